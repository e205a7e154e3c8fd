"""The settings refuse what is wrong and say what is right."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negtome import NegToMeConfig
from negtome.validation import check_float, check_int, read_step_range


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alpha", math.nan, "alpha must be a finite number, got nan"),
        *((name, 10**400, "finite number, got 1000") for name in ("alpha", "threshold")),
        ("timestep_range", (0, -(10**400)), "finite number, got -1000"),
        ("alpha", True, "finite number, got True"),
        ("threshold", 1.01, "between -1 and 1, got 1.01"),
        ("timestep_range", (1000, 800), r"are \(800, 1000\)"),
        ("timestep_range", (0, 1001), "between 0 and 1000, got 1001"),
        ("timestep_range", (0.85, 1.0), r"got \(0.85, 1\); for shares .* use step_range"),
        ("timestep_range", (1, 2, 3), "two numbers"),
        ("timestep_range", 800, r"two numbers \(low, high\), got 800"),
        ("threshold", np.float32(1.5), "between -1 and 1, got 1.5"),
        ("alpha", torch.tensor([0.9]), "finite number, got tensor"),
        ("step_range", 0, r"two numbers \(first, last\), got 0"),
        ("step_range", "0:1", "two numbers"),
        ("step_range", (0, 1, 2), "two numbers"),
        ("step_range", (2, 1), "first <= last, got"),
        ("step_range", (-1, 0), "whole number from 0 to 999, got -1"),
        ("step_range", (0, 10**400), "whole number from 0 to 999, got 1000"),
        ("step_range", (False, 1), "whole number from 0 to 999, got False"),
        ("step_range", (0, "1"), "finite number, got '1'"),
        ("step_range", (0.5, 0.5), r"low < high, got \(0.5, 0.5\)"),
        ("step_range", (0, 1.5), "between 0 and 1, got 1.5"),
        ("step_range", (0.5, math.nan), "finite number, got nan"),
        ("step_range", (0.0, 1.0), r"for every step, pass timestep_range=\(0, 1000\)"),
        ("matching", "nearest", "one of"),
        ("reference", "last", "one of"),
        ("sites", "up_blocks", "list of module names"),
        ("sites", (), "at least one"),
        ("sites", ("up_blocks", 1), "module names"),
        ("cross_attention", 1, "true or false"),
        ("min_side", 0, "min_side must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_values_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        NegToMeConfig(**{field: value})


@pytest.mark.parametrize("reference", ["previous", "others"])
def test_released_matching_has_one_reference_image(reference):
    with pytest.raises(ValueError, match='needs reference="first"'):
        NegToMeConfig(matching="released", reference=reference)


def test_lists_become_tuples_and_fields_are_frozen():
    config = NegToMeConfig(timestep_range=[600, 1000], sites=["up_blocks.1"])
    assert config.timestep_range == (600, 1000)
    assert config.sites == ("up_blocks.1",)
    assert hash(config) == hash(NegToMeConfig(timestep_range=(600, 1000), sites=("up_blocks.1",)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 1.0
    assert config.replace(alpha=1.5).alpha == 1.5
    with pytest.raises(ValueError, match="threshold"):
        config.replace(threshold=2)


@pytest.mark.parametrize("of", [np.array, torch.tensor])
def test_numbers_of_numpy_and_tensors_are_numbers(of):
    ours = NegToMeConfig(alpha=0.5, threshold=0.75, timestep_range=(600, 900), cross_attention=True, min_side=8)
    theirs = NegToMeConfig(
        alpha=of(0.5), threshold=of(0.75), timestep_range=of([600, 900]), cross_attention=of(True), min_side=of(8)
    )
    assert theirs == ours and hash(theirs) == hash(ours) and repr(theirs) == repr(ours)
    assert NegToMeConfig(alpha=np.float64(0.5), min_side=np.int64(8)) == NegToMeConfig(alpha=0.5, min_side=8)


def test_the_timestep_range_is_inclusive():
    config = NegToMeConfig(timestep_range=(800, 900))
    assert [config.is_active(t) for t in (799.9, 799.9999, 800, 850, 900, 900.0001, 900.1)] == [
        False, True, True, True, True, True, False,
    ]  # fmt: skip


ranges = st.lists(st.integers(0, 60), min_size=2, max_size=2).map(sorted)
every_share = sorted({Fraction(i, n) for n in range(1, 61) for i in range(n + 1)})
shares = st.lists(st.sampled_from(every_share), min_size=2, max_size=2, unique=True).map(sorted)


@settings(deadline=None)
@given(ends=ranges, steps=st.integers(1, 60), order=st.sampled_from([1, 2]))
def test_indices_of_steps_are_inclusive_for_any_schedule(ends, steps, order):
    timesteps = [1000.0] * (steps * order - (order - 1))  # the last step of a second-order scheduler has one
    first, last = ends
    active = NegToMeConfig(step_range=ends).active_steps(timesteps, order)
    assert active == [first <= i // order <= last for i in range(len(timesteps))]
    assert sum(active[::order]) == max(0, min(last, steps - 1) - first + 1)


@settings(deadline=None)
@given(ends=shares.filter(lambda ends: ends != [0, 1]), steps=st.integers(1, 60), order=st.sampled_from([1, 2]))
def test_shares_of_steps_partition_any_schedule(ends, steps, order):
    timesteps = [1000.0] * (steps * order - (order - 1))
    low, high = ends
    active = NegToMeConfig(step_range=[float(low), float(high)]).active_steps(timesteps, order)
    assert active == [low <= Fraction(i // order, steps) < high for i in range(len(timesteps))]
    assert sum(active[::order]) == math.ceil(high * steps) - math.ceil(low * steps)
    if low == 0:
        assert active[0], "there is always a first step"


@pytest.mark.parametrize("of", [np.array, torch.tensor, list])
def test_steps_and_shares_keep_their_kind(of):
    for ends in ((0, 0), (0, 3), (0.25, 0.5)):
        config = NegToMeConfig(step_range=of(ends))
        assert repr(config.step_range) == repr(ends) and hash(config) == hash(NegToMeConfig(step_range=ends))
    assert repr(NegToMeConfig(step_range=(0, np.float16(0.25))).step_range) == "(0.0, 0.25)"


def test_one_range_chooses_the_steps():
    with pytest.raises(
        ValueError, match=r"both choose the steps, got \(0, 0\) and \(900.0, 1000.0\); leave one"
    ) as error:
        NegToMeConfig(timestep_range=(900, 1000), step_range=(0, 0))
    assert "\n" not in str(error.value)
    published = NegToMeConfig.preset("sdxl")
    by_step = published.replace(step_range=(0, 0))
    assert by_step == NegToMeConfig.preset("sdxl", step_range=(0, 0)) == by_step.published_for("sdxl")
    assert by_step.timestep_range is None and by_step.replace(timestep_range=(800, 1000)) == published
    assert by_step.replace(step_range=None).published_for("sdxl") == published
    assert by_step.replace(timestep_range=None) == by_step
    with pytest.raises(ValueError, match="both choose"):
        published.replace(step_range=(0, 0), timestep_range=(0, 1000))
    with pytest.raises(ValueError, match=r"got step_range=\(0, 0\); pass a timestep_range"):
        by_step.window()


def test_steps_that_nobody_counted_are_refused():
    with pytest.raises(ValueError, match="needs the index of a step"):
        NegToMeConfig(step_range=(0, 0)).is_active(1000)
    with pytest.raises(ValueError, match=r"does not say how many there are; pass the first and the last step"):
        NegToMeConfig(step_range=(0, 0.5)).is_active(1000, 0)
    assert NegToMeConfig(step_range=(1, 2)).is_active(1000, 2), "without the number of steps"


def test_a_share_is_read_as_python_writes_it():
    assert read_step_range("0:0.25") == (0.0, 0.25)
    assert read_step_range(f"0:{1e-05!r}") == (0.0, 1e-05)
    assert read_step_range("0:2") == (0, 2)


def test_few_steps_have_settings_of_their_own():
    unet, transformer = (NegToMeConfig.few_step(denoiser) for denoiser in ("unet", "transformer"))
    assert unet.alpha > transformer.alpha and unet.threshold < transformer.threshold, "weaker for transformers"
    for few in (unet, transformer):
        assert (few.step_range, few.timestep_range) == ((0, 0), None)
        for architecture in ("sdxl", "flux", "sd3"):
            assert few.published_for(architecture) == few
    changed = NegToMeConfig.few_step("unet", alpha=1.5, timestep_range=(0, 1000))
    assert changed == NegToMeConfig(1.5, 0.5, (0, 1000))
    with pytest.raises(ValueError, match=r'must be "unet" or "transformer", got \'mmdit\''):
        NegToMeConfig.few_step("mmdit")


def test_settings_without_numbers_are_refused():
    unset = NegToMeConfig()
    for ask, name in ((unset.strength, "threshold"), (unset.window, "timestep_range")):
        with pytest.raises(ValueError, match=f"expected a {name}, got None; published_for"):
            ask()
    published = unset.published_for("flux")
    assert published.window() == (900, 1000)
    assert published.strength() == {"alpha": 0.9, "threshold": 0.65, "matching": "paper"}


def test_presets_are_the_published_settings():
    sdxl, flux = (NegToMeConfig.preset(name, "paper") for name in ("sdxl", "flux"))
    assert (sdxl.alpha, sdxl.threshold, sdxl.timestep_range) == (0.9, 0.7, (800, 1000))
    assert [sdxl.side_within(largest) for largest in ((64, 64), (32, 40), (40, 12))] == [32, 32, 12]
    assert NegToMeConfig(min_side=4).side_within((2, 2)) == 4
    assert (flux.alpha, flux.threshold, flux.timestep_range) == (0.9, 0.65, (900, 1000))
    for paper in (sdxl, flux):
        assert (paper.matching, paper.reference, paper.cross_attention) == ("paper", "first", False)
    released = NegToMeConfig.preset("sdxl", "released")
    assert released == sdxl.replace(matching="released", cross_attention=True)
    assert NegToMeConfig.preset("sdxl", "evaluation") == released.replace(timestep_range=(600, 1000))
    assert NegToMeConfig.preset("flux", "released") == flux.replace(matching="released")
    assert NegToMeConfig.preset("flux", "evaluation") == flux.replace(matching="released", alpha=1.9)
    assert NegToMeConfig.preset("flux", alpha=1.5) == flux.replace(alpha=1.5)
    with pytest.raises(ValueError, match="the presets are sdxl/paper"):
        NegToMeConfig.preset("sd3")
    assert NegToMeConfig(alpha=2).published_for("sd3") == NegToMeConfig(2, 0.7, (900, 1000)), "nothing was published"


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, 10**400, [1.0], 1.1, -1.1])
def test_bad_numbers_are_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^alpha must be "):
        check_float("alpha", value, -1, 1)


def test_whole_numbers_keep_to_their_limits():
    assert check_int("steps", 10**400, 1) == 10**400
    for value in (True, 6.0, "6", 0, None):
        with pytest.raises(ValueError, match=r"^steps must be a whole number of at least 1, got "):
            check_int("steps", value, 1)
    with pytest.raises(ValueError, match=r"^steps must be a whole number from 1 to 9, got 10; take fewer"):
        check_int("steps", 10, 1, 9, "; take fewer")
