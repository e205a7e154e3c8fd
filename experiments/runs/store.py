"""The folders of runs: complete groups are kept, missing groups are generated, and settings never mix.

A run's id is a hash of everything that affects pixels: the request, the weights' content, the software and the kind of
device. A group of images appears in the folder by one atomic rename, so that an interruption at any moment leaves
complete groups only, and several processes may work in one folder.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from omegaconf import OmegaConf
from PIL import Image

from eval import files
from eval.files import cached_hash, content_hash, read_json, read_regular, with_checksum, write_text
from eval.images import MANIFEST, WITHHELD, ManifestRow, Withheld, WithheldRow, write_manifest, write_withheld
from experiments import project_path
from experiments.plan import RunSpec, plan_file
from experiments.prompts import Group
from experiments.runs import checkpoints
from experiments.runs.identity import environment, short_digest

#: In a group's folder: the manifest's rows, or the reason why there are no images, and the method's statistics.
RECORD = "group.json"

#: Folder of all runs, in `outputs`.
RUNS = "runs"

#: Folder of the locks, beside the runs: a file for each group that is being generated.
LOCKS = ".locks"


@dataclass(frozen=True)
class Run:
    """The folder of one run, `<outputs>/runs/<run_id>/`, which several experiments may share."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def complete(self) -> bool:
        return (self.folder / "complete").exists()

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that the run id hashes.

        Raises:
            ValueError: the file was edited, so the folder's name no longer identifies its content.
        """
        path = self.folder / "config.yaml"
        try:
            status = path.stat()
            identity = _read_identity(path, status.st_size, status.st_mtime_ns)
            digest = short_digest(identity)
            _ = identity["request"], identity["machine"]
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{path} cannot be read ({reason}): restore it, or move the folder away") from error
        if digest != self.id:
            raise ValueError(
                f"{path} does not hash to its folder's name {self.id}: it was edited. "
                "Restore it, or move the folder away and generate again"
            )
        return identity

    @property
    def environment(self) -> dict[str, Any]:
        """Commit, date, platform and CPU, recorded when the run began; "unknown" if the file was lost.

        Raises:
            ValueError: the file holds something else.
        """
        path = self.folder / "environment.json"
        try:
            recorded = read_json(path)
        except FileNotFoundError:
            return dict.fromkeys(("commit", "date", "python", "platform", "cpu"), "unknown")
        if not isinstance(recorded, dict) or not {"commit", "date", "python"} <= recorded.keys():
            raise ValueError(f"expected when and by what a run was made in {path}, got other JSON: delete it")
        return recorded

    def begin(self, identity: Mapping[str, Any], device: str) -> None:
        """Create the folder of a planned run, unless it exists."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "config.yaml").exists():
            files.write_json(self.folder / "environment.json", environment(device))
            write_text(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(identity)))
        _ = self.identity  # fails here and not after hours, should the file be damaged

    @classmethod
    def of(cls, spec: RunSpec) -> Self:
        """Return the complete run of a spec, on whatever machine it was generated.

        Raises:
            FileNotFoundError: there is none, or it was made with other weights than those on this machine.
            ValueError: its identity or its manifest was changed.
        """
        cfg, cure = spec.cfg, "run python -m experiments generate with the same overrides"
        if spec.id is None:
            raise FileNotFoundError(
                f"expected a complete run of model={cfg.model.name} method={cfg.method.name} with these settings in "
                f"{plan_file(cfg)}: {cure}; complete groups are kept"
            )
        run = cls(project_path(cfg.outputs) / RUNS / spec.id)
        if not run.complete:
            raise FileNotFoundError(f"the run of method={cfg.method.name}, {run.folder}, is unfinished or gone: {cure}")
        weights = checkpoints.local_fingerprint(cfg.model)
        if weights not in (None, run.identity["weights"]):
            raise FileNotFoundError(
                f"{run.folder} was made with other weights than those of {cfg.model.source}: {cure}"
            )
        run.check_manifest()
        return run

    def check_alike(self, baseline: Self) -> None:
        """Raise ValueError if a run and its baseline are of different weights or machines."""
        for part in ("weights", "machine"):
            ours, theirs = self.identity[part], baseline.identity[part]
            if ours != theirs:
                raise ValueError(
                    f"expected {self.folder} and {baseline.folder}, with which it is paired, of the same {part}, got "
                    f"{ours} and {theirs}: generate both on one machine"
                )

    def records(self) -> dict[str, dict[str, Any]]:
        """Return the record of every group by its id, including groups without images.

        Raises:
            ValueError: a record was edited.
        """
        files = sorted(self.folder.glob(f"images/*/[0-9]*/{RECORD}"))
        return {f"{file.parts[-3]}/{file.parts[-2]}": _read_record(file) for file in files}

    def statistics(self) -> list[dict[str, Any]]:
        """Return the method's statistics of every group that has images; ValueError as of `records`."""
        return [record["stats"] for record in self.records().values() if "withheld" not in record]

    def check_manifest(self) -> None:
        """Raise ValueError if a complete run's manifest, or list of withheld groups, was changed."""
        hashes = read_regular(self.folder / "complete").decode().split("\n")
        for name, expected in zip((MANIFEST, WITHHELD), [*hashes, None], strict=False):
            path = self.folder / name
            actual = hashlib.sha256(read_regular(path)).hexdigest() if path.exists() else None
            if actual != expected:
                raise ValueError(
                    f"expected the manifest that the run was completed with, got another {path}: it was edited, is "
                    "damaged or of an earlier version; run experiments.generate with the run's settings again"
                )

    def group_folder(self, group: Group) -> Path:
        return self.folder / "images" / group.prompt_id / f"{group.seed:06d}"

    def images(self, group: Group) -> list[Path]:
        """Return the files of a complete group's images, in their order."""
        return [self.folder / row["path"] for row in _read_record(self.group_folder(group) / RECORD)["rows"]]

    def has(self, group: Group) -> bool:
        """Return whether all images of the group are as generated, or the reason why it has none is recorded."""
        return self.fault(group) is None

    def fault(self, group: Group) -> str | None:
        """Return why the group has to be generated (again), naming the file; None if it is complete."""
        path = self.group_folder(group) / RECORD
        try:
            record = _read_record(path)
            images = [(self.folder / row["path"], row["sha256"]) for row in record["rows"]]
            if record["run"] != self.id or any(image.parent != path.parent for image, _ in images):
                return f"{path} is of another run or group"
            withheld = WithheldRow(**record["withheld"]) if "withheld" in record else None
            is_other = withheld is not None and withheld != _withheld_row(group, withheld)
            if is_other or (withheld is None) != bool(images):
                return f"{path} is of another group, or says neither which images there are nor why there are none"
            for image, sha256 in images:
                if cached_hash(image) != sha256:
                    return f"{image} is not the image that was generated"
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            return str(error)
        return None

    def save(
        self,
        group: Group,
        images: list[Image.Image],
        statistics: dict[str, Any],
        references: Mapping[str, float] | None = None,
        withheld: Withheld | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        """Write the images of a group and its record, which appear together by one rename.

        Args:
            group, images: the group, and its images in their order.
            statistics, references, withheld, seeds: as of `experiments.methods.method.GroupResult`.
        """
        folder = self.group_folder(group)
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        record: dict[str, Any] = {"run": self.id, "rows": [], "stats": statistics}
        if withheld is not None:
            record["withheld"] = _withheld_row(group, withheld).to_dict()
        seeds = [] if withheld is not None else (seeds or group.image_seeds())
        try:
            temporary.mkdir(parents=True)
            for index, (seed, image) in enumerate(zip(seeds, images, strict=True)):
                file = temporary / f"{index:02d}.png"
                image.save(file)
                row = ManifestRow(
                    path=(folder / file.name).relative_to(self.folder).as_posix(),
                    prompt_id=group.prompt_id,
                    prompt=group.prompt,
                    category=group.category,
                    group_seed=group.seed,
                    index=index,
                    seed=seed,
                    references=None if references is None else dict(references),
                    sha256=content_hash(file),
                )
                record["rows"].append(row.to_dict())
            (temporary / RECORD).write_text(json.dumps(with_checksum(record), indent=1) + "\n")
            if folder.exists() and not self.has(group):
                shutil.rmtree(folder)  # see `fault`
            os.rename(temporary, folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)  # above all on a full disk
            # Another process may have been faster, and `finish` then swept up: its images are the same.
            if not (isinstance(error, OSError) and self.has(group)):
                raise

    def lock(self, group: Group) -> Path:
        """Return the file that a process locks while it generates a group, so that no other one does."""
        return self.folder.parent / LOCKS / f"{self.id}.{group.prompt_id}.{group.seed:06d}"

    def finish(self, groups: list[Group]) -> bool:
        """Write the manifests and mark the run as complete, if all groups are there; return whether they are.

        The mark is the manifest's hash and, if groups are withheld, the hash of their list in a second line.
        """
        if not all(self.has(group) for group in groups):
            return False
        for leftover in self.folder.glob("images/*/.*"):
            # Half-written groups of killed processes: with every group there, a live one could only repeat another's.
            shutil.rmtree(leftover, ignore_errors=True)
        for lock in self.folder.parent.glob(f"{LOCKS}/{self.id}.*"):
            with contextlib.suppress(OSError):
                lock.unlink()
        records = [_read_record(self.group_folder(group) / RECORD) for group in groups]
        manifests = [write_manifest(self.folder, [ManifestRow(**row) for record in records for row in record["rows"]])]
        withheld = [WithheldRow(**record["withheld"]) for record in records if "withheld" in record]
        write_withheld(self.folder, withheld)
        if withheld:
            manifests.append(self.folder / WITHHELD)
        write_text(self.folder / "complete", "\n".join(map(content_hash, manifests)))
        return True


def _withheld_row(group: Group, withheld: Withheld) -> WithheldRow:
    """Return the row of a group in the manifest of withheld groups."""
    return WithheldRow(
        status=withheld.status,
        reason=withheld.reason,
        clauses=withheld.clauses,
        prompt_id=group.prompt_id,
        prompt=group.prompt,
        category=group.category,
        group_seed=group.seed,
    )


@functools.lru_cache(maxsize=4096)
def _read_identity(path: Path, size: int, changed: int) -> dict[str, Any]:
    text = read_regular(path)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    # Aliases of aliases make a small file an endless configuration; the files of runs have none.
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
        raise ValueError("it has aliases")
    return yaml.load(text, loader)


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    files.verify_checksum(record, path)
    return record
