"""Which settings are worth having: the front of those that no other one beats, and the rule that chooses one."""

import math

import pandas as pd

from eval.fronts import on_front
from experiments.tables.columns import DIFFERENCE, direction, filter_model, require_rows, without_controls


def select_run(frame: pd.DataFrame, primary_metric: str, quality: str, model: str) -> str | None:
    """Select the setting with the largest gain whose loss of quality is within the margin; return its run id.

    Uses point estimates, not confidence limits: the margin for choosing is therefore half of the margin for reporting
    (`primary.quality_margin` in conf/experiment/sweep.yaml).

    Args:
        frame: an experiment's CSV.
        primary_metric: metric that a method is to improve.
        quality: metric that is to be kept; its margin is in the table. What else that marks as quality is to be, too.
        model: one of the CSV's models.

    Returns:
        The run's id, or None where no setting fulfils it or there is no margin.

    Raises:
        ValueError: the table lacks the model or a metric, or nothing was compared.
    """
    further = frame.loc[frame["primary"] == "quality", "metric"]
    kept = [differences(frame, primary_metric, metric, model) for metric in dict.fromkeys((quality, *further))]
    gain = kept[0]["x"] * kept[0]["x_sign"]
    gain = gain[gain > 0]
    for points in kept:
        gain = gain[(points["y"] * points["y_sign"] >= -points["margin"]).reindex(gain.index, fill_value=False)]
    return None if gain.empty else gain.idxmax()


def pareto_front(frame: pd.DataFrame, primary_metric: str, quality: str, model: str) -> list[str]:
    """Return the run ids of the settings that no other one beats in both metrics, by what they do for `primary_metric`.

    Args and errors: those of `select_run`. The run without a method takes part, with no difference to itself.
    Of settings with equal differences the first one is named.
    """
    points = differences(frame, primary_metric, quality, model)
    points = points.assign(x=points["x"] * points["x_sign"], y=points["y"] * points["y_sign"])
    front = points[on_front(points["x"].to_numpy(), -points["y"].to_numpy(), math.inf)]
    return list(front.drop_duplicates(["x", "y"]).sort_values("x").index)


def differences(frame: pd.DataFrame, primary_metric: str, quality: str, model: str) -> pd.DataFrame:
    """Return both metrics' paired differences of a model's runs, and those of the run without a method, which are 0.

    Negative controls are left out.

    Args and errors: those of `select_run`.

    Returns:
        One row a run, by its id: x and y, of the primary metric and of quality, with the bounds of their intervals
        (`x_low`, `x_high`) and `x_sign`, -1 where less is better; `margin` of quality; `method`.
    """
    part = without_controls(filter_model(frame, model, primary_metric, quality))
    tables = []
    for metric, name in ((primary_metric, "x"), (quality, "y")):
        rows = part[part["metric"] == metric].drop_duplicates("run_id").set_index("run_id")
        table = rows[DIFFERENCE]
        table = table.set_axis([name, f"{name}_low", f"{name}_high"], axis="columns")
        table = table.where(rows["method"] != "none", 0.0).astype(float)
        # Of metrics that have no direction, more counts as better: there is no other way to draw a front.
        tables.append(table.assign(**{f"{name}_sign": -1 if direction(part, metric) is False else 1}))
    points = tables[0].join(tables[1], how="inner").join(rows[["margin", "method"]])
    points = points[points["x"].notna() & points["y"].notna()].astype({"margin": float})
    require_rows(points[points["method"] != "none"], model, f"paired differences of {primary_metric} and {quality}")
    return points
