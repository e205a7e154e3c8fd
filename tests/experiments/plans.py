"""Plans of a part of an experiment, and of configurations that no command line stands for."""

import copy
import functools

from experiments.plan import Plan, RunSpec, complete_runs, plan_file
from experiments.runs.identity import config_digest


@functools.cache
def _composed(overrides):
    return Plan.make(overrides)


def plan_of(overrides, method=None):
    """Return the plan of a command line, composed once for all tests; with `method`, of that method's runs alone."""
    plan = copy.deepcopy(_composed(tuple(overrides)))
    complete = complete_runs(plan.file)
    for spec in plan.runs:
        spec.id, spec.baseline.id = complete.get(spec.settings), complete.get(spec.baseline.settings)
    return plan if method is None else Plan([spec for spec in plan.runs if spec.cfg.method.name == method])


def plan_from(*configs):
    """Return the plan of configurations, the first of which is the baseline of all; complete runs have their ids."""
    specs = []
    for cfg in configs:
        specs.append(RunSpec(cfg, digest := config_digest(cfg), complete_runs(plan_file(cfg)).get(digest)))
        specs[-1].baseline = specs[0]
    return Plan(specs)
