"""Attach NegToMe to a stock diffusers pipeline for the length of a `with` block."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from negtome.architectures import Architecture
from negtome.calls import DenoiserCall, asked_of, calling_pipeline, images_of
from negtome.config import NegToMeConfig
from negtome.merge import plain
from negtome.pushing import ATTRIBUTE, Call, Now, Push, Site, not_compiled, path, restore, retype
from negtome.reference import Reference
from negtome.rows import ReferenceRows, shrink
from negtome.sites import check_denoiser, fewest_tokens, find_architecture, find_sites, unwrap
from negtome.tally import Run, SiteCount, Step, check_pushed, check_side, check_window


def attach(
    pipe: Any,
    config: NegToMeConfig | None = None,
    group_size: int | None = None,
    given: Reference | Sequence[Reference | None] | None = None,
    push: Push | None = None,
) -> Attachment:
    """Push the images that a pipeline generates together apart, or away from given ones, until the `with` block ends.

        with negtome.attach(pipe) as attached:
            images = pipe("a photo of a dog", num_images_per_prompt=4).images

        with negtome.attach(pipe, NegToMeConfig(alpha=1.5), given=negtome.Reference("protected.png")):
            image = pipe("a photo of a cartoon mouse").images[0]

    Every call of the pipeline in the block is checked: one in which nothing was compared raises RuntimeError and says
    why, one in which no token was above the threshold warns. Copy or pickle the pipeline outside the block: a copy made
    inside stays attached until `detach`.

    Args:
        pipe: a stock pipeline of `negtome.architectures`, such as `StableDiffusionXLPipeline` or `FluxPipeline`;
            compiled or offloaded if you like.
        config: the method's settings. None: those published for the pipeline's architecture, or the usual ones.
        group_size: how many neighbouring images of a call make a group, at least 2. With several prompts in a call,
            pass num_images_per_prompt (of videos, num_videos_per_prompt). Groups never influence each other; what a
            group holds is up to you. None: all images of a call are one group, and must share their prompt. Without
            meaning where images are given.
        given: images from outside to push away from, instead of the images of the group (`config.reference`): one
            Reference for all images of a call, or a list with one or None for each, in the order of the images. Every
            reference image is a further row of the denoiser's batch in the steps of the window, and only there. The
            pipeline's latents, generators and output never hold it; hooks and processors inside the denoiser do.
        push: what becomes of the image tokens at a site instead, for controls of the method: called as `push(site,
            tokens, pushed, group_size)` with the site's name, the tokens [G * K, N, C] of G groups of K = group_size
            images, and what the method would make of them; it returns a tensor like them. Counts stay those of the
            method. Not where images are given.

    Returns:
        A context manager, for one block. Used without `with`, `remove()` ends it, or `detach` where it was lost.

    Raises:
        TypeError: if the pipeline is not supported, the config is no NegToMeConfig, or what is given no Reference.
        ValueError: if a block named in the config holds no site, for a bad `group_size`, for a `push` beside given
            images, or where no Reference is given, or what encodes it is missing, or the output is a video;
            or if the pipeline has a second denoiser.
        RuntimeError: if the pipeline is attached already, or its denoiser is split over processes, or has a cache
            beside a given image.
    """
    return Attachment(pipe, config, group_size, given, push)


def detach(pipe: Any) -> None:
    """Take NegToMe off a pipeline, as `remove()` of what `attach` returned does.

    Raises:
        TypeError: if the pipeline is not supported.
        RuntimeError: if nothing is attached to it.
    """
    attachment = next(filter(None, map(_attachment_of, _owners(pipe, find_architecture(pipe)))), None)
    if attachment is None:
        raise RuntimeError(f"NegToMe is not attached to this {type(pipe).__name__}, nor to its denoiser.")
    attachment.remove()


class Attachment:
    """NegToMe on a pipeline; made by `attach`.

    Adapters (LoRA) may be loaded and unloaded meanwhile: the sites follow to the modules that then bear their names.

    Attributes:
        config: the method's settings, with the published numbers in the place of None.
        group_size: images in a group, or None for all images of a call.
        steps: the denoising steps of the finished calls of the pipeline, in a row.
    """

    def __init__(
        self,
        pipe: Any,
        config: NegToMeConfig | None,
        group_size: int | None,
        given: Reference | Sequence[Reference | None] | None,
        push: Push | None,
    ) -> None:
        if not isinstance(config, NegToMeConfig | None):
            raise TypeError(f"config must be a NegToMeConfig, or None, got a {type(config).__name__}.")
        group_size = plain(group_size)
        if group_size is not None and (
            isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2
        ):
            raise ValueError(
                f"group_size must be a whole number of images, at least 2, or None, got {group_size!r}: an image "
                "alone has nothing to be pushed from."
            )
        architecture = find_architecture(pipe)
        config = (config or NegToMeConfig()).published_for(architecture.name.lower())
        if push is not None and given is not None:
            raise ValueError("push changes what images of a group do to each other, got given images beside it.")
        if getattr(pipe, f"{architecture.denoiser}_2", None) is not None:
            raise ValueError(
                f"NegToMe acts in one denoiser, but this {type(pipe).__name__} has {architecture.denoiser}_2 for its "
                "late steps; use a checkpoint with a single one, such as Wan 2.1 or Wan 2.2 TI2V."
            )
        denoiser = getattr(pipe, architecture.denoiser)
        for owner in _owners(pipe, architecture):
            if _attachment_of(owner) is not None:
                raise RuntimeError(
                    f"NegToMe is attached to this {type(owner).__name__} already; leave that `with` block, or call "
                    "negtome.detach(pipe), before attaching again."
                )

        self.config = config
        self.group_size = group_size
        self.steps: list[Step] = []
        self._pipe = pipe
        self._architecture = architecture
        self._pipeline = type(pipe).__name__
        self._denoiser = unwrap(denoiser)
        check_denoiser(self._denoiser, adds_rows=given is not None)
        self._parameters = tuple(inspect.signature(type(self._denoiser).forward).parameters)[1:]  # but for self
        self._now = Now()
        self._rows = None if given is None else ReferenceRows(architecture, given, config.matching)
        if self._rows is not None:
            self._rows.check(pipe)
        found = find_sites(self._denoiser, architecture, config)
        self._sites = [Site(name, place, config, self._now, push) for name, _, place in found]
        self._links: list[tuple[dict[str, Any], str, torch.nn.Module]] = []
        self._run: Run | None = None
        self._finished_runs = 0
        self._compared: Counter[str] = Counter()  # tokens by site, in the finished calls
        self._pushed: Counter[str] = Counter()
        self._entered = False

        # What torch.compile(denoiser) returned has bound the `__call__` of the module inside it already, so this one is
        # retyped, not the inner one.
        self._owners: tuple[Any, ...] = (denoiser, pipe)
        with contextlib.ExitStack() as stack:
            stack.callback(self.remove)
            self._follow()
            retype(denoiser, self, _begin_before)
            retype(pipe, self, _run_around)
            stack.pop_all()

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the denoiser's modules that are touched."""
        return tuple(site.name for site in self._sites)

    def counts(self) -> dict[str, SiteCount]:
        """Return the tokens compared and pushed at every site, in the finished calls of the pipeline."""
        return {name: SiteCount(self._compared[name], self._pushed[name]) for name in self.sites}

    def summary(self) -> dict[str, Any]:
        """Return what happened in the finished calls of the pipeline, all sites together, as JSON values."""
        return {
            "sites": len(self._sites),
            "timesteps": [step.timestep for step in self.steps],
            "active_timesteps": [step.timestep for step in self.steps if step.active],
            "tokens_compared": self._compared.total(),
            "tokens_pushed": self._pushed.total(),
        }

    def remove(self) -> None:
        """Give the pipeline back exactly as it was. Does nothing the second time."""
        for site in self._sites:
            site.leave()
        for owner in self._owners:
            restore(owner)
        self._pipe = self._denoiser = self._rows = None  # the counts may be kept for long, the weights should not
        self._owners, self._links = (), []

    def __enter__(self) -> Attachment:
        if self._entered or self._pipe is None:
            past = "entered" if self._entered else "removed"
            raise RuntimeError(
                f"NegToMe is attached for one `with` block, but this one was {past} before; attach again."
            )
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        self.remove()
        if kind is None and not self._finished_runs:
            raise RuntimeError(
                f"NegToMe was attached to a {self._pipeline}, but no call of it finished in the block: "
                "expected at least one; call this very pipeline inside the `with` block."
            )

    @contextlib.contextmanager
    def _running(self, asked: Mapping[str, Any]) -> Iterator[None]:
        """Surround one call of the pipeline, and check afterwards that something happened in it."""
        if self._run is not None:
            raise RuntimeError(
                f"NegToMe expects one call of its {self._pipeline} at a time, but it was called again "
                "(by a callback or another thread) before that one ended; attach to a pipeline of its own there."
            )
        architecture = self._architecture
        masks = architecture.mixed if (asked.get(architecture.per_prompt) or 1) > 1 else ()
        if architecture.trimmed is not None:
            masks = (architecture.trimmed,)
        self._run = run = Run(architecture, images_of(architecture, asked), masks)
        try:
            if self._rows is not None:
                self._rows.start(self._pipe, asked)
            yield
        finally:
            self._run = None
            self._now.active = False
            for site in self._sites:
                site.similarity = None
        self._finished_runs += 1
        self.steps += run.steps
        if not run.steps:
            raise RuntimeError(
                f"NegToMe saw no call of the {self._architecture.denoiser_class} it is attached to: expected the "
                f"pipeline to call it; if `pipe.{self._architecture.denoiser}` was replaced inside the block, or no "
                "step was asked for, change that before attaching."
            )
        compared, pushed, highest = run.read()
        self._compared.update(compared)
        self._pushed.update(pushed)
        check_window(self.config, [step.timestep for step in run.steps])  # the schedule may be unknown, or interrupted
        check_pushed(self.config, self.sites, compared.total(), pushed.total(), highest)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Decide, before one call of the denoiser, whether the sites act in it and how.

        Returns:
            The call's arguments by name, with the rows of outside references added if the sites act.
        """
        run, now = self._run, self._now
        if run is None or calling_pipeline() is not self._pipe:
            raise RuntimeError(
                f"NegToMe expects its {self._architecture.denoiser_class} to be called by the pipeline it is attached "
                "to, but something else called it; attach to the pipeline that you call, and give any other that is "
                "called meanwhile a denoiser of its own."
            )
        if any(children.get(key) is not child for children, key, child in self._links):
            self._follow()
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        call = run.reader.read(self._pipe, arguments, run.images)
        if self._rows is None:
            now.group_size = self._images_in_group(call)
        if not any(call.text is known for known in run.prompts):
            if self._rows is None and self.group_size is None:
                _check_one_prompt(call, self._architecture.per_prompt)
            for mask in filter(call.prompts.__contains__, run.masks):
                _check_one_length(call, call.prompts[mask], self._architecture)
            run.prompts.append(call.text)
        if not run.steps:
            check_denoiser(self._denoiser, adds_rows=self._rows is not None)
            if run.reader.schedule:
                check_window(self.config, run.reader.schedule)
        if call.grid != run.grid:
            run.grid, now.fewest_tokens = call.grid, 0
            if self._architecture.levels:
                height, width = call.grid
                check_side(self.config, self._denoiser, self.sites, (height, width))
                now.fewest_tokens = fewest_tokens((height, width), self.config.min_side)
        now.active = self.config.is_active(call.timestep)
        now.rows, now.tokens, now.stream, now.layout = call.rows, math.prod(call.grid), call.stream, None
        if not call.again:
            run.steps.append(Step(call.timestep, now.active))
        if self._rows is not None and now.active:
            arguments, now.layout = self._rows.extend(self._pipe, call, arguments, now.fewest_tokens)
        return arguments

    def _end(self, output: Any) -> Any:
        """Count, and take the rows of outside references out of what the denoiser returned."""
        run, now = self._run, self._now
        if run is not None and now.active:
            run.count(self._sites, self.config.strength()["threshold"])
            now.active = False  # whoever calls the modules next may be another pipeline, past the compiled denoiser
        output = output if now.layout is None else shrink(output, now.layout, self._architecture.listed)
        if len(output[0]) != now.rows:
            raise RuntimeError(
                f"NegToMe expected the {self._architecture.denoiser_class} to return the {now.rows} rows that the "
                f"pipeline asked for, got {len(output[0])}; switch off what keeps features between its calls (caches)."
            )
        return output

    def _follow(self) -> None:
        """Move the sites to the modules that bear their names now."""
        links: dict[tuple[int, str], tuple[dict[str, Any], str, torch.nn.Module]] = {}
        for site in self._sites:
            try:
                way = path(self._denoiser, site.name)
            except KeyError:
                raise RuntimeError(
                    f"NegToMe's site {site.name} is gone from the {self._architecture.denoiser_class}; call "
                    "negtome.detach(pipe) before taking modules away, and attach again afterwards."
                ) from None
            parent, module = [self._denoiser, *(one for _, _, one in way)][-2:]
            if module is not site.module:
                site.leave()
                site.enter(module, parent)
            links |= {(id(children), key): (children, key, child) for children, key, child in way}
        self._links = list(links.values())

    def _images_in_group(self, call: DenoiserCall) -> int:
        """Return the size of the groups in this call of the denoiser."""
        images, each = call.images, self._architecture.per_prompt
        size = images if self.group_size is None else self.group_size
        if size < 2:
            raise ValueError(
                f"NegToMe pushes the images of a group apart, expected at least 2 images, got 1; pass {each}=2 or more."
            )
        if call.rows % (call.halves * size):
            raise ValueError(
                f"NegToMe expected whole groups of {size} images, got {images} images in one call; make {each} times "
                "the number of prompts a multiple of group_size."
            )
        return size


def _check_one_prompt(call: DenoiserCall, per_prompt: str) -> None:
    """Refuse a batch of several prompts where all images of a call are to be one group."""
    for embedding in call.prompts.values():
        halves = embedding.unflatten(0, (call.halves, -1)).float()  # [halves, images, ...]
        # The rows are copies of each other, or were computed side by side: then they differ by rounding at most.
        if (halves - halves[:, :1]).abs().max() > 1e-2 * halves.abs().max():
            raise ValueError(
                "NegToMe expected the images of a call to share their prompt, got several prompts; pass "
                f"group_size={per_prompt} to attach, so that only images of a prompt are pushed apart."
            )


def _check_one_length(call: DenoiserCall, mask: torch.Tensor, architecture: Architecture) -> None:
    """Refuse prompts of several lengths where their masks [rows, T] are mixed up, or images begin behind them."""
    halves = mask.unflatten(0, (call.halves, -1))
    if (halves == halves[:, :1]).all():
        return
    each = architecture.per_prompt
    if architecture.trimmed is not None:
        reason = "the image's tokens follow its text at once here; give each prompt a call of its own."
    else:
        reason = (
            f"with {each} > 1, diffusers gives images the text masks of other prompts here (its PR #14147 describes "
            f"how); give each prompt a call of its own, or repeat it in the list of prompts, with {each}=1."
        )
    raise ValueError(f"NegToMe expected prompts of one length, got several: {reason}")


def _owners(pipe: Any, architecture: Architecture) -> tuple[Any, ...]:
    """Return what may carry an attachment: the pipeline and its denoiser, compiled or not."""
    denoiser = getattr(pipe, architecture.denoiser)
    return pipe, denoiser, unwrap(denoiser)


def _attachment_of(owner: Any) -> Attachment | None:
    found: Attachment | None = owner.__dict__.get(ATTRIBUTE)
    return found


def _begin_before(original: Call) -> Call:
    # torch.compile(denoiser) inside the block compiles from here on. The decision stays out of the graph, as does this
    # frame, so that even fullgraph=True starts with the denoiser's own code.
    begin, end = not_compiled()(Attachment._begin), not_compiled()(Attachment._end)

    @not_compiled(recursive=False)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = _attachment_of(self)  # None where such compiled code outlives the block
        if attachment is None:
            return original(self, *args, **kwargs)
        return end(attachment, original(self, **begin(attachment, args, kwargs)))

    return __call__


def _run_around(original: Call) -> Call:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = _attachment_of(self)
        if attachment is None or attachment._pipe is not self:  # made as type(pipe)(...) or copy.copy(pipe) inside
            return original(self, *args, **kwargs)
        with attachment._running(asked_of(attachment._architecture, self, args, kwargs)):
            return original(self, *args, **kwargs)

    return __call__
