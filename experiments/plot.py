"""Act 4: an experiment's table and images become its figures.

    python -m experiments.plot experiment=diversity

`tradeoff` draws diversity against quality from the CSV alone; `image_grid` sets the same groups, from the same noises,
side by side for every method. The notebooks call these functions.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
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
from experiments.assets import read_assets
from experiments.configs import expand
from experiments.runs import Run
from experiments.tabulate import TEXT, primary_metrics

#: Okabe and Ito's palette, told apart with any colour vision; a method keeps its colour in every figure.
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
#: How a method is called in figures where its name in folders is too terse.
TITLES = {
    "none": "without NegToMe",
    "negtome": "NegToMe",
    "negtome_released": "NegToMe, released matching",
    "negative_prompt": "negative prompt",
    "negtome_reference": "NegToMe from the asset",
    "negtome_and_negative_prompt": "both",
    "negtome_reference_released": "NegToMe, released way",
    "negative_ip_adapter": "negative IP-Adapter",
}


def tradeoff(frame: pd.DataFrame, claim: str = "pairwise_distance", quality: str = "clip_score") -> Figure:
    """Draw what a method is for against quality, one panel a model, crosses for the 95 % intervals.

    Args:
        frame: an experiment's CSV.
        claim: metric on the x axis, such as the experiment's primary one of diversity.
        quality: metric on the y axis.
    """
    # The suites hold more metrics, by other encoders and of other units; none of that belongs to this figure.
    frame = frame[frame["metric"].isin([claim, quality])]
    higher = frame.drop_duplicates("metric").set_index("metric")["higher_is_better"]
    models = list(frame["model"].unique())
    methods = list(frame["method"].unique())
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        part = frame[frame["model"] == model]
        for _, rows in part.groupby("run_id", sort=False):
            points = rows.drop_duplicates("metric").set_index("metric")  # the first encoder's
            if claim not in points.index or quality not in points.index:
                continue
            x, y, method = points.loc[claim], points.loc[quality], rows["method"].iloc[0]
            axis.errorbar(
                x["value"], y["value"],
                xerr=[[x["value"] - x["ci_low"]], [x["ci_high"] - x["value"]]],
                yerr=[[y["value"] - y["ci_low"]], [y["ci_high"] - y["value"]]],
                fmt="o", capsize=2, color=COLOURS[methods.index(method) % len(COLOURS)],
                label=TITLES.get(method, method),
            )  # fmt: skip
        axis.set_title(f"{model} (n = {part['n_groups'].iloc[0]} groups)")
        for metric, put in ((claim, axis.set_xlabel), (quality, axis.set_ylabel)):
            put(f"{metric.replace('_', ' ')}, {'higher' if higher[metric] else 'lower'} is better")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique))
    figure.suptitle(
        f"Scored by {', '.join(frame['encoder'].unique())}; bars: 95 % intervals",
        fontsize=9,
    )
    return figure


def image_grid(
    runs: list[Run], groups: int = 6, tile: int = 96, leading: Mapping[str, Path] | None = None
) -> Image.Image:
    """Set the same groups side by side: one row a group, one block of images a run.

    Args:
        runs: complete runs of the same prompts, in the order of the columns.
        groups: rows, each of another category, spread evenly over the groups' names.
        tile: side of an image in pixels.
        leading: category -> a picture to stand before the runs' images, such as a protected asset; only groups of
            these categories are shown. None: all, without such a picture.

    Raises:
        ValueError: the runs share no group.
    """
    manifests = [group_rows(read_manifest(run.folder)) for run in runs]
    shared = [group for group in manifests[0] if all(group in manifest for manifest in manifests)]
    if leading is not None:
        shared = [group for group in shared if manifests[0][group][0].category in leading]
    if not shared:
        raise ValueError("The runs share no group: generate them with the same prompts")
    by_category = {manifests[0][group][0].category: group for group in reversed(shared)}
    firsts = sorted(by_category.values())
    chosen = [firsts[round(i * (len(firsts) - 1) / max(groups - 1, 1))] for i in range(min(groups, len(firsts)))]
    size = len(manifests[0][chosen[0]])
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 13)
    header, gap = 24, 12
    label_width = 190 + (tile + gap if leading is not None else 0)
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
        if column == 0 and leading is not None:
            draw.text((190, 4), "asset", "black", font)
        draw.text((left, 4), f"{request['model']['name']}: {title}", "black", font)
        for line, group in enumerate(chosen):
            top = header + line * (tile + 4)
            if column == 0:
                draw.multiline_text((4, top + tile // 3), _wrapped(manifest[group][0].prompt), "black", font)
                if leading is not None:
                    sheet.paste(_tile(leading[manifest[group][0].category], tile), (190, top))
            for index, row in enumerate(manifest[group]):
                sheet.paste(_tile(run.folder / row.path, tile), (left + index * tile, top))
    return sheet


def _tile(file: Path, side: int) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


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
    claim = next(metric for role, metric in primary_metrics(cfg).items() if role != "quality")
    figure = tradeoff(frame, claim, cfg.primary.quality)
    for suffix in ("png", "pdf"):
        files.append(results / f"{cfg.name}_tradeoff.{suffix}")
        # No date inside: the same numbers give the same file.
        figure.savefig(files[-1], dpi=150, metadata={"CreationDate": None} if suffix == "pdf" else None)
    plt.close(figure)
    for model in dict.fromkeys(cfg.model.name for cfg in configs):
        # A grid of settings names its baseline more than once.
        chosen = [cfg for cfg in configs if cfg.model.name == model]
        runs = list(dict.fromkeys(Run.find(cfg) for cfg in chosen))
        assets = read_assets(chosen[0].model.copyright.guidance) if cfg.primary.resemblance else None
        leading = None if assets is None else {asset.name: asset.file for asset in reversed(assets)}
        files.append(results / f"{cfg.name}_grid_{model}.png")
        image_grid(runs, leading=leading).quantize(256).save(files[-1], optimize=True)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for experiments.generate")
    for file in plot(expand(parser.parse_args().overrides)):
        print(file)


if __name__ == "__main__":
    main()
