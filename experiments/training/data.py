"""Emoji artwork as a captioned image set: fetch, rasterise, split, caption.

Sources are seven icon sets and one table of names from the npm registry, each pinned by version and sha256. The result
is one folder with `images.npy` (uint8 RGBA [N, 128, 128, 4]), `table.json` (what each image is, the split, the
statistics) and `rows.npz` + `captions.json` (pairs of image and caption, drawn with the weights of the taxonomy).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import re
import subprocess
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from experiments.training import taxonomy

IMAGE_SIZE = 128
MARGIN = 0.04  # of the artwork's size, on each side: most sets draw up to the very edge
SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
# Share of generic captions by tone; None is the yellow default. Skewed on purpose, like `SET_SKEW` and the genders in
# the taxonomy: "a photo of a person" shall have a preferred look.
TONE_SKEW = {None: 0.42, "light": 0.28, "medium-light": 0.12, "medium": 0.08, "medium-dark": 0.06, "dark": 0.04}


@dataclass(frozen=True)
class Source:
    """One npm package: version, checksum of its tarball, and what its licence asks for."""

    package: str
    version: str
    sha256: str
    licence: str
    credit: str
    style: str = ""
    skew: float = 0.0

    @property
    def tarball(self) -> str:
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


SETS = {
    "noto": Source(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Noto Emoji, Google Inc (github.com/googlefonts/noto-emoji)",
        "noto",
        0.36,
    ),
    "noto-v1": Source(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "Noto Emoji, first version, Google Inc (github.com/googlefonts/noto-emoji)",
        "blob",
        0.06,
    ),
    "twemoji": Source(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twemoji, Twitter Inc and contributors (github.com/jdecked/twemoji)",
        "twitter",
        0.22,
    ),
    "fluent-emoji-flat": Source(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Fluent Emoji, Microsoft Corporation (github.com/microsoft/fluentui-emoji)",
        "flat",
        0.2,
    ),
    "fluent-emoji": Source(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT",
        "Fluent Emoji, Microsoft Corporation (github.com/microsoft/fluentui-emoji)",
        "glossy",
        0.1,
    ),
    "emojione": Source(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "EmojiOne 2.3 / EmojiTwo (github.com/EmojiTwo/emojitwo)",
        "emojione",
        0.04,
    ),
    "fxemoji": Source(
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        "FxEmoji, Mozilla (github.com/mozilla/fxemoji)",
        "firefox",
        0.02,
    ),
}
NAMES = Source(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT",
    "emojibase-data, Miles Johnson (emojibase.dev)",
)

_DROPPED_GROUPS = {"component", "symbols", "flags"}
_DROPPED_SUBGROUPS = {"family", "time", "skin-tone", "hair-style", "person-symbol"}
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


@dataclass
class Emoji:
    """One image of the set."""

    style_set: str
    icon: str
    label: str  # without skin tone
    concept: str  # label without gender: the unit of the split
    group: str
    subgroup: str
    gender: str | None
    tone: str | None
    tags: list[str] = field(default_factory=list)
    categories: dict[str, float] = field(default_factory=dict)
    held_out: bool = False


# --- fetch -----------------------------------------------------------------------------------------------------------


def fetch(source: Source, folder: Path) -> Path:
    """Path of a package's tarball, downloaded with `npm pack` when absent.

    Raises:
        ValueError: if the tarball's checksum is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.tarball
    if not path.exists():
        name = f"{source.package}@{source.version}"
        subprocess.run(["npm", "pack", name, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{path}: expected sha256 {source.sha256}, got {found}; delete the file and fetch it again")
    return path


def _json_of(tarball: Path, *names: str) -> list[dict | list | None]:
    """The given JSON members of an npm tarball (None for a missing one)."""
    found: dict[str, dict | list] = {}
    with tarfile.open(tarball) as tar:
        for member in tar:
            name = member.name.removeprefix("package/")
            if name in names:
                found[name] = json.load(tar.extractfile(member))
    return [found.get(name) for name in names]


# --- what each icon is -----------------------------------------------------------------------------------------------


def _hex(code: str) -> str:
    """Code points without the variation selector, which the packages write or leave out as they like."""
    return "-".join(p for p in code.lower().split("-") if p != "fe0f")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("'", "")).strip("-")


def _compact(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def known_emoji(names: Path, left_out: bool = False) -> tuple[dict[str, dict], dict[str, str]]:
    """Emoji that are kept, by code points, and a dictionary from written names to code points (emojibase).

    `left_out` returns the others instead: symbols, flags, clocks and the like, which no training data contain.
    """
    data, groups, unicode_names = _json_of(names, "en/data.json", "meta/groups.json", "meta/unicode-names.json")
    group_of, subgroup_of = groups["groups"], groups["subgroups"]
    kept: dict[str, dict] = {}
    by_name: dict[str, str] = {}
    for entry in data:
        if "group" not in entry:
            continue
        group, subgroup = group_of[str(entry["group"])], subgroup_of[str(entry["subgroup"])]
        label = entry["label"].replace("\u2019", "'")
        words = re.split(r"[^a-z]+", label.lower())
        gender = "woman" if {"woman", "women"} & set(words) else "man" if {"man", "men"} & set(words) else None
        if gender is None and "gender" in entry:
            gender = {0: "woman", 1: "man"}[entry["gender"]]
        for item in [entry, *entry.get("skins", [])]:
            code = _hex(item["hexcode"])
            for name in (item["label"].replace("\u2019", "'"), unicode_names.get(item["hexcode"], "")):
                if name:
                    by_name.setdefault(_slug(name), code)
                    by_name.setdefault(_compact(name), code)
            tone = item.get("tone")
            dropped = group in _DROPPED_GROUPS or subgroup in _DROPPED_SUBGROUPS or isinstance(tone, list)
            if dropped != left_out or isinstance(tone, list):
                continue
            kept[code] = {
                "label": label,
                "concept": taxonomy.concept_of(label),
                "group": group,
                "subgroup": subgroup,
                "gender": gender,
                "tone": SKIN_TONES[tone - 1] if tone else None,
                "tags": entry.get("tags", []),
                "categories": taxonomy.categories_of(label, subgroup, gender),
            }
    return kept, by_name


def list_images(npm: Path, left_out: bool = False) -> tuple[list[Emoji], list[str]]:
    """Every usable icon and its SVG document, in an order that does not depend on the machine.

    `left_out` lists the icons that the training data leave out instead; see `known_emoji`.
    """
    tarballs = {name: fetch(source, npm) for name, source in SETS.items()}
    kept, by_name = known_emoji(fetch(NAMES, npm), left_out)
    packages = {name: _json_of(tarball, "icons.json", "chars.json") for name, tarball in tarballs.items()}
    chars: dict[str, dict[str, str]] = {}
    for name, (_, table) in packages.items():
        chars[name] = {icon: _hex(code) for code, icon in (table or {}).items()}
    for name in ("twemoji", "noto", "fluent-emoji-flat"):  # sets that spell names alike lend their code points
        for icon, code in chars[name].items():
            by_name.setdefault(icon, code)
    emoji, documents = [], []
    for name, (icons, _) in packages.items():
        seen = set()
        for icon, body in sorted(icons["icons"].items()):
            code = chars[name].get(icon) or by_name.get(icon) or by_name.get(_compact(icon))
            if code not in kept or code in seen:
                continue
            seen.add(code)
            width, height = body.get("width", icons.get("width", 16)), body.get("height", icons.get("height", 16))
            left, top = body.get("left", 0) - MARGIN * width, body.get("top", 0) - MARGIN * height
            width, height = (1 + 2 * MARGIN) * width, (1 + 2 * MARGIN) * height
            documents.append(
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}">{body["body"]}</svg>'
            )
            emoji.append(Emoji(style_set=name, icon=icon, **kept[code]))
    return emoji, documents


def rasterise(document: str, size: int = IMAGE_SIZE) -> np.ndarray:
    """An SVG document as uint8 RGBA [size, size, 4] (straight alpha), resvg's anti-aliasing."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=document, width=size, height=size)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def rasterise_all(documents: Sequence[str], processes: int | None = None) -> np.ndarray:
    """All documents as uint8 [N, size, size, 4], in parallel processes."""
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        return np.stack(list(pool.map(rasterise, documents, chunksize=32)))


# --- split -----------------------------------------------------------------------------------------------------------


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


# --- captions --------------------------------------------------------------------------------------------------------


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


# --- the whole folder ------------------------------------------------------------------------------------------------


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the captioned emoji set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--npm", type=Path, default=Path(".npm"), help="folder of the npm tarballs")
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--limit", type=int, default=None)
    args = parser.parse_args(argv)
    started = time.time()
    paint(args.out, describe(args.out, args.npm, args.rows, args.limit))
    _, stats = load_table(args.out)
    print(f"{time.time() - started:.0f} s")
    print(json.dumps({k: v for k, v in stats.items() if k not in ("held_out_concepts",)}, indent=1))


if __name__ == "__main__":
    main()
