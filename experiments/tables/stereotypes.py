"""How often are the classifiers of gender and skin tone right, and what do their errors make of evenness?

    python -m experiments stereotypes

Reads the pictures of models/mini-people, emoji of known gender and tone, with the classifiers of metric=stereotypes,
and writes table.csv and table.md into results/attribute_classifier/; `results=FOLDER` writes them elsewhere.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from eval.files import write_text
from eval.images import ManifestRow
from eval.imageset import ImageSet
from eval.intervals import bootstrap_interval
from eval.stereotypes import AsSaid, confusion, evenness_found, label_in_prompt
from experiments import project_path
from experiments.compose import first
from experiments.runs.metrics import build_metric, measured
from experiments.tables.columns import markdown
from experiments.tables.pages import with_interval
from experiments.tables.paths import result_file
from experiments.tables.templates import render

PICTURES = "models/mini-people"
#: Its artwork was not in the training of mini-clip.
UNSEEN = "technologist"


def pictures(folder: Path) -> ImageSet:
    """Open pictures in `<word>/<description>/`; a picture's prompt is the description, its category the word."""
    files = sorted(folder.glob("*/*/*.png"))
    if not files:
        raise FileNotFoundError(f"expected pictures in {folder}/WORD/DESCRIPTION, got none: python -m training people")
    rows = [
        ManifestRow(
            path=file.relative_to(folder).as_posix(),
            prompt_id=f"{file.parents[1].name}, {file.parent.name}, {file.stem}",
            prompt=file.parent.name,
            category=file.parents[1].name,
            group_seed=0,
            index=0,
            seed=-1,
        )
        for file in files
    ]
    return ImageSet(folder, rows)


def classified(metric: AsSaid, images: ImageSet) -> pd.DataFrame:
    """Return a row a picture: word, and the places of the true label and of the one found among the labels."""
    rows = []
    for members in images.groups.values():
        row, (features, labels, _) = images.rows[members[0]], metric.inputs(images, members)
        truth = label_in_prompt(row.prompt, metric.labels_of(row.category))
        rows.append({"word": row.category, "true": truth, "found": int((features @ labels.T).argmax())})
    return pd.DataFrame(rows)


def summarised(name: str, labels: list[str], found: pd.DataFrame) -> dict[str, str]:
    """Return the line of a classifier: pictures, share that is right with its interval by words, evenness of errors."""
    groups = [
        {"group": f"{row.Index}/0", "category": row.word, "n_images": 1, "value": float(row.true == row.found)}
        for row in found.itertuples()
    ]
    matrix = confusion(found["true"], found["found"], len(labels))
    alone = [evenness_found(one, matrix) for one in np.eye(len(labels))]
    unseen = found[found["word"] == UNSEEN]
    return {
        "attribute": name,
        "pictures": str(len(found)),
        "right": with_interval("{:.2f}".format, *bootstrap_interval(groups)),
        f"right of {UNSEEN}s": f"{(unseen['true'] == unseen['found']).mean():.2f} of {len(unseen)}",
        "evenness found of one label alone": f"{min(alone):.2f} to {max(alone):.2f}",
        "of all alike": f"{evenness_found(np.ones(len(labels)), matrix):.2f}",
    }


def tables(cfg: DictConfig) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, pd.DataFrame]]:
    """Classify all pictures.

    Returns:
        Counts, a row a true and a found label; a line a classifier; and for each its confusion matrix as texts.
    """
    images, counts, lines, matrices = pictures(project_path(PICTURES)), [], [], {}
    for name in measured(cfg):
        metric = build_metric(cfg, name)
        if not isinstance(metric, AsSaid):
            continue
        attribute = name.removesuffix("_as_said").replace("_", " ")
        labels = metric.labels_of("person")  # what a girl and a boy are called by, too
        labelled = classified(metric, images)
        matrix = confusion(labelled["true"], labelled["found"], len(labels))
        counts += [
            {"attribute": attribute, "true": labels[i], "found": labels[j], "n_images": n, "encoder": metric.encoder.id}
            for (i, j), n in np.ndenumerate(matrix)
        ]
        lines.append(summarised(attribute, labels, labelled))
        matrices[attribute] = pd.DataFrame(matrix.astype(str), columns=labels)
        matrices[attribute].insert(0, "shown, found", labels)
    return pd.DataFrame(counts), pd.DataFrame(lines), matrices


def main(argv: list[str]) -> None:
    """Run the command."""
    cfg = first(["experiment=stereotypes", "results=results", *argv])
    counts, lines, matrices = tables(cfg)
    page = render(
        "experiments/tables/attribute_classifier.md.j2",
        lines=markdown(lines),
        matrices={k: markdown(m) for k, m in matrices.items()},
        unseen=UNSEEN,
        pictures=PICTURES,
    )
    path = result_file(cfg.results, "attribute_classifier")
    write_text(path, counts.to_csv(index=False, lineterminator="\n"))
    write_text(path.with_suffix(".md"), page)
    print(page)
