"""The stages of training on one device, from nothing or from finished models, and the comparison of recipes.

Every stage is a process. Models this small leave much of a GPU idle between kernels, so stages run at the same time:
first text encoders, evaluation CLIP and autoencoder, then both denoisers, with the decoder's refinement beside them.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer, T5Tokenizer

from eval.files import write_json
from experiments.runs.locks import locked
from training import clip, data, flux, tokenizer, unet, vae
from training.loop import TrainingArguments
from training.rows import Images

STAGES = {
    "text": clip.train_text,
    "score": clip.train_score,
    "vae": vae.train,
    "decoder": vae.refine_decoder,
    "unet": unet.train,
    "flux": flux.train,
    "distil": flux.distil,
}
#: Shares of the time of all stages at which each must end. The denoisers start when their inputs exist.
ENDS = {"text": 0.215, "score": 0.3, "vae": 0.25, "decoder": 0.4, "unet": 0.975, "flux": 0.72, "distil": 0.975}
#: Hours for all stages, the data included, unless another time is given.
HOURS = 17 / 60
#: Parts of finished models, and where in the work folder the stages look for them.
PARTS = {
    "mini-sdxl/tokenizer": "tokenizer",
    "mini-sdxl/text_encoder": "text_encoder",
    "mini-sdxl/text_encoder_2": "text_encoder_2",
    "mini-sdxl/vae": "vae/model",
    "mini-sdxl/unet": "unet/start",
    "mini-flux/tokenizer_2": "tokenizer_2",
    "mini-flux/transformer": "flux/start/transformer",
    "mini-flux/text_encoder_2": "flux/start/text_encoder_2",
    "mini-clip": "score/model",
}
#: What each recipe of the comparison changes, and the seed where that is what changes.
RECIPES: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "as shipped, another seed": {"seed": 105},
    "AdamW alone": {"muon": False},
    "uniform times": {"times": "uniform"},
    "noisy times": {"times": "noisy"},
    "no caption left out": {"dropout": 0.0},
}
#: What a denoiser does already changes nothing.
UNCHANGED = {("flux", "noisy times"), ("unet", "uniform times")}


def train(
    out: Path,
    npm: Path,
    source: Path | None,
    limit: int | None,
    device: str | None,
    stage: str | None,
    hours: float | None,
    deadline: float,
    **options: Any,
) -> int:
    """Train every stage, or one; see `training.__main__` for the options.

    Returns:
        The number of stages that failed.

    Raises:
        ValueError: the stage is unknown, or it was not said how long it trains.
    """
    arguments = _arguments(out, device, hours=hours, deadline=deadline, **options)
    if stage not in (None, *STAGES):
        raise ValueError(f"--stage must be one of {', '.join(STAGES)}, got {stage}.")
    if stage and not (hours or deadline or arguments.steps):
        raise ValueError("--stage needs --hours or --steps.")
    if source:
        take_over(source, arguments, npm, limit)
    if stage:
        STAGES[stage](arguments)
        return 0
    stages = ("unet", "flux", "distil") if source else tuple(STAGES)
    return train_together(stages, arguments, npm, limit)


def _arguments(out: Path, device: str | None, **options: Any) -> TrainingArguments:
    return TrainingArguments(out, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **options)


def take_over(models: Path, arguments: TrainingArguments, npm: Path, limit: int | None = None) -> None:
    """Lay out a work folder from finished models, as far as it is not done: parts, data, token ids and latents."""
    work = arguments.work
    with locked(work / ".take_over.lock"):
        if (work / "text" / "card.json").exists():
            return
        for part, target in PARTS.items():
            if not (models / part).exists():
                raise ValueError(f"expected a folder {models / part}, got none; name the folder of the three models")
            shutil.copytree(models / part, work / target, dirs_exist_ok=True)
        if not (work / "data" / "images.npy").exists():
            data.rasterise_into(work / "data", data.describe(work / "data", npm, limit=limit))
        captions = json.loads((work / "data" / "captions.json").read_text())
        bpe = CLIPTokenizer.from_pretrained(work / "tokenizer")
        tokenizer.save_ids(bpe, T5Tokenizer.from_pretrained(work / "tokenizer_2"), captions, work)
        autoencoder = AutoencoderKL.from_pretrained(work / "vae" / "model").to(arguments.device).eval()
        latents = vae.encode_all(autoencoder, Images(work / "data", arguments.device), arguments)
        torch.save(latents, work / "vae" / "latents.pt")
        write_json(work / "text" / "card.json", {"source": "earlier"})


def train_together(stages: tuple[str, ...], arguments: TrainingArguments, npm: Path, limit: int | None) -> int:
    """Start the processes of stages, prepare what they wait for, and report each that ends; count those that fail."""
    work, started = arguments.work, time.time()
    folder, documents = work / "data", None
    work.mkdir(parents=True, exist_ok=True)
    if not (folder / "images.npy").exists():
        documents = data.describe(folder, npm, limit=limit)
        tokenizer.build(json.loads((folder / "captions.json").read_text()), work)
    processes = {stage: _start(stage, arguments, started) for stage in stages}
    if documents:
        data.rasterise_into(folder, documents)
    failed = []
    while processes:
        time.sleep(0.5)
        for stage, process in list(processes.items()):
            if process.poll() is None:
                continue
            del processes[stage]
            print(f"[{time.time() - started:.0f} s] {stage} ended with {process.returncode}", flush=True)
            if process.returncode:
                failed.append(stage)
                print("\n".join((work / f"{stage}.log").read_text().splitlines()[-25:]), flush=True)
    return len(failed)


def _start(stage: str, arguments: TrainingArguments, started: float) -> subprocess.Popen:
    """Start the process of a stage, which logs to `work/STAGE.log`."""
    deadline = started + ENDS[stage] * 3600 * (arguments.hours or HOURS)
    options = {"stage": stage, "out": arguments.work, "deadline": deadline}
    options |= {name: getattr(arguments, name) for name in ("device", "lr", "steps", "batch")}
    command = [sys.executable, "-m", "training", "train"]
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    command += [f"--{flag}" for flag in ("bf16", "compile") if getattr(arguments, flag)]
    with (arguments.work / f"{stage}.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def compare_recipes(
    out: Path,
    npm: Path,
    source: Path | None,
    limit: int | None,
    device: str | None,
    stages: list[str],
    steps: int | None,
    batch: int | None,
    **options: Any,
) -> None:
    """Print the losses of short trainings from nothing, of the fixed rows and the averaged weights; keep no model.

    Args:
        out: work folder whose text encoders and autoencoder are done, or are taken over from `source`.
        stages: "unet" or "flux".
    """
    arguments = _arguments(out, device, steps=steps or 150, batch=batch or 32, **options)
    if source:
        take_over(source, arguments, npm, limit)
    table = []
    for stage in stages:
        for recipe in RECIPES:
            if (stage, recipe) not in UNCHANGED:
                table.append({"denoiser": stage, "recipe": recipe, **_try_recipe(stage, recipe, arguments)})
                print(pd.DataFrame(table).to_markdown(index=False), flush=True)


def _try_recipe(stage: str, recipe: str, arguments: TrainingArguments) -> dict[str, float]:
    changes = dict(RECIPES[recipe])
    seeds = {"seed": changes.pop("seed")} if "seed" in changes else {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        for part in ("data", "tokens.pt", "text", "text_encoder", "text_encoder_2", "vae"):
            (work / part).symlink_to((arguments.work / part).resolve())
        STAGES[stage](replace(arguments, work=work, **changes), **seeds)
        card = json.loads((work / stage / "card.json").read_text())
    images = card["steps"] * card["batch"]
    losses = {"training rows": card["last"]["fixed"], "held out": card["last"]["held_out"]}
    return {**losses, "steps": card["steps"], "images": images, "seconds": round(card["seconds"])}
