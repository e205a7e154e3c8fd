"""What an experiment needs before it starts: downloads, disk, memory, time. Nothing is loaded, written or fetched."""

import contextlib
import copy
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from eval.weights import Download, Remote
from experiments import project_path, select_device
from experiments.configs import build
from experiments.methods.edited import EditedBaseline
from experiments.plan import Plan, RunSpec
from experiments.prompts import Group
from experiments.runs import checkpoints, gpus
from experiments.runs.faults import Fault
from experiments.runs.jobs import RunJob

#: Bytes of a pixel of a PNG of a photograph, rounded up.
BYTES_PER_PIXEL = 2
#: Groups of each category in the experiment that is proposed as a smaller one: enough for every metric.
FEW_GROUPS = 10

#: The groups that are still to be generated, by run.
Pending = Mapping[RunSpec, Sequence[Group]]


def pending_groups(plan: Plan, jobs: Iterable[RunJob]) -> Pending:
    """Return the missing groups of each run; all groups of a run that has no job because something is missing.

    Runs with invalid prompts are left out.
    """
    missing: dict[RunSpec, Sequence[Group]] = {job.spec: job.missing for job in jobs}
    for spec in plan.runs:
        if spec not in missing:
            with contextlib.suppress(ValueError):
                missing[spec] = build(spec.cfg.prompts).groups()
    return missing


def count_images(pending: Pending) -> int:
    """Return the number of images of the groups."""
    return sum(group.size for groups in pending.values() for group in groups)


def bytes_of_images(pending: Pending) -> int:
    """Estimate the disk space of the images that are still to be generated."""
    total = 0
    for spec, groups in pending.items():
        height, width = gpus.image_size(spec.cfg.model)
        total += BYTES_PER_PIXEL * height * width * sum(group.size for group in groups)
    return total


def free_space(folder: Path) -> tuple[int, Path]:
    """Return the free bytes of the disk where a folder lies or will lie, and the part of its path that exists."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(existing).free, existing


def without_metrics(tables: bool) -> str:
    """Return how to make images without the networks for scoring; a command that makes tables cannot."""
    command = "python -m experiments generate with the same overrides and" if tables else "The same command with"
    return f"{command} metric=none makes the images alone; evaluate scores them later."


def counted(pending: Pending) -> str:
    """Write how many images are to be generated, and how many are edited copies, as of negative controls."""
    edited = {spec: groups for spec, groups in pending.items() if _is_edited(spec)}
    generated = {spec: groups for spec, groups in pending.items() if spec not in edited}
    text = f"{count_images(generated):,} images to generate in {_count_groups(generated):,} groups"
    if copies := count_images(edited):
        text += f", {copies:,} edited copies of the baseline's"
    return text


def _is_edited(spec: RunSpec) -> bool:
    return issubclass(get_class(spec.cfg.method._target_), EditedBaseline)


def summary(plan: Plan, pending: Pending) -> list[str]:
    """Return images, disk and time in short, for the log of real checkpoints; [] if there is nothing to do."""
    of_real = _of_real(pending)
    if not of_real:
        return []
    free, _ = free_space(project_path(plan.cfg.outputs))
    times = [
        f"{duration(hours)} on {_article(device)} (steps {kind})" for device, hours, kind in denoising_hours(of_real)
    ]
    device = _local_gpu(plan.cfg)
    here = [time for time in times if device is not None and f" {device.name} (" in time]
    return [
        f"{len(of_real)} runs: {counted(of_real)}, about {gigabytes(bytes_of_images(of_real))} on disk, "
        f"{gigabytes(free)} are free",
        f"Denoising takes about {', '.join(here or times)}" if times else "How long this model takes is not known",
        "--dry-run says what is downloaded, how much memory it takes, and how to make it smaller",
    ]


def report(plan: Plan, pending: Pending, faults: Sequence[Fault], tables: bool = False) -> list[str]:
    """Return all lines of `--dry-run` but the faults.

    Args:
        tables: whether the command makes tables, which need metrics.

    The servers of missing files are asked for their sizes, unless `HF_HUB_OFFLINE` is set.
    """
    models = {spec.cfg.model.name: spec.cfg for spec in plan.runs}
    answers = _ask({download: None for fault in faults for download in fault.downloads})
    folder = project_path(plan.cfg.outputs)
    free, _ = free_space(folder)
    lines = [
        f"{plan.name}: {len(plan.runs)} runs, {counted(pending)}",
        f"Disk: about {gigabytes(bytes_of_images(pending))} for images in {folder}, {gigabytes(free)} are free",
        *_download_lines(models.values(), faults, answers),
    ]
    least = 0.0
    for cfg in models.values():
        if cfg.model.kind != "mini":
            with contextlib.suppress(ValueError):  # an invalid setting is among the faults
                memory = _memory_of(cfg, answers)
                lines += _memory_lines(cfg, memory)
                least = max(least, memory.offloaded)
    return [*lines, *_time_lines(plan.cfg, pending, least), *_smaller_lines(plan, pending, faults, tables)]


def denoising_hours(pending: Pending) -> list[tuple[str, float, str]]:
    """Estimate the hours that the denoiser takes on each GPU of the table: its name, hours, and their kind.

    [] if a model is not in the table. Edited baselines take no denoising. What other methods add is left out.
    """
    hours: dict[str, float] = {}
    kinds: dict[str, set[str]] = {}
    for spec, groups in pending.items():
        if _is_edited(spec):
            continue
        for size, count in Counter(group.size for group in groups).items():
            try:
                steps = int(checkpoints.call_arguments(spec.cfg.model)["num_inference_steps"])
                times = gpus.step_times(spec.cfg.model, size)
            except (KeyError, TypeError, ValueError):  # an invalid setting is among the faults
                times = []
            if not times:
                return []
            for time in times:
                hours[time.device] = hours.get(time.device, 0) + count * steps * time.milliseconds / 3.6e6
                kinds.setdefault(time.device, set()).add(time.kind)
    return [(name, hours[name], gpus.MEASURED if kinds[name] == {gpus.MEASURED} else gpus.ESTIMATED) for name in hours]


def gigabytes(size: float) -> str:
    """Write a number of bytes in GB, 10^9 bytes, or in MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def duration(hours: float) -> str:
    """Write a number of hours."""
    if hours >= 1:
        return f"{hours:,.0f} hours" if hours >= 10 else f"{hours:.1f} hours"
    minutes = round(60 * hours)
    return f"{minutes} minutes" if minutes > 1 else "a minute"


def _count_groups(pending: Pending) -> int:
    return sum(map(len, pending.values()))


def _article(device: str) -> str:
    return f"{'an' if device[0] in 'AHR' else 'a'} {device}"


def _local_gpu(cfg: DictConfig) -> gpus.Device | None:
    """Return the GPU of the table that this machine has; None if it has none of them."""
    device = select_device(cfg.device)
    if not device.startswith("cuda"):
        return None
    return gpus.find_device(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory)


def _ask(downloads: Iterable[Download]) -> dict[Download, Remote | None]:
    """Ask the servers of all downloads at once."""
    distinct = [*downloads]
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(distinct, pool.map(Download.remote, distinct), strict=True))


def _download_lines(
    configs: Iterable[DictConfig], faults: Sequence[Fault], answers: Mapping[Download, Remote | None]
) -> list[str]:
    """Return a line for each download, the sum, and what is gated."""
    if not answers:
        return ["Download: nothing"]
    by_source = {cfg.model.source: cfg.model for cfg in configs}
    rows, total, unknown, gated = [], 0, 0, []
    for download, answer in answers.items():
        model = by_source.get(download.source)
        size, basis = _size(download, answer, model)
        total, unknown = total + (size or 0), unknown + (size is None)
        name = next(fault.name for fault in faults if download in fault.downloads)
        rows.append([name, "size not known" if size is None else gigabytes(size), basis, download.source])
        is_gated = answer is not None and answer.gated
        if is_gated or (model is not None and "gated" in (checkpoints.licence(model) or "")):
            gated.append(f"  {download.source}: {checkpoints.how_to_accept(download.source)}, if you have not yet")
    sum_of = f"{gigabytes(total)}{f' and {unknown} files of unknown size' if unknown else ''}"
    lines = [f"Download: {sum_of}", *_columns(rows)]
    return lines + (["Gated", *gated] if gated else [])


def _size(download: Download, answer: Remote | None, model: DictConfig | None) -> tuple[int | None, str]:
    """Return the bytes that are still to be downloaded, None if they are not known; and where the number is from."""
    if answer is not None:
        absent = download.absent(answer.sizes)
        kept = len(answer.sizes) - len(absent)
        basis = f"as the server says; {kept} of {len(answer.sizes)} files are here" if kept else "as the server says"
        return sum(answer.sizes[name] for name in absent), basis
    computed = gpus.weights_by_architecture(model) if model is not None else {}
    if computed:
        return sum(computed.values()), "computed from parameters, the server does not answer"
    return None, "the server does not answer"


def _weights(model: DictConfig, answers: Mapping[Download, Remote | None]) -> tuple[dict[str, int], str]:
    """Return the bytes of each component's weights in memory, {} if they are not known; and where they are from."""
    itemsize = checkpoints.torch_dtype(model).itemsize
    with contextlib.suppress(FileNotFoundError):
        folder = checkpoints.find_checkpoint(model, fetch=False).folder
        counts = checkpoints.count_parameters(folder, model.variant)
        return {name: count * itemsize for name, count in counts.items() if count}, "parameters of the checkpoint here"
    if computed := gpus.weights_by_architecture(model):
        return computed, "parameters of the published architecture"
    sizes: dict[str, int] = {}
    for download, answer in answers.items():
        if download.source == model.source and answer is not None:
            for name, size in answer.sizes.items():
                if name.endswith(".safetensors"):
                    component = name.partition("/")[0]
                    sizes[component] = sizes.get(component, 0) + size
    return sizes, "sizes of the files"


class _Memory(NamedTuple):
    """Bytes that a model needs on a GPU.

    Attributes:
        weights: by component; {} if they are not known.
        activations: estimated, of the components that need most; {} if they are not known.
        basis: where the bytes of the weights are from.
        images: generated at once.
    """

    weights: Mapping[str, float]
    activations: Mapping[str, float]
    basis: str
    images: int

    @property
    def whole(self) -> float:
        return sum(self.weights.values()) + max(self.activations.values(), default=0)

    @property
    def offloaded(self) -> float:
        """With `offload=true`, which keeps only the active component on the GPU."""
        return max((size + self.activations.get(name, 0) for name, size in self.weights.items()), default=0)


def _memory_of(cfg: DictConfig, answers: Mapping[Download, Remote | None]) -> _Memory:
    weights, basis = _weights(cfg.model, answers)
    images = max((group.size for group in build(cfg.prompts).groups()), default=1)
    return _Memory(weights, gpus.activations(cfg.model, images), basis, images)


def _memory_lines(cfg: DictConfig, memory: _Memory) -> list[str]:
    """Return what a model needs on a GPU, whole and with `offload=true`, and which GPUs of the table hold it."""
    title = f"Memory of model={cfg.model.name}"
    if not memory.weights:
        return [f"{title}: not known"]
    largest_first = sorted(memory.weights.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in largest_first)
    total = gigabytes(sum(memory.weights.values()))
    rows = [["weights", total, f"{parts}: {memory.basis}, {cfg.model.dtype}"]]
    if memory.activations:
        height, width = gpus.image_size(cfg.model)
        component, peak = max(memory.activations.items(), key=lambda item: item[1])
        size = f"{memory.images} images of {height} x {width}"
        rows.append(["activations", gigabytes(peak), f"estimated from shapes: {component}, {size}"])
    else:
        rows.append(["activations", "not known", "they come on top"])
    for label, size in (("together", memory.whole), ("offload=true", memory.offloaded)):
        rows.append([label, gigabytes(size), f"fits {_holding(size)}"])
    return [title, *_columns(rows)]


def _holding(size: float) -> str:
    return ", ".join(device.name for device in gpus.DEVICES if 1e9 * device.memory > size) or "no GPU of the table"


def _time_lines(cfg: DictConfig, pending: Pending, least: float) -> list[str]:
    """Return the estimated time on each GPU.

    Args:
        least: bytes that a GPU needs with `offload=true`.
    """
    of_real = _of_real(pending)
    if not of_real:
        return []
    times = denoising_hours(of_real)
    if not times:
        return ["Time: not known for this model"]
    local = _local_gpu(cfg)
    memory = {device.name: 1e9 * device.memory for device in gpus.DEVICES}
    rows = []
    for device, hours, kind in times:
        notes = [f"steps {kind}"]
        if local is not None and local.name == device:
            notes.append("the GPU here")
        if memory[device] < least:
            notes.append("too little memory, also with offload=true")
        rows.append([device, duration(hours), ", ".join(notes)])
    return ["Time of denoising on one GPU; decoding, scoring and what a method adds come on top", *_columns(rows)]


def _of_real(pending: Pending) -> Pending:
    """Return what is pending of runs of real checkpoints."""
    return {spec: groups for spec, groups in pending.items() if groups and spec.cfg.model.kind != "mini"}


def _smaller_lines(plan: Plan, pending: Pending, faults: Sequence[Fault], tables: bool) -> list[str]:
    """Return overrides that make the experiment smaller, with the number of generated images that remain."""
    pending = {spec: groups for spec, groups in pending.items() if not _is_edited(spec)}
    real = [spec for spec in pending if spec.cfg.model.kind != "mini"]
    total, rows = count_images(pending), []
    with contextlib.suppress(ValueError):  # there are not so many
        fewer = {spec: _few_groups(spec.cfg) for spec in real}
        if real and (few := count_images(fewer)) < total:
            rows.append([f"model.groups_per_category={FEW_GROUPS}", f"{few:,} images"])
    methods = list(dict.fromkeys(spec.cfg.method.name for spec in real))
    if len(methods) > 2 and "negtome" in methods:
        fewer = {spec: groups for spec, groups in pending.items() if spec.cfg.method.name in ("none", "negtome")}
        rows.append(["method=negtome", f"{count_images(fewer):,} images, with the baseline"])
    lines = ["Smaller", *_columns(rows)] if rows else []
    if any(fault.needed_by and fault.downloads for fault in faults):
        lines.append(without_metrics(tables))
    return lines


def _few_groups(cfg: DictConfig) -> Sequence[Group]:
    cfg = copy.deepcopy(cfg)
    OmegaConf.update(cfg, "model.groups_per_category", FEW_GROUPS, force_add=True)
    return build(cfg.prompts).groups()


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align rows of texts, indented."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows)
    return [f"  {'  '.join(texts)}".rstrip() for texts in padded]
