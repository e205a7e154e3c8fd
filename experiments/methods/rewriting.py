"""Rewritten prompts: ask for diversity in words."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from experiments.methods.method import Method, MethodContext, generator_of
from experiments.methods.setting import numbers
from experiments.prompts import Group
from negtome.validation import check_float


@dataclass
class Rewriting(Method):
    """Replace the category in the prompts of some of a group's images by a kind or a scene of it.

    "a photo of a dog" becomes "a photo of a poodle". The phrases are part of the configuration, so that runs need no
    language model and are reproducible; NegToMe's paper (arXiv 2412.01339) has prompts rewritten by a language model.
    Images are scored against the original prompt. The last images of a group are rewritten, with different phrases as
    long as there are enough; a group's order of phrases is the same at every share. A call of the pipeline is for one
    group.

    Attributes:
        rewrites: phrases by category, as in conf/rewrites/.
        share: the share of a group's images that are rewritten, in [0, 1], rounded down to an integer; 0 is off. Below
            1 the first image keeps the group's prompt.
    """

    title = "prompt rewriting"
    columns = numbers("share")
    version = 1

    name: str
    rewrites: Mapping[str, Sequence[str]]
    share: float = 0.75

    def __post_init__(self) -> None:
        self.share = check_float("method.share", self.share, 0, 1)
        if not isinstance(self.rewrites, Mapping):
            raise ValueError(f"method.rewrites must be lists of phrases by category, got {self.rewrites!r}")
        for category, phrases in self.rewrites.items():
            if isinstance(phrases, str) or not phrases or len(set(phrases)) != len(phrases):
                raise ValueError(
                    f"method.rewrites.{category} must be a list of distinct phrases with at least one, got {phrases!r}"
                )

    def settings(self) -> dict[str, Any]:
        phrases = json.dumps(self.rewrites, sort_keys=True)  # there are hundreds, so the identity has their digest
        return {"rewrites": hashlib.sha256(phrases.encode()).hexdigest()[:12], "share": self.share}

    def prompts(self, group: Group) -> list[str]:
        """Return a prompt for each image.

        Raises:
            ValueError: there are no phrases for the category, or the prompt does not name it.
        """
        if not (phrases := self.rewrites.get(group.category)):
            raise ValueError(
                f"method={self.name} expected phrases for the category {group.category!r} in method.rewrites, got "
                "none: add them to the model's file in conf/rewrites/, or leave the method out for these prompts"
            )
        pattern = rf"\b{re.escape(group.category)}\b"
        if not re.search(pattern, group.prompt):
            raise ValueError(
                f"method={self.name} rewrites the category in a prompt, got {group.prompt!r}, which does not name "
                f"{group.category!r}: leave the method out for these prompts"
            )
        order = torch.randperm(len(phrases), generator=generator_of(group, "rewriting")).tolist()
        kept = group.size - int(self.share * group.size + 1e-9)
        chosen = [phrases[order[index % len(order)]] for index in range(kept, group.size)]
        rewritten = [re.sub(pattern, lambda _, phrase=phrase: phrase, group.prompt) for phrase in chosen]
        return [group.prompt] * kept + rewritten

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        prompts = self.prompts(group)
        changes = {} if set(prompts) == {group.prompt} else {"prompt": prompts, "num_images_per_prompt": 1}
        yield MethodContext({**call, **changes}, lambda: {"prompts": prompts})
