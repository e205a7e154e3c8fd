"""Lint the prose that users read: no long sentences, and none of the words that readers stumbled over."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Markdown pages, and Python files, whose module's docstring is checked: often the help text of a command.
PATTERNS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "results/README.md"]
PATTERNS += [f"{package}/**/*.py" for package in ("negtome", "eval", "experiments", "training")]
PAGES = sorted(path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern))
LONGEST_SENTENCE = 35  # words
BANNED = {
    r"knobs?": "hyperparameter",
    r"noises": "initial latents, seeds",
    r"who(so)?ever": "somebody who, if you",
    r"that are none": "say what they are",
    r"(is|are) nothing (for|to)": "has no effect on",
    r"may be nothing": "is not significant",
    r"the run without": "the baseline",
    r"beside (other|another|none|the|a)": "compared with, alongside",
    r"resemblances?": "similarity",
}
NOT_PROSE = re.compile(r"\s*(\||#|!\[|<|:::)| {4}")  # tables, headings, images, HTML, directives, indented code


def blocks(text):
    """Return the paragraphs and list items of a Markdown text, one a line, without code and addresses of links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"^> ?", "", line) for line in text.splitlines()]
    prose = "\n".join("" if NOT_PROSE.match(line) else re.sub(r"^(- |\d+\. )", "\n", line) for line in lines)
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    return [re.sub(r"`[^`]*`", "CODE", " ".join(block.split())) for block in re.split(r"\n\s*\n", prose)]


def find_faults(text):
    """Return the sentences of a text that are too long, and the banned phrases in it with what to write instead."""
    sentences = [sentence for block in blocks(text) for sentence in re.split(r"(?<=[.!?])\s+", block)]
    too_long = [sentence for sentence in sentences if len(sentence.split()) > LONGEST_SENTENCE]
    banned = [phrase for phrase in BANNED if re.search(rf"\b{phrase}\b", "\n".join(sentences), re.IGNORECASE)]
    return too_long + [f"{phrase}: write {BANNED[phrase]}" for phrase in banned]


@pytest.mark.parametrize("page", PAGES)
def test_prose_is_plain(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert find_faults(ast.get_docstring(ast.parse(text)) or "" if page.endswith(".py") else text) == []


def test_long_sentences_and_banned_words_are_found_but_not_in_code_and_tables():
    sentence = "word " * LONGEST_SENTENCE + "end."
    assert len(find_faults(f"It is fine.\n\n> {sentence}\n\n- Turn the knob, whoever you are.\n- {sentence}")) == 4
    assert find_faults(f"# {sentence}\n\n| {sentence} |\n\n```\n{sentence}\n```\n\nUse `knob`. {sentence[5:]}") == []
