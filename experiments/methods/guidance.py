"""Less guidance: the cheapest way to more diverse images, and the one that other methods have to beat."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experiments.methods.method import Method, MethodContext
from experiments.methods.setting import Setting, numbers
from experiments.methods.steps import denoiser_calls, levels, some_rows
from experiments.prompts import Group
from negtome.call_inspection import DenoiserCall
from negtome.sites import find_architecture
from negtome.validation import check_float


def check_guided(method: str, call: Mapping[str, Any]) -> None:
    """Raise ValueError for a model that is called without a guidance scale above 1."""
    if not (call.get("guidance_scale") or 0) > 1:
        raise ValueError(
            f"method={method} needs a model that is called with a guidance_scale above 1, got "
            f"{call.get('guidance_scale')}: leave the method out for this model"
        )


@dataclass
class LowerGuidance(Method):
    """Another scale of classifier-free guidance (arXiv 2207.12598), or of distilled guidance.

    Attributes:
        scale: w in uncond + w (cond - uncond), at least 1, which is no guidance; None: the model's.
    """

    title = "lower guidance"
    columns = numbers("scale")
    version = 1

    name: str
    scale: float | None = None

    def __post_init__(self) -> None:
        self.scale = None if self.scale is None else check_float("method.scale", self.scale, 1, math.inf)

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        check_guided(self.name, call)
        yield MethodContext(dict(call) if self.scale is None else {**call, "guidance_scale": self.scale})


@dataclass
class IntervalGuidance(Method):
    """Guidance in an interval of noise levels only (Kynkaanniemi et al., arXiv 2404.07724).

    Outside the interval, a UNet that is guided in one batch computes only the conditional half. A model with distilled
    guidance, such as FLUX.1-dev, gets `outside` as its scale there.

    Attributes:
        sigma_range: (low, high], the interval with guidance, in noise over signal, EDM's noise levels; None for no
            upper end. For SDXL the paper has (0.28, 5.42] with a scale of about 15.
        scale: of the guidance inside, at least 1; None: the model's.
        outside: the distilled scale outside, at least 1, which has almost no effect.
    """

    title = "interval guidance"
    columns = (Setting("sigma_range", ("sigma_low", "sigma_high"), "sigma", number=True), *numbers("scale"))
    version = 1

    name: str
    sigma_range: tuple[float, float | None] = (0.28, 5.42)
    scale: float | None = None
    outside: float = 1.0

    def __post_init__(self) -> None:
        low, high = (None if end is None else check_float("each end of method.sigma_range", end, 0, math.inf)
                     for end in self.sigma_range)  # fmt: skip
        if low is None or (high is not None and low > high):
            raise ValueError(f"method.sigma_range must be (low, high) with low <= high, got {tuple(self.sigma_range)}")
        self.sigma_range = low, high
        self.scale = None if self.scale is None else check_float("method.scale", self.scale, 1, math.inf)
        self.outside = check_float("method.outside", self.outside, 1, math.inf)

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        check_guided(self.name, call)
        architecture = find_architecture(pipe)
        if architecture.guidance != "batch" and not getattr(pipe.transformer.config, "guidance_embeds", False):
            raise ValueError(
                f"method={self.name} is for models that are guided in one batch, as SDXL, or by distillation, as "
                f"FLUX.1-dev, got a {type(pipe).__name__} that is neither: leave the method out for this model"
            )
        low, high = self.sigma_range
        left_out = False  # whether the running call is without the unconditional half

        def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
            nonlocal left_out
            signal, noise = levels(pipe.scheduler, denoiser.time)
            inside = noise > low * signal and (high is None or noise <= high * signal)
            left_out = not inside and denoiser.cfg_chunks == 2
            if left_out:
                return some_rows(pipe, denoiser, arguments, slice(denoiser.images, None))
            if not inside and (scale := arguments.get("guidance")) is not None:
                return {**arguments, "guidance": torch.full_like(scale, self.outside)}
            return arguments

        def after(denoiser: DenoiserCall, output: torch.Tensor) -> torch.Tensor:
            return torch.cat([output, output]) if left_out else output  # w (cond - cond) adds nothing

        with denoiser_calls(pipe, before, after):
            yield MethodContext(dict(call) if self.scale is None else {**call, "guidance_scale": self.scale})
