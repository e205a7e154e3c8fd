"""Particle guidance: the noisy latents of a group repel each other by a kernel, at every step."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from experiments.methods.method import Method, MethodContext
from experiments.methods.setting import Setting, numbers
from experiments.methods.steps import Prediction, predictions
from experiments.prompts import Group
from negtome.validation import check_float

#: The width of the kernel; see `repulsion`.
Bandwidth = Literal["paper", "released"]
BANDWIDTHS = get_args(Bandwidth)


def repulsion(latents: torch.Tensor, bandwidth: Bandwidth) -> torch.Tensor:
    """Return sum_j 2 exp(-|x_i - x_j|^2 / h_i) (x_i - x_j) / h_i, the gradient of -sum_j exp(-|x_i - x_j|^2 / h_i).

    Args:
        latents: float32 [G, K, N], of G groups of K images, K at least 2.
        bandwidth: "paper": h is the squared median of a group's distances over log K. "released": h_i is the squared
            median of the distances of x_i to the others, the lower one of two, over log(K - 1), infinite for K = 2.

    Returns:
        [G, K, N], with h as a constant.
    """
    K = latents.shape[1]
    distance = torch.cdist(latents, latents, compute_mode="donot_use_mm_for_euclid_dist")  # [G, K, K]
    others = distance[:, ~torch.eye(K, dtype=torch.bool, device=latents.device)].unflatten(1, (K, K - 1))
    if bandwidth == "paper":
        h = others.flatten(1).quantile(0.5, dim=1)[:, None, None] ** 2 / math.log(K)
    else:
        h = others.median(dim=2, keepdim=True).values ** 2 / math.log(K - 1)
    h = h.clamp(min=torch.finfo(h.dtype).tiny)
    weight = torch.where(distance > 0, 2 * torch.exp(-(distance**2) / h) / h, 0)  # [G, K, K]; equal latents stay
    return latents * weight.sum(dim=2, keepdim=True) - weight @ latents


@dataclass
class ParticleGuidance(Method):
    """Particle guidance by an RBF kernel on latents (Corso, Xu et al., arXiv 2310.13102).

    sigma * coefficient * `repulsion` of the group's noisy latents, scaled to a variance-preserving process, is
    subtracted from the noise that a step predicts; sigma times that is added to the clean latents. The authors' code is
    for Stable Diffusion 1.5, 4 x 64 x 64 latents, in groups of 4. `repulsion` falls with the number of latents: a model
    with a fourth of them needs about a fourth of the coefficient. The authors' guidance scale of 8 is 9 here.

    Attributes:
        coefficient: at least 0. The authors' notebook has 30; later comparisons go from 10 to 150.
        bandwidth: "paper", log n of n images, or "released", log(n - 1), which is not defined for two.
        sigma_low: the noise over signal below which there is no guidance: 1 in the released code.
        sigma_high: an upper bound of sigma, 14.6 as at the first step of Stable Diffusion. Flows, and schedules that
            begin without any signal, have an infinite sigma at first; nothing is published for them.
    """

    title = "particle guidance"
    columns = (*numbers("coefficient"), Setting("bandwidth"))
    version = 1

    name: str
    coefficient: float = 30.0
    bandwidth: Bandwidth = "paper"
    sigma_low: float = 1.0
    sigma_high: float = 14.6

    def __post_init__(self) -> None:
        for name in ("coefficient", "sigma_low", "sigma_high"):
            setattr(self, name, check_float(f"method.{name}", getattr(self, name), 0, math.inf))
        if self.bandwidth not in BANDWIDTHS:
            raise ValueError(f"method.bandwidth must be one of {BANDWIDTHS}, got {self.bandwidth!r}")

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        if group.size == 2 and self.bandwidth == "released":
            raise ValueError(
                f"method={self.name} divides by log(n - 1) where bandwidth=released, which is 0 for a group of n = 2: "
                "use bandwidth=paper, or larger groups"
            )

        def repel(prediction: Prediction) -> torch.Tensor:
            if prediction.sigma < self.sigma_low:
                return prediction.clean
            particles = prediction.sample / math.hypot(prediction.signal, prediction.noise)
            gradient = repulsion(particles.flatten(1).unflatten(0, (-1, group.size)), self.bandwidth)
            strength = self.coefficient * min(prediction.sigma, self.sigma_high) ** 2
            return prediction.clean + strength * gradient.view_as(prediction.clean)

        with contextlib.ExitStack() as stack:
            if group.size > 1 and self.coefficient:
                stack.enter_context(predictions(pipe, repel))
            yield MethodContext(dict(call))
