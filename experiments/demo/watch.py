"""Watch a pipeline's call while it runs: its steps, their predictions, and the pushed tokens."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from experiments.methods.steps import decoded, levels, predictions, replaced, unpacked
from negtome import NegToMeConfig, StepReport
from negtome.sites import find_architecture, find_sites, largest_map, unwrap

#: Latents a side that a preview is decoded from at most.
PREVIEW = 32


class Stopped(Exception):
    """The user stopped the run."""


class Pushed(NamedTuple):
    """Where and when tokens were pushed.

    Attributes:
        steps: all of the call, without their maps.
        where: float [K, h, w] in [0, 1], for each image and each place the share of comparisons in which its token was
            pushed; h x w as the largest feature map.
    """

    steps: tuple[StepReport, ...]
    where: torch.Tensor


@contextlib.contextmanager
def stoppable(pipe: Any, stop: threading.Event) -> Iterator[None]:
    """Raise `Stopped` before the next call of the denoiser once `stop` is set."""

    def check(*_: Any) -> None:
        if stop.is_set():
            raise Stopped

    with contextlib.ExitStack() as stack:
        denoiser = getattr(pipe, find_architecture(pipe).denoiser)
        stack.callback(denoiser.register_forward_pre_hook(check).remove)
        yield


@dataclass
class Steps:
    """Counts the steps of a pipeline's calls and shows what they predict.

    A preview is decoded only if all previews together then take at most `share` of the time since the first call. The
    next one is expected to take as long as the last one of its size; the first one, as long as a step.

    Attributes:
        report: called after every step with its number, from 1 in every call of the pipeline, how many there are, and
            the predicted images, float [K, H, W, 3] in [0, 1], small; or None where none are decoded.
        share: of the time that previews may take, in [0, 1].
        clock: returns seconds.
        costs: seconds that the last preview of each size took; runs may share it.
        spent: seconds that previews and reports took, which are not the method's.
    """

    report: Callable[[int, int, torch.Tensor | None], None]
    share: float = 0.1
    clock: Callable[[], float] = time.perf_counter
    costs: dict[Any, float] = field(default_factory=dict)
    spent: float = field(default=0.0, init=False)
    _previews: float = field(default=0.0, init=False)  # seconds, of `spent`
    _began: float | None = field(default=None, init=False)

    @contextlib.contextmanager
    def of(self, pipe: Any, size: tuple[int, int] | None, previews: bool = True) -> Iterator[None]:
        """Watch a pipeline until the block ends.

        Args:
            pipe: a stock pipeline, whose images stay bit-identical.
            size: height and width of its images in pixels, None if nobody said.
            previews: whether to decode predictions at all.
        """
        scheduler, clean = pipe.scheduler, None
        schedule, number, ended = None, 0, self.clock()
        self._began = ended if self._began is None else self._began
        architecture = find_architecture(pipe)
        can_be_decoded = not (
            architecture.list_inputs or architecture.frames or architecture.scale or architecture.video
        )
        previews = previews and can_be_decoded and _known(scheduler)

        def predicted(prediction: Any) -> torch.Tensor:
            nonlocal clean
            clean = prediction.clean
            return clean

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal clean, schedule, number, ended
            if scheduler.timesteps is not schedule:  # another call of the pipeline
                schedule, number = scheduler.timesteps, 0
            number += 1
            result = original(*args, **kwargs)
            start = self.clock()
            kind = None if clean is None else (type(pipe).__name__, tuple(clean.shape))
            fresh = kind is not None and self._affords(start, self.costs.get(kind, start - ended))
            self.report(number, len(schedule), _preview(pipe, clean, size) if fresh else None)
            clean, ended = None, self.clock()
            self.spent += ended - start
            if fresh:
                self.costs[kind] = ended - start
                self._previews += ended - start
            return result

        with predictions(pipe, predicted) if previews else contextlib.nullcontext():
            original = scheduler.step
            with replaced(scheduler, "step", step):
                yield

    def _affords(self, now: float, cost: float) -> bool:
        """Tell whether a preview of this cost, in seconds, keeps all of them within their share of the time."""
        return self._previews + cost <= self.share * (now - self._began + cost)


def _known(scheduler: Any) -> bool:
    try:
        levels(scheduler)
    except ValueError:
        return False
    return True


def _preview(pipe: Any, clean: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor | None:
    """Decode predicted latents, made small first: what is to be seen of a large picture in a moment's time."""
    if clean.dim() == 3:
        if size is None:
            return None
        clean = unpacked(pipe, clean, *size)
    shrink = max(1, math.ceil(max(clean.shape[-2:]) / PREVIEW))
    return decoded(pipe, F.avg_pool2d(clean, shrink) if shrink > 1 else clean)


class Watch:
    """Collect which tokens move while a pipeline makes square images; pass `on_step` to `negtome.attach`."""

    def __init__(self) -> None:
        self._steps: list[StepReport] = []
        self._maps: list[torch.Tensor] = []  # [K, h, w]

    def on_step(self, report: StepReport) -> None:
        """Keep the counts and the maps of a step."""
        self._steps.append(replace(report, moved={}))
        for moved in report.moved.values():
            side = math.isqrt(moved.shape[1])
            self._maps.append(moved.unflatten(1, (side, side)))

    def pushed(self) -> Pushed:
        """Return what all steps did, at the resolution of the largest feature map."""
        side = max((share.shape[-1] for share in self._maps), default=1)
        large = [F.interpolate(share[:, None], (side, side), mode="nearest")[:, 0] for share in self._maps]
        return Pushed(tuple(self._steps), torch.stack(large).mean(dim=0) if large else torch.zeros(1, 1, 1))


def token_grid(pipe: Any, config: NegToMeConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width in tokens, of the largest feature map that takes part, of images of a size in pixels."""
    architecture = find_architecture(pipe)
    denoiser = unwrap(getattr(pipe, architecture.denoiser))
    height, width = (side // pipe.vae_scale_factor for side in size)
    if not architecture.levels:
        return height // architecture.patch, width // architecture.patch
    names = [name for name, _, _ in find_sites(denoiser, architecture, config.sites, config.cross_attention)]
    return largest_map(denoiser, names, (height, width))


def pictures(images: Any) -> tuple[Image.Image, ...]:
    """Return floats [K, H, W, 3] in [0, 1] as Pillow's images."""
    return tuple(Image.fromarray(image) for image in torch.as_tensor(255 * images).round().byte().numpy())
