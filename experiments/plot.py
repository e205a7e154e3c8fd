"""Act 4: an experiment's table and images become its figures.

    python -m experiments.plot experiment=diversity

`tradeoff` draws diversity against quality from the CSV alone; `image_grid` sets the same groups, from the same noises,
side by side for every method. The notebooks call these functions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pandas as pd
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL import Image, ImageDraw, ImageFont

from eval.images import group_rows, read_manifest
from experiments import project_path
from experiments.configs import expand
from experiments.runs import Run
from experiments.tabulate import TEXT

#: Okabe and Ito's palette, told apart with any colour vision; a method keeps its colour in every figure.
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
#: How a method is called in figures where its name in folders is too terse.
TITLES = {"none": "without NegToMe", "negtome": "NegToMe", "negtome_released": "NegToMe, released matching"}


def tradeoff(frame: pd.DataFrame, diversity: str = "pairwise_distance", quality: str = "clip_score") -> Figure:
    """Draw diversity against quality, one panel a model, crosses for the 95 % intervals; up and right is better.

    Args:
        frame: an experiment's CSV.
        diversity: metric on the x axis.
        quality: metric on the y axis.
    """
    # The suites hold more metrics, by other encoders and of other units; none of that belongs to this figure.
    frame = frame[frame["metric"].isin([diversity, quality])]
    models = list(frame["model"].unique())
    methods = list(frame["method"].unique())
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        part = frame[frame["model"] == model]
        for _, rows in part.groupby("run_id", sort=False):
            points = rows.drop_duplicates("metric").set_index("metric")  # the first encoder's
            if diversity not in points.index or quality not in points.index:
                continue
            x, y, method = points.loc[diversity], points.loc[quality], rows["method"].iloc[0]
            axis.errorbar(
                x["value"], y["value"],
                xerr=[[x["value"] - x["ci_low"]], [x["ci_high"] - x["value"]]],
                yerr=[[y["value"] - y["ci_low"]], [y["ci_high"] - y["value"]]],
                fmt="o", capsize=2, color=COLOURS[methods.index(method) % len(COLOURS)],
                label=TITLES.get(method, method),
            )  # fmt: skip
        axis.set_title(f"{model} (n = {part['n_groups'].iloc[0]} groups)")
        axis.set_xlabel(f"{diversity.replace('_', ' ')}, higher is more diverse")
        axis.set_ylabel(f"{quality.replace('_', ' ')}, higher is better")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique))
    figure.suptitle(
        f"Scored by {', '.join(frame['encoder'].unique())}; bars: 95 % intervals",
        fontsize=9,
    )
    return figure


def image_grid(runs: list[Run], groups: int = 6, tile: int = 96) -> Image.Image:
    """Set the same groups side by side: one row a group, one block of images a run.

    Args:
        runs: complete runs of the same prompts, in the order of the columns.
        groups: rows, each of another category, spread evenly over the groups' names.
        tile: side of an image in pixels.

    Raises:
        ValueError: the runs share no group.
    """
    manifests = [group_rows(read_manifest(run.folder)) for run in runs]
    shared = [group for group in manifests[0] if all(group in manifest for manifest in manifests)]
    if not shared:
        raise ValueError("The runs share no group: generate them with the same prompts")
    by_category = {manifests[0][group][0].category: group for group in reversed(shared)}
    firsts = sorted(by_category.values())
    chosen = [firsts[round(i * (len(firsts) - 1) / max(groups - 1, 1))] for i in range(min(groups, len(firsts)))]
    size = len(manifests[0][chosen[0]])
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 13)
    label_width, header, gap = 190, 24, 12
    width = label_width + len(runs) * (size * tile + gap)
    sheet = Image.new("RGB", (width, header + len(chosen) * (tile + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (run, manifest) in enumerate(zip(runs, manifests, strict=True)):
        left = label_width + column * (size * tile + gap)
        request = run.identity["request"]
        title = TITLES.get(request["method"]["name"], request["method"]["name"])
        if [other.identity["request"]["method"]["name"] for other in runs].count(request["method"]["name"]) > 1:
            values = request["method"]["settings"]
            window = values["timestep_range"]
            title = f"alpha {values['alpha']:g}, threshold {values['threshold']:g}, {window[1]:g} to {window[0]:g}"
        draw.text((left, 4), f"{request['model']['name']}: {title}", "black", font)
        for line, group in enumerate(chosen):
            top = header + line * (tile + 4)
            if column == 0:
                draw.multiline_text((4, top + tile // 3), _wrapped(manifest[group][0].prompt), "black", font)
            for index, row in enumerate(manifest[group]):
                with Image.open(run.folder / row.path) as image:
                    sheet.paste(
                        image.convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS),
                        (left + index * tile, top),
                    )
    return sheet


def _wrapped(text: str, length: int = 24) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > length:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def plot(configs: list[DictConfig]) -> list[Path]:
    """Write the experiment's figures into the results folder and return their paths."""
    cfg = configs[0]
    results = project_path(cfg.results)
    frame = pd.read_csv(results / f"{cfg.name}.csv", dtype=TEXT)
    files = []
    figure = tradeoff(frame, cfg.primary.diversity, cfg.primary.quality)
    for suffix in ("png", "pdf"):
        files.append(results / f"{cfg.name}_tradeoff.{suffix}")
        figure.savefig(files[-1], dpi=150)
    plt.close(figure)
    for model in dict.fromkeys(cfg.model.name for cfg in configs):
        # A grid of settings names its baseline more than once.
        runs = list(dict.fromkeys(Run.find(cfg) for cfg in configs if cfg.model.name == model))
        files.append(results / f"{cfg.name}_grid_{model}.png")
        image_grid(runs).quantize(256).save(files[-1], optimize=True)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for experiments.generate")
    for file in plot(expand(parser.parse_args().overrides)):
        print(file)


if __name__ == "__main__":
    main()
