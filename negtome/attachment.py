"""Attach NegToMe to a diffusers pipeline, stock or modular, for the length of a `with` block."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from negtome import sites, stats
from negtome.architectures import Architecture
from negtome.call_inspection import PipelineCall, read_arguments
from negtome.config import NegToMeConfig
from negtome.denoiser_hook import DenoiserHook
from negtome.hooks import ATTRIBUTE, Call, Push, not_compiled, patch_call, patch_denoiser, unpatch_call
from negtome.reference import Reference
from negtome.sites import find_architecture, unwrap
from negtome.stats import PipelineRun, SiteCount, Step, StepReport, StepReporter, Totals
from negtome.validation import check_int, to_python_scalar


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
        pipe: a pipeline of `negtome.architectures`, such as `StableDiffusionXLPipeline`, `FluxPipeline` or
            `StableDiffusionXLModularPipeline`. It may be compiled or offloaded.
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
        TypeError: the pipeline is not supported, the config is no NegToMeConfig, a reference is no Reference, or
            `on_step` cannot be called.
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
    """Take NegToMe off a pipeline, as `Attachment.remove` does, or what a failed call with a guider left there.

    Raises:
        TypeError: the pipeline is not supported.
        RuntimeError: it is not attached, or a call of it is running.
    """
    for owner in _patchable(pipe, find_architecture(pipe)):
        state = owner.__dict__.get(ATTRIBUTE)
        if state is not None:
            state.remove()
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
        if on_step is not None and not callable(on_step):
            raise TypeError(f"on_step must be a function of a StepReport, or None, got a {type(on_step).__name__}.")
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
        for owner in _patchable(pipe, architecture):
            if ATTRIBUTE in owner.__dict__:  # a guider, whose call failed before it reached the denoiser
                owner.__dict__[ATTRIBUTE].remove()

        self.config = config
        self.group_size = group_size
        self._on_step = on_step
        self._pipe = pipe
        self._architecture = architecture
        self._pipeline_class = type(pipe).__name__
        denoiser = getattr(pipe, architecture.denoiser)
        hook = DenoiserHook(unwrap(denoiser), architecture, config, group_size, push, references)
        self._hook: DenoiserHook | None = hook
        if hook.references is not None:
            hook.references.check(pipe)
        self.sites = hook.sites
        self._totals = Totals(hook.sites)
        self.steps: list[Step] = self._totals.steps
        self._run: PipelineRun | None = None
        # One call of the denoiser at a time: the sites cannot tell whose call reaches them.
        self._lock = threading.RLock()
        self._warned = False  # of calls that run unchanged
        self._started_runs = 0
        self._entered = False

        # torch.compile(denoiser) returns an object that has bound the `__call__` of the module inside it already, so
        # the outer object is patched.
        self._owners: tuple[Any, ...] = (denoiser, pipe)
        with contextlib.ExitStack() as stack:
            stack.callback(self.remove)
            hook.enter()
            patch_call(denoiser, self, patch_denoiser)
            patch_call(pipe, self, _patch_pipeline)
            stack.pop_all()

    def counts(self) -> dict[str, SiteCount]:
        """Return the tokens compared and pushed at every site, in the finished calls of the pipeline."""
        return self._totals.counts()

    def summary(self) -> dict[str, Any]:
        """Return what happened in the finished calls of the pipeline, all sites together, as JSON values."""
        return self._totals.summary()

    def remove(self) -> None:
        """Give the pipeline back exactly as it was. Does nothing the second time.

        Raises:
            RuntimeError: a call of the pipeline is running, in a callback of which or another thread this was called.
        """
        if self._run is not None:
            raise RuntimeError(
                f"NegToMe cannot be detached from its {self._pipeline_class} during a call of it; wait for its end."
            )
        if self._hook is not None:
            self._hook.leave()
        for owner in self._owners:
            unpatch_call(owner)
        # The counts may be kept for long, the weights should not.
        self._pipe = self._hook = self._on_step = None
        self._owners = ()

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
            if self._hook is not None and self._hook.references is not None:
                self._hook.references.start(self._pipe, call.arguments)
            yield
            run.report()
        finally:
            self._run = None
        interrupted = bool(getattr(self._pipe, "interrupt", False))
        if not run.steps and not interrupted:
            raise RuntimeError(
                f"NegToMe saw no call of the {self._architecture.denoiser_class} it is attached to; if "
                f"`pipe.{self._architecture.denoiser}` was replaced inside the block, do that before attaching."
            )
        compared, pushed, highest = self._totals.add(run)
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
        stats.check_pushed(self.config, self.sites, compared, pushed, highest)

    @contextlib.contextmanager
    def _suspended(self) -> Iterator[None]:
        """Let calls of the denoiser in the block run unchanged: a user's callback may call another pipeline."""
        with contextlib.nullcontext() if self._run is None else self._run.suspend():
            yield

    # torch.compile(denoiser) inside the block compiles from here on; see `DenoiserHook.call`.
    @not_compiled(recursive=False)
    def call_denoiser(self, original: Call, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the denoiser as the pipeline's next step, or unchanged if another pipeline calls it."""
        with self._lock:
            run, hook = self._run, self._hook
            if run is not None and hook is not None and not run.suspended and run.thread == threading.get_ident():
                return hook.call(run, self._pipe, original, owner, args, kwargs)
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


def _patchable(pipe: Any, architecture: Architecture) -> tuple[Any, ...]:
    """Return the objects that may carry an attachment: the pipeline and its denoiser, compiled or not."""
    denoiser = getattr(pipe, architecture.denoiser)
    return pipe, denoiser, unwrap(denoiser)


def _attachment_of(owner: Any) -> Attachment | None:
    state = owner.__dict__.get(ATTRIBUTE)
    return state if isinstance(state, Attachment) else None  # the denoiser may carry a guider instead


def _patch_pipeline(original: Call) -> Call:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = _attachment_of(self)
        if attachment is None:
            return original(self, *args, **kwargs)
        architecture = attachment._architecture
        call = PipelineCall(architecture, read_arguments(architecture, self, args, kwargs))
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
