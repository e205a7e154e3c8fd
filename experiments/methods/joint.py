"""What methods inside of Flux's blocks share: where these are, and gradient steps on the cosines among images."""

from collections.abc import Callable
from typing import Any

import torch

from negtome.sites import find_architecture


def joint_blocks(pipe: Any, method: str) -> tuple[torch.nn.ModuleList, torch.nn.ModuleList]:
    """Return the blocks that attend to text and image tokens together: with a stream each, and with a single one.

    Both kinds return (text [rows, L, C], image [rows, N, C]).

    Raises:
        ValueError: the pipeline has none, or those of another architecture, named for `method`.
    """
    architecture = find_architecture(pipe)
    if architecture.name != "Flux":
        raise ValueError(
            f"method={method} is defined for the joint blocks of Flux's transformer, got {type(pipe).__name__}: choose "
            "a Flux model, such as model=flux-dev, or leave the method out"
        )
    denoiser = getattr(pipe, architecture.denoiser)
    return denoiser.transformer_blocks, denoiser.single_transformer_blocks


def step_on_cosines(
    features: torch.Tensor,
    slope: Callable[[torch.Tensor], torch.Tensor],
    rate: float,
    steps: int,
    group_size: int,
    relative: bool,
) -> torch.Tensor:
    """Ascend E of the cosines C of each group, f_i <- f_i + rate * grad_i E(C), where each image is one vector f_i.

    With u_i = f_i / |f_i| and M = dE/dC, symmetric, the gradient is

        grad_i E = 2 (sum_j M_ij u_j - sum_j M_ij C_ij u_i) / |f_i|

    which lies in the span of the K images, so that all steps are taken on K x K numbers, and the images added up once.

    Args:
        features: [groups * K, ...] of K = `group_size` images each.
        slope: cosines [groups, K, K] -> dE/dC, of the same shape, as if each entry were a variable.
        rate: of a step; negative descends.
        steps: how many.
        group_size: K.
        relative: times |f_i|^2, which makes them steps of the directions u_i: the same for features of any length.
    """
    images = features.unflatten(0, (-1, group_size)).flatten(2)
    if images.device.type != "mps":  # which knows no float64
        images = images.double()  # images are alike to the last digits of float32 where the text has just come in
    gram = (images @ images.mT).double().cpu()
    identity = torch.eye(group_size, dtype=torch.float64)
    weights = identity.expand_as(gram)  # of the images before, in those of now
    for _ in range(steps):
        now = weights @ gram @ weights.mT
        length = now.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        cosines = now / length.unsqueeze(2) / length.unsqueeze(1)
        change = slope(cosines)
        change = change - torch.diag_embed((change * cosines).sum(dim=2))
        scale = length.unsqueeze(2) if relative else 1 / length.unsqueeze(2)
        weights = weights + rate * (2 * scale * change / length.unsqueeze(1)) @ weights
    moved = (weights - identity).to(images) @ images
    return (images + moved).view(features.shape).to(features.dtype)
