"""Train all the small models on one device: `python -m training.train --minutes 17 --out DIR`.

Every stage is a process of its own. Models this small leave much of a GPU idle between kernels, so stages run at the
same time: while the denoisers compile, the text encoders, the scoring CLIP and the autoencoder are trained; then both
denoisers, with the refinement of the decoder in the gaps. A stage that dies is reported at once; the others go on.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from training import clip, data, flux, tokenizer, unet, vae
from training.loop import Setting

STAGES = {
    "text": clip.train_text,
    "score": clip.train_score,
    "vae": vae.train,
    "decoder": vae.refine_decoder,
    "unet": unet.train,
    "flux": flux.train,
    "distil": flux.distil,
}
# Shares of the whole time at which each stage must end. The denoisers start when their inputs exist.
ENDS = {"text": 0.215, "score": 0.3, "vae": 0.25, "decoder": 0.95, "unet": 0.975, "flux": 0.72, "distil": 0.975}
DUTY = {"decoder": 0.25}  # share of the time that a background stage may keep the device busy


def start_stage(name: str, args: argparse.Namespace, started: float) -> subprocess.Popen:
    """Start the process of a stage, logging to `work/<name>.log`."""
    deadline = started + ENDS[name] * args.minutes * 60
    options = {"stage": name, "deadline": deadline}
    options |= {option: getattr(args, option) for option in ("out", "device", "lr", "steps", "batch")}
    command = [sys.executable, "-m", "training.train"]
    command += [f"--{option}={value}" for option, value in options.items() if value is not None]
    command += [f"--{flag}" for flag in ("bf16", "compile") if getattr(args, flag)]
    with (args.out / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def orchestrate(args: argparse.Namespace) -> int:
    """Prepare the data, start the stages, watch them. Returns the number of stages that failed."""
    started, work, documents = time.time(), args.out, None

    def say(text: str) -> None:
        print(f"[{time.time() - started:.0f} s] {text}", flush=True)

    work.mkdir(parents=True, exist_ok=True)
    if not (work / "data" / "images.npy").exists():
        documents = data.describe(work / "data", args.npm)
        tokenizer.build(json.loads((work / "data" / "captions.json").read_text()), work)
        say(f"{len(documents)} images described")
    running = {name: start_stage(name, args, started) for name in STAGES}
    if documents:  # after the start of the stages, which wait for the pictures and compile meanwhile
        data.paint(work / "data", documents)
        say("images painted")
    failed = []
    while running:
        for name, code in [(name, process.poll()) for name, process in running.items()]:
            if code is None:
                continue
            del running[name]
            say(f"{name} ended" if code == 0 else f"{name} DIED with {code}")
            if code:
                failed.append(name)
                print("\n".join((work / f"{name}.log").read_text().splitlines()[-25:]), flush=True)
        time.sleep(0.5)
    say(f"all ended; failed: {', '.join(failed) or 'none'}")
    return len(failed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the small embedded models")
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--minutes", type=float, default=17.0, help="time for everything, the data included")
    parser.add_argument("--npm", type=Path, default=Path(".npm"), help="folder of the npm tarballs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stage", choices=STAGES, help="run one stage in this process")
    parser.add_argument("--deadline", type=float, default=0.0, help="Unix time at which the stage must end")
    parser.add_argument("--lr", type=float, default=1.0, help="factor of the denoisers' learning rates")
    parser.add_argument("--bf16", action="store_true", help="bf16 on the CPU too")
    parser.add_argument("--compile", action="store_true", help="compile on the CPU too")
    parser.add_argument("--steps", type=int, help="limit of each stage's steps, for trying out")
    parser.add_argument("--batch", type=int, help="batch size of each stage")
    args = parser.parse_args(argv)
    if not args.stage:
        return orchestrate(args)
    STAGES[args.stage](
        Setting(
            work=args.out,
            deadline=args.deadline,
            steps=args.steps,
            batch=args.batch,
            device=args.device,
            duty=DUTY.get(args.stage, 1.0),
            lr=args.lr,
            half=args.bf16,
            compile=args.compile,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
