"""The methods of conf/method/ with their titles, colours and columns, for tables and figures."""

import functools
from typing import Any, NamedTuple

import yaml
from hydra.utils import get_class

from experiments import PROJECT
from experiments.methods.setting import Setting

#: Colours that a method's file may name: Okabe and Ito's, which are distinct for any colour vision, and a marker each
#: for print without colours. Black is for the baseline.
PALETTE = {
    "black": ("#000000", "o"), "blue": ("#0072B2", "s"), "red": ("#D55E00", "^"), "green": ("#009E73", "D"),
    "purple": ("#CC79A7", "v"), "orange": ("#E69F00", "P"), "sky": ("#56B4E9", "X"), "yellow": ("#F0E442", "*"),
}  # fmt: skip


class Entry(NamedTuple):
    """A method of conf/method/.

    Attributes:
        columns: the settings that distinguish its runs in tables.
        title: its name in figures.
        colour: its colour in every figure, one of `PALETTE`; None: a colour that no other method of a figure has.
        control: whether it is a negative control, which is never ranked with methods.
        summary: a line for lists: that of its class, or the title that its file gives it.
        between: whether it has values between two settings of its hyperparameter.
    """

    columns: tuple[Setting, ...]
    title: str
    colour: str | None
    control: bool = False
    summary: str = ""
    between: bool = True


@functools.cache
def entries() -> dict[str, Entry]:
    """Return the methods by their names.

    Raises:
        ValueError: a method's file names an unknown colour, or has whole numbers between which there would be values.
    """
    methods = {}
    for file in sorted((PROJECT / "conf" / "method").glob("*.yaml")):
        spec = _read(file.stem)
        method, metadata = get_class(spec["_target_"]), spec.get("metadata", {})
        colour = metadata.get("colour")
        if colour not in (None, *PALETTE):
            raise ValueError(f"expected one of {', '.join(PALETTE)} for colour in {file}, got {colour!r}")
        title, control = metadata.get("title") or method.title, bool(metadata.get("control"))
        summary = metadata.get("title") or (method.__doc__ or title).splitlines()[0]
        hyperparameter = metadata.get("hyperparameter") or {}
        between = hyperparameter.get("interpolate", True)
        values = hyperparameter.get("values", {}).values()
        if between and any(all(type(value) is int for value in of_model) for of_model in values):
            raise ValueError(
                f"expected metadata.hyperparameter.interpolate: false in {file}, whose values are whole numbers: none "
                "lies between two of them"
            )
        methods[spec["name"]] = Entry(method.columns, title, colour, control, summary, between)
    return methods


def controls() -> list[str]:
    """Return the names of the negative controls."""
    return [name for name, entry in entries().items() if entry.control]


def _read(name: str) -> dict[str, Any]:
    """Read a method's file, merged over the files in its defaults."""
    text = (PROJECT / "conf" / "method" / f"{name}.yaml").read_text(encoding="utf-8")
    spec = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # in C: every command reads all files
    defaults: dict[str, Any] = {}
    for base in spec.get("defaults", ()):
        if isinstance(base, str) and base != "_self_" and "@" not in base:
            defaults |= _read(base)
    defaults.pop("metadata", None)  # title and colour are not inherited
    return defaults | spec


def settings(*names: str) -> tuple[Setting, ...]:
    """Return the columns of the named methods, or of all methods, each once."""
    chosen = [entries()[name] for name in names if name in entries()] if names else list(entries().values())
    return tuple(dict.fromkeys(setting for entry in chosen for setting in entry.columns))
