"""Gather what a finished (or interrupted) training leaves into a few small tar files, for moving off a GPU machine."""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PARTS = {
    "unet": ("unet/model", "unet/card.json", "unet.log"),
    "flux": ("flux/model", "flux/card.json", "flux/first.json", "flux.log"),
    "text": (
        "text_encoder",
        "text_encoder_2",
        "text/card.json",
        "text.log",
        "flux/text_encoder_2",
        "tokenizer",
        "tokenizer_2",
    ),
    "rest": (
        "decoder/model",
        "decoder/card.json",
        "decoder.log",
        "vae/card.json",
        "vae.log",
        "score/model",
        "score/card.json",
        "score.log",
    ),
    "stage1": ("flux/stage1",),
}
_INSTEAD = {"flux/model": ("flux/stage1",), "decoder/model": ("vae/model", "vae/checkpoint")}


def halve(folder: Path) -> None:
    """Rewrite a model folder's weights in half precision."""
    for path in folder.glob("*.safetensors"):
        state = {k: v.half() if v.dtype == torch.float32 else v for k, v in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})


def pack(work: Path, out: Path) -> None:
    """Write one tar file for each part that exists."""
    out.mkdir(parents=True, exist_ok=True)
    for part, names in PARTS.items():
        with tarfile.open(out / f"{part}.tar", "w") as tar:
            for name in names:
                path = next((work / n for n in (name, *_INSTEAD.get(name, ())) if (work / n).exists()), None)
                if path is None:
                    print(f"missing: {name}", flush=True)
                    continue
                if path.is_dir():
                    halve(path)
                tar.add(path, path.relative_to(work).as_posix())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tar the results of a training")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    pack(args.work, args.out)


if __name__ == "__main__":
    main()
