"""What is asked of the table of architectures: which row a pipeline is of, and where its denoiser has sites."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from negtome.architectures import ARCHITECTURES, Architecture, Place


def find_architecture(pipe: Any) -> Architecture:
    """Find the row for a pipeline.

    Raises:
        TypeError: if the pipeline is not supported.
    """
    names = {cls.__name__ for cls in type(pipe).__mro__}
    for architecture in ARCHITECTURES:
        denoiser = unwrap(getattr(pipe, architecture.denoiser, None))
        classes = {cls.__name__ for cls in type(denoiser).__mro__}
        if names & set(architecture.pipelines) and architecture.denoiser_class in classes:
            return architecture
    supported = "; ".join(f"{', '.join(a.pipelines)} with a {a.denoiser_class}" for a in ARCHITECTURES)
    raise TypeError(f"NegToMe cannot be attached to a {type(pipe).__name__}; supported are {supported}.")


def unwrap(denoiser: Any) -> Any:
    """Return the module inside what torch.compile(module) returned, or the module itself."""
    return getattr(denoiser, "_orig_mod", denoiser)


def check_denoiser(denoiser: torch.nn.Module, adds_rows: bool) -> None:
    """Refuse a denoiser in which NegToMe would silently do something else.

    Args:
        denoiser: the module itself.
        adds_rows: whether its batch has more rows in some steps than in others.

    Raises:
        RuntimeError: it is split over several processes, so that each has a part of the tokens or channels; or a hook
            of diffusers carries features from one step to the next (a cache), and the rows change.
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
                    "NegToMe adds the rows of a Reference in the steps of its window only, but a cache, the "
                    f"{type(hook).__name__} on {name or 'the denoiser'}, keeps features from one step to the next; "
                    f"call disable_cache() on the {type(denoiser).__name__}, or leave the Reference out."
                )


def find_sites(
    denoiser: torch.nn.Module, architecture: Architecture, sites: Sequence[str] | None, cross_attention: bool
) -> list[tuple[str, torch.nn.Module, Place]]:
    """Find the modules to touch in a denoiser, in its own order: (name, module, kind).

    Args:
        denoiser: UNet or transformer.
        architecture: of the denoiser.
        sites, cross_attention: as of `NegToMeConfig`.

    Raises:
        ValueError: if a block holds no site.
    """
    blocks = architecture.blocks if sites is None else sites
    places = [place for place in architecture.places if cross_attention or not place.cross]
    found = [
        (name, module, place)
        for name, module in denoiser.named_modules()
        for place in places
        if fnmatchcase(name, place.pattern) and any(_within(name, block) for block in blocks)
    ]
    for block in blocks:
        if not any(_within(name, block) for name, _, _ in found):
            top = ", ".join(dict.fromkeys(name for name, _ in denoiser.named_children()))
            raise ValueError(
                f"NegToMe found no site under {block!r} of the {type(denoiser).__name__}: it looked for modules "
                f"named {' or '.join(place.pattern for place in places)}; choose sites among {top}."
            )
    return found


def _within(name: str, block: str) -> bool:
    """Tell whether a dotted module name is a block's, or lies inside it."""
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
        return lowest if part == "mid_block" else int(number) if part == "down_blocks" else lowest - int(number)

    maps = feature_maps(latent)
    return maps[min(*map(level, names), len(maps) - 1)]


def fewest_tokens(latent: tuple[int, int], min_side: int) -> int:
    """Count the tokens of the smallest feature map whose sides are both at least `min_side`."""
    return min(height * width for height, width in feature_maps(latent) if min(height, width) >= min_side)
