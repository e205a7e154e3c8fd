"""What a page opens with: the group that shows the method most clearly, and what was found, in words."""

from pathlib import Path
from typing import Any

import pandas as pd

from experiments import PROJECT
from experiments.report.pictures import Pictures, is_elsewhere, kept
from experiments.safety.gate import read_gate
from experiments.tables import pages
from experiments.tables.columns import ROLES, direction, primary_pair, words

#: Tables that verdicts are of, the first three that are there.
VERDICTS = ("diversity", "copyright", "safety", "latency")
#: This project's own method, as a table tests it.
SUBJECTS = {"diversity": "negtome", "copyright": "negtome_reference"}
#: What the metrics of verdicts are, for those who read nothing else.
GLOSSARY = {
    "pairwise_distance": "how unlike each other the images of one prompt are",
    "clip_score": "how well images fit their prompt",
    "clip_score_unnamed": "how well images fit prompts that name no protected design",
    "maximum_resemblance_direct": "likeness to the nearest picture of the design that the prompt names",
    "maximum_resemblance_indirect": "the same of prompts that describe the design without its name",
    "not_unsafe": "share of requests for a protected design that end without an image in which it is detected",
    "not_overrefuse": "share of the other requests that end with an image",
}


def clearest(section: dict[str, Any]) -> dict[str, Any] | None:
    """Return the group of a section with the largest gain of the method in what it is for, at no loss of quality.

    It is looked for among the groups on the page that both runs have scores of; None where none gains without a loss.
    """
    frame = section["frame"]
    claim, quality = primary_pair(frame)
    signs = {metric: 1 if direction(frame, metric) else -1 for metric in (claim, quality)}
    n, best, most = 0, None, 0.0
    for gallery in section["galleries"]:
        for group in gallery["groups"]:
            for number, run in enumerate(group["runs"]):
                changes = run["changes"]
                if run["method"] != SUBJECTS["diversity"] or not {claim, quality} <= changes.keys():
                    continue
                n += 1
                gain, kept = (signs[metric] * changes[metric] for metric in (claim, quality))
                if kept >= 0 and gain > most:
                    most = gain
                    best = {"model": gallery["model"], "group": group, "number": number, "run": run}
    if best is None:
        return None
    rule = f"the largest gain in {words(claim)} at no loss of {words(quality)}"
    return best | {"rule": rule, "n": n, "without": best["group"]["runs"][best["run"]["base"]]}


def sheet(models: list[str], results: Path, pictures: Pictures) -> dict[str, Any] | None:
    """Return the sheet of images that was kept with a table of diversity: with this one, or with the published one."""
    files = [file for model in models for file in kept(results, f"diversity_grid_{model}")]
    files += kept(PROJECT / "results", "diversity_grid_*")[::-1]
    for file in files:
        if not is_elsewhere(file, file.parent):
            model = file.stem.removeprefix("diversity_grid_")
            of = "kept with the table" if file.parent == results else "published with this project"
            return pictures.copy(file, f"{model}: the same prompts and noises without and with NegToMe, as {of}")
    return None


def verdicts(sections: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Say what the first three tables of `VERDICTS` that are here found, each run's in words and with its numbers."""
    told = []
    for name in VERDICTS:
        section = sections.get(name)
        if section is None:
            continue
        if "targets" in section:
            found = _targets(section["targets"])
        elif "frame" in section:
            found = _runs(name, section["frame"])
        else:
            continue
        if found:
            told.append({"name": name, "found": found, "glossary": _glossary(section)})
    return told[:3]


def _runs(name: str, frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return what the method of a verdict did to the primary metrics, a run a model."""
    if name == "safety":
        gate = read_gate(PROJECT / "conf" / "safety" / "gate.yaml")
        guard, layers = gate.released
        rows = frame[(frame["guard"] == guard) & (frame["layers"] == layers)]
        subject = f"guard “{guard}” with the layers up to “{layers}”, the system that conf/safety/gate.yaml is about"
    else:
        rows = frame[frame["method"] == SUBJECTS[name]]
        subject = pages.title_of(SUBJECTS[name])
    rows = rows[rows["difference"].notna() & rows["primary"].isin(ROLES)]
    found = []
    for model, of_model in rows.groupby("model", sort=False):
        tested = of_model[of_model["run_id"] == of_model["run_id"].iloc[0]]
        found.append(
            {
                "who": f"{model}, {subject}",
                "texts": [pages.finding(row).partition(" (") for _, row in tested.iterrows()],
                "n": _counts(tested),
            }
        )
    return found


def _counts(tested: pd.DataFrame) -> str:
    """Return how many groups the differences are of; once where it is as many for all metrics."""
    found = {pages.phrase(row["metric"]): pages.counts(row) for _, row in tested.iterrows()}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ". ".join(f"{metric}: {text}" for metric, text in found.items())


def _targets(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return what was aimed at and measured, a target a line."""
    found = []
    for device, rows in table[table["verdict"].isin(["met", "not met", "undecided"])].groupby("on", sort=False):
        texts = [
            (f"{row['what']}, {row['of']}: {row['measured']}", " (", f"at most {row['at most']}: {row['verdict']})")
            for _, row in rows.iterrows()
        ]
        found.append({"who": device, "texts": texts, "n": ""})
    return found


def _glossary(section: dict[str, Any]) -> dict[str, str]:
    """Return what the primary metrics of a table are, of those that need saying."""
    if "frame" not in section:
        return {}
    frame = section["frame"]
    metrics = frame.loc[frame["primary"].isin(ROLES), "metric"].unique()
    return {pages.phrase(metric): GLOSSARY[metric] for metric in metrics if metric in GLOSSARY}
