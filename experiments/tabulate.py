"""Act 3: the JSONs of an experiment's runs become its table: CSV (one row a number), Markdown and LaTeX.

    python -m experiments.tabulate experiment=diversity

The overrides are those of `experiments.generate`. Rows of models that are not among them stay as they are in the CSV.

An experiment declares one primary metric of diversity and one of quality: these two are tested, corrected for their
number, and make the main table and the findings. All other metrics are described, with intervals, in a table below.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import io
import re
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from eval.files import write_text
from eval.images import METRICS
from eval.intervals import SUBSETS, difference_of, interval_of, n_units
from eval.measure import is_current, read_document
from eval.metric import Metric
from eval.significance import effect_size, holm, non_inferior, sign_flip_p, win_rate
from experiments import project_path
from experiments.configs import expand, first, flag
from experiments.evaluate import NEEDS, configured_metrics, document_path, interval_options
from experiments.runs import Run
from experiments.tables import Key, csv_text, latex, lock, markdown, put_rows, read_csv, row_keys

#: What a row's metric may be primary for, in the order of the main table's columns.
ROLES = ("diversity", "resemblance", "quality")
#: Settings that are printed only where a model's runs differ in them, and how they are headed.
FURTHER = {
    "guidance_scale": "guidance", "steps": "steps", "true_cfg_scale": "true guidance", "reference": "from",
    "sites": "blocks",
}  # fmt: skip
#: Those of them that are of methods alone: that the run without one has none is no other choice of them.
OF_METHODS = ("true_cfg_scale", "reference", "sites")
#: A difference is called one where its corrected p-value is at most this.
LEVEL = 0.05
#: Columns that say which measured thing a row is; with the metric they are the row's key. By which encoder it was
#: measured is not in it: a metric has one, and a row by an earlier one is replaced, not kept beside the new.
SETTING = [
    "model", "guidance_scale", "true_cfg_scale", "steps", "method", "matching", "reference", "alpha", "threshold",
    "t_low", "t_high", "sites",
]  # fmt: skip
KEY = ["experiment", *SETTING, "metric"]
COLUMNS = [
    *KEY, "encoder", "primary", "higher_is_better", "value", "ci_low", "ci_high", "difference", "difference_low",
    "difference_high", "p_value", "p_holm", "effect_size", "win_rate", "margin", "non_inferior", "n_units", "n_groups",
    "n_images", "pushed_share", "seconds", "run_id", "commit", "device",
]  # fmt: skip

#: Columns that name folders and files, and what they may hold.
NAMES = {**dict.fromkeys(("experiment", "model", "method"), r"[^./\\\0][^/\\\0]*"), "run_id": "[0-9a-f]{12}"}
#: What the columns of the main table, of the other metrics' and of the paper's mean.
LEGEND = (
    "Without a method: value [95 % interval]. With one: value; paired difference to the run without, over the same "
    "groups [95 % interval]. pushed: share of the compared tokens that moved. p: sign-flip test of the difference, "
    "after Holm's correction over a model's methods and primary metrics. d_z: mean difference in standard "
    "deviations of the paired differences. wins: share of groups in which the method is better, ties halved. "
    "quality kept: the interval excludes a loss of more than the margin; every method is judged by itself, so "
    "that the chance to call quality kept by one that loses it grows with their number. "
    "units: what intervals resample and tests exchange whole, categories unless configured otherwise; intervals of "
    "fewer than four are not estimable."
)
OTHER_LEGEND = (
    "All other metrics, described, not tested: value [95 % interval], with a method value; paired difference "
    "[95 % interval]. units: how many were resampled; where no interval stands, they are too few or all alike. "
    "What each metric is, and by what it is biased: docs/metrics.md."
)
PAPER_LEGEND = (
    "The paper's own numbers (results/paper.csv; DreamSim similarity, other models, other images: not the same "
    "scale as above):"
)


def read_table(name: str, folder: str | Path = "results") -> pd.DataFrame:
    """Read an experiment's table.

    Args:
        name: the experiment's.
        folder: where its CSV lies; relative paths are taken from the checkout.

    Raises:
        FileNotFoundError: it was not made yet; the message says by which command it is.
        ValueError: it is damaged, or names something by what could be a path.
    """
    path = project_path(folder) / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(f"expected the table {path}, got no file: make it with {commands(name)[0]}")
    frame = read_csv(path)
    if missing := set(COLUMNS) - set(frame.columns):
        raise ValueError(
            f"expected an experiment's table in {path}, got none of the columns {sorted(missing)[:5]}: "
            f"make it again with {commands(name)[0]}"
        )
    check_names(frame, path)
    return frame


def check_names(frame: pd.DataFrame, path: Path) -> None:
    """Refuse a table whose runs could lie outside of the folders that they are looked for in.

    Raises:
        ValueError: an experiment, model, method or run id is no name of a folder; the message names the file.
    """
    for column, pattern in NAMES.items():
        for value in frame[column].unique():
            if not (isinstance(value, str) and re.fullmatch(pattern, value)):
                raise ValueError(
                    f"expected the name of a folder for {column} in {path}, got {value!r}: correct the table, or make "
                    "it again"
                )


def commands(name: str) -> list[str]:
    """Return what makes an experiment's table and figures: the make target, and the command that it calls."""
    if name in ("latency", "search"):  # acts of their own
        return [f"make {name}", f"python -m experiments.{name} experiment={name}"]
    return [f"make reproduce-{name}", f"python -m experiments.reproduce experiment={name}"]


def rows_of(configs: list[DictConfig]) -> list[dict[str, Any]]:
    """Return one row for every run and metric, each with its paired difference to the run without a method.

    Args:
        configs: from `expand`; a run is paired with the one of method `none` that is otherwise as configured.

    Raises:
        FileNotFoundError: a run or its baseline was not generated or not scored; the message names the command.
        ValueError: random weights, which measure nothing, would enter a table; or the primary metrics are not two of
            the configured ones that can be tested.
    """
    for cfg in configs:
        _check_primary(cfg)
    level = configs[0].bootstrap.level
    if level != 0.95:
        raise ValueError(f"tables and figures say 95 % of their intervals: expected bootstrap.level=0.95, got {level}")
    # A grid of the method's settings names its baseline over and over.
    runs = {run: cfg for cfg, run in ((cfg, Run.find(cfg)) for cfg in configs)}
    rows = []
    for run, cfg in runs.items():
        if cfg.model.kind == "tiny":
            raise ValueError(
                f"model={cfg.model.name} has random weights (kind: tiny): its numbers may not enter a table"
            )
        baseline = Run.find_baseline(cfg)
        for name, metric in configured_metrics(cfg):
            if name in primary_metrics(cfg).values() and metric.aggregate == SUBSETS:
                raise ValueError(
                    f"expected primary metrics that can be tested, got {name}, a number of the whole set of images: "
                    "there are no values of groups to exchange; choose a metric of groups, as clip_score, in `primary`"
                )
            reference = None if baseline == run else find_document(baseline, name, metric)
            rows.append(_row(cfg, run, name, find_document(run, name, metric), reference))
    return rows


def primary_metrics(cfg: DictConfig) -> dict[str, str]:
    """Return the metrics that an experiment tests, by their roles."""
    return {role: cfg.primary[role] for role in ROLES if cfg.primary[role] is not None}


def _check_primary(cfg: DictConfig) -> None:
    """Refuse an experiment whose primary metrics are not different ones of those that are measured."""
    primary = primary_metrics(cfg)
    if len(primary) < 2 or "quality" not in primary:
        raise ValueError(f"expected primary.quality and one of {', '.join(ROLES[:-1])} to be given, got {primary}")
    for role, name in primary.items():
        spec = cfg.metric.get(name)
        if spec is None or any(need in spec and spec[need] is None for need in NEEDS):
            raise ValueError(
                f"expected primary.{role} to be one of the metrics measured, got {name!r}: choose among "
                f"{', '.join(sorted(cfg.metric))}, or a suite (metric=...) that has it"
            )
    if len(set(primary.values())) < len(primary):
        raise ValueError(f"expected different primary metrics, got {primary}; see `primary`")


def _row(
    cfg: DictConfig, run: Run, name: str, document: dict[str, Any], reference: dict[str, Any] | None
) -> dict[str, Any]:
    value, low, high = interval_of(document, **interval_options(cfg))
    role = next((role for role, metric in primary_metrics(cfg).items() if metric == name), None)
    settings = run.identity["request"]["method"]["settings"]
    window = settings.get("timestep_range") or (None, None)
    statistics = run.statistics()
    compared = sum(group.get("tokens_compared", 0) for group in statistics)
    return {
        "experiment": cfg.name,
        "model": cfg.model.name,
        "guidance_scale": cfg.model.call.guidance_scale,
        "true_cfg_scale": settings.get("true_cfg_scale", cfg.model.call.get("true_cfg_scale")),
        "steps": cfg.model.call.num_inference_steps,
        "method": cfg.method.name,
        **{key: settings.get(key) for key in ("matching", "reference", "alpha", "threshold")},
        "t_low": window[0],
        "t_high": window[1],
        "sites": "+".join(settings.get("sites") or ()) or None,
        "metric": name,
        "encoder": document["encoder"]["id"],
        "primary": role,
        "higher_is_better": document["higher_is_better"],
        "value": value,
        "ci_low": low,
        "ci_high": high,
        **({} if reference is None else _comparison(cfg, role, document, reference)),
        "n_units": n_units(document, cfg.bootstrap.cluster),
        "n_groups": document["n_groups"],
        "n_images": document["n_images"],
        "pushed_share": sum(group.get("tokens_pushed", 0) for group in statistics) / compared if compared else None,
        # Only where asked for: a rerun gives every other number again, to the last digit.
        "seconds": (
            median(group["seconds"] for group in statistics) / cfg.prompts.images_per_prompt
            if flag(cfg, "report_seconds")
            else None
        ),
        "run_id": run.id,
        "commit": run.environment["commit"],
        "device": run.identity["machine"]["device"],
    }


def _comparison(
    cfg: DictConfig, role: str | None, document: dict[str, Any], reference: dict[str, Any]
) -> dict[str, Any]:
    """Return the columns that compare a run with the one without a method, group by group."""
    aggregate, higher = document["aggregate"], document["higher_is_better"]
    options = interval_options(cfg)
    difference = difference_of(document, reference, **options)
    columns = {
        "difference": difference.difference,
        "difference_low": difference.low,
        "difference_high": difference.high,
    }
    # A number of a whole set has no results of groups that could be exchanged.
    if aggregate != SUBSETS:
        groups = (document["groups"], reference["groups"])
        columns["p_value"] = sign_flip_p(
            *groups, aggregate, n_flips=options["n_resamples"], seed=options["seed"], cluster=options["cluster"]
        )
        columns["effect_size"] = effect_size(*groups, aggregate)
        columns["win_rate"] = None if higher is None else win_rate(*groups, higher, aggregate)
    least, base = reference["bounds"][0], reference["value"]
    # A share of a number that may be 0 or less is no margin.
    if role == "quality" and least is not None and least >= 0 and base > 0:
        columns["margin"] = cfg.primary.quality_margin * base
        columns["non_inferior"] = non_inferior(difference, columns["margin"], higher)
    return columns


def find_document(run: Run, name: str, metric: Metric) -> dict[str, Any]:
    """Read a run's score.

    Raises:
        FileNotFoundError: it was not measured, or by another version or of other images.
        ValueError: the file, or an image, is not as it was written; the message names it.
    """
    path = document_path(run.folder / METRICS, name, metric)
    document = read_document(path) if path.exists() else None
    if document is None or not is_current(document, metric, run.folder):
        state = "missing" if document is None else "of another version"
        raise FileNotFoundError(f"{path} is {state}: run python -m experiments.evaluate with the same overrides")
    return document


def merge_rows(path: Path, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Put `rows` into the CSV at `path`: they replace the rows with their `KEY`, all others stay.

    Returns:
        The CSV's content, read back: a table made now and one made from the committed file are the same.

    Raises:
        ValueError: two of the runs have the same key, and are to be told apart.
    """
    runs: dict[Key, str] = {}
    keys = row_keys(io.StringIO(csv_text(pd.DataFrame(rows, columns=COLUMNS))), KEY)
    for key, run in zip(keys, (row["run_id"] for row in rows), strict=True):
        if runs.setdefault(key, run) != run:
            raise ValueError(
                f"Runs {runs[key]} and {run} differ in nothing that a table tells ({', '.join(SETTING)}), so that one "
                "would replace the other: give them names of their own (method.name=NAME), or tabulate them into other "
                "folders (results=FOLDER)"
            )
    return put_rows(path, rows, COLUMNS, KEY, finish=_correct)


def _correct(frame: pd.DataFrame) -> None:
    """Correct the primary metrics' p-values by Holm's method; a family is all of a model's tests in the table."""
    corrected = pd.Series(float("nan"), index=frame.index)
    tested = frame[frame["primary"].isin(ROLES) & frame["p_value"].notna()]
    for _, family in tested.groupby("model", sort=False):
        corrected[family.index] = holm(family["p_value"].astype(float).tolist())
    frame["p_holm"] = corrected


def _number(value: float, low: float, high: float, sign: str = "", digits: int | None = None) -> str:
    """Return `value [low, high]`, without the brackets where the interval is not estimable."""
    digits = _digits(value) if digits is None else digits
    interval = "" if pd.isna(low) else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return f"{value:{sign}.{digits}f}{interval}"


def _digits(value: float) -> int:
    """Return how many decimals a number of this size is printed with."""
    return 1 if abs(value) >= 10 else 3 if abs(value) >= 0.1 else 5


def change(row: pd.Series) -> str:
    """Return the paired difference with its interval; it is smaller than what it is a difference of."""
    digits = {1: 2, 3: 3, 5: 5}[_digits(row["value"])]
    return _number(row["difference"], row["difference_low"], row["difference_high"], "+", digits)


def _cell(row: pd.Series) -> str:
    """Return a run's number with its interval, or with its paired difference to the run without a method."""
    digits = _digits(row["value"])
    if pd.isna(row["difference"]):
        return _number(row["value"], row["ci_low"], row["ci_high"], digits=digits)
    return f"{row['value']:.{digits}f}; {change(row)}"


def printed_window(row: pd.Series, without: str = "") -> str:
    """Return the window of a run in words, from noise down, or `without` where it has none."""
    return without if pd.isna(row["t_low"]) else f"{row['t_high']:g} to {row['t_low']:g}"


def printed_p(value: float) -> str:
    return "" if pd.isna(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def printed_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _arrow(row: pd.Series) -> str:
    return {True: "up", False: "down"}.get(row["higher_is_better"], "-")


def _setting(row: pd.Series, further: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the settings of a run as they are printed, blank where it has none; `further` ones are columns' names."""
    printed = {
        "alpha": "" if pd.isna(row["alpha"]) else f"{row['alpha']:g}",
        "threshold": "" if pd.isna(row["threshold"]) else f"{row['threshold']:g}",
        "window": printed_window(row),
    }
    for column in further:
        value = row[column]
        printed[FURTHER[column]] = "" if pd.isna(value) else value if isinstance(value, str) else f"{value:g}"
    return printed


def _further(frame: pd.DataFrame) -> tuple[str, ...]:
    """Return the columns of `FURTHER` that differ among the runs of a model, and so have to be told."""
    counts = frame.groupby("model", sort=False)[list(FURTHER)].nunique(dropna=False)
    compared = frame[frame["method"] != "none"].groupby("model", sort=False)[list(FURTHER)].nunique(dropna=False)
    return tuple(column for column in FURTHER if (compared if column in OF_METHODS else counts)[column].max() > 1)


def run_labels(frame: pd.DataFrame) -> dict[str, str]:
    """Name every run: its method; where a model has several runs of the method, its settings too; or even its id."""
    runs = frame.drop_duplicates("run_id").set_index("run_id")
    further = _further(frame)
    settings = [
        " ".join(f"{key} {value}" for key, value in _setting(row, further).items() if value)
        for _, row in runs.iterrows()
    ]
    names = runs["method"]
    for more in (settings, runs.index):
        swept = names[pd.DataFrame({"model": runs["model"], "name": names}).duplicated()]
        names = names.where(~names.isin(swept), (names + " " + pd.Series(more, runs.index)).str.strip())
    return names.to_dict()


def main_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table people read: one row a run, with the primary metrics and their tests."""
    primary = frame[frame["primary"].isin(ROLES)]
    several = primary.groupby("metric")["encoder"].nunique() > 1
    further = _further(frame)
    table = []
    for _, group in frame.groupby([*SETTING, "run_id"], sort=False, dropna=False):
        first = group.iloc[0]
        entry = {"model": first["model"], "method": first["method"], **_setting(first, further)}
        entry["pushed"] = "" if pd.isna(first["pushed_share"]) else printed_percent(first["pushed_share"])
        tested = group[group["primary"].isin(ROLES)]
        for role in ROLES:
            for _, row in tested[tested["primary"] == role].iterrows():
                by = f" by {row['encoder']}" if several[row["metric"]] else ""
                metric = f"{row['metric'].replace('_', ' ')}{by}"
                entry[f"{metric} ({_arrow(row)})"] = _cell(row)
                entry[f"{metric}: p"] = printed_p(row["p_holm"])
                if role == "quality":
                    entry["quality kept"] = _kept(row)
                else:
                    entry["d_z"] = "" if pd.isna(row["effect_size"]) else f"{row['effect_size']:+.2f}"
                    entry["wins"] = "" if pd.isna(row["win_rate"]) else printed_percent(row["win_rate"])
        if not pd.isna(first["seconds"]):
            entry["seconds"] = f"{first['seconds']:.2f}"
        counted = first if tested.empty else tested.iloc[0]
        entry |= {count: int(counted[f"n_{count}"]) for count in ("units", "groups", "images")}
        table.append(entry)
    return pd.DataFrame(table).fillna("")


def short_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the narrow table of the README: one row a run, the primary metrics' values and differences alone."""
    main = main_table(frame)
    columns = [column for column in main if column.endswith((" (up)", " (down)"))]
    return main[["model", "method", *columns, "images"]]


def _kept(row: pd.Series) -> str:
    if pd.isna(row["difference"]):
        return ""
    if pd.isna(row["non_inferior"]):
        return "not estimable"
    return f"{'yes' if row['non_inferior'] else 'not shown'} (margin {row['margin']:.2g})"


def other_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return all metrics that are not primary: one row a model, metric and encoder, one column a method.

    Where a model's runs of a method differ in their settings, each setting is a column.
    """
    labels = run_labels(frame)
    others = frame[~frame["primary"].isin(ROLES)]
    table: dict[tuple[str, ...], dict[str, str]] = {}
    for _, row in others.iterrows():
        key = (row["model"], row["metric"].replace("_", " "), _arrow(row), row["encoder"], f"{row['n_units']:.0f}")
        table.setdefault(key, {})[labels[row["run_id"]]] = _cell(row)
    heads = ("model", "metric", "better", "scored by", "units")
    rows = [dict(zip(heads, key, strict=True)) | cells for key, cells in table.items()]
    return pd.DataFrame(rows, columns=[*heads, *dict.fromkeys(labels.values())], dtype=object).fillna("")


def findings(frame: pd.DataFrame) -> list[str]:
    """Say in words, from the numbers alone, what each method did to each primary metric on each model."""
    labels = run_labels(frame)
    compared = frame[frame["primary"].isin(ROLES) & frame["difference"].notna()]
    return [
        f"- {model}, {labels[run]}: {'; '.join(_finding(row) for _, row in rows.iterrows())} "
        f"({rows['n_groups'].iloc[0]:.0f} groups in {rows['n_units'].iloc[0]:.0f} independent units)."
        for (model, run), rows in compared.groupby(["model", "run_id"], sort=False)
    ]


def _finding(row: pd.Series) -> str:
    base = row["value"] - row["difference"]
    direction = "raised" if row["difference"] > 0 else "lowered"
    excluded = row["difference_low"] > 0 or row["difference_high"] < 0
    verb = direction if row["p_holm"] <= LEVEL else f"may have {direction}" if excluded else "did not measurably change"
    facts = [f"{100 * row['difference'] / abs(base):+.1f} %"] if base else []
    if not pd.isna(row["p_holm"]):
        facts.append(f"p {printed_p(row['p_holm'])}" if row["p_holm"] < 0.001 else f"p = {printed_p(row['p_holm'])}")
    if not pd.isna(row["win_rate"]):
        facts.append(f"better in {printed_percent(row['win_rate'])} of the groups")
    text = f"{verb} the {row['metric'].replace('_', ' ')} by {change(row)} ({', '.join(facts)})"
    if not pd.isna(row["non_inferior"]):
        loss = printed_percent(row["margin"] / abs(base)) if base else f"{row['margin']:g}"
        text += f", and a loss of more than {loss} is {'' if row['non_inferior'] else 'not '}excluded"
    return text


def paper_table(experiment: str, paper_csv: str | Path = "results/paper.csv") -> pd.DataFrame:
    """Return the paper's own numbers for `experiment`, one row a method, as transcribed in results/paper.csv."""
    paper = pd.read_csv(project_path(paper_csv))
    paper = paper[paper["experiment"] == experiment]
    wide = paper.pivot_table(index=["table", "model", "method"], columns="metric", values="value", sort=False)
    wide = wide.reset_index().rename(columns={"table": "source"})
    wide.columns.name = None
    return wide


def scored_by(frame: pd.DataFrame) -> str:
    """Say which networks measured the primary metrics, and what the models' names mean."""
    primary = frame[frame["primary"].isin(ROLES)]
    return (
        f"Scored by {', '.join(sorted(primary['encoder'].dropna().unique()))}. Models named mini-* are this project's "
        "small models: their numbers are not SDXL's or Flux's."
    )


def render_markdown(frame: pd.DataFrame, description: str | None, paper: pd.DataFrame) -> str:
    """Return the Markdown page of one experiment: ours, how it was measured, and the paper's beside it."""
    name = frame["experiment"].iloc[0]
    others = other_table(frame)
    parts = [f"# {name}", ""]
    if description:
        parts += [description, ""]
    parts += [
        markdown(main_table(frame)),
        "",
        f"{LEGEND} {scored_by(frame)}",
        "",
        *findings(frame),
        "",
    ]
    if len(others):
        parts += [
            OTHER_LEGEND,
            "",
            markdown(others),
            "",
        ]
    if len(paper):
        parts += [
            PAPER_LEGEND,
            "",
            markdown(paper),
            "",
        ]
    return "\n".join(parts)


def render_latex(frame: pd.DataFrame) -> str:
    """Return the two tables of `render_markdown` as LaTeX."""
    return latex([main_table(frame), other_table(frame)])


def tabulate(overrides: list[str]) -> str:
    """Write `<results>/<experiment>.csv`, `.md` and `.tex` for the runs of `overrides`; return the Markdown."""
    return write_table(expand(overrides))[1]


def write_table(configs: list[DictConfig]) -> tuple[pd.DataFrame, str]:
    """Write `<results>/<experiment>.csv`, `.md` and `.tex` for the runs of `configs`.

    Args:
        configs: of one experiment, see `rows_of`.

    Returns:
        The table with all rows that were in it before, and the Markdown.
    """
    cfg = configs[0]
    folder = project_path(cfg.results)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cfg.name}.csv"
    merge_rows(path, rows_of(configs))
    with lock(path):
        frame = read_csv(path)  # another process may have merged its rows meanwhile
        page = render_markdown(frame, cfg.description, paper_table(cfg.name, project_path("results/paper.csv")))
        write_text(folder / f"{cfg.name}.md", page)
        write_text(folder / f"{cfg.name}.tex", render_latex(frame))
    return frame, page


def main(argv: list[str]) -> None:
    print(tabulate(argv))
    cfg = first(argv)
    for suffix in ("csv", "md", "tex"):
        print(project_path(cfg.results) / f"{cfg.name}.{suffix}")
