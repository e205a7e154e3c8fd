"""Reproduce a few of an experiment's published groups, and compare each with its published value.

`experiments.reproduce` does so for an experiment that declares `quick_every: N`, if all of its runs are published: it
makes every N-th group again. full=true makes all groups and the table.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from hydra.utils import get_object
from omegaconf import open_dict

from eval.intervals import SUBSETS, has_value, values_of
from experiments import evaluate, generate
from experiments.configs import flag
from experiments.plan import Plan, RunSpec, complete_runs
from experiments.runs.checkpoints import find_checkpoint
from experiments.runs.identity import code_digest, config_digest
from experiments.tables.columns import ROLES, TEXT
from experiments.tables.groups import GROUPS, read_groups, values_of_run
from experiments.tables.paths import PUBLISHED, TABLE, result_file
from experiments.tabulate import Score, read_scores

#: Deviation of a group's value that rounding may make, as a share of the metric's mean.
TOLERANCE = 0.01
#: Share of a metric's groups that must agree, save one group. On another make of CPU, rounding may turn the match of a
#: token or a detection near its threshold, and so change one group visibly: between an Intel Xeon and an AMD EPYC, one
#: of nine groups of mini-sdxl lost a detection, and one of seven deviated by 1.6 % in distance.
AGREEING = 0.9


class Comparison(NamedTuple):
    """The groups of a run and metric beside their published values.

    Attributes:
        n_agree: number of groups within the tolerance.
        deviations: by group id, |value - published| as a share of the mean of the published |values|; infinite for a
            group that is not published.
    """

    score: Score
    n_agree: int
    deviations: dict[str, float]

    @property
    def agrees(self) -> bool:
        n_groups = len(self.deviations)
        return self.n_agree >= min(AGREEING * n_groups, n_groups - 1) and self.n_agree > n_groups / 2


def published_runs(plan: Plan, results: str = PUBLISHED) -> dict[str, str]:
    """Return the ids of the published runs by the digests of a plan's settings; {} unless all its runs are published.

    A run is published if a table has its settings, weights and versions of metrics, of whatever machine.
    """
    table = result_file(results, plan.name, TABLE)
    if not (table.exists() and result_file(results, plan.name, GROUPS).exists()):
        return {}
    frame = pd.read_csv(table, dtype=TEXT)
    ids = dict(zip(frame["code"], frame["run_id"], strict=True))
    runs = {}
    for spec in plan.specs:
        try:
            weights = find_checkpoint(spec.cfg.model, fetch=False).fingerprint
        except (FileNotFoundError, ValueError):
            return {}
        versions = {get_object(metric._target_).version for metric in (spec.cfg.metric or {}).values()}
        runs_of_spec = {ids.get(code_digest(spec.settings, weights, version)) for version in versions}
        run = runs_of_spec.pop() if len(runs_of_spec) == 1 else None
        if run is None:
            return {}
        runs[spec.settings] = run
    return runs


def quick_plan(plan: Plan, results: str = PUBLISHED) -> Plan | None:
    """Return the plan of every `quick_every`-th group, of metrics with published groups; None if all are to be made.

    Its name is another, so that its scores never stand for those of the whole experiment.

    Raises:
        ValueError: `full` is neither true nor false, or `quick_every` is no whole number of at least 1.
    """
    every = plan.cfg.quick_every
    if every is None or flag(plan.cfg, "full") or not published_runs(plan, results):
        return None
    metrics = set(groups_of_metrics(plan, results)["metric"])
    specs: dict[RunSpec, RunSpec] = {}
    for spec in plan.specs:
        cfg = copy.deepcopy(spec.cfg)
        cfg.name = f"{plan.name}_quick"
        with open_dict(cfg):
            cfg.prompts.every = every
            for name in set(cfg.metric) - metrics:
                del cfg.metric[name]
        specs[spec] = RunSpec(cfg, config_digest(cfg))
        specs[spec].baseline = specs[spec.baseline]
    quick = Plan([specs[spec] for spec in plan.runs], plan.launcher)
    quick.add_ids(complete_runs(quick.file))
    return quick


def groups_of_metrics(plan: Plan, results: str = PUBLISHED) -> pd.DataFrame:
    """Return the published values of single groups; metrics of whole categories have none."""
    groups = read_groups(results, plan.name)
    return groups[groups["group_seed"].str.isdigit()]


def compare(quick: Plan, plan: Plan, results: str = PUBLISHED) -> Iterator[Comparison]:
    """Compare the scores of a quick plan with the published groups of the plan that it is a part of.

    Raises:
        FileNotFoundError: a run was not generated or not scored.
    """
    published = published_runs(plan, results)
    groups = dict(iter(groups_of_metrics(plan, results).groupby(["run_id", "metric"])))
    settings = {mine.settings: spec.settings for mine, spec in zip(quick.specs, plan.specs, strict=True)}
    for score in read_scores(quick):
        if has_value(score.document) and score.document["aggregate"] != SUBSETS:
            key = published[settings[score.spec.settings]], score.metric
            theirs = values_of_run(groups[key], *key) if key in groups else []
            mine = values_of(score.document["groups"], score.document["aggregate"])
            deviations = deviations_of(
                {value["group"]: value["value"] for value in mine},
                {value["group"]: value["value"] for value in theirs},
            )
            n_agree = sum(deviation <= TOLERANCE for deviation in deviations.values())
            yield Comparison(score, n_agree, deviations)


def deviations_of(mine: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Return |mine - theirs| of each group of `mine` as a share of the mean of |theirs|; see `Comparison`."""
    scale = float(np.mean(np.abs(list(theirs.values())))) if theirs else 0.0
    deviations = {}
    for group, value in mine.items():
        distance = abs(value - theirs[group]) if group in theirs else float("inf")
        deviations[group] = distance / scale if distance and scale else distance
    return deviations


def reproduce(argv: list[str], quick: Plan, plan: Plan) -> int:
    """Make the groups of a quick plan and compare them; return 1 if a metric of a run does not agree."""
    for stage in (generate, evaluate):
        if code := stage.main(argv, quick):
            return code
    comparisons = sorted(compare(quick, plan), key=lambda comparison: comparison.score.role not in ROLES)
    for score, n_agree, deviations in comparisons:
        worst = max(deviations, key=deviations.__getitem__)
        print(
            f"{score.spec.label}: {score.metric}: {n_agree} of {len(deviations)} groups agree, "
            f"largest deviation {100 * deviations[worst]:.2g} % of the mean ({worst})"
        )
    n_agree = sum(comparison.agrees for comparison in comparisons)
    every = plan.cfg.quick_every
    print(
        f"{plan.name}: {n_agree} of {len(comparisons)} numbers agree with the published ones group by group. This is "
        f"1 group in {every}; full=true makes all groups and the table (make reproduce-{plan.name} ARGS=full=true)."
    )
    return int(n_agree < len(comparisons))
