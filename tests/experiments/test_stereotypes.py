"""The experiment of stereotypes at tiny size, its prompts, and the validation of its classifiers."""

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from plans import plan_from

from eval.people import BINS, SIDE, TONES, log_likelihoods
from eval.stereotypes import label_in_prompt
from experiments import PROJECT, tabulate
from experiments.compose import expand, first
from experiments.configs import build
from experiments.evaluate import evaluate
from experiments.generate import generate
from experiments.tables import stereotypes
from training import people
from training.sources import SKIN_TONES, Emoji


def test_every_word_has_100_open_images_and_is_specified_for_both_genders():
    cfg = first(["experiment=stereotypes"])
    groups = build(cfg.prompts).groups()
    tones = cfg.metric.skin_tone_as_said.labels
    assert tones == list(TONES) and len({group.category for group in groups}) == 14
    for word, genders in cfg.metric.gender_as_said.labels.items():
        own = [group for group in groups if group.category == word]
        assert sum(group.size for group in own if group.prompt_id.startswith("open-")) == (word != "technologist") * 100
        said = {group.prompt for group in own if group.prompt_id.startswith("said-")}
        assert {label_in_prompt(prompt, genders) for prompt in said} == ({0, 1} if said else set())
        assert len({label_in_prompt(prompt, tones) for prompt in said}) == len(said)
    open_prompts = [group.prompt for group in groups if group.prompt_id.startswith("open-")]
    assert not any(word in prompt for prompt in open_prompts for word in ("woman", "man ", "girl", "boy", "tone"))
    named = {f"{group.prompt_id}" for group in groups}
    assert set(cfg.metric.skin_tone_evenness_trained.only) <= named


@pytest.mark.slow
def test_the_experiment_runs_to_its_table(tmp_path, tiny_overrides):
    mine = ("prompts.categories", "model.groups_per_category", "metric=", "primary.")
    usual = [one for one in tiny_overrides("stereotypes", tmp_path, "method=none,negtome") if not one.startswith(mine)]
    words = {"judge": ["woman judge with light skin tone"], "cook": ["man cook with dark skin tone"]}
    changes = [
        "prompts.seeds=[0,1,2,3]", "prompts.said_seeds=[0]", "prompts.images_per_prompt=2",
        "~metric.skin_tone_evenness_trained",
    ]  # fmt: skip
    configs = expand(list({one.partition("=")[0]: one for one in (*usual, *changes)}.values()))
    for cfg in configs:
        cfg.prompts.people = OmegaConf.create(words)  # in place of all: an override would add to them
    plan = plan_from(*configs)
    generate(plan)
    evaluate(plan)
    frame, markdown = tabulate.write_table(plan)
    value = frame.set_index(["method", "metric"])["value"]
    for method in ("none", "negtome"):
        for metric in ("gender_evenness", "skin_tone_evenness", "skin_tone_heterogeneous", "gender_as_said"):
            assert 0 <= value[method, metric] <= 1
    counted = frame.set_index(["method", "metric"])
    assert counted.loc[("none", "gender_evenness"), ["n_groups", "n_images"]].tolist() == [2, 16]
    assert counted.loc[("none", "gender_as_said"), ["n_groups", "n_images"]].tolist() == [2, 4]
    assert "skin tone evenness (up)" in markdown


@pytest.mark.slow
def test_the_classifiers_are_right_about_the_pictures_as_published(tmp_path, capsys):
    stereotypes.main([f"results={tmp_path}"])
    published = PROJECT / "results" / "attribute_classifier" / "table.csv"
    found = pd.read_csv(tmp_path / "attribute_classifier" / "table.csv")
    pd.testing.assert_frame_equal(found, pd.read_csv(published))
    assert (tmp_path / "attribute_classifier" / "table.md").read_text() == published.with_suffix(".md").read_text()
    assert capsys.readouterr().out.startswith("# attribute_classifier")
    # Every word, gender and tone once; by chance one in two and one in six would be right.
    right = found[found["true"] == found["found"]].groupby("attribute")["n_images"].sum()
    assert found.groupby("attribute")["n_images"].sum().tolist() == [180, 180]
    assert right["gender"] > 0.8 * 180 and right["skin tone"] > 0.8 * 180


def test_pictures_are_read_by_their_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected pictures in .*/WORD/DESCRIPTION, got none"):
        stereotypes.pictures(tmp_path)
    images = stereotypes.pictures(PROJECT / stereotypes.PICTURES)
    assert {row.category for row in images.rows} == set(people.words())
    assert all(row.path == f"{row.category}/{row.prompt}/{row.path.rpartition('/')[2]}" for row in images.rows)


def square(colour, tone_level):
    """Return a picture of a square of skin of a level on a ground of a colour."""
    image = torch.tensor(colour, dtype=torch.uint8)[:, None, None].repeat(1, 2 * SIDE, 2 * SIDE)
    image[:, SIDE // 2 : SIDE, SIDE // 2 : SIDE] = tone_level
    return image


def test_skin_is_what_differs_between_all_tones_of_one_emoji():
    levels = [250, 210, 170, 130, 90, 50]
    colours = ([0, 0, 255], [0, 255, 0])
    images = torch.stack([square(colour, level) for colour in colours for level in levels])
    images[[5, 11], :, -8:, -8:] = 255  # what one tone alone has, as white hair
    tones, shown = [*range(6), *range(6)], [0] * 6 + [1] * 6
    fitted = people.fit(images, tones, shown)
    assert fitted["place"].min().item() == pytest.approx(0.01) and fitted["place"].max().item() == pytest.approx(0.99)
    assert (fitted["place"] > 0.5).sum() == (SIDE // 4) ** 2
    for histogram in (*fitted["skin"], fitted["rest"]):
        assert histogram.shape == (BINS**3,) and histogram.sum().item() == pytest.approx(1) and histogram.min() > 0
    assert people.accuracy(images, tones, fitted) == 1
    assert people.accuracy(torch.stack([square([9, 9, 9], level) for level in levels]), range(6), fitted) == 1
    assert people.accuracy(images, tones[::-1], fitted) == 0
    with pytest.raises(ValueError, match="in every one of 6 tones, got none"):
        people.fit(images[:5], tones[:5], shown[:5])
    assert log_likelihoods(torch.zeros(SIDE, SIDE, dtype=torch.long), **fitted).sum().abs() < 1e-3


def test_a_histogram_is_smoothed_along_each_channel_and_no_colour_is_impossible():
    counts = torch.zeros(BINS, BINS, BINS)
    counts[5, 5, 5] = 8
    found = people.smooth(counts.flatten()).reshape(BINS, BINS, BINS)
    even = people.EVEN / BINS**3
    for place, share in (((5, 5, 5), 1 / 8), ((4, 5, 5), 1 / 16), ((6, 6, 4), 1 / 64), ((0, 5, 5), 0)):
        assert found[place].item() == pytest.approx((1 - people.EVEN) * share + even, rel=1e-5)


def test_a_probe_finds_the_direction_that_parts_two_classes():
    features = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1]) + 2
    men = features[:, 1] > 2
    probe = people.fit_probe(features, men)
    assert ((features @ probe["weight"] + probe["bias"] > 0) == men).float().mean() > 0.97
    scaled = probe["weight"] * features.std(dim=0)
    assert scaled[1] > 5 * scaled[[0, 2]].abs().max()


def test_a_picture_of_every_word_gender_and_tone_is_drawn():
    emoji = []
    for word, concepts in people.words().items():
        for concept in concepts:
            for tone in (None, *SKIN_TONES):
                genders = (None,) if word == "child" else ("woman", "man", None)
                emoji += [
                    Emoji(style, concept, concept, concept, "people-body", "person", gender, tone)
                    for gender in genders
                    for style in ("noto", "twemoji")
                ]
    folders = people.draw(emoji)
    assert len(folders) == 12 * len(people.words()) and folders == people.draw(emoji)
    for folder, index in folders.items():
        said = folder.partition("/")[2]
        assert label_in_prompt(said, TONES) == people.tone_of(emoji[index])
        gender = people.gender_of(emoji[index])
        assert said.split()[0] in {"woman": ("woman", "girl"), "man": ("man", "boy")}[gender]
    assert "child/girl with no skin tone" in folders and "doctor/man health worker with dark skin tone" in folders


def test_pictures_are_composed_on_white():
    pixels = np.zeros((1, 2, 2, 4), np.uint8)
    pixels[0, 0, 0] = 10, 20, 30, 255
    found = people.on_white(pixels)
    assert found.dtype == torch.uint8 and found[0, :, 0, 0].tolist() == [10, 20, 30] and (found[0, :, 1] == 255).all()
