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

#: Bytes of an answer, of which a reply of 32,000 tokens needs a quarter.
LONGEST = 1 << 20
#: Statuses with which a server may ask to be tried again later.
BUSY = (429, 503)
#: Seconds before the first retry, doubled each time, whatever less the server asks for.
PAUSE = 0.25


class TooLateError(ConnectionError):
    """Raised where the server did not answer in time."""


class AnswerError(ConnectionError):
    """Raised where an answer is not read: it is too long, or compressed."""


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        status: of HTTP.
        headers: by names, in whatever case.
        body: at most `LONGEST` bytes.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


def post(url: str, document: Any, headers: Mapping[str, str], deadline: float) -> Answer:
    """Send JSON and return the answer, trying again where the server says when.

    Redirects are answers: they are not followed. Environment variables may name a proxy.

    Args:
        url: of the server.
        document: what is sent.
        headers: that are sent beside those of JSON.
        deadline: as `time.monotonic` counts; waiting included.

    Raises:
        TooLateError: the answer was not complete by then.
        AnswerError: it is longer than `LONGEST` bytes, or compressed.
        ConnectionError: there is none.
    """
    shortest = PAUSE
    while True:
        answer = _post(url, document, headers, deadline)
        delay = _retry_after(answer) if answer.status in BUSY else None
        if delay is None:
            return answer
        pause = max(delay, shortest)
        if time.monotonic() + pause >= deadline:
            return answer
        time.sleep(pause)
        shortest *= 2


def _retry_after(answer: Answer) -> float | None:
    """Return the seconds after which a server asks to be tried again; None where it does not."""
    text = answer.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return (parsedate_to_datetime(text).astimezone(UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None


def _post(url: str, document: Any, headers: Mapping[str, str], deadline: float) -> Answer:
    # In a thread, since the caller may have an event loop of its own, and in one that nobody waits for: to look up a
    # name may take longer than any limit.
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(asyncio.run(_exchange(url, document, headers, deadline - time.monotonic())))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=max(deadline - time.monotonic(), 0) + 0.5)
    except (ConnectionError, ImportError):
        raise
    except TimeoutError as error:
        raise TooLateError("no complete answer in time") from error
    except Exception as error:  # whatever a hostile server makes the client raise
        cause = _root(error)
        raise ConnectionError(f"{type(cause).__name__}: {cause}") from error


def _root(error: BaseException) -> BaseException:
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


async def _exchange(url: str, document: Any, headers: Mapping[str, str], seconds: float) -> Answer:
    import httpx2

    # Not compressed: a kilobyte could become a megabyte before anybody counts.
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
            if len(body) > LONGEST:
                raise AnswerError(f"an answer of more than {LONGEST} bytes")
        return Answer(response.status_code, response.headers, bytes(body))
