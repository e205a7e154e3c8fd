"""The set-up of an experiment with your own policy: its checks, and the split of its reference images.

Methods are given some images of a concept, and the scorecard is measured against others, or it would only tell whether
the system avoids those very images.
"""

import functools
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from eval.files import content_hash
from experiments import project_path
from negtome.guard import Policy, read_policy
from negtome.guard.lint import FEWEST_HELD_OUT, lint
from negtome.guard.policy import VERSION
from negtome.guard.references import GUIDANCE, HELD_OUT, SCORING, References, is_folder_name, read_references

log = logging.getLogger(__name__)

#: In a laid-out folder, written last: the original of each image.
SPLIT = "split.json"
#: In a laid-out folder, and in a configuration: the held-out images of the output check.
CHECK_HELD_OUT = "check_held_out"
#: In a laid-out folder: the policy without the concepts that have no images.
CHECKED = "policy.yaml"
#: Class of prompts that are generated from a policy.
GENERATED = "experiments.safety.requests.PolicyPrompts"
CHECK = "python -m negtome.guard check --policy {} lists all faults"


def is_generated(cfg: DictConfig) -> bool:
    """Tell whether the requests of a configuration are generated from its policy."""
    return cfg.prompts.get("_target_") == GENERATED


def configure(cfg: DictConfig) -> None:
    """Put `policy` and `references` of a configuration where methods, prompts and metrics read them.

    Raises:
        FileNotFoundError, ValueError: the policy or the images cannot be used, or the prompts are of another policy.
    """
    if not is_generated(cfg):
        raise ValueError(
            "policy= and references= need requests that are generated from the policy, got "
            f"prompts={cfg.prompts.get('name')}: give experiment=own_policy, or prompts=policy"
        )
    if cfg.policy is not None:
        cfg.model.copyright.policy = str(Path(cfg.policy).expanduser().absolute())
    if cfg.model.copyright.policy is None:
        raise FileNotFoundError("expected the file of a policy beside references=, got none: policy=FILE")
    policy = read_policy(cfg.model.copyright.policy)
    if errors := lint(policy).errors:
        raise ValueError(f"{errors[0]}; {CHECK.format(cfg.model.copyright.policy)}")
    if cfg.references is None:
        return
    folder = str(Path(cfg.references).expanduser().absolute())
    laid_out = lay_out(policy, folder, str(project_path(cfg.outputs)))
    cfg.model.copyright.guidance, cfg.model.copyright.scoring = str(laid_out / GUIDANCE), str(laid_out / SCORING)
    concepts = sorted(path.name for path in (laid_out / GUIDANCE).iterdir())
    if len(concepts) < len(policy.clauses):  # what has no images can neither be detected nor be measured
        cfg.prompts.concepts = concepts
        if "check" in cfg.method:
            cfg.method.check.policy = str(laid_out / CHECKED)
    if (laid_out / HELD_OUT).is_dir():
        cfg.model.copyright.held_out = str(laid_out / HELD_OUT)
        cfg.model.copyright.check_held_out = str(laid_out / CHECK_HELD_OUT)


def lay_out(policy: Policy, folder: str | Path, outputs: str | Path) -> Path:
    """Copy the reference images of a policy into `<outputs>/references/DIGEST/{guidance,scoring}/NAME`.

    Concepts without images are left out, and the part of the policy that is left is written beside the images. Folders
    that are split already stay so. Otherwise the images of each concept are split in turns, in the order of
    their names; near copies of an image go where it goes. Every second held-out image is for the output check.

    Args:
        policy: whose concepts count.
        folder: of the images; see `negtome.guard.references` for the layouts.
        outputs: folder of outputs.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no concept has an image, or one that is to be steered has none, or none to be measured against.
    """
    references = read_references(folder, [clause.asset for clause in policy.clauses])
    if unfit := [name for name in references.images if not is_folder_name(name)]:
        raise ValueError(f"expected assets that can name a folder, got {', '.join(map(repr, unfit))}: rename them")
    absent = set(references.absent)
    steered = [clause.asset for clause in policy.clauses if clause.action == "steer" and clause.asset in absent]
    if steered or len(absent) == len(references.images):
        raise ValueError(
            f"expected images of every asset that is to be steered in {folder}, and of one at least, got none of "
            f"{', '.join((steered or references.absent)[:5])}: add a folder of that name, or files such as NAME-1.png"
        )
    if len(references.held_out) == 1:
        raise ValueError(f"expected {FEWEST_HELD_OUT} held-out images in {folder}, got 1: add some, or remove it")
    if references.foreign:
        raise ValueError(f"expected PNG, JPEG, WebP or BMP images, got {references.foreign[0]}: convert it to PNG")
    names = [(name, str(file), content_hash(file)) for name, files in references.images.items() for file in files]
    names += [("", str(mask), content_hash(mask)) for mask in references.masks.values()]
    names += [(kind, str(file), content_hash(file)) for kind, file in references.held_out]
    digest = hashlib.sha256(json.dumps([policy.sha256, str(references.folder), names]).encode()).hexdigest()[:12]
    target = Path(outputs) / "references" / digest
    if not (target / SPLIT).is_file():
        _write(target, policy, references)
    _announce(target)
    return target


def split(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Split the images of a concept: some for the methods, the others to measure against, none a copy of another's.

    Args:
        files: at least two images.

    Returns:
        Two lists, the first at most one longer than the second unless copies have to stay together.

    Raises:
        ValueError: all images are near copies of each other.
    """
    from experiments.methods.assets import near_copies  # loads torch

    sides: tuple[list[Path], list[Path]] = ([], [])
    for copies in near_copies(files):
        sides[len(sides[0]) > len(sides[1])].extend(copies)
    if not sides[1]:
        raise ValueError(
            f"expected at least two different images of {files[0].parent.name!r}, got {len(files)} that are one image "
            f"or near copies of it, the first {files[0]}: add images of other poses or views, since the scorecard is "
            "measured against images that the methods are not given"
        )
    return sides


def _write(target: Path, policy: Policy, references: References) -> None:
    """Write a laid-out folder, at once and only if it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        origins: dict[str, str] = {}
        for name, files in references.images.items():
            if not files:
                log.warning("%s has no images: it is neither checked nor measured", name)
                continue
            if references.is_split:
                scoring = list(references.scoring[name])
                guidance = [file for file in files if file not in set(scoring)]
                if not (guidance and scoring):
                    raise ValueError(
                        f"expected images of {name!r} in both {GUIDANCE}/ and {SCORING}/ of {references.folder}, got "
                        f"{len(guidance)} and {len(scoring)}: move some, or let all be split by putting them together"
                    )
            else:
                guidance, scoring = split(files)
            for side, chosen in ((GUIDANCE, guidance), (SCORING, scoring)):
                masks = references.masks if side == GUIDANCE else {}
                origins |= _copy(chosen, masks, Path(scratch), f"{side}/{name}")
        # The evaluator and the output check have a threshold each, and no image of the other's.
        for side, first_place in ((HELD_OUT, 0), (CHECK_HELD_OUT, 1)):
            by_kind: dict[str, list[Path]] = {}
            for kind, file in references.held_out[first_place::2]:
                by_kind.setdefault(kind, []).append(file)
            for kind, files in by_kind.items():
                origins |= _copy(files, {}, Path(scratch), f"{side}/{kind}")
        (Path(scratch) / CHECKED).write_text(json.dumps(_document(policy, references)), encoding="utf-8")
        (Path(scratch) / SPLIT).write_text(json.dumps(origins, indent=1) + "\n", encoding="utf-8")
        shutil.copytree(scratch, target, dirs_exist_ok=True)


def _document(policy: Policy, references: References) -> dict[str, Any]:
    """Return the clauses whose concepts have images as a document of a policy, without examples and exceptions."""
    clauses = [
        {"id": clause.id, "asset": clause.asset, "names": list(clause.names), "description": clause.description,
         "action": clause.action}
        for clause in policy.clauses if references.images[clause.asset]
    ]  # fmt: skip
    return {"version": VERSION, "clauses": clauses}


def _copy(files: Sequence[Path], masks: Mapping[Path, Path], root: Path, folder: str) -> dict[str, str]:
    """Copy images as FOLDER/00.png and so on, with their masks; return the original of each by its new name."""
    (root / folder).mkdir(parents=True)
    origins = {}
    for number, file in enumerate(files):
        name = f"{folder}/{number:02}{file.suffix.lower()}"
        shutil.copyfile(file, root / name)
        if file in masks:
            shutil.copyfile(masks[file], root / f"{folder}/{number:02}.mask.png")
        origins[name] = str(file)
    return origins


@functools.lru_cache(maxsize=64)
def _announce(target: Path) -> None:
    """Log which images are given to methods and which are measured against, once in a process."""
    origins = json.loads((target / SPLIT).read_text(encoding="utf-8"))
    names: dict[tuple[str, str], list[str]] = {}
    for path, origin in origins.items():
        side, name, _ = path.split("/")
        names.setdefault((name, side), []).append(Path(origin).name)
    for name in (name for name, side in names if side == GUIDANCE):
        text = "%s: methods are given %s; the scorecard is measured against %s"
        log.info(text, name, ", ".join(names[name, GUIDANCE]), ", ".join(names[name, SCORING]))
