"""Print what this machine has for `negtome generate`: versions, device, memory and embedded models."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from negtome.recipe import EMBEDDED, find_embedded

PACKAGES = ("negtome", "torch", "diffusers", "transformers", "accelerate")


def accelerator() -> str:
    """Return the fastest kind of device here, by torch's name, such as cuda, mps or cpu."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if device is None else device.type


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _memory(device: str) -> str:
    """Describe the free memory of a device, if the platform reports it."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return f", {torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    pages = "SC_AVPHYS_PAGES"  # main memory, also for accelerators that share it
    if pages not in getattr(os, "sysconf_names", ()):
        return ""
    return f", {os.sysconf(pages) * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB of main memory free"


def main() -> None:
    """Print a line each for the packages, the device and every embedded model."""
    print(f"python {platform.python_version()}, {', '.join(map(_version, PACKAGES))}")
    print(f"device {(device := accelerator())}{_memory(device)}")
    for name in EMBEDDED:
        folder = find_embedded(name)
        print(f"{name}: " + (f"at {folder}" if folder else "not here; it comes with the checkout (git clone)"))
