"""`negtome generate --method NAME`: the images of one prompt by a method of the benchmark."""

import numpy as np
import pytest
from PIL import Image

from experiments import try_method
from experiments.demo import models
from negtome.__main__ import main

PROMPT = "a photo of a dog"


def _pixels(folder, name):
    return np.stack([np.asarray(Image.open(folder / f"{name}-{index}.png"), dtype=int) for index in range(2)])


@pytest.mark.slow
def test_negtome_as_a_method_of_the_benchmark_makes_the_commands_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(models.PROJECT / "models" / "mini-sdxl")
    config = models.find("mini-sdxl").method("negtome").config
    low, high = config.timestep_range
    two_steps = [PROMPT, "-n", "2", "--seed", "3", "--steps", "2"]
    own = ["--alpha", str(config.alpha), "--threshold", str(config.threshold), "--timestep-range", f"{low}:{high}"]
    assert main(["generate", *two_steps, "--method", "negtome", "--out", "by_method"]) == 0
    assert main(["generate", *two_steps, "--model", model, *own, "--compare", "--out", "own"]) == 0
    for ours, theirs in (("negtome", "with"), ("without", "without")):
        difference = np.abs(_pixels(tmp_path / "by_method", ours) - _pixels(tmp_path / "own", theirs))
        assert difference.max() <= 1, "they round pixels differently"


def test_a_value_replaces_the_chosen_one_and_a_folder_is_for_one_setting(tmp_path, capsys):
    arguments = ["generate", PROMPT, "--method=cads", "-n", "2", "--steps", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--value", "2"]) == 0
    assert not (_pixels(tmp_path, "cads") == _pixels(tmp_path, "without")).all()
    assert main([*arguments, "--value", "2"]) == 0, "the same settings go into the same folder"
    assert main(arguments) == 2 and "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "cds"), ("--method", "negtome_reference"), ("--method", "cads", "--alpha", "1"),
        ("--method", "cads", "-n", "1"), ("--method", "cads", "--steps", "0"), ("--method", "cads", "--seed", "-1"),
        ("--method", "best_of", "--value", "none"), ("--method", "cads", "--model", "nowhere/nothing"),
        ("--method", "cads", "--value", "[1,2]"), ("--method", "limited_interval", "--value", "3"),
        ("--method", "cads", "--value", "NaN"), ("--method", "cads", "--value", "true"),
    ],
)  # fmt: skip
def test_an_option_that_no_method_can_use_is_one_line_before_the_weights(options, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(try_method.models, "load", lambda model: pytest.fail("the weights were read"))
    assert main(["generate", PROMPT, *options, "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("generate --method: ") and error.count("\n") == 1
    assert "experiments try" not in error and options[-1].strip("[]")[0] in error
    assert not (tmp_path / "new").exists()


def test_the_methods_are_listed_without_a_prompt_or_a_method(capsys):
    assert main(["generate", "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"negtome", "cads", "stride", "sparke"} <= set(listed) and "negtome_reference" not in listed
