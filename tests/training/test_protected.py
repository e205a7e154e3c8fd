"""The protected designs of the mini models: what lies where, and the prompts about them."""

import itertools
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from eval.images import load_image, read_manifest
from experiments import PROJECT
from experiments.methods.assets import MASK, read_assets
from experiments.prompts import KINDS
from training import memorised, protected
from training.sources import Emoji

FOLDER = PROJECT / "models" / "mini-protected"
RESULTS = PROJECT / "results" / "memorised"
PROMPTS = protected.PROMPTS["test"] | protected.PROMPTS["development"]


def test_every_picture_lies_in_one_place_and_those_for_guidance_have_a_mask_of_the_design() -> None:
    pixels, folders = Counter(), {}
    for path in FOLDER.glob("*/*/*.png"):
        if not path.stem.endswith(MASK):
            pixels[load_image(path).numpy().tobytes()] += 1  # files may differ where pictures do not
            folders.setdefault(path.parts[-3], Counter())[path.parent.name] += 1
    assert max(pixels.values()) == 1 and {len(content) for content in pixels} == {3 * 128 * 128}
    assert {*folders["guidance"]} == {*folders["scoring"]} == {*PROMPTS} == {*protected.CHARACTERS}
    assert min(folders["scoring"].values()) >= 2
    for asset in read_assets(FOLDER / "guidance"):
        assert 0.1 < asset.mask.double().mean() < 0.95
        assert (asset.image[:, ~asset.mask] > 200).double().mean() > 0.9  # what is left out is white


def test_guidance_and_scoring_share_no_artwork_set() -> None:
    sets = [*protected.GUIDANCE, *protected.SCORING, *protected.POSITIVE]
    assert len({*sets}) == len(sets)
    for role, allowed in (("guidance", protected.GUIDANCE), ("scoring", protected.SCORING)):
        assert {memorised.style_set(path) for path in (FOLDER / role).glob("*/*.png")} <= {*allowed}


def test_every_character_is_known_by_heart_to_both_models() -> None:
    rows = pd.read_csv(RESULTS / "by_character.csv")
    direct = rows[rows["sort"] == "direct"]
    pairs = set(zip(direct["model"], direct["name"], strict=True))
    assert pairs == set(itertools.product(memorised.MODELS, protected.CHARACTERS))
    assert direct["identified"].min() >= memorised.KNOWN
    assert set(rows.loc[rows["split"] == "test", "name"]) == set(protected.PROMPTS["test"])


def test_negatives_suffice_for_a_rate_of_five_percent() -> None:
    rows = read_manifest(FOLDER / "held_out")
    assert sum(row.category not in PROMPTS for row in rows) >= 60
    assert {row.category for row in rows} & set(PROMPTS)


def test_direct_prompts_say_the_name_and_no_other_prompt_does() -> None:
    assert len(PROMPTS) == sum(map(len, protected.PROMPTS.values())) >= 30
    for name, kinds in PROMPTS.items():
        assert kinds["direct"] and all(name in prompt for prompt in kinds["direct"])
        others = " / ".join([*kinds["indirect"], *kinds["benign"]])
        assert kinds["indirect"] and kinds["benign"] and not any(any_name in others for any_name in PROMPTS)
    prompts = [prompt for kinds in PROMPTS.values() for kind in KINDS for prompt in kinds[kind]]
    assert len(set(prompts)) == len(prompts)


def test_artwork_leaves_skin_tones_and_genders_out_and_a_character_needs_some() -> None:
    def emoji(style_set: str, gender: str | None, tone: str | None) -> Emoji:
        return Emoji(style_set, "guard", "Guard", "guard", "people-body", "person-role", gender, tone)

    images = [emoji("noto", None, "dark"), emoji("noto", "man", None), emoji("twemoji", None, None)]
    assert protected.artwork(images) == {"guard": {"twemoji": 2}}
    with pytest.raises(ValueError, match=f"expected artwork of '{protected.CHARACTERS[0]}'"):
        protected.plan(images, [])


def test_a_prompt_is_compared_with_the_design_that_it_names() -> None:
    names = ["panda", "panda", "guard", "watch"]
    values = memorised.measure(np.array([[0.1, 0.9, 0.4, 0.2], [0.5, 0.3, 0.2, 0.6]]), names, "panda")
    # the only other character of this gallery is the guard, with 0.4 and 0.2
    assert values == pytest.approx({"own": 0.7, "other": 0.3, "own - other": 0.4, "identified": 0.5})


def test_requests_cover_all_sorts_once() -> None:
    requests, shown = memorised.requests(), Counter(name for name, _ in memorised.gallery())
    characters, controls = len(protected.CHARACTERS), memorised.CONTROLS
    counts = dict.fromkeys(("direct", "indirect", "benign"), characters)
    assert Counter(request.sort for request in requests) == counts | {"held out": controls, "never seen": controls}
    assert {request.name for request in requests} <= shown.keys()
    assert set(shown.values()) == {len(protected.COMMON)}


def test_the_published_page_is_of_the_published_tables_and_links_their_picture():
    table, named = (pd.read_csv(RESULTS / f"{name}.csv") for name in ("table", "by_character"))
    published = (RESULTS / "table.md").read_text()
    picture = re.search(r"\]\((images\..*?)\)", published)[1]
    assert (RESULTS / picture).exists()
    assert memorised.render_page(table, named.assign(scorer="mini-clip"), picture) == published
