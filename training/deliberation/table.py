"""The comparison of what deliberative alignment adds to a guard of under a million parameters; the embedded guard.

Trained models and their answers are kept, each under a digest of all that it depends on, so that a comparison that was
interrupted goes on.
"""

import time
from collections.abc import Sequence
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
from experiments.prompts import HARMLESS
from experiments.runs.identity import short_digest
from experiments.tables.columns import markdown
from experiments.tables.pages import with_interval
from experiments.tables.templates import render
from negtome.guard.controls import Always
from negtome.guard.keyword import Keyword
from negtome.guard.mini import Mini, read
from negtome.guard.policy import Policy, read_policy
from training.deliberation import fit, scores
from training.deliberation.cells import STAGES, Cell, Sizes, all_cells, draw_examples, save, train_cell
from training.deliberation.requests import PARTS, POLICY, Maker, Request, build_tokenizer
from training.deliberation.scores import Lookup, Outcome

#: Number of requests on which the number of examples is chosen.
DEVELOPMENT = 400
#: Guards that are compared, by stage and trace, on the same seeds.
PAIRS = [
    (("SFT", True), ("SFT", False)),
    (("RL", True), ("RL", False)),
    (("SFT + RL", True), ("SFT + RL", False)),
    (("SFT", True), ("none", True)),
    (("SFT", False), ("none", False)),
    (("RL", True), ("none", True)),
    (("RL", False), ("none", False)),
    (("SFT + RL", True), ("SFT", True)),
    (("SFT + RL", False), ("SFT", False)),
]
#: Columns in which they are compared.
COMPARED = ("decision right", "clause right", "wrappers held out", "encodings held out")
TRACE = {True: "yes", False: "no", None: ""}
#: Title of the guard in models/mini-guard.
SHIPPED = "models/mini-guard"
#: Kinds of prompts, as the guard's card names them.
KINDS = ("direct", "indirect", "benign", "near", "generic", "parody", f"{HARMLESS}parody")
#: Outcomes of guards, by stage (or title) and trace, then by seed.
Outcomes = dict[tuple[str, bool | None], dict[int, list[Outcome]]]


def answer(folder: Path, requests: Sequence[Request]) -> list[list[str]]:
    """Return a trained model's replies to requests; they are kept in its folder."""
    file = folder / f"answers-{short_digest([request.text for request in requests])}.json"
    if not file.exists():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        replies = fit.replies(model, tokenizer, [request.text for request in requests])
        write_json(file, [" ".join(words) for words in replies])
    return [line.split() for line in read_json(file)]


def evaluate_cells(cells: Sequence[Cell], sizes: Sizes, root: Path, development: bool) -> dict[Cell, list[Outcome]]:
    """Train cells, one after the other, and return their outcomes on the test or the development requests."""
    torch.set_num_threads(1)
    disable_progress_bar()
    policy = read_policy(POLICY)
    requests = Maker(policy, 0, development=True).draw(DEVELOPMENT) if development else scores.tests(policy)
    outcomes = {}
    for cell in cells:
        replies = answer(train_cell(cell, sizes, policy, root), requests)
        judged = [scores.judge(policy, *pair) for pair in zip(requests, map(read, replies), strict=True)]
        right, cited = sum(one.action == one.right for one in judged), sum(one.cited for one in judged)
        print(f"{cell}: {right} decided right, {cited} cited right, of {len(requests)} requests", flush=True)
        outcomes[cell] = judged
    return outcomes


def evaluate_all(
    cells: Sequence[Cell], sizes: Sizes, root: Path, development: bool, workers: int
) -> dict[Cell, list[Outcome]]:
    """Evaluate cells, those of a seed and trace in one process."""
    chains: dict[tuple[int, bool], list[Cell]] = {}
    for cell in cells:
        chains.setdefault((cell.seed, cell.trace), []).append(cell)
    outcomes: dict[Cell, list[Outcome]] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(evaluate_cells, chain, sizes, root, development) for chain in chains.values()]
        for job in jobs:
            outcomes |= job.result()
    return outcomes


def evaluate_controls(policy: Policy) -> Outcomes:
    """Evaluate the guards that need no training here: the controls, and the embedded guard."""
    outcomes: Outcomes = {}
    guards = {
        "always allow": Always("allow"),
        "keyword": Keyword(),
        "look-up table": Lookup(policy),
        SHIPPED: Mini(project_path("models/mini-guard")),
    }
    for title, guard in guards.items():
        judged = [scores.judge(policy, one, guard.reply(policy, one.text)) for one in scores.tests(policy)]
        outcomes[title, None] = {0: judged}
    return outcomes


def tabulate(policy: Policy, outcomes: Outcomes) -> pd.DataFrame:
    """Return a row for each guard, or difference of two, and column: value, 95 % interval, extremes of the seeds."""
    table = []
    for column in scores.columns(policy):
        groups = {key: scores.values(column, of_seeds) for key, of_seeds in outcomes.items()}
        table += [_row(key, "", column.name, values) for key, values in groups.items()]
        if column.name not in COMPARED:
            continue
        for a, b in PAIRS:  # the model of the form alone is one for all seeds
            same_seeds = {seed: outcomes[b].get(seed, outcomes[b][0]) for seed in outcomes[a]}
            differences = paired_differences(groups[a], scores.values(column, same_seeds))
            table.append(_row(a, f"{b[0]}, trace: {TRACE[b[1]]}", column.name, differences))
    return pd.DataFrame(table)


def _row(key: tuple[str, bool | None], against: str, name: str, groups: Sequence[dict]) -> dict[str, object]:
    value, low, high = bootstrap_interval(groups)
    frame = pd.DataFrame(groups)
    means = frame.groupby(frame["group"].str.rpartition("/")[2])["value"].mean()
    return {
        "training": key[0],
        "trace": TRACE[key[1]],
        "against": against,
        "metric": name,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "lowest_seed": means.min(),
        "highest_seed": means.max(),
        "n": len(frame),
        "n_characters": frame["category"].nunique(),
        "n_seeds": len(means),
    }


def render_page(frame: pd.DataFrame, sizes: Sizes) -> str:
    """Return the table and its differences as Markdown."""
    guards, differences = frame[frame["against"] == ""], frame[frame["against"] != ""]
    names = list(dict.fromkeys(guards["metric"]))
    wide = []
    for (training, trace), part in guards.groupby(["training", "trace"], sort=False):
        first, cells = part.iloc[0], {}
        for row in part.itertuples():
            cells[row.metric] = with_interval("{:.2f}".format, row.value, row.ci_low, row.ci_high)
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
    counts = {name: int(part["n"].max() / part["n_seeds"].max()) for name, part in guards.groupby("metric", sort=False)}
    return render(
        "training/deliberation/page.md.j2",
        table=markdown(pd.DataFrame(wide)),
        differences=markdown(pd.DataFrame(long)),
        counts=counts,
        seeds=int(guards["n_seeds"].max()),
        sizes=sizes,
        prompts=fit.PROMPTS,
        tries=fit.TRIES,
        stages=[*STAGES],
        wrappers=PARTS["wrappers_of_the_evaluation"],
    )


def _verdict(row: tuple) -> str:
    """Return which way a difference goes, if its interval and each of its seeds say so."""
    if row.ci_low is not None and row.ci_low > 0 and row.lowest_seed > 0:
        return "more"
    if row.ci_high is not None and row.ci_high < 0 and row.highest_seed < 0:
        return "less"
    return "no"


def compare_stages(
    out: Path, work: Path, seeds: int, workers: int, development: bool, **sizes: int | float | None
) -> None:
    """Train and evaluate all cells, and write deliberation/table.csv and .md.

    Args:
        out: folder of the table.
        work: folder of trained models.
        seeds: how many, from 0.
        workers: processes at a time.
        development: only print the results of one seed on the requests that the sizes are chosen by.
        sizes: fields of `Sizes`; None: as they are.
    """
    policy, root = read_policy(POLICY), project_path(work)
    chosen = Sizes(**{name: value for name, value in sizes.items() if value is not None})
    if development:
        evaluate_all(all_cells(1), chosen, root, True, workers)
        return
    outcomes = evaluate_controls(policy)
    for cell, judged in evaluate_all(all_cells(seeds), chosen, root, False, workers).items():
        outcomes.setdefault((cell.stage, cell.trace), {})[cell.seed] = judged
    frame, folder = tabulate(policy, outcomes), project_path(out)
    write_text(folder / "deliberation" / "table.csv", frame.to_csv(index=False, float_format="%.6g"))
    print(write_text(folder / "deliberation" / "table.md", render_page(frame, chosen)))


def count_by_kind(outcomes: Sequence[Outcome]) -> str:
    """Return the shares of right decisions by kind of prompt as Markdown."""
    wrapped = [f"{about}, wrapper {seen}" for about in ("asset", "none") for seen in ("held out", "seen")]
    right: dict[str, list[bool]] = {name: [] for name in (*KINDS, *wrapped)}
    for outcome in outcomes:
        kind, _, wrapper = outcome.request.kind.partition("/")
        if kind == "encoded":
            continue
        if kind not in KINDS:
            seen = "seen" if wrapper in PARTS["wrappers_of_the_evaluation"] else "held out"
            kind = f"{'none' if kind.startswith(HARMLESS) else 'asset'}, wrapper {seen}"
        right[kind].append(outcome.action == outcome.right)
    shares = [{"prompts": kind, "n": str(len(r)), "right": f"{sum(r) / len(r):.3f}"} for kind, r in right.items()]
    return markdown(pd.DataFrame(shares))


def export_guard(out: Path, examples: int) -> None:
    """Train the embedded guard on right replies with traces, and write it."""
    torch.set_num_threads(1)
    disable_progress_bar()
    policy, folder, start = read_policy(POLICY), project_path(out), time.process_time()
    tokenizer = build_tokenizer(policy)
    model = fit.new_model(policy, tokenizer, seed=0)
    fit.fit_examples(model, tokenizer, draw_examples(policy, 0, examples, trace=True), seed=0)
    seconds = time.process_time() - start
    save(model, tokenizer, folder)
    write_card(folder, policy, examples, seconds)


def write_card(folder: Path, policy: Policy, n: int, seconds: float) -> None:
    """Measure an exported guard and write its README.md."""
    guard, requests = Mini(folder), scores.tests(policy)
    replies = fit.replies(guard.model, guard.tokenizer, [request.text for request in requests])
    outcomes = [scores.judge(policy, *pair) for pair in zip(requests, map(read, replies), strict=True)]
    facts = {
        "parameters": f"{guard.model.num_parameters():,}",
        "words": f"{guard.tokenizer.get_vocab_size():,}",
        "longest": guard.longest,
        "policy": policy.sha256,
        "example": " ".join(replies[0][:-1]),
        "examples": f"{n:,}",
        "seconds": f"{seconds:.0f}",
        "wrappers": PARTS["wrappers_of_the_evaluation"],
        "table": count_by_kind(outcomes),
    }
    write_text(folder / "README.md", render("training/deliberation/card.md.j2", **facts))
