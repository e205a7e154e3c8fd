"""Act 1: a configuration becomes a run folder of images.

    python -m experiments generate experiment=diversity
    python -m experiments generate model=mini-sdxl method=negtome method.alpha=0.3,0.9

The run without a method that the others are compared with is made beside them, whether it is named or not.

Interrupt it at will: the same command goes on where it stopped, and does nothing where everything is there. Call it as
often as you like at the same time, on one machine or on several with a shared disk: no group is generated twice.

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

from eval.images import count_withheld, read_withheld
from experiments import project_path, select_device, start_log
from experiments.configs import build, flag, with_device
from experiments.methods.method import Method
from experiments.plan import Plan, RunSpec, launch, launched_run
from experiments.prompts import Group
from experiments.runs import checkpoints, preflight
from experiments.runs.identity import request
from experiments.runs.metrics import left_out_lines
from experiments.runs.preflight import Fault
from experiments.runs.store import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """All that generating a group of a run needs, model and method as YAML: who generates composes nothing."""

    run: Run
    checkpoint: checkpoints.Checkpoint
    device: str
    model: str
    method: str
    compile: bool
    offload: bool


@dataclass(frozen=True)
class Job:
    """A run, its identity, what this process has to generate of it, and in how many processes."""

    spec: RunSpec
    task: Task
    identity: dict[str, Any]
    groups: list[Group]
    missing: list[Group]
    workers: int

    def begin(self) -> None:
        """Make the run's folder."""
        self.task.run.begin(self.identity, self.task.device)


def prepare_job(spec: RunSpec, checkpoint: checkpoints.Checkpoint, method: Method | None = None) -> Job:
    """Look what is missing of a run; nothing is written.

    Args:
        method: the configured one, if it is built already.

    Raises:
        FileNotFoundError: something that the method needs is not there.
        ValueError: a setting is out of range.
    """
    cfg = spec.cfg
    device = select_device(cfg.device)
    flag(cfg, "offload")  # before anything is generated
    workers = count_workers(cfg, device)
    groups: list[Group] = build(cfg.prompts).groups()
    run, identity = Run.plan(cfg, checkpoint.fingerprint, device, method)
    missing = {group: fault for group in groups if (fault := run.fault(group)) is not None}
    if faults := [fault for group, fault in missing.items() if run.group_folder(group).exists()]:
        log.warning("%s: %d groups are made again, the first since %s", spec.label, len(faults), faults[0])
    texts = (OmegaConf.to_yaml(part, resolve=True) for part in (cfg.model, cfg.method))
    task = Task(run, checkpoint, device, *texts, cfg.compile, cfg.offload)
    return Job(spec, task, identity, groups, [*missing], workers)


def examine(plan: Plan, tables: bool = False, disk: bool = True) -> tuple[list[Job], list[Fault]]:
    """Look what is missing of all runs, and find all that would stop them or their scoring.

    Nothing is written or fetched.

    Args:
        tables: whether tables are to be made, which need the primary metrics.
        disk: whether the images go to a disk of this machine.
    """
    jobs: list[Job] = []
    faults: dict[str, Fault] = {}
    n_images: Counter[tuple[int, int]] = Counter()
    configs = [spec.cfg for spec in plan.runs]
    for cfg in configs:
        select_device(cfg.device)  # which all else asks for
    for spec in plan.runs:
        cfg = spec.cfg
        job, some = _examine_run(spec, configs)
        faults |= {fault.problem: fault for fault in some}
        if job is not None:
            jobs.append(job)
        with contextlib.suppress(ValueError):  # of the prompts, which is among the faults
            groups = build(cfg.prompts).groups() if job is None else job.missing
            size = tuple(cfg.model.call.get(side) or 1024 for side in ("height", "width"))
            n_images[size] += sum(group.size for group in groups)
    if disk:
        faults |= {fault.problem: fault for fault in preflight.of_disk(n_images, project_path(configs[0].outputs))}
    return jobs, [*faults.values(), *preflight.of_scoring(configs, tables)]


def _examine_run(spec: RunSpec, configs: list[DictConfig]) -> tuple[Job | None, list[Fault]]:
    """Look what is missing of a run if it can be generated, and return what is wrong with it."""
    cfg, faults = spec.cfg, []
    try:
        checkpoint = checkpoints.find_checkpoint(cfg.model, fetch=False)
    except FileNotFoundError as error:
        fetch = (
            functools.partial(checkpoints.find_checkpoint, cfg.model) if checkpoints.is_repository(cfg.model) else None
        )
        faults.append(Fault(str(error), f"model={cfg.model.name}", without=_others(cfg, configs, "model"), fetch=fetch))
        checkpoint = None
    except ValueError as error:
        return None, [Fault(str(error))]
    leave_out = _others(cfg, configs, "method")
    try:
        method = build(cfg.method)
        if missing := preflight.of_method(method):
            return None, [*faults, *(replace(fault, without=leave_out) for fault in missing)]
        if checkpoint is None:
            request(cfg, method)
            return None, faults
        job = prepare_job(spec, checkpoint, method)
    except (FileNotFoundError, ValueError) as error:
        return None, [*faults, Fault(str(error), without=leave_out)]
    if job.missing:
        settings = job.identity["request"]["method"]["settings"]
        steps = preflight.of_timesteps(cfg.model, checkpoint.folder, cfg.method.name, settings)
        faults = [replace(fault, without=leave_out) for fault in steps]
    return job, faults


def _others(cfg: DictConfig, configs: list[DictConfig], group: str) -> str:
    """Return the override by which a run's model or method is left out of several."""
    others = dict.fromkeys(one[group].name for one in configs if one[group].name != cfg[group].name)
    return f"{group}={','.join(others)}" if others else ""


def examine_and_fetch(plan: Plan, tables: bool = False, disk: bool = True) -> tuple[list[Job], list[Fault]]:
    """Look what is missing of all runs, and return all that would stop them; arguments are those of `examine`.

    Where nothing is wrong but that files are missing, they are fetched, all before the first image.
    """
    jobs, faults = examine(plan, tables, disk)
    if not faults or not all(fault.fetch for fault in faults):
        return jobs, faults
    if failed := fetch_all(faults):
        return jobs, failed
    return examine(plan, tables, disk)


def fetch_all(faults: list[Fault]) -> list[Fault]:
    """Fetch what can be fetched, and return what is still wrong."""
    left = []
    log.info("Fetching: %s", ", ".join(fault.name for fault in faults if fault.fetch))
    for fault in faults:
        try:
            if fault.fetch is None:
                left.append(fault)
            else:
                fault.fetch()
        except (OSError, ValueError) as error:
            left.append(replace(fault, problem=str(error)))
    return left


def generate(plan: Plan) -> list[Path]:
    """Generate what is missing of a plan's runs and return their folders; the plan is written, with their ids.

    Raises:
        FileNotFoundError: a checkpoint is not there and cannot be fetched.
        ValueError: a setting is out of range, or an image is not finite.
        RuntimeError: NegToMe was attached and compared nothing; or processes were lost over and over.
    """
    plan.write()
    jobs = [prepare_job(spec, checkpoints.find_checkpoint(spec.cfg.model)) for spec in plan.runs]
    generate_jobs(plan, jobs)
    return [job.task.run.folder for job in jobs]


def generate_jobs(plan: Plan, jobs: list[Job]) -> None:
    """Generate what is missing of runs, finishing each with its last group; see `generate`.

    Raises:
        KeyboardInterrupt: saying what is kept.
    """
    for job in jobs:
        job.begin()
    runs = {job.task.run: job for job in jobs}  # one that is named twice is one
    names = Plan([job.spec for job in runs.values()]).names()
    titles = {}
    left = {run: len(job.missing) for run, job in runs.items()}
    total = sum(left.values())
    with logging_redirect_tqdm(), tqdm(total=total, unit="group", dynamic_ncols=True, disable=not total) as bar:
        try:
            for number, (run, name) in enumerate(zip(runs, names, strict=True), 1):
                titles[run] = f"run {number} of {len(runs)}: {name}"
                there = f"{left[run]} of" if left[run] else "nothing to generate, there are all"
                log.info("%s: %s %d groups: %s", name, there, len(runs[run].groups), run.folder)
                if not left[run]:
                    _finish(plan, run, jobs)
            for run in _generate_groups(list(runs.values())):
                bar.set_description(titles[run])
                bar.update()
                left[run] -= 1
                if not left[run]:
                    _finish(plan, run, jobs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{bar.n} of {total} groups were generated and are kept in {jobs[0].task.run.folder.parent}; the same "
                "command goes on from there."
            ) from None


def _finish(plan: Plan, run: Run, jobs: list[Job]) -> None:
    """Complete a run, and note its id in the plan."""
    for job in jobs:
        if job.task.run == run:
            if not run.finish(job.groups):
                raise RuntimeError(f"Groups vanished from {run.folder} meanwhile: run the same command again")
            plan.complete(job.spec, run.id)
            if withheld := read_withheld(run.folder):
                text = "%s: %d of %d groups are withheld: %s"
                log.info(text, job.spec.label, len(withheld), len(job.groups), count_withheld(withheld))


def count_workers(cfg: DictConfig, device: str) -> int:
    """Return how many processes generate at the same time.

    `workers=auto` is one a core for the mini models on a CPU: their operations are too small to share one between
    threads. Else it is one.

    Raises:
        ValueError: not "auto" or a number of at least 1.
    """
    if cfg.workers == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, 8) if device == "cpu" and cfg.model.kind == "mini" else 1
    if not isinstance(cfg.workers, int) or cfg.workers < 1:
        raise ValueError(f"workers must be auto or a whole number of at least 1, got {cfg.workers!r}")
    return cfg.workers


def _generate_groups(jobs: list[Job]) -> Iterator[Run]:
    """See to it that the missing groups of all runs are there, yielding the run of each when it is on disk.

    Those that another process is generating are left to it, and waited for at the end: should it die, they are free.
    Where one of several processes that generate here is lost, new ones go on.
    """
    for workers in sorted({job.workers for job in jobs}, reverse=True):
        left = {(job.task, group): job.task.run for job in jobs if job.workers == workers for group in job.missing}
        wait, losses = False, 0  # in a row, without a group between them
        while left:
            before = len(left)
            try:
                for done in _generate_each(list(left), wait, workers):
                    yield left.pop(done)
                wait = True
            except BrokenProcessPool as error:
                _executor.cache_clear()
                losses = losses + 1 if len(left) == before else 0
                if losses == 2:
                    raise RuntimeError(
                        f"One of {workers} processes that generate was killed, most likely for want of memory, before "
                        "any had finished a group, twice: what is done is kept, run the same command with workers=1"
                    ) from error
                log.warning("A process that generates was killed: new ones go on with the %d groups left", len(left))


def _generate_each(todo: list[tuple[Task, Group]], wait: bool, workers: int) -> Iterator[tuple[Task, Group]]:
    """Generate groups here or in several processes, yielding those that no other process is at as they are there."""
    for (*one, _), there in parallel_map(_generate_group, [(*one, wait) for one in todo], workers):
        if there:
            yield tuple(one)


def parallel_map(work: Callable[..., Any], tasks: Sequence[tuple], workers: int) -> Iterator[tuple[tuple, Any]]:
    """Call a function of a module with each task's arguments, here or in several processes; yield both when done."""
    if workers == 1:
        yield from ((task, work(*task)) for task in tasks)
        return
    with _quiet_children():
        futures = {_executor(workers).submit(work, *task): task for task in tasks}
    try:
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    finally:
        for future in futures:
            future.cancel()


def _generate_group(task: Task, group: Group, wait: bool) -> bool:
    """Generate and save a group, unless it is there; tell whether it is now, and no other process is at it."""
    with task.run.claim(group, wait) as mine:
        if not mine:
            return task.run.has(group)
        made_of = task.model, task.method, task.checkpoint, task.device, task.compile, task.offload
        pipe, method, call = load_pipeline_and_method(*made_of)
        start = time.perf_counter()
        drawn = method.generate(pipe, group, call)
        images = [] if drawn.withheld else _pictures(pipe, drawn.images, _model(task.model))
        statistics = {"seconds": round(time.perf_counter() - start, 3), **drawn.statistics}
        task.run.save(group, images, statistics, drawn.references, drawn.withheld, drawn.seeds)
        return True


def load_pipeline_and_method(
    model: str,
    method: str,
    checkpoint: checkpoints.Checkpoint,
    device: str,
    compiled: bool = False,
    offload: bool = False,
) -> tuple[Any, Method, dict[str, Any]]:
    """Return a pipeline, a method and the arguments of the model's calls, of YAML; the last ones are kept."""
    pipe = _pipeline(model, checkpoint, device, compiled, offload)
    return pipe, _method(method), checkpoints.call_arguments(_model(model))


def _pictures(pipe: Any, images: np.ndarray, model: DictConfig) -> list[Image.Image]:
    """Return decoded images, float [N, H, W, 3] in [0, 1], as the pipeline itself would have.

    Raises:
        ValueError: they are not numbers, which a PNG would show as black.
    """
    if not np.isfinite(images).all():
        half = "SDXL's own autoencoder overflows in float16: give model.dtype=float32, or a checkpoint whose does not"
        cure = half if model.dtype == "float16" else "check the checkpoint's weights and the method's settings"
        raise ValueError(
            f"expected finite images of model={model.name} in {model.dtype}, got NaN, which would show black: {cure}"
        )
    return pipe.image_processor.numpy_to_pil(images)


@functools.lru_cache(maxsize=1)
def _model(spec: str) -> DictConfig:
    """Read a model's configuration, or return the last one: it takes as long as a step of a mini model."""
    return OmegaConf.create(spec)


@functools.lru_cache(maxsize=1)
def _method(spec: str) -> Method:
    """Build a method, or return the last one: one that looks for assets holds an encoder."""
    return build(OmegaConf.create(spec))


@functools.lru_cache(maxsize=1)
def _pipeline(model: str, checkpoint: checkpoints.Checkpoint, device: str, compiled: bool, offload: bool) -> Any:
    """Load a pipeline, or return the last one: the runs of a sweep mostly share theirs."""
    cfg = _model(model)
    if device == "cpu" and cfg.kind == "mini":
        torch.set_num_threads(1)
    return checkpoints.load(cfg, checkpoint, device, compile_denoiser=compiled, offload=offload)


@functools.cache
def _executor(workers: int) -> ProcessPoolExecutor:
    """Return the processes that generate; they outlive a call of `generate`, and then wait for the next."""
    log.info("Starting %d processes that generate side by side; each loads the model first", workers)
    # Interrupted, Python's process that frees their semaphores would warn that it did.
    warnings = [os.environ.get("PYTHONWARNINGS"), "ignore::UserWarning:multiprocessing.resource_tracker"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, warnings))
    context = multiprocessing.get_context("spawn")  # a forked torch hangs
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent)


@contextlib.contextmanager
def _quiet_children() -> Iterator[None]:
    """Start processes in the block that leave Ctrl-C to this one from their first instruction on.

    Else each shows a traceback of its imports.
    """
    listens = threading.current_thread() is threading.main_thread()
    answer = signal.signal(signal.SIGINT, signal.SIG_IGN) if listens else None
    try:
        yield
    finally:
        if listens:
            signal.signal(signal.SIGINT, answer)


def _die_with_parent() -> None:
    """End this process when the one that started it is gone, killed or interrupted, and only then."""
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
    if any(fault.fetch for fault in faults) and not all(fault.fetch for fault in faults):  # none of them was tried
        print("python -m experiments doctor --fetch with the same overrides fetches what it can.", file=sys.stderr)
    if any(fault.needed_by for fault in faults):
        command = "python -m experiments generate with the same overrides and" if tables else "The same command with"
        print(f"{command} metric=none makes the images alone; evaluate scores them later.", file=sys.stderr)
    return 2


def generate_job(cfg: DictConfig) -> None:
    """Generate the run of a job that a launcher started."""
    plan, spec = launched_run(cfg)
    generate_jobs(plan, [prepare_job(spec, checkpoints.find_checkpoint(spec.cfg.model))])


def _on_cpu(plan: Plan) -> Plan:
    """Return a plan whose runs need no device of this machine: a job's own machine may be another."""
    configs = [OmegaConf.to_container(spec.cfg, resolve=True) for spec in plan.runs]
    return Plan([RunSpec(OmegaConf.create(with_device(cfg, lambda _: "cpu")), "") for cfg in configs])


def main(argv: list[str], plan: Plan | None = None) -> int:
    """Generate; `plan` is that of `experiments.reproduce`, which goes on to scores and tables."""
    start_log()
    tables = plan is not None
    plan = plan or Plan.of(argv)
    for line in left_out_lines(spec.cfg for spec in plan.runs):
        log.warning("%s", line)
    if plan.launcher:
        if faults := examine_and_fetch(_on_cpu(plan), tables, disk=False)[1]:
            return refuse(faults, tables)
        plan.write()
        launch(generate_job, plan)
        return 0
    jobs, faults = examine_and_fetch(plan, tables)
    if faults:
        return refuse(faults, tables)
    plan.write()
    generate_jobs(plan, jobs)
    return 0
