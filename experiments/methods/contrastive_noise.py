"""Contrastive noise optimisation: move a group's initial latents until the first predictions are less alike."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from experiments.methods.method import GroupResult, Method, sample
from experiments.methods.setting import Setting, numbers
from experiments.methods.steps import Prediction, initial_noise, predictions, unpacked
from experiments.prompts import Group
from negtome.validation import check_float, check_int

#: Which contrast is minimised; see `contrast`.
Loss = Literal["paper", "released"]
LOSSES = get_args(Loss)
#: Adam's epsilon. The gradient is for the clean latents instead of the noise; they differ by a factor, which Adam
#: cancels but for epsilon. The factor is 14.6 at the first step of the released code's models, whose epsilon is 1e-8.
EPSILON = 1e-8 / 14.6


def contrast(latents: torch.Tensor, first: torch.Tensor, temperature: float, gamma: float, loss: Loss) -> torch.Tensor:
    """Return the InfoNCE loss, which holds each of B latents to its first value and apart from the others.

    It is the mean of

        -log(exp(cos(x_i, first_i) / (gamma T)) / sum_j exp(cos(x_i, x_j) / T))

    Args:
        latents, first: [B, c, h, w].
        temperature: T.
        gamma: the lower, the more an image is held to its first value.
        loss: "paper": cosines are of all latents of an image. "released": of the c numbers at each spatial position,
            over which the loss is averaged, and the sum's term j = i is the numerator.
    """
    B = len(latents)
    x, y = ((z if loss == "released" else z.reshape(B, -1, 1, 1)).flatten(2) for z in (latents, first))  # [B, C, P]
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    held = torch.einsum("bcp,bcp->pb", x, y) / (gamma * temperature)
    alike = torch.einsum("bcp,dcp->pbd", x, x) / temperature
    if loss == "released":
        alike = torch.where(torch.eye(B, dtype=torch.bool, device=x.device), held.diag_embed(), alike)
    return (alike.logsumexp(dim=2) - held).mean()


class _Predicted(Exception):
    """Ends a call of a pipeline after its first prediction."""


@dataclass
class ContrastiveNoise(Method):
    """Contrastive noise optimisation (Kim, Um and Ye, CNO, arXiv 2510.03813).

    Adam minimises `contrast` of the clean latents that the first step predicts, averaged to `window` x `window`
    positions. Every step calls the denoiser again, without a gradient through it: clean latents are taken to move as
    their noise does. The released code takes the gradient through the network, unlike the paper; that is not offered
    here. Every step costs one call of the denoiser, and encodes the prompt again.

    Attributes:
        inner_steps: of Adam; 3 in the released scripts for SDXL and Stable Diffusion 1.5, in groups of 5.
        learning_rate: of Adam, at least 0, the distance that each number of the noise moves in a step; 0.01 in the
            released scripts.
        temperature: T, above 0; 0.1 in both.
        gamma: above 0; None: the paper's 1 / (T ln(B - 1) + 1) for B images. The released scripts have 1.
        window: at least 1; 16 in both. Smaller latents are not averaged.
        loss: as of `contrast`.
    """

    title = "contrastive noise"
    columns = (*numbers("inner_steps", "learning_rate"), Setting("loss"))
    version = 1

    name: str
    inner_steps: int = 3
    learning_rate: float = 0.01
    temperature: float = 0.1
    gamma: float | None = None
    window: int = 16
    loss: Loss = "paper"

    def __post_init__(self) -> None:
        for name, least in (("inner_steps", 0), ("window", 1)):
            setattr(self, name, check_int(f"method.{name}", getattr(self, name), least, 1000))
        for name, low in (("learning_rate", 0.0), ("temperature", 1e-3)):
            setattr(self, name, check_float(f"method.{name}", getattr(self, name), low, math.inf))
        self.gamma = None if self.gamma is None else check_float("method.gamma", self.gamma, 1e-3, math.inf)
        if self.loss not in LOSSES:
            raise ValueError(f"method.loss must be one of {LOSSES}, got {self.loss!r}")

    def generate(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> GroupResult:
        if group.size < 2 or not self.inner_steps or not self.learning_rate:
            return super().generate(pipe, group, call)
        noise, clean = self._first(pipe, group, call, None)
        dtype, first = noise.dtype, clean
        noise = noise.float().requires_grad_()
        adam, losses = torch.optim.Adam([noise], lr=self.learning_rate, eps=EPSILON), []
        for step in range(self.inner_steps):
            if step:
                _, clean = self._first(pipe, group, call, noise.detach().to(dtype))
            clean.requires_grad_()
            with torch.enable_grad():
                loss = self._loss(clean, first)
                (noise.grad,) = torch.autograd.grad(loss, clean)
            adam.step()
            losses.append(loss.item())
        with initial_noise(pipe, lambda _: noise.detach().to(dtype)):
            images = sample(pipe, group, call)
        return GroupResult(images, {"losses": [round(loss, 4) for loss in losses]})

    def _loss(self, clean: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        size = min(clean.shape[2], self.window), min(clean.shape[3], self.window)
        gamma = 1 / (self.temperature * math.log(len(clean) - 1) + 1) if self.gamma is None else self.gamma
        moved, start = (F.adaptive_avg_pool2d(latents, size) for latents in (clean, first.detach()))
        return contrast(moved, start, self.temperature, gamma, self.loss)

    @staticmethod
    def _first(
        pipe: Any, group: Group, call: Mapping[str, Any], noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a call's initial noise and the clean latents that its first step predicts, [K, c, h, w].

        Args:
            noise: replaces the pipeline's noise; None: the pipeline's.
        """
        initial: list[torch.Tensor] = []
        predicted: list[torch.Tensor] = []

        def begin(default: torch.Tensor) -> torch.Tensor:
            initial.append(default if noise is None else noise)
            return initial[0]

        def end(prediction: Prediction) -> torch.Tensor:
            height, width = (side * pipe.vae_scale_factor for side in initial[0].shape[2:])
            predicted.append(unpacked(pipe, prediction.clean, height, width).clone())
            raise _Predicted

        with initial_noise(pipe, begin), predictions(pipe, end), contextlib.suppress(_Predicted):
            sample(pipe, group, call)
        return initial[0], predicted[0]
