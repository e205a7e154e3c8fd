"""What the methods of conf/method/ say of themselves to tables and figures, which know none of them by name."""

import functools
from typing import Any, NamedTuple

import yaml
from hydra.utils import get_class

from experiments import PROJECT
from experiments.methods.setting import Setting

#: Colours that a method's file may name: Okabe and Ito's, told apart with any colour vision, and a shape each for print
#: without colours. Black is for the run without a method.
PALETTE = {
    "black": ("#000000", "o"), "blue": ("#0072B2", "s"), "red": ("#D55E00", "^"), "green": ("#009E73", "D"),
    "purple": ("#CC79A7", "v"), "orange": ("#E69F00", "P"), "sky": ("#56B4E9", "X"), "yellow": ("#F0E442", "*"),
}  # fmt: skip


class Entry(NamedTuple):
    """A method of conf/method/.

    Attributes:
        columns: the settings that tell its runs apart in tables.
        title: what figures call it.
        colour: its own in every figure, one of `PALETTE`; None: what the others of a figure leave.
    """

    columns: tuple[Setting, ...]
    title: str
    colour: str | None


@functools.cache
def entries() -> dict[str, Entry]:
    """Return the methods by their names.

    Raises:
        ValueError: a method's file names a colour that there is not.
    """
    found = {}
    for file in sorted((PROJECT / "conf" / "method").glob("*.yaml")):
        spec = _read(file.stem)
        method, metadata = get_class(spec["_target_"]), spec.get("metadata", {})
        colour = metadata.get("colour")
        if colour not in (None, *PALETTE):
            raise ValueError(f"expected one of {', '.join(PALETTE)} for colour in {file}, got {colour!r}")
        found[spec["name"]] = Entry(method.columns, metadata.get("title") or method.title, colour)
    return found


def _read(name: str) -> dict[str, Any]:
    """Return a method's file over those that it is based on."""
    spec = yaml.safe_load((PROJECT / "conf" / "method" / f"{name}.yaml").read_text(encoding="utf-8"))
    based: dict[str, Any] = {}
    for base in spec.get("defaults", ()):
        if isinstance(base, str) and base != "_self_" and "@" not in base:
            based |= _read(base)
    based.pop("metadata", None)  # a title is of one method, as is a colour
    return based | spec


def settings(*names: str) -> tuple[Setting, ...]:
    """Return the settings that methods declare for tables, each once; of all methods where none is named."""
    chosen = [entries()[name] for name in names if name in entries()] if names else list(entries().values())
    return tuple(dict.fromkeys(setting for entry in chosen for setting in entry.columns))
