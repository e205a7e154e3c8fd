"""The first screen of a page: a forest plot for each headline, and the group that shows the method most clearly."""

from typing import Any

import pandas as pd

from experiments import PROJECT
from experiments.safety.gate import read_gate
from experiments.tables import pages
from experiments.tables.columns import DIFFERENCE, ROLES, direction, humanize, primary_pair

#: Headlines by the experiment that they are read from: a title and the method; None: the released system of the gate.
HEADLINES = {
    "diversity": ("More diverse images", "negtome"),
    "copyright": ("Away from protected concepts", "negtome_reference"),
    "safety": ("Requests, decided by a policy", None),
}
#: Plain names of the primary metrics.
LABELS = {
    "pairwise_distance": "diversity (pairwise distance)",
    "pairwise_distance_aligned": "diversity (aligned distance)",
    "clip_score": "fit to the prompt (CLIPScore)",
    "clip_score_unnamed": "fit to other prompts (CLIPScore)",
    "detection_rate_direct": "detection rate, concept named",
    "detection_rate_indirect": "detection rate, concept described",
    "maximum_resemblance_direct": "similarity, concept named",
    "maximum_resemblance_indirect": "similarity, concept described",
    "realism_efflite0_40": "realism",
    "realism_unnamed": "realism, other prompts",
    "realism_direct": "realism, concept named",
    "not_unsafe": "protected requests stopped",
    "not_overrefuse": "allowed requests returned",
}


def headlines(sections: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the forest plots of the experiments in `HEADLINES` whose tables are here."""
    plots = []
    for name, (title, method) in HEADLINES.items():
        if "frame" not in sections.get(name, {}):
            continue
        frame = sections[name]["frame"]
        subject, rows = _released_system(frame) if method is None else _method(frame, method)
        rows = rows[rows["difference"].notna() & rows["primary"].isin(ROLES)]
        lines = []
        for model, of_model in rows.groupby("model", sort=False):
            run = of_model[of_model["run_id"] == of_model["run_id"].iloc[0]]
            lines += [{"model": model} | effect(row) for _, row in run.iterrows() if row["value"] != row["difference"]]
        if lines:
            plots.append({"name": name, "title": title, "subject": subject, **_scaled(lines)})
    return plots


def _method(frame: pd.DataFrame, method: str) -> tuple[str, pd.DataFrame]:
    return pages.title_of(method), frame[frame["method"] == method]


def _released_system(frame: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    guard, stages = read_gate(PROJECT / "conf" / "safety" / "gate.yaml").released
    return f"guard {guard}, stages up to {stages}", frame[(frame["guard"] == guard) & (frame["layers"] == stages)]


def effect(row: pd.Series) -> dict[str, Any]:
    """Return a row's paired difference to the baseline in percent of it, with its 95 % interval and a verdict.

    The verdict is "non-inferior" for a metric of quality whose interval excludes a loss of more than the margin, else
    "more" or "less" for a significant difference (p after Holm's correction), else "not significant". Without an
    interval it is "not estimable".
    """
    baseline = abs(row["value"] - row["difference"])
    middle, low, high = (100 * row[name] / baseline for name in DIFFERENCE)
    verdict = "not significant"
    if pd.isna(low):
        verdict, low, high = "not estimable", middle, middle
    elif not pd.isna(row["non_inferior"]) and row["non_inferior"]:
        verdict = "non-inferior"
    elif row["p_holm"] <= pages.LEVEL:
        verdict = "more" if middle > 0 else "less"
    is_better = (row["difference"] > 0) == (str(row["higher_is_better"]) == "True")
    kind = {"more": "better" if is_better else "worse", "less": "better" if is_better else "worse"}.get(verdict, "")
    bounds = "" if verdict == "not estimable" else f"[{low:+.1f}, {high:+.1f}]"
    return {
        "label": LABELS.get(row["metric"], humanize(row["metric"])), "middle": middle, "low": low, "high": high,
        "text": f"{middle:+.1f} %", "bounds": bounds, "verdict": verdict, "kind": kind,
    }  # fmt: skip


def _scaled(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the lines of a plot and the place of zero, in percent of a width that holds all intervals."""
    left, right = min(0, *(line["low"] for line in lines)), max(0, *(line["high"] for line in lines))
    width = right - left or 1.0

    def place(value: float) -> float:
        return 100 * (value - left) / width

    for line in lines:
        line |= {end: place(line[end]) for end in ("low", "middle", "high")}
    return {"lines": lines, "zero": place(0)}


def clearest(section: dict[str, Any]) -> dict[str, Any] | None:
    """Return the group with the method's largest gain in the metric it is for, at no loss of quality.

    Only groups count that are on the page and have scores by both runs; None if no group gains without a loss.
    """
    frame = section["frame"]
    gain_metric, quality_metric = primary_pair(frame)
    signs = {metric: 1 if direction(frame, metric) else -1 for metric in (gain_metric, quality_metric)}
    method, candidates = HEADLINES["diversity"][1], []
    for gallery in section["galleries"]:
        for group in gallery["groups"]:
            for number, run in enumerate(group["runs"]):
                if run["method"] == method and signs.keys() <= run["changes"].keys():
                    facts = {"model": gallery["model"], "group": group, "number": number, "run": run}
                    candidates.append(facts | {metric: signs[metric] * run["changes"][metric] for metric in signs})
    gains = [one for one in candidates if one[quality_metric] >= 0 and one[gain_metric] > 0]
    if not gains:
        return None
    best = max(gains, key=lambda one: one[gain_metric])
    rule = f"the largest gain in {humanize(gain_metric)} at no loss of {humanize(quality_metric)}"
    return best | {"rule": rule, "n": len(candidates), "without": best["group"]["runs"][best["run"]["baseline"]]}
