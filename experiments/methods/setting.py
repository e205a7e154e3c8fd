"""A setting of a method, as a column of tables."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Setting:
    """A setting of a method, as one or two columns.

    Attributes:
        name: in `Method.settings`.
        columns: of the CSV: one, or two for the lower and upper end of a range; the default is the name.
        heading: of printed tables; the default is the name with spaces.
        printed: "always", "differing" (only if a model's runs differ in it) or "never".
        number: whether the columns hold only numbers.
        optional: whether a CSV has the columns only if one of its rows has a value.
        upper_first: whether a range is printed from its upper end.
    """

    name: str
    columns: tuple[str, ...] = ()
    heading: str = ""
    printed: Literal["always", "differing", "never"] = "differing"
    number: bool = False
    optional: bool = False
    upper_first: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", self.columns or (self.name,))
        object.__setattr__(self, "heading", self.heading or self.name.replace("_", " "))

    def cells(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the cells of a CSV's row, by column; None if the method's settings lack this one."""
        value = settings.get(self.name)
        if len(self.columns) == 2:
            return dict(zip(self.columns, value or (None, None), strict=True))
        return {self.columns[0]: ("+".join(map(str, value)) or None) if isinstance(value, (list, tuple)) else value}

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the setting of a CSV's row as text; empty if the row lacks it."""
        values = [row[column] for column in (reversed(self.columns) if self.upper_first else self.columns)]
        if any(value is None or (isinstance(value, float) and math.isnan(value)) for value in values):
            return ""
        return " to ".join(value if isinstance(value, str) else f"{value:g}" for value in values)


def numbers(*names: str) -> tuple[Setting, ...]:
    """Return settings whose columns hold only numbers."""
    return tuple(Setting(name, number=True) for name in names)
