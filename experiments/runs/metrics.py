"""The metrics of a configuration: which of them can be measured, and which a table tests."""

import fnmatch
from collections.abc import Container, Iterable
from pathlib import Path

from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf

from eval.encoders import Network, Scorer
from eval.intervals import SUBSETS
from eval.metric import Metric, SetMetric
from experiments.configs import build
from experiments.plan import RunSpec
from experiments.runs.store import Run
from experiments.safety.own_policy import is_generated
from experiments.tables import columns

#: Images that a metric may need and a model's configuration may lack, and how to give them.
NEEDS = {
    "reference": "they compare with real images; give a folder, one subfolder a category or all images in one: "
    "model.reference_images=FOLDER",
    "references": "they compare with protected assets; give a folder, one subfolder a character: "
    "model.copyright.scoring=FOLDER",
    "held_out": "their threshold is calibrated on pictures that show no protected asset; give a folder of them, one "
    "subfolder a kind: model.copyright.held_out=FOLDER",
}
NO_FLOORS = (
    "the model has no floors of an answer; set them by python -m experiments floors experiment=safety_floors model=NAME"
)
NO_PROMPTS = "they are of kinds of requests that the policy gives none of"
OF_RUNS = "they compare a run with its baseline, and a folder of images is no run"
OF_KIND = "their networks are for photographs, and a mini model draws emoji; give model=sdxl or another real checkpoint"


def left_out(cfg: DictConfig) -> dict[str, str]:
    """Return the configured metrics that are not for the model, or whose images for comparison are missing.

    Returns:
        The reason for each.
    """
    reasons = {}
    generated = cfg.images is None and is_generated(cfg)
    ids = {group.prompt_id for group in build(cfg.prompts).groups()} if generated else set()
    for name, spec in cfg.metric.items():
        lacking = [need for need in NEEDS if need in spec and spec[need] is None]
        if spec.get("kind", cfg.model.kind) != cfg.model.kind:
            reasons[name] = OF_KIND
        elif lacking:
            reasons[name] = NEEDS[lacking[0]]
        elif generated and spec.get("only") and not any(fnmatch.filter(ids, pattern) for pattern in spec.only):
            reasons[name] = NO_PROMPTS
        elif generated and "floors" in spec and not Path(spec.floors).is_file():
            reasons[name] = NO_FLOORS
        elif "baseline" in spec and cfg.images is not None:
            reasons[name] = OF_RUNS
    return reasons


def left_out_lines(configs: Iterable[DictConfig]) -> list[str]:
    """Return a line for each model and reason with the metrics that are left out."""
    names: dict[tuple[str, str], dict[str, None]] = {}
    for cfg in configs:
        for name, reason in left_out(cfg).items():
            names.setdefault((cfg.model.name, reason), {})[name] = None
    return [f"model={model}: left out: {', '.join(metrics)}: {reason}" for (model, reason), metrics in names.items()]


def measured(cfg: DictConfig) -> list[str]:
    """Return the names of the configured metrics that are not `left_out`."""
    absent = left_out(cfg)
    return [name for name in cfg.metric if name not in absent]


def metric_of_run(spec: RunSpec, name: str) -> Metric:
    """Build a configured metric of a run, which may compare the run with its baseline; errors as of `build_metric`."""
    compares = "baseline" in spec.cfg.metric[name]
    return build_metric(spec.cfg, name, str(Run.of(spec.baseline).folder) if compares else None)


def build_metric(cfg: DictConfig, name: str, baseline: str | None = None) -> Metric:
    """Build a configured metric, named as in the configuration.

    Args:
        baseline: folder of the baseline run, for a metric that compares with it.

    Raises:
        FileNotFoundError, ValueError: an argument is wrong.
    """
    spec = cfg.metric[name]
    settings = OmegaConf.to_container(spec, resolve=True) | {"name": name}
    only = settings.pop("only", None)
    settings.pop("kind", None)
    if isinstance(only, str):
        raise ValueError(f"metric.{name}.only must be a list of patterns, got {only!r}: give [{only}]")
    if "baseline" in spec:
        settings["baseline"] = baseline
    metric = build(settings)
    metric.only = None if only is None else tuple(only)
    if isinstance(metric, SetMetric):  # which prepares its intervals while it is measured
        metric.cluster = cfg.bootstrap.cluster
    return metric


def place_of_weights(cfg: DictConfig, name: str, scorer: Scorer) -> str:
    """Return the override for another place of the weights of a metric's scorer; empty if there is none."""
    places = [part.PLACE for part in scorer.parts() if isinstance(part, Network) and part.PLACE]
    if not places:
        return ""
    key, node = f"metric.{name}", OmegaConf.to_container(cfg.metric[name], resolve=False)
    while isinstance(node, dict) and "encoder" in node:  # an averaged encoder has the one with the weights inside
        key, node = f"{key}.encoder", node["encoder"]
    if isinstance(node, str):
        key = node.removeprefix("${").removesuffix("}")
    place = places[0]  # of the scorer itself, if it has weights
    return f"{key}.{place}={'FILE' if place in ('file', 'weights') else 'FOLDER'}"


def primary_metrics(cfg: DictConfig) -> dict[str, str]:
    """Return the metrics that an experiment tests, each with its role.

    Raises:
        ValueError: a role lacks a metric, or a metric is not configured or has two roles.
    """
    primary = {role: cfg.primary[role] for role in columns.ROLES if cfg.primary[role] is not None}
    named = {role: [names] if isinstance(names, str) else list(names) for role, names in primary.items()}
    claims = [name for role in named if role != "quality" for name in named[role]]
    if not claims or not named.get("quality"):
        raise ValueError(
            f"expected primary.quality and one of {', '.join(columns.ROLES[:-1])} to be given, got {named}"
        )
    absent = left_out(cfg)
    for role, names in named.items():
        # Without real images, realism is left out, and quality is judged by CLIPScore alone.
        named[role] = [name for name in names if name not in absent] or names
    for role, name in ((role, name) for role, names in named.items() for name in names):
        if name not in cfg.metric or absent.get(name) in (*NEEDS.values(), NO_PROMPTS, OF_KIND):
            raise ValueError(
                f"expected primary.{role} to be one of the metrics measured, got {name!r}: choose among "
                f"{', '.join(sorted(measured(cfg)))}, or a suite (metric=...) that has it"
            )
    if len({*claims, *named["quality"]}) < len(claims) + len(named["quality"]):
        raise ValueError(f"expected different primary metrics, got {named}; see `primary`")
    return {name: role for role, names in named.items() for name in names}


def check_table(cfg: DictConfig) -> None:
    """Check that a table can be made with a configuration, before its images are generated.

    Raises:
        ValueError: the primary metrics cannot be tested, or the intervals do not have the level that tables state.
    """
    if (level := cfg.bootstrap.level) != 0.95:
        raise ValueError(f"tables and figures say 95 % of their intervals: expected bootstrap.level=0.95, got {level}")
    for name, role in primary_metrics(cfg).items():
        metric = get_class(cfg.metric[name]._target_)
        if metric.aggregate == SUBSETS:
            raise ValueError(
                f"expected primary metrics that can be tested, got {name}, a number of the whole set of images: there "
                "are no values of groups to resample; choose a metric of groups, as clip_score, in `primary`"
            )
        if role == "quality" and metric.higher_is_better is None:
            raise ValueError(f"expected a metric with a better direction for primary.quality, got {name}")


def tested_among(cfg: DictConfig, names: Iterable[str]) -> list[str]:
    """Return the primary metrics among `names`."""
    values = [cfg.primary[role] for role in columns.ROLES]
    primary = {name for value in values for name in (value if isinstance(value, ListConfig) else [value])}
    return [name for name in names if name in primary]


def primary_without(cfg: DictConfig, names: Iterable[str], doubtful: Container[str]) -> list[str] | None:
    """Return overrides of `primary` that replace some metrics, or None if there is no replacement.

    A replacement has the same class, such as a distance by another encoder for a distance.

    Args:
        names: the metrics to replace.
        doubtful: metrics that are replacements only if there is no other one.
    """
    absent = set(names)
    overrides = []
    for role in (role for role in columns.ROLES if cfg.primary[role] is not None):
        value = cfg.primary[role]
        tested = list(value) if isinstance(value, ListConfig) else [value]
        if not absent.intersection(tested):
            continue
        kept = [name for name in tested if name not in absent and name in measured(cfg)]
        kinds = {cfg.metric[name]._target_ for name in tested if name in cfg.metric}
        others = [name for name in measured(cfg) if name not in absent and cfg.metric[name]._target_ in kinds]
        others.sort(key=lambda name: name in doubtful)
        if not (chosen := kept or others[:1]):
            return None
        overrides.append(f"primary.{role}={chosen[0] if len(chosen) == 1 else '[' + ','.join(chosen) + ']'}")
    return overrides
