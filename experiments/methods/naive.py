"""A naive transcription of NegToMe, to measure against: nothing here is fast, and nothing here knows `negtome.merge`.

It makes the passes over memory that the authors' released code makes (github.com/1jsingh/negtome, described, not
copied): both sides normalised, the whole similarity matrix kept, its maximum over an axis, a gather, a blend of all
images with the first one among them, and a concatenation. It is put into a stock pipeline by ordinary torch hooks.
Images are square, and all images of a call are one group. `Naive` is the same as a method.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from experiments.methods.method import Applied
from experiments.methods.negtome import NegToMe
from experiments.prompts import Group
from negtome import NegToMeConfig

#: Gets the image tokens [halves * K, N, C] of an attention and the number of halves, and returns what replaces them.
Change = Callable[[torch.Tensor, int], torch.Tensor]


def push(tokens: torch.Tensor, halves: int, alpha: float, threshold: float, matching: str) -> torch.Tensor:
    """Push the images of every half of a batch away from the first image of the half.

    Args:
        tokens: [halves * K, N, C].
        halves: 2 for unconditional and conditional in one batch, else 1.
        alpha, threshold, matching: as in `negtome.negative_merge`.

    Returns:
        A new tensor [halves * K, N, C]; the first image of each half as it was.
    """
    done = []
    for source in tokens.chunk(halves):
        target = source[:1].expand_as(source)
        source_unit = source / source.norm(dim=-1, keepdim=True)
        target_unit = target / target.norm(dim=-1, keepdim=True)
        similarity = source_unit @ target_unit.transpose(1, 2)  # [K, N, N]
        closest, index = similarity.max(dim=2 if matching == "paper" else 1)
        match = torch.gather(target, 1, index.unsqueeze(-1).expand_as(source))
        moved = (1 + alpha) * source - alpha * match
        moved = torch.where((closest > threshold).unsqueeze(-1), moved, source)
        done.append(torch.cat([source[:1], moved[1:]]))
    return torch.cat(done)


@contextlib.contextmanager
def attach(pipe: Any, config: NegToMeConfig, change: Change | None = None) -> Iterator[None]:
    """Hook the transcription into a stock StableDiffusionXLPipeline or FluxPipeline for the length of the block.

    Args:
        pipe: the pipeline; its calls must generate square images of a single prompt.
        config: the settings; reference="first" only.
        change: what happens to an attention's image tokens in the steps of the window; None: `push`.

    Raises:
        ValueError: for a setting that is not transcribed.
    """
    if config.reference != "first":
        raise ValueError(f'the transcription is of reference="first", got {config.reference!r}; use negtome.attach.')
    if change is None:

        def change(tokens: torch.Tensor, halves: int) -> torch.Tensor:
            return push(tokens, halves, config.alpha, config.threshold, config.matching)

    flux = hasattr(pipe, "transformer")
    denoiser = pipe.transformer if flux else pipe.unet
    now = {"active": False, "halves": 1, "text": 0}

    def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if flux:
            timestep = pipe.current_timestep
            now["text"] = kwargs["encoder_hidden_states"].shape[1]
        else:
            timestep = args[1]
            now["halves"] = 2 if pipe.do_classifier_free_guidance else 1
        now["active"] = config.is_active(float(timestep))

    def changed(tokens: torch.Tensor) -> torch.Tensor:
        if not now["active"] or (not flux and math.isqrt(tokens.shape[1]) < config.min_side):
            return tokens
        return change(tokens, now["halves"])

    def of_output(_: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return changed(output)

    def of_input(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (changed(args[0]), *args[1:])

    def after_text(_: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if not now["active"]:
            return output
        text, image = output[:, : now["text"]], output[:, now["text"] :]
        return torch.cat([text, changed(image)], dim=1)

    with contextlib.ExitStack() as stack:
        handle = denoiser.register_forward_pre_hook(begin, with_kwargs=True)
        stack.callback(handle.remove)
        for name, module in denoiser.named_modules():
            if config.sites is not None and not any(name.startswith(f"{block}.") for block in config.sites):
                continue
            if flux and fnmatchcase(name, "transformer_blocks.*.attn.to_out.0"):
                handle = module.register_forward_pre_hook(of_input)
            elif flux and fnmatchcase(name, "single_transformer_blocks.*.attn"):
                handle = module.register_forward_hook(after_text)
            elif not flux and (config.sites is not None or name.startswith("up_blocks.")) and _attention(name, config):
                handle = module.register_forward_hook(of_output)
            else:
                continue
            stack.callback(handle.remove)
        yield


def _attention(name: str, config: NegToMeConfig) -> bool:
    return name.endswith(".attn1") or (config.cross_attention and name.endswith(".attn2"))


class Naive(NegToMe):
    """NegToMe by the transcription."""

    title = "NegToMe, naive transcription"
    version = 1

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "transcription": "naive"}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[Applied]:
        with attach(pipe, self.config.published_for("flux" if hasattr(pipe, "transformer") else "sdxl")):
            yield Applied(dict(call))
