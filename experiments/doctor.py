"""Which encoders and models are ready to use on this machine, and what to do for the others.

    python -m experiments.doctor

Looks only: nothing is loaded and nothing fetched.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import PROJECT
from experiments.pipelines import find_checkpoint, licence


class Finding(NamedTuple):
    """What is known of one encoder or model of the configuration.

    Attributes:
        option: its name on the command line: `scorer` or `model` and its file's stem, or the metric that brings it.
        state: `ready`, `missing` or `broken` (its configuration does not work).
        facts: what to print of it, by label, in this order.
    """

    option: str
    state: str
    facts: dict[str, str]


def examine(conf: Path = PROJECT / "conf") -> list[Finding]:
    """Look at every encoder of `conf/scorer`, every network that a metric brings itself, and every model.

    Args:
        conf: a folder of configuration with `config.yaml` and the groups `scorer`, `metric` and `model`.
    """
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        return [
            *(_look(f"scorer={name}", _scorer, name) for name in _names(conf, "scorer")),
            *(_look(f"metric={name}", _metric, spec) for name, spec in _with_networks(conf).values()),
            *(_look(f"model={name}", _model, name) for name in _names(conf, "model")),
        ]


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
                found.setdefault(OmegaConf.to_yaml(spec), (f"{suite}: {name}", spec))
    return found


def _look(option: str, look: Callable[[Any], tuple[bool, dict[str, str]]], what: Any) -> Finding:
    try:
        present, facts = look(what)
    except Exception as error:  # one broken option must not hide the others
        return Finding(option, "broken", {"error": f"{type(error).__name__}: {error}"})
    return Finding(option, "ready" if present else "missing", facts)


def _scorer(name: str) -> tuple[bool, dict[str, str]]:
    return _weights(instantiate(compose("config", [f"+scorer={name}", "device=cpu"]).scorer))


def _metric(spec: DictConfig) -> tuple[bool, dict[str, str]]:
    return _weights(instantiate(spec).encoder)


def _weights(encoder: Any) -> tuple[bool, dict[str, str]]:
    facts = encoder.weights()
    printed = {"encoder": facts.encoder}
    if not facts.looked_in:
        printed["weights"] = "none needed"
    elif facts.present:
        one, several = facts.files[0], os.path.commonpath([file.parent for file in facts.files])
        printed["weights"] = str(one) if len(facts.files) == 1 else f"{several} ({len(facts.files)} files)"
        printed["sha256"] = facts.fingerprint[:12]  # which refuses a file that is not its publishers'
    else:
        printed["wanted"] = facts.source
        printed["looked in"] = ", ".join(map(str, facts.looked_in))
    printed |= {"resize": facts.resize, "input": facts.input_range, "licence": facts.licence}
    if not facts.present:
        printed["to do"] = facts.how_to_get
    return facts.present, printed


def _model(name: str) -> tuple[bool, dict[str, str]]:
    model = compose("config", [f"model={name}", "device=cpu"]).model
    printed = {"checkpoint": model.source, "licence": licence(model) or "as its page says"}
    try:
        checkpoint = find_checkpoint(model, fetch=False)
    except FileNotFoundError as error:
        return False, printed | {"to do": str(error)}
    return True, printed | {"folder": str(checkpoint.folder), "fingerprint": checkpoint.fingerprint}


def render(findings: list[Finding]) -> str:
    """Return the findings as text: one block each, and at the end how many are ready."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8}{finding.option}")
        for label, value in finding.facts.items():
            first, *rest = value.splitlines() or [""]
            lines.append(f"        {label + ':':13}{first}")
            lines += [f"{'':21}{line}" for line in rest]
    ready = sum(finding.state == "ready" for finding in findings)
    needed = "The others are needed only where they are named; with a network they are fetched then."
    return "\n".join([*lines, "", f"{ready} of {len(findings)} are ready. {needed}"])


def main(argv: list[str]) -> None:
    if argv:
        raise ValueError(f"expected no arguments, got {' '.join(argv)}")
    print(render(examine()))
