"""A naive transcription of NegToMe as a yardstick, which does not use `negtome.merge`.

It makes the same passes over memory as the authors' released code (github.com/1jsingh/negtome, described, not copied).
It normalises both sides, keeps the whole similarity matrix and takes its maximum over an axis. Then it gathers, blends
all images and concatenates. Ordinary torch hooks at the hook points of `negtome.sites` put it into a stock pipeline.
Images are square, and all images of a call are one group. `Naive` is the transcription as a method.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from experiments.methods.method import MethodContext
from experiments.methods.negtome import NegToMe
from experiments.methods.steps import denoiser_calls
from experiments.prompts import Group
from negtome import NegToMeConfig
from negtome.architectures import HookPoint
from negtome.call_inspection import DenoiserCall
from negtome.sites import find_architecture, find_sites


def push(tokens: torch.Tensor, halves: int, config: NegToMeConfig) -> torch.Tensor:
    """Push the images of every half of a batch away from the first image of the half.

    Args:
        tokens: [halves * K, N, C].
        halves: 2 for unconditional and conditional in one batch, else 1.
        config: the settings.

    Returns:
        A new tensor [halves * K, N, C], in which the first image of each half is unchanged.
    """
    pushed = []
    for source in tokens.chunk(halves):
        target = source[:1].expand_as(source)
        source_unit = source / source.norm(dim=-1, keepdim=True)
        target_unit = target / target.norm(dim=-1, keepdim=True)
        similarity = source_unit @ target_unit.transpose(1, 2)  # [K, N, N]
        closest, index = similarity.max(dim=2 if config.matching == "paper" else 1)
        match = torch.gather(target, 1, index.unsqueeze(-1).expand_as(source))
        moved = (1 + config.alpha) * source - config.alpha * match
        moved = torch.where((closest > config.threshold).unsqueeze(-1), moved, source)
        pushed.append(torch.cat([source[:1], moved[1:]]))
    return torch.cat(pushed)


@contextlib.contextmanager
def attach(
    pipe: Any, config: NegToMeConfig, change: Callable[[torch.Tensor, int, NegToMeConfig], torch.Tensor] = push
) -> Iterator[None]:
    """Hook the transcription into a stock pipeline for the length of the block.

    Args:
        pipe: the pipeline; its calls must generate square images of a single prompt.
        config: the settings; reference="first" only.
        change: replaces an attention's image tokens in the steps that take part, called as `push`.

    Raises:
        ValueError: a setting is not transcribed.
    """
    if config.reference != "first":
        raise ValueError(f'the transcription is of reference="first", got {config.reference!r}; use negtome.attach.')
    architecture = find_architecture(pipe)
    denoiser = getattr(pipe, architecture.denoiser)
    call: DenoiserCall | None = None  # the running call, if its step takes part

    def begin(denoiser_call: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
        nonlocal call
        active = config.is_active(denoiser_call.timestep, denoiser_call.index, denoiser_call.steps)
        call = denoiser_call if active else None
        return arguments

    def changed(features: torch.Tensor, place: HookPoint) -> torch.Tensor:
        if call is None or (architecture.levels and math.isqrt(features.shape[1]) < config.min_side):
            return features
        text = features.shape[1] - call.stream if place.image == "last" else 0
        tokens = change(features[:, text:], call.cfg_chunks, config)
        return torch.cat([features[:, :text], tokens], dim=1) if text else tokens

    def hook(module: torch.nn.Module, place: HookPoint) -> Any:
        if place.tensor == "input":
            return module.register_forward_pre_hook(lambda _, args: (changed(args[0], place), *args[1:]))
        return module.register_forward_hook(lambda _, args, output: changed(output, place))

    with denoiser_calls(pipe, begin), contextlib.ExitStack() as stack:
        for _, module, place in find_sites(denoiser, architecture, config.sites, config.cross_attention):
            stack.callback(hook(module, place).remove)
        yield


class Naive(NegToMe):
    """NegToMe by the transcription."""

    title = "NegToMe, naive transcription"
    version = 1

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "transcription": "naive"}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        with attach(pipe, self.config.published_for(find_architecture(pipe).name.lower())):
            yield MethodContext(dict(call))
