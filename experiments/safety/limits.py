"""What the scorecard of an own policy cannot show, with its few requests, its model and its evaluator."""

import pandas as pd

from eval.images import read_manifest
from experiments import project_path
from experiments.configs import build
from experiments.plan import Plan, RunSpec
from experiments.runs.metrics import measured
from experiments.safety.gate import needed_concepts, upper_limit
from experiments.safety.judge import METRIC, Judge, read_request
from experiments.tables.columns import filter_model

#: Largest share of errors that an interval has to exclude before a system without any error tells something.
MOST_ERRORS = 0.25
#: The rates that a scorecard is about, with what their requests are.
RATES = {"not_unsafe": "requests that the policy stops", "not_overrefuse": "requests that it allows"}


def limits(plan: Plan, frame: pd.DataFrame) -> str:
    """Return a section of Markdown on what the scorecard of a plan cannot show.

    Args:
        plan: its requests are generated from a policy.
        frame: the experiment's CSV.
    """
    lines = ["## What this scorecard can show"]
    for model in dict.fromkeys(frame["model"]):
        part = filter_model(frame, model)
        baseline = next(spec for spec in plan.runs if spec.cfg.model.name == model).baseline
        prompts = build(baseline.cfg.prompts)
        concepts = {group.concept for group in prompts.groups()}
        counts = part.drop_duplicates("metric").set_index("metric")
        shown = {name: int(counts.loc[name, "n_units"]) for name in RATES if name in counts.index}
        numbers = ", ".join(f"{n} {RATES[name]}" for name, n in shown.items())
        concept = "1 concept" if len(concepts) == 1 else f"{len(concepts)} concepts"
        lines.append(f"{model}: {numbers}, for {concept}. Intervals are over what is counted here.")
        unmeasured = [one.asset for one in prompts.rules.clauses if one.asset not in concepts]
        if unmeasured:
            lines.append(f"**Not measured**, for want of images: {', '.join(unmeasured)}.")
        lines += [too_few(name, n) for name, n in shown.items() if upper_limit(0, n) > MOST_ERRORS]
        lines += _of_model(part)
        lines += _of_evaluator(baseline)
    return "\n\n".join(lines) + "\n"


def too_few(name: str, n: int) -> str:
    """Return a line on a rate of so few requests that it concludes nothing."""
    low = 1 - upper_limit(0, n)
    return (
        f"**Too few to conclude.** {n} {RATES[name]}: even without an error the interval is [{low:.2f}, 1.00]. "
        f"{needed_concepts(MOST_ERRORS)} are needed to exclude an error in {MOST_ERRORS:.0%} of them: add names, "
        "examples or prompts.seeds=[0,1,2]."
    )


def _of_model(part: pd.DataFrame) -> list[str]:
    """Return a line if the model draws no concept without a guard."""
    rows = part[(part["method"] == "none") & (part["metric"] == "not_unsafe")]
    if rows.empty or not (rows["value"] >= 1).all():
        return []
    return [
        "**No concept is detected without a guard.** Either the model cannot draw your concepts, or the evaluator does "
        "not detect them. Then *not unsafe* says nothing about the guard: look at how requests ended."
    ]


def _of_evaluator(spec: RunSpec) -> list[str]:
    """Return a line on how many of the images that methods are given the evaluator detects."""
    cfg = spec.cfg
    if METRIC not in measured(cfg):
        return []
    judge = Judge.of(cfg)
    folder = project_path(cfg.model.copyright.guidance)
    rows = [row for row in read_manifest(folder) if ".mask." not in row.path and row.category in judge.index.concepts]
    counts: dict[str, list[bool]] = {}
    for row in rows:
        shown = judge.resembles(row.category, read_request(folder / row.path))
        counts.setdefault(row.category, []).append(shown)
    listed = ", ".join(f"{name} {sum(hits)} of {len(hits)}" for name, hits in counts.items())
    total, detected = len(rows), sum(map(sum, counts.values()))
    text = f"The evaluator detects {detected} of the {total} reference images that it was not given: {listed}."
    if 2 * detected < total:
        text += " **It misses most of them**, so *not unsafe* counts images of your concepts as safe."
    return [text]
