"""Tables as files: a CSV whose rows replace their predecessors, and how tables are printed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval.files import write_text
from experiments.locks import locked

#: Columns that hold text also where they look like numbers.
TEXT = dict.fromkeys(
    ("run_id", "commit", "primary", "setting", "torch", "diffusers", "cuda", "python", "call_how"), str
)
#: Columns that hold numbers alone.
NUMBERS = {
    "alpha", "threshold", "t_low", "t_high", "value", "ci_low", "ci_high", "difference", "difference_low",
    "difference_high", "p_value", "p_holm", "effect_size", "win_rate", "margin", "pushed_share", "seconds",
}  # fmt: skip
Key = tuple[str, ...]


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
    return frame.to_csv(index=False, float_format="%.6g")


def row_keys(
    file: Path | io.StringIO, columns: Sequence[str], alike: Mapping[str, Mapping[str, str]] | None = None
) -> list[Key]:
    """Return what each row of a CSV holds in `columns`, in one spelling: 1, 1.0 and 1.00 are one setting.

    Args:
        file: the CSV.
        columns: of the key; those that the file does not have are empty.
        alike: by column, values that count as others.
    """
    text = pd.read_csv(file, dtype=str, keep_default_na=False).reindex(columns=columns, fill_value="")
    return [tuple(map(_spelled, row)) for row in text.replace(alike or {}).itertuples(index=False)]


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
    """
    text = csv_text(pd.DataFrame(rows, columns=columns))
    with lock(path):
        frame = pd.read_csv(io.StringIO(text), dtype=TEXT)
        if path.exists():
            old = read_csv(path).reindex(columns=columns)
            was, keys = (row_keys(file, key, alike) for file in (path, io.StringIO(text)))
            frame = _merged(old, was, frame, keys)
        if finish is not None:
            finish(frame)
        write_text(path, csv_text(frame))
        return read_csv(path)


def lock(path: Path) -> contextlib.AbstractContextManager[bool]:
    """Hold a CSV: between reading and writing, another process would have its rows lost."""
    return locked(path.with_name(f".{path.name}.lock"))


def _merged(old: pd.DataFrame, was: list[Key], new: pd.DataFrame, keys: list[Key]) -> pd.DataFrame:
    """Return the rows of two tables, given with their `row_keys`; a new row stands where its predecessor stood."""
    fresh = set(keys)
    kept = [key not in fresh for key in was]
    # As objects, since an empty column has no type to agree on; then numbers are numbers again, and written as such.
    frame = pd.concat([old[kept].astype(object), new.astype(object)], ignore_index=True).infer_objects()
    # So the table does not depend on what was measured again, and when.
    place = {key: position for position, key in reversed(list(enumerate(was)))}
    order = [key for key, keep in zip(was, kept, strict=True) if keep] + keys
    return frame.iloc[sorted(range(len(order)), key=lambda i: place.get(order[i], len(was)))].reset_index(drop=True)


def _spelled(value: str) -> str:
    try:
        return f"{float(value):.6g}"
    except ValueError:
        return value


def markdown(table: pd.DataFrame) -> str:
    """Return a table of texts as Markdown."""
    return table.to_markdown(index=False, disable_numparse=True)


def latex(tables: Iterable[pd.DataFrame]) -> str:
    """Return tables of texts as LaTeX, without those that are empty."""
    return "\n".join(table.to_latex(index=False, escape=True) for table in tables if len(table))
