"""What a method is: it changes what a stock pipeline generates for the length of a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import negtome
from experiments.prompts import Group


@dataclass
class Applied:
    """A method at work on one group.

    Attributes:
        call: keyword arguments of the pipeline's call: those of the model, as far as the method did not change them.
        attached: NegToMe's attachment, where there is one.
        references: the assets the method was given for this group, file -> score by which it was found; None where the
            method takes none.
    """

    call: dict[str, Any]
    attached: negtome.Attachment | None = None
    references: Mapping[str, float] | None = None

    def statistics(self) -> dict[str, Any]:
        """Return what the run's log should keep of the finished call."""
        return {} if self.attached is None else self.attached.summary()


class Method(Protocol):
    """What an experiment asks of a method.

    Attributes:
        name: in folders and tables.
        version: raised whenever the same settings would make other pixels, whatever was edited; runs
            of another version are neither gone on with nor put into a table (tests/experiments/test_golden.py tells).
    """

    name: str
    version: int

    def settings(self) -> dict[str, Any]:
        """Return every setting of the method that affects pixels, as JSON values: part of the run's identity."""

    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> contextlib.AbstractContextManager[Applied]:
        """Change what `pipe` generates for `group` until the block ends.

        The block calls `pipe(group.prompt, ..., **applied.call)` once.

        Args:
            pipe: a stock pipeline.
            group: the images to be generated together.
            call: further keyword arguments that the pipeline is to be called with.
        """


class Baseline:
    """The stock pipeline: changes nothing."""

    version = 0  # what all runs share has a version of its own, `experiments.runs.GENERATION_VERSION`

    def __init__(self, name: str = "none") -> None:
        self.name = name

    def settings(self) -> dict[str, Any]:
        return {}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[Applied]:
        yield Applied(dict(call))
