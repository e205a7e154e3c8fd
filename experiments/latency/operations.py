"""Record the operations of a denoising step from shapes alone: FLOPs and bytes, on torch's meta device.

A denoiser runs as it is, with NegToMe's own code at its hook points. Nothing is computed and no weight is needed.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from experiments.latency.random_weights import embeddings
from experiments.methods import naive
from negtome import NegToMeConfig
from negtome.architectures import HookPoint
from negtome.hooks import Layout, Route, Site, StepContext
from negtome.sites import fewest_tokens, find_architecture, find_sites, largest_map

#: Operations that read the matched tokens; the push of a hook point begins with one.
GATHERS = ("index_select", "gather")
#: Channels that a random projection leaves to tokens for matching; see `experiments.methods.approximate_match`.
PROJECTIONS = (128, 64)


class Operation(NamedTuple):
    """A call of a kernel: its name in aten, its FLOPs, and the bytes of its inputs and outputs."""

    name: str
    flops: int
    bytes: int


class Push(NamedTuple):
    """The operations at one hook point, and those of alternatives.

    Attributes:
        tokens, channels: of an image there.
        matching: up to the gather.
        moving: the gather and what follows.
        lower_bound: as of `measure.lower_bound`, the bare product and one pass over the tokens that move.
        naive: of the naive transcription with the released matching; none for a reference image.
        projected: matching in a random projection, for each width of `PROJECTIONS`.
    """

    tokens: int
    channels: int
    matching: tuple[Operation, ...]
    moving: tuple[Operation, ...]
    lower_bound: tuple[Operation, ...]
    naive: tuple[Operation, ...]
    projected: tuple[tuple[Operation, ...], ...]


class Step(NamedTuple):
    """A step in the timestep range: the denoiser's own operations, and the pushes at its hook points in order."""

    denoiser: list[Operation]
    pushes: list[Push]


class Recorder(TorchDispatchMode):
    """Records the operations that run while it is active. Views move nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    @contextmanager
    def separately(self) -> Iterator[list[Operation]]:
        """Yield a list that takes the operations of the block."""
        outer, self.operations = self.operations, []
        try:
            yield self.operations
        finally:
            self.operations = outer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        packet, name = func._overloadpacket, func._schema.name.removeprefix("aten::")
        if func.is_view or name == "_unsafe_view" or "empty" in name:
            return output
        inputs = [args, {key: value for key, value in kwargs.items() if key != "out"}]
        if name in ("copy_", "fill_", "zero_"):  # they overwrite their first argument and do not read it
            inputs[0] = args[1:]
        flops = flop_registry[packet](*args, **kwargs, out_val=output) if packet in flop_registry else 0
        self.operations.append(Operation(name, flops, count_bytes(inputs) + count_bytes(output)))
        return output


def count_bytes(values: Any) -> int:
    """Add up the bytes of all tensors in nested values; an expanded dimension is in memory once."""
    total = 0
    for tensor in tree_leaves(values):
        if isinstance(tensor, torch.Tensor):
            sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
            total += tensor.element_size() * math.prod(sizes)
    return total


class FusedKernels(TorchFunctionMode):
    """Runs attention and RMS norm as one operation each, as a GPU does. The meta device has no such kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _FUSED.get(func, func)(*args, **(kwargs or {}))


def _attention(query: Any, key: Any, value: Any, *options: Any, **more_options: Any) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _rms_norm(features: Any, shape: Any, weight: Any = None, eps: float | None = None) -> torch.Tensor:
    return torch.nn.functional.layer_norm(features, shape, weight)  # of the same inputs and output


_FUSED = {torch.nn.functional.scaled_dot_product_attention: _attention, torch.nn.functional.rms_norm: _rms_norm}


class RecordedSite(Site):
    """A hook point whose push is recorded, and after it the alternatives on tensors of the same shape."""

    def __init__(self, name: str, hook_point: HookPoint, config: NegToMeConfig, recorder: Recorder) -> None:
        super().__init__(name, hook_point, config, None)
        self.recorder, self.released = recorder, config.replace(matching="released")
        self.recorded: Push | None = None

    def push(self, features: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Push as a `Site` does; `recorded` stays None on a feature map that is too small."""
        with self.recorder.separately() as operations:
            pushed = super().push(features, context)
        if not operations:
            return pushed
        length, channels = features.shape[1:]
        tokens = length if self.hook_point.image == "all" else context.tokens
        images = context.group_size if context.layout is None else 2
        matching, moving = _split(operations)
        self.recorded = Push(
            tokens,
            channels,
            matching=tuple(matching),
            moving=tuple(moving),
            lower_bound=tuple(self._lower_bound(features, tokens, images)),
            naive=tuple(self._naive(features, tokens, context)),
            projected=tuple(self._projected(features, tokens, width, context) for width in PROJECTIONS),
        )
        return pushed

    def _lower_bound(self, features: torch.Tensor, tokens: int, images: int) -> list[Operation]:
        chunks, channels = len(features) // images, features.shape[-1]
        moving = features.new_empty(chunks, (images - 1) * tokens, channels)
        with self.recorder.separately() as operations:
            torch.bmm(moving, features.new_empty(chunks, channels, tokens))
            moving.clone()
        return operations

    def _naive(self, features: torch.Tensor, tokens: int, context: StepContext) -> list[Operation]:
        text = features.shape[1] - tokens
        with self.recorder.separately() as operations:
            if context.layout is None:
                pushed = naive.push(features[:, text:], len(features) // context.group_size, self.released)
                if text:
                    torch.cat([features[:, :text], pushed], dim=1)
        return operations

    def _projected(
        self, features: torch.Tensor, tokens: int, width: int, context: StepContext
    ) -> tuple[Operation, ...]:
        rows, length, channels = features.shape
        self.similarity = None  # or else another call of the module would be joined to the first
        with self.recorder.separately() as projection:
            torch.mm(features.new_empty(rows * tokens, channels), features.new_empty(channels, width))
        with self.recorder.separately() as operations:
            super().push(features.new_empty(rows, length, width), context)
        return (*projection, *_split(operations)[0])


def _split(operations: Sequence[Operation]) -> tuple[Sequence[Operation], Sequence[Operation]]:
    """Split the operations of a hook point into matching and moving."""
    first = next(number for number, operation in enumerate(operations) if operation.name in GATHERS)
    return operations[:first], operations[first:]


def record_step(pipe: Any, spec: DictConfig, config: NegToMeConfig | None, side: int, images: int) -> Step:
    """Record a step in the timestep range, with guidance where it shares the batch.

    Args:
        pipe: a pipeline on the meta device that `build_pipeline` made of `spec`.
        config: the settings; None for the baseline.
        side: of an image, in pixels.
        images: in the call, all in one group. With a config, a single image gets a reference image as a further row.
    """
    architecture = find_architecture(pipe)
    denoiser = getattr(pipe, architecture.denoiser)
    chunks = 2 if architecture.guidance == "batch" else 1
    grid = (side // pipe.vae_scale_factor // architecture.patch,) * 2
    recorder, hooked, sites, layout, fewest = Recorder(), [], [], None, 0
    if config is not None:
        hooked = find_sites(denoiser, architecture, config.sites, config.cross_attention)
        sites = [RecordedSite(name, hook_point, config, recorder) for name, _, hook_point in hooked]
        if architecture.levels:
            largest = largest_map(denoiser, [site.name for site in sites], grid)
            fewest = fewest_tokens(grid, config.side_within(largest))
        if images == 1:
            masks = dict.fromkeys(math.prod(grid) // 4**level for level in range(8))  # all tokens of every feature map
            layout = Layout(chunks, 1, 1, (Route(images=((0, 1),), rows=(1, 2), masks=masks, allowed={}),))
    arguments = denoiser_arguments(pipe, spec, side, chunks * (1 + images if layout else images))
    context = StepContext(images, math.prod(grid), math.prod(grid), fewest, layout)
    try:
        for site, (name, module, _) in zip(sites, hooked, strict=True):
            site.enter(module, denoiser.get_submodule(name.rpartition(".")[0]))
            site.context = context
        with torch.no_grad(), FusedKernels(), recorder:
            denoiser(**arguments)
    finally:
        for site in sites:
            site.leave()
    return Step(recorder.operations, [site.recorded for site in sites if site.recorded is not None])


def denoiser_arguments(pipe: Any, spec: DictConfig, side: int, rows: int) -> dict[str, Any]:
    """Make the denoiser's arguments for so many rows, on the meta device."""
    text = embeddings(pipe, spec, rows)
    pooled, latent = text["pooled_prompt_embeds"], side // pipe.vae_scale_factor
    arguments = {"encoder_hidden_states": text["prompt_embeds"], "timestep": pooled.new_empty(rows)}
    if hasattr(pipe, "unet"):
        conditions = {"text_embeds": pooled, "time_ids": pooled.new_empty(rows, 6)}
        sample = pooled.new_empty(rows, pipe.unet.config.in_channels, latent, latent)
        return {**arguments, "sample": sample, "added_cond_kwargs": conditions}
    tokens, channels = (latent // 2) ** 2, pipe.transformer.config.in_channels
    return {
        **arguments,
        "hidden_states": pooled.new_empty(rows, tokens, channels),
        "pooled_projections": pooled,
        "guidance": pooled.new_empty(rows) if pipe.transformer.config.guidance_embeds else None,
        "img_ids": pooled.new_empty(tokens, 3),
        "txt_ids": pooled.new_empty(text["prompt_embeds"].shape[1], 3),
    }
