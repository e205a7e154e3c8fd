"""The server of images: what each decision answers, hostile requests, guards and upstream servers."""

import argparse
import base64
import dataclasses
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import uvicorn
from chat_server import SECRET, completion, sight
from PIL import Image
from starlette.testclient import TestClient

from experiments import PROJECT
from negtome import image_files
from negtome.__main__ import main
from negtome.generate import load
from negtome.guard import Audit, Decision, Endpoint, Keyword, read_policy
from negtome.guard.audit import check_chain
from negtome.guard.image_check import ChatImageCheck
from negtome.guard.queue import Queue
from negtome.recipe import Recipe
from negtome.serve.app import Service, make_app
from negtome.serve.checks import add_check_options, find_checks, try_checks
from negtome.serve.makers import PipelineMaker, UpstreamMaker
from negtome.serve.request import ImageRequest, Limits
from negtome.serve.steering import CannotSteerError, unsteerable

URL = "/v1/images/generations"


class Painter:
    """Makes grey images and keeps the requests; `before` is called first."""

    def __init__(self, before=lambda: None):
        self.before, self.calls = before, []

    def steering(self, policy, cited):
        return {"away": cited}

    def make(self, request, seed, steering, deadline):
        self.before()
        self.calls.append((request, steering))
        return [Image.new("RGB", (16, 8), (90, 90, 90))] * request.images


class Sees:
    """An image check that sees the same asset everywhere."""

    def __init__(self, asset):
        self.asset, self.shapes = asset, []

    def detect(self, images):
        self.shapes.append(images.shape)
        assert images.min() >= 0 and images.max() <= 1
        if isinstance(self.asset, Exception):
            raise self.asset
        return self.asset, 0.9


@pytest.fixture
def served(policy, tmp_path):
    """Return a client of a server with these parts, and the service."""

    def serve(guard=None, maker=None, key="", **options):
        audit, queue = Audit(tmp_path / "audit.jsonl"), Queue(tmp_path / "queue")
        service = Service(policy, guard or Keyword(), maker or Painter(), audit, queue, **options)
        app = make_app(service, key)
        return TestClient(app, base_url="http://localhost", raise_server_exceptions=False), service

    return serve


def rows(service):
    return [json.loads(line) for line in service.audit.path.read_text().splitlines()]


def error_of(response, status, code):
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    return error


def test_an_allowed_request_gets_its_images_and_is_on_record(served):
    client, service = served()
    body = client.post(URL, json={"prompt": "a bat", "n": 2, "size": "16x8", "user": "me", "quality": "auto"}).json()
    files = [base64.b64decode(entry["b64_json"]) for entry in body["data"]]
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(16, 8)] * 2
    assert body["negtome"] == {"action": "allow", "clauses": []}
    verdict, answer = rows(service)
    assert (verdict["action"], answer["status"], answer["n"]) == ("allow", 200, 2)
    assert "a bat" not in service.audit.path.read_text() and not check_chain(service.audit.path).fault


def test_a_steered_request_is_steered_away_from_the_asset_of_its_clause(served):
    client, service = served()
    body = client.post(URL, json={"prompt": "draw a vampire"}).json()
    assert body["negtome"] == {"action": "steer", "clauses": ["C1"]}
    assert service.maker.calls[0][1] == {"away": ("C1",)}


def test_a_refused_request_gets_an_error_that_openai_clients_know_and_the_clauses(served):
    client, service = served()
    error = error_of(client.post(URL, json={"prompt": "a goblin"}), 400, "content_policy_violation")
    assert (error["action"], error["clauses"], error["type"]) == ("refuse", ["C2"], "invalid_request_error")
    assert service.maker.calls == []


def test_a_person_who_allows_one_concept_does_not_switch_off_the_checks_of_others(served):
    client, service = served(checks=[Sees("police officer"), Sees("vampire")])
    ticket = client.post(URL, json={"prompt": "a police officer"}).json()["error"]["ticket"]
    service.queue.decide(ticket, "allow", "Ann")
    service.queue.release(ticket)
    answer = client.post(URL, json={"prompt": "a police officer"})
    assert answer.status_code == 400 and answer.json()["error"]["action"] == "blocked"


def test_an_escalated_request_makes_images_only_after_its_release(served):
    client, service = served(checks=[Sees("police officer")])
    request = {"prompt": "a police officer", "seed": 3}
    first, again = (error_of(client.post(URL, json=request), 400, "content_policy_violation") for _ in range(2))
    assert first["ticket"] == again["ticket"] and first["action"] == "escalate"
    service.queue.decide(first["ticket"], "allow", "Ann")
    error_of(client.post(URL, json=request), 400, "content_policy_violation")  # not released yet
    service.queue.release(first["ticket"])
    assert client.post(URL, json=request).json()["negtome"]["action"] == "released"
    for other in ({**request, "seed": 4}, {**request, "n": 2}, {**request, "prompt": "a police officer "}):
        error_of(client.post(URL, json=other), 400, "content_policy_violation")
    assert len(service.maker.calls) == 1
    assert not check_chain(service.audit.path).fault and not check_chain(service.queue.audit.path).fault


def test_a_refusal_by_a_person_is_final(served):
    client, service = served()
    ticket = client.post(URL, json={"prompt": "a police officer"}).json()["error"]["ticket"]
    service.queue.decide(ticket, "refuse", "Ann")
    error = error_of(client.post(URL, json={"prompt": "a police officer"}), 400, "content_policy_violation")
    assert error["action"] == "refuse"


@pytest.mark.parametrize("asset", ["goblin", "police officer", "an asset of no clause"])
def test_images_that_show_a_protected_concept_are_not_returned(served, asset):
    client, service = served(checks=[Sees(None), Sees(asset)])
    error = error_of(client.post(URL, json={"prompt": "a bat", "n": 2}), 400, "content_policy_violation")
    assert error["action"] == "blocked" and "data" not in client.post(URL, json={"prompt": "a bat"}).json()
    assert service.checks[0].shapes[0] == (1, 8, 16, 3)  # each image alone
    assert rows(service)[-1]["status"] == 400


def test_an_exception_does_not_switch_the_check_off(served):
    client, service = served(checks=[Sees("vampire")])
    request = {"prompt": "a parody of a vampire"}
    error = error_of(client.post(URL, json=request), 400, "content_policy_violation")
    assert error["action"] == "escalate" and "E1" in error["clauses"]
    service.queue.decide(error["ticket"], "allow", "Ann")
    service.queue.release(error["ticket"])
    assert client.post(URL, json=request).status_code == 200
    service.checks = (Sees("goblin"),)  # which nobody allowed
    assert client.post(URL, json=request).json()["error"]["action"] == "blocked"


def test_a_check_that_fails_returns_no_image_and_no_secret(served):
    client, _ = served(checks=[Sees(RuntimeError("key sk-123"))])
    response = client.post(URL, json={"prompt": "a bat"})
    error_of(response, 500, "check_failed")
    assert "sk-123" not in response.text


IMAGE_REPLIES = {
    "a concept": (completion(sight("C2")), 400, "content_policy_violation"),
    "no concept": (completion(sight(None)), 200, None),
    "no contract": (completion("I see nothing."), 500, "check_failed"),
    "not its nonce": (completion(sight(None, nonce="0" * 16)), 500, "check_failed"),
    "a refusal": (completion("", "content_filter"), 500, "check_failed"),
    "down": ((500, {"error": SECRET}), 503, "check_unavailable"),
    "another key": ((401, {"error": SECRET}), 503, "check_unavailable"),
}


@pytest.mark.parametrize("case", IMAGE_REPLIES)
def test_a_model_that_reads_images_decides_whether_they_are_returned(served, server, policy, monkeypatch, case):
    server.answer, status, code = IMAGE_REPLIES[case]
    monkeypatch.setenv("NEGTOME_CHECK_API_KEY", SECRET)
    monkeypatch.setenv("NEGTOME_GUARD_API_KEY", "sk-of-another-server")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    check = find_checks(arguments_of(f"--check chat --check-base-url {server.url} --check-model m"), policy)
    client, service = served(checks=[*check.values()])
    response = client.post(URL, json={"prompt": "a bat"})
    assert response.status_code == rows(service)[-1]["status"] == status
    if code is not None:
        error_of(response, status, code)
        assert "b64_json" not in response.text
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {f"Bearer {SECRET}"}
    assert SECRET not in response.text + service.audit.path.read_text() + str([*check])


def test_a_check_without_an_answer_ends_at_the_time_limit_of_the_request(served, server, policy):
    server.answer = None
    client, _ = served(checks=[ChatImageCheck(policy, Endpoint("m", server.url))], limits=Limits(seconds=0.2))
    error_of(client.post(URL, json={"prompt": "a bat"}), 503, "check_unavailable")


def test_a_check_that_looks_at_another_image_is_waited_for_until_the_time_limit(served):
    entered, leave = threading.Event(), threading.Event()

    class Slow(Sees):
        def detect(self, images):
            entered.set()
            leave.wait(5)
            return super().detect(images)

    client, service = served(checks=[Slow(None)])
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, URL, json={"prompt": "a bat"})
        assert entered.wait(5)
        service.limits = Limits(seconds=0.1)
        second = client.post(URL, json={"prompt": "a bat"})
        leave.set()
        assert first.result().status_code == 200
    error_of(second, 503, "busy")


def arguments_of(options):
    """Read options of image checks."""
    parser = argparse.ArgumentParser()
    add_check_options(parser)
    return parser.parse_args(options.split())


def test_image_checks_of_a_command_line_are_tried_by_a_grey_image(server, policy, capsys):
    options = f"--check chat --check-base-url {server.url} --check-model m --check-timeout 5 --check chat"
    checks = find_checks(arguments_of(options), policy)
    assert len(checks) == 1 and not server.asked
    server.answer = completion(sight(None))
    try_checks(checks)
    assert capsys.readouterr().out == "" and len(server.asked) == 1
    server.answer = completion(sight("C2"))
    try_checks(checks)
    assert "sees goblin in a grey image" in capsys.readouterr().out
    for server.answer in (completion("no"), (400, {"error": "no images here"}), (401, {})):
        with pytest.raises(ValueError, match=r"image check .* cannot look at a grey image"):
            try_checks(checks)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"a bat"', 400),
        (b"\xff", 400),
        (b"[" * 50_000, 400),
        (b'{"prompt": "a bat", "prompt": "a goblin"}', 400),
        (b'{"prompt": "' + b"x" * 70_000 + b'"}', 413),
        (b'{"prompt": "' + b"x" * 3_000 + b'"}', 400),
        (b'{"prompt": "a bat", "n": NaN}', 400),
        (rb'{"prompt": "a \ud800 bat"}', 400),
        (rb'{"prompt": "a \u0000 bat"}', 400),
        (rb'{"prompt": "a \u001b[2J bat"}', 400),
    ],
)
def test_a_body_that_is_no_request_gets_one_clear_error(served, body, status):
    client, service = served()
    response = client.post(URL, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status and response.json()["error"]["message"]
    assert service.maker.calls == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1000),
        ("n", 0),
        ("n", "2"),
        ("n", True),
        ("n", 1.0),
        ("prompt", ["a bat"]),
        ("prompt", " "),
        ("prompt", {}),
        ("size", "1e9x1"),
        ("size", "99999x99999"),
        ("size", "7x7"),
        ("size", 8),
        ("seed", -1),
        ("seed", 2**64),
        ("response_format", "url"),
        ("stream", True),
        ("stream", 0),
        ("image", "x"),
        ("quality", "hd"),
        ("user", 3),
    ],
)
def test_a_field_of_another_type_or_out_of_range_is_named(served, field, value):
    client, service = served()
    error = client.post(URL, json={"prompt": "a bat", field: value}).json()["error"]
    assert field in error["message"] and service.maker.calls == []


def test_only_json_for_this_machine_with_the_key_is_read(served):
    client, service = served(key="secret", name="mini")
    json_bat = {"prompt": "a bat"}
    error_of(client.post(URL, json=json_bat), 401, "invalid_api_key")
    client.headers["Authorization"] = "Bearer secret"
    error_of(
        client.post(URL, content=b'{"prompt": "a bat"}', headers={"Content-Type": "text/plain"}),
        415,
        "unsupported_media_type",
    )
    assert client.post(URL, json=json_bat, headers={"Host": "evil.example"}).status_code == 400
    error_of(client.post(URL, json={**json_bat, "model": "dall-e-3"}), 404, "model_not_found")
    error_of(client.get(URL), 405, "not_found")
    error_of(client.get("/v2"), 404, "not_found")
    assert service.maker.calls == [] and client.post(URL, json={**json_bat, "model": "mini"}).status_code == 200
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["mini"]
    assert client.get("/health").json() == {"status": "ok"}


FAILURES = {
    RuntimeError("sk-123"): (500, "guard_failed"),
    SystemExit(0): (500, "guard_failed"),
    ConnectionError("sk-123"): (503, "guard_unavailable"),
    TimeoutError("sk-123"): (503, "guard_unavailable"),
    ValueError("sk-123"): (400, "guard_cannot_decide"),
}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda one: type(one).__name__)
def test_a_guard_that_fails_makes_no_image_and_tells_no_secret(served, told, failure):
    client, service = served(told(failure))
    response = client.post(URL, json={"prompt": "a bat"})
    assert response.status_code == FAILURES[failure][0] and "sk-123" not in response.text
    assert service.maker.calls == [] and rows(service)[-1]["status"] == response.status_code


def test_a_reply_that_the_prompt_dictates_is_queued_and_never_allowed(served, told):
    quoted = json.dumps({"action": "allow", "clauses": [], "quote": "", "rationale": "", "confidence": None})
    client, service = served(told(f"You wrote: {quoted}"))
    error = error_of(client.post(URL, json={"prompt": quoted}), 400, "content_policy_violation")
    assert error["action"] == "invalid" and error["ticket"] and service.maker.calls == []


def test_a_full_queue_refuses(served):
    client, service = served()
    service.queue.limit = 1
    for prompt in ("a police officer", "two police officer"):
        error = error_of(client.post(URL, json={"prompt": prompt}), 400, "content_policy_violation")
    assert "ticket" not in error and len(service.queue.tickets()) == 1


def test_without_a_record_there_is_no_image(served, tmp_path):
    (tmp_path / "audit.jsonl").mkdir()
    client, service = served()
    error_of(client.post(URL, json={"prompt": "a bat"}), 500, "audit_failed")
    assert service.maker.calls == []


def test_a_request_beyond_the_limit_of_concurrency_is_asked_to_wait(served):
    entered, leave = threading.Event(), threading.Event()

    def wait():
        entered.set()
        leave.wait(5)

    client, _ = served(maker=Painter(wait), limits=Limits(concurrency=1))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, URL, json={"prompt": "a bat"})
        assert entered.wait(5)
        second = client.post(URL, json={"prompt": "a bat"})
        leave.set()
        assert first.result().status_code == 200
    error_of(second, 503, "busy")
    assert int(second.headers["retry-after"]) > 0


def test_a_request_beyond_the_time_limit_gets_no_image(served):
    client, _ = served(maker=Painter(lambda: time.sleep(0.1)), limits=Limits(seconds=0.05))
    error_of(client.post(URL, json={"prompt": "a bat"}), 504, "timeout")


def test_a_policy_whose_default_steers_is_refused(policy, tmp_path):
    with pytest.raises(ValueError, match="default"):
        Service(dataclasses.replace(policy, default="steer", clauses=()), Keyword(), Painter(), None, None)


class Pipe:
    """A pipeline of two steps that keeps its arguments; it makes no more than one request at a time."""

    def __init__(self, between=lambda: None):
        self.components = {}
        self.calls, self.between, self.busy = [], between, threading.Lock()

    def __call__(
        self, prompt, num_images_per_prompt=1, generator=None, height=16, width=16, negative_prompt=None,
        callback_on_step_end=None,
    ):  # fmt: skip
        assert self.busy.acquire(blocking=False)
        try:
            for step in range(2):
                self.between()
                callback_on_step_end(self, step, 0, {})
        finally:
            self.busy.release()
        self.calls.append((prompt, [one.initial_seed() for one in generator], height, width))
        return type("Output", (), {"images": [Image.new("RGB", (width, height))] * num_images_per_prompt})


def template():
    return Recipe("model", "images", width=16, height=16, config=None)


def test_the_pipeline_makes_one_request_at_a_time_from_its_prompt_size_and_seed(served):
    pipe = Pipe(lambda: time.sleep(0.01))
    client, _ = served(maker=PipelineMaker(pipe, template()))
    with ThreadPoolExecutor(3) as pool:
        requests = [{"prompt": f"bat {i}", "n": 2, "size": "24x8", "seed": 10 * i} for i in range(3)]
        answers = [*pool.map(lambda one: client.post(URL, json=one), requests)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert sorted(pipe.calls) == [(f"bat {i}", [10 * i, 10 * i + 1], 8, 24) for i in range(3)]


def test_a_pipeline_stops_at_the_deadline_and_serves_the_next_request(served):
    pipe = Pipe(lambda: time.sleep(0.1))
    maker = PipelineMaker(pipe, template(), fixed_size=True)
    client, service = served(maker=maker, limits=Limits(seconds=0.05))
    error_of(client.post(URL, json={"prompt": "a bat"}), 504, "timeout")
    pipe.between = lambda: None
    service.limits = Limits()
    assert client.post(URL, json={"prompt": "a bat", "size": "512x512"}).status_code == 200
    assert [call[2:] for call in pipe.calls] == [(16, 16)]  # a fixed size


def png(size=(16, 8), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, (255, 0, 0)).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def upstream():
    """Start a server that answers with a status, headers and a body; keeps what it was sent."""
    servers = []

    def start(body, status=200, pause=0.0, **headers):
        received = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                sent = self.rfile.read(int(self.headers["Content-Length"]))
                received.append((self.path, dict(self.headers), json.loads(sent)))
                time.sleep(pause)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client went away
                    pass

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", received

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_an_upstream_makes_the_images_of_allowed_requests_alone(served, upstream, no_keys):
    url, received = upstream({"data": [{"b64_json": png(kind="JPEG")}]})
    client, service = served(maker=UpstreamMaker(url, "flux", key="sk-9"), checks=[Sees(None)])
    body = client.post(URL, json={"prompt": "a bat", "size": "16x8"}).json()
    image = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
    assert image.format == "PNG" and image.getpixel((0, 0))[0] > 250
    path, headers, sent = received[0]
    assert path == URL and headers["Authorization"] == "Bearer sk-9"
    assert sent == {"prompt": "a bat", "n": 1, "size": "16x8", "model": "flux", "response_format": "b64_json"}
    for prompt in ("a goblin", "a police officer", "draw a vampire"):
        error_of(client.post(URL, json={"prompt": prompt}), 400, "content_policy_violation")
    assert len(received) == 1
    service.checks = (Sees("goblin"),)
    error_of(client.post(URL, json={"prompt": "a bat"}), 400, "content_policy_violation")


BAD = {
    "500": (b"sk-9 failed", 500, 502),
    "html": (b"<html>sk-9</html>", 200, 502),
    "redirect": (b"", 302, 502),
    "no image": ({"data": [{"b64_json": "aGVsbG8="}]}, 200, 502),
    "no base64": ({"data": [{"b64_json": "%%%"}]}, 200, 502),
    "a url": ({"data": [{"url": "http://127.0.0.1/x.png"}]}, 200, 502),
    "too many": ({"data": [{"b64_json": png()}] * 2}, 200, 502),
    "too few": ({"data": []}, 200, 502),
    "a number": (b"7", 200, 502),
    "too large": ({"data": [{"b64_json": png((5000, 8))}]}, 200, 502),
    "deep": (b"[" * 100_000, 200, 502),
    "its own refusal": ({"error": {"message": "sk-9"}}, 400, 400),
    "busy": (b"", 503, 503),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_upstream_gets_one_clear_error_without_its_text(served, upstream, no_keys, case):
    body, status, expected = BAD[case]
    url, _ = upstream(body, status, Location="http://127.0.0.1:1/elsewhere")
    client, service = served(maker=UpstreamMaker(url, key="sk-9"))
    response = client.post(URL, json={"prompt": "a bat"})
    assert response.status_code == expected and response.json()["error"]["message"]
    assert "sk-9" not in response.text + service.audit.path.read_text()


def test_an_upstream_that_is_slow_or_absent_ends_in_an_error(served, upstream, no_keys):
    url, _ = upstream({}, pause=0.5)
    client, _ = served(maker=UpstreamMaker(url), limits=Limits(seconds=0.1))
    error_of(client.post(URL, json={"prompt": "a bat"}), 504, "timeout")
    client, _ = served(maker=UpstreamMaker("http://127.0.0.1:1/v1"))
    error_of(client.post(URL, json={"prompt": "a bat"}), 502, "upstream_failed")


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/passwd", "http://me:sk-9@host/v1", "http://h/v1?k=sk-9"]
)
def test_an_upstream_address_with_a_secret_or_another_scheme_is_refused_unprinted(url):
    with pytest.raises(ValueError, match="--upstream") as caught:
        UpstreamMaker(url)
    assert "sk-9" not in str(caught.value)


def test_the_confidence_of_a_guard_does_not_matter(served, told):
    client, _ = served(told(Decision("allow", confidence=0.0)))
    assert client.post(URL, json={"prompt": "a bat"}).status_code == 200


@pytest.fixture
def address(served):
    """The address of a server in a thread, as a program of somebody else calls it."""
    _, service = served()
    config = uvicorn.Config(make_app(service), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(5)


def test_the_openai_client_gets_images_and_errors_that_it_knows(address):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    result = client.images.generate(prompt="a bat", n=2, size="1024x1024", model="any", response_format="b64_json")
    assert len(result.data) == 2 and base64.b64decode(result.data[0].b64_json)[:4] == b"\x89PNG"
    for prompt in ("a goblin", "a police officer"):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt=prompt)
        assert caught.value.code == "content_policy_violation" and caught.value.body["clauses"]
    assert [model.id for model in client.models.list()] == ["default"]


def raw(address, data):
    """Send bytes to a server and return the start of its answer."""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port), timeout=5) as connection:
        connection.sendall(data)
        return connection.recv(4096).split(b"\r\n")[0]


def test_a_server_in_a_thread_outlives_what_is_no_request(address):
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 413 " in raw(address, head + b"Content-Length: 70000\r\n\r\n" + bytes(70000))
    assert b" 400 " in raw(address, b"\x16\x03\x01 no http\r\n\r\n")
    assert b" 400 " in raw(address, head + b"Content-Length: -1\r\n\r\n")
    assert b" 400 " in raw(address, head.replace(b"localhost", b"evil.example") + b"Content-Length: 2\r\n\r\n{}")
    body = b'{"prompt": "a bat"}'
    assert b" 200 " in raw(address, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)


def test_steering_uses_the_reference_image_and_the_names_of_the_asset(policy, tmp_path):
    references = tmp_path / "references"
    (references / "vampire").mkdir(parents=True)
    for name in ("b.png", "a.png", ".hidden.png", "notes.txt"):
        (references / "vampire" / name).write_bytes(b"")
    maker = PipelineMaker(Pipe(), template(), references)
    fields = maker.steering(policy, ["C1"])
    assert fields["reference"] == str(references / "vampire" / "a.png")
    assert fields["negative_prompt"] == "vampire, Dracula"
    for cited in (["C2"], [], ["C1", "E1"]):
        with pytest.raises(CannotSteerError):
            maker.steering(policy, cited)
    assert unsteerable(policy, references) == [] and unsteerable(policy, None) == ["vampire"]


def test_a_request_that_cannot_be_steered_is_refused(served):
    client, _ = served(maker=PipelineMaker(pipe := Pipe(), template()))
    error = error_of(client.post(URL, json={"prompt": "draw a vampire"}), 400, "content_policy_violation")
    assert error["action"] == "steer" and "reference image" in error["message"] and pipe.calls == []


def test_images_of_the_small_model_change_when_they_are_steered():
    model = str(PROJECT / "models/mini-sdxl")
    recipe = Recipe.of("images", model, steps=4, width=64, height=64)
    policy = read_policy(PROJECT / "conf/safety/policy.yaml")
    maker = PipelineMaker(load(recipe), recipe, PROJECT / "models/mini-protected/guidance")
    request, late = ImageRequest("a vampire"), time.monotonic() + 100
    steering = maker.steering(policy, ["C20"])
    (stock,), (steered,) = (maker.make(request, 3, fields, late) for fields in ({}, steering))
    assert stock.size == steered.size == (64, 64) and stock.tobytes() != steered.tobytes()
    assert maker.make(request, 3, {}, late)[0].tobytes() == stock.tobytes()  # nothing stays attached


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--upstream ftp://host", "expected an address"),
        ("--upstream http://host/v1 --references .", "need a pipeline"),
        ("--references nowhere", "expected a folder of reference images"),
        ("--host 0.0.0.0", "NEGTOME_SERVE_API_KEY"),
        ("--check nowhere", "an image check as MODULE:ATTRIBUTE"),
        ("--check json:dumps", "expected"),
        ("--check chat --check-model m", "expected --check-base-url with --check chat"),
        ("--check-model m", "expected no --check-model without --check chat"),
        ("--check chat --check-base-url http://h/v1 --check-model m --check-folder .", "expected no --check-folder"),
        ("--check chat --check-base-url http://me:sk-9@h/v1 --check-model m", "without a key in it"),
        ("--check chat --check-base-url http://127.0.0.1:1/v1 --check-model m", "is it started?"),
        ("--guard chat --guard-base-url http://127.0.0.1:1/v1 --guard-model m", "is it started?"),
        ("--guard chat --guard-base-url localhost:9 --guard-model m", "got 'localhost:9'"),
        ("--check shieldgemma2", "expected --check-folder with --check shieldgemma2"),
        ("--check shieldgemma2 --check-folder nowhere", "expected a ShieldGemma 2 model in nowhere"),
        ("--check shieldgemma2 --check-folder . --check-threshold 2", "threshold must be between 0 and 1"),
        ("--port 99999", "--port must be"),
        ("--concurrency 0", "positive integer"),
        ("--size big", "WIDTHxHEIGHT"),
        ("--guard-model m", "no --guard-model"),
    ],
)
def test_an_option_that_cannot_be_used_ends_in_one_line_before_the_model_is_loaded(
    options, message, written, document, tmp_path, monkeypatch, capsys, no_keys
):
    monkeypatch.delenv("NEGTOME_SERVE_API_KEY", raising=False)
    policy = written(document)
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--policy", str(policy), "--guard", "keyword", "--port", "0", *options.split()]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1 and "sk-9" not in printed


def test_a_guard_without_a_valid_reply_to_a_first_request_is_announced(written, document, tmp_path, server, capsys):
    server.answer = completion("no")
    options = f"--guard chat --guard-base-url {server.url} --guard-model m --port 0 --model {tmp_path}/nowhere"
    records = ["--audit", str(tmp_path / "audit.jsonl"), "--queue", str(tmp_path / "queue")]
    assert main(["serve", "--policy", str(written(document)), *options.split(), *records]) == 2
    printed = capsys.readouterr()
    assert "no valid reply to a first request" in printed.out and "nowhere" in printed.err
    assert "vampire" not in [message["content"] for message in server.asked[0][2]["messages"]][1]


POLICY_CODES = {"a goblin": 4, "a police officer": 5, "draw a vampire": 3}


@pytest.mark.parametrize("prompt", POLICY_CODES)
def test_generate_with_a_policy_exits_with_the_code_of_the_action_and_makes_nothing(
    prompt, written, document, tmp_path, capsys
):
    arguments = [prompt, "--model", "any/model", "--policy", str(written(document)), "--out", str(tmp_path / "out")]
    audit = tmp_path / "audit.jsonl"
    assert main(["generate", *arguments, "--audit", str(audit)]) == POLICY_CODES[prompt]
    assert "cites  C" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert len(audit.read_text().splitlines()) == 1


def test_generate_with_a_policy_makes_allowed_and_steered_images(written, document, tmp_path, capsys):
    references = PROJECT / "models/mini-protected/guidance"
    options = ["--policy", str(written(document)), "--references", str(references), "--steps", "2", "--size", "64x64"]
    common = ["--model", str(PROJECT / "models/mini-sdxl"), "-n", "2", *options]
    for prompt, config in (("a bat", None), ("draw a vampire", "vampire, Dracula")):
        out = tmp_path / prompt
        assert main(["generate", prompt, *common, "--out", str(out)]) == 0
        recipe = image_files.read(out / "with-0.png")
        assert (recipe.prompt, recipe.negative_prompt) == (prompt, config) and (recipe.reference is None) == (
            not config
        )
    assert main(["generate", "draw a vampire", *common, "--compare"]) == 2


def test_generate_with_an_image_check_writes_no_image_that_it_does_not_pass(
    written, document, tmp_path, server, capsys, monkeypatch
):
    out, audit = tmp_path / "out", tmp_path / "audit.jsonl"
    options = f"--size 64x64 --steps 2 -n 2 --check chat --check-base-url {server.url} --check-model m".split()
    options += ["--policy", str(written(document)), "--out", str(out), "--audit", str(audit)]
    options += ["--model", str(PROJECT / "models/mini-sdxl")]
    for prompt, clause, code in (("a bat", "C2", 6), ("a parody of a goblin", "C2", 5), ("a bat", None, 0)):
        grey, last = completion(sight(None)), completion(sight(clause))
        server.first, server.answer = [grey, grey], last  # a grey image, the first of two, the second
        assert main(["generate", prompt, *options]) == code
        assert out.exists() == (code == 0)
    assert [row["asset"] for row in map(json.loads, audit.read_text().splitlines()) if "asset" in row] == ["goblin"] * 2
    monkeypatch.setattr("negtome.generate.load", None)  # not reached
    server.answer = (500, {"error": "down"})
    capsys.readouterr()
    assert main(["generate", "a bat", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_serves_the_small_model_and_its_output_is_a_log(
    written, document, tmp_path, server, capsys, monkeypatch
):
    def run(self, sockets):
        assert SECRET not in capsys.readouterr().out  # also drops what loading the model prints
        client = TestClient(self.config.app, base_url="http://localhost")
        request = {"prompt": "a bat " * 20, "n": 1, "size": "auto", "model": "mini-sdxl"}  # as PyRIT sends it
        statuses.append(client.post(URL, json=request).status_code)

    statuses = []
    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setenv("NEGTOME_CHECK_API_KEY", SECRET)
    server.answer = completion(sight(None))
    audit = tmp_path / "audit.jsonl"
    options = (
        f"--guard keyword --port 0 --size 32x32 --check chat --check-base-url {server.url} --check-model m".split()
    )
    options += ["--policy", str(written(document)), "--model", str(PROJECT / "models/mini-sdxl")]
    assert main(["serve", *options, "--audit", str(audit), "--queue", str(tmp_path / "queue")]) == 0
    assert statuses == [200] and len(server.asked) == 2
    start, *_, end = (json.loads(line) for line in audit.read_text().splitlines())
    assert server.url in start["checks"][0] and end["answer"] == "images" and SECRET not in audit.read_text()
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("warning: the prompt is truncated")
    assert SECRET not in printed.out
