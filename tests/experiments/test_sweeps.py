"""Every experiment that sweeps, run from the command line's overrides to table and figures, at tiny size."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from experiments import PROJECT, plot, tables, tabulate
from experiments.configs import build, expand
from experiments.evaluate import evaluate
from experiments.figures.image_grid import worth_showing
from experiments.generate import generate
from experiments.identity import config_digest, experiments_of, lookup, register
from experiments.pages import run_labels
from experiments.runs import Run

#: Experiment -> the part of its sweep that is run here: the rest takes as much time again and shows nothing new.
SWEEPS = {
    "ablate_alpha": ["method=none,negtome", "method.alpha=-0.9,0.9"],
    "ablate_threshold": ["method=none,negtome", "method.threshold=-1,0.5"],
    "ablate_window": ["method=none,negtome", "method.timestep_range=[0,1000],[400,1000]"],
    "ablate_blocks": ["method=none,negtome", "method.about.blocks=early,late"],
    "ablate_matching": ["method=none,negtome,random_match,noise_control"],
    "cfg_scale": ["method=none,negtome", "model.call.guidance_scale=2,8"],
    "cfg_scale_flux": ["method=none,negtome", "model.call.guidance_scale=1.5,3.5"],
    "sweep": ["method=none,negtome", "method.alpha=0.9,1.8", "method.threshold=-1,0.5"],
}
#: One of every kind of figures is drawn: for a grid, one numeric setting, and one that sweeps the baseline along.
DRAWN = {"sweep", "cfg_scale"}
#: What differs from its neighbours by one line of configuration, which other tests read, is run among the slow tests.
ALIKE = {
    "ablate_alpha", "ablate_threshold", "ablate_window", "ablate_blocks", "ablate_matching", "cfg_scale_flux"
}  # fmt: skip
RUN = [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in SWEEPS]
#: Those that choose nothing, and so may look at the reported prompts.
REPORTED = {"ablate_matching", "cfg_scale", "cfg_scale_flux"}


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_overrides):
    """Run an experiment to its table and figures, once: configurations, table, Markdown and files."""
    folder, kept = tmp_path_factory.mktemp("sweeps"), {}

    def run(experiment):
        if experiment not in kept:
            kind = "flux" if experiment.endswith("flux") else "sdxl"
            configs = expand(tiny_overrides(experiment, folder, *SWEEPS[experiment], kind=kind))
            for cfg in configs:
                generate(cfg)
                evaluate(cfg)
            _, markdown = tabulate.write_table(configs)
            frame = tables.read_table(configs[0].name, configs[0].results)
            frame = frame[frame["model"] == configs[0].model.name]  # two experiments make one table
            kept[experiment] = configs, frame, markdown, plot.plot(configs) if experiment in DRAWN else []
        return kept[experiment]

    return run


def test_every_experiment_that_sweeps_is_run_here():
    """Apart from those whose own tests run them, or that are another of these with other prompts."""
    elsewhere = {"diversity", "copyright", "copyright_sweep", "latency", "stereotypes", "safety", "safety_controls"}
    elsewhere |= {"peers_grid", "peers_grid_flux", "peers", "peers_flux", "peers_copyright"}  # test_rank.py
    assert {file.stem for file in (PROJECT / "conf" / "experiment").glob("*.yaml")} == {*SWEEPS, *elsewhere}


@pytest.mark.parametrize("experiment", RUN)
def test_an_experiment_runs_to_its_table_and_figures(experiment, done):
    configs, frame, markdown, files = done(experiment)
    labels = run_labels(frame)
    assert not any(run in label for run, label in labels.items()), "told apart by nothing but their ids"
    compared = frame[frame["method"] != "none"]
    assert compared["difference"].notna().all() and compared["pushed_share"].notna().all()
    assert len(compared["run_id"].unique()) == len([cfg for cfg in configs if cfg.method.name != "none"])
    assert all(labels[run] in markdown for run in compared["run_id"])
    # Every method with its own baseline: same call, same prompts.
    for cfg in configs:
        ours, base = Run.find(cfg).identity["request"], Run.find(cfg, baseline=True).identity["request"]
        assert base["method"] == {"name": "none", "settings": {}}
        assert {key: ours[key] for key in ("model", "prompts")} == {key: base[key] for key in ("model", "prompts")}
    if experiment in DRAWN:
        assert [file for file in files if file.suffix == ".pdf"] and all(file.stat().st_size for file in files)
        with Image.open(next(file for file in files if file.suffix == ".webp")) as grid:
            assert grid.width > 2 * 2 * 96


@pytest.mark.parametrize("experiment", SWEEPS)
def test_what_is_swept_is_chosen_on_development_prompts_and_the_page_says_which(experiment):
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"experiment={experiment}"])
    split = build(cfg.prompts).split
    assert split == ("test" if experiment in REPORTED else "development")
    assert ("reported prompts" if experiment in REPORTED else "development prompts") in cfg.description


def test_guidance_is_swept_as_in_the_papers_figure_and_each_scale_has_its_baseline():
    for name, scales in (("cfg_scale", (2, 3, 4, 5, 6, 7, 8)), ("cfg_scale_flux", (1.5, 2.5, 3.5, 5))):
        found = [(cfg.model.call.guidance_scale, cfg.method.name) for cfg in expand([f"experiment={name}"])]
        assert found == [(scale, method) for scale in scales for method in ("none", "negtome")]


def test_the_blocks_of_an_ablation_are_the_models_own():
    found = {
        (cfg.model.name, cfg.method.about.blocks): build(cfg.method).config.sites
        for cfg in expand(["experiment=ablate_blocks", "model=mini-sdxl,flux-dev", "method=negtome"])
    }
    assert found["mini-sdxl", "early"] == ("up_blocks.0",) and found["mini-sdxl", "release"] is None
    assert found["mini-sdxl", "all"] == ("down_blocks", "mid_block", "up_blocks")
    assert found["flux-dev", "early"] == ("transformer_blocks",) and found["flux-dev", "all"] is None


def test_a_grid_gives_heat_maps_and_a_front(done):
    names = {file.name for file in done("sweep")[3]}  # one swept setting gives a curve: test_plot.py
    assert {"sweep_heat_map_pairwise_distance_sdxl.pdf", "sweep_pareto_sdxl.png"} <= names


def test_experiments_share_what_they_have_in_common(done, monkeypatch):
    """The model's own strengths and the baseline are of every ablation: made once."""
    configs, *_ = done("ablate_alpha")
    done("ablate_blocks")
    outputs = Path(configs[0].outputs)
    shared = [Run.find(cfg).id for cfg in configs if cfg.method.name == "none"]
    assert len(shared) == 1 and {"ablate_alpha", "ablate_blocks"} <= set(experiments_of(outputs)[shared[0]])
    # Nothing is loaded for what is there.
    monkeypatch.setattr("experiments.pipelines.load", lambda *a, **k: pytest.fail("loaded a pipeline"))
    monkeypatch.setattr("experiments.generate._pipeline", lambda *a: pytest.fail("loaded a pipeline"))
    cfg = next(cfg for cfg in configs if cfg.method.name == "none").copy()
    cfg.name = "another"
    with pytest.raises(FileNotFoundError, match="another/asked: run python"):
        Run.find(cfg)
    assert generate(cfg).name == shared[0] and Run.find(cfg).id == shared[0]


def test_an_image_grid_of_a_sweep_shows_some_that_stand_for_the_others():
    class Made:
        def __init__(self, run, method, guidance=5):
            self.id = run
            model = {"name": "m", "call": {"guidance_scale": guidance}}
            self.identity = {"request": {"model": model, "method": {"name": method}}}

    rows = [
        {"model": "m", "run_id": run, "method": "none" if run == "r0" else "negtome", "metric": metric, "primary": role,
         "difference": None if run == "r0" else x, "difference_low": x, "difference_high": x, "margin": 3.5,
         "higher_is_better": True}
        for place, run in enumerate(f"r{number}" for number in range(20))
        for metric, role, x in (("d", "diversity", place), ("q", "quality", -place))
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=tables.COLUMNS)
    runs = [Made(f"r{number}", "negtome" if number else "none") for number in range(20)]
    shown = [run.id for run in worth_showing(runs, frame)]
    assert shown[0] == "r0" and "r3" in shown and "r19" in shown and len(shown) <= 6
    assert list(worth_showing(runs[:4], frame)) == runs[:4]
    scales = [Made(f"{method}{scale}", method, scale) for scale in range(2, 9) for method in ("none", "negtome")]
    rows = [
        {"model": "m", "run_id": run.id, "method": run.id[:-1], "guidance_scale": int(run.id[-1])} for run in scales
    ]
    shown = worth_showing(scales, pd.DataFrame(rows, columns=tables.COLUMNS))
    assert [run.id for run in shown] == ["none2", "negtome2", "none8", "negtome8"]
    assert list(shown.values())[:2] == ["m: without NegToMe guidance 2", "m: guidance 2"]


def test_a_run_is_named_by_what_its_pictures_are_and_not_by_how_they_are_called(tmp_path):
    """Exchanged pictures ask for another run, moved ones for the same; spelling does not count."""
    here, there = (shutil.copytree(PROJECT / "models/mini-protected/guidance", tmp_path / name) for name in "ab")
    asked = ["experiment=copyright", "model=mini-sdxl", "method=negtome_reference"]

    def digest(*changes):
        return config_digest(expand([*asked, *changes])[-1])

    known = digest(f"model.copyright.guidance={here}")
    assert digest(f"model.copyright.guidance={there}") == known == digest()
    assert digest("model.source=./models/mini-sdxl", "model.call.guidance_scale=5") == known
    shutil.rmtree(sorted(there.iterdir())[0])
    assert digest(f"model.copyright.guidance={there}") != known


def test_a_guarded_run_is_named_by_what_its_policy_says_and_not_by_where_verdicts_are_kept(tmp_path):
    asked = ["prompts=safety", "model=mini-sdxl", "method=guarded"]
    text = (PROJECT / "conf/safety/policy.yaml").read_text()
    for name, said in (("same", text), ("other", text.replace("action: refuse", "action: steer"))):
        (tmp_path / f"{name}.yaml").write_text(said)
        (tmp_path / name).mkdir()
        (tmp_path / name / "verdict.json").write_text(name)

    def digest(*changes):
        return config_digest(expand([*asked, *changes])[-1])

    known = digest()
    assert digest(f"model.copyright.policy={tmp_path}/same.yaml", f"method.decisions={tmp_path}/same") == known
    assert digest(f"method.decisions={tmp_path}/other") == known
    assert digest(f"model.copyright.policy={tmp_path}/other.yaml") != known


def test_what_names_a_run_is_read_with_care(done, tmp_path):
    cfg = done("ablate_alpha")[0][0].copy()
    outputs, run = Path(cfg.outputs), Run.find(cfg).id
    cfg.outputs = str(tmp_path)
    register(cfg, run)
    (file,) = tmp_path.glob("ablate_alpha/asked/*.json")
    assert lookup(cfg) == run and experiments_of(tmp_path) == {run: ["ablate_alpha"]}
    with pytest.raises(FileNotFoundError, match="is unfinished or gone: run python"):
        Run.find(cfg)
    shutil.copytree(outputs / "runs" / run, tmp_path / "runs" / run)
    assert Run.find(cfg).id == run
    cfg.model.source = str(PROJECT / "models/mini-sdxl")  # weights of its own, here
    register(cfg, run)
    with pytest.raises(FileNotFoundError, match=r"was made with other weights than those of .*mini-sdxl"):
        Run.find(cfg)
    for content in ("[]", '{"run": "../../x"}', "{"):
        file.write_text(content)
        cfg = done("ablate_alpha")[0][0].copy()
        cfg.outputs = str(tmp_path)
        with pytest.raises(ValueError, match=file.name):
            lookup(cfg)
    assert set(experiments_of(tmp_path)) == {run}, "the other file still names it"
    cfg.name = "../elsewhere"
    with pytest.raises(ValueError, match="a name without slashes"):
        lookup(cfg)


def test_a_run_is_paired_with_one_of_its_own_machine_and_with_one_alone(done, monkeypatch):
    configs = done("ablate_alpha")[0]
    with pytest.raises(ValueError, match="one run of negtome on sdxl to pair with, got several"):
        tabulate.rows_of_runs(configs, "negtome")
    identity = Run.identity.fget

    def elsewhere(run):
        found = identity(run)
        return found if found["request"]["method"]["name"] == "none" else found | {"machine": {"device": "another"}}

    monkeypatch.setattr(Run, "identity", property(elsewhere))
    with pytest.raises(ValueError, match=r"of the same machine, got .*another.* generate both on one machine"):
        tabulate.rows_of_runs(configs)
