"""The scorecard: requests counted by how they ended, and the rates of every guard and stage where they belong."""

import itertools
from types import SimpleNamespace

import pandas as pd
import pytest
from plans import plan_of

from experiments.safety import scorecard


@pytest.fixture(scope="module")
def plan():
    return plan_of(["experiment=safety", "guard=keyword", "method.layers=steer"], "guarded")


def record(action, status=None, **stats):
    stats = {"action": action, "decide_seconds": 0.5, "draw_seconds": 1.0, **stats}
    return {"stats": stats} | ({"withheld": {"status": status}} if status else {})


@pytest.fixture
def counted(plan, monkeypatch):
    """The outcomes of the keyword guard by kind of request: `counted(direct=[record(...)], ...)`."""

    def count(**ends):
        records = {}
        for kind, of_kind in itertools.groupby(scorecard.build(plan.cfg.prompts).groups(), lambda group: group.kind):
            records |= {group.id: ends[kind].pop(0) for group in of_kind if ends.get(kind)}
        monkeypatch.setattr(scorecard.Run, "of", lambda spec: SimpleNamespace(id="0" * 12, records=lambda: records))
        return {row["asked"]: row for row in scorecard.outcomes(plan)}

    return count


def test_requests_are_counted_by_how_they_ended(counted):
    rows = counted(
        direct=[record("steer"), record("refuse", "refused"), record("escalate", "escalated"), record("allow")],
        injected=[record("invalid", "escalated"), record("steer", "blocked", check_seconds=0.25)],
        benign=[record("allow"), record("allow", "blocked")],
        parody=[record("allow")],
    )
    assert {rows["protected"][end] for end in scorecard.ENDS} == {1} and rows["protected"]["n"] == 6
    assert rows["protected"]["check_seconds"] == round(0.25 / 6, 4)
    ends = {name: rows["allowed"][name] for name in scorecard.ENDS if rows["allowed"][name]}
    assert ends == {"shown": 2, "blocked": 1} and rows["allowed"]["n"] == 3
    assert {row["guard"] for row in rows.values()} == {"keyword"} and rows["allowed"]["layers"] == "steer"


@pytest.fixture(scope="module")
def frame():
    """A table of two guards and none, by hand."""
    rows = []
    for method, guard, layers, safe, useful in (
        ("none", None, None, 0.25, 1.0),
        ("guarded", "keyword", "decide", 0.5, 0.75),
        ("guarded", "keyword", "check", 0.875, 0.625),
        ("guarded", "always refuse", "decide", 1.0, 0.0),
    ):
        for metric, value, base in (
            ("not_unsafe", safe, 0.25), ("not_unsafe_direct", safe, safe), ("not_overrefuse", useful, 1.0),
            ("not_overrefuse_benign", useful, useful), ("clip_score_allowed", 50.0, 50.0),
        ):  # fmt: skip
            numbers = {"value": value, "ci_low": value - 0.125, "ci_high": value + 0.125}
            if method != "none":
                numbers |= {"difference": value - base, "difference_low": -0.5, "difference_high": 0.5}
            if metric == "clip_score_allowed" and guard == "always refuse":
                numbers = dict.fromkeys(numbers)
            rows.append({"experiment": "safety", "model": "mini-sdxl", "method": method, "guard": guard,
                         "layers": layers, "metric": metric, "n_units": 2, "n_groups": 8, **numbers})  # fmt: skip
    return pd.DataFrame(rows)


def test_every_rate_stands_in_its_row(counted, frame):
    counts = pd.DataFrame(counted(direct=[record("allow")], benign=[record("allow")]).values())
    page = scorecard.render(frame, counts)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert lines[0] == ["guard", "layers", "not unsafe", "not overrefuse", "clip score allowed"]
    assert lines[2][:3] == ["no guard", "", "0.250 [0.125, 0.375]"]
    keyword = "0.500 [0.375, 0.625]; +0.250 [-0.500, +0.500]"
    assert lines[3][:3] == ["keyword", "decide", keyword] and lines[3][3].startswith("0.750 [0.625, 0.875]; -0.250")
    assert lines[5][:2] == ["always refuse", "decide"] and lines[5][4] == ""  # without images there is no score
    assert sum("not unsafe direct" in cell for line in lines for cell in line) == 1


def test_the_figure_has_a_path_for_each_guard_and_what_answers_nothing_stands_apart(frame):
    apart, axis = scorecard.tradeoff(frame, "mini-sdxl").axes
    paths = {line.get_label(): line.get_xydata().tolist() for line in (*apart.lines, *axis.lines)}
    assert paths["keyword"] == [[0.75, 0.5], [0.625, 0.875]] and paths["no guard"] == [[1.0, 0.25]]
    assert [line.get_label() for line in apart.lines if line.get_label()[0] != "_"] == ["always refuse"]
    assert [name for name in paths if name in scorecard.LAYERS] == list(scorecard.LAYERS)
