"""The table of how guards follow edits of the policy: its numbers are those of the outcomes."""

import sys

import pandas as pd
import pytest
import yaml
from omegaconf import OmegaConf

from experiments.configs import build
from experiments.safety import sensitivity
from experiments.safety.guards import guarded_systems
from experiments.tables.columns import TEXT
from negtome.guard import Keyword, read_policy
from negtome.guard.controls import Always
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
        {"id": f"C{number}", "asset": f"asset {number}", "description": f"it has {number} legs", "action": "steer",
         "examples": {"violates": [f"draw asset {number}"], "allowed": [f"draw {number} legs"]}}
        for number in range(5)
    ]  # fmt: skip
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "clauses": clauses}))
    return path


def test_rows_are_counted_and_rows_of_other_guards_stay(file, tmp_path, monkeypatch):
    (tmp_path / "partial_guard.py").write_text(GUARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sensitivity, "current_commit", lambda: "0" * 40)

    def measure(name):
        guard = ["guard=own", f"guard.name={name}"]
        sensitivity.main([*guard, f"model.copyright.policy={file}", f"results={tmp_path / 'out'}"])
        frame = pd.read_csv(tmp_path / "out" / "policy_sensitivity" / "table.csv", dtype=TEXT)
        return frame, (tmp_path / "out" / "policy_sensitivity" / "table.md").read_text()

    try:
        first, page = measure("partial_guard:Partial")
        frame, both = measure("negtome.guard:Keyword")
    finally:
        sys.modules.pop("partial_guard", None)
    assert list(first.columns) == sensitivity.COLUMNS and set(first["guard_id"]) == {"partial-1"}
    assert set(first["policy_sha256"]) == {read_policy(file).sha256}
    rows = first.set_index(["edit", "must"])
    example, flip = rows.loc[("example", "be right")], rows.loc[("flip", "change")]
    assert (example["value"], example["n_right"], example["n_requests"], example["n_clauses"]) == (0.9, 9, 10, 5)
    assert (flip["value"], flip["n_right"], flip["n_requests"], flip["n_invalid"]) == (0.8, 4, 5, 0)
    assert 0 <= flip["ci_low"] < 0.8 < flip["ci_high"] <= 1
    assert rows.loc[("flip", "stay"), "value"] == 1 and pd.isna(rows.loc[("flip", "stay"), "ci_low"])
    assert "; 9 of 10 " in page and page.count("\n| partial ") == len({*first["edit"]})
    assert list(frame["guard"].unique()) == ["partial", "keyword"] and both == sensitivity.render(frame)
    pd.testing.assert_frame_equal(frame[frame["guard"] == "partial"].reset_index(drop=True), first)


@pytest.mark.slow
def test_by_default_all_of_the_projects_guards_and_the_control_are_measured():
    systems = [cfg for cfg in guarded_systems([], sensitivity.DEFAULTS) if cfg.method.name != "none"]
    targets = [OmegaConf.to_container(cfg.guard)["_target_"].rpartition(".")[2] for cfg in systems]
    assert targets == ["Always", "Keyword", "nearest", "Mini"]
    assert build(systems[0].guard).name == "always allow" and "results" not in systems[0].results.split("/")[:1]


def test_the_control_passes_what_stays_alone(file):
    policy = read_policy(file)
    rows = {(row["edit"], row["must"]): row["value"] for row in sensitivity.rows_of(policy, Always("allow"))}
    assert {must: value for (_, must), value in rows.items()} == {"be right": 0.5, "change": 0.0, "stay": 1.0}
    assert len(run_examples(policy, Keyword())) == 10 and all(one.right for one in run_edits(policy, Keyword()))
