"""What the page shows of a state: one piece of HTML, with its pictures in it."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from experiments.demo.export import address, exports, png
from experiments.demo.models import Model
from experiments.demo.session import Row, State
from experiments.demo.watch import Pushed
from experiments.tables.templates import render
from negtome.image_files import image_grid
from negtome.reference import fit, token_mask

#: Colour of what is pushed, and of what a mask leaves out: Okabe and Ito's orange, and white.
HOT = (213, 94, 0)
#: Side of a small picture, in pixels.
SMALL = 256
#: Largest side of a picture on a sheet, in pixels.
SHEET = 512


def progress(state: State) -> str:
    """Return where a run is: a sentence, what to do, a bar, the seconds so far, and what is predicted by now."""
    preview = _addresses(state.preview)
    return render("demo/progress.html", state=state, preview=preview, columns=state.asked.images)


def _addresses(images: tuple[Image.Image, ...]) -> list[str]:
    """Return previews as addresses; those of the last call again where its very images are given again."""
    global _last
    if _last[0] is not images:
        _last = images, [address(png(image)) for image in images]
    return _last[1]


#: What `_addresses` was given and returned; a preview stays for several steps.
_last: tuple[tuple[Image.Image, ...], list[str]] = ((), [])


def results(state: State, model: Model | None = None) -> str:
    """Return the images that are there, and once all are, how they differ and what can be taken away."""
    done = state.kind == "done" and model is not None
    shown = [row for row in state.rows if not row.refused]
    asked = replace(state.asked, methods=tuple(row.name for row in shown[1:]))
    return render(
        "demo/results.html",
        state=state,
        rows=[_row(state, number, row) for number, row in enumerate(state.rows)],
        columns=state.asked.images,
        steps=_bars(next((row.pushed for row in state.rows if row.pushed is not None), None)),
        numbers=_numbers(state),
        similar=any(row.similarity is not None for row in state.rows),
        exports=exports(asked, state.recipe, model) if done else [],
        sheet=_sheet(state) if done else "",
        link=state.asked.link(),
    )


def _row(state: State, number: int, row: Row) -> dict[str, Any]:
    whole = state.asked.mode not in ("quality", "compare")  # else no recipe says it all
    recipe = state.recipe.without() if number == 0 else state.recipe if whole else None
    images = [address(png(image, recipe, state.asked.link())) for image in row.images]
    where = [] if row.pushed is None else list(map(_heat, row.pushed.where, row.images))
    seeds = list(row.seeds or state.recipe.seeds())
    return {
        "title": row.title, "setup": row.setup, "images": images, "refused": row.refused, "warning": row.warning,
        "where": where, "seeds": seeds,
    }  # fmt: skip


def _sheet(state: State) -> str:
    """Return all rows as one picture, which holds the page's link."""
    rows = [(row.title, [_small(image, SHEET) for image in row.images]) for row in state.rows if row.images]
    note = f"{state.recipe.model}, seeds {state.recipe.seed} to {state.recipe.seeds()[-1]}: a column has the same seed"
    return address(png(image_grid(state.recipe.prompt, rows, note), link=state.asked.link()))


def _small(image: Image.Image, side: int) -> Image.Image:
    """Return an image with no side above `side` pixels."""
    small = image.copy()
    small.thumbnail((side, side))
    return small


def _heat(share: torch.Tensor, image: Image.Image) -> str:
    """Return a small pale picture of an image, with the shares [h, w] in [0, 1] of pushes laid over it."""
    pale = Image.blend(image.convert("L").resize((SMALL, SMALL)), Image.new("L", (SMALL, SMALL), 255), 0.5).convert(
        "RGB"
    )
    strength = Image.fromarray((150 * share).round().byte().numpy()).resize((SMALL, SMALL), Image.Resampling.NEAREST)
    return address(png(Image.composite(Image.new("RGB", pale.size, HOT), pale, strength)))


def _bars(pushed: Pushed | None) -> list[dict[str, Any]]:
    """Return a bar a step: its height in per cent of the tokens compared, and what it says."""
    bars = []
    for number, step in enumerate(pushed.steps if pushed else (), 1):
        share = 100 * step.pushed / step.compared if step.compared else 0.0
        said = f"{step.pushed} of {step.compared} tokens pushed" if step.active else "outside the timestep range"
        bars.append(
            {"share": share, "active": step.active, "what": f"Step {number}, timestep {step.timestep:.0f}: {said}"}
        )
    return bars


def _numbers(state: State) -> list[dict[str, str]]:
    """Return the table's rows as texts; after a value, its difference to the baseline."""
    base, table = (state.rows or (None,))[0], []
    for row in state.rows:
        pushed = "-" if row.tokens is None else f"{row.tokens:,}".replace(",", " ")
        table.append(
            {
                "title": row.title,
                "distance": _beside(row.distance, base.distance, row is base, 3),
                "clip": _beside(row.clip, base.clip, row is base, 1),
                "similarity": _beside(row.similarity, base.similarity, row is base, 3),
                "pushed": pushed,
                "seconds": "-" if row.refused else f"{row.seconds:.1f}{' (kept)' if row.kept else ''}",
            }
        )
    return table


def _beside(value: float | None, base: float | None, is_base: bool, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if is_base or base is None else f"{value:.{digits}f} ({value - base:+.{digits}f})"


def mask_seen(picture: Image.Image, mask: Image.Image | None, size: tuple[int, int], grid: tuple[int, int]) -> str:
    """Return a given picture as the tokens see it: brought to the output's size, dimmed where none may be matched.

    Args:
        picture: RGB.
        mask: grey, of its size: above half of full scale is inside; None: all of it is.
        size: height and width of the output in pixels.
        grid: height and width in tokens.
    """
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    inside = None if mask is None else torch.from_numpy(np.array(mask.convert("L"))) > 127
    fitted, share = fit(pixels, inside, *size)
    tokens = torch.ones(grid, dtype=torch.bool) if share is None else token_mask(share, *grid).view(grid)
    shown = Image.fromarray((255 * fitted).round().byte().permute(1, 2, 0).numpy()).resize((SMALL, SMALL))
    cover = Image.fromarray(np.where(tokens, 255, 56).astype(np.uint8)).resize((SMALL, SMALL), Image.Resampling.NEAREST)
    ground = Image.new("RGB", shown.size, "white")
    return render(
        "demo/mask.html",
        picture=address(png(Image.composite(shown, ground, cover))),
        inside=int(tokens.sum()),
        tokens=tokens.numel(),
        height=grid[0],
        width=grid[1],
    )
