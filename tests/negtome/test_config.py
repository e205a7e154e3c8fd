"""The settings refuse what is wrong and say what is right."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from negtome import NegToMeConfig
from negtome.validation import check_float, check_int


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
        ("timestep_range", (1, 2, 3), "two numbers"),
        ("timestep_range", 800, r"two numbers \(low, high\), got 800"),
        ("threshold", np.float32(1.5), "between -1 and 1, got 1.5"),
        ("alpha", torch.tensor([0.9]), "finite number, got tensor"),
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


def test_settings_without_numbers_are_refused():
    settings = NegToMeConfig()
    for ask, name in ((settings.strength, "threshold"), (settings.window, "timestep_range")):
        with pytest.raises(ValueError, match=f"expected a {name}, got None; published_for"):
            ask()
    whole = settings.published_for("flux")
    assert whole.window() == (900, 1000)
    assert whole.strength() == {"alpha": 0.9, "threshold": 0.65, "matching": "paper"}


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
