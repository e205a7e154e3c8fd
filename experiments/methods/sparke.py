"""SPARKE: noisy latents of a group ascend their conditional Renyi kernel entropy of order 2."""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from experiments.methods.method import Method, MethodContext
from experiments.methods.setting import numbers
from experiments.methods.steps import denoiser_calls, replaced, saturated
from experiments.prompts import Group
from negtome.call_inspection import DenoiserCall
from negtome.validation import check_float, check_int


def entropy_gradient(latents: torch.Tensor, texts: torch.Tensor, sigma: float, sigma_text: float) -> torch.Tensor:
    """Return the gradient of each group's conditional RKE score in the directions of its latents.

    With unit vectors z of latents and y of texts, and Gaussian kernels k(a, b) = exp(-|a - b|^2 / (2 sigma^2)),

        score = sum_ij k(y_i, y_j)^2 / sum_ij (k(z_i, z_j) k(y_i, y_j))^2

    is the number of modes among images of equal texts, from 1 to K. Lengths of latents do not change it.

    Args:
        latents: float [G, K, N], of G groups of K images.
        texts: float [G, K, D], features of each image's prompt.
        sigma: bandwidth for latents.
        sigma_text: bandwidth for texts.

    Returns:
        [G, K, N], orthogonal to the latents: the gradient for z, without the part that changes the length of z.
    """
    z, y = F.normalize(latents, dim=2), F.normalize(texts, dim=2)
    squares = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    alike_texts = torch.exp(-squares / sigma_text**2)  # [G, K, K], squared kernels
    squares = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square()
    weights = alike_texts * torch.exp(-squares / sigma**2)
    total = weights.sum(dim=(1, 2), keepdim=True)
    score = alike_texts.sum(dim=(1, 2), keepdim=True) / total
    weights = torch.where(squares > 0, weights, 0)  # equal latents do not move by rounding
    gradient = 4 * score / (total * sigma**2) * (z * weights.sum(dim=2, keepdim=True) - weights @ z)
    return gradient - z * (z * gradient).sum(dim=2, keepdim=True)


@dataclass
class SPARKE(Method):
    """SPARKE, scalable prompt-aware Renyi kernel entropy guidance (Jalali et al., arXiv 2506.10173).

    Before every `interval`-th step, from the first, each image's noisy latents x move along `entropy_gradient` g:

        x <- x + entropy_scale |x| g / |g|

    The authors' code (mjalali/sparke-diffusers, a fork of diffusers, Apache-2.0) has this length of the step, these
    bandwidths, and unit vectors of latents. As there, the model's prediction of the step is the one for the latents
    before they move.

    Ours: the entropy is of the noisy images of one group, which move together, since groups of the benchmark are
    independent. The code generates images one after the other and compares each with the finished ones; beyond ten,
    it compares only the last with the others. The features of a text are the mean of the denoiser's tokens instead of a
    CLIP's embedding, so that no network is added; images of one prompt have equal features.

    Attributes:
        entropy_scale: at least 0, which is off; 0.02 to 0.14 in published uses.
        interval: at least 1; 10 in the code, whose models take 50 steps.
        sigma: bandwidth for latents, above 0; 0.8 in the code.
        sigma_text: bandwidth for texts, above 0; 0.35 in the code.
    """

    title = "SPARKE"
    columns = numbers("entropy_scale", "interval")
    version = 1

    name: str
    entropy_scale: float = 0.1
    interval: int = 10
    sigma: float = 0.8
    sigma_text: float = 0.35

    def __post_init__(self) -> None:
        self.entropy_scale = check_float("method.entropy_scale", self.entropy_scale, 0, math.inf)
        self.interval = check_int("method.interval", self.interval, 1)
        for name in ("sigma", "sigma_text"):
            setattr(self, name, check_float(f"method.{name}", getattr(self, name), 1e-3, math.inf))

    def moved(self, latents: torch.Tensor, texts: torch.Tensor, group_size: int) -> torch.Tensor:
        """Return noisy latents [rows, ...] after a move, in their dtype; texts are [rows, D]."""
        x = latents.float().flatten(1).unflatten(0, (-1, group_size))
        gradient = entropy_gradient(x, texts.unflatten(0, (-1, group_size)), self.sigma, self.sigma_text)
        length = torch.linalg.vector_norm(x, dim=2, keepdim=True)
        moved = x + self.entropy_scale * length * F.normalize(gradient, dim=2)  # equal latents have no gradient
        return saturated(moved.view(latents.shape), latents.dtype)

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        if group.size == 1 or not self.entropy_scale:
            yield MethodContext(dict(call))
            return
        texts = torch.empty(0)
        index, previous_index = 0, -1
        original = pipe.scheduler.step

        def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
            nonlocal texts, index
            index = denoiser.index
            if denoiser.conditional:  # not the second call of a step, which is of the negative prompt
                tokens = denoiser.text.expand(denoiser.rows, *denoiser.text.shape[1:])
                tokens = tokens.chunk(denoiser.cfg_chunks)[denoiser.conditional[0]]
                texts = tokens.float().flatten(1, -2).mean(dim=1)
            return arguments

        @functools.wraps(original)
        def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal previous_index
            # A step of a second-order scheduler calls this twice.
            if index != previous_index and index % self.interval == 0:
                sample = self.moved(sample, texts, group.size)
            previous_index = index
            return original(model_output, timestep, sample, *args, **kwargs)

        with denoiser_calls(pipe, before), replaced(pipe.scheduler, "step", step):
            yield MethodContext(dict(call))
