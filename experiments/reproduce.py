"""All acts of an experiment, one after the other: images, scores, table, figures, comparison with the published values.

    python -m experiments.reproduce experiment=diversity
    python -m experiments.reproduce experiment=sweep launcher=joblib

`make reproduce-diversity` calls it. The acts are experiments.generate, evaluate, tabulate, plot and check, with the
same overrides, in one process that imports what they share once. What is there already is not made again.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import importlib
import logging

from experiments.configs import expand

ACTS = ("generate", "evaluate", "tabulate", "plot", "check")


def main(argv: list[str]) -> int:
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # of a figure it says what it did to every font
    configs = expand(argv, baselines=True)
    acts = [importlib.import_module(f"experiments.{name}") for name in ACTS]  # all before the first of them begins
    return [act.main(argv, configs) for act in acts][-1]
