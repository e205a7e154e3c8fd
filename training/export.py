"""Assemble trained stages into stock pipeline folders with model cards: `models/mini-sdxl`, `mini-flux`, `mini-clip`.

Weights are stored in half precision. The text encoders' configs say float32 all the same: transformers loads in the
config's type, diffusers in float32, and a pipeline of mixed types fails.
"""

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

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

from experiments.plan import expand
from experiments.runs.checkpoints import call_arguments
from negtome import NegToMeConfig
from negtome.recipe import FILE, ModelDefaults
from training import clip, flux, unet
from training.cards import write_cards

SHARED = ("vae", "text_encoder", "tokenizer")  # parts of mini-flux that are links into mini-sdxl


def _finish_config(path: Path, **changes: object) -> None:
    """Change entries of a config.json; an entry set to None is removed."""
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def export(work: Path, models: Path) -> None:
    """Write the three folders from a work folder; replaces what is there.

    Args:
        work: of `training.train`; a stage that died is represented by its last checkpoint.
        models: where `mini-sdxl`, `mini-flux` and `mini-clip` go.
    """

    def found(*names: str) -> Path:
        for name in names:
            if (work / name).exists():
                return work / name
        raise ValueError(f"expected one of {', '.join(names)} in {work}, got none; train that stage first")

    sdxl, fluxes, score = models / "mini-sdxl", models / "mini-flux", models / "mini-clip"
    for folder in (sdxl, fluxes, score):
        if folder.exists():
            shutil.rmtree(folder)
    one = CLIPTextModel.from_pretrained(found("text_encoder"))
    two = CLIPTextModelWithProjection.from_pretrained(found("text_encoder_2"))
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    vae = AutoencoderKL.from_pretrained(found("decoder/model", "vae/model"))
    StableDiffusionXLPipeline(
        vae=vae.half(),
        text_encoder=one.half(),
        text_encoder_2=two.half(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(found("unet/model", "unet/start")).half(),
        scheduler=unet.make_scheduler(),
        add_watermarker=False,
    ).save_pretrained(sdxl)
    FluxPipeline(
        scheduler=flux.make_scheduler(),
        vae=vae,
        text_encoder=one,
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel.from_pretrained(found("flux/text_encoder_2")).half(),
        tokenizer_2=T5Tokenizer.from_pretrained(work / "tokenizer_2"),
        transformer=FluxTransformer2DModel.from_pretrained(found("flux/model", "flux/stage1")).half(),
    ).save_pretrained(fluxes)
    CLIPModel.from_pretrained(found("score/model")).half().save_pretrained(score)
    tokenizer.save_pretrained(score)
    clip.write_preprocessor(score)

    for folder in (sdxl / "text_encoder", sdxl / "text_encoder_2", fluxes / "text_encoder_2", score):
        _finish_config(folder / "config.json", dtype="float32", torch_dtype=None)
    for folder in (sdxl / "unet", sdxl / "vae", fluxes / "transformer"):
        _finish_config(folder / "config.json", _name_or_path=None)
    for path in models.rglob("tokenizer*.json"):
        if not path.is_symlink():
            path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")) + "\n")
    for path in score.glob("tokenizer*.json"):
        path.unlink()
        os.symlink(Path("..") / "mini-sdxl" / "tokenizer" / path.name, path)
    for name in SHARED:
        shutil.rmtree(fluxes / name)
        os.symlink(Path("..") / "mini-sdxl" / name, fluxes / name)
    shutil.rmtree(sdxl / "tokenizer_2")
    os.symlink("tokenizer", sdxl / "tokenizer_2")
    for folder in (sdxl, fluxes):
        (folder / FILE).write_text(choices(folder.name).to_json())
    notes = Path(__file__).with_name("NOTES.md")
    write_cards(work, models, notes.read_text() if notes.exists() else "")


def choices(name: str) -> ModelDefaults:
    """Return what conf/ chose for a model: its calls, and the settings among images and away from a picture."""
    found = []
    for method in ("negtome", "negtome_reference"):
        (cfg,) = expand([f"model={name}", f"method={method}"])
        given = {field.name: cfg.method.get(field.name) for field in dataclasses.fields(NegToMeConfig)}
        found.append(NegToMeConfig(**{field: value for field, value in given.items() if value is not None}))
    return ModelDefaults(call_arguments(cfg.model), *found)


def size_of(folder: Path) -> int:
    """Bytes of all regular files below a folder; links count nothing."""
    return sum(
        p.stat().st_size
        for p in folder.rglob("*")
        if p.is_file() and not p.is_symlink() and not any(q.is_symlink() for q in p.parents)
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Assemble the trained small models")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("models"))
    args = parser.parse_args(argv)
    export(args.work, args.models)
    print(f"{args.models}: {size_of(args.models) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
