"""Lay out the real images that the mini models are compared with: `models/mini-reference/<category>/*.png`.

A seeded draw from the training artwork, the same number from each evaluated category: the real side of KID and CMMD.
It is no held-out set: it shows how near the models come to what they learnt from.
"""

import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.tables.templates import render
from training import taxonomy
from training.data import load_table
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


def write_image(pixels: np.ndarray, folder: Path, item: Emoji) -> Path:
    """Write an image [128, 128, 4] on white, in 256 colours, named after its set and icon; return its path."""
    image = Image.fromarray(np.asarray(pixels), "RGBA")
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{item.style_set}-{item.icon}.png"
    white.quantize(256).save(path, optimize=True)
    return path


def write_card(folder: Path, **facts: object) -> None:
    """Write the model card of a folder, from the template of its name."""
    (folder / "README.md").write_text(render(f"training/cards/{folder.name}.md.j2", **facts))


def lay_out(data: Path, out: Path) -> None:
    """Write the images of all evaluated categories, and their card."""
    emoji, statistics = load_table(data)
    images = np.load(data / "images.npy", mmap_mode="r")
    shutil.rmtree(out, ignore_errors=True)
    total = 0
    for category in taxonomy.EVALUATED:
        for index in draw(emoji, category):
            write_image(images[index], out / category, emoji[index])
            total += 1
    write_card(out, total=total, each=IMAGES_PER_CATEGORY, statistics=statistics)
    print(f"{out}: {total} images")
