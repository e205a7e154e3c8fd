"""What each part of deliberative alignment adds to a guard of under a million parameters.

    python -m training.deliberation.table
    python -m training.deliberation.table --development --examples 2000

Written: results/deliberation/table.csv and .md. Trained models and their answers are kept in outputs/deliberation, each
under a digest of what it depends on, so that what is there is not made again. --development prints how good
models of one seed are on other requests than the tests: the sizes are chosen by it.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from eval.files import read_json, write_json, write_text
from eval.intervals import bootstrap_interval, paired_differences
from experiments import project_path
from experiments.runs.identity import short_digest
from experiments.tables.columns import markdown
from experiments.tables.pages import with_interval
from experiments.tables.templates import render
from negtome.guard.controls import Always
from negtome.guard.keyword import Keyword
from negtome.guard.mini import read
from negtome.guard.policy import Policy, read_policy
from training.deliberation import fit, scores
from training.deliberation.cells import STAGES, Cell, Sizes, all_cells, trained
from training.deliberation.controls import Lookup
from training.deliberation.requests import PARTS, POLICY, Maker, Request
from training.deliberation.scores import Outcome

#: Requests on which the number of examples is chosen.
DEVELOPMENT = 400
#: What is compared with what, of the same seeds: with a trace or without, and stages with those before them.
PAIRS = [
    *(((stage, True), (stage, False)) for stage in ("SFT", "RL", "SFT + RL")),
    *(
        ((a, trace), (b, trace))
        for a, b in (("SFT", "none"), ("RL", "none"), ("SFT + RL", "SFT"))
        for trace in (True, False)
    ),
]
COMPARED = ("decision right", "clause right", "wrappers held out", "encodings held out")
TRACE = {True: "yes", False: "no", None: ""}


def answers(folder: Path, asked: Sequence[Request]) -> list[list[str]]:
    """Return what a trained model writes to requests; kept in its folder."""
    file = folder / f"answers-{short_digest([one.text for one in asked])}.json"
    if not file.exists():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        written = fit.replies(model, tokenizer, [one.text for one in asked])
        write_json(file, [" ".join(words) for words in written])
    return [line.split() for line in read_json(file)]


def measured(cell: Cell, sizes: Sizes, root: Path, development: bool) -> list[Outcome]:
    """Train a cell, unless it is, and return its outcomes on the tests or on the development requests."""
    torch.set_num_threads(1)
    disable_progress_bar()
    policy = read_policy(POLICY)
    folder = trained(cell, sizes, policy, root)
    asked = Maker(policy, 0, development=True).draw(DEVELOPMENT) if development else scores.tests(policy)
    written = answers(folder, asked)
    outcomes = [scores.outcome(policy, one, read(words)) for one, words in zip(asked, written, strict=True)]
    right = sum(one.action == one.right for one in outcomes) / len(outcomes)
    cited = sum(one.cited for one in outcomes) / len(outcomes)
    print(
        f"{cell.stage}, trace: {TRACE[cell.trace]}, seed {cell.seed}: {right:.3f} decided right, {cited:.3f} cited "
        f"right, of {len(asked)} {'development' if development else 'test'} requests",
        flush=True,
    )
    return outcomes


def chains(
    cells: Sequence[Cell], sizes: Sizes, root: Path, development: bool, workers: int
) -> dict[Cell, list[Outcome]]:
    """Measure cells, those of a seed and trace in one process, one after the other."""
    groups: dict[tuple[int, bool], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.seed, cell.trace), []).append(cell)
    found: dict[Cell, list[Outcome]] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for part in pool.map(_chain, groups.values(), [(sizes, root, development)] * len(groups)):
            found |= part
    return found


def _chain(cells: Sequence[Cell], how: tuple[Sizes, Path, bool]) -> dict[Cell, list[Outcome]]:
    return {cell: measured(cell, *how) for cell in cells}


def controls(policy: Policy) -> Iterator[tuple[str, list[Outcome]]]:
    """Ask the guards that need no training."""
    asked = scores.tests(policy)
    for title, guard in (("always allow", Always("allow")), ("keyword", Keyword()), ("look-up table", Lookup(policy))):
        yield title, [scores.outcome(policy, one, guard.reply(policy, one.text)) for one in asked]


def rows(policy: Policy, found: Mapping[tuple[str, bool | None], Mapping[int, Sequence[Outcome]]]) -> pd.DataFrame:
    """Return a row for each guard, or difference of two, and column: value, 95 % interval, extremes of the seeds."""
    table = []
    for column in scores.columns(policy):
        valued = {key: scores.values(column, outcomes) for key, outcomes in found.items()}
        table += [_row(key, "", column.name, groups) for key, groups in valued.items()]
        if column.name not in COMPARED:
            continue
        for a, b in PAIRS:  # what knows the form alone is one model for all seeds
            same = {seed: found[b].get(seed, found[b][0]) for seed in found[a]}
            groups = paired_differences(valued[a], scores.values(column, same))
            table.append(_row(a, f"{b[0]}, trace: {TRACE[b[1]]}", column.name, groups))
    return pd.DataFrame(table)


def _row(key: tuple[str, bool | None], against: str, name: str, groups: Sequence[dict]) -> dict[str, object]:
    value, low, high = bootstrap_interval(groups)
    seeds: dict[str, list[float]] = {}
    for group in groups:
        seeds.setdefault(group["group"].rpartition("/")[2], []).append(group["value"])
    means = [sum(part) / len(part) for part in seeds.values()]
    return {
        "training": key[0],
        "trace": TRACE[key[1]],
        "against": against,
        "metric": name,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "lowest_seed": min(means),
        "highest_seed": max(means),
        "n": len(groups),
        "n_characters": len({group["category"] for group in groups}),
        "n_seeds": len(seeds),
    }


def page(frame: pd.DataFrame, sizes: Sizes) -> str:
    """Return the table and its differences as Markdown."""
    plain, differences = frame[frame["against"] == ""], frame[frame["against"] != ""]
    names = list(dict.fromkeys(plain["metric"]))
    wide = []
    for (training, trace), part in plain.groupby(["training", "trace"], sort=False):
        cells = {
            row.metric: with_interval("{:.2f}".format, row.value, row.ci_low, row.ci_high) for row in part.itertuples()
        }
        first = part.iloc[0]
        seeds = f"{first.lowest_seed:.2f} to {first.highest_seed:.2f}" if first.n_seeds > 1 else ""
        wide.append({"training": training, "trace": trace, **cells, f"{names[0]}, by seed": seeds})
    long = [
        {
            "training": row.training,
            "trace": row.trace,
            "less that of": row.against,
            "of": row.metric,
            "difference": with_interval("{:+.3f}".format, row.value, row.ci_low, row.ci_high),
            "by seed": f"{row.lowest_seed:+.3f} to {row.highest_seed:+.3f}",
            "all seeds and the interval agree": _verdict(row),
        }
        for row in differences.itertuples()
    ]
    counts = {name: int(part["n"].max() / part["n_seeds"].max()) for name, part in plain.groupby("metric", sort=False)}
    return render(
        "training/deliberation/page.md.j2",
        table=markdown(pd.DataFrame(wide)),
        differences=markdown(pd.DataFrame(long)),
        counts=counts,
        seeds=int(plain["n_seeds"].max()),
        sizes=sizes,
        prompts=fit.PROMPTS,
        tries=fit.TRIES,
        stages=[*STAGES],
        wrappers=PARTS["wrappers_of_the_evaluation"],
    )


def _verdict(row: tuple) -> str:
    """Tell which way a difference goes, if its interval and each of its seeds say so."""
    if row.ci_low is not None and row.ci_low > 0 and row.lowest_seed > 0:
        return "more"
    if row.ci_high is not None and row.ci_high < 0 and row.highest_seed < 0:
        return "less"
    return "no"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/deliberation"), help="folder of trained models")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the table")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, each on one core")
    parser.add_argument("--steps", type=int, default=Sizes.steps, help="steps of rewards")
    parser.add_argument("--rate", type=float, default=Sizes.rate, help="of learning from rewards")
    parser.add_argument("--examples", type=int, default=Sizes.examples, help="right replies")
    parser.add_argument("--development", action="store_true", help="only what the sizes are chosen by")
    args = parser.parse_args(argv)
    sizes, root, policy = (
        Sizes(examples=args.examples, steps=args.steps, rate=args.rate),
        project_path(args.out),
        read_policy(POLICY),
    )
    if args.development:
        chains(all_cells(1), sizes, root, True, args.workers)
        return 0
    found: dict[tuple[str, bool | None], dict[int, list[Outcome]]] = {}
    for title, outcomes in controls(policy):
        found[title, None] = {0: outcomes}
    for cell, outcomes in chains(all_cells(args.seeds), sizes, root, False, args.workers).items():
        found.setdefault((cell.stage, cell.trace), {})[cell.seed] = outcomes
    frame, folder = rows(policy, found), project_path(args.results)
    write_text(folder / "deliberation" / "table.csv", frame.to_csv(index=False, float_format="%.6g"))
    write_text(folder / "deliberation" / "table.md", page(frame, sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
