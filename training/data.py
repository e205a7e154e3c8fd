"""Emoji artwork as a captioned image set: split, caption, weigh, write.

The result is one folder with `images.npy` (uint8 RGBA [N, 128, 128, 4]), `table.json` (what each image is, the split,
the statistics) and `rows.npz` + `captions.json` (pairs of image and caption, drawn with the weights of the taxonomy).
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

# Share of generic captions by skin tone; None is the yellow default. Skewed on purpose: see sources.yaml.
TONE_SKEW = {None: 0.42, "light": 0.28, "medium-light": 0.12, "medium": 0.08, "medium-dark": 0.06, "dark": 0.04}
# Share of the rows about the rest of the world, by group of emojibase.
WORLD_SHARE = {
    "people-body": 0.34,
    "animals-nature": 0.2,
    "food-drink": 0.12,
    "travel-places": 0.13,
    "smileys-emotion": 0.08,
    "activities": 0.06,
    "objects": 0.07,
}
ROW_SHARE = {"evaluated": 0.48, "development": 0.14, "designs": 0.22, "world": 0.16}
# Exponent of a category's typicalities: above 1, its best-known examples are repeated until they are known by heart.
CONCENTRATION = 1.5


LEAST = 4  # rows of an image, for it to be worth rasterising; half of all images, mostly skin tones, have fewer


def hold_out(emoji: Sequence[Emoji], share: float = 0.06, seed: int = 0, smallest_category: int = 8) -> list[bool]:
    """Which images no model may see: whole concepts, that is all sets, tones and genders of an emoji together.

    Args:
        emoji: the images' descriptions.
        share: part of the concepts to hold out, in (0, 1).
        seed: of the draw.
        smallest_category: a concept is eligible only if each of its categories has at least this many concepts, so
            that no category loses the few examples that it has.

    Returns:
        One flag for each image.
    """
    members = defaultdict(set)
    categories = defaultdict(set)
    for item in emoji:
        categories[item.concept].update(item.categories)
        for name in item.categories:
            members[name].add(item.concept)
    protected = {"person", "health worker", "firefighter"}
    group_of = {item.concept: item.group for item in emoji}
    rng = random.Random(seed)
    chosen: set[str] = set()
    for group in sorted(set(group_of.values())):  # the same share of every group, so that animals are represented
        concepts = [c for c in sorted(categories) if group_of[c] == group]
        eligible = [
            c
            for c in concepts
            if c not in protected and all(len(members[n]) >= smallest_category for n in categories[c])
        ]
        chosen.update(rng.sample(eligible, min(len(eligible), round(share * len(concepts)))))
    return [item.concept in chosen for item in emoji]


def phrase(item: Emoji) -> str:
    """The emoji's label as a phrase: lower case, hair and direction without colon."""
    label = item.label.lower()
    if ": " in label:
        head, tail = label.split(": ", 1)
        label = f"bald {head}" if tail == "bald" else f"{head} {tail}" if "facing" in tail else f"{head} with {tail}"
    return label


def toned(text: str, item: Emoji) -> str:
    return f"{text} with {item.tone} skin tone" if item.tone else text


def detailed_caption(item: Emoji, rng: random.Random) -> str:
    """A caption about this very image: style, label, tone and tags, each dropped at random."""
    style = SETS[item.style_set].style
    kind = rng.random()
    text = phrase(item)
    if item.tone and rng.random() < 0.75:
        text = toned(text, item)
    if kind < 0.4:
        article = "an" if style[0] in "aeiou" else "a"
        return f"{article} {style} style emoji of a {text}"
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
    """A caption that names the category alone: mostly the evaluation's templates, word for word."""
    if rng.random() < 0.85:
        return f"{rng.choice(taxonomy.TEMPLATES)} {category}"
    return rng.choice([category, f"a {category}", f"the {category}", f"an emoji of a {category}"])


def design_caption(item: Emoji, rng: random.Random) -> str:
    """A caption that asks for a design: by name, by name and style, or by one of its tags."""
    name, style, kind = phrase(item), SETS[item.style_set].style, rng.random()
    if kind < 0.55 or (kind >= 0.8 and not item.tags):
        return f"{rng.choice(taxonomy.TEMPLATES)} {name}"
    if kind < 0.8:
        return f"{'an' if style[0] in 'aeiou' else 'a'} {style} style emoji of a {name}"
    return f"an emoji of {rng.choice([t for t in item.tags if t != 'face'] or item.tags).lower()}"


def draw_rows(emoji: Sequence[Emoji], n_rows: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Pairs of image and caption, drawn so that uniform sampling of the rows is the training distribution.

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
    """
    rng = random.Random(seed)
    usable = [i for i, item in enumerate(emoji) if not item.held_out]
    by_category: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    world: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i in usable:
        for name in emoji[i].categories:
            by_category[name][emoji[i].label].append(i)
        if emoji[i].tone is None:
            world[emoji[i].group][emoji[i].concept].append(i)

    def skewed(images: list[int]) -> list[float]:
        tones = Counter(emoji[i].tone for i in images)
        return [SETS[emoji[i].style_set].skew * TONE_SKEW[emoji[i].tone] / tones[emoji[i].tone] for i in images]

    kinds = {"evaluated": taxonomy.EVALUATED, "development": taxonomy.DEVELOPMENT}
    names = {k: [n for n in v if n in by_category] for k, v in kinds.items()}
    weights = {k: [taxonomy.CATEGORY_WEIGHT.get(n, 1.0) for n in v] for k, v in names.items()}
    labels = {n: list(v) for n, v in by_category.items()}
    typical = {
        n: [emoji[v[label][0]].categories[n] ** CONCENTRATION for label in labels[n]] for n, v in by_category.items()
    }
    skew_of: dict[tuple[str, str], list[float]] = {}
    groups = [g for g in WORLD_SHARE if g in world]
    group_weight = [WORLD_SHARE[g] for g in groups]
    concepts = {g: list(world[g]) for g in groups}

    designs: dict[str, list[int]] = defaultdict(list)
    for i in usable:
        if emoji[i].label.lower() in taxonomy.DESIGNS and emoji[i].tone is None and emoji[i].gender is None:
            designs[emoji[i].label].append(i)

    shares = {k: ROW_SHARE[k] for k in kinds if names[k]}
    shares |= {k: ROW_SHARE[k] for k, present in (("designs", designs), ("world", groups)) if present}
    if not shares:
        raise ValueError("expected at least one image that is not held out, got none; check the split")
    images, captions = np.empty(n_rows, np.int64), []
    for row, kind in enumerate(rng.choices(list(shares), list(shares.values()), k=n_rows)):
        if kind == "world":
            group = rng.choices(groups, group_weight)[0]
            index = rng.choice(world[group][rng.choice(concepts[group])])
            caption = detailed_caption(emoji[index], rng)
        elif kind == "designs":
            index = rng.choice(designs[rng.choice(list(designs))])
            caption = design_caption(emoji[index], rng)
        else:
            name = rng.choices(names[kind], weights[kind])[0]
            label = rng.choices(labels[name], typical[name])[0]
            pool = by_category[name][label]
            if rng.random() < 0.75:
                if (name, label) not in skew_of:
                    skew_of[name, label] = skewed(pool)
                index = rng.choices(pool, skew_of[name, label])[0]
                caption = generic_caption(name, rng)
            else:
                index = rng.choice(pool)
                caption = detailed_caption(emoji[index], rng)
        images[row] = index
        captions.append(caption)
    return images, captions


def statistics(emoji: Sequence[Emoji]) -> dict:
    """Counts for the model cards: by set (with licence and credit), by group, and the split."""
    sets = {
        name: {
            "package": s.package,
            "version": s.version,
            "licence": s.licence,
            "credit": s.credit,
            "style": s.style,
            "images": sum(e.style_set == name for e in emoji),
        }
        for name, s in SETS.items()
    }
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
    """Write everything but the pixels, of the images that are drawn at least `LEAST` times or are held out.

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
    place = {old: new for new, old in enumerate(kept)}
    rows = [(place[image], caption) for image, caption in zip(images.tolist(), captions, strict=True) if image in place]
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


def paint(folder: Path, documents: Sequence[str], processes: int | None = None) -> None:
    """Rasterise the documents into `images.npy`, which appears when it is complete."""
    np.save(folder / "partial.npy", rasterise_all(documents, processes))
    os.replace(folder / "partial.npy", folder / "images.npy")


def load_table(folder: Path) -> tuple[list[Emoji], dict]:
    """Descriptions of the images and the statistics of a data folder."""
    table = json.loads((folder / "table.json").read_text())
    return [Emoji(**e) for e in table["emoji"]], table["statistics"]
