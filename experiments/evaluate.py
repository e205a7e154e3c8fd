"""Act 2: a run folder becomes one JSON of per-group values for every metric.

    python -m experiments.evaluate experiment=diversity

The overrides are those of `experiments.generate`, hence the same runs. What is scored already is skipped.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from eval.encoders import EmbeddingCache
from eval.images import METRICS
from eval.metrics import ImageSet, Metric, is_current, measure, read_document
from experiments import project_path
from experiments.runs import Run

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> list[Path]:
    """Score the run that `cfg` asks for with every configured metric and return the JSON files.

    Raises:
        FileNotFoundError: the images were not generated, or an encoder's weights are missing.
    """
    run = Run.find(cfg)
    cache = EmbeddingCache(project_path(cfg.outputs) / ".embeddings")
    images = ImageSet.open(run.folder, cache, progress=True)
    files = []
    for name, spec in cfg.metric.items():
        metric = instantiate(spec)
        file = document_path(run, name, metric)
        label = f"{cfg.model.name} {cfg.method.name}: {name} by {metric.encoder.name}"
        if file.exists() and is_current(read_document(file), metric, images):
            log.info("%s is there", label)
        else:
            log.info("%s", label)
            measure(metric, images, path=file)
        files.append(file)
    return files


def document_path(run: Run, name: str, metric: Metric) -> Path:
    """Return where the values of a metric lie: one file for every encoder, so that none overwrites another's."""
    return run.folder / METRICS / f"{name}-{re.sub(r'[^A-Za-z0-9.-]+', '_', metric.encoder.id)}.json"


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    try:
        evaluate(cfg)
    except FileNotFoundError as error:  # it says what to do; a traceback would bury that
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
