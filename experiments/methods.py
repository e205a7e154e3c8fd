"""The compared methods, behind one interface: attach something to a stock pipeline for the length of a `with` block.

A further method is a further class here (or in a file beside this one) and a file in conf/method/; no experiment knows
any method by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Protocol

import negtome


class Method(Protocol):
    """What an experiment asks of a method."""

    name: str

    def settings(self) -> dict[str, Any]:
        """Return every setting of the method that affects pixels, as JSON values: part of the run's identity."""

    def code(self) -> str | None:
        """Return a digest of the code that makes the change: an edited method must never go on in an old run."""

    def attach(self, pipe: Any, group_size: int) -> contextlib.AbstractContextManager[Any]:
        """Change what `pipe` generates until the block ends; `group_size` images of one prompt make a group."""

    def statistics(self, attached: Any) -> dict[str, Any]:
        """Return what the run log should keep of one finished call, from what `attach` gave to the block."""


class Baseline:
    """The stock pipeline: attaches nothing."""

    def __init__(self, name: str = "none") -> None:
        self.name = name

    def settings(self) -> dict[str, Any]:
        return {}

    def code(self) -> None:
        return None

    def attach(self, pipe: Any, group_size: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def statistics(self, attached: None) -> dict[str, Any]:
        return {}


class NegToMe:
    """Negative token merging (arXiv 2412.01339) through `negtome.attach`.

    Args:
        name: the method's name in folders and tables.
        **config: fields of `negtome.NegToMeConfig`; a field that is None takes the dataclass's default.
    """

    def __init__(self, name: str, **config: Any) -> None:
        self.name = name
        self.config = negtome.NegToMeConfig(**{key: value for key, value in config.items() if value is not None})

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)

    def code(self) -> str:
        digest = hashlib.sha256()
        for file in sorted(Path(negtome.__file__).parent.glob("*.py")):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:12]

    def attach(self, pipe: Any, group_size: int) -> negtome.Attachment:
        return negtome.attach(pipe, self.config, group_size=group_size)

    def statistics(self, attached: negtome.Attachment) -> dict[str, Any]:
        return attached.summary()
