"""The search: ordinary runs, a front, and the same end however often it is interrupted."""

import re

import pandas as pd
import pytest

pytest.importorskip("optuna", reason='needs pip install -e ".[search]"')

from experiments import project_path
from experiments import search as module
from experiments.choose import pareto_front
from experiments.configs import expand
from experiments.runs import Run
from experiments.search import front_file, search
from experiments.tables import TEXT, read_table

#: Six trials of four settings, so that one is drawn twice; that which diversifies most comes after such a one.
SMALL = (
    "method.threshold=0.5", "search.trials=6", "~search.space.window", "search.space.alpha.low=0.3",
    "search.space.alpha.high=0.9", "search.space.alpha.step=0.6", "search.space.threshold.low=0.0",
    "search.space.threshold.high=0.5", "search.space.threshold.step=0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_overrides):
    """An undisturbed search: overrides and the front."""
    arguments = tiny_overrides("search", tmp_path_factory.mktemp("search"), *SMALL)
    return arguments, search(arguments)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_front_is_what_no_other_setting_beats(found):
    arguments, front = found
    cfg = expand(arguments)[0]
    frame = read_table("search", cfg.results)
    assert front["run_id"].tolist() == pareto_front(frame, "pairwise_distance", "vendi_score", "sdxl")
    assert front_file(cfg).name == "search_front.csv"
    written = pd.read_csv(front_file(cfg), dtype=TEXT)
    assert written["run_id"].tolist() == front["run_id"].tolist()
    # No other run is better in one metric and as good in the other.
    wide = frame[frame["method"] != "none"].pivot(index="run_id", columns="metric", values="difference")
    for run in set(front["run_id"]) & set(wide.index):
        better = (wide["pairwise_distance"] > wide.loc[run, "pairwise_distance"]) & (
            wide["vendi_score"] >= wide.loc[run, "vendi_score"]
        )
        assert not better.any()


def test_the_most_diverse_setting_within_the_margin_is_chosen(found):
    arguments, front = found
    table = read_table("search", expand(arguments)[0].results).set_index(["run_id", "metric"])
    chosen, most = [], 0
    for run in table[table["method"] != "none"].index.unique("run_id"):
        diversity, quality = table.loc[run, "pairwise_distance"], table.loc[run, "vendi_score"]
        if quality["difference"] >= -quality["margin"] and diversity["difference"] > most:
            chosen, most = [run], diversity["difference"]
    assert len(chosen) == 1 and front.loc[front["chosen"], "run_id"].tolist() == chosen


def test_the_front_says_in_which_trial_a_setting_was_drawn_first(found, caplog):
    arguments, front = found
    with caplog.at_level("INFO", logger=module.__name__):
        search(arguments)
    drawn = [re.search(r"trial (\d+) of 6: alpha (\S+), threshold (\S+):", text) for text in caplog.messages]
    numbers = {}
    for trial in filter(None, drawn):
        numbers.setdefault((float(trial[2]), float(trial[3])), int(trial[1]))
    tried = front[front["method"] != "none"]
    settings = list(zip(tried["alpha"], tried["threshold"], strict=True))
    assert [numbers[setting] for setting in settings] == tried["trial"].tolist()
    assert any(numbers[setting] > 1 + list(numbers).index(setting) for setting in settings), "else this shows nothing"


def test_trials_are_ordinary_runs_and_the_models_own_strengths_the_first(found):
    arguments, _ = found
    baseline, own = expand(arguments)
    frame = read_table("search", baseline.results)
    runs = list(dict.fromkeys(frame["run_id"]))
    assert runs[:2] == [Run.find(baseline).id, Run.find(own).id]
    assert 3 <= len(runs) <= 1 + 4
    tried = frame[frame["method"] != "none"].drop_duplicates("run_id")
    assert set(tried["alpha"]) <= {0.3, 0.9} and set(tried["threshold"]) <= {0.0, 0.5}


@pytest.mark.slow
def test_an_interrupted_search_ends_as_an_undisturbed_one(found, tmp_path, tiny_overrides, monkeypatch):
    arguments, front = found
    again = tiny_overrides("search", tmp_path, *SMALL)
    calls = []

    def interrupted(cfg):
        calls.append(cfg)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(cfg)

    generate = module.generate
    monkeypatch.setattr(module, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(again)
    assert not (tmp_path / "results").exists()
    pd.testing.assert_frame_equal(search(again), front)
    assert files(tmp_path / "results") == files(project_path(expand(arguments)[0].results))
    # Once more, with nothing left to do.
    monkeypatch.setattr("experiments.generate._generate_groups", lambda *a: pytest.fail("generated"))
    pd.testing.assert_frame_equal(search(again), front)


def test_a_quality_without_a_margin_is_refused_before_the_first_trial(found, monkeypatch):
    """Of a similarity, which may be below 0, a share is no margin: nothing could be chosen."""
    arguments, _ = found
    arguments = [one for one in arguments if not one.startswith("primary.quality=")]
    generate = module.generate
    monkeypatch.setattr(
        module, "generate", lambda cfg: generate(cfg) if cfg.method.name == "none" else pytest.fail("tried")
    )
    with pytest.raises(ValueError, match=r"expected primary\.quality .* got pairwise_similarity, .* no margin"):
        search([*arguments, "primary.quality=pairwise_similarity"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["experiment=sweep"], "expected an experiment with a `search`, got 'sweep'"),
        (["method=negtome"], "expected the methods none and one to be searched"),
        (["search.space.alpha.setting=method.alpah"], r"search\.space\.alpha\.setting .* method\.alpah"),
        (["search.space.alpha.high=0"], r"expected search\.space\.alpha to have a setting, low <= high"),
        (["~search.space.alpha", "~search.space.threshold"], "expected axes in search.space"),
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_is_generated(
    changes, message, tmp_path, tiny_overrides, monkeypatch
):
    monkeypatch.setattr(module, "generate", lambda cfg: pytest.fail("generated"))
    small = () if changes == ["experiment=sweep"] else SMALL
    with pytest.raises(ValueError, match=message):
        search(tiny_overrides("search", tmp_path, *small, *changes))
