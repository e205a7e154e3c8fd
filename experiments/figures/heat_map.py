"""What two settings do together."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from experiments.figures.style import named, new_figure, styled
from experiments.pages import change
from experiments.tables import direction, of_model, some_of, spelled, with_window, words

#: Better and worse: blue and red, white where nothing changed.
DIVERGING = "RdBu"


@styled
def heat_map(frame: pd.DataFrame, metric: str, model: str, over: tuple[str, str] = ("alpha", "threshold")) -> Figure:
    """Draw a metric's paired differences over two settings, one panel a window of timesteps.

    Blue is better than without, red is worse; numbers are the difference and its 95 % interval, bold where that
    excludes 0.

    Args:
        frame: an experiment's CSV, of one method over a grid of the two settings and the window.
        metric: what is drawn.
        model: one of the CSV's models.
        over: the settings of the rows and of the columns: columns of the CSV, or `window` for t_high and t_low
            together, which makes one panel.

    Raises:
        ValueError: the table lacks the model, the metric or a setting, nothing was compared, or a cell has several
            runs.
    """
    rows = with_window(of_model(frame, model, metric))
    if missing := set(over) - set(rows):
        raise ValueError(f"expected two settings of the table or window, got {over}: it lacks {sorted(missing)}")
    rows = rows[rows[[*over]].notna().all(axis=1) & rows["difference"].notna()]
    some_of(rows, model, f"a paired difference over {' and '.join(over)}")
    if rows.duplicated([*over, "window"]).any():
        raise ValueError(
            f"expected one run for every {', '.join(dict.fromkeys([*over, 'window']))}, got several: choose one method "
            "and one value of every other setting of the table first"
        )
    rows = rows.sort_values(["t_high", "t_low"], ascending=False, kind="stable")
    windows = [None] if "window" in over else list(rows["window"].unique())
    down, across = (list(rows[name].unique()) for name in over)
    down, across = (sorted(ticks) if pd.api.types.is_number(ticks[0]) else ticks for ticks in (down, across))
    down = down[::-1] if over[0] != "window" else down
    higher = direction(frame, metric)
    limit = rows["difference"].abs().max() or 1.0
    width = max(1.3 + len(windows) * (0.45 + 1.1 * len(across)), 4.6)  # the title's width
    figure, (axes,) = new_figure(len(windows), width, 1.4 + 0.55 * len(down))
    for axis, window in zip(axes, windows, strict=True):
        here = rows[(rows["window"] == window) | (window is None)]
        table = here.pivot(index=over[0], columns=over[1], values="difference").reindex(down, columns=across)
        colours = DIVERGING if higher is not False else f"{DIVERGING}_r"
        image = axis.imshow(table.to_numpy(dtype=float), cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
        for _, row in here.iterrows():
            sure = row["difference_low"] > 0 or row["difference_high"] < 0
            axis.text(
                across.index(row[over[1]]), down.index(row[over[0]]), change(row).replace(" [", "\n["),
                ha="center", va="center", fontsize=7.5, fontweight="bold" if sure else "normal",
                color="white" if abs(row["difference"]) > 0.62 * limit else "black",
            )  # fmt: skip
        axis.set_xticks(range(len(across)), map(spelled, across))
        axis.set_yticks(range(len(down)), map(spelled, down))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(f"timesteps {window}" if window else "")
        axis.set_xlabel(words(over[1]))
    axes[0].set_ylabel(words(over[0]))
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("" if higher is None else "blue: better")
    figure.suptitle(
        f"{model}: paired {named(frame, metric, paired=True)}\nwith its 95 % interval; bold where that excludes 0"
    )
    return figure
