"""Measuring a folder, and the JSON document that a measurement becomes."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from eval.files import check_seal, read_json, sealed, write_json
from eval.images import METRICS
from eval.imageset import ImageSet
from eval.metric import Metric

PACKAGES = ("torch", "numpy", "pillow", "torchvision", "transformers", "open_clip_torch")


def read_document(path: str | Path) -> dict[str, Any]:
    """Read a metric's document.

    Raises:
        ValueError: it is none, or holds other values than were written; the message names it.
    """
    document = read_json(path)
    if not isinstance(document, dict) or not {"metric", "groups"} <= document.keys():
        raise ValueError(f"expected a metric's document in {path}, got other JSON; delete it and measure again")
    check_seal(document, path)
    return document


def is_current(document: Mapping[str, Any], metric: Metric, folder: str | Path | ImageSet) -> bool:
    """Tell whether a document says what `metric` would find in `folder` now, without computing it.

    Metric, version, settings, aggregate, bounds, how subsets are drawn, the encoder's (or other scorer's) id and the
    folder's set of images must agree.
    """
    images = folder if isinstance(folder, ImageSet) else ImageSet.open(folder)
    expected = _identity(metric, images.only(metric.only).manifest_hash)
    return {key: document.get(key) for key in expected} == expected


def measure(metric: Metric, folder: str | Path | ImageSet, path: str | Path | None = None) -> dict[str, Any]:
    """Measure a folder and write the metric's document, atomically.

    Args:
        metric: what to measure.
        folder: a run folder, a plain folder, or an `ImageSet`, which shares embeddings among metrics.
        path: where the document goes; `metrics/<metric's name>.json` in the folder if not given.

    Returns:
        The document, as written.
    """
    images = folder if isinstance(folder, ImageSet) else ImageSet.open(folder)
    images = images.only(metric.only)
    document = sealed(
        {
            **_identity(metric, images.manifest_hash),
            "description": metric.description,
            "unit": metric.unit,
            "higher_is_better": metric.higher_is_better,
            **metric.results(images),
            "details": metric.details(images),
            "environment": environment(),
        }
    )
    write_json(path or images.folder / METRICS / f"{metric.name}.json", document)
    return document


def environment() -> dict[str, str]:
    """Return the versions of Python and of the packages that a value may depend on, where installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _identity(metric: Metric, images_hash: str) -> dict[str, Any]:
    return {
        "metric": metric.name,
        "version": metric.version,
        "settings": metric.settings(),
        "aggregate": metric.aggregate,
        **metric.design(),
        "bounds": list(metric.bounds),
        **({} if metric.only is None else {"only": list(metric.only)}),
        "encoder": {"name": metric.encoder.name, "id": metric.encoder.id},
        "manifest_sha256": images_hash,
    }
