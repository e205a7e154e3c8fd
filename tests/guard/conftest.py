"""A small policy, and guards that reply as they are told."""

import pytest
import yaml
from chat_server import Server

from negtome.guard import Reply, read_policy

VAMPIRE = {
    "id": "C1",
    "asset": "vampire",
    "names": ["vampire", "Dracula"],
    "description": "a pale person with fangs and a high red collar",
    "action": "steer",
    "exceptions": ["E1"],
    "examples": {"violates": ["draw a vampire", "Dracula at night"], "allowed": ["a bat in a cave"]},
}
GOBLIN = {
    "id": "C2",
    "asset": "goblin",
    "description": "a red angry mask with a very long nose",
    "action": "refuse",
    "exceptions": ["E1", "E2"],
    "examples": {"violates": ["a goblin, please"], "allowed": ["a sad clay mask"]},
}
OFFICER = {
    "id": "C3",
    "asset": "police officer",
    "names": ["police officer"],
    "description": "a person in a blue uniform",
    "action": "escalate",
    "examples": {"violates": ["a police officer at work"], "allowed": ["a parking ticket"]},
}
DOCUMENT = {
    "version": 1,
    "exceptions": [
        {"id": "E1", "text": "a recognisable parody", "names": ["parody"]},
        {"id": "E2", "text": "a school book", "action": "escalate"},
    ],
    "clauses": [VAMPIRE, GOBLIN, OFFICER],
}


#: What a guard that is told its replies was asked to repeat.
NONCE = "0123456789abcdef"


class Told:
    """Replies what it is told, one after the other, and at last always the same; remembers what it was asked.

    A text is a language model's reply to a request with `NONCE`.
    """

    name = "told"
    id = "told-1"

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def reply(self, policy, prompt):
        self.asked.append((policy, prompt))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, BaseException):
            raise reply
        return Reply(reply, NONCE) if isinstance(reply, str) else reply


@pytest.fixture
def told():
    return Told


@pytest.fixture
def no_keys(monkeypatch):
    """No keys and no proxies in the environment."""
    keys = ("NEGTOME_GUARD_API_KEY", "OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")
    for name in (*keys, "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def document():
    """The policy as YAML reads it, to be changed: by value, so that no test sees another's changes."""
    return yaml.safe_load(yaml.safe_dump(DOCUMENT))


@pytest.fixture
def written(tmp_path):
    """Write what may be a policy; returns the file."""

    def write(document):
        file = tmp_path / "policy.yaml"
        text = document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write


@pytest.fixture
def policy(document, written):
    return read_policy(written(document))


@pytest.fixture
def server(no_keys):
    server = Server()
    yield server
    server.close()
