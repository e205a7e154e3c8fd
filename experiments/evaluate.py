"""Act 2: a run folder becomes one JSON of per-group values for every metric.

    python -m experiments.evaluate experiment=diversity

The overrides are those of `experiments.generate`, hence the same runs. What is scored already is skipped.

    python -m experiments.evaluate images=FOLDER metric=core model=sdxl

scores any folder of images, one subfolder a prompt (see `eval.images.read_manifest`), and prints the numbers. Which
CLIP model, labels and reference images are used follows from `model`, here as there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from eval.cache import EmbeddingCache
from eval.images import METRICS
from eval.intervals import interval_of
from eval.metrics import ImageSet, Metric, is_current, measure, read_document
from experiments import project_path
from experiments.runs import Run

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> list[Path]:
    """Score the run that `cfg` asks for with every configured metric and return the JSON files.

    Raises:
        FileNotFoundError: the images were not generated, or an encoder's weights are missing.
        ValueError: an image cannot be read, or there are too few for a metric.
    """
    run = Run.find(cfg)
    images = _open(cfg, run.folder)
    label = f"{cfg.model.name} {cfg.method.name}"
    files = []
    for name, metric in configured_metrics(cfg):
        try:
            files.append(_score(images, name, metric, run.folder / METRICS, label))
        except ValueError as error:
            raise ValueError(f"{label}: {name}: {error} (~metric.{name} leaves it out)") from error
    return files


def evaluate_folder(cfg: DictConfig) -> tuple[pd.DataFrame, dict[str, str]]:
    """Score the folder `cfg.images` with every configured metric.

    A metric that cannot measure this folder (too few images, no weights) does not keep the others from it. The JSONs go
    into `cfg.scores`, or `metrics` in the folder.

    Returns:
        A table, one row a metric: value, interval, direction, what it was scored by, how many units and images; and for
        each metric without a number, why.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no images in it, or no metric can measure them.
    """
    images = _open(cfg, Path(cfg.images).expanduser().resolve())
    scores = images.folder / METRICS if cfg.scores is None else Path(cfg.scores).expanduser().resolve()
    rows, refused = [], {}
    for name, metric in configured_metrics(cfg):
        try:
            document = read_document(_score(images, name, metric, scores, images.folder.name))
        except (ValueError, TypeError, FileNotFoundError) as error:
            refused[name] = str(error)
            continue
        value, low, high = interval_of(document, **interval_options(cfg, document["aggregate"]))
        rows.append(
            {
                "metric": name,
                "value": f"{value:.4g}",
                f"{100 * cfg.bootstrap.level:g} % interval": "" if low is None else f"{low:.4g} to {high:.4g}",
                "better": {True: "higher", False: "lower", None: "-"}[document["higher_is_better"]],
                "scored by": document["encoder"]["id"],
                "units": str(document["n_groups"]),
                "images": str(document["n_images"]),
            }
        )
    if not rows:
        raise ValueError(f"No configured metric could measure {images.folder}.\n{_reasons(refused)}")
    return pd.DataFrame(rows), refused


def _reasons(refused: dict[str, str]) -> str:
    """Say why metrics have no number, each reason once."""
    names: dict[str, list[str]] = {}
    for name, reason in refused.items():
        names.setdefault(reason, []).append(name)
    return "\n".join(f"Not measured: {', '.join(metrics)}: {reason}" for reason, metrics in names.items())


def configured_metrics(cfg: DictConfig) -> Iterator[tuple[str, Metric]]:
    """Build the configured metrics one by one, so that no two encoders need to be held at a time.

    A metric is called what the configuration calls it, in documents and tables. One that compares with real images,
    of which the configuration has none (`reference: null`), is left out, and the log says so.
    """
    for name, spec in cfg.metric.items():
        if "reference" in spec and spec.reference is None:
            log.warning(
                "%s is left out: it compares with real images, and there are none for model=%s; give a folder, one "
                "subfolder a category: model.reference_images=FOLDER",
                name,
                cfg.model.name,
            )
        else:
            yield name, instantiate(spec, name=name)


def interval_options(cfg: DictConfig, aggregate: str) -> dict[str, Any]:
    """Return the configured options of `eval.intervals.interval_of` for a kind of metric.

    Only means are resampled by clusters: an entropy is one of fixed categories, and where a category has one prompt,
    nothing could be said of others.
    """
    options = OmegaConf.to_container(cfg.bootstrap)
    return options if aggregate == "mean" else options | {"cluster": None}


def document_path(folder: Path, name: str, metric: Metric) -> Path:
    """Return where the values of a metric lie: one file for every encoder, so that none overwrites another's."""
    return folder / f"{name}-{re.sub(r'[^A-Za-z0-9.-]+', '_', metric.judge.id)}.json"


def _open(cfg: DictConfig, folder: Path) -> ImageSet:
    return ImageSet.open(folder, EmbeddingCache(project_path(cfg.outputs) / ".embeddings"), progress=True)


def _score(images: ImageSet, name: str, metric: Metric, folder: Path, label: str) -> Path:
    file = document_path(folder, name, metric)
    label = f"{label}: {name} by {metric.judge.name}"
    if file.exists() and is_current(read_document(file), metric, images):
        log.info("%s is there", label)
    else:
        log.info("%s", label)
        measure(metric, images, path=file)
    return file


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    try:
        if cfg.images is None:
            evaluate(cfg)
        else:
            table, refused = evaluate_folder(cfg)
            print(table.to_markdown(index=False, disable_numparse=True))
            if refused:
                print(_reasons(refused))
    except FileNotFoundError as error:  # it says what to do; a traceback would bury that
        raise SystemExit(str(error)) from None
    except ValueError as error:
        if cfg.images is None:
            raise
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
