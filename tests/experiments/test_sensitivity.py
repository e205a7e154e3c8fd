"""The table of how guards follow edits of the policy: numbers are those of the outcomes, the page is the CSV's."""

import sys

import pandas as pd
import pytest
import yaml

from experiments.safety import sensitivity
from experiments.tables.columns import TEXT
from negtome.guard import Keyword, read_policy
from negtome.guard.testing import run_edits, run_examples

GUARD = """
from negtome.guard import Keyword

class Partial(Keyword):
    name, id = "partial", "partial-1"

    def reply(self, policy, prompt):
        return super().reply(policy, prompt.replace("asset 0", "nothing"))
"""


@pytest.fixture
def file(tmp_path):
    clauses = [
        {
            "id": f"C{number}",
            "asset": f"asset {number}",
            "description": f"it has {number} legs",
            "action": "steer",
            "examples": {"violates": [f"draw asset {number}"], "allowed": [f"draw {number} legs"]},
        }
        for number in range(5)
    ]
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "clauses": clauses}))
    return path


@pytest.fixture
def made(file, tmp_path, monkeypatch):
    """Make the table of guards of one's own; returns its rows and its page."""
    (tmp_path / "partial_guard.py").write_text(GUARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sensitivity, "current_commit", lambda: "0" * 40)

    def make(*guards):
        options = [part for guard in guards for part in ("--guard", guard)]
        sensitivity.main(["--policy", str(file), "--out", str(tmp_path / "out"), *options])
        frame = pd.read_csv(tmp_path / "out" / "policy_sensitivity" / "table.csv", dtype=TEXT)
        return frame, (tmp_path / "out" / "policy_sensitivity" / "table.md").read_text()

    yield make
    sys.modules.pop("partial_guard", None)


def test_numbers_are_counted_and_their_intervals_lie_around_them(made, file):
    frame, page = made("partial_guard:Partial")
    assert list(frame.columns) == sensitivity.COLUMNS and set(frame["guard_id"]) == {"partial-1"}
    rows = frame.set_index(["edit", "must"])
    example, flip = rows.loc[("example", "be right")], rows.loc[("flip", "change")]
    assert (example["value"], example["n_right"], example["n_requests"], example["n_clauses"]) == (0.9, 9, 10, 5)
    assert (flip["value"], flip["n_right"], flip["n_requests"], flip["n_invalid"]) == (0.8, 4, 5, 0)
    assert 0 <= flip["ci_low"] < 0.8 < flip["ci_high"] <= 1
    assert rows.loc[("flip", "stay"), "value"] == 1 and pd.isna(rows.loc[("flip", "stay"), "ci_low"])
    assert set(frame["policy_sha256"]) == {read_policy(file).sha256}
    assert "; 9 of 10 " in page and page.count("\n| partial ") == len({*frame["edit"]})


def test_rows_of_other_guards_stay_and_the_page_is_what_the_csv_renders_to(made):
    first, _ = made("partial_guard:Partial")
    made("negtome.guard:Keyword")
    frame, page = made("negtome.guard:Keyword", "partial_guard:Partial")
    assert list(frame["guard"].unique()) == ["partial", "keyword"]
    pd.testing.assert_frame_equal(frame[frame["guard"] == "partial"].reset_index(drop=True), first)
    assert page == sensitivity.rendered(frame)


def test_without_names_all_of_the_projects_guards_are_asked_and_the_control(monkeypatch, tmp_path):
    monkeypatch.setattr(sensitivity.guards, "nearest", lambda: "nearest")
    monkeypatch.setattr(sensitivity, "MINI", str(tmp_path / "none"))
    control, keyword, nearest = sensitivity.own_guards()
    assert (control.name, keyword.name, nearest) == ("always allow", "keyword", "nearest")


def test_the_control_passes_what_stays_alone(file):
    policy = read_policy(file)
    control = sensitivity.Always("allow")
    rows = {(row["edit"], row["must"]): row["value"] for row in sensitivity.rows_of(policy, control)}
    assert {must: value for (_, must), value in rows.items()} == {"be right": 0.5, "change": 0.0, "stay": 1.0}
    assert len(run_examples(policy, Keyword())) == 10 and all(one.right for one in run_edits(policy, Keyword()))
