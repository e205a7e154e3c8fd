"""The weights of an encoder: which files, where they lie, what they are, and what to say when they are missing.

Nothing here loads a model. A download is tried only if the network answers at once, so that a machine without
one fails within seconds instead of after minutes of retries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from eval.files import content_hash


@dataclass(frozen=True)
class WeightsFacts:
    """What there is to know about an encoder's weights before they are loaded.

    Attributes:
        encoder: the encoder's name.
        source: the file or repository that is wanted, as its publishers call it.
        files: the files on this machine that decide what is embedded; empty if any of them is missing.
        looked_in: the paths that were looked at, in this order; empty if no file is needed.
        resize: how an image is brought to the network's size.
        input_range: what the network is fed with, after normalisation.
        licence: of the weights, as far as known.
        how_to_get: what to do if they are missing.
    """

    encoder: str
    source: str
    files: tuple[Path, ...]
    looked_in: tuple[Path, ...]
    resize: str
    input_range: str
    licence: str
    how_to_get: str

    @property
    def present(self) -> bool:
        """Whether the encoder can be loaded without a network."""
        return bool(self.files) or not self.looked_in

    @cached_property
    def sha256(self) -> str | None:
        """Hash of the files' names and contents, 64 digits, None without files; of one file it is the file's own.

        Reads the files, about a second a gigabyte.
        """
        if len(self.files) <= 1:
            return content_hash(self.files[0]) if self.files else None
        digest = hashlib.sha256()
        for file in sorted(self.files, key=lambda path: path.name):
            digest.update(f"{file.name} {content_hash(file)}\n".encode())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Identity of what is embedded: 12 digits of `sha256`, and 4 of a hash of `resize` and `input_range`.

        Whoever changes how images are prepared changes these texts, and no embedding of before is taken for a new one.

        Raises:
            FileNotFoundError: the weights are missing.
        """
        if not self.present:
            raise self.missing()
        preparation = hashlib.sha256(f"{self.resize}\n{self.input_range}".encode()).hexdigest()
        return "-".join(part for part in ((self.sha256 or "")[:12], preparation[:4]) if part)

    def missing(self, reason: str | None = None) -> FileNotFoundError:
        """Return the error to raise for weights that are not there: what, where, from where.

        Args:
            reason: why they were not downloaded.
        """
        places = "; ".join(str(path) for path in self.looked_in)
        tried = f" and no download ({reason})" if reason else ""
        return FileNotFoundError(
            f"expected the weights of {self.encoder} ({self.source}), got none at {places}{tried}; {self.how_to_get}"
        )


# What a tokenizer of transformers may be stored as, each enough by itself.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))

NO_NETWORK = "the network is switched off or does not answer"


def hub_folder() -> Path:
    """Return torch.hub's folder as it is now: `$TORCH_HOME/hub`, or `~/.cache/torch/hub`."""
    return Path(torch.hub.get_dir())


def checkpoints_folder() -> Path:
    """Return where torch.hub keeps weights files."""
    return hub_folder() / "checkpoints"


def first_file(candidates: Iterable[Path]) -> Path | None:
    """Return the first of `candidates` that is a file."""
    return next((path for path in candidates if path.is_file()), None)


def missing_vocabulary(folder: Path) -> list[str]:
    """Return the file that a tokenizer's folder lacks: without a vocabulary transformers makes one up in silence."""
    found = [names for names in VOCABULARIES if all((folder / name).is_file() for name in names)]
    return [] if found else [VOCABULARIES[0][0]]


def in_hub_cache(repository: str, names: Sequence[str], revision: str | None = None) -> Path | None:
    """Return the snapshot folder of a Hugging Face repository in the cache that has all of `names`, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repository, name, revision=revision) for name in names]
    return Path(found[0]).parent if all(isinstance(path, str) for path in found) else None


def hub_cache(repository: str) -> Path:
    """Return where the cache keeps a Hugging Face repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def network_answers(url: str | None, timeout: float = 5.0) -> bool:
    """Ask once, shortly: the download libraries themselves retry for most of a minute.

    Args:
        url: what is to be downloaded; the Hugging Face hub if None.
        timeout: seconds.

    Returns:
        False also where `HF_HUB_OFFLINE` switches the network off.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(url or constants.ENDPOINT, timeout=timeout)
    except Exception:  # the kind of exception depends on the HTTP library of the installed version
        return False
    return True


def download(url: str, path: Path, facts: WeightsFacts) -> None:
    """Download a file, or raise the error of `facts` within seconds.

    Args:
        url: from where.
        path: to where; written only when complete.
        facts: of the encoder that wants it.

    Raises:
        FileNotFoundError: there is no network, or the server refused.
    """
    if not network_answers(url):
        raise facts.missing(NO_NETWORK)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:  # URLError among them
        raise facts.missing(str(error)) from error
