"""A stand-in for the Hugging Face hub on the loopback interface."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from experiments import PROJECT

#: Files that the hub keeps apart from git: it redirects to another host for them.
LARGE = (".safetensors", ".bin", ".pt", ".pth")
#: A port of the loopback that refuses every connection: the proxy of whatever is not on the loopback.
NOWHERE = "http://127.0.0.1:9"

#: Runs before the command in each process that a test starts: see `environment`.
SITE = """
import os
import types
from pathlib import Path

import eval.weights

if gpus := int(os.environ.get("FAKE_GPUS", 0)):  # the CPU works in the place of each
    import torch

    import experiments

    torch.cuda.device_count = lambda: gpus
    torch.cuda.get_device_name = lambda device=None: "NVIDIA H100 80GB HBM3"
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(total_memory=85_017_493_504)
    torch.cuda.set_device = lambda device: Path(os.environ["NOTES"], device).touch()
    experiments.select_device = lambda name: "cuda" if name == "auto" else name

    from eval.encoders import Network
    from experiments.runs import checkpoints

    def load(model, checkpoint, device, load=checkpoints.load, **options):
        return load(model, checkpoint, "cpu", **options)

    def begin(network, name, slug, device, *rest, begin=Network.__init__, **values):
        begin(network, name, slug, "cpu", *rest, **values)

    checkpoints.load, Network.__init__ = load, begin

for row in eval.weights.FACTS.values():
    for key in ("url", "dino"):
        if key in row:
            row[key] = row[key].replace("https://", os.environ["STAND_IN_FILES"])
eval.weights.published_hash = lambda *_: ""
"""


@dataclass
class Repository:
    """A repository of models.

    Attributes:
        folder: its files.
        gated: the status of a refused download, 401 or 403; 0 if everybody may download.
        cuts: the number of downloads that break off half way, by the file's path.
        pauses: the seconds that each of the next downloads of a file stands still half way, by the file's path.
    """

    folder: Path
    gated: int = 0
    cuts: dict[str, int] = field(default_factory=dict)
    pauses: dict[str, list[float]] = field(default_factory=dict)

    def files(self) -> dict[str, Path]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}

    @property
    def commit(self) -> str:
        listing = [f"{name} {path.stat().st_size}" for name, path in self.files().items()]
        return hashlib.sha1("\n".join(listing).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server, which runs in a thread of its own within `with Hub() as hub`.

    Attributes:
        repositories: what it has, by OWNER/NAME.
        files: what other servers have, by URL without https://; see `environment`.
        requests: method and path of each request so far.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.files: dict[str, Path] = {}
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def downloads(self) -> list[str]:
        """Return the files that were asked for in full or in part, in this order."""
        places = r"/(?:cdn|files)/(.+)|/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)"
        matches = [re.fullmatch(places, path) for method, path in self.requests if method == "GET"]
        return ["/".join(filter(None, match.groups())) for match in matches if match]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        with_sizes = "blobs=" in urlsplit(self.path).query
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/(\w+))?", path):
            self._describe(*match.groups(), with_sizes)
        elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/cdn/([\w.-]+/[\w.-]+)/(.+)", path):
            repository = self.server.repositories[match[1]]
            self._send_file(repository.files()[match[2]], {}, repository, match[2])
        elif path.startswith("/files/") and path.removeprefix("/files/") in self.server.files:
            self._send_file(self.server.files[path.removeprefix("/files/")], {})
        else:
            self._send(404, b"")

    do_HEAD = do_GET

    def _repository(self, name: str, revision: str | None) -> Repository | None:
        repository = self.server.repositories.get(name)
        if repository is None:  # the hub does not tell strangers which names exist
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif revision not in (None, "main", repository.commit):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository
        return None

    def _describe(self, name: str, what: str | None, revision: str | None, with_sizes: bool) -> None:
        if (repository := self._repository(name, revision)) is None:
            return
        files = repository.files()
        if what == "tree":
            document = [_entry(name, path) for name, path in files.items()]
        else:
            sizes = {name: {"size": path.stat().st_size} if with_sizes else {} for name, path in files.items()}
            siblings = [{"rfilename": name, **size} for name, size in sizes.items()]
            gated = "auto" if repository.gated else False
            document = {"_id": "0", "id": name, "modelId": name, "sha": repository.commit, "private": False,
                        "gated": gated, "tags": ["diffusers"], "siblings": siblings}  # fmt: skip
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if (repository := self._repository(name, revision)) is None:
            return
        headers = {"X-Repo-Commit": repository.commit}
        path = repository.files().get(file)
        if repository.gated:
            self._refuse(repository.gated, "GatedRepo", f"Access to model {name} is restricted.")
        elif path is None:
            self._refuse(404, "EntryNotFound", "Entry not found", headers)
        elif path.suffix in LARGE:
            port, digest = self.server.server_port, _digest(path, "sha256")
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(path.stat().st_size)}
            # To another host than the hub's own.
            self._send(302, b"", headers | {"Location": f"http://localhost:{port}/cdn/{name}/{file}"})
        else:
            self._send_file(path, headers | {"ETag": f'"{_digest(path, "sha1")}"'}, repository, file)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, message.encode(), {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _send_file(
        self,
        path: Path,
        headers: dict[str, str],
        repository: Repository | None = None,
        name: str = "",
    ) -> None:
        size = path.stat().st_size
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(span[1]) if span else 0
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        for key, value in {"Accept-Ranges": "bytes", **headers, "Content-Length": str(size - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "GET":
            return
        with path.open("rb") as file:
            file.seek(start)
            if repository is not None and repository.cuts.get(name, 0) > 0:
                repository.cuts[name] -= 1
                self.wfile.write(file.read((size - start) // 2))
                self.close_connection = True
                return
            if repository is not None and repository.pauses.get(name):
                self.wfile.write(file.read((size - start) // 2))
                self.wfile.flush()
                threading.Event().wait(repository.pauses[name].pop())  # tests replace time.sleep
            with contextlib.suppress(ConnectionError):  # who waits no longer
                shutil.copyfileobj(file, self.wfile)


_digests: dict[tuple[Path, str, int], str] = {}


def _digest(path: Path, kind: str) -> str:
    key = path, kind, path.stat().st_mtime_ns
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, kind).hexdigest()
    return _digests[key]


def _entry(name: str, path: Path) -> dict:
    size = path.stat().st_size
    entry = {"type": "file", "oid": _digest(path, "sha1"), "size": size, "path": name}
    if path.suffix in LARGE:
        entry["lfs"] = {"oid": _digest(path, "sha256"), "size": size, "pointerSize": 134}
    return entry


def environment(hub: Hub, home: Path, checkout: Path = PROJECT) -> dict[str, str]:
    """Return the variables of a process whose caches are empty folders in `home` and for which `hub` is the network.

    Nothing but the loopback can be reached. The table of weights points at `hub.files`, and takes any file for the
    published one.
    """
    site = home / "site"
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "NEGTOME_")) and not name.lower().endswith("_proxy")
    }
    return inherited | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "huggingface"), "TORCH_HOME": str(home / "torch"),
        "STAND_IN_FILES": f"{hub.url}/files/", "http_proxy": NOWHERE, "https_proxy": NOWHERE,
        "no_proxy": "127.0.0.1,localhost", "PYTHONPATH": f"{site}{os.pathsep}{checkout}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
