"""Guards that are chat models, behind an address or in a folder, with the policy as their system message.

Nothing is cut off and nothing is trusted: a policy that the model cannot read whole is refused, and what it replies is
parsed and verified as every guard's reply is, without any server's promise of well-formed JSON.
"""

import hashlib
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from negtome.guard.decision import UnusableReplyError
from negtome.guard.policy import Policy

#: Where a key is looked for, in this order; servers of one's own mostly ask for none.
KEYS = ("NEGTOME_GUARD_API_KEY", "OPENAI_API_KEY")
#: Characters of English text a token of current tokenizers, about: 3.6 to 4.
CHARACTERS_A_TOKEN = 4
#: What chat templates and reasoning models mark their parts by; in a prompt it would pretend to be another part.
MARKUP = re.compile(
    r"<[|｜][^<>|｜]{1,40}[|｜]>|</?think(?:ing)?>|\[/?(?:INST|SYSTEM_PROMPT)\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>",  # noqa: RUF001
    re.IGNORECASE,
)


def messages(policy: Policy, prompt: str) -> list[dict[str, str]]:
    """Return the conversation that a model is to continue.

    Raises:
        UnusableReplyError: the prompt has markup of a conversation in it, which no model could tell from its own.
    """
    if found := MARKUP.search(prompt):
        raise UnusableReplyError(f"expected a prompt without markup of conversations, got {found.group()!r} in it")
    return [{"role": "system", "content": policy.render()}, {"role": "user", "content": prompt}]


def about_tokens(text: str) -> int:
    """Return about how many tokens a text has, whosever they are."""
    return round(len(text) / CHARACTERS_A_TOKEN)


class Endpoint:
    """A chat model behind an OpenAI-compatible address: vLLM, llama.cpp, ollama and others.

    Args:
        model: as the server calls it.
        base_url: of the server, mostly ending in /v1.
        api_key: none: that of the environment, NEGTOME_GUARD_API_KEY or else OPENAI_API_KEY.
        timeout: seconds without a sign of the server after which it is given up.
        temperature: of sampling; at 0 most servers give the most likely reply.
        max_tokens: of the reply, thinking included.
        context: tokens that policy, prompt and reply may have together, for servers that cut off what is more and do
            not say so (ollama); others refuse by themselves.
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
    ) -> None:
        parts = urlsplit(base_url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.username
            or parts.password
            or parts.query
        ):
            shown = f"{parts.scheme}://{parts.hostname}"  # without what may be secret
            raise ValueError(f"expected an address such as http://127.0.0.1:8000/v1, without a key in it, got {shown}")
        self.model, self.base_url, self.timeout = model, base_url, timeout
        self.temperature, self.max_tokens, self.context = temperature, max_tokens, context
        self._key = api_key or next((os.environ[name] for name in KEYS if os.environ.get(name)), "none")

    @property
    def id(self) -> str:
        """Model, address and settings; whether the server has other weights under the same name, nobody here knows."""
        return f"chat-1-{self.model}@{self.base_url}-temperature={self.temperature:g}-max_tokens={self.max_tokens}"

    @cached_property
    def _client(self) -> Any:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ImportError("expected the package openai, got none: pip install -e '.[chat]'") from error
        return OpenAI(base_url=self.base_url, api_key=self._key, timeout=self.timeout, max_retries=0)

    def reply(self, policy: Policy, prompt: str) -> str:
        conversation = messages(policy, prompt)
        text = "".join(message["content"] for message in conversation)
        if self.context and (tokens := about_tokens(text) + self.max_tokens) > self.context:
            raise ValueError(
                f"expected a policy, prompt and reply of at most {self.context} tokens, got about {tokens}: shorten "
                "the policy, or serve the model with a larger context"
            )
        answer = self.complete(conversation)
        read = (answer.usage and answer.usage.prompt_tokens) or 0  # some servers do not count
        if 0 < read < (words := len(text.split())):
            raise ValueError(
                f"expected {self.base_url} to read the {words} words of policy and prompt, got {read} tokens read: it "
                "cuts them off; serve the model with a larger context"
            )
        reply = answer.choices[0].message.content or ""
        if answer.choices[0].finish_reason == "length":
            raise UnusableReplyError(_too_long(self.max_tokens), reply)
        return reply

    def complete(self, conversation: list[dict[str, str]]) -> Any:
        """Return the server's answer to a conversation, a chat completion with at least one message.

        Raises:
            ConnectionError: none came, or none of a chat model.
            ValueError: the server says that the conversation is longer than it can read.
        """
        client = self._client
        import openai

        what = f"expected a reply of {self.model} from {self.base_url}, got"
        try:
            answer = client.chat.completions.create(
                model=self.model, messages=conversation, temperature=self.temperature, max_tokens=self.max_tokens
            )
        except openai.APITimeoutError:
            raise ConnectionError(f"{what} none in {self.timeout:g} s: give it more time") from None
        except openai.APIConnectionError as error:
            reason = _line(error.__cause__ or error)
            raise ConnectionError(f"{what} no connection ({reason}): is it started?") from None
        except openai.APIStatusError as error:
            said = _line(error)
            if error.status_code in (400, 413) and re.search(r"context|too (?:long|large)", said):
                raise ValueError(f"{what} that they are too long ({said}): shorten the policy or the reply") from None
            raise ConnectionError(f"{what} {said}: see what the server says") from None
        except (openai.APIError, ValueError) as error:  # ValueError: no JSON
            raise ConnectionError(f"{what} no chat completion ({_line(error)}): correct the address") from None
        if not getattr(answer, "choices", None) or not getattr(answer.choices[0], "message", None):
            raise ConnectionError(f"{what} no chat completion ({_line(answer)}): correct the address")
        return answer


class Local:
    """A chat model of transformers from a folder, which is loaded when it is first asked; always its likeliest reply.

    Args:
        folder: with weights, tokenizer and its chat template. Code in it is not run.
        max_tokens: of the reply, thinking included.
        device: torch's name of it; none: a GPU where there is one.
    """

    name = "chat"

    def __init__(self, folder: str | Path, max_tokens: int = 1024, device: str | None = None) -> None:
        self.folder, self.max_tokens, self.device = Path(folder), max_tokens, device
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(f"expected a model of transformers in {folder}, got no config.json there")

    @cached_property
    def id(self) -> str:
        """The folder's name, a digest of all files in it, and how long its replies may be."""
        total = hashlib.sha256()
        for path in sorted(path for path in self.folder.iterdir() if path.is_file()):
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return f"chat-1-{self.folder.resolve().name}-{total.hexdigest()[:16]}-max_tokens={self.max_tokens}"

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

    def reply(self, policy: Policy, prompt: str) -> str:
        tokenizer, model = self._loaded
        text = self._template(messages(policy, prompt))
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
        read = inputs["input_ids"].shape[1]
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and read + self.max_tokens > limit:
            raise ValueError(
                f"expected a policy, prompt and reply of at most {limit} tokens, the context of {self.folder}, got "
                f"{read} and {self.max_tokens}: shorten the policy or the reply"
            )
        ends = model.generation_config.eos_token_id
        written = model.generate(
            **inputs,
            max_new_tokens=self.max_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=ends[0] if isinstance(ends, list) else ends,
        )[0, read:]
        # with the marks of channels, which say what is thinking
        reply: str = tokenizer.decode(written, skip_special_tokens=False)
        if len(written) >= self.max_tokens and written[-1] not in (ends if isinstance(ends, list) else [ends]):
            raise UnusableReplyError(_too_long(self.max_tokens), reply)
        return reply

    def _template(self, conversation: list[dict[str, str]]) -> str:
        """Return a conversation as the model is used to read it.

        Raises:
            UnusableReplyError: the prompt has one of the model's special tokens in it.
            ValueError: the template has no place for a system message.
        """
        import jinja2

        tokenizer, _ = self._loaded
        policy, prompt = (message["content"].strip() for message in conversation)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        if found := [token for token in special if token and token in prompt]:
            raise UnusableReplyError(f"expected a prompt without the model's special tokens, got {found[0]!r} in it")
        try:
            text: str = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"expected a chat template that takes a system message in {self.folder}, got {_line(error)}"
            ) from error
        if policy not in text or prompt not in text:
            raise ValueError(f"expected a chat template that shows the system message in {self.folder}, got none")
        return text


def _too_long(max_tokens: int) -> str:
    return f"expected a reply of at most {max_tokens} tokens, got one cut off: models that think need more max_tokens"


def _line(what: object) -> str:
    """Return what a server or a library said, in one line and not all of it."""
    return " ".join(str(what).split())[:200]
