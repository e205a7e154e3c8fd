"""Push tokens inside the calls of one denoiser, for whatever runs these calls: a pipeline or a guider."""

import inspect
import math
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from negtome import call_inspection, sites, stats
from negtome.architectures import Architecture
from negtome.call_inspection import DenoiserCall, Snapshot
from negtome.config import NegToMeConfig
from negtome.hooks import Call, Layout, Push, Site, StepContext, not_compiled, path
from negtome.reference import Reference
from negtome.reference_batch import ReferenceBatch, shrink
from negtome.stats import PipelineRun, Step

#: Images in a group above which reference="others" warns: its cost grows with their square.
MANY_OTHERS = 8


class DenoiserHook:
    """The hook points of a denoiser, and what happens around each of its calls.

    Args:
        denoiser: the UNet or transformer itself, not what torch.compile returned.
        architecture: of the denoiser.
        config: the method's settings, with published numbers instead of None.
        group_size: images in a group, or None if each call decides it.
        push: as in `negtome.attach`.
        references: as in `negtome.attach`.

    Attributes:
        config: the method's settings, as above.
        sites: names of the modules whose tokens are pushed.
        references: that add rows to the batch, or None.

    Raises:
        ValueError: a block named in the config holds no site, or the references do not fit the matching.
        TypeError: a reference is no Reference.
        RuntimeError: the denoiser is split over processes, or has a cache and is to be combined with references.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        architecture: Architecture,
        config: NegToMeConfig,
        group_size: int | None,
        push: Push | None = None,
        references: Reference | Sequence[Reference | None] | None = None,
    ) -> None:
        sites.check_denoiser(denoiser, adds_rows=references is not None)
        self._denoiser_reference = weakref.ref(denoiser)  # a call that failed must not keep the weights
        self._architecture = architecture
        self.config = config
        self._group_size = group_size
        self._parameters = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]  # without self
        self.references = None if references is None else ReferenceBatch(architecture, references, config.matching)
        modules = sites.find_sites(denoiser, architecture, config.sites, config.cross_attention)
        self.sites = tuple(name for name, _, _ in modules)
        self._sites = [Site(name, hook_point, config, push) for name, _, hook_point in modules]
        self._links: list[tuple[dict[str, Any], str, torch.nn.Module]] = []

    @property
    def _denoiser(self) -> torch.nn.Module:
        denoiser = self._denoiser_reference()
        assert denoiser is not None  # whoever calls it holds it
        return denoiser

    def enter(self) -> None:
        """Move the sites to the modules that have their names now.

        Raises:
            RuntimeError: a module is gone.
        """
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

    def leave(self) -> None:
        """Give the modules back as they were."""
        for site in self._sites:
            site.leave()
        self._links = []

    # The decision stays out of the graph, as does this frame, so that even fullgraph=True starts with the denoiser's
    # own code.
    @not_compiled(recursive=False)
    def call(
        self, run: PipelineRun, pipe: Any, original: Call, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the denoiser in a run, and push tokens if the step takes part.

        Args:
            run: counts the call.
            pipe: holds the scheduler, and the guider of a ModularPipeline; None where the run's reader needs neither.
            original: the denoiser's own `__call__`.
            owner: the denoiser, compiled or not.
            args, kwargs: of the call.

        Returns:
            What the denoiser returns, without reference rows.
        """
        context, arguments = self._begin(run, pipe, args, kwargs)
        try:
            return self._end(run, context, original(owner, **arguments))
        finally:
            for site in self._sites:  # another pipeline may call the modules next, past the compiled denoiser
                site.context = site.similarity = None

    @not_compiled()
    def _begin(
        self, run: PipelineRun, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[StepContext | None, dict[str, Any]]:
        """Prepare the sites for one call of the denoiser.

        Returns:
            The context of the sites, None in a step that does not take part; and the call's arguments by name, with
            the reference rows added in one that does.
        """
        if any(children.get(key) is not child for children, key, child in self._links):
            self.enter()
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        call = run.reader.read(pipe, arguments, run.call.images)
        group_size = self._images_in_group(run, call) if self.references is None else 0
        self._check_text(run, call, group_size)
        if not run.steps:
            sites.check_denoiser(self._denoiser, adds_rows=self.references is not None)
            schedule, order = run.reader.schedule, run.reader.order
            if schedule:
                stats.check_active_steps(self.config, schedule, self.config.active_steps(schedule, order), order)
        if call.grid != run.grid:
            run.grid, run.fewest_tokens = call.grid, self._fewest_tokens(call)
        active = self.config.is_active(call.timestep, call.index, call.steps)
        run.rows, run.images = call.rows, call.images
        if not call.again:
            run.report()
            run.steps.append(Step(call.timestep, active))
            if run.reporter is not None:
                run.reporter.begin(len(run.steps) - 1, run.steps[-1])
        if not active:
            return None, arguments
        layout: Layout | None = None
        if self.references is not None:
            arguments, layout = self.references.extend(call, arguments, run.fewest_tokens)
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
            call_inspection.check_one_length(run.call, call, call.prompts[mask], self._architecture)
        if self._group_size is None and self.references is None:
            call_inspection.check_one_prompt(run.call, call, group_size, self._architecture)
        run.prompts.append(Snapshot(prompts))

    def _images_in_group(self, run: PipelineRun, call: DenoiserCall) -> int:
        """Return the size of the groups in this call of the denoiser."""
        size = call_inspection.images_in_group(run.call, call, self._group_size, self._architecture.per_prompt)
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
