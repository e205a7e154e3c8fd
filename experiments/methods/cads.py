"""Condition-annealed sampling: noise on the prompt's embeddings that fades during sampling."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experiments.methods.method import Method, MethodContext, generator_of
from experiments.methods.setting import Setting, numbers
from experiments.methods.steps import denoiser_calls
from experiments.prompts import Group
from negtome.call_inspection import DenoiserCall, with_value
from negtome.sites import find_architecture
from negtome.validation import check_float

RESCALES, HALVES = ("sample", "token", "none"), ("conditional", "both")


def share_of_prompt(t: float, tau1: float, tau2: float) -> float:
    """Return gamma: 1 up to tau1, 0 from tau2 on, falling linearly between; t = 1 is pure noise."""
    return 1.0 if t <= tau1 else 0.0 if t >= tau2 else (tau2 - t) / (tau2 - tau1)


def anneal(
    prompt: torch.Tensor, noise: torch.Tensor, gamma: float, scale: float, mixing: float, rescale: str
) -> torch.Tensor:
    """Add noise to embeddings of a prompt.

    Args:
        prompt: y, [rows, ..., C].
        noise: n, like y, of unit variance.
        gamma: share of the prompt's variance.
        scale, mixing, rescale: of `CADS`.

    Returns:
        The noised embeddings, of the prompt's shape and dtype.
    """
    y = prompt.float()
    noised = math.sqrt(gamma) * y + scale * math.sqrt(1 - gamma) * noise
    if rescale != "none":
        axes = tuple(range(1, y.dim())) if rescale == "sample" else (-1,)
        (std, mean), (own_std, own_mean) = (torch.std_mean(x, dim=axes, keepdim=True) for x in (y, noised))
        noised = mixing * ((noised - own_mean) / own_std * std + mean) + (1 - mixing) * noised
    return noised.to(prompt.dtype)


@dataclass
class CADS(Method):
    """Condition-annealed sampling (Sadat et al., arXiv 2310.17347): noise on the prompt's embeddings that fades.

    At time t, the timestep over 1000, y2 replaces each embedding y of the prompt, tokens and pooled:

        y1 = sqrt(gamma) y + noise_scale sqrt(1 - gamma) n,  gamma = 1 for t <= tau1, 0 for t >= tau2, linear between
        y2 = mixing ((y1 - mean(y1)) / std(y1) std(y) + mean(y)) + (1 - mixing) y1

    The noise n differs for each image, embedding and step. For t >= tau2 nothing of the prompt is left; with mixing = 1
    noise_scale has no effect there, only between tau1 and tau2.

    The paper noises the condition. Its code takes mean and std over the whole tensor, so that the images of a batch
    depend on each other; here they are taken for each image, as in ComfyUI-CADS. Ports, and the CADS baseline of
    NegToMe's authors, also noise the unconditional half; the latter rescales every token by itself.

    Attributes:
        noise_scale: s, at least 0, which is off; published: 0.25 for Stable Diffusion, 0.1 to 0.7 elsewhere.
        tau1, tau2: in [0, 1], tau1 <= tau2; published: 0.6 and 0.9; None for tau2 means 0.9.
        mixing: psi, in [0, 1]; published: 1.
        rescale: the axes of mean and std: "sample", tokens and channels of an image (default); "token", the channels of
            each token; or "none" for no rescaling.
        halves: which halves of a guided batch are noised: "conditional" (default), or "both", with different noise.
    """

    title = "CADS"
    columns = (*numbers("noise_scale", "tau1", "tau2", "mixing"), Setting("rescale"), Setting("halves"))
    version = 1

    name: str
    noise_scale: float = 0.25
    tau1: float = 0.6
    tau2: float | None = None
    mixing: float = 1.0
    rescale: str = "sample"
    halves: str = "conditional"

    def __post_init__(self) -> None:
        self.noise_scale = check_float("method.noise_scale", self.noise_scale, 0, math.inf)
        self.tau2 = check_float("method.tau2", 0.9 if self.tau2 is None else self.tau2, 0, 1)
        self.tau1 = check_float("method.tau1", self.tau1, 0, self.tau2)
        self.mixing = check_float("method.mixing", self.mixing, 0, 1)
        for setting, choices in (("rescale", RESCALES), ("halves", HALVES)):
            if (value := getattr(self, setting)) not in choices:
                raise ValueError(f"method.{setting} must be one of {', '.join(choices)}, got {value!r}")

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        if find_architecture(pipe).list_inputs:
            raise ValueError(
                f"method={self.name} is for models that take their texts as one tensor, got a {type(pipe).__name__}, "
                "which takes a list: leave it out for this model"
            )
        generators: dict[torch.device, torch.Generator] = {}

        def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
            gamma = share_of_prompt(denoiser.timestep / 1000, self.tau1, self.tau2)
            if gamma == 1:
                return arguments
            for name, prompt in denoiser.prompts.items():
                if "mask" in name:
                    continue
                if prompt.device not in generators:
                    generators[prompt.device] = generator_of(group, "cads", device=prompt.device)
                noised = self._noised(prompt, denoiser, gamma, group.size, generators[prompt.device])
                arguments = with_value(arguments, name, noised)
            return arguments

        with denoiser_calls(pipe, before) if self.noise_scale else contextlib.nullcontext():
            yield MethodContext(dict(call))

    def _noised(
        self, prompt: torch.Tensor, denoiser: DenoiserCall, gamma: float, size: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Return embeddings [rows, ...] with noise on the chosen halves, the same for all groups."""
        parts = list(prompt.expand(denoiser.rows, *prompt.shape[1:]).chunk(denoiser.cfg_chunks))
        for half in denoiser.conditional if self.halves == "conditional" else range(denoiser.cfg_chunks):
            shape = (size, *prompt.shape[1:])
            noise = torch.randn(shape, generator=generator, device=prompt.device)
            noise = noise.repeat(denoiser.images // size, *(1,) * (prompt.dim() - 1))
            parts[half] = anneal(parts[half], noise, gamma, self.noise_scale, self.mixing, self.rescale)
        return torch.cat(parts)
