"""Tables as files: a CSV whose rows replace their predecessors, and what the columns of an experiment's one mean."""

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval.files import write_text
from eval.significance import holm
from experiments.methods.setting import Setting
from experiments.runs import catalogue
from experiments.runs.locks import locked
from experiments.tables.paths import result_file

#: Settings of the model's calls.
CALL = (
    Setting("guidance_scale", heading="guidance"),
    Setting("steps"),
    Setting("true_cfg_scale", heading="true guidance"),
)
#: Columns of the settings that methods declare; a CSV has those of the methods that are in it.
OF_METHODS = [column for setting in catalogue.settings() for column in setting.columns]
#: Columns that say which measured thing a row is; with the metric they are the row's key. By which encoder it was
#: measured is not in it: a metric has one, and a row by an earlier one is replaced, not kept beside the new.
SETTING = [
    "model", "guidance_scale", "true_cfg_scale", "steps", "method",
    *(column for column in OF_METHODS if column != "true_cfg_scale"),
]  # fmt: skip
KEY = ["experiment", *SETTING, "metric"]
#: A paired difference and the ends of its interval.
DIFFERENCE = ["difference", "difference_low", "difference_high"]
STATISTICS = [
    "value", "ci_low", "ci_high", *DIFFERENCE, "p_value", "p_holm", "effect_size", "win_rate", "margin",
]  # fmt: skip
#: Columns that a CSV has where groups of its runs are withheld: how many, and how many a difference is of.
OF_WITHHELD = ["n_withheld", "n_paired"]
#: Column that a CSV has where matches are approximate: how many of these are equal to the exact ones.
EQUAL_SHARE = "equal_share"
AMOUNTS = ["n_units", "n_groups", "n_images", *OF_WITHHELD, "pushed_share", EQUAL_SHARE, "seconds"]
COLUMNS = [
    *KEY, "encoder", "primary", "higher_is_better", *STATISTICS, "non_inferior", *AMOUNTS,
    "run_id", "code", "commit", "device",
]  # fmt: skip
#: Those that a table has whatever is in it.
REQUIRED = set(COLUMNS) - (set(OF_METHODS) - {"true_cfg_scale"}) - {*OF_WITHHELD, EQUAL_SHARE}
#: Columns that hold text also where they look like numbers.
TEXT = dict.fromkeys(
    ("run_id", "code", "commit", "primary", "setting", "torch", "diffusers", "cuda", "python", "call_how"), str
)
#: Columns that hold numbers alone.
NUMBERS = {column for setting in catalogue.settings() if setting.number for column in setting.columns}
NUMBERS |= {*STATISTICS, *AMOUNTS}
#: Columns that name folders and files, and what they may hold: no run is looked for outside of its folder.
NAMES = {**dict.fromkeys(("experiment", "model", "method"), r"[^./\\\0][^/\\\0]*"), "run_id": "[0-9a-f]{12}"}
#: What a row's metric may be primary for, in the order of the main table's columns.
ROLES = ("diversity", "resemblance", "quality")
#: What a setting is called that a run leaves to its model.
UNSET = "as configured"


def read_table(name: str, folder: str | Path = "results") -> pd.DataFrame:
    """Read an experiment's table.

    Args:
        name: the experiment's.
        folder: of the results; relative paths are taken from the checkout.

    Raises:
        FileNotFoundError: it was not made yet; the message says by which command it is.
        ValueError: it is damaged, or names something by what could be a path.
    """
    path = result_file(folder, name)
    if not path.exists():
        raise FileNotFoundError(f"expected the table {path}, got no file: make it with {commands(name)[0]}")
    frame = read_csv(path)
    if missing := REQUIRED - set(frame.columns):
        raise ValueError(
            f"expected an experiment's table in {path}, got none of the columns {sorted(missing)[:5]}: "
            f"make it again with {commands(name)[0]}"
        )
    for column, pattern in NAMES.items():
        for value in frame[column].unique():
            if not (isinstance(value, str) and re.fullmatch(pattern, value)):
                raise ValueError(
                    f"expected the name of a folder for {column} in {path}, got {value!r}: correct the table, or make "
                    "it again"
                )
    return whole(frame)


def whole(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table with the columns of methods that are not in it, too."""
    return frame.reindex(columns=[*COLUMNS, *(column for column in frame if column not in COLUMNS)])


def settings_in(frame: pd.DataFrame) -> list[Setting]:
    """Return the settings of the methods that are in a table; of one under a name of its own, those that it has."""
    declared = catalogue.settings(*frame["method"].unique())
    return [
        setting
        for setting in catalogue.settings()
        if set(setting.columns) <= set(frame.columns)
        and ((setting in declared and not setting.optional) or frame[list(setting.columns)].notna().any(axis=None))
    ]


def read_csv(path: Path) -> pd.DataFrame:
    """Read a table of the results folder.

    Raises:
        ValueError: it is no table, or has text where numbers belong; the message names the file.
    """
    try:
        frame = pd.read_csv(path, dtype=TEXT)
        frame.astype(dict.fromkeys(NUMBERS & set(frame.columns), float))
    except (ValueError, OSError) as error:  # of pandas' own errors, most are ValueErrors
        reason = " ".join(str(error).split())
        raise ValueError(
            f"expected a table in {path}, got a damaged file ({reason}): restore it, or move it away and make it again"
        ) from None
    return frame


def csv_text(frame: pd.DataFrame) -> str:
    """Return a table as CSV with six significant digits."""
    return frame.to_csv(index=False, float_format="%.6g")


def row_keys(
    file: Path | io.StringIO, columns: Sequence[str], alike: Mapping[str, Mapping[str, str]] | None = None
) -> list[tuple[str, ...]]:
    """Return what each row of a CSV holds in `columns`, in one spelling: 1, 1.0 and 1.00 are one setting.

    Args:
        file: the CSV.
        columns: of the key; those that the file does not have are empty.
        alike: by column, values that count as others.
    """
    cells = _cells(file, columns).replace(alike or {})
    return [tuple(map(_respelled, row)) for row in cells.itertuples(index=False)]


def _cells(file: Path | io.StringIO, columns: Sequence[str]) -> pd.DataFrame:
    """Return the columns of a CSV as they are written in it, empty where it has none of the name."""
    return pd.read_csv(file, dtype=str, keep_default_na=False).reindex(columns=columns, fill_value="")


def _respelled(text: str) -> str:
    try:
        return f"{float(text):.6g}"
    except ValueError:
        return text


def put_rows(
    path: Path,
    rows: list[dict[str, Any]],
    columns: Sequence[str],
    key: Sequence[str],
    alike: Mapping[str, Mapping[str, str]] | None = None,
    finish: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:
    """Put `rows` into the CSV at `path`: they replace the rows with their key, all others stay.

    Args:
        path: the CSV; another process may put its own rows there meanwhile.
        rows: by column.
        columns: of the CSV; those that an earlier version did not have are empty in its rows.
        key, alike: see `row_keys`.
        finish: fills the columns that depend on all rows.

    Returns:
        The CSV's content, read back: a table made now and one made from the committed file are the same.

    Raises:
        ValueError: the CSV has other columns too, whose cells would be lost.
    """
    new = csv_text(pd.DataFrame(rows, columns=columns))
    with lock(path):
        tables = [new]
        if path.exists():
            # which refuses a damaged one, too
            if unknown := sorted(set(read_csv(path).columns) - set(columns)):
                raise ValueError(f"expected a table of the same kind at {path}, got one with the columns {unknown}")
            tables.insert(0, path.read_text(encoding="utf-8"))
        by_key: dict[tuple[str, ...], pd.DataFrame] = {}
        for table in tables:
            keys = pd.Series(row_keys(io.StringIO(table), key, alike), dtype=object)
            # New rows stand where their predecessors stood: no table tells when something was measured.
            by_key |= dict(iter(_cells(io.StringIO(table), columns).groupby(keys, sort=False)))
        text = pd.concat(by_key.values()).to_csv(index=False)
        frame = pd.read_csv(io.StringIO(text), dtype=TEXT)
        if finish is not None:
            finish(frame)
        write_text(path, csv_text(frame))
        return read_csv(path)


def merge_rows(path: Path, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Put `rows` into the CSV of an experiment at `path`, see `put_rows`, and return the table.

    Raises:
        ValueError: two of the runs have the same key, and are to be told apart.
    """
    runs: dict[tuple[str, ...], str] = {}
    keys = row_keys(io.StringIO(csv_text(pd.DataFrame(rows, columns=COLUMNS))), KEY)
    for key, run in zip(keys, (row["run_id"] for row in rows), strict=True):
        if runs.setdefault(key, run) != run:
            raise ValueError(
                f"Runs {runs[key]} and {run} differ in nothing that a table tells ({', '.join(SETTING)}), so "
                "that one would replace the other: give them names of their own (method.name=NAME), or tabulate them "
                "into other folders (results=FOLDER)"
            )
    return whole(put_rows(path, rows, COLUMNS, KEY, finish=_finish))


def _finish(frame: pd.DataFrame) -> None:
    """Fill the columns that depend on all rows of a table, and delete those of methods that are not in it."""
    correct_p_values(frame)
    declared = {column for setting in settings_in(frame) for column in setting.columns}
    declared |= set(OF_WITHHELD) if frame["n_withheld"].any() or frame["n_paired"].notna().any() else set()
    declared |= {EQUAL_SHARE} if frame[EQUAL_SHARE].notna().any() else set()
    for name in set(frame.columns) - REQUIRED - declared:
        del frame[name]


def correct_p_values(frame: pd.DataFrame) -> None:
    """Correct the primary metrics' p-values by Holm's method; a family is all tests of a model's methods in the table.

    Negative controls are no hypotheses and count in no family.
    """
    corrected = pd.Series(float("nan"), index=frame.index)
    methods = without_controls(frame)
    tested = methods[methods["primary"].isin(ROLES) & methods["p_value"].notna()]
    for _, family in tested.groupby("model", sort=False):
        corrected[family.index] = holm(family["p_value"].astype(float).tolist())
    frame["p_holm"] = corrected


def lock(path: Path) -> contextlib.AbstractContextManager[bool]:
    """Hold a CSV: between reading and writing, another process would have its rows lost."""
    return locked(path.with_name(f".{path.name}.lock"))


def printed(table: Iterable[Mapping[str, str]]) -> pd.DataFrame:
    """Return rows of cells, by heading, as a table of texts, without the columns that are blank."""
    frame = pd.DataFrame(table).fillna("")
    return frame.loc[:, (frame != "").any()]


def markdown(table: pd.DataFrame) -> str:
    """Return a table of texts as Markdown."""
    return table.to_markdown(index=False, disable_numparse=True)


def latex(tables: Iterable[pd.DataFrame]) -> str:
    """Return tables of texts as LaTeX, without those that are empty."""
    return "\n".join(table.to_latex(index=False, escape=True) for table in tables if len(table))


def commands(name: str) -> list[str]:
    """Return what makes an experiment's table and figures: the make target, and the command that it calls."""
    if name == "latency":  # an act of its own
        return ["make latency", "python -m experiments latency experiment=latency"]
    return [f"make reproduce-{name}", f"python -m experiments reproduce experiment={name}"]


def filter_model(frame: pd.DataFrame, model: str, *metrics: str) -> pd.DataFrame:
    """Return a model's rows of some metrics (none named: of all).

    Raises:
        ValueError: the table does not have this model or one of the metrics.
    """
    part = frame[frame["model"] == model]
    if part.empty:
        raise ValueError(f"expected a model of the table ({', '.join(frame['model'].unique())}), got {model!r}")
    for metric in metrics:
        if metric not in set(part["metric"]):
            raise ValueError(
                f"expected a metric of {model} in the table ({', '.join(part['metric'].unique())}), got {metric!r}"
            )
    return part[part["metric"].isin(metrics)] if metrics else part


def without_controls(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table without its negative controls, which are never compared with methods."""
    return frame[~frame["method"].isin(catalogue.controls())]


def require_rows(rows: pd.DataFrame, model: str, what: str) -> pd.DataFrame:
    """Return a model's rows that have what is to be drawn.

    Raises:
        ValueError: there are none.
    """
    if rows.empty:
        raise ValueError(f"expected runs of {model} with {what}, got none: tabulate them with method=none")
    return rows


def direction(frame: pd.DataFrame, metric: str) -> bool | None:
    """Return whether higher values of a metric are better; None where neither is."""
    rows = frame.loc[frame["metric"] == metric, "higher_is_better"]
    if rows.empty:
        metrics = ", ".join(frame["metric"].unique())
        raise ValueError(f"expected a metric of the table, got {metric!r}: it has {metrics}")
    higher = rows.iloc[0]
    return None if pd.isna(higher) else str(higher) == "True"


def primary_pair(frame: pd.DataFrame) -> tuple[str, str]:
    """Return the primary metric of what a method is for, and that of quality.

    Raises:
        ValueError: the table does not mark both.
    """
    marked = frame[frame["primary"].isin(ROLES)].drop_duplicates("metric").set_index("metric")["primary"]
    aim, quality = (
        next((name for name, role in marked.items() if (role == "quality") == last), None) for last in (False, True)
    )
    if aim is None or quality is None:
        raise ValueError(f"expected a primary metric of quality and another one, got {marked.to_dict()}: tabulate anew")
    return aim, quality


def with_window(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table with a column `window`, in words, for the bounds t_high and t_low, which are one setting."""
    window = next(setting for setting in catalogue.settings() if setting.columns == ("t_low", "t_high"))
    return frame.assign(window=[window.text(row) or UNSET for _, row in frame.iterrows()])


def by_steps(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table in which a model with several numbers of steps counts as several, as "mini-sdxl, 4 steps".

    A run is compared with the baseline of as many steps, so pages and figures keep the numbers of steps apart.
    """
    several = frame.groupby("model")["steps"].transform("nunique") > 1
    counts = frame["steps"].map(lambda steps: "1 step" if steps == 1 else f"{steps:g} steps")
    return frame.assign(model=frame["model"].where(~several, frame["model"] + ", " + counts))


def swept_settings(frame: pd.DataFrame, along: str | None = None) -> list[str]:
    """Return the settings that differ among the runs of one method; the bounds of the window count as one.

    Args:
        frame: an experiment's CSV.
        along: a setting; those that follow from it, as alpha chosen for each number of steps, are left out.
    """
    names = [name for name in SETTING if name not in ("model", "method", "t_low", "t_high")] + ["window"]
    groups = ["method"] if along in (None, "method") else ["method", along]
    counts = with_window(frame).groupby(groups, dropna=False)[[name for name in names if name != along]]
    counts = counts.nunique(dropna=False).max()
    return [name for name in names if name != along and counts[name] > 1]


def format_setting(value: Any, without: str = "") -> str:
    """Return a setting as it is printed: text as it is, a number in six digits, `without` where there is none."""
    return without if pd.isna(value) else str(value) if isinstance(value, str | bool) else f"{value:g}"


def humanize(name: str) -> str:
    """Return a name from code as words."""
    return name.replace("_", " ")
