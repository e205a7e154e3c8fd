"""Compare the evaluator and the output check with labels that a person gave to 200 images by looking at them.

    python -m experiments labels                    (results/labels/labels.csv and images.webp)
    python -m experiments labels labels=FOLDER      (your own, in the same layout)

Writes `<results>/labels/table.md` with precision and recall of each, and the agreement of two rounds of labels. The
folder has `images.webp`, tiles of one size in rows of 20, and `labels.csv`, whose rows are in the order of the tiles:
sha256 of the tile's pixels, prompt_id, group_seed, method, requested, label, second_label. A label is a concept, or
`none`.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import binomtest

from eval.files import write_text
from experiments import project_path
from experiments.compose import first
from experiments.configs import build
from experiments.safety.judge import Judge
from experiments.tables.columns import markdown, printed
from experiments.tables.paths import result_file

#: The system whose check is compared.
SYSTEM = ("experiment=safety", "guard=keyword", "method=guarded", "method.layers=check")
#: Published labels.
FOLDER = "results/labels"
#: Tiles in a row of the image.
IN_ROW = 20
NONE = "none"
LEGEND = """\
positive: the label is one of the 20 concepts. precision: share of the detected images that show a concept; recall: \
share of the images that show a concept which are detected; false alarms: share of the other images that are detected. \
95 % Wilson intervals; images of one concept are not independent, so true intervals are wider. named: share of the \
detected positives whose nearest concept is the label. The project gave the labels by looking at the images, without \
prompt or method, once in each of two orders."""


@dataclass(frozen=True)
class Comparison:
    """Detections counted against labels.

    Attributes:
        true, false: detected images that show a concept, and that show none.
        missed, passed: images that are not detected and show a concept, and that show none.
        named: detected images whose named concept is the label.
    """

    true: int
    false: int
    missed: int
    passed: int
    named: int


def compare(labels: Sequence[str], detections: Sequence[str | None]) -> Comparison:
    """Count detections, a concept or None for each image, against labels, a concept or "none".

    Raises:
        ValueError: there is not one detection for each label.
    """
    counts = dict.fromkeys(("true", "false", "missed", "passed", "named"), 0)
    for label, concept in zip(labels, detections, strict=True):
        if label == NONE:
            counts["passed" if concept is None else "false"] += 1
        else:
            counts["missed" if concept is None else "true"] += 1
            counts["named"] += label == concept
    return Comparison(**counts)


def kappa(labels: Sequence[str], others: Sequence[str]) -> float:
    """Return Cohen's kappa of two rounds of labels of the same images: 1 for equal ones, NaN if all are one label."""
    pairs = list(zip(labels, others, strict=True))
    agreement = sum(one == other for one, other in pairs) / len(pairs)
    shares = [pd.Series(list(column)).value_counts(normalize=True) for column in (labels, others)]
    by_chance = float(shares[0].mul(shares[1], fill_value=0).sum())
    return (agreement - by_chance) / (1 - by_chance) if by_chance < 1 else float("nan")


def read_labels(folder: Path) -> tuple[np.ndarray, pd.DataFrame]:
    """Return labelled images, uint8 [n, side, side, 3], and their rows.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the rows are not those of the images.
    """
    for name in ("images.webp", "labels.csv"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"expected {folder / name}, got no file: `python -m experiments labels --help`")
    rows = pd.read_csv(folder / "labels.csv", keep_default_na=False)
    missing = {"sha256", "method", "label", "second_label"} - set(rows)
    if missing or rows.empty:
        raise ValueError(f"expected labels with the columns sha256, method, label, second_label in {folder}")
    with Image.open(folder / "images.webp") as file:
        pixels = np.asarray(file.convert("RGB"))
    side = pixels.shape[1] // IN_ROW
    tiles = pixels[: pixels.shape[0] // side * side, : IN_ROW * side].reshape(-1, side, IN_ROW, side, 3)
    images = tiles.swapaxes(1, 2).reshape(-1, side, side, 3)[: len(rows)]
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    if digests != rows["sha256"].tolist():
        raise ValueError(f"expected the images in {folder} in the order of labels.csv, got others: restore both files")
    return images, rows


def render(detections: dict[str, Sequence[str | None]], rows: pd.DataFrame) -> str:
    """Return the page.

    Args:
        detections: for the name of each detector, a concept or None for each image.
        rows: of the labels.
    """
    table = []
    subsets = {"all": rows.index, **{str(name): part.index for name, part in rows.groupby("method", sort=False)}}
    for name, concepts in detections.items():
        for subset, index in subsets.items():
            counts = compare(rows["label"][index].tolist(), [concepts[place] for place in index])
            table.append(
                {
                    "detector": name,
                    "method": subset,
                    "n": str(len(index)),
                    "positive": str(counts.true + counts.missed),
                    "precision": _share(counts.true, counts.true + counts.false),
                    "recall": _share(counts.true, counts.true + counts.missed),
                    "false alarms": _share(counts.false, counts.false + counts.passed),
                    "named": f"{counts.named} of {counts.true}",
                }
            )
    agreement = kappa(rows["label"].tolist(), rows["second_label"].tolist())
    differ = int((rows["label"] != rows["second_label"]).sum())
    rounds = f"Two rounds of labels differ for {differ} of {len(rows)} images: Cohen's kappa {agreement:.3f}."
    made_by = "Images of mini-sdxl. Made by `python -m experiments labels`."
    return f"# labels\n\n{made_by}\n\n{markdown(printed(table))}\n\n{rounds}\n\n{LEGEND}\n"


def _share(part: int, total: int) -> str:
    if not total:
        return f"{part} of {total}"
    interval = binomtest(part, total).proportion_ci(method="wilson")
    return f"{part / total:.2f} [{interval.low:.2f}, {interval.high:.2f}]; {part} of {total}"


def main(argv: list[str]) -> None:
    """Run the command."""
    folders = [text.partition("=")[2] for text in argv if text.startswith("labels=")]
    images, rows = read_labels(project_path(folders[-1] if folders else FOLDER))
    cfg = first([*SYSTEM, *(text for text in argv if not text.startswith("labels="))])
    judge, check = Judge.of(cfg), build(cfg.method).check
    requests = images[:, None] / np.float32(255)
    page = render(
        {
            f"evaluator: {judge.metric.encoder.name}": [judge.nearest(request) for request in requests],
            f"output check: {check.encoder.name}": [check.detect(request)[0] for request in requests],
        },
        rows,
    )
    write_text(result_file(cfg.results, "labels").with_suffix(".md"), page)
    print(page)
