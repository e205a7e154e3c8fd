"""Act 1: a configuration becomes a run folder of images.

    python -m experiments.generate experiment=diversity
    python -m experiments.generate model=mini-sdxl method=negtome method.alpha=0.3,0.9

The run without a method that the others are compared with is made beside them, whether it is named or not.

Interrupt it at will: the same command goes on where it stopped, and does nothing where everything is there. Call it as
often as you like at the same time, on one machine or on several with a shared disk: no group is generated twice.

    python -m experiments.generate -m experiment=sweep launcher=joblib
    python -m experiments.generate -m experiment=sweep launcher=slurm

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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from eval.images import count_withheld, read_withheld
from experiments import pipelines, select_device
from experiments.configs import build, expand, flag, has_launcher, launch, run_names
from experiments.identity import register, request
from experiments.methods.method import Method
from experiments.prompts import Group
from experiments.runs import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """All that generating a group of a run needs, model and method as YAML: who generates composes nothing."""

    run: Run
    checkpoint: pipelines.Checkpoint
    device: str
    model: str
    method: str
    compile: bool
    offload: bool


@dataclass(frozen=True)
class Job:
    """A run, what this process has to generate of it, and in how many processes."""

    cfg: DictConfig
    task: Task
    groups: list[Group]
    missing: list[Group]
    workers: int


def prepare(cfg: DictConfig) -> Job:
    """Open the run that `cfg` asks for and see what is missing of it.

    Raises:
        FileNotFoundError: the checkpoint is not there and cannot be fetched.
        ValueError: a setting is out of range.
    """
    device = select_device(cfg.device)
    flag(cfg, "offload")  # before anything is generated
    workers = count_workers(cfg, device)
    groups: list[Group] = build(cfg.prompts).groups()
    checkpoint = pipelines.find_checkpoint(cfg.model)
    run = Run.start(cfg, checkpoint.fingerprint, device)
    missing = {group: fault for group in groups if (fault := run.fault(group)) is not None}
    if faults := [fault for group, fault in missing.items() if run.group_folder(group).exists()]:
        label = f"{cfg.model.name} {cfg.method.name}"
        log.warning("%s: %d groups are made again, the first since %s", label, len(faults), faults[0])
    model, method = (OmegaConf.to_yaml(part, resolve=True) for part in (cfg.model, cfg.method))
    task = Task(run, checkpoint, device, model, method, cfg.compile, cfg.offload)
    return Job(cfg, task, groups, [*missing], workers)


def check(cfg: DictConfig) -> None:
    """Raise what `prepare` would of any machine: a run's own may be another, with another device than this one's."""
    cfg = cfg.copy()
    cfg.device = "cpu"
    flag(cfg, "offload")
    count_workers(cfg, cfg.device)
    request(cfg)
    pipelines.find_checkpoint(cfg.model)


def generate(cfg: DictConfig) -> Path:
    """Generate what is missing of the run that `cfg` asks for and return its folder.

    Raises:
        FileNotFoundError: the checkpoint is not there and cannot be fetched.
        ValueError: as `prepare`, or an image is not finite.
        RuntimeError: NegToMe was attached and compared nothing; or processes were lost over and over.
    """
    job = prepare(cfg)
    generate_all([job])
    return job.task.run.folder


def generate_all(jobs: list[Job]) -> None:
    """Generate what is missing of all runs, finishing each with its last group; see `generate`.

    Raises:
        KeyboardInterrupt: saying what is kept.
    """
    runs = {job.task.run: job for job in jobs}  # one that is named twice is one
    names = run_names([job.cfg for job in runs.values()])
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
                    _finish(run, jobs)
            for run in _generate_groups(list(runs.values())):
                bar.set_description(titles[run])
                bar.update()
                left[run] -= 1
                if not left[run]:
                    _finish(run, jobs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{bar.n} of {total} groups were generated and are kept in {jobs[0].task.run.folder.parent}; the same "
                "command goes on from there."
            ) from None


def _finish(run: Run, jobs: list[Job]) -> None:
    """Complete a run, and name it as what answers every job that asked for it."""
    for job in jobs:
        if job.task.run == run:
            if not run.finish(job.groups):
                raise RuntimeError(f"Groups vanished from {run.folder} meanwhile: run the same command again")
            register(job.cfg, run.id)
            if withheld := read_withheld(run.folder):
                label, counts = f"{job.cfg.model.name} {job.cfg.method.name}", count_withheld(withheld)
                log.info("%s: %d of %d groups are withheld: %s", label, len(withheld), len(job.groups), counts)


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
    for (*one, _), there in spread(_generate_group, [(*one, wait) for one in todo], workers):
        if there:
            yield tuple(one)


def spread(work: Callable[..., Any], tasks: Sequence[tuple], workers: int) -> Iterator[tuple[tuple, Any]]:
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
        pipe, method, call = ready(*made_of)
        start = time.perf_counter()
        drawn = method.draw(pipe, group, call)
        images = [] if drawn.withheld else _pictures(pipe, drawn.images, _model(task.model))
        statistics = {"seconds": round(time.perf_counter() - start, 3), **drawn.statistics}
        task.run.save(group, images, statistics, drawn.references, drawn.withheld, drawn.seeds)
        return True


def ready(
    model: str,
    method: str,
    checkpoint: pipelines.Checkpoint,
    device: str,
    compiled: bool = False,
    offload: bool = False,
) -> tuple[Any, Method, dict[str, Any]]:
    """Return a pipeline, a method and the arguments of the model's calls, of YAML; the last ones are kept."""
    pipe = _pipeline(model, checkpoint, device, compiled, offload)
    return pipe, _method(method), pipelines.call_arguments(_model(model))


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
def _pipeline(model: str, checkpoint: pipelines.Checkpoint, device: str, compiled: bool, offload: bool) -> Any:
    """Load a pipeline, or return the last one: the runs of a sweep mostly share theirs."""
    cfg = _model(model)
    if device == "cpu" and cfg.kind == "mini":
        torch.set_num_threads(1)
    return pipelines.load(cfg, checkpoint, device, compile_denoiser=compiled, offload=offload)


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


def main(argv: list[str], configs: list[DictConfig] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    configs = configs or expand(argv, baselines=True)
    if has_launcher(argv):
        for cfg in configs:
            check(cfg)
        launch(generate, argv)
    else:
        generate_all([prepare(cfg) for cfg in configs])  # what is wrong with any run of a sweep, before its first image
