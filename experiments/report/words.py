"""Pages of results/ that are Markdown, as blocks for a template: what this project writes of it, and nothing more."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from eval.files import read_regular


def read_page(path: Path) -> list[tuple[str, Any]]:
    """Read a page without its title, as (kind, content): heading, text, list and table.

    Raises:
        ValueError: it is no text; the message names it.
    """
    try:
        text = read_regular(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a page of text in {path}, got a damaged file ({error}): make it again") from None
    found = list(blocks(text))
    return found[1:] if found and text.lstrip().startswith("# ") else found


def blocks(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the headings, texts, lists and tables of a page, everything escaped."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = paragraph.splitlines()
        if lines and lines[0].startswith("#"):
            yield "heading", inline(lines[0].lstrip("# "))
            lines = lines[1:]
        if lines and all(line.startswith("|") for line in lines):
            yield "table", _table(lines)
        elif lines and lines[0].startswith("- "):
            joined = "\n".join(lines)
            yield "list", [inline(entry) for entry in re.split(r"^- ", joined, flags=re.MULTILINE)[1:]]
        elif lines:
            yield "text", inline(" ".join(lines))


def inline(text: str) -> Markup:
    """Return a text with its code and its bold words marked; of links, which lead out of the page, the words stay."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(text.split()))
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked))


def _table(lines: list[str]) -> pd.DataFrame:
    """Return a table of pipes, whose second line is a rule."""
    cells = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in lines]
    head, _, *rows = ([cell.strip().replace(r"\|", "|") for cell in row] for row in cells)
    return pd.DataFrame(rows, columns=pd.Index(head))


def cell_lines(cell: Any) -> list[str]:
    """Return `value; difference [interval]`, `value [interval]` and `words (margin)` as two lines, all else as one."""
    parts = re.fullmatch(r"([^;]+); (.+)|(-?[\d.]+) (\[.+\])|([a-z ]+) (\(margin .+\))", str(cell))
    return [part for part in parts.groups() if part] if parts else [str(cell)]
