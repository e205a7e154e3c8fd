"""Contact sheets of the small models: one row a category, drawn with the stock pipelines on the CPU."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from PIL import Image

from experiments.figures.image_grid import contact_sheet
from experiments.training import taxonomy

SETTINGS = {  # what the models are meant to be run with
    "mini-sdxl": {"guidance_scale": 5.0, "num_inference_steps": 20},
    "mini-flux": {
        "guidance_scale": 3.5,
        "num_inference_steps": 20,
        "height": 128,
        "width": 128,
        "max_sequence_length": 32,
    },
}


def load(folder: Path) -> StableDiffusionXLPipeline | FluxPipeline:
    """The stock pipeline of a model folder, in float32."""
    kind = FluxPipeline if folder.name.startswith("mini-flux") else StableDiffusionXLPipeline
    pipe = kind.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sheet(
    pipe: StableDiffusionXLPipeline | FluxPipeline,
    settings: dict,
    categories: Sequence[str],
    columns: int = 6,
    seed: int = 0,
    template: str = taxonomy.TEMPLATES[0],
) -> tuple[Image.Image, float]:
    """One row of images for each category.

    Returns:
        The sheet, and the mean seconds of one call.
    """
    rows, seconds = [], 0.0
    for number, name in enumerate(categories):
        generators = [torch.Generator().manual_seed(seed + 1000 * number + i) for i in range(columns)]
        started = time.time()
        images = pipe(f"{template} {name}", num_images_per_prompt=columns, generator=generators, **settings).images
        seconds += time.time() - started
        rows.append((name, [images]))
    return contact_sheet([template], rows, tile=64), seconds / len(categories)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw contact sheets of the small models")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--out", type=Path, default=None, help="folder of the sheets; default: each model's own")
    parser.add_argument("--only", choices=list(SETTINGS))
    parser.add_argument("--development", action="store_true", help="the development categories")
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--shift", type=float, help="of the flow scheduler, to compare")
    args = parser.parse_args(argv)
    for name, usual in SETTINGS.items():
        if args.only not in (None, name):
            continue
        settings = dict(usual)
        if args.guidance is not None:
            settings["guidance_scale"] = args.guidance
        if args.steps:
            settings["num_inference_steps"] = args.steps
        pipe = load(args.models / name)
        if args.shift is not None and name == "mini-flux":
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=args.shift)
        categories = taxonomy.DEVELOPMENT if args.development else taxonomy.EVALUATED
        page, seconds = sheet(pipe, settings, categories, args.columns)
        folder = args.out or args.models / name
        folder.mkdir(parents=True, exist_ok=True)
        stem = "samples-development" if args.development else "samples"
        path = folder / (f"{name}-{stem}.jpg" if args.out else f"{stem}.jpg")
        page.save(path, quality=75)
        print(f"{path}: {seconds:.1f} s a call of {args.columns}, {settings}")


if __name__ == "__main__":
    main()
