"""Search a method's settings for the most diversity within a stated loss of quality, with Optuna.

    python -m experiments.search experiment=search
    python -m experiments.search experiment=search model=sdxl search.trials=100

Two objectives, the primary metrics of `primary`, and one constraint: quality may fall by `primary.quality_margin` of
the baseline's value. All settings that were tried make the experiment's table; those that no other one beats in both
metrics, with the one that the rule chooses marked, `<results>/<experiment>_front.csv`.

Interrupt it at will: the same command goes on where it stopped, and ends as if it had never been interrupted.

Start the command several times, on as many GPUs or machines with a shared disk, and the processes divide the groups of
each trial among them.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from eval.files import write_text
from eval.measure import read_document
from experiments import project_path
from experiments.choose import chosen_run, pareto_front
from experiments.configs import build, expand, first
from experiments.evaluate import evaluate
from experiments.generate import generate
from experiments.methods.method import Baseline
from experiments.runs import Run
from experiments.tables import SETTING
from experiments.tabulate import primary_metrics, write_table

if TYPE_CHECKING:
    import optuna

# There is no database of trials to that end. The sampler is seeded, a trial is an ordinary run folder, and what is
# there is not made again, so all earlier trials are asked for again in the same order and answered at once. With a
# database, a sampler that is started anew would draw other trials than one that went on. That, and that Hydra's plugin
# for Optuna needs a version below 3 whose database does not work with today's SQLAlchemy, is why Optuna is called
# directly.

log = logging.getLogger(__name__)


@dataclass
class Trials:
    """What was tried on one model.

    Attributes:
        baseline: the run without a method.
        tried: run id -> number of the trial, from 1, and configuration, in the order of the trials; a setting that was
            drawn twice stands once, with the first one's number.
    """

    baseline: DictConfig
    tried: dict[str, tuple[int, DictConfig]] = field(default_factory=dict)


def search(overrides: list[str]) -> pd.DataFrame:
    """Try `search.trials` settings of every model of `overrides`; write the table and the front.

    Args:
        overrides: as on the command line of `experiments.generate`; the experiment needs a `search`, see
            conf/experiment/search.yaml, and the methods `none` and one to be searched.

    Returns:
        The front, one row a setting: model, settings, both metrics' values and paired differences with intervals,
        `chosen`, `trial` (the first that drew it) and run id.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: the search is not configured as above, or its primary metrics can choose nothing.
    """
    configs = expand(overrides)
    common = configs[0]
    if "search" not in common:
        raise ValueError(
            f"expected an experiment with a `search`, got {common.name!r}: give experiment=search, or write one like it"
        )
    found = [_search_model(baseline, method) for baseline, method in _pairs(configs)]
    frame, _ = write_table([cfg for one in found for cfg in (one.baseline, *(cfg for _, cfg in one.tried.values()))])
    fronts = [_front(frame, trials) for trials in found]
    front = pd.concat(fronts, ignore_index=True)
    write_text(front_file(common), front.to_csv(index=False, float_format="%.6g"))
    return front


def front_file(cfg: DictConfig) -> Path:
    """Return where the front of a search is written."""
    return project_path(cfg.results) / f"{cfg.name}_front.csv"


def _pairs(configs: list[DictConfig]) -> list[tuple[DictConfig, DictConfig]]:
    """Return each model's configuration without and with a method."""
    pairs = []
    for model in dict.fromkeys(cfg.model.name for cfg in configs):
        mine = [cfg for cfg in configs if cfg.model.name == model]
        baselines = [cfg for cfg in mine if isinstance(build(cfg.method), Baseline)]
        methods = [cfg for cfg in mine if not isinstance(build(cfg.method), Baseline)]
        if (len(baselines), len(methods)) != (1, 1):
            raise ValueError(
                f"expected the methods none and one to be searched for {model}, got "
                f"{[cfg.method.name for cfg in mine]}: give method=none,negtome and no other sweep"
            )
        methods[0].method = OmegaConf.to_container(methods[0].method, resolve=True)  # for a range's end to be set alone
        _check_space(methods[0])
        pairs.append((baselines[0], methods[0]))
    return pairs


def _search_model(baseline: DictConfig, method: DictConfig) -> Trials:
    optuna = _optuna()
    trials = Trials(baseline)
    base = _measure(baseline)[1]
    up = {role: document["higher_is_better"] for role, document in base.items()}
    if None in up.values():
        raise ValueError(f"expected primary metrics of which more or less is better, got {primary_metrics(method)}")
    _check_margin(base["quality"])
    roles = [role for role in base if role != "quality"] + ["quality"]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["maximize" if up[role] else "minimize" for role in roles],
        sampler=optuna.samplers.TPESampler(seed=method.search.seed),
    )
    axes = method.search.space
    usual = {name: OmegaConf.select(method, axis.setting) for name, axis in axes.items()}
    # The model's own strengths first, where they may be drawn: the search then never ends below them.
    if all(_may_draw(axes[name], value) for name, value in usual.items()):
        study.enqueue_trial(usual)
    margin = method.primary.quality_margin * base["quality"]["value"]
    for number in range(1, method.search.trials + 1):
        trial = study.ask(_space(method))
        cfg = copy.deepcopy(method)
        for name, value in trial.params.items():
            OmegaConf.update(cfg, axes[name].setting, round(value, 10))  # 0.30000000000000004 is 0.3
        run, documents = _measure(cfg)
        trials.tried.setdefault(run.id, (number, cfg))
        values = {role: document["value"] for role, document in documents.items()}
        loss = (base["quality"]["value"] - values["quality"]) * (1 if up["quality"] else -1)
        trial.set_constraint("loss of quality", loss - margin)
        study.tell(trial, [values[role] for role in roles])
        drawn = ", ".join(f"{name} {value:g}" for name, value in trial.params.items())
        found = ", ".join(f"{role} {values[role]:.4g}" for role in roles)
        log.info("%s: trial %d of %d: %s: %s", method.model.name, number, method.search.trials, drawn, found)
    return trials


def _measure(cfg: DictConfig) -> tuple[Run, Mapping[str, dict[str, Any]]]:
    """Generate and score a run, as far as it is not; return it and the documents of the primary metrics by role."""
    run = Run(generate(cfg))
    documents = {document["metric"]: document for document in map(read_document, evaluate(cfg))}
    return run, {role: documents[name] for role, name in primary_metrics(cfg).items()}


def _space(cfg: DictConfig) -> dict[str, optuna.distributions.BaseDistribution]:
    """Return what may be drawn for each axis of `search.space`: whole numbers where its bounds are."""
    distributions = _optuna().distributions
    space = {}
    for name, axis in cfg.search.space.items():
        whole = all(isinstance(axis[bound], int) for bound in ("low", "high", "step"))
        kind = distributions.IntDistribution if whole else distributions.FloatDistribution
        space[name] = kind(axis.low, axis.high, step=axis.step)
    return space


def _check_space(cfg: DictConfig) -> None:
    """Refuse a space without axes, or an axis of a setting that does not exist or has no range."""
    if not cfg.search.space:
        raise ValueError("expected axes in search.space, got none: see conf/experiment/search.yaml")
    for name, axis in cfg.search.space.items():
        if axis.keys() != {"setting", "low", "high", "step"} or axis.low > axis.high or axis.step <= 0:
            raise ValueError(
                f"expected search.space.{name} to have a setting, low <= high and step > 0, got {axis}: correct it"
            )
        if not isinstance(OmegaConf.select(cfg, axis.setting), (int, float)):
            raise ValueError(
                f"expected search.space.{name}.setting to name a number of the configuration, got {axis.setting}: "
                "name it as on the command line, as method.alpha"
            )


def _check_margin(quality: dict[str, Any]) -> None:
    """Refuse a quality of which a share is no margin: the table then has none, and nothing could be chosen."""
    least, value = quality["bounds"][0], quality["value"]
    if least is None or least < 0 or value <= 0:
        raise ValueError(
            f"expected primary.quality to be a metric that is never below 0, and above it without a method, got "
            f"{quality['metric']}, {value:.4g} of at least {'-inf' if least is None else least}: a share of that is no "
            "margin, and nothing could be chosen; take another one, as clip_score"
        )


def _may_draw(axis: DictConfig, value: float) -> bool:
    steps = (value - axis.low) / axis.step
    return axis.low <= value <= axis.high and abs(steps - round(steps)) < 1e-6


def _front(frame: pd.DataFrame, trials: Trials) -> pd.DataFrame:
    """Return the settings of this search that no other one of it beats in both metrics."""
    cfg = trials.baseline
    metrics = primary_metrics(cfg)
    claim = next(name for role, name in metrics.items() if role != "quality")
    model = cfg.model.name
    mine = frame[(frame["model"] == model) & frame["run_id"].isin([Run.find(cfg).id, *trials.tried])]
    chosen = chosen_run(mine, claim, metrics["quality"], model)
    rows = []
    for run in pareto_front(mine, claim, metrics["quality"], model):
        measured = mine[mine["run_id"] == run].set_index("metric")
        row = {name: measured[name].iloc[0] for name in SETTING}
        row |= {"trial": trials.tried[run][0] if run in trials.tried else None, "chosen": run == chosen}
        for metric in (claim, metrics["quality"]):
            columns = ("value", "difference", "difference_low", "difference_high")
            row |= {f"{metric}_{name}".removesuffix("_value"): measured.loc[metric, name] for name in columns}
        rows.append(row | {"run_id": run})
    return pd.DataFrame(rows).astype({"trial": "Int64"})


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError('expected Optuna to be installed, got none: pip install -e ".[search]"') from error
    return optuna


def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    front = search(argv)
    print(front.dropna(axis="columns", how="all").to_markdown(index=False, floatfmt=".4g"))
    print(front_file(first(argv)))
