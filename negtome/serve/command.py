"""The command `negtome serve`: read everything, load the model, and serve until interrupted."""

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from negtome.guard.__main__ import add_guard_options, find_guard
from negtome.guard.audit import Audit
from negtome.guard.policy import Policy, read_policy
from negtome.guard.queue import Queue
from negtome.guard.verdict import Guard, GuardError, decide
from negtome.serve.checks import add_check_options, find_checks, try_checks
from negtome.serve.request import Limits
from negtome.validation import one_line

#: Environment variable with the key that clients must send.
KEY = "NEGTOME_SERVE_API_KEY"
#: Default folder of the audit file and the queue.
FOLDER = Path("negtome-serve")
#: Request by which the guard is tried before the server listens.
FIRST_REQUEST = "a lighthouse by the sea"


def main(options: argparse.Namespace) -> int:
    """Serve until interrupted; see `add_options`.

    Raises:
        ValueError, OSError, ImportError: an option cannot be used.
    """
    try:
        import uvicorn

        from negtome.generate import warnings_as_lines
        from negtome.serve.app import LOCAL_NAMES, Service, make_app
    except ImportError as error:
        raise ImportError(f"serve needs further packages ({error}): pip install 'negtome[serve]'") from error
    hosts: Sequence[str] = LOCAL_NAMES
    key = os.environ.get(KEY, "").strip()
    if options.host not in LOCAL_NAMES:
        if not key:
            raise ValueError(f"--host {options.host} is open to other machines: set {KEY} to a key for your clients")
        hosts = ("*",)
    limits = Limits(options.max_images, options.max_side, options.max_prompt, options.time_limit, options.concurrency)
    policy, guard = read_policy(options.policy), find_guard(options, "guard-")
    checks = find_checks(options, policy)
    audit, queue = Audit(options.audit, options.audit_text), Queue(options.queue)
    with _bind(options.host, options.port) as listener:  # like the record, before the model is loaded
        _try_guard(policy, guard)
        try_checks(checks)
        audit.record({"event": "start", "policy_sha256": policy.sha256, "guard": guard.id, "checks": [*checks]})
        maker, source, name = _maker(options, policy)
        service = Service(policy, guard, maker, audit, queue, [*checks.values()], limits, name)
        print(f"policy  {options.policy}, sha256 {policy.sha256[:12]}; guard {guard.id}")
        print(f"checks  {', '.join(checks) or 'no image check: --check adds one'}")
        print(f"images  {source}")
        print(f"audit   {audit.path.resolve()}; queue {queue.folder.resolve()}")
        print(f"serve   http://{options.host}:{listener.getsockname()[1]}/v1/images/generations", flush=True)
        config = uvicorn.Config(
            make_app(service, key, hosts),
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=16 + 4 * limits.concurrency,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=5,
        )
        with warnings_as_lines():
            uvicorn.Server(config).run(sockets=[listener])
    return 0


def _try_guard(policy: Policy, guard: Guard) -> None:
    """Let the guard decide an ordinary request, before a pipeline is loaded: is it there, and can it read the policy?

    Raises:
        ValueError, ImportError: it cannot; the message names the guard.
    """
    try:
        verdict = decide(policy, guard, FIRST_REQUEST)
    except (ValueError, OSError, GuardError) as error:
        raise ValueError(f"the guard {guard.name} cannot decide a first request: {error}") from error
    if verdict.action == "invalid":
        print(f"note: the guard {guard.name} has no valid reply to a first request: {one_line(verdict.reason)}")


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket at an address; OSError if another program has it."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be from 0 to {2**16 - 1}, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OSError(f"cannot serve at {host}:{port} ({error}): choose another --port") from error
    return listener


def _maker(options: argparse.Namespace, policy: Any) -> tuple[Any, str, str | None]:
    """Return what makes the images, its model or address, and the name in the API."""
    from negtome.doctor import accelerator
    from negtome.generate import load
    from negtome.recipe import Recipe
    from negtome.serve.makers import PipelineMaker, UpstreamMaker
    from negtome.serve.steering import unsteerable

    if options.upstream is not None:
        if options.model is not None or options.references is not None or options.size is not None:
            raise ValueError("--model, --references and --size need a pipeline: leave them or --upstream out")
        print("note: an upstream cannot be steered: requests that the policy steers are refused")
        return UpstreamMaker(options.upstream, options.name, side=4 * options.max_side), options.upstream, options.name
    if options.references is not None and not Path(options.references).is_dir():
        raise FileNotFoundError(f"expected a folder of reference images at {options.references}, got none")
    if bare := unsteerable(policy, options.references):
        print(
            f"note: no reference image in --references FOLDER/ASSET for {', '.join(bare)}: their requests are refused"
        )
    size = {} if options.size is None else dict(zip(("width", "height"), options.size, strict=True))
    template = Recipe.of("images", options.model, **size)
    pipe = load(template, options.device or accelerator())
    pipe.set_progress_bar_config(disable=True)  # the output is a log
    name = options.name or Path(template.model).name
    return PipelineMaker(pipe, template, options.references, options.size is not None), template.model, name


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.add_argument("--policy", metavar="P", required=True, help="YAML file, see docs/safety.md")
    add_guard_options(parser, "guard-")
    images = parser.add_argument_group("images")
    images.add_argument("--model", metavar="M", help="diffusers folder or hub repository (models/mini-sdxl)")
    images.add_argument("--upstream", metavar="URL", help="ask this OpenAI-compatible server for the images instead")
    images.add_argument("--name", metavar="NAME", help="name of the model in the API, also of the upstream")
    images.add_argument("--references", metavar="F", help="reference images, F/ASSET/*.png, for requests to steer")
    images.add_argument("--size", metavar="WxH", type=_size, help="of all images, whatever size a client asks for")
    images.add_argument("--device", metavar="D", help="cuda, mps or cpu (the fastest here)")
    add_check_options(parser.add_argument_group("image check"))
    records = parser.add_argument_group("records")
    records.add_argument("--audit", metavar="FILE", default=FOLDER / "audit.jsonl", help=f"({FOLDER}/audit.jsonl)")
    records.add_argument("--audit-text", action="store_true", help="keep the texts of prompts and replies, too")
    records.add_argument("--queue", metavar="FOLDER", default=FOLDER / "queue", help=f"({FOLDER}/queue)")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help=f"(127.0.0.1); any other needs a key in {KEY}")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="(8000); 0: a free one")
    server.add_argument("--max-images", type=_positive, default=Limits.images, metavar="N", help="a request (4)")
    server.add_argument("--max-side", type=_positive, default=Limits.side, metavar="N", help="in pixels (1024)")
    server.add_argument("--max-prompt", type=_positive, default=Limits.prompt, metavar="N", help="characters (2000)")
    server.add_argument("--time-limit", type=float, default=Limits.seconds, metavar="S", help="of a request (300)")
    server.add_argument(
        "--concurrency", type=_positive, default=Limits.concurrency, metavar="N", help="requests at once (8)"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "positive integer"  # argparse puts it into its messages


def _size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    return width, height


_size.__name__ = "WIDTHxHEIGHT"
