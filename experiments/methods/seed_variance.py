"""Seed variance enhancer: noise on a random part of the prompt's embedding, in the first steps only."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experiments.methods.method import Method, MethodContext
from experiments.methods.setting import numbers
from experiments.methods.steps import denoiser_calls, drawn_once, saturated, with_tokens
from experiments.prompts import Group
from negtome.call_inspection import DenoiserCall
from negtome.validation import check_float


def disturb(
    tokens: torch.Tensor, noise: torch.Tensor, chosen: torch.Tensor, strength: float, relative: bool
) -> torch.Tensor:
    """Add noise to the chosen numbers of a prompt's tokens; tokens of zeros, which are padding, stay.

    Args:
        tokens: y, [images, L, C].
        noise: u, like y, uniform in [-1, 1].
        chosen: m, like y, bool.
        strength, relative: of `SeedVariance`.

    Returns:
        y + strength * m * u, or y + strength * std(y) * m * u, of the shape and dtype of y; std is over all tokens of
        an image that are not padding.
    """
    y = tokens.float()
    text = (y != 0).any(dim=-1, keepdim=True)  # [images, L, 1]
    scale = strength * torch.ones(len(y), 1, 1, device=y.device)
    if relative:
        count = (y.shape[-1] * text.sum(dim=(1, 2), keepdim=True)).clamp(min=1)  # padding alone has no deviation
        mean = y.sum(dim=(1, 2), keepdim=True) / count
        squares = torch.where(text, (y - mean).square(), 0)
        scale = scale * (squares.sum(dim=(1, 2), keepdim=True) / count).sqrt()
    noised = saturated(y + scale * noise * chosen, tokens.dtype)
    return torch.where(text, noised, tokens)


@dataclass
class SeedVariance(Method):
    """The community's seed variance enhancer, a ComfyUI node (ChangeTheConstants/SeedVarianceEnhancer, MIT-0).

    It is the common remedy for few-step models whose images hardly depend on the seed. `disturb` changes the prompt's
    tokens, once for each image, and the denoiser gets the result in the first steps; after that it gets the prompt.
    Pooled embeddings and the unconditional half stay. There is no paper.

    The node's strength is an absolute number, 20 for Z-Image Turbo, and its log suggests a tenth to ten times the
    embedding's standard deviation; here `relative` makes that deviation the unit. The node adds equal noise to all
    images of a batch, and its users change the seed for each image; here each image has different noise. The node can
    also protect a part of the prompt or add noise in the last steps, which is left out.

    Attributes:
        strength: at least 0, which is off.
        relative: whether strength counts in standard deviations of the prompt's tokens.
        noised_share: the probability in [0, 1] that a number is chosen; 0.5 in the node.
        early_share: the share of the steps, from the first, that get noise, in [0, 1]; 0.2 in the node. Above 0, it is
            at least one step.
    """

    title = "seed variance enhancer"
    columns = numbers("strength", "noised_share", "early_share")
    version = 1

    name: str
    strength: float = 4.0
    relative: bool = True
    noised_share: float = 0.5
    early_share: float = 0.2

    def __post_init__(self) -> None:
        self.strength = check_float("method.strength", self.strength, 0, math.inf)
        for name in ("noised_share", "early_share"):
            setattr(self, name, check_float(f"method.{name}", getattr(self, name), 0, 1))

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        step = -1

        def draw(shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            noise = 2 * torch.rand(shape, generator=generator) - 1
            return noise, torch.rand(shape, generator=generator) < self.noised_share

        noise_for = drawn_once(group, "seed variance", draw)

        def change(tokens: torch.Tensor) -> torch.Tensor:
            noise, chosen = noise_for(tokens)
            return disturb(tokens, noise, chosen, self.strength, self.relative)

        def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
            nonlocal step
            step += not denoiser.again
            steps = getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
            early = round(self.early_share * steps, 6)  # 0.28 * 25 is above 7 in floating point
            return with_tokens(denoiser, arguments, change) if step < early else arguments

        is_on = self.strength and self.noised_share and self.early_share
        with denoiser_calls(pipe, before) if is_on else contextlib.nullcontext():
            yield MethodContext(dict(call))
