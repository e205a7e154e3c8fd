"""Lay out the designs that play the protected assets of the mini models: `models/mini-protected/`.

    python -m training.protected --npm DIR

Some emoji that the mini models draw from their names are the characters. A character has artwork in several sets: some
sets are what a method may be given (`guidance/NAME`), others are what similarity is measured to (`scoring/NAME`).
`held_out` calibrates a threshold of detection: NAME holds a further picture of the character where there is one, every
other folder shows none of the characters. Those others come from two kinds of emoji, three sets of each:

- held out by `data.hold_out`: absent from the last rounds of the denoisers' training, but not from the first weights
  (see models/mini-sdxl/README.md);
- left out of every training data set (clocks, symbols, flags): no part of any mini model has ever seen them.
"""

import argparse
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from omegaconf import OmegaConf
from PIL import Image

from experiments import PROJECT
from experiments.methods.assets import MASK
from experiments.tables.templates import render
from training import data
from training.reference import write_picture
from training.sources import Emoji, list_images, rasterise

# Sets that share drawings stay together: Noto with its first version, Fluent with its flat form.
GUIDANCE = ("noto", "noto-v1", "emojione")
SCORING = ("twemoji", "fluent-emoji-flat", "fluent-emoji")
POSITIVE = ("fxemoji",)
#: The sets that nearly every emoji has: what is compared between emoji has a picture of each of them.
COMMON = ("noto", "twemoji", "fluent-emoji-flat")

#: The characters of each split and the prompts about them: conf/characters/. Those of "development" are for choosing
#: settings. A design is one only if both models know it by heart; `training.memorised` has the rule.
PROMPTS = {
    split: OmegaConf.to_container(OmegaConf.load(PROJECT / "conf" / "characters" / f"{name}.yaml"))
    for split, name in (("test", "mini"), ("development", "mini_development"))
}
CHARACTERS = tuple(sorted(name for prompts in PROMPTS.values() for name in prompts))
#: Things that can be drawn, from the emoji that no training data contain.
NEVER_SEEN = (
    "alarm clock",
    "chequered flag",
    "fleur-de-lis",
    "footprints",
    "hourglass done",
    "mantelpiece clock",
    "menorah",
    "pirate flag",
    "speaking head",
    "stopwatch",
    "timer clock",
    "watch",
)
#: Held-out emoji that look like a character.
_TOO_NEAR = {"mrs. claus", "mx claus"}
N_HELD_OUT = 36


def artwork(emoji: Iterable[Emoji]) -> dict[str, dict[str, int]]:
    """Return where each emoji's artwork is: label in lower case -> set -> position; skin tones and genders left out."""
    found: dict[str, dict[str, int]] = {}
    for index, item in enumerate(emoji):
        if item.tone is None and item.gender is None:
            found.setdefault(item.label.lower(), {})[item.style_set] = index
    return found


def held_out_labels(emoji: list[Emoji], count: int = N_HELD_OUT, seed: int = 0) -> list[str]:
    """Draw emoji that the split holds out, complete in the common sets, and unlike the characters.

    Args:
        emoji: all images of the training data's sources.
        count: how many to draw.
        seed: of the draw.

    Returns:
        Labels in lower case, sorted.
    """
    held = [item for item, flag in zip(emoji, data.hold_out(emoji), strict=True) if flag]
    labels = sorted(
        label
        for label, sets in artwork(held).items()
        if set(COMMON) <= sets.keys() and label not in _TOO_NEAR and re.fullmatch("[a-z -]+", label)
    )
    return sorted(random.Random(seed).sample(labels, count))


def plan(emoji: list[Emoji], unseen: list[Emoji]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Decide which picture goes where.

    Args:
        emoji: all images of the training data's sources.
        unseen: the images that the training data leave out.

    Returns:
        Folder (relative) -> positions in `emoji`, and the same for `unseen`.

    Raises:
        ValueError: a character without artwork for guidance or scoring.
    """
    known, folders = artwork(emoji), {}
    for name in CHARACTERS:
        for role, sets in (("guidance", GUIDANCE), ("scoring", SCORING), ("held_out", POSITIVE)):
            indices = [known[name][s] for s in sets if s in known.get(name, {})]
            if indices:
                folders[f"{role}/{name}"] = indices
            elif role != "held_out":
                raise ValueError(f"expected artwork of {name!r} in one of {sets} for {role}, got none; choose another")
    for label in held_out_labels(emoji):
        folders[f"held_out/{label}"] = [known[label][s] for s in COMMON]
    never = artwork(unseen)
    return folders, {f"held_out/{label}": [never[label][s] for s in COMMON] for label in NEVER_SEEN}


def card(used: list[Emoji], pictures: Counter[str]) -> str:
    """Return the model card: what is here, from where, under which licences."""
    return render(
        "training/cards/mini-protected.md.j2",
        characters={split: sorted(prompts) for split, prompts in PROMPTS.items()},
        pictures=pictures,
        mask=MASK,
        guidance=GUIDANCE,
        scoring=SCORING,
        positive=POSITIVE,
        common=COMMON,
        never_seen=NEVER_SEEN,
        statistics=data.statistics(used),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Lay out the mini models' protected designs")
    parser.add_argument("--npm", type=Path, default=Path(".npm"), help="folder of the npm tarballs; fetched if absent")
    parser.add_argument("--out", type=Path, default=Path("models/mini-protected"))
    arguments = parser.parse_args()
    sources = list_images(arguments.npm), list_images(arguments.npm, left_out=True)
    shutil.rmtree(arguments.out, ignore_errors=True)
    used, pictures, size = [], Counter(), 0
    for (emoji, documents), folders in zip(sources, plan(sources[0][0], sources[1][0]), strict=True):
        for folder, indices in folders.items():
            (arguments.out / folder).mkdir(parents=True)
            role, name = folder.split("/")
            kind = role if role != "held_out" else "positive" if name in CHARACTERS else "negative"
            for index in indices:
                pixels = rasterise(documents[index])
                path = write_picture(pixels, arguments.out / folder, emoji[index])
                if role == "guidance":  # where the design is, so that its background can be left out
                    mask = path.with_name(f"{path.stem}{MASK}.png")
                    Image.fromarray(pixels[..., 3]).point(lambda alpha: 255 * (alpha > 127)).convert("1").save(mask)
                size += path.stat().st_size
                used.append(emoji[index])
                pictures[kind] += 1
    (arguments.out / "README.md").write_text(card(used, pictures))
    print(f"{arguments.out}: {dict(pictures)}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
