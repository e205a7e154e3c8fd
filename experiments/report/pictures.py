"""Find the files of a folder of results, and put the images of a page into its folder or into the page."""

import base64
import hashlib
import io
import logging
from pathlib import Path
from typing import Any

from PIL import Image

from eval.images import load_picture

log = logging.getLogger(__name__)

#: Folder of a page's images, beside it.
PICTURES = "pictures"
#: Largest side of a reduced image, in pixels.
SIDE = 256
#: Subtypes of image/ that are not called as the ending of their files.
TYPES = {"svg": "svg+xml"}


def result_files(results: Path, *endings: str) -> dict[str, Path]:
    """Return the files of a folder of results by name: `diversity` for a table or its page, `diversity/grid_mini-flux`.

    Links are left out and logged. All reading of paths in results/ goes through this function.

    Args:
        results: the folder.
        endings: of the files' names, such as csv; of two files with one name, that with the later ending is taken.
    """
    files = {}
    for ending in endings:
        for file in [*results.glob(f"*.{ending}"), *results.glob(f"*/*.{ending}")]:
            name = file.relative_to(results).with_suffix("").as_posix().removesuffix("/table")
            files[name] = file
    return {name: files[name] for name in sorted(files) if not is_link(files[name], results)}


def is_link(file: Path, folder: Path) -> bool:
    """Tell whether a file in a folder is a link or in a linked folder, which may be private, and log it."""
    linked = file.resolve() != folder.resolve() / file.relative_to(folder)
    if linked:
        log.warning("%s is left out: it is a link, and what it links to may not be meant for others", file)
    return linked


class Pictures(dict[str, bytes]):
    """The images of a page by the names of their files, which are made of their contents.

    No file replaces another: if the process is killed, or two write at once, the page that is there stays complete.

    Args:
        inline: put the images into the page as data URIs; then no files lie beside it.
    """

    def __init__(self, inline: bool = False) -> None:
        super().__init__()
        self.inline = inline

    def put(self, content: bytes, ending: str) -> str:
        """Add an image and return its address on the page."""
        if self.inline:
            return f"data:image/{TYPES.get(ending, ending)};base64,{base64.b64encode(content).decode()}"
        name = f"{hashlib.sha256(content).hexdigest()[:16]}.{ending}"
        self[name] = content
        return f"{PICTURES}/{name}"

    def figure(self, content: bytes, ending: str, size: Any, alt: str, name: str = "") -> dict[str, Any]:
        """Add a figure of a size in pixels and return its facts for the template."""
        width, height = map(round, size)
        return {"file": self.put(content, ending), "alt": alt, "width": width, "height": height, "name": name}

    def copy(self, file: Path, alt: str) -> dict[str, Any]:
        """Add a file as a figure."""
        return self.figure(file.read_bytes(), file.suffix[1:], load_picture(file).size, alt)

    def tile(self, file: Path) -> dict[str, str | None]:
        """Add an image of a group: a reduced copy, and a full one if the image is larger than that."""
        image = load_picture(file)
        is_large = max(image.size) > SIDE
        return {"file": self.put(reduced(image), "webp"), "full": self.put(_webp(image), "webp") if is_large else None}


def reduced(image: Image.Image) -> bytes:
    """Return a WebP copy of an image with at most `SIDE` pixels a side."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return _webp(small)


def _webp(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="webp", quality=90)
    return file.getvalue()
