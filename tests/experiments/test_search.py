"""The search: ordinary runs, a front, and the same end however often it is interrupted."""

import pandas as pd
import pytest

pytest.importorskip("optuna", reason='needs pip install -e ".[search]"')

from experiments import search as module
from experiments import tabulate
from experiments.configs import expand
from experiments.plot import pareto_front
from experiments.runs import Run
from experiments.search import front_file, search


def overrides(folder, source, *changes):
    """The search on a tiny checkpoint: two prompts, two images, two steps, six trials."""
    return [
        "experiment=search", "model=sdxl", f"model.source={source}", "model.dtype=float32",
        "model.call.num_inference_steps=2", "model.call.height=64", "model.call.width=64", "model.negtome.min_side=4",
        "model.negtome.timestep_range=[0,1000]", "model.negtome.threshold=0.5", "model.groups_per_category=1",
        "prompts.categories=[flower,fruit]", "prompts.images_per_prompt=2", "metric=core",
        "scorer@model.scorer=pixel", "~metric.clip_score", "primary.quality=pairwise_similarity",
        "bootstrap.n_resamples=100", "search.trials=6",
        "~search.space.window", "search.space.alpha.high=2", "search.space.threshold.low=-0.5",
        "search.space.threshold.high=0.5", "search.space.threshold.step=0.5",
        f"outputs={folder / 'outputs'}", f"results={folder / 'results'}", *changes,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_checkpoint):
    """An undisturbed search: overrides and the front."""
    arguments = overrides(tmp_path_factory.mktemp("search"), tiny_checkpoint("sdxl"))
    return arguments, search(arguments)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_front_is_what_no_other_setting_beats(found):
    arguments, front = found
    cfg = expand(arguments)[0]
    frame = tabulate.read_table("search", cfg.results)
    assert front["run_id"].tolist() == pareto_front(frame, "pairwise_distance", "pairwise_similarity", "sdxl")
    assert front_file(cfg).name == "search_front.csv"
    written = pd.read_csv(front_file(cfg), dtype=tabulate.TEXT)
    assert written["run_id"].tolist() == front["run_id"].tolist()
    assert front["chosen"].sum() <= 1
    # No other run is better in one metric and as good in the other.
    wide = frame[frame["method"] != "none"].pivot(index="run_id", columns="metric", values="difference")
    for run in set(front["run_id"]) & set(wide.index):
        better = (wide["pairwise_distance"] > wide.loc[run, "pairwise_distance"]) & (
            wide["pairwise_similarity"] < wide.loc[run, "pairwise_similarity"]
        )
        assert not better.any()


def test_trials_are_ordinary_runs_and_the_models_own_strengths_the_first(found):
    arguments, _ = found
    baseline, own = expand(arguments)
    frame = tabulate.read_table("search", baseline.results)
    runs = list(dict.fromkeys(frame["run_id"]))
    assert runs[:2] == [Run.find(baseline).id, Run.find(own).id]
    assert 3 <= len(runs) <= 7
    tried = frame[frame["method"] != "none"].drop_duplicates("run_id")
    assert tried["alpha"].between(0.1, 2).all() and set(tried["threshold"]) <= {-0.5, 0.0, 0.5}
    assert (tried["alpha"] * 10 % 1).round(9).isin([0, 1]).all()


def test_an_interrupted_search_ends_as_an_undisturbed_one(found, tmp_path, tiny_checkpoint, monkeypatch):
    arguments, front = found
    again = overrides(tmp_path, tiny_checkpoint("sdxl"))
    calls = []

    def interrupted(cfg):
        calls.append(cfg)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(cfg)

    generate = module.generate
    monkeypatch.setattr(module, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(again)
    assert not (tmp_path / "results").exists()
    pd.testing.assert_frame_equal(search(again), front)
    assert files(tmp_path / "results") == files(tabulate.project_path(expand(arguments)[0].results))
    # Once more, with nothing left to do.
    monkeypatch.setattr("experiments.generate._generate_groups", lambda *a: pytest.fail("generated"))
    pd.testing.assert_frame_equal(search(again), front)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("experiment=tune", "expected an experiment with a `search`, got 'tune'"),
        ("method=negtome", "expected the methods none and one to be searched"),
        ("shard.count=2", "expected no shards"),
        ("search.space.alpha.setting=model.negtome.alpah", r"search\.space\.alpha\.setting .* model\.negtome\.alpah"),
        ("search.space.alpha.high=0", r"expected search\.space\.alpha to have a setting, low <= high"),
        ("~search.space", "expected axes in search.space"),
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_is_generated(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "generate", lambda cfg: pytest.fail("generated"))
    arguments = [one for one in overrides(tmp_path, tmp_path) if one.split("=")[0] != change.split("=")[0]]
    if change == "experiment=tune":
        arguments = ["model=mini-sdxl", "model.negtome.alpha=1", "model.negtome.threshold=0.7", "method=none"]
    if change == "~search.space":
        change = "~search.space.alpha"
        arguments = [*(one for one in arguments if ".threshold." not in one), "~search.space.threshold"]
    with pytest.raises(ValueError, match=message):
        search([*arguments, change])
