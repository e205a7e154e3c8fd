"""Experiments over every method's hyperparameter: its values, the chosen ones, and the ranking."""

import functools

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from plans import plan_of

from experiments import PROJECT, rank, tabulate
from experiments.compose import expand
from experiments.configs import build
from experiments.evaluate import evaluate
from experiments.generate import generate
from experiments.plan import Plan
from experiments.runs import catalogue
from experiments.tables import columns

FILES = {file.stem: yaml.safe_load(file.read_text()) for file in (PROJECT / "conf" / "method").glob("*.yaml")}
HYPERPARAMETERS = {
    name: hyperparameter
    for name, spec in FILES.items()
    if (hyperparameter := (spec.get("metadata") or {}).get("hyperparameter"))
}


def swept_methods(model, pending=False):
    """Return the methods with values for a model that `make peers` tries, or all of them."""
    return [
        name
        for name, hyperparameter in sorted(HYPERPARAMETERS.items())
        if model in hyperparameter["values"] and (pending or not hyperparameter.get("pending"))
    ]


def at(spec, path):
    for key in path.split("."):
        spec = spec[key]
    return spec


@pytest.mark.parametrize("model", ["mini-sdxl", "mini-flux"])
def test_every_hyperparameter_has_four_values_and_a_column_in_tables(model):
    assert OmegaConf.create({"methods": f"${{peers:{model}}}"}).methods == ",".join(swept_methods(model))
    in_tables = {setting.name for setting in catalogue.settings()}
    for method in swept_methods(model, pending=True):
        assert len({str(value) for value in HYPERPARAMETERS[method]["values"][model]}) == 4
        assert HYPERPARAMETERS[method]["setting"].rpartition(".")[2] in in_tables
        if HYPERPARAMETERS[method].get("interpolate", True):
            assert all(isinstance(value, float) for value in HYPERPARAMETERS[method]["values"][model]), method


@pytest.mark.parametrize(
    ("experiment", "pending"),
    [("peers_grid", False), ("peers", False), ("few_steps_peers_grid", True), ("few_steps_peers", True)],
)
def test_methods_that_are_pending_are_in_experiments_whose_tables_are_not_published(experiment, pending):
    spec = OmegaConf.load(PROJECT / "conf" / "experiment" / f"{experiment}.yaml")
    methods = swept_methods("mini-sdxl", pending)
    assert spec.hydra.sweeper.params.method == ",".join(["none", *methods])
    assert ("stride" in methods) == pending


@pytest.mark.parametrize(
    ("experiment", "model", "methods"),
    [
        ("peers_grid", "mini-sdxl", ["limited_interval_and_negtome", "negtome"]),
        pytest.param("peers_grid", "mini-sdxl", None, marks=pytest.mark.slow),
        pytest.param("peers_grid_flux", "mini-flux", None, marks=pytest.mark.slow),
    ],
)
def test_every_method_with_a_hyperparameter_is_swept_over_its_values(experiment, model, methods):
    changes = [f"method=none,{','.join(methods)}"] if methods else []
    methods = methods or swept_methods(model)
    configs = expand([f"experiment={experiment}", *changes])
    assert [cfg.method.name for cfg in configs] == ["none", *(name for name in methods for _ in range(4))]
    for number, method in enumerate(methods):
        hyperparameter, own = HYPERPARAMETERS[method], configs[1 + 4 * number : 5 + 4 * number]
        assert [at(cfg.method, hyperparameter["setting"]) for cfg in own] == hyperparameter["values"][model]
        assert len({str(build(cfg.method).settings()) for cfg in own[:2]}) == 2, "which the run's identity knows"


def test_a_hyperparameter_takes_the_values_of_its_method_and_architecture():
    def scales(model, hyperparameter="hyperparameter=0,1,2,3"):
        return [cfg.method.scale for cfg in expand([f"model={model}", "method=lower_guidance", hyperparameter])]

    values = HYPERPARAMETERS["lower_guidance"]["values"]["mini-sdxl"]
    assert scales("sdxl") == values, "those of the small model of the same architecture"
    with pytest.raises(ValueError, match=r"metadata.hyperparameter.values for model=sd15 in method=lower_guidance"):
        scales("sd15")
    with pytest.raises(ValueError, match=r"hyperparameter must be null or from 0 to 3, got 4"):
        scales("sdxl", "hyperparameter=4")
    with pytest.raises(ValueError, match=r"hyperparameter=2 has no effect on method=negtome_released"):
        expand(["model=mini-sdxl", "method=negtome_released", "hyperparameter=2"])
    with pytest.warns(DeprecationWarning, match="hyperparameter="):
        assert scales("sdxl", "knob=2") == [values[2]]


@pytest.fixture(scope="module")
def grid(tiny_checkpoint, tmp_path_factory):
    """A grid of two methods on a tiny checkpoint, made and tabulated: overrides, plan, folder."""
    folder = tmp_path_factory.mktemp("peers")
    small = [
        "model=sdxl", f"model.source={tiny_checkpoint('sdxl')}", "model.dtype=float32", "model.call.height=32",
        "model.call.width=32", "model.call.num_inference_steps=2", "prompts.categories=[flower,fruit,horse,truck]",
        "prompts.images_per_prompt=2", "metric=core", "scorer@model.scorer=pixel", "~metric.clip_score",
        "primary.quality=vendi_score", "bootstrap.n_resamples=200", f"outputs={folder}",
    ]  # fmt: skip
    plan = plan_of(["experiment=peers_grid", "method=none,lower_guidance,limited_interval", *small])
    generate(plan)
    evaluate(plan)
    tabulate.write_table(plan)
    return small, plan, folder / "results"


def test_a_grid_is_ranked_and_what_gains_most_within_the_loss_is_chosen(grid):
    small, plan, results = grid
    page = rank.write_ranking(plan)
    frame = pd.read_csv(results / "peers_grid" / "ranking.csv")
    assert list(frame.columns) == rank.COLUMNS and list(frame["method"]) == ["lower_guidance", "limited_interval"]
    assert sorted(frame["rank"]) in ([1, 2], [1, 1]) and set(frame["settings"]) == {4} and set(frame["n_units"]) == {4}
    assert frame["first_share"].sum() >= 1 and (frame["seconds"] > 0).all() and "lower guidance" in page
    assert frame[["front_share", "within_share"]].stack().between(0, 1).all() and rank.render(frame) == page
    # Once more, from the table: a fine walk through the differences of the settings.
    table, chosen = (
        columns.read_table("peers_grid", results),
        yaml.safe_load((results / "peers_grid" / "chosen.yaml").read_text()),
    )
    for _, row in frame.iterrows():
        rows = table[table["method"] == row["method"]]
        gains, kept = (
            rows.loc[rows["metric"] == name, "difference"].to_numpy() for name in (row["claim"], row["quality"])
        )
        values = HYPERPARAMETERS[row["method"]]["values"]
        values = np.array(values.get("sdxl", values["mini-sdxl"]))
        if not HYPERPARAMETERS[row["method"]].get("interpolate", True):
            allowed = -kept <= row["loss"]
            best = gains[allowed].argmax() if allowed.any() else 0
            assert chosen["sdxl"][row["method"]] == values[allowed if allowed.any() else slice(None)][best].tolist()
            assert not allowed.any() or row["gain"] == pytest.approx(gains[allowed][best], rel=1e-4)
            continue
        if "nothing" in HYPERPARAMETERS[row["method"]]:  # from which the path begins
            gains, kept, values = (np.insert(of, 0, zero) for of, zero in ((gains, 0), (kept, 0), (values, 5.0)))
        n, value = len(values), np.array(chosen["sdxl"][row["method"]])
        steps = np.linspace(0, n - 1, 1000 * (n - 1) + 1)
        allowed = np.interp(steps, range(n), -kept) <= row["loss"]
        if not (-kept <= row["loss"]).any():
            assert np.isnan(row["gain"]) and (value == values[0]).all()
            continue
        walked = np.interp(steps, range(n), gains)[allowed]
        assert row["gain"] == pytest.approx(walked.max(), rel=1e-2, abs=1e-4)
        if (place := steps[allowed][walked.argmax()]) == 0:
            place = n - 4  # the weakest setting
        paths = values.reshape(n, -1).T
        assert value.ravel() == pytest.approx([np.interp(place, range(n), path) for path in paths], rel=1e-2)
    peers = {cfg.method.name: cfg for cfg in expand(["experiment=peers", f"method={','.join(chosen['sdxl'])}", *small])}
    for method, value in chosen["sdxl"].items():
        assert at(peers[method].method, HYPERPARAMETERS[method]["setting"]) == value


@pytest.fixture(scope="module")
def laid_plans():
    """Return a function that composes the grid of one method at few steps, once for all tests."""
    return functools.cache(
        lambda method, *overrides: plan_of(
            ["experiment=few_steps_peers_grid", f"method=none,{method}", "bootstrap.n_resamples=99", *overrides]
        )
    )


@pytest.fixture(scope="module")
def laid_grid(laid_plans):
    """Return a function that lays down the grid of one method at few steps and reads it.

    By default distance gains 0.1 to 0.4 at the four settings, and CLIPScore and realism lose other shares.
    """
    bases = {"clip_score": 50, "realism_efflite0_40": 0.8}

    def read(*overrides, method="lower_guidance", gains=(0.1, 0.2, 0.3, 0.4), clip=(0, 0.01, 0.02, 0.05),
             realism=(0, 0.05, 0.1, 0.2)):  # fmt: skip
        plan, table, groups = laid_plans(method, *overrides), [], []
        losses = {"clip_score": (0, *clip), "realism_efflite0_40": (0, *realism)}
        for number, spec in enumerate(plan.runs):
            spec.id = f"{number:012d}"
            values = {"pairwise_distance_aligned": 0.2 + (0, *gains)[number]}
            values |= {name: bases[name] * (1 - losses[name][number]) for name in losses}
            for metric, value in values.items():
                row = {"run_id": spec.id, "metric": metric, "higher_is_better": True, "n_withheld": 0, "seconds": 1}
                table.append(row | {"pushed_share": np.nan})
                for category in ("cat", "dog", "hat", "car"):
                    place = {"category": category, "prompt_id": category, "group_seed": "0"}
                    groups.append({"run_id": spec.id, "metric": metric, "n_images": 4, "value": value} | place)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rank, "read_table", lambda *_: pd.DataFrame(table))
            patch.setattr(rank, "read_groups", lambda *_: pd.DataFrame(groups))
            return rank.read_paths(plan.runs)

    return read


def test_every_measure_of_quality_limits_the_choice(laid_grid):
    """Realism reaches its limit between the scales 4 and 3, CLIPScore between 2 and 1.5."""
    both = laid_grid()
    assert rank.chosen_values(both) == {"lower_guidance": 3.5}
    (row,) = rank.rows_of_model(both)
    assert row["gain"] == pytest.approx(0.15) and row["loss"] == pytest.approx(0.025)
    page = rank.render(pd.DataFrame([row], columns=rank.COLUMNS))
    assert "clip score and realism efflite0 40 falls by at most 2.5%" in page
    clip_score = laid_grid("primary.quality=clip_score")
    assert rank.chosen_values(clip_score) == {"lower_guidance": 1.92}
    assert rank.rows_of_model(clip_score)[0]["loss"] == pytest.approx(0.025 * 50)


def test_a_method_of_single_steps_is_chosen_and_ranked_at_a_measured_value(laid_grid):
    """The losses of the test above: realism reaches its limit after the first of the four values."""
    interval = laid_grid(method="limited_interval")
    assert rank.chosen_values(interval) == {"limited_interval": [0.28, 20.0]}
    (row,) = rank.rows_of_model(interval)
    assert row["gain"] == pytest.approx(0.1) and row["settings"] == 4
    lost = laid_grid(method="diversity_distillation", realism=(0.03, 0.05, 0.1, 0.2))  # whose 0 does nothing
    assert rank.chosen_values(lost) == {"diversity_distillation": 1}, "the weakest"
    assert "gain" not in rank.rows_of_model(lost)[0]


SHARES = st.tuples(*[st.integers(-3, 6).map(lambda n: n / 100)] * 4)


@settings(max_examples=10, deadline=None)
@given(gains=SHARES, clip=SHARES, realism=SHARES)
@pytest.mark.parametrize(
    "method", ["limited_interval", "diversity_distillation", pytest.param("rewriting", marks=pytest.mark.slow)]
)
def test_without_interpolation_every_choice_was_measured(laid_grid, method, gains, clip, realism):
    paths = laid_grid(method=method, gains=gains, clip=clip, realism=realism)
    values = HYPERPARAMETERS[method]["values"]["mini-sdxl"]
    within = [place for place in range(4) if max(clip[place], realism[place]) <= rank.LOSS]
    best = max(within, key=lambda place: gains[place], default=0)
    (chosen,) = rank.chosen_values(paths).values()
    assert chosen in values
    if within:
        assert gains[values.index(chosen)] == gains[best]
    else:
        assert chosen == values[0]


@pytest.mark.parametrize(
    ("method", "interpolate", "message"),
    [
        (
            "best_of",
            True,
            r"interpolate in method=best_of must be false, or the values floating-point.*\[5, 6, 8, 12\]",
        ),
        ("limited_interval", True, "interpolate in method=limited_interval must be false, or the values"),
        ("lower_guidance", "no way", "interpolate in method=lower_guidance must be true or false, got 'no way'"),
    ],
)
def test_values_that_have_nothing_between_must_be_declared(method, interpolate, message):
    plan = plan_of(["experiment=few_steps_peers_grid", f"method=none,{method}"])
    for spec in plan.runs[1:]:
        OmegaConf.update(spec.cfg, "method.metadata.hyperparameter.interpolate", interpolate, force_add=True)
    with pytest.raises(ValueError, match=message):
        rank.read_paths(plan.runs)


def test_other_choices_stay(grid):
    _, plan, results = grid
    file = results / "peers_grid" / "chosen.yaml"
    file.write_text("another: {cads: 0.5}\nsdxl: {cads: 0.3, lower_guidance: 77}\n")
    rank.write_ranking(Plan([spec for spec in plan.runs if spec.cfg.method.name in ("none", "lower_guidance")]))
    written = yaml.safe_load(file.read_text())
    assert written["another"] == {"cads": 0.5} and written["sdxl"]["cads"] == 0.3
    assert written["sdxl"]["lower_guidance"] in np.arange(1, 5.001, 0.001).round(3)


@pytest.mark.slow
def test_single_settings_are_compared_as_they_are_and_a_baseline_alone_is_refused(grid):
    _, plan, results = grid
    one_each = list({spec.cfg.method.name: spec for spec in plan.runs}.values())
    frame = pd.DataFrame(rank.rows_of_model(rank.read_paths(one_each)))
    table = columns.read_table("peers_grid", results)
    for _, row in frame.iterrows():
        rows = table[table["run_id"] == row["run_ids"]].set_index("metric")
        assert row["gain"] == pytest.approx(rows.loc[row["claim"], "difference"], rel=1e-4)
        assert row["lost"] == pytest.approx(-rows.loc[row["quality"], "difference"], rel=1e-4)
        assert row["gain_low"] == pytest.approx(rows.loc[row["claim"], "difference_low"], rel=1e-3)
    assert "rank" not in rank.render(frame.reindex(columns=rank.COLUMNS)).splitlines()[2]
    with pytest.raises(ValueError, match="expected methods to be ranked on sdxl, got none"):
        rank.read_paths([spec for spec in plan.runs if spec is spec.baseline])
    several = plan_of(["experiment=peers_grid", "method=none,lower_guidance", "model.call.num_inference_steps=4,2"])
    with pytest.raises(ValueError, match=r"compared with one baseline.*got several"):
        rank.read_paths(several.runs)


def test_a_chosen_setting_needs_a_choice_and_stands_back_for_one_that_is_given(tmp_path):
    file = tmp_path / "chosen.yaml"
    arguments = ["model=sdxl", "method=lower_guidance", f"chosen={file}"]
    with pytest.raises(FileNotFoundError, match=r"value of scale for lower_guidance on sdxl .* make peers,"):
        expand(arguments)
    with pytest.raises(FileNotFoundError, match=r"value of scale for lower_guidance on sdxl .* make few-steps-peers,"):
        expand(["experiment=few_steps_peers", *arguments])
    file.write_text("sdxl: {lower_guidance: 2.5}\n")
    assert [cfg.method.scale for cfg in expand(arguments)] == [2.5]
    assert [cfg.method.scale for cfg in expand([*arguments, "method.scale=4"])] == [4]
    assert [cfg.method.scale for cfg in expand([*arguments, f"chosen=[{tmp_path}/none.yaml,{file}]"])] == [2.5]
    assert [cfg.method.scale for cfg in expand([*arguments, "chosen=null"])] == [None]
