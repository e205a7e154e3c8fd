"""Assemble trained stages into stock pipeline folders with model cards: `models/mini-sdxl`, `mini-flux`, `mini-clip`.

Weights are stored in half precision. The text encoders' configs say float32 all the same: transformers loads in the
config's type, diffusers in float32, and a pipeline of mixed types fails.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from experiments.compose import expand
from experiments.runs.checkpoints import call_arguments
from experiments.tables.templates import render
from negtome import NegToMeConfig
from negtome.recipe import FILE, ModelDefaults
from training import clip, data, flux, taxonomy, unet

#: Parts of mini-flux that are links into mini-sdxl.
SHARED = ("vae", "text_encoder", "tokenizer")
#: Stages whose records stand in the cards.
STAGES = ("text", "vae", "decoder", "unet", "score", "flux", "distil")


def _finish_config(path: Path, **changes: object) -> None:
    """Change entries of a config.json; an entry set to None is removed."""
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _finish_files(sdxl: Path, fluxes: Path, score: Path) -> None:
    """Write the configs' types, compact the tokenizers, and replace shared parts by links."""
    for folder in (sdxl / "text_encoder", sdxl / "text_encoder_2", fluxes / "text_encoder_2", score):
        _finish_config(folder / "config.json", dtype="float32", torch_dtype=None)
    for folder in (sdxl / "unet", sdxl / "vae", fluxes / "transformer"):
        _finish_config(folder / "config.json", _name_or_path=None)
    for path in (path for folder in (sdxl, fluxes, score) for path in folder.rglob("tokenizer*.json")):
        path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")) + "\n")
    for path in score.glob("tokenizer*.json"):
        path.unlink()
        path.symlink_to(Path("..") / "mini-sdxl" / "tokenizer" / path.name)
    for name in SHARED:
        shutil.rmtree(fluxes / name)
        (fluxes / name).symlink_to(Path("..") / "mini-sdxl" / name)
    shutil.rmtree(sdxl / "tokenizer_2")
    (sdxl / "tokenizer_2").symlink_to("tokenizer")


def export(work: Path, models: Path) -> None:
    """Write the three folders from a work folder; replaces earlier ones.

    Args:
        work: of `training.train`; a stage that died is represented by its last checkpoint.
        models: where `mini-sdxl`, `mini-flux` and `mini-clip` go.

    Raises:
        ValueError: a stage has left nothing.
    """

    def first_of(*names: str) -> Path:
        for name in names:
            if (work / name).exists():
                return work / name
        raise ValueError(f"expected one of {', '.join(names)} in {work}, got none; train that stage first")

    sdxl, fluxes, score = models / "mini-sdxl", models / "mini-flux", models / "mini-clip"
    for folder in (sdxl, fluxes, score):
        if folder.exists():
            shutil.rmtree(folder)
    one = CLIPTextModel.from_pretrained(first_of("text_encoder"))
    two = CLIPTextModelWithProjection.from_pretrained(first_of("text_encoder_2"))
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    vae = AutoencoderKL.from_pretrained(first_of("decoder/model", "vae/model"))
    StableDiffusionXLPipeline(
        vae=vae.half(),
        text_encoder=one.half(),
        text_encoder_2=two.half(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(first_of("unet/model", "unet/start")).half(),
        scheduler=unet.make_scheduler(),
        add_watermarker=False,
    ).save_pretrained(sdxl)
    FluxPipeline(
        scheduler=flux.make_scheduler(),
        vae=vae,
        text_encoder=one,
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel.from_pretrained(first_of("flux/text_encoder_2")).half(),
        tokenizer_2=T5Tokenizer.from_pretrained(work / "tokenizer_2"),
        transformer=FluxTransformer2DModel.from_pretrained(first_of("flux/model", "flux/stage1")).half(),
    ).save_pretrained(fluxes)
    CLIPModel.from_pretrained(first_of("score/model")).half().save_pretrained(score)
    tokenizer.save_pretrained(score)
    clip.write_preprocessor(score)

    _finish_files(sdxl, fluxes, score)
    for folder in (sdxl, fluxes):
        (folder / FILE).write_text(choices(folder.name).to_json())
    write_cards(work, models)


def write_cards(work: Path, models: Path) -> None:
    """Write a README.md into each of the three folders, with the statistics and records of a work folder."""

    def read(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text()) if path.exists() else {}

    _, statistics = data.load_table(work / "data")
    cards = {stage: read(work / stage / "card.json") for stage in STAGES}
    cards["score"].setdefault("quality", {})
    facts = {
        "statistics": statistics,
        # the evaluation CLIP may come from a work folder of its own, whose table then lies beside it
        "scored": read(work / "score" / "table.json").get("statistics", statistics),
        "cards": cards,
        "quality": cards["decoder"].get("quality") or cards["vae"].get("quality"),
        "categories": len(taxonomy.EVALUATED) + len(taxonomy.DEVELOPMENT),
        "notes": Path(__file__).with_name("NOTES.md").read_text(),
    }
    for name in ("mini-sdxl", "mini-flux", "mini-clip"):
        (models / name / "README.md").write_text(render(f"training/cards/{name}.md.j2", **facts))


def choices(name: str) -> ModelDefaults:
    """Return the settings that conf/ has for a model: of its calls, among images and away from a reference image."""
    configs = []
    for method in ("negtome", "negtome_reference"):
        (cfg,) = expand([f"model={name}", f"method={method}"])
        values = {field.name: cfg.method.get(field.name) for field in dataclasses.fields(NegToMeConfig)}
        configs.append(NegToMeConfig(**{field: value for field, value in values.items() if value is not None}))
    return ModelDefaults(call_arguments(cfg.model), *configs)
