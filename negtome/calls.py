"""How the calls of a pipeline and of its denoiser are read: how many images, which step, where their tokens are."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from negtome.architectures import Architecture


@dataclass(frozen=True)
class DenoiserCall:
    """What one call of the denoiser says about itself.

    Attributes:
        timestep: in training timesteps, 1000 = pure noise.
        time: [1] the same, as the scheduler holds it.
        again: whether the call before was of the same step.
        rows: of the batch, all halves included.
        halves: parts of the batch that hold the same images, one after the other: 2 for unconditional and conditional
            in one batch, 3 with a perturbed one, else 1.
        conditional: the halves that are conditioned on the prompt.
        prompts: [rows, ...] the embeddings of the text, or [1, ...] of all rows, by the names of their arguments;
            without those that are None. Of texts in a list, padded with zeros.
        grid: (height, width) of the generated image in tokens, of the largest feature map, or (frames, height, width).
        stream: tokens of all images of a row, generated and given, where the sample is packed; else of the grid.
    """

    timestep: float
    time: torch.Tensor
    again: bool
    rows: int
    halves: int
    conditional: tuple[int, ...]
    prompts: Mapping[str, torch.Tensor]
    grid: tuple[int, ...]
    stream: int

    @property
    def images(self) -> int:
        """Images that are generated."""
        return self.rows // self.halves

    @property
    def text(self) -> torch.Tensor:
        """The first of `prompts`."""
        return next(iter(self.prompts.values()))


class Snapshot:
    """Tensors as they are now. They are kept, so that no other tensor gets the memory of one."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._tensors = [(tensor, self._count_writes(tensor)) for tensor in tensors]

    def holds(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Tell whether these are the very tensors, and nothing was written to them since."""
        now = [(tensor, self._count_writes(tensor)) for tensor in tensors]
        return len(now) == len(self._tensors) and all(
            tensor is other and writes == before
            for (tensor, writes), (other, before) in zip(now, self._tensors, strict=True)
        )

    @staticmethod
    def _count_writes(tensor: torch.Tensor) -> int | None:
        return None if tensor.is_inference() else tensor._version  # torch counts those to the others alone


class CallReader:
    """Reads the calls of the denoiser in one call of a pipeline, without waiting for the device at every one.

    A UNet gets its timestep as a view of one element of `scheduler.timesteps`, some transformers one that is expanded
    to the rows, and where that lies in memory says which. Others get it divided and rounded to the dtype of the
    latents, in bfloat16 by up to 4 timesteps: there the scheduler's own counter says which. The values are fetched
    once.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._known = Snapshot([])  # the scheduler's timesteps
        self._values: list[float] = []
        self._step: tuple[int | None, float] | None = None  # of the last call
        self._grids: dict[torch.Size, tuple[int, ...]] = {}
        self._padded: list[tuple[Snapshot, torch.Tensor]] = []  # texts, and what was made of them
        self.schedule: list[float] = []  # of the pipeline's whole loop, as far as it is known

    def read(self, pipe: Any, arguments: Mapping[str, Any], images: int | None) -> DenoiserCall:
        """Read a call of the denoiser.

        Args:
            pipe: that calls it.
            arguments: the denoiser's, by name.
            images: that the call of the pipeline generates; see `PipelineCall`.

        Raises:
            ValueError: the time, or another of the schedule, is no training timestep; or the rows are not `images`
                times the halves of a batch.
        """
        architecture = self._architecture
        sample = arguments[architecture.sample]
        rows, shape = len(sample), sample[0].shape
        guided = int(getattr(pipe, "do_classifier_free_guidance", True))
        perturbed = int(getattr(pipe, "do_perturbed_attention_guidance", False))
        if architecture.guidance == "calls":
            images = rows
        elif not images or rows % images or rows // images > 1 + guided + perturbed:
            raise ValueError(
                f"NegToMe expected 1 to {1 + guided + perturbed} rows for each image, got {rows} rows for {images} "
                f"images (of prompt or prompt_embeds, times {architecture.per_prompt}, in the call of the attached "
                f"{type(pipe).__name__}); give a prompt, or a row of embeddings, for each image."
            )
        halves = rows // images
        index, timestep, time = self._when(pipe, arguments[architecture.time])
        step = (index, timestep)
        again, self._step = step == self._step, step
        if shape not in self._grids:
            self._grids[shape] = architecture.grid(arguments)
        grid = self._grids[shape]
        if architecture.guidance == "batch":
            conditional = range(max(halves - 1 - perturbed, 0), halves)
        else:
            conditional = range(0 if again and architecture.guidance == "calls" else 1)
        prompts = {name: value_at(arguments, name) for name in filter(None, architecture.prompts)}
        if architecture.listed:
            prompts = {name: self._pad(value) for name, value in prompts.items()}
        return DenoiserCall(
            timestep=timestep,
            time=time,
            again=again,
            rows=rows,
            halves=halves,
            conditional=tuple(conditional),
            prompts={name: value for name, value in prompts.items() if value is not None},
            grid=grid,
            stream=shape[0] if len(shape) == 2 else math.prod(grid),
        )

    def _pad(self, texts: list[torch.Tensor]) -> torch.Tensor:
        """Return texts [L, D] as one tensor, the same one in every step, in which a pipeline may make a new list."""
        for known, padded in self._padded:
            if known.holds(texts):
                return padded
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        self._padded.append((Snapshot(texts), padded))
        return padded

    def _when(self, pipe: Any, time: torch.Tensor | float) -> tuple[int | None, float, torch.Tensor]:
        """Return which of the scheduler's timesteps a call is at, the timestep itself, and as a tensor [1]."""
        scheduler, clock = pipe.scheduler, self._architecture.clock
        known = getattr(scheduler, "timesteps", None)
        if not isinstance(known, torch.Tensor):
            _check_unit(scheduler, value := clock(_first(time)))
            return None, value, torch.tensor([value])
        if not self._known.holds([known]):
            self._known, self._values = Snapshot([known]), known.tolist()
            self.schedule = []
            _check_unit(scheduler, *self._values)
        index = _number_in(known, time.flatten()[:1]) if isinstance(time, torch.Tensor) else None
        if index is None:  # the counter is there after the first step, and where a loop begins is often said before
            index = getattr(scheduler, "step_index", None)
        if index is None:
            index = getattr(scheduler, "begin_index", None)
        if index is None:
            value = clock(_first(time))
            index = min(range(len(self._values)), key=lambda number: abs(self._values[number] - value))
            if abs(self._values[index] - value) > 4:  # more than bfloat16 rounds: none of them
                _check_unit(scheduler, value)
                return None, value, known.new_tensor([value])
        if not self.schedule:  # it begins later than the scheduler's with a given image, and may end before
            self.schedule = self._values[index:][: getattr(pipe, "num_timesteps", None)]
        return index, float(self._values[index]), known[index : index + 1]


def _first(time: torch.Tensor | float) -> float:
    return float(time.flatten()[0] if isinstance(time, torch.Tensor) else time)


def _check_unit(scheduler: Any, *timesteps: float) -> None:
    """Refuse what cannot be training timesteps, of which a window is made."""
    if not all(-1e-3 <= timestep <= 1000 + 1e-3 for timestep in timesteps):
        raise ValueError(
            f"NegToMe's window is in training timesteps, from 0 to 1000, but the timesteps of this "
            f"{type(scheduler).__name__} go from {min(timesteps):g} to {max(timesteps):g} (EDM's are logarithms of the "
            "noise level); choose a scheduler in training timesteps, such as EulerDiscreteScheduler."
        )


def _number_in(values: torch.Tensor, value: torch.Tensor) -> int | None:
    """Tell which element of a list of values [n] a tensor of one element is a view of, if any."""
    if values.dim() != 1 or value.numel() != 1 or value.dtype != values.dtype or values.stride(0) < 1:
        return None
    if value.device != values.device or value.untyped_storage().data_ptr() != values.untyped_storage().data_ptr():
        return None
    number, between = divmod(int(value.storage_offset()) - int(values.storage_offset()), values.stride(0))
    return number if not between and 0 <= number < len(values) else None


class PipelineCall:
    """The arguments of one call of a pipeline, and what they say about its images.

    Args:
        architecture: of the pipeline.
        pipe: the pipeline.
        args, kwargs: of the call.

    Attributes:
        arguments: all of them by name, defaults included.
        images_per_prompt: as the call says.
        prompts: how many prompts, or rows of embeddings, the call has; None if its arguments do not say it.
    """

    def __init__(self, architecture: Architecture, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # A subclass may only pass its arguments on.
        signatures = (inspect.signature(cls.__call__) for cls in type(pipe).__mro__ if "__call__" in vars(cls))
        signature = next(s for s in signatures if architecture.per_prompt in s.parameters)
        parameters = list(signature.parameters.values())[1:]  # without self
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self.arguments = defaults | dict(zip((p.name for p in parameters), args, strict=False)) | dict(kwargs)
        self.images_per_prompt: int = self.arguments.get(architecture.per_prompt) or 1
        prompt = self.arguments.get("prompt")
        prompts = self.arguments.get("prompt_embeds") if prompt is None else prompt
        self.prompts: int | None = None
        if isinstance(prompts, str):
            self.prompts = 1
        elif isinstance(prompts, list | tuple | torch.Tensor):  # the pipeline refuses what is neither
            self.prompts = len(prompts)

    @property
    def images(self) -> int | None:
        """Images that the call generates; None if its arguments do not say it."""
        return None if self.prompts is None else self.prompts * self.images_per_prompt

    def callbacks(self) -> list[Callable[..., Any]]:
        """Return the user's functions that the pipeline calls between its steps, diffusers' deprecated one included."""
        return [value for name, value in self.arguments.items() if name.startswith("callback") and callable(value)]

    def has_several_texts(self) -> bool:
        """Tell whether lists of prompts, negative ones included, hold different texts; embeddings are not looked at."""
        if self.prompts == 1:
            return False
        lists = [v for name, v in self.arguments.items() if "prompt" in name and isinstance(v, list | tuple)]
        return any(isinstance(text, str) and text != texts[0] for texts in lists for text in texts)


def value_at(arguments: Mapping[str, Any], name: str) -> Any:
    """Look an argument up by a name that may lead into mappings, as "added_cond_kwargs.text_embeds"."""
    for key in name.split("."):
        arguments = arguments[key]
    return arguments


def with_value(arguments: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Return arguments in which another value stands at such a name."""
    key, _, rest = name.partition(".")
    return {**arguments, key: with_value(arguments[key], rest, value) if rest else value}
