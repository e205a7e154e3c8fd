"""The demo without its page: what a session makes, says and stops; and what a visitor takes away."""

import ast
import contextlib
import io
import json
import os
import runpy
import shlex
import sys
import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

import negtome
from eval.alignment import clip_score
from eval.images import load_picture, read_manifest
from experiments import PROJECT
from experiments.__main__ import main
from experiments.configs import build
from experiments.demo import asked as asking
from experiments.demo import models, session, view, watch
from experiments.demo.asked import MODES, Asked, keep, split
from experiments.demo.export import exports, png
from experiments.demo.jobs import Job, Jobs
from experiments.demo.session import Session, blurred
from experiments.methods.negtome import NegToMe
from experiments.plan import Plan, expand, first
from experiments.runs import checkpoints, preflight
from experiments.runs.store import Run
from negtome.__main__ import main as negtome_main
from negtome.generate import Made, generate
from negtome.recipe import Recipe
from negtome.reference import token_mask

FEW = Asked(images=2, steps=2, low=0, threshold=0.5)


@pytest.fixture(scope="module")
def one():
    """A session that has mini-sdxl loaded; no test changes its pipeline."""
    made = Session(preview_share=1)
    made.load("mini-sdxl")
    return made


@pytest.fixture
def kept_in(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "PICTURES", tmp_path / "pictures")
    return tmp_path / "pictures"


def given(kept_in, **changes):
    """Ask for what is away from a picture, of which the left half counts."""
    picture, mask = Image.new("RGB", (96, 64), "red"), Image.new("L", (96, 64))
    ImageDraw.Draw(picture).ellipse((20, 10, 70, 60), fill="blue")
    ImageDraw.Draw(mask).rectangle((0, 0, 47, 63), fill=255)
    return replace(FEW, mode="away", picture=keep(picture), mask=keep(mask), **changes)


def states(one, asked, stop=None):
    return list(one.run(asked, stop or threading.Event()))


def ended(one, asked):
    last = states(one, asked)[-1]
    assert last.kind == "done", last
    return last


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def test_both_rows_are_the_library_s_own_images_whatever_is_watched(one):
    seen = states(one, FEW)
    recipe, pipe = seen[-1].recipe, one.loaded[1]
    made = generate(pipe, recipe)
    assert np.array_equal(pixels(seen[-1].rows[0].images), pixels(generate(pipe, recipe.without()).images))
    assert np.array_equal(pixels(seen[-1].rows[1].images), pixels(made.images))
    working = [state for state in seen if state.kind == "working" and state.step]
    assert [state.step for state in working] == [1, 2, 1, 2] and {state.steps for state in working} == {2}
    assert all(len(state.preview) == 2 for state in working), "a preview of every image after every step"
    pushed, summary = seen[-1].rows[1].pushed, made.attached.summary()
    assert sum(step.pushed for step in pushed.steps) == summary["tokens_pushed"] > 0
    assert sum(step.compared for step in pushed.steps) == summary["tokens_compared"]
    assert [step[:2] for step in pushed.steps] == made.attached.steps
    assert pushed.where.shape == (2, 16, 16) and not pushed.where[0].any() and 0 < pushed.where[1].mean() <= 1


def test_what_is_measured_is_what_the_harness_measures(one, tmp_path):
    from eval.alignment import ClipScore
    from eval.diversity import PairwiseDistance

    row = ended(one, FEW).rows[1]
    encoder = build(models.find("mini-sdxl").cfg.scorer)
    images = torch.from_numpy(pixels(row.images)).permute(0, 3, 1, 2)
    distance, clip = PairwiseDistance(encoder), ClipScore(encoder)
    distance.update(images[None])
    clip.update(images, [FEW.prompt] * 2)
    assert row.distance == pytest.approx(float(distance.compute()), abs=1e-5)
    assert row.clip == pytest.approx(float(clip.compute()), abs=1e-3)


def test_images_without_a_method_are_made_once_for_all_that_they_depend_on(one, monkeypatch):
    calls, blank = [], [Image.new("RGB", (8, 8))]

    def painted(pipe, recipe):
        calls.append(recipe)
        return Made(blank * recipe.images, SimpleNamespace(steps=[]))

    monkeypatch.setattr(session, "generate", painted)
    monkeypatch.setattr(one, "baselines", OrderedDict())
    ended(one, FEW)
    for change in ({"alpha": 0.1}, {"threshold": 0.9}, {"low": 500}, {"matching": "released"}):
        calls.clear()
        assert ended(one, replace(FEW, **change)).rows[0].kept and len(calls) == 1, change
    for change in ({"prompt": "a photo of a cat"}, {"seed": 7}, {"steps": 1}, {"images": 3}):
        calls.clear()
        assert not ended(one, replace(FEW, **change)).rows[0].kept and len(calls) == 2, change
    for seed in range(20):
        ended(one, replace(FEW, seed=seed))
    assert len(one.baselines) == session.KEPT and not ended(one, FEW).rows[0].kept, "the oldest are forgotten"


@pytest.fixture
def stopped_at(one, monkeypatch):
    """Run what is asked for and stop it where it has so many rows and is at a step; return its states.

    In the run's own thread, which would else be done before it is told.
    """

    def run(asked, rows, step):
        stop, say = threading.Event(), session._Run.say

        def stopping(run, *words, **changes):
            say(run, *words, **changes)
            if (len(run.state.rows), run.state.step) == (rows, step):
                stop.set()

        with monkeypatch.context() as patch:
            patch.setattr(session._Run, "say", stopping)
            return list(one.run(asked, stop))

    return run


def test_stop_ends_a_run_before_the_next_step_and_the_pipeline_is_free_again(one, stopped_at):
    seen = stopped_at(replace(FEW, seed=11), rows=0, step=1)
    assert seen[-1].kind == "stopped" and "after step 1 of 2" in seen[-1].text and seen[-1].advice
    assert max(state.step for state in seen[:-1]) == 1 and not seen[-1].rows
    assert not one.turn.locked() and ended(one, FEW)


def test_a_run_that_is_stopped_in_its_second_row_keeps_the_first(one, stopped_at):
    *_, state = stopped_at(FEW, rows=1, step=1)
    assert state.kind == "stopped" and [row.name for row in state.rows] == ["none"]
    negtome.attach(one.loaded[1]).remove()  # which is refused where anything is left


def test_a_visitor_who_leaves_ends_the_run(one):
    stop = threading.Event()
    run = one.run(replace(FEW, seed=12), stop)
    next(run)
    run.close()
    assert stop.is_set()


def test_runs_wait_for_each_other_and_may_be_taken_out_of_the_queue(one):
    with one.turn:
        stop = threading.Event()
        run = one.run(FEW, stop)
        first = next(run)
        assert first.kind == "queued" and "another run" in first.text
        stop.set()
        assert [state.kind for state in run] == ["stopped"]
        waiting = one.run(FEW, threading.Event())
        assert next(waiting).kind == "queued"
    assert [*waiting][-1].kind == "done"


def test_missing_weights_are_named_and_the_embedded_model_stands_in(one, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    last = ended(one, replace(FEW, model="sd15"))
    assert last.asked.model == "mini-sdxl" and last.recipe.model == "models/mini-sdxl"
    assert "stable-diffusion-v1-5" in last.notes[0] and "hf download" in last.notes[0]
    assert "These images are by mini-sdxl" in last.notes[0]
    for name in ("./nowhere", "nobody/nothing"):
        assert name in ended(one, replace(FEW, model=name)).notes[0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_without_memory_it_says_what_to_try(one, monkeypatch, error):
    def failing(pipe, recipe):
        raise error

    monkeypatch.setattr(session, "generate", failing)
    last = states(one, replace(FEW, seed=13))[-1]
    assert last.kind == "failed" and last.text == "Out of memory." and "1 instead of 2" in last.advice


def test_the_library_s_own_words_are_shown_where_nothing_is_pushed_or_nothing_can_be(one):
    last = ended(one, replace(FEW, threshold=0.9999))
    assert any("pushed no token" in note and "lower the threshold" in note for note in last.notes)
    last = states(one, replace(FEW, low=1, high=2))[-1]
    assert last.kind == "failed" and "widen the window" in last.text and [row.name for row in last.rows] == ["none"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": " "}, "prompt is empty: write"),
        ({"images": 1}, "at least two"),
        ({"mode": "away"}, "upload or paste"),
        ({"mode": "compare", "methods": ()}, "tick at least one"),
        ({"low": 900, "high": 100}, "swap its ends"),
        ({"seed": -1}, "seed from 0"),
        ({"images": 99}, "1 to 8 images"),
        ({"steps": 0}, "1 to 200 steps"),
        ({"mode": "sharpen"}, "got 'sharpen'"),
    ],
)
def test_what_cannot_be_made_is_said_before_anything_is(one, change, said):
    (state,) = states(one, replace(FEW, **change))
    assert state.kind == "failed" and said in state.text and not state.rows


def test_a_picture_and_its_mask_are_what_the_library_gets(one, kept_in):
    last = ended(one, given(kept_in, images=1))
    picture, mask = (kept_in / f"{name}.png" for name in (last.asked.picture, last.asked.mask))
    reference = negtome.Reference(str(picture), mask=str(mask))
    with negtome.attach(one.loaded[1], last.recipe.config, references=reference):
        images = generate(one.loaded[1], last.recipe.without()).images
    assert np.array_equal(pixels(last.rows[1].images), pixels(images))
    assert last.rows[1].pushed.where.shape == (1, 16, 16) and last.rows[1].distance is None


def test_the_mask_is_shown_as_the_tokens_see_it(one, kept_in):
    asked = given(kept_in)
    size, grid = one.grid(asked.model)
    assert (size, grid) == ((128, 128), (16, 16))
    picture, mask = (Image.open(kept_in / f"{name}.png") for name in (asked.picture, asked.mask))
    # 96 x 64 in a square: a third of the height is margin, and half of the width is inside.
    inside = token_mask(
        torch.zeros(128, 128).index_fill_(0, torch.arange(21, 106), 1) * (torch.arange(128) < 64), *grid
    )
    assert f"{int(inside.sum())} of 256 (16 x 16)" in view.mask_seen(picture, mask, size, grid)
    assert "0 of 256" in view.mask_seen(picture, Image.new("L", picture.size), size, grid)


class Dropped(Session):
    """Whose model a run of another thread drops as soon as anybody has looked at it."""

    @property
    def loaded(self):
        loaded, self._loaded = self._loaded, None
        return loaded

    @loaded.setter
    def loaded(self, loaded):
        self._loaded = loaded


def test_a_look_at_a_picture_survives_a_run_that_drops_the_model(one):
    dropped = Dropped()
    dropped.loaded = one.loaded
    assert dropped.grid("mini-sdxl") == one.grid("mini-sdxl") is not None


def test_a_look_at_a_picture_drops_no_model_and_waits_for_none(one):
    before = one.loaded
    assert one.grid("mini-flux") is None and one.grid("mini-none") is None and one.loaded is before
    fresh = Session()
    with fresh.turn:
        assert fresh.grid("mini-sdxl") is None
    # A run that ends between two looks of this one leaves its model behind.
    fresh.turn = SimpleNamespace(acquire=lambda blocking: vars(fresh).update(loaded=before) or True, release=list)
    assert fresh.grid("mini-flux") is None and fresh.loaded is before


def test_quality_is_away_from_a_blurred_copy_of_each_image(one):
    last = ended(one, replace(FEW, mode="quality", blur=0.1, alpha=0.6))
    copies = [negtome.Reference(blurred(image, 0.1)) for image in last.rows[0].images]
    with negtome.attach(one.loaded[1], last.recipe.config, references=copies):
        images = generate(one.loaded[1], last.recipe.without()).images
    assert np.array_equal(pixels(last.rows[1].images), pixels(images))


def test_methods_are_those_of_the_benchmark_and_one_that_refuses_hides_no_other(one):
    methods = models.find("mini-sdxl").methods()
    assert next(iter(methods)) == "negtome" and {"cads", "negtome_released", "best_of"} <= methods.keys()
    assert not {"shield_reference", "guarded", "contextual_repulsion", "none"} & methods.keys()
    last = ended(one, replace(FEW, mode="compare", methods=("lower_guidance", "contextual_repulsion", "negtome")))
    assert [row.name for row in last.rows] == ["none", "lower_guidance", "contextual_repulsion", "negtome"]
    assert last.rows[2].refused and not last.rows[2].images and len(last.rows[3].images) == 2
    pipe, config = one.loaded[1], models.find("mini-sdxl").group.replace(alpha=chosen("mini-sdxl")["negtome"])
    made = generate(pipe, last.recipe.replace(config=config))
    assert np.array_equal(pixels(last.rows[3].images), pixels(made.images)), "from the same seeds"
    assert last.rows[3].tokens == made.attached.summary()["tokens_pushed"] > 0 and last.rows[1].tokens is None
    shown = view.results(last, models.find("mini-sdxl"))
    assert f"<td>{last.rows[3].tokens:,}</td>".replace(",", " ") in shown and "scale 2.79" in shown


def chosen(model):
    """The published hyperparameters of a model's methods."""
    return yaml.safe_load((PROJECT / "results" / "peers_grid" / "chosen.yaml").read_text())[model]


@pytest.mark.parametrize("name", ["mini-sdxl", "mini-flux"])
def test_every_method_has_its_chosen_hyperparameter_and_every_export_the_same_settings(name):
    model = models.find(name)
    methods = tuple(model.methods())
    assert chosen(name).keys() <= {*methods}
    asked = Asked(mode="compare", model=name, methods=methods, images=3, steps=7, seed=5)
    recipe = asked.recipe(model)
    script, commands, overrides = (export.text for export in exports(asked, recipe, model))
    of_script = next(
        ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(script))
        if isinstance(node, ast.Assign) and node.targets[0].id == "methods"
    )
    of_commands = [read_recipe(line) for line in commands.splitlines()]
    lines = [shlex.split(line)[3:] for line in overrides.splitlines()]
    assert len(lines) == 1 + len(methods) and list(of_script) == list(methods)
    assert expand(lines[0])[0].method.name == "none"
    for method, line in zip(methods, lines[1:], strict=True):
        shown, (cfg,) = model.method(method), expand(line)
        assert build(cfg.method).settings() == shown.settings(), method
        assert build(first([f"model={name}", f"method={method}", *of_script[method]]).method).settings() == (
            shown.settings()
        )
        assert checkpoints.call_arguments(cfg.model) == checkpoints.call_arguments(model.cfg) | {
            "num_inference_steps": 7
        }
        if method in chosen(name):
            knob = cfg.method.metadata.hyperparameter
            value = OmegaConf.select(cfg, f"method.{knob.setting}")
            assert value == chosen(name)[method] and value != knob.get("nothing")
        (group,) = build(cfg.prompts).groups()
        assert (group.prompt, group.image_seeds()) == (asked.prompt, [5, 6, 7])
        if type(shown) is NegToMe:
            assert recipe.replace(config=shown.config) in of_commands


def read_recipe(line):
    """What a command line of negtome generate would load a model for."""
    words, recipes = shlex.split(line), []

    def load(recipe, *_):
        recipes.append(recipe)
        raise ValueError("no further")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("negtome.generate.load", load)
        assert words[0] == "negtome" and negtome_main(words[1:]) == 2
    return recipes[0]


@pytest.mark.parametrize("name", ["sdxl", "flux-dev"])
def test_no_method_of_a_published_checkpoint_does_nothing(name):
    model = models.find(name)
    for method in model.methods():
        cfg = first([f"model={name}", f"method={method}", *model.setup(method).overrides])
        if knob := OmegaConf.select(cfg, "method.metadata.hyperparameter"):
            value = OmegaConf.select(cfg, f"method.{knob.setting}")
            assert value is not None and value != knob.get("nothing"), method


def test_the_exports_of_compared_methods_make_these_very_images(one, tmp_path, monkeypatch):
    """Methods of settings, of further draws, and of other seeds; by the script and as runs of the benchmark."""
    methods = ("negtome", "lower_guidance", "cads", "best_of", "negtome_previous")
    asked = replace(FEW, mode="compare", methods=methods, seed=3)
    last = ended(one, asked)
    assert not any(row.refused for row in last.rows)
    script, _, overrides = (export.text for export in exports(asked, last.recipe, models.find("mini-sdxl")))
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda model, **_: one.loaded[1])
    (tmp_path / "script.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("script.py")
    for row, file in zip(last.rows, ("without", *methods), strict=True):
        made = [Image.open(f"{file}-{number}.png") for number in range(2)]
        assert np.array_equal(pixels(made), pixels(row.images)), row.name
    for row, line in [*zip(last.rows, overrides.splitlines(), strict=True)][:4:3]:  # the baseline, and one that draws
        words = [*shlex.split(line)[3:], f"outputs={tmp_path}", "device=cpu"]
        assert main(["generate", *words]) == 0
        rows = sorted(read_manifest(Run.of(Plan.make(words).runs[-1]).folder), key=lambda row: row.index)
        made = [Image.open(Run.of(Plan.make(words).runs[-1]).folder / one.path) for one in rows]
        assert np.array_equal(pixels(made), pixels(row.images)), row.name


def test_a_method_that_changes_no_image_says_so_and_shows_none(one):
    last = ended(one, replace(FEW, mode="compare", methods=("rewriting", "negtome")))
    assert chosen("mini-sdxl")["rewriting"] * FEW.images < 1, "no image of two is rewritten"
    assert "the baseline's" in last.rows[1].refused and not last.rows[1].images and last.rows[2].images


def test_similarity_to_the_reference_image_is_shown_for_both_rows(one, kept_in):
    asked = given(kept_in)
    last = ended(one, asked)
    encoder = build(models.find("mini-sdxl").cfg.scorer)
    reference = np.array(Image.open(kept_in / f"{asked.picture}.png"))
    reference[:, 48:] = 255  # outside of the mask
    features = encoder.embed_images([torch.from_numpy(reference).permute(2, 0, 1)])
    for row in last.rows:
        images = encoder.embed_images([*torch.from_numpy(pixels(row.images)).permute(0, 3, 1, 2)])
        expected = torch.nn.functional.cosine_similarity(images, features).mean()
        assert row.similarity == pytest.approx(float(expected), abs=1e-5)
    shown, difference = view.results(last), last.rows[1].similarity - last.rows[0].similarity
    assert f"{last.rows[0].similarity:.3f}<" in shown and f"({difference:+.3f})" in shown
    again = ended(one, replace(asked, mask=""))
    assert again.rows[0].kept and again.rows[0].similarity != last.rows[0].similarity, "a kept row is measured anew"
    assert ended(one, FEW).rows[1].similarity is None


def test_images_that_show_something_else_come_with_a_warning(one, kept_in):
    asked = Asked(images=2, steps=8, seed=1, threshold=-1, low=0)
    torn, mild = (ended(one, replace(asked, alpha=alpha)) for alpha in (4, 0.05))
    assert torn.rows[1].clip < 0.6 * torn.rows[0].clip and "CLIPScore fell" in torn.rows[1].warning
    assert "CLIPScore fell" in view.results(torn) and not mild.rows[1].warning and not torn.rows[0].warning
    away = ended(one, replace(given(kept_in), mask="", steps=8, threshold=-1, alpha=4))
    assert away.rows[1].clip < 0.6 * away.rows[0].clip and "CLIPScore fell" in away.rows[1].warning


def test_the_limit_of_the_warning_parts_fitting_images_from_others():
    """On the artwork of the evaluated categories, by mini-clip, as the limit's comment says."""
    encoder = build(models.find("mini-sdxl").cfg.scorer)
    folders = sorted(path for path in (PROJECT / "models" / "mini-reference").iterdir() if path.is_dir())
    texts = {folder.name: encoder.embed_texts([f"a photo of a {folder.name}"]) for folder in folders}
    images = {
        folder.name: encoder.embed_images(
            [torch.from_numpy(np.array(load_picture(file))).permute(2, 0, 1) for file in sorted(folder.glob("*.png"))]
        )
        for folder in folders
    }
    scores = {
        (shown, said): clip_score(images[shown], texts[said].expand(len(images[shown]), -1)).numpy()
        for shown in images for said in texts
    }  # fmt: skip
    mismatched = [scores[a, b].mean() / scores[b, b].mean() for a in images for b in texts if a != b]
    assert np.mean(np.array(mismatched) < session.STILL_SHOWN) >= 0.95
    draw, matched = np.random.default_rng(0), []
    for name in images:
        for _ in range(200):
            before, after = draw.permutation(scores[name, name])[:8].reshape(2, 4).mean(axis=1)
            matched.append(after / before)
    assert np.mean(np.array(matched) > session.STILL_SHOWN) >= 0.999


class Clock:
    """Seconds that pass only when something says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("cost", [0.01, 0.2, 7])
def test_previews_take_a_tenth_of_the_time_and_the_clock_says_how_much_that_is(one, monkeypatch, cost):
    clock, decoded = Clock(), []
    watched = Session(clock=clock)
    watched.loaded = one.loaded

    def preview(pipe, clean, size):
        decoded.append(clock.now)
        clock.now += cost
        return torch.zeros(2, 8, 8, 3)

    def step(*_):
        clock.now += 1

    monkeypatch.setattr(watch, "_preview", preview)
    handle = one.loaded[1].unet.register_forward_pre_hook(step)
    try:
        for run, most in ((0, cost), (1, 0)):  # the first run does not know what a preview takes
            decoded.clear()
            began = clock.now
            last = ended(watched, replace(FEW, steps=12, seed=run))
            assert last.seconds == pytest.approx(clock.now - began) == pytest.approx(24 + cost * len(decoded))
            assert cost * len(decoded) <= 0.1 * last.seconds + most
            assert last.rows[0].seconds == pytest.approx(12), "previews are not the pipeline's"
        assert cost > 4 or cost * (len(decoded) + 1) > 0.1 * 24 or len(decoded) == 24, "as many as there may be"
    finally:
        handle.remove()


def test_after_a_stop_the_last_preview_stays(one, stopped_at):
    seen = stopped_at(replace(FEW, seed=14), rows=0, step=1)
    assert seen[-1].kind == "stopped" and len(seen[-1].preview) == 2
    assert view.progress(seen[-1]).count("data:image/png;base64,") == 2


def test_a_run_goes_on_while_its_page_is_loaded_again(one):
    jobs = Jobs(one)
    with one.turn:
        name = jobs.start(replace(FEW, seed=15))
        first = jobs.get(name).follow()
        assert next(first).kind == "queued"
        first.close()  # the page is gone
        again = jobs.get(name).follow()
        assert next(again).kind == "queued"
    assert [*again][-1].kind == "done"
    assert [state.kind for state in jobs.get(name).follow()] == ["done"], "and is shown when it has ended"
    assert jobs.get("no such run") is None


def test_a_run_that_nobody_follows_ends(one):
    with one.turn:
        job = Job(one, replace(FEW, seed=16), patience=0)
        run = job.follow()
        next(run)
        run.close()
        assert job.stop.wait(timeout=60)
    assert [*job.follow()][-1].kind == "stopped"


@pytest.mark.parametrize(
    "mode", ["away", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("diversity", "quality", "towards"))]
)
def test_the_script_makes_these_very_images(one, kept_in, tmp_path, monkeypatch, mode):
    asked = replace(given(kept_in), mode=mode, alpha=-0.3 if mode == "towards" else 0.9)
    last = ended(one, asked)
    script = exports(asked, last.recipe, models.find(asked.model))[0].text
    loads = []
    monkeypatch.setattr(
        "diffusers.DiffusionPipeline.from_pretrained",
        lambda model, **options: loads.append(model) or one.loaded[1],
    )
    (tmp_path / "script.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path("script.py")
    for row, name in zip(last.rows, ("without", "with"), strict=True):
        made = [Image.open(f"{name}-{number}.png") for number in range(2)]
        assert np.array_equal(pixels(made), pixels(row.images)), name
    assert loads == ["models/mini-sdxl"]


@pytest.mark.parametrize("mode", MODES)
def test_the_overrides_compose_to_the_same_settings(kept_in, mode):
    prompt = 'a photo of a dog\'s "day, \\ out\\"\\'
    asked = replace(given(kept_in), mode=mode, mask="", prompt=prompt, methods=("negtome", "cads"))
    model = models.find(asked.model)
    recipe = asked.recipe(model)
    words = shlex.split(exports(asked, recipe, model)[2].text.splitlines()[-1])
    assert words[:3] == ["python", "-m", "experiments"]
    cfg = expand(words[4:])[-1] if words[3] == "generate" else expand(["method=negtome", *words[4:]])[0]
    assert cfg.model.call.num_inference_steps == 2
    if words[3] == "generate":
        (group,) = build(cfg.prompts).groups()
        assert (group.prompt, group.seed, group.size) == (prompt, 0, 2)
        assert preflight.of_scoring([cfg], tables=False) == [], "two images are too few for most metrics"
    else:
        (spec,) = cfg.applications.values()
        assert (spec.prompt, list(spec.alphas), list(spec.seeds)) == (prompt, [asked.alpha], [0, 1])
        assert spec.get("blur") == (asked.blur if mode == "quality" else None)
    if mode != "compare":
        config = build(cfg.method).config
        if mode != "diversity":
            config = config.replace(alpha=recipe.config.alpha)
        assert config.published_for("sdxl") == recipe.config


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_reads_nothing_of_the_machine_in_the_overrides(kept_in, mode):
    prompt = "a photo of ${oc.env:HOME}, \\${x \\\\${project:a} \\'${"
    asked = replace(given(kept_in), mode=mode, mask="", prompt=prompt)
    model = models.find(asked.model)
    export = exports(asked, asked.recipe(model), model)[2]
    if mode in ("diversity", "compare"):
        assert not export.text and "cannot hold ${" in export.what
    else:
        (spec,) = OmegaConf.to_container(
            expand(["method=negtome", *shlex.split(export.text)[3:]])[0].applications, resolve=True
        ).values()
        assert spec["prompt"] == prompt


def test_a_prompt_is_split_at_its_last_article_or_word():
    assert split("a photo of a red dog") == ("a photo of a", "red dog")
    assert split("cats and dogs") == ("cats and", "dogs")
    assert split("dog") == ("", "dog")


@pytest.mark.parametrize("mode", MODES)
def test_a_link_restores_what_was_asked_for(kept_in, mode):
    asked = replace(given(kept_in), mode=mode, prompt="50 % of a dög & cat?", methods=("negtome", "cads"), blur=0.1)
    back = Asked.from_query(dict(parse_qsl(asked.link()[1:])))
    matters = {"mode", "prompt", "model", "images", "seed", "steps", *MODES[mode].controls}
    assert {name: getattr(back, name) for name in matters} == {name: getattr(asked, name) for name in matters}


def test_a_foreign_link_names_no_file_and_changes_nothing_that_it_may_not(kept_in):
    query = {
        "picture": "../../../etc/passwd",
        "mask": "0" * 16,
        "alpha": "nan",
        "images": "1e9",
        "mode": "x",
        "who": "me",
        "methods": "nothing,../negtome",
    }
    assert Asked.from_query(query) == Asked()
    assert Asked.from_query({"methods": "nothing,cads"}).methods == ("cads",)


@pytest.mark.parametrize(
    "model", ["/etc", "../x/y", "./x", "~", "~x/y", "models/mini-sdxl", "a" * 400, "a/" + "b" * 400]
)
def test_a_link_names_no_folder_but_the_page_s_own(model):
    assert Asked.from_query({"model": model}).model == Asked().model
    assert Asked.from_query({"model": model}, own=model).model == model


@pytest.mark.parametrize("model", ["mini-flux", "sd15", "owner/name-1.0"])
def test_a_link_names_a_model_of_the_configuration_or_of_the_hub(model):
    assert Asked.from_query({"model": model}).model == model


def test_a_link_names_no_mask_but_one_of_its_picture(kept_in):
    picture, fits, other = (
        keep(Image.new(mode, size)) for mode, size in (("RGB", (9, 6)), ("L", (9, 6)), ("L", (6, 9)))
    )
    assert Asked.from_query({"mask": fits, "picture": picture}).mask == fits
    assert Asked.from_query({"mask": other, "picture": picture}) == Asked(picture=picture)
    assert Asked.from_query({"mask": fits}) == Asked()


def test_a_picture_holds_its_settings(one):
    last = ended(one, FEW)
    with Image.open(io.BytesIO(png(last.rows[1].images[0], last.recipe, FEW.link()))) as image:
        assert Recipe.from_dict(json.loads(image.text["negtome"])) == last.recipe
        assert Asked.from_query(dict(parse_qsl(image.text["negtome demo"][1:]))) == FEW


def test_memory_is_saved_only_where_it_is_needed():
    gigabyte = 1 << 30
    assert models.plan(80 * gigabyte, 7 * gigabyte, "cuda") == (False, False)
    assert models.plan(8 * gigabyte, 7 * gigabyte, "cuda") == (True, False)
    assert models.plan(5 * gigabyte, 7 * gigabyte, "cuda") == (True, True)
    assert models.plan(8 * gigabyte, 7 * gigabyte, "cpu") == (False, True), "nothing can be moved off a CPU"


def test_a_folder_is_called_as_the_model_of_its_architecture(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("sdxl")
    model = models.find(str(folder))
    assert (model.base, model.cfg.source, model.cfg.call.height) == ("sdxl", str(folder), None)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match=r"FluxPipeline.*got a WanPipeline"):
        models.find(str(tmp_path))
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"maps names in .*, got a list"):
        models.find(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="choose mini-sdxl"):
        models.find("a" * 400)


@pytest.mark.slow
def test_a_folder_makes_images_that_nothing_measures(tiny_checkpoint):
    asked = Asked(model=str(tiny_checkpoint("flux")), images=2, steps=2, low=0, threshold=-1)
    models.find(asked.model).cfg.call.max_sequence_length = 32  # which the tiny encoder reads
    last = ended(Session(preview_share=1), asked)
    assert last.rows[1].pushed.steps[0].pushed and last.rows[1].distance is None
    assert "Not measured: the weights of" in last.scorer


def test_what_is_shown_is_escaped_and_complete(one):
    asked = replace(FEW, prompt="a photo of a <b onclick=x>${dog}")
    last = ended(one, asked)
    shown = view.results(last, models.find(asked.model))
    assert "<b onclick" not in shown and shown.count("data:image/png;base64,") == 2 * 2 + 2 + 1
    assert "mini-clip" in shown and "tokens pushed" in shown and "negtome generate" in shown
    assert "step 1 of 3" in view.progress(replace(last, kind="working", text="step 1 of 3", step=1, steps=3))


def test_a_missing_gradio_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv("NEGTOME_TRACEBACK", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "experiments.demo.page", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["demo"]) == 2
    assert (
        capsys.readouterr().err
        == "demo: expected gradio for the demo, got none: pip install -e '.[demo]', or make demo\n"
    )
    assert main(["demo", "--prot", "1"]) == 2 and "got --prot 1" in capsys.readouterr().err
    for port in ("99999", "0", "-1"):
        assert main(["demo", "--port", port]) == 2
        assert capsys.readouterr().err.startswith(f"demo: expected a port from 1 to 65535, got {port}: ")


def test_gradio_is_of_the_page_alone():
    files = [path for package in ("negtome", "eval", "experiments") for path in (PROJECT / package).rglob("*.py")]
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {path for name in names if name.split(".")[0] == "gradio"}
    assert found == {Path(PROJECT, "experiments", "demo", "page.py")}
