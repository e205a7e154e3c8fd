"""Several methods at once."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from experiments.methods.method import Method, MethodContext
from experiments.prompts import Group


class Combined(Method):
    """Several methods at once, the first outermost.

    Each looks for protected concepts as it does alone: in a preview of the model's own call, without the changes of the
    methods before it. Methods that change the pipeline itself therefore come last.

    Args:
        methods: by name, those that are None left out; at most one of them may attach NegToMe, and no two may change
            the same argument of the call.

    Raises:
        ValueError: none is left, or one of them overrides `generate`.
    """

    title = "several methods"
    version = 1

    def __init__(self, name: str, methods: Mapping[str, Method | None]) -> None:
        super().__init__(name)
        self.methods = [method for method in methods.values() if method is not None]
        if not self.methods:
            raise ValueError(f"method={name} combines methods, got none: leave one of {', '.join(methods)} in")
        if others := [method.name for method in self.methods if type(method).generate is not Method.generate]:
            raise ValueError(f"method={name} combines methods of one call, got {others}, which make several")
        self.version += sum(method.version for method in self.methods)  # rises with any of them

    def settings(self) -> dict[str, Any]:
        parts = [{"name": method.name, **method.settings()} for method in self.methods]
        return _merged(method.settings() for method in self.methods) | {"methods": parts}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        changed, parts = {}, []
        with contextlib.ExitStack() as stack:
            for method in self.methods:
                part = stack.enter_context(method.apply(pipe, group, call))
                changes = {key: value for key, value in part.call.items() if key not in call or value is not call[key]}
                if twice := changed.keys() & changes:
                    raise ValueError(
                        f"method={self.name} combines methods that change the same arguments of the call, "
                        f"{sorted(twice)}: leave one of them out"
                    )
                changed |= changes
                parts.append(part)
            references = [part.references for part in parts if part.references is not None]
            yield MethodContext(
                {**call, **changed},
                lambda: _merged(part.statistics() for part in parts),
                _merged(references) if references else None,
            )


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}
