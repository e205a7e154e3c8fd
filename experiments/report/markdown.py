"""Markdown pages of results/ as HTML: no tag and no link of a page reaches the report."""

import itertools
import re
from pathlib import Path

from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from eval.files import read_regular

_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")


def read_page(path: Path) -> Markup:
    """Return a page without its title; "" for a page that has only a title.

    Raises:
        ValueError: the file is not text; the message names it.
    """
    try:
        text = read_regular(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a page of text in {path}, got a damaged file ({error}): make it again") from None
    return render_page(text, path.stem)


def render_page(text: str, name: str) -> Markup:
    """Return Markdown as HTML without its title; `name` labels the tables."""
    tokens = _MARKDOWN.parse(text)
    if tokens and tokens[0].tag == "h1":
        tokens = tokens[3:]
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):  # h3 is the heading of a section of the report
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
        elif token.type in ("th_open", "td_open"):
            token.attrs = {"scope": "col"} if token.tag == "th" else {}
        for child in token.children or ():
            child.hidden = child.type in ("link_open", "link_close")
            child.type = "text" if child.type == "image" else child.type
    html, numbers = _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}), itertools.count(1)

    def scrolling(_: re.Match[str]) -> str:
        label = f"{escape(name)}, table {next(numbers)}"
        return f'<div class="scroll table" role="region" tabindex="0" aria-label="{label}"><table>'

    return Markup(re.sub("<table>", scrolling, html).replace("</table>", "</table></div>"))
