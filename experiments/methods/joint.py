"""Shared by methods inside Flux's blocks: the blocks, and gradient steps on the cosines among images."""

from collections.abc import Callable
from typing import Any

import torch

from negtome.sites import find_architecture


def joint_blocks(pipe: Any, method: str) -> tuple[torch.nn.ModuleList, torch.nn.ModuleList]:
    """Return the blocks that attend to text and image tokens together: the dual-stream and the single-stream ones.

    Both kinds return (text [rows, L, C], image [rows, N, C]).

    Raises:
        ValueError: the pipeline is not Flux; the message names `method`.
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

    which lies in the span of the K images: all steps are taken on K x K numbers, and the images are combined once.

    Args:
        features: [groups * K, ...] of K = `group_size` images each.
        slope: cosines [groups, K, K] -> dE/dC, of the same shape, as if each entry were a variable.
        rate: step size; negative to descend.
        steps: number of steps.
        group_size: K.
        relative: multiply the gradient by |f_i|^2. The steps then act on the directions u_i, whatever the length.
    """
    images = features.unflatten(0, (-1, group_size)).flatten(2)
    if images.device.type != "mps":  # which has no float64
        images = images.double()  # right after the text comes in, images differ only in the last digits of float32
    gram = (images @ images.mT).double().cpu()
    identity = torch.eye(group_size, dtype=torch.float64)
    weights = identity.expand_as(gram)  # each moved image as a combination of the original images
    for _ in range(steps):
        moved_gram = weights @ gram @ weights.mT
        length = moved_gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        cosines = moved_gram / length.unsqueeze(2) / length.unsqueeze(1)
        change = slope(cosines)
        change = change - torch.diag_embed((change * cosines).sum(dim=2))
        scale = length.unsqueeze(2) if relative else 1 / length.unsqueeze(2)
        weights = weights + rate * (2 * scale * change / length.unsqueeze(1)) @ weights
    moved = (weights - identity).to(images) @ images
    return (images + moved).view(features.shape).to(features.dtype)
