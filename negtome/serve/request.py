"""Requests for images in OpenAI's format: reading them strictly, and the errors that clients understand."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from negtome.guard.audit import text_sha256
from negtome.guard.policy import brief

#: Most bytes of a request's body.
LONGEST_BODY = 1 << 16
#: Largest seed of a request; the n-th image has the seed plus n - 1.
LARGEST_SEED = 2**32 - 1
#: Fields of OpenAI's API that change nothing here, with the values that ask for nothing else.
IGNORED: Mapping[str, tuple[Any, ...]] = {
    "quality": ("auto", "standard"),
    "style": ("auto",),
    "background": ("auto", "opaque"),
    "moderation": ("auto",),
    "output_format": ("png",),
    "output_compression": (100,),
    "stream": (False,),
    "partial_images": (0,),
    "response_format": ("b64_json",),
}
#: Fields that are read.
FIELDS = ("prompt", "model", "n", "size", "seed", "user")


class RequestError(Exception):
    """An answer that is no image: an HTTP status with OpenAI's error object.

    Args:
        status: of HTTP.
        code: for programs.
        message: for people; it has no secrets, paths or texts of other programs.
        details: further fields of the error object, such as clause ids.
        param: name of the field that is wrong.
        retry_after: seconds after which a retry makes sense.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: Mapping[str, Any] | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.details, self.retry_after = dict(details or {}), retry_after

    def body(self) -> dict[str, Any]:
        """Return the answer's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code, **self.details}
        }


@dataclass(frozen=True)
class Limits:
    """Bounds of a request.

    Attributes:
        images: most images of a request.
        side: longest side of an image in pixels.
        prompt: most characters of a prompt.
        seconds: for a request, from its body to its answer.
        concurrency: most requests in work; further ones get HTTP 503.
    """

    images: int = 4
    side: int = 1024
    prompt: int = 2000
    seconds: float = 300.0
    concurrency: int = 8


@dataclass(frozen=True)
class ImageRequest:
    """A request for images.

    Attributes:
        prompt: not empty.
        images: how many, at least 1.
        width, height: in pixels; both None for the model's own size.
        seed: of the first image; None for a random one.
    """

    prompt: str
    images: int = 1
    width: int | None = None
    height: int | None = None
    seed: int | None = None

    def sha256(self, policy_sha256: str) -> str:
        """Return a digest of the request under a policy: another prompt, size, seed or policy has another one."""
        return text_sha256(json.dumps([policy_sha256, asdict(self)], sort_keys=True))

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT, or auto."""
        return "auto" if self.width is None else f"{self.width}x{self.height}"


def read_request(body: bytes, model: str | None, limits: Limits) -> ImageRequest:
    """Read the JSON of a request.

    Args:
        body: of the HTTP request.
        model: the only name that the field `model` may have; None for any.
        limits: of its values.

    Raises:
        RequestError: it is no JSON, or has an unknown field, a wrong type or a value out of range.
    """
    try:
        fields = json.loads(body.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "invalid_json", "the body must be one JSON object in UTF-8") from error
    if not isinstance(fields, dict):
        raise RequestError(400, "invalid_json", "the body must be a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, value in fields.items():
        if name not in FIELDS:
            _check_ignored(name, value)
    named = fields.get("model", model)
    if model is not None and named != model:
        raise RequestError(404, "model_not_found", f"the model is {model}, got {brief(named)}", param="model")
    if "user" in fields and not isinstance(fields["user"], str):
        _wrong("user", "must be a text")
    images, seed = fields.get("n", 1), fields.get("seed")
    if type(images) is not int or not 1 <= images <= limits.images:
        _wrong("n", f"must be an integer from 1 to {limits.images}, got {brief(images)}")
    if seed is not None and (type(seed) is not int or not 0 <= seed <= LARGEST_SEED):
        _wrong("seed", f"must be an integer from 0 to {LARGEST_SEED}, got {brief(seed)}")
    width, height = _read_size(fields.get("size", "auto"), limits.side)
    return ImageRequest(_read_prompt(fields.get("prompt"), limits.prompt), images, width, height, seed)


def _wrong(param: str, message: str) -> NoReturn:
    raise RequestError(400, "invalid_value", f"{param} {message}", param=param)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that occurs twice, of which another reader of the JSON may take the other value."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name twice")
    return fields


def _check_ignored(name: str, value: Any) -> None:
    if name == "response_format" and value == "url":
        _wrong(name, 'must be b64_json: this server keeps no images that a url could name; send "b64_json"')
    if name not in IGNORED:
        raise RequestError(400, "unknown_parameter", f"{brief(name)} is no field of a request here: leave it out")
    if not any(type(value) is type(one) and value == one for one in IGNORED[name]):
        allowed = " or ".join(map(json.dumps, IGNORED[name]))
        _wrong(name, f"must be {allowed} here, got {brief(value)}: leave it out")


def _read_prompt(prompt: Any, longest: int) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        _wrong("prompt", "must be a text that is not empty")
    if len(prompt) > longest:
        _wrong("prompt", f"must have at most {longest} characters, got {len(prompt)}: shorten it")
    if any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" for character in prompt):
        _wrong("prompt", "must have no control characters and no halves of characters")
    return prompt


def _read_size(size: Any, side: int) -> tuple[int | None, int | None]:
    if size == "auto":
        return None, None
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size) if isinstance(size, str) else None
    if match is None:
        _wrong("size", f"must be WIDTHxHEIGHT in pixels, or auto, got {brief(size)}")
    width, height = int(match[1]), int(match[2])
    if not all(8 <= one <= side and one % 8 == 0 for one in (width, height)):
        _wrong("size", f"must have sides from 8 to {side} that are multiples of 8, got {width}x{height}")
    return width, height
