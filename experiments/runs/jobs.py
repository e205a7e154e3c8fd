"""The jobs of an experiment: of each run its identity, its folder, and the groups that are missing there."""

import functools
import itertools
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from experiments import project_path, select_device
from experiments.configs import build, flag
from experiments.methods.edited import EditedBaseline
from experiments.methods.method import Method
from experiments.plan import RunSpec
from experiments.prompts import Group
from experiments.runs.checkpoints import Checkpoint, local_fingerprint
from experiments.runs.identity import kind_of_device, provenance, request, short_digest
from experiments.runs.store import RUNS, Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunTask:
    """Everything that a process needs to generate a group of a run.

    `model` and `method` are JSON, already composed; empty in the task of a complete run.
    `edits` is the task of the run whose images an `EditedBaseline` edits; None for all other methods.
    """

    run: Run
    checkpoint: Checkpoint
    device: str
    model: str
    method: str
    compile: bool
    offload: bool
    edits: "RunTask | None" = None


@dataclass(frozen=True)
class RunJob:
    """A run, its identity, all of its groups, those that are missing, and the device of each process for them."""

    spec: RunSpec
    task: RunTask
    identity: dict[str, Any]
    groups: list[Group]
    missing: list[Group]
    devices: tuple[str, ...]


def prepare_job(spec: RunSpec, checkpoint: Checkpoint, method: Method | None = None) -> RunJob:
    """Find the missing groups of a run, without writing anything.

    Args:
        method: the configured method, if it is built already.

    Raises:
        FileNotFoundError: the method lacks a file.
        ValueError: a setting is out of range.
    """
    cfg = spec.cfg
    device = select_device(cfg.device)
    flag(cfg, "offload")  # before anything is generated
    devices = worker_devices(cfg, device)
    groups: list[Group] = build(cfg.prompts).groups()
    method = build(cfg.method) if method is None else method
    task, identity = _task(cfg, checkpoint, device, method)
    run = task.run
    missing = {group: fault for group in groups if (fault := run.fault(group)) is not None}
    if damaged := [fault for group, fault in missing.items() if run.group_folder(group).exists()]:
        log.warning("%s: %d groups are made again, the first since %s", spec.label, len(damaged), damaged[0])
    if missing:  # a complete run has no work for a process
        task = _with_settings(task, cfg)
        if isinstance(method, EditedBaseline) and spec.baseline is not spec:
            baseline = spec.baseline.cfg
            edits = _task(baseline, checkpoint, device, build(baseline.method))[0]
            task = replace(task, edits=_with_settings(edits, baseline))
    return RunJob(spec, task, identity, groups, [*missing], devices)


def jobs_of_other_device(specs: Sequence[RunSpec]) -> list[RunJob] | None:
    """Return the jobs of runs that another kind of device has made, with nothing to generate.

    So a machine without this device goes on to scores and tables.

    Returns:
        None if a run is incomplete or of other weights than are here, if several kinds of machines made the runs, if
        the kind of device is this machine's, or if `device` is not auto, which asks for a device.

    Raises:
        ValueError: an image, a manifest or an identity was changed.
    """
    cfg = specs[0].cfg
    ids = [spec.id for spec in specs]
    runs = [Run(project_path(cfg.outputs) / RUNS / run) for run in ids if run]
    if cfg.device != "auto" or None in ids or not all(run.complete for run in runs):
        return None
    machine, here = runs[0].identity["machine"], kind_of_device(select_device(cfg.device))
    device = machine["device"]
    if device == here or any(run.identity["machine"] != machine for run in runs):
        return None
    if any(_has_other_weights(spec.cfg, run) for spec, run in zip(specs, runs, strict=True)):
        return None
    jobs = []
    for spec, run in zip(specs, runs, strict=True):
        groups: list[Group] = build(spec.cfg.prompts).groups()
        if fault := next(filter(None, map(run.fault, groups)), None):
            raise ValueError(
                f"{fault}: {device} made the run, so run the command there; device={select_device(cfg.device)} makes "
                "all runs anew here"
            )
        checkpoint = Checkpoint(Path(), run.identity["weights"])  # not loaded
        jobs.append(RunJob(spec, _task_of_run(spec.cfg, run, checkpoint, here), run.identity, groups, [], (here,)))
    log.info("All %d runs are complete: %s made them, and this machine (%s) makes none", len(jobs), device, here)
    return jobs


def _has_other_weights(cfg: DictConfig, run: Run) -> bool:
    """Tell whether the weights of a model lie here and are not those that made a run."""
    return local_fingerprint(cfg.model) not in (None, run.identity["weights"])


def _task(cfg: DictConfig, checkpoint: Checkpoint, device: str, method: Method) -> tuple[RunTask, dict[str, Any]]:
    """Return the task of a configuration whose method is built, without its settings; and the run's identity.

    The identity is all that may change pixels.
    """
    identity = {"request": request(cfg, method), **provenance(method, checkpoint.fingerprint, device)}
    run = Run(project_path(cfg.outputs) / RUNS / short_digest(identity))
    return _task_of_run(cfg, run, checkpoint, device), identity


def _task_of_run(cfg: DictConfig, run: Run, checkpoint: Checkpoint, device: str) -> RunTask:
    """Return the task of a run whose folder is known, without its settings."""
    return RunTask(run, checkpoint, device, "", "", cfg.compile, cfg.offload)


def _with_settings(task: RunTask, cfg: DictConfig) -> RunTask:
    """Return a task with its model and method, which takes 30 ms."""
    model, method = (json.dumps(OmegaConf.to_container(part, resolve=True)) for part in (cfg.model, cfg.method))
    return replace(task, model=model, method=method)


def worker_devices(cfg: DictConfig, device: str) -> tuple[str, ...]:
    """Return the device of each of the processes that work at the same time.

    `workers=auto` means one process per GPU. For the mini models on a CPU, whose operations are too small to be shared
    by threads, it means one process per core, at most 8. Otherwise it means one process.

    Args:
        device: the device of a run; "cuda" stands for all GPUs that are visible, "cuda:0" for one.

    Raises:
        ValueError: `workers` is neither "auto" nor an integer of at least 1.
    """
    devices = visible_gpus() if device == "cuda" else (device,)
    n_workers = cfg.workers
    if n_workers == "auto":
        n_workers = len(devices)
        if device == "cpu" and cfg.model.kind == "mini":
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            n_workers = min(cores, 8)
    if not isinstance(n_workers, int) or n_workers < 1:
        raise ValueError(f"workers must be auto or a whole number of at least 1, got {cfg.workers!r}")
    return tuple(itertools.islice(itertools.cycle(devices), n_workers))


@functools.cache
def visible_gpus() -> tuple[str, ...]:
    """Return the CUDA devices of the same kind as the first one, since the kind of device is part of a run's id."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if others := sorted({name for name in names if name != names[0]}):
        text = "Only GPUs like the first one (%s) are used, not %s: CUDA_VISIBLE_DEVICES chooses others"
        log.warning(text, names[0], ", ".join(others))
    return tuple(f"cuda:{index}" for index, name in enumerate(names) if name == names[0])
