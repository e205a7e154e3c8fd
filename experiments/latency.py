"""What the method costs: time and memory of the same calls without and with it, in turns, in one process.

    python -m experiments.latency experiment=latency
    python -m experiments.latency experiment=latency latency.only=[sdxl-1024] force=true

The configuration says what is measured (conf/experiment/latency.yaml), experiments/timing/ how. Each case is one row a
variant and window in `<results>/latency.csv`, written when the case is done; a case that is there already, of this
device and these versions, is skipped. Tables and figures are made of the CSV; of the CSV as it is with
latency.cases=false latency.curves=false.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments import project_path, select_device, start_log
from experiments.configs import flag
from experiments.figures.style import using
from experiments.tables import put_rows, read_csv
from experiments.timing import report
from experiments.timing.cases import composed, configured_cases
from experiments.timing.measure import find_weights, measure, origin
from experiments.timing.rows import COLUMNS, CONFIGURATION, SAME_CASE

log = logging.getLogger(__name__)


def read_rows(path: Path) -> pd.DataFrame:
    """Read the table, if there is one; columns that one of an earlier version does not have are empty."""
    return read_csv(path).reindex(columns=COLUMNS) if path.exists() else pd.DataFrame(columns=COLUMNS)


def run(overrides: Sequence[str]) -> str:
    """Measure what is not in the table yet, write tables and figures, and return the tables as Markdown.

    Raises:
        ValueError: the configuration asks for something that is not measured.
        FileNotFoundError: a checkpoint is not there, or there is nothing to make tables of.
    """
    cfg = composed(*overrides)
    force = flag(cfg, "force")
    if flag(cfg, "offload"):
        raise ValueError("expected offload=false: transfers would be measured, not the method; choose a smaller batch.")
    device, folder = select_device(cfg.device), project_path(cfg.results)
    path = folder / f"{cfg.name}.csv"
    for case in configured_cases(overrides):
        weights = find_weights(case.model, cfg.latency.weights)
        common, known = origin(case, cfg, device, weights), read_rows(path)
        if not force and ((known["setting"] == common["setting"]) & (known["part"] == case.part)).any():
            log.info("%s (%s): measured already", case.label, case.part)
            continue
        rows = [common | row for row in measure(case, weights, cfg, device)]
        put_rows(path, rows, COLUMNS, CONFIGURATION, SAME_CASE)
    if not path.exists():
        raise FileNotFoundError(f"expected the table {path}, got no file: let latency.cases or latency.curves be true.")
    return report.write(read_rows(path), cfg, folder)


def main(argv: list[str]) -> None:
    start_log()
    cfg = composed(*argv)
    with using(cfg.style, cfg.width):
        print(run(argv))
    print(*sorted(project_path(cfg.results).glob(f"{cfg.name}[._]*")), sep="\n")
