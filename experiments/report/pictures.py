"""The pictures of a page: beside it, each named after its content, or within it."""

import base64
import hashlib
import io
import logging
from pathlib import Path
from typing import Any

from PIL import Image

from eval.images import load_picture

log = logging.getLogger(__name__)

#: Folder of a page's pictures, beside it.
PICTURES = "pictures"
#: Of a reduced image, in pixels; smaller ones keep their size.
SIDE = 256
#: What a browser calls the kinds of pictures.
TYPES = {"svg": "svg+xml"}


def kept(folder: Path, stem: str = "*") -> list[Path]:
    """Return the pictures kept beside tables, by name; of a sheet the WebP, where an older PNG lies beside it."""
    found = {file.stem: file for kind in ("png", "webp") for file in folder.glob(f"{stem}.{kind}")}
    return [found[name] for name in sorted(found)]


class Pictures(dict[str, bytes]):
    """What lies beside a page, by names that are made of the contents.

    None takes another's place: a page of before stays whole until the new one replaces it, and whoever is killed or
    comes second leaves a whole page.

    Args:
        inline: put the pictures into the page instead, as data URIs; then nothing lies beside it.
    """

    def __init__(self, inline: bool = False) -> None:
        super().__init__()
        self.inline = inline

    def put(self, content: bytes, kind: str) -> str:
        """Take a picture of a kind, such as png; return its address on the page."""
        if self.inline:
            return f"data:image/{TYPES.get(kind, kind)};base64,{base64.b64encode(content).decode()}"
        name = f"{hashlib.sha256(content).hexdigest()[:16]}.{kind}"
        self[name] = content
        return f"{PICTURES}/{name}"

    def plate(self, content: bytes, kind: str, size: tuple[float, float], what: str) -> dict[str, Any]:
        """Take a picture that stands by itself, of so many pixels; return it as the template wants it."""
        width, height = map(round, size)
        return {"file": self.put(content, kind), "alt": what, "width": width, "height": height}

    def copy(self, file: Path, what: str) -> dict[str, Any]:
        return self.plate(file.read_bytes(), file.suffix[1:], load_picture(file).size, what)

    def tile(self, file: Path) -> dict[str, str | None]:
        """Take an image of a group: a reduced copy and, where that is smaller than the image, one of its own size."""
        image = load_picture(file)
        large = max(image.size) > SIDE
        return {"file": self.put(reduced(image), "webp"), "full": self.put(_webp(image), "webp") if large else None}


def reduced(image: Image.Image) -> bytes:
    """Return a copy of an image, of at most `SIDE` pixels a side."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return _webp(small)


def _webp(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="webp", quality=90)
    return file.getvalue()


def is_elsewhere(file: Path, folder: Path) -> bool:
    """Tell whether a file within a folder is a link, or in a linked folder, and so may be anybody's; then log it."""
    linked = file.resolve() != folder.resolve() / file.relative_to(folder)
    if linked:
        log.warning("%s is left out: it is a link, and what it links to may not be meant for others", file)
    return linked
