"""One request to a server that is not trusted: bounded in time and bytes, and sent to no other address."""

import asyncio
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

#: Largest answer in bytes; a reply of 32,000 tokens needs a quarter of it.
LONGEST = 1 << 20
#: Statuses with which a server may ask for a retry.
BUSY = (429, 503)
#: Shortest wait in seconds before the first retry; it doubles with each retry.
PAUSE = 0.25


class TooLateError(ConnectionError):
    """Raised if the server does not answer in time."""


class AnswerError(ConnectionError):
    """Raised for an answer that is too long or compressed."""


@dataclass(frozen=True)
class Answer:
    """A server's answer; header names ignore case, and the body is bounded."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def post(url: str, document: Any, headers: Mapping[str, str], deadline: float, longest: int = LONGEST) -> Answer:
    """Send JSON and return the answer; if a busy server says when to retry, do so until the deadline.

    Redirects are not followed but returned. Environment variables may name a proxy.

    Args:
        url: of the server.
        document: the JSON value.
        headers: in addition to those of JSON.
        deadline: in seconds of `time.monotonic`, waiting included.
        longest: most bytes of an answer.

    Raises:
        TooLateError: the answer is not complete by then.
        AnswerError: the answer is longer, or compressed.
        ConnectionError: there is no answer.
    """
    shortest = PAUSE
    while True:
        answer = _post(url, document, headers, deadline, longest)
        delay = _retry_after(answer) if answer.status in BUSY else None
        if delay is None:
            return answer
        pause = max(delay, shortest)
        if time.monotonic() + pause >= deadline:
            return answer
        time.sleep(pause)
        shortest *= 2


def _retry_after(answer: Answer) -> float | None:
    """Return the seconds after which a server asks for a retry; None if it does not ask for one."""
    text = answer.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return (parsedate_to_datetime(text).astimezone(UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None


def _post(url: str, document: Any, headers: Mapping[str, str], deadline: float, longest: int) -> Answer:
    # In a thread, since the caller may run an event loop. It is a daemon, since looking up a host name may take longer
    # than any limit.
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(asyncio.run(_exchange(url, document, headers, deadline - time.monotonic(), longest)))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=max(deadline - time.monotonic(), 0) + 0.5)
    except (ConnectionError, ImportError):
        raise
    except TimeoutError as error:
        raise TooLateError("no complete answer in time") from error
    except Exception as error:  # a hostile server may make the client raise anything
        root: BaseException = error
        while cause := root.__cause__ or root.__context__:
            root = cause
        raise ConnectionError(f"{type(root).__name__}: {root}") from error


async def _exchange(url: str, document: Any, headers: Mapping[str, str], seconds: float, longest: int) -> Answer:
    import httpx2

    # A compressed kilobyte could become a megabyte before it is counted.
    headers = {**headers, "Accept-Encoding": "identity"}
    body = bytearray()
    async with (
        asyncio.timeout(seconds),
        httpx2.AsyncClient(follow_redirects=False, timeout=None) as client,
        client.stream("POST", url, json=document, headers=headers) as response,
    ):
        if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise AnswerError("a compressed answer, which was not asked for")
        async for part in response.aiter_raw():
            body += part
            if len(body) > longest:
                raise AnswerError(f"an answer of more than {longest} bytes")
        return Answer(response.status_code, response.headers, bytes(body))
