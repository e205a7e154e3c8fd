"""How the methods of an experiment compare at equal cost: gains, ranks, fronts, and how sure each of them is.

    python -m experiments.rank experiment=peers
    python -m experiments.rank experiment=peers_grid model=sdxl

Written: `<results>/<experiment>_ranking.csv` and `.md`, a row a model and method, of the runs that were generated and
evaluated with the same overrides. A method with several settings is a path from nothing done through its settings in
the order of the sweep. Resamples of the prompts' categories are the same for all methods.

Of a sweep over `knob`, the value that the experiment's rule chooses for each method (`experiments.choose.chosen_run`;
the weakest, where none fulfils it) is written to `<results>/peers_grid_chosen.yaml`, which knob=chosen reads.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import functools
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from eval import fronts
from eval.files import write_text
from eval.imageset import ImageSet
from eval.intervals import GroupValue, mean_of, paired_differences
from experiments import chosen_file, project_path
from experiments.choose import chosen_run
from experiments.configs import expand
from experiments.evaluate import configured_metrics
from experiments.figures.style import TITLES
from experiments.pages import printed_percent, with_interval
from experiments.runs import Run
from experiments.tables import markdown, primary_pair, put_rows, read_table, spelled, words
from experiments.tabulate import find_document, primary_metrics

#: The loss of quality, as a share of what it is without a method, at which methods are compared: half of the margin
#: within which it counts as kept. Hypervolumes reach to the whole of that.
LOSS, MOST = 0.025, 0.05
#: Resamples of which the front is looked for, which compares every setting with every other.
OF_FRONT = 1000
#: The row of all methods that merge tokens, alone or with another one.
WITH_NEGTOME = "(all with NegToMe)"
COLUMNS = [
    "experiment", "model", "method", "settings", "gain", "gain_low", "gain_high", "rank", "rank_low", "rank_high",
    "first_share", "front_share", "added_share", "added_low", "added_high", "seconds", "claim", "quality", "loss",
    "n_units", "run_ids",
]  # fmt: skip
KEY = ["experiment", "model", "method"]


def rows_of_model(configs: list[DictConfig]) -> list[dict[str, Any]]:
    """Return one row for every method of an experiment on one model.

    Args:
        configs: from `expand`, with the run without a method.

    Raises:
        FileNotFoundError: a run was not generated or not scored; the message names the command.
        ValueError: the primary metrics have no better direction.
    """
    cfg, runs = configs[0], _runs(configs)
    tested, metrics = primary_metrics(cfg), dict(configured_metrics(cfg))
    claim, quality = (next(name for name in tested if (tested[name] == "quality") == last) for last in (False, True))
    images = functools.cache(lambda run: ImageSet.open(run.folder))

    def paths(name: str) -> tuple[dict[str, np.ndarray], list[GroupValue]]:
        """Return of each method the means of a metric's differences [1 + R, S], more being better; and the baseline."""
        if metrics[name].higher_is_better is None:
            raise ValueError(f"expected primary metrics with a better direction to rank by, got {name}")
        sign = 1 if metrics[name].higher_is_better else -1
        base = find_document(images(Run.find(cfg, baseline=True)), name, metrics[name])["groups"]
        means = {}
        for method, settings in runs.items():
            found = [find_document(images(run), name, metrics[name])["groups"] for run in settings]
            differences = [paired_differences(groups, base) for groups in found]
            resampling = cfg.bootstrap.n_resamples, cfg.bootstrap.seed, cfg.bootstrap.cluster
            means[method] = sign * fronts.resampled_means(differences, *resampling)
        return means, base

    (gains, base), (kept, of_quality) = paths(claim), paths(quality)
    losses, worth = {method: -means for method, means in kept.items()}, abs(mean_of(of_quality))
    common = {
        "experiment": cfg.name, "model": cfg.model.name, "claim": claim, "quality": quality, "loss": LOSS * worth,
        "n_units": len({group["category"] for group in base}),
    }  # fmt: skip
    statistics = {method: [one for run in settings for one in run.statistics()] for method, settings in runs.items()}
    rows = _compared(gains, losses, worth)
    for method, settings in runs.items():
        seconds = median(one["seconds"] for one in statistics[method]) / cfg.prompts.images_per_prompt
        rows[method] |= {"seconds": seconds, "settings": len(settings), "run_ids": " ".join(run.id for run in settings)}
    merging = [method for method in runs if any(one.get("tokens_compared") for one in statistics[method])]
    if merging:
        rows[WITH_NEGTOME] = _interval("added", fronts.added_shares(gains, losses, MOST * worth, merging))
    return [common | {"method": method} | row for method, row in rows.items()]


def _runs(configs: list[DictConfig]) -> dict[str, dict[Run, None]]:
    """Return the runs of each method in the order of the sweep, each once."""
    runs: dict[str, dict[Run, None]] = {}
    for cfg in configs:
        if cfg.method.name != "none":
            runs.setdefault(cfg.method.name, {})[Run.find(cfg)] = None
    return runs


def _compared(
    gains: Mapping[str, np.ndarray], losses: Mapping[str, np.ndarray], worth: float
) -> dict[str, dict[str, Any]]:
    """Return what is said of each method beside all others, of its path's gains and losses [1 + R, S]."""
    at_loss = np.stack([fronts.gain_at_loss(gains[name], losses[name], LOSS * worth) for name in gains], axis=-1)
    ranks = 1 + (at_loss[:, None, :] > at_loss[:, :, None]).sum(axis=-1)
    everything = [np.concatenate([of[name][: 1 + OF_FRONT] for name in gains], axis=-1) for of in (gains, losses)]
    ends = np.cumsum([gains[name].shape[-1] for name in gains])[:-1]
    fronting = [part.any(axis=-1)[1:].mean() for part in np.split(fronts.on_front(*everything), ends, axis=-1)]
    return {
        name: {
            **_interval("gain", at_loss[:, number]),
            **_interval("rank", ranks[:, number]),
            "first_share": float((ranks[1:, number] == 1).mean()),
            "front_share": float(fronting[number]),
            **_interval("added", fronts.added_shares(gains, losses, MOST * worth, [name])),
        }
        for number, name in enumerate(gains)
    }


def _interval(name: str, estimates: np.ndarray) -> dict[str, float]:
    """Return the value, the first of [1 + R], and percentiles of the resamples."""
    low, high = np.quantile(estimates[1:], [0.025, 0.975])
    return {"added_share" if name == "added" else name: float(estimates[0]), f"{name}_low": low, f"{name}_high": high}


def render(frame: pd.DataFrame) -> str:
    """Return a ranking as Markdown, a table a model, the highest rank first."""
    parts = []
    for model, rows in frame.groupby("model", sort=False):
        first = rows.iloc[0]
        table = [
            {
                "rank": with_interval("{:.0f}".format, row["rank"], row["rank_low"], row["rank_high"]),
                "method": TITLES.get(row["method"], row["method"]),
                f"gain in {words(row['claim'])} [95 % interval]": with_interval(
                    "{:+.3f}".format, row["gain"], row["gain_low"], row["gain_high"]
                ),
                "first": printed_percent(row["first_share"]),
                "on the front": printed_percent(row["front_share"]),
                "hypervolume lost without it": with_interval(
                    "{:.1%}".format, row["added_share"], row["added_low"], row["added_high"]
                ),
                "seconds an image": spelled(round(row["seconds"], 3)),
            }
            for _, row in rows.sort_values("rank", na_position="last").iterrows()
        ]
        falls = f"{words(first['quality'])} falls by {first['loss']:.2f} ({LOSS:.1%} of what it is without)"
        parts += [f"**{model}**, {first['n_units']} categories. Gain where {falls}.", markdown(pd.DataFrame(table))]
    return "\n\n".join([*parts, LEGEND]) + "\n"


LEGEND = """\
Gain: interpolated along a method's settings to that loss; of a method that never loses as much, that of its strongest
setting. Rank, and how often it is the first and on the front of all settings: of resamples of the categories, the same
for all methods. Hypervolume: the area that all settings dominate up to a loss of 5 %. Seconds: the machine's, of the
median group."""


def write_ranking(configs: list[DictConfig]) -> str:
    """Write `<results>/<experiment>_ranking.csv` and `.md`; other models' rows stay. Returns the Markdown."""
    path = project_path(configs[0].results) / f"{configs[0].name}_ranking.csv"
    models = dict.fromkeys(cfg.model.name for cfg in configs)
    rows = [row for name in models for row in rows_of_model([cfg for cfg in configs if cfg.model.name == name])]
    page = render(put_rows(path, rows, COLUMNS, KEY))
    write_text(path.with_suffix(".md"), page)
    return page


def write_choice(configs: list[DictConfig]) -> Path:
    """Write which value of each method's knob the rule chooses; other models' choices stay. Returns the file."""
    cfg, file = configs[0], chosen_file(configs[0].results)
    frame, choices = read_table(cfg.name, cfg.results), {}
    for one in configs:
        if one.knob is None or one.method.name == "none":
            continue
        run = chosen_run(frame[frame["method"].isin([one.method.name, "none"])], *primary_pair(frame), one.model.name)
        of_model = choices.setdefault(one.model.name, {})
        value = OmegaConf.select(one.method, one.method.about.knob.setting)
        if Run.find(one).id == run or one.method.name not in of_model:  # the weakest comes first
            of_model[one.method.name] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    there = OmegaConf.to_container(OmegaConf.load(file)) if file.exists() else {}
    head = f"# Of each model, what experiment={cfg.name} chose of each method's knob: made by experiments.rank.\n"
    write_text(file, head + OmegaConf.to_yaml(OmegaConf.create(there | choices)))
    return file


def main(argv: list[str]) -> None:
    configs = expand(argv, baselines=True)
    print(write_ranking(configs))
    if any(isinstance(cfg.knob, int) for cfg in configs):
        print(write_choice(configs))
