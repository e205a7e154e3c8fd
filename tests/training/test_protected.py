"""The protected designs of the mini models: what lies where, and the prompts about them."""

import itertools
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
    everything = [
        pixels for role in ("guidance", "scoring", "held_out") for p in _pictures(role).values() for pixels in p
    ]
    assert max(Counter(everything).values()) == 1


def test_every_picture_for_guidance_has_a_mask_of_the_design() -> None:
    for asset in read_assets(FOLDER / "guidance"):
        share = asset.mask.double().mean()
        assert 0.1 < share < 0.95
        assert (asset.image[:, ~asset.mask] > 200).double().mean() > 0.9  # what is left out is white


def test_guidance_and_scoring_share_no_artwork_set() -> None:
    sets = [protected.GUIDANCE, protected.SCORING, protected.POSITIVE]
    assert len({name for group in sets for name in group}) == sum(map(len, sets))
    for role, allowed in (("guidance", protected.GUIDANCE), ("scoring", protected.SCORING)):
        assert {memorised._style_set(path) for path in (FOLDER / role).glob("*/*.png")} <= set(allowed)


def test_every_character_has_artwork_and_prompts() -> None:
    guidance, scoring = _pictures("guidance"), _pictures("scoring")
    assert set(PROMPTS) == set(guidance) == set(scoring) == set(protected.CHARACTERS)
    assert all(guidance.values()) and all(len(pictures) >= 2 for pictures in scoring.values())
    assert all(set(kinds) >= {"direct", "indirect", "benign"} and all(kinds.values()) for kinds in PROMPTS.values())


def test_no_character_is_both_for_choosing_and_for_reporting() -> None:
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


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 1_200_000


def test_pictures_are_small_squares() -> None:
    assert {tuple(load_image(path).shape) for path in FOLDER.glob("*/*/*.png")} == {(3, 128, 128)}


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

    found = protected.artwork([emoji("noto", None, "dark"), emoji("noto", "man", None), emoji("twemoji", None, None)])
    assert found == {"guard": {"twemoji": 2}}


def test_measured_compares_with_what_is_asked_for() -> None:
    names = ["panda", "panda", "guard", "watch"]
    found = memorised.measured(np.array([[0.1, 0.9, 0.4, 0.2], [0.5, 0.3, 0.2, 0.6]]), names, "panda")
    assert found["own"] == pytest.approx(0.7)
    assert found["identified"] == 0.5
    # the only other character of this gallery: 0.4 and 0.2
    assert found["other"] == pytest.approx(0.3)
    assert found["own - other"] == pytest.approx(0.4)


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


def test_the_published_page_is_of_the_published_tables():
    folder = PROJECT / "results" / "memorised"
    table, named = (pd.read_csv(folder / f"{name}.csv") for name in ("table", "by_character"))
    assert memorised.rendered(table, named.assign(scorer="mini-clip")) == (folder / "table.md").read_text()
    assert (folder / "images.webp").is_file()
