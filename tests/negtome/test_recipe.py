"""A recipe refuses what is wrong, stays itself however it is written down, and makes what its script makes."""

import dataclasses
import inspect
import json
import re
import shlex
from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

import negtome
from negtome import NegToMeConfig, image_files
from negtome.__main__ import _parser
from negtome.generate import generate, load, recipe_from_args, truncated_prompts
from negtome.recipe import DTYPES, FILE, ModelDefaults, Recipe

ALL = {"threshold": -1, "timestep_range": (0, 1000), "min_side": 4}
SMALL = {"steps": 2, "height": 32, "width": 32, "images": 2}

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
names = st.from_regex(r"[a-z]{1,4}_blocks(\.[0-9])?", fullmatch=True)
numbers = st.floats(-100, 100)
#: A repository, of which nothing is known here, and a folder that chooses: made once, below.
models = st.sampled_from(["owner/name", "-x", "FOLDER"])


share = st.floats(0, 1)
steps = (
    st.none()
    | st.lists(st.integers(0, 999), min_size=2, max_size=2).map(sorted)
    | st.lists(share, min_size=2, max_size=2, unique=True).map(sorted).filter(lambda ends: ends != [0, 1])
)


@st.composite
def recipes(draw):
    """Draw anything that a recipe may be."""
    window = draw(st.none() | st.tuples(st.floats(0, 1000), st.floats(2, 1000)).map(sorted))
    matching = draw(st.sampled_from(["paper", "released"]))
    config = NegToMeConfig(
        alpha=draw(numbers),
        threshold=draw(st.none() | st.floats(-1, 1)),
        timestep_range=window,
        step_range=draw(steps) if window is None else None,
        matching=matching,
        reference="first" if matching == "released" else draw(st.sampled_from(["first", "previous", "others"])),
        sites=draw(st.none() | st.lists(names, min_size=1, max_size=2)),
        cross_attention=draw(st.booleans()),
        min_side=draw(st.none() | st.integers(1, 64)),
    )
    side = st.integers(1, 200).map(lambda n: 8 * n)
    height, width = draw(st.just((None, None)) | st.tuples(side, side))
    values = st.recursive(st.none() | st.booleans() | st.integers() | numbers | texts, st.lists, max_leaves=3)
    options = st.dictionaries(st.sampled_from(["eta", "max_sequence_length", "sigmas"]), values)
    fields = {
        "model": draw(models), "prompt": draw(texts.filter(str.strip)), "negative_prompt": draw(st.none() | texts),
        "images": draw(st.integers(2, 9)), "seed": draw(st.integers(0, 2**40)),
        "steps": draw(st.none() | st.integers(1, 100)), "guidance_scale": draw(st.none() | st.floats(0, 100)),
        "height": height, "width": width, "options": draw(options), "dtype": draw(st.sampled_from(DTYPES)),
        "variant": draw(st.sampled_from([None, "fp16", "non_ema", "-x"])),
    }  # fmt: skip
    if draw(st.booleans()):
        return Recipe(**fields, config=None)
    reference = draw(st.none() | texts.filter(bool))
    mask = None if reference is None else draw(st.none() | texts.filter(bool))
    return Recipe(**fields, config=config, reference=reference, mask=mask)


@pytest.fixture(scope="module")
def choosing(tmp_path_factory):
    """A folder that says how its model is used best."""
    folder = tmp_path_factory.mktemp("model")
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 64, "width": 32, "max_sequence_length": 8}
    group, reference = NegToMeConfig(alpha=0.5, sites=["up_blocks"]), NegToMeConfig(alpha=2, threshold=0.1)
    (folder / FILE).write_text(ModelDefaults(call, group, reference).to_json())
    return folder


PARSER = _parser()


@settings(deadline=None, max_examples=40)
@given(recipes())
def test_it_is_the_same_after_json_and_after_a_command_line(choosing, recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    if recipe.model == "FOLDER":
        recipe = recipe.replace(model=str(choosing))
    program, command, *words = shlex.split(recipe.command())
    assert (program, command) == ("negtome", "generate")
    assert recipe_from_args(PARSER.parse_args(words)) == recipe


@settings(deadline=None, max_examples=15)
@given(recipes())
def test_the_script_holds_the_recipes_values(recipe):
    calls = []

    class Pipe:
        def __call__(self, **call):
            calls.append(call)
            return self

        images = ()

    scope = {}
    text = recipe.python().replace("DiffusionPipeline.from_pretrained(", "made(")
    for heavy in ("import torch", "import negtome", "from diffusers import DiffusionPipeline"):
        text = text.replace(heavy, "")
    attached = type("A", (), {"__enter__": lambda s: s, "__exit__": lambda *_: None, "summary": lambda s: None})()
    seen = {}
    library = type("N", (), {
        "NegToMeConfig": NegToMeConfig, "Reference": staticmethod(lambda *a, **k: (a, k)),
        "attach": staticmethod(lambda pipe, config, references=None: seen.update(config=config) or attached),
    })  # fmt: skip
    scope = {"made": lambda *a, **k: seen.update(model=a, dtype=k) or Pipe(), "torch": torch, "negtome": library}
    exec(compile(text, "script", "exec"), {**scope, "print": lambda *_: None})
    variant = {} if recipe.variant is None else {"variant": recipe.variant}
    assert seen["model"] == (recipe.model,)
    assert seen["dtype"] == {"use_safetensors": True, "torch_dtype": getattr(torch, recipe.dtype), **variant}
    for call in calls:
        assert [one.initial_seed() for one in call.pop("generator")] == [*recipe.seeds()]
        assert call == recipe.arguments()
    assert len(calls) == (1 if recipe.config is None else 2) and seen.get("config") == recipe.config


def test_unset_fields_come_from_the_folder(choosing):
    recipe = Recipe.of("a dog", str(choosing))
    assert recipe.arguments() == {
        "prompt": "a dog", "num_images_per_prompt": 4, "num_inference_steps": 3, "guidance_scale": 2.0,
        "height": 64, "width": 32, "max_sequence_length": 8,
    }  # fmt: skip
    assert recipe.config == NegToMeConfig(alpha=0.5, sites=["up_blocks"])
    assert Recipe.of("a dog", str(choosing), reference="dog.png").config == NegToMeConfig(alpha=2, threshold=0.1)
    assert (
        Recipe.of("a dog", str(choosing), steps=None, options={})
        .arguments()
        .keys()
        .isdisjoint({"num_inference_steps", "max_sequence_length"})
    )
    assert Recipe.of("a dog", "owner/name") == Recipe("owner/name", "a dog"), "nothing is known of it"


@pytest.mark.parametrize("text", ["[]", "{", '{"call": {}}', '{"call": {}, "group": {"beta": 1}, "reference": {}}'])
def test_bad_model_defaults_are_refused(text, tmp_path):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match="must be JSON with call, group and reference"):
        Recipe.of("a dog", str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "prompt must not be empty"),
        ({"prompt": "a\0"}, "whole characters"),
        ({"negative_prompt": "\ud800"}, "whole characters"),
        ({"model": ""}, "model must not be empty"),
        ({"images": 1}, "images must be at least 2 without a reference image, got 1"),
        ({"images": 257}, "images must be a whole number from 1 to 256, got 257; make more by further runs"),
        ({"steps": 10**9}, "steps must be a whole number from 1 to 1000"),
        ({"height": 8, "width": 8200}, "width must be a whole number from 8 to 8192"),
        ({"variant": "a/b"}, "name of a variant"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a finite number"),
        ({"height": 64}, "height and width must be set together"),
        ({"height": 64, "width": 60}, "width must be a multiple of 8"),
        ({"options": {"prompt": "x"}}, "sets itself, got prompt"),
        ({"options": {"eta": float("nan")}}, "JSON values"),
        ({"options": {"a b": 1}}, "options must map names of arguments"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"config": 0.9}, "config must be a NegToMeConfig or None, got a float"),
        ({"config": NegToMeConfig(sites=["auto"])}, "must not be auto alone, got"),
        ({"config": NegToMeConfig(sites=["up_blocks", "a,b"])}, "sites must have no commas"),
        ({"mask": "m.png"}, "mask needs a reference image"),
        ({"config": None, "reference": "r.png"}, "a reference image needs settings of NegToMe"),
    ],
)
def test_bad_values_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        Recipe(**{"model": "m", "prompt": "p", **changes})
    assert "\n" not in str(error.value)


def test_a_recipe_of_another_version_is_read():
    recipe = Recipe("m", "p", images=3, config=NegToMeConfig(alpha=0.5))
    document = recipe.to_dict()
    assert document["version"] == negtome.__version__
    older = {name: value for name, value in document.items() if name not in ("version", "variant")}
    assert Recipe.from_dict(document | {"version": "99.0"}) == Recipe.from_dict(older) == recipe
    for strange in (document | {"version": "99.0", "sneed": 1}, {"version": "99.0", "model": "m"}):
        with pytest.raises(ValueError, match=r"(?=.*'99\.0')(?=.*(sneed|lacks prompt))") as error:
            Recipe.from_dict(strange)
        assert negtome.__version__ in str(error.value)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.sampled_from(["m", "first", "fp16", "float32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)
fields = [one.name for one in dataclasses.fields(Recipe)]
settings_of = [one.name for one in dataclasses.fields(NegToMeConfig)]


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.sampled_from(fields), anything, max_size=3),
    st.dictionaries(st.sampled_from(settings_of), anything, max_size=2),
)
def test_any_json_is_a_recipe_or_a_value_error(changes, config):
    document = {"model": "m", "prompt": "p", "config": config, **changes}
    try:
        recipe = Recipe.from_dict(document)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def pixels(images):
    return [image.tobytes() for image in images]


@pytest.fixture
def reference(tmp_path):
    """Files of a picture and its mask."""
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(tmp_path / "r.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 0, 32, 32))
    mask.save(tmp_path / "m.png")
    return {"reference": str(tmp_path / "r.png"), "mask": str(tmp_path / "m.png")}


@pytest.mark.parametrize("given_picture", [False, True])
def test_the_script_makes_the_same_images(kind, given_picture, reference, tiny_checkpoint, tmp_path, monkeypatch):
    side = {"height": 16, "width": 16, "options": {"max_sequence_length": 32}} if kind == "flux" else {}
    fields = {**SMALL, **side, "config": NegToMeConfig(**ALL), **(reference if given_picture else {})}
    recipe = Recipe(str(tiny_checkpoint(kind)), "a 'dog'", seed=5, **fields)
    pipe = load(recipe)
    pipe.set_progress_bar_config(disable=True)
    pushed, without = generate(pipe, recipe), generate(pipe, recipe.without())
    assert pushed.attached.summary()["tokens_pushed"] > 0 and without.attached is None
    assert pixels(pushed.images) != pixels(without.images)

    monkeypatch.chdir(tmp_path)
    exec(compile(recipe.python(), "script", "exec"), {})
    for name, made in (("with", pushed), ("without", without)):
        assert pixels(Image.open(f"{name}-{i}.png") for i in range(2)) == pixels(made.images)

    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    call = {"num_inference_steps": 2, "height": recipe.height, "width": recipe.width, **recipe.options}
    stock = pipe("a 'dog'", num_images_per_prompt=2, generator=generators, **call).images
    assert pixels(stock) == pixels(without.images), "afterwards the pipeline is as before"


def test_arguments_that_a_pipeline_would_ignore_are_refused(tiny_flux, tiny_sdxl):
    recipe = Recipe("m", "a dog", config=None, options={"sigma": 1})
    with pytest.raises(ValueError, match="a StableDiffusionXLPipeline does not take sigma"):
        generate(tiny_sdxl, recipe)
    with pytest.raises(ValueError, match="unless true_cfg_scale is above 1"):
        generate(tiny_flux, recipe.replace(options={}, negative_prompt="a cat"))
    with pytest.raises(ValueError, match="24x24 pixels, but this Rounding makes 16x16"):
        generate(_rounding(tiny_sdxl), recipe.replace(options={}, height=24, width=24, steps=1))


def _rounding(pipe):
    """Return a pipeline that makes the next multiple of 16 of the size asked for, as Flux does."""

    class Rounding(type(pipe)):
        def __call__(self, *args, height, width, **options):
            return super().__call__(*args, height=height // 16 * 16, width=width // 16 * 16, **options)

        __call__.__signature__ = inspect.signature(type(pipe).__call__)

    pipe.__class__ = Rounding
    return pipe


@settings(deadline=None, max_examples=10)
@given(recipes())
def test_an_image_keeps_its_recipe(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "said.png"
    image = Image.linear_gradient("L").convert("RGB")
    image_files.save(image, path, recipe)
    assert image_files.read(path) == recipe
    assert Image.open(path).tobytes() == image.tobytes()


characters = st.sampled_from("il mMW 漢字かな\u0301😀")


@settings(deadline=None, max_examples=40)
@given(st.text(characters, max_size=80), st.integers(60, 200))
def test_wrapped_lines_hold_the_text_and_fit(text, width):
    lines = image_files.wrap(text, ImageFont.load_default(size=12), width)
    assert len(lines) <= image_files.LINES
    assert all(ImageFont.load_default(size=12).getlength(line) <= width for line in lines)
    if not lines[-1].endswith("..."):
        assert "".join("".join(lines).split()) == "".join(text.split())


def test_an_image_grid_shows_every_image_unscaled_and_cuts_an_endless_prompt():
    red, blue = (Image.new("RGB", (40, 24), colour) for colour in ("red", "blue"))
    rows = [("first", [red, blue]), ("second", [blue, red])]
    grids = [
        image_files.image_grid(text * length, rows, "x" * 400) for text in ("犬", "dog ") for length in (10**4, 10**6)
    ]
    for grid in grids:
        counts = {colour: count for count, colour in grid.getcolors(1 << 16)}
        assert counts[255, 0, 0] == counts[0, 0, 255] == 2 * 40 * 24
    assert grids[0].tobytes() == grids[1].tobytes() and grids[2].tobytes() == grids[3].tobytes()
    assert grids[0].height < 1000


def test_truncation_warnings_agree_with_diffusers(kind, tiny_checkpoint, caplog):
    """By its own log, of which it is silent where the command runs."""
    flux = kind == "flux"
    options = {"max_sequence_length": 32} if flux else {}
    recipe = Recipe(
        str(tiny_checkpoint(kind)), "x", config=None, images=1, steps=1, height=16, width=16, options=options
    )
    pipe = load(recipe)
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_warning()
    diffusers.utils.logging.enable_propagation()
    try:
        for length in (30, 31, 75, 76):
            caplog.clear()
            prompt = "x" * length
            (message,) = truncated_prompts(pipe, recipe.replace(prompt=prompt).arguments()) or [""]
            pipe.encode_prompt(prompt, prompt, **options)
            logged = [record.message for record in caplog.records if "truncated" in record.message]
            cut = {int(re.search(r"(\d+) tokens", line)[1]) for line in logged}
            assert {int(most) for most in re.findall(r"reads (\d+) of", message)} == cut
            assert cut == {most for most in (77, 32 if flux else 77) if length + 2 > most}
    finally:
        diffusers.utils.logging.disable_propagation()
        diffusers.utils.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("name", ["mini-sdxl", "mini-flux"])
def test_the_embedded_models_make_images_of_their_size(name):
    folder = Path(__file__).parents[2] / "models" / name
    recipe = Recipe.of("a photo of a dog", str(folder), images=2)
    assert (recipe.height, recipe.width, recipe.steps, recipe.guidance_scale) == (128, 128, 20, 5.0)
    pipe = load(recipe)
    pipe.set_progress_bar_config(disable=True)
    made = generate(pipe, recipe.replace(steps=3))
    assert made.images[0].size == (128, 128) and made.attached.summary()["tokens_pushed"] > 0
