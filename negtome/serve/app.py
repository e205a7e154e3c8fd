"""The server: decide, make, check, record, answer. Whatever goes wrong, no image is returned."""

import asyncio
import base64
import hashlib
import hmac
import io
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from negtome.guard.audit import Audit, text_sha256
from negtome.guard.image_check import ImageCheck, is_remote_check
from negtome.guard.policy import Policy
from negtome.guard.queue import Queue, QueueFullError, Ticket, new_ticket
from negtome.guard.verdict import Guard, GuardError, Verdict, check_text, decide, is_remote
from negtome.serve.checks import look
from negtome.serve.makers import WAIT, Maker, out_of_time
from negtome.serve.request import LARGEST_SEED, LONGEST_BODY, ImageRequest, Limits, RequestError, read_request
from negtome.serve.steering import CannotSteerError
from negtome.validation import one_line

#: Code of every answer without an image that the policy leads to, as of OpenAI's servers.
VIOLATION = "content_policy_violation"
#: Names of this machine, by which a local server is called; a page in a browser cannot use another one.
LOCAL_NAMES = ("127.0.0.1", "localhost")
#: Seconds in which a client must send a body of at most `LONGEST_BODY` bytes.
BODY_SECONDS = 10.0


class Service:
    """Decides requests by a policy, and makes the images of those that it allows.

    Args:
        policy: its default must not be steer, which names no asset.
        guard: decides; one that is not remote decides one request at a time.
        maker: makes the images.
        audit: records every verdict and every answer.
        queue: of requests that a person decides.
        checks: of every image before it is returned.
        limits: of requests.
        name: of the model in the API; None for any.

    Raises:
        ValueError: the policy's default is steer.
    """

    def __init__(
        self,
        policy: Policy,
        guard: Guard,
        maker: Maker,
        audit: Audit,
        queue: Queue,
        checks: Sequence[ImageCheck] = (),
        limits: Limits | None = None,
        name: str | None = None,
    ) -> None:
        if policy.default == "steer":
            raise ValueError("expected a policy whose default names no asset, got steer: allow or refuse")
        self.policy, self.guard, self.maker, self.audit, self.queue = policy, guard, maker, audit, queue
        self.guard_id = check_text(guard, "id")
        self.checks = tuple(checks)
        self.limits = limits or Limits()
        self.name = name
        self._deciding = threading.Lock()
        self._checking = threading.Lock()

    def answer(self, request: ImageRequest, deadline: float) -> dict[str, Any]:
        """Return the body of the answer with the images.

        Args:
            request: a checked one.
            deadline: in seconds of `time.monotonic`; later steps do not start.

        Raises:
            RequestError: there are no images to return.
        """
        key = request.sha256(self.policy.sha256)
        record: dict[str, Any] = {
            "request_sha256": key,
            "policy_sha256": self.policy.sha256,
            "prompt_sha256": text_sha256(request.prompt),
            "n": request.images,
            "size": request.size,
        }
        try:
            body, details = self._answer(request, key, deadline)
        except RequestError as error:
            self._record({**record, "answer": error.code, "status": error.status, **error.details})
            raise
        except Exception as error:  # of a pipeline or a file: no image, and no detail for the client
            self._record({**record, "answer": "failed", "status": 500, "error": type(error).__name__})
            raise
        self._record({**record, "answer": "images", "status": 200, **details})
        return body

    def _record(self, fields: Mapping[str, Any]) -> None:
        with _audit_errors():
            self.audit.record(fields)

    def _answer(self, request: ImageRequest, key: str, deadline: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the answer's body, and what the record says of it."""
        ticket = self.queue.find(key)
        if ticket is not None and ticket.state != "released":
            raise _ticket_error(ticket)
        steering: dict[str, Any] = {}
        verdict = None
        if ticket is None:
            verdict = self._decide(request.prompt, deadline)
            steering = self._act(verdict, request, key)
            action, clauses = verdict.action, verdict.clauses
        else:
            action, clauses = ticket.state, ticket.clauses
        seed = secrets.randbelow(LARGEST_SEED) if request.seed is None else request.seed
        _check_time(deadline)
        images = self.maker.make(request, seed, steering, deadline)
        for image in images:
            _check_time(deadline)
            for asset in self._detect(image, deadline):
                if verdict is None and asset in self._assets(clauses):
                    continue  # a person allowed what the ticket's clauses name
                if verdict is not None and asset in self.policy.assets(verdict.clauses, "allow"):
                    # A person decides whether it is the parody, or the like, that an exception means.
                    reason = f"an image shows {asset}: see the exceptions"
                    raise self._escalate(request, key, "escalate", clauses, reason)
                showing = [clause.id for clause in self.policy.clauses if clause.asset == asset]
                raise _violation("an image showed a protected concept, so none is returned", "blocked", showing)
        files = [_png(image) for image in images]
        _check_time(deadline)  # the client has its answer by then
        details = {
            "action": action,
            "clauses": list(clauses),
            "seed": seed,
            "images_sha256": [hashlib.sha256(file).hexdigest() for file in files],
        }
        data = [{"b64_json": base64.b64encode(file).decode()} for file in files]
        decision = {"action": action, "clauses": list(clauses)}
        return {"created": int(time.time()), "data": data, "negtome": decision}, details

    def _decide(self, prompt: str, deadline: float) -> Verdict:
        turn = nullcontext() if is_remote(self.guard) else _turn(self._deciding, "the guard", deadline)
        try:
            with turn:
                verdict = decide(self.policy, self.guard, prompt)
        except OSError as error:
            _report("the guard", error)
            message = "the guard does not answer, so no image is made"
            raise RequestError(503, "guard_unavailable", message, retry_after=WAIT) from error
        except ValueError as error:
            _report("the guard", error)
            raise RequestError(400, "guard_cannot_decide", "the guard cannot read this prompt: shorten it") from error
        except (GuardError, ImportError) as error:
            _report("the guard", error)
            raise RequestError(500, "guard_failed", "the guard failed, so no image is made") from error
        with _audit_errors():
            self.audit.write(
                self.policy.sha256,
                self.guard_id,
                prompt,
                verdict.replies,
                verdict.action,
                verdict.clauses,
                verdict.faults,
            )
        return verdict

    def _act(self, verdict: Verdict, request: ImageRequest, key: str) -> dict[str, Any]:
        """Return the fields that steer an allowed request; raise the error of another one."""
        if verdict.action == "allow":
            return {}
        if verdict.action == "steer":
            try:
                return self.maker.steering(self.policy, verdict.clauses)
            except CannotSteerError as error:
                message = f"the policy steers this request, but {error}"
                raise _violation(message, "steer", verdict.clauses) from error
        if verdict.action == "refuse":
            raise _violation("the policy refuses this request", "refuse", verdict.clauses)
        raise self._escalate(request, key, verdict.action, verdict.clauses, verdict.reason)

    def _escalate(
        self, request: ImageRequest, key: str, action: str, clauses: Sequence[str], reason: str
    ) -> RequestError:
        """Put a request into the queue, and return the error that has its ticket."""
        ticket = new_ticket(key, asdict(request), self.policy.sha256, self.guard_id, action, clauses, reason)
        try:
            return _ticket_error(self.queue.add(ticket))
        except QueueFullError as error:
            _report("the queue", error)
            message = "a person must decide this request, and the queue is full: send it again later"
            return _violation(message, action, clauses)

    def _assets(self, clauses: Sequence[str]) -> list[str]:
        return [clause.asset for clause in self.policy.clauses if clause.id in clauses]

    def _detect(self, image: Any, deadline: float) -> Iterator[str]:
        """Yield the protected concept that each check sees in an image, if it sees one."""
        for check in self.checks:
            turn = nullcontext() if is_remote_check(check) else _turn(self._checking, "the image check", deadline)
            try:
                with turn:
                    asset = look(check, image, deadline)
            except OSError as error:
                _report("the image check", error)
                message = "the image check does not answer, so no image is returned"
                raise RequestError(503, "check_unavailable", message, retry_after=WAIT) from error
            except (ValueError, GuardError, ImportError) as error:
                _report("the image check", error)
                raise RequestError(500, "check_failed", "the image check failed, so no image is returned") from error
            if asset is not None:
                yield asset


@contextmanager
def _turn(lock: threading.Lock, name: str, deadline: float) -> Iterator[None]:
    """Hold a lock; raise RequestError if it is not free before the deadline."""
    if not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise RequestError(503, "busy", f"{name} is busy: send the request again later", retry_after=WAIT)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _audit_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _report("the audit file", error)
        raise RequestError(500, "audit_failed", "the server cannot record the request, so it answers none") from error


def _violation(message: str, action: str, clauses: Sequence[str], **details: str) -> RequestError:
    cited = f" (clauses {', '.join(clauses)})" if clauses else ""
    fields = {"action": action, "clauses": list(clauses), **details}
    return RequestError(400, VIOLATION, f"{message}{cited}", fields, param="prompt")


def _ticket_error(ticket: Ticket) -> RequestError:
    if ticket.state == "refused":
        return _violation("a person refused this request", "refuse", ticket.clauses, ticket=ticket.id)
    message = f"a person must decide this request: send it again after the release of ticket {ticket.id}"
    return _violation(message, ticket.action, ticket.clauses, ticket=ticket.id)


def _check_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise out_of_time()


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _report(what: str, error: BaseException) -> None:
    """Print an error for the person who runs the server, as one line without control characters."""
    text = one_line(f"{type(error).__name__}: {error}")[:500]
    print(f"serve: {what}: {text}", file=sys.stderr, flush=True)


def make_app(service: Service, key: str = "", hosts: Sequence[str] = LOCAL_NAMES) -> Starlette:
    """Return the ASGI application of a service.

    Args:
        service: answers requests.
        key: that clients must send as a bearer token; "" asks for none.
        hosts: names by which clients may call the server; a page in a browser could use another one.
    """
    front = _Front(service, key)
    return Starlette(
        routes=[
            Route("/v1/images/generations", front.generations, methods=["POST"]),
            Route("/v1/models", front.models, methods=["GET"]),
            Route("/health", front.health, methods=["GET"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
        exception_handlers={RequestError: _error, HTTPException: _http_error},
    )


async def _error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = "this server has POST /v1/images/generations, GET /v1/models and GET /health"
    body = RequestError(error.status_code, "not_found", message).body()
    return JSONResponse(body, error.status_code, error.headers)


class _Front:
    """The HTTP side: who may ask, how much, and for how long."""

    def __init__(self, service: Service, key: str) -> None:
        self.service = service
        self._key = key
        self._active = 0
        self._threads = ThreadPoolExecutor(service.limits.concurrency, "serve")

    async def health(self, request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> JSONResponse:
        self._check_key(request)
        entry = {"id": self.service.name or "default", "object": "model", "created": 0, "owned_by": "negtome"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def generations(self, request: Request) -> JSONResponse:
        self._check_key(request)
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # A page in a browser may send other types to this machine without asking.
            raise RequestError(415, "unsupported_media_type", "send Content-Type: application/json")
        limits = self.service.limits
        image_request = read_request(await self._read_body(request), self.service.name, limits)
        if self._active >= limits.concurrency:
            raise RequestError(503, "busy", "the server is busy: send the request again later", retry_after=WAIT)
        self._active += 1
        deadline = time.monotonic() + limits.seconds
        work = asyncio.get_running_loop().run_in_executor(self._threads, self.service.answer, image_request, deadline)
        work.add_done_callback(self._finish)  # a thread that is late keeps its place
        done, _ = await asyncio.wait({work}, timeout=limits.seconds + 1)
        if not done:
            raise out_of_time()
        try:
            return JSONResponse(work.result())
        except RequestError:
            raise
        except Exception as error:
            _report("a request failed", error)
            raise RequestError(500, "server_failed", "the server failed, so no image is returned") from error

    def _finish(self, work: "asyncio.Future[Any]") -> None:
        self._active -= 1
        if not work.cancelled():
            work.exception()  # of a late thread, which nobody awaits

    async def _read_body(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > LONGEST_BODY:
                        raise RequestError(413, "body_too_large", f"a body has at most {LONGEST_BODY} bytes")
        except TimeoutError as error:
            raise RequestError(408, "timeout", f"send the body within {BODY_SECONDS:g} seconds") from error
        except ClientDisconnect as error:
            raise RequestError(400, "disconnected", "the client went away") from error
        return bytes(body)

    def _check_key(self, request: Request) -> None:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self._key and not hmac.compare_digest(sent, self._key.encode()):
            raise RequestError(401, "invalid_api_key", "send the server's key as Authorization: Bearer KEY")
