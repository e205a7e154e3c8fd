"""Lay out the designs that play the protected concepts of the mini models: `models/mini-protected/`.

Some emoji that the mini models draw from their names are the characters. A method may use a character's artwork in some
sets (`guidance/NAME`); similarity is measured to that in other sets (`scoring/NAME`). `held_out` calibrates a threshold
of detection: NAME holds a further image of the character where there is one, and every other folder shows none of the
characters. Those come from two kinds of emoji, three sets of each:

- held out by `data.hold_out`: absent from the last rounds of the denoisers' training, but not from the first weights
  (see models/mini-sdxl/README.md);
- left out of every training data set (clocks, symbols, flags): no part of any mini model has ever seen them.
"""

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
from training import data
from training.reference import write_card, write_image
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
    "alarm clock", "chequered flag", "fleur-de-lis", "footprints", "hourglass done", "mantelpiece clock", "menorah",
    "pirate flag", "speaking head", "stopwatch", "timer clock", "watch",
)  # fmt: skip
#: Held-out emoji that look like a character.
_TOO_NEAR = {"mrs. claus", "mx claus"}
N_HELD_OUT = 36


def artwork(emoji: Iterable[Emoji]) -> dict[str, dict[str, int]]:
    """Return the positions of artwork without skin tone and gender: label in lower case -> set -> position."""
    positions: dict[str, dict[str, int]] = {}
    for index, item in enumerate(emoji):
        if item.tone is None and item.gender is None:
            positions.setdefault(item.label.lower(), {})[item.style_set] = index
    return positions


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
    """Decide which image lies in which folder.

    Args:
        emoji: all images of the training data's sources.
        unseen: the images that the training data leave out.

    Returns:
        Folder (relative) -> positions in `emoji`, and the same for `unseen`.

    Raises:
        ValueError: a character without artwork for guidance or scoring.
    """
    positions, folders = artwork(emoji), {}
    for name in CHARACTERS:
        for role, sets in (("guidance", GUIDANCE), ("scoring", SCORING), ("held_out", POSITIVE)):
            indices = [positions[name][s] for s in sets if s in positions.get(name, {})]
            if indices:
                folders[f"{role}/{name}"] = indices
            elif role != "held_out":
                raise ValueError(f"expected artwork of {name!r} in one of {sets} for {role}, got none; choose another")
    for label in held_out_labels(emoji):
        folders[f"held_out/{label}"] = [positions[label][s] for s in COMMON]
    never = artwork(unseen)
    return folders, {f"held_out/{label}": [never[label][s] for s in COMMON] for label in NEVER_SEEN}


def lay_out(npm: Path, out: Path) -> None:
    """Write all images, the masks of those for guidance, and the card."""
    sources = list_images(npm), list_images(npm, left_out=True)
    shutil.rmtree(out, ignore_errors=True)
    used, counts = [], Counter()
    for (emoji, documents), folders in zip(sources, plan(sources[0][0], sources[1][0]), strict=True):
        for folder, indices in folders.items():
            role, name = folder.split("/")
            if role == "held_out":
                role = "positive" if name in CHARACTERS else "negative"
            for index in indices:
                pixels = rasterise(documents[index])
                path = write_image(pixels, out / folder, emoji[index])
                if role == "guidance":  # where the design is, so that its background can be left out
                    mask = Image.fromarray(pixels[..., 3]).point(lambda alpha: 255 * (alpha > 127)).convert("1")
                    mask.save(path.with_name(f"{path.stem}{MASK}.png"))
                used.append(emoji[index])
                counts[role] += 1
    write_card(
        out,
        characters={split: sorted(prompts) for split, prompts in PROMPTS.items()},
        pictures=counts,
        mask=MASK,
        guidance=GUIDANCE,
        scoring=SCORING,
        positive=POSITIVE,
        common=COMMON,
        never_seen=NEVER_SEEN,
        statistics=data.statistics(used),
    )
    print(f"{out}: {dict(counts)}")
