"""A quick reproduction makes a part of the published groups, and compares each with its own value."""

import gzip
import io

import numpy as np
import pandas as pd
import pytest

from experiments import quick, tabulate
from experiments.evaluate import evaluate
from experiments.generate import generate
from experiments.prompts import CharacterPrompts, PromptSet
from experiments.tables.groups import GROUPS


@pytest.fixture
def published(scored_copy):
    """A published experiment, of which every third group is made again: its plan, and the folder of results."""
    plan, *_ = scored_copy
    tabulate.write_table(plan)
    for spec in plan.specs:
        spec.cfg.quick_every = 3
    return plan, plan.cfg.results


def made(plan, results):
    part = quick.quick_plan(plan, results)
    generate(part)
    evaluate(part)
    return part


def change_groups(results, plan, change):
    """Replace the published values of groups by those of `change(values)`."""
    path = plan.result_file(GROUPS)
    frame = pd.read_csv(io.BytesIO(gzip.decompress(path.read_bytes())), dtype={"group_seed": str})
    frame["value"] = change(frame["value"])
    path.write_bytes(gzip.compress(frame.to_csv(index=False).encode()))


def test_the_part_has_the_published_groups_and_their_values(published):
    plan, results = published
    part = made(plan, results)
    wanted = {f"{row.prompt_id}/{row.group_seed}" for row in quick.groups_of_metrics(plan, results).itertuples()}
    comparisons = list(quick.compare(part, plan, results))
    assert {comparison.score.metric for comparison in comparisons} == set(part.cfg.metric)
    for comparison in comparisons:
        assert comparison.agrees and set(comparison.deviations) < wanted
        assert len(comparison.deviations) == -(-len(wanted) // 3)
        assert max(comparison.deviations.values()) < 1e-6  # nine digits are published
    # Its scores stand in another plan, and the whole experiment's are as they were.
    assert part.file != plan.file and part.name != plan.name
    assert {spec.id for spec in part.specs}.isdisjoint({spec.id for spec in plan.specs})


def test_other_values_deviate(published):
    plan, results = published
    part = made(plan, results)
    change_groups(results, plan, lambda values: values * 1.05)
    assert not any(comparison.agrees for comparison in quick.compare(part, plan, results))


@pytest.mark.parametrize(
    ("deviations", "agrees"),
    [
        ([0.002] * 7, True),
        ([0.002] * 6 + [1.1], True),  # rounding turned one detection
        ([0.002] * 5 + [0.02] * 2, False),
        ([0.0] * 17 + [0.02] * 3, False),
        ([0.0, 0.02], False),
        ([0.02], False),
    ],
)
def test_one_group_may_deviate(deviations, agrees):
    by_group = {f"group/{index}": deviation for index, deviation in enumerate(deviations)}
    n_agree = sum(deviation <= quick.TOLERANCE for deviation in deviations)
    assert quick.Comparison(None, n_agree, by_group).agrees == agrees


@pytest.mark.parametrize("change", ["another setting", "no groups", "full", "no quick_every"])
def test_what_is_not_published_or_is_wanted_in_full_is_made_in_full(published, change):
    plan, results = published
    assert quick.quick_plan(plan, results) is not None
    if change == "another setting":
        plan.runs[-1].settings = "0" * 12
    elif change == "no groups":
        plan.result_file(GROUPS).unlink()
    for spec in plan.specs:
        spec.cfg.full = change == "full"
        spec.cfg.quick_every = None if change == "no quick_every" else 3
    assert quick.quick_plan(plan, results) is None


def test_a_deviation_is_a_share_of_the_mean():
    theirs = {"a": 0.1, "b": -0.3, "c": 0.0}
    mine = {"a": 0.1, "c": 0.01, "new": 1.0}
    deviations = quick.deviations_of(mine, theirs)
    assert deviations["a"] == 0 and deviations["new"] == np.inf
    assert deviations["c"] == pytest.approx(0.01 / (0.4 / 3))
    # Where all published values are 0, the difference itself counts.
    assert quick.deviations_of({"a": 0.02, "b": 0.0}, {"a": 0.0, "b": 0.0}) == {"a": 0.02, "b": 0.0}


@pytest.mark.parametrize("every", [1, 2, 5])
def test_every_so_many_groups_are_a_part_with_the_same_images(every):
    words = PromptSet("p", "test", ("a", "b", "c"), ("x", "y"), (0, 1), 2)
    characters = CharacterPrompts("c", "test", {"A": {"direct": ["p A"]}, "B": {"direct": ["p B"]}}, (3, 4, 5), 1)
    for whole in (words, characters):
        part = type(whole)(**{**vars(whole), "every": every}).groups()
        assert part == whole.groups()[::every]
        assert part[-1].image_seeds() == whole.groups()[every * (len(part) - 1)].image_seeds()
    with pytest.raises(ValueError, match=r"prompts\.every .* 0"):
        PromptSet("p", "test", ("a",), ("x",), (0,), 2, every=0)
