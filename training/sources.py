"""Emoji artwork from the npm packages of sources.yaml: fetched, told apart by emojibase's names, rasterised."""

import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from eval.files import content_hash
from training import taxonomy

IMAGE_SIZE = 128
MARGIN = 0.04  # of the artwork's size, on each side: most sets draw up to the very edge
SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


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


_DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
SETS = {name: Source(**row) for name, row in _DATA["sets"].items()}
NAMES = Source(**_DATA["names"])

_DROPPED_GROUPS = {"component", "symbols", "flags"}
_DROPPED_SUBGROUPS = {"family", "time", "skin-tone", "hair-style", "person-symbol"}


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


def fetch(source: Source, folder: Path) -> Path:
    """Return the path of a package's tarball, downloaded with `npm pack` where it is absent.

    Raises:
        ValueError: if the tarball's checksum is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.tarball
    if not path.exists():
        name = f"{source.package}@{source.version}"
        subprocess.run(["npm", "pack", name, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    digest = content_hash(path)
    if digest != source.sha256:
        raise ValueError(f"{path}: expected sha256 {source.sha256}, got {digest}; delete the file and fetch it again")
    return path


def _json_of(tarball: Path, *names: str) -> list[dict | list | None]:
    """Return JSON members of an npm tarball (None for a missing one)."""
    members: dict[str, dict | list] = {}
    with tarfile.open(tarball) as tar:
        for member in tar:
            name = member.name.removeprefix("package/")
            if name in names:
                members[name] = json.load(tar.extractfile(member))
    return [members.get(name) for name in names]


def _hex(code: str) -> str:
    """Return code points without the variation selector, which only some packages write."""
    return "-".join(p for p in code.lower().split("-") if p != "fe0f")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("'", "")).strip("-")


def _compact(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def known_emoji(names: Path, left_out: bool = False) -> tuple[dict[str, dict], dict[str, str]]:
    """Return the emoji that are kept, by code points, and the code points of written names (emojibase).

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
        gender = {0: "woman", 1: "man"}.get(entry.get("gender"))
        for name, forms in (("man", {"man", "men"}), ("woman", {"woman", "women"})):
            gender = name if forms & {*words} else gender
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
    """Return every usable icon and its SVG document, in an order that does not depend on the machine.

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
    """Rasterise an SVG document to uint8 RGBA [size, size, 4] (straight alpha)."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=document, width=size, height=size)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def rasterise_all(documents: Sequence[str], processes: int | None = None) -> np.ndarray:
    """Rasterise all documents to uint8 [N, size, size, 4], in parallel processes."""
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        return np.stack(list(pool.map(rasterise, documents, chunksize=32)))
