"""STRIDE: pink noise on the principal components of the image's own features, in the first steps."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experiments.methods.method import Method, MethodContext, generator_of
from experiments.methods.pink_noise import coloured
from experiments.methods.setting import numbers
from experiments.methods.steps import denoiser_calls, saturated
from experiments.prompts import Group
from negtome.call_inspection import DenoiserCall
from negtome.sites import find_architecture
from negtome.validation import check_float, check_int


def perturb(features: torch.Tensor, noise: torch.Tensor, components: int, strength: float) -> torch.Tensor:
    """Add noise to features along their first principal components.

    With features h of one image, their mean m over tokens, and the projector P on the principal components of h - m,

        h + strength * |h - m| * nP / |nP|

    where lengths are over all tokens of an image. All components count alike, whatever their variance.

    Args:
        features: [images, N, C].
        noise: n, float32 of the same shape.
        components: number of principal components, at most C.
        strength: length of the noise, in lengths of the features' deviations.

    Returns:
        [images, N, C] in the dtype of the features.
    """
    h = features.float()
    deviations = h - h.mean(dim=1, keepdim=True)
    _, vectors = torch.linalg.eigh(deviations.mT @ deviations)  # eigenvalues ascend
    axes = vectors[..., -components:]  # [images, C, components]
    projected = noise @ axes @ axes.mT  # does not depend on the signs of the axes
    length, deviation = (torch.linalg.vector_norm(part, dim=(1, 2), keepdim=True) for part in (projected, deviations))
    scale = strength * deviation / length.clamp(min=torch.finfo(length.dtype).tiny)
    return saturated(h + scale * projected, features.dtype)


def image_blocks(pipe: Any, method: str) -> list[torch.nn.Module]:
    """Return the denoiser's blocks that return image tokens, in the order of its modules.

    These are the dual-stream blocks of Flux and Stable Diffusion 3, or a UNet's transformer blocks.

    Raises:
        ValueError: the pipeline has neither; the message names `method`.
    """
    architecture = find_architecture(pipe)
    denoiser = getattr(pipe, architecture.denoiser)
    if architecture.name in ("Flux", "SD3"):
        return list(denoiser.transformer_blocks)
    blocks = [module for module in denoiser.modules() if type(module).__name__ == "BasicTransformerBlock"]
    if not architecture.levels or not blocks:
        raise ValueError(
            f"method={method} is defined for Flux, Stable Diffusion 3 and UNets with transformer blocks, such as "
            f"SDXL's, got a {type(pipe).__name__}: leave it out for this model"
        )
    return blocks


def grid_of(tokens: int, grid: tuple[int, ...]) -> tuple[int, int]:
    """Return (height, width) of a feature map of so many tokens; `grid` is that of the largest one."""
    height, width = grid[-2:]
    side = max(1, round(math.sqrt(height * width / tokens)))
    return math.ceil(height / side), math.ceil(width / side)


@dataclass
class STRIDE(Method):
    """STRIDE, feature perturbation directed by principal components (Yadav et al., arXiv 2605.11494).

    In the first steps, `perturb` changes the image tokens that one block returns, with pink noise on their grid. The
    paper is about models of 1 to 4 steps, FLUX.1-schnell and SD3.5 Turbo.

    We had only the abstract, and saw no code. It says that noise with spatial coherence (pink) is projected onto the
    principal components of the model's activations. We chose the rest: the block, the number of components, the length
    of the noise, one noise for each image that holds for all steps and both halves of guidance, a power spectrum of
    1 / f, and the place in a UNet. The components are those of one image, not of a group.

    Attributes:
        noise_length: length of the noise, at least 0, which is off, in lengths of the features' deviations.
        components: number of principal components, at least 1; at most all numbers of a token count.
        block: the number of the block, from 1, in the order of the denoiser's modules.
        first_steps: the number of steps that are changed, at least 1.
        exponent: a of the noise's power spectrum f^-a; 0 is white.
    """

    title = "STRIDE"
    columns = numbers("noise_length", "components")
    version = 1

    name: str
    noise_length: float = 0.2
    components: int = 16
    block: int = 1
    first_steps: int = 4
    exponent: float = 1.0

    def __post_init__(self) -> None:
        self.noise_length = check_float("method.noise_length", self.noise_length, 0, math.inf)
        self.exponent = check_float("method.exponent", self.exponent, -math.inf, math.inf)
        for name in ("components", "block", "first_steps"):
            setattr(self, name, check_int(f"method.{name}", getattr(self, name), 1))

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        blocks = image_blocks(pipe, self.name)
        if self.block > len(blocks):
            raise ValueError(f"method.block must be at most {len(blocks)}, the blocks of the model, got {self.block}")
        if not self.noise_length:
            yield MethodContext(dict(call))
            return
        index = 0
        grid: tuple[int, ...] = (0, 0)
        noise: torch.Tensor | None = None

        def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
            nonlocal index, grid
            index, grid = denoiser.index, denoiser.grid
            return arguments

        def after(block: torch.nn.Module, args: Any, output: Any) -> Any:
            nonlocal noise
            if index >= self.first_steps:
                return output
            *text, image = output if isinstance(output, tuple) else (output,)
            if noise is None:
                shape = (group.size, image.shape[2], *grid_of(image.shape[1], grid))
                white = torch.randn(shape, generator=generator_of(group, "stride"))
                noise = coloured(white, self.exponent).flatten(2).mT.to(image.device)  # [K, N, C]
            rows = noise.repeat(len(image) // group.size, 1, 1)
            moved = perturb(image, rows, min(self.components, image.shape[2]), self.noise_length)
            return (*text, moved) if text else moved

        with denoiser_calls(pipe, before), contextlib.ExitStack() as stack:
            stack.callback(blocks[self.block - 1].register_forward_hook(after).remove)
            yield MethodContext(dict(call))
