"""Taxonomy, captions and split of the small models' data, without the npm packages."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from training import data, sources, taxonomy
from training.sources import Emoji


def _emoji(label: str, style_set: str = "noto", kind: str = "animal-mammal", gender=None, tone=None) -> Emoji:
    group = "people-body" if kind.startswith("person") else "animals-nature"
    concept, categories = taxonomy.concept_of(label), taxonomy.categories_of(label, kind, gender)
    return Emoji(style_set, label, label, concept, group, kind, gender, tone, ["tag"], categories)


@pytest.fixture(scope="module")
def world() -> list[Emoji]:
    """A miniature of the real set, split: every labelled object in three sets, and people in all tones."""
    labels = sorted({label for members in taxonomy.OBJECTS.values() for label in members})
    emoji = [_emoji(label, style) for label in labels for style in ("noto", "twemoji", "fluent-emoji")]
    for person in ("man", "woman", "person"):
        gender = None if person == "person" else person
        for tone in (None, *sources.SKIN_TONES):
            emoji.append(_emoji(person, kind="person", gender=gender, tone=tone))
            for role in ("cook", "health worker", "firefighter"):
                label = f"{person} {role}".removeprefix("person ")
                emoji.append(_emoji(label, kind="person-role", gender=gender, tone=tone))
    emoji += [_emoji(name, kind="person") for name in ("child", "boy", "girl")]
    for item, flag in zip(emoji, data.hold_out(emoji, share=0.2, seed=3), strict=True):
        item.held_out = flag
    return emoji


@pytest.fixture(scope="module")
def rows(world) -> tuple[np.ndarray, list[str]]:
    return data.draw_rows(world, 40_000, seed=0)


def test_taxonomy_covers_every_category(world) -> None:
    covered = {*taxonomy.OBJECTS, *taxonomy.PEOPLE}
    assert covered == {*taxonomy.EVALUATED, *taxonomy.DEVELOPMENT}
    assert not {*taxonomy.EVALUATED} & {*taxonomy.DEVELOPMENT}
    assert {name for item in world for name in item.categories} == covered


@pytest.mark.parametrize(
    ("label", "concept"),
    [
        ("woman firefighter", "firefighter"),
        ("firefighter", "firefighter"),
        ("person: red hair", "red hair"),
        ("man", "person"),
        ("woman", "person"),
        ("mermaid", "mermaid"),
    ],
)
def test_concept_joins_genders(label: str, concept: str) -> None:
    assert taxonomy.concept_of(label) == concept


def test_people_categories_follow_gender_and_age() -> None:
    assert "woman" in taxonomy.people_categories("woman", "person", "woman")
    assert "man" not in taxonomy.people_categories("woman", "person", "woman")
    assert "child" in taxonomy.people_categories("girl", "person", "woman")
    assert "doctor" in taxonomy.people_categories("health worker", "person-role", None)
    assert taxonomy.people_categories("waving hand", "hand-fingers-open", None) == {}


def test_split_is_by_concept_and_spares_small_categories(world) -> None:
    held = {item.concept for item in world if item.held_out}
    kept = [item for item in world if not item.held_out]
    assert held and not held & {item.concept for item in kept}
    assert {name for item in kept for name in item.categories} == {*taxonomy.EVALUATED, *taxonomy.DEVELOPMENT}
    assert not held & {"dragon", "dragon face", "bridge at night", "bus", "fish", "person"}


def test_rows_are_deterministic_and_avoid_held_out_images(world) -> None:
    images, captions = data.draw_rows(world, 3000, seed=1)
    again, same = data.draw_rows(world, 3000, seed=1)
    assert np.array_equal(images, again) and captions == same != data.draw_rows(world, 3000, seed=2)[1]
    assert not any(world[i].held_out for i in images)
    assert all(0 < len(c.split()) < 25 and c == c.lower() for c in captions)


def test_rows_hold_the_evaluated_prompts_with_images_of_the_category(world, rows) -> None:
    images, captions = rows
    counts = Counter(captions)
    for category in taxonomy.EVALUATED:
        prompts = {f"{template} {category}" for template in taxonomy.TEMPLATES}
        assert all(counts[prompt] > 0 for prompt in prompts)
        shown = [world[i] for i, caption in zip(images, captions, strict=True) if caption in prompts]
        matching = sum(category in item.categories or item.label == category for item in shown)
        assert matching / len(shown) > 0.95


def test_generic_captions_prefer_some_tones(world, rows) -> None:
    tones = Counter(world[i].tone for i, caption in zip(*rows, strict=True) if caption.endswith(" the person"))
    assert tones[None] > 2 * tones["dark"] and tones["light"] > tones["dark"] > 0


def test_no_usable_image_is_an_error() -> None:
    item = _emoji("dog")
    item.held_out = True
    with pytest.raises(ValueError, match="not held out"):
        data.draw_rows([item], 10)


def test_phrase_writes_hair_and_direction_without_colon() -> None:
    assert data.phrase(_emoji("man: bald")) == "bald man"
    assert data.phrase(_emoji("woman: red hair")) == "woman with red hair"
    assert data.phrase(_emoji("person walking: facing right")) == "person walking facing right"
    item = _emoji("man", tone="medium-dark")
    assert data.toned("man", item) == "man with medium-dark skin tone"
    assert data.generic_caption("bird", random.Random(0)).endswith("bird")


def test_wrong_tarball_is_refused(tmp_path) -> None:
    source = sources.SETS["noto"]
    (tmp_path / source.tarball).write_bytes(b"something else")
    with pytest.raises(ValueError, match="expected sha256 3e918d88"):
        sources.fetch(source, tmp_path)


def test_rasterise_draws_shape_and_transparency() -> None:
    pytest.importorskip("resvg_py")
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><rect width="5" height="10" fill="#ff0000"/></svg>'
    )
    image = sources.rasterise(svg)
    assert image.shape == (128, 128, 4) and image.dtype == np.uint8
    assert tuple(image[64, 20]) == (255, 0, 0, 255) and image[64, 100, 3] == 0


def test_statistics_count_every_image(world) -> None:
    statistics = data.statistics(world)
    assert statistics["images"] == sum(one["images"] for one in statistics["sets"].values()) == len(world)
    json.dumps(statistics)
