"""What makes the images behind the server: a pipeline of this process, or another server."""

import base64
import binascii
import io
import json
import os
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from PIL import Image

from negtome.generate import generate
from negtome.guard.policy import Clause, Policy
from negtome.guard.transport import AnswerError, TooLateError, post
from negtome.recipe import ModelDefaults, Recipe
from negtome.serve.request import ImageRequest, RequestError

#: Environment variable with the upstream's key.
UPSTREAM_KEY = "NEGTOME_UPSTREAM_API_KEY"
#: Bytes of an upstream's answer for each of its images.
UPSTREAM_BYTES = 1 << 25
#: Formats of images that are read from an upstream.
FORMATS = ("PNG", "JPEG", "WEBP")
#: Endings of reference images.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
#: Seconds that a busy server asks clients to wait.
WAIT = 5


class Maker(Protocol):
    """Makes images.

    Attributes:
        steers: whether it can push images away from a reference image.
    """

    steers: bool

    def steering(self, policy: Policy, asset: str) -> dict[str, Any] | None:
        """Return what steers images away from an asset, for `make`; None if it cannot."""

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


def find_references(folder: str | Path | None, asset: str) -> list[Path]:
    """Return the reference images of an asset, FOLDER/ASSET/*.png (or jpg, webp), by name."""
    if folder is None:
        return []
    subfolder = Path(folder) / asset
    files = subfolder.iterdir() if subfolder.is_dir() else []
    return sorted(file for file in files if file.suffix.lower() in ENDINGS and not file.name.startswith("."))


def steer(policy: Policy, asset: str, model: str, folder: str | Path | None) -> dict[str, Any] | None:
    """Return the fields of a recipe that steer images of a model away from an asset.

    NegToMe pushes away from the asset's first reference image by name, at the model's own settings; the asset's names
    are the negative prompt.

    Returns:
        None if there is no reference image.
    """
    files = find_references(folder, asset)
    if not files:
        return None
    names = [name for clause in policy.clauses if clause.asset == asset for name in (asset, *clause.names)]
    negative = ", ".join(dict.fromkeys(names))
    return {"reference": str(files[0]), "config": ModelDefaults.of(model).reference, "negative_prompt": negative}


def unsteerable(policy: Policy, folder: str | Path | None) -> list[str]:
    """Return the assets of clauses that steer without any reference image."""
    assets = [part.asset for part in policy.parts if isinstance(part, Clause) and part.action == "steer"]
    return [asset for asset in dict.fromkeys(assets) if not find_references(folder, asset)]


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

    steers = True

    def __init__(
        self, pipe: Any, template: Recipe, references: str | Path | None = None, fixed_size: bool = False
    ) -> None:
        self.pipe = pipe
        self.template = template.without()
        self.references = references
        self.fixed_size = fixed_size
        self._lock = threading.Lock()

    def steering(self, policy: Policy, asset: str) -> dict[str, Any] | None:
        """Return the fields of a recipe from `steer`."""
        return steer(policy, asset, self.template.model, self.references)

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

    steers = False

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

    def steering(self, policy: Policy, asset: str) -> dict[str, Any] | None:
        """Return None: another server takes no reference image to push away from."""
        return None

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
