"""Look up the architecture of a pipeline, and the modules of its denoiser that NegToMe hooks."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any

import torch

from negtome.architectures import ARCHITECTURES, Architecture, HookPoint


def find_architecture(pipe: Any) -> Architecture:
    """Find the row for a pipeline.

    Raises:
        TypeError: the pipeline is not supported.
    """
    if isinstance(pipe, (str, PathLike)):
        raise TypeError(f"Pass a loaded pipeline, got the name {str(pipe)!r}; load it with from_pretrained first.")
    pipeline_classes = {cls.__name__ for cls in type(pipe).__mro__}
    if "ModularPipeline" in pipeline_classes:
        return _find_modular(pipe)
    for architecture in ARCHITECTURES:
        if architecture.denoiser_class in pipeline_classes:
            raise TypeError(f"Pass the pipeline, not its denoiser, got a {type(pipe).__name__}.")
        denoiser = unwrap(getattr(pipe, architecture.denoiser, None))
        denoiser_classes = {cls.__name__ for cls in type(denoiser).__mro__}
        if not pipeline_classes & set(architecture.pipelines):
            continue
        if architecture.denoiser_class not in denoiser_classes:
            raise TypeError(
                f"NegToMe needs a {architecture.denoiser_class} as the {architecture.denoiser} of this "
                f"{type(pipe).__name__}, got a {type(denoiser).__name__}."
            )
        return architecture
    supported = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise TypeError(
        f"NegToMe cannot be attached to a {type(pipe).__name__}; supported are pipelines of {supported}, which "
        "docs/pipelines.md lists."
    )


def _find_modular(pipe: Any) -> Architecture:
    """Find the row for a ModularPipeline. diffusers derives some of its classes from others that work differently."""
    # The class of diffusers that a user's own class derives from.
    pipeline_class = next((cls for cls in type(pipe).__mro__ if cls.__module__.startswith("diffusers.")), type(pipe))
    for architecture in ARCHITECTURES:
        denoiser = unwrap(getattr(pipe, architecture.denoiser, None))
        is_loaded = architecture.denoiser_class in (cls.__name__ for cls in type(denoiser).__mro__)
        if pipeline_class.__name__ in architecture.modular and is_loaded:
            return guided(architecture)
    supported = "; ".join(f"{', '.join(a.modular)} with a {a.denoiser_class}" for a in ARCHITECTURES if a.modular)
    raise TypeError(
        f"NegToMe cannot be attached to a {type(pipe).__name__} with these components; modular pipelines that are "
        f"supported, once load_components() has loaded their denoiser, are {supported}."
    )


def find_architecture_of_denoiser(denoiser: torch.nn.Module) -> Architecture:
    """Find the row for a denoiser that a ModularPipeline calls.

    Raises:
        TypeError: no ModularPipeline of the table has such a denoiser.
    """
    classes = {cls.__name__ for cls in type(unwrap(denoiser)).__mro__}
    for architecture in ARCHITECTURES:
        if architecture.modular and architecture.denoiser_class in classes:
            return guided(architecture)
    supported = ", ".join(a.denoiser_class for a in ARCHITECTURES if a.modular)
    raise TypeError(f"NegToMe cannot guide a {type(unwrap(denoiser)).__name__}; supported are {supported}.")


def guided(architecture: Architecture) -> Architecture:
    """Return the row as ModularPipelines use it: every condition is a call of the denoiser, as the guider decides."""
    return replace(architecture, guidance="guider")


def unwrap(denoiser: Any) -> Any:
    """Return the module inside what torch.compile(module) returned, or the module itself."""
    return getattr(denoiser, "_orig_mod", denoiser)


def check_single_denoiser(pipe: Any, architecture: Architecture) -> None:
    """Raise ValueError for a pipeline that uses a second denoiser in late steps."""
    if getattr(pipe, f"{architecture.denoiser}_2", None) is not None:
        raise ValueError(
            f"NegToMe acts in one denoiser, but this {type(pipe).__name__} has {architecture.denoiser}_2 for its "
            "late steps; use a checkpoint with a single one, such as Wan 2.1 or Wan 2.2 TI2V."
        )


def check_denoiser(denoiser: torch.nn.Module, adds_rows: bool) -> None:
    """Refuse a denoiser in which NegToMe would silently do something else.

    Args:
        denoiser: the module itself.
        adds_rows: whether references add rows to the batch in some steps.

    Raises:
        RuntimeError: it is split over several processes, so that each has a part of the tokens or channels; or rows are
            added, and a diffusers hook keeps features from one step to the next (a cache).
    """
    split = any(type(parameter).__name__ == "DTensor" for parameter in denoiser.parameters())
    if split or getattr(denoiser, "_parallel_config", None) is not None:
        raise RuntimeError(
            f"NegToMe compares whole tokens, but this {type(denoiser).__name__} is split over processes "
            "(context or tensor parallelism, or sharded parameters); load it whole in each process, and give each "
            "process groups of its own."
        )
    for name, module in denoiser.named_modules() if adds_rows else ():
        for hook in getattr(module.__dict__.get("_diffusers_hook"), "hooks", {}).values():
            if hook._is_stateful:
                raise RuntimeError(
                    "NegToMe adds rows for a Reference in the steps of its timestep range only, but a cache, the "
                    f"{type(hook).__name__} on {name or 'the denoiser'}, keeps features from one step to the next; "
                    f"call disable_cache() on the {type(denoiser).__name__}, or leave the Reference out."
                )


def find_sites(
    denoiser: torch.nn.Module, architecture: Architecture, sites: Sequence[str] | None, cross_attention: bool
) -> list[tuple[str, torch.nn.Module, HookPoint]]:
    """Find the modules to hook in a denoiser, in its own order: (name, module, kind).

    Args:
        denoiser: UNet or transformer.
        architecture: of the denoiser.
        sites, cross_attention: as in `NegToMeConfig`.

    Raises:
        ValueError: a block holds no module to hook.
    """
    blocks = architecture.blocks if sites is None else sites
    hook_points = [point for point in architecture.hook_points if cross_attention or not point.cross]
    modules = [
        (name, module, point)
        for name, module in denoiser.named_modules()
        for point in hook_points
        if fnmatchcase(name, point.pattern) and any(_is_within(name, block) for block in blocks)
    ]
    for block in blocks:
        if not any(_is_within(name, block) for name, _, _ in modules):
            names = [name for name, _ in denoiser.named_modules() if name]
            near = get_close_matches(block, names, 1)
            top = ", ".join(name for name, _ in denoiser.named_children())
            advice = f"did you mean {near[0]!r}?" if near else f"choose among {top}."
            raise ValueError(
                f"NegToMe found no site under {block!r} of the {type(denoiser).__name__}: no module there is named "
                f"{' or '.join(point.pattern for point in hook_points)}; {advice}"
            )
    return modules


def _is_within(name: str, block: str) -> bool:
    """Tell whether a dotted module name is that of a block, or lies inside it."""
    return name == block or name.startswith(block + ".")


def feature_maps(latent: tuple[int, int]) -> list[tuple[int, int]]:
    """List the sizes (height, width) of a UNet's feature maps, large to small: every level halves, rounding up."""
    sizes = [latent]
    while max(sizes[-1]) > 1:
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes


def largest_map(denoiser: Any, names: Sequence[str], latent: tuple[int, int]) -> tuple[int, int]:
    """Return the size (height, width) of the largest feature map that any of these modules of a UNet works on."""
    lowest = len(denoiser.down_blocks) - 1

    def level(name: str) -> int:
        part, number, *_ = name.split(".")
        if part == "mid_block":
            return lowest
        return int(number) if part == "down_blocks" else lowest - int(number)

    maps = feature_maps(latent)
    return maps[min(*map(level, names), len(maps) - 1)]


def fewest_tokens(latent: tuple[int, int], min_side: int) -> int:
    """Count the tokens of the smallest feature map whose sides are both at least `min_side`."""
    return min(height * width for height, width in feature_maps(latent) if min(height, width) >= min_side)
