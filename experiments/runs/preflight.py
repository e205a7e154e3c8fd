"""Faults that would stop an experiment after hours, found before its first image: weights, settings, prompts, disk."""

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import negtome
from eval.images import ManifestRow
from eval.imageset import ImageSet
from eval.resemblance import DetectionRate
from experiments import project_path, select_device
from experiments.configs import build, without
from experiments.methods.guarded import LAYERS, Guarded, OutputCheck
from experiments.methods.method import Method
from experiments.plan import Plan, RunSpec
from experiments.prompts import Group
from experiments.runs import checkpoints, metrics, outlook
from experiments.runs.checkpoints import find_checkpoint
from experiments.runs.faults import Fault, listing, of_method, of_weights
from experiments.runs.identity import request
from experiments.runs.jobs import RunJob, jobs_of_other_device, prepare_job

log = logging.getLogger(__name__)


def examine(plan: Plan, tables: bool = False, disk: bool = True) -> tuple[list[RunJob], list[Fault]]:
    """Find the missing groups of all runs, and every fault that would stop them or their scoring.

    Nothing is written or fetched.

    Args:
        tables: whether tables will be made, which need the primary metrics.
        disk: whether the images go to a disk of this machine.
    """
    jobs: list[RunJob] = []
    faults: list[Fault] = []
    configs = [spec.cfg for spec in plan.runs]
    for cfg in configs:
        select_device(cfg.device)  # everything else depends on it
    faults_of_scoring = of_scoring(configs, tables)
    if (done := jobs_of_other_device(plan.runs)) is not None:
        return done, faults_of_scoring
    for spec in plan.runs:
        job, faults_of_run = _examine_run(spec, configs)
        faults += faults_of_run
        if job is not None:
            jobs.append(job)
    if disk:
        faults += of_disk(outlook.pending_groups(plan, jobs), project_path(configs[0].outputs))
    distinct = {fault.problem: fault for fault in faults}
    return jobs, [*distinct.values(), *faults_of_scoring]


def _examine_run(spec: RunSpec, configs: list[DictConfig]) -> tuple[RunJob | None, list[Fault]]:
    """Return the job of a run, or None if the run cannot be generated; and the faults of the run."""
    cfg, faults, checkpoint = spec.cfg, [], None
    without_method = _others(cfg, configs, "method")
    try:
        checkpoint = find_checkpoint(cfg.model, fetch=False)
    except FileNotFoundError as error:
        fault = Fault(str(error), f"model={cfg.model.name}", without=_others(cfg, configs, "model"))
        if (download := checkpoints.download_of(cfg.model)) is not None:
            fetch = functools.partial(find_checkpoint, cfg.model)
            fault = replace(fault, fetch=fetch, downloads=(download,))
        faults.append(fault)
    except ValueError as error:
        return None, [Fault(str(error))]
    try:
        method = build(cfg.method)
        if missing := of_method(method):
            return None, [*faults, *(replace(fault, without=without_method) for fault in missing)]
        if checkpoint is None:
            request(cfg, method)
            return None, faults
        job = prepare_job(spec, checkpoint, method)
    except (FileNotFoundError, ValueError) as error:
        return None, [*faults, Fault(str(error), without=without_method)]
    faults += _of_check(cfg, method)
    settings = job.identity["request"]["method"]["settings"]
    if job.missing and "timestep_range" in settings:  # a method without one acts on all steps
        if settings.get("step_range") is None:
            of_steps = of_timesteps(cfg.model, checkpoint.folder, cfg.method.name, settings["timestep_range"])
        else:
            of_steps = of_step_range(cfg.model, cfg.method.name, settings["step_range"])
        faults += [replace(fault, without=without_method) for fault in of_steps]
    return job, faults


def _of_check(cfg: DictConfig, method: Method) -> list[Fault]:
    """Return a fault if a method's check of its output is not independent of the metrics that evaluate it."""
    if not isinstance(method, Guarded) or method.layers != LAYERS[-1] or not isinstance(method.check, OutputCheck):
        return []
    problems: dict[str, list[str]] = {}
    for name in metrics.measured(cfg):
        metric = metrics.build_metric(cfg, name)
        if isinstance(metric, DetectionRate) and (shared := method.check.shared_with(metric)):
            problems.setdefault(" and ".join(shared), []).append(name)
    return [
        Fault(
            f"The output check and the evaluator share {shared}, so it cannot see the check's mistakes: give "
            "the check others by method.check.encoder, method.check.folder and method.check.held_out",
            needed_by=tuple(names),
            without="method.layers=steer",
        )
        for shared, names in problems.items()
    ]


def _others(cfg: DictConfig, configs: list[DictConfig], group: str) -> str:
    """Return the override that leaves a run's model or method out of several."""
    others = dict.fromkeys(other[group].name for other in configs if other[group].name != cfg[group].name)
    return f"{group}={','.join(others)}" if others else ""


def examine_and_fetch(plan: Plan, tables: bool = False, disk: bool = True) -> tuple[list[RunJob], list[Fault]]:
    """Call `examine` and log what is to be made; if missing files are the only faults, fetch them and examine again."""
    jobs, faults = examine(plan, tables, disk)
    if not all(fault.fetch for fault in faults):
        return jobs, faults
    for line in outlook.summary(plan, outlook.pending_groups(plan, jobs)):
        log.info("%s", line)
    if not faults:
        return jobs, faults
    if failed := fetch_all(faults):
        return jobs, failed
    return examine(plan, tables, disk)


def describe(plan: Plan, jobs: list[RunJob], faults: list[Fault], tables: bool = False) -> list[str]:
    """Return what an experiment needs, and the faults that `examine` found, as lines to print."""
    lines = metrics.left_out_lines(spec.cfg for spec in plan.runs)
    lines += outlook.report(plan, outlook.pending_groups(plan, jobs), faults, tables)
    if not faults:
        return [*lines, f"{len(plan.runs)} runs can be made and scored here."]
    if all(fault.fetch for fault in faults):
        lines.append(f"Missing, and downloaded before the first image if the network answers: {len(faults)}")
    else:
        lines.append(f"Faults that would stop it: {len(faults)}")
    return [*lines, listing(faults)]


def fetch_all(faults: list[Fault]) -> list[Fault]:
    """Fetch everything that can be fetched, and return the faults that remain."""
    remaining = []
    if names := [fault.name for fault in faults if fault.fetch]:
        log.info("Fetching: %s", ", ".join(names))
    for fault in faults:
        try:
            if fault.fetch is None:
                remaining.append(fault)
            else:
                fault.fetch()
        except (OSError, ValueError) as error:
            remaining.append(replace(fault, problem=str(error)))
    return remaining


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
    return ImageSet(Path("the images to be made"), rows)


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


def of_disk(pending: outlook.Pending, folder: Path) -> list[Fault]:
    """Return a fault if the images that are still to be generated do not fit onto the disk.

    Args:
        folder: where they go; it need not exist.
    """
    needed = outlook.bytes_of_images(pending)
    free, existing = outlook.free_space(folder)
    if needed <= free:
        return []
    return [
        Fault(
            f"{outlook.count_images(pending)} images need about {outlook.gigabytes(needed)}, and "
            f"{outlook.gigabytes(free)} are free at {existing}: make room, or give outputs=FOLDER on another disk, or "
            "make fewer images, as by prompts.seeds=[0]"
        )
    ]


def of_timesteps(
    model: DictConfig, folder: Path, method: str, timestep_range: tuple[float, float] | None
) -> list[Fault]:
    """Return a fault if no step of a call lies in the method's timestep range.

    Args:
        folder: the model's checkpoint.
        method: the method's name.
        timestep_range: low and high; None for the one that is published for the architecture.
    """
    config = negtome.NegToMeConfig(timestep_range=timestep_range).published_for(model.architecture)
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


def of_step_range(model: DictConfig, method: str, step_range: tuple[int, int] | tuple[float, float]) -> list[Fault]:
    """Return a fault if no step of a call lies in the method's step range.

    Args:
        method: the method's name.
        step_range: of `negtome.NegToMeConfig`.
    """
    call = checkpoints.call_arguments(model)
    steps = call["num_inference_steps"]
    config = negtome.NegToMeConfig(step_range=step_range)
    if {"timesteps", "sigmas"} & call.keys() or any(config.active_steps([0.0] * steps)):
        return []
    first, last = step_range
    return [
        Fault(
            f"model={model.name} method={method}: no step lies in step_range=[{first:g},{last:g}]: a call has {steps} "
            f"steps, from 0 to {steps - 1}; widen method.step_range, or raise model.call.num_inference_steps"
        )
    ]
