"""Every experiment that sweeps, run from the command line's overrides to table and figures, at tiny size."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from PIL import Image
from plans import plan_from, plan_of

from experiments import PROJECT, plot, tabulate
from experiments.compose import expand
from experiments.configs import build
from experiments.evaluate import evaluate
from experiments.figures.image_grid import select_runs
from experiments.generate import generate
from experiments.plan import Plan, experiments_of
from experiments.runs.identity import config_digest
from experiments.runs.store import Run
from experiments.tables import columns
from experiments.tables.pages import run_labels

#: Experiment -> the part of its sweep that is run here: the rest takes as much time again and shows nothing new.
SWEEPS = {
    "ablate_alpha": ["method=none,negtome", "method.alpha=-0.9,0.9"],
    "ablate_threshold": ["method=none,negtome", "method.threshold=-1,0.5"],
    "ablate_window": ["method=none,negtome", "method.timestep_range=[0,1000],[400,1000]"],
    "ablate_blocks": ["method=none,negtome", "method.metadata.blocks=early,late"],
    "ablate_matching": ["method=none,negtome,random_match,noise_control"],
    "ablate_approximation": ["method=none,negtome,negtome_reuse_2,negtome_projection_64"],
    "cfg_scale": ["method=none,negtome", "model.call.guidance_scale=2,8"],
    "cfg_scale_flux": ["method=none,negtome", "model.call.guidance_scale=1.5,3.5"],
    "sweep": ["method=none,negtome", "method.alpha=0.9,1.8", "method.threshold=-1,0.5"],
}
#: One of every kind of figures is drawn: for a grid, one numeric setting, and one that sweeps the baseline along.
DRAWN = {"sweep", "cfg_scale"}
#: What differs from its neighbours by one line of configuration, which other tests read, is run among the slow tests.
ALIKE = {
    "cfg_scale", "ablate_alpha", "ablate_threshold", "ablate_window", "ablate_blocks", "ablate_matching",
    "ablate_approximation", "cfg_scale_flux",
}  # fmt: skip
RUN = [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in SWEEPS]


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_overrides):
    """Run an experiment to its table and figures, once: plan, table, Markdown and files."""
    folder, kept = tmp_path_factory.mktemp("sweeps"), {}

    def run(experiment):
        if experiment not in kept:
            kind = "flux" if experiment.endswith("flux") else "sdxl"
            plan = plan_of(tiny_overrides(experiment, folder, *SWEEPS[experiment], kind=kind))
            generate(plan)
            evaluate(plan)
            _, markdown = tabulate.write_table(plan)
            frame = columns.read_table(plan.name, plan.results)
            frame = frame[frame["model"] == plan.cfg.model.name]  # two experiments make one table
            kept[experiment] = plan, frame, markdown, plot.plot(plan) if experiment in DRAWN else []
        return kept[experiment]

    return run


@pytest.mark.parametrize("experiment", RUN)
def test_an_experiment_runs_to_its_table_and_figures(experiment, done):
    plan, frame, markdown, files = done(experiment)
    labels = run_labels(frame)
    assert not any(run in label for run, label in labels.items()), "told apart by nothing but their ids"
    compared = frame[frame["method"] != "none"]
    assert compared["difference"].notna().all() and compared["pushed_share"].notna().all()
    assert len(compared["run_id"].unique()) == len([spec for spec in plan.runs if spec.cfg.method.name != "none"])
    assert all(labels[run] in markdown for run in compared["run_id"])
    # Every method with its own baseline: same call, same prompts.
    for spec in plan.runs:
        ours, base = (Run.of(one).identity["request"] for one in (spec, spec.baseline))
        assert base["method"] == {"name": "none", "settings": {}}
        assert {key: ours[key] for key in ("model", "prompts")} == {key: base[key] for key in ("model", "prompts")}
    if experiment in DRAWN:
        assert all(file.stat().st_size for file in files)
        with Image.open(next(file for file in files if file.suffix == ".webp")) as grid:
            assert grid.width > 2 * 2 * 96


@pytest.mark.slow
def test_the_blocks_of_an_ablation_are_the_models_own():
    sites = {
        (cfg.model.name, cfg.method.metadata.blocks): build(cfg.method).config.sites
        for cfg in expand(["experiment=ablate_blocks", "model=mini-sdxl,flux-dev", "method=negtome"])
    }
    assert sites["mini-sdxl", "early"] == ("up_blocks.0",) and sites["mini-sdxl", "release"] is None
    assert sites["mini-sdxl", "all"] == ("down_blocks", "mid_block", "up_blocks")
    assert sites["flux-dev", "early"] == ("transformer_blocks",) and sites["flux-dev", "all"] is None


def test_a_grid_gives_heat_maps_and_a_front(done):
    names = {file.name for file in done("sweep")[3]}  # one swept setting gives a curve: test_plot.py
    assert {"heat_map_pairwise_distance_sdxl.png", "pareto_sdxl.png"} <= names


@pytest.mark.parametrize(
    "experiments", [["sweep"], pytest.param(["ablate_alpha", "ablate_blocks"], marks=pytest.mark.slow)]
)
def test_experiments_share_what_they_have_in_common(experiments, done, monkeypatch):
    """The model's own strengths and the baseline are of every ablation: made once."""
    plan, *_ = (done(name)[0] for name in experiments)
    shared = plan.runs[0].baseline.id
    # Nothing is loaded for what is there.
    monkeypatch.setattr("experiments.runs.checkpoints.load", lambda *a, **k: pytest.fail("loaded a pipeline"))
    monkeypatch.setattr("experiments.runs.workers._pipeline", lambda *a: pytest.fail("loaded a pipeline"))
    cfg = plan.cfg.copy()
    cfg.name = f"another_{experiments[0]}"
    other = plan_from(cfg)
    with pytest.raises(FileNotFoundError, match=rf"{cfg.name}/plan\.json: run python"):
        Run.of(other.runs[0])
    assert [folder.name for folder in generate(other)] == [shared] == [other.runs[0].id]
    assert {*experiments, cfg.name} <= set(experiments_of(Path(cfg.outputs))[shared])


def test_an_image_grid_of_a_sweep_shows_some_that_stand_for_the_others():
    class ShownRun:
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
    frame = pd.DataFrame(rows, columns=columns.COLUMNS)
    runs = [ShownRun(f"r{number}", "negtome" if number else "none") for number in range(20)]
    shown = [run.id for run in select_runs(runs, frame)]
    assert shown[0] == "r0" and "r3" in shown and "r19" in shown and len(shown) <= 6
    assert list(select_runs(runs[:4], frame)) == runs[:4]
    scales = [ShownRun(f"{method}{scale}", method, scale) for scale in range(2, 9) for method in ("none", "negtome")]
    rows = [
        {"model": "m", "run_id": run.id, "method": run.id[:-1], "guidance_scale": int(run.id[-1])} for run in scales
    ]
    shown = select_runs(scales, pd.DataFrame(rows, columns=columns.COLUMNS))
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
    assert digest(f"model.copyright.policy={tmp_path}/same.yaml", f"method.audit={tmp_path}/same") == known
    assert digest(f"method.audit={tmp_path}/other") == known
    assert digest(f"model.copyright.policy={tmp_path}/other.yaml") != known


def test_a_plan_names_its_complete_runs_and_is_read_with_care(done, tmp_path):
    cfg = done("sweep")[0].cfg.copy()
    outputs, run = Path(cfg.outputs), done("sweep")[0].runs[0].id
    cfg.outputs = str(tmp_path)
    plan = plan_from(cfg)
    plan.complete(plan.runs[0], run)
    assert plan_from(cfg).runs[0].id == run and experiments_of(tmp_path) == {run: ["sweep"]}
    with pytest.raises(FileNotFoundError, match="is unfinished or gone: run python"):
        Run.of(plan.runs[0])
    shutil.copytree(outputs / "runs" / run, tmp_path / "runs" / run)
    assert Run.of(plan.runs[0]).id == run
    cfg.model.source = str(PROJECT / "models/mini-sdxl")  # weights of its own, here
    other = plan_from(cfg)
    assert other.runs[0].id is None
    other.complete(other.runs[0], run)
    with pytest.raises(FileNotFoundError, match=r"was made with other weights than those of .*mini-sdxl"):
        Run.of(other.runs[0])
    text = plan.file.read_text()
    for content in ("[]", text.replace(run, "../../x"), "{"):
        plan.file.write_text(content)
        with pytest.raises(ValueError, match=plan.file.name):
            plan_from(cfg)
        assert not experiments_of(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a plan in .*nowhere"):
        Plan.of([f"plan={tmp_path}/nowhere.json"])
    plan.file.unlink()
    cfg.name = "../elsewhere"
    with pytest.raises(ValueError, match="a name without slashes"):
        plan_from(cfg)


@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        ("diversity", ["model=mini-sdxl", "method=none,negtome"]),
        *(pytest.param(name, [], marks=pytest.mark.slow) for name in ("diversity", "safety", "sweep")),
    ],
)
def test_a_plan_is_read_as_it_was_written(experiment, overrides, tmp_path):
    plan = Plan.make([f"experiment={experiment}", *overrides, f"outputs={tmp_path}"])
    read = Plan.of([f"plan={plan.write()}", f"results={tmp_path}/other", "style=paper"])
    assert (read.name, read.results, read.cfg.style) == (experiment, tmp_path / "other", "paper")
    assert [spec.settings for spec in read.runs] == [config_digest(spec.cfg) for spec in plan.runs]
    for mine, theirs in zip(read.runs, plan.runs, strict=True):
        settings = OmegaConf.to_container(theirs.cfg, resolve=True) | {"results": f"{tmp_path}/other", "style": "paper"}
        assert repr(sorted(OmegaConf.to_container(mine.cfg).items())) == repr(sorted(settings.items()))
        assert read.runs.index(mine.baseline) == plan.runs.index(theirs.baseline)
        assert mine.baseline.cfg.method.name == "none" and mine.baseline.cfg.model == mine.cfg.model
    assert Plan.of([f"plan={plan.file}", "launcher=slurm", "launcher.jobs=3"]).launcher.jobs == 3
    sent = Plan.make([f"experiment={experiment}", *overrides, f"outputs={tmp_path}", "launcher=slurm"])
    assert sent.launcher.jobs == 8 and Plan.of([f"plan={sent.write()}"]).launcher is None, "jobs submit no others"
    with pytest.raises(ValueError, match=r"beside plan=.*got model=sdxl"):
        Plan.of([f"plan={plan.file}", "model=sdxl"])


def test_a_later_command_keeps_what_is_known_of_earlier_runs(tmp_path):
    def plan(model):
        return Plan.make(["experiment=diversity", f"model={model}", "method=none", f"outputs={tmp_path}"])

    first = plan("mini-sdxl")
    first.complete(first.runs[0], "0123456789ab")
    second = plan("mini-flux")
    second.write()
    assert [spec.cfg.model.name for spec in Plan.read(second.file).runs] == ["mini-flux"]
    first.complete(first.runs[0], "ba9876543210")
    assert plan("mini-sdxl").runs[0].id == "ba9876543210" and plan("mini-flux").runs[0].id is None


def test_a_run_is_paired_with_one_of_its_own_machine_and_with_one_alone(done, monkeypatch):
    plan = done("sweep")[0]
    with pytest.raises(ValueError, match="one run of negtome on sdxl to pair with, got several"):
        tabulate.rows_of_runs(plan, "negtome")
    identity = Run.identity.fget

    def elsewhere(run):
        same = identity(run)
        return same if same["request"]["method"]["name"] == "none" else same | {"machine": {"device": "another"}}

    monkeypatch.setattr(Run, "identity", property(elsewhere))
    with pytest.raises(ValueError, match=r"of the same machine, got .*another.* generate both on one machine"):
        tabulate.rows_of_runs(plan)
