"""How the cost is measured and told: arithmetic by hand, measurements on tiny pipelines. No test asserts a time."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from omegaconf import OmegaConf
from scipy.stats import binom
from torch.autograd import DeviceType

import negtome
from experiments import PROJECT, latency
from experiments.latency import cases, measure, profile, report, rows
from experiments.latency.cases import BOUND, composed, configured_cases
from experiments.latency.clock import Timing, inside_of, take_rounds, time_call, timesteps_of
from experiments.latency.measure import lower_bound, products
from experiments.latency.rows import COLUMNS, CONFIGURATION, SAME_CASE, median_interval
from experiments.latency.scaling import curve_models, scaling
from experiments.methods.naive import Naive
from experiments.tables.columns import put_rows

RESULTS = PROJECT / "results" / "latency"
#: A call of a tiny pipeline.
CALL = {
    "prompt": "a dog", "height": 32, "width": 32, "num_inference_steps": 4, "num_images_per_prompt": 3,
    "output_type": "latent",
}  # fmt: skip
EVERYTHING = {"threshold": -1, "min_side": 8, "timestep_range": (600, 1000)}
#: The suites as they are configured.
MINI, FULL = (("experiment=latency", f"latency.suite={suite}") for suite in ("mini", "full"))


def tiny(source, results, *more):
    """A case of the mini suite on a tiny checkpoint, of few steps and rounds."""
    return [
        "experiment=latency", "latency.suite=mini", "device=cpu", f"model.source={source}", f"results={results}",
        "model.call.num_inference_steps=6", "method.timestep_range=[500,1000]", "method.threshold=0",
        *more,
    ]  # fmt: skip


def change(monkeypatch, *changes):
    """Change what is composed from now on, without composing it again."""

    def changed(*overrides):
        return OmegaConf.merge(composed(*overrides), OmegaConf.from_dotlist(list(changes)))

    for module in (latency, cases):
        monkeypatch.setattr(module, "composed", changed)


@pytest.fixture(scope="module")
def flux(tiny_checkpoint, tmp_path_factory):
    """A whole run, with curves, on a tiny Flux checkpoint: overrides, results' folder and what was returned."""
    folder = tmp_path_factory.mktemp("flux")
    case, curve = ("latency.mini.{}.mini-flux.{}".format(kind, "{}").format for kind in ("cases", "curves"))
    overrides = tiny(
        tiny_checkpoint("flux"), folder, "latency.only=[mini-flux]", "latency.curve_windows=[900,0]",
        "bootstrap.level=0.4", case("side=32"), case("batch=2"), case("rounds=2"),
        case("steps={inside: 2, outside: 1}"), curve("rounds=1"), curve("side=32"), curve("batch=2"),
        curve("steps={inside: 1, outside: 1}"), curve("batches=[2]"), curve("sides=[16]"),
    )  # fmt: skip
    return overrides, folder, latency.run(overrides)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_a_round_goes_there_and_back_so_that_a_drift_of_the_machine_falls_on_all_variants_alike():
    """Each call is a little slower than the last: the ratios do not show it."""
    order = []

    def run(name):
        order.append(name)
        duration = 1 + 0.01 * len(order)
        return Timing([duration, duration * (1.5 if name == "slow" else 1.0)], len(order))

    timings = take_rounds(["plain", "slow", "same"], 2, run)
    assert order == ["plain", "slow", "same", "same", "slow", "plain"] * 2
    assert timings["slow"].seconds.tolist() == [[2, 5], [8, 11]]
    inside, outside = ({name: timing.steps[:, :, [n]] for name, timing in timings.items()} for n in (1, 0))
    assert rows.per_round(inside["slow"]) / rows.per_round(inside["plain"]) == pytest.approx(1.5)
    assert rows.per_round(outside["same"]) / rows.per_round(outside["plain"]) == pytest.approx(1.0)
    steps = np.array([[[1, 2, 9], [3, 4, 5]], [[1, 1, 1], [7, 7, 7]]], dtype=float)
    assert rows.per_round(steps).tolist() == [(2 + 4) / 2, (1 + 7) / 2], "the mean of the calls' medians"


def test_a_whole_call_has_the_measured_one_in_it_once():
    """Steps 10, 2, 4 inside the window and 1, 3 outside, of 25 seconds: 5 are spent before and after the loop."""

    def compose(calls, inside, outside):
        timing = Timing(*(np.array(values) for values in calls))
        return rows.compose(timing, np.array([True, True, True, False, False]), inside, outside).flatten().tolist()

    steps, slower = [10, 2, 4, 1, 3], [10, 2, 6, 1, 3]
    once = [[[steps]], [[25]]]
    assert [compose(once, *counts) for counts in ((3, 2), (6, 20), (1, 2))] == [[25], [25 + 3 * 4 + 18 * 2], [25 - 8]]
    twice = [[steps, slower], [slower, slower]], [[25, 27], [27, 27]]
    assert compose(twice, 4, 2) == [(29 + 33) / 2, 33]


def test_the_floor_is_added_to_the_steps_in_the_window_and_to_the_call():
    plain = Timing(*(np.array(values) for values in ([[[1, 2, 3]]], [[7]], [[100]], [[0.5]])))
    bound = rows.with_bound(plain, np.array([True, True, False]), 0.25)
    assert bound.steps.tolist() == [[[1.25, 2.25, 3]]] and bound.seconds.tolist() == [[7.5]]
    assert np.isnan(bound.peak) and np.isnan(bound.pushed_share)


@settings(deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_the_interval_is_the_shortest_that_holds_the_median_often_enough(rounds, level):
    """In closed form: as many rounds lie beyond each end as a fair coin would seldom leave there."""
    beyond = int((binom.cdf(np.arange(rounds), rounds, 0.5) <= (1 - level) / 2).sum())
    expected = (beyond, rounds + 1 - beyond) if beyond else (np.nan, np.nan)
    interval = median_interval(range(1, rounds + 1), level)
    assert interval == pytest.approx(((rounds + 1) / 2, *expected), abs=0, nan_ok=True)


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [MINI, pytest.param(FULL, marks=pytest.mark.slow)])
def test_every_target_and_title_belongs_to_a_case_whose_rounds_give_an_interval(overrides):
    configured, suite = composed(*overrides).latency, [*configured_cases(overrides)]
    table = {(case.model.name, case.side): case for case in suite if case.part == "table"}
    for case in table.values():
        assert np.isfinite(median_interval(range(case.rounds), 0.95)).all() and case.variants[0].name == cases.PLAIN
        assert {variant.name for variant in case.variants} | {BOUND} == set(configured.titles)
        assert case.batch == configured.target_batch
    models = {model for model, _ in table}
    targets = [target for target in configured.targets if target.model in models]
    assert {target.model for target in targets} == models
    for target in targets:
        case = table[target.model, target.side]
        assert target.get("variant", cases.METHOD) in configured.titles and f"{target.quantity}_ratio" in COLUMNS
        assert "window" not in target or tuple(target.window) in case.windows
    for model in models & {*configured.growth}:
        sides = {case.side for case in suite if (case.part, case.model.name) == ("resolution", model)}
        assert set(configured.growth[model]) <= sides


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("latency.suite=half", "auto, mini or full, got 'half'"),
        ("latency.only=[sdxl-1024]", r"the suite mini, \['mini-flux', 'mini-sdxl'\], got"),
        ("latency.weights=good", "auto, random or checkpoint, got 'good'"),
        ("offload=true", "offload=false"),
        ("latency.variants.none.via=negtome", "must begin with none"),
        ("latency.variants.naive.via=slow", "'slow' in variant naive"),
        ("latency.mini.cases.mini-sdxl.steps.outside=0", "at least 1, got 12 and"),
    ],
)
def test_what_cannot_be_measured_is_refused(setting, message, tmp_path, monkeypatch):
    change(monkeypatch, f"results={tmp_path}", "device=cpu", setting)
    with pytest.raises(ValueError, match=message):
        latency.run(MINI)
    assert not list(tmp_path.iterdir())


def test_a_model_and_another_experiment_are_refused():
    with pytest.raises(ValueError, match="expected no model="):
        next(configured_cases([*MINI, "model=sdxl"]))
    with pytest.raises(ValueError, match="expected experiment=latency"):
        latency.run(["name=other"])


def test_timesteps_and_shapes_are_those_of_a_real_call(kind, pipe):
    timesteps = timesteps_of(pipe, CALL)
    config = negtome.NegToMeConfig(**EVERYTHING | {"timestep_range": (timesteps[1], 1000)})
    assert inside_of(timesteps, config.timestep_range).tolist() == [True, True, False, False]
    counts = products(pipe, CALL, config, 2)

    with negtome.attach(pipe, config) as attached:
        timing = time_call(pipe, CALL, "cpu", attached)
    assert [step.timestep for step in attached.steps] == timesteps
    assert len(timing.steps) == 4 and min(timing.steps) > 0 and sum(timing.steps) < timing.seconds
    assert np.isnan(timing.peak) and timing.pushed_share == 1
    # The lower bound moves the tokens that the method compares, and compares them with one image of each chunk.
    assert 2 * sum(math.prod(left[:2]) for left, _ in counts.elements()) == attached.summary()["tokens_compared"]
    for (chunks, moving, channels), right in counts:
        assert chunks == (2 if kind == "sdxl" else 1) and right == (chunks, channels, moving // 2)
    assert lower_bound(counts, "cpu", torch.float32) > 0 == lower_bound({}, "cpu", torch.float32)


def test_the_parts_of_a_step_are_counted_and_the_operations_add_up_to_the_push(pipe):
    classes = [type(module) for module in pipe.components.values()]
    config, attachments = negtome.NegToMeConfig(**EVERYTHING), []

    def attach():
        attachments.append(negtome.attach(pipe, config))
        return attachments[-1]

    def call():
        pipe(**CALL, generator=torch.Generator().manual_seed(0))

    parts = profile.parts(pipe, attach, call, 2, "cpu")
    assert [attached.summary() for attached in attachments] == [attachments[0].summary()] * (2 + 2)
    assert [type(module) for module in pipe.components.values()] == classes
    with negtome.attach(pipe, config) as unwatched:
        call()
    assert unwatched.summary() == attachments[0].summary(), "watching changes nothing"
    of_push = parts[parts.index.str.startswith("push: ")]
    assert [*parts.index] == ["before the denoiser", "push", *of_push.index, "after the denoiser", "outside the window"]
    assert (parts["host_ms"] > 0).all() and parts["device_ms"].isna().all()
    assert math.isclose(of_push["host_ms"].sum(), parts.loc["push", "host_ms"])
    calls = parts["operation_calls"]
    assert calls[["before the denoiser", "after the denoiser", "outside the window"]].tolist() == [1, 1, 1]
    # One product a site that is reached and large enough; the others come out again before.
    products = sum(count.compared > 0 for count in unwatched.counts().values())
    assert calls["push: bmm"] == products <= calls["push"] == len(unwatched.sites)
    assert of_push["host_ms"].iloc[: profile.LISTED].is_monotonic_decreasing


class Event:
    """An event of a stream whose work is done when the host waits for it, and not before."""

    pending, clock = [], iter(range(10**9))

    def __init__(self, enable_timing):
        assert enable_timing
        self.time = None

    def record(self):
        self.pending.append(self)

    def elapsed_time(self, other):
        assert None not in (self.time, other.time), "read before the device was there"
        return other.time - self.time

    @classmethod
    def wait(cls, device=None):
        for event in cls.pending:
            event.time = next(cls.clock)
        cls.pending.clear()


@pytest.fixture
def cuda(monkeypatch):
    """What is asked of CUDA, answered here: every event is a millisecond after the last, and memory is 3 GiB."""
    for name, answer in (
        ("Event", Event), ("synchronize", Event.wait), ("reset_peak_memory_stats", lambda device: None),
        ("max_memory_allocated", lambda device: 3 * 2**30),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, answer)


@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning:torch.profiler")
def test_on_cuda_events_time_steps_and_parts_and_nobody_waits_in_between(cuda, tiny_flux, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: (waits.append(device), Event.wait()))
    timing = time_call(tiny_flux, CALL, "cuda:0")
    assert timing.steps == [0.001] * 4 and timing.peak == 3 * 2**30
    assert waits == ["cuda:0"] * 2, "before and after the call"
    config = negtome.NegToMeConfig(**EVERYTHING)
    parts = profile.parts(tiny_flux, lambda: negtome.attach(tiny_flux, config), lambda: tiny_flux(**CALL), 1, "cuda:0")
    sites, device_ms = parts.loc["push", "operation_calls"], parts["device_ms"]
    # Two events before a module's own call, and two after it.
    assert device_ms["push"] == 2 * sites and device_ms["before the denoiser"] == 1
    assert device_ms["outside the window"] == 2
    # No kernel ran, so all of it lies between them; the host's time tells them apart.
    assert device_ms["push: bmm"] == 0 and device_ms["push: between its operations"] == 2 * sites


def test_a_kernels_time_is_its_operations_and_what_is_left_lies_between():
    """From events as the profiler gives them: nested on the host, kernels with the operation that launched them."""

    def event(name, parent=None, host=0, device=0, kind=DeviceType.CPU):
        return SimpleNamespace(
            name=name, cpu_parent=parent, self_cpu_time_total=host, self_device_time_total=device, device_type=kind
        )

    push = event("push", host=300)
    take = event("aten::index_select", push, host=100, device=2000)
    product = event("aten::matmul", push, host=50)
    outside = event("aten::addmm", event("model"), host=9999, device=9999)
    events = [
        push, take, product, event("aten::bmm", product, host=150, device=5000), outside, outside.cpu_parent,
        event("gemm", device=5000, kind=DeviceType.CUDA), event("push", device=9000, kind=DeviceType.CUDA),
    ]  # fmt: skip
    table = profile.operations(events, 1, pd.Series([1, 1.2, 8.5], profile.TAKEN))
    # 0.6 ms on the host under the profiler are 1.2 without; the device's are as they are.
    assert [(operation, calls, round(host, 9), device) for operation, calls, host, device in table.itertuples()] == [
        ("push: bmm", 1, 0.3, 5.0), ("push: index_select", 1, 0.2, 2.0), ("push: matmul", 1, 0.1, 0.0),
        ("push: between its operations", 1, 0.6, 1.5),
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_is_measured_with_its_memory_and_kernels(tiny_checkpoint, tmp_path):
    spec = "latency.mini.cases.mini-sdxl.{}".format
    overrides = tiny(
        tiny_checkpoint("sdxl"), tmp_path, "latency.only=[mini-sdxl]", "latency.curves=false", spec("side=32"),
        spec("rounds=6"), "method.min_side=8",
    )  # fmt: skip
    overrides[overrides.index("device=cpu")] = "device=cuda"
    markdown = latency.run(overrides)
    frame = latency.read_rows(tmp_path / "latency" / "table.csv")
    assert frame["cuda"].notna().all() and frame["device"].eq(torch.cuda.get_device_name()).all()
    table = frame[frame["part"] == "table"].set_index("variant")
    assert table.drop("lower_bound")["peak_mib"].gt(0).all() and table.loc["first", "inside_ratio_low"] > 0
    profile = frame[frame["part"] == "profile"].set_index("operation")
    assert profile.loc["push", "device_ms"] > 0 and "device, ms" in markdown
    operations = profile[profile.index.str.startswith("push: ")]["device_ms"]
    assert operations.drop("push: between its operations").sum() > 0, "kernels were found"


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_writes_a_row_for_every_variant_and_window(flux):
    _, folder, _ = flux
    frame = latency.read_rows(folder / "latency" / "table.csv")
    assert list(frame.columns) == COLUMNS
    counts = frame.groupby("part", sort=False).size().to_dict()
    operations = counts.pop("profile")
    assert counts == {"table": 9 + 1, "window": 2 * (3 + 1), "batch": 3 + 1, "resolution": 3 + 1}
    parts = frame[frame["part"] == "profile"]
    assert parts["operation"].iloc[[0, 1, -2, -1]].tolist() == [
        "before the denoiser", "push", "after the denoiser", "outside the window",
    ]  # fmt: skip
    assert operations > 8 and parts["host_ms"].gt(0).all() and parts["device_ms"].isna().all()
    frame = frame[frame["part"] != "profile"]
    traced = ["weights", "device", "threads", "torch", "diffusers", "python", "setting", "rounds", "steps_inside"]
    assert frame[traced].notna().all(axis=None)

    table = frame[frame["part"] == "table"].set_index("variant")
    assert table.index.tolist() == [*composed(*MINI).latency.titles]
    assert (table["measured_steps"] == 3).all() and table.loc[["none", "first"], "measured_inside"].tolist() == [2, 2]
    assert table.loc["outside", "measured_inside"] == 1 and pd.isna(table.loc["outside", "inside_ms"])
    assert table.loc["none", ["inside_ratio", "outside_ratio", "call_ratio"]].isna().all()
    compared = table.drop(["none", "outside", "lower_bound"])
    assert table.loc["lower_bound", ["inside_ratio_low", "call_ratio_high"]].isna().all(), "rounds say nothing of it"
    for quantity in ("inside", "call"):
        value, low, high = (compared[f"{quantity}_ratio{end}"] for end in ("", "_low", "_high"))
        assert ((low <= value) & (value <= high)).all(), quantity
    assert table["peak_mib"].isna().all() and (table.drop("outside")["call_how"] == "composed").all()
    assert table.loc["lower_bound", "inside_ratio"] > 1 and pd.isna(table.loc["lower_bound", "outside_ms"])
    assert table.loc["first", ["matching", "reference"]].tolist() == ["paper", "first"]
    assert table.loc["picture", "reference"] == "given image"
    share = table["pushed_share"]
    assert (share[["first", "previous", "others", "released", "picture"]] > 0).all()
    assert share[["none", "naive", "naive_released", "lower_bound"]].isna().all()
    # One round, as in the curves, has no interval.
    assert frame.loc[frame["part"] == "batch", "inside_ratio_low"].isna().all()
    curve = frame[(frame["part"] == "window") & (frame["variant"] == "lower_bound")]
    assert curve["steps_inside"].is_monotonic_increasing and curve["call_ratio"].is_monotonic_increasing
    assert curve["steps_inside"].iloc[-1] == 6


def test_what_is_measured_already_is_not_measured_again(flux, monkeypatch):
    overrides, folder, markdown = flux
    before = {path.name: path.read_bytes() for path in (folder / "latency").glob("*.*")}
    assert {name for name in before if name[0] != "."} == {"table.csv", "table.md", "mini-flux.png"}
    monkeypatch.setattr(latency, "measure_case", lambda *arguments: pytest.fail("measured"))
    assert latency.run(overrides) == markdown == (folder / "latency" / "table.md").read_text()
    assert {path.name: path.read_bytes() for path in (folder / "latency").glob("*.*")} == before


@pytest.mark.parametrize("setting", ["force=true", "method.alpha=1", None])
def test_a_changed_setting_or_method_is_measured_anew(flux, monkeypatch, setting):
    monkeypatch.setattr(latency, "measure_case", lambda *arguments: pytest.fail("measured"))
    if setting:
        change(monkeypatch, setting)
    else:
        monkeypatch.setattr(Naive, "version", Naive.version + 1)
    with pytest.raises(pytest.fail.Exception, match="measured"):
        latency.run(flux[0])


@pytest.mark.slow
def test_whole_calls_and_what_does_not_fit(tiny_checkpoint, tmp_path, monkeypatch):
    """A call of the model's own steps is measured, not composed; a variant that is too large is told, not fatal."""
    attached = measure.attached

    def too_large(pipe, variant, *arguments):
        if variant.via == "naive":
            raise torch.OutOfMemoryError
        return attached(pipe, variant, *arguments)

    monkeypatch.setattr(measure, "attached", too_large)
    spec = "latency.mini.cases.mini-sdxl.{}".format
    markdown = latency.run(
        tiny(
            tiny_checkpoint("sdxl"), tmp_path, "latency.only=[mini-sdxl]", "latency.curves=false", spec("side=32"),
            spec("batch=2"), spec("rounds=1"), spec("steps=null"), "method.min_side=8",
        )
    )  # fmt: skip
    frame = latency.read_rows(tmp_path / "latency" / "table.csv")
    assert set(frame["part"]) == {"table", "profile"}
    table = frame[frame["part"] == "table"].set_index("variant")
    assert table.loc[["none", "first", "others"], "call_how"].tolist() == ["measured"] * 3
    assert table.loc[["naive", "naive_released"], "call_how"].tolist() == ["out of memory"] * 2
    assert table.loc["lower_bound", "call_how"] == "composed"
    assert table.loc["none", "measured_steps"] == 6
    assert "out of memory" in markdown and "Whole calls were measured" in markdown
    assert not list(tmp_path.rglob("*.png"))


def test_a_new_measurement_replaces_its_configuration_and_keeps_the_others(tmp_path):
    """A table makes the curve over the window, too."""

    def put(value, **changes):
        new = [row | {"inside_ms": value} | changes for row in measured(first=(1, 1, 1, 1000))]
        return put_rows(tmp_path / "table.csv", new, COLUMNS, CONFIGURATION, SAME_CASE)["inside_ms"].tolist()

    put(1.0)
    others = [{"device": "H200"}, {"side": 512}, {"compiled": True}, {"part": "batch"}, {"device": "cpu", "threads": 1}]
    for number, changes in enumerate(others):
        put(2.0 + number, **changes)
    assert put(8.0, part="window") == [value for value in (8, 2, 3, 4, 5, 6) for _ in range(2)]
    assert put(7.0, device="cpu", threads=1, torch="3.0") == [value for value in (8, 2, 3, 4, 5, 7) for _ in range(2)]


def test_a_table_of_an_earlier_version_is_shown_and_goes_on(tmp_path, monkeypatch):
    change(monkeypatch, "latency.cases=false", "latency.curves=false", "device=cpu", f"results={tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"latency/table\.csv, got no file: let latency\.cases"):
        latency.run(MINI)
    frame = table_of(measured(first=(1.03, 1, 1.02, 1005), outside=(1, 1.001, 1, 1000)))
    added = ["operation", "operation_calls", "host_ms", "device_ms"]
    (tmp_path / "latency").mkdir()
    frame.drop(columns=added).to_csv(tmp_path / "latency" / "table.csv", index=False)
    page = latency.run(MINI)
    assert "## flux-dev, 768 x 768" in page and "Where it goes" not in page
    frame = put_rows(tmp_path / "latency" / "table.csv", measured(side=512), COLUMNS, CONFIGURATION, SAME_CASE)
    assert list(frame.columns) == COLUMNS and len(frame) == 3 + 1


# --- the report -------------------------------------------------------------------------------------------------------


def measured(model="flux-dev", side=768, part="table", device="H100", batch=4, window=(900, 1000), **variants):
    """Rows of the table by hand: variant=(inside, outside, call, peak in MiB), ratios to 100 ms, 10 s."""
    rows = []
    for variant, (inside, outside, call, peak) in {"none": (1, 1, 1, 1000), **variants}.items():
        row = dict.fromkeys(COLUMNS) | {
            "experiment": "latency", "part": part, "model": model, "weights": "random", "side": side, "batch": batch,
            "steps": 25, "dtype": "bfloat16", "compiled": False, "device": device, "variant": variant,
            "t_low": window[0], "t_high": window[1], "steps_inside": 6, "rounds": 6, "measured_steps": 5,
            "measured_inside": 3, "torch": "2.9", "diffusers": "0.42", "cuda": "12.8", "call_how": "composed",
            "call_s": 10 * call, "image_s": 2.5 * call, "peak_mib": peak, "peak_ratio": peak and peak / 1000,
        }  # fmt: skip
        for quantity, value, width in (("inside", inside, 0.005), ("outside", outside, 0.005), ("call", call, 0.001)):
            if quantity != "call":
                ends = {f"{quantity}_q1_ms": 99 * value, f"{quantity}_q3_ms": 101 * value}
                row |= {f"{quantity}_ms": 100 * value, **ends}
            if variant != "none":
                ends = {f"{quantity}_ratio_low": value - width, f"{quantity}_ratio_high": value + width}
                row |= {f"{quantity}_ratio": value, **ends}
        rows.append(row)
    return rows


def table_of(*rows):
    return pd.DataFrame([row for part in rows for row in part], columns=COLUMNS)


def test_targets_are_met_not_met_undecided_or_not_measured():
    frame = table_of(
        measured(first=(1.03, 1, 1.02, 1005), outside=(1, 1.001, 1, 1000)),
        measured(device="H200", first=(1.036, 1, 1.005, 1005)),
        measured(side=1024, first=(1.2, 1, 1.2, 1011)),
        *(
            [row | {"steps": steps} for row in measured(part="resolution", side=side, first=(1.2, 1, 1.2, peak))]
            for steps, peaks in ((25, (1010, 1045)), (50, (1010, 1020)))
            for side, peak in zip((1024, 2048), peaks, strict=True)
        ),
        [measured()[0] | {"part": "profile", "operation": "outside the window", "host_ms": 0.12}],
    )
    table = report.target_table(frame, composed(*MINI))
    of_flux = table[table["of"].str.startswith("flux") & (table["verdict"] != "not measured")]
    assert [tuple(row) for row in of_flux[["what", "on", "measured", "verdict"]].itertuples(index=False)] == [
        ("step in the window", "H100", "+3.0 % [+2.5 %, +3.5 %]", "met"),
        ("step in the window", "H200", "+3.6 % [+3.1 %, +4.1 %]", "undecided"),
        ("whole call, 1000 to 900", "H100", "+2.0 % [+1.9 %, +2.1 %]", "not met"),
        ("whole call, 1000 to 900", "H200", "+0.5 % [+0.4 %, +0.6 %]", "met"),
        ("attached, outside the window", "H100", "+0.1 % [-0.4 %, +0.6 %]", "undecided"),
        ("of which hooks, by the clock", "H100", "+0.12 %", ""),  # on the H200 no profile was taken
        ("peak memory", "H100", "+1.1 %", "not met"),
        ("extra peak memory, 2048 against 1024", "H100", "x 4.50 (10 to 45 MiB)", "not met"),
        ("extra peak memory, 2048 against 1024", "H100", "x 2.00 (10 to 20 MiB)", "met"),  # of another number of steps
    ]
    rest = table[~table["of"].str.startswith("flux")]
    assert set(rest["verdict"]) == {"not measured"} and {"mini-sdxl 128", "sdxl"} <= set(rest["of"])


def test_a_profile_of_a_gpu_says_what_share_of_a_step_each_part_has():
    row = measured()[0] | {"part": "profile", "operation_calls": 57}
    times = {"push": (5.0, 2.5), "push: view": (1.0, 0.0), "outside the window": (1.0, 0.2)}
    rows = [row | {"operation": name, "host_ms": host, "device_ms": gpu} for name, (host, gpu) in times.items()]
    frame, baseline = pd.DataFrame(rows), {"inside_ms": 100, "outside_ms": 200}
    shares = report.profile_table(frame, baseline)["on the device, of a step without"]
    assert shares.tolist() == ["2.50 %", "0.00 %", "0.10 %"]
    shares = report.profile_table(frame.assign(device_ms=None), baseline)["of a step without"]
    assert shares.tolist() == ["5.00 %", "1.00 %", "0.50 %"]


def test_the_page_and_the_figure_of_a_gpu_show_memory_and_every_device(tmp_path):
    cfg = composed(*MINI)
    strengths = {"first": (1.03, 1, 1.02, 1005), "lower_bound": (1.01, 1, 1.005, None)}
    frame = table_of(
        *(measured(device=device, **strengths) for device in ("H100", "H200")),
        measured(window=(600, 1000), **strengths),
        [measured()[0] | {"part": "profile", "operation": "push", "operation_calls": 57, "host_ms": 5.0}],
        *(
            measured(device=device, part="batch", batch=batch, **strengths)
            for device in ("H100", "H200")
            for batch in (2, 4)
        ),
        *(measured(part="resolution", side=side, **strengths) for side in (768, 1024)),
        *(measured(part="window", window=(low, 1000), **strengths) for low in (900, 800)),
    )
    assert curve_models(frame) == ["flux-dev"]
    text = report.write(frame, cfg, tmp_path)
    assert text.count("## flux-dev, 768 x 768, 4 images, 25 steps") == 2
    assert text.count("1000 to 900 (6 steps): ratio") == 2 and text.count("1000 to 600 (6 steps): ratio") == 1
    assert text.count("Where it goes") == 1, "of the device that it was taken on"
    (_, statements) = text.split("## The paper's statements")
    assert all(value in statements for value in ("30.62", "31.71", "4.0", "abstract")) and "nan" not in statements
    assert "random weights of the published architecture" in " ".join(text.split()) and "![" in text
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "flux-dev.png"}
    figure = scaling(frame, "flux-dev", cfg.latency.titles)
    assert [axis.get_xlabel() for axis in figure.axes if axis.get_visible()] == [
        "images in a call", "side, pixels", "side, pixels", "steps in the window, of 25", "images in a call",
    ]  # fmt: skip
    one_panel = scaling(frame[frame["part"] == "window"], "flux-dev", cfg.latency.titles)
    canvas = FigureCanvasAgg(one_panel)
    canvas.draw()
    box = one_panel.get_tightbbox(canvas.get_renderer())
    assert box.x0 >= 0 and box.x1 <= one_panel.get_figwidth(), "nothing is cut off at the edges"
    with pytest.raises(ValueError, match=r"model with curves \(flux-dev\), got 'sdxl'"):
        scaling(frame, "sdxl", {})


def test_the_committed_page_is_what_its_csv_renders_to():
    frame, cfg = latency.read_rows(RESULTS / "table.csv"), composed(*MINI)
    assert pd.read_csv(RESULTS / "table.csv", nrows=0).columns.tolist() == COLUMNS
    assert (RESULTS / "table.md").read_text() == report.pages(frame, cfg)[0]
    assert all((RESULTS / f"{model}.png").exists() for model in curve_models(frame))
    assert frame[["device", "torch", "diffusers", "weights", "setting", "commit"]].notna().all(axis=None)
