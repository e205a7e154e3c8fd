"""The site has the repository's own folders, so that a link that works on GitHub works in it.

Pages of docs/ link to tables, figures and model cards outside it. So every file is known by its path in the repository.
Files that pages link to are added, directly or through other pages. Pages of docs/ come out without that folder.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: Relative targets of Markdown's links and images, without fragments.
LINK = re.compile(r"\]\((?![a-z]+:|[#/])([^)\s#]+)")
#: Blocks of code, in which a link is a text.
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Name the files of docs/ by their paths in the repository, and add those that they link to."""
    docs_files = [file for file in files if file.src_dir == config.docs_dir]
    for file in docs_files:
        files.remove(file)
    inclusions = {f"docs/{file.src_uri}": file.inclusion for file in docs_files}
    queue = [path for path, inclusion in inclusions.items() if inclusion.is_included()]
    queue += [page for page in pages(config.nav) if page not in inclusions]
    while queue:
        path = queue.pop()
        inclusions.setdefault(path, File.inclusion)
        if path.endswith(".md"):
            queue += [linked for linked in links(path) if linked not in inclusions]
    for path, inclusion in sorted(inclusions.items()):
        page = File(path, str(ROOT), config.site_dir, config.use_directory_urls, inclusion=inclusion)
        page.dest_uri = page.dest_uri.removeprefix("docs/")
        if path == "README.md":
            page.dest_uri = "README.html"  # the index is docs/index.md
        files.append(page)
    return files


def links(path: str) -> list[str]:
    """Return the files of the repository that one of its pages links to."""
    text = CODE.sub("", (ROOT / path).read_text(encoding="utf-8"))
    targets = {posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in LINK.findall(text)}
    return sorted(target for target in targets if (ROOT / target).is_file())


def pages(nav: object) -> list[str]:
    """Return the paths in a navigation."""
    if isinstance(nav, dict | list):
        return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]
    return [str(nav)]
