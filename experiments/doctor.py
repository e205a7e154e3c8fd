"""List the encoders and models that are ready on this machine, and what to do for the others.

    python -m experiments doctor               a line each: ready or missing, size, licence
    python -m experiments doctor sdxl          everything about one, and how to get it
    python -m experiments doctor --details     everything about all
    python -m experiments doctor experiment=diversity model=sdxl             what this experiment needs and lacks here
    python -m experiments doctor experiment=diversity model=sdxl --fetch     the same, after fetching what it can

Nothing is loaded, and nothing is fetched without --fetch. Exit code 1 if an experiment lacks something.
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

from experiments import PROJECT, start_log
from experiments.compose import composed
from experiments.plan import Plan
from experiments.runs import preflight
from experiments.runs.checkpoints import find_checkpoint, licence

#: Columns of the table's lines.
WIDTH = 100
#: In the place of weights, for an encoder without any.
NONE_NEEDED = "none needed"


class Finding(NamedTuple):
    """The state of one encoder or model of the configuration.

    Attributes:
        option: its name on the command line: `scorer=` or `model=` and its file's stem, or the metric that brings it.
        state: `ready`, `missing` or `broken` (its configuration does not work).
        facts: text to print by label, in this order.
        size: of its files, in bytes; 0 if there are none here.
    """

    option: str
    state: str
    facts: dict[str, str]
    size: int = 0


def examine(conf: Path = PROJECT / "conf", name: str | None = None) -> list[Finding]:
    """Examine every encoder of `conf/scorer`, every network that a metric brings itself, and every model.

    Args:
        conf: a folder of configuration with `config.yaml` and the groups `scorer`, `metric` and `model`.
        name: examine only the option of this name: `model=sdxl`, `sdxl`, `lpips_vgg`.

    Raises:
        ValueError: no option has the name.
    """
    checks = {f"scorer={stem}": functools.partial(_scorer, conf, stem) for stem in _stems(conf, "scorer")}
    checks |= {f"metric={label}": functools.partial(_metric, spec) for label, spec in _with_networks(conf)}
    checks |= {f"model={stem}": functools.partial(_model, conf, stem) for stem in _stems(conf, "model")}
    if name is not None:
        checks = {option: check for option, check in checks.items() if name in (option, re.split("=|: ", option)[-1])}
        if not checks:
            raise ValueError(f"expected a name that python -m experiments doctor lists, got {name}")
    findings = [_check(option, check) for option, check in checks.items()]
    return [one for one in findings if one.facts.get("weights") != NONE_NEEDED or one.option.startswith("scorer=")]


def _stems(conf: Path, group: str) -> list[str]:
    return sorted(file.stem for file in (conf / group).glob("*.yaml"))


def _with_networks(conf: Path) -> list[tuple[str, DictConfig]]:
    """Return ("suite: name", configuration) of the metrics that have no `encoder` setting, each metric once."""
    metrics: dict[str, tuple[str, DictConfig]] = {}
    for suite in _stems(conf, "metric"):
        # Not composed: a suite may name what only some model has.
        cfg = OmegaConf.create({"device": "cpu", "metric": OmegaConf.load(conf / "metric" / f"{suite}.yaml")})
        for name in (name for name in cfg.metric if not OmegaConf.is_interpolation(cfg.metric, name)):
            spec = cfg.metric[name]
            # A metric with a baseline compares two runs, which are known only when it is measured.
            if isinstance(spec, DictConfig) and "_target_" in spec and not {"encoder", "baseline"} & spec.keys():
                spec.pop("only", None)  # a choice of groups: no argument of the class
                metrics.setdefault(OmegaConf.to_yaml(spec), (f"{suite}: {name}", spec))
    return list(metrics.values())


def _check(option: str, check: Callable[[], tuple[dict[str, str], int | None]]) -> Finding:
    try:
        facts, size = check()
    except Exception as error:  # one broken option must not hide the others
        return Finding(option, "broken", {"error": f"{type(error).__name__}: {error}"})
    return Finding(option, "missing" if size is None else "ready", facts, size or 0)


def _scorer(conf: Path, name: str) -> tuple[dict[str, str], int | None]:
    return _weights(instantiate(composed([f"+scorer={name}", "device=cpu"], conf).scorer))


def _metric(spec: DictConfig) -> tuple[dict[str, str], int | None]:
    return _weights(instantiate(spec).encoder)


def _weights(encoder: Any) -> tuple[dict[str, str], int | None]:
    """Return the facts of an encoder, and the bytes of its weights; None if they are missing."""
    weights = encoder.weights()
    facts = {"encoder": weights.encoder}
    if not weights.looked_in:
        facts["weights"] = NONE_NEEDED
    elif weights.present:
        folder = os.path.commonpath([file.parent for file in weights.files])
        single = len(weights.files) == 1
        facts["weights"] = str(weights.files[0]) if single else f"{folder} ({len(weights.files)} files)"
        facts["sha256"] = weights.fingerprint[:12]  # which refuses a file that is not its publishers'
    else:
        facts["wanted"] = weights.source
        facts["looked in"] = ", ".join(map(str, weights.looked_in))
    facts |= {"resize": weights.resize, "input": weights.input_range, "licence": weights.licence}
    if not weights.present:
        return facts | {"to do": weights.how_to_get}, None
    return facts, sum(file.stat().st_size for file in weights.files)


def _model(conf: Path, name: str) -> tuple[dict[str, str], int | None]:
    model = composed([f"model={name}", "device=cpu"], conf).model
    facts = {"checkpoint": model.source, "licence": licence(model) or "as its page says"}
    try:
        checkpoint = find_checkpoint(model, fetch=False)
    except FileNotFoundError as error:
        return facts | {"to do": str(error)}, None
    size = sum(
        (Path(folder) / file).stat().st_size
        for folder, _, files in os.walk(checkpoint.folder, followlinks=True)
        for file in files
    )
    return facts | {"folder": str(checkpoint.folder), "fingerprint": checkpoint.fingerprint}, size


def table(findings: list[Finding]) -> str:
    """Return a line for each finding, and the number that are ready."""
    option = max(len(finding.option) for finding in findings)
    lines = []
    for finding in findings:
        size = f"{finding.size / 2**20:.1f} MiB" if finding.size else ""
        terms = finding.facts.get("licence") or finding.facts["error"]
        line = f"{finding.state:<8}{finding.option:<{option}}{size:>12}  "
        lines.append(line + textwrap.shorten(terms, WIDTH - len(line), placeholder=" ..."))
    ready = sum(finding.state == "ready" for finding in findings)
    lines += ["", f"{ready} of {len(findings)} are ready; others are fetched when you first use them."]
    lines += ["python -m experiments doctor NAME says where one is looked for, and how to get it; --details of all."]
    return "\n".join(lines)


def details(findings: list[Finding]) -> str:
    """Return all facts of the findings, a block each."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8}{finding.option}")
        for label, value in finding.facts.items():
            first, *rest = value.splitlines() or [""]
            lines.append(f"        {label + ':':13}{first}")
            lines += [f"{'':21}{line}" for line in rest]
    return "\n".join(lines)


def diagnose(overrides: list[str], fetch: bool = False) -> int:
    """Print what an experiment needs and which faults would stop it on this machine, and return the exit code.

    Args:
        overrides: of the experiment.
        fetch: whether to fetch what can be fetched first.
    """
    plan = Plan.of(overrides)
    jobs, faults = preflight.examine(plan, tables=True)
    if fetch and any(fault.fetch for fault in faults):
        failed = {fault.needed_by: fault for fault in preflight.fetch_all(faults) if fault.fetch}
        jobs, faults = preflight.examine(plan, tables=True)
        faults = [failed.get(fault.needed_by, fault) for fault in faults]
    print(*preflight.describe(plan, jobs, faults), sep="\n")
    if not fetch and any(fault.fetch for fault in faults):
        print("--fetch gets what can be fetched.")
    return int(bool(faults))


def main(argv: list[str]) -> int | None:
    """Run the command and return its exit code."""
    fetch = "--fetch" in argv
    names = [argument for argument in argv if argument not in ("--details", "--fetch")]
    overrides = [argument for argument in names if "=" in argument]
    is_option = len(overrides) <= 1 and all(text.startswith(("model=", "scorer=", "metric=")) for text in overrides)
    if fetch or not is_option:
        start_log()
        return diagnose(names, fetch)
    if len(names) > 1 or any(name.startswith("-") for name in names):
        raise ValueError(f"expected one name, --details, overrides of an experiment or nothing, got {' '.join(argv)}")
    findings = examine(name=names[0] if names else None)
    print(details(findings) if argv else table(findings))
    return None
