"""Read the calls of a pipeline and of its denoiser: how many images, which step, which prompts and tokens."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from negtome.architectures import Architecture

#: Two embeddings of one text differ by rounding. Those of different texts differ in some element by more than this
#: share of itself and of a median element.
ROUNDING = 0.05


@dataclass(frozen=True)
class DenoiserCall:
    """One call of the denoiser.

    Attributes:
        timestep: training timestep, 1000 = pure noise.
        time: [1] the same, as the scheduler holds it.
        again: whether the previous call was of the same timestep of the schedule.
        index: number of the denoising step, from 0 for the first one that the pipeline runs. A step of a second-order
            scheduler has two timesteps, and a timestep that PNDM repeats is one step.
        steps: number of denoising steps of the pipeline's call, None if unknown.
        rows: rows of the batch, all chunks included.
        cfg_chunks: parts of the batch that hold the same images, one after the other: 2 for unconditional and
            conditional in one batch, 3 with a perturbed one, else 1.
        conditional: indices of the chunks that are conditioned on the prompt.
        prompts: [rows, ...] text embeddings, or [1, ...] for all rows, by the names of their arguments; lists of texts
            are padded with zeros.
        grid: (height, width) of the generated image in tokens on the largest feature map, or (frames, height, width).
        stream: tokens of all images of a row, generated and input, if the sample is packed; else those of the grid.
    """

    timestep: float
    time: torch.Tensor
    again: bool
    index: int
    steps: int | None
    rows: int
    cfg_chunks: int
    conditional: tuple[int, ...]
    prompts: Mapping[str, torch.Tensor]
    grid: tuple[int, ...]
    stream: int

    @property
    def images(self) -> int:
        """Return how many images are generated."""
        return self.rows // self.cfg_chunks

    @property
    def text(self) -> torch.Tensor:
        """Return the first of `prompts`."""
        return next(iter(self.prompts.values()))


class Snapshot:
    """Remembers tensors and their versions. It keeps the tensors, so that no other tensor gets their memory."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._tensors = [(tensor, self._count_writes(tensor)) for tensor in tensors]

    def holds(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Tell whether these are the very tensors, and nothing was written to them since."""
        current = [(tensor, self._count_writes(tensor)) for tensor in tensors]
        return len(current) == len(self._tensors) and all(
            tensor is other and writes == before
            for (tensor, writes), (other, before) in zip(current, self._tensors, strict=True)
        )

    @staticmethod
    def _count_writes(tensor: torch.Tensor) -> int | None:
        return None if tensor.is_inference() else tensor._version  # torch counts those to the others alone


class CallReader:
    """Reads the calls of the denoiser in one call of a pipeline, without waiting for the device each time.

    A UNet gets its timestep as a view of one element of `scheduler.timesteps`, and some transformers get that expanded
    to the rows; the position in memory tells the step. Others get it divided and rounded to the dtype of the latents,
    in bfloat16 by up to 4 timesteps; there the scheduler's own counter tells the step. Values are fetched once.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._timesteps = Snapshot([])  # the scheduler's timesteps
        self._values: list[float] = []
        self._step: tuple[int | None, float] | None = None  # of the last call
        self._grids: dict[torch.Size, tuple[int, ...]] = {}
        self._padded: list[tuple[Snapshot, torch.Tensor]] = []
        self._timesteps_run = 0
        self.schedule: list[float] = []  # timesteps of the pipeline's loop, if known; a repeated one stands once
        self.order = 1  # timesteps in a step of the scheduler
        self._merges_repeated = False

    def read(self, pipe: Any, arguments: Mapping[str, Any], images: int | None) -> DenoiserCall:
        """Read a call of the denoiser.

        Args:
            pipe: that calls it.
            arguments: the denoiser's, by name.
            images: that the call of the pipeline generates; see `PipelineCall`.

        Raises:
            ValueError: the time, or another of the schedule, is no training timestep; or the rows are not `images`
                times the chunks of a batch.
        """
        architecture = self._architecture
        sample = arguments[architecture.sample]
        rows, shape = len(sample), sample[0].shape
        guided = int(getattr(pipe, "do_classifier_free_guidance", True))
        perturbed = int(getattr(pipe, "do_perturbed_attention_guidance", False))
        if architecture.guidance in ("calls", "guider"):
            images = rows
        elif not images or rows % images or rows // images > 1 + guided + perturbed:
            raise ValueError(
                f"NegToMe expected 1 to {1 + guided + perturbed} rows for each image, got {rows} rows for {images} "
                f"images (of prompt or prompt_embeds, times {architecture.per_prompt}, in the call of the attached "
                f"{type(pipe).__name__}); give a prompt, or a row of embeddings, for each image."
            )
        chunks = rows // images
        position, timestep, time = self._locate(pipe, arguments[architecture.time])
        previous, self._step = self._step, (position, timestep)
        again = self._step == previous
        repeated = self._merges_repeated and previous is not None and timestep == previous[1]
        if not again and not repeated:
            self._timesteps_run += 1
        index, steps = self._count_steps()
        if shape not in self._grids:
            self._grids[shape] = architecture.grid(arguments)
        grid = self._grids[shape]
        if architecture.guidance == "batch":
            conditional = range(max(chunks - 1 - perturbed, 0), chunks)
        elif architecture.guidance == "guider":
            guider = getattr(pipe, "guider", None)
            conditional = range(1 if guider is None or guider.is_conditional else 0)
        else:
            conditional = range(0 if again and architecture.guidance == "calls" else 1)
        prompts = {name: value_at(arguments, name) for name in filter(None, architecture.prompts)}
        if architecture.list_inputs:
            prompts = {name: self._pad(value) for name, value in prompts.items()}
        return DenoiserCall(
            timestep=timestep,
            time=time,
            again=again,
            index=index,
            steps=steps,
            rows=rows,
            cfg_chunks=chunks,
            conditional=tuple(conditional),
            prompts={name: value for name, value in prompts.items() if value is not None},
            grid=grid,
            stream=shape[0] if len(shape) == 2 else math.prod(grid),
        )

    def _pad(self, texts: list[torch.Tensor]) -> torch.Tensor:
        """Pad texts [L, D] to one tensor, the same in every step even if the pipeline makes a new list."""
        for snapshot, padded in self._padded:
            if snapshot.holds(texts):
                return padded
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        self._padded.append((Snapshot(texts), padded))
        return padded

    def _count_steps(self) -> tuple[int, int | None]:
        """Return the index of the denoising step that a call belongs to, and how many there are, None if unknown."""
        return (self._timesteps_run - 1) // self.order, math.ceil(len(self.schedule) / self.order) or None

    def _locate(self, pipe: Any, time: torch.Tensor | float) -> tuple[int | None, float, torch.Tensor]:
        """Return the index of a call among the scheduler's timesteps, the timestep, and the same as a tensor [1]."""
        scheduler, to_timestep = pipe.scheduler, self._architecture.timestep_scale
        self.order = getattr(scheduler, "order", 1)
        # PNDM repeats a timestep to evaluate a step again. A scheduler with sigmas may round two steps to one timestep.
        self._merges_repeated = self.order == 1 and not hasattr(scheduler, "sigmas")
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, torch.Tensor):
            value = to_timestep(_first(time))
            _check_unit(type(scheduler).__name__, value)
            return None, value, torch.tensor([value])
        if not self._timesteps.holds([timesteps]):
            self._timesteps, self._values = Snapshot([timesteps]), timesteps.tolist()
            self.schedule = []
            _check_unit(type(scheduler).__name__, *self._values)
        index = _index_in(timesteps, time.flatten()[:1]) if isinstance(time, torch.Tensor) else None
        if index is None:  # step_index is set after the first step, and begin_index often before the loop
            index = getattr(scheduler, "step_index", None)
        if index is None:
            index = getattr(scheduler, "begin_index", None)
        if index is None:
            value = to_timestep(_first(time))
            index = min(range(len(self._values)), key=lambda number: abs(self._values[number] - value))
            if abs(self._values[index] - value) > 4:  # bfloat16 rounds by less, so it is none of them
                _check_unit(type(scheduler).__name__, value)
                return None, value, timesteps.new_tensor([value])
        if not self.schedule:  # an input image makes the loop begin later than the schedule, and it may end earlier
            values = self._values[index:][: self._count_timesteps(pipe)]
            self.schedule = [value for value, _ in itertools.groupby(values)] if self._merges_repeated else values
        return index, float(self._values[index]), timesteps[index : index + 1]

    def _count_timesteps(self, pipe: Any) -> int | None:
        """Return how many timesteps the pipeline's loop has, None if it does not say so."""
        guider = getattr(pipe, "guider", None)
        if self._architecture.guidance == "guider" and guider is not None and self.order == 1:
            count: int | None = guider.get_state()["num_inference_steps"]
            return count
        return getattr(pipe, "num_timesteps", None)


class StepReader(CallReader):
    """Reads the calls of the denoiser for a guider, which sees no scheduler but learns each step from the pipeline.

    It cannot know that a scheduler is of second order, so every timestep counts as a step.
    """

    def set_step(self, index: int, steps: int | None, timestep: float, time: torch.Tensor) -> None:
        """Set the step of the calls that follow.

        Args:
            index: number of the step, from 0.
            steps: number of steps of the pipeline's call, None if unknown.
            timestep: training timestep.
            time: the same, as the scheduler holds it.

        Raises:
            ValueError: it is no training timestep.
        """
        self._current = (index, timestep, time.reshape(1))
        self._steps = steps
        _check_unit("scheduler", timestep)

    def _count_steps(self) -> tuple[int, int | None]:
        return self._current[0], self._steps

    def _locate(self, pipe: Any, time: torch.Tensor | float) -> tuple[int | None, float, torch.Tensor]:
        return self._current


def _first(time: torch.Tensor | float) -> float:
    return float(time.flatten()[0] if isinstance(time, torch.Tensor) else time)


def _check_unit(scheduler: str, *timesteps: float) -> None:
    """Refuse values that cannot be training timesteps."""
    if not all(-1e-3 <= timestep <= 1000 + 1e-3 for timestep in timesteps):
        raise ValueError(
            f"NegToMe's timestep_range is in training timesteps, from 0 to 1000, but the timesteps of this "
            f"{scheduler} go from {min(timesteps):g} to {max(timesteps):g} (EDM's are logarithms of the "
            "noise level); choose a scheduler in training timesteps, such as EulerDiscreteScheduler."
        )


def _index_in(values: torch.Tensor, value: torch.Tensor) -> int | None:
    """Return the index of the element of values [n] that a tensor of one element is a view of, if any."""
    if values.dim() != 1 or value.numel() != 1 or value.dtype != values.dtype or values.stride(0) < 1:
        return None
    if value.device != values.device or value.untyped_storage().data_ptr() != values.untyped_storage().data_ptr():
        return None
    number, between = divmod(int(value.storage_offset()) - int(values.storage_offset()), values.stride(0))
    return number if not between and 0 <= number < len(values) else None


def read_arguments(
    architecture: Architecture, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of one call of a pipeline by name, defaults included."""
    if architecture.guidance == "guider":
        return _read_modular_arguments(pipe, *args, **kwargs)
    # A subclass may only pass its arguments on.
    signatures = (inspect.signature(cls.__call__) for cls in type(pipe).__mro__ if "__call__" in vars(cls))
    signature = next(s for s in signatures if architecture.per_prompt in s.parameters)
    parameters = list(signature.parameters.values())[1:]  # without self
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return defaults | dict(zip((p.name for p in parameters), args, strict=False)) | dict(kwargs)


def _read_modular_arguments(pipe: Any, state: Any = None, output: object = None, **inputs: Any) -> dict[str, Any]:
    """Read the call of a ModularPipeline, which may go on from the state that another one returned."""
    defaults = {parameter.name: parameter.default for parameter in pipe.blocks.inputs if parameter.name is not None}
    values = {} if state is None else state.values
    return {**defaults, **values, **inputs}


class PipelineCall:
    """The arguments of one call of a pipeline, and what they say about its images.

    Args:
        architecture: of the pipeline.
        arguments: all of them by name, defaults included; see `read_arguments`.

    Attributes:
        arguments: the same.
        images_per_prompt: as the call says.
        prompts: how many prompts, or rows of embeddings, the call has; None if its arguments do not say it.
    """

    def __init__(self, architecture: Architecture, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
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


def images_in_group(pipeline_call: PipelineCall, call: DenoiserCall, group_size: int | None, argument: str) -> int:
    """Return the size of the groups in a call of the denoiser.

    Args:
        pipeline_call: that makes the call.
        call: of the denoiser.
        group_size: as in `negtome.attach`.
        argument: of the pipeline, that sets how many images a prompt has.

    Raises:
        ValueError: a group has a single image, ends within the images of a prompt, or is incomplete.
    """
    per_prompt = pipeline_call.images_per_prompt
    several_prompts = (pipeline_call.prompts or 1) > 1
    size = group_size
    if size is None:
        # Several prompts form a group each, if the pipeline makes as many images as its arguments say.
        as_expected = several_prompts and per_prompt > 1 and pipeline_call.images == call.images
        size = per_prompt if as_expected else call.images
    if size < 2:
        raise ValueError(f"NegToMe pushes images apart and needs at least 2, got 1; pass {argument}=2 or more.")
    if several_prompts and size % per_prompt and per_prompt % size:
        raise ValueError(
            f"NegToMe expected groups that end where a prompt's images do, got group_size={size} and {argument}="
            f"{per_prompt}; make {argument} a multiple of group_size."
        )
    if call.rows % (call.cfg_chunks * size):
        raise ValueError(
            f"NegToMe expected complete groups of {size} images, got {call.images} images in one call; make {argument} "
            "times the number of prompts a multiple of group_size."
        )
    return size


def check_one_prompt(
    pipeline_call: PipelineCall, call: DenoiserCall, group_size: int, architecture: Architecture
) -> None:
    """Raise ValueError if the images of a group have several prompts."""
    several = group_size == call.images and pipeline_call.has_several_texts()
    # A callback, or a pipeline of the user's, may have put other embeddings in the place of the texts'.
    if several or not all(_rows_agree(rows, group_size) for rows in call.prompts.values() if len(rows) == call.rows):
        if architecture.guidance == "guider" and group_size < call.images:
            each = architecture.per_prompt
            raise ValueError(
                "NegToMe expected the images of a group to share their prompt, but with several prompts and several "
                "images of each, this ModularPipeline of diffusers mixes the prompts up; repeat each prompt in the "
                f"list instead, with {each}=1 and group_size in attach."
            )
        raise ValueError(
            "NegToMe expected the images of a group to share their prompt, got several prompts; pass "
            f"{architecture.per_prompt}=2 or more, or set group_size, so that only images of a prompt are pushed apart."
        )


def _rows_agree(embedding: torch.Tensor, group_size: int) -> bool:
    """Tell whether the rows of an embedding [rows, ...] are of one text in every group of consecutive rows.

    Rows of one text are copies, or were computed in one batch and differ by rounding. Each element is compared at the
    scale of a median one: some language models have activations a million times as large as the others, which would
    hide the difference between two texts.
    """
    groups = embedding.detach().unflatten(0, (-1, group_size))
    if torch.equal(groups, groups[:, :1].expand_as(groups)):
        return True
    groups = groups.float()
    size = groups.abs()
    nonzero = size[size > 0]  # padding is zero
    median = nonzero.median() if nonzero.numel() else 0
    return not ((groups - groups[:, :1]).abs() > ROUNDING * (size[:, :1] + median)).any()


def check_one_length(
    pipeline_call: PipelineCall, call: DenoiserCall, mask: torch.Tensor, architecture: Architecture
) -> None:
    """Raise ValueError if masks [rows, T] differ within a chunk, where diffusers mixes them up or drops padding."""
    chunks = mask.unflatten(0, (call.cfg_chunks, -1))
    if (chunks == chunks[:, :1]).all():
        return
    each = architecture.per_prompt
    if architecture.drops_text_padding is not None:
        reason = "the image's tokens follow its text at once here; give each prompt a call of its own."
    elif not pipeline_call.arguments:  # the caller is a guider
        reason = (
            f"with {each} > 1, diffusers gives images the text masks of other prompts here, and a guider cannot see "
            f"{each}; give each prompt a call of its own, or use negtome.attach with {each}=1 and group_size."
        )
    else:
        reason = (
            f"with {each} > 1, diffusers gives images the text masks of other prompts here (its PR #14147 describes "
            f"how); give each prompt a call of its own, or repeat it in the list of prompts, with {each}=1."
        )
    raise ValueError(f"NegToMe expected prompts of one length, got several: {reason}")
