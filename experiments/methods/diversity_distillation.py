"""Diversity distillation: a base model takes the first steps, in finer ones, and the few-step model the others."""

import contextlib
import functools
import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.methods.method import GroupResult, Method, sample
from experiments.methods.setting import numbers
from experiments.methods.steps import replaced
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


class _Handed(Exception):
    """Ends the base model's call where the other model takes over."""


@functools.lru_cache(maxsize=1)
def _load(kind: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    denoiser: torch.nn.Module = kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    return denoiser.eval().to(device)


@dataclass
class DiversityDistillation(Method):
    """Diversity distillation (Gandikota and Bau, arXiv 2503.10637): the base model decides the layout.

    Of a call of n steps, the base model makes the first `base_steps`, each as `substeps` steps of a schedule of
    substeps * n; its own guidance applies there. The model makes the others. In the authors' scripts (project page
    distillation.baulab.info), SDXL takes the first of 4 steps as 5 of its 20, with a guidance scale of 7, and SDXL-DMD2
    the other three without guidance.

    Ours: the base model is a denoiser that uses the model's text encoders, autoencoder and scheduler. Without `base` it
    is the model itself, as for the mini models, of which no distilled version exists: what is left of the method is a
    weaker guidance and finer steps at the beginning. Both schedules must have the level of noise where the models
    change, as flows do, and `timestep_spacing="trailing"`. The model's own first steps are computed and dropped.

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
        return {**super().settings(), "base_weights": weights_digest(self._folder) if self._folder else None}

    def generate(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> GroupResult:
        if not self.base_steps:
            return super().generate(pipe, group, call)
        steps = call.get("num_inference_steps")
        if steps is None:
            steps = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
        if self.base_steps > steps:
            raise ValueError(f"method.base_steps must be at most {steps}, the steps of the call, got {self.base_steps}")
        latents, timestep = self._begin(pipe, group, call, steps)
        taken = 0
        original = pipe.scheduler.step

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal taken
            output, *rest = original(*args, **kwargs)
            taken += 1
            if taken != self.base_steps:
                return (output, *rest)
            self._check_level(pipe, timestep)
            return (latents.to(output), *rest)

        with replaced(pipe.scheduler, "step", step):
            return GroupResult(sample(pipe, group, call), {})

    def _begin(self, pipe: Any, group: Group, call: Mapping[str, Any], steps: int) -> tuple[torch.Tensor, float | None]:
        """Return the base model's latents where the other model takes over, and their timestep; None: the end."""
        base_call = {**call, "num_inference_steps": self.substeps * steps}
        if self.base_guidance is not None:
            base_call["guidance_scale"] = self.base_guidance
        last, taken, latents = self.substeps * self.base_steps, 0, torch.empty(0)
        original = pipe.scheduler.step

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal taken, latents
            result = original(*args, **kwargs)
            taken += 1
            if taken == last:
                latents = result[0]
                raise _Handed
            return result

        with self._base_model(pipe), replaced(pipe.scheduler, "step", step), contextlib.suppress(_Handed):
            sample(pipe, group, base_call)
        return latents, self._timestep(pipe, last)

    @staticmethod
    def _timestep(pipe: Any, taken: int) -> float | None:
        timesteps = pipe.scheduler.timesteps.tolist()
        return timesteps[taken] if taken < len(timesteps) else None

    def _check_level(self, pipe: Any, timestep: float | None) -> None:
        """Raise ValueError if the base model's latents have another level of noise than the model's next step."""
        expected = self._timestep(pipe, self.base_steps)
        if expected != timestep and (expected is None or timestep is None or abs(expected - timestep) > 1):
            raise ValueError(
                f"method={self.name} needs schedules that meet, got timesteps {timestep} and {expected} where the "
                'models change: choose timestep_spacing="trailing" for the scheduler'
            )

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
        other = _load(type(denoiser), self._folder, denoiser.dtype, denoiser.device)
        for setting in SHAPES:
            if (here := denoiser.config.get(setting)) != (there := other.config.get(setting)):
                raise ValueError(
                    f"method.base must fit the model, got {setting}={there} in {self.base}, expected {here}: choose "
                    "the model from which this one was distilled"
                )
        setattr(pipe, name, other)
        try:
            yield
        finally:
            setattr(pipe, name, denoiser)
