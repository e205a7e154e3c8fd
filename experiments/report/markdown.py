"""Markdown pages of results/ as HTML: no tag and no link of a page reaches the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

from eval.files import read_regular


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
    return Markup(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {"name": name}))


def _heading(_: Any, tokens: Sequence[Token], index: int, *rest: Any) -> str:
    """Lower a heading by two levels: h3 is the heading of a section of the report."""
    slash = "/" if tokens[index].nesting < 0 else ""
    return f"<{slash}h{min(int(tokens[index].tag[1]) + 2, 6)}>"


def _table(_: Any, tokens: Sequence[Token], index: int, options: Any, env: dict[str, str]) -> str:
    number = sum(token.type == "table_open" for token in tokens[: index + 1])
    label = f"{escape(env['name'])}, table {number}"
    return f'<div class="scroll table" role="region" tabindex="0" aria-label="{label}"><table>'


def _markdown() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    rules = {
        "heading_open": _heading,
        "heading_close": _heading,
        "table_open": _table,
        "table_close": lambda *_: "</table></div>",
        "td_open": lambda *_: "<td>",
        "th_open": lambda *_: '<th scope="col">',
        "link_open": lambda *_: "",
        "link_close": lambda *_: "",
        "image": lambda _, tokens, index, *rest: str(escape(tokens[index].content)),
    }
    for name, rule in rules.items():
        markdown.add_render_rule(name, rule)
    return markdown


_MARKDOWN = _markdown()
