"""Figures: a table gets those it calls for, nothing is cut off or lies over data, choices equal a plain search."""

import itertools
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from omegaconf import OmegaConf
from PIL import Image

from eval.images import ManifestRow, write_manifest
from experiments import PROJECT, figures
from experiments.__main__ import main as command
from experiments.compose import expand
from experiments.figures.image_grid import LABELS, LINE, SPACE, grid_of_runs, image_grid, median_groups
from experiments.figures.labels import Label, put_beside
from experiments.figures.style import Drawing, encode, look, pixels, save, using
from experiments.methods.method import Baseline
from experiments.runs.catalogue import controls
from experiments.runs.identity import config_digest, request
from experiments.runs.store import Run
from experiments.tables import selection
from experiments.tables.columns import COLUMNS, primary_pair, read_table

SETTINGS = {"model": "m", "guidance_scale": 5.0, "steps": 20.0, "method": "negtome", "matching": "paper",
            "reference": "first", "alpha": 0.9, "threshold": 0.7, "t_low": 700.0, "t_high": 1000.0}  # fmt: skip
NOTHING = {"method": "none", "matching": None, "reference": None, "alpha": None, "threshold": None, "t_low": None,
           "t_high": None}  # fmt: skip
METRICS = {"pairwise_distance": "diversity", "clip_score": "quality", "gender_entropy": None}


def table(*runs, seed=0, directions=(True, True)):
    """An experiment's table of runs, each given by what differs from `SETTINGS`; the numbers are random."""
    random = np.random.default_rng(seed)
    rows = []
    for number, changes in enumerate(runs):
        for metric, role in METRICS.items():
            value, difference = random.uniform(1, 2), random.normal(0, 1)
            row = dict.fromkeys(COLUMNS) | SETTINGS | changes
            row |= {"experiment": "e", "metric": metric, "primary": role, "encoder": "clip-0", "value": value,
                    "ci_low": value - 0.5, "ci_high": value + 0.5, "n_units": 8, "n_groups": 16, "n_images": 64,
                    "run_id": f"{number:012d}", "code": "c", "commit": "c", "device": "cpu",
                    "higher_is_better": directions[role == "quality"]}  # fmt: skip
            if row["method"] != "none":
                row |= {"difference": difference, "difference_low": difference - 0.3, "difference_high": difference + 1,
                        "p_holm": 0.01, "effect_size": 1.0, "win_rate": 0.75}  # fmt: skip
                if role == "quality":
                    row |= {"margin": 0.4, "non_inferior": difference > 0.1}
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS).infer_objects()


GRID = [
    {"alpha": alpha, "threshold": threshold, "t_low": low}
    for alpha, threshold, low in itertools.product((0.3, 0.9, 1.8), (0.5, 0.7), (900.0, 700.0))
]
TABLES = {
    "methods": [NOTHING, {}, {"method": "negtome_released", "matching": "released"}, {"method": "my_own"}],
    "assets": [NOTHING, *({"method": method} for method in (
        "negative_prompt", "negtome_reference", "negtome_and_negative_prompt", "negtome_reference_released"))],
    "grid": [NOTHING, *GRID],
    "one window": [NOTHING, *GRID[::2]],
    "alphas": [NOTHING, *({"alpha": alpha} for alpha in (0.3, 0.9, 1.8))],
    "windows": [NOTHING, *({"t_low": low} for low in (900.0, 700.0, 0.0))],
    "blocks": [NOTHING, *({"sites": sites} for sites in (
        "transformer_blocks+single_transformer_blocks", "transformer_blocks", "single_transformer_blocks"))],
    "guidance": [setting | {"guidance_scale": scale} for scale in (2.0, 5.0, 8.0) for setting in (NOTHING, {})],
    "many": [NOTHING, *({"method": f"my_{m}", "alpha": 0.1 * s} for m in range(9) for s in (1, 2, 3))],
    "steps": [*(NOTHING | {"steps": steps} for steps in (20.0, 4.0, 1.0)),
              *({"steps": steps, "alpha": 0.1 * steps} for steps in (20.0, 4.0, 1.0)),
              {"steps": 4.0, "method": "my_own"}],
    "scattered": [NOTHING, *({"alpha": 0.1 + 0.1 * n, "threshold": 0.5 + 0.03 * n} for n in range(9))],
}  # fmt: skip
EXPECTED = {
    "methods": {"tradeoff", "forest_m"},
    "assets": {"tradeoff", "forest_m"},
    "grid": {"heat_map_pairwise_distance_m", "heat_map_clip_score_m", "pareto_m"},
    "one window": {"heat_map_pairwise_distance_m", "heat_map_clip_score_m", "pareto_m"},
    "alphas": {"ablation_pairwise_distance_m", "ablation_clip_score_m"},
    "windows": {"ablation_pairwise_distance_m", "ablation_clip_score_m"},
    "blocks": {"ablation_pairwise_distance_m", "ablation_clip_score_m"},
    "guidance": {"ablation_pairwise_distance_m", "ablation_clip_score_m", "values_pairwise_distance_m",
                 "values_clip_score_m"},
    "many": {"fronts_m"},
    "steps": {"steps_pairwise_distance_m", "steps_clip_score_m", "tradeoff", "forest_m_20_steps", "forest_m_4_steps",
              "forest_m_1_step"},
    "scattered": {"pareto_m"},
}  # fmt: skip


#: One of each kind of figure is drawn for pages, and two for papers. The slow tests draw the others.
USUAL = {"web": {"methods", "one window", "guidance", "many", "steps"}, "paper": {"one window", "many"}}
DRAWN = [
    pytest.param(name, kind, marks=[pytest.mark.slow] * (name not in USUAL[kind]))
    for name, kind in itertools.product(TABLES, USUAL)
]


@pytest.mark.parametrize(("name", "kind"), DRAWN)
def test_a_table_gets_the_figures_it_calls_for_and_nothing_is_cut_off_or_hidden(name, kind):
    with using(kind):
        drawn = figures.figures_for(table(*TABLES[name]))
    assert set(drawn) == EXPECTED[name]
    for figure_name, (figure, words) in drawn.items():
        assert len(words) > 30 and "_" not in words.replace("my_own", ""), figure_name
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
        assert box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02, figure_name
        assert kind == "web" or width == 3.25
        for legend, axis in itertools.product(figure.legends, figure.axes):
            assert not legend.get_window_extent().overlaps(axis.get_window_extent()), figure_name
        for axis in figure.axes:
            labels = [label.get_window_extent() for label in axis.get_xticklabels() if label.get_text()]
            assert all(left.x1 < right.x0 for left, right in itertools.pairwise(labels)), figure_name
            numbers = [text.get_window_extent() for text in axis.texts if text.get_text()]  # of a heat map's cells
            assert not any(overlap(*pair) for pair in itertools.combinations(numbers, 2)), figure_name


def test_a_method_whose_settings_follow_from_the_steps_is_one_line_over_them():
    figure, _ = figures.figures_for(table(*TABLES["steps"]))["steps_pairwise_distance_m"]
    (axis,) = figure.axes
    lines = [list(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) > 1]
    assert lines == [[1.0, 4.0, 20.0]] * 2, "the baseline and NegToMe, not the method of 4 steps alone"


def overlap(one, other):
    """Return by how much two boxes overlap, in pixels of the lesser side; 0 where they do not."""
    return max(min(min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)), 0)


def points_of(axis):
    """Return the boxes of all markers that are points, and no caps of error bars, in pixels."""
    dot = axis.get_figure(root=True).dpi / 72
    for line in axis.lines:
        if line.get_marker() in ("o", "s", "^", "v", "D", "P", "X", "*", "."):
            every = line.get_markevery()
            for place in axis.transData.transform(line.get_xydata()[every if every else slice(None)]):
                half = line.get_markersize() * dot * (0.25 if line.get_marker() == "." else 0.5)
                yield Bbox([place - half, place + half])


@pytest.mark.parametrize("kind", ["web", pytest.param("paper", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["sweep", *(pytest.param(n, marks=pytest.mark.slow) for n in ("peers", "safety", "peers_grid"))]
)
def test_no_label_of_a_published_front_hides_another_or_a_point_and_the_star_is_the_choice(name, kind):
    frame = read_table(name)
    pair = primary_pair(frame)
    frame = frame[frame["metric"].isin([*pair, "frechet_distance_40_efflite0"])]
    counted = 0
    for model in frame["model"].unique():
        with using(kind):
            figure = (figures.fronts if name.startswith("peers") else figures.pareto)(frame, *pair, model)
        FigureCanvasAgg(figure).draw()
        for axis in figure.axes:
            texts = [text for text in axis.texts if text.get_text()]
            boxes = [text.get_window_extent() for text in texts]
            counted += len(boxes)
            hidden = [overlap(one, other) for one, other in itertools.combinations(boxes, 2)]
            hidden += [overlap(one, other) for one in boxes for other in points_of(axis)]
            assert max(hidden) < 0.5, (model, axis.get_ylabel())
            room = axis.get_window_extent()
            assert all(room.x0 <= box.x0 and box.x1 <= room.x1 for box in boxes)
        if not name.startswith("peers"):
            (star,) = [line for line in axis.lines if line.get_marker() == "*"]
            chosen = selection.differences(frame, *pair, model).loc[selection.select_run(frame, *pair, model)]
            assert star.get_xydata().tolist() == [[chosen["x"], chosen["y"]]]
    assert counted > 2


def test_labels_of_equal_points_stand_apart_and_the_same_each_time():
    def drawn():
        figure = Drawing(figsize=(3, 3))
        axis = figure.add_subplot()
        axis.plot([0, 0, 0, 1], [0, 0, 0, 1], "o")
        put_beside(axis, [Label(text, (0.0, 0.0), "black") for text in ("1", "2", "33", "4")], 9)
        FigureCanvasAgg(figure).draw()
        return [text.get_window_extent() for text in axis.texts if text.get_text()]

    boxes = drawn()
    assert not any(overlap(*pair) for pair in itertools.combinations(boxes, 2))
    assert [box.bounds for box in boxes] == [box.bounds for box in drawn()]


@pytest.mark.slow
@pytest.mark.parametrize("width", [3.25, 6.75])
def test_a_pdf_in_a_papers_style_has_exactly_the_width_and_type_of_readable_size(width, tmp_path):
    with using("paper", width):
        drawn = figures.figures_for(table(*TABLES["one window"])) | figures.figures_for(table(*TABLES["methods"]))
        drawn["sheet"] = (figures.image_grid(["head"], [("label", [[Image.new("RGB", (32, 32), "red")] * 3])]), "")
        for name, (figure, _) in drawn.items():
            file = save(figure, tmp_path / name)
            assert file == tmp_path / "paper" / f"{name}.pdf"
            content = file.read_bytes()
            (box,) = re.findall(rb"/MediaBox \[ ?([\d. ]+?) ?\]", content)
            left, bottom, right, top = map(float, box.split())
            assert (left, bottom, right) == (0, 0, 72 * width) and top > 50
            sizes = {text.get_fontsize() for text in figure.findobj(Text) if text.get_text()}
            assert min(sizes) > 5.5 and max(sizes) < 8.5, name


def test_a_style_and_a_width_change_no_run_and_others_are_refused(capsys):
    overrides = ["experiment=diversity", "model=mini-sdxl", "method=none"]
    plain, paper = (expand([*overrides, *more])[-1] for more in ([], ["style=paper", "width=3.25"]))
    assert (paper.style, paper.width) == ("paper", 3.25)
    assert config_digest(plain) == config_digest(paper) and request(plain, Baseline()) == request(paper, Baseline())
    for width in (0, float("nan"), "wide", True):
        with pytest.raises(ValueError, match=r"width=.* expected inches from 3 to 20"), using("paper", width):
            pass
    assert command(["plot", *overrides, "style=papier"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "style=papier: expected one of web, paper" in message


def test_a_long_front_is_named_in_full():
    frame = table(NOTHING, *({"alpha": 0.1 + 0.1 * n, "threshold": 0.5 + 0.01 * n} for n in range(30)))
    for metric, sign in (("pairwise_distance", 1), ("clip_score", -1)):
        rows = (frame["metric"] == metric) & frame["difference"].notna()
        frame.loc[rows, "difference"] = sign * np.arange(1.0, 31)
    figure = figures.pareto(frame, "pairwise_distance", "clip_score", "m")
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box, size = legend.get_window_extent(), figure.bbox
    assert box.y0 > size.y0 and box.y1 <= size.y1 + 1 and box.x1 <= size.x1 + 1
    assert "30  alpha 3 threshold 0.79" in " ".join(text.get_text() for text in legend.get_texts())


def test_the_same_table_gives_the_same_bytes():
    one, other = (figures.pareto(table(*TABLES["alphas"]), *tuple(METRICS)[:2], "m") for _ in range(2))
    for kind, start in {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}.items():
        encoded = encode(one, kind)
        assert encoded == encode(other, kind) and encoded.startswith(start)


@pytest.mark.parametrize("directions", [(True, True), (True, False), (False, True), (False, False)])
def test_the_front_and_the_choice_are_what_a_plain_search_finds(directions):
    claim, quality = tuple(METRICS)[:2]
    chosen = 0
    for seed in range(8):
        frame = table(*TABLES["grid"], seed=seed, directions=directions)
        # Ties too: whoever is equal in one metric and worse in the other is beaten.
        compared = frame["difference"].notna()
        frame.loc[compared, "difference"] = frame.loc[compared, "difference"].round(1)
        signs = {claim: 1 if directions[0] else -1, quality: 1 if directions[1] else -1}
        points = {
            run: tuple(
                float(rows.set_index("metric")["difference"].fillna(0)[metric]) * signs[metric] for metric in signs
            )
            for run, rows in frame.groupby("run_id")
        }
        best = {
            point for point in points.values()
            if not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points.values())
        }  # fmt: skip
        front = selection.pareto_front(frame, claim, quality, "m")
        assert [points[run] for run in front] == sorted(best)
        allowed = [point[0] for point in points.values() if point[0] > 0 and point[1] >= -0.4]
        found = selection.select_run(frame, claim, quality, "m")
        assert (points[found][0] if found else None) == max(allowed, default=None)
        assert found is None or points[found][1] >= -0.4
        chosen += found is not None
    assert chosen


def test_what_is_chosen_has_a_gain_and_keeps_every_quality_within_its_margin():
    pair = tuple(METRICS)[:2]
    frame = table(NOTHING, *GRID)
    chosen = selection.select_run(frame, *pair, "m")
    assert chosen is not None and selection.select_run(frame.assign(margin=float("nan")), *pair, "m") is None
    further = frame["metric"] == "gender_entropy"
    frame.loc[further, "primary"], frame.loc[further, "margin"] = "quality", 1.0
    frame.loc[further & (frame["method"] != "none"), "difference"] = 0.0
    assert selection.select_run(frame, *pair, "m") == chosen
    frame.loc[further & (frame["run_id"] == chosen), "difference"] = -1.5
    assert selection.select_run(frame, *pair, "m") not in (chosen, None)
    frame.loc[frame["metric"] == pair[0], "difference"] *= 0
    assert selection.select_run(frame, *pair, "m") is None


def test_methods_of_one_experiment_never_look_alike():
    for experiment in ("diversity", "copyright", "ablate_matching"):
        conf = OmegaConf.load(PROJECT / "conf" / "experiment" / f"{experiment}.yaml")
        methods = [*conf.hydra.sweeper.params.method.replace(" ", "").split(","), "my_own"]
        methods = [method for method in methods if method not in controls()]  # which no figure shows
        looks = [tuple(look(method, methods).values()) for method in methods]
        assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
        assert looks[0] == tuple(look("none", []).values())


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda frame: figures.forest(frame, "other"), r"expected a model of the table \(m\), got 'other'"),
        (lambda frame: figures.heat_map(frame, "fid", "m"), r"expected a metric of m .*clip_score.*got 'fid'"),
        (lambda frame: figures.ablation(frame, "clip_score", "beta", "m"), "expected a setting .*alpha.* got 'beta'"),
        (lambda frame: figures.forest(frame[frame["method"] == "none"], "m"), "with method=none"),
        (lambda frame: figures.pareto(frame[frame["method"] == "none"], *tuple(METRICS)[:2], "m"), "with method=none"),
        (lambda frame: figures.ablation(frame[frame["alpha"].isna()], "clip_score", "alpha", "m"), "with method=none"),
        (lambda frame: figures.heat_map(frame.assign(alpha=1.0), "clip_score", "m"), "got several: choose one method"),
        (lambda frame: figures.figures_for(frame.assign(primary=None)), "expected a primary metric of quality"),
        (lambda frame: figures.tradeoff(frame, "pairwise_distance", "clip_skore"), "got 'clip_skore': it has pairwise"),
        (lambda frame: figures.heat_map(frame, "clip_score", "m", ("alpha", "beta")), r".* lacks \['beta'\]"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw, message):
    with pytest.raises(ValueError, match=message):
        draw(table(*TABLES["grid"]))


def test_a_heat_map_is_over_any_two_settings():
    scales = itertools.product((2.0, 5.0), (0.3, 0.9, 1.8))
    runs = [{"guidance_scale": scale, "alpha": alpha} for scale, alpha in scales]
    baselines = [NOTHING | {"guidance_scale": scale} for scale in (2.0, 5.0)]
    drawn = figures.figures_for(table(*baselines, *runs))
    assert set(drawn) == {"heat_map_pairwise_distance_m", "heat_map_clip_score_m", "pareto_m"}
    figure, words = drawn["heat_map_clip_score_m"]
    assert "over guidance_scale and alpha" in words.replace("guidance scale", "guidance_scale")
    axis, _ = figure.axes
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("guidance scale", "alpha")
    assert [label.get_text() for label in axis.get_yticklabels()] == ["5", "2"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.3", "0.9", "1.8"]
    # The window may be one of them, as noise comes first; then there is one panel.
    windows = [{"alpha": alpha, "t_low": low} for alpha in (0.3, 0.9) for low in (900.0, 700.0)]
    figure = figures.heat_map(table(NOTHING, *windows), "clip_score", "m", ("window", "alpha"))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1000 to 900", "1000 to 700"]


def noise(seed, side=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_a_contact_sheet_has_every_pixel_of_every_image_in_its_place():
    """Blocks side by side, each as wide as its longest row; rows below each other; what is not there is white."""
    one, two, three, four = map(noise, range(4))
    sheet = pixels(image_grid(["one", "two"], [("a", [[one], [two, three]]), ("b", [[four], []])]))
    found = np.array(sheet)
    left, height = round(128 * LABELS), round(128 * LINE * 1.5)
    step = 32 + round(128 * SPACE)
    for image, row, x in ((one, 0, 0), (two, 0, 32 + 12), (three, 0, 64 + 12), (four, 1, 0)):
        there = found[height + row * step :, left + x :][:32, :32]
        assert (there == np.array(image)).all(), "every colour of every pixel"
    assert (found[height + step :, left + 32 :] == 255).all()
    assert (found[:, :left] < 128).any(), "labels"
    assert sheet.size == (left + 3 * 32 + 12, height + 2 * step)


def test_a_tile_has_the_size_of_what_was_generated_up_to_a_limit_and_the_shape_of_its_image():
    asset, small, large = noise(0, 200), noise(1, 96), Image.new("RGB", (1024, 512), "red")
    assert pixels(image_grid(["asset", "m"], [("a", [[asset], [small]])])).width == 192 + 96 + 12 + 96
    found = np.array(pixels(image_grid(["m"], [("a", [[large, large]])])))
    assert found.shape[1] == 192 + 2 * 256
    assert ((found == (255, 0, 0)).all(axis=2)).sum() == 2 * 256 * 128


def test_a_sheet_is_a_small_picture_close_to_the_images_and_a_pdf_with_text_and_lossless_tiles(tmp_path):
    file = PROJECT / "models" / "mini-protected" / "guidance" / "panda" / "noto-panda.png"
    sheet = image_grid(["a head"], [("a label", [[file, file]])])
    picture = save(sheet, tmp_path / "sheet")
    with using("paper"):
        pdf = save(sheet, tmp_path / "sheet")
    assert (picture, pdf) == (tmp_path / "sheet.webp", tmp_path / "paper" / "sheet.pdf")
    with Image.open(picture) as opened:
        lost = np.array(opened.convert("RGB"), float) - np.array(pixels(sheet), float)
    assert 10 * np.log10(255**2 / (lost**2).mean()) > 35, "decibels: no loss that is seen"
    assert picture.stat().st_size < 8000 * 2
    assert [written.read_bytes() for written in (picture, pdf)] == [
        encode(image_grid(["a head"], [("a label", [[file, file]])]), kind) for kind in ("webp", "pdf")
    ]
    content = pdf.read_bytes()
    streams = [zlib.decompress(part) for part in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL)
               if part[:1] == b"\x78"]  # fmt: skip
    told = [b"".join(re.findall(rb"\(([^()]*)\)", stream)).replace(b"\0", b"") for stream in streams]
    assert any(b"a head" in text and b"a label" in text for text in told), "text, and no picture of one"
    assert content.count(b"/Width 128") == 2 and b"/DCTDecode" not in content


def test_an_image_grid_shows_every_category_once(tmp_path):
    categories = ["bus", "cat", "ogre"]
    rows = []
    for number, category in enumerate(categories):
        for seed in (0, 1):
            path = f"images/{category}/{seed}/00.png"
            (tmp_path / path).parent.mkdir(parents=True)
            Image.new("RGB", (8, 8), (80 * number, 10 + seed, 0)).save(tmp_path / path)
            rows.append(ManifestRow(path, category, f"a {category}", category, seed, 0, 0))
    write_manifest(tmp_path, rows)
    run = Run(tmp_path)
    colours = {tuple(pixel) for pixel in np.array(pixels(grid_of_runs([run], ["m: method"]))).reshape(-1, 3)}
    assert {(80 * number, 10, 0) for number in range(3)} <= colours and (0, 11, 0) not in colours
    leading = {"ogre": tmp_path / rows[0].path}
    fewer, every = (grid_of_runs([run], ["m: method"], some).get_figheight() for some in (leading, None))
    assert fewer < every
    with pytest.raises(ValueError, match="share no group"):
        grid_of_runs([run], ["m: method"], {"dragon": tmp_path})


@pytest.mark.parametrize("count", [1, 4, 5])
def test_the_rows_of_a_grid_are_the_groups_of_median_gain(count):
    rng = np.random.default_rng(count)
    category = {f"{name}/{seed}": name for name in "abcde" for seed in range(count)}
    gains = {group: rng.normal() for group in category}
    medians = {}
    for name in "abcde":
        own = sorted(gains[group] for group in category if category[group] == name)
        medians[name] = next(value for value in own if 2 * sum(other <= value for other in own) >= count)
    shown = median_groups(gains, category, 3)
    assert [gains[group] for group in shown] == [sorted(medians.values())[place] for place in (0, 2, 4)]
    assert len(median_groups(gains, category, 9)) == 5


def test_a_figure_that_was_there_is_never_half_overwritten(tmp_path, monkeypatch):
    """Killed at any moment, a figure is the old one or the new one; what a killed process left is swept a day later."""
    figure = Drawing()
    file = save(figure, tmp_path / "figure")
    before = file.read_bytes()
    assert file.name == "figure.png" and before

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process sweeps nothing
        with pytest.raises(KeyboardInterrupt):
            save(figure, tmp_path / "figure")
    assert file.read_bytes() == before
    (left,) = set(tmp_path.iterdir()) - {file}
    save(figure, tmp_path / "figure")
    assert set(tmp_path.iterdir()) == {file, left}, "it may be another process's"
    os.utime(left, (0, 0))
    save(figure, tmp_path / "figure")
    assert set(tmp_path.iterdir()) == {file}


def test_a_corrupt_picture_is_named_in_one_line(tmp_path):
    (tmp_path / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    with pytest.raises(ValueError, match=rf"got a damaged or foreign file: {tmp_path}/00\.png") as error:
        image_grid(["one"], [("", [[tmp_path / "00.png"]])])
    assert "\n" not in str(error.value)
