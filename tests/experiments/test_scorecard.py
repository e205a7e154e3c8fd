"""The scorecard: requests counted by how they ended, and the rates of every guard and stage where they belong."""

import hashlib
import itertools
from types import SimpleNamespace

import pandas as pd
import pytest
from plans import plan_of

from eval.requests import Floors
from eval.significance import holm
from experiments import PROJECT
from experiments.runs.metrics import left_out_lines
from experiments.safety import scorecard


@pytest.fixture(scope="module")
def plan():
    return plan_of(["experiment=safety", "guard=keyword", "method.layers=steer"], "guarded")


def record(action, status=None, **stats):
    stats = {"action": action, "decide_seconds": 0.5, "draw_seconds": 1.0, **stats}
    return {"stats": stats} | ({"withheld": {"status": status}} if status else {})


def values(metric, run_id="0" * 12, **by_group):
    """Rows of groups.csv.gz of one run: `values("answered", **{"direct-a/000010": 1.0})`; categories are the ids."""
    return [
        {"run_id": run_id, "metric": metric, "category": group.partition("/")[0], "prompt_id": group.rpartition("/")[0],
         "group_seed": group.rpartition("/")[2], "n_images": 1, "value": value}
        for group, value in by_group.items()
    ]  # fmt: skip


COLUMNS = ["run_id", "metric", "category", "prompt_id", "group_seed", "n_images", "value"]


@pytest.fixture
def counted(plan, monkeypatch):
    """The outcomes of the keyword guard by kind of request: `counted(direct=[record(...)], ...)`.

    Every shown image reaches the floors, and no steered one does.
    """

    def count(**ends):
        records = {}
        for kind, of_kind in itertools.groupby(scorecard.build(plan.cfg.prompts).groups(), lambda group: group.kind):
            records |= {group.id: ends[kind].pop(0) for group in of_kind if ends.get(kind)}
        monkeypatch.setattr(scorecard.Run, "of", lambda spec: SimpleNamespace(id="0" * 12, records=lambda: records))
        reached = {group: float(record["stats"]["action"] == "allow" and "withheld" not in record)
                   for group, record in records.items()}  # fmt: skip
        groups = pd.DataFrame(values("answered_protected", **reached), columns=COLUMNS)
        return {row["asked"]: row for row in scorecard.outcomes(plan, groups)}

    return count


def test_requests_are_counted_by_how_they_ended(counted):
    rows = counted(
        direct=[record("steer"), record("refuse", "refused"), record("escalate", "escalated"), record("allow")],
        injected=[record("invalid", "escalated"), record("steer", "blocked", check_seconds=0.25),
                  record("allow", "escalated", check=[0.9])],
        benign=[record("allow"), record("allow", "blocked")],
        parody=[record("allow"), record("allow", "escalated", check=[0.9]), record("escalate", "escalated")],
    )  # fmt: skip
    assert {rows["protected"][end] for end in scorecard.ENDS} == {1} and rows["protected"]["n"] == 7
    assert rows["protected"]["check_seconds"] == round(0.25 / 7, 4)
    assert rows["protected"]["answered"] == 1 and rows["protected"]["steered_answered"] == 0
    ends = {name: rows["allowed"][name] for name in scorecard.ENDS if rows["allowed"][name]}
    assert ends == {"shown": 2, "blocked": 1, "escalated": 1, "escalated_by_check": 1} and rows["allowed"]["n"] == 5
    assert rows["allowed"]["answered"] == 2
    assert {row["guard"] for row in rows.values()} == {"keyword"} and rows["allowed"]["layers"] == "steer"


SYSTEMS = (
    ("none", None, None, 0.25, 1.0, 0.9),
    ("guarded", "keyword", "decide", 0.5, 0.75, 0.7),
    ("guarded", "keyword", "check", 0.875, 0.625, 0.5),
    ("guarded", "nearest", "check", 0.75, 0.5, 0.52),
    ("guarded_negtome", "keyword", "check", 0.625, 0.5, 0.25),
    ("guarded", "always refuse", "decide", 1.0, 0.0, 0.0),
    ("guarded", "always refuse", "check", 1.0, 0.0, 0.0),
)


def run_of(method, guard, layers):
    return hashlib.sha256(f"{method}{guard}{layers}".encode()).hexdigest()[:12]


@pytest.fixture(scope="module")
def frame():
    """A table of systems by hand."""
    rows = []
    for method, guard, layers, safe, returned, answered in SYSTEMS:
        for metric, value, base in (
            ("not_unsafe", safe, 0.25), ("not_unsafe_direct", safe, safe), ("not_overrefuse", returned, 1.0),
            ("not_overrefuse_benign", returned, returned), ("answered", answered, 0.9),
            ("answered_protected", answered, 0.9), ("clip_score_allowed", 50.0, 50.0),
        ):  # fmt: skip
            numbers = {"value": value, "ci_low": value - 0.125, "ci_high": value + 0.125}
            if method != "none":
                numbers |= {"difference": value - base, "difference_low": -0.5, "difference_high": 0.5}
            if metric == "clip_score_allowed" and guard == "always refuse":
                numbers = dict.fromkeys(numbers)
            rows.append({"experiment": "safety", "model": "mini-sdxl", "method": method, "guard": guard,
                         "layers": layers, "metric": metric, "n_units": 8, "n_groups": 8,
                         "run_id": run_of(method, guard, layers), **numbers})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def groups():
    """The values of eight concepts, of which the first ones fail, by system and metric."""
    rows = []
    for method, guard, layers, *shares in SYSTEMS:
        for metric, share in zip(scorecard.COMPARED, shares, strict=True):
            by_group = {f"c{number}/000010": float(number >= 8 - round(8 * share)) for number in range(8)}
            rows += values(metric, run_of(method, guard, layers), **by_group)
    return pd.DataFrame(rows, columns=COLUMNS)


FLOORS = {"experiment": "safety", "model": "mini-sdxl", "clip_score": 41.5, "realism": 0.375, "quantile": 0.05,
          "n_images": 132, "source": "0123456789ab"}  # fmt: skip


def cells_of(page):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]


def test_every_rate_stands_in_its_row(counted, frame, groups):
    counts = pd.DataFrame(counted(direct=[record("allow")], benign=[record("allow")]).values())
    compared = pd.DataFrame(scorecard.comparisons(frame, groups, n_resamples=200))
    page = scorecard.render(frame, counts, groups, compared, pd.DataFrame([FLOORS]))
    lines = cells_of(page)
    assert lines[0] == ["guard", "layers", "steering", "not unsafe", "not overrefuse", "answered", "clip score allowed"]
    assert lines[2][:4] == ["no guard", "", "", "0.250 [0.125, 0.375]"]
    keyword = "0.500 [0.375, 0.625]; +0.250 [-0.500, +0.500]"
    assert lines[3][:4] == ["keyword", "decide", "", keyword] and lines[3][4].startswith("0.750 [0.625, 0.875]; -0.250")
    assert lines[3][5].startswith("0.700"), "what was returned and what answers are two numbers"
    assert lines[4][:3] == ["keyword", "check", "both"] and lines[6][:3] == ["keyword", "check", "NegToMe"]
    assert lines[7][:2] == ["always refuse", "decide"] and lines[7][6] == ""  # without images there is no score
    assert sum("not unsafe direct" in cell for line in lines for cell in line) == 1
    assert "CLIPScore 41.50, realism 0.375" in page and "0123456789ab" in page
    assert ["no guard", "", "", "2 of 8 [0.03, 0.65]"] in lines and [
        "always refuse",
        "check",
        "both",
        "8 of 8 [0.63, 1.00]",
    ] in lines


def test_guards_are_tested_against_each_other_where_they_differ_in_one_thing(frame, groups):
    tests = scorecard.comparisons(frame, groups, n_resamples=500)
    pairs = {(test["system"], test["reference"]) for test in tests}
    keyword, nearest = "keyword, steered by both", "nearest, steered by both"
    assert pairs == {(nearest, keyword), ("keyword, steered by NegToMe", keyword)}, "no stage, and no control"
    assert len(tests) == 2 * len(scorecard.COMPARED)
    test = next(test for test in tests if test["metric"] == "not_unsafe" and test["system"] == nearest)
    assert test["difference"] == pytest.approx(0.75 - 0.875) and test["n_groups"] == 8
    adjusted = [test["p_holm"] for test in tests if test["p_value"] is not None]
    assert adjusted == holm([test["p_value"] for test in tests if test["p_value"] is not None])
    equal = next(test for test in tests if test["metric"] == "answered" and test["system"] == nearest)
    assert equal["difference"] == 0


def test_the_figure_has_a_path_for_each_guard_and_what_answers_nothing_stands_apart(frame):
    apart, axis = scorecard.tradeoff(frame, "mini-sdxl").axes
    paths = {line.get_label(): line.get_xydata().tolist() for line in (*apart.lines, *axis.lines)}
    assert paths["keyword"] == [[0.7, 0.5], [0.5, 0.875]] and paths["no guard"] == [[0.9, 0.25]]
    assert [line.get_label() for line in apart.lines if line.get_label()[0] != "_"] == ["always refuse"]
    assert [name for name in paths if name in scorecard.LAYERS] == list(scorecard.LAYERS)


def test_requests_of_a_policy_are_answered_by_the_published_floors_of_the_model(tmp_path):
    overrides = ["experiment=own_policy", f"outputs={tmp_path}"]
    (floors,) = scorecard.write_floors(plan_of(overrides, "guarded")).to_dict("records")
    published = pd.read_csv(PROJECT / "results" / "safety" / "floors.csv").set_index("model").loc["mini-sdxl"]
    assert floors["clip_score"] == pytest.approx(published["clip_score"], rel=1e-4)
    assert floors["realism"] == pytest.approx(published["realism"], rel=1e-4)


@pytest.mark.slow
def test_requests_of_a_policy_have_no_answers_where_the_model_has_no_floors(tmp_path):
    generated = plan_of(["experiment=own_policy", "model=mini-flux", f"outputs={tmp_path}"], "guarded")
    floors = scorecard.write_floors(generated)
    assert floors.empty and list(floors.columns) == scorecard.FLOOR_COLUMNS
    assert not generated.result_file("floors.csv").exists()
    (line,) = [line for line in left_out_lines([generated.cfg]) if "floors" in line]
    assert line.startswith("model=mini-flux: left out: answered: the model has no floors of an answer")
    Floors(20.0, 0.3, 0.05, 9, "a run").write(tmp_path / "safety_floors" / "mini-flux.json")
    assert scorecard.write_floors(generated)["clip_score"].tolist() == [20.0]
