"""Image checks of `negtome serve` and `negtome generate --policy`: their options, and looking at one image."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from negtome.guard.__main__ import check_options, load_object
from negtome.guard.chat import Endpoint
from negtome.guard.image_check import ChatImageCheck, ImageCheck, ShieldGemma2Check, is_remote_check
from negtome.guard.policy import Policy
from negtome.guard.verdict import guard_errors

#: Environment variable with the key of the chat check's server, which gets no other server's key.
KEY = "NEGTOME_CHECK_API_KEY"
#: Options of the built-in checks: name, placeholder, type and help.
OPTIONS: tuple[tuple[str, str, type, str], ...] = (
    ("base-url", "U", str, f"chat: address of the server, such as http://host:8000/v1; its key is in {KEY}"),
    ("model", "M", str, "chat: the server's name of a model that reads images"),
    ("max-tokens", "N", int, "chat: longest reply, reasoning included (1024)"),
    ("timeout", "S", float, "chat: seconds for an image (60)"),
    ("folder", "F", str, "shieldgemma2: folder of the model"),
    ("threshold", "X", float, "shieldgemma2: probability above which an image shows a concept (0.5)"),
)
#: Size in pixels of the grey image that every check sees first; models have a smallest size.
FIRST_SIZE = (224, 224)


def _chat(policy: Policy, **options: Any) -> ChatImageCheck:
    return ChatImageCheck(policy, Endpoint(**options, keys=(KEY,)))


#: What makes each built-in check, the options that it needs, and those that it takes.
BUILT_IN: Mapping[str, tuple[Callable[..., ChatImageCheck | ShieldGemma2Check], set[str], set[str]]] = {
    "chat": (_chat, {"base_url", "model"}, {"max_tokens", "timeout"}),
    "shieldgemma2": (ShieldGemma2Check, {"folder"}, {"threshold"}),
}


def add_check_options(part: argparse._ActionsContainer) -> None:
    """Add --check, which may be repeated, and the options of the built-in checks."""
    part.add_argument(
        "--check", metavar="C", action="append", default=[],
        help="check every image before it is returned: chat, shieldgemma2 or MODULE:ATTRIBUTE; may be repeated",
    )  # fmt: skip
    for name, metavar, kind, text in OPTIONS:
        part.add_argument(f"--check-{name}", metavar=metavar, type=kind, help=text)


def find_checks(arguments: argparse.Namespace, policy: Policy) -> dict[str, ImageCheck]:
    """Return the image checks that the arguments name, by their ids for the record.

    Args:
        arguments: see `add_check_options`.
        policy: the built-in checks look for its concepts.

    Raises:
        ValueError, OSError, ImportError: there is no such check, or its options are missing, unknown or wrong.
        GuardError: the code of a check fails.
    """
    names = list(dict.fromkeys(arguments.check))
    values = {
        name.replace("-", "_"): getattr(arguments, f"check_{name.replace('-', '_')}", None) for name, *_ in OPTIONS
    }
    options = {name: value for name, value in values.items() if value is not None}
    built_in = [BUILT_IN[name] for name in names if name in BUILT_IN]
    needed = {option for _, of_check, _ in built_in for option in of_check}
    optional = {option for _, _, of_check in built_in for option in of_check}
    choice = " ".join(f"--check {name}" for name in names)
    check_options(options, needed, optional, "check-", f"with {choice}" if names else "without --check chat")
    checks: dict[str, ImageCheck] = {}
    for name in names:
        if name not in BUILT_IN:
            checks[name] = load_object(name, "an image check", ("detect",))
            continue
        build, of_check, more = BUILT_IN[name]
        check = build(policy, **{option: options[option] for option in of_check | more if option in options})
        checks[check.id] = check
    return checks


def try_checks(checks: Mapping[str, ImageCheck]) -> None:
    """Let each check look at a grey image, before a pipeline is loaded: is it there, and can it read images?

    Raises:
        ValueError, ImportError: it cannot; the message names the check.
    """
    for name, check in checks.items():
        try:
            asset = look(check, Image.new("RGB", FIRST_SIZE, (128, 128, 128)))
        except ImportError:
            raise
        except Exception as error:
            raise ValueError(f"the image check {name} cannot look at a grey image: {error}") from error
        if asset is not None:
            print(f"note: the image check {name} sees {asset} in a grey image: test it on images of yours")


def look(check: ImageCheck, image: Any, deadline: float | None = None) -> str | None:
    """Return the protected concept that a check sees in a PIL image in RGB, or None.

    Args:
        check: a remote one has until the deadline.
        image: is passed on as numbers [1, H, W, 3] in [0, 1].
        deadline: in seconds of `time.monotonic`; None: the check's own.

    Raises:
        ValueError, OSError, ImportError, GuardError: the check fails. Return no image.
    """
    import torch

    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    images = (pixels.reshape(1, image.height, image.width, 3).float() / 255).numpy()
    with guard_errors(type(check).__name__, "image check"):
        if deadline is not None and is_remote_check(check):
            asset, _ = check.detect_before(images, deadline)
        else:
            asset, _ = check.detect(images)
    return asset
