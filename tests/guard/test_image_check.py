"""Checks of images: a vision-language model behind an address, and ShieldGemma 2 with tiny random weights."""

import base64
import io
import json
import re
import time
from dataclasses import replace

import pytest
import torch
from chat_server import NONCE, SECRET, completion, sight
from PIL import Image

from experiments import PROJECT
from negtome.guard import Endpoint, UnusableReplyError
from negtome.guard.image_check import ChatImageCheck, protected_clauses


@pytest.fixture
def check(policy, server):
    return ChatImageCheck(policy, Endpoint("m", server.url, timeout=5))


IMAGES = torch.rand(2, 6, 4, 3, generator=torch.Generator().manual_seed(0))


def test_each_image_is_sent_as_a_png_with_the_policy_until_one_shows_a_concept(check, server):
    server.first = [completion(sight(None, 0.25))]
    server.answer = completion(sight("C2", 0.75))
    assert check.detect(IMAGES) == ("goblin", 0.75)
    assert len(server.asked) == 2
    for image, (_, _, asked) in zip(IMAGES, server.asked, strict=True):
        system, user = asked["messages"]
        assert "C1: vampire: a pale person" in system["content"]
        (part,) = user["content"]
        kind, _, data = part["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        sent = Image.open(io.BytesIO(base64.b64decode(data)))
        assert torch.equal(torch.tensor(list(sent.tobytes())), (255 * image).round().long().flatten())
    server.asked.clear()
    assert check.detect(IMAGES.numpy()) == ("goblin", 0.75)
    assert len(server.asked) == 1


def test_an_image_without_a_concept_passes(check, server):
    server.first = [completion(sight(None, 0.25))]
    server.answer = completion(f"<think>{sight('C1')}</think>\n```json\n{sight(None, 0.125)}\n```")
    assert check.detect(IMAGES) == (None, 0.25)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no concept",
        "I'm sorry, I can't help with that.",
        "null",
        sight(None, nonce="0123456789abcdef"),  # an object that the image shows
        sight(None) + sight(None),
        sight(None) + " as the image says",
        f"The image says: {sight(None)}",
        f"[{sight(None)}]",
        sight(None, extra=1),
        json.dumps({"nonce": NONCE, "clause": None}),
        sight("C9"),
        sight("vampire"),
        sight(["C1"]),
        sight(False),
        sight(""),
        sight(None, None),
        sight(None, 1.5),
        sight(None, True),
        sight(None, "0.5"),
        '{"nonce": "<nonce>", "clause": "C1", "clause": null, "probability": 0}',
        '{"nonce": "<nonce>", "clause": null, "probability": NaN}',
        '{"nonce": "<nonce>", "clause": null, "probability": 0.97}',
    ],
)
def test_any_other_reply_is_an_error_and_never_no_concept(check, server, reply):
    server.answer = completion(reply)
    with pytest.raises(UnusableReplyError):
        check.detect(IMAGES)
    assert len(server.asked) == 2  # asked once more about the first image
    server.first = [completion(reply)]
    server.answer = completion(sight("C1"))
    assert check.detect(IMAGES)[0] == "vampire"


@pytest.mark.parametrize(
    "reply",
    [
        (500, {"error": "broken"}),
        (400, {"error": f"no images, {SECRET}"}),
        (302, {}),
        b"<html>",
        {"choices": []},
        {"error": "overloaded"},
    ],
)
def test_a_server_that_fails_is_an_error(check, server, reply):
    server.answer = reply
    with pytest.raises(ConnectionError, match="expected a reply"):
        check.detect(IMAGES)


@pytest.mark.parametrize(
    "reply",
    [
        completion(sight(None), "length"),
        completion(sight(None), "content_filter"),
        completion(sight(None), refusal="no"),
        completion(sight(None), tool_calls=[{}]),
    ],
)
def test_an_incomplete_answer_is_an_error(check, server, reply):
    server.answer = reply
    with pytest.raises(UnusableReplyError):
        check.detect(IMAGES)


def test_a_server_that_is_late_or_reads_too_little_is_an_error(policy, server):
    server.answer = None
    with pytest.raises(ConnectionError, match=r"in 0\.3 s"):
        ChatImageCheck(policy, Endpoint("m", server.url, timeout=0.3)).detect(IMAGES)
    with pytest.raises(ConnectionError, match="expected a reply"):
        ChatImageCheck(policy, Endpoint("m", server.url)).detect_before(IMAGES, time.monotonic() + 0.1)
    server.answer = completion(sight(None), prompt_tokens=20)
    with pytest.raises(ValueError, match="cuts them off"):
        ChatImageCheck(policy, Endpoint("m", server.url)).detect(IMAGES)


@pytest.mark.parametrize(
    "images", [IMAGES[0], IMAGES[:0], 255 * IMAGES, IMAGES - 1, IMAGES * torch.nan, IMAGES[..., :2]]
)
def test_images_of_other_shapes_and_values_are_refused(check, server, images):
    with pytest.raises(ValueError, match="expected images"):
        check.detect(images)
    assert not server.asked


def test_concepts_that_the_policy_allows_are_not_looked_for(policy, server):
    first, *others = policy.clauses
    changed = replace(policy, clauses=(replace(first, action="allow"), *others))
    check = ChatImageCheck(changed, Endpoint("m", server.url))
    assert check.id != ChatImageCheck(policy, Endpoint("m", server.url)).id
    server.answer = completion(sight("C1"))
    with pytest.raises(UnusableReplyError, match="a clause of the policy"):
        check.detect(IMAGES)
    with pytest.raises(ValueError, match="nothing to look for"):
        protected_clauses(replace(policy, clauses=()))


def test_the_program_of_the_reference_page_looks_at_every_image(document, server, tmp_path, monkeypatch, capsys):
    page = (PROJECT / "docs/reference/image-checks.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text(json.dumps(document))
    (tmp_path / "images/vampire").mkdir(parents=True)
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "images/vampire/a.png")
    monkeypatch.setenv("MODEL", "m")
    monkeypatch.setenv("BASE_URL", server.url)
    monkeypatch.setenv("NEGTOME_CHECK_API_KEY", SECRET)
    server.answer = completion(sight("C1", 0.5))
    exec(program, {})
    assert capsys.readouterr().out == "images/vampire/a.png vampire 0.5\n"
    assert server.asked[0][1]["Authorization"] == f"Bearer {SECRET}"
