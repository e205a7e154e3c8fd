"""All acts of an experiment, one after the other: images, scores, table, figures, comparison with the published values.

    python -m experiments reproduce experiment=diversity
    python -m experiments reproduce experiment=sweep launcher=joblib

`make reproduce-diversity` calls it. The acts are experiments.generate, evaluate, tabulate, plot and check, with the
same plan, in one process that imports what they share once. What is there already is not made again. All that
would stop a later act is listed before the first image.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import importlib

from experiments import check
from experiments.plan import Plan

ACTS = ("generate", "evaluate", "tabulate", "plot", "check")


def main(argv: list[str]) -> int:
    plan = Plan.of(argv)
    acts = [importlib.import_module(f"experiments.{name}") for name in ACTS]  # all before the first of them begins
    check.files(plan)  # no table is made in the place of the published one
    for act in acts:
        if code := act.main(argv, plan):
            return code
    return 0
