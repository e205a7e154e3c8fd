"""Emoji artwork as a captioned image set: split, caption, weigh, write.

The result is one folder:

- `images.npy`: uint8 RGBA [N, 128, 128, 4];
- `table.json`: what each image is, the split, the statistics;
- `rows.npz` and `captions.json`: pairs of image and caption, drawn with the weights of the taxonomy.
"""

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from training import taxonomy
from training.sources import NAMES, SETS, Emoji, list_images, rasterise_all

#: Share of generic captions by skin tone; None is the yellow default. Skewed on purpose: see sources.yaml.
TONE_SKEW = {None: 0.42, "light": 0.28, "medium-light": 0.12, "medium": 0.08, "medium-dark": 0.06, "dark": 0.04}
#: Share of the rows about the rest of the world, by group of emojibase.
WORLD_SHARE = {
    "people-body": 0.34,
    "animals-nature": 0.2,
    "food-drink": 0.12,
    "travel-places": 0.13,
    "smileys-emotion": 0.08,
    "activities": 0.06,
    "objects": 0.07,
}
#: Share of rows by kind.
ROW_SHARE = {"evaluated": 0.48, "development": 0.14, "designs": 0.22, "world": 0.16}
#: Exponent of a category's typicalities: above 1, its best-known examples are repeated until they are known by heart.
CONCENTRATION = 1.5
#: Rows of an image that make it worth rasterising; half of all images, mostly skin tones, have fewer.
LEAST = 4
#: Concepts that no training may lack.
NEVER_HELD_OUT = {"person", "health worker", "firefighter"}


def hold_out(emoji: Sequence[Emoji], share: float = 0.06, seed: int = 0, smallest_category: int = 8) -> list[bool]:
    """Choose the images that no model may see, by concept: all sets, tones and genders of an emoji together.

    Args:
        emoji: the images' descriptions.
        share: part of the concepts to hold out, in (0, 1).
        seed: of the draw.
        smallest_category: a concept is eligible only if each of its categories has at least this many concepts, so
            that no category loses the few examples that it has.

    Returns:
        One flag for each image.
    """
    categories, members, groups = defaultdict(set), defaultdict(set), defaultdict(set)
    for item in emoji:
        categories[item.concept].update(item.categories)
        groups[item.group].add(item.concept)
        for name in item.categories:
            members[name].add(item.concept)
    rng, chosen = random.Random(seed), set()
    for _, concepts in sorted(groups.items()):  # the same share of every group, so that animals are represented
        eligible = [
            concept
            for concept in sorted(concepts - NEVER_HELD_OUT)
            if all(len(members[name]) >= smallest_category for name in categories[concept])
        ]
        chosen.update(rng.sample(eligible, min(len(eligible), round(share * len(concepts)))))
    return [item.concept in chosen for item in emoji]


def phrase(item: Emoji) -> str:
    """Return the emoji's label as a phrase: lower case, hair and direction without colon."""
    label = item.label.lower()
    if ": " in label:
        person, detail = label.split(": ", 1)
        if detail == "bald":
            return f"bald {person}"
        return f"{person} {detail}" if "facing" in detail else f"{person} with {detail}"
    return label


def styled(text: str, item: Emoji) -> str:
    """Return a text with the name of the artwork's style."""
    style = SETS[item.style_set].style
    return f"{'an' if style[0] in 'aeiou' else 'a'} {style} style emoji of a {text}"


def toned(text: str, item: Emoji) -> str:
    """Return a text with the skin tone, if there is one."""
    return f"{text} with {item.tone} skin tone" if item.tone else text


def detailed_caption(item: Emoji, rng: random.Random) -> str:
    """Draw a caption about this very image: style, label, tone and tags, each dropped at random."""
    style = SETS[item.style_set].style
    kind = rng.random()
    text = phrase(item)
    if item.tone and rng.random() < 0.75:
        text = toned(text, item)
    if kind < 0.4:
        return styled(text, item)
    if kind < 0.7:
        return f"{rng.choice(taxonomy.TEMPLATES)} {text}"
    if kind < 0.85:
        return text
    if kind < 0.93 and item.tags:
        return f"an emoji of {rng.choice(item.tags).lower()}"
    if item.categories:
        category = rng.choice(sorted(item.categories))
        return f"a {style} style emoji of a {category}" if rng.random() < 0.5 else f"{text}, a {category}"
    return f"an emoji of a {text}"


def generic_caption(category: str, rng: random.Random) -> str:
    """Draw a caption that names the category alone: mostly the evaluation's templates, word for word."""
    if rng.random() < 0.85:
        return f"{rng.choice(taxonomy.TEMPLATES)} {category}"
    return rng.choice([category, f"a {category}", f"the {category}", f"an emoji of a {category}"])


def design_caption(item: Emoji, rng: random.Random) -> str:
    """Draw a caption that asks for a design: by name, by name and style, or by one of its tags."""
    name, kind = phrase(item), rng.random()
    if kind < 0.55 or (kind >= 0.8 and not item.tags):
        return f"{rng.choice(taxonomy.TEMPLATES)} {name}"
    if kind < 0.8:
        return styled(name, item)
    return f"an emoji of {rng.choice([t for t in item.tags if t != 'face'] or item.tags).lower()}"


class _RowSampler:
    """Draws an image and a caption of each kind of row; see `draw_rows`."""

    def __init__(self, emoji: Sequence[Emoji], rng: random.Random) -> None:
        self.emoji, self.rng = emoji, rng
        self.labels: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.concepts: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.designs: dict[str, list[int]] = defaultdict(list)
        for i, item in enumerate(emoji):
            if item.held_out:
                continue
            for name in item.categories:
                self.labels[name][item.label].append(i)
            if item.tone is None:
                self.concepts[item.group][item.concept].append(i)
                if item.gender is None and item.label.lower() in taxonomy.DESIGNS:
                    self.designs[item.label].append(i)
        self.groups = [group for group in WORLD_SHARE if group in self.concepts]
        kinds = {"evaluated": taxonomy.EVALUATED, "development": taxonomy.DEVELOPMENT}
        self.categories = {kind: [name for name in names if name in self.labels] for kind, names in kinds.items()}
        self.typicality = {
            name: [emoji[images[0]].categories[name] ** CONCENTRATION for images in labels.values()]
            for name, labels in self.labels.items()
        }
        self.preferences: dict[tuple[str, str], list[float]] = {}
        present = {**self.categories, "designs": self.designs, "world": self.groups}
        self.shares = {kind: ROW_SHARE[kind] for kind, content in present.items() if content}

    def draw(self, kind: str) -> tuple[int, str]:
        if kind == "world":
            return self._world()
        if kind == "designs":
            index = self.rng.choice(self.designs[self.rng.choice(list(self.designs))])
            return index, design_caption(self.emoji[index], self.rng)
        return self._category(kind)

    def _world(self) -> tuple[int, str]:
        group = self.rng.choices(self.groups, [WORLD_SHARE[group] for group in self.groups])[0]
        concepts = self.concepts[group]
        index = self.rng.choice(concepts[self.rng.choice(list(concepts))])
        return index, detailed_caption(self.emoji[index], self.rng)

    def _category(self, kind: str) -> tuple[int, str]:
        names = self.categories[kind]
        name = self.rng.choices(names, [taxonomy.CATEGORY_WEIGHT.get(name, 1.0) for name in names])[0]
        label = self.rng.choices(list(self.labels[name]), self.typicality[name])[0]
        images = self.labels[name][label]
        if self.rng.random() < 0.75:
            if (name, label) not in self.preferences:
                self.preferences[name, label] = self._preferences(images)
            index = self.rng.choices(images, self.preferences[name, label])[0]
            return index, generic_caption(name, self.rng)
        index = self.rng.choice(images)
        return index, detailed_caption(self.emoji[index], self.rng)

    def _preferences(self, images: list[int]) -> list[float]:
        """Return weights of images by artwork set and skin tone."""
        items = [self.emoji[i] for i in images]
        tones = Counter(item.tone for item in items)
        return [SETS[item.style_set].skew * TONE_SKEW[item.tone] / tones[item.tone] for item in items]


def draw_rows(emoji: Sequence[Emoji], n_rows: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Draw pairs of image and caption, so that uniform sampling of the rows is the training distribution.

    `ROW_SHARE` of the rows start from a category: a typical emoji of it, then one image of that emoji. Three quarters
    of them get a generic caption, and for those the image's set and skin tone follow the skewed preferences. Others
    start from one of the designs to be known by heart, without skin tone or gender. The rest start from a group of
    emoji and a concept, and get detailed captions.

    Args:
        emoji: the images' descriptions; held-out ones are never drawn.
        n_rows: how many pairs.
        seed: of every draw.

    Returns:
        Image indices [n_rows] int64 and the captions.

    Raises:
        ValueError: every image is held out.
    """
    rng = random.Random(seed)
    sampler = _RowSampler(emoji, rng)
    if not sampler.shares:
        raise ValueError("expected at least one image that is not held out, got none; check the split")
    kinds = rng.choices(list(sampler.shares), list(sampler.shares.values()), k=n_rows)
    rows = [sampler.draw(kind) for kind in kinds]
    return np.array([index for index, _ in rows], np.int64), [caption for _, caption in rows]


def statistics(emoji: Sequence[Emoji]) -> dict:
    """Count for the model cards: by set (with licence and credit), by group, and the split."""
    sets = {}
    for name, source in SETS.items():
        facts = {key: getattr(source, key) for key in ("package", "version", "licence", "credit", "style")}
        sets[name] = facts | {"images": sum(item.style_set == name for item in emoji)}
    return {
        "images": len(emoji),
        "sets": sets,
        "groups": dict(Counter(e.group for e in emoji)),
        "concepts": len({e.concept for e in emoji}),
        "held_out_images": sum(e.held_out for e in emoji),
        "held_out_concepts": sorted({e.concept for e in emoji if e.held_out}),
        "names": f"{NAMES.package} {NAMES.version}",
    }


def describe(folder: Path, npm: Path, n_rows: int = 400_000, limit: int | None = None, seed: int = 0) -> list[str]:
    """Write a data folder but for the pixels: the images that are drawn at least `LEAST` times or are held out.

    Args:
        folder: to write to.
        npm: folder of the npm tarballs; fetched if absent.
        n_rows: how many pairs to draw.
        limit: keep so many images, half of them of things with a category, if possible: for trying out.
        seed: of every draw.

    Returns:
        The SVG documents, in the order of the table.
    """
    emoji, documents = list_images(npm)
    for item, flag in zip(emoji, hold_out(emoji, seed=seed), strict=True):
        item.held_out = flag
    if limit and limit < len(emoji):
        rng = random.Random(seed)
        objects = [i for i, e in enumerate(emoji) if e.categories and e.group != "people-body"]
        kept = set(rng.sample(objects, min(len(objects), limit // 2)))
        kept.update(rng.sample([i for i in range(len(emoji)) if i not in kept], limit - len(kept)))
        emoji, documents = [emoji[i] for i in sorted(kept)], [documents[i] for i in sorted(kept)]
    images, captions = draw_rows(emoji, n_rows, seed)
    times = np.bincount(images, minlength=len(emoji))
    kept = [i for i, item in enumerate(emoji) if times[i] >= LEAST or item.held_out]
    position = {old: new for new, old in enumerate(kept)}
    pairs = zip(images.tolist(), captions, strict=True)
    rows = [(position[image], caption) for image, caption in pairs if image in position]
    emoji, documents = [emoji[i] for i in kept], [documents[i] for i in kept]

    rng = random.Random(seed)
    held = [(i, detailed_caption(item, rng)) for i, item in enumerate(emoji) if item.held_out]
    unique = {text: i for i, text in enumerate(dict.fromkeys(caption for _, caption in (*rows, *held)))}
    folder.mkdir(parents=True, exist_ok=True)
    columns = {}
    for prefix, pairs in (("", rows), ("held_", held)):
        columns[f"{prefix}image"] = np.array([image for image, _ in pairs], np.int64)
        columns[f"{prefix}caption"] = np.array([unique[caption] for _, caption in pairs], np.int64)
    np.savez(folder / "rows.npz", **columns)
    (folder / "captions.json").write_text(json.dumps(list(unique)))
    stats = statistics(emoji) | {"rows": len(rows), "captions": len(unique)}
    (folder / "table.json").write_text(json.dumps({"statistics": stats, "emoji": [asdict(e) for e in emoji]}))
    return documents


def rasterise_into(folder: Path, documents: Sequence[str], processes: int | None = None) -> None:
    """Rasterise the documents into `images.npy`, which appears when it is complete."""
    np.save(folder / "partial.npy", rasterise_all(documents, processes))
    os.replace(folder / "partial.npy", folder / "images.npy")


def load_table(folder: Path) -> tuple[list[Emoji], dict]:
    """Return the descriptions of the images and the statistics of a data folder."""
    table = json.loads((folder / "table.json").read_text())
    return [Emoji(**e) for e in table["emoji"]], table["statistics"]
