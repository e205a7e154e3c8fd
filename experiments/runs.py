"""A run's identity and its folder: what is complete is skipped, what is half done goes on, settings never mix.

The identity is a hash of everything that affects pixels: the request (model, method, prompts as configured), the
weights' content, the software and the kind of device. A group of images appears in the folder by one atomic rename, so
an interruption at any moment leaves whole groups only, and several processes may work in one folder.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import hashlib
import io
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from PIL import Image

import negtome
from eval.files import check_seal, content_hash, read_json, read_regular, remembered_hash, sealed, sweep, write_text
from eval.images import MANIFEST, ManifestRow, write_manifest
from experiments import PROJECT, pipelines, project_path, select_device
from experiments.configs import build, flag
from experiments.locks import locked
from experiments.methods.method import Baseline, Method
from experiments.prompts import Group, PromptSet

log = logging.getLogger(__name__)

#: Raise when experiments/generate.py would make other pixels from the same settings.
GENERATION_VERSION = 1

#: What was generated in a group's folder: the manifest's rows, and the log's numbers.
RECORD = "group.json"

#: Bytes of the largest config.yaml that is read: some hundred thousand groups.
LARGEST_IDENTITY = 1 << 24

#: Where the locks of a run lie while it is generated, a file a group.
LOCKS = ".locks"


def canonical(value: Any) -> str:
    """Return `value` as JSON with sorted keys and without spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def run_id(identity: dict[str, Any]) -> str:
    """Return the first 12 hex digits of the SHA-256 of `identity` in canonical JSON."""
    return hashlib.sha256(canonical(identity).encode()).hexdigest()[:12]


def request(cfg: DictConfig, method: Method | None = None) -> dict[str, Any]:
    """Return what the configuration asks for, as far as it affects pixels: no weights or machine needed to know it.

    Args:
        cfg: the composed configuration.
        method: in place of the configured one.
    """
    method = build(cfg.method) if method is None else method
    prompts: PromptSet = build(cfg.prompts)
    model = OmegaConf.to_container(cfg.model, resolve=True)
    # What means the same is spelled the same.
    model |= {
        "source": pipelines.canonical_source(cfg.model.source),
        "dtype": str(pipelines.torch_dtype(cfg.model)).removeprefix("torch."),
        "call": pipelines.call_arguments(cfg.model),
    }
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
        "compile": flag(cfg, "compile"),
    }


def made_by(method: Method, weights: str | None, device: str) -> dict[str, Any]:
    """Return what may change pixels beside the request: weights, machine, software and the method's version."""
    return {
        "weights": weights,
        "machine": {
            # The model of a GPU, since kernels differ; CPUs differ less, and have no name that is the same everywhere.
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.device(device).type,
            **{package: version(package) for package in ("torch", "diffusers", "transformers")},
        },
        "code": _version(method),
    }


def _version(method: Method) -> int | None:
    return method.version or None  # the baseline has none: what all runs share is in the request


#: What makes the images, beside the run's settings and the software installed: other code may make others.
CODE = (
    *sorted(Path(negtome.__file__).parent.glob("*.py")),
    *(Path(__file__).with_name(f"{name}.py") for name in ("generate", "pipelines", "prompts")),
    *sorted(Path(__file__).with_name("methods").glob("*.py")),
)


@functools.cache
def maker(device: str) -> dict[str, str | None]:
    """Return what made a group and is in no run id: the CPU's instructions, where it computes, and a digest of `CODE`.

    Comments and layout of the code do not count, nor does the version of Python that reads it.
    """
    digest = hashlib.sha256()
    for file in CODE:
        digest.update(_tree(file.read_text(encoding="utf-8")).encode())
    capability = torch.backends.cpu.get_cpu_capability() if torch.device(device).type == "cpu" else None
    return {"cpu": capability, "generation_code": digest.hexdigest()[:12]}


def _tree(code: str) -> str:
    """Return the syntax tree of code in words, as Python 3.11 has it: 3.12 adds an empty list, 3.13 leaves all out."""
    shown = {"show_empty": True} if sys.version_info >= (3, 13) else {}
    return ast.dump(ast.parse(code), **shown).replace(", type_params=[]", "")


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
            status = path.stat()
            identity = _read_identity(path, status.st_size, status.st_mtime_ns)
            found = run_id(identity)
            _ = identity["request"], identity["machine"]
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{path} cannot be read ({reason}): restore it, or move the folder away") from error
        if found != self.id:
            raise ValueError(
                f"{path} does not hash to its folder's name {self.id}: it was edited. "
                "Restore it, or move the folder away and generate again"
            )
        return identity

    @property
    def environment(self) -> dict[str, Any]:
        """Commit, date, platform and `maker`, as recorded when the run began; "unknown" where that was lost.

        Raises:
            ValueError: the file holds something else.
        """
        path = self.folder / "environment.json"
        try:
            recorded = read_json(path)
        except FileNotFoundError:
            return dict.fromkeys(_environment("cpu"), "unknown")
        if not isinstance(recorded, dict) or not {"commit", "date", "python"} <= recorded.keys():
            raise ValueError(f"expected when and by what a run was made in {path}, got other JSON: delete it")
        return recorded

    @classmethod
    def start(cls, cfg: DictConfig, weights: str, device: str) -> Run:
        """Open the run that `cfg` asks for, making its folder if it is new.

        Args:
            cfg: the composed configuration.
            weights: fingerprint of the checkpoint's content (`pipelines.Checkpoint.fingerprint`).
            device: torch device.
        """
        method: Method = build(cfg.method)
        identity = {"request": request(cfg, method), **made_by(method, weights, device)}
        run = cls(_model_folder(cfg) / cfg.method.name / run_id(identity))
        run.folder.mkdir(parents=True, exist_ok=True)
        for pattern in (".*.tmp", "images/*/.*"):
            sweep(run.folder, pattern)
        if not (run.folder / "environment.json").exists():
            if run._begun():  # not here and now
                log.warning(
                    "%s/environment.json is lost: when and by which commit its images were made is unknown", run.folder
                )
            else:
                run._write_environment(_environment(device))
        if not (run.folder / "config.yaml").exists():
            write_text(run.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(identity)))
        _ = run.identity  # fails here and not after hours, should the file be damaged
        return run

    @classmethod
    def find(cls, cfg: DictConfig) -> Run:
        """Return the complete run that `cfg` asks for, wherever and with whatever software it was generated.

        It is of the method as it is now; where there are several, of this machine and these weights.

        Raises:
            FileNotFoundError: there is none, or only unfinished ones.
            ValueError: there are several, none of them made here, and `run_id=` does not say which; or its manifest was
                changed.
        """
        return cls._find(cfg, build(cfg.method))

    @classmethod
    def find_baseline(cls, cfg: DictConfig) -> Run:
        """Return the complete run without any method that is otherwise as `cfg` asks; see `find`."""
        return cls._find(cfg, Baseline())

    @classmethod
    def _find(cls, cfg: DictConfig, method: Method) -> Run:
        folder, wanted = _model_folder(cfg) / method.name, request(cfg, method)
        runs, damaged = [], []
        for path in sorted(folder.glob("*/config.yaml")):
            try:
                run = cls(path.parent)
                if run.identity["request"] == wanted and run.identity.get("code") == _version(method):
                    runs.append(run)
            except ValueError as error:
                damaged.append(error)
        done = [run for run in runs if run.complete]
        if damaged and not done:
            raise damaged[0]
        for error in damaged:
            log.warning("left out: %s", error)
        if not done:
            state = "only unfinished ones" if runs else "none"
            raise FileNotFoundError(
                f"No complete run with these settings under {folder} ({state}): "
                f"run python -m experiments.generate with the same overrides and method={method.name}"
            )
        if len(done) > 1:
            chosen = [run for run in done if run.id in str(cfg.run_id).split("+")]
            if not chosen:
                here = made_by(method, pipelines.local_fingerprint(cfg.model), select_device(cfg.device))
                chosen = [run for run in done if here.items() <= run.identity.items()]
            done = chosen or done
        if len(done) > 1:
            listing = "; ".join(
                f"{run.id}: {run.identity['machine']}, weights {run.identity['weights']}" for run in done
            )
            raise ValueError(
                f"Several runs have these settings and none was made here: {listing}. Name one with run_id=ID (for a "
                "sweep run_id=ID+ID+...), or move the others away"
            )
        done[0].check_manifest()
        return done[0]

    def statistics(self) -> list[dict[str, Any]]:
        """Return what was recorded of every group while it was generated.

        Raises:
            ValueError: a record holds other values than were written.
        """
        return [_read_record(path)["stats"] for path in sorted(self.folder.glob(f"images/*/[0-9]*/{RECORD}"))]

    def check_manifest(self) -> None:
        """Raise ValueError where the manifest of a complete run is not the one that the run was completed with."""
        manifest = hashlib.sha256(read_regular(self.folder / MANIFEST)).hexdigest()
        if read_regular(self.folder / "complete").decode() != manifest:
            raise ValueError(
                f"expected the manifest that the run was completed with, got another {self.folder / MANIFEST}: it was "
                "edited, is damaged or of an earlier version; run experiments.generate with the run's settings again"
            )

    def group_folder(self, group: Group) -> Path:
        return self.folder / "images" / group.prompt_id / f"{group.seed:06d}"

    def has(self, group: Group) -> bool:
        """Tell whether the group's images are all there, as they were generated."""
        return self.fault(group) is None

    def fault(self, group: Group) -> str | None:
        """Say in words why the group's images cannot be taken, naming the file; None where they are as generated."""
        path = self.group_folder(group) / RECORD
        try:
            record = _read_record(path)
            rows = [ManifestRow(**row) for row in record["rows"]]
            wanted = self._rows(group, None, [row.sha256 for row in rows])
            if record["run"] != self.id or [replace(row, references=None) for row in rows] != wanted:
                return f"{path} is of another run or group"
            for row in rows:
                if remembered_hash(self.folder / row.path) != row.sha256:
                    return f"{self.folder / row.path} is not the image that was generated"
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            return str(error)
        return None

    def save(
        self,
        group: Group,
        images: list[Image.Image],
        statistics: dict[str, Any],
        references: Mapping[str, float] | None = None,
        made: Mapping[str, str | None] | None = None,
    ) -> None:
        """Write a group's images and record; they appear together, by one rename.

        Args:
            group: what was generated.
            images: as many as the group's size.
            statistics: what the log should keep, as JSON values.
            references: pictures that the method was given, with the score by which each was found.
            made: see `maker`.
        """
        with self._appearing(group) as temporary:
            temporary.mkdir()
            files = [temporary / f"{index:02d}.png" for index in range(len(images))]
            for file, image in zip(files, images, strict=True):
                image.save(file)
            rows = [row.to_dict() for row in self._rows(group, references, map(content_hash, files))]
            record = sealed({"run": self.id, "made": made, "rows": rows, "stats": statistics})
            (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def _write_environment(self, environment: dict[str, Any]) -> None:
        write_text(self.folder / "environment.json", json.dumps(environment, indent=2, sort_keys=True) + "\n")

    def _begun(self) -> bool:
        return any(self.folder.glob(f"images/*/[0-9]*/{RECORD}"))

    def _made(self, group: Group) -> dict[str, str | None] | None:
        return _read_record(self.group_folder(group) / RECORD)["made"]

    def check_makers(self, groups: list[Group], device: str, mixed: bool) -> None:
        """Refuse to go on with a run whose images other code made, or another kind of CPU.

        Args:
            groups: all of the run.
            device: that generates.
            mixed: go on all the same; `finish` says so.

        Raises:
            ValueError: with what made them and what would go on.
        """
        now = maker(device)
        sound = [group for group in groups if self.has(group)]
        if not sound:
            self._write_environment(_environment(device))
        others = {canonical(made) for group in sound if (made := self._made(group)) != now}
        if not others or mixed:
            return
        raise ValueError(
            f"{self.folder} was begun by {' and '.join(sorted(others))}, and here is {canonical(now)}: its images "
            "would be of several makes. Finish it there, move it away to make all of it here, or go on nevertheless "
            "with resume_any=true"
        )

    def take_over(self, groups: list[Group], device: str) -> int:
        """Take over groups that runs of other experiments have, as far as this run lacks them; return how many.

        A run of the same id has the same pixels, whatever it was made for: ablations share their baseline and the
        model's own strengths. What another `maker` made is taken over as a whole or not at all. Files are linked where
        the disk can do that, else copied.
        """
        place, taken, sources = self.folder.relative_to(self.folder.parents[2]), 0, []
        own = self._begun()
        for experiment in sorted(self.folder.parents[3].iterdir()):
            other = Run(experiment / place)
            if other == self or not (other.folder / "config.yaml").is_file():
                continue
            try:
                _ = other.identity
            except ValueError:  # edited: not what its name says
                continue
            offered = [group for group in groups if not self.has(group) and other.has(group)]
            if own or taken or len(offered) < len(groups):
                offered = [group for group in offered if other._made(group) == maker(device)]
            for group in offered:
                with self._appearing(group) as temporary:
                    shutil.copytree(other.group_folder(group), temporary, copy_function=_link_or_copy)
                taken += 1
                sources.append(other)
        if sources and not own and len(set(sources)) == 1:
            # Where and when it was made is where and when its images were.
            self._write_environment(sources[0].environment)
        return taken

    @contextlib.contextmanager
    def _appearing(self, group: Group) -> Iterator[Path]:
        """Give a folder's name to fill that becomes the group's at the end of the `with` block, by one rename."""
        folder = self.group_folder(group)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            yield temporary
            if folder.exists() and not self.has(group):
                shutil.rmtree(folder)  # see `fault`
            os.rename(temporary, folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk above all
            # Another process may have been faster, and `finish` then swept up: its images are the same.
            if not (isinstance(error, OSError) and self.has(group)):
                raise

    @contextlib.contextmanager
    def claim(self, group: Group, wait: bool) -> Iterator[bool]:
        """Reserve a group for the length of a `with` block, so that no two processes generate it.

        Args:
            group: what is to be generated.
            wait: whether to wait where another process has reserved it.

        Yields:
            Whether the group is this process's to generate: it is not there, and no other has reserved it.
        """
        if self.has(group):
            yield False
            return
        with locked(self.folder / LOCKS / f"{group.prompt_id}.{group.seed:06d}", wait) as mine:
            yield mine and not self.has(group)

    def finish(self, groups: list[Group]) -> bool:
        """Write the manifest and the mark of completeness if every group is there; tell whether it is complete."""
        if not all(self.has(group) for group in groups):
            return False
        for leftover in self.folder.glob("images/*/.*"):
            # Half-written groups of killed processes: with every group there, a live one could only repeat another's.
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.rmtree(self.folder / LOCKS, ignore_errors=True)
        records = [_read_record(self.group_folder(group) / RECORD) for group in groups]
        makers = sorted({canonical(record["made"]) for record in records})
        if len(makers) > 1:
            log.warning("%s: its images are of several makes: %s", self.folder, " and ".join(makers))
        rows = [ManifestRow(**row) for record in records for row in record["rows"]]
        write_text(self.folder / "complete", content_hash(write_manifest(self.folder, rows)))
        return True

    def _rows(
        self, group: Group, references: Mapping[str, float] | None, hashes: Iterable[str | None]
    ) -> list[ManifestRow]:
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
                references=None if references is None else dict(references),
                sha256=sha256,
            )
            for index, (seed, sha256) in enumerate(zip(group.image_seeds(), hashes, strict=True))
        ]


def _model_folder(cfg: DictConfig) -> Path:
    return project_path(cfg.outputs) / cfg.name / cfg.model.name


@functools.lru_cache(maxsize=4096)
def _read_identity(path: Path, size: int, changed: int) -> dict[str, Any]:
    """Read a run's identity, at most once: in a sweep each run is looked for among all others."""
    text = read_regular(path, LARGEST_IDENTITY)
    # Aliases of aliases are a small file and an endless configuration; what is written here has none.
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, getattr(yaml, "CLoader", yaml.Loader))):
        raise ValueError("it has aliases")
    return OmegaConf.to_container(OmegaConf.load(io.StringIO(text.decode())))


def _read_record(path: Path) -> dict[str, Any]:
    """Read what a group's folder says of its images, as it was written."""
    record = read_json(path)
    check_seal(record, path)
    return record


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        shutil.copyfile(source, target)


def _plain(value: Any) -> Any:
    """Return `value` as JSON would give it back, so that it equals what is read from a file."""
    return json.loads(canonical(value))


def current_commit() -> str:
    """Return the checkout's commit, marked where code, configuration or models differ from it."""
    git = ["git", "-C", str(PROJECT)]
    code = ["--", "negtome", "eval", "experiments", "conf", "models"]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", *code]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        return "unknown"
    return commit + ("+changes" if changed.strip() else "")


def _environment(device: str) -> dict[str, Any]:
    return {
        "commit": current_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **maker(device),
    }
