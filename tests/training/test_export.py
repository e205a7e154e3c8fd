"""Export of the small models: a work folder of untrained stages becomes folders that the stock classes load."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from transformers import CLIPModel

from experiments import PROJECT
from negtome.recipe import ModelDefaults
from training import clip, data, export, flux, samples, sources, taxonomy, tokenizer, unet, vae

pytestmark = pytest.mark.slow  # they make and store the models at the size that they are published in


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three folders, exported from untrained models of the real architectures."""
    torch.manual_seed(0)
    work = tmp_path_factory.mktemp("work")
    with pytest.raises(ValueError, match="train that stage first"):
        export.export(work, work / "models")
    tokenizer.build([f"{t} {c}" for t in taxonomy.TEMPLATES for c in taxonomy.EVALUATED], work)
    tokens = torch.load(work / "tokens.pt")
    first, second = (clip.make_model(tokens["clip_size"], 32, 1) for _ in range(2))
    for model, name in zip(clip.text_encoders(first, second), ("text_encoder", "text_encoder_2"), strict=True):
        model.save_pretrained(work / name)
    first.save_pretrained(work / "score" / "model")
    vae.make_model().save_pretrained(work / "vae" / "model")
    unet.make_model().save_pretrained(work / "unet" / "model")
    flux.make_model().save_pretrained(work / "flux" / "model")
    flux.make_text_encoder(tokens["t5_size"]).save_pretrained(work / "flux" / "text_encoder_2")
    (work / "data").mkdir()
    item = sources.Emoji("noto", "dog", "dog", "dog", "animals-nature", "animal-mammal", None, None)
    stats = data.statistics([item]) | {"captions": 1}
    (work / "data" / "table.json").write_text(json.dumps({"statistics": stats, "emoji": [asdict(item)]}))
    record = {"steps": 10, "batch": 4, "seconds": 1.5, "device": "CPU", "last": {"step": 10, "loss": 0.5}}
    (work / "unet" / "card.json").write_text(json.dumps(record))
    out = tmp_path_factory.mktemp("models")
    export.export(work, out)
    return out


def test_stock_pipelines_load_in_float32_what_is_stored_in_halves_and_draw(models: Path) -> None:
    for name, kind in (("mini-sdxl", StableDiffusionXLPipeline), ("mini-flux", FluxPipeline)):
        pipe = kind.from_pretrained(models / name)
        networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        assert {parameter.dtype for network in networks for parameter in network.parameters()} == {torch.float32}
        pipe.set_progress_bar_config(disable=True)
        image = pipe("a photo of a bird", **samples.SETTINGS[name] | {"num_inference_steps": 1}).images[0]
        assert image.size == (128, 128)
    assert next(CLIPModel.from_pretrained(models / "mini-clip").parameters()).dtype == torch.float32
    stored = load_file(models / "mini-sdxl" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.float16}


def test_folders_share_parts_by_links_and_tell_their_settings_and_training(models: Path) -> None:
    for name in export.SHARED:
        link = models / "mini-flux" / name
        assert link.is_symlink() and not link.readlink().is_absolute() and link.resolve().is_dir()
    for name in ("mini-sdxl", "mini-flux"):
        shipped = (PROJECT / "models" / name / "negtome.json").read_text()
        assert (models / name / "negtome.json").read_text() == shipped
    assert ModelDefaults.of(str(models / "mini-sdxl")).reference.alpha == 1.35
    card = (models / "mini-sdxl" / "README.md").read_text()
    assert "CC-BY-4.0" in card and "UNet: 10 steps of 4 in 2 s on CPU; last loss 0.5" in card
