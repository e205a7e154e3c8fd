"""Act 1: a configuration becomes a run folder of images.

    python -m experiments.generate experiment=diversity
    python -m experiments.generate -m model=mini-sdxl method=negtome method.alpha=0.3,0.9

Interrupt it at will: the same command goes on where it stopped, and does nothing where everything is there.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from experiments import pipelines, select_device
from experiments.configs import build
from experiments.methods import Method
from experiments.prompts import Group, PromptSet
from experiments.runs import Run

log = logging.getLogger(__name__)


def generate(cfg: DictConfig) -> Path:
    """Generate what is missing of the run that `cfg` asks for and return its folder.

    Raises:
        FileNotFoundError: the checkpoint is not there and cannot be fetched.
        ValueError: a setting is out of range.
        RuntimeError: NegToMe was attached and compared nothing.
    """
    device = select_device(cfg.device)
    prompts: PromptSet = build(cfg.prompts)
    groups = prompts.groups()
    checkpoint = pipelines.find_checkpoint(cfg.model)
    run = Run.start(cfg, checkpoint.fingerprint, device)
    missing = [group for group in groups if not run.has(group)]
    label = f"{cfg.model.name} {cfg.method.name}"
    if missing:
        log.info("%s: %d of %d groups to generate: %s", label, len(missing), len(groups), run.folder)
        done = _generate_groups(cfg, checkpoint, device, run, missing)
        for _ in tqdm(done, desc=label, total=len(missing), unit="group", dynamic_ncols=True):
            pass
    else:
        log.info("%s: all %d groups are there, nothing to generate: %s", label, len(groups), run.folder)
    if not run.finish(groups):
        raise RuntimeError(f"Groups vanished from {run.folder} while it was being filled: run the same command again")
    return run.folder


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


def _generate_groups(
    cfg: DictConfig, checkpoint: pipelines.Checkpoint, device: str, run: Run, groups: list[Group]
) -> Iterator[Group]:
    """Generate and save `groups`, yielding each when it is on disk."""
    workers = count_workers(cfg, device)
    # All that is needed, resolved: a worker composes nothing.
    job = (OmegaConf.to_container(cfg, resolve=True), checkpoint, device, run)
    if workers == 1:
        for group in groups:
            _generate_group(*job, group)
            yield group
    else:
        executor = _executor(workers)
        futures = {executor.submit(_generate_group, *job, group): group for group in groups}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            for future in futures:
                future.cancel()


def _generate_group(
    config: dict[str, Any], checkpoint: pipelines.Checkpoint, device: str, run: Run, group: Group
) -> None:
    cfg = OmegaConf.create(config)
    pipe = _pipeline(OmegaConf.to_yaml(cfg.model), checkpoint, device, cfg.compile, cfg.offload)
    method = _method(OmegaConf.to_yaml(cfg.method))
    # Each image its own generator, on the CPU: the same noises for every method and on every device.
    generators = [torch.Generator().manual_seed(seed) for seed in group.image_seeds()]
    start = time.perf_counter()
    with method.apply(pipe, group, cfg.model.call) as applied:
        images = pipe(group.prompt, num_images_per_prompt=group.size, generator=generators, **applied.call).images
    seconds = time.perf_counter() - start
    run.save(group, images, {"seconds": round(seconds, 3), **applied.statistics()}, applied.references)


@functools.lru_cache(maxsize=1)
def _method(spec: str) -> Method:
    """Build a method, or return the last one: one that looks for assets holds an encoder."""
    return build(OmegaConf.create(spec))


@functools.lru_cache(maxsize=1)
def _pipeline(model: str, checkpoint: pipelines.Checkpoint, device: str, compiled: bool, offload: bool) -> Any:
    """Load a pipeline, or return the last one: the runs of a sweep mostly share theirs."""
    if device == "cpu" and OmegaConf.create(model).kind == "mini":
        torch.set_num_threads(1)
    return pipelines.load(OmegaConf.create(model), checkpoint, device, compile_denoiser=compiled, offload=offload)


@functools.cache
def _executor(workers: int) -> ProcessPoolExecutor:
    """Return the processes that generate; they outlive a run, so that a sweep starts them once."""
    context = multiprocessing.get_context("spawn")  # a forked torch hangs
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent)


def _die_with_parent() -> None:
    """End this process when the one that started it is gone, killed without a word included."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    try:
        generate(cfg)
    except FileNotFoundError as error:  # it says what to do; a traceback would bury that
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
