"""The primary hypotheses are judged by the tables' runs and corrected over all of them, as docs/protocol.md says."""

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from eval.significance import holm
from experiments.hypotheses import EXCLUDED, FILE, SHOWN, UNDECIDED, UNMEASURED, judge, render, verdict
from experiments.tables.columns import COLUMNS, csv_text
from experiments.tables.groups import put_groups
from experiments.tables.paired import paired_test

BOOTSTRAP = {"n_resamples": 400, "seed": 0, "level": 0.95, "cluster": "category"}
BASE = {"experiment": "e", "reference": "none", "settings": {"steps": 4}, "metric": "d", "margin": 0.05}
N = 12


def write(results, values):
    """Write a table and values of groups: (model, method) -> a value for each of N categories."""
    rows, groups = [], []
    for number, ((model, method), of_categories) in enumerate(values.items()):
        run = f"{number:012x}"
        value = float(np.mean(of_categories))
        row = {"experiment": "e", "model": model, "method": method, "steps": 4, "metric": "d", "encoder": "x"}
        rows.append(row | {"value": value, "run_id": run, "n_units": N, "n_groups": N})
        for category, one in enumerate(of_categories):
            place = {"category": f"c{category}", "prompt_id": f"p{category}", "group_seed": "000000"}
            one_group = {"run_id": run, "model": model, "method": method, "metric": "d", "encoder": "x"}
            groups.append(one_group | place | {"n_images": 4, "value": one})
    (results / "e").mkdir(parents=True)
    table = pd.DataFrame(rows, columns=COLUMNS)
    (results / "e" / "table.csv").write_text(csv_text(table))
    put_groups(results / "e" / "groups.csv.gz", groups, table)


@pytest.fixture
def results(tmp_path):
    """One model on which the method gains, one on which it changes nothing, one that is noise."""
    noise = np.random.default_rng(0).normal(size=N)
    write(
        tmp_path,
        {
            ("gains", "none"): np.ones(N),
            ("gains", "negtome"): 2 + 0.01 * noise,
            ("same", "none"): np.ones(N),
            ("same", "negtome"): 1 + 0.001 * (noise - noise.mean()),
            ("noise", "none"): np.ones(N),
            ("noise", "negtome"): 1 + noise - noise.mean(),
        },
    )
    return tmp_path


def hypotheses(*models, direction="higher"):
    return [BASE | {"model": model, "method": "negtome", "direction": direction} for model in models]


def test_effects_are_differences_of_means_and_all_hypotheses_count_in_holms_method(results):
    frame = judge(hypotheses("gains", "same", "noise", "absent", "elsewhere"), 0.05, results, BOOTSTRAP)
    assert frame["verdict"].tolist() == [SHOWN, EXCLUDED, UNDECIDED, UNMEASURED, UNMEASURED]
    assert frame["effect"].iloc[:3].to_numpy() == pytest.approx([1, 0, 0], abs=0.02)
    p = frame["p_value"].iloc[:3].tolist()
    assert frame["p_holm"].iloc[:3].tolist() == pytest.approx(holm([*p, 1.0, 1.0])[:3])
    assert frame["p_holm"].iloc[0] == pytest.approx(5 * p[0]) and frame["p_holm"].iloc[3:].isna().all()
    assert "not yet measured" in render(frame)


def test_too_many_hypotheses_leave_none_shown(results):
    """400 resamples give p >= 1/401, which Holm's method multiplies by the number of hypotheses."""
    frame = judge(hypotheses("gains", *["absent"] * 40), 0.05, results, BOOTSTRAP)
    assert frame["verdict"].iloc[0] == UNDECIDED


def test_an_effect_in_the_other_direction_is_excluded_however_significant(results):
    frame = judge(hypotheses("gains", direction="lower"), 0.05, results, BOOTSTRAP)
    assert frame["p_holm"].iloc[0] <= 0.05 and frame["verdict"].iloc[0] == EXCLUDED


@pytest.mark.parametrize(
    ("direction", "effect", "low", "high", "p_holm", "expected"),
    [
        ("higher", 0.1, 0.05, 0.15, 0.01, SHOWN),
        ("higher", 0.1, 0.05, 0.15, 0.06, UNDECIDED),
        ("higher", 0.01, -0.02, 0.049, 0.9, EXCLUDED),
        ("higher", 0.01, -0.02, 0.051, 0.9, UNDECIDED),
        ("lower", -0.1, -0.15, -0.05, 0.01, SHOWN),
        ("lower", 0.0, -0.049, 0.2, 0.9, EXCLUDED),
        ("lower", 0.0, -0.051, 0.2, 0.9, UNDECIDED),
        ("higher", 0.1, None, None, 1.0, UNDECIDED),
    ],
)
def test_a_verdict_follows_the_rule(direction, effect, low, high, p_holm, expected):
    assert verdict(direction, effect, low, high, p_holm, 0.05, 0.05) == expected


def test_a_row_that_is_not_unique_is_refused(results):
    table = pd.read_csv(results / "e" / "table.csv", dtype={"run_id": str})
    again = table[table["method"] == "negtome"].assign(alpha=3)
    pd.concat([table, again]).to_csv(results / "e" / "table.csv", index=False)
    with pytest.raises(ValueError, match="expected one row of negtome on gains in the table of e, got 2"):
        judge(hypotheses("gains"), 0.05, results, BOOTSTRAP)


def test_a_paired_test_changes_its_sign_with_its_sides(results):
    groups = pd.DataFrame(
        {"run_id": run, "metric": "d", "prompt_id": f"p{k}", "group_seed": "000000", "category": f"c{k}",
         "n_images": 4, "value": float(k * scale)}
        for run, scale in (("a", 2), ("b", 1)) for k in range(6)
    )  # fmt: skip
    one, other = (paired_test(groups, *runs, "d", **BOOTSTRAP) for runs in (("a", "b"), ("b", "a")))
    assert one.difference == -other.difference == 2.5 and one.p_value == other.p_value
    assert one.win_rate == 1 - other.win_rate == 1 - 0.5 / 6 and one.n_groups == 6


def test_the_projects_hypotheses_are_seven_with_rules_that_are_known():
    declared = OmegaConf.load(FILE).hypotheses
    assert len(declared) == 7
    assert {one.direction for one in declared} == {"higher", "lower"} and {one.margin for one in declared} == {0.05}
