"""Counts of the tokens that were compared and pushed, reports to the user, and errors where nothing happened."""

import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from negtome.architectures import Architecture
from negtome.calls import CallReader, PipelineCall, Snapshot
from negtome.config import NegToMeConfig
from negtome.hooks import Site, StepContext


class Step(NamedTuple):
    """One denoising step of a run: its training timestep, and whether the window contains it."""

    timestep: float
    active: bool


class SiteCount(NamedTuple):
    """Tokens compared with a reference at a site, and how many of them were pushed, all halves and steps together."""

    compared: int
    pushed: int


@dataclass(frozen=True)
class StepReport:
    """What NegToMe did in one denoising step; `negtome.attach` passes it to `on_step`.

    Attributes:
        index: number of the step in this call of the pipeline, from 0.
        timestep: its training timestep, 0 to 1000.
        active: whether it lies in the timestep range. If not, `counts` and `moved` are empty.
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
    """Average what moved [G, J, N] over the chunks of a batch: float32 [images, N] on the CPU."""
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


class Run:
    """The state of one call of the pipeline.

    Args:
        architecture: of the pipeline.
        call: the arguments of the call.
        reporter: reports its steps to the user, or None.

    Attributes:
        masks: names of the denoiser's arguments that must be the same for all images of a half.
        thread: the thread that runs it.
        suspended: whether the denoiser is called by somebody else at the moment, from a callback of this call.
        rows: of the batch that the pipeline asked for last.
        images: among them, generated.
        grid: (height, width) of the generated image in tokens in the last call of the denoiser.
        fewest_tokens: of a feature map that takes part.
    """

    def __init__(self, architecture: Architecture, call: PipelineCall, reporter: StepReporter | None = None) -> None:
        self.call = call
        self.masks: tuple[str, ...] = ()
        if architecture.trimmed is not None:
            self.masks = (architecture.trimmed,)
        elif call.images_per_prompt > 1:
            self.masks = architecture.mixed
        self.thread = threading.get_ident()
        self.suspended = False
        self.steps: list[Step] = []
        self.reader = CallReader(architecture)
        self.prompts: list[Snapshot] = []  # embeddings that passed the checks
        self.rows = self.images = 0
        self.grid: tuple[int, ...] | None = None
        self.fewest_tokens = 0
        # Sites alike, the tokens each of them compared, and of each: tokens pushed, and the highest similarity.
        self.reporter = reporter
        self._counts: list[tuple[list[Site], int, torch.Tensor, torch.Tensor]] = []

    def count(self, sites: Sequence[Site], threshold: float) -> None:
        """Count what the sites found in one call of the denoiser: all alike at once, and the host does not wait."""
        alike: dict[tuple[torch.Size, torch.device], list[tuple[Site, torch.Tensor]]] = {}
        for site in sites:
            if (seen := site.similarity) is not None:
                alike.setdefault((seen.shape, seen.device), []).append((site, seen))
        for some in alike.values():
            found = [site for site, _ in some]
            similarity = torch.stack([seen for _, seen in some]).flatten(1)
            pushed = (similarity > _effective_threshold(threshold)).sum(dim=1)
            self._counts.append((found, similarity.shape[1], pushed, similarity.amax(dim=1)))
            for site in found:
                site.similarity = None

    def read(self) -> tuple[Counter[str], Counter[str], float]:
        """Fetch what was counted from the device: tokens compared and pushed by site, and the highest similarity."""
        compared: Counter[str] = Counter()
        pushed: Counter[str] = Counter()
        highest = -1.0
        if self._counts:
            sites, numbers, *of_sites = zip(*self._counts, strict=True)
            device = of_sites[0][0].device  # a denoiser may be spread over several
            counts, maxima = (torch.cat([values.to(device) for values in one]).tolist() for one in of_sites)
            found = [(site.name, number) for alike, number in zip(sites, numbers, strict=True) for site in alike]
            for (name, number), moved in zip(found, counts, strict=True):
                compared[name] += number
                pushed[name] += moved
            highest = max(highest, *(min(value, 1.0) for value in maxima))  # rounded to more than 1, at times
        return compared, pushed, highest


def check_window(config: NegToMeConfig, timesteps: Sequence[float]) -> None:
    """Refuse a call of the pipeline none of whose timesteps is in the window."""
    if not any(map(config.is_active, timesteps)):
        low, high = config.window()
        raise RuntimeError(
            f"NegToMe has nothing to do: no step lies in the window, timestep_range=({low:g}, {high:g}); the "
            f"timesteps of this call are {', '.join(f'{t:g}' for t in timesteps)}; widen the window or take more "
            "steps."
        )


def check_side(config: NegToMeConfig, largest: tuple[int, int]) -> None:
    """Refuse a UNet's feature maps that are all too small to take part, by the size of the largest at a site."""
    if min(largest) < config.side_within(largest):
        raise RuntimeError(
            f"NegToMe has nothing to do: its largest feature map is {largest[0]}x{largest[1]} tokens and min_side="
            f"{config.min_side}; generate larger images or lower min_side to {min(largest)}."
        )


def check_pushed(config: NegToMeConfig, sites: Sequence[str], compared: int, pushed: int, highest: float) -> None:
    """Refuse a finished call of the pipeline in which nothing was compared, and warn of one that pushed nothing."""
    if not compared:
        raise RuntimeError(
            f"NegToMe did nothing: none of its {len(sites)} sites was reached in the steps of the window, the first "
            f"one being {sites[0]}; expected the denoiser to run them; switch off whatever skips or caches blocks."
        )
    threshold = config.strength()["threshold"]
    if config.alpha != 0 and threshold < 1 and not pushed:
        warnings.warn(
            f"NegToMe pushed no token: the highest similarity was {highest:.3f}, not above threshold="
            f"{threshold:g}; lower the threshold if this was not intended.",
            RuntimeWarning,
            stacklevel=5,
        )
