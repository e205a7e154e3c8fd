"""Guards that need the experiments: the CLIP nearest-neighbour guard, and the guards that a command line names."""

import hashlib
import json
import logging
from collections.abc import Collection, Sequence

from omegaconf import DictConfig, OmegaConf

from experiments import project_path
from experiments.compose import expand
from experiments.methods.assets import Retriever
from negtome.guard import Nearest

log = logging.getLogger(__name__)


def nearest(retriever: Retriever) -> Nearest:
    """Return the guard that compares prompts with reference images, by the retriever's query "prompt"."""

    def find(prompt: str, names: Collection[str]) -> tuple[str, float] | None:
        pictures = retriever.of_prompt(prompt, names)
        return (pictures[0][0].name, pictures[0][1]) if pictures else None

    digest = hashlib.sha256(json.dumps(retriever.settings(), sort_keys=True).encode()).hexdigest()
    return Nearest(find, digest[:12], {asset.name for asset in retriever.assets})


def guarded_systems(argv: Sequence[str], defaults: Sequence[str]) -> list[DictConfig]:
    """Compose the systems of a command line, the one without a guard first.

    Systems whose guard has no folder, such as a small guard that was not trained, are left out with a warning.

    Args:
        argv: overrides.
        defaults: overrides for the keys that `argv` does not set.

    Raises:
        ValueError: no system with a guard is left.
    """
    keys = {text.partition("=")[0] for text in argv}
    systems = []
    for cfg in expand([*(text for text in defaults if text.partition("=")[0] not in keys), *argv], baselines=True):
        folder = OmegaConf.select(cfg, "method.guard.folder")
        if folder is None or project_path(folder).is_dir():
            systems.append(cfg)
        else:
            log.warning("the guard of %s is left out: there is no such folder", folder)
    if all(cfg.method.name == "none" for cfg in systems):
        raise ValueError(
            "expected at least one system with a guard that is there, got none: name one, as guard=keyword"
        )
    return systems
