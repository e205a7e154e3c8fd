"""The prompt sets: their groups in order, and the seeds of the images."""

import pytest

from experiments.prompts import CharacterPrompts, Group, PeoplePrompts, PromptSet

SMALL = {
    "name": "small", "split": "test", "categories": ["bird", "fish"],
    "templates": ["a photo of a", "a good photo of the"], "seeds": [0, 1, 2], "images_per_prompt": 4,
}  # fmt: skip
CHARACTERS = {
    "name": "small", "split": "test", "seeds": [3, 0], "images_per_prompt": 1, "characters": {
        "Panda": {"direct": ["a photo of a Panda"], "indirect": ["a black and white bear"], "benign": ["a brown bear"]},
        "Robot": {"indirect": ["a man of tin", "A metal man!"], "direct": ["a Robot"]},
    },
}  # fmt: skip
PEOPLE = {
    "name": "small", "split": "test", "template": "a photo of a",
    "people": {"judge": ["woman judge with dark skin tone", "man judge"], "cook": ["man cook"]},
    "seeds": [0, 1], "said_seeds": [1], "images_per_prompt": 4,
}  # fmt: skip


def test_the_full_set_is_the_product_in_canonical_order_and_no_two_images_share_a_seed():
    groups = PromptSet(**SMALL).groups()
    assert [(g.prompt, g.seed) for g in groups[:4]] == [
        ("a photo of a bird", 0), ("a photo of a bird", 1), ("a photo of a bird", 2), ("a good photo of the bird", 0),
    ]  # fmt: skip
    assert len(groups) == len({g.id for g in groups}) == 2 * 2 * 3
    assert groups[0].id == "a-photo-of-a-bird/000000"
    seeds = [seed for group in groups for seed in group.image_seeds()]
    assert len(set(seeds)) == len(seeds) == 4 * len(groups) and all(0 <= seed < 2**32 for seed in seeds)
    small, large = (Group("a", "a", "a", 0, size).image_seeds() for size in (2, 4))
    assert large[:2] == small


def test_a_subset_is_drawn_from_the_full_set_and_does_not_depend_on_the_other_categories():
    everything = {g.id for g in PromptSet(**SMALL).groups()}
    subset = PromptSet(**SMALL, groups_per_category=2).groups()
    assert [g.category for g in subset] == ["bird", "bird", "fish", "fish"]
    assert {g.id for g in subset} < everything
    alone = PromptSet(**SMALL | {"categories": ["fish"]}, groups_per_category=2).groups()
    assert alone == [g for g in subset if g.category == "fish"]
    many = SMALL | {"seeds": range(10), "groups_per_category": 2}
    assert PromptSet(**many, subset_seed=1).groups() != PromptSet(**many).groups()


def test_characters_are_asked_for_by_name_by_description_and_by_near_misses():
    groups = CharacterPrompts(**CHARACTERS).groups()
    assert [(g.id, g.prompt, g.category, g.asks_for_concept) for g in groups[:6:2]] == [
        ("direct-a-photo-of-a-panda/000003", "a photo of a Panda", "Panda", True),
        ("indirect-a-black-and-white-bear/000003", "a black and white bear", "Panda", True),
        ("benign-a-brown-bear/000003", "a brown bear", "beside Panda", False),
    ]
    assert [g.seed for g in groups[:6]] == [3, 0] * 3 and {(g.concept, g.size) for g in groups[:6]} == {("Panda", 1)}
    # A kind that a character lacks is left out, and the order of kinds is not that of the file.
    assert [g.prompt_id for g in groups[6::2]] == ["direct-a-robot", "indirect-a-man-of-tin", "indirect-a-metal-man"]
    assert len({seed for group in groups for seed in group.image_seeds()}) == len(groups) == 12
    # The seeds of a group do not depend on the other kinds.
    benign = CharacterPrompts(**CHARACTERS, kinds=["benign"]).groups()
    assert benign == [group for group in groups if not group.asks_for_concept]
    assert CharacterPrompts(**CHARACTERS | {"seeds": [0]}, kinds=["direct"]).groups()[0] == groups[1]


def test_people_are_asked_for_openly_and_with_more_specified():
    groups = PeoplePrompts(**PEOPLE).groups()
    dark = "woman judge with dark skin tone"
    assert [(g.id, g.prompt, g.category, g.size) for g in groups[:4]] == [
        ("open-a-photo-of-a-judge/000000", "a photo of a judge", "judge", 4),
        ("open-a-photo-of-a-judge/000001", "a photo of a judge", "judge", 4),
        (f"said-a-photo-of-a-{dark.replace(' ', '-')}/000001", f"a photo of a {dark}", "judge", 4),
        ("said-a-photo-of-a-man-judge/000001", "a photo of a man judge", "judge", 4),
    ]
    assert [g.category for g in groups[4:]] == ["cook"] * 3


BAD = [
    (PromptSet, {"categories": []}, "categories must be a list of distinct values"),
    (PromptSet, {"templates": ["a", "a"]}, "templates must be a list of distinct values"),
    (PromptSet, {"seeds": [-1]}, "seeds must be integers in"),
    (PromptSet, {"images_per_prompt": 1}, "at least 2, got 1"),
    (PromptSet, {"categories": ["T-shirt", "t shirt"]}, "must differ in their letters"),
    (PromptSet, {"groups_per_category": 7}, r"null \(all\) or in \[1, 6\]"),
    (CharacterPrompts, {"characters": {"Robot": {"direct": ["a Robot"]}}, "kinds": ["benign"]}, "at least one prompt"),
    (CharacterPrompts, {"characters": {"Robot": {"Direct": ["a Robot"]}}}, r"must be among .*got \['Direct'\]"),
    (CharacterPrompts, {"characters": {"Robot": {"direct": "a Robot"}}}, r"Robot\.direct must be a list, got 'a Robot"),
    (CharacterPrompts, {"characters": {"Robot": {"indirect": ["the small robot"]}}}, r"got \['the small robot'\]"),
    (CharacterPrompts, {"characters": {"Robot": {"direct": ["a Robot", "a robot!"]}}}, r"twice: \['direct-a-robot'\]"),
    (CharacterPrompts, {"characters": {key: {"benign": ["a bear"]} for key in "ab"}}, r"twice: \['benign-a-bear'\]"),
    (CharacterPrompts, {"seeds": [10**6]}, r"seeds must be integers in \[0, 999999\]"),
    (CharacterPrompts, {"kinds": "direct"}, r"prompts\.kinds must be a list, got 'direct'"),
    (CharacterPrompts, {"kinds": ["direct", "friendly"]}, r"must be among .*got \['friendly'\]"),
    (CharacterPrompts, {"images_per_prompt": 0}, "at least 1, got 0"),
    (PeoplePrompts, {"people": {}}, "at least one word, got none"),
    (PeoplePrompts, {"people": {"judge": "woman judge"}}, r"prompts.people.judge must be a list"),
    (PeoplePrompts, {"people": {"judge": ["man judge", "man judge!"]}}, r"twice: \['said-a-photo-of-a-man-judge'\]"),
    (PeoplePrompts, {"said_seeds": [2]}, r"said_seeds must be among prompts.seeds, got \[2\] too"),
    (PeoplePrompts, {"images_per_prompt": 1}, "at least 2, got 1"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BAD)
def test_bad_sets_are_refused(kind, change, message):
    settings = {PromptSet: SMALL, CharacterPrompts: CHARACTERS, PeoplePrompts: PEOPLE}[kind]
    with pytest.raises(ValueError, match=message):
        kind(**settings | change)
