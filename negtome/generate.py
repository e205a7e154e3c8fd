"""Make the images of a recipe with a stock pipeline."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch

from negtome.attachment import Attachment, attach
from negtome.recipe import Recipe
from negtome.reference import Reference


class Made(NamedTuple):
    """Images of a recipe.

    Attributes:
        images: PIL images, in the order of their seeds.
        attached: what NegToMe did, as its `summary()`; None without it.
    """

    images: list[Any]
    attached: Attachment | None


def generate(pipe: Any, recipe: Recipe, **more: Any) -> Made:
    """Make the images of a recipe, with NegToMe where it has settings for it. The pipeline is afterwards as before.

    Args:
        pipe: what `DiffusionPipeline.from_pretrained(recipe.model)` gives.
        recipe: what to make.
        more: keyword arguments of the pipeline's call that change no pixels, such as callback_on_step_end.

    Raises:
        ValueError: the pipeline does not take an argument, or makes another size than was asked for, or the reference
            picture or its mask cannot be used.
        FileNotFoundError: there is no such picture.
        TypeError, RuntimeError: as of `negtome.attach`.
    """
    given = None if recipe.reference is None else Reference(recipe.reference, mask=recipe.mask)
    call = recipe.arguments()
    _check(pipe, call)
    call |= {"generator": [torch.Generator().manual_seed(seed) for seed in recipe.seeds()], **more}
    if recipe.config is None:
        made = Made(pipe(**call).images, None)
    else:
        with attach(pipe, recipe.config, given=given) as attached:
            made = Made(pipe(**call).images, attached)
    size = made.images[0].size
    if recipe.width is not None and size != (recipe.width, recipe.height):
        raise ValueError(
            f"expected images of {recipe.width}x{recipe.height} pixels, but this {type(pipe).__name__} makes "
            f"{size[0]}x{size[1]} of that; ask for these"
        )
    return made


def _check(pipe: Any, call: dict[str, Any]) -> None:
    """Refuse arguments that a pipeline does not take, or would take for nothing."""
    takes = inspect.signature(type(pipe).__call__).parameters
    if unknown := [name for name in call if name not in takes]:
        raise ValueError(
            f"expected arguments that a {type(pipe).__name__} takes, got {', '.join(unknown)}; leave it out"
        )
    # What guides without a negative prompt (Flux) is guided by one only where this scale is asked for.
    scale = takes.get("true_cfg_scale")
    if "negative_prompt" in call and scale is not None and call.get("true_cfg_scale", scale.default) <= 1:
        raise ValueError(
            f"expected true_cfg_scale above 1 beside a negative prompt: without, a {type(pipe).__name__} ignores it"
        )
