"""Run all stages of an experiment: images, scores, table, figures, comparison with the published values.

    python -m experiments reproduce experiment=diversity
    python -m experiments reproduce experiment=diversity model=sdxl --dry-run
    python -m experiments reproduce experiment=sweep model=sdxl launcher=slurm

The third submits Slurm jobs for the images and scores, and returns. When the jobs are done, the same command without
launcher does the rest on any machine: it uses complete runs, whatever device made them. `device=cuda` makes them anew.

`make reproduce-diversity` calls it. The stages are generate, evaluate, tabulate, plot and check, with one plan and in
one process. Results that exist are not made again. Everything that would stop a later stage is listed before the first
image.

--dry-run prints downloads, disk, memory, time and what is missing, and writes nothing. Exit code 0; wrong settings: 2.
An experiment with `quick_every` compares a few of its published groups one by one; full=true makes all.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import gc
import importlib

from experiments import PROJECT, check, generate, quick, start_log
from experiments.plan import Plan

STAGES = ("generate", "evaluate", "tabulate", "plot", "check")


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    start_log()
    gc.freeze()  # what is imported stays, and the collector need not go over it while a plan is composed
    overrides = [text for text in argv if text != generate.DRY_RUN]
    if not any(text.startswith(("experiment=", "+experiment=", "plan=")) for text in overrides):
        # Without one it would make a baseline for an hour.
        names = ", ".join(sorted(file.stem for file in (PROJECT / "conf" / "experiment").glob("*.yaml")))
        raise ValueError(f"expected an experiment, such as experiment=diversity, got none: there are {names}")
    plan = Plan.of(overrides)
    stages = [importlib.import_module(f"experiments.{name}") for name in STAGES]  # all before the first begins
    check.files(plan)  # no table is made in the place of the published one
    part = quick.quick_plan(plan)
    if generate.DRY_RUN in argv:
        return generate.main(argv, part or plan)
    if plan.launcher:
        return generate.launch(["generate", "evaluate"], part or plan, tables=True)
    if part is not None:
        return quick.reproduce(argv, part, plan)
    for stage in stages:
        if code := stage.main(argv, plan):
            return code
    return 0
