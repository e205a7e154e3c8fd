"""Act 1: a configuration becomes a run folder of images.

    python -m experiments.generate experiment=diversity
    python -m experiments.generate -m model=mini-sdxl method=negtome method.alpha=0.3,0.9

Interrupt it at will: the same command goes on where it stopped, and does nothing where everything is there.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from experiments import pipelines
from experiments.methods import Method
from experiments.prompts import PromptSet
from experiments.runs import Run, select_device

log = logging.getLogger(__name__)


def generate(cfg: DictConfig) -> Path:
    """Generate what is missing of the run that `cfg` asks for and return its folder.

    Raises:
        FileNotFoundError: the checkpoint is not there and cannot be fetched.
        ValueError: a setting is out of range.
    """
    device = select_device(cfg.device)
    method: Method = instantiate(cfg.method)
    prompts: PromptSet = instantiate(cfg.prompts)
    groups = prompts.groups()
    checkpoint = pipelines.find_checkpoint(cfg.model)
    run = Run.start(cfg, checkpoint.fingerprint, device)
    missing = [group for group in groups if not run.has(group)]
    label = f"{cfg.model.name} {method.name}"
    if not missing:
        run.finish(groups)
        log.info("%s: all %d groups are there, nothing to generate: %s", label, len(groups), run.folder)
        return run.folder

    log.info("%s: %d of %d groups to generate: %s", label, len(missing), len(groups), run.folder)
    pipe = pipelines.load(cfg.model, checkpoint, device, compile_denoiser=cfg.compile, offload=cfg.offload)
    call = OmegaConf.to_container(cfg.model.call, resolve=True)
    for group in tqdm(missing, desc=label, unit="group", dynamic_ncols=True):
        # Each image its own generator, on the CPU: the same noises for every method and on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in group.image_seeds()]
        start = time.perf_counter()
        with method.attach(pipe, group_size=group.size) as attached:
            images = pipe(group.prompt, num_images_per_prompt=group.size, generator=generators, **call).images
        seconds = time.perf_counter() - start
        run.save(group, images, {"seconds": round(seconds, 3), **method.statistics(attached)})
    if not run.finish(groups):
        raise RuntimeError(f"Groups vanished from {run.folder} while it was being filled: run the same command again")
    return run.folder


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    generate(cfg)


if __name__ == "__main__":
    main()
