"""Attach NegToMe to a stock diffusers pipeline for the length of a `with` block."""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from negtome.architectures import Architecture
from negtome.calls import DenoiserCall, PipelineCall, Snapshot
from negtome.config import NegToMeConfig
from negtome.hooks import ATTRIBUTE, Call, Layout, Push, Site, StepContext, not_compiled, patch_call, path, unpatch_call
from negtome.prompt_checks import check_one_length, check_one_prompt
from negtome.reference import Reference
from negtome.rows import ReferenceRows, shrink
from negtome.sites import check_denoiser, fewest_tokens, find_architecture, find_sites, largest_map, unwrap
from negtome.tally import Run, SiteCount, Step, StepReport, StepReporter, check_pushed, check_side, check_window
from negtome.validation import to_python_scalar

#: Images in a group above which reference="others" warns: its cost grows with their square.
MANY_OTHERS = 8


def attach(
    pipe: Any,
    config: NegToMeConfig | None = None,
    *,
    group_size: int | None = None,
    references: Reference | Sequence[Reference | None] | None = None,
    push: Push | None = None,
    on_step: Callable[[StepReport], object] | None = None,
    given: Reference | Sequence[Reference | None] | None = None,
) -> Attachment:
    """Push the images that a pipeline generates together apart, or away from given ones, until the `with` block ends.

        with negtome.attach(pipe) as attached:
            images = pipe("a photo of a dog", num_images_per_prompt=4).images

        with negtome.attach(pipe, NegToMeConfig(alpha=1.5), references=negtome.Reference("protected.png")):
            image = pipe("a photo of a cartoon mouse").images[0]

    Every call of the pipeline in the block is checked: one in which nothing was compared raises RuntimeError and says
    why, one in which no token was above the threshold warns. A call of another pipeline that shares the denoiser, such
    as a refining second pass, runs unchanged and warns. A copy or pickle of the pipeline is not attached.

    Args:
        pipe: a stock pipeline of `negtome.architectures`, such as `StableDiffusionXLPipeline` or `FluxPipeline`;
            compiled or offloaded if you like.
        config: the method's settings. None: those published for the pipeline's architecture, or the usual ones.
        group_size: how many neighbouring images of a call make a group, at least 2. Groups never influence each other.
            None: the images of a prompt, where a call has several prompts and num_images_per_prompt > 1 (of videos,
            num_videos_per_prompt); otherwise all images of the call, which must then share their prompt. Has no effect
            with `references`.
        references: images from outside to push away from, instead of the images of the group (`config.reference`): one
            Reference for all images of a call, or a list with one or None for each, in the order of the images. Every
            reference image is a further row of the denoiser's batch in the steps of the timestep range, and only there.
            The pipeline's latents, generators and output never hold it; hooks and processors inside the denoiser do.
        push: replaces the push at every site, for controls of the method: called as `push(site, tokens, pushed,
            group_size)` with the site's name, the tokens [G * K, N, C] of G groups of K = group_size images, and the
            result of the method; it returns a tensor like them. Counts stay those of the method. Not with `references`.
        on_step: called with a `negtome.StepReport` after every denoising step, which says which tokens moved. A step
            ends when the next one begins or the pipeline's call ends. Reading the counts waits for the device in each
            step of the timestep range; images do not change. The function may raise, which ends the pipeline's call.
        given: the former name of `references`, deprecated.

    Returns:
        A context manager, for one block. Used without `with`, `remove()` ends it, or `detach` where it was lost.

    Raises:
        TypeError: the pipeline is not supported, the config is no NegToMeConfig, or a reference is no Reference.
        ValueError: a block named in the config holds no site; `group_size` is out of range; `push` is combined with
            references; there is no Reference in the list, the component that encodes it is missing, or the output is a
            video; or the pipeline has a second denoiser.
        RuntimeError: the pipeline is attached already, its denoiser is split over processes, or it has a cache and is
            to be combined with references.
    """
    if given is not None:
        warnings.warn("attach(given=...) is called references=... now", DeprecationWarning, stacklevel=2)
        if references is not None:
            raise ValueError("references was passed twice, also by its former name, given; pass references alone.")
        references = given
    return Attachment(pipe, config, group_size, references, push, on_step)


def detach(pipe: Any) -> None:
    """Take NegToMe off a pipeline, as `Attachment.remove` does.

    Raises:
        TypeError: the pipeline is not supported.
        RuntimeError: nothing is attached to it, or a call of it is running.
    """
    attachment = next(filter(None, map(_attachment_of, _patched(pipe, find_architecture(pipe)))), None)
    if attachment is None:
        raise RuntimeError(f"NegToMe is not attached to this {type(pipe).__name__}, nor to its denoiser.")
    attachment.remove()


class Attachment:
    """NegToMe on a pipeline; made by `attach`.

    Adapters (LoRA) may be loaded and unloaded meanwhile: the sites follow to the modules that then bear their names.
    After the block it holds its counts alone and can be pickled.

    Attributes:
        config: the method's settings, with the published numbers in the place of None.
        group_size: images in a group, or None where each call says it.
        sites: names of the denoiser's modules whose tokens are pushed.
        steps: the denoising steps of the finished calls of the pipeline, in a row.
    """

    def __init__(
        self,
        pipe: Any,
        config: NegToMeConfig | None,
        group_size: int | None,
        references: Reference | Sequence[Reference | None] | None,
        push: Push | None,
        on_step: Callable[[StepReport], object] | None = None,
    ) -> None:
        if not isinstance(config, NegToMeConfig | None):
            raise TypeError(f"config must be a NegToMeConfig, or None, got a {type(config).__name__}.")
        group_size = to_python_scalar(group_size)
        if group_size is not None and (
            isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2
        ):
            raise ValueError(
                f"group_size must be a whole number of images, at least 2, or None, got {group_size!r}: an image "
                "alone has nothing to be pushed from."
            )
        architecture = find_architecture(pipe)
        config = (config or NegToMeConfig()).published_for(architecture.name.lower())
        if push is not None and references is not None:
            raise ValueError("push replaces the push among the images of a group; leave it or the references out.")
        if getattr(pipe, f"{architecture.denoiser}_2", None) is not None:
            raise ValueError(
                f"NegToMe acts in one denoiser, but this {type(pipe).__name__} has {architecture.denoiser}_2 for its "
                "late steps; use a checkpoint with a single one, such as Wan 2.1 or Wan 2.2 TI2V."
            )
        denoiser = getattr(pipe, architecture.denoiser)
        for owner in _patched(pipe, architecture):
            if _attachment_of(owner) is not None:
                raise RuntimeError(
                    f"NegToMe is attached to this {type(owner).__name__} already; leave that `with` block, or call "
                    "negtome.detach(pipe), before attaching again."
                )

        self.config = config
        self.group_size = group_size
        self.steps: list[Step] = []
        self._on_step = on_step
        self._pipe = pipe
        self._architecture = architecture
        self._pipeline_class = type(pipe).__name__
        self._denoiser = unwrap(denoiser)
        check_denoiser(self._denoiser, adds_rows=references is not None)
        self._parameters = tuple(inspect.signature(type(self._denoiser).forward).parameters)[1:]  # without self
        self._rows = None if references is None else ReferenceRows(architecture, references, config.matching)
        if self._rows is not None:
            self._rows.check(pipe)
        modules = find_sites(self._denoiser, architecture, config.sites, config.cross_attention)
        self.sites = tuple(name for name, _, _ in modules)
        self._sites = [Site(name, place, config, push) for name, _, place in modules]
        self._links: list[tuple[dict[str, Any], str, torch.nn.Module]] = []
        self._run: Run | None = None
        # One call of the denoiser at a time: the sites cannot tell whose call reaches them.
        self._lock = threading.RLock()
        self._warned = False  # of calls that run unchanged
        self._started_runs = 0
        self._compared: Counter[str] = Counter()  # tokens by site, in the finished calls
        self._pushed: Counter[str] = Counter()
        self._entered = False

        # torch.compile(denoiser) returns an object that has bound the `__call__` of the module inside it already, so
        # the outer object is patched.
        self._owners: tuple[Any, ...] = (denoiser, pipe)
        with contextlib.ExitStack() as stack:
            stack.callback(self.remove)
            self._follow()
            patch_call(denoiser, self, _begin_before)
            patch_call(pipe, self, _run_around)
            stack.pop_all()

    def counts(self) -> dict[str, SiteCount]:
        """Return the tokens compared and pushed at every site, in the finished calls of the pipeline."""
        return {name: SiteCount(self._compared[name], self._pushed[name]) for name in self.sites}

    def summary(self) -> dict[str, Any]:
        """Return what happened in the finished calls of the pipeline, all sites together, as JSON values."""
        return {
            "sites": len(self.sites),
            "timesteps": [step.timestep for step in self.steps],
            "active_timesteps": [step.timestep for step in self.steps if step.active],
            "tokens_compared": self._compared.total(),
            "tokens_pushed": self._pushed.total(),
        }

    def remove(self) -> None:
        """Give the pipeline back exactly as it was. Does nothing the second time.

        Raises:
            RuntimeError: a call of the pipeline is running, in a callback of which or another thread this was called.
        """
        if self._run is not None:
            raise RuntimeError(
                f"NegToMe cannot be detached from its {self._pipeline_class} during a call of it; wait for its end."
            )
        for site in self._sites:
            site.leave()
        for owner in self._owners:
            unpatch_call(owner)
        # The counts may be kept for long, the weights should not.
        self._pipe = self._denoiser = self._rows = self._on_step = None
        self._owners, self._links, self._sites = (), [], []

    def __getstate__(self) -> dict[str, Any]:
        if self._pipe is not None:
            raise TypeError("an Attachment can be copied or pickled after its `with` block alone; leave it first.")
        return {name: value for name, value in vars(self).items() if name not in ("_architecture", "_lock")}

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
        if kind is None and not self._started_runs:
            raise RuntimeError(
                f"NegToMe was attached to a {self._pipeline_class}, but it was not called in the block: "
                "expected at least one call; call this very pipeline inside the `with` block."
            )

    @contextlib.contextmanager
    def _running(self, call: PipelineCall) -> Iterator[None]:
        """Surround one call of the pipeline, and check afterwards that something happened in it."""
        if self._run is not None:
            raise RuntimeError(
                f"NegToMe expects one call of its {self._pipeline_class} at a time, but it was called again "
                "(by a callback or another thread) before that one ended; attach to a pipeline of its own there."
            )
        reporter = None
        if self._on_step is not None:
            reporter = StepReporter(self._on_step, self.config.strength()["threshold"])
        run = Run(self._architecture, call, reporter)
        try:
            self._run = run
            self._started_runs += 1
            if self._rows is not None:
                self._rows.start(self._pipe, call.arguments)
            yield
            self._report(run)
        finally:
            self._run = None
        self.steps += run.steps
        interrupted = bool(getattr(self._pipe, "interrupt", False))
        if not run.steps and not interrupted:
            raise RuntimeError(
                f"NegToMe saw no call of the {self._architecture.denoiser_class} it is attached to: expected the "
                f"pipeline to call it; if `pipe.{self._architecture.denoiser}` was replaced inside the block, or no "
                "step was asked for, change that before attaching."
            )
        compared, pushed, highest = run.read()
        self._compared.update(compared)
        self._pushed.update(pushed)
        timesteps = [step.timestep for step in run.steps]
        if interrupted and not any(map(self.config.is_active, timesteps)):
            warnings.warn(
                "NegToMe pushed no token: the call was interrupted before a step of the timestep range.",
                RuntimeWarning,
                stacklevel=4,
            )
            return
        check_window(self.config, timesteps)  # the schedule may be unknown
        check_pushed(self.config, self.sites, compared.total(), pushed.total(), highest)

    def _report(self, run: Run) -> None:
        """Report the step that has ended; the user's function may call another pipeline."""
        if run.reporter is not None:
            with self._suspended():
                run.reporter.end()

    def _rest(self) -> None:
        """Take the sites out of the call of the denoiser that has ended."""
        for site in self._sites:
            site.context = site.similarity = None

    @contextlib.contextmanager
    def _suspended(self) -> Iterator[None]:
        """Let calls of the denoiser in the block run unchanged: a callback of the user's may call another pipeline."""
        run = self._run
        if run is not None:
            run.suspended = True
        try:
            yield
        finally:
            if run is not None:
                run.suspended = False

    # torch.compile(denoiser) inside the block compiles from here on. The decision stays out of the graph, as does this
    # frame, so that even fullgraph=True starts with the denoiser's own code.
    @not_compiled(recursive=False)
    def _call_denoiser(self, original: Call, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the denoiser: as the pipeline's next step, or unchanged where another pipeline calls it."""
        with self._lock:
            run = self._run
            if run is not None and run.thread == threading.get_ident() and not run.suspended:
                context, arguments = self._begin(run, args, kwargs)
                try:
                    return self._end(run, context, original(owner, **arguments))
                finally:
                    self._rest()  # another pipeline may call the modules next, past the compiled denoiser
            self._warn_of_other_caller()
            return original(owner, *args, **kwargs)

    @not_compiled()
    def _warn_of_other_caller(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"NegToMe is attached to a {self._pipeline_class}, but something else calls its "
                f"{self._architecture.denoiser_class}: that call runs unchanged. Attach to the pipeline that you call, "
                "if its images should be pushed.",
                RuntimeWarning,
                stacklevel=3,
            )

    @not_compiled()
    def _begin(
        self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[StepContext | None, dict[str, Any]]:
        """Prepare the sites for one call of the denoiser, if they act in it.

        Returns:
            The context that they have now, None if they do not act; and the call's arguments by name, with the rows of
            outside references added if they act.
        """
        if any(children.get(key) is not child for children, key, child in self._links):
            self._follow()
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        call = run.reader.read(self._pipe, arguments, run.call.images)
        group_size = self._images_in_group(run, call) if self._rows is None else 0
        self._check_text(run, call, group_size)
        if not run.steps:
            check_denoiser(self._denoiser, adds_rows=self._rows is not None)
            if run.reader.schedule:
                check_window(self.config, run.reader.schedule)
        if call.grid != run.grid:
            run.grid, run.fewest_tokens = call.grid, self._fewest_tokens(call)
        active = self.config.is_active(call.timestep)
        run.rows, run.images = call.rows, call.images
        if not call.again:
            self._report(run)
            run.steps.append(Step(call.timestep, active))
            if run.reporter is not None:
                run.reporter.begin(len(run.steps) - 1, run.steps[-1])
        if not active:
            return None, arguments
        layout: Layout | None = None
        if self._rows is not None:
            arguments, layout = self._rows.extend(self._pipe, call, arguments, run.fewest_tokens)
        context = StepContext(group_size, math.prod(call.grid), call.stream, run.fewest_tokens, layout)
        for site in self._sites:
            site.context = context
        return context, arguments

    @not_compiled()
    def _end(self, run: Run, context: StepContext | None, output: Any) -> Any:
        """Count, and take the rows of outside references out of the denoiser's output."""
        if context is not None:
            if run.reporter is not None:
                run.reporter.add(self._sites, context, run.images)
            run.count(self._sites, self.config.strength()["threshold"])
            if context.layout is not None:
                output = shrink(output, context.layout, self._architecture.listed)
        if len(output[0]) != run.rows:
            raise RuntimeError(
                f"NegToMe expected the {self._architecture.denoiser_class} to return the {run.rows} rows that the "
                f"pipeline asked for, got {len(output[0])}; switch off what keeps features between its calls (caches)."
            )
        return output

    def _check_text(self, run: Run, call: DenoiserCall, group_size: int) -> None:
        """Refuse texts, each once, that the images of a group may not differ in."""
        prompts = call.prompts.values()
        if any(known.holds(prompts) for known in run.prompts):
            return
        for mask in filter(call.prompts.__contains__, run.masks):
            check_one_length(call, call.prompts[mask], self._architecture)
        if self.group_size is None and self._rows is None:
            check_one_prompt(run.call, call, group_size, self._architecture)
        run.prompts.append(Snapshot(prompts))

    def _fewest_tokens(self, call: DenoiserCall) -> int:
        """Return the tokens of the smallest feature map that takes part, 0 where there is one map alone."""
        if not self._architecture.levels:
            return 0
        height, width = call.grid
        largest = largest_map(self._denoiser, self.sites, (height, width))
        check_side(self.config, largest)
        return fewest_tokens((height, width), self.config.side_within(largest))

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

    def _images_in_group(self, run: Run, call: DenoiserCall) -> int:
        """Return the size of the groups in this call of the denoiser."""
        images, each = call.images, self._architecture.per_prompt
        size = self.group_size
        if size is None:
            # Of several prompts, each has images of its own; a pipeline that makes another number is not understood.
            several = (run.call.prompts or 1) > 1 and run.call.images_per_prompt > 1 and run.call.images == images
            size = run.call.images_per_prompt if several else images
        if size < 2:
            raise ValueError(
                f"NegToMe pushes the images of a group apart, expected at least 2 images, got 1; pass {each}=2 or more."
            )
        per_prompt = run.call.images_per_prompt
        if (run.call.prompts or 1) > 1 and size % per_prompt and per_prompt % size:
            raise ValueError(
                f"NegToMe expected groups that end where a prompt's images do, got group_size={size} and {each}="
                f"{per_prompt}; make {each} a multiple of group_size."
            )
        if call.rows % (call.halves * size):
            raise ValueError(
                f"NegToMe expected whole groups of {size} images, got {images} images in one call; make {each} times "
                "the number of prompts a multiple of group_size."
            )
        if not run.steps and self.config.reference == "others" and size > MANY_OTHERS:
            warnings.warn(
                f'reference="others" compares every image of a group with all others: for {size} images that takes '
                f'{size} times as long as reference="first"; use smaller groups, or "first".',
                RuntimeWarning,
                stacklevel=2,
            )
        return size


def _patched(pipe: Any, architecture: Architecture) -> tuple[Any, ...]:
    """Return the objects that may carry an attachment: the pipeline and its denoiser, compiled or not."""
    denoiser = getattr(pipe, architecture.denoiser)
    return pipe, denoiser, unwrap(denoiser)


def _attachment_of(owner: Any) -> Attachment | None:
    attachment: Attachment | None = owner.__dict__.get(ATTRIBUTE)
    return attachment


def _begin_before(original: Call) -> Call:
    @not_compiled(recursive=False)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = _attachment_of(self)  # None where such compiled code outlives the block
        if attachment is None:
            return original(self, *args, **kwargs)
        return attachment._call_denoiser(original, self, args, kwargs)

    return __call__


def _run_around(original: Call) -> Call:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = _attachment_of(self)
        if attachment is None:
            return original(self, *args, **kwargs)
        call = PipelineCall(attachment._architecture, self, args, kwargs)
        wrapped = {id(callback): _Callback(callback, attachment) for callback in call.callbacks()}
        args = tuple(wrapped.get(id(value), value) for value in args)
        kwargs = {name: wrapped.get(id(value), value) for name, value in kwargs.items()}
        with attachment._running(call):
            return original(self, *args, **kwargs)

    return __call__


class _Callback:
    """A user's callback, during which the denoiser is not called by the attached pipeline.

    It passes for an object of the callback's class, by which diffusers tells its own callbacks.
    """

    def __init__(self, callback: Callable[..., Any], attachment: Attachment) -> None:
        self._callback = callback
        self._attachment = attachment

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._callback)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._attachment._suspended():
            return self._callback(*args, **kwargs)
