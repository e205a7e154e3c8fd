"""The prompt sets: what is asked for, how often, and from which noises."""

import pytest

from experiments.prompts import Group, PromptSet

SMALL = {
    "name": "small",
    "split": "test",
    "categories": ["bird", "fish"],
    "templates": ["a photo of a", "a good photo of the"],
    "seeds": [0, 1, 2],
    "images_per_prompt": 4,
}


def test_the_whole_set_is_the_product_in_canonical_order():
    groups = PromptSet(**SMALL).groups()
    assert [(g.prompt, g.seed) for g in groups[:4]] == [
        ("a photo of a bird", 0),
        ("a photo of a bird", 1),
        ("a photo of a bird", 2),
        ("a good photo of the bird", 0),
    ]
    assert len(groups) == 2 * 2 * 3
    assert len({g.id for g in groups}) == len(groups)
    assert groups[0].id == "a-photo-of-a-bird/000000"


def test_a_subset_is_drawn_from_the_whole_and_does_not_depend_on_the_other_categories():
    whole = {g.id for g in PromptSet(**SMALL).groups()}
    subset = PromptSet(**SMALL, groups_per_category=2).groups()
    assert [g.category for g in subset] == ["bird", "bird", "fish", "fish"]
    assert {g.id for g in subset} < whole
    alone = PromptSet(**SMALL | {"categories": ["fish"]}, groups_per_category=2).groups()
    assert alone == [g for g in subset if g.category == "fish"]
    other = PromptSet(**SMALL | {"seeds": range(10)}, groups_per_category=2, subset_seed=1).groups()
    assert other != PromptSet(**SMALL | {"seeds": range(10)}, groups_per_category=2).groups()


def test_image_seeds_are_distinct_between_images_groups_and_prompts():
    groups = PromptSet(**SMALL).groups()
    seeds = [seed for group in groups for seed in group.image_seeds()]
    assert len(set(seeds)) == len(seeds) == 4 * len(groups)
    assert all(0 <= seed < 2**32 for seed in seeds)
    # A larger group begins with the same noises.
    small, large = (Group("a", "a", "a", 0, size).image_seeds() for size in (2, 4))
    assert large[:2] == small


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": []}, "categories must be a list of distinct values"),
        ({"templates": ["a", "a"]}, "templates must be a list of distinct values"),
        ({"seeds": [-1]}, "seeds must be integers in"),
        ({"split": "train"}, "split must be 'test' or 'development'"),
        ({"images_per_prompt": 1}, "at least 2"),
        ({"categories": ["T-shirt", "t shirt"]}, "must differ in their letters"),
        ({"groups_per_category": 7}, r"null \(all\) or in \[1, 6\]"),
    ],
)
def test_bad_sets_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PromptSet(**SMALL | change)
