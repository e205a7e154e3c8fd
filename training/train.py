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

from training import data

# Shares of the whole time at which each stage must end. The denoisers start when their inputs exist.
ENDS = {"text": 0.215, "score": 0.3, "vae": 0.25, "decoder": 0.95, "unet": 0.975, "flux": 0.72, "distil": 0.975}
DUTY = {"decoder": 0.25}  # share of the time that a background stage may keep the device busy
SMOKE_STEPS = {"cpu": 3, "cuda": 12}


def run_stage(args: argparse.Namespace) -> None:
    """Run one stage in this process."""
    from training import clip, flux, unet, vae
    from training.loop import Setting

    setting = Setting(
        work=args.out,
        deadline=args.deadline,
        steps=args.steps,
        batch=args.batch,
        device=args.device,
        duty=DUTY.get(args.stage, 1.0),
        lr=args.lr,
        half=args.bf16,
        compile=args.compile,
        cooldown=args.cooldown,
    )
    if args.stage == "vae" and args.vae:
        vae.adopt(setting, args.vae)
    else:
        {
            "text": clip.train_text,
            "score": clip.train_score,
            "vae": vae.train,
            "decoder": vae.refine_decoder,
            "unet": unet.train,
            "flux": flux.train,
            "distil": flux.distil,
        }[args.stage](setting)


def start_stage(name: str, args: argparse.Namespace, started: float) -> subprocess.Popen:
    """Start the process of a stage, logging to `work/<name>.log`."""
    deadline = started + ENDS[name] * args.minutes * 60
    command = [
        sys.executable,
        "-m",
        "training.train",
        "--stage",
        name,
        "--out",
        str(args.out),
        "--device",
        args.device,
        "--deadline",
        str(deadline),
    ]
    if args.vae:
        command += ["--vae", str(args.vae)]
    if args.smoke:
        command += ["--steps", str(SMOKE_STEPS[args.device])] + (["--batch", "6"] if args.device == "cpu" else [])
    with (args.out / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def orchestrate(args: argparse.Namespace) -> int:
    """Prepare the data, start the stages, watch them. Returns the number of stages that failed."""
    from training import tokenizer

    started = time.time()
    work: Path = args.out
    work.mkdir(parents=True, exist_ok=True)
    documents = None
    if not (work / "data" / "images.npy").exists():
        rows, limit = (4000, 300) if args.smoke and args.device == "cpu" else (400_000, None)
        documents = data.describe(work / "data", args.npm, rows, limit)
        tokenizer.build(json.loads((work / "data" / "captions.json").read_text()), work)
        print(f"[{time.time() - started:.0f} s] {len(documents)} images described", flush=True)
    waiting = list(ENDS)
    running: dict[str, subprocess.Popen] = {}
    ended: dict[str, int] = {}
    while waiting or running:
        while waiting and not (args.serial and running):
            name = waiting.pop(0)
            running[name] = start_stage(name, args, started)
        if documents:  # after the start of the stages, which wait for the pictures and compile meanwhile
            data.paint(work / "data", documents)
            documents = None
            print(f"[{time.time() - started:.0f} s] images painted", flush=True)
        for name, process in list(running.items()):
            code = process.poll()
            if code is not None:
                ended[name] = code
                del running[name]
                tail = "".join((work / f"{name}.log").read_text().splitlines(keepends=True)[-25:])
                print(
                    f"[{time.time() - started:.0f} s] {name} {'ended' if code == 0 else f'DIED with {code}'}"
                    f"{chr(10) + tail if code else ''}",
                    flush=True,
                )
        time.sleep(0.5)
    failed = [n for n, code in ended.items() if code]
    print(f"ALL ENDED after {time.time() - started:.0f} s; failed: {failed or 'none'}", flush=True)
    return len(failed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the small embedded models")
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--minutes", type=float, default=17.0, help="time for everything, the data included")
    parser.add_argument("--npm", type=Path, default=Path(".npm"), help="folder of the npm tarballs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is one")
    parser.add_argument("--vae", type=Path, default=None, help="adopt this autoencoder; only its decoder is refined")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to find faults")
    parser.add_argument("--serial", action="store_true", help="one stage at a time")
    parser.add_argument("--stage", choices=ENDS, help="run one stage in this process")
    parser.add_argument("--deadline", type=float, default=0.0, help="Unix time at which the stage must end")
    parser.add_argument("--lr", type=float, default=1.0, help="factor of the denoisers' learning rates")
    parser.add_argument("--bf16", action="store_true", help="bf16 on the CPU too")
    parser.add_argument("--compile", action="store_true", help="compile on the CPU too")
    parser.add_argument(
        "--cooldown", type=float, default=0.3, help="last share of the time, with a falling learning rate"
    )
    parser.add_argument("--steps", type=int, default=None, help="limit of the stage's steps")
    parser.add_argument("--batch", type=int, default=None, help="batch size of the stage")
    args = parser.parse_args(argv)
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.stage:
        run_stage(args)
        return 0
    return orchestrate(args)


if __name__ == "__main__":
    sys.exit(main())
