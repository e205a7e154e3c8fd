"""PromptMoG: each image's prompt embedding is drawn from a mixture of Gaussians around the prompt's."""

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
from negtome.validation import check_float, check_int


def mixture_offsets(shape: torch.Size, modes: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw each token's mode and Gaussian noise for the images of a group.

    The modes are the corners of a regular simplex in a random rotation, which all tokens and images share: unit vectors
    whose cosines are -1 / (modes - 1), the least that is possible for all pairs. Each token of each image takes one of
    them, all equally likely.

    Args:
        shape: [K, L, C] of K images, L tokens of the prompt and C numbers of a token.
        modes: number of modes, from 2 to C.
        generator: of random numbers, on the CPU.

    Returns:
        Unit vectors u and standard normal noise n, [K, L, C] each.
    """
    # No eigenvectors: those of equal eigenvalues differ from CPU to CPU, and with them the images of a seed.
    corners = torch.nn.functional.normalize(torch.eye(modes) - 1 / modes)
    frame, _ = torch.linalg.qr(torch.randn(shape[2], modes, generator=generator))  # [C, modes]
    choices = torch.randint(modes, shape[:2], generator=generator)
    return corners[choices] @ frame.T, torch.randn(shape, generator=generator)


def mixed(
    tokens: torch.Tensor, directions: torch.Tensor, noise: torch.Tensor, distance: float, sigma: float
) -> torch.Tensor:
    """Return y + distance |y| (u + sigma n / sqrt(C)) for each token y, but for the first two and the last.

    These are special tokens. Tokens of zeros, which are padding, stay.

    Args:
        tokens: y, [images, L, C].
        directions, noise: u and n of `mixture_offsets`, of the same shape.
        distance, sigma: of `PromptMoG`.
    """
    y = tokens.float()
    length = torch.linalg.vector_norm(y, dim=2, keepdim=True)
    length[:, [0, 1, -1] if y.shape[1] > 1 else 0] = 0
    moved = y + distance * length * (directions + sigma / math.sqrt(y.shape[2]) * noise)
    return torch.where(length > 0, saturated(moved, tokens.dtype), tokens)


@dataclass
class PromptMoG(Method):
    """PromptMoG (Ruan et al., arXiv 2511.20251): prompt embeddings from a mixture of Gaussians.

    `mixed` changes the prompt's tokens, with one draw for each image, which holds for all steps. The authors' code
    (basiclab/prompt_mog, Apache-2.0) is for SD3.5, Flux, CogView4 and Qwen-Image. As there, pooled embeddings and the
    negative prompt stay.

    Ours: the images of a group share the rotation, so that their modes are as far apart as possible; the code rotates
    for each seed. The setting is a distance instead of the code's gamma, the cosine of a token and a mode: distance is
    sqrt(2 (1 - gamma)). Where a denoiser takes tokens of several text encoders in one tensor, they move together.

    Attributes:
        distance: of the modes from a token, in lengths of the token, at least 0, which is off. The code has gamma 0.6
            for FLUX.1-Krea-dev, which is 0.89 here, 0.77 for SD3.5, 0.55 for Qwen-Image and 0.32 for CogView4.
        sigma: root mean square length of the noise about a mode, in units of the distance, at least 0; published 0.25.
        modes: number of modes, at least 2; published 50. At most as many as a token has numbers.
    """

    title = "PromptMoG"
    columns = numbers("distance", "sigma", "modes")
    version = 2

    name: str
    distance: float = 0.89
    sigma: float = 0.25
    modes: int = 50

    def __post_init__(self) -> None:
        for name in ("distance", "sigma"):
            setattr(self, name, check_float(f"method.{name}", getattr(self, name), 0, math.inf))
        self.modes = check_int("method.modes", self.modes, 2, 1000)

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        def draw(shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            if self.modes > shape[2]:
                raise ValueError(
                    f"method.modes must be at most {shape[2]} for this model, whose tokens have as many numbers, got "
                    f"{self.modes}"
                )
            return mixture_offsets(shape, self.modes, generator)

        offsets_for = drawn_once(group, "prompt mog", draw)

        def change(tokens: torch.Tensor) -> torch.Tensor:
            directions, noise = offsets_for(tokens)
            return mixed(tokens, directions, noise, self.distance, self.sigma)

        def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
            return with_tokens(denoiser, arguments, change)

        with denoiser_calls(pipe, before) if self.distance else contextlib.nullcontext():
            yield MethodContext(dict(call))
