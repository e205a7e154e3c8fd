"""Methods against each other: paired differences to a chosen method, where tables pair all with the run without any.

    python -m experiments.compare random_match experiment=ablate_matching

The overrides are those of `experiments.generate`, whose runs must be generated and scored. Writes
`<results>/<experiment>_against_<method>.md` with the experiment's primary metrics.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import pandas as pd
from omegaconf import DictConfig

from eval.files import write_text
from eval.intervals import difference_of, n_units
from eval.significance import effect_size, holm, sign_flip_p, win_rate
from experiments import project_path
from experiments.configs import expand
from experiments.evaluate import configured_metrics, interval_options
from experiments.runs import Run, request
from experiments.tabulate import change, find_document, primary_metrics, printed_p, printed_percent


def compare(configs: list[DictConfig], against: str) -> pd.DataFrame:
    """Return one row a model, method and primary metric: the paired difference to the method `against`.

    Args:
        configs: from `expand`; a run is paired with the one of method `against` that is otherwise as configured.
        against: the method's name.

    Returns:
        model, method, metric, value, against_value, difference with its interval, p_value and p_holm (over a model's
        methods and metrics), effect_size, win_rate, n_units, n_groups.

    Raises:
        FileNotFoundError: a run was not generated or not scored.
        ValueError: there is no run of `against` to pair one with.
    """
    others = {_asked(cfg): cfg for cfg in configs if cfg.method.name == against}
    if not others:
        names = ", ".join(dict.fromkeys(cfg.method.name for cfg in configs))
        raise ValueError(f"expected one of the experiment's methods ({names}), got {against!r}")
    rows = []
    for cfg in configs:
        if cfg.method.name == against:
            continue
        if _asked(cfg) not in others:
            raise ValueError(f"there is no run of {against} like the one of {cfg.method.name} on {cfg.model.name}")
        metrics, options = dict(configured_metrics(cfg)), interval_options(cfg)
        for name in primary_metrics(cfg).values():
            ours, theirs = (find_document(Run.find(one), name, metrics[name]) for one in (cfg, others[_asked(cfg)]))
            found, aggregate = difference_of(ours, theirs, **options), ours["aggregate"]
            groups = (ours["groups"], theirs["groups"])
            rows.append(
                {
                    "model": cfg.model.name,
                    "method": cfg.method.name,
                    "metric": name,
                    "value": ours["value"],
                    "against_value": theirs["value"],
                    "difference": found.difference,
                    "difference_low": found.low,
                    "difference_high": found.high,
                    "p_value": sign_flip_p(
                        *groups,
                        aggregate,
                        n_flips=options["n_resamples"],
                        seed=options["seed"],
                        cluster=options["cluster"],
                    ),
                    "effect_size": effect_size(*groups, aggregate),
                    "win_rate": win_rate(*groups, ours["higher_is_better"], aggregate),
                    "n_units": n_units(ours, cfg.bootstrap.cluster),
                    "n_groups": ours["n_groups"],
                }
            )
    frame = pd.DataFrame(rows)
    frame["p_holm"] = frame.groupby("model")["p_value"].transform(lambda values: holm(values.tolist()))
    return frame


def _asked(cfg: DictConfig) -> str:
    """Return all that is asked for but the method."""
    return repr({key: value for key, value in request(cfg).items() if key != "method"})


def render(frame: pd.DataFrame, name: str, against: str) -> str:
    """Return the comparison as a Markdown page."""
    table = pd.DataFrame(
        {
            "model": row["model"],
            "method": row["method"],
            "metric": row["metric"].replace("_", " "),
            "value": f"{row['value']:.3f}",
            against: f"{row['against_value']:.3f}",
            "difference": change(row),
            "p": printed_p(row["p_holm"]),
            "d_z": f"{row['effect_size']:+.2f}",
            "wins": printed_percent(row["win_rate"]),
            "units": f"{row['n_units']:.0f}",
            "groups": f"{row['n_groups']:.0f}",
        }
        for _, row in frame.iterrows()
    )
    return "\n".join(
        [
            f"# {name} against {against}",
            "",
            f"Paired differences of each method to {against}, over the same groups and noises, with 95 % intervals; p "
            "after Holm's correction over a model's methods and metrics. Models named mini-* are this project's small "
            "models: their numbers are not SDXL's or Flux's.",
            "",
            table.to_markdown(index=False, disable_numparse=True),
            "",
        ]
    )


def main(argv: list[str]) -> None:
    if not argv or "=" in argv[0]:
        raise ValueError("expected the method to compare with first: python -m experiments.compare random_match ...")
    against, *overrides = argv
    configs = expand(overrides)
    text = render(compare(configs, against), configs[0].name, against)
    path = project_path(configs[0].results) / f"{configs[0].name}_against_{against}.md"
    write_text(path, text)
    print(text)
    print(path)
