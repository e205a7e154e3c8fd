"""Plans of a part of an experiment, and of configurations that no command line stands for."""

from experiments.plan import Plan, RunSpec, complete_runs, plan_file
from experiments.runs.identity import config_digest


def plan_of(overrides, method=None):
    """Return the plan of a command line; with `method`, of that method's runs alone."""
    plan = Plan.make(overrides)
    return plan if method is None else Plan([spec for spec in plan.runs if spec.cfg.method.name == method])


def plan_from(*configs):
    """Return the plan of configurations, the first of which is the baseline of all; complete runs have their ids."""
    specs = []
    for cfg in configs:
        specs.append(RunSpec(cfg, digest := config_digest(cfg), complete_runs(plan_file(cfg)).get(digest)))
        specs[-1].baseline = specs[0]
    return Plan(specs)
