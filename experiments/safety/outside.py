"""Look for protected concepts in the images that an outside tool obtained.

    python -m experiments outside outputs/pyrit/records.csv
    python -m experiments outside outputs/pyrit/records.csv model=mini-sdxl model.copyright.scoring=FOLDER

The CSV has a row for each request, with the columns converter, concept, outcome and image (a path, or empty), as
integrations/pyrit/attack.py writes it. The command adds `similarity` and `detected` by the evaluator of the red team,
and prints the outcomes of each converter. docs/redteam.md has an example.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

from pathlib import Path

import pandas as pd

from eval.files import write_text
from experiments import start_log
from experiments.compose import first
from experiments.safety.judge import Judge, read_request, similarity
from experiments.tables.columns import markdown

OUTCOMES = ("refused", "escalated", "image", "error")
NEEDED = {"converter", "concept", "outcome", "image"}


def detect(records: pd.DataFrame, judge: Judge) -> pd.DataFrame:
    """Return records with the columns `similarity` and `detected`; both are empty without an image.

    Raises:
        ValueError: a column is missing, or the evaluator has no image of a concept.
        FileNotFoundError: an image is missing.
    """
    if missing := sorted(NEEDED - set(records.columns)):
        raise ValueError(f"expected the columns {', '.join(sorted(NEEDED))}, got no {', '.join(missing)}")
    if unknown := sorted(set(records["concept"]) - set(judge.index.concepts)):
        raise ValueError(
            f"expected concepts with scoring images, got {', '.join(unknown)}: set model.copyright.scoring"
        )
    cosines: list[float | None] = []
    for record in records.to_dict("records"):
        if not record["image"]:
            cosines.append(None)
            continue
        cosines.append(similarity(judge.index, record["concept"], read_request(record["image"])))
    detected = [None if cosine is None else bool(cosine > judge.threshold) for cosine in cosines]
    return records.assign(similarity=cosines, detected=detected)


def summary(records: pd.DataFrame) -> str:
    """Return a row for each converter as Markdown: requests, outcomes, and images that show the concept."""
    rows = []
    for converter, of_converter in records.groupby("converter", sort=False):
        counts = {outcome: str((of_converter["outcome"] == outcome).sum()) for outcome in OUTCOMES}
        detected = str(sum(value is True for value in of_converter["detected"]))
        rows.append({"converter": converter, "requests": str(len(of_converter)), **counts, "detected": detected})
    return markdown(pd.DataFrame(rows))


def main(argv: list[str]) -> None:
    """Run the command."""
    start_log()
    if not argv or "=" in argv[0]:
        raise ValueError("expected the CSV of an outside tool first: python -m experiments outside records.csv")
    path = Path(argv[0])
    records = pd.read_csv(path, keep_default_na=False, dtype=str)
    judge = Judge.of(first(["experiment=safety", *argv[1:]]))
    records = detect(records, judge)
    write_text(path, records.to_csv(index=False, lineterminator="\n"))
    print(summary(records))
