"""Faults that would stop an experiment after hours, found before its first image: weights, settings, prompts, disk.

Nothing is loaded or fetched. Every fault says what to do and, where possible, names the override that goes on without
the part that is missing.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import negtome
from eval.encoders import Network, Scorer
from eval.images import ManifestRow
from eval.imageset import ImageSet
from experiments.configs import build, without
from experiments.prompts import Group
from experiments.runs import checkpoints, metrics

#: Bytes of a pixel of a PNG of a photograph, rounded up.
BYTES_PER_PIXEL = 2


@dataclass(frozen=True)
class Fault:
    """Something that would stop an experiment.

    Attributes:
        problem: what is wrong and what to do.
        name: of the missing part, if it may be fetched.
        needed_by: metrics that cannot be measured because of it.
        elsewhere: the override that names another place of a missing file.
        without: the overrides by which an experiment goes on without the part.
        fetch: downloads the part, or raises FileNotFoundError; None if nothing can be downloaded.
    """

    problem: str
    name: str = ""
    needed_by: tuple[str, ...] = ()
    elsewhere: str = ""
    without: str = ""
    fetch: Callable[[], Any] | None = field(default=None, compare=False)

    def lines(self) -> list[str]:
        notes = {"needed by": ", ".join(self.needed_by), "elsewhere": self.elsewhere, "without it": self.without}
        problem = [line.rstrip() for line in self.problem.splitlines()]
        return [*problem, *(f"{label + ':':<12}{note}" for label, note in notes.items() if note)]


def listing(faults: Sequence[Fault]) -> str:
    """Return the numbered list of faults."""
    lines = []
    for number, fault in enumerate(faults, 1):
        first, *rest = fault.lines()
        lines += [f"{number:>3}. {first}", *(f"     {line}" for line in rest)]
    return "\n".join(lines)


def of_weights(scorer: Scorer, elsewhere: str = "") -> list[Fault]:
    """Find missing weights of a scorer and of its parts, and weights that are not their publishers'.

    Args:
        elsewhere: the override that names another place of the weights.
    """
    faults = []
    for part in scorer.parts():
        facts = part.weights()
        try:
            if facts.present:
                _ = facts.fingerprint
                continue
        except ValueError as error:
            faults.append(Fault(str(error), elsewhere=elsewhere))
            continue
        can_be_fetched = isinstance(part, Network) and part.can_be_fetched(facts)
        fetch = part.obtain if can_be_fetched else None
        faults.append(Fault(str(facts.missing()), facts.encoder, elsewhere=elsewhere, fetch=fetch))
    return faults


def of_method(method: Any) -> list[Fault]:
    """Find faults in the weights of the networks that a method holds, at any depth."""
    if isinstance(method, Scorer):
        return of_weights(method)
    if isinstance(method, Mapping):
        parts = method.values()
    elif isinstance(method, (list, tuple)):
        parts = method
    elif type(method).__module__.startswith("experiments."):
        parts = getattr(method, "__dict__", {}).values()
    else:
        return []
    return [fault for part in parts for fault in of_method(part)]


def of_scoring(configs: Sequence[DictConfig], tables: bool) -> list[Fault]:
    """Find faults that would keep the configured metrics from being measured.

    Args:
        tables: whether a table will be made of the numbers, which needs the primary metrics.
    """
    faults: dict[str, tuple[DictConfig, Fault]] = {}
    absent: set[str] = set()
    distinct = _distinct(configs)
    for cfg in distinct:
        try:
            images = _planned(build(cfg.prompts).groups())
        except ValueError:  # invalid prompts are a fault of the run, too
            continue
        for name in metrics.measured(cfg):
            for fault in _of_metric(cfg, name, images):
                absent.add(name)
                first, earlier = faults.get(fault.problem, (cfg, fault))
                needed_by = tuple(dict.fromkeys([*earlier.needed_by, name]))
                faults[fault.problem] = first, replace(earlier, needed_by=needed_by)
    result = [replace(fault, without=_leave_out(cfg, fault, absent, tables)) for cfg, fault in faults.values()]
    if tables:
        result += _of_tables(distinct)
    return result


def _distinct(configs: Sequence[DictConfig]) -> list[DictConfig]:
    """Return one configuration of all that measure alike: methods and settings of calls make no difference."""
    distinct = {}
    for cfg in configs:
        nodes = (cfg.metric, cfg.model, cfg.prompts, cfg.primary)
        parts = [without(OmegaConf.to_container(node), "call") for node in nodes]
        distinct.setdefault(str([*parts, cfg.get("scorers"), cfg.bootstrap]), cfg)
    return list(distinct.values())


def _planned(groups: Iterable[Group]) -> ImageSet:
    """Return the images that groups will have; their files do not exist yet."""
    rows = [
        ManifestRow(f"{group.id}/{index}.png", group.prompt_id, group.prompt, group.category, group.seed, index, seed)
        for group in groups
        for index, seed in enumerate(group.image_seeds())
    ]
    return ImageSet("the images to be made", rows)


def _of_metric(cfg: DictConfig, name: str, images: ImageSet) -> list[Fault]:
    try:
        metric = metrics.build_metric(cfg, name)
    except (FileNotFoundError, ValueError) as error:
        return [Fault(str(error))]
    faults = of_weights(metric.encoder, metrics.place_of_weights(cfg, name, metric.encoder))
    try:
        metric.require(metric.part(images.only(metric.only)))
    except (FileNotFoundError, ValueError) as error:
        faults.append(Fault(str(error)))
    return faults


def _leave_out(cfg: DictConfig, fault: Fault, absent: set[str], tables: bool) -> str:
    """Return the overrides that leave out the metrics of a fault, and test other metrics in their place."""
    overrides = [f"~metric.{name}" for name in fault.needed_by]
    primary = metrics.tested_among(cfg, fault.needed_by) if tables else []
    if primary:
        others = metrics.primary_without(cfg, fault.needed_by, absent)
        if others is None:
            return f"not possible: the table tests {', '.join(primary)} (`primary`), and no other metric can stand in"
        overrides += others
    return " ".join(overrides)


def _of_tables(configs: Iterable[DictConfig]) -> list[Fault]:
    faults = {}
    for cfg in configs:
        try:
            metrics.check_table(cfg)
        except ValueError as error:
            faults[str(error)] = Fault(str(error))
    return list(faults.values())


def of_disk(n_images: dict[tuple[int, int], int], folder: Path) -> list[Fault]:
    """Return a fault if the images do not fit onto the disk.

    Args:
        n_images: number of images by height and width in pixels.
        folder: where they go; it need not exist.
    """
    needed = sum(BYTES_PER_PIXEL * height * width * number for (height, width), number in n_images.items())
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed <= free:
        return []
    return [
        Fault(
            f"{sum(n_images.values())} images need about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free "
            f"at {existing}: make room, or give outputs=FOLDER on another disk, or make fewer images, as by "
            "prompts.seeds=[0]"
        )
    ]


def of_timesteps(model: DictConfig, folder: Path, method: str, settings: dict[str, Any]) -> list[Fault]:
    """Return a fault if no step of a call lies in the method's timestep range.

    Args:
        folder: the model's checkpoint.
        method: the method's name.
        settings: of the method; without a `timestep_range`, it acts on all steps.
    """
    if "timestep_range" not in settings:
        return []
    config = negtome.NegToMeConfig(timestep_range=settings["timestep_range"]).published_for(model.architecture)
    steps = checkpoints.timesteps(model, folder)
    if not steps or any(map(config.is_active, steps)):
        return []
    low, high = config.window()
    first_steps = ", ".join(f"{step:.4g}" for step in steps[:6]) + (", ..." if len(steps) > 6 else "")
    return [
        Fault(
            f"model={model.name} method={method}: no step lies in timestep_range=[{low:g},{high:g}]: the "
            f"{len(steps)} steps of a call are at {first_steps}; widen method.timestep_range, or raise "
            "model.call.num_inference_steps"
        )
    ]
