"""Several methods at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.methods.method import Applied, Method
from experiments.prompts import Group


class Combined(Method):
    """Several methods at once, the first outermost.

    Each looks for assets as it does alone: in a preview of the model's own call, not of what the methods before it make
    of that. Those that touch the pipeline itself therefore come last.

    Args:
        name: the method's name in folders and tables.
        methods: by name; at most one of them may attach NegToMe, and no two may change the same argument of the call.

    Raises:
        ValueError: one of them makes its images otherwise than by one call.
    """

    title = "several methods"
    version = 1

    def __init__(self, name: str, methods: Mapping[str, Method]) -> None:
        self.name = name
        self.methods = list(methods.values())
        if alone := [method.name for method in self.methods if type(method).draw is not Method.draw]:
            raise ValueError(f"method={name} combines methods of one call, got {alone}, which draw by themselves")
        self.version += sum(method.version for method in self.methods)  # rises with any of them

    def settings(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for method in self.methods:
            merged |= method.settings()
        return merged | {"methods": [{"name": method.name, **method.settings()} for method in self.methods]}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[Applied]:
        whole = Applied(dict(call))
        changed: set[str] = set()
        parts: list[Applied] = []
        whole.statistics = lambda: {key: value for part in parts for key, value in part.statistics().items()}
        with contextlib.ExitStack() as stack:
            for method in self.methods:
                part = stack.enter_context(method.apply(pipe, group, call))
                changes = {key: value for key, value in part.call.items() if key not in call or value is not call[key]}
                if twice := changed & changes.keys():
                    raise ValueError(
                        f"method={self.name} combines methods that change the same arguments of the call, "
                        f"{sorted(twice)}: leave one of them out"
                    )
                changed |= changes.keys()
                whole.call |= changes
                parts.append(part)
                if part.references is not None:
                    whole.references = {**(whole.references or {}), **part.references}
            yield whole
