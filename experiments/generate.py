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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments import pipelines, select_device
from experiments.configs import build, expand, flag, has_launcher, launch, run_names
from experiments.identity import register, request
from experiments.methods.method import Method
from experiments.prompts import Group, PromptSet
from experiments.runs import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run, and what this process has to generate of it."""

    cfg: DictConfig
    device: str
    checkpoint: pipelines.Checkpoint
    run: Run
    groups: list[Group]
    missing: list[Group]


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

    @classmethod
    def of(cls, job: Job) -> Self:
        model, method = (OmegaConf.to_yaml(part, resolve=True) for part in (job.cfg.model, job.cfg.method))
        return cls(job.run, job.checkpoint, job.device, model, method, job.cfg.compile, job.cfg.offload)


def prepare(cfg: DictConfig) -> Job:
    """Open the run that `cfg` asks for and see what is missing of it.

    Raises:
        FileNotFoundError: the checkpoint is not there and cannot be fetched.
        ValueError: a setting is out of range.
    """
    device = select_device(cfg.device)
    flag(cfg, "offload")  # before anything is generated
    prompts: PromptSet = build(cfg.prompts)
    groups = prompts.groups()
    checkpoint = pipelines.find_checkpoint(cfg.model)
    run = Run.start(cfg, checkpoint.fingerprint, device)
    missing = {group: fault for group in groups if (fault := run.fault(group)) is not None}
    if faults := [fault for group, fault in missing.items() if run.group_folder(group).exists()]:
        label = f"{cfg.model.name} {cfg.method.name}"
        log.warning("%s: %d groups are made again, the first since %s", label, len(faults), faults[0])
    return Job(cfg, device, checkpoint, run, groups, [*missing])


def check(cfg: DictConfig) -> None:
    """Raise what `prepare` would of any machine: a run's own may be another, with another device than this one's."""
    cfg = cfg.copy()
    cfg.device = "cpu"
    flag(cfg, "offload")
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
    return job.run.folder


def generate_all(jobs: list[Job]) -> None:
    """Generate what is missing of all runs, one after the other; see `generate`. A run that is named twice is one.

    Raises:
        KeyboardInterrupt: saying what is kept.
    """
    askers: dict[Run, list[DictConfig]] = {}
    for job in jobs:
        askers.setdefault(job.run, []).append(job.cfg)
    jobs = list({job.run: job for job in jobs}.values())
    names = run_names([job.cfg for job in jobs])
    total = sum(len(job.missing) for job in jobs)
    with logging_redirect_tqdm(), tqdm(total=total, unit="group", dynamic_ncols=True, disable=not total) as bar:
        try:
            for number, (job, name) in enumerate(zip(jobs, names, strict=True), 1):
                bar.set_description(f"run {number} of {len(jobs)}: {name}")
                there = f"{len(job.missing)} of" if job.missing else "nothing to generate, there are all"
                log.info("%s: %s %d groups: %s", name, there, len(job.groups), job.run.folder)
                for _ in _generate_groups(job) if job.missing else ():
                    bar.update()
                if not job.run.finish(job.groups):
                    raise RuntimeError(f"Groups vanished from {job.run.folder} meanwhile: run the same command again")
                for cfg in askers[job.run]:
                    register(cfg, job.run.id)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{bar.n} of {total} groups were generated and are kept in {jobs[0].run.folder.parent}; the same "
                "command goes on from there."
            ) from None


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


def _generate_groups(job: Job) -> Iterator[Group]:
    """See to it that the missing groups are there, yielding each when it is on disk.

    Those that another process is generating are left to it, and waited for at the end: should it die, they are free.
    """
    workers, left = count_workers(job.cfg, job.device), dict.fromkeys(job.missing)
    task = Task.of(job)
    for wait in (False, True):
        if workers == 1:
            ready = (group for group in list(left) if _generate_group(task, group, wait))
        else:
            ready = _side_by_side(task, list(left), wait, workers)
        for group in ready:
            del left[group]
            yield group


def _side_by_side(task: Task, left: list[Group], wait: bool, workers: int) -> Iterator[Group]:
    """Generate in several processes; where one of them is lost, new ones go on."""
    losses = 0  # in a row, without a group between them
    while left:
        futures, before = {}, len(left)
        try:
            executor = _executor(workers)
            with _quiet_children():
                futures = {executor.submit(_generate_group, task, group, wait): group for group in left}
            for future in as_completed(futures):
                there = future.result()
                left.remove(group := futures[future])
                if there:
                    yield group
        except BrokenProcessPool as error:
            _executor.cache_clear()
            losses = losses + 1 if len(left) == before else 0
            if losses == 2:
                raise RuntimeError(
                    f"A process that generates was killed, most likely for want of memory, before any of the {workers} "
                    "had finished a group, twice: what is done is kept, run the same command with fewer, as workers=1"
                ) from error
            log.warning("A process that generates was killed: new ones go on with the %d groups left", len(left))
        finally:
            for future in futures:
                future.cancel()


def _generate_group(task: Task, group: Group, wait: bool) -> bool:
    """Generate and save a group, unless it is there; tell whether it is now, and no other process is at it."""
    with task.run.claim(group, wait) as mine:
        if not mine:
            return task.run.has(group)
        model, method = _model(task.model), _method(task.method)
        pipe = _pipeline(task.model, task.checkpoint, task.device, task.compile, task.offload)
        start = time.perf_counter()
        drawn = method.draw(pipe, group, pipelines.call_arguments(model))
        images = _pictures(pipe, drawn.images, model)
        seconds = time.perf_counter() - start
        statistics = {"seconds": round(seconds, 3), **drawn.statistics}
        task.run.save(group, images, statistics, drawn.references)
        return True


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
    """Return the processes that generate; they outlive a run, so that a sweep starts them once."""
    log.info("Starting %d processes that generate side by side; each loads the model first", workers)
    # Interrupted, Python's process that frees their semaphores would warn that it did.
    warnings = [os.environ.get("PYTHONWARNINGS"), "ignore::UserWarning:multiprocessing.resource_tracker"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, warnings))
    context = multiprocessing.get_context("spawn")  # a forked torch hangs
    with _quiet_children():
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
