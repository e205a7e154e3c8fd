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

from negtome import call_inspection, sites, stats
from negtome.architectures import Architecture
from negtome.call_inspection import DenoiserCall, PipelineCall, Snapshot
from negtome.config import NegToMeConfig
from negtome.hooks import ATTRIBUTE, Call, Layout, Push, Site, StepContext, not_compiled, patch_call, path, unpatch_call
from negtome.reference import Reference
from negtome.reference_batch import ReferenceBatch, shrink
from negtome.sites import find_architecture, unwrap
from negtome.stats import PipelineRun, SiteCount, Step, StepReport, StepReporter
from negtome.validation import check_int, to_python_scalar

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
    """Push the images of a pipeline's calls apart, or away from references, until the `with` block ends.

        with negtome.attach(pipe) as attached:
            images = pipe("a photo of a dog", num_images_per_prompt=4).images

        with negtome.attach(pipe, NegToMeConfig(alpha=1.5), references=negtome.Reference("protected.png")):
            image = pipe("a photo of a cartoon mouse").images[0]

    Every call of the pipeline in the block is checked. A call that compared no token raises RuntimeError and says why;
    one in which no token exceeded the threshold warns. A call of another pipeline that shares the denoiser, such as a
    refining second pass, runs unchanged and warns. A copy or pickle of the pipeline is not attached.

    Args:
        pipe: a stock pipeline of `negtome.architectures`, such as `StableDiffusionXLPipeline` or `FluxPipeline`. It may
            be compiled or offloaded.
        config: the method's settings. None: those published for the pipeline's architecture, or the defaults.
        group_size: how many consecutive images of a call form a group, at least 2. Groups never influence each other.
            None: the images of a prompt if a call has several prompts and num_images_per_prompt > 1 (for videos,
            num_videos_per_prompt); otherwise all images of the call, which must then share their prompt. Has no effect
            with `references`.
        references: images to push away from, instead of the images of the group (`config.reference`): one Reference for
            all images of a call, or a list with one or None for each. Every reference image adds a row to the
            denoiser's batch in the steps that take part. The pipeline's latents, generators and output never
            hold it; hooks and processors inside the denoiser see it.
        push: replaces the push at every site, for controls of the method. It is called as `push(site, tokens, pushed,
            group_size)` with the site's name, the tokens [G * K, N, C] of G groups of K = group_size images, and the
            result of the method; it returns a tensor like them. Counts stay those of the method. Not with `references`.
        on_step: called with a `negtome.StepReport` when a denoising step has ended. Images do not change, but each
            step that takes part waits for the device. The function may raise to end the pipeline's call.
        given: the former name of `references`, deprecated.

    Returns:
        A context manager, for one block. Without `with`, call `remove()` on it, or `detach` if you lost it.

    Raises:
        TypeError: the pipeline is not supported, the config is no NegToMeConfig, or a reference is no Reference.
        ValueError: a block named in the config holds no site; `group_size` is out of range; `push` is combined with
            references; the pipeline cannot encode the references or makes videos; or it has a second denoiser.
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
        RuntimeError: it is not attached, or a call of it is running.
    """
    for owner in _patchable(pipe, find_architecture(pipe)):
        attachment = _attachment_of(owner)
        if attachment is not None:
            attachment.remove()
            return
    raise RuntimeError(f"NegToMe is not attached to this {type(pipe).__name__}, nor to its denoiser.")


class Attachment:
    """NegToMe on a pipeline; made by `attach`.

    You may load and unload adapters (LoRA) meanwhile: sites follow to the modules that then have their names. After the
    block it holds only its counts and can be pickled.

    Attributes:
        config: the method's settings, with published numbers instead of None.
        group_size: images in a group, or None if each call decides it.
        sites: names of the denoiser's modules whose tokens are pushed.
        steps: the denoising steps of all finished calls of the pipeline.
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
        if group_size is not None:
            check_int("group_size", group_size, 2, advice="; use None for all images of a prompt.")
        architecture = find_architecture(pipe)
        config = (config or NegToMeConfig()).published_for(architecture.name.lower())
        if push is not None and references is not None:
            raise ValueError("push replaces the push among the images of a group; leave it or the references out.")
        sites.check_single_denoiser(pipe, architecture)
        for owner in _patchable(pipe, architecture):
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
        denoiser = getattr(pipe, architecture.denoiser)
        self._denoiser = unwrap(denoiser)
        sites.check_denoiser(self._denoiser, adds_rows=references is not None)
        self._parameters = tuple(inspect.signature(type(self._denoiser).forward).parameters)[1:]  # without self
        self._references = None if references is None else ReferenceBatch(architecture, references, config.matching)
        if self._references is not None:
            self._references.check(pipe)
        modules = sites.find_sites(self._denoiser, architecture, config.sites, config.cross_attention)
        self.sites = tuple(name for name, _, _ in modules)
        self._sites = [Site(name, hook_point, config, push) for name, _, hook_point in modules]
        self._links: list[tuple[dict[str, Any], str, torch.nn.Module]] = []
        self._run: PipelineRun | None = None
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
            self._relink()
            patch_call(denoiser, self, _patch_denoiser)
            patch_call(pipe, self, _patch_pipeline)
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
        self._pipe = self._denoiser = self._references = self._on_step = None
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
                f"NegToMe was attached to a {self._pipeline_class} that was not called in the block; call this very "
                "pipeline inside the `with` block."
            )

    @contextlib.contextmanager
    def _run_checked(self, call: PipelineCall) -> Iterator[None]:
        """Surround one call of the pipeline, and check afterwards that it compared tokens."""
        if self._run is not None:
            raise RuntimeError(
                f"NegToMe expects one call of its {self._pipeline_class} at a time, but it was called again "
                "(by a callback or another thread) before that one ended; attach to a separate pipeline there."
            )
        threshold = self.config.strength()["threshold"]
        reporter = None if self._on_step is None else StepReporter(self._on_step, threshold)
        run = PipelineRun(self._architecture, call, reporter)
        try:
            self._run = run
            self._started_runs += 1
            if self._references is not None:
                self._references.start(self._pipe, call.arguments)
            yield
            self._report(run)
        finally:
            self._run = None
        self.steps += run.steps
        interrupted = bool(getattr(self._pipe, "interrupt", False))
        if not run.steps and not interrupted:
            raise RuntimeError(
                f"NegToMe saw no call of the {self._architecture.denoiser_class} it is attached to; if "
                f"`pipe.{self._architecture.denoiser}` was replaced inside the block, do that before attaching."
            )
        compared, pushed, highest = run.read()
        self._compared.update(compared)
        self._pushed.update(pushed)
        timesteps = [step.timestep for step in run.steps]
        active = [step.active for step in run.steps]
        if interrupted and not any(active):
            warnings.warn(
                "NegToMe pushed no token: the call was interrupted before a step that takes part.",
                RuntimeWarning,
                stacklevel=4,
            )
            return
        stats.check_active_steps(self.config, timesteps, active, run.reader.order)  # the schedule may be unknown
        stats.check_pushed(self.config, self.sites, compared.total(), pushed.total(), highest)

    def _report(self, run: PipelineRun) -> None:
        """Report the step that has ended; the user's function may call another pipeline."""
        if run.reporter is not None:
            with self._suspended():
                run.reporter.end()

    def _clear_sites(self) -> None:
        """Make the sites inactive after a call of the denoiser."""
        for site in self._sites:
            site.context = site.similarity = None

    @contextlib.contextmanager
    def _suspended(self) -> Iterator[None]:
        """Let calls of the denoiser in the block run unchanged: a user's callback may call another pipeline."""
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
        """Call the denoiser as the pipeline's next step, or unchanged if another pipeline calls it."""
        with self._lock:
            run = self._run
            if run is not None and run.thread == threading.get_ident() and not run.suspended:
                context, arguments = self._begin(run, args, kwargs)
                try:
                    return self._end(run, context, original(owner, **arguments))
                finally:
                    self._clear_sites()  # another pipeline may call the modules next, past the compiled denoiser
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
        self, run: PipelineRun, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[StepContext | None, dict[str, Any]]:
        """Prepare the sites for one call of the denoiser.

        Returns:
            The context of the sites, None in a step that does not take part; and the call's arguments by name, with
            the reference rows added in one that does.
        """
        if any(children.get(key) is not child for children, key, child in self._links):
            self._relink()
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        call = run.reader.read(self._pipe, arguments, run.call.images)
        group_size = self._images_in_group(run, call) if self._references is None else 0
        self._check_text(run, call, group_size)
        if not run.steps:
            sites.check_denoiser(self._denoiser, adds_rows=self._references is not None)
            schedule, order = run.reader.schedule, run.reader.order
            if schedule:
                stats.check_active_steps(self.config, schedule, self.config.active_steps(schedule, order), order)
        if call.grid != run.grid:
            run.grid, run.fewest_tokens = call.grid, self._fewest_tokens(call)
        active = self.config.is_active(call.timestep, call.index, call.steps)
        run.rows, run.images = call.rows, call.images
        if not call.again:
            self._report(run)
            run.steps.append(Step(call.timestep, active))
            if run.reporter is not None:
                run.reporter.begin(len(run.steps) - 1, run.steps[-1])
        if not active:
            return None, arguments
        layout: Layout | None = None
        if self._references is not None:
            arguments, layout = self._references.extend(self._pipe, call, arguments, run.fewest_tokens)
        context = StepContext(group_size, math.prod(call.grid), call.stream, run.fewest_tokens, layout)
        for site in self._sites:
            site.context = context
        return context, arguments

    @not_compiled()
    def _end(self, run: PipelineRun, context: StepContext | None, output: Any) -> Any:
        """Count, and remove the reference rows from the denoiser's output."""
        if context is not None:
            if run.reporter is not None:
                run.reporter.add(self._sites, context, run.images)
            run.count(self._sites, self.config.strength()["threshold"])
            if context.layout is not None:
                output = shrink(output, context.layout, self._architecture.list_inputs)
        if len(output[0]) != run.rows:
            raise RuntimeError(
                f"NegToMe expected the {self._architecture.denoiser_class} to return the {run.rows} rows that the "
                f"pipeline asked for, got {len(output[0])}; switch off what keeps features between its calls (caches)."
            )
        return output

    def _check_text(self, run: PipelineRun, call: DenoiserCall, group_size: int) -> None:
        """Refuse a group of images with different texts; embeddings are checked once."""
        prompts = call.prompts.values()
        if any(snapshot.holds(prompts) for snapshot in run.prompts):
            return
        for mask in filter(call.prompts.__contains__, run.masks):
            call_inspection.check_one_length(call, call.prompts[mask], self._architecture)
        if self.group_size is None and self._references is None:
            call_inspection.check_one_prompt(run.call, call, group_size, self._architecture)
        run.prompts.append(Snapshot(prompts))

    def _images_in_group(self, run: PipelineRun, call: DenoiserCall) -> int:
        """Return the size of the groups in this call of the denoiser."""
        size = call_inspection.images_in_group(run.call, call, self.group_size, self._architecture.per_prompt)
        if not run.steps and self.config.reference == "others" and size > MANY_OTHERS:
            warnings.warn(
                f'reference="others" compares every image of a group with all others: for {size} images that takes '
                f'{size} times as long as reference="first"; use smaller groups, or "first".',
                RuntimeWarning,
                stacklevel=2,
            )
        return size

    def _fewest_tokens(self, call: DenoiserCall) -> int:
        """Return the tokens of the smallest feature map that takes part, 0 if the denoiser has only one."""
        if not self._architecture.levels:
            return 0
        height, width = call.grid
        largest = sites.largest_map(self._denoiser, self.sites, (height, width))
        stats.check_min_side(self.config, largest)
        return sites.fewest_tokens((height, width), self.config.side_within(largest))

    def _relink(self) -> None:
        """Move the sites to the modules that have their names now."""
        links: dict[tuple[int, str], tuple[dict[str, Any], str, torch.nn.Module]] = {}
        for site in self._sites:
            try:
                links_to_site = path(self._denoiser, site.name)
            except KeyError:
                raise RuntimeError(
                    f"NegToMe's site {site.name} is gone from the {self._architecture.denoiser_class}; call "
                    "negtome.detach(pipe) before taking modules away, and attach again afterwards."
                ) from None
            parent, module = [self._denoiser, *(child for _, _, child in links_to_site)][-2:]
            if module is not site.module:
                site.leave()
                site.enter(module, parent)
            links |= {(id(children), key): (children, key, child) for children, key, child in links_to_site}
        self._links = list(links.values())


def _patchable(pipe: Any, architecture: Architecture) -> tuple[Any, ...]:
    """Return the objects that may carry an attachment: the pipeline and its denoiser, compiled or not."""
    denoiser = getattr(pipe, architecture.denoiser)
    return pipe, denoiser, unwrap(denoiser)


def _attachment_of(owner: Any) -> Attachment | None:
    attachment: Attachment | None = owner.__dict__.get(ATTRIBUTE)
    return attachment


def _patch_denoiser(original: Call) -> Call:
    @not_compiled(recursive=False)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = _attachment_of(self)  # None if such compiled code outlives the block
        if attachment is None:
            return original(self, *args, **kwargs)
        return attachment._call_denoiser(original, self, args, kwargs)

    return __call__


def _patch_pipeline(original: Call) -> Call:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = _attachment_of(self)
        if attachment is None:
            return original(self, *args, **kwargs)
        call = PipelineCall(attachment._architecture, self, args, kwargs)
        wrapped = {id(callback): _Callback(callback, attachment) for callback in call.callbacks()}
        args = tuple(wrapped.get(id(value), value) for value in args)
        kwargs = {name: wrapped.get(id(value), value) for name, value in kwargs.items()}
        with attachment._run_checked(call):
            return original(self, *args, **kwargs)

    return __call__


class _Callback:
    """Wraps a user's callback. While it runs, calls of the denoiser belong to other pipelines.

    It looks like an object of the callback's class, because diffusers checks for its own callback classes.
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
