"""The processes that generate the groups of runs, this one or several."""

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from eval.images import load_image
from experiments import start_log
from experiments.configs import build
from experiments.methods.edited import EditedBaseline
from experiments.methods.method import Method
from experiments.prompts import Group
from experiments.runs import checkpoints
from experiments.runs.checkpoints import Checkpoint
from experiments.runs.jobs import RunJob, RunTask
from experiments.runs.locks import locked
from experiments.runs.store import Run

log = logging.getLogger(__name__)


def generate_groups(jobs: list[RunJob]) -> Iterator[Run]:
    """Generate the missing groups of all runs, and yield the run of each group when the group is on disk.

    Groups that another process is generating come last: this process waits for them, and generates them itself if the
    other one dies. When a process of this command is killed, new processes go on.
    """
    for devices in sorted({job.devices for job in jobs}, key=len, reverse=True):
        remaining = {(job.task, group): job.task.run for job in jobs if job.devices == devices for group in job.missing}
        wait, losses = False, 0  # losses in a row, without a group between them
        while remaining:
            before = len(remaining)
            try:
                tasks = [(task, group, wait) for task, group in remaining]
                for (task, group, _), is_on_disk in parallel_map(_generate_group, tasks, devices):
                    if is_on_disk:
                        yield remaining.pop((task, group))
                wait = True
            except BrokenProcessPool as error:
                losses = losses + 1 if len(remaining) == before else 0
                if losses == 2:
                    raise RuntimeError(
                        f"One of {len(devices)} processes that generate was killed, most likely for want of memory, "
                        "before any had finished a group, twice: what is done is kept, run the same command with "
                        "workers=1"
                    ) from error
                log.warning("A process that generates was killed: %d groups remain for new processes", len(remaining))


def parallel_map(
    function: Callable[..., Any], tasks: Sequence[tuple], devices: tuple[str, ...]
) -> Iterator[tuple[tuple, Any]]:
    """Call a module-level function with each task's arguments, in this or in several processes.

    Args:
        devices: the device of each process; see `experiments.runs.jobs.worker_devices`. With one, this process works.

    Yields (task, result) pairs, as they are done.

    Raises:
        BrokenProcessPool: one of several processes was killed.
    """
    if len(devices) == 1:
        yield from ((task, function(*task)) for task in tasks)
        return
    with _quiet_children():
        futures = {_executor(devices).submit(function, *task): task for task in tasks}
    try:
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    except BrokenProcessPool:
        _executor.cache_clear()  # the next call starts new processes
        raise
    finally:
        for future in futures:
            future.cancel()


def _generate_group(task: RunTask, group: Group, wait: bool) -> bool:
    """Generate and save a group unless it is on disk; return whether it is there and no other process works on it."""
    run = task.run
    if run.has(group):
        return True
    with locked(run.lock(group), wait) as is_locked:
        if not is_locked or run.has(group):  # another process is generating it, or has done so meanwhile
            return run.has(group)
        if task.edits is not None:
            # The baseline's group comes first; where another process is generating it, this one comes back later.
            if not _generate_group(task.edits, group, wait):
                return False
            _edit_group(task, task.edits.run, group)
            return True
        pipe, method, call = load_pipeline_and_method(
            task.model, task.method, task.checkpoint, task.device, task.compile, task.offload
        )
        start = time.perf_counter()
        result = method.generate(pipe, group, call)
        images = [] if result.images is None or result.withheld else _to_pil(pipe, result.images, _model(task.model))
        statistics = {"seconds": round(time.perf_counter() - start, 3), **result.statistics}
        run.save(group, images, statistics, result.references, result.withheld, result.seeds)
        return True


def _edit_group(task: RunTask, baseline: Run, group: Group) -> None:
    """Save the edited images of the group that the baseline's run has."""
    start, method = time.perf_counter(), _method(task.method)
    assert isinstance(method, EditedBaseline)  # no other method's task has `edits`
    edited = method.edit_images(group, [load_image(path) for path in baseline.images(group)])
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
    checkpoint: Checkpoint,
    device: str,
    compiled: bool = False,
    offload: bool = False,
) -> tuple[Any, Method, dict[str, Any]]:
    """Load a pipeline, a method and the arguments of the model's calls from JSON; the last ones are cached."""
    pipe = _pipeline(model, checkpoint, device, compiled, offload)
    return pipe, _method(method), checkpoints.call_arguments(_model(model))


@functools.lru_cache(maxsize=1)  # parsing takes as long as a step of a mini model
def _model(spec: str) -> DictConfig:
    return OmegaConf.create(json.loads(spec))


@functools.lru_cache(maxsize=1)  # a method that looks for assets holds an encoder
def _method(spec: str) -> Method:
    return build(OmegaConf.create(json.loads(spec)))


@functools.lru_cache(maxsize=1)  # the runs of a sweep mostly share a pipeline
def _pipeline(model: str, checkpoint: Checkpoint, device: str, compiled: bool, offload: bool) -> Any:
    cfg = _model(model)
    if device == "cpu" and cfg.kind == "mini":
        torch.set_num_threads(1)
    return checkpoints.load(cfg, checkpoint, device, compile_denoiser=compiled, offload=offload)


@functools.cache
def _executor(devices: tuple[str, ...]) -> ProcessPoolExecutor:
    """Start a process for each device. The processes outlive a call of `parallel_map`, and wait for the next."""
    text = "Starting %d processes side by side, on %s; each loads its model first"
    log.info(text, len(devices), ", ".join(dict.fromkeys(devices)))
    # When interrupted, Python's process that frees their semaphores would print a warning.
    warnings = [os.environ.get("PYTHONWARNINGS"), "ignore::UserWarning:multiprocessing.resource_tracker"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, warnings))
    context = multiprocessing.get_context("spawn")  # a forked torch hangs
    unused = context.SimpleQueue()
    for device in devices:
        unused.put(device)
    return ProcessPoolExecutor(len(devices), mp_context=context, initializer=_begin_process, initargs=(unused,))


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


def _begin_process(unused: Any) -> None:
    """Bind this process to a device of its own, from a queue: "cuda" means that GPU from now on."""
    start_log()
    _die_with_parent()
    device = unused.get()
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


def _die_with_parent() -> None:
    """End this process when its parent is gone, killed or interrupted, and only then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
