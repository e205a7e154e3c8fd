"""Continue from earlier models instead of nothing: lay out a work folder from finished pipeline folders.

    python -m training.resume --models EARLIER --out DIR --limit 4400
    python -m training.train --stage unet --out DIR --deadline ... (and flux)

The tokenizers, text encoders and autoencoder of the earlier models stay as they are. Captions are encoded with the
earlier tokenizers, latents with the earlier autoencoder.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer, T5Tokenizer

from eval.files import write_json
from training import data, tokenizer
from training.loop import Images, Setting, prepare
from training.vae import encode_all

COPIES = {
    "mini-sdxl/tokenizer": "tokenizer",
    "mini-sdxl/text_encoder": "text_encoder",
    "mini-sdxl/text_encoder_2": "text_encoder_2",
    "mini-sdxl/vae": "vae/model",
    "mini-sdxl/unet": "unet/start",
    "mini-flux/tokenizer_2": "tokenizer_2",
    "mini-flux/transformer": "flux/start/transformer",
    "mini-flux/text_encoder_2": "flux/start/text_encoder_2",
    "mini-clip": "score/model",
}


def lay_out(models: Path, work: Path) -> None:
    """Copy the parts of the earlier models to where the stages would have left or will look for them."""
    for source, target in COPIES.items():
        if not (models / source).exists():
            raise ValueError(f"expected a folder {models / source}, got none; give the folder of three earlier models")
        shutil.copytree(models / source, work / target, dirs_exist_ok=True)


def encode(setting: Setting) -> None:
    """Token ids of the captions and latents of the images, with the earlier tokenizers and autoencoder."""
    work = setting.work
    captions = json.loads((work / "data" / "captions.json").read_text())
    bpe, words = CLIPTokenizer.from_pretrained(work / "tokenizer"), T5Tokenizer.from_pretrained(work / "tokenizer_2")
    tokenizer.save_ids(bpe, words, captions, work)
    model = AutoencoderKL.from_pretrained(work / "vae" / "model").to(setting.device).eval()
    torch.save(encode_all(model, Images(work / "data", setting.device), setting), work / "vae" / "latents.pt")
    write_json(work / "text" / "card.json", {"source": "earlier"})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prepare a work folder that continues from earlier models")
    parser.add_argument("--models", type=Path, required=True, help="folder with mini-sdxl, mini-flux and mini-clip")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--npm", type=Path, default=Path(".npm"))
    parser.add_argument("--limit", type=int, default=None, help="keep so many images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args(argv)
    lay_out(args.models, args.out)
    data.paint(args.out / "data", data.describe(args.out / "data", args.npm, 400_000, args.limit))
    setting = Setting(work=args.out, deadline=0.0, device=args.device, half=args.bf16)
    prepare(setting, 0)
    encode(setting)


if __name__ == "__main__":
    main()
