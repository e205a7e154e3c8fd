"""DiverseFlow: predicted images of a group ascend the likelihood of a determinantal point process."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.special import chdtri

from experiments.methods.method import Method, MethodContext
from experiments.methods.setting import numbers
from experiments.methods.steps import Prediction, predictions
from experiments.prompts import Group
from negtome.validation import check_float

#: The smallest eigenvalue that counts, as a share of the largest: equal images have 0, where the slope is infinite.
SMALLEST = 1e-6


def process_gradient(clean: torch.Tensor, quality: torch.Tensor, spread: float) -> torch.Tensor:
    """Return the gradient of each group's log-likelihood log(det L / det(L + I)).

    The kernel is

        L_ij = q_i q_j exp(-spread |x_i - x_j|^2 / (2 m)),   m the median of |x_i - x_j|^2 over the pairs of a group,

    with q and m as constants.

    Args:
        clean: x, float [G, K, N], of G groups of K images.
        quality: q, [G, K], above 0.
        spread: h, at least 0.

    Returns:
        [G, K, N].
    """
    K = clean.shape[1]
    squares = torch.cdist(clean, clean, compute_mode="donot_use_mm_for_euclid_dist").square().cpu().double()
    above = torch.triu_indices(K, K, offset=1)
    median = squares[:, above[0], above[1]].quantile(0.5, dim=1)[:, None, None]
    distances = squares / median.clamp(min=torch.finfo(median.dtype).tiny)
    q = quality.cpu().double()
    kernel = q[:, :, None] * q[:, None, :] * torch.exp(-spread * distances / 2)  # [G, K, K]
    values, vectors = torch.linalg.eigh(kernel)
    values = values.maximum(SMALLEST * values[:, -1:])
    slope = (vectors * (1 / values - 1 / (1 + values)).unsqueeze(1)) @ vectors.mT  # of the likelihood in L
    weights = torch.where(median > 0, -2 * spread * slope * kernel / median, 0)
    weights.diagonal(dim1=1, dim2=2).zero_()  # x_i - x_i is 0, whatever the slope
    weights = weights.to(clean)
    return clean * weights.sum(dim=2, keepdim=True) - weights @ clean


def noise_quality(noise: torch.Tensor, percentile: float, least: float) -> torch.Tensor:
    """Return 1 for predicted noise in the ball that has a share `percentile` of normal noise, less outside.

    Args:
        noise: float [..., N].
        percentile: in (0, 1].
        least: the smallest quality, above 0.

    Returns:
        exp(r^2 - |noise|^2) outside the ball of radius r, at least `least`: [...].
    """
    if percentile == 1:
        return torch.ones(noise.shape[:-1], device=noise.device)
    squared_radius = float(chdtri(noise.shape[-1], 1 - percentile))
    outside = noise.square().sum(dim=-1) - squared_radius
    return torch.exp(-outside.relu()).clamp(min=least)


@dataclass
class DiverseFlow(Method):
    """DiverseFlow (Morshed and Boddeti, arXiv 2504.07894, CVPR 2025).

    At every step of a flow, at time t from 1 (noise) to 0, with velocity v and predicted image x = x_t - t v,

        v <- v - t dpp_scale |v| g / |g|,   g = `process_gradient` of x,

    with lengths over all images of a group, so that x moves by t^2 dpp_scale |v|. Other schedulers move x alike, with
    t = noise / (signal + noise) and v = n - x for predicted noise n.

    The authors have published no code. The length of the step is that of a reimplementation, basiclab/prompt_mog
    (Apache-2.0), as are the smallest quality, features that are the latents themselves, where the paper has an image
    encoder's, and a gradient that is taken for x instead of through the network.

    Ours: the kernel has the paper's factor of 1 / 2, which the reimplementation lacks: its spread of 1 is 2 here. The
    median is the mean of the middle two where the number of pairs is even. The reimplementation multiplies each image's
    gradient by its quality once more, and adds 1e-4 to the kernel's diagonal, as much as a kernel of qualities of 0.01
    has there; here only eigenvalues near 0 are raised.

    Attributes:
        dpp_scale: at least 0, which is off; the reimplementation has 0.6.
        spread: h of the kernel, at least 0.
        percentile: of the noise that counts as likely, in [0.5, 1]; 0.95 in the reimplementation; 1 is no constraint.
        least_quality: in (0, 1]; 0.01 in the reimplementation.
    """

    title = "DiverseFlow"
    columns = numbers("dpp_scale", "spread", "percentile")
    version = 1

    name: str
    dpp_scale: float = 0.6
    spread: float = 1.0
    percentile: float = 0.95
    least_quality: float = 0.01

    def __post_init__(self) -> None:
        for name in ("dpp_scale", "spread"):
            setattr(self, name, check_float(f"method.{name}", getattr(self, name), 0, math.inf))
        self.percentile = check_float("method.percentile", self.percentile, 0.5, 1)
        self.least_quality = check_float("method.least_quality", self.least_quality, 1e-6, 1)

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        def repel(prediction: Prediction) -> torch.Tensor:
            if not prediction.noise:
                return prediction.clean
            clean = prediction.clean.flatten(1).unflatten(0, (-1, group.size))
            noise = (prediction.sample - prediction.signal * prediction.clean) / prediction.noise
            noise = noise.flatten(1).unflatten(0, (-1, group.size))
            quality = noise_quality(noise, self.percentile, self.least_quality)
            gradient = process_gradient(clean, quality, self.spread)
            time = prediction.noise / (prediction.signal + prediction.noise)
            speed = torch.linalg.vector_norm(noise - clean, dim=(1, 2), keepdim=True)
            direction = F.normalize(gradient.flatten(1), dim=1).view_as(gradient)  # equal images have no gradient
            return (clean + self.dpp_scale * time**2 * speed * direction).view_as(prediction.clean)

        with contextlib.ExitStack() as stack:
            if group.size > 1 and self.dpp_scale and self.spread:
                stack.enter_context(predictions(pipe, repel))
            yield MethodContext(dict(call))
