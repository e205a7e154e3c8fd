"""A server that means harm cannot hold a decision, fill the memory, or make it an allow."""

import gzip
import itertools
import json
import socket
import subprocess
import sys
import threading
import zlib

import pytest

from experiments import PROJECT
from negtome.guard import Decision

#: In a process of its own, whose memory is measured: a decision about each address, and what came of it.
CLIENT = """
import dataclasses, json, os, resource, sys
from negtome.guard import Endpoint, decide, read_policy

policy, unit = read_policy(sys.argv[1]), 1 if sys.platform == "darwin" else 1024

if os.environ.get("LONG_POLICY"):  # longer than the buffers of a connection
    clause = dataclasses.replace(policy.clauses[0], description="fangs " * 1_000_000)
    policy = dataclasses.replace(policy, clauses=(clause, *policy.clauses[1:]))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

for argument in sys.argv[2:]:
    before = peak()
    url, timeout = argument.split(",")
    try:
        outcome = decide(policy, Endpoint("m", url, timeout=float(timeout)), "a vampire").action
    except (ConnectionError, ValueError) as error:
        outcome = f"{type(error).__name__}: {error}"
    print(json.dumps([outcome, peak() - before]), flush=True)
"""
#: Where a server's reply has the nonce that it was asked to repeat, and as long.
NONCE = "<----nonce----->"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ALLOW = Decision("allow").to_json(NONCE)


def completion(text):
    return json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": text}}]}).encode()


def whole(body, *headers):
    return [b"".join((OK, *headers, b"Content-Length: %d\r\n\r\n" % len(body), body))]


def drip(data):
    """Send a byte at a time, and again and again the last."""
    for byte in itertools.chain(data, itertools.repeat(data[-1])):
        yield bytes([byte])
        STOP.wait(0.05)


def endless(head, part):
    yield head
    while True:
        yield part


def gzip_bomb():
    packer, part = zlib.compressobj(9, zlib.DEFLATED, 31), bytes(1 << 20)
    yield OK + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n"
    for _ in range(1000):
        yield packer.compress(part)
    yield packer.flush()


NESTED = (
    '{"nonce": "<----nonce----->", "action": "allow", "clauses": %s, "quote": "", "rationale": "", "confidence": null}'
)
MANY = ", ".join(['"C1"'] * 100_000)
#: What servers send after a request, part by part, until nobody listens.
ATTACKS = {
    "nothing": lambda: itertools.repeat(b""),
    "bytes of a header": lambda: drip(OK + b"X: y"),
    "bytes of a body": lambda: drip(OK + b"Connection: close\r\n\r\n "),
    "a body without an end": lambda: endless(OK + b"Connection: close\r\n\r\n", b" " * (1 << 16)),
    "chunks without an end": lambda: endless(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * (1 << 16) + b"\r\n"
    ),
    "chunks of one byte": lambda: endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 1000),
    "a chunk of any size": lambda: endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"f" * 1000),
    "headers without an end": lambda: endless(OK, b"X-%s: %s\r\n" % (b"a" * 100, b"b" * 1000)),
    "to continue without an end": lambda: endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "a gzip bomb": gzip_bomb,
    "a compressed allow": lambda: whole(gzip.compress(completion(ALLOW)), b"Content-Encoding: gzip\r\n"),
    "an allow in an unknown coding": lambda: whole(completion(ALLOW), b"Content-Encoding: x\r\n"),
    "less than it promises": lambda: [OK + b"Content-Length: 10000\r\n\r\n" + completion(ALLOW)],
    "two lengths": lambda: [OK + b"Content-Length: 1\r\nContent-Length: 9\r\n\r\n" + completion(ALLOW)],
    "an allow without HTTP": lambda: [completion(ALLOW)],
    "a redirect to itself": lambda: [b"HTTP/1.1 307 Go\r\nLocation: /v1/chat/completions\r\nContent-Length: 0\r\n\r\n"],
    "busy for ever": lambda: [b"HTTP/1.1 429 No\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n"],
    "an unclosed object": lambda: whole(b'{"a":' * 200_000),
    "empty lists": lambda: whole(b"[" + b"[]," * 340_000 + b"[]]"),
    "a long number": lambda: whole(b"9" * 1_000_000),
    "nested lists in a reply": lambda: whole(completion(NESTED % ("[" * 900 + "]" * 900))),
    "many clauses in a reply": lambda: whole(completion(NESTED % f"[{MANY}]")),
    "a long quote in a reply": lambda: whole(
        completion(Decision("steer", ("C1",), "fangs (a" * 100_000).to_json(NONCE))
    ),
    "many blocks": lambda: whole(completion("<think></think>" * 60_000 + "<think>")),
    "an allow in another character set": lambda: whole(completion(ALLOW).decode().encode("utf-16")),
    "an allow after a byte order mark": lambda: whole(b"\xef\xbb\xbf" + completion(ALLOW)),
    "an allow and another": lambda: whole(completion(ALLOW) + b"\n" + completion(ALLOW)),
    "an allow with status 201": lambda: [whole(completion(ALLOW))[0].replace(b"200 OK", b"201 Made")],
}
#: Seconds for a decision, and for one by a server that only the timeout stops.
TIMEOUT, SHORT_TIMEOUT = 1.5, 0.3
UNENDING = ("nothing", "bytes of a header", "bytes of a body", "chunks of one byte", "to continue without an end",
            "busy for ever")  # fmt: skip
STOP = threading.Event()


class Server:
    """Sends the same to everybody who asks, with the nonce that was asked for; `reads`: reads requests beforehand."""

    def __init__(self, attack, reads=True):
        self.attack, self.reads = attack, reads
        self.timeout = SHORT_TIMEOUT if attack in map(ATTACKS.get, UNENDING) else TIMEOUT
        self.listener = socket.create_server(("127.0.0.1", 0))
        if not reads:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # soon full
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.talk, args=(peer,), daemon=True).start()

    def talk(self, peer):
        with peer:
            try:
                nonce = read_nonce(peer) if self.reads else b""
                for part in self.attack():
                    peer.sendall(part.replace(NONCE.encode(), nonce)) if part else STOP.wait(0.05)
                    if STOP.is_set():
                        return
            except OSError:
                pass  # nobody listens any more


def read_nonce(peer):
    request = b""
    while b"## Nonce\\n" not in request or not request.rstrip().endswith(b"}"):
        if not (part := peer.recv(1 << 16)):
            raise OSError("no request")
        request += part
    return request.partition(b"## Nonce\\n")[2][:16]


@pytest.fixture
def decided(written, document, no_keys):
    """Have a process decide by servers; returns for each what came of it and the bytes that its peak grew by."""
    servers = []

    def decide(*attacks, reads=True):
        STOP.clear()
        servers.extend(Server(attack, reads) for attack in attacks)
        command = [sys.executable, "-c", CLIENT, str(written(document))]
        command += [f"{server.url},{server.timeout}" for server in servers]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    yield decide
    STOP.set()
    for server in servers:
        server.listener.close()


def honest():
    return whole(completion(Decision("steer", ("C1",), "fangs").to_json(NONCE)))


def allowing():
    return whole(completion(ALLOW))


def test_no_server_holds_a_decision_fills_the_memory_or_has_its_allow(decided):
    first, second, *found = decided(honest, allowing, *ATTACKS.values())
    assert (first[0], second[0]) == ("steer", "allow")  # else nothing below says anything
    outcomes = {name: outcome for name, (outcome, _) in zip(ATTACKS, found, strict=True)}
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.startswith(("invalid", "Connec"))} == {}
    assert sum(grown for _, grown in found) < 100e6


def test_a_server_that_does_not_read_cannot_hold_a_decision(decided, monkeypatch):
    monkeypatch.setenv("LONG_POLICY", "1")
    ((outcome, _),) = decided(ATTACKS["nothing"], reads=False)
    assert f"got none in {SHORT_TIMEOUT} s" in outcome
