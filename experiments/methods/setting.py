"""How a setting of a method stands in tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Setting:
    """A setting of a method, as one or two columns.

    Attributes:
        name: in `Method.settings`.
        columns: of the CSV: one, or those of a range's lower and upper end; by default the name.
        heading: of printed tables; by default the name in words.
        printed: "always", "differing": where a model's runs differ in it, or "never".
        number: whether the columns hold numbers alone.
    """

    name: str
    columns: tuple[str, ...] = ()
    heading: str = ""
    printed: Literal["always", "differing", "never"] = "differing"
    number: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", self.columns or (self.name,))
        object.__setattr__(self, "heading", self.heading or self.name.replace("_", " "))

    def cells(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a row of a CSV has, by column, of a method's settings; None where they lack this one."""
        value = settings.get(self.name)
        if len(self.columns) == 2:
            return dict(zip(self.columns, value or (None, None), strict=True))
        return {self.columns[0]: ("+".join(map(str, value)) or None) if isinstance(value, (list, tuple)) else value}

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the setting of a CSV's row as it is printed, a range from its upper end; blank where there is none."""
        values = [row[column] for column in reversed(self.columns)]
        if any(value is None or value != value for value in values):
            return ""
        return " to ".join(value if isinstance(value, str) else f"{value:g}" for value in values)
