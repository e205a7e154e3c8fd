"""Rewritten prompts: the phrases, the images that get them, and that the rest of a run does not depend on them."""

import numpy as np
import pytest
import yaml
from test_methods import CALLS, STRENGTH

from experiments import PROJECT
from experiments.methods.combined import Combined
from experiments.methods.method import Baseline, sample
from experiments.methods.negtome import NegToMe
from experiments.methods.rewriting import Rewriting
from experiments.prompts import Group

CONF = PROJECT / "conf"
PHRASES = {"red": ["scarlet", "crimson", "ruby"]}
RED = ["a scarlet thing", "a crimson thing", "a ruby thing"]


def group(size=4, seed=0, prompt="a red thing", category="red"):
    return Group("one", prompt, category, seed, size)


def test_the_last_images_ask_for_different_phrases_the_same_at_every_share():
    asked = {share: Rewriting("m", PHRASES, share).prompts(group()) for share in (0, 0.25, 0.5, 0.75, 1)}
    for share, prompts in asked.items():
        kept = 4 - int(4 * share)
        assert prompts[:kept] == ["a red thing"] * kept
        assert prompts[kept:] == asked[1][kept:]
    assert sorted(asked[0.75][1:]) == sorted(RED), "as many as there are"
    assert asked[1][3] == asked[1][0], "and then again"
    drawn = {tuple(Rewriting("m", PHRASES, 1).prompts(group(3, seed))) for seed in range(20)}
    assert len(drawn) > 3, "other groups, other phrases"
    assert Rewriting("m", PHRASES, 0.75).prompts(group(1)) == ["a red thing"]


def test_a_category_is_replaced_as_a_word():
    method = Rewriting("m", PHRASES, 1)
    assert method.prompts(group(1, prompt="a hundred red"))[0].startswith("a hundred ")


def test_images_are_those_of_their_prompts(pipe, kind):
    """One by one by themselves; the log keeps what was asked for."""
    asked = group(3)
    method = Rewriting("m", PHRASES, 0.67)
    drawn = method.generate(pipe, asked, CALLS[kind])
    prompts = drawn.statistics["prompts"]
    assert prompts[0] == "a red thing" and set(prompts[1:]) < set(RED) and len(set(prompts)) == 3
    for prompt, seed, image in zip(prompts, asked.image_seeds(), drawn.images, strict=True):
        alone = sample(pipe, group(1, prompt=prompt), CALLS[kind], [seed])
        assert np.allclose(alone[0], image, atol=2e-3)


def test_negtome_pushes_images_of_several_prompts_from_the_first(pipe, kind):
    asked = group(2)
    rewriting, push = Rewriting("a", PHRASES, 0.5), NegToMe("b", **STRENGTH)
    both = Combined("both", {"a": rewriting, "b": push}).generate(pipe, asked, CALLS[kind])
    words, baseline = (one.generate(pipe, asked, CALLS[kind]) for one in (rewriting, Baseline()))
    assert both.statistics["tokens_pushed"] > 0 and both.statistics["prompts"] == words.statistics["prompts"]
    # The first image keeps its prompt and is never moved, up to how a batch of other contents is rounded.
    assert np.allclose(both.images[0], baseline.images[0], atol=2e-3)
    assert not np.allclose(both.images[1], words.images[1], atol=2e-3)
    with push.apply(pipe, asked, CALLS[kind]) as applied:
        by_hand = sample(pipe, asked, applied.call | {"prompt": both.statistics["prompts"], "num_images_per_prompt": 1})
    assert np.array_equal(both.images, by_hand)


def test_what_cannot_be_rewritten_says_which_category():
    method = Rewriting("m", PHRASES)
    with pytest.raises(ValueError, match=r"category 'green' in method\.rewrites.*conf/rewrites/"):
        method.prompts(group(category="green"))
    with pytest.raises(ValueError, match="does not name 'red'"):
        method.prompts(group(prompt="a hundred things"))


def test_the_phrases_are_part_of_the_identity():
    one, same, other = (
        Rewriting("m", phrases).settings()
        for phrases in (PHRASES, dict(PHRASES), {"red": [*PHRASES["red"][:2], "pink"]})
    )
    assert one == same != other


def phrases_of(name):
    return yaml.safe_load((CONF / "rewrites" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["mini", "paper"])
def test_every_category_that_is_asked_for_has_phrases(name):
    sets = (yaml.safe_load((CONF / "prompts" / f"{file}.yaml").read_text()) for file in ("diversity", "development"))
    phrases = phrases_of(name)
    assert set(phrases) == {category for prompts in sets for category in prompts["categories"]}
    for category, others in phrases.items():
        assert len(others) >= 6 and category not in others


def test_labels_of_the_mini_models_are_known_to_them():
    """Phrases are labels of emoji below the category, with a style before or a skin tone behind where there are few."""
    phrases = phrases_of("mini")
    labels = yaml.safe_load((CONF / "labels" / "mini.yaml").read_text())
    for category, others in phrases.items():
        if category != "doctor":  # whose emoji are health workers
            known = {category, *(label.lower() for label in labels[category])}
            assert {phrase.partition(" style emoji of a ")[2] or phrase for phrase in others} <= known
