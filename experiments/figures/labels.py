"""Short labels beside points, each where it hides no point and no other label: the same table, the same places."""

import itertools
from collections.abc import Sequence
from math import cos, pi, sin
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

#: How far from its point a label may stand, in points beyond the mark, the nearest first; and in which directions, as
#: shares of a half turn from the right: beside and above before below, where there is room for all.
DISTANCES = (1, 4, 8, 13, 19, 26, 34, 43, 53)
DIRECTIONS = (0.25, 0.75, -0.25, -0.75, 0.5, -0.5, 0, 1, 0.125, 0.375, 0.625, 0.875, -0.125, -0.375, -0.625, -0.875)
#: Points to be kept free around a label; and its distance from which on a line leads to its point.
FREE, FAR = 1.0, 8
#: Markers that are the caps of error bars, and no points.
CAPS = ("_", "|")


class Label(NamedTuple):
    """A text, the point that it stands beside, in data, and its colour."""

    text: str
    point: tuple[float, float]
    colour: str


def put_beside(axis: Axes, labels: Sequence[Label], size: float | str) -> None:
    """Write labels beside their points, so that they overlap nothing, as far as there is room; `size` is the font's.

    To be called when all else is in the figure: its layout is computed, and then kept.
    """
    figure = axis.get_figure(root=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    dot = figure.dpi / 72  # pixels of a point
    taken = marks(axis)
    room = axis.get_window_extent()
    for label in labels:
        note = axis.annotate(
            label.text, label.point, (0, 0), textcoords="offset points", ha="center", va="center", color=label.colour,
            fontweight="bold", fontsize=size, zorder=6, path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
        x, y = axis.transData.transform(label.point)
        own = max((box.width / 2 for box in taken if abs(box.x0 + box.x1 - 2 * x) + abs(box.y0 + box.y1 - 2 * y) < 1),
                  default=0.0)  # fmt: skip
        drawn = note.get_window_extent()
        half = np.array([drawn.width, drawn.height]) / 2 + FREE * dot
        places = []
        for distance, direction in itertools.product(DISTANCES, DIRECTIONS):
            way = np.array([cos(pi * direction), sin(pi * direction)])
            middle = np.array([x, y]) + way * (own + distance * dot) + _reach(way, half)
            box = Bbox([middle - half, middle + half])
            lost = sum(map(_area, [box] * len(taken), taken)) + box.width * box.height - _area(box, room)
            places.append((lost, len(places), distance, middle, box))
            if lost < 1e-6:
                break
        _, _, distance, middle, box = min(places, key=lambda place: place[:2])
        note.set_position(tuple((middle - (x, y)) / dot))
        taken.append(box)
        if distance >= FAR:
            _lead(axis, note, label)


def marks(axis: Axes) -> list[Bbox]:
    """Return where the points of an axis are drawn, in pixels, each as large as its marker."""
    boxes = []
    for line in axis.lines:
        if line.get_marker() in (None, "None", "", " ", *CAPS) or line.get_transform() != axis.transData:
            continue
        half = (line.get_markersize() / 2 + line.get_markeredgewidth() / 2) * axis.get_figure(root=True).dpi / 72
        data = np.column_stack([np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)])
        kept = data[line.get_markevery() or slice(None)]
        boxes += [Bbox([place - half, place + half]) for place in axis.transData.transform(kept)]
    return boxes


def _reach(way: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Return how far the middle of a box is from the nearest of its edges, the way it is moved."""
    with np.errstate(divide="ignore"):
        return way * min(half / np.maximum(abs(way), 1e-9))


def _area(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)


def _lead(axis: Axes, note: Annotation, label: Label) -> None:
    """Lead a thin line from a label to its point, below all labels."""
    x, y = note.get_position()
    axis.annotate(
        "", label.point, (x, y), textcoords="offset points", zorder=4,
        arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
