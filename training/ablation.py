"""Short trainings of both denoisers from nothing, each with one part of the recipe changed: losses after equal steps.

    python -m training.ablation --work DIR --steps 150 --batch 32 --bf16

DIR is a work folder whose text encoders and autoencoder are done (`training.resume`, or the first stages of
`training.train`); the trainings start in a folder of their own and leave nothing behind but a row each. The
losses are those that a training logs: of 256 training rows and of 256 held-out images, at times spread evenly over
(0, 1) whatever the recipe draws, with noises of their own, of the averaged weights.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from training import flux, unet
from training.loop import Recipe, Setting

STAGES = {"flux": flux.train, "unet": unet.train}
RECIPES = {
    "as shipped": Recipe(),
    "as shipped, another seed": Recipe(),
    "AdamW alone": Recipe(muon=False),
    "uniform times": Recipe(times="uniform"),
    "noisy times": Recipe(times="noisy"),
    "no caption left out": Recipe(dropout=0.0),
}
# What a denoiser does already is no variant.
SAME = {("flux", "noisy times"), ("unet", "uniform times")}


def run(stage: str, name: str, setting: Setting) -> dict[str, float | str]:
    """Train a stage from nothing by a recipe and return its row: losses, steps and seconds."""
    with tempfile.TemporaryDirectory(dir=setting.work) as folder:
        work = Path(folder)
        for part in ("data", "tokens.pt", "text", "text_encoder", "text_encoder_2", "vae"):
            (work / part).symlink_to((setting.work / part).resolve())
        started = time.time()
        seeds = {"seed": 105} if "seed" in name else {}
        STAGES[stage](replace(setting, work=work, recipe=RECIPES[name]), **seeds)
        card = json.loads((work / stage / "card.json").read_text())
    last = card["last"]
    return {
        "denoiser": stage,
        "recipe": name,
        "training rows": last["fixed"],
        "held out": last["held_out"],
        "steps": card["steps"],
        "images": card["steps"] * card["batch"],
        "seconds": round(time.time() - started),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare recipes of the denoisers' training")
    parser.add_argument("--work", type=Path, required=True, help="work folder with text encoders and latents")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args(argv)
    setting = Setting(
        work=args.work, deadline=0.0, steps=args.steps, batch=args.batch, device=args.device, half=args.bf16
    )
    rows = []
    for stage in args.stages:
        for name in RECIPES:
            if (stage, name) not in SAME:
                rows.append(run(stage, name, setting))
                print(pd.DataFrame(rows).to_markdown(index=False), flush=True)


if __name__ == "__main__":
    main()
