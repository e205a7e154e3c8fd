"""Paired tests of one run against another of the same table, from the published values of their groups."""

from typing import Any, NamedTuple

import pandas as pd

from eval.intervals import bootstrap_interval, paired_differences
from eval.significance import bootstrap_t_p, win_rate
from experiments.tables.groups import values_of_run


class PairedTest(NamedTuple):
    """A difference between two runs with its 95 % interval and p-value; None where there are too few clusters."""

    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    win_rate: float
    n_groups: int


def paired_test(
    groups: pd.DataFrame, run: str, reference: str, metric: str, higher_is_better: bool = True, **bootstrap: Any
) -> PairedTest:
    """Test the first run against the second, over the same groups.

    Args:
        groups: of `experiments.tables.groups.read_groups`.
        run, reference: ids of the runs; the difference is the first's value minus the second's.
        metric: name of a metric of groups.
        higher_is_better: direction of the metric, for the win rate.
        bootstrap: see `eval.intervals.bootstrap_interval`.

    Raises:
        ValueError: a run has no values of the metric, or the runs have different groups.
    """
    values, others = (values_of_run(groups, name, metric) for name in (run, reference))
    pairs = paired_differences(values, others)
    difference, low, high = bootstrap_interval(pairs, **bootstrap)
    resampling = {key: bootstrap[key] for key in ("n_resamples", "seed", "cluster") if key in bootstrap}
    p_value = bootstrap_t_p(pairs, **resampling)
    wins = win_rate(pairs, higher_is_better, resampling.get("cluster", "category"))
    return PairedTest(difference, low, high, p_value, wins, len(pairs))
