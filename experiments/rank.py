"""Rank the methods of an experiment at equal cost: gains, ranks and Pareto fronts, each with its uncertainty.

    python -m experiments rank experiment=peers
    python -m experiments rank experiment=peers_grid model=sdxl

It reads the table and the values of groups that tabulate wrote with the same overrides, and writes
`<results>/<experiment>/ranking.csv` and `.md`, a row a model and method. A method with several settings is a path
through them in the order of the sweep.
Resamples of the prompts' categories are the same for all methods.

A sweep over `hyperparameter` writes a value for each method to `<results>/<experiment>/chosen.yaml`, which `chosen`
names. It is the value with the largest gain within the allowed loss. It may lie between two settings, unless the method
has `metadata.hyperparameter.interpolate: false`: whole numbers, or what changes steps one by one. If no value
keeps within the loss, it is the weakest. With several measures of quality, the loss is the largest of theirs, each as a
share of what it is without a method.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from eval import fronts
from eval.files import write_text
from eval.intervals import FEWEST, GroupValue, clusters_of, limits, mean_of, paired_differences
from experiments import project_path
from experiments.plan import Plan, RunSpec
from experiments.runs import catalogue
from experiments.runs.metrics import primary_metrics
from experiments.tables.columns import direction, humanize, markdown, printed, put_rows, read_table
from experiments.tables.groups import read_groups, values_of_run
from experiments.tables.pages import printed_percent, title_of, with_interval
from experiments.tables.paths import chosen_file

#: The loss of quality, as a share of what it is without a method, that a method may cost: half of the margin within
#: which quality counts as kept. Fronts and hypervolumes reach to the whole of that.
LOSS, MOST = 0.025, 0.05
#: Resamples of which the front is looked for, which compares every setting with every other.
OF_FRONT = 1000
#: The row of all methods that merge tokens, alone or with another one.
WITH_NEGTOME = "(all with NegToMe)"
COLUMNS = [
    "experiment", "model", "method", "settings", "gain", "gain_low", "gain_high", "lost", "lost_low", "lost_high",
    "rank", "rank_low", "rank_high", "first_share", "within_share", "front_share", "added_share", "added_low",
    "added_high", "seconds", "claim", "quality", "loss", "n_units", "run_ids",
]  # fmt: skip
KEY = ["experiment", "model", "method"]


@dataclass(frozen=True)
class Paths:
    """Gains and losses of an experiment's methods on one model.

    Attributes:
        specs: of each method, in the order of the sweep.
        rows: rows of the table of a method's runs, in the same order: of the primary metric.
        gains, losses: of each method, [1 + R, S] of S settings: the estimate, then R resamples. Where a method's
            hyperparameter is interpolated and has a value that does nothing (`metadata.hyperparameter.nothing`), that
            is the first setting.
        primary_metric: by which methods gain.
        qualities: the metrics by which they lose.
        worth: of quality without a method; 1 if there are several metrics, whose losses are shares.
        n_units: clusters that are resampled.
        between: of each method, whether values between two settings may be chosen.
    """

    specs: dict[str, list[RunSpec]]
    rows: dict[str, list[pd.Series]]
    gains: dict[str, np.ndarray]
    losses: dict[str, np.ndarray]
    primary_metric: str
    qualities: list[str]
    worth: float
    n_units: int
    between: dict[str, bool]


def read_paths(specs: list[RunSpec]) -> Paths:
    """Read what an experiment's table and values of groups say of the runs on one model.

    Raises:
        FileNotFoundError: the table or the values of groups are missing, or a run is not in the table.
        ValueError: there is no method, or there are several baselines; a primary metric has no better direction or no
            values of groups; groups of a run are withheld: methods are ranked over the same groups; or values that
            cannot be interpolated are not declared so.
    """
    cfg, baseline = specs[0].cfg, specs[0].baseline
    if any(spec.baseline is not baseline for spec in specs):
        raise ValueError(
            f"expected runs of {cfg.model.name} that are compared with one baseline, to be ranked, got several: give "
            "one value of the model's settings, as model.call.num_inference_steps=4"
        )
    by_method: dict[str, list[RunSpec]] = {}
    for spec in specs:
        if spec is not spec.baseline and spec.cfg.method.name not in catalogue.controls():
            by_method.setdefault(spec.cfg.method.name, []).append(spec)
    if not by_method:
        raise ValueError(f"expected methods to be ranked on {cfg.model.name}, got none but the run without: name some")
    between = {method: _is_interpolated(settings) for method, settings in by_method.items()}
    table, groups = read_table(cfg.name, project_path(cfg.results)), read_groups(cfg.results, cfg.name)
    roles = primary_metrics(cfg)
    primary_metric = next(name for name, role in roles.items() if role != "quality")
    qualities = [name for name, role in roles.items() if role == "quality"]
    by_run = table[table["metric"] == primary_metric].drop_duplicates("run_id").set_index("run_id")
    rows = {method: [_row_of(by_run, spec) for spec in settings] for method, settings in by_method.items()}
    _row_of(by_run, baseline)

    def means(name: str) -> tuple[dict[str, np.ndarray], list[GroupValue]]:
        """Return the mean differences of each method, more being better, and the values of the baseline."""
        base, higher = values_of_run(groups, baseline.id, name), direction(table, name)
        if higher is None or not base:
            raise ValueError(f"expected primary metrics of groups with a better direction to rank by, got {name}")
        resampling, found = (cfg.bootstrap.n_resamples, cfg.bootstrap.seed, cfg.bootstrap.cluster), {}
        for method, settings in by_method.items():
            differences = [paired_differences(values_of_run(groups, spec.id, name), base) for spec in settings]
            if between[method] and _nothing(settings[0].cfg) is not None:
                differences.insert(0, paired_differences(base, base))
            found[method] = (1 if higher else -1) * fronts.resampled_means(differences, *resampling)
        return found, base

    gains, base = means(primary_metric)
    losses, worth = _largest_losses([means(name) for name in qualities])
    n_units = len(set(clusters_of(base, cfg.bootstrap.cluster)))
    return Paths(by_method, rows, gains, losses, primary_metric, qualities, worth, n_units, between)


def _largest_losses(
    measures: list[tuple[dict[str, np.ndarray], list[GroupValue]]],
) -> tuple[dict[str, np.ndarray], float]:
    """Return `losses` and `worth` of `Paths`.

    Args:
        measures: of each measure of quality, the mean differences of each method and the values of the baseline.
    """
    worths = [abs(mean_of(base)) for _, base in measures]
    units = worths if len(measures) > 1 else [1.0]
    losses = {}
    for method in measures[0][0]:
        of_method = [-kept[method] / unit for (kept, _), unit in zip(measures, units, strict=True)]
        losses[method] = np.max(of_method, axis=0)
    return losses, worths[0] / units[0]


def _row_of(table: pd.DataFrame, spec: RunSpec) -> pd.Series:
    """Return the row of a run in the table, by its id; its groups must all have images."""
    if spec.id not in table.index:
        raise FileNotFoundError(
            f"{spec.label} is not in the table of {spec.cfg.name}: run python -m experiments tabulate with the same "
            "overrides"
        )
    row = table.loc[spec.id]
    if row["n_withheld"] > 0:
        raise ValueError(
            f"expected runs that show the same groups, to be ranked, got {spec.id} of {spec.label}, which withheld "
            f"{row['n_withheld']:.0f} groups: leave its method out"
        )
    return row


def rows_of_model(paths: Paths) -> list[dict[str, Any]]:
    """Return one row for every method, and one of all that merge tokens."""
    cfg = next(iter(paths.specs.values()))[0].cfg
    common = {
        "experiment": cfg.name, "model": cfg.model.name, "claim": paths.primary_metric,
        "quality": " ".join(paths.qualities), "loss": LOSS * paths.worth, "n_units": paths.n_units,
    }  # fmt: skip
    rows, reached = _compared(paths)
    for method, runs in paths.rows.items():
        ahead = paths.gains[method].shape[-1] - len(runs)  # of what was run: nothing done
        at = len(runs) - 1 if np.isnan(reached[method]) else max(ceil(reached[method]) - ahead, 0)
        ids = " ".join(str(run.name) for run in runs)
        rows[method] |= {"seconds": runs[at]["seconds"], "settings": len(runs), "run_ids": ids}
    merging = [method for method, runs in paths.rows.items() if any(pd.notna(run["pushed_share"]) for run in runs)]
    if merging:
        rows[WITH_NEGTOME] = _share(
            "added", fronts.added_shares(paths.gains, paths.losses, MOST * paths.worth, merging)
        )
    return [common | {"method": method} | row for method, row in rows.items()]


def _compared(paths: Paths) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Return what is said of each method beside all others, and the place on its path that its gain is of."""
    gains, losses, most = paths.gains, paths.losses, MOST * paths.worth
    everything = [np.concatenate([of[name][: 1 + OF_FRONT] for name in gains], axis=-1) for of in (gains, losses)]
    ends = np.cumsum([gains[name].shape[-1] for name in gains])[:-1]
    fronting = np.split(fronts.on_front(*everything, most), ends, axis=-1)
    rows, reached = {}, {}
    for name, front in zip(gains, fronting, strict=True):
        rows[name] = {"front_share": float(front.any(axis=-1)[1:].mean())}
        rows[name] |= _share("added", fronts.added_shares(gains, losses, most, [name]))
        if gains[name].shape[-1] == 1:  # one setting, which is compared as it is
            rows[name] |= _limits("gain", gains[name][:, 0], paths.n_units)
            rows[name] |= _limits("lost", losses[name][:, 0], paths.n_units)
            reached[name] = 0.0
    swept = [name for name in gains if name not in reached]
    if swept:
        within = [_best(paths, name) for name in swept]
        done = np.stack([np.nan_to_num(gain) for gain, _ in within], axis=-1)  # or else nothing
        ranks = 1 + (done[:, None, :] > done[:, :, None]).sum(axis=-1)
        for number, (name, (gain, place)) in enumerate(zip(swept, within, strict=True)):
            rows[name] |= _limits("gain", done[:, number], paths.n_units) if np.isfinite(gain[0]) else {}
            rows[name] |= _share("rank", ranks[:, number].astype(float))
            rows[name] |= {"first_share": float((ranks[1:, number] == 1).mean())}
            rows[name] |= {"within_share": float(np.isfinite(gain[1:]).mean())}
            reached[name] = float(place[0])
    return rows, reached


def _limits(name: str, estimates: np.ndarray, n_units: int) -> dict[str, float]:
    """Return the value, the first of [1 + R], and its interval, as of all tables."""
    low, high = limits(float(estimates[0]), estimates[1:], n_units) if n_units >= FEWEST else (np.nan, np.nan)
    return {name: float(estimates[0]), f"{name}_low": low, f"{name}_high": high}


def _share(name: str, estimates: np.ndarray) -> dict[str, float]:
    """Return the value, the first of [1 + R], and the percentiles of the resamples."""
    low, high = np.quantile(estimates[1:], [0.025, 0.975])
    value = "added_share" if name == "added" else name
    return {value: float(estimates[0]), f"{name}_low": float(low), f"{name}_high": float(high)}


def _best(paths: Paths, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a method's largest gain within the loss, and its place on the path, [1 + R] each."""
    gains, losses = paths.gains[method], paths.losses[method]
    return fronts.best_gain_at_budget(gains, losses, LOSS * paths.worth, paths.between[method])


def chosen_values(paths: Paths) -> dict[str, Any]:
    """Return the value of its hyperparameter at which each method of a sweep gains most within the loss."""
    chosen = {}
    for method, specs in paths.specs.items():
        configs = [spec.cfg for spec in specs]
        if not isinstance(configs[0].hyperparameter, int):
            continue
        values, place = [_value(one) for one in configs], np.nan_to_num(_best(paths, method)[1][0])
        if not paths.between[method]:
            chosen[method] = values[int(place)]
            continue
        if (nothing := _nothing(configs[0])) is not None:
            values, place = [nothing, *values], place or 1.0  # what does nothing is no choice
        chosen[method] = float(f"{np.interp(place, range(len(values)), values):.3g}")
    return chosen


def _value(cfg: DictConfig) -> Any:
    """Return the value of a method's hyperparameter, lists and dictionaries as plain ones."""
    value = OmegaConf.select(cfg.method, cfg.method.metadata.hyperparameter.setting)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _nothing(cfg: DictConfig) -> float | None:
    """Return the value of a method's hyperparameter that does nothing, where it has one."""
    return OmegaConf.select(cfg, "method.metadata.hyperparameter.nothing")


def _is_interpolated(specs: list[RunSpec]) -> bool:
    """Tell whether values between two settings of a method may be chosen: its hyperparameter's `interpolate`.

    Raises:
        ValueError: `interpolate` is neither true nor false, or is true of values that are no floating-point numbers.
    """
    first = specs[0].cfg
    if len(specs) == 1:  # compared as it is
        return False
    declared = OmegaConf.select(first, "method.metadata.hyperparameter.interpolate", default=True)
    key = f"metadata.hyperparameter.interpolate in method={first.method.name}"
    if not isinstance(declared, bool):
        raise ValueError(f"{key} must be true or false, got {declared!r}")
    if declared and isinstance(first.hyperparameter, int):
        values = [_value(spec.cfg) for spec in specs]
        if not all(isinstance(value, (int, float)) for value in values) or all(type(value) is int for value in values):
            raise ValueError(f"{key} must be false, or the values floating-point numbers, got {values}")
    return declared


def render(frame: pd.DataFrame) -> str:
    """Return a ranking as Markdown, a table a model, the highest rank or largest gain first."""
    parts = []
    for model, rows in frame.groupby("model", sort=False):
        first, swept = rows.iloc[0], bool(rows["rank"].notna().any())
        claim, qualities = humanize(first["claim"]), [humanize(name) for name in first["quality"].split()]
        quality, share = " and ".join(qualities), f"{LOSS:.1%} of what it is without"
        lost_format, heading = "{:+.2f}".format, f"loss of {quality} [95 % interval]"
        limit = f"{quality} falls by at most {first['loss']:.2f}, {share}"
        if len(qualities) > 1:
            lost_format, heading = "{:+.1%}".format, f"largest loss of {quality} [95 % interval]"
            limit = f"each of {quality} falls by at most {share}"
        head = f"**{model}**, {first['n_units']} categories."
        if swept:
            head += f" Gain where {limit}."
        table = [
            {
                "rank": with_interval("{:.0f}".format, row["rank"], row["rank_low"], row["rank_high"]),
                "method": title_of(row["method"]),
                f"gain in {claim} [95 % interval]": with_interval(
                    "{:+.3f}".format, row["gain"], row["gain_low"], row["gain_high"]
                ) or ("none within" if swept and row["method"] != WITH_NEGTOME else ""),
                heading: with_interval(lost_format, row["lost"], row["lost_low"], row["lost_high"]),
                "first": printed_percent(row["first_share"]),
                "within": printed_percent(row["within_share"]),
                "on the front": printed_percent(row["front_share"]),
                "hypervolume lost without it": with_interval(
                    "{:.1%}".format, row["added_share"], row["added_low"], row["added_high"]
                ),
                "seconds an image": "" if pd.isna(row["seconds"]) else f"{row['seconds']:.2f}",
            }
            for _, row in rows.sort_values(["rank", "gain"], ascending=[True, False], na_position="last").iterrows()
        ]  # fmt: skip
        parts += [head, markdown(printed(table))]
    return "\n\n".join([*parts, LEGEND]) + "\n"


LEGEND = """\
Gain: the most within that loss, at a setting or on the line between two; at a setting alone where a method has no
values between, such as whole numbers. Rank: by it, with the 2.5 and 97.5 percentiles of resamples of the categories,
the same for all methods. First: the share of these with the highest gain; within: with a setting within the loss; on
the front: with a setting, at a loss of at most 5 %, that none of all others beats. Hypervolume: the area that all
settings dominate up to that loss; methods that are alike, as a method and a combination with it, stand in for each
other. Seconds: the machine's, of the median group at the setting that gains it."""


def write_ranking(plan: Plan) -> str:
    """Write the ranking, `<results>/<experiment>/ranking.csv` and `.md`, and what was chosen; return the Markdown.

    Other models' rows stay, as do other methods' choices.
    """
    path = plan.result_file("ranking.csv")
    rows, file, choices = [], chosen_file(plan.results, plan.name), {}
    for model in dict.fromkeys(spec.cfg.model.name for spec in plan.runs):
        paths = read_paths([spec for spec in plan.runs if spec.cfg.model.name == model])
        rows += rows_of_model(paths)
        choices[model] = chosen_values(paths)
    page = render(put_rows(path, rows, COLUMNS, KEY))
    write_text(path.with_suffix(".md"), page)
    if any(choices.values()):
        earlier = OmegaConf.load(file) if file.exists() else {}
        head = f"# Hyperparameters that experiments.rank chose from experiment={plan.name}, by model and method.\n"
        write_text(file, head + OmegaConf.to_yaml(OmegaConf.merge(earlier, choices)))
    return page


def main(argv: list[str]) -> None:
    """Run the command."""
    print(write_ranking(Plan.of(argv)))
