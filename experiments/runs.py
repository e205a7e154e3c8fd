"""A run's identity and its folder: what is complete is skipped, what is half done goes on, settings never mix.

The identity is a hash of everything that affects pixels: the request (model, method, prompts as configured), the
weights' content, the software and the kind of device. A group of images appears in the folder by one atomic rename, so
an interruption at any moment leaves whole groups only, and several processes may work in one folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from eval.images import ManifestRow, write_manifest, write_text
from experiments import PROJECT, project_path
from experiments.methods import Method
from experiments.prompts import Group, PromptSet

#: Raise when experiments/generate.py would make other pixels from the same settings.
GENERATION_VERSION = 1


def canonical(value: Any) -> str:
    """Return `value` as JSON with sorted keys and without spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def run_id(identity: dict[str, Any]) -> str:
    """Return the first 12 hex digits of the SHA-256 of `identity` in canonical JSON."""
    return hashlib.sha256(canonical(identity).encode()).hexdigest()[:12]


def select_device(name: str) -> str:
    """Return the torch device that `device=NAME` means.

    Raises:
        ValueError: the device is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.split(":")[0]
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(kind, False):
        there = [kind for kind, available in present.items() if available]
        raise ValueError(f"device={name} is not available here: expected auto or one of {there}")
    return name


def request(cfg: DictConfig) -> dict[str, Any]:
    """Return what the configuration asks for, as far as it affects pixels: no weights or machine needed to know it."""
    method: Method = instantiate(cfg.method)
    prompts: PromptSet = instantiate(cfg.prompts)
    model = OmegaConf.to_container(cfg.model, resolve=True)
    return {
        "version": GENERATION_VERSION,
        "model": {
            key: model[key]
            for key in ("name", "kind", "architecture", "source", "revision", "variant", "dtype", "call")
        },
        "method": {"name": method.name, "settings": _plain(method.settings())},
        "prompts": {
            "name": prompts.name,
            "split": prompts.split,
            "images_per_prompt": prompts.images_per_prompt,
            "groups": [[group.category, group.prompt, group.seed] for group in prompts.groups()],
        },
        "compile": bool(cfg.compile),
    }


def made_by(cfg: DictConfig, device: str) -> dict[str, Any]:
    """Return what of the machine, its software and the method's code may change pixels."""
    return {
        "machine": {
            "device": torch.device(device).type,
            **{package: version(package) for package in ("torch", "diffusers", "transformers")},
        },
        "code": instantiate(cfg.method).code(),
    }


@dataclass(frozen=True)
class Run:
    """One run's folder, `<outputs>/<experiment>/<model>/<method>/<run_id>/`.

    Use `Run.start` to generate, `Run.find` to score what was generated.
    """

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
            ValueError: the file was changed by hand, so the folder's name no longer tells what is in it.
        """
        path = self.folder / "config.yaml"
        try:
            identity = OmegaConf.to_container(OmegaConf.load(path))
        except Exception as error:
            raise ValueError(f"{path} cannot be read ({error}): restore it, or move the folder away") from error
        if run_id(identity) != self.id:
            raise ValueError(
                f"{path} does not hash to its folder's name {self.id}: it was edited. "
                "Restore it, or move the folder away and generate again"
            )
        return identity

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, commit, device and date, as recorded when the run began."""
        return json.loads((self.folder / "environment.json").read_text())

    @classmethod
    def start(cls, cfg: DictConfig, weights: str, device: str) -> Run:
        """Open the run that `cfg` asks for, making its folder if it is new.

        Args:
            cfg: the composed configuration.
            weights: fingerprint of the checkpoint's content (`pipelines.Checkpoint.fingerprint`).
            device: torch device.
        """
        identity = {"request": request(cfg), "weights": weights, **made_by(cfg, device)}
        run = cls(_method_folder(cfg) / run_id(identity))
        run.folder.mkdir(parents=True, exist_ok=True)
        if not (run.folder / "environment.json").exists():
            write_text(
                run.folder / "environment.json",
                json.dumps(_environment(device), indent=2, sort_keys=True) + "\n",
            )
        if not (run.folder / "config.yaml").exists():
            write_text(run.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(identity)))
        _ = run.identity  # fails here and not after hours, should the file be damaged
        return run

    @classmethod
    def find(cls, cfg: DictConfig) -> Run:
        """Return the complete run that `cfg` asks for, wherever and with whatever versions it was generated.

        Raises:
            FileNotFoundError: there is none, or only unfinished ones.
            ValueError: there are several and `run_id=` does not say which.
        """
        folder = _method_folder(cfg)
        wanted = request(cfg)
        runs = [cls(path.parent) for path in sorted(folder.glob("*/config.yaml"))]
        runs = [run for run in runs if cfg.run_id in (None, run.id) and run.identity["request"] == wanted]
        done = [run for run in runs if run.complete]
        command = "python -m experiments.generate with the same overrides"
        if not done:
            state = "only unfinished ones" if runs else "none"
            raise FileNotFoundError(f"No complete run with these settings under {folder} ({state}): run {command}")
        if len(done) > 1:
            here = made_by(cfg, select_device(cfg.device))
            done = [run for run in done if here.items() <= run.identity.items()] or done
        if len(done) > 1:
            listing = "; ".join(f"{run.id}: {run.identity['machine']}, code {run.identity['code']}" for run in done)
            raise ValueError(f"Several runs have these settings; add run_id=ID to choose one of {listing}")
        return done[0]

    def group_folder(self, group: Group) -> Path:
        return self.folder / "images" / group.prompt_id / f"{group.seed:06d}"

    def has(self, group: Group) -> bool:
        """Tell whether the group's images are all there."""
        folder = self.group_folder(group)
        return (folder / "group.json").exists() and all(
            (folder / f"{index:02d}.png").exists() for index in range(group.size)
        )

    def save(self, group: Group, images: list[Image.Image], statistics: dict[str, Any]) -> None:
        """Write a group's images and record; they appear together, by one rename."""
        folder = self.group_folder(group)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        temporary.mkdir()
        for index, image in enumerate(images):
            image.save(temporary / f"{index:02d}.png")
        rows = [asdict(row) for row in self._rows(group)]
        (temporary / "group.json").write_text(json.dumps({"rows": rows, "stats": statistics}, indent=1) + "\n")
        if folder.exists() and not self.has(group):
            shutil.rmtree(folder)  # files were taken out of it by hand
        try:
            os.rename(temporary, folder)
        except OSError:
            if not self.has(group):
                raise
            shutil.rmtree(temporary)  # another process was faster; its images are the same

    def finish(self, groups: list[Group]) -> bool:
        """Write the manifest and the mark of completeness if every group is there; tell whether it is complete."""
        if not all(self.has(group) for group in groups):
            return False
        for leftover in self.folder.glob("images/*/.*"):
            shutil.rmtree(leftover, ignore_errors=True)  # half-written groups of killed processes
        write_manifest(self.folder, [row for group in groups for row in self._rows(group)])
        write_text(self.folder / "complete", "")
        return True

    def _rows(self, group: Group) -> list[ManifestRow]:
        folder = self.group_folder(group).relative_to(self.folder).as_posix()
        return [
            ManifestRow(
                path=f"{folder}/{index:02d}.png",
                prompt_id=group.prompt_id,
                prompt=group.prompt,
                category=group.category,
                group_seed=group.seed,
                index=index,
                seed=seed,
            )
            for index, seed in enumerate(group.image_seeds())
        ]


def _method_folder(cfg: DictConfig) -> Path:
    return project_path(cfg.outputs) / cfg.name / cfg.model.name / cfg.method.name


def _plain(value: Any) -> Any:
    """Return `value` as JSON would give it back, so that it equals what is read from a file."""
    return json.loads(canonical(value))


def _environment(device: str) -> dict[str, Any]:
    git = ["git", "-C", str(PROJECT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": (commit or "unknown") + ("+changes" if commit and changed else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
