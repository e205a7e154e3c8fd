"""Feature self-guidance: disperse the images' features after an early block, and apply the block again."""

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


@dataclass
class FeatureGuidance(Method):
    """Feature self-guidance, "Don't Settle at the Mode!" (Bhat et al., arXiv 2606.27371, ECCV 2026), for Flux.

    The image tokens h that one block returns, as one vector for each image, descend their mean similarity,

        E(h) = log mean_ij exp(cos(h_i, h_j) / temperature)
        h~ <- h~ - w grad E(h~)                             n_opt times from h~ = h, every image
        h' = beta block(h~) + (1 - beta) h~

    The block runs a second time with the text that it returned, and the second text is dropped (the paper says only
    that h~ passes through the block again). h' goes on to the next block. The authors published no code.

    Attributes:
        w: step size, at least 0, which is off; published 0.5.
        relative: whether to use the gradient for the direction h / |h|, which is |h|^2 times as large. The gradient for
            h itself, as in the formula, moves h by a fraction of about w / |h|^2, which is tiny in any model.
        n_opt: number of steps; published 30.
        temperature: above 0; we found no published value.
        mix: beta, in [0, 1]; larger is more faithful and less diverse; published 0.4.
        block: the number of the dual-stream block, from 1; published 2.
        timestep_range: (low, high) in training timesteps, 1000 = pure noise; published (800, 1000).
    """

    title = "feature self-guidance"
    columns = numbers("w", "mix")
    version = 1

    name: str
    w: float = 0.5
    relative: bool = False
    n_opt: int = 30
    temperature: float = 1.0
    mix: float = 0.4
    block: int = 2
    timestep_range: tuple[float, float] = (800.0, 1000.0)

    def __post_init__(self) -> None:
        self.w = check_float("method.w", self.w, 0, math.inf)
        self.temperature = check_float("method.temperature", self.temperature, 1e-3, math.inf)
        self.mix = check_float("method.mix", self.mix, 0, 1)
        self.n_opt = check_int("method.n_opt", self.n_opt, 1)
        self.block = check_int("method.block", self.block, 1)
        low, high = (check_float("each end of method.timestep_range", end, 0, 1000) for end in self.timestep_range)
        if low > high:
            raise ValueError(f"method.timestep_range must be (low, high) with low <= high, got ({low:g}, {high:g})")
        self.timestep_range = low, high

    def slope(self, cosines: torch.Tensor) -> torch.Tensor:
        """Return dE/dC of cosines [groups, K, K]."""
        return torch.softmax(cosines.flatten(1) / self.temperature, dim=1).view_as(cosines) / self.temperature

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        blocks, _ = joint_blocks(pipe, self.name)
        if self.block > len(blocks):
            raise ValueError(f"method.block must be at most {len(blocks)}, the blocks of the model, got {self.block}")
        if not self.w or group.size == 1:
            yield MethodContext(dict(call))
            return
        low, high = self.timestep_range
        active = False

        def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
            nonlocal active
            active = low <= denoiser.timestep <= high
            return arguments

        def after(block: torch.nn.Module, args: tuple[()], kwargs: dict[str, Any], output: tuple[Any, Any]) -> Any:
            if not active:
                return output
            text, image = output
            apart = step_on_cosines(image, self.slope, -self.w, self.n_opt, group.size, self.relative)
            # `forward` skips the block's hooks, which have run already.
            _, again = block.forward(**kwargs | {"hidden_states": apart, "encoder_hidden_states": text})
            return text, torch.lerp(apart, again, self.mix)

        with denoiser_calls(pipe, before), contextlib.ExitStack() as stack:
            hook = blocks[self.block - 1].register_forward_hook(after, with_kwargs=True)
            stack.callback(hook.remove)
            yield MethodContext(dict(call))
