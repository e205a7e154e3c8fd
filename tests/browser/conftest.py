"""Pages in a real Chromium: make test-browser. Without one, every test is skipped with a line that says why."""

import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NEEDED = "make test-browser needs {}: apt install chromium; pip install -e '.[browser]'"
#: Rules of axe that pages must follow: WCAG 2.1, levels A and AA.
RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "browser":
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium():
    """The browser of all tests."""
    api = pytest.importorskip("playwright.sync_api", reason=NEEDED.format("playwright"))
    if not (executable := next(filter(None, map(shutil.which, NAMES)), None)):
        pytest.skip(NEEDED.format("a Chromium"))
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Open an address: `open_page(url, width=1280, dark=False)`; a request to anywhere else fails the test."""
    opened, elsewhere, errors = [], [], []

    def open_at(url, width=1280, height=900, dark=False):
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            accept_downloads=True,
        )
        page = context.new_page()
        local = ("http://127.0.0.1:", "ws://127.0.0.1:", "file://", "data:", "blob:", "about:")
        page.on("request", lambda request: request.url.startswith(local) or elsewhere.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        opened.append(context)
        page.goto(url)
        return page

    yield open_at
    for context in opened:
        context.close()
    assert elsewhere == [], "a page asks for nothing that is not on this machine"
    assert errors == [], "a script of the page failed"


@pytest.fixture(scope="session")
def check_accessibility(chromium):
    """Fail if axe finds a violation in a page: `check_accessibility(page)`; first, that it finds one in a bad page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=NEEDED.format("axe-playwright-python"))

    def check(page):
        violations = axe.Axe().run(page, options=RULES).response["violations"]
        lines = [f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}" for one in violations]
        if lines:
            raise AssertionError("\n".join(lines))

    page = chromium.new_page()
    page.set_content("<html><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>")
    with pytest.raises(AssertionError, match="image-alt"):
        check(page)
    page.close()
    return check
