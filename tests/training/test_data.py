"""Taxonomy, captions and split of the small models' data, without the npm packages."""

import json
from collections import Counter

import numpy as np
import pytest

from training import data, sources, taxonomy
from training.sources import Emoji

CATEGORIES = {*taxonomy.EVALUATED, *taxonomy.DEVELOPMENT}


def make_emoji(label: str, style_set: str = "noto", kind: str = "animal-mammal", gender=None, tone=None) -> Emoji:
    group = "people-body" if kind.startswith("person") else "animals-nature"
    concept, categories = taxonomy.concept_of(label), taxonomy.categories_of(label, kind, gender)
    return Emoji(style_set, label, label, concept, group, kind, gender, tone, ["tag"], categories)


@pytest.fixture(scope="module")
def world() -> list[Emoji]:
    """A miniature of the real set, split: every labelled object in three sets, and people in all tones."""
    labels = sorted({label for members in taxonomy.OBJECTS.values() for label in members})
    emoji = [make_emoji(label, style) for label in labels for style in ("noto", "twemoji", "fluent-emoji")]
    for person in ("man", "woman", "person"):
        gender = None if person == "person" else person
        for tone in (None, *sources.SKIN_TONES):
            emoji.append(make_emoji(person, kind="person", gender=gender, tone=tone))
            for role in ("cook", "health worker", "firefighter"):
                label = f"{person} {role}".removeprefix("person ")
                emoji.append(make_emoji(label, kind="person-role", gender=gender, tone=tone))
    emoji += [make_emoji(name, kind="person") for name in ("child", "boy", "girl")]
    for item, flag in zip(emoji, data.hold_out(emoji, share=0.2, seed=3), strict=True):
        item.held_out = flag
    return emoji


def test_concepts_join_genders_and_categories_follow_gender_and_age(world) -> None:
    concepts = {"woman firefighter": "firefighter", "firefighter": "firefighter", "person: red hair": "red hair",
                "man": "person", "woman": "person", "mermaid": "mermaid"}  # fmt: skip
    assert {label: taxonomy.concept_of(label) for label in concepts} == concepts
    woman = taxonomy.people_categories("woman", "person", "woman")
    assert "woman" in woman and "man" not in woman
    assert "child" in taxonomy.people_categories("girl", "person", "woman")
    assert "doctor" in taxonomy.people_categories("health worker", "person-role", None)
    assert taxonomy.people_categories("waving hand", "hand-fingers-open", None) == {}
    assert {*taxonomy.OBJECTS, *taxonomy.PEOPLE} == CATEGORIES == {name for item in world for name in item.categories}
    assert not {*taxonomy.EVALUATED} & {*taxonomy.DEVELOPMENT}


def test_split_is_by_concept_and_spares_small_categories(world) -> None:
    held_out = {item.concept for item in world if item.held_out}
    kept = [item for item in world if not item.held_out]
    assert held_out and not held_out & {item.concept for item in kept}
    assert {name for item in kept for name in item.categories} == CATEGORIES
    assert not held_out & {"dragon", "dragon face", "bridge at night", "bus", "fish", "person"}


def test_rows_are_deterministic_and_follow_split_prompts_and_tones(world) -> None:
    images, captions = data.draw_rows(world, 40_000, seed=0)
    for seed in (0, 1):
        first = data.draw_rows(world, 500, seed)
        assert np.array_equal(first[0], data.draw_rows(world, 500, seed)[0])
        assert first[1] == data.draw_rows(world, 500, seed)[1] != data.draw_rows(world, 500, 2)[1]
    assert not any(world[i].held_out for i in images)
    assert all(0 < len(caption.split()) < 25 and caption == caption.lower() for caption in captions)
    counts = Counter(captions)
    for category in taxonomy.EVALUATED:
        prompts = {f"{template} {category}" for template in taxonomy.TEMPLATES}
        assert all(counts[prompt] > 0 for prompt in prompts)
        shown = [world[i] for i, caption in zip(images, captions, strict=True) if caption in prompts]
        matching = sum(category in item.categories or item.label == category for item in shown)
        assert matching / len(shown) > 0.95
    tones = Counter(
        world[i].tone for i, caption in zip(images, captions, strict=True) if caption.endswith(" the person")
    )
    assert tones[None] > 2 * tones["dark"] and tones["light"] > tones["dark"] > 0
    with pytest.raises(ValueError, match="not held out"):
        data.draw_rows([item for item in world if item.held_out], 10)


def test_phrase_writes_hair_and_direction_without_colon() -> None:
    phrases = {"man: bald": "bald man", "woman: red hair": "woman with red hair",
               "person walking: facing right": "person walking facing right"}  # fmt: skip
    assert {label: data.phrase(make_emoji(label)) for label in phrases} == phrases


def test_another_tarball_is_refused(tmp_path) -> None:
    source = sources.SETS["noto"]
    (tmp_path / source.tarball).write_bytes(b"something else")
    with pytest.raises(ValueError, match="expected sha256 3e918d88"):
        sources.fetch(source, tmp_path)


def test_rasterise_draws_shape_and_transparency() -> None:
    pytest.importorskip("resvg_py")
    shape = '<rect width="5" height="10" fill="#ff0000"/>'
    image = sources.rasterise(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10">{shape}</svg>')
    assert image.shape == (128, 128, 4) and image.dtype == np.uint8
    assert tuple(image[64, 20]) == (255, 0, 0, 255) and image[64, 100, 3] == 0


def test_statistics_count_every_image(world) -> None:
    statistics = data.statistics(world)
    assert statistics["images"] == sum(one["images"] for one in statistics["sets"].values()) == len(world)
    json.dumps(statistics)
