"""Further uses of a reference: the images of their grids, and the settings that are refused."""

import pytest
import torch
from omegaconf import OmegaConf

import negtome
from experiments.compose import expand
from experiments.figures import applications

CALL = {"num_inference_steps": 1, "height": 32, "width": 32}
CONFIG = negtome.NegToMeConfig(threshold=-1.0, timestep_range=(0, 1000), min_side=1)


def test_a_grid_has_the_reference_the_baseline_and_an_image_for_each_alpha(tiny_sdxl, monkeypatch):
    monkeypatch.setattr(applications, "image_grid", lambda heads, rows: (heads, rows))
    (cfg,) = expand(["method=negtome"])
    assert len(cfg.applications) == 4
    for spec in OmegaConf.to_container(cfg.applications, resolve=True).values():
        spec |= {"alphas": spec["alphas"][:1], "seeds": [3]}
        heads, rows = applications.draw(tiny_sdxl, CALL, CONFIG, **spec)
        assert heads == ["reference", "baseline", *(f"alpha {alpha:g}" for alpha in spec["alphas"])]
        for seed, (label, ((shown,), (plain,), *pushed)) in zip(spec["seeds"], rows, strict=True):
            assert label == f"{spec['description']}; seed {seed}"
            alone = tiny_sdxl(spec["prompt"], generator=torch.Generator().manual_seed(seed), **CALL).images[0]
            assert plain == alone and all(image != plain for (image,) in pushed)
            assert (shown == plain) == ("reference" not in spec and "blur" not in spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "middle"}, "null or one of .*got 'middle'"),
        ({"blur": 2}, r"in \[0, 1\], got 2"),
        ({"alphas": []}, "none"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        applications.draw(None, {}, CONFIG, **{"description": "d", "prompt": "p", "alphas": [1.0]} | settings)
