"""What makes the images behind the server: a pipeline of this process, or another server."""

import base64
import binascii
import io
import json
import os
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from PIL import Image

from negtome.generate import check_arguments, generate
from negtome.guard.policy import Policy
from negtome.guard.transport import AnswerError, TooLateError, post
from negtome.recipe import Recipe
from negtome.serve.request import ImageRequest, RequestError
from negtome.serve.steering import CannotSteerError, steer

#: Environment variable with the upstream's key.
UPSTREAM_KEY = "NEGTOME_UPSTREAM_API_KEY"
#: Bytes of an upstream's answer for each of its images.
UPSTREAM_BYTES = 1 << 25
#: Formats of images that are read from an upstream.
FORMATS = ("PNG", "JPEG", "WEBP")
#: Seconds that a busy server asks clients to wait.
WAIT = 5


class Maker(Protocol):
    """Makes images."""

    def steering(self, policy: Policy, cited: Sequence[str]) -> dict[str, Any]:
        """Return what steers images away from the asset of the cited clauses, for `make`.

        Raises:
            CannotSteerError: it cannot; the message is for the client.
        """

    def make(self, request: ImageRequest, seed: int, steering: Mapping[str, Any], deadline: float) -> list[Any]:
        """Return the PIL images of a request, in RGB.

        Args:
            request: a checked one.
            seed: of the first image.
            steering: from `steering`; empty without steering.
            deadline: in seconds of `time.monotonic`.

        Raises:
            RequestError: there are no images; the message is for the client.
        """


class _OutOfTimeError(Exception):
    """Raised inside a pipeline's call after the deadline."""


class PipelineMaker:
    """Makes images with a stock diffusers pipeline, one request at a time.

    Args:
        pipe: the loaded pipeline.
        template: its recipe; the prompt, the number of images, their size and seed come from each request.
        references: folder of reference images, FOLDER/ASSET/*.png, for requests that are steered.
        fixed_size: ignores the sizes that clients ask for; the template's size is used.
    """

    def __init__(
        self, pipe: Any, template: Recipe, references: str | Path | None = None, fixed_size: bool = False
    ) -> None:
        self.pipe = pipe
        self.template = template.without()
        self.references = references
        self.fixed_size = fixed_size
        self._lock = threading.Lock()

    def steering(self, policy: Policy, cited: Sequence[str]) -> dict[str, Any]:
        """Return the fields of a recipe; see `steer`. A pipeline that ignores negative prompts gets none."""
        fields = steer(policy, cited, self.template.model, self.references)
        try:
            check_arguments(type(self.pipe), self.template.replace(negative_prompt="none").arguments())
        except ValueError:
            del fields["negative_prompt"]
        return fields

    def make(self, request: ImageRequest, seed: int, steering: Mapping[str, Any], deadline: float) -> list[Any]:
        """Return the images; see `Maker`."""
        fields: dict[str, Any] = {"prompt": request.prompt, "images": request.images, "seed": seed, **steering}
        if request.width is not None and not self.fixed_size:
            fields |= {"width": request.width, "height": request.height}
        recipe = self.template.replace(**fields)
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise RequestError(503, "busy", "the model is busy: send the request again later", retry_after=WAIT)
        try:

            def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                if time.monotonic() >= deadline:
                    raise _OutOfTimeError
                return tensors

            images = generate(self.pipe, recipe, callback_on_step_end=stop).images
        except _OutOfTimeError:
            raise out_of_time() from None
        finally:
            self._lock.release()
        return [image.convert("RGB") for image in images]


def out_of_time() -> RequestError:
    """Return the error of a request that takes too long."""
    return RequestError(504, "timeout", "the request took longer than the server's time limit: ask for less")


class UpstreamMaker:
    """Asks another server with OpenAI's API for images, such as vLLM-Omni or SGLang.

    Its redirects are not followed. Its images are decoded and written anew, so nothing else than pixels is passed on.

    Args:
        url: of the API, such as http://localhost:8000/v1.
        model: its name of the model; None names none.
        key: of the API; None takes NEGTOME_UPSTREAM_API_KEY of the environment.
        side: longest side of its images in pixels.

    Raises:
        ValueError: it is no http or https address, or it contains a password.
    """

    def __init__(self, url: str, model: str | None = None, key: str | None = None, side: int = 4096) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address such as http://localhost:8000/v1 as --upstream")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(f"expected an --upstream without a password or query: give its key by {UPSTREAM_KEY}")
        self.url = f"{url.rstrip('/')}/images/generations"
        self.model = model
        self.side = side
        self._key = (key if key is not None else os.environ.get(UPSTREAM_KEY, "")).strip()

    def steering(self, policy: Policy, cited: Sequence[str]) -> dict[str, Any]:
        """Raise CannotSteerError: another server takes no reference image to push away from."""
        raise CannotSteerError("images of an upstream server cannot be steered")

    def make(self, request: ImageRequest, seed: int, steering: Mapping[str, Any], deadline: float) -> list[Any]:
        """Return the images; see `Maker`."""
        document: dict[str, Any] = {"prompt": request.prompt, "n": request.images, "response_format": "b64_json"}
        if request.width is not None:
            document["size"] = request.size
        if request.seed is not None:
            document["seed"] = seed
        if self.model is not None:
            document["model"] = self.model
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            answer = post(self.url, document, headers, deadline, UPSTREAM_BYTES * request.images)
        except TooLateError as error:
            raise out_of_time() from error
        except AnswerError as error:
            raise _bad_upstream("its answer is too long, or compressed") from error
        except ConnectionError as error:
            raise _bad_upstream("it does not answer") from error
        if answer.status in (400, 422):
            raise RequestError(400, "upstream_rejected", "the upstream server did not accept the request")
        if answer.status in (429, 503):
            raise RequestError(503, "busy", "the upstream server is busy: try again later", retry_after=WAIT)
        if answer.status != 200:
            raise _bad_upstream(f"it answered with HTTP {answer.status}")
        return self._read(answer.body, request.images)

    def _read(self, body: bytes, count: int) -> list[Any]:
        """Return the images in an answer."""
        try:
            entries = json.loads(body)["data"]
            if len(entries) != count:
                raise _bad_upstream(f"it sent {len(entries)} images for {count}")
            data = [base64.b64decode(entry["b64_json"], validate=True) for entry in entries]
        except (ValueError, TypeError, KeyError, RecursionError, binascii.Error) as error:
            raise _bad_upstream("its answer has no images as b64_json") from error
        return [self._decode(one) for one in data]

    def _decode(self, data: bytes) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # Pillow warns of decompression bombs
                image = Image.open(io.BytesIO(data), formats=FORMATS)
                if max(image.size) > self.side:
                    raise ValueError("too large")
                return image.convert("RGB")
        except Exception as error:  # a hostile file may make the decoder raise anything
            raise _bad_upstream(f"it sent something that is no image of up to {self.side} pixels a side") from error


def _bad_upstream(what: str) -> RequestError:
    return RequestError(502, "upstream_failed", f"the upstream server failed: {what}")
