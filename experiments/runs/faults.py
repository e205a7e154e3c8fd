"""Faults that would stop an experiment, and those of the weights that a metric or a method needs.

Nothing is loaded or fetched. Every fault says what to do and, where possible, names the override that goes on without
the part that is missing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from eval.encoders import Network, Scorer
from eval.weights import Download


@dataclass(frozen=True)
class Fault:
    """Something that would stop an experiment.

    Attributes:
        problem: what is wrong and what to do.
        name: of the missing part, if it may be fetched.
        needed_by: metrics that cannot be measured because of it.
        elsewhere: the override that names another place of a missing file.
        without: the overrides by which an experiment goes on without the part.
        fetch: downloads the part, or raises FileNotFoundError; None if nothing can be downloaded.
        downloads: what `fetch` downloads.
    """

    problem: str
    name: str = ""
    needed_by: tuple[str, ...] = ()
    elsewhere: str = ""
    without: str = ""
    fetch: Callable[[], Any] | None = field(default=None, compare=False)
    downloads: tuple[Download, ...] = field(default=(), compare=False)

    def lines(self) -> list[str]:
        notes = {"needed by": ", ".join(self.needed_by), "elsewhere": self.elsewhere, "without it": self.without}
        problem = [line.rstrip() for line in self.problem.splitlines()]
        return [*problem, *(f"{label + ':':<12}{note}" for label, note in notes.items() if note)]


def listing(faults: Sequence[Fault]) -> str:
    """Return the numbered list of faults."""
    lines = []
    for number, fault in enumerate(faults, 1):
        first, *rest = fault.lines()
        lines += [f"{number:>3}. {first}", *(f"     {line}" for line in rest)]
    return "\n".join(lines)


def of_weights(scorer: Scorer, elsewhere: str = "") -> list[Fault]:
    """Find missing weights of a scorer and of its parts, and weights that are not their publishers'.

    Args:
        elsewhere: the override that names another place of the weights.
    """
    faults = []
    for part in scorer.parts():
        facts = part.weights()
        try:
            if facts.present:
                _ = facts.fingerprint
                continue
        except ValueError as error:
            faults.append(Fault(str(error), elsewhere=elsewhere))
            continue
        fault = Fault(str(facts.missing()), facts.encoder, elsewhere=elsewhere)
        if isinstance(part, Network) and (downloads := part.downloads(facts)):
            fault = replace(fault, fetch=part.obtain, downloads=tuple(downloads))
        faults.append(fault)
    return faults


def of_method(method: Any) -> list[Fault]:
    """Find faults in the weights of the networks that a method holds, at any depth."""
    if isinstance(method, Scorer):
        return of_weights(method)
    parts: Iterable[Any]
    if isinstance(method, Mapping):
        parts = method.values()
    elif isinstance(method, (list, tuple)):
        parts = method
    elif type(method).__module__.startswith("experiments."):
        parts = getattr(method, "__dict__", {}).values()
    else:
        return []
    return [fault for part in parts for fault in of_method(part)]
