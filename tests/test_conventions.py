"""What stands in several files of the project's face stands in all of them alike: versions, pins, licences."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import negtome
from training.sources import NAMES, SETS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    return yaml.safe_load(text) if path.endswith(("yml", "yaml", "cff")) else text


@pytest.mark.parametrize("source", [*SETS.values(), NAMES], ids=lambda source: source.package)
def test_every_source_of_artwork_is_credited_by_the_terms_of_its_licence(source):
    notices = read("THIRD_PARTY_NOTICES.md")
    (row,) = [line for line in notices.splitlines() if line.startswith(f"| `{source.package}` |")]
    _, _, version, work, copyright_line, licence, _ = (cell.strip() for cell in row.split("|"))
    assert version == source.version and f"[{source.licence}]" in licence
    name, place = re.fullmatch(r"([\w-]+).* \((?:github\.com/)?([\w./-]+)\)", source.credit).groups()
    assert place in work and (name.lower() in work.lower() or source is NAMES)
    title = {"Apache-2.0": "Apache License 2.0", "MIT": "MIT License"}.get(source.licence)
    if title:  # whose text has to go with the work, under the copyright line
        text = notices.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        assert copyright_line in text
        assert {"MIT": "The above copyright notice and this", "Apache-2.0": "4. Redistribution."}[
            source.licence
        ] in text
    else:
        assert source.licence == "CC-BY-4.0"
        assert "https://creativecommons.org/licenses/by/4.0/legalcode" in notices and "Changes: " in notices


def test_one_version_is_said_everywhere():
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == negtome.__version__ and f"\n## [{negtome.__version__}]" in read("CHANGELOG.md")


def test_continuous_integration_runs_every_python_that_is_promised():
    tested = read(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    promised = SpecifierSet(PROJECT["requires-python"])
    assert tested == [f"3.{minor}" for minor in range(30) if f"3.{minor}" in promised]
    said = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if ":: Python :: 3." in name]
    assert said == tested


def test_a_commit_is_checked_by_the_ruff_that_is_pinned():
    (need,) = [need for need in PROJECT["optional-dependencies"]["dev"] if need.startswith("ruff")]
    hooks = {Path(repo["repo"]).name: repo.get("rev") for repo in read(".pre-commit-config.yaml")["repos"]}
    assert hooks["ruff-pre-commit"] == need.replace("ruff==", "v")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", read(page))
    assert links and [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_make_knows_every_target_that_is_named(page):
    targets = set(re.findall(r"^([\w%-]+):", read("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)(?![\w=])", read(page), re.MULTILINE))
    assert named and {name for name in named if not name.startswith("reproduce-")} <= targets
