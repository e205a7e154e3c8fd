"""Guards that are chat models, behind an address or in a folder, with the policy as the system message.

A policy that does not fit into the model's context is refused. Replies are parsed strictly, and no server is trusted.
"""

import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from negtome.guard.decision import Reply, UnusableReplyError, new_nonce, read_json
from negtome.guard.policy import Policy
from negtome.guard.transport import Answer, AnswerError, TooLateError, post

#: Environment variables of the key, the first that is set counts.
KEYS = ("NEGTOME_GUARD_API_KEY", "OPENAI_API_KEY")
#: Environment variables of the account that OPENAI_API_KEY belongs to, and their headers.
ACCOUNT = {"OPENAI_ORG_ID": "OpenAI-Organization", "OPENAI_PROJECT_ID": "OpenAI-Project"}
#: Longest timeout in seconds.
LONGEST_WAIT = 86_400
#: Length of the shortest key that is masked: local servers take "none" or "EMPTY".
SECRET = 8
#: Characters of English text per token, 3.6 to 4 with current tokenizers.
CHARACTERS_A_TOKEN = 4
#: Markup of chat templates and reasoning models, by which a prompt could pretend to be another message.
MARKUP = re.compile(
    r"<[|｜][^<>|｜]{1,40}[|｜]>|</?think(?:ing)?>|\[/?(?:INST|SYSTEM_PROMPT)\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>",  # noqa: RUF001
    re.IGNORECASE,
)
#: A reasoning block that a chat template opens for the model.
OPENED = re.compile(r"(<think(?:ing)?>)\s*\Z")


def messages(policy: Policy, prompt: str, nonce: str) -> list[dict[str, str]]:
    """Return the conversation that a model continues with a decision.

    Raises:
        UnusableReplyError: the prompt contains markup of conversations.
    """
    if markup := MARKUP.search(prompt):
        raise UnusableReplyError(f"expected a prompt without markup of conversations, got {markup.group()!r} in it")
    return [{"role": "system", "content": policy.render(nonce)}, {"role": "user", "content": prompt}]


def about_tokens(text: str) -> int:
    """Estimate the number of tokens of a text."""
    return round(len(text) / CHARACTERS_A_TOKEN)


class Completion(NamedTuple):
    """The assistant's message, and the server's count of the conversation's tokens, 0 if it does not count."""

    text: str
    tokens_read: int


def read_completion(body: bytes, max_tokens: int) -> Completion:
    """Read the answer of an OpenAI-compatible server, JSON in UTF-8: one choice, a text that the model ended itself.

    Raises:
        UnusableReplyError: there are several choices, or the text is not the model's complete answer.
        ValueError: it is no chat completion.
    """
    document = read_json(body.decode("utf-8"))
    choices = document.get("choices") if isinstance(document, dict) else None
    if isinstance(document, dict) and document.get("error"):  # some routers send it with status 200
        raise ValueError("an error with status 200")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices) or not choices:
        raise ValueError("no list of choices")
    usage = document.get("usage") or {}  # some servers do not count
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else usage
    if tokens is not None and type(tokens) is not int:
        raise ValueError("a usage that counts no tokens")
    choice = choices[0]
    message, reason = choice.get("message"), choice.get("finish_reason")
    if not isinstance(message, dict):
        raise ValueError("no message")
    text = "" if message.get("content") is None else message["content"]
    if not isinstance(text, str):
        raise ValueError("a content that is no text")
    if len(choices) > 1:
        raise UnusableReplyError(f"expected one choice, got {len(choices)}", text)
    if reason == "length":
        raise UnusableReplyError(_too_long(max_tokens), text)
    if reason != "stop":
        raise UnusableReplyError(f"expected finish_reason stop, got {str(reason)[:40]!r}", text)
    if extra := [name for name in ("refusal", "tool_calls", "function_call") if message.get(name)]:
        raise UnusableReplyError(f"expected a text alone, got {extra[0]} with it", text)
    return Completion(text, tokens or 0)


class Endpoint:
    """A chat model behind an OpenAI-compatible address: vLLM, llama.cpp, ollama and others.

    The server is not trusted: time and size of its answers are limited, and redirects are not followed.

    Args:
        model: the server's name of the model.
        base_url: of the server, usually ending in /v1.
        api_key: None: the first of `keys` that the environment has; with OPENAI_API_KEY, OPENAI_ORG_ID and
            OPENAI_PROJECT_ID are sent too.
        timeout: seconds for a decision with all its tries, above 0 and at most `LONGEST_WAIT`.
        temperature: of sampling; at 0 most servers return the likeliest reply.
        max_tokens: of the reply, reasoning included.
        context: largest number of tokens of policy, prompt and reply, for servers that cut off silently (ollama).
        keys: names of environment variables; NEGTOME_GUARD_API_KEY and then OPENAI_API_KEY.
    """

    name = "chat"

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None = None,
        timeout: float = 60.0,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        context: int | None = None,
        keys: Sequence[str] = KEYS,
    ) -> None:
        _check_address(base_url)
        if not 0 < timeout <= LONGEST_WAIT:
            raise ValueError(f"expected a timeout of more than 0 and at most {LONGEST_WAIT} seconds, got {timeout}")
        self.model, self.base_url, self.timeout = model, base_url, timeout
        self.temperature, self.max_tokens, self.context = temperature, max_tokens, context
        source = None if api_key else next((name for name in keys if os.environ.get(name)), None)
        self._key = (api_key or os.environ.get(source or "", "")).strip()
        if not re.fullmatch(r"[!-~]*", self._key):
            raise ValueError(f"expected a key of printable ASCII, got another in {source or 'api_key'}")
        self._headers = {"Authorization": f"Bearer {self._key or 'none'}"}
        if source == "OPENAI_API_KEY":  # servers that get another key must not learn the account
            account = {header: os.environ.get(name) for name, header in ACCOUNT.items()}
            self._headers |= {header: value for header, value in account.items() if value}

    @property
    def id(self) -> str:
        """Model, address and settings; it does not change with the server's weights."""
        return f"chat-2-{self.model}@{self.base_url}-temperature={self.temperature:g}-max_tokens={self.max_tokens}"

    def reply(self, policy: Policy, prompt: str) -> Reply:
        """Return the model's reply within `timeout`."""
        return self.reply_before(policy, prompt, time.monotonic() + self.timeout)

    def reply_before(self, policy: Policy, prompt: str, deadline: float) -> Reply:
        """Return the model's reply.

        Raises:
            UnusableReplyError: the reply is cut off, filtered or not only a text, or the prompt contains markup.
            ValueError: policy and prompt are longer than the context.
            ConnectionError: no chat completion came before the deadline.
        """
        nonce = new_nonce(prompt)
        conversation = messages(policy, prompt, nonce)
        text = "".join(message["content"] for message in conversation)
        if self.context and (tokens := about_tokens(text) + self.max_tokens) > self.context:
            raise ValueError(
                f"expected a policy, prompt and reply of at most {self.context} tokens, got about {tokens}: shorten "
                "the policy, or serve the model with a larger context"
            )
        answer = self.complete(conversation, deadline)
        if 0 < answer.tokens_read < (words := len(text.split())):
            raise ValueError(
                f"expected {self.base_url} to read the {words} words of policy and prompt, got {answer.tokens_read} "
                "tokens read: it cuts them off; serve the model with a larger context"
            )
        return Reply(answer.text, nonce)

    def complete(self, conversation: Sequence[Mapping[str, Any]], deadline: float | None = None) -> Completion:
        """Return the server's answer to a conversation, before a deadline of `time.monotonic` or within `timeout`.

        Raises:
            UnusableReplyError: there are several answers, or the answer is incomplete or not only a text.
            ConnectionError: no chat completion came in time.
            ValueError: the server says that the conversation is too long.
        """
        expected = f"expected a reply of {self.model} from {self.base_url}, got"
        deadline = time.monotonic() + self.timeout if deadline is None else deadline
        request = {
            "model": self.model,
            "messages": conversation,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        try:
            answer = post(f"{self.base_url.rstrip('/')}/chat/completions", request, self._headers, deadline)
        except TooLateError:
            raise ConnectionError(f"{expected} none in {self.timeout:g} s: give it more time") from None
        except AnswerError as error:
            raise ConnectionError(f"{expected} {error}: see what the server is") from None
        except ImportError as error:
            raise ImportError("expected the package httpx2, got none: pip install -e '.[chat]'") from error
        except ConnectionError as error:
            raise ConnectionError(f"{expected} no connection ({self._line(error)}): is it started?") from None
        if answer.status != 200:
            raise self._status_error(expected, answer)
        try:
            completion = read_completion(self._masked_body(answer), self.max_tokens)
        except UnusableReplyError as error:
            raise UnusableReplyError(self._masked(str(error)), self._masked(error.text)) from None
        except ValueError as error:
            raise ConnectionError(f"{expected} no chat completion ({self._line(error)}): correct the address") from None
        return Completion(self._masked(completion.text), completion.tokens_read)

    def _status_error(self, expected: str, answer: Answer) -> Exception:
        """Return the error for a status other than 200."""
        if 300 <= answer.status < 400:
            return ConnectionError(
                f"{expected} a redirect (status {answer.status}), which is not followed: give the address that it "
                "leads to"
            )
        body = self._masked_body(answer).decode(errors="replace")
        message = self._line(f"Error code: {answer.status} - {body}")
        if answer.status in (400, 413) and re.search(r"context|too (?:long|large)", message):
            return ValueError(f"{expected} that they are too long ({message}): shorten the policy or the reply")
        return ConnectionError(f"{expected} {message}: see what the server says")

    def _masked_body(self, answer: Answer) -> bytes:
        """Return an answer's body without the key, also where JSON escapes its slashes."""
        if len(self._key) < SECRET:
            return answer.body
        body = answer.body.replace(self._key.encode(), b"***")
        return body.replace(self._key.replace("/", "\\/").encode(), b"***")

    def _masked(self, text: str) -> str:
        """Return a text of the server without the key."""
        return text.replace(self._key, "***") if len(self._key) >= SECRET else text

    def _line(self, text: object) -> str:
        return _line(self._masked(str(text)))


class Local:
    """A chat model of transformers in a folder, loaded by its first reply; it always writes its likeliest reply.

    Args:
        folder: with weights, tokenizer and chat template. Code in it is not run.
        max_tokens: of the reply, reasoning included.
        device: torch's name; None: a GPU if there is one.
    """

    name = "chat"

    def __init__(self, folder: str | Path, max_tokens: int = 1024, device: str | None = None) -> None:
        self.folder, self.max_tokens, self.device = Path(folder), max_tokens, device
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(f"expected a model of transformers in {folder}, got no config.json there")

    @cached_property
    def id(self) -> str:
        """The folder's name, a digest of all files in it, and the longest reply."""
        return f"chat-1-{self.folder.resolve().name}-{folder_digest(self.folder)}-max_tokens={self.max_tokens}"

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ImportError("expected the package transformers, got none: pip install -e '.[chat]'") from error
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        if not tokenizer.chat_template:
            raise ValueError(
                f"expected a chat model in {self.folder}, got one without a chat template: take its instruct version"
            )
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, local_files_only=True, trust_remote_code=False, dtype="auto"
        )
        return tokenizer, model.eval().to(device)

    def reply(self, policy: Policy, prompt: str) -> Reply:
        """Return the model's reply.

        Raises:
            UnusableReplyError: the reply is cut off, or the prompt contains markup.
            ValueError: policy, prompt and reply are longer than the context, or the chat template does not fit.
        """
        nonce = new_nonce(prompt)
        tokenizer, model = self._loaded
        text = self._template(messages(policy, prompt, nonce))
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
        read = inputs["input_ids"].shape[1]
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and read + self.max_tokens > limit:
            raise ValueError(
                f"expected a policy, prompt and reply of at most {limit} tokens, the context of {self.folder}, got "
                f"{read} and {self.max_tokens}: shorten the policy or the reply"
            )
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        written = model.generate(
            **inputs,
            max_new_tokens=self.max_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=ends[0],
        )[0, read:].tolist()
        ended = bool(written) and written[-1] in ends
        # Special tokens are kept, apart from the last: channels mark the reasoning.
        reply: str = tokenizer.decode(written[:-1] if ended else written, skip_special_tokens=False)
        if not ended and len(written) >= self.max_tokens:
            raise UnusableReplyError(_too_long(self.max_tokens), reply)
        if opened := OPENED.search(text):  # the model writes only the end of the block
            reply = opened.group(1) + reply
        return Reply(reply, nonce)

    def _template(self, conversation: list[dict[str, str]]) -> str:
        """Return a conversation as a text in the model's chat template.

        Raises:
            UnusableReplyError: the prompt contains one of the model's special tokens.
            ValueError: the template has no system message.
        """
        import jinja2

        tokenizer, _ = self._loaded
        policy, prompt = (message["content"].strip() for message in conversation)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        if contained := [token for token in special if token and token in prompt]:
            raise UnusableReplyError(
                f"expected a prompt without the model's special tokens, got {contained[0]!r} in it"
            )
        try:
            text: str = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"expected a chat template that takes a system message in {self.folder}, got {_line(error)}"
            ) from error
        if policy not in text or prompt not in text:
            raise ValueError(f"expected a chat template that shows the system message in {self.folder}, got none")
        return text


def _check_address(base_url: str) -> None:
    """Raise ValueError unless it is an HTTP address without credentials, query or fragment."""
    parts = urlsplit(base_url)
    secret = parts.username or parts.password or parts.query or parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or secret:
        shown = repr(base_url[:200])
        if secret or "@" in base_url:  # without a scheme, urlsplit does not find a password
            shown = "one with a user, a query or a fragment"
        elif not re.search("[:./]", base_url):  # a key may have been given in its place
            shown = "a text without a host"
        raise ValueError(f"expected an address such as http://127.0.0.1:8000/v1, without a key in it, got {shown}")
    if re.search(r"[\s\x00-\x1f\x7f]", base_url):
        raise ValueError(f"expected an address without spaces and control characters, got {base_url!r}")
    try:
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"expected a port from 0 to 65535 in {base_url}") from error


def folder_digest(folder: Path) -> str:
    """Return 16 digits of a digest of all files in a model's folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def _too_long(max_tokens: int) -> str:
    return f"expected a reply of at most {max_tokens} tokens, got one cut off: models that think need more max_tokens"


def _line(message: object) -> str:
    """Return the start of a message in one line."""
    return " ".join(str(message).split())[:200]
