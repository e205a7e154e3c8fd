"""Which encoders and models are ready to use on this machine, and what to do for the others.

    python -m experiments doctor               a line each: there or not, size, licence
    python -m experiments doctor sdxl          all that is known of one, and how to get it
    python -m experiments doctor --details     of all
    python -m experiments doctor experiment=diversity model=sdxl             all that this experiment lacks here
    python -m experiments doctor experiment=diversity model=sdxl --fetch     and gets what can be fetched

Looks only, but for --fetch: nothing is loaded and nothing fetched. Exit code 1 where an experiment lacks something.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import functools
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import PROJECT, generate, start_log
from experiments.plan import Plan, composed
from experiments.runs.checkpoints import find_checkpoint, licence
from experiments.runs.metrics import left_out_lines
from experiments.runs.preflight import listing

#: Columns of the table's lines.
WIDTH = 100
#: What an encoder says of its weights that has none.
NONE_NEEDED = "none needed"


class Finding(NamedTuple):
    """What is known of one encoder or model of the configuration.

    Attributes:
        option: its name on the command line: `scorer` or `model` and its file's stem, or the metric that brings it.
        state: `ready`, `missing` or `broken` (its configuration does not work).
        facts: what to print of it, by label, in this order.
        size: of its files, in bytes; 0 where none is here.
    """

    option: str
    state: str
    facts: dict[str, str]
    size: int = 0


def examine(conf: Path = PROJECT / "conf", name: str | None = None) -> list[Finding]:
    """Look at every encoder of `conf/scorer`, every network that a metric brings itself, and every model.

    Args:
        conf: a folder of configuration with `config.yaml` and the groups `scorer`, `metric` and `model`.
        name: look at what is called so alone: `model=sdxl`, `sdxl`, `lpips_vgg`.

    Raises:
        ValueError: there is none of the name.
    """
    looks = [
        *((f"scorer={one}", functools.partial(_scorer, conf), one) for one in _names(conf, "scorer")),
        *((f"metric={one}", _metric, spec) for one, spec in _with_networks(conf).values()),
        *((f"model={one}", functools.partial(_model, conf), one) for one in _names(conf, "model")),
    ]
    if name is not None:
        looks = [one for one in looks if name in (one[0], re.split("=|: ", one[0])[-1])]
    findings = [_look(*one) for one in looks]
    if name is not None and not findings:
        raise ValueError(f"expected a name that python -m experiments doctor lists, got {name}")
    return [one for one in findings if one.facts.get("weights") != NONE_NEEDED or one.option.startswith("scorer=")]


def _names(conf: Path, group: str) -> list[str]:
    return sorted(file.stem for file in (conf / group).glob("*.yaml"))


def _with_networks(conf: Path) -> dict[str, tuple[str, DictConfig]]:
    """Return the metrics that are given no encoder, "suite: name" and configuration; what several suites have, once."""
    found: dict[str, tuple[str, DictConfig]] = {}
    for suite in _names(conf, "metric"):
        # Not composed: a suite may name what only some model has.
        cfg = OmegaConf.create({"device": "cpu", "metric": OmegaConf.load(conf / "metric" / f"{suite}.yaml")})
        for name in (name for name in cfg.metric if not OmegaConf.is_interpolation(cfg.metric, name)):
            spec = cfg.metric[name]
            # One with a baseline compares two runs, and is told at the time which.
            if isinstance(spec, DictConfig) and "_target_" in spec and not {"encoder", "baseline"} & spec.keys():
                spec.pop("only", None)  # of which groups: no argument of the class
                found.setdefault(OmegaConf.to_yaml(spec), (f"{suite}: {name}", spec))
    return found


def _look(option: str, look: Callable[[Any], tuple[dict[str, str], int | None]], what: Any) -> Finding:
    try:
        facts, size = look(what)
    except Exception as error:  # one broken option must not hide the others
        return Finding(option, "broken", {"error": f"{type(error).__name__}: {error}"})
    return Finding(option, "missing" if size is None else "ready", facts, size or 0)


def _scorer(conf: Path, name: str) -> tuple[dict[str, str], int | None]:
    return _weights(instantiate(composed([f"+scorer={name}", "device=cpu"], conf).scorer))


def _metric(spec: DictConfig) -> tuple[dict[str, str], int | None]:
    return _weights(instantiate(spec).encoder)


def _weights(encoder: Any) -> tuple[dict[str, str], int | None]:
    """Return what to print of an encoder, and the bytes of its weights; None where they are missing."""
    facts = encoder.weights()
    printed = {"encoder": facts.encoder}
    if not facts.looked_in:
        printed["weights"] = NONE_NEEDED
    elif facts.present:
        one, several = facts.files[0], os.path.commonpath([file.parent for file in facts.files])
        printed["weights"] = str(one) if len(facts.files) == 1 else f"{several} ({len(facts.files)} files)"
        printed["sha256"] = facts.fingerprint[:12]  # which refuses a file that is not its publishers'
    else:
        printed["wanted"] = facts.source
        printed["looked in"] = ", ".join(map(str, facts.looked_in))
    printed |= {"resize": facts.resize, "input": facts.input_range, "licence": facts.licence}
    if not facts.present:
        return printed | {"to do": facts.how_to_get}, None
    return printed, sum(file.stat().st_size for file in facts.files)


def _model(conf: Path, name: str) -> tuple[dict[str, str], int | None]:
    model = composed([f"model={name}", "device=cpu"], conf).model
    printed = {"checkpoint": model.source, "licence": licence(model) or "as its page says"}
    try:
        checkpoint = find_checkpoint(model, fetch=False)
    except FileNotFoundError as error:
        return printed | {"to do": str(error)}, None
    size = sum(
        (Path(folder) / file).stat().st_size
        for folder, _, files in os.walk(checkpoint.folder, followlinks=True)
        for file in files
    )
    return printed | {"folder": str(checkpoint.folder), "fingerprint": checkpoint.fingerprint}, size


def table(findings: list[Finding]) -> str:
    """Return a line for each finding, and how many are ready."""
    option = max(len(finding.option) for finding in findings)
    lines = []
    for finding in findings:
        size = f"{finding.size / 2**20:.1f} MiB" if finding.size else ""
        terms = finding.facts.get("licence") or finding.facts["error"]
        line = f"{finding.state:<8}{finding.option:<{option}}{size:>12}  "
        lines.append(line + textwrap.shorten(terms, WIDTH - len(line), placeholder=" ..."))
    ready = sum(finding.state == "ready" for finding in findings)
    return "\n".join([
        *lines, "",
        f"{ready} of {len(findings)} are ready; others are needed only where they are named, and fetched then.",
        "python -m experiments doctor NAME says where one is looked for, and how to get it; --details of all.",
    ])  # fmt: skip


def details(findings: list[Finding]) -> str:
    """Return all that is known of the findings, a block each."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8}{finding.option}")
        for label, value in finding.facts.items():
            first, *rest = value.splitlines() or [""]
            lines.append(f"        {label + ':':13}{first}")
            lines += [f"{'':21}{line}" for line in rest]
    return "\n".join(lines)


def diagnose(overrides: list[str], fetch: bool = False) -> int:
    """Print all that an experiment lacks on this machine, as `experiments.reproduce` would; return the exit code.

    Args:
        overrides: those of the experiment.
        fetch: whether to fetch what can be fetched first.
    """
    plan = Plan.of(overrides)
    faults = generate.examine(plan, tables=True)[1]
    if fetch and any(fault.fetch for fault in faults):
        failed = [fault for fault in generate.fetch_all(faults) if fault.fetch]
        reasons = {fault.needed_by: fault for fault in failed}
        faults = [reasons.get(fault.needed_by, fault) for fault in generate.examine(plan, tables=True)[1]]
    for line in left_out_lines(spec.cfg for spec in plan.runs):
        print(line)
    if not faults:
        print(f"{len(plan.runs)} runs can be made and scored here.")
        return 0
    print(f"{len(faults)} faults would stop python -m experiments reproduce {' '.join(overrides)}:\n{listing(faults)}")
    if not fetch and any(fault.fetch for fault in faults):
        print("--fetch gets what can be fetched.")
    return 1


def main(argv: list[str]) -> int | None:
    fetch = "--fetch" in argv
    names = [one for one in argv if one not in ("--details", "--fetch")]
    overrides = [one for one in names if "=" in one]
    if fetch or len(overrides) > 1 or any(one.startswith("experiment=") for one in overrides):
        start_log()
        return diagnose(names, fetch)
    if len(names) > 1 or any(one.startswith("-") for one in names):
        raise ValueError(f"expected one name, --details, overrides of an experiment or nothing, got {' '.join(argv)}")
    findings = examine(name=names[0] if names else None)
    print(details(findings) if argv else table(findings))
    return None
