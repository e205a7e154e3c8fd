"""The command line: what it writes, that it overwrites nothing else, and that what is wrong is one line."""

import builtins
import errno
import functools
import io
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import negtome.__main__
import negtome.generate
from negtome import NegToMeConfig, image_files
from negtome.__main__ import main
from negtome.recipe import FILE, ModelDefaults, Recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tiny_checkpoint, tmp_path_factory):
    """A tiny checkpoint that says how it is used: two steps of 32 x 32 pixels, every token pushed."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_checkpoint("sdxl"), folder)
    every = NegToMeConfig(threshold=-1, timestep_range=(0, 1000), min_side=4)
    call = {"height": 32, "width": 32, "num_inference_steps": 2}
    (folder / FILE).write_text(ModelDefaults(call, every, every).to_json())
    return str(folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEGTOME_TRACEBACK", raising=False)


def pixels(folder, kind, count=2):
    return [Image.open(Path(folder) / f"{kind}-{i}.png").tobytes() for i in range(count)]


def test_help_is_short(capsys):
    assert main([]) == main(["-h"]) == 0
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    lines = capsys.readouterr().out.partition("usage: ")[0].splitlines()
    assert 10 < len(lines) <= 2 * 15 and all(len(line) <= 120 for line in lines)


def test_a_comparison_uses_the_same_seeds_and_stores_its_recipe(model, capsys):
    assert main(["generate", "a dog", "-n", "2", "--seed", "3", "--model", model, "--compare", "--out", "dogs"]) == 0
    out, err = capsys.readouterr()
    assert "warning" not in err
    assert {path.name for path in Path("dogs").iterdir()} == {
        *("without-0.png", "without-1.png", "with-0.png", "with-1.png", "compare.png", "recipe.py")
    }
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", out.splitlines()[-1])]
    active, steps, pushed, compared = numbers
    assert out.startswith("dogs: ") and active == steps == 2 and 0 < pushed <= compared

    stock = diffusers.StableDiffusionXLPipeline.from_pretrained(model)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    call = {"height": 32, "width": 32, "num_inference_steps": 2}
    images = stock("a dog", num_images_per_prompt=2, generator=generators, **call).images
    assert [image.tobytes() for image in images] == pixels("dogs", "without") != pixels("dogs", "with")

    recipe = image_files.read("dogs/with-1.png")
    assert (recipe.prompt, recipe.images, recipe.seed, recipe.steps) == ("a dog", 2, 3, 2)
    assert image_files.read("dogs/without-0.png") == recipe.without() and image_files.read("dogs/compare.png") == recipe
    assert Path("dogs/recipe.py").read_text() == recipe.python()


def test_settings_for_few_steps_need_no_other_option(model, capsys):
    words = ["generate", "a dog", "-n", "2", "--model", model, "--few-steps"]
    assert main([*words, "--min-side", "4", "--threshold", "0.1", "--out", "dogs"]) == 0
    expected = NegToMeConfig.few_step("unet", min_side=4, threshold=0.1)
    assert image_files.read("dogs/with-0.png").config == expected
    assert main([*words, "--without"]) == 2 and "--without" in capsys.readouterr().err


def test_an_image_is_made_again_from_its_recipe(model, monkeypatch, capsys):
    assert main(["generate", "a cat", "-n", "2", "--model", model, "--alpha", "0.5", "--out", "cats"]) == 0
    assert main(["generate", "--from", "cats/with-0.png", "--model", model, "--out", "again"]) == 0
    assert pixels("again", "with") == pixels("cats", "with")
    assert not Path("again/without-0.png").exists()
    monkeypatch.setattr("negtome.recipe.EMBEDDED", (model,))
    assert main(["generate", "--from", "cats/with-0.png"]) == 0, "an embedded model needs not be named"
    (own,) = Path("negtome-images").iterdir()
    assert own.name.startswith("a-cat-") and pixels(own, "with") == pixels("cats", "with")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sent.png"], "names the model 'someone/else', got None"),
        (["sent.png", "--model", "models/mini-sdxl"], "names the model 'someone/else', got 'models/mini-sdxl'"),
        (["mine.png", "--model", "m"], "names the reference 'r.png', got None"),
        (["mine.png", "--model", "m", "--reference", "other.png"], "names the reference 'r.png', got 'other.png'"),
        (["mine.png", "--model", "m", "--reference", "r.png"], "names the mask 'secret.png', got None"),
        (["bare.png", "--model", "m", "--reference", "r.png"], "bare.png was made without a reference"),
    ],
)
def test_files_that_an_image_names_are_read_only_if_the_user_names_them(words, message, monkeypatch, capsys):
    for name, recipe in (
        ("sent.png", Recipe("someone/else", "a cat")),
        ("mine.png", Recipe("m", "a cat", reference="r.png", mask="secret.png")),
        ("bare.png", Recipe("m", "a cat")),
    ):
        image_files.save(Image.new("RGB", (8, 8)), name, recipe)
    for name in ("load", "Reference"):
        monkeypatch.setattr(negtome.generate, name, lambda *_, **__: pytest.fail("it was read"))
    assert main(["generate", "--from", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("changed", ["r.png", "m.png"])
def test_another_reference_under_the_same_path_is_another_recipe(changed, model, capsys):
    picture, mask = Image.linear_gradient("L").resize((32, 32)), Image.new("L", (32, 32), 255)
    picture.save("r.png")
    mask.save("m.png")
    words = ["generate", "a dog", "-n", "1", "--model", model, "--reference", "r.png", "--mask", "m.png"]
    for out in ([], ["--out", "away"], ["--out", "away", "--compare"]):  # the last to this recipe's own folder
        assert main([*words, *out]) == 0
    assert "away from r.png" in capsys.readouterr().out
    assert pixels("away", "with", 1) != pixels("away", "without", 1)
    again = ["generate", "--model", model, "--from", "away/with-0.png", "--reference", "r.png", "--mask", "m.png"]
    assert main(again) == 0
    (first,) = Path("negtome-images").iterdir()
    before = {path.name: path.read_bytes() for path in Path("away").iterdir()}

    mask.paste(0, (0, 16, 32, 32))
    (picture.rotate(90) if changed == "r.png" else mask).save(changed)
    capsys.readouterr()
    assert main([*words, "--out", "away"]) == main(again) == 2
    refused, unlike = capsys.readouterr().err.splitlines()
    assert "away must be a new folder" in refused and "compare.png is something else" in refused
    assert "away/with-0.png was made from another reference image or mask than r.png" in unlike
    assert {path.name: path.read_bytes() for path in Path("away").iterdir()} == before
    assert main(words) == 0 and len([*Path("negtome-images").iterdir()]) == 2
    (second,) = set(Path("negtome-images").iterdir()) - {first}
    assert pixels(second, "with", 1) != pixels(first, "with", 1)


def test_files_of_another_recipe_are_not_overwritten(model, capsys):
    words = ["generate", "a dog", "-n", "2", "--model", model, "--out", "dogs"]
    assert main(words) == 0
    before = {path.name: path.read_bytes() for path in Path("dogs").iterdir()}
    for other in (["--seed", "1"], ["-n", "3"], ["--alpha", "0.5"], ["--without"]):
        assert main([*words, *other]) == 2
        assert "with-0.png is something else" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("dogs").iterdir()} == before
    assert main([*words, "--compare"]) == 0, "this recipe's own folder, to which the other row is added"
    assert main(words) == 0

    Path("notes").mkdir()
    Path("notes/.DS_Store").write_text("of a file manager")
    for name in ("notes.txt", "with-0.png"):
        Path("notes", name).write_text("mine")
        assert main([*words[:-1], "notes"]) == 2
        assert f"{name} is something else" in capsys.readouterr().err
        Path("notes", name).unlink()
    assert main([*words[:-1], "notes"]) == 0, "hidden files are nobody's"


def test_a_script_that_was_changed_is_kept(model, monkeypatch, capsys):
    words = ["generate", "a dog", "-n", "2", "--model", model, "--device", "cpu", "--out", "dogs"]
    assert main([*words, "--without"]) == main(words) == 0, "of the same images, the other row"
    script = Path("dogs/recipe.py")
    text = script.read_text() + "print('mine')\n"
    script.write_text(text)
    monkeypatch.setattr(negtome.generate, "load", lambda *_: pytest.fail("it was loaded"))
    capsys.readouterr()
    for images in (Path("dogs").glob("*.png"), ()):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "dogs/recipe.py was changed" in line
        assert script.read_text() == text
        for image in images:
            image.unlink()


@pytest.fixture
def half_encoders(model):
    """A checkpoint as many publishers lay it: text encoders in half precision, and their configs say so."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    shutil.copytree(model, "half")
    for name, encoder in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        encoder.from_pretrained(f"half/{name}").half().save_pretrained(f"half/{name}")
    return "half"


def test_text_encoders_in_half_precision_need_no_option(half_encoders, capsys):
    assert main(["generate", "a dog", "-n", "2", "--model", half_encoders, "--out", "dogs"]) == 0
    exec(compile(Path("dogs/recipe.py").read_text(), "script", "exec"), {})
    assert pixels(".", "with") == pixels("dogs", "with")


def write_variant(folder, variant, keep):
    """Give every component of a folder weights of a variant, zeros but for norms, beside or instead of the others."""
    for file in [path for path in Path(folder).rglob("*.safetensors") if path.name.count(".") == 1]:
        weights = {name: 0 * value if value.dim() > 1 else value for name, value in load_file(file).items()}
        save_file(weights, file.with_name(f"{file.stem}.{variant}.safetensors"), metadata={"format": "pt"})
        if not keep:
            file.unlink()


@pytest.mark.parametrize(
    ("others", "options", "expected"),
    [
        (False, [], "fp16"),
        (True, [], None),
        (True, ["--dtype", "float16"], "fp16"),
        (True, ["--dtype", "float16", "--variant", "auto"], None),
    ],
)
def test_weights_of_half_precision_are_taken_where_they_are_meant(others, options, expected, model, monkeypatch):
    shutil.copytree(model, "both")
    write_variant("both", "fp16", keep=others)
    loaded = []
    generate = negtome.generate.generate
    monkeypatch.setattr(negtome.generate, "generate", lambda pipe, *a: loaded.append(pipe) or generate(pipe, *a))
    words = ["generate", "a dog", "-n", "2", "--model", "both", "--threshold", "0.99", "--out", "dogs"]
    assert main([*words, *options]) == 0
    assert loaded[0].unet.conv_in.weight.any() == (expected is None)
    assert image_files.read("dogs/with-0.png").variant == expected
    assert ('variant="fp16"' in Path("dogs/recipe.py").read_text()) == (expected == "fp16")


def test_an_absent_variant_is_refused_before_weights_are_read(model, monkeypatch, capsys):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    shutil.copytree(model, "both")
    write_variant("both", "fp16", keep=True)
    for folder, said in ((model, "only ones without a variant"), ("both", "but fp16;")):
        assert main(["generate", "a dog", "--model", folder, "--variant", "bf16"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "no weights of the variant 'bf16'" in line and said in line


@pytest.fixture
def cached(model, tmp_path, monkeypatch):
    """A repository in the hub's cache, as a download leaves it, of weights in the variant fp16 alone."""
    import huggingface_hub

    folder = tmp_path / "hub/models--publisher--cached"
    shutil.copytree(model, folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0" * 40)
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "publisher/cached"


def test_a_repository_in_the_cache_is_used_as_its_folder_is(cached, model, capsys):
    assert main(["generate", "a dog", "-n", "2", "--model", cached, "--out", "dogs"]) == 0
    assert main(["generate", "a dog", "-n", "2", "--model", model, "--out", "same"]) == 0
    recipe = image_files.read("dogs/with-0.png")
    assert (recipe.steps, recipe.width, recipe.config.min_side, recipe.variant) == (2, 32, 4, "fp16")
    assert pixels("dogs", "with") == pixels("same", "with")


def test_settings_that_do_not_fit_are_refused_before_the_baseline_is_made(model, monkeypatch, capsys):
    calls, forward = [], diffusers.UNet2DConditionModel.forward

    @functools.wraps(forward)
    def counted(*args, **options):
        calls.append(1)
        return forward(*args, **options)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", counted)
    words = ["generate", "a dog", "-n", "2", "--model", model, "--compare", "--timestep-range", "5:6", "--out", "dogs"]
    assert main(words) == 2
    assert "widen the range" in capsys.readouterr().err and calls == []


@pytest.mark.parametrize("out", ["file/images", "/proc/images", "dangling"])
def test_a_folder_that_cannot_be_written_is_refused_before_images_are_made(out, model, monkeypatch, capsys):
    monkeypatch.setattr(negtome.generate, "load", lambda *_: pytest.fail("it was loaded"))
    Path("file").write_text("mine")
    Path("dangling").symlink_to("nowhere/images")
    assert main(["generate", "a dog", "--model", model, "--out", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert out in line and "--out" in line


class Full(io.FileIO):
    """A file on a disk that is full after half of what is written."""

    def write(self, data):
        super().write(bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["with-1.png", "recipe.py"])
def test_after_a_full_disk_the_same_command_works(name, model, monkeypatch, capsys):
    words = ["generate", "a dog", "-n", "2", "--model", model, "--compare", "--out"]

    def full(file, mode="r", *args, **kwargs):
        if "w" in mode and name in str(file):
            return Full(file, "w")
        return real(file, mode, *args, **kwargs)

    real = builtins.open
    with monkeypatch.context() as disk:
        disk.setattr(builtins, "open", full)
        disk.setattr(io, "open", full)
        assert main([*words, "dogs"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("generate: ") and f"dogs/{name}" in line and os.strerror(errno.ENOSPC) in line
    assert not Path("dogs", name).exists()
    assert main([*words, "dogs"]) == main([*words, "once"]) == 0
    assert {path.name: path.read_bytes() for path in Path("dogs").iterdir()} == {
        path.name: path.read_bytes() for path in Path("once").iterdir()
    }


def test_warnings_are_printed(model, capsys):
    assert main(["generate", "a dog " * 30, "-n", "2", "--model", model, "--threshold", "0.999999"]) == 0
    truncated, pushed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "the prompt is truncated" in truncated and "77" in truncated
    assert "NegToMe pushed no token" in pushed


def send(path, **changes):
    """Write a picture that says what `Recipe` itself would refuse to say."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(image_files.CHUNK, json.dumps(Recipe("m", "p").to_dict() | changes))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def write_header(path, width, height):
    """Write a PNG that says how large it is, and has no pixels."""
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    empty = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in (data, empty)]
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """A folder of what is wrong on disk: no models, models without weights or with pickled ones, pictures, masks."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(model, folder / "cut")
    weights = folder / "cut/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    send(folder / "many.png", images=10**9)
    send(folder / "newer.png", version="99.0", sneed=1)
    send(folder / "older.png", version="0.0.1", config={"alpha": 1.0, "beta": 2.0})
    write_header(folder / "large.png", 8192, 8193)
    write_header(folder / "bomb.png", 100_000, 100_000)
    text = PngImagePlugin.PngInfo()
    text.add_text(image_files.CHUNK, "x" * 2**27, zip=True)
    Image.new("RGB", (8, 8)).save(folder / "text.png", pnginfo=text)
    (folder / "empty").mkdir()
    partial = shutil.copytree(model, folder / "partial")
    (partial / "unet/diffusion_pytorch_model.safetensors").unlink()
    for name, weights in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        component = shutil.copytree(model, folder / f"pickled-{name}") / name
        (file,) = component.glob("*.safetensors")
        torch.save(load_file(file), file.with_name(f"{weights}.bin"))
        file.unlink()
    index = json.loads((partial / "model_index.json").read_text())
    for name in ("NoPipeline", "WanPipeline", "CogVideoXPipeline", "StableDiffusionXLInpaintPipeline"):
        shutil.copytree(partial, folder / name)
        (folder / name / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    for name in ("tokenizer_2", "text_encoder"):  # diffusers makes an empty tokenizer, and images with it
        shutil.copytree(model, folder / f"no-{name}", ignore=shutil.ignore_patterns(name))
    Image.new("RGB", (32, 32)).save(folder / "r.png")
    Image.new("L", (16, 32), 255).save(folder / "small.png")
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["genrate"], "did you mean generate?"),
        (["generate"], "a prompt is missing"),
        (["generate", ""], "prompt must not be empty"),
        (["generate", "x", "--alhpa", "1"], "unrecognized arguments: --alhpa"),
        (["generate", "x", "-n", "two"], "invalid int value: 'two'"),
        (["generate", "x", "--size", "128"], "--size: must be WxH"),
        (
            ["generate", "x", "--timestep-range", "850"],
            "argument --timestep-range: must be LOW:HIGH, such as 850:1000, got '850';",
        ),
        (["generate", "x", "--call", "eta", "--model", "MODEL"], "--call"),
        (["generate", "x", "--call", "sigma=1", "--model", "MODEL"], "does not take sigma"),
        (["generate", "x", "--call", "eta=NaN", "--model", "MODEL"], "JSON values"),
        (
            ["generate", "x", "--call", "eta=large", "--model", "MODEL"],
            "eta of a StableDiffusionXLPipeline must be a number",
        ),
        (
            ["generate", "x", "--call", "eta=" + "[" * 10**5, "--model", "MODEL"],
            "eta of a StableDiffusionXLPipeline must be a number",
        ),
        (["generate", "x", "--call", "timesteps={}", "--model", "MODEL"], "correct the --call options"),
        (["generate", "x", "--call", "clip_skip=1000", "--model", "MODEL"], "correct the --call options"),
        (["generate", "x", "-n", str(10**9), "--model", "MODEL"], "from 1 to 256"),
        (["generate", "x", "-n", "1", "--model", "MODEL"], "images must be at least 2 without a reference image"),
        (
            ["generate", "x", "--without", "--alpha", "1", "--model", "MODEL"],
            "--without cannot be combined with settings",
        ),
        (["generate", "x", "--without", "--compare", "--model", "MODEL"], "leave --without or --compare out"),
        (
            ["generate", "x", "--model", "nobody/nothing"],
            "no folder nobody/nothing, and no such repository can be read from the Hugging Face hub",
        ),
        (["generate", "x", "--model", "empty"], "empty has no model_index.json"),
        (["generate", "x", "--model", "./nowhere"], "no folder ./nowhere"),
        (["generate", "x", "--model", "partial"], "diffusion_pytorch_model"),
        (["generate", "x", "--model", "pickled-unet"], "with safetensors weights"),
        (["generate", "x", "--model", "pickled-text_encoder"], "with safetensors weights"),
        (["generate", "x", "--model", "NoPipeline"], "NoPipeline cannot be used"),
        (["generate", "x", "--model", "WanPipeline"], "makes videos"),
        (["generate", "x", "--model", "CogVideoXPipeline"], "cannot be attached to a CogVideoXPipeline"),
        (["generate", "x", "--model", "StableDiffusionXLInpaintPipeline"], "starts from an image"),
        (["generate", "x", "--model", "no-tokenizer_2"], "has no folder tokenizer_2"),
        (["generate", "x", "--model", "no-text_encoder"], "has no folder text_encoder"),
        (["generate", "x", "--model", "MODEL", "--sites", "up_block"], "did you mean 'up_blocks'?"),
        (["generate", "x", "--model", "cut"], "cut cannot be used"),
        (["generate", "x", "--model", "MODEL", "--reference", "large.png"], "pixels, got 8192 x 8193 in large.png"),
        (["generate", "x", "--model", "MODEL", "--reference", "bomb.png"], "pixels, got more in bomb.png"),
        (["generate", "x", "--model", "MODEL", "--reference", "."], "got no file"),
        (
            ["generate", "x", "--model", "MODEL", "--reference", "r.png", "--mask", "large.png"],
            "pixels, got 8192 x 8193 in large.png",
        ),
        (["generate", "x", "--model", "MODEL", "--reference", "no.png"], "no.png"),
        (
            ["generate", "x", "--model", "MODEL", "--reference", "r.png", "--mask", "small.png"],
            "32x32 pixels, got 16x32",
        ),
        (["generate", "x", "--model", "MODEL", "--mask", "small.png"], "mask needs a reference image"),
        (["generate", "x", "--model", "MODEL", "--device", "cpu:7"], "this machine has no device"),
        (["generate", "x", "--model", "MODEL", "--device", "cpu", "--low-memory"], "--low-memory needs a GPU"),
        (["generate", "x", "--model", "MODEL", "--out", "r.png"], "r.png is something else"),
        (["generate", "x", "--model", "MODEL", "--timestep-range", "0:0"], "no step lies in timestep_range=(0, 0)"),
        (["generate", "x", "--model", "MODEL", "--step-range", "2:9"], "no step lies in step_range=(2, 9)"),
        (["generate", "x", "--model", "MODEL", "--step-range", "0-1"], "must be FIRST:LAST, such as 0:0"),
        (
            ["generate", "x", "--model", "MODEL", "--step-range", "0:0", "--timestep-range", "0:1000"],
            "step_range and timestep_range both choose the steps",
        ),
        (["generate", "--from", "no.png"], "no image no.png"),
        (["generate", "--from", "r.png"], "has no recipe"),
        (["generate", "--from", "text.png"], "cannot be read as a PNG"),
        (["generate", "--from", "bomb.png"], "cannot be read as a PNG"),
        (["generate", "--from", "many.png"], "images must be a whole number from 1 to 256, got 1000000000"),
        (
            ["generate", "--from", "newer.png"],
            f"written by version '99.0', has unknown fields 'sneed'; this is negtome {negtome.__version__}",
        ),
        (["generate", "--from", "older.png"], "has unknown fields 'beta'"),
        (
            ["generate", "x", "--from", "r.png"],
            "--from already sets the prompt and the settings; only --model may be added",
        ),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(words, said, model, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    before = sorted(Path().rglob("*"))
    assert main([model if word == "MODEL" else word for word in words]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith(f"{words[0]}: ")]
    assert lines == err.splitlines()[-1:] and said in lines[0] and not out
    assert sorted(Path().rglob("*")) == before, "nothing is written"


def test_errors_outside_of_the_table(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("negtome.recipe.EMBEDDED", ("models/gone",))
        assert main(["generate", "x"]) == 2
        assert "name a folder in the diffusers layout" in capsys.readouterr().err
    Path("models").mkdir()
    assert main(["generate", "x", "--model", "models/nope"]) == 2
    assert capsys.readouterr().err == "generate: no folder models/nope\n"
    with monkeypatch.context() as patch:
        patch.setattr(negtome.generate, "recipe_from_args", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["generate", "x"]) == 130
        assert capsys.readouterr().err == "\ngenerate: interrupted\n"
    monkeypatch.setenv("NEGTOME_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a prompt is missing"):
        main(["generate"])


@pytest.mark.parametrize(("text", "ends"), [("0:0", (0, 0)), ("0:0.25", (0.0, 0.25)), ("auto", None)])
def test_a_step_range_is_of_steps_or_of_shares(text, ends):
    parsed = negtome.__main__._parser().parse_args(["x", "--step-range", text])
    assert repr(vars(parsed)["config.step_range"]) == repr(ends)


def test_the_former_name_of_the_timestep_range_warns(capsys):
    parser = negtome.__main__._parser()
    old, new = (parser.parse_args(["x", name, "850:1000"]) for name in ("--timesteps", "--timestep-range"))
    assert old == new and vars(new)["config.timestep_range"] == (850, 1000)
    assert capsys.readouterr().err == "warning: --timesteps is called --timestep-range now\n"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_names_the_options_to_change(error, model, monkeypatch, capsys):
    def full(pipe, recipe):
        raise error

    monkeypatch.setattr(negtome.generate, "generate", full)
    assert main(["generate", "x", "--model", model]) == 2
    assert "--low-memory" in capsys.readouterr().err


def test_the_library_alone_has_a_doctor_and_says_where_the_demo_is(monkeypatch, capsys):
    monkeypatch.setattr(negtome.__main__.importlib.util, "find_spec", lambda name: None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in out and "device " in out
    assert f"models/mini-sdxl: at {ROOT}/models/mini-sdxl" in out
    for words in (["demo"], ["doctor", "sdxl"]):
        assert main(words) == 2
        assert "git clone" in capsys.readouterr().err


def test_the_checkout_is_handed_over_to(monkeypatch):
    pytest.importorskip("omegaconf", reason="the experiments need their packages")
    import experiments.__main__

    handed = []
    monkeypatch.setattr(experiments.__main__, "main", lambda argv, typed: handed.append((argv, typed)) or 3)
    assert main(["demo", "--port", "1"]) == main(["doctor", "pixel"]) == 3
    assert main(["generate", "a cat", "--method", "cads"]) == 3
    assert handed == [
        (["demo", "--port", "1"], None),
        (["doctor", "pixel"], None),
        (["try", "a cat", "--method", "cads"], "generate --method"),
    ]
