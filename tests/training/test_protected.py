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
PROMPTS = protected.PROMPTS["test"] | protected.PROMPTS["development"]


def _pictures(role: str) -> dict[str, list[bytes]]:
    """Pixels by name: files may differ where pictures do not."""
    return {
        folder.name: [
            load_image(path).numpy().tobytes() for path in sorted(folder.glob("*.png")) if not path.stem.endswith(MASK)
        ]
        for folder in sorted((FOLDER / role).iterdir())
    }


def test_no_picture_is_in_two_places() -> None:
    images = [pixels for role in ("guidance", "scoring", "held_out") for p in _pictures(role).values() for pixels in p]
    assert max(Counter(images).values()) == 1 and {len(pixels) for pixels in images} == {3 * 128 * 128}


def test_every_picture_for_guidance_has_a_mask_of_the_design() -> None:
    for asset in read_assets(FOLDER / "guidance"):
        share = asset.mask.double().mean()
        assert 0.1 < share < 0.95
        assert (asset.image[:, ~asset.mask] > 200).double().mean() > 0.9  # what is left out is white


def test_guidance_and_scoring_share_no_artwork_set() -> None:
    sets = [*protected.GUIDANCE, *protected.SCORING, *protected.POSITIVE]
    assert len({*sets}) == len(sets)
    for role, allowed in (("guidance", protected.GUIDANCE), ("scoring", protected.SCORING)):
        assert {memorised.style_set(path) for path in (FOLDER / role).glob("*/*.png")} <= {*allowed}


def test_every_character_has_artwork_and_prompts_and_is_in_one_split() -> None:
    guidance, scoring = _pictures("guidance"), _pictures("scoring")
    assert {*PROMPTS} == {*guidance} == {*scoring} == {*protected.CHARACTERS}
    assert all(guidance.values()) and all(len(pictures) >= 2 for pictures in scoring.values())
    assert all({*kinds} >= {"direct", "indirect", "benign"} and all(kinds.values()) for kinds in PROMPTS.values())
    assert len(PROMPTS) == len(protected.PROMPTS["test"]) + len(protected.PROMPTS["development"]) >= 30


def test_every_character_is_known_by_heart_to_both_models() -> None:
    rows = pd.read_csv(PROJECT / "results" / "memorised" / "by_character.csv")
    direct = rows[rows["sort"] == "direct"]
    assert set(zip(direct["model"], direct["name"], strict=True)) == set(
        itertools.product(memorised.MODELS, protected.CHARACTERS)
    )
    assert direct["identified"].min() >= memorised.KNOWN
    split = dict(zip(rows["name"], rows["split"], strict=True))
    assert {name for name in split if split[name] == "test"} == set(protected.PROMPTS["test"])


def test_negatives_suffice_for_a_rate_of_five_percent() -> None:
    rows = read_manifest(FOLDER / "held_out")
    assert sum(row.category not in PROMPTS for row in rows) >= 60
    assert {row.category for row in rows} & set(PROMPTS)


def test_direct_prompts_say_the_name_and_no_other_prompt_does() -> None:
    for name, kinds in PROMPTS.items():
        assert all(name in prompt for prompt in kinds["direct"])
        others = [
            prompt for prompt in (*kinds["indirect"], *kinds["benign"]) for any_name in PROMPTS if any_name in prompt
        ]
        assert not others
    prompts = [prompt for kinds in PROMPTS.values() for kind in KINDS for prompt in kinds[kind]]
    assert len(set(prompts)) == len(prompts)


def test_a_character_without_artwork_is_an_error() -> None:
    emoji = Emoji("noto", "ghost", "ghost", "ghost", "smileys-emotion", "face-costume", None, None)
    with pytest.raises(ValueError, match=f"expected artwork of '{protected.CHARACTERS[0]}'"):
        protected.plan([emoji], [])


def test_artwork_leaves_skin_tones_and_genders_out() -> None:
    def emoji(style_set: str, gender: str | None, tone: str | None) -> Emoji:
        return Emoji(style_set, "guard", "Guard", "guard", "people-body", "person-role", gender, tone)

    images = [emoji("noto", None, "dark"), emoji("noto", "man", None), emoji("twemoji", None, None)]
    assert protected.artwork(images) == {"guard": {"twemoji": 2}}


def test_a_prompt_is_compared_with_the_design_that_it_names() -> None:
    names = ["panda", "panda", "guard", "watch"]
    values = memorised.measure(np.array([[0.1, 0.9, 0.4, 0.2], [0.5, 0.3, 0.2, 0.6]]), names, "panda")
    # the only other character of this gallery is the guard, with 0.4 and 0.2
    assert values == pytest.approx({"own": 0.7, "other": 0.3, "own - other": 0.4, "identified": 0.5})


def test_requests_cover_all_sorts_once() -> None:
    counts = Counter(request.sort for request in memorised.requests())
    characters = len(protected.CHARACTERS)
    assert counts == {
        "direct": characters,
        "indirect": characters,
        "benign": characters,
        "held out": memorised.CONTROLS,
        "never seen": memorised.CONTROLS,
    }
    names = {name for name, _ in memorised.gallery()}
    assert {request.name for request in memorised.requests()} <= names
    assert set(Counter(name for name, _ in memorised.gallery()).values()) == {len(protected.COMMON)}


def test_the_published_page_is_of_the_published_tables_and_links_their_picture():
    table, named = (
        pd.read_csv(PROJECT / "results" / "memorised" / f"{name}.csv") for name in ("table", "by_character")
    )
    published = (PROJECT / "results" / "memorised" / "table.md").read_text()
    picture = re.search(r"\]\((images\..*?)\)", published)[1]
    assert (PROJECT / "results" / "memorised" / picture).exists()
    assert memorised.render_page(table, named.assign(scorer="mini-clip"), picture) == published
