"""Lay out the real images that the mini models' are compared with: `models/mini-reference/<category>/*.png`.

    python -m training.reference --data DIR/data

A seeded draw from the artwork that the models were trained on, the same number from each evaluated category: what
KID and CMMD need as the "real" side. Not a held-out set: it says how near the models come to their training artwork.
"""

import argparse
import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.tables.templates import render
from training import data, taxonomy
from training.sources import Emoji

IMAGES_PER_CATEGORY = 16


def draw(emoji: list[Emoji], category: str, count: int = IMAGES_PER_CATEGORY, seed: int = 0) -> list[int]:
    """Draw images of a category without replacement, typical ones more often, all artwork sets alike.

    Args:
        emoji: the table of images.
        category: a key of the taxonomy.
        count: how many; fewer where the category has fewer.
        seed: of the draw; categories are drawn independently.

    Returns:
        Positions in `emoji`, sorted.
    """
    generator = random.Random(f"{seed}/{category}")
    weights = {index: item.categories[category] for index, item in enumerate(emoji) if category in item.categories}
    # Efraimidis and Spirakis (2006): the largest u^(1/w) are a weighted sample without replacement.
    keys = {index: generator.random() ** (1 / weight) for index, weight in weights.items()}
    return sorted(sorted(keys, key=keys.get, reverse=True)[:count])


def write_picture(pixels: np.ndarray, folder: Path, item: Emoji) -> Path:
    """Write an image [128, 128, 4] on white, in 256 colours, named after its set and icon; return its path."""
    picture = Image.fromarray(np.asarray(pixels), "RGBA")
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    path = folder / f"{item.style_set}-{item.icon}.png"
    white.quantize(256).save(path, optimize=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Lay out the mini models' real images")
    parser.add_argument("--data", type=Path, required=True, help="the data folder of training.train")
    parser.add_argument("--out", type=Path, default=Path("models/mini-reference"))
    arguments = parser.parse_args()
    emoji, statistics = data.load_table(arguments.data)
    images = np.load(arguments.data / "images.npy", mmap_mode="r")
    shutil.rmtree(arguments.out, ignore_errors=True)
    total = 0
    for category in taxonomy.EVALUATED:
        (arguments.out / category).mkdir(parents=True)
        for index in draw(emoji, category):
            write_picture(images[index], arguments.out / category, emoji[index])
            total += 1
    facts = {"total": total, "each": IMAGES_PER_CATEGORY, "statistics": statistics}
    (arguments.out / "README.md").write_text(render("training/cards/mini-reference.md.j2", **facts))
    print(f"{arguments.out}: {total} images")


if __name__ == "__main__":
    main()
