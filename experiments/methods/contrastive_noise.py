"""Contrastive noise optimisation: a group's noises are moved until what they are first denoised to is less alike."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F

from experiments.methods.method import GroupResult, Method, Setting, sample
from experiments.methods.steps import Prediction, initial_noise, predictions, unpacked
from experiments.prompts import Group
from negtome.validation import check_float, check_int

#: Which contrast is minimised; see `contrast`.
Loss = Literal["paper", "released"]
LOSSES = get_args(Loss)
#: Adam's, for the gradient to clean latents in the place of that to the noise. How fast the former move with the latter
#: is but a factor, which Adam takes out; at the first step of the released code's models, whose epsilon is 1e-8, 14.6.
EPSILON = 1e-8 / 14.6


def contrast(latents: torch.Tensor, first: torch.Tensor, temperature: float, gamma: float, loss: Loss) -> torch.Tensor:
    """Return the InfoNCE loss of B latents, each held to what it was and pushed from the others: the mean over i of

        -log(exp(cos(x_i, first_i) / (gamma T)) / sum_j exp(cos(x_i, x_j) / T))

    Args:
        latents, first: [B, c, h, w].
        temperature: T.
        gamma: the lower, the more an image is held to what it was.
        loss: "paper": cosines are of whole latents. "released": of the c numbers of each place, over which the loss is
            averaged, and in the sum j = i stands with the numerator's term.
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

    Adam minimises `contrast` of the clean latents that the first step predicts, averaged to `window` x `window` places.
    The network is asked anew at every step, and has no gradient: clean latents move as their noise does. The released
    code differs from the paper in that its gradient goes through the network, which is not offered here. Every step
    costs one call of the denoiser; the prompt is encoded anew.

    Attributes:
        inner_steps: of Adam, 3 in the released scripts for SDXL and Stable Diffusion 1.5, in groups of 5.
        learning_rate: of Adam, at least 0; 0.01 in the released scripts. So far a number of the noise moves in a step.
        temperature: T, above 0; 0.1 in both.
        gamma: above 0; None: the paper's 1 / (T ln(B - 1) + 1) for B images. The released scripts have 1.
        window: at least 1, and as much as the latents have where they have less; 16 in both.
        loss: as of `contrast`.
    """

    title: ClassVar[str] = "contrastive noise"
    columns: ClassVar[tuple[Setting, ...]] = (
        Setting("inner_steps", number=True),
        Setting("learning_rate", number=True),
        Setting("loss"),
    )
    version: ClassVar[int] = 1

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
        for name, least in (("learning_rate", 0), ("temperature", 1e-3)):
            setattr(self, name, check_float(f"method.{name}", getattr(self, name), least, math.inf))
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
        size = [min(side, self.window) for side in clean.shape[2:]]
        gamma = 1 / (self.temperature * math.log(len(clean) - 1) + 1) if self.gamma is None else self.gamma
        pooled = (F.adaptive_avg_pool2d(latents, size) for latents in (clean, first.detach()))
        return contrast(*pooled, self.temperature, gamma, self.loss)

    @staticmethod
    def _first(
        pipe: Any, group: Group, call: Mapping[str, Any], noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noise that a call begins from and the clean latents that its first step predicts, [K, c, h, w].

        `noise` is begun from in the place of the pipeline's own, where it is given.
        """
        begun: list[torch.Tensor] = []
        found: list[torch.Tensor] = []

        def begin(own: torch.Tensor) -> torch.Tensor:
            begun.append(own if noise is None else noise)
            return begun[0]

        def end(prediction: Prediction) -> torch.Tensor:
            height, width = (side * pipe.vae_scale_factor for side in begun[0].shape[2:])
            found.append(unpacked(pipe, prediction.clean, height, width).clone())
            raise _Predicted

        with initial_noise(pipe, begin), predictions(pipe, end), contextlib.suppress(_Predicted):
            sample(pipe, group, call)
        return begun[0], found[0]
