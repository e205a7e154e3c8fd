"""Normalised attention guidance: a negative prompt inside the attentions, for any number of steps."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from experiments.methods.assets import Retriever
from experiments.methods.method import Method, MethodContext
from experiments.methods.setting import numbers
from experiments.methods.steps import denoiser_calls, some_rows
from experiments.prompts import Group
from negtome.call_inspection import DenoiserCall
from negtome.sites import find_architecture
from negtome.validation import check_float

NORMS = {"L1": 1, "L2": 2}


@dataclass
class NAG(Method):
    """Normalised attention guidance (Chen et al., arXiv 2505.21179) away from the nearest protected concept's name.

    Before the output projection of an attention, the image tokens' output for the prompt, Z+, is extrapolated away from
    their output for the negative prompt, Z-; norms are those of a token:

        Z~ = scale Z+ - (scale - 1) Z-
        Z~ <- Z~ min(1, tau |Z+| / |Z~|)
        Z = alpha Z~ + (1 - alpha) Z+

    Flux is guided in every block, as in the published code, at the cost of a second pass. The negative text runs
    through the blocks beside the prompt. In the dual-stream blocks it attends to the prompt's image tokens; in the
    single-stream blocks to a copy of them, which gets the same Z. UNets are guided in the cross-attentions of the
    conditional half; the call's own negative prompt stays.

    If no concept is near enough, the pipeline is unchanged.

    Attributes:
        retriever: finds the concept.
        scale: at least 1, which is off; None: 5, as published for Flux.
        tau: the largest norm of Z~ relative to that of Z+, above 0; None: 2.5, as published.
        alpha: in [0, 1], 0 is off; None: 0.25, as published.
        end: the share of the denoising that is guided, in (0, 1]: timesteps from 1000 (1 - end) on; published 1.
        norm: "L2" as in the published code, or "L1" as in the paper.
        prompt: with {} for the concept's name.
    """

    title = "normalised attention guidance"
    columns = numbers("scale", "end")
    version = 1

    name: str
    retriever: Retriever
    scale: float | None = None
    tau: float | None = None
    alpha: float | None = None
    end: float = 1.0
    norm: Literal["L1", "L2"] = "L2"
    prompt: str = "{}"

    def __post_init__(self) -> None:
        self.scale = check_float("method.scale", 5.0 if self.scale is None else self.scale, 1, math.inf)
        self.tau = check_float("method.tau", 2.5 if self.tau is None else self.tau, 1e-3, math.inf)
        self.alpha = check_float("method.alpha", 0.25 if self.alpha is None else self.alpha, 0, 1)
        self.end = check_float("method.end", self.end, 1e-3, 1)
        if self.norm not in NORMS:
            raise ValueError(f"method.norm must be one of {sorted(NORMS)}, got {self.norm!r}")

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "retriever": self.retriever.settings()}

    def guide(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Return Z from Z+ and Z- [..., C]."""
        precise = torch.promote_types(positive.dtype, torch.float32)
        wanted, unwanted = positive.to(precise), negative.to(precise)
        apart = self.scale * wanted - (self.scale - 1) * unwanted
        length, longest = (
            torch.linalg.vector_norm(tokens, NORMS[self.norm], dim=-1, keepdim=True) for tokens in (apart, wanted)
        )
        apart = apart * (self.tau * longest / length.clamp_min(torch.finfo(precise).tiny)).clamp_max(1)
        return torch.lerp(wanted, apart, self.alpha).to(positive.dtype)

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        architecture = find_architecture(pipe)
        if architecture.name not in ("Flux", "SDXL", "SD1.5"):
            raise ValueError(
                f"method={self.name} is defined for Flux, SDXL and Stable Diffusion 1.5, got {type(pipe).__name__}: "
                "choose another model, or leave the method out"
            )
        references = self.retriever.find(pipe, group, call)
        context = MethodContext(dict(call), references={asset.label: score for asset, score in references})
        if not references or self.scale == 1 or not self.alpha:
            yield context
            return
        names = dict.fromkeys(self.prompt.format(asset.name) for asset, _ in references)
        guided = _in_joint_attentions if architecture.name == "Flux" else _in_cross_attentions
        with guided(self, pipe, ", ".join(names), call):
            yield context

    def is_active(self, denoiser: DenoiserCall) -> bool:
        return denoiser.timestep >= 1000 * (1 - self.end)


def _encoded(pipe: Any, prompt: str, **options: Any) -> dict[str, torch.Tensor]:
    """Return the embeddings of a prompt, [1, ...], by the denoiser's arguments."""
    with torch.no_grad():
        values = pipe.encode_prompt(prompt, device=pipe._execution_device, num_images_per_prompt=1, **options)
    names = find_architecture(pipe).prompts
    return {name: value for name, value in zip(names, values, strict=False) if name is not None and value is not None}


@contextlib.contextmanager
def _in_joint_attentions(method: NAG, pipe: Any, prompt: str, call: Mapping[str, Any]) -> Iterator[None]:
    """Guide Flux: in active steps the batch is [rows with the prompt, the same rows with the negative prompt]."""
    architecture = find_architecture(pipe)
    options = {key: call[key] for key in ("max_sequence_length",) if key in call}
    negative = _encoded(pipe, prompt, prompt_2=None, **options)
    active = False

    def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
        nonlocal active
        active = method.is_active(denoiser) and bool(denoiser.conditional)  # not the negative call of true guidance
        if not active:
            return arguments
        doubled = some_rows(pipe, denoiser, arguments, [*range(denoiser.rows), *range(denoiser.rows)])
        for name, value in negative.items():
            positive = arguments[name]
            doubled[name] = torch.cat([positive, value.to(positive).expand_as(positive)])
        return doubled

    def after(denoiser: DenoiserCall, output: torch.Tensor) -> torch.Tensor:
        return output[: denoiser.rows] if active else output

    def same_images(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the negative text the prompt's image tokens."""
        if not active:
            return None
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].chunk(2)[0].repeat(2, 1, 1)}

    def of_images(projection: Any, args: tuple[torch.Tensor]) -> Any:
        return (method.guide(*args[0].chunk(2)).repeat(2, 1, 1),) if active else None

    def of_last(block: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
        return (output[0], output[1].chunk(2)[0].repeat(2, 1, 1)) if active else None

    def of_both(attention: Any, args: Any, output: torch.Tensor) -> Any:
        if not active:
            return None
        text, image = output.split([length, output.shape[1] - length], dim=1)
        return torch.cat([text, method.guide(*image.chunk(2)).repeat(2, 1, 1)], dim=1)

    length = negative[architecture.prompts[0]].shape[1]
    denoiser = getattr(pipe, architecture.denoiser)
    with denoiser_calls(pipe, before, after), contextlib.ExitStack() as stack:
        for block in denoiser.transformer_blocks:
            stack.callback(block.attn.register_forward_pre_hook(same_images, with_kwargs=True).remove)
            stack.callback(block.attn.to_out[0].register_forward_pre_hook(of_images).remove)
        stack.callback(denoiser.transformer_blocks[-1].register_forward_hook(of_last).remove)
        for block in denoiser.single_transformer_blocks:
            stack.callback(block.attn.register_forward_hook(of_both).remove)
        yield


@contextlib.contextmanager
def _in_cross_attentions(method: NAG, pipe: Any, prompt: str, call: Mapping[str, Any]) -> Iterator[None]:
    """Guide a UNet: cross-attentions get the conditional rows again with the negative text, behind the batch."""
    architecture = find_architecture(pipe)
    text = _encoded(pipe, prompt, do_classifier_free_guidance=False)[architecture.prompts[0]]
    active, rows = False, slice(0)

    def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
        nonlocal active, rows
        active = method.is_active(denoiser)
        rows = slice(denoiser.images * denoiser.conditional[0], denoiser.images * (denoiser.conditional[-1] + 1))
        return arguments

    def with_negative(attention: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> Any:
        if not active:
            return None
        tokens, prompts = args[0], kwargs["encoder_hidden_states"]
        unwanted = text.to(prompts).expand_as(prompts[rows])
        return (torch.cat([tokens, tokens[rows]]),), kwargs | {"encoder_hidden_states": torch.cat([prompts, unwanted])}

    def of_images(projection: Any, args: tuple[torch.Tensor]) -> Any:
        if not active:
            return None
        count = rows.stop - rows.start
        tokens, negative = args[0][:-count], args[0][-count:]
        return (torch.cat([tokens[: rows.start], method.guide(tokens[rows], negative), tokens[rows.stop :]]),)

    with denoiser_calls(pipe, before), contextlib.ExitStack() as stack:
        for name, module in getattr(pipe, architecture.denoiser).named_modules():
            if name.endswith(".attn2"):
                stack.callback(module.register_forward_pre_hook(with_negative, with_kwargs=True).remove)
                stack.callback(module.to_out[0].register_forward_pre_hook(of_images).remove)
        yield
