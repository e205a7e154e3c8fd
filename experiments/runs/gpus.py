"""Figures of GPUs and of models at full size, as `conf/gpus.yaml` has them."""

from typing import NamedTuple

import yaml
from omegaconf import DictConfig

from experiments import PROJECT
from experiments.runs.checkpoints import call_arguments, torch_dtype

#: Calls with a guidance above 1 take two rows of the denoiser's batch for each image; by architecture.
GUIDANCE = {"sdxl": "guidance_scale", "flux": "true_cfg_scale"}
MEASURED, ESTIMATED = "measured", "estimated"


class Device(NamedTuple):
    """A GPU: the peak of its dense matrix products of 16-bit factors, added up in 32 bits, and its memory.

    Attributes:
        is_called: the name that CUDA gives it.
        memory: in GB, as it is sold.
        teraflops: a second; the same for float16 and bfloat16.
        terabytes: of the memory, a second.
    """

    name: str
    is_called: str
    memory: float
    teraflops: float
    terabytes: float
    source: str


class StepTime(NamedTuple):
    """The time of a denoising step without a method, and whether it was measured or estimated."""

    device: str
    milliseconds: float
    kind: str


FACTS = yaml.safe_load((PROJECT / "conf" / "gpus.yaml").read_text(encoding="utf-8"))
DEVICES = tuple(Device(**row) for row in FACTS["devices"])


def find_device(name: str, total_memory: int) -> Device | None:
    """Return the GPU of the table with a name and memory; None for all others, whose figures may differ by far.

    An H100 PCIe, an A100 with 40 GB and an RTX 4090 of a laptop are slower than those of the table.

    Args:
        name, total_memory: of `torch.cuda`; the memory in bytes, a few percent less than it is sold as.
    """
    for device in DEVICES:
        if name == device.is_called and 0.9 < total_memory / (device.memory * 2**30) <= 1.01:
            return device
    return None


def image_size(model: DictConfig) -> tuple[int, int]:
    """Return height and width of the images of a call in pixels; 1024 where the pipeline's default is not known."""
    return int(model.call.get("height") or 1024), int(model.call.get("width") or 1024)


def rows_of_image(model: DictConfig) -> int:
    """Return the rows of the denoiser's batch for each image: two with guidance, else one."""
    scale = call_arguments(model).get(GUIDANCE.get(model.architecture, ""))
    return 1 + (scale is not None and scale > 1)


def step_times(model: DictConfig, images: int) -> list[StepTime]:
    """Return the time of a step of a call on each GPU; [] for an architecture that the table lacks.

    The time grows with the rows of the batch and with the pixels. A time of another size than the table's is estimated.

    Args:
        images: in the call.
    """
    height, width = image_size(model)
    rows = rows_of_image(model) * images
    times = []
    for row in FACTS["steps"]:
        if row["architecture"] != model.architecture:
            continue
        scale = rows * height * width / (row["rows"] * row["side"] ** 2)
        kind = row["kind"] if scale == 1 else ESTIMATED
        times.append(StepTime(row["device"], row["milliseconds"] * scale, kind))
    return times


def weights_by_architecture(model: DictConfig) -> dict[str, int]:
    """Return the bytes of each component in the model's dtype; {} for an architecture that the table lacks."""
    counts = FACTS["parameters"].get(model.architecture, {})
    return {name: count * torch_dtype(model).itemsize for name, count in counts.items()}


def activations(model: DictConfig, images: int) -> dict[str, float]:
    """Estimate the bytes of activations of each component that needs many; {} for an architecture without figures.

    Args:
        images: in the call.
    """
    height, width = image_size(model)
    scale = images * height * width / 2**20
    peaks = {name: 1e9 * size * scale for name, size in FACTS["activations"].get(model.architecture, {}).items()}
    if model.architecture == "sdxl":  # the table's have guidance
        peaks["unet"] *= rows_of_image(model) / 2
    return peaks
