"""HTML of a run's state, with its images as data URIs."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from experiments.demo.export import data_uri, exports, png
from experiments.demo.models import Model
from experiments.demo.session import Row, State
from experiments.tables.templates import render
from negtome.image_files import image_grid
from negtome.reference import fit, token_mask

#: Colour of pushed tokens: Okabe and Ito's orange.
HOT = (213, 94, 0)
#: Side of a small image, in pixels.
SMALL = 256
#: Largest side of an image in the image grid, in pixels.
LARGE = 512
#: The last preview and its data URIs: a preview stays for several steps.
_last_preview: tuple[tuple[Image.Image, ...], list[str]] = ((), [])


def progress(state: State) -> str:
    """Return the progress of a run: a sentence, advice, a bar, the seconds so far, and the preview."""
    global _last_preview
    if _last_preview[0] is not state.preview:
        _last_preview = state.preview, [data_uri(png(image)) for image in state.preview]
    template = "experiments/demo/progress.html"
    return render(template, state=state, preview=_last_preview[1], columns=state.request.images)


def results(state: State, model: Model | None = None) -> str:
    """Return the finished rows; for a run that is done, given its model, also the exports."""
    exported, grid = [], ""
    if state.kind == "done" and model is not None:
        methods = tuple(row.name for row in state.rows[1:] if not row.refused)
        exported = exports(replace(state.request, methods=methods), state.recipe, model)
        grid = _image_grid(state)
    pushed = next((row.pushed for row in state.rows if row.pushed is not None), None)
    return render(
        "experiments/demo/results.html",
        state=state,
        rows=[_row(state, row) for row in state.rows],
        columns=state.request.images,
        pushed=pushed,
        has_similarity=any(row.similarity is not None for row in state.rows),
        exports=exported,
        grid=grid,
        link=state.request.link(),
    )


def _row(state: State, row: Row) -> dict[str, Any]:
    recipe = state.recipe
    if row is state.rows[0]:
        recipe = recipe.without()
    elif state.request.mode in ("quality", "compare"):
        recipe = None  # a recipe has neither blurred copies nor other methods
    link = state.request.link()
    heat = [] if row.pushed is None else list(map(_heat_map, row.pushed.where, row.images))
    return {
        "title": row.title, "setup": row.setup, "refused": row.refused, "warning": row.warning, "heat_maps": heat,
        "images": [data_uri(png(image, recipe, link)) for image in row.images],
        "seeds": list(row.seeds or state.recipe.seeds()),
    }  # fmt: skip


def _image_grid(state: State) -> str:
    rows = []
    for row in state.rows:
        images = [image.copy() for image in row.images]
        for image in images:
            image.thumbnail((LARGE, LARGE))
        if images:
            rows.append((row.title, images))
    seeds = state.recipe.seeds()
    note = f"{state.recipe.model}, seeds {seeds[0]} to {seeds[-1]}: a column has the same seed"
    return data_uri(png(image_grid(state.recipe.prompt, rows, note), link=state.request.link()))


def _heat_map(share: torch.Tensor, image: Image.Image) -> str:
    """Return a pale copy of an image under the shares [h, w] in [0, 1] of pushes."""
    grey = image.convert("L").resize((SMALL, SMALL))
    pale = Image.blend(grey, Image.new("L", grey.size, 255), 0.5).convert("RGB")
    strength = Image.fromarray((150 * share).round().byte().numpy()).resize(grey.size, Image.Resampling.NEAREST)
    return data_uri(png(Image.composite(Image.new("RGB", pale.size, HOT), pale, strength)))


def mask_seen(picture: Image.Image, mask: Image.Image | None, size: tuple[int, int], grid: tuple[int, int]) -> str:
    """Return a reference image as the tokens see it: at the output's size, dimmed where no token may be matched.

    Args:
        picture: RGB.
        mask: grey, of the same size; values above 127 are inside; None: all of the image is.
        size: height and width of the output in pixels.
        grid: height and width in tokens.
    """
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    inside = None if mask is None else torch.from_numpy(np.array(mask.convert("L"))) > 127
    fitted, share = fit(pixels, inside, *size)
    tokens = torch.ones(grid, dtype=torch.bool) if share is None else token_mask(share, *grid).view(grid)
    image = Image.fromarray((255 * fitted).round().byte().permute(1, 2, 0).numpy()).resize((SMALL, SMALL))
    cover = Image.fromarray(np.where(tokens, 255, 56).astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    dimmed = Image.composite(image, Image.new("RGB", image.size, "white"), cover)
    return render(
        "experiments/demo/mask.html",
        picture=data_uri(png(dimmed)),
        inside=int(tokens.sum()),
        tokens=tokens.numel(),
        height=grid[0],
        width=grid[1],
    )
