"""Find, download and identify the weights of networks; `weights.yaml` describes each of them. No model is loaded.

A download is tried only if the server answers at once, so that an offline machine fails within seconds.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
import yaml

from eval.files import cached_hash

FACTS: Mapping[str, Mapping[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


#: Servers that did not answer: when, by `time.monotonic`, and why.
_silent: dict[str, tuple[float, str]] = {}


class Remote(NamedTuple):
    """The answer of a server about a download: bytes by file, and whether a licence must be accepted first."""

    sizes: dict[str, int]
    gated: bool = False


@dataclass(frozen=True)
class Download:
    """Something to download: the file of a URL, or files of a Hugging Face repository.

    Attributes:
        source: the URL, or OWNER/NAME.
        patterns: of the repository's files; () for a URL.
        revision: of the repository; None for the newest.
        one_of: whether the first pattern that the repository has a file for is enough.
    """

    source: str
    patterns: tuple[str, ...] = ()
    revision: str | None = None
    one_of: bool = False

    def remote(self, timeout: float = 5.0) -> Remote | None:
        """Ask the server which files would be downloaded; None if it does not say. Nothing is downloaded.

        Args:
            timeout: seconds to wait for the server.
        """
        from huggingface_hub import constants, get_session, model_info

        if constants.HF_HUB_OFFLINE:
            return None
        try:
            if self.patterns:
                info = model_info(self.source, revision=self.revision, files_metadata=True, timeout=timeout)
                sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
                return Remote({name: sizes[name] for name in self.wanted(sizes)}, bool(info.gated))
            identity = {"Accept-Encoding": "identity"}  # the size of the file, and not of a compressed one
            answer = get_session().head(self.source, timeout=timeout, follow_redirects=True, headers=identity)
            return Remote({self.source: int(answer.raise_for_status().headers["Content-Length"])})
        except Exception:  # the kind of exception depends on the HTTP library of the installed version
            return None

    def wanted(self, names: Collection[str]) -> list[str]:
        """Return those of a repository's files that match the patterns."""
        by_pattern = (fnmatch.filter(names, pattern) for pattern in self.patterns)
        if self.one_of:
            return next(filter(None, by_pattern), [])
        return sorted(set(itertools.chain.from_iterable(by_pattern)))

    def absent(self, names: Iterable[str]) -> list[str]:
        """Return those of the files that are not in the hub's cache."""
        return [name for name in names if not (self.patterns and in_hub_cache(self.source, [name], self.revision))]


@dataclass(frozen=True)
class WeightsFacts:
    """A description of a network's weights before they are loaded; the texts are those of `weights.yaml`.

    Attributes:
        encoder: the network's name.
        files: the files on this machine; empty if any of them is missing.
        looked_in: the paths that were searched, in this order; empty if no file is needed.
        url: address of the file, which is downloaded to the first path searched; None if there is none.
        hub: arguments of `huggingface_hub.snapshot_download`; None if the files are not on the hub.
        expected: the beginning of the published file's `sha256`; "" if unknown.
    """

    encoder: str
    source: str
    files: tuple[Path, ...]
    looked_in: tuple[Path, ...]
    resize: str
    input_range: str
    licence: str
    how_to_get: str
    url: str | None = None
    hub: Mapping[str, Any] | None = None
    expected: str = ""

    @classmethod
    def of(
        cls,
        row: str,
        encoder: str,
        files: Sequence[Path] = (),
        looked_in: Sequence[Path] = (),
        local: bool = False,
        **values: Any,
    ) -> WeightsFacts:
        """Describe weights by a row of `weights.yaml`.

        Args:
            local: whether the user named the path, to which nothing is downloaded.
            values: values for the braces in the row's texts.
        """
        facts = {**FACTS[row], **(FACTS[row].get("local", {}) if local else {})}
        values["url"] = facts.get("url", "").format(**values)
        texts = {key: text.format(**values) for key, text in facts.items() if isinstance(text, str)}
        hub = {
            "repo_id": texts.get("repository"),
            "revision": values.get("revision"),
            "allow_patterns": facts.get("files"),
        }
        names = [Path(name.format(**values)).name for name in facts.get("files", ())]
        published = len(files) == 1 and files[0].name in names
        return cls(
            encoder=encoder,
            files=tuple(files),
            looked_in=tuple(looked_in),
            **{text: texts[text] for text in ("source", "resize", "input_range", "licence", "how_to_get")},
            url=None if local else texts.get("url"),
            hub=None if local or not hub["repo_id"] else hub,
            expected=published_hash(facts, files[0].name) if published else "",
        )

    @classmethod
    def find(cls, row: str, encoder: str, path: Path | None = None, **values: Any) -> WeightsFacts:
        """Search for weights at the user's path or at the publishers' default location.

        Args:
            row: a row with a `url`, any of whose files suffices, or with a `repository`, all of whose files are needed.
            path: the file, or the folder with a repository's files, that the user named.
        """
        names = [name.format(**values) for name in FACTS[row]["files"]]
        if repository := FACTS[row].get("repository", "").format(**values):
            searched = [path or hub_cache(repository)]
            files = [path / name for name in names] if path else in_hub_cache(repository, names, values.get("revision"))
            files = [file for file in files if file.is_file()]
            files = files if len(files) == len(names) else []
        else:
            searched = [path] if path else [Path(torch.hub.get_dir()) / "checkpoints" / name for name in names]
            files = [file for file in searched if file.is_file()][:1]
        first = (files or searched)[0]
        return cls.of(row, encoder, files, searched, path is not None, found=first.name, folder=first.parent, **values)

    @property
    def present(self) -> bool:
        """Whether the encoder can be loaded without a network."""
        return bool(self.files) or not self.looked_in

    @cached_property
    def sha256(self) -> str | None:
        """Hash of the file, or of several files and their names; None without files. Takes a second per gigabyte."""
        if len(self.files) <= 1:
            return cached_hash(self.files[0]) if self.files else None
        digest = hashlib.sha256()
        for file in sorted(self.files, key=lambda path: path.name):
            digest.update(f"{file.name} {cached_hash(file)}\n".encode())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Identifier of the embeddings: 12 digits of `sha256` and 4 digits of a hash of `resize` and `input_range`.

        Raises:
            FileNotFoundError: the weights are missing.
            ValueError: the weights differ from the published ones.
        """
        if not self.present:
            raise self.missing()
        if not (self.sha256 or "").startswith(self.expected):
            raise ValueError(
                f"expected the weights of {self.encoder} in {self.files[0]} with a SHA-256 of {self.expected}..., got "
                f"{self.sha256}: it is another file or damaged; remove it and {self.how_to_get}"
            )
        preparation = hashlib.sha256(f"{self.resize}\n{self.input_range}".encode()).hexdigest()
        return "-".join(part for part in ((self.sha256 or "")[:12], preparation[:4]) if part)

    def fetch(self) -> None:
        """Download the files, or raise within seconds a FileNotFoundError that says what to do."""
        if self.url:
            self.download(self.url, self.looked_in[0])
        elif self.hub:
            from huggingface_hub import snapshot_download

            self._from_network(None, snapshot_download, **self.hub)
        else:
            raise self.missing()

    def download(self, url: str, path: Path) -> None:
        """Download a file, which appears only when it is complete; raise as `fetch`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._from_network(url, torch.hub.download_url_to_file, url, str(path))

    def _from_network(self, address: str | None, get: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if reason := network_failure(address):
            raise self.missing(reason)
        try:
            get(*arguments, **options)
        except Exception as error:  # the kind of exception depends on the HTTP library of the installed version
            raise self.missing(str(error)) from error

    def missing(self, reason: str | None = None) -> FileNotFoundError:
        """Return the error for missing weights: the files, where they were searched, and how to get them."""
        paths = "; ".join(str(path) for path in self.looked_in)
        failure = f" and no download ({reason})" if reason else ""
        return FileNotFoundError(
            f"expected the weights of {self.encoder} ({self.source}), got none at {paths}{failure}; {self.how_to_get}"
        )


def published_hash(facts: Mapping[str, Any], name: str) -> str:
    """Return the beginning of a file's SHA-256, from the row or from the end of the file's name; "" if unknown."""
    suffix = re.search(r"-([0-9a-f]{8})\.pth$", name)
    return facts.get("sha256", suffix[1] if suffix else "")


def missing_vocabulary(folder: Path) -> list[str]:
    """Return the missing vocabulary file of a tokenizer, if any; transformers would silently invent a vocabulary."""
    for names in (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",)):
        if all((folder / name).is_file() for name in names):
            return []
    return ["tokenizer.json"]


def in_hub_cache(repository: str, names: Iterable[str], revision: str | None = None) -> list[Path]:
    """Return the cached ones among a Hugging Face repository's files."""
    from huggingface_hub import try_to_load_from_cache

    paths = (try_to_load_from_cache(repository, name, revision=revision) for name in names)
    return [Path(path) for path in paths if isinstance(path, str)]


def hub_cache(repository: str) -> Path:
    """Return the cache folder of a Hugging Face repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def network_failure(url: str | None, timeout: float = 10.0) -> str | None:
    """Return why a URL's server, or the Hugging Face hub for None, cannot be asked; None if it answers.

    The download libraries would retry for most of a minute. A server that did not answer is not asked again for a
    minute.

    Args:
        timeout: seconds to wait for the server.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(url or constants.ENDPOINT)
    server = f"{address.scheme}://{address.netloc}"
    since, reason = _silent.get(server, (-math.inf, ""))
    if time.monotonic() - since < 60:
        return reason
    try:
        get_session().head(url or server, timeout=timeout)
    except Exception as error:  # the kind of exception depends on the HTTP library of the installed version
        reason = f"{server} does not answer ({' '.join(str(error).split()) or type(error).__name__})"
        _silent[server] = time.monotonic(), reason
        return reason
    return None
