"""Train the small guard and write it, with its card, to be embedded.

python -m training.deliberation.export --out models/mini-guard
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from transformers.utils.logging import disable_progress_bar

from eval.files import write_text
from experiments import project_path
from experiments.prompts import HARMLESS
from experiments.tables.columns import markdown
from experiments.tables.templates import render
from negtome.guard.mini import Mini, read
from negtome.guard.policy import Policy, read_policy
from training.deliberation import fit, scores
from training.deliberation.cells import examples, save
from training.deliberation.requests import PARTS, POLICY, build_tokenizer
from training.deliberation.scores import Outcome

#: Requests and right replies; about as many as five minutes of one core are enough for.
EXAMPLES = 36_000
#: Kinds of prompts, as the card names them.
KINDS = ("direct", "indirect", "benign", "near", "generic", "parody", f"{HARMLESS}parody")


def counted(outcomes: Sequence[Outcome]) -> str:
    """Return right decisions by kind of prompt as Markdown."""
    seen = {False: "wrapper held out", True: "wrapper seen"}
    found: dict[str, list[bool]] = {
        name: [] for name in (*KINDS, *(f"{a}, {b}" for a in ("asset", "none") for b in seen.values()))
    }
    for one in outcomes:
        kind, _, wrapper = one.request.kind.partition("/")
        if kind == "encoded":
            continue
        name = kind
        if kind not in KINDS:
            what = "none" if kind.startswith(HARMLESS) else "asset"
            name = f"{what}, {seen[wrapper in PARTS['wrappers_of_the_evaluation']]}"
        found[name].append(one.action == one.right)
    rows = [
        {"prompts": name, "n": str(len(right)), "right": f"{sum(right) / len(right):.3f}"}
        for name, right in found.items()
    ]
    return markdown(pd.DataFrame(rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("models/mini-guard"), help="folder of the model")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="requests and right replies to train on")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    disable_progress_bar()
    policy, folder, start = read_policy(POLICY), project_path(args.out), time.process_time()
    tokenizer = build_tokenizer(policy)
    model = fit.new_model(policy, tokenizer, seed=0)
    fit.fit_examples(model, tokenizer, examples(policy, 0, args.examples, trace=True), seed=0)
    seconds = time.process_time() - start
    save(model, tokenizer, folder)
    write_card(folder, policy, args.examples, seconds)
    return 0


def write_card(folder: Path, policy: Policy, n: int, seconds: float) -> None:
    """Measure an exported guard and write its README.md."""
    guard, asked = Mini(folder), scores.tests(policy)
    written = fit.replies(guard.model, guard.tokenizer, [one.text for one in asked])
    facts = {
        "parameters": f"{guard.model.num_parameters():,}",
        "words": f"{guard.tokenizer.get_vocab_size():,}",
        "longest": guard.longest,
        "policy": policy.sha256,
        "example": " ".join(written[0][:-1]),
        "examples": f"{n:,}",
        "seconds": f"{seconds:.0f}",
        "wrappers": PARTS["wrappers_of_the_evaluation"],
        "table": counted([scores.outcome(policy, one, read(words)) for one, words in zip(asked, written, strict=True)]),
    }
    write_text(folder / "README.md", render("training/deliberation/card.md.j2", **facts))


if __name__ == "__main__":
    sys.exit(main())
