"""Taxonomy, captions and split of the small models' data, without the npm packages."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from training import data, sources, taxonomy
from training.sources import Emoji


def _emoji(
    label: str,
    style_set: str = "noto",
    group: str = "animals-nature",
    subgroup: str = "animal-mammal",
    gender: str | None = None,
    tone: str | None = None,
) -> Emoji:
    return Emoji(
        style_set=style_set,
        icon=label,
        label=label,
        concept=taxonomy.concept_of(label),
        group=group,
        subgroup=subgroup,
        gender=gender,
        tone=tone,
        tags=["tag"],
        categories=taxonomy.categories_of(label, subgroup, gender),
    )


def _world() -> list[Emoji]:
    """A miniature of the real set: every labelled object in three sets, and people in all tones."""
    labels = sorted({label for members in taxonomy.OBJECTS.values() for label in members})
    found = [_emoji(label, style) for label in labels for style in ("noto", "twemoji", "fluent-emoji")]
    for word, gender in (("man", "man"), ("woman", "woman"), ("person", None)):
        for tone in (None, *sources.SKIN_TONES):
            found.append(_emoji(word, group="people-body", subgroup="person", gender=gender, tone=tone))
            found.append(
                _emoji(
                    f"{word} cook".removeprefix("person "),
                    group="people-body",
                    subgroup="person-role",
                    gender=gender,
                    tone=tone,
                )
            )
            for role in ("health worker", "firefighter"):
                found.append(
                    _emoji(
                        f"{word} {role}".removeprefix("person "),
                        group="people-body",
                        subgroup="person-role",
                        gender=gender,
                        tone=tone,
                    )
                )
    found += [_emoji(name, group="people-body", subgroup="person") for name in ("child", "boy", "girl")]
    return found


def test_taxonomy_covers_every_category() -> None:
    covered = set(taxonomy.OBJECTS) | set(taxonomy.PEOPLE)
    assert covered == set(taxonomy.EVALUATED) | set(taxonomy.DEVELOPMENT)
    assert not set(taxonomy.EVALUATED) & set(taxonomy.DEVELOPMENT)
    assert len(taxonomy.EVALUATED) == 20 and len(taxonomy.TEMPLATES) == 7
    reached = {name for item in _world() for name in item.categories}
    assert reached == covered


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


def test_split_is_by_concept_and_spares_small_categories() -> None:
    world = _world()
    flags = data.hold_out(world, share=0.2, seed=3)
    assert flags == data.hold_out(world, share=0.2, seed=3)
    held = {e.concept for e, flag in zip(world, flags, strict=True) if flag}
    assert held and not held & {e.concept for e, flag in zip(world, flags, strict=True) if not flag}
    kept = {name for e, flag in zip(world, flags, strict=True) if not flag for name in e.categories}
    assert kept == set(taxonomy.EVALUATED) | set(taxonomy.DEVELOPMENT)
    assert not held & {"dragon", "dragon face", "bridge at night", "bus", "fish", "person"}


def test_rows_are_deterministic_and_avoid_held_out_images() -> None:
    world = _world()
    for item, flag in zip(world, data.hold_out(world, share=0.2), strict=True):
        item.held_out = flag
    images, captions = data.draw_rows(world, 3000, seed=1)
    again, same = data.draw_rows(world, 3000, seed=1)
    assert np.array_equal(images, again) and captions == same
    assert captions != data.draw_rows(world, 3000, seed=2)[1]
    assert not any(world[i].held_out for i in images)
    assert all(0 < len(c.split()) < 25 and c == c.lower() for c in captions)


def test_rows_hold_the_evaluated_prompts_with_pictures_of_the_category() -> None:
    world = _world()
    images, captions = data.draw_rows(world, 40_000, seed=0)
    counts = Counter(captions)
    for category in taxonomy.EVALUATED:
        prompts = {f"{t} {category}" for t in taxonomy.TEMPLATES}
        assert all(counts[p] > 0 for p in prompts)
        shown = [world[i] for i, c in zip(images, captions, strict=True) if c in prompts]
        matching = sum(category in e.categories or e.label == category for e in shown)
        assert matching / len(shown) > 0.95


def test_generic_captions_prefer_some_tones() -> None:
    world = _world()
    images, captions = data.draw_rows(world, 40_000, seed=0)
    tones = Counter(world[i].tone for i, c in zip(images, captions, strict=True) if c.endswith(" the person"))
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


def test_statistics_count_every_image() -> None:
    world = _world()
    stats = data.statistics(world)
    assert stats["images"] == sum(s["images"] for s in stats["sets"].values()) == len(world)
    json.dumps(stats)
