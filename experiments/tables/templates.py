"""Texts of many lines from templates: the report, the page of latency and the cards of models."""

from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from experiments import PROJECT

TEMPLATES = Environment(
    loader=FileSystemLoader(PROJECT),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, **facts: Any) -> str:
    """Return a template, named by its path in the checkout, with its facts."""
    return TEMPLATES.get_template(template).render(facts)
