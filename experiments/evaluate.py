"""Act 2: a run folder becomes one JSON of per-group values for every metric.

    python -m experiments.evaluate experiment=diversity

The overrides are those of `experiments.generate`, hence the same runs. What is scored already is skipped.

    python -m experiments.evaluate images=FOLDER metric=core model=sdxl

scores any folder of images, one subfolder a prompt (see `eval.images.read_manifest`), and prints the numbers. Which
CLIP model, labels and reference images are used follows from `model`, here as there; those of a mini model, the
default, are for emoji artwork alone, and the log says so.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import contextlib
import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from eval.files import read_document
from eval.images import METRICS, count_withheld, scores_path
from eval.imageset import EmbeddingCache, ImageSet
from eval.intervals import has_value, interval_of, n_units
from eval.metric import Metric, SetMetric, is_current, measure
from experiments import project_path
from experiments.configs import expand, has_launcher, launch
from experiments.runs import Run

log = logging.getLogger(__name__)

#: Images that a metric may need and that a model's configuration may lack: how to give them.
NEEDS = {
    "reference": "it compares with real images; give a folder, one subfolder a category: model.reference_images=FOLDER",
    "references": "it compares with protected assets; give a folder, one subfolder a character: "
    "model.copyright.scoring=FOLDER",
    "held_out": "its threshold is calibrated on pictures that show no protected asset; give a folder of them, one "
    "subfolder a kind: model.copyright.held_out=FOLDER",
}


def evaluate(cfg: DictConfig) -> list[Path]:
    """Score the run that `cfg` asks for with every configured metric and return the JSON files.

    A metric has no value where the groups that it is of are withheld, and the log says so.

    Raises:
        FileNotFoundError: the images were not generated, or an encoder's weights are missing.
        ValueError: an image cannot be read, or there are too few for a metric.
    """
    run = Run.find(cfg)
    images = _open(cfg, run.folder)
    label = f"{cfg.model.name} {cfg.method.name}"
    if not images.rows:
        withheld = f"{len(images.withheld)} groups are withheld ({count_withheld(images.withheld)})"
        log.warning("%s: all %s: there are no images to measure: %s", label, withheld, run.folder)
    files, made = [], 0
    for name, metric in configured_metrics(cfg):
        try:
            file, new = _score(images, name, metric, run.folder / METRICS, label)
        except ValueError as error:
            raise ValueError(f"{label}: {name}: {error} (~metric.{name} leaves it out)") from error
        files.append(file)
        made += new
    log.info("%s: %d metrics are there, %d of them measured now: %s", label, len(files), made, run.folder)
    return files


def evaluate_folder(cfg: DictConfig) -> tuple[pd.DataFrame, dict[str, str]]:
    """Score the folder `cfg.images` with every configured metric.

    A metric that cannot measure this folder (too few images, no weights) does not keep the others from it. The JSONs go
    into `cfg.scores`, or `metrics` in the folder, where those that are there are replaced and never read.

    Returns:
        A table, one row a metric: value, interval, direction, what it was scored by, how many units and images; and for
        each metric without a number, why.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no images in it, or no metric can measure them.
    """
    if cfg.model.kind == "mini":
        text = (
            "model=%s: labels, reference images and the scorer %s are those of the mini models, which know emoji "
            "artwork alone; for other images give model=sdxl"
        )
        log.warning(text, cfg.model.name, cfg.model.scorer.get("name", cfg.model.scorer._target_))
    images = _open(cfg, Path(cfg.images).expanduser().resolve())
    scores = images.folder / METRICS if cfg.scores is None else Path(cfg.scores).expanduser().resolve()
    # Whoever made the images may have made the numbers beside them, too.
    trusted = not scores.is_relative_to(images.folder)
    rows, refused = [], {}
    for name, metric in configured_metrics(cfg):
        try:
            document = read_document(_score(images, name, metric, scores, images.folder.name, trusted)[0])
            if not has_value(document):
                raise ValueError(f"too few images: of its groups are withheld {count_withheld(images.withheld)}")
        except (ValueError, TypeError, FileNotFoundError) as error:
            refused[name] = str(error)
            continue
        value, low, high = interval_of(document, **cfg.bootstrap)
        rows.append(
            {
                "metric": name,
                "value": f"{value:.4g}",
                f"{100 * cfg.bootstrap.level:g} % interval": "" if low is None else f"{low:.4g} to {high:.4g}",
                "better": {True: "higher", False: "lower", None: "-"}[document["higher_is_better"]],
                "scored by": document["encoder"]["id"],
                "units": str(n_units(document, cfg.bootstrap.cluster)),
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

    A metric is called what the configuration calls it, in documents and tables. One for which the configuration has no
    images to compare with is left out, and the log says so.
    """
    for name, spec in cfg.metric.items():
        lacking = [need for need in NEEDS if need in spec and spec[need] is None]
        if lacking:
            log.warning("%s is left out: %s (model=%s)", name, NEEDS[lacking[0]], cfg.model.name)
            continue
        arguments = {"name": name}
        if "baseline" in spec:
            if cfg.images is not None:
                log.warning("%s is left out: it compares a run with the one without a method", name)
                continue
            arguments["baseline"] = str(Run.find(cfg, baseline=True).folder)
        settings = OmegaConf.to_container(spec, resolve=True)
        only = settings.pop("only", None)
        if isinstance(only, str):
            raise ValueError(f"metric.{name}.only must be a list of patterns, got {only!r}: give [{only}]")
        metric = instantiate(settings | arguments)
        metric.only = None if only is None else tuple(only)
        if isinstance(metric, SetMetric):  # its intervals are prepared while it is measured
            metric.cluster = cfg.bootstrap.cluster
        yield name, metric


def _open(cfg: DictConfig, folder: Path) -> ImageSet:
    return ImageSet.open(folder, EmbeddingCache(project_path(cfg.outputs) / ".embeddings"), progress=True)


def _score(
    images: ImageSet, name: str, metric: Metric, folder: Path, label: str, trusted: bool = True
) -> tuple[Path, bool]:
    """Return the file of a metric's values, and whether they were measured now; what is not trusted is not read."""
    file = scores_path(folder, name, metric.encoder.id)
    document = None
    try:
        document = read_document(file) if trusted and file.exists() else None
    except ValueError as error:
        log.warning("measured anew: %s", error)
    if document is not None and is_current(document, metric, images):
        return file, False
    label = f"{label}: {name} by {metric.encoder.name}"
    log.info("%s", label)
    document = measure(metric, images, path=file)
    details = document["details"]
    if images.rows and not has_value(document):
        log.warning("%s has no value: of its groups are withheld %s", label, count_withheld(images.withheld))
    if cut := details.get("n_prompts_truncated"):
        text = "%s: %d of %d prompts are longer than it reads; their ends count nothing"
        log.warning(text, label, cut, details["n_prompts"])
    return file, True


def _keep_memory() -> None:
    """Have glibc keep the memory of tensors that are freed for the next ones.

    Else it gives large ones back, and the kernel clears every page of the next: half of an encoder's time on a CPU.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 1 << 30)


def main(argv: list[str], configs: list[DictConfig] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _keep_memory()
    configs = configs or expand(argv, baselines=True)
    if configs[0].images is not None:
        if len(models := dict.fromkeys(cfg.model.name for cfg in configs)) > 1:
            raise ValueError(f"expected one model, whose scorer images are measured by, got {', '.join(models)}")
        table, refused = evaluate_folder(configs[0])
        print(table.to_markdown(index=False, disable_numparse=True))
        if refused:
            print(_reasons(refused))
    elif has_launcher(argv):
        launch(evaluate, argv)
    else:
        for cfg in configs:
            evaluate(cfg)
