"""Repulsion in the contextual space: push apart the images' text tokens after they have attended to the images."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experiments.methods.joint import joint_blocks, step_on_cosines
from experiments.methods.method import Method, MethodContext
from experiments.methods.setting import numbers
from experiments.methods.steps import denoiser_calls
from experiments.prompts import Group
from negtome.call_inspection import DenoiserCall
from negtome.validation import check_float, check_int


def entropy_slope(cosines: torch.Tensor) -> torch.Tensor:
    """Return dS/dC = -(log(C / K) + 1) / K of S = -tr(C/K log(C/K)), cosines [groups, K, K]."""
    values, vectors = torch.linalg.eigh(cosines / cosines.shape[-1])
    values = values.clamp_min(1e-12)  # S has an infinite slope at equal images
    return -(vectors * (values.log() + 1).unsqueeze(1)) @ vectors.mT / cosines.shape[-1]


@dataclass
class ContextualRepulsion(Method):
    """Repulsion in the contextual space (Dahary et al., arXiv 2603.28762, SIGGRAPH 2026), for Flux.

    The tokens that each block returns, as one vector f for each of K images, ascend the von Neumann entropy of their
    cosines C, the logarithm of the Vendi score, in `inner_steps` = M steps:

        f <- f + eta / M grad S(C / K),   S(A) = -tr(A log A)

    without a gradient through the network. In dual-stream blocks these are the text tokens, in single-stream blocks all
    tokens. With two calls a step (true guidance), both calls are changed. The authors published no code.

    Attributes:
        eta: total step size, at least 0, which is off. Published for FLUX.1-dev with `relative: false`: 5e6 to 8e9.
        relative: whether to use the gradient for the direction f / |f|, which is |f|^2 times as large: eta then means
            the same for every block, model, length of text and size of image. With the gradient for f itself, as in the
            paper, the effect is by far largest in blocks with small |f|.
        inner_steps: M, at least 1; published 50.
        first_steps: the number of denoising steps that are changed, at least 1; published 1 (tau).
    """

    title = "contextual repulsion"
    columns = numbers("eta", "first_steps")
    version = 1

    name: str
    eta: float = 1e8
    relative: bool = False
    inner_steps: int = 50
    first_steps: int = 1

    def __post_init__(self) -> None:
        self.eta = check_float("method.eta", self.eta, 0, math.inf)
        self.inner_steps = check_int("method.inner_steps", self.inner_steps, 1)
        self.first_steps = check_int("method.first_steps", self.first_steps, 1)

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        blocks, single_blocks = joint_blocks(pipe, self.name)
        if not self.eta or group.size == 1:
            yield MethodContext(dict(call))
            return
        index = 0

        def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
            nonlocal index
            index = denoiser.index
            return arguments

        def apart(tokens: torch.Tensor) -> torch.Tensor:
            rate = self.eta / self.inner_steps
            return step_on_cosines(tokens, entropy_slope, rate, self.inner_steps, group.size, self.relative)

        def text_apart(block: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
            text, image = output
            return (apart(text), image) if index < self.first_steps else output

        def all_apart(block: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
            if index >= self.first_steps:
                return output
            text, image = output
            return apart(torch.cat([text, image], dim=1)).split([text.shape[1], image.shape[1]], dim=1)

        with denoiser_calls(pipe, before), contextlib.ExitStack() as stack:
            for kind, hook in ((blocks, text_apart), (single_blocks, all_apart)):
                for block in kind:
                    stack.callback(block.register_forward_hook(hook).remove)
            yield MethodContext(dict(call))
