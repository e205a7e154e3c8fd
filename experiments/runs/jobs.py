"""The jobs of an experiment: of each run its identity, its folder, and the groups that are missing there."""

import json
import logging
import os
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments import project_path, select_device
from experiments.configs import build, flag
from experiments.methods.edited import EditedBaseline
from experiments.methods.method import Method
from experiments.plan import RunSpec
from experiments.prompts import Group
from experiments.runs.checkpoints import Checkpoint
from experiments.runs.identity import run_identity, short_digest
from experiments.runs.store import RUNS, Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunTask:
    """Everything that a process needs to generate a group of a run; model and method are JSON, already composed.

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
    """A run, its identity, all of its groups, those that are missing, and the number of processes to generate them."""

    spec: RunSpec
    task: RunTask
    identity: dict[str, Any]
    groups: list[Group]
    missing: list[Group]
    workers: int


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
    workers = count_workers(cfg, device)
    groups: list[Group] = build(cfg.prompts).groups()
    method = build(cfg.method) if method is None else method
    task, identity = _task(cfg, checkpoint, device, method)
    if isinstance(method, EditedBaseline) and spec.baseline is not spec:
        baseline = spec.baseline.cfg
        task = replace(task, edits=_task(baseline, checkpoint, device, build(baseline.method))[0])
    run = task.run
    missing = {group: fault for group in groups if (fault := run.fault(group)) is not None}
    if damaged := [fault for group, fault in missing.items() if run.group_folder(group).exists()]:
        log.warning("%s: %d groups are made again, the first since %s", spec.label, len(damaged), damaged[0])
    return RunJob(spec, task, identity, groups, [*missing], workers)


def _task(cfg: DictConfig, checkpoint: Checkpoint, device: str, method: Method) -> tuple[RunTask, dict[str, Any]]:
    """Return the task of a configuration whose method is built, and the run's identity."""
    identity = run_identity(cfg, method, checkpoint.fingerprint, device)
    run = Run(project_path(cfg.outputs) / RUNS / short_digest(identity))
    # JSON, because writing YAML takes 20 ms a run, also of a plan whose images all exist.
    texts = (json.dumps(OmegaConf.to_container(part, resolve=True)) for part in (cfg.model, cfg.method))
    return RunTask(run, checkpoint, device, *texts, cfg.compile, cfg.offload), identity


def count_workers(cfg: DictConfig, device: str) -> int:
    """Return the number of processes that generate at the same time.

    `workers=auto` means one process a core for the mini models on a CPU, whose operations are too small to be shared by
    threads, and otherwise one process.

    Raises:
        ValueError: `workers` is neither "auto" nor an integer of at least 1.
    """
    if cfg.workers == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, 8) if device == "cpu" and cfg.model.kind == "mini" else 1
    if not isinstance(cfg.workers, int) or cfg.workers < 1:
        raise ValueError(f"workers must be auto or a whole number of at least 1, got {cfg.workers!r}")
    return cfg.workers
