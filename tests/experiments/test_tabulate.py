"""The table's rules, on documents made by hand: what may be tested, what replaces what, and when quality is kept."""

import numpy as np
import pandas as pd
import pytest

from experiments import tabulate
from experiments.configs import expand
from experiments.evaluate import configured_metrics

ROW = dict.fromkeys(tabulate.COLUMNS, 1.0) | {
    "experiment": "e", "model": "m", "method": "negtome", "metric": "clip_score", "encoder": "clip-old",
    "primary": "quality", "run_id": "0123", "true_cfg_scale": None,
}  # fmt: skip


def configured(*overrides):
    return expand(["experiment=diversity", "model=mini-flux", "method=negtome", *overrides])


def document(values, bounds=(0, 100), **more):
    """A metric's document: one value a category, unless `categories` says otherwise."""
    categories = more.pop("categories", [f"c{index:02d}" for index in range(len(values))])
    groups = [
        {"group": f"p{index:02d}/000000", "category": category, "n_images": 4, "value": float(value)}
        for index, (value, category) in enumerate(zip(values, categories, strict=True))
    ]
    return {
        "metric": "clip_score", "aggregate": "mean", "higher_is_better": True, "bounds": list(bounds),
        "value": float(np.mean(values)), "groups": groups, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["primary.quality=clip_scoer"], r"primary.quality .*'clip_scoer'.*clip_score"),
        (["primary.diversity=null"], r"primary.diversity .*None"),
        (["~metric.clip_score"], r"primary.quality .*'clip_score'"),
        (["metric=tune", "primary.diversity=vendi_score"], r"primary.diversity .*'vendi_score'"),
        (["primary.quality=pairwise_distance"], "two different primary metrics, got 'pairwise_distance'"),
        (
            ["primary.quality=kernel_distance_scorer", "model.reference_images=null"],
            "primary.quality .*one of the metrics",
        ),
    ],
)
def test_primary_metrics_must_be_two_that_are_measured(overrides, message, tmp_path):
    """Before anything is looked for: a mistyped name must not cost an experiment, nor silently test nothing."""
    with pytest.raises(ValueError, match=message):
        tabulate.rows_of(configured(f"outputs={tmp_path}", *overrides))


def test_a_number_of_a_whole_set_cannot_be_primary(monkeypatch):
    (cfg,) = configured("primary.quality=kernel_distance_scorer")
    monkeypatch.setattr(tabulate.Run, "find", lambda cfg: "run")
    monkeypatch.setattr(tabulate.Run, "find_baseline", lambda cfg: "baseline")
    monkeypatch.setattr(tabulate, "_document", lambda *arguments: {})
    monkeypatch.setattr(tabulate, "_row", lambda *arguments: {})
    with pytest.raises(ValueError, match="kernel_distance_scorer, a number of the whole set"):
        tabulate.rows_of([cfg])
    cfg.primary.quality = "clip_score"
    assert len(tabulate.rows_of([cfg])) == len(cfg.metric)


def test_the_configured_cluster_reaches_the_halves_too():
    for cluster in ("category", "prompt", None):
        (cfg,) = configured(f"bootstrap.cluster={'null' if cluster is None else cluster}")
        found = {name: metric for name, metric in configured_metrics(cfg)}
        assert found["kernel_distance_scorer"].design()["subset_cluster"] == cluster
        assert found["clip_score"].design() == {}


def test_quality_is_held_against_its_margin():
    base, change = np.linspace(20, 40, 12), np.linspace(-2.5, 0.5, 12)
    for margin, kept in ((0.1, True), (0.04, False)):
        (cfg,) = configured(f"primary.quality_margin={margin}")
        columns = tabulate._comparison(cfg, "quality", document(base + change), document(base))
        assert columns["margin"] == pytest.approx(margin * 30)
        assert (columns["difference_low"] > -columns["margin"]) == columns["non_inferior"] == kept
        assert "margin" not in tabulate._comparison(cfg, "diversity", document(base + change), document(base))


@pytest.mark.parametrize(
    ("base", "bounds"),
    [(np.zeros(8), (0, 1)), (np.linspace(0.1, 1, 8), (-1, 1)), (np.linspace(0.1, 1, 8), (None, None))],
    ids=["a baseline of 0", "may be negative", "bounds unknown"],
)
def test_a_share_of_what_may_be_0_or_less_is_no_margin(base, bounds):
    (cfg,) = configured()
    changed = document(base + np.linspace(0, 0.3, 8), bounds)
    columns = tabulate._comparison(cfg, "quality", changed, document(base, bounds))
    assert "margin" not in columns and "non_inferior" not in columns
    assert columns["difference_low"] > 0
    row = pd.Series(dict.fromkeys(tabulate.COLUMNS) | {"value": base.mean() + 0.15, "metric": "clip_score"} | columns)
    assert tabulate._kept(row) == "not estimable"
    assert "excluded" not in tabulate._finding(row.where(row.notna(), float("nan")))
    assert tabulate._kept(row.drop(labels="difference").reindex(row.index)) == "", "the baseline itself"


def test_differences_and_tests_go_by_category():
    """40 groups in 4 categories: four witnesses, however many groups."""
    categories = [f"c{index // 10}" for index in range(40)]
    base = np.random.default_rng(0).normal(30, 3, 40)
    change = np.repeat([0.5, 1.0, 1.5, 2.0], 10) + np.random.default_rng(1).normal(0, 0.01, 40)
    documents = [document(values, categories=categories) for values in (base + change, base)]
    columns = {}
    for cluster in ("category", "null"):
        (cfg,) = configured(f"bootstrap.cluster={cluster}")
        columns[cluster] = tabulate._comparison(cfg, "diversity", *documents)
    assert columns["category"]["p_value"] == 2 / 2**4 and columns["null"]["p_value"] < 0.001
    widths = {name: found["difference_high"] - found["difference_low"] for name, found in columns.items()}
    # 10**0.5 by the number of units; Student's t with 3 degrees of freedom against 39
    assert widths["category"] > 4 * widths["null"]


def test_rows_by_an_earlier_encoder_are_replaced(tmp_path):
    path = tmp_path / "table.csv"
    others = [ROW | {"metric": "vendi_score", "primary": None}, ROW | {"model": "other"}, ROW | {"alpha": 0.5}]
    tabulate.merge_rows(path, [ROW | {"p_value": 0.03}, *others])
    frame = tabulate.merge_rows(path, [ROW | {"p_value": 0.03, "encoder": "clip-new"}])
    assert len(frame) == 4, "beside the new row its predecessor stands"
    key = (frame["metric"] == "clip_score") & (frame["model"] == "m") & (frame["alpha"] == 1)
    assert frame.loc[key, "encoder"].tolist() == ["clip-new"]
    assert frame.loc[~key, "encoder"].tolist() == ["clip-old"] * 3
    # the family is the two tests that stand in the table, not three
    assert frame.loc[key, "p_holm"].tolist() == [0.06]


def test_the_page_says_what_was_resampled_and_what_is_not_corrected():
    frame = pd.DataFrame(
        [
            ROW | {"method": "none", "run_id": "a", "n_units": 20, "n_groups": 40, "difference": None},
            ROW | {"run_id": "b", "n_units": 20, "n_groups": 40, "ci_low": None, "non_inferior": None, "margin": None},
            ROW | {"run_id": "b", "metric": "gender_entropy", "primary": None, "n_units": 2, "difference_low": None},
        ]
    )
    table = tabulate.main_table(frame)
    assert table["units"].tolist() == [20, 20] and table["groups"].tolist() == [40, 40]
    assert table["quality kept"].tolist() == ["", "not estimable"]
    assert tabulate.other_table(frame)["units"].tolist() == ["2"]
    page = tabulate.render_markdown(frame, None, pd.DataFrame())
    assert "40 groups in 20 independent units" in page
    assert "every method is judged by itself" in page and "intervals of fewer than four are not estimable" in page
