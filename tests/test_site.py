"""The site of docs/ and the docstrings: built without a warning, whole, and asking no other server for anything."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import negtome
import negtome.guard
from experiments.__main__ import COMMANDS

pytest.importorskip("mkdocs")
ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"


class Asked(HTMLParser):
    """What a browser fetches for a page, by itself or where a link is followed."""

    def __init__(self, page):
        super().__init__()
        self.fetched, self.linked = [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "a":
            self.linked += filter(None, [values.get("href")])
        elif tag != "link" or values.get("rel") not in ("canonical", "prev", "next"):
            self.fetched += filter(None, [values.get("href"), values.get("src")])


def documented(page):
    return re.findall(r"^::: ([\w.]+)$", (REFERENCE / page).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("module", [negtome, negtome.guard])
def test_the_reference_has_every_public_name(module):
    page = f"{module.__name__.rpartition('.')[2]}.md"
    objects = {name for name in module.__all__ if callable(getattr(module, name))}  # constants have no docstring
    assert sorted(documented(page)) == sorted(f"{module.__name__}.{name}" for name in objects)


def test_the_reference_has_every_command():
    assert documented("commands.md") == [*COMMANDS.values(), "negtome.guard.__main__"]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_is_all_there(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page: Asked(page) for page in tmp_path.rglob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= {page.stem for page in pages}
    assert not (tmp_path / "hooks.py").exists()
    for page, asked in pages.items():
        elsewhere = [url for url in asked.fetched if re.match(r"[a-z]+:|//", url) and not url.startswith("data:")]
        assert elsewhere == [], page
        ways = {url.partition("#")[0].partition("?")[0] for url in asked.fetched + asked.linked}
        near = [url for url in ways if url and not re.match(r"[a-z]+:|/", url)]
        assert [url for url in near if not (page.parent / url).exists()] == [], page
    sheets = "".join(sheet.read_text(encoding="utf-8") for sheet in tmp_path.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(https?:[^)]*)", sheets) == []
    table = tmp_path / "results" / "diversity" / "table.csv"
    assert table.read_bytes() == (ROOT / "results" / "diversity" / "table.csv").read_bytes()
    found = {entry["title"] for entry in json.loads((tmp_path / "search" / "search_index.json").read_text())["docs"]}
    assert any("negative_merge" in title for title in found) and "The first ten minutes" in found
