"""NegToMe as a guider of Modular Diffusers: classifier-free guidance whose images are pushed apart.

    pipe.update_components(guider=NegToMeGuidance.for_pipeline(pipe))
    images = pipe(prompt="a photo of a dog", num_images_per_prompt=4, output="images")

This module imports diffusers' guiders, which are experimental; `import negtome` does not import it.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, NamedTuple

import torch

try:
    import diffusers
    from diffusers import ClassifierFreeGuidance
    from diffusers.configuration_utils import register_to_config
except ImportError as error:
    raise ImportError(
        f"negtome.guider needs the guiders of diffusers, which this version lacks ({error}); install diffusers 0.42."
    ) from error

from negtome import stats
from negtome.call_inspection import PipelineCall, StepReader
from negtome.config import NegToMeConfig
from negtome.denoiser_hook import DenoiserHook
from negtome.hooks import ATTRIBUTE, Call, not_compiled, patch_call, patch_denoiser, unpatch_call
from negtome.merge import GroupReference, Matching
from negtome.sites import check_single_denoiser, find_architecture, find_architecture_of_denoiser, unwrap
from negtome.stats import PipelineRun, SiteCount, Step, Totals
from negtome.validation import check_int, to_python_scalar

#: What this module overrides or passes on, by the names of the parameters.
_API = {
    "__init__": {"guidance_scale", "guidance_rescale", "use_original_formulation", "start", "stop", "enabled"},
    "set_state": {"step", "num_inference_steps", "timestep"},
    "prepare_models": {"denoiser"},
    "cleanup_models": {"denoiser"},
}


def check_api(guidance: type) -> None:
    """Raise ImportError if diffusers' classifier-free guidance has other methods than this module overrides."""
    for name, expected in _API.items():
        method = getattr(guidance, name, None)
        parameters = set() if method is None else set(inspect.signature(method).parameters)
        if not expected <= parameters:
            raise ImportError(
                f"negtome.guider expected {guidance.__name__}.{name} to take {', '.join(sorted(expected))}, but the "
                f"experimental API of diffusers {diffusers.__version__} differs; use negtome.attach(pipe), or install "
                "diffusers 0.42."
            )


check_api(ClassifierFreeGuidance)


class _RunningCall(NamedTuple):
    """A running call of the pipeline."""

    hook: DenoiserHook
    run: PipelineRun
    reader: StepReader


class NegToMeGuidance(ClassifierFreeGuidance):  # type: ignore[misc]
    """Guide as `ClassifierFreeGuidance` does, and push the images of a call apart.

    Images equal those of `negtome.attach` on the same pipeline with `ClassifierFreeGuidance`. A guider sees only the
    calls of the denoiser, so all images of a call form one group and share their prompt, unless `group_size` is set.
    References and `on_step` need `negtome.attach`.

    A call of the pipeline in which no token was compared or pushed warns. `summary` tells what the last call did.

    Args:
        guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled: as in
            `ClassifierFreeGuidance`. A scale of 1 (0 with the original formulation) turns off the guidance and not the
            push, which `alpha=0` does. `enabled=False` does so too, but not on SDXL, where diffusers turns it on again.
        alpha, threshold, timestep_range, step_range, matching, reference, sites, cross_attention, min_side: as in
            `negtome.NegToMeConfig`. None: the number published for the denoiser's architecture, or the default. A
            guider cannot see the order of the scheduler, so a step_range counts every timestep as a step, also
            where a step has two (Heun) or one is repeated (PNDM); then the call warns.
        group_size: how many consecutive images of a call form a group, at least 2; None for all of them.

    Raises:
        ValueError: a setting is out of range.
    """

    # diffusers saves a configuration by the parameters of __init__, so each setting is one.
    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(  # noqa: PLR0913, PLR0917
        self,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        alpha: float = 0.9,
        threshold: float | None = None,
        timestep_range: tuple[float, float] | None = None,
        matching: Matching = "paper",
        reference: GroupReference = "first",
        sites: tuple[str, ...] | None = None,
        cross_attention: bool = False,
        min_side: int | None = None,
        step_range: tuple[int, int] | tuple[float, float] | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__(
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            use_original_formulation=use_original_formulation,
            start=start,
            stop=stop,
            enabled=enabled,
        )
        self.settings = NegToMeConfig(
            alpha=alpha,
            threshold=threshold,
            timestep_range=timestep_range,
            matching=matching,
            reference=reference,
            sites=sites,
            cross_attention=cross_attention,
            min_side=min_side,
            step_range=step_range,
        )
        self.group_size = to_python_scalar(group_size)
        if self.group_size is not None:
            check_int("group_size", self.group_size, 2, advice="; use None for all images of a call.")
        self._patched: Any = None  # the denoiser, between prepare_models and the end of its call
        self._in_denoiser = False
        self._forwards = 0  # calls of the denoiser in this step
        self._call: _RunningCall | None = None
        self._totals: Totals | None = None  # of the last finished call of the pipeline

    @classmethod
    def for_pipeline(cls, pipe: Any, **settings: Any) -> NegToMeGuidance:
        """Make a guider with the guidance of a pipeline's own guider, whose scale differs between architectures.

        Args:
            pipe: a ModularPipeline that has a guider.
            settings: other arguments; they also replace those of the pipeline's guider.

        Raises:
            TypeError: the pipeline has no guider, or one with another formula than classifier-free guidance; or
                `negtome.attach` does not support it, or its denoiser is not loaded yet.
            ValueError: the pipeline has a second denoiser, or is of SDXL while `enabled` is False.
        """
        guider = getattr(pipe, "guider", None)
        if guider is None or type(guider) not in (ClassifierFreeGuidance, cls):
            kind = "no guider" if guider is None else f"a {type(guider).__name__}"
            raise TypeError(
                f"NegToMeGuidance can replace a ClassifierFreeGuidance only, but this {type(pipe).__name__} has "
                f"{kind}; use negtome.attach(pipe), which leaves it as it is."
            )
        architecture = find_architecture(pipe)
        check_single_denoiser(pipe, architecture)
        guidance = {name: guider.config[name] for name in _API["__init__"]}
        guidance["enabled"] = guider._enabled  # `guider.disable()` does not change the config
        guidance |= settings
        if not guidance["enabled"] and architecture.denoiser_class == "UNet2DConditionModel":
            # Its denoising block calls `guider.enable()`, after other blocks prepared a call without guidance.
            raise ValueError(
                "NegToMeGuidance cannot take enabled=False on SDXL, where diffusers turns the guidance on again in "
                "every call; use enabled=True, guidance_scale=1."
            )
        replacement: NegToMeGuidance = cls(**guidance)
        return replacement

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        """Begin a step; the first one begins a call of the pipeline."""
        super().set_state(step, num_inference_steps, timestep)
        self._release()
        if step == 0:
            self._call = self._totals = None
        self._forwards = 0
        time = torch.as_tensor(timestep)
        self._current_step = (step, num_inference_steps, float(time), time)  # read once: it waits for the device
        if step == num_inference_steps and self.settings.step_range is not None:
            warnings.warn(
                "NegToMeGuidance counted every timestep as a step of step_range="
                f"{self.settings.step_range}, but this scheduler has more timesteps than steps: a second-order one "
                "(Heun) has two in a step, and PNDM repeats one; use timestep_range or negtome.attach, or another "
                "scheduler.",
                RuntimeWarning,
                stacklevel=2,
            )

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Hook the denoiser for its next call.

        Raises:
            TypeError: the denoiser is not supported.
            ValueError: a block named in `sites` holds no hook point.
            RuntimeError: `negtome.attach` is at work on it too, or it is split over processes.
        """
        super().prepare_models(denoiser)
        self._release()
        self._forwards += 1
        module = unwrap(denoiser)
        for owner in (denoiser, module):
            state = owner.__dict__.get(ATTRIBUTE)
            if isinstance(state, NegToMeGuidance):  # its call failed before it reached the denoiser
                state.remove()
            elif state is not None:
                raise RuntimeError(
                    f"NegToMe is attached to this {type(module).__name__} already; use either negtome.attach or "
                    "NegToMeGuidance, or else tokens would be pushed twice."
                )
        try:
            call = self._begin(module)
            call.reader.set_step(*self._current_step)
            step, steps, timestep, _ = self._current_step
            if call.hook.config.is_active(timestep, step, steps):
                call.hook.enter()
        except BaseException:
            self.remove()
            raise
        patch_call(denoiser, self, patch_denoiser)
        self._patched = denoiser

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Give the denoiser back as it was; warn after the last call of the last step if nothing was pushed."""
        super().cleanup_models(denoiser)
        self._release()
        step, steps, *_ = self._current_step
        if steps is not None and step >= steps - 1 and self._forwards >= self.num_conditions:
            self._finish()

    def remove(self) -> None:
        """Give the denoiser back as it was after a call of the pipeline that failed, and forget that call.

        The next call of the pipeline, `negtome.attach` and `negtome.detach` do it by themselves. Until then, a call
        that failed before it reached the denoiser, in a ControlNet for example, leaves it changed.

        Raises:
            RuntimeError: a call of the denoiser is running.
        """
        if self._in_denoiser:
            raise RuntimeError("NegToMeGuidance cannot be removed during a call of the denoiser; wait for its end.")
        self._release()
        self._call = None

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the guider without the denoiser and a call that runs or failed."""
        return {**vars(self), "_patched": None, "_call": None, "_in_denoiser": False}

    def counts(self) -> dict[str, SiteCount]:
        """Return the tokens compared and pushed at every hook point, in the last finished call of the pipeline."""
        return {} if self._totals is None else self._totals.counts()

    def summary(self) -> dict[str, Any]:
        """Return what happened in the last finished call of the pipeline, as `Attachment.summary` does."""
        return (self._totals or Totals(())).summary()

    @property
    def steps(self) -> list[Step]:
        """The denoising steps of the last finished call of the pipeline."""
        return [] if self._totals is None else self._totals.steps

    # torch.compile(denoiser) compiles inside this; see `DenoiserHook.call`.
    @not_compiled(recursive=False)
    def call_denoiser(self, original: Call, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the denoiser for one condition; its hooks end with the call, even if it fails."""
        call = self._begin(unwrap(owner))
        self._in_denoiser = True
        try:
            output = call.hook.call(call.run, None, original, owner, args, kwargs)
        except BaseException:
            self._in_denoiser = False
            self.remove()
            raise
        self._in_denoiser = False
        self._release()
        return output

    def _begin(self, module: torch.nn.Module) -> _RunningCall:
        """Return the running call of the pipeline, which begins with its first call of the denoiser."""
        if self._call is None:
            architecture = find_architecture_of_denoiser(module)
            settings = self.settings.published_for(architecture.name.lower())
            hook, reader = DenoiserHook(module, architecture, settings, self.group_size), StepReader(architecture)
            run = PipelineRun(architecture, PipelineCall(architecture, {}), reader=reader)
            # A guider cannot see whether prompts have several images, which is what mixes these masks up.
            run.masks = architecture.shuffles_text_mask
            self._call = _RunningCall(hook, run, reader)
        return self._call

    def _release(self) -> None:
        """Take the hooks off the denoiser, if they are still there."""
        if self._call is not None:
            self._call.hook.leave()
        if self._patched is not None:
            unpatch_call(self._patched)
        self._patched = None

    def _finish(self) -> None:
        """Count a call of the pipeline, and warn if it pushed nothing."""
        if self._call is None:
            return
        hook, run, _ = self._call
        self._call = None  # the counts may be kept for long, the weights should not
        # A scheduler of second order goes on after the step that diffusers counts as the last one.
        is_rest = self._totals is not None
        self._totals = self._totals or Totals(hook.sites)
        compared, pushed, highest = self._totals.add(run)
        if is_rest:
            return
        try:
            timesteps, active = [step.timestep for step in run.steps], [step.active for step in run.steps]
            stats.check_active_steps(hook.config, timesteps, active, run.reader.order)
            stats.check_pushed(hook.config, hook.sites, compared, pushed, highest)
        except RuntimeError as error:  # the images are nearly complete, so the user gets them
            warnings.warn(str(error), RuntimeWarning, stacklevel=3)
