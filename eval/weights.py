"""The weights of networks: found, fetched, identified, and complained of when they are missing.

What there is to know of each stands in a row of `weights.yaml`. Nothing here loads a model. A download is tried only
if the network answers at once, so that a machine without one fails within seconds instead of after minutes of retries.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from eval.files import remembered_hash

#: What is known of the weights of each network, by its name here.
FACTS: Mapping[str, Mapping[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class WeightsFacts:
    """What there is to know about a network's weights before they are loaded; its texts are those of `weights.yaml`.

    Attributes:
        encoder: the network's name.
        files: the files on this machine that decide what is embedded; empty if any of them is missing.
        looked_in: the paths that were looked at, in this order; empty if no file is needed.
        url: of the file that is downloaded to the first place looked in; None if there is none.
        hub: arguments of `huggingface_hub.snapshot_download` that fetch the files; None if they are not on the hub.
        expected: the beginning of `sha256`, where the publishers' file is known by it.
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
        given: bool = False,
        **values: Any,
    ) -> WeightsFacts:
        """State a row of `FACTS`.

        Args:
            given: whether the user named the place, where nothing is downloaded then.
            values: what stands for the braces in the row's texts.
        """
        facts = {**FACTS[row], **(FACTS[row].get("given", {}) if given else {})}
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
            url=None if given else texts.get("url"),
            hub=None if given or not hub["repo_id"] else hub,
            expected=published_hash(facts, files[0].name) if published else "",
        )

    @classmethod
    def find(cls, row: str, encoder: str, given: Path | None = None, **values: Any) -> WeightsFacts:
        """Look for the weights of a row where the user says, or else where their publishers' own code puts them.

        Args:
            row: one with a `url`, of whose files any will do, or a `repository`, all of whose files are needed.
            given: the file, or of a repository the folder, that the user named.
        """
        names = [name.format(**values) for name in FACTS[row]["files"]]
        if repository := FACTS[row].get("repository", "").format(**values):
            places = [given or hub_cache(repository)]
            found = (
                [given / name for name in names] if given else in_hub_cache(repository, names, values.get("revision"))
            )
            found = [file for file in found if file.is_file()]
            files = found if len(found) == len(names) else []
        else:
            places = [given] if given else [Path(torch.hub.get_dir()) / "checkpoints" / name for name in names]
            files = [place for place in places if place.is_file()][:1]
        first = (files or places)[0]
        return cls.of(row, encoder, files, places, given is not None, found=first.name, folder=first.parent, **values)

    @property
    def present(self) -> bool:
        """Whether the encoder can be loaded without a network."""
        return bool(self.files) or not self.looked_in

    @cached_property
    def sha256(self) -> str | None:
        """Hash of the files' names and contents, 64 digits, None without files; of one file it is the file's own.

        Reads the files once a process, about a second a gigabyte.
        """
        if len(self.files) <= 1:
            return remembered_hash(self.files[0]) if self.files else None
        digest = hashlib.sha256()
        for file in sorted(self.files, key=lambda path: path.name):
            digest.update(f"{file.name} {remembered_hash(file)}\n".encode())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Identity of what is embedded: 12 digits of `sha256`, and 4 of a hash of `resize` and `input_range`.

        Raises:
            FileNotFoundError: the weights are missing.
            ValueError: they are not those of their publishers.
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
        """Download what is missing, or raise within seconds the FileNotFoundError that says what to do."""
        if self.url:
            self.download(self.url, self.looked_in[0])
        elif self.hub:
            from huggingface_hub import snapshot_download

            self._from_network(None, snapshot_download, **self.hub)
        else:
            raise self.missing()

    def download(self, url: str, path: Path) -> None:
        """Download one of the files, written only when complete, or raise as `fetch`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._from_network(url, torch.hub.download_url_to_file, url, str(path))

    def _from_network(self, address: str | None, get: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if not network_answers(address):
            raise self.missing("the network is switched off or does not answer")
        try:
            get(*arguments, **options)
        except Exception as error:  # the kind of exception depends on the HTTP library of the installed version
            raise self.missing(str(error)) from error

    def missing(self, reason: str | None = None) -> FileNotFoundError:
        """Return the error to raise for weights that are not there: what, where, why not downloaded, from where."""
        places = "; ".join(str(path) for path in self.looked_in)
        tried = f" and no download ({reason})" if reason else ""
        return FileNotFoundError(
            f"expected the weights of {self.encoder} ({self.source}), got none at {places}{tried}; {self.how_to_get}"
        )


def published_hash(facts: Mapping[str, Any], name: str) -> str:
    """Return how the SHA-256 of a row's file begins: as in the table, or as its name ends; "" if nobody knows."""
    found = re.search(r"-([0-9a-f]{8})\.pth$", name)
    return facts.get("sha256", found[1] if found else "")


def missing_vocabulary(folder: Path) -> list[str]:
    """Return the file that a tokenizer's folder lacks: without a vocabulary transformers makes one up in silence."""
    vocabularies = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
    whole = any(all((folder / name).is_file() for name in names) for names in vocabularies)
    return [] if whole else [vocabularies[0][0]]


def in_hub_cache(repository: str, names: Iterable[str], revision: str | None = None) -> list[Path]:
    """Return those of a Hugging Face repository's files that are in the cache."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name, revision=revision) for name in names)
    return [Path(path) for path in found if isinstance(path, str)]


def hub_cache(repository: str) -> Path:
    """Return where the cache keeps a Hugging Face repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def network_answers(url: str | None, timeout: float = 5.0) -> bool:
    """Tell whether a URL's server, or the Hugging Face hub for None, answers at once, and `HF_HUB_OFFLINE` is not set.

    The download libraries themselves retry for most of a minute.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(url or constants.ENDPOINT, timeout=timeout)
    except Exception:  # the kind of exception depends on the HTTP library of the installed version
        return False
    return True
