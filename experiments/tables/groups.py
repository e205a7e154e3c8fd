"""Values of single groups: one row per run, metric and group, in `<results>/<experiment>/groups.csv.gz`.

A metric of label counts has a row per category instead, and a metric of the whole set of images has none. 200
groups of 24 runs with 10 metrics take half a megabyte.
"""

import gzip
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval.files import read_regular, write_bytes
from eval.intervals import SUBSETS, GroupValue, has_value, values_of
from experiments.tables.columns import commands
from experiments.tables.paths import result_file

#: Name of the file in the folder of an experiment.
GROUPS = "groups.csv.gz"
#: Significant digits of the values. Tables have six, and `experiments.rank` makes six of differences of these values,
#: which may be a thousandth of them.
DIGITS = 9
COLUMNS = [
    "run_id", "model", "method", "metric", "encoder", "category", "prompt_id", "group_seed", "n_images", "value",
]  # fmt: skip


def group_rows(row: Mapping[str, Any], document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the values that a number of a table is the mean of.

    Args:
        row: the number's row of the table.
        document: the score that the number comes from.
    """
    if document["aggregate"] == SUBSETS or not has_value(document):
        return []
    shared = {name: row[name] for name in ("run_id", "model", "method", "metric", "encoder")}
    rows = []
    for value in values_of(document["groups"], document["aggregate"]):
        prompt_id, _, seed = value["group"].rpartition("/")
        place = {"category": value["category"], "prompt_id": prompt_id, "group_seed": seed}
        rows.append(shared | place | {"n_images": value["n_images"], "value": value["value"]})
    return rows


def put_groups(path: Path, rows: Sequence[Mapping[str, Any]], table: pd.DataFrame) -> None:
    """Write the groups of a table's numbers: `rows`, and those that the file has of other numbers of the table.

    Equal values give equal bytes. The caller holds the lock of the table.
    """
    frame = pd.DataFrame(rows, columns=COLUMNS)
    if path.exists():
        earlier = _read(path)
        replaced = set(zip(frame["run_id"], frame["metric"], strict=True))
        stays = [number not in replaced for number in zip(earlier["run_id"], earlier["metric"], strict=True)]
        frame = pd.concat([earlier[stays], frame])
    order = {number: place for place, number in enumerate(zip(table["run_id"], table["metric"], strict=True))}
    places = pd.Series([order.get(number, -1) for number in zip(frame["run_id"], frame["metric"], strict=True)])
    frame = frame.set_axis(places).sort_index(kind="stable")
    text = frame[frame.index >= 0].to_csv(index=False, float_format=f"%.{DIGITS}g")
    # Without a time stamp, so that equal values give equal bytes.
    write_bytes(path, gzip.compress(text.encode(), mtime=0))


def read_groups(results: str | Path, experiment: str) -> pd.DataFrame:
    """Read the values of groups of an experiment.

    Raises:
        FileNotFoundError: they are not here; the message names the command that makes them.
        ValueError: the file is damaged.
    """
    path = result_file(results, experiment, GROUPS)
    if not path.exists():
        command = commands(experiment)[1]
        raise FileNotFoundError(f"expected the values of groups in {path}, got no file: make it with {command}")
    return _read(path)


def _read(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(io.BytesIO(gzip.decompress(read_regular(path))), dtype=str, keep_default_na=False)
        frame = frame.astype({"n_images": int, "value": float})
    except (ValueError, KeyError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"expected values of groups in {path}, got a damaged file: move it away") from error
    if list(frame.columns) != COLUMNS:
        raise ValueError(f"expected the columns {', '.join(COLUMNS)} in {path}, got others: move it away")
    return frame


def values_of_run(groups: pd.DataFrame, run_id: str, metric: str) -> list[GroupValue]:
    """Return the values of a run's groups, as `eval.intervals` takes them."""
    rows = groups[(groups["run_id"] == run_id) & (groups["metric"] == metric)]
    return [
        GroupValue(
            group=f"{row.prompt_id}/{row.group_seed}", category=row.category, n_images=row.n_images, value=row.value
        )
        for row in rows.itertuples()
    ]
