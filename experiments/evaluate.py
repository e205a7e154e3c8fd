"""Score the images of runs: one JSON of per-group values for each metric.

    python -m experiments evaluate experiment=diversity

The overrides are those of `experiments.generate`, or plan=FILE, which it wrote. What is scored already is skipped.
Several GPUs, commands or Slurm jobs (launcher=slurm) divide the runs among them.

    python -m experiments evaluate images=FOLDER metric=core model=sdxl

scores any folder of images, one subfolder a prompt (see `eval.images.read_manifest`), and prints the numbers;
controls=true adds how far edits that add nothing (mirrored, shifted, blurred, noisy images) change each. Which
CLIP model, labels and reference images are used follows from `model`, here as there; those of a mini model, the
default, are for emoji artwork alone, and the log says so.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import contextlib
import ctypes
import logging
import multiprocessing
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import DictConfig

from eval.controls import CONTROLS, write_control
from eval.files import read_document
from eval.images import METRICS, count_withheld, scores_path
from eval.imageset import EmbeddingCache, ImageSet
from eval.intervals import difference_of, has_value, interval_of, n_units
from eval.metric import Metric, current_document, measure
from experiments import generate, project_path, select_device, start_log
from experiments.configs import flag
from experiments.plan import Plan, RunSpec
from experiments.runs.jobs import worker_devices
from experiments.runs.locks import locked
from experiments.runs.metrics import build_metric, left_out_lines, measured, metric_of_run
from experiments.runs.preflight import fetch_all, of_scoring
from experiments.runs.slurm import check_launcher, submit
from experiments.runs.store import LOCKS, Run
from experiments.runs.workers import parallel_map
from experiments.tables.pages import with_interval

log = logging.getLogger(__name__)

#: What keeps a metric from its number, and not the others from theirs.
REFUSALS = (ValueError, TypeError, OSError, RuntimeError)


class RunScores(NamedTuple):
    """The files of a run's scores, how many are new, and for each metric that could not be measured the reason."""

    files: list[Path]
    n_new: int
    reasons: dict[str, str]


def evaluate(plan: Plan) -> list[Path]:
    """Score a plan's runs with every configured metric and return the JSON files.

    A metric has no value where the groups that it is of are withheld, and the log says so.

    Raises:
        FileNotFoundError: the images were not generated.
        ValueError: some metrics could not be measured, as for want of weights or of images; the others were before.
    """
    files, refused = score_runs(plan)
    if refused:
        raise ValueError(_reasons(refused))
    return files


def score_runs(plan: Plan) -> tuple[list[Path], dict[str, dict[str, str]]]:
    """Score a plan's runs with every configured metric that can.

    On GPUs, a process for each scores whole runs. Runs that another command scores come last: this one waits for them.

    Returns:
        The JSON files; and for each run's name, and each metric that could not be measured, why.

    Raises:
        FileNotFoundError: the images were not generated.
        ValueError: a run is not as it was generated.
        RuntimeError: a process was killed.
    """
    runs = [Run.of(spec) for spec in plan.runs]  # what was not generated, before the first of them is scored
    device = select_device(plan.cfg.device)
    devices = worker_devices(plan.cfg, device) if device.startswith("cuda") else (device,)
    scores: dict[RunSpec, RunScores] = {}
    for wait in (False, True):
        remaining = [task for task in zip(plan.runs, runs, strict=True) if task[0] not in scores]
        if len(remaining) < 2:
            devices = devices[:1]  # this process, which is here already
        try:
            for (spec, run, _), scored in parallel_map(_score_run, [(*task, wait) for task in remaining], devices):
                if scored is None:
                    continue
                scores[spec] = scored
                counts = f"{len(scored.files)} metrics are there, {scored.n_new} of them measured now"
                missing = f", {len(scored.reasons)} not measured" if scored.reasons else ""
                log.info("%s: %s%s: %s", spec.label, counts, missing, run.folder)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"One of {len(devices)} processes that score was killed, most likely for want of memory: what is done "
                "is kept, run the same command with workers=1"
            ) from error
    files = [file for spec in plan.runs for file in scores[spec].files]
    reasons = {name: scores[spec].reasons for name, spec in zip(plan.names(), plan.runs, strict=True)}
    return files, {name: refused for name, refused in reasons.items() if refused}


def _score_run(spec: RunSpec, run: Run, wait: bool) -> RunScores | None:
    """Score a run; return None where another process does, unless `wait`."""
    with locked(run.folder.parent / LOCKS / f"scores.{run.id}", wait) as is_locked:
        if not is_locked:
            return None
        images, label = _open(spec.cfg, run.folder), spec.label
        if not images.rows:
            withheld = f"{len(images.withheld)} groups are withheld ({count_withheld(images.withheld)})"
            log.warning("%s: all %s: there are no images to measure: %s", label, withheld, run.folder)
        files, reasons, n_new = [], {}, 0
        for metric in measured(spec.cfg):
            try:
                file, new = _score(images, metric_of_run(spec, metric), run.folder / METRICS, label)
            except REFUSALS as error:
                reasons[metric] = str(error)
                continue
            files.append(file)
            n_new += new
    return RunScores(files, n_new, reasons)


def evaluate_folder(cfg: DictConfig) -> tuple[pd.DataFrame, dict[str, str]]:
    """Score the folder `cfg.images` with every configured metric.

    A metric that cannot measure this folder (too few images, no weights) does not keep the others from it. The JSONs go
    into `cfg.scores`, or `metrics` in the folder, where existing ones are replaced and never read.

    Returns:
        A table, one row a metric: value, interval, direction, encoder, numbers of clusters and images, and with
        `cfg.controls` the paired change that each of `eval.controls.CONTROLS` makes; and for each metric without a
        number, why.

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
    # The author of the images may have written the numbers in their folder, too.
    trusted = not scores.is_relative_to(images.folder)
    rows, refused = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        names = CONTROLS if flag(cfg, "controls") else ()
        controls = {name: write_control(images, name, Path(scratch) / name) for name in names}
        for name in measured(cfg):
            try:
                metric = build_metric(cfg, name)
                document = read_document(_score(images, metric, scores, images.folder.name, trusted)[0])
                if not has_value(document):
                    raise ValueError(f"too few images: of its groups are withheld {count_withheld(images.withheld)}")
                changes = _changes_by_controls(cfg, metric, document, controls)
            except REFUSALS as error:
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
                    "clusters": str(n_units(document, cfg.bootstrap.cluster)),
                    "images": str(document["n_images"]),
                    **changes,
                }
            )
    if not rows:
        raise ValueError(f"No configured metric could measure {images.folder}.\n{_reasons({'': refused})}")
    return pd.DataFrame(rows), refused


def _changes_by_controls(
    cfg: DictConfig, metric: Metric, document: Mapping[str, Any], controls: Mapping[str, ImageSet]
) -> dict[str, str]:
    """Return for each control its paired change of a metric, as printed: a fair measure of diversity has none."""
    changes = {}
    for name, images in controls.items():
        change = difference_of(measure(metric, images), document, **cfg.bootstrap)
        changes[name] = with_interval("{:+.3g}".format, change.difference, change.low, change.high)
    return changes


def _reasons(refused: dict[str, dict[str, str]]) -> str:
    """Say why metrics of runs have no number, each reason once, and how to leave them out.

    Args:
        refused: for each run's label, which may be empty, and each metric the reason.
    """
    names: dict[str, dict[str, None]] = {}
    runs: dict[str, dict[str, None]] = {}
    for label, reasons in refused.items():
        for name, reason in reasons.items():
            names.setdefault(reason, {})[name] = None
            runs.setdefault(reason, {})[label] = None
    lines = []
    for reason, metrics in names.items():
        of = " of " * any(runs[reason]) + ", ".join(runs[reason])
        without = " ".join(f"~metric.{name}" for name in metrics)
        lines.append(f"Not measured: {', '.join(metrics)}{of}: {reason} ({without} leaves it out)")
    return "\n".join(lines)


def _open(cfg: DictConfig, folder: Path) -> ImageSet:
    is_command = multiprocessing.parent_process() is None  # the progress bars of several processes would mix
    return ImageSet.open(folder, EmbeddingCache(project_path(cfg.outputs) / ".embeddings"), progress=is_command)


def _score(images: ImageSet, metric: Metric, folder: Path, label: str, trusted: bool = True) -> tuple[Path, bool]:
    """Return the file of a metric's values, and whether they were measured now; what is not trusted is not read."""
    file = scores_path(folder, metric.name, metric.encoder.id)
    try:
        if trusted and current_document(metric, images, folder) is not None:
            return file, False
    except ValueError as error:
        log.warning("measured anew: %s", error)
    label = f"{label}: {metric.name} by {metric.encoder.name}"
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


def _launch(plan: Plan) -> int:
    """Fetch here what jobs need to score a plan's runs, submit the jobs, and return the exit code."""
    for spec in plan.runs:
        Run.of(spec)  # fails here and not in every job
    for fault in check_launcher(plan):
        raise RuntimeError(fault.problem)
    if faults := of_scoring([spec.cfg for spec in generate.on_cpu(plan).runs], tables=False):
        for fault in fetch_all(faults):
            log.warning("not measured: %s: %s", ", ".join(fault.needed_by), fault.problem)
    submit(["evaluate"], plan)
    return 0


def main(argv: list[str], plan: Plan | None = None) -> int:
    """Score; `plan` is that of `experiments.reproduce`, whose first act says what is left out."""
    start_log()
    _keep_memory()
    if plan is None:
        plan = Plan.of(argv)
        for line in left_out_lines(spec.cfg for spec in plan.runs):
            log.warning("%s", line)
    if plan.cfg.images is not None:
        if len(models := dict.fromkeys(spec.cfg.model.name for spec in plan.runs)) > 1:
            raise ValueError(f"expected one model, whose scorer images are measured by, got {', '.join(models)}")
        table, reasons = evaluate_folder(plan.cfg)
        print(table.to_markdown(index=False, disable_numparse=True))
        if reasons:
            print(_reasons({"": reasons}))
        return 0
    if plan.launcher:
        return _launch(plan)
    refused = score_runs(plan)[1]
    if not refused:
        return 0
    print(f"evaluate: some metrics have no number, all others were measured:\n{_reasons(refused)}", file=sys.stderr)
    return 1
