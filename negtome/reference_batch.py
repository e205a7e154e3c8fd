"""Add reference images as further rows to the denoiser's batch, and remove them from its output."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from negtome.architectures import Architecture
from negtome.call_inspection import DenoiserCall, Snapshot, value_at, with_value
from negtome.encoding import embed, encode, encoding_pipeline, noise_latents, scale_latents
from negtome.hooks import Layout, Route
from negtome.merge import Matching
from negtome.reference import Reference, fit, token_mask
from negtome.sites import feature_maps

#: Training timestep of a flow from which at most 0.01 % of a noised reference is the image.
PURE_NOISE = 999.9


class _Encoded(NamedTuple):
    """A reference at the size of the output: scaled latents, the posterior, and the share of pixels to match."""

    latents: torch.Tensor
    posterior: Any
    shares: tuple[torch.Tensor | None, ...]


class _Plan(NamedTuple):
    """The batch of all calls with certain prompts in certain chunks."""

    prompts: Snapshot
    conditional: tuple[int, ...]
    slots: tuple[tuple[Reference, int], ...]  # a reference, and the image that lends it its conditioning
    size: tuple[int, int]  # of the latent
    layout: Layout
    order: list[int]  # [cfg_chunks * (images + rows)] the original row that each new row copies
    gathered: torch.Tensor  # the same on the device


class ReferenceBatch:
    """The references of an attachment: encoded once, noised in every step, added to and removed from the batch.

    Every image of a reference adds a row. If images with different conditioning share a reference without its own
    prompt, every conditioning adds one, so that no image depends on the other prompts of the call.

    Args:
        architecture: of the pipeline.
        references: one for all images of a call, or one or None for each.
        matching: of the method's settings.

    Raises:
        TypeError: an item is no Reference.
        ValueError: there is no Reference, or one that the matching is not defined for.
    """

    def __init__(
        self, architecture: Architecture, references: Reference | Sequence[Reference | None], matching: Matching
    ) -> None:
        items = [references] if isinstance(references, Reference) else references
        if not isinstance(items, Sequence) or not all(isinstance(item, Reference | None) for item in items):
            raise TypeError(
                "references must be a negtome.Reference, or a list with one or None for each image of a call, got "
                f"{type(items).__name__}; wrap images: negtome.Reference(image)."
            )
        self._distinct = [item for item in items if item is not None]
        if not self._distinct:
            raise ValueError("references must hold at least one negtome.Reference, got none; leave them out instead.")
        if matching == "released" and any(len(reference.images) > 1 for reference in self._distinct):
            raise ValueError(
                'matching="released" is defined between two images only, got a Reference of several images; use '
                'matching="paper", or one image.'
            )
        self._architecture = architecture
        self._references = references
        self._encoded: dict[tuple[Reference, tuple[int, int]], _Encoded] = {}
        self._vae: Any = None  # that encoded them; another one encodes again
        self._encoder: Any = None  # the pipeline whose methods encode and pack

    def check(self, pipe: Any) -> Any:
        """Return the pipeline whose methods encode the references; see `encoding_pipeline`.

        Raises:
            ValueError: it cannot encode the references or their prompts, or it generates videos.
        """
        if self._architecture.video:
            raise ValueError(
                f"NegToMe takes no references for a {type(pipe).__name__}, whose output is a video; use groups."
            )
        encoder = encoding_pipeline(self._architecture, pipe)
        if encoder.vae is None:
            raise ValueError("NegToMe expected an autoencoder, to encode a Reference, got vae=None; load it too.")
        prompted = any(reference.prompt is not None for reference in self._distinct)
        if prompted and None in (getattr(encoder, name, ...) for name in ("text_encoder", "text_encoder_2")):
            raise ValueError(
                "NegToMe expected all text encoders, to embed a Reference's prompt, got None; load them too, or leave "
                "the prompt out, and each image lends its own."
            )
        if prompted and "image" in inspect.signature(encoder.encode_prompt).parameters:
            raise ValueError(
                f"a {type(pipe).__name__} reads the prompt together with the image to edit, which a Reference's prompt "
                "cannot be; leave that prompt out, and each image lends its own."
            )
        return encoder

    def start(self, pipe: Any, pipeline_arguments: Mapping[str, Any]) -> None:
        """Begin a call of the pipeline; every call draws the same noise. Errors are those of `check`."""
        self._encoder = self.check(pipe)
        if self._encoder.vae is not self._vae:
            self._encoded.clear()
            self._vae = self._encoder.vae
        self._pipeline_arguments = pipeline_arguments
        self._plans: list[_Plan] = []
        self._noise: dict[Reference, tuple[torch.Tensor, torch.Generator]] = {}
        self._embedded: dict[Reference, dict[str, torch.Tensor]] = {}

    def extend(
        self, call: DenoiserCall, arguments: Mapping[str, Any], fewest_tokens: int
    ) -> tuple[dict[str, Any], Layout]:
        """Add the reference rows to the denoiser's arguments.

        Args:
            call: the same call, as `CallReader` reads it.
            arguments: the denoiser's arguments by name.
            fewest_tokens: tokens of the smallest feature map that takes part.

        Returns:
            The new arguments, and how their batch is laid out.

        Raises:
            ValueError: there are more or fewer references, or rows of text, than images, or a mask is too thin to hold
                a token.
        """
        architecture, pipe = self._architecture, self._encoder
        for name, value in call.prompts.items():
            if len(value) not in (1, call.rows):
                raise ValueError(
                    f"With references, text embeddings must have one row, or one for each of {call.rows} images, got "
                    f"{len(value)}; repeat prompt_embeds and pooled_prompt_embeds along their first dimension."
                )
            if not architecture.list_inputs:
                arguments = with_value(arguments, name, value.expand(call.rows, *value.shape[1:]))
        prompts, conditional = list(call.prompts.values()), call.conditional
        plan = next((p for p in self._plans if p.prompts.holds(prompts) and p.conditional == conditional), None)
        if plan is None:
            plan = self._plan(pipe, call, fewest_tokens)
            self._plans.append(plan)
        layout, size = plan.layout, plan.size

        def take(rows: torch.Tensor | list[Any]) -> torch.Tensor | list[Any]:
            return [rows[k] for k in plan.order] if isinstance(rows, list) else rows[plan.gathered]

        extended = {
            name: value if name in architecture.shared else _map(value, call.rows, take, architecture.list_inputs)
            for name, value in arguments.items()
        }
        start = layout.images
        for reference, _ in plan.slots:
            stop = start + len(reference.images)
            latents, noise = self._latents_and_noise(pipe, reference, size)
            rows = noise_latents(pipe, latents, noise, call)
            # The new tensors are ours: what was indexed is a copy.
            _put(extended[architecture.sample], rows, layout, start, stop, range(layout.cfg_chunks))
            if call.conditional and reference.prompt is not None:
                if reference not in self._embedded:
                    options = self._pipeline_arguments
                    self._embedded[reference] = embed(architecture, pipe, reference.prompt, call, options)
                for name, row in self._embedded[reference].items():
                    _put(value_at(extended, name), row, layout, start, stop, call.conditional)
            start = stop
        return extended, layout

    def warn_of_pure_noise(self, timesteps: Sequence[float]) -> None:
        """Warn if no reference held anything of its image in any of the training timesteps that took part."""
        is_flow = hasattr(self._encoder.scheduler, "scale_noise")
        noised = all(reference.noise for reference in self._distinct)
        if is_flow and noised and min(timesteps) >= PURE_NOISE:
            warnings.warn(
                "NegToMe pushed the images away from pure noise: the first step of a flow model holds nothing of a "
                "reference image, and no later step took part. Choose step_range=(0, 1) or a wider timestep_range.",
                RuntimeWarning,
                stacklevel=5,
            )

    def _plan(self, pipe: Any, call: DenoiserCall, fewest_tokens: int) -> _Plan:
        """Lay out the batch of a call, and everything that later calls with the same prompts need."""
        images, (height, width), patch = call.images, call.grid, self._architecture.patch
        size = (patch * height, patch * width)
        references = self._references
        if isinstance(references, Reference):
            references = [references] * images
        if len(references) != images:
            raise ValueError(
                f"NegToMe expected one reference or None for each of the {images} images of the call, got "
                f"{len(references)}; give a single Reference for all, or a list in the order of the images."
            )
        slots = _assign_slots(references, call)
        maps = feature_maps((height, width)) if self._architecture.levels else [(height, width)]
        grids = [(h, w) for h, w in maps if h * w >= fewest_tokens]
        routes: list[Route] = []
        lenders: list[int] = []
        for (reference, lender), members in slots.items():
            start = images + len(lenders)
            lenders += [lender] * len(reference.images)
            masks = self._masks(pipe, reference, size, grids)
            allowed = {n: mask.nonzero().flatten() for n, mask in masks.items() if mask is not None and mask.any()}
            rows = (start, images + len(lenders))
            device = call.text.device
            routes.append(
                Route(
                    images=_runs(members),
                    rows=rows,
                    masks={n: None if mask is None else mask.to(device) for n, mask in masks.items()},
                    allowed={n: indices.to(device) for n, indices in allowed.items()},
                )
            )
        chunk = [*range(images), *lenders]
        order = [images * number + image for number in range(call.cfg_chunks) for image in chunk]
        index = torch.tensor(order, device=call.text.device)
        layout = Layout(call.cfg_chunks, images, len(lenders), tuple(routes))
        return _Plan(Snapshot(call.prompts.values()), call.conditional, tuple(slots), size, layout, order, index)

    def _masks(
        self, pipe: Any, reference: Reference, size: tuple[int, int], grids: Sequence[tuple[int, int]]
    ) -> dict[int, torch.Tensor | None]:
        """Return which tokens of a reference may be matched, for each feature map by its number of tokens."""
        shares = self._encode(pipe, reference, size).shares
        masks = {height * width: _mask(shares, height, width) for height, width in grids}
        if masks and all(mask is not None and not mask.any() for mask in masks.values()):
            raise ValueError(
                "NegToMe got a mask that covers more than half of no token: the largest feature map has "
                f"{grids[0][0]}x{grids[0][1]} of them; draw a larger mask or generate larger images."
            )
        return masks

    def _encode(self, pipe: Any, reference: Reference, size: tuple[int, int]) -> _Encoded:
        """Encode a reference for a size of the latent, at most once."""
        key = (reference, size)
        if key not in self._encoded:
            height, width = (side * pipe.vae_scale_factor for side in size)
            fitted = [fit(i, m, height, width) for i, m in zip(reference.images, reference.mask, strict=True)]
            pixels = 2 * torch.stack([image for image, _ in fitted]) - 1
            latents, posterior = encode(self._architecture, pipe, pixels)
            if posterior is None and reference.posterior == "sample":
                raise ValueError(
                    f'posterior="sample" needs an autoencoder that has one, got a {type(pipe.vae).__name__}; use '
                    '"mode".'
                )
            latents = scale_latents(self._architecture, pipe, latents)
            self._encoded[key] = _Encoded(latents, posterior, tuple(share for _, share in fitted))
        return self._encoded[key]

    def _latents_and_noise(
        self, pipe: Any, reference: Reference, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a reference's latents and noise for this step, float32, packed as the denoiser takes them."""
        latents, posterior, _ = self._encode(pipe, reference, size)
        if reference not in self._noise:
            # On the CPU: the same on every device.
            generator = torch.Generator().manual_seed(reference.seed)
            noise = torch.randn(latents.shape, generator=generator).to(latents.device)
            self._noise[reference] = (noise, generator)
        noise, generator = self._noise[reference]
        if reference.posterior == "sample":
            latents = scale_latents(self._architecture, pipe, posterior.sample(generator))
        if (pack := self._architecture.pack) is not None:
            latents, noise = pack(pipe, latents), pack(pipe, noise)
        return latents, noise if reference.noise else None


def shrink(output: Any, layout: Layout, list_inputs: bool) -> Any:
    """Remove the reference rows from the denoiser's output, which is a list of rows or holds tensors of them."""
    chunk = layout.images + layout.rows

    def keep(rows: torch.Tensor | list[Any]) -> torch.Tensor | list[Any]:
        if isinstance(rows, list):
            return [row for index, row in enumerate(rows) if index % chunk < layout.images]
        kept: torch.Tensor = rows.unflatten(0, (layout.cfg_chunks, chunk))[:, : layout.images].flatten(0, 1)
        return kept

    return _map(output, layout.cfg_chunks * chunk, keep, list_inputs)


def _assign_slots(references: Sequence[Reference | None], call: DenoiserCall) -> dict[tuple[Reference, int], list[int]]:
    """Group the images that share a reference and the conditioning it borrows: (reference, lending image) -> images."""
    conditions = [
        embedding.expand(call.rows, *embedding.shape[1:]).unflatten(0, (call.cfg_chunks, call.images))
        for embedding in call.prompts.values()
    ]  # [cfg_chunks, images, ...]
    slots: dict[tuple[Reference, int], list[int]] = {}
    for image, reference in enumerate(references):
        if reference is None:
            continue
        # The reference's own prompt replaces the image's in the conditional chunks.
        borrowed = [c for c in range(call.cfg_chunks) if reference.prompt is None or c not in call.conditional]
        lender = image
        for other, candidate in slots:
            if other is reference and all(torch.equal(c[borrowed, candidate], c[borrowed, image]) for c in conditions):
                lender = candidate
                break
        slots.setdefault((reference, lender), []).append(image)
    return slots


def _runs(indices: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Write rising indices as runs (start, stop)."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return tuple(runs)


def _mask(shares: Sequence[torch.Tensor | None], height: int, width: int) -> torch.Tensor | None:
    """Return which tokens of the references' rows may be matched, bool [R * height * width], or None for all."""
    if all(share is None for share in shares):
        return None
    everything = torch.ones(height * width, dtype=torch.bool)
    masks = [everything if share is None else token_mask(share, height, width) for share in shares]
    return torch.cat(masks)


def _map(value: Any, rows: int, change: Callable[[Any], Any], list_inputs: bool) -> Any:
    """Change every tensor with this many rows, in dicts, lists, tuples and the outputs of models.

    If `list_inputs`, a list of this many rows is changed itself.
    """
    if isinstance(value, torch.Tensor):
        return change(value) if value.dim() and value.shape[0] == rows else value
    if isinstance(value, Mapping):
        changed = {key: _map(item, rows, change, list_inputs) for key, item in value.items()}
        return changed if type(value) is dict else type(value)(**changed)  # a model's output takes its fields
    if list_inputs and type(value) is list:
        return change(value) if len(value) == rows else value
    if type(value) in (list, tuple):
        return type(value)(_map(item, rows, change, list_inputs) for item in value)
    return value


def _put(
    target: torch.Tensor | list[Any], rows: torch.Tensor, layout: Layout, start: int, stop: int, chunks: Sequence[int]
) -> None:
    """Write rows to the indices start to stop of some chunks of a batch, into its first channels and tokens."""
    if isinstance(target, list):
        for chunk in chunks:
            first = chunk * (layout.images + layout.rows)
            target[first + start : first + stop] = rows.to(target[first]).expand(stop - start, *rows.shape[1:])
        return
    batch = target.unflatten(0, (layout.cfg_chunks, -1))
    leading = tuple(slice(size) for size in rows.shape[1:])
    for chunk in chunks:
        batch[chunk, start:stop][:, *leading] = rows.to(batch)
