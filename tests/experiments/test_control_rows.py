"""Negative controls have a section of their own below the methods, and never rank with them."""

import pandas as pd
import pytest

from experiments.figures import figures_for
from experiments.runs import catalogue
from experiments.tables import pages, selection
from experiments.tables.columns import COLUMNS, correct_p_values

DISTANCE, KEPT = "pairwise_distance_aligned", ("clip_score", "realism_efflite0_40")


def rows(method, gain, losses=(0.0, 0.0), kept=(True, True), width=0.01):
    """Return the rows of a method's primary metrics; the baseline has no differences."""
    common = {"experiment": "e", "model": "mini-sdxl", "method": method, "run_id": method, "steps": 20}
    common |= {"n_units": 20, "n_groups": 40, "n_images": 160, "encoder": "x", "higher_is_better": True}
    entries = [(DISTANCE, "diversity", gain, None, None)]
    entries += [(name, "quality", -loss, 1.0, ok) for name, loss, ok in zip(KEPT, losses, kept, strict=True)]
    for metric, role, change, margin, ok in entries:
        row = common | {"metric": metric, "primary": role, "value": 1 + change, "margin": margin}
        if method != "none":
            row |= {"difference": change, "difference_low": change - width, "difference_high": change + width}
            row |= {"p_value": 0.01, "non_inferior": ok}
        yield row


def table(*of_methods):
    return pd.DataFrame([row for of_method in of_methods for row in of_method], columns=COLUMNS)


@pytest.fixture
def frame():
    """A table in which a control beats every method in the primary metric."""
    return table(rows("none", 0), rows("negtome", 0.1, (0.1, 0.1)), rows("control_mirrored", 0.5),
                 rows("control_blurred", 0.3, (0, 5), (True, False)))  # fmt: skip


def test_a_control_that_gains_most_is_neither_chosen_nor_on_the_front(frame):
    assert {"control_mirrored", "control_shifted", "control_blurred", "control_noisy"} == set(catalogue.controls())
    assert selection.select_run(frame, DISTANCE, KEPT[0], "mini-sdxl") == "negtome"
    assert selection.pareto_front(frame, DISTANCE, KEPT[0], "mini-sdxl") == ["none", "negtome"]
    page = pages.render_markdown(frame, None, pd.DataFrame())
    methods, controls = page.split("Negative controls", 1)
    assert "NegToMe" in methods and "mirrored" not in methods and "every second image mirrored" in controls
    assert figures_for(frame).keys() == figures_for(frame[~frame["method"].str.startswith("control")]).keys()


def test_controls_are_in_no_family_of_tests(frame):
    correct_p_values(frame)
    corrected = frame.set_index(["method", "metric"])["p_holm"]
    assert corrected["negtome", DISTANCE] == pytest.approx(0.03)  # of three tests
    assert corrected["control_mirrored"].isna().all()


@pytest.mark.parametrize(
    ("control", "holds"),
    [
        (rows("control_mirrored", 0.0), "yes"),
        (rows("control_mirrored", 0.0, width=float("nan")), "yes"),
        (rows("control_mirrored", 0.009, width=0.001), "no"),  # the interval excludes 0
        (rows("control_shifted", 0.011, width=0.1), "no"),  # more than a tenth of NegToMe's
        (rows("control_blurred", 0.5, (0, 5), (True, False)), "yes"),
        (rows("control_noisy", 0.0, (0, 0.1), (False, True)), "no"),  # realism does not see the noise
    ],
)
def test_a_control_is_judged_by_the_rule_of_the_protocol(control, holds):
    frame = table(rows("none", 0), rows("negtome", 0.1), list(control))
    assert pages.control_table(frame)["holds"].tolist() == [holds]


@pytest.mark.parametrize(("change", "holds"), [(0.0, "yes"), (0.02, "yes"), (-0.011, "no")])
def test_a_control_must_not_lower_a_detection_rate_either(change, holds):
    frame = table(rows("none", 0), rows("negtome_reference", -0.1), rows("control_shifted", change, width=0.1))
    tested = frame["metric"] == DISTANCE
    frame.loc[tested, ["primary", "higher_is_better"]] = ["resemblance", False]
    assert pages.control_table(frame)["holds"].tolist() == [holds]


def test_quality_is_kept_only_if_both_measures_are():
    for kept in ((True, True), (True, False), (False, True)):
        (finding,) = pages.findings(table(rows("none", 0), rows("negtome", 0.1, kept=kept)))
        assert ("quality kept" in finding) == all(kept)


def test_quality_is_not_kept_if_one_of_two_realism_scores_falls():
    frame = table(rows("none", 0), rows("negtome", 0.1))
    another = frame[frame["metric"].str.startswith("realism")].assign(metric="realism_direct", non_inferior=False)
    (finding,) = pages.findings(pd.concat([frame, another], ignore_index=True))
    assert "quality kept" not in finding


def at_steps(steps, of_methods):
    """Return rows of methods with this number of steps."""
    return [
        row | {"steps": steps, "run_id": f"{row['run_id']}{steps}"} for of_method in of_methods for row in of_method
    ]


def test_numbers_of_steps_are_kept_apart():
    """At 4 steps NegToMe gains so much that a shift passes; at 2 steps the same shift breaks the rule."""
    shift = {"width": 0.05}
    frame = table(
        at_steps(4, [rows("none", 0), rows("negtome", 0.5), rows("control_shifted", 0.03, **shift)]),
        at_steps(2, [rows("none", 0), rows("negtome", 0.1), rows("control_shifted", 0.03, **shift)]),
    )
    controls = pages.control_table(frame)
    assert controls["model"].tolist() == ["mini-sdxl, 4 steps", "mini-sdxl, 2 steps"]
    assert controls["holds"].tolist() == ["yes", "no"]
    findings = pages.findings(frame[frame["method"] != "control_shifted"])
    assert ["+0.50" in finding for finding in findings] == [True, False]
    assert [finding.split(": ")[0] for finding in findings] == [
        "- mini-sdxl, 4 steps, NegToMe", "- mini-sdxl, 2 steps, NegToMe"
    ]  # fmt: skip
    others = pages.other_table(frame.assign(primary=None))
    assert {"none", "negtome"} <= set(others) and set(others["model"]) == set(controls["model"])
    alone = pages.control_table(frame[frame["steps"] == 4])
    assert alone["model"].tolist() == ["mini-sdxl"], "one number of steps needs no name"
