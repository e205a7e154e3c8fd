"""Runs of a table laid down for a page: one-coloured images, each of its own colour, and scores of their groups."""

import json
from dataclasses import replace

import pandas as pd
from PIL import Image

from eval.files import content_hash, with_checksum
from eval.images import METRICS, ManifestRow, scores_path, write_manifest
from experiments import PROJECT
from experiments.runs.identity import short_digest
from experiments.tables.columns import TEXT

PROMPTS = {
    "a-cat": ("a cat", "cat"),
    "odd": ("a <script>alert(\"1\")</script> & 'ogre'", "ogre"),
    "bus": ("a bus", "bus"),
}
METHODS = ("none", "negtome", "negtome_released")


def colour(model, method, prompt, seed, index):
    """One that tells the image from every other."""
    return (40 * index + 10 * seed, 80 * METHODS.index(method) + 20, 60 * list(PROMPTS).index(prompt) + 30)


def write_run(outputs, model, method, size=32, request=None, commit="abc"):
    """Lay down a run of every prompt and two seeds, four one-coloured images a group, and return its id.

    `request` adds to the settings that its id hashes, or replaces them.
    """
    request = {"model": {"name": model}, "method": {"name": method, "settings": {}}, **(request or {})}
    identity = {"request": request,
                "weights": "w", "machine": {"device": "cpu", "torch": "2.9.0", "diffusers": "0.42.1",
                                            "transformers": "4.56.0"}, "code": "c"}  # fmt: skip
    folder = outputs / "runs" / short_digest(identity)
    rows = [
        ManifestRow(f"images/{prompt_id}/{seed:06d}/{index:02d}.png", prompt_id, prompt, category, seed, index, index,
                    {"ogre/a.png": 0.875} if method == "negtome_released" else None)
        for prompt_id, (prompt, category) in PROMPTS.items() for seed in (0, 1) for index in range(4)
    ]  # fmt: skip
    for row in rows:
        (folder / row.path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), colour(model, method, row.prompt_id, row.group_seed, row.index)).save(
            folder / row.path
        )
    manifest = write_manifest(folder, [replace(row, sha256=content_hash(folder / row.path)) for row in rows])
    (folder / "config.yaml").write_text(json.dumps(identity))
    environment = {"commit": commit, "python": "3.11.7", "date": "2020-01-01T00:00:00"}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "complete").write_text(content_hash(manifest))
    return folder.name


def write_scores(run, metric, encoder, values, **more):
    """Lay down what a metric found in each group of a run's folder, with `more` of a document, and return the mean."""
    groups = [
        {"group": group, "category": PROMPTS[group.split("/")[0]][1], "n_images": 4, "value": value}
        for group, value in values.items()
    ]
    mean = sum(values.values()) / len(values)
    document = {"metric": metric, "encoder": {"name": encoder, "id": encoder}, "aggregate": "mean", "value": mean}
    document = with_checksum({**document, "groups": groups, **more})
    path = scores_path(run / METRICS, metric, encoder)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))
    return mean


def diversity_table():
    """Return the committed table of diversity, its metrics that tests look at: the rest takes time."""
    frame = pd.read_csv(PROJECT / "results" / "diversity" / "table.csv", dtype=TEXT)
    frame = frame[frame["model"].isin(["mini-sdxl", "mini-flux"]) & frame["method"].isin(METHODS)]
    return frame[frame["metric"].isin(["pairwise_distance_aligned", "clip_score", "vendi_score"])]


def scored_runs(folder, size=32):
    """Lay down mini-sdxl's runs of all methods with scores; return their table, and the scores by method and metric.

    Of the groups, a-cat/000001 gains most in distance at a loss of CLIPScore, and odd/000000 most without one.
    """
    results, outputs = folder / "results", folder / "outputs"
    (results / "diversity").mkdir(parents=True)
    frame = diversity_table()
    frame = frame[frame["model"] == "mini-sdxl"].copy()
    groups = [f"{prompt_id}/{seed:06d}" for prompt_id in PROMPTS for seed in (0, 1)]
    scores = {}
    for number, method in enumerate(METHODS):
        run = write_run(outputs, "mini-sdxl", method, size)
        mine = frame["method"] == method
        frame.loc[mine, "run_id"] = run
        gains = {"a-cat/000001": 0.4, "odd/000000": 0.3, "bus/000000": 0.2}
        distances = {group: 0.2 + number * gains.get(group, 0.01 * place) for place, group in enumerate(groups)}
        kept = {group: 50.0 - number * (group == "a-cat/000001") for group in groups}
        for metric, values in (("pairwise_distance_aligned", distances), ("clip_score", kept)):
            row = mine & (frame["metric"] == metric)
            scores[method, metric] = values
            encoder = frame.loc[row, "encoder"].iloc[0]
            frame.loc[row, "value"] = write_scores(outputs / "runs" / run, metric, encoder, values)
    frame.to_csv(results / "diversity" / "table.csv", index=False)
    return frame, scores
