"""Adaptive projected guidance: guidance without its part along the prediction, which saturates images."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experiments.methods.method import Method, MethodContext
from experiments.methods.setting import Setting, numbers
from experiments.methods.steps import clean_of_call, denoiser_calls, levels
from experiments.prompts import Group
from negtome.call_inspection import DenoiserCall
from negtome.sites import find_architecture
from negtome.validation import check_float

VARIANTS = ("paper", "diffusers")


def projected(update: torch.Tensor, along: torch.Tensor, eta: float, norm_threshold: float | None) -> torch.Tensor:
    """Return updates [rows, ...] cut to a norm, with their part parallel to `along` times eta, row by row."""
    rows, direction = update.flatten(1), torch.nn.functional.normalize(along.flatten(1), dim=1)
    if norm_threshold is not None:
        rows = rows * (norm_threshold / rows.norm(dim=1, keepdim=True)).clamp(max=1)
    parallel = (rows * direction).sum(dim=1, keepdim=True) * direction
    return (rows + (eta - 1) * parallel).view_as(update)


@dataclass
class APG(Method):
    """Adaptive projected guidance, APG (Sadat et al., arXiv 2410.02416), for models that are guided in one batch.

    With the predictions c with the prompt and u without it in step i,

        d_i = c - u + momentum d_(i-1)
        e = d_i min(1, norm_threshold / |d_i|),  e = e_parallel + e_orthogonal to c
        guided = c + (w - 1) (e_orthogonal + eta e_parallel)

    where norm and projection are over all latents of an image. The predictions are clean latents, as in the paper's
    formulas; its authors say that they work best. The guider of diffusers uses the model's output instead, noise or
    velocity, and begins from u: u + w (e_orthogonal + eta e_parallel). Both are equal only without momentum, threshold
    and projection.

    Attributes:
        eta: the share of the parallel part that is kept, at least 0; published: 0. With 1, and neither threshold nor
            momentum, it is ordinary guidance, and the model is unchanged.
        norm_threshold: r, above 0, in units of the denoiser's latents; None for no threshold. It grows with the root of
            their number. Published: 15 for SDXL, whose images of 1024 x 1024 pixels have 65536; 7.5 for Stable
            Diffusion 2.1.
        momentum: beta, between -1 and 1; published: -0.5 for SDXL, -0.75 for others.
        scale: w, at least 1, which is no guidance; None: the model's. Published: 15 for SDXL.
        variant: "paper" (default), or "diffusers", as above.
    """

    title = "APG"
    columns = (*numbers("eta", "norm_threshold", "momentum", "scale"), Setting("variant"))
    version = 1

    name: str
    eta: float = 0.0
    norm_threshold: float | None = 15.0
    momentum: float = -0.5
    scale: float | None = None
    variant: str = "paper"

    def __post_init__(self) -> None:
        self.eta = check_float("method.eta", self.eta, 0, math.inf)
        if self.norm_threshold is not None and not check_float(
            "method.norm_threshold", self.norm_threshold, 0, math.inf
        ):
            raise ValueError("method.norm_threshold must be above 0, or null for none, got 0")
        self.momentum = check_float("method.momentum", self.momentum, -1, 1)
        self.scale = None if self.scale is None else check_float("method.scale", self.scale, 1, math.inf)
        if self.variant not in VARIANTS:
            raise ValueError(f"method.variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        if find_architecture(pipe).guidance != "batch":
            raise ValueError(
                f"method={self.name} is for models that are guided in one batch, as SDXL, got a {type(pipe).__name__}: "
                "leave it out for this model"
            )
        if call.get("guidance_rescale"):
            raise ValueError(
                f"method={self.name} is no guidance to be rescaled, got guidance_rescale={call['guidance_rescale']}: "
                "leave that out of model.call"
            )
        levels(pipe.scheduler)  # before anything is generated
        inputs: dict[str, Any] = {}  # of the denoiser, in the running step
        schedule, update = None, None  # timesteps and d of the pipeline's running call

        def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
            nonlocal inputs
            inputs = arguments
            return arguments

        def after(denoiser: DenoiserCall, output: torch.Tensor) -> torch.Tensor:
            nonlocal schedule, update
            if denoiser.cfg_chunks != 2:
                return output
            if pipe.scheduler.timesteps is not schedule:  # a new tensor in every call of the pipeline
                schedule, update = pipe.scheduler.timesteps, None
            without, prompted = output.float().chunk(2)
            along, slope = prompted, 1.0
            if self.variant == "paper":
                clean, slope = clean_of_call(pipe, denoiser, inputs, output)
                along = clean[denoiser.images :]
            update = (prompted - without) / slope + (0 if update is None else self.momentum * update)
            step = slope * projected(update, along, self.eta, self.norm_threshold)
            w = pipe.guidance_scale
            guided = prompted + (w - 1) * step if self.variant == "paper" else without + w * step
            return torch.cat([guided, guided]).to(output.dtype)  # g + w (g - g) is g

        is_off = self.eta == 1 and self.norm_threshold is None and self.momentum == 0
        with contextlib.nullcontext() if is_off else denoiser_calls(pipe, before, after):
            yield MethodContext(dict(call) if self.scale is None else {**call, "guidance_scale": self.scale})
