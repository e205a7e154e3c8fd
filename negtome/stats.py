"""Count the tokens that were compared and pushed, report them to the user, and raise if there were none."""

import contextlib
import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from negtome.architectures import Architecture
from negtome.call_inspection import CallReader, PipelineCall, Snapshot
from negtome.config import NegToMeConfig
from negtome.hooks import Site, StepContext

#: Most steps of a call whose error names `NegToMeConfig.few_step`.
FEW_STEPS = 8


class Step(NamedTuple):
    """One denoising step: its training timestep, and whether tokens may move in it."""

    timestep: float
    active: bool


class SiteCount(NamedTuple):
    """Tokens compared with a reference at a site, and how many were pushed, over all chunks and steps."""

    compared: int
    pushed: int


@dataclass(frozen=True, eq=False)
class StepReport:
    """Counts and moved tokens of one denoising step; `negtome.attach` passes it to `on_step`.

    A step ends when the next one begins, or when the pipeline's call ends.

    Attributes:
        index: number of the step in this call of the pipeline, from 0.
        timestep: its training timestep, 0 to 1000.
        active: whether it lies in the timestep range or step range. If not, `counts` and `moved` are empty.
        counts: tokens compared and pushed at every hook point that the step reached, by the module's name.
        moved: for each of these, float32 [images, tokens] on the CPU: the share of the comparisons of a token in this
            step (conditional and unconditional, for example) that moved it. Images that stay as they are have 0.
            Tokens are in row-major order of the feature map.
    """

    index: int
    timestep: float
    active: bool
    counts: Mapping[str, SiteCount]
    moved: Mapping[str, torch.Tensor]

    @property
    def tokens_compared(self) -> int:
        """Tokens compared at all hook points together."""
        return sum(count.compared for count in self.counts.values())

    @property
    def tokens_pushed(self) -> int:
        """Tokens pushed at all hook points together."""
        return sum(count.pushed for count in self.counts.values())


class StepReporter:
    """Collects what happens in a step, over one or more calls of the denoiser, and reports it when the step ends.

    Args:
        on_step: the user's function.
        threshold: of the method's settings.
    """

    def __init__(self, on_step: Callable[[StepReport], object], threshold: float) -> None:
        self._on_step = on_step
        self._threshold = _effective_threshold(threshold)
        self._step: Step | None = None
        self._index = 0
        self._counts: dict[str, SiteCount] = {}
        self._moved: dict[str, list[torch.Tensor]] = {}

    def add(self, sites: Sequence[Site], context: StepContext, images: int) -> None:
        """Add one call of the denoiser to the step, before the sites drop their similarities."""
        for site in sites:
            if site.similarity is None:
                continue
            moved = site.similarity > self._threshold
            before = self._counts.get(site.name, SiteCount(0, 0))
            self._counts[site.name] = SiteCount(before.compared + moved.numel(), before.pushed + int(moved.sum()))
            share = _share_moved(moved, context, images, first_moves=site.reference == "others")
            self._moved.setdefault(site.name, []).append(share)

    def begin(self, index: int, step: Step) -> None:
        """Start the next step."""
        self._index, self._step, self._counts, self._moved = index, step, {}, {}

    def end(self) -> None:
        """Report the step, if one has begun."""
        if self._step is None:
            return
        moved = {name: torch.stack(shares).mean(dim=0) for name, shares in self._moved.items()}
        report = StepReport(self._index, *self._step, self._counts, moved)
        self._step = None
        self._on_step(report)


def _share_moved(moved: torch.Tensor, context: StepContext, images: int, first_moves: bool) -> torch.Tensor:
    """Average moved tokens, bool [G, J, N], over the chunks of a batch: float32 [images, N] on the CPU."""
    size = context.group_size
    movable = list(range(0 if first_moves else 1, size))
    if context.layout is not None:
        size = images
        runs = [run for route in context.layout.routes for run in route.images]
        movable = [image for start, stop in runs for image in range(start, stop)]
    repeated = moved.cpu().unflatten(1, (-1, len(movable)))  # a module may be called twice
    share = torch.zeros(len(repeated), size, moved.shape[-1])  # [chunks * groups, K, N]
    share[:, movable] = repeated.float().mean(dim=1)
    averaged: torch.Tensor = share.unflatten(0, (-1, images // size)).mean(dim=0).flatten(0, 1)
    return averaged


def _effective_threshold(threshold: float) -> float:
    """Return the similarity that must be exceeded: rounding lifts that of a copy above 1, but 1 moves nothing."""
    return threshold if threshold < 1 else math.inf


class PipelineRun:
    """The state of one call of the pipeline.

    Args:
        architecture: of the pipeline.
        call: the arguments of the call.
        reporter: reports its steps to the user, or None.
        reader: reads the calls of the denoiser; None for that of a pipeline.

    Attributes:
        masks: denoiser arguments that must be the same for all images of a chunk.
        thread: the thread that runs the call.
        suspended: whether a callback of this call is running, which may call the denoiser through another pipeline.
        prompts: embeddings that passed the checks.
        rows: rows of the batch in the last call of the denoiser.
        images: generated images among them.
        grid: (height, width) of the generated image in tokens in the last call of the denoiser.
        fewest_tokens: tokens of the smallest feature map that takes part.
    """

    def __init__(
        self,
        architecture: Architecture,
        call: PipelineCall,
        reporter: StepReporter | None = None,
        reader: CallReader | None = None,
    ) -> None:
        self.call = call
        self.masks: tuple[str, ...] = ()
        if architecture.drops_text_padding is not None:
            self.masks = (architecture.drops_text_padding,)
        elif call.images_per_prompt > 1:
            self.masks = architecture.shuffles_text_mask
        self.thread = threading.get_ident()
        self.suspended = False
        self.steps: list[Step] = []
        self.reader = reader or CallReader(architecture)
        self.prompts: list[Snapshot] = []
        self.rows = self.images = 0
        self.grid: tuple[int, ...] | None = None
        self.fewest_tokens = 0
        self.reporter = reporter
        # Sites of one shape, the tokens that each compared, and for each site: tokens pushed, highest similarity.
        self._counts: list[tuple[list[Site], int, torch.Tensor, torch.Tensor]] = []

    @contextlib.contextmanager
    def suspend(self) -> Iterator[None]:
        """Let calls of the denoiser in the block run unchanged."""
        self.suspended = True
        try:
            yield
        finally:
            self.suspended = False

    def report(self) -> None:
        """Report the step that has ended; the user's function may call another pipeline."""
        if self.reporter is not None:
            with self.suspend():
                self.reporter.end()

    def count(self, sites: Sequence[Site], threshold: float) -> None:
        """Count one call of the denoiser. Sites of one shape are counted together, and the host does not wait."""
        by_shape: dict[tuple[torch.Size, torch.device], list[Site]] = {}
        for site in sites:
            if site.similarity is not None:
                by_shape.setdefault((site.similarity.shape, site.similarity.device), []).append(site)
        for group in by_shape.values():
            similarity = torch.stack([site.similarity for site in group if site.similarity is not None]).flatten(1)
            pushed = (similarity > _effective_threshold(threshold)).sum(dim=1)
            self._counts.append((group, similarity.shape[1], pushed, similarity.amax(dim=1)))
            for site in group:
                site.similarity = None

    def read(self) -> tuple[Counter[str], Counter[str], float]:
        """Fetch from the device the tokens compared and pushed at each site, and the highest similarity."""
        compared: Counter[str] = Counter()
        pushed: Counter[str] = Counter()
        if not self._counts:
            return compared, pushed, -1.0
        device = self._counts[0][2].device  # a denoiser may be spread over several
        # Two transfers for the whole run.
        all_pushed = torch.cat([counts.to(device) for _, _, counts, _ in self._counts]).tolist()
        all_maxima = torch.cat([maxima.to(device) for _, _, _, maxima in self._counts]).tolist()
        compared_by_site = [(site.name, number) for sites, number, _, _ in self._counts for site in sites]
        for (name, number), moved in zip(compared_by_site, all_pushed, strict=True):
            compared[name] += number
            pushed[name] += moved
        return compared, pushed, min(1.0, max(all_maxima))  # rounding may exceed 1


class Totals:
    """Steps and tokens of the finished calls of a pipeline.

    Attributes:
        sites: names of the modules whose tokens are pushed.
        steps: the denoising steps of these calls.
    """

    def __init__(self, sites: Sequence[str]) -> None:
        self.sites = tuple(sites)
        self.steps: list[Step] = []
        self._compared: Counter[str] = Counter()
        self._pushed: Counter[str] = Counter()

    def add(self, run: PipelineRun) -> tuple[int, int, float]:
        """Add a call; return its tokens compared, its tokens pushed, and its highest similarity."""
        compared, pushed, highest = run.read()
        self.steps += run.steps
        self._compared.update(compared)
        self._pushed.update(pushed)
        return compared.total(), pushed.total(), highest

    def counts(self) -> dict[str, SiteCount]:
        """Return the tokens compared and pushed at every site."""
        return {name: SiteCount(self._compared[name], self._pushed[name]) for name in self.sites}

    def summary(self) -> dict[str, Any]:
        """Return the totals of all sites together, as JSON values."""
        return {
            "sites": len(self.sites),
            "timesteps": [step.timestep for step in self.steps],
            "active_timesteps": [step.timestep for step in self.steps if step.active],
            "tokens_compared": self._compared.total(),
            "tokens_pushed": self._pushed.total(),
        }


def check_active_steps(config: NegToMeConfig, timesteps: Sequence[float], active: Sequence[bool], order: int) -> None:
    """Refuse a call of the pipeline in which no step takes part.

    Args:
        config: the method's settings.
        timesteps: training timesteps of the call.
        active: whether each of them takes part.
        order: timesteps in a step of the scheduler.
    """
    if any(active):
        return
    steps = math.ceil(len(timesteps) / order)
    if config.step_range is not None:
        raise RuntimeError(
            f"NegToMe has nothing to do: no step lies in step_range={config.step_range}. This call has {steps} steps, "
            f"from 0 to {steps - 1}; widen the range or take more steps."
        )
    low, high = config.window()
    advice = "" if steps > FEW_STEPS else "; for models of few steps there is negtome.NegToMeConfig.few_step"
    raise RuntimeError(
        f"NegToMe has nothing to do: no step lies in timestep_range=({low:g}, {high:g}). The timesteps of this "
        f"call are {', '.join(f'{t:g}' for t in timesteps)}; widen the range or take more steps{advice}."
    )


def check_min_side(config: NegToMeConfig, largest: tuple[int, int]) -> None:
    """Refuse a UNet in which all feature maps at hook points are too small, given the size of the largest."""
    if min(largest) < config.side_within(largest):
        raise RuntimeError(
            f"NegToMe has nothing to do: its largest feature map is {largest[0]}x{largest[1]} tokens and min_side="
            f"{config.min_side}; generate larger images or lower min_side to {min(largest)}."
        )


def check_pushed(config: NegToMeConfig, sites: Sequence[str], compared: int, pushed: int, highest: float) -> None:
    """Raise if a finished call of the pipeline compared nothing; warn if it pushed nothing."""
    if not compared:
        raise RuntimeError(
            f"NegToMe did nothing: none of its {len(sites)} sites was reached in the steps that take part. The "
            f"first one is {sites[0]}; switch off whatever skips or caches blocks."
        )
    threshold = config.strength()["threshold"]
    if config.alpha != 0 and threshold < 1 and not pushed:
        warnings.warn(
            f"NegToMe pushed no token: the highest similarity was {highest:.3f}, not above threshold="
            f"{threshold:g}; lower the threshold if this was not intended.",
            RuntimeWarning,
            stacklevel=5,
        )
