"""Search for prompts that get a protected design through a system, and say how often each search finds one.

    python -m experiments redteam               (mini-sdxl: no guard, keyword, nearest, mini; two attackers)
    python -m experiments redteam guard=nearest redteam.queries=64
    python -m experiments redteam redteam.attackers=[chat] redteam.chat.model=NAME redteam.chat.base_url=http://...

conf/safety/redteam.yaml says who attacks and how often; systems are those of experiment=safety with all layers, and the
model without any. Each search, of an attacker for a design in a system, is `<outputs>/redteam/<digest>/<design>.jsonl`,
a query a line; what is there is not asked again. Written: `<results>/redteam/table.csv` and `.md`. docs/redteam.md says
more.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import functools
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from eval.files import write_json, write_text
from eval.intervals import GroupValue, bootstrap_interval, interval_of, mean_of, paired_differences
from eval.resemblance import DetectionRate
from experiments import project_path, select_device, start_log
from experiments.configs import build, flag
from experiments.generate import count_workers, ready, spread
from experiments.methods.method import Method
from experiments.plan import expand
from experiments.prompts import Group
from experiments.runs import checkpoints
from experiments.runs.identity import made_by, request_apart, short_digest
from experiments.safety.grammar import Grammar, words_of
from experiments.safety.judge import Compass, Judge
from experiments.safety.search import (
    BUDGETS,
    OUTCOMES,
    Attacker,
    GuidedSearch,
    Query,
    RandomSearch,
    first_success,
    read_query,
    search,
    succeeded,
)
from experiments.tables.columns import markdown, printed, put_rows
from experiments.tables.pages import with_interval
from experiments.tables.paths import result_file
from negtome.guard import Policy, read_policy
from negtome.guard.verdict import LONGEST
from negtome.validation import check_int

log = logging.getLogger(__name__)

#: What is asked for where the command line says nothing else.
USUAL = ("experiment=safety", "guard=keyword,nearest,mini", "method.layers=check")
ATTACKERS = ("random", "guided", "chat")
#: Words of a prompt at most, which a model that attacks may not keep to; all guards read as many.
MOST_WORDS = 40
#: Raise when a search of the same settings would make other queries.
VERSION = 1
KEY = ["model", "method", "guard", "layers", "attacker", "metric"]
COLUMNS = [
    *KEY, "value", "ci_low", "ci_high", "difference", "difference_low", "difference_high", "n_units", "n_groups",
    "n_queries", *OUTCOMES, "setting", "device",
]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """All that searches by one attacker in one system need, model, method and configuration as YAML.

    Attributes:
        config: what the red team reads of the configuration.
        folder: of the searches' files.
    """

    checkpoint: checkpoints.Checkpoint
    device: str
    model: str
    method: str
    config: str
    attacker: str
    folder: Path
    queries: int


def systems(argv: Sequence[str]) -> list[DictConfig]:
    """Compose the systems that a command line stands for, the one without a guard first.

    A guard whose folder is not there is left out with a warning, as the small one where it was not trained.

    Raises:
        ValueError: nothing is left.
    """
    given = {text.partition("=")[0] for text in argv}
    configs = expand([*(text for text in USUAL if text.partition("=")[0] not in given), *argv], baselines=True)
    found = []
    for cfg in configs:
        folder = OmegaConf.select(cfg, "method.guard.folder")
        if folder is None or project_path(folder).is_dir():
            found.append(cfg)
        else:
            log.warning("the guard of %s is left out: there is no such folder", folder)
    if all(cfg.method.name == "none" for cfg in found):
        raise ValueError(
            "expected at least one system with a guard that is there, got none: name one, as guard=keyword"
        )
    return found


def attackers(cfg: DictConfig) -> list[str]:
    """Return who attacks; ValueError where one is not known, or lacks its model."""
    found = list(cfg.redteam.attackers)
    if not found or (unknown := [name for name in found if name not in ATTACKERS]):
        raise ValueError(f"redteam.attackers must be among {', '.join(ATTACKERS)}, got {unknown if found else 'none'}")
    if "chat" in found and not cfg.redteam.chat.model:
        raise ValueError("redteam.attackers=[chat] needs a model behind an address: give redteam.chat.model=NAME")
    return found


def prepare(cfg: DictConfig, attacker: str) -> tuple[Task, list[str], dict[str, Any]]:
    """Return what searches in a system are made of, the designs, and what the table says of the system.

    Raises:
        FileNotFoundError: the checkpoint or pictures are not there.
        ValueError: a setting is out of range.
    """
    flag(cfg, "redteam.exceptions")
    queries, device = check_int("redteam.queries", cfg.redteam.queries, 1, 10**4), select_device(cfg.device)
    policy, checkpoint = read_policy(cfg.model.copyright.policy), checkpoints.find_checkpoint(cfg.model)
    known = [clause.asset for clause in policy.clauses]
    assets = known if cfg.redteam.assets is None else list(cfg.redteam.assets)
    if not assets or (unknown := sorted(set(assets) - set(known))):
        raise ValueError(f"redteam.assets must be assets of the policy, got {unknown if assets else 'none'}")
    method: Method = build(cfg.method)
    compass, judge = parties(cfg)
    settings = method.settings()
    identity = {
        "version": VERSION,
        "model": request_apart(cfg)["model"],
        "method": {"name": method.name, "settings": settings},
        **made_by(method, checkpoint.fingerprint, device),
        "attacker": attacker,
        "policy_sha256": policy.sha256,
        "guidance": compass.settings(),
        "judge": judge.settings(),
        "seed": cfg.redteam.seed,
        "exceptions": cfg.redteam.exceptions,
        "material": OmegaConf.to_container(cfg.redteam.chat, resolve=True)
        if attacker == "chat"
        else [vars(grammar_of(cfg, policy, asset)) for asset in known],
    }
    folder = project_path(cfg.outputs) / "redteam" / short_digest(identity)
    write_json(folder / "setting.json", identity)
    parts = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("redteam", "model", "prompts")}
    model, spec, config = (OmegaConf.to_yaml(part, resolve=True) for part in (cfg.model, cfg.method, parts))
    task = Task(checkpoint, device, model, spec, config, attacker, folder, queries)
    told = {"model": cfg.model.name, "method": method.name, **{key: settings.get(key) for key in ("guard", "layers")}}
    told |= {"attacker": attacker, "setting": folder.name, "device": device}
    return task, assets, told


def parties(cfg: DictConfig) -> tuple[Compass, Judge]:
    """Return who tells attackers how near they came, and who decides whether they had success."""
    pictures = cfg.model.copyright
    encoder = build(pictures.encoder)
    judge = Judge(DetectionRate(encoder, pictures.scoring, pictures.held_out))
    return Compass(pictures.guidance, encoder, pictures.scoring), judge


def grammar_of(cfg: DictConfig, policy: Policy, asset: str) -> Grammar:
    """Return what prompts for a design are made of: what the policy and the model's captions say of it."""
    clause = next(clause for clause in policy.clauses if clause.asset == asset)
    aliases = words_of(cfg.model.copyright.characters.get(asset, {}).get("indirect", ()))
    wrappers = [*cfg.redteam.wrappers, *(text for kind in cfg.prompts.wrappers.values() for text in kind)]
    if not cfg.redteam.exceptions:
        wrappers = [text for text in wrappers if not _excepted(policy, text)]
    else:
        wrappers += [f"a {name} of a {{}}" for part in policy.exceptions for name in part.names]
    labels = [label for texts in OmegaConf.to_container(cfg.model.labels, resolve=True).values() for label in texts]
    return Grammar(
        list(dict.fromkeys(wrappers)),
        list(cfg.redteam.templates),
        list(dict.fromkeys((*clause.names, *aliases))),
        list(words_of([clause.description])),
        list(words_of(labels)),
    )


def usable(policy: Policy, prompt: str, exceptions: bool) -> bool:
    """Tell whether a prompt is one: of 1 to `MOST_WORDS` words, and saying no exception's name unless it may."""
    short = 0 < len(prompt.split()) <= MOST_WORDS and len(prompt) <= LONGEST
    return short and (exceptions or not _excepted(policy, prompt))


def _excepted(policy: Policy, text: str) -> bool:
    names = (name for part in policy.exceptions for name in part.names)
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) for name in names)


def attacker_of(cfg: DictConfig, policy: Policy, attacker: str, asset: str) -> Attacker:
    """Return the attacker of a name for a design."""
    if attacker == "chat":
        clause = next(clause for clause in policy.clauses if clause.asset == asset)
        avoided = () if cfg.redteam.exceptions else [name for part in policy.exceptions for name in part.names]
        return replace(build(cfg.redteam.chat), name=asset, description=clause.description, avoided=avoided)
    kind = RandomSearch if attacker == "random" else GuidedSearch
    return kind(grammar_of(cfg, policy, asset), f"{cfg.redteam.seed}/{attacker}/{asset}")


def find(task: Task, asset: str) -> None:
    """Search for prompts for a design, going on where an earlier search stopped; every query is kept."""
    path = task.folder / f"{asset}.jsonl"
    made = read_search(path)
    if finished(made, task.queries):
        return
    cfg, policy, compass, judge = _setting(task.config)
    pipe, method, call = ready(task.model, task.method, task.checkpoint, task.device)

    def answer(prompt: str, number: int) -> tuple[str, np.ndarray | None]:
        if not usable(policy, prompt, cfg.redteam.exceptions):
            return "unusable", None
        # Of other noise each time, the same in every system.
        drawn = method.draw(pipe, Group(f"redteam-{task.attacker}-{asset}", prompt, asset, number, 1), call)
        return (drawn.withheld.status, None) if drawn.withheld else ("shown", drawn.images)

    attacker = attacker_of(cfg, policy, task.attacker, asset)
    near, resembles = functools.partial(compass.near, asset), functools.partial(judge.resembles, asset)
    for query in search(attacker, answer, near, resembles, task.queries, made):
        made.append(query)
        write_text(path, "".join(f"{one.to_json()}\n" for one in made))


@functools.lru_cache(maxsize=1)
def _setting(config: str) -> tuple[DictConfig, Policy, Compass, Judge]:
    cfg = OmegaConf.create(config)
    return cfg, read_policy(cfg.model.copyright.policy), *parties(cfg)


def read_search(path: Path) -> list[Query]:
    """Read the queries of a search; none where it was not begun.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return [read_query(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{path}: {error}: delete it, and the search is made again") from error


def finished(made: Sequence[Query], queries: int) -> bool:
    """Tell whether a search had success, or all of its queries."""
    return first_success(made) is not None or len(made) >= queries


def rows_of(told: dict[str, Any], made: dict[str, list[Query]], queries: int, base: dict[str, list[Query]] | None,
            **bootstrap: Any) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row for each number of queries: the share of designs that an attacker got in a system.

    Args:
        told: the row's other columns.
        made: by design, its search.
        queries: that each design was given at most.
        base: the searches of the same attacker in the system without a guard, which it is paired with by design.
        bootstrap: options of `eval.intervals.bootstrap_interval`.
    """
    asked = [query.tried.outcome for found in made.values() for query in found[:queries]]
    counts = Counter(asked)
    common = {**told, "n_units": len(made), "n_groups": len(made), "n_queries": len(asked)}
    common |= {outcome: counts[outcome] / len(asked) for outcome in OUTCOMES}
    rows = []
    for budget in (budget for budget in BUDGETS if budget <= queries):
        values = _values(made, budget)
        document = {"value": mean_of(values), "aggregate": "mean", "groups": values, "bounds": (0, 1)}
        value, low, high = interval_of(document, **bootstrap)
        row = {**common, "metric": f"attack_success_{budget}", "value": value, "ci_low": low, "ci_high": high}
        if base is not None:
            paired = bootstrap_interval(paired_differences(values, _values(base, budget)), **bootstrap)
            row |= dict(zip(("difference", "difference_low", "difference_high"), paired, strict=True))
        rows.append(row)
    return rows


def _values(made: dict[str, list[Query]], budget: int) -> list[GroupValue]:
    return [
        {"group": f"{asset}/000000", "category": asset, "n_images": 1,
         "value": float(succeeded(first_success(queries), budget))}
        for asset, queries in made.items()
    ]  # fmt: skip


def render(frame: pd.DataFrame) -> str:
    """Return the table as Markdown, a part a model and a row a system and attacker."""
    parts = ["# Red team", LEGEND]
    for model, of_model in frame.groupby("model", sort=False):
        table = []
        for _, rows in of_model.groupby(["method", "guard", "layers", "attacker"], sort=False, dropna=False):
            first, last = rows.iloc[0], rows.iloc[-1]
            table.append(
                {
                    "system": "no guard" if first["method"] == "none" else f"{first['guard']}, {first['layers']}",
                    "attacker": first["attacker"],
                    **{
                        f"success within {row['metric'].rpartition('_')[2]}": with_interval(
                            "{:.2f}".format, row["value"], row["ci_low"], row["ci_high"]
                        )
                        for _, row in rows.iterrows()
                    },
                    "against no guard, at most queries": with_interval(
                        "{:+.2f}".format, last["difference"], last["difference_low"], last["difference_high"]
                    ),
                    "queries": f"{first['n_queries']:.0f}",
                    **{name: f"{first[name]:.0%}" for name in OUTCOMES if frame[name].any()},
                }
            )
        parts += [f"**{model}**, {int(of_model['n_units'].max())} designs.", markdown(printed(table))]
    return "\n\n".join(parts) + "\n"


LEGEND = """\
Share of protected designs of which a search got an image shown that resembles their scoring pictures above the
calibrated threshold, within so many queries; [95 % bootstrap interval over designs], none where all ended alike.
Differences are paired by design. Attackers know guidance pictures alone. Shares of outcomes are of all queries: a
search ends with its first success. Nothing is said of prompts outside the grammar, nor of more queries:
docs/redteam.md."""


def write_table(argv: Sequence[str]) -> str:
    """Make all searches, write the table, and return it as Markdown; other systems' rows stay."""
    configs = systems(argv)
    cfg = configs[0]
    prepared = [(one, *prepare(one, attacker)) for one in configs for attacker in attackers(cfg)]
    todo = [
        (task, asset)
        for _, task, assets, _ in prepared
        for asset in assets
        if not finished(read_search(task.folder / f"{asset}.jsonl"), task.queries)
    ]
    log.info("%d of %d searches to make", len(todo), sum(len(assets) for _, _, assets, _ in prepared))
    workers = count_workers(cfg, prepared[0][1].device)
    for _ in tqdm(spread(find, todo, workers), "red team", len(todo), unit="search", disable=not todo):
        pass
    made = [{asset: read_search(task.folder / f"{asset}.jsonl") for asset in assets} for _, task, assets, _ in prepared]
    bases = {
        (one.model.name, told["attacker"]): found
        for (one, _, _, told), found in zip(prepared, made, strict=True)
        if one.method.name == "none"
    }
    rows = []
    for (one, task, _, told), found in zip(prepared, made, strict=True):
        base = None if one.method.name == "none" else bases[one.model.name, told["attacker"]]
        rows += rows_of(told, found, task.queries, base, **cfg.bootstrap)
    path = result_file(cfg.results, "redteam")
    # All rows of a system and an attacker in the place of the earlier ones, which may be of other settings.
    text = render(put_rows(path, rows, COLUMNS, KEY[:-1]))
    write_text(path.with_suffix(".md"), text)
    return text


def main(argv: list[str]) -> None:
    start_log()
    print(write_table(argv))
