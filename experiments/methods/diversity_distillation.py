"""Diversity distillation: a base model takes the first steps, in finer ones, and the few-step model the others."""

import contextlib
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.methods.method import GroupResult, Method, sample
from experiments.methods.setting import numbers
from experiments.methods.steps import denoiser_calls, replaced
from experiments.prompts import Group
from negtome.sites import find_architecture
from negtome.validation import check_float, check_int

#: Settings of a denoiser that another one must share to take its place.
SHAPES = ("in_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim")
#: Bytes of a file that are hashed at once.
BLOCK = 1 << 16
#: Folders of denoisers in the diffusers layout.
DENOISERS = ("unet", "transformer")


def weights_digest(folder: Path) -> str:
    """Return 16 hex digits of a SHA-256 over a model's files, for the run's identity.

    Of large files it hashes the size and 16 blocks of 64 KiB, so that 24 GB take no time; fine-tuned weights differ in
    every block.
    """
    digest = hashlib.sha256()
    for path in sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for block in range(16):
                file.seek(block * max(0, size - BLOCK) // 15)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


class _Stop(Exception):
    """Ends a call of the pipeline whose images are not needed."""


@functools.lru_cache(maxsize=1)
def _load(kind: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    denoiser: torch.nn.Module = kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    return denoiser.eval().to(device)


@dataclass
class DiversityDistillation(Method):
    """Diversity distillation (Gandikota and Bau, arXiv 2503.10637): the base model decides the layout.

    Of a call of n steps, the model takes over at step `base_steps`. Before that, the base model makes the steps of a
    schedule of substeps * n, up to the timestep that is closest to the model's; its guidance applies there. The
    authors' code (rohitgandikota/distillation, MIT) takes the closest timestep too. Its function has a base of 20 steps
    and a guidance scale of 7 for the first of 4 steps; its command line has a base of 4 steps.

    Ours: the base model is a denoiser that uses the model's text encoders, autoencoder and scheduler, but DDIM where
    the model has a scheduler for consistency models. Without `base` it is the model itself, as for the mini models, of
    which no distilled version exists. The method then reduces to weaker guidance and finer steps at the beginning.
    The model's first steps are computed and dropped, which takes time; a multistep scheduler remembers them.

    Attributes:
        base_steps: k, at least 0, which is off; published 1. At most the steps of the call.
        substeps: at least 1; published 5.
        base_guidance: guidance scale of the base model, at least 0; None: the call's; published 7.
        base: folder of a pipeline in the diffusers layout; None: the model itself.
    """

    title = "diversity distillation"
    columns = numbers("base_steps", "substeps", "base_guidance")
    version = 1

    name: str
    base_steps: int = 1
    substeps: int = 5
    base_guidance: float | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        self.base_steps = check_int("method.base_steps", self.base_steps, 0)
        self.substeps = check_int("method.substeps", self.substeps, 1, 1000)
        if self.base_guidance is not None:
            self.base_guidance = check_float("method.base_guidance", self.base_guidance, 0, math.inf)
        if self.base is not None and self._folder is None:
            raise FileNotFoundError(
                f"method.base must be a folder of a pipeline, with a folder unet or transformer, got {self.base}: "
                "download the base model, or give method.base=null for the model itself"
            )

    @property
    def _folder(self) -> Path | None:
        """Return the folder of the base model's denoiser; None if there is none."""
        folders = [Path(self.base).expanduser() / name for name in DENOISERS] if self.base else []
        return next((folder for folder in folders if (folder / "config.json").is_file()), None)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "base": weights_digest(self._folder) if self._folder else None}

    def generate(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> GroupResult:
        if not self.base_steps:
            return super().generate(pipe, group, call)
        steps = call.get("num_inference_steps")
        if steps is None:
            steps = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
        if self.base_steps > steps:
            raise ValueError(f"method.base_steps must be at most {steps}, the steps of the call, got {self.base_steps}")
        if pipe.scheduler.order != 1:  # the second half of a step would not begin at the base model's latents
            raise ValueError(
                f"method={self.name} needs a scheduler with one denoiser call in a step, such as "
                f"EulerDiscreteScheduler, got a {type(pipe.scheduler).__name__}: choose another one for the model"
            )
        latents = self._begin(pipe, group, call, steps)
        taken = 0

        def hand_over(output: torch.Tensor) -> torch.Tensor:
            nonlocal taken
            taken += 1
            return latents.to(output) if taken == self.base_steps else output

        # The model's initial latents are dropped; other seeds keep its noise apart from the base model's.
        seeds = [seed + (1 << 32) for seed in group.image_seeds()]
        with _step_results(pipe, hand_over):
            return GroupResult(sample(pipe, group, call, seeds), {})

    def _begin(self, pipe: Any, group: Group, call: Mapping[str, Any], steps: int) -> torch.Tensor:
        """Return the base model's latents where the other model takes over."""
        base_call = {**call, "num_inference_steps": self.substeps * steps}
        if self.base_guidance is not None:
            base_call["guidance_scale"] = self.base_guidance
        coming = _timesteps(pipe, group, call)[self.base_steps :]
        taken, latents = 0, torch.empty(0)

        def stop(output: torch.Tensor) -> torch.Tensor:
            nonlocal taken, latents
            taken += 1
            latents = output
            if coming and taken == _closest(pipe.scheduler.timesteps, coming[0]):
                raise _Stop
            return output

        with self._base_model(pipe), _base_scheduler(pipe), _step_results(pipe, stop), contextlib.suppress(_Stop):
            sample(pipe, group, base_call)
        return latents

    @contextlib.contextmanager
    def _base_model(self, pipe: Any) -> Iterator[None]:
        """Put the base model's denoiser in the place of the pipeline's."""
        if self._folder is None:
            yield
            return
        name = find_architecture(pipe).denoiser
        denoiser = getattr(pipe, name)
        if self._folder.name != name:
            raise ValueError(f"method.base must fit the model, whose denoiser is a {name}, got a {self._folder.name}")
        if hasattr(denoiser, "_hf_hook"):
            raise ValueError("method.base needs both models on the device, got offload=true: set offload=false")
        other = _load(type(denoiser), self._folder, denoiser.dtype, denoiser.device)
        for setting in SHAPES:
            if (expected := denoiser.config.get(setting)) != (actual := other.config.get(setting)):
                raise ValueError(
                    f"method.base must fit the model, got {setting}={actual} in {self.base}, expected {expected}: "
                    "choose the model from which this one was distilled"
                )
        setattr(pipe, name, other)
        try:
            yield
        finally:
            setattr(pipe, name, denoiser)


@contextlib.contextmanager
def _base_scheduler(pipe: Any) -> Iterator[None]:
    """Replace a scheduler for consistency models, which sample no other model, by DDIM."""
    from diffusers import DDIMScheduler  # not with the package, which is imported for a command's help

    scheduler = pipe.scheduler
    if type(scheduler).__name__ in ("LCMScheduler", "TCDScheduler"):
        pipe.scheduler = DDIMScheduler.from_config(scheduler.config)
    try:
        yield
    finally:
        pipe.scheduler = scheduler


@contextlib.contextmanager
def _step_results(pipe: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Change the latents that each step of the scheduler returns."""
    original = pipe.scheduler.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        latents, *rest = original(*args, **kwargs)
        return (change(latents), *rest)

    with replaced(pipe.scheduler, "step", step):
        yield


def _timesteps(pipe: Any, group: Group, call: Mapping[str, Any]) -> list[float]:
    """Return the timesteps of a call, which ends before the denoiser is called."""

    def stop(*_: Any) -> dict[str, Any]:
        raise _Stop

    with denoiser_calls(pipe, stop), contextlib.suppress(_Stop):
        sample(pipe, group, call)
    return [float(timestep) for timestep in pipe.scheduler.timesteps]


def _closest(timesteps: torch.Tensor, timestep: float) -> int:
    """Return how many steps lead to the timestep that is closest to another, at least 1."""
    return max(1, int((timesteps - timestep).abs().argmin()))
