"""Push the attention outputs that a model patcher shows to its patches, by `negtome.merge`.

ComfyUI calls a `GroupPush` or `ReferencePush` at three places:

- `sample` around each sampling pass: it starts a new report, and logs it at the end. Forge has no such place, so its
  script makes a new push for each pass.
- `apply` around each call of the model: it decides whether the call takes part, adds the reference images to the batch,
  and describes the batch in `transformer_options`.
- the object itself at each attention (`attn1_output_patch`): it pushes the image tokens.

A batch has one chunk for each entry of `cond_or_uncond`. A chunk has the images of the latent batch, and after them the
rows that reference pushes added.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from negtome.config import NegToMeConfig
from negtome.hooks import not_compiled
from negtome.merge import GroupReference, cannot_move, push_from, push_groups
from negtome.patcher.report import Report
from negtome.patcher.settings import PushSettings
from negtome.reference import fit, token_mask
from negtome.sites import feature_maps, fewest_tokens

#: Key of the batch's description in `transformer_options`.
KEY = "negtome"
#: The blocks of a UNet that take part, those of the authors' release.
UNET_BLOCKS = "output"
#: The release's rule for the feature maps that take part.
SIDE_WITHIN = NegToMeConfig().side_within
#: Relative difference of two sigmas that are the same up to rounding.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Batch:
    """The batch of one model call.

    Attributes:
        chunks: conditions that run together.
        images: images of the latent batch, in each chunk.
        added: reference rows after them, in each chunk.
        latent: (height, width) of the latent.
        rows_by_push: for every push that acts in this call, its rows (start, stop) in a chunk, or None for groups.
    """

    chunks: int
    images: int
    added: int
    latent: tuple[int, int]
    rows_by_push: Mapping[int, tuple[int, int] | None] = field(default_factory=dict)


class _Push:
    """The common part of the two pushes.

    Args:
        settings: of the method and the model.

    Attributes:
        report: of the last sampling pass.
    """

    def __init__(self, settings: PushSettings) -> None:
        self.settings = settings
        self.report = Report()
        self._sigmas: list[float] = []  # of the pass, each lower than the one before

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the push itself: Forge and older ComfyUI copy it with the model, away from its report and wrappers."""
        return self

    def sample(self, executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run a sampling pass and log the report."""
        self.report.start()
        self._sigmas = []
        output = executor(noise, *args, **kwargs)
        self.report.log()
        return output

    def _takes_part(self, sigma: float, sample_sigmas: torch.Tensor | None) -> bool:
        """Tell whether a model call at `sigma` takes part; `sample_sigmas` are those of the pass, falling."""
        schedule = self.settings.schedule
        if schedule.step_range is None:
            return schedule.low * (1 - ROUNDING) <= sigma <= schedule.high
        first, last = schedule.step_range
        return first <= self._step(sigma, sample_sigmas) <= last

    def _step(self, sigma: float, sample_sigmas: torch.Tensor | None) -> int:
        """Return the number of the step within the pass; a solver may call the model twice within a step."""
        if sample_sigmas is not None and len(sample_sigmas) > 1:
            return int((sigma <= sample_sigmas[1:] * (1 + ROUNDING)).sum())
        # Forge does not tell the schedule: there, each lower sigma counts as a step.
        if not self._sigmas or sigma < self._sigmas[-1] * (1 - ROUNDING):
            self._sigmas.append(sigma)
        return len(self._sigmas) - 1

    def apply(
        self,
        executor: Any,
        x: torch.Tensor,
        sigma: torch.Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model, with the batch's description in `transformer_options`."""
        options = dict(transformer_options or {})
        arguments = {"x": x, "c_concat": c_concat, "c_crossattn": c_crossattn, "control": control, **kwargs}
        self.report.calls += 1
        batch = options.get(KEY) or _describe(x, options)
        acts = self._takes_part(float(sigma.max()), options.get("sample_sigmas"))
        if acts and x.dim() != 4:
            reason = "the model has no hook point: its latents are those of videos or sound, or of Qwen-Image."
            self.report.skipped[reason] += 1
            acts = False
        if acts and (acts := self._can_act(batch)):
            self.report.active_calls += 1
            arguments, sigma, options = self._extend(executor, arguments, sigma, options, batch)
        x, c_concat, c_crossattn, control = (
            arguments.pop(name) for name in ("x", "c_concat", "c_crossattn", "control")
        )
        output = executor(x, sigma, c_concat, c_crossattn, control, options, **arguments)
        return self._shrink(output, batch) if acts else output

    @not_compiled()
    def __call__(self, tokens: torch.Tensor, extra_options: Mapping[str, Any]) -> torch.Tensor:
        """Push the image tokens in an attention's output [rows, N, C]; return `tokens` itself where none can move."""
        batch = extra_options.get(KEY)
        if batch is None or id(self) not in batch.rows_by_push:
            return tokens
        columns = self._image_tokens(tokens, extra_options, batch)
        if columns is None:
            return tokens
        before = tokens[:, columns]
        if tokens.dtype == torch.float16:  # products of large activations would overflow
            before = before.float()
        chunked = before.unflatten(0, (batch.chunks, -1))  # [chunks, images + added, N, C]
        moved, similarity = self._push(chunked, batch)
        strength = self.settings.strength
        names = ("block_type", "block", "block_index", "transformer_index")
        hook_point = tuple(extra_options.get(name) for name in names)
        if cannot_move(strength["alpha"], strength["threshold"]):
            self.report.add(hook_point, torch.zeros_like(similarity, dtype=torch.bool))
            return tokens
        self.report.add(hook_point, similarity > strength["threshold"])
        if tokens.dtype == torch.float16:
            largest = torch.finfo(tokens.dtype).max
            moved = moved.clamp(-largest, largest)
        result = tokens.clone()
        result.unflatten(0, (batch.chunks, -1))[:, : batch.images, columns] = moved.to(tokens.dtype)
        return result

    def _image_tokens(self, tokens: torch.Tensor, extra_options: Mapping[str, Any], batch: Batch) -> slice | None:
        """Find the columns of the generated image's tokens; None where the attention takes no part."""
        if tokens.shape[0] != batch.chunks * (batch.images + batch.added):
            self.report.skipped["another node splits the batch at the attention; remove that node."] += 1
            return None
        if (image := extra_options.get("img_slice")) is not None:
            count = math.prod(self._token_grid(batch.latent))
            start, stop = image
            # Tokens of images to edit follow those of the generated image.
            return slice(start, start + count) if stop - start >= count else None
        block = extra_options.get("block")
        if self.settings.attention_level is None or block is None or block[0] != UNET_BLOCKS:
            return None
        maps = feature_maps(batch.latent)
        largest = maps[min(self.settings.attention_level, len(maps) - 1)]
        fewest = fewest_tokens(batch.latent, SIDE_WITHIN(largest))
        count = tokens.shape[1]
        if count not in {height * width for height, width in maps}:
            self.report.skipped["another node merges or splits tokens; let NegToMe come after it."] += 1
            return None
        return slice(0, count) if count >= fewest else None

    def _token_grid(self, latent: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) of a transformer's image in tokens."""
        height, width = (-(-side // self.settings.patch_size) for side in latent)
        return height, width

    def _can_act(self, batch: Batch) -> bool:
        raise NotImplementedError

    def _extend(
        self, executor: Any, arguments: dict[str, Any], sigma: torch.Tensor, options: dict[str, Any], batch: Batch
    ) -> tuple[dict[str, Any], torch.Tensor, dict[str, Any]]:
        raise NotImplementedError

    def _shrink(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        return output

    def _push(self, chunked: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Push the images of [chunks, images + added, N, C]: [chunks, images, N, C], and the similarity."""
        raise NotImplementedError


class GroupPush(_Push):
    """Push the images of a batch apart.

    Args:
        settings: of the method and the model.
        group_size: images of a group, which are neighbours in the batch; 0 for all images.
        reference: which images of its group an image is pushed from; see `negtome.NegToMeConfig`.
    """

    def __init__(self, settings: PushSettings, *, group_size: int = 0, reference: GroupReference = "first") -> None:
        super().__init__(settings)
        self.group_size, self.reference = group_size, reference

    def check_batch(self, images: int) -> None:
        """Raise ValueError if a batch of so many images does not split into groups."""
        size = self.group_size or images
        if images % size:
            raise ValueError(
                f"NegToMe needs a batch that splits into groups of {size} images, got {images}; change the batch "
                "size or the group size."
            )

    def _can_act(self, batch: Batch) -> bool:
        self.check_batch(batch.images)
        if self.group_size == 1:
            self.report.skipped["the group size is 1, so no image has another to move from. Set it to 0 or 2."] += 1
        elif batch.images == 1:
            self.report.skipped["a group has one image. Set the batch size of the latent to 2 or more."] += 1
        return self.group_size != 1 and batch.images > 1

    def _extend(
        self, executor: Any, arguments: dict[str, Any], sigma: torch.Tensor, options: dict[str, Any], batch: Batch
    ) -> tuple[dict[str, Any], torch.Tensor, dict[str, Any]]:
        batch = replace(batch, rows_by_push={**batch.rows_by_push, id(self): None})
        return arguments, sigma, {**options, KEY: batch}

    def _push(self, chunked: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images = chunked[:, : batch.images]
        size = self.group_size or batch.images
        tokens = images.flatten(0, 1)
        moved, similarity = push_groups(tokens, size, reference=self.reference, **self.settings.strength)
        return moved.view(images.shape), similarity


class ReferencePush(_Push):
    """Push the images of a batch away from reference images, which pass through the model as further rows.

    Args:
        settings: of the method and the model.
        images: float [R, H, W, 3] in [0, 1].
        mask: bool [R, H, W], the pixels that may be matched, or None for all.
        encode: float [R, height, width, 3] in [0, 1] -> latents [R, c, h, w], as ComfyUI's VAE does.
        factor: pixels of a side for each element of the latent.
        seed: of the references' noise.

    Raises:
        ValueError: the mask does not fit to the images, or is empty.
    """

    def __init__(
        self,
        settings: PushSettings,
        *,
        images: torch.Tensor,
        mask: torch.Tensor | None,
        encode: Callable[[torch.Tensor], torch.Tensor],
        factor: int,
        seed: int = 0,
    ) -> None:
        super().__init__(settings)
        if mask is not None:
            if not mask.any():
                raise ValueError("NegToMe got an empty mask; mark the area to avoid, or connect no mask.")
            if mask.shape[1:] != images.shape[1:3] or len(mask) not in (1, len(images)):
                raise ValueError(
                    f"NegToMe expected a mask of its image's size, {list(images.shape[1:3])}, got "
                    f"{list(mask.shape)}; draw it on that image."
                )
            mask = mask.expand(len(images), -1, -1)
        self._images, self._mask, self._encode, self._factor, self._seed = images, mask, encode, factor, seed
        self._encoded: dict[tuple[int, int], tuple[torch.Tensor, list[torch.Tensor | None]]] = {}

    def sample(self, executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Encode the images at the size of this pass before the model is loaded, then sample."""
        if noise.dim() == 4:
            self.prepare((noise.shape[2], noise.shape[3]))
        return super().sample(executor, noise, *args, **kwargs)

    def prepare(self, latent: tuple[int, int]) -> None:
        """Encode the images for a size of the latent, at most once."""
        if latent in self._encoded:
            return
        height, width = (side * self._factor for side in latent)
        masks = [None] * len(self._images) if self._mask is None else list(self._mask)
        fitted = [
            fit(image.movedim(-1, 0), mask, height, width) for image, mask in zip(self._images, masks, strict=True)
        ]
        pixels = torch.stack([image for image, _ in fitted]).movedim(1, -1)
        self._encoded[latent] = self._encode(pixels), [share for _, share in fitted]

    def _can_act(self, batch: Batch) -> bool:
        if batch.latent not in self._encoded:
            self.report.skipped["a prompt is limited to an area, which reference images do not support."] += 1
            return False
        return True

    def _extend(
        self, executor: Any, arguments: dict[str, Any], sigma: torch.Tensor, options: dict[str, Any], batch: Batch
    ) -> tuple[dict[str, Any], torch.Tensor, dict[str, Any]]:
        model, x = executor.class_obj, arguments["x"]
        latents = model.process_latent_in(self._encoded[batch.latent][0])
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(self._seed))
        latents, noise = latents.to(x), noise.to(x)  # the noise is drawn on the CPU: the same on every device
        references = model.model_sampling.noise_scaling(sigma[:1], noise, latents, False)
        self.report.noise_calls += torch.equal(references, noise)  # a flow's at sigma 1
        count, size = len(latents), batch.images + batch.added
        chunks = torch.arange(batch.chunks * size).view(batch.chunks, size)
        order = torch.cat([chunks, chunks[:, :1].expand(-1, count)], dim=1).flatten()  # image 1 lends its conditioning
        extended = {name: _take_rows(value, batch.chunks * size, order) for name, value in arguments.items()}
        extended["x"].unflatten(0, (batch.chunks, -1))[:, size:] = references.to(x)
        rows = {**batch.rows_by_push, id(self): (size, size + count)}
        options = _reorder_options(options, batch.chunks * size, order)
        options[KEY] = replace(batch, added=batch.added + count, rows_by_push=rows)
        return extended, sigma[order.to(sigma.device)], options

    def _shrink(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        size = batch.images + batch.added
        images: torch.Tensor = output.unflatten(0, (batch.chunks, -1))[:, :size]
        return images.flatten(0, 1)

    def _push(self, chunked: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        rows = batch.rows_by_push[id(self)]
        assert rows is not None  # `_extend` set them
        mask = self._token_mask(batch.latent, chunked.shape[2])
        mask = None if mask is None else mask.to(chunked.device)
        return push_from(chunked[:, : batch.images], chunked[:, slice(*rows)], mask=mask, **self.settings.strength)

    def _token_mask(self, latent: tuple[int, int], count: int) -> torch.Tensor | None:
        """Return which of the references' tokens may be matched, bool [R * count], or None for all."""
        shares = self._encoded[latent][1]
        if all(share is None for share in shares):
            return None
        if self.settings.attention_level is None:
            height, width = self._token_grid(latent)
        else:
            height, width = next((h, w) for h, w in feature_maps(latent) if h * w == count)
        everything = torch.ones(count, dtype=torch.bool)
        return torch.cat([everything if share is None else token_mask(share, height, width) for share in shares])


def _describe(x: torch.Tensor, options: Mapping[str, Any]) -> Batch:
    """Describe a batch before anything is added to it."""
    chunks = len(options.get("cond_or_uncond") or [0])
    return Batch(chunks, len(x) // chunks, 0, (x.shape[-2], x.shape[-1]))


def _reorder_options(options: Mapping[str, Any], rows: int, order: torch.Tensor) -> dict[str, Any]:
    """Adapt what Forge tells other extensions about the rows: which are conditional, by a mark and by index."""
    reordered = dict(options)
    if "cond_mark" in options:
        reordered["cond_mark"] = _take_rows(options["cond_mark"], rows, order)
    for name in ("cond_indices", "uncond_indices"):
        if name in options:
            indices = {int(index) for index in options[name]}
            reordered[name] = [row for row, source in enumerate(order.tolist()) if source in indices]
    return reordered


def _take_rows(value: Any, rows: int, order: torch.Tensor) -> Any:
    """Take rows in a new order from every tensor with this many rows, also inside dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value[order.to(value.device)] if value.dim() and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _take_rows(item, rows, order) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take_rows(item, rows, order) for item in value)
    return value
