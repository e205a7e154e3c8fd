"""What this machine has for `negtome generate`: versions, device, memory, and which embedded models lie here."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from negtome.recipe import EMBEDDED, find_embedded

PACKAGES = ("negtome", "torch", "diffusers", "transformers", "accelerate")


def accelerator() -> str:
    """Return the kind of device that a pipeline is best run on here, by torch's name, such as cuda, mps or cpu."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _memory(device: str) -> str:
    """Say how much memory a device has free, where that is told."""
    if device == "cuda":
        free, whole = torch.cuda.mem_get_info()
        return f", {torch.cuda.get_device_name()}, {free / 2**30:.1f} of {whole / 2**30:.1f} GiB free"
    pages = "SC_AVPHYS_PAGES"  # of the processor, and where the accelerator has no memory of its own
    if pages not in getattr(os, "sysconf_names", ()):
        return ""
    return f", {os.sysconf(pages) * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB of main memory free"


def main() -> None:
    """Print it."""
    print(f"python {platform.python_version()}, {', '.join(map(_version, PACKAGES))}")
    print(f"device {(device := accelerator())}{_memory(device)}")
    for name in EMBEDDED:
        folder = find_embedded(name)
        print(f"{name}: " + (f"at {folder}" if folder else "not here; it comes with the checkout (git clone)"))
