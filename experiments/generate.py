"""Stage 1: generate the images of an experiment, a folder for each run.

    python -m experiments generate experiment=diversity
    python -m experiments generate model=mini-sdxl method=negtome method.alpha=0.3,0.9

The baseline of each run is generated too, whether you name it or not.

You may interrupt the command at any time: the same command goes on where it stopped, and does nothing when everything
is there. Several commands may run at once, also on several machines with a shared disk: no group is generated twice.

    python -m experiments generate -m experiment=sweep launcher=joblib
    python -m experiments generate -m experiment=sweep launcher=slurm

A launcher sends the runs of a sweep to other processes or machines.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from eval.images import count_withheld, load_image, read_withheld
from experiments import project_path, select_device, start_log
from experiments.configs import build, flag, with_device
from experiments.methods.edited import EditedBaseline
from experiments.methods.method import Method
from experiments.plan import Plan, RunSpec, launch, launched_run, run_names
from experiments.prompts import Group
from experiments.runs import checkpoints, preflight
from experiments.runs.identity import request
from experiments.runs.metrics import left_out_lines
from experiments.runs.preflight import Fault
from experiments.runs.store import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunTask:
    """Everything that a process needs to generate a group of a run; model and method are YAML, already composed.

    `edits` is the task of the run whose images an `EditedBaseline` edits; None for all other methods.
    """

    run: Run
    checkpoint: checkpoints.Checkpoint
    device: str
    model: str
    method: str
    compile: bool
    offload: bool
    edits: "RunTask | None" = None

    @classmethod
    def of(
        cls, cfg: DictConfig, checkpoint: checkpoints.Checkpoint, device: str, method: Method | None = None
    ) -> tuple["RunTask", dict[str, Any]]:
        """Return the task of a configuration, and the run's identity."""
        run, identity = Run.plan(cfg, checkpoint.fingerprint, device, method)
        texts = (OmegaConf.to_yaml(part, resolve=True) for part in (cfg.model, cfg.method))
        return cls(run, checkpoint, device, *texts, cfg.compile, cfg.offload), identity


@dataclass(frozen=True)
class RunJob:
    """A run, its identity, all of its groups, those that are missing, and the number of processes to generate them."""

    spec: RunSpec
    task: RunTask
    identity: dict[str, Any]
    groups: list[Group]
    missing: list[Group]
    workers: int


def prepare_job(spec: RunSpec, checkpoint: checkpoints.Checkpoint, method: Method | None = None) -> RunJob:
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
    task, identity = RunTask.of(cfg, checkpoint, device, method)
    if isinstance(method, EditedBaseline) and spec.baseline is not spec:
        task = replace(task, edits=RunTask.of(spec.baseline.cfg, checkpoint, device)[0])
    run = task.run
    missing = {group: fault for group in groups if (fault := run.fault(group)) is not None}
    if damaged := [fault for group, fault in missing.items() if run.group_folder(group).exists()]:
        log.warning("%s: %d groups are made again, the first since %s", spec.label, len(damaged), damaged[0])
    return RunJob(spec, task, identity, groups, [*missing], workers)


def examine(plan: Plan, tables: bool = False, disk: bool = True) -> tuple[list[RunJob], list[Fault]]:
    """Find the missing groups of all runs, and every fault that would stop them or their scoring.

    Nothing is written or fetched.

    Args:
        tables: whether tables will be made, which need the primary metrics.
        disk: whether the images go to a disk of this machine.
    """
    jobs: list[RunJob] = []
    faults: list[Fault] = []
    n_images: Counter[tuple[int, int]] = Counter()
    configs = [spec.cfg for spec in plan.runs]
    for cfg in configs:
        select_device(cfg.device)  # everything else depends on it
    for spec in plan.runs:
        job, faults_of_run = _examine_run(spec, configs)
        faults += faults_of_run
        if job is not None:
            jobs.append(job)
        with contextlib.suppress(ValueError):  # invalid prompts are among the faults
            groups = build(spec.cfg.prompts).groups() if job is None else job.missing
            size = tuple(spec.cfg.model.call.get(side) or 1024 for side in ("height", "width"))
            n_images[size] += sum(group.size for group in groups)
    if disk:
        faults += preflight.of_disk(n_images, project_path(configs[0].outputs))
    distinct = {fault.problem: fault for fault in faults}
    return jobs, [*distinct.values(), *preflight.of_scoring(configs, tables)]


def _examine_run(spec: RunSpec, configs: list[DictConfig]) -> tuple[RunJob | None, list[Fault]]:
    """Return the job of a run, or None if the run cannot be generated; and the faults of the run."""
    cfg, faults, checkpoint = spec.cfg, [], None
    without_method = _others(cfg, configs, "method")
    try:
        checkpoint = checkpoints.find_checkpoint(cfg.model, fetch=False)
    except FileNotFoundError as error:
        is_repository = checkpoints.is_repository(cfg.model)
        fetch = functools.partial(checkpoints.find_checkpoint, cfg.model) if is_repository else None
        faults.append(Fault(str(error), f"model={cfg.model.name}", without=_others(cfg, configs, "model"), fetch=fetch))
    except ValueError as error:
        return None, [Fault(str(error))]
    try:
        method = build(cfg.method)
        if missing := preflight.of_method(method):
            return None, [*faults, *(replace(fault, without=without_method) for fault in missing)]
        if checkpoint is None:
            request(cfg, method)
            return None, faults
        job = prepare_job(spec, checkpoint, method)
    except (FileNotFoundError, ValueError) as error:
        return None, [*faults, Fault(str(error), without=without_method)]
    if job.missing:
        settings = job.identity["request"]["method"]["settings"]
        of_steps = preflight.of_timesteps(cfg.model, checkpoint.folder, cfg.method.name, settings)
        faults = [replace(fault, without=without_method) for fault in of_steps]
    return job, faults


def _others(cfg: DictConfig, configs: list[DictConfig], group: str) -> str:
    """Return the override that leaves a run's model or method out of several."""
    others = dict.fromkeys(other[group].name for other in configs if other[group].name != cfg[group].name)
    return f"{group}={','.join(others)}" if others else ""


def examine_and_fetch(plan: Plan, tables: bool = False, disk: bool = True) -> tuple[list[RunJob], list[Fault]]:
    """Call `examine`; if missing files are the only faults, fetch them and examine again."""
    jobs, faults = examine(plan, tables, disk)
    if not faults or not all(fault.fetch for fault in faults):
        return jobs, faults
    if failed := fetch_all(faults):
        return jobs, failed
    return examine(plan, tables, disk)


def fetch_all(faults: list[Fault]) -> list[Fault]:
    """Fetch everything that can be fetched, and return the faults that remain."""
    remaining = []
    log.info("Fetching: %s", ", ".join(fault.name for fault in faults if fault.fetch))
    for fault in faults:
        try:
            if fault.fetch is None:
                remaining.append(fault)
            else:
                fault.fetch()
        except (OSError, ValueError) as error:
            remaining.append(replace(fault, problem=str(error)))
    return remaining


def generate(plan: Plan) -> list[Path]:
    """Write the plan, generate the missing groups of its runs, and return the runs' folders.

    Raises:
        FileNotFoundError: a checkpoint is missing and cannot be fetched.
        ValueError: a setting is out of range, or an image is not finite.
        RuntimeError: NegToMe was attached and compared nothing; or processes were killed repeatedly.
    """
    plan.write()
    jobs = [prepare_job(spec, checkpoints.find_checkpoint(spec.cfg.model)) for spec in plan.runs]
    generate_jobs(plan, jobs)
    return [job.task.run.folder for job in jobs]


def generate_jobs(plan: Plan, jobs: list[RunJob]) -> None:
    """Generate the missing groups of runs, and complete each run after its last group; errors as of `generate`.

    Raises:
        KeyboardInterrupt: its message says which groups are kept.
    """
    for job in jobs:
        job.task.run.begin(job.identity, job.task.device)
    by_run = {job.task.run: job for job in jobs}  # a run that is named twice is generated once
    names = run_names([job.spec.cfg for job in by_run.values()])
    titles = {}
    remaining = {run: len(job.missing) for run, job in by_run.items()}
    total = sum(remaining.values())
    with logging_redirect_tqdm(), tqdm(total=total, unit="group", dynamic_ncols=True, disable=not total) as bar:
        try:
            for number, (run, name) in enumerate(zip(by_run, names, strict=True), 1):
                titles[run] = f"run {number} of {len(by_run)}: {name}"
                state = f"{remaining[run]} of" if remaining[run] else "nothing to generate, there are all"
                log.info("%s: %s %d groups: %s", name, state, len(by_run[run].groups), run.folder)
                if not remaining[run]:
                    _finish(plan, run, jobs)
            for run in _generate_groups(list(by_run.values())):
                bar.set_description(titles[run])
                bar.update()
                remaining[run] -= 1
                if not remaining[run]:
                    _finish(plan, run, jobs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{bar.n} of {total} groups were generated and are kept in {jobs[0].task.run.folder.parent}; the same "
                "command goes on from there."
            ) from None


def _finish(plan: Plan, run: Run, jobs: list[RunJob]) -> None:
    """Complete a run, and write its id into the plan."""
    for job in jobs:
        if job.task.run != run:
            continue
        if not run.finish(job.groups):
            raise RuntimeError(f"Groups vanished from {run.folder} meanwhile: run the same command again")
        plan.complete(job.spec, run.id)
        if withheld := read_withheld(run.folder):
            text = "%s: %d of %d groups are withheld: %s"
            log.info(text, job.spec.label, len(withheld), len(job.groups), count_withheld(withheld))


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


def _generate_groups(jobs: list[RunJob]) -> Iterator[Run]:
    """Generate the missing groups of all runs, and yield the run of each group when the group is on disk.

    Groups that another process is generating come last: this process waits for them, and generates them itself if the
    other one dies. When a process of this command is killed, new processes go on.
    """
    for workers in sorted({job.workers for job in jobs}, reverse=True):
        remaining = {(job.task, group): job.task.run for job in jobs if job.workers == workers for group in job.missing}
        wait, losses = False, 0  # losses in a row, without a group between them
        while remaining:
            before = len(remaining)
            try:
                for finished in _generate_each(list(remaining), wait, workers):
                    yield remaining.pop(finished)
                wait = True
            except BrokenProcessPool as error:
                _executor.cache_clear()
                losses = losses + 1 if len(remaining) == before else 0
                if losses == 2:
                    raise RuntimeError(
                        f"One of {workers} processes that generate was killed, most likely for want of memory, before "
                        "any had finished a group, twice: what is done is kept, run the same command with workers=1"
                    ) from error
                log.warning("A process that generates was killed: %d groups remain for new processes", len(remaining))


def _generate_each(todo: list[tuple[RunTask, Group]], wait: bool, workers: int) -> Iterator[tuple[RunTask, Group]]:
    """Generate groups, and yield each that is on disk; skip those that another process is generating, unless `wait`."""
    tasks = [(*task_and_group, wait) for task_and_group in todo]
    for (task, group, _), is_on_disk in parallel_map(_generate_group, tasks, workers):
        if is_on_disk:
            yield task, group


def parallel_map(function: Callable[..., Any], tasks: Sequence[tuple], workers: int) -> Iterator[tuple[tuple, Any]]:
    """Call a module-level function with each task's arguments, in this or in several processes.

    Yields (task, result) pairs, as they are done.
    """
    if workers == 1:
        yield from ((task, function(*task)) for task in tasks)
        return
    with _quiet_children():
        futures = {_executor(workers).submit(function, *task): task for task in tasks}
    try:
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    finally:
        for future in futures:
            future.cancel()


def _generate_group(task: RunTask, group: Group, wait: bool) -> bool:
    """Generate and save a group unless it is on disk; return whether it is there and no other process works on it."""
    with task.run.claim(group, wait) as is_claimed:
        if not is_claimed:
            return task.run.has(group)
        if task.edits is not None:
            # The baseline's group comes first; where another process is generating it, this one comes back later.
            if not _generate_group(task.edits, group, wait):
                return False
            _edit_group(task, group)
            return True
        pipe, method, call = load_pipeline_and_method(
            task.model, task.method, task.checkpoint, task.device, task.compile, task.offload
        )
        start = time.perf_counter()
        result = method.generate(pipe, group, call)
        images = [] if result.withheld else _to_pil(pipe, result.images, _model(task.model))
        statistics = {"seconds": round(time.perf_counter() - start, 3), **result.statistics}
        task.run.save(group, images, statistics, result.references, result.withheld, result.seeds)
        return True


def _edit_group(task: RunTask, group: Group) -> None:
    """Save the edited images of the group that another run has."""
    start = time.perf_counter()
    edited = _method(task.method).edit_images(group, [load_image(path) for path in task.edits.run.images(group)])
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in edited]
    task.run.save(group, images, {"seconds": round(time.perf_counter() - start, 3)})


def _to_pil(pipe: Any, images: np.ndarray, model: DictConfig) -> list[Image.Image]:
    """Convert decoded images, float [N, H, W, 3] in [0, 1], as the pipeline itself would.

    Raises:
        ValueError: an image is not finite; a PNG would show it black.
    """
    if not np.isfinite(images).all():
        half = "SDXL's own autoencoder overflows in float16: give model.dtype=float32, or a checkpoint whose does not"
        cure = half if model.dtype == "float16" else "check the checkpoint's weights and the method's settings"
        raise ValueError(
            f"expected finite images of model={model.name} in {model.dtype}, got NaN, which would show black: {cure}"
        )
    return pipe.image_processor.numpy_to_pil(images)


def load_pipeline_and_method(
    model: str,
    method: str,
    checkpoint: checkpoints.Checkpoint,
    device: str,
    compiled: bool = False,
    offload: bool = False,
) -> tuple[Any, Method, dict[str, Any]]:
    """Load a pipeline, a method and the arguments of the model's calls from YAML; the last ones are cached."""
    pipe = _pipeline(model, checkpoint, device, compiled, offload)
    return pipe, _method(method), checkpoints.call_arguments(_model(model))


@functools.lru_cache(maxsize=1)  # parsing takes as long as a step of a mini model
def _model(spec: str) -> DictConfig:
    return OmegaConf.create(spec)


@functools.lru_cache(maxsize=1)  # a method that looks for assets holds an encoder
def _method(spec: str) -> Method:
    return build(OmegaConf.create(spec))


@functools.lru_cache(maxsize=1)  # the runs of a sweep mostly share a pipeline
def _pipeline(model: str, checkpoint: checkpoints.Checkpoint, device: str, compiled: bool, offload: bool) -> Any:
    cfg = _model(model)
    if device == "cpu" and cfg.kind == "mini":
        torch.set_num_threads(1)
    return checkpoints.load(cfg, checkpoint, device, compile_denoiser=compiled, offload=offload)


@functools.cache
def _executor(workers: int) -> ProcessPoolExecutor:
    """Start the processes that generate. They outlive a call of `generate`, and wait for the next."""
    log.info("Starting %d processes that generate side by side; each loads the model first", workers)
    # When interrupted, Python's process that frees their semaphores would print a warning.
    warnings = [os.environ.get("PYTHONWARNINGS"), "ignore::UserWarning:multiprocessing.resource_tracker"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, warnings))
    context = multiprocessing.get_context("spawn")  # a forked torch hangs
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent)


@contextlib.contextmanager
def _quiet_children() -> Iterator[None]:
    """Let processes that start in the block ignore Ctrl-C; otherwise each prints a traceback of its imports."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)


def _die_with_parent() -> None:
    """End this process when its parent is gone, killed or interrupted, and only then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def refuse(faults: list[Fault], tables: bool) -> int:
    """Print all faults, and return the exit code."""
    if len(faults) == 1 and len(faults[0].lines()) == 1:
        raise ValueError(faults[0].problem)
    print(f"generate: {len(faults)} faults, and no image was made:\n{preflight.listing(faults)}", file=sys.stderr)
    can_be_fetched = [bool(fault.fetch) for fault in faults]
    if any(can_be_fetched) and not all(can_be_fetched):  # otherwise all were tried
        print("python -m experiments doctor --fetch with the same overrides fetches what it can.", file=sys.stderr)
    if any(fault.needed_by for fault in faults):
        command = "python -m experiments generate with the same overrides and" if tables else "The same command with"
        print(f"{command} metric=none makes the images alone; evaluate scores them later.", file=sys.stderr)
    return 2


def generate_launched(cfg: DictConfig) -> None:
    """Generate the run of a job that a launcher started."""
    plan, spec = launched_run(cfg)
    generate_jobs(plan, [prepare_job(spec, checkpoints.find_checkpoint(spec.cfg.model))])


def _on_cpu(plan: Plan) -> Plan:
    """Return the plan for the CPU: a launched job may run on a machine with other devices than this one."""
    configs = [OmegaConf.to_container(spec.cfg, resolve=True) for spec in plan.runs]
    return Plan([RunSpec(OmegaConf.create(with_device(cfg, lambda _: "cpu")), "") for cfg in configs])


def main(argv: list[str], plan: Plan | None = None) -> int:
    """Generate; `experiments.reproduce` passes its plan, and goes on to scores and tables."""
    start_log()
    tables = plan is not None
    plan = plan or Plan.of(argv)
    for line in left_out_lines(spec.cfg for spec in plan.runs):
        log.warning("%s", line)
    if plan.launcher:
        if faults := examine_and_fetch(_on_cpu(plan), tables, disk=False)[1]:
            return refuse(faults, tables)
        plan.write()
        launch(generate_launched, plan)
        return 0
    jobs, faults = examine_and_fetch(plan, tables)
    if faults:
        return refuse(faults, tables)
    plan.write()
    generate_jobs(plan, jobs)
    return 0
