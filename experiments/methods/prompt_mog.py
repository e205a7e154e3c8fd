"""PromptMoG: each image's prompt embedding is drawn from a mixture of Gaussians around the prompt's."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experiments.methods.method import Method, MethodContext, generator_of
from experiments.methods.setting import numbers
from experiments.methods.steps import check_text_is_one_tensor, denoiser_calls, saturated, with_tokens
from experiments.prompts import Group
from negtome.call_inspection import DenoiserCall
from negtome.validation import check_float, check_int


def simplex(count: int) -> torch.Tensor:
    """Return the corners of a regular simplex: `count` unit vectors [count, count - 1] whose cosines are equal.

    The cosine of two corners is -1 / (count - 1), the least that is possible for all pairs.
    """
    centred = torch.eye(count, dtype=torch.float64) - 1 / count
    _, vectors = torch.linalg.eigh(centred)  # the first is constant, with eigenvalue 0
    corners = vectors[:, 1:]
    return (corners / torch.linalg.vector_norm(corners, dim=1, keepdim=True)).float()


def mixture_offsets(
    images: int, length: int, width: int, modes: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw each token's mode and Gaussian number for the images of a group.

    The modes of a token are the corners of a simplex that is rotated at random, one rotation a token, which the images
    share. Each token of each image takes one of them, all equally likely.

    Args:
        images: K.
        length: L, tokens of the prompt.
        width: C, numbers of a token, at least modes - 1.
        modes: of the mixture, at least 2.
        generator: of random numbers, on the CPU.

    Returns:
        Unit vectors u and standard normal noise n, [K, L, C] each.
    """
    frames, _ = torch.linalg.qr(torch.randn(length, width, modes - 1, generator=generator))  # [L, C, modes - 1]
    choices = torch.randint(modes, (images, length), generator=generator)
    directions = torch.einsum("klm,lcm->klc", simplex(modes)[choices], frames)
    return directions, torch.randn(images, length, width, generator=generator)


@dataclass
class PromptMoG(Method):
    """PromptMoG (Ruan et al., arXiv 2511.20251): prompt embeddings from a mixture of Gaussians.

    Each token y of the prompt, but for the first two and the last, which are special, becomes

        y + gamma u + sigma n

    with u and n of `mixture_offsets`, one draw for each image, which holds for all steps. The authors' code
    (basiclab/prompt_mog, Apache-2.0) is for SD3, Flux, CogView4 and Qwen-Image. As there, pooled embeddings and the
    negative prompt stay.

    Ours: the images of a group share each token's rotation, so that their modes are as far apart as possible; the code
    rotates for each image too, which makes u uniform on the sphere. `relative` makes one strength mean the same for
    models whose tokens have other lengths. Of Stable Diffusion XL, which is not in the paper, the tokens of both text
    encoders are moved together. Tokens of zeros, which are padding, stay.

    Attributes:
        gamma: distance of the modes from the prompt, at least 0; published 0.6 for Flux and 0.85 for Qwen-Image, with
            `relative: false`.
        sigma: standard deviation of each mode in each number, at least 0; published 0.25. If both are 0, it is off.
        modes: number of modes, at least 2; published 50. At most one more than a token has numbers.
        relative: whether gamma and sigma are lengths in units of the tokens' root mean square length; n is then divided
            by the square root of its numbers.
    """

    title = "PromptMoG"
    columns = numbers("gamma", "sigma", "modes")
    version = 1

    name: str
    gamma: float = 0.6
    sigma: float = 0.25
    modes: int = 50
    relative: bool = False

    def __post_init__(self) -> None:
        for name in ("gamma", "sigma"):
            setattr(self, name, check_float(f"method.{name}", getattr(self, name), 0, math.inf))
        self.modes = check_int("method.modes", self.modes, 2, 1000)

    def moved(self, tokens: torch.Tensor, directions: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return tokens [rows, L, C] moved by u and n of the same shape, in the dtype of the tokens."""
        y = tokens.float()
        text = (y != 0).any(dim=-1, keepdim=True)
        movable = text.clone()
        movable[:, [0, 1, -1] if y.shape[1] > 1 else 0] = False
        offset = self.gamma * directions + self.sigma * noise
        if self.relative:
            offset = self.gamma * directions + self.sigma / math.sqrt(y.shape[-1]) * noise
            squares = y.square().sum(dim=(1, 2), keepdim=True) / text.sum(dim=(1, 2), keepdim=True).clamp(min=1)
            offset = squares.sqrt() * offset
        return torch.where(movable, saturated(y + offset, tokens.dtype), tokens)

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        check_text_is_one_tensor(pipe, self.name)
        drawn: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

        def change(tokens: torch.Tensor) -> torch.Tensor:
            length, width = tokens.shape[1:]
            if self.modes > width + 1:
                raise ValueError(
                    f"method.modes must be at most {width + 1} for this model, one more than a token has numbers, "
                    f"got {self.modes}"
                )
            if (length, width) not in drawn:
                generator = generator_of(group, f"prompt mog {len(drawn)}")
                drawn[length, width] = mixture_offsets(group.size, length, width, self.modes, generator)
            groups = len(tokens) // group.size
            directions, noise = (part.to(tokens.device).repeat(groups, 1, 1) for part in drawn[length, width])
            return self.moved(tokens, directions, noise)

        def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
            return with_tokens(denoiser, arguments, change)

        is_on = self.gamma or self.sigma
        with denoiser_calls(pipe, before) if is_on else contextlib.nullcontext():
            yield MethodContext(dict(call))
