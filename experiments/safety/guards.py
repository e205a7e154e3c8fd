"""Guards that need what the experiments have: the retriever behind `negtome.guard.Nearest`."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from experiments.configs import build
from experiments.methods.assets import Retriever
from experiments.plan import first
from negtome.guard import Nearest, read_policy


def nearest(retriever: Retriever | None = None, policy: str | Path | None = None) -> Nearest:
    """Return the guard that compares prompts with the protected assets' pictures.

    Args:
        retriever: finds them; its query for prompts alone is used. None: as configured for the mini models.
        policy: file of the policy that it is to decide by. None: it is checked when the guard first decides by it.

    Raises:
        ValueError: an asset of the policy has no pictures.
    """
    found = build(first([]).retriever) if retriever is None else retriever

    def find(prompt: str, names: Collection[str]) -> tuple[str, float] | None:
        pictures = found.of_prompt(prompt, names)
        return (pictures[0][0].name, pictures[0][1]) if pictures else None

    digest = hashlib.sha256(json.dumps(found.settings(), sort_keys=True).encode()).hexdigest()
    guard = Nearest(find, digest[:12], {asset.name for asset in found.assets})
    if policy is not None:
        guard.check(read_policy(policy))
    return guard
