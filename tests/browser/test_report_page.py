"""The report in a browser: what a click, a key and an address do, on a desk and on a phone.

The pictures of it in docs/images are those of `python -m experiments report` on scored runs of experiment=diversity:

    python tests/browser/test_report_page.py outputs/report/index.html docs/images '#g=diversity/mini-sdxl/3/2/4'
"""

import io
import re
import shutil
import sys
from pathlib import Path

import pytest
from laid_runs import METHODS, PROMPTS, colour, scored_runs
from PIL import Image

from experiments import report


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a page of scored runs, of images that are larger than their copies."""
    folder = tmp_path_factory.mktemp("page")
    scored_runs(folder, size=320)
    rows = [[f"column {n} of many" for n in range(30)], *([f"row {row}", *["1.5"] * 29] for row in range(60))]
    (folder / "results" / "wide.csv").write_text("\n".join(map(",".join, rows)))
    return report.report(folder / "results", folder / "outputs", folder / "report").as_uri()


def opened(page):
    """What stands above the lightbox, once it is open."""
    page.wait_for_selector("dialog[open]")
    return page.locator("#shown").text_content()


def closed(page):
    page.wait_for_selector("dialog:not([open])", state="attached")
    return True


def group(page):
    """The id of the group that is to be seen."""
    (found,) = page.locator(".group:visible").evaluate_all("groups => groups.map(one => one.id)")
    return found


def pixel(page, across):
    """The colour at a share of the width of the picture in the lightbox."""
    box = page.locator(".pair").bounding_box()
    with Image.open(io.BytesIO(page.screenshot())) as taken:
        return taken.convert("RGB").getpixel((int(box["x"] + across * box["width"]), int(box["y"] + box["height"] / 2)))


def near(found, *arguments):
    return max(abs(one - other) for one, other in zip(found, colour("mini-sdxl", *arguments), strict=True)) <= 8


#: Addresses: groups are numbered by category and prompt, runs and images from 1.
BUS, CAT, ODD = "g=diversity/mini-sdxl/1", "g=diversity/mini-sdxl/3", "g=diversity/mini-sdxl/5"


def test_an_image_opens_beside_the_one_without_the_method(open_page, address):
    page = open_page(address)
    page.locator(".best .tile").nth(5).click()
    odd = PROMPTS["odd"][0]
    assert opened(page) == f"{odd}, seed 0, image 2 of 4: NegToMe" and page.url.endswith(f"#{ODD}/2/2")
    page.wait_for_function("document.querySelector('.pair').getBoundingClientRect().width > 100")
    slider = page.get_by_role("slider")
    for value, left in (("100", "none"), ("0", "negtome")):
        slider.fill(value)
        assert near(pixel(page, 0.4), left, "odd", 0, 1)
    slider.fill("50")
    assert near(pixel(page, 0.25), "none", "odd", 0, 1) and near(pixel(page, 0.75), "negtome", "odd", 0, 1)
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.input_value() == "49" and page.url.endswith(f"#{ODD}/2/2"), "on the slider keys are its own"
    box = page.locator(".pair").bounding_box()
    page.mouse.click(box["x"] + 0.2 * box["width"], box["y"] + 20)
    assert slider.input_value() == "20"
    # What is without the method is shown below one with it.
    page.goto(f"{address}#{ODD}/1/3")
    assert opened(page) == f"{odd}, seed 0, image 3 of 4: NegToMe"


def test_keys_go_through_images_groups_and_methods_and_close(open_page, address):
    page = open_page(address)
    page.locator(".best .tile").last.click()
    page.keyboard.press("ArrowDown")
    assert opened(page).endswith("image 4 of 4: NegToMe, released matching")
    page.keyboard.press("ArrowDown")
    assert opened(page).endswith("image 4 of 4: NegToMe"), "the last method is followed by the first"
    page.keyboard.press("ArrowRight")
    assert "seed 1, image 1 of 4" in opened(page), "the last image is followed by the next group's first"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert opened(page).endswith("seed 0, image 4 of 4: NegToMe, released matching")
    assert "0.8" in page.locator("dialog .scores").text_content()
    focused = (
        "document.querySelector('dialog').contains(document.activeElement) || document.activeElement === document.body"
    )
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate(focused), "the focus stays in the lightbox"
    page.keyboard.press("Escape")
    page.wait_for_function("!document.querySelector('dialog').open && !location.hash")
    assert page.evaluate("document.activeElement.className") == "tile" and page.evaluate("scrollY") == 0


def test_an_image_is_shown_at_its_own_size(open_page, address):
    page = open_page(f"{address}#{CAT}/2/1")
    page.wait_for_function("document.querySelector('.pair').getBoundingClientRect().width > 320")
    page.keyboard.press("z")
    button = page.get_by_role("button", name="Native size")
    assert page.locator(".pair").bounding_box()["width"] == 320 and button.get_attribute("aria-pressed") == "true"
    button.click()
    assert page.locator(".pair").bounding_box()["width"] > 320


def test_an_address_opens_what_it_names_and_back_goes_back(open_page, address):
    page = open_page(f"{address}#{CAT}")
    assert group(page) == CAT and page.locator("details.section#diversity").get_attribute("open") is not None
    assert page.locator(f"[id='{CAT}']").evaluate("one => one.getBoundingClientRect().top") < 900
    page.get_by_role("button", name="next →").click()
    second = group(page)
    assert second != CAT and page.url.endswith(f"#{second}")
    page.locator(f"[id='{second}'] .tile").nth(4).click()
    assert "seed 1, image 1 of 4: NegToMe" in opened(page)
    page.go_back()
    assert closed(page) and group(page) == second
    page.go_back()
    page.wait_for_function(f"!document.getElementById('{CAT}').hidden")
    page.go_forward()
    page.go_forward()
    assert "seed 1, image 1 of 4: NegToMe" in opened(page)
    page = open_page(page.url)
    assert "seed 1, image 1 of 4: NegToMe" in opened(page) and group(page) == second, "sent to somebody else"
    page.keyboard.press("Escape")
    assert closed(page)
    assert page.url.endswith(f"#{second}")
    for wrong in ("g=diversity/mini-sdxl/99", "%E0%A4%A", "'\"]"):
        page = open_page(f"{address}#{wrong}")
        assert closed(page) and page.get_by_role("heading", name="negtome: results").is_visible()


def test_groups_are_filtered_and_sorted(open_page, address):
    page = open_page(f"{address}#diversity")
    choice = page.locator("select[name=group]")
    listed = lambda: choice.locator("option").evaluate_all("options => options.map(one => one.value)")  # noqa: E731
    assert len(listed()) == 6
    page.locator("select[name=category]").select_option("cat")
    assert len(listed()) == 2 and group(page) == listed()[0] == CAT
    page.locator("select[name=category]").select_option("")
    page.locator("select[name=order]").select_option(label="largest change of pairwise distance")
    assert listed()[:3] == ["g=diversity/mini-sdxl/4", ODD, BUS] and group(page) == listed()[0]
    page.locator("select[name=order]").select_option(label="largest change of clip score")
    assert listed()[0] == "g=diversity/mini-sdxl/4"
    page.get_by_label("NegToMe, released matching", exact=True).uncheck()
    assert page.locator(".group:visible .strip:visible").count() == len(METHODS) - 1
    # An address that the filter hides is shown all the same.
    page.locator("select[name=category]").select_option("bus")
    page.evaluate(f"location.hash = '{CAT}'")
    page.wait_for_function(f"!document.getElementById('{CAT}').hidden")
    assert group(page) == CAT and len(listed()) == 6


def visible(page, selector):
    return page.locator(f"{selector}:visible").count()


def test_a_query_leaves_the_sections_tables_and_figures_of_that_name(open_page, address):
    page = open_page(address)
    sections, tables = page.locator(".section").count(), page.locator(".scroll.table").count()
    field = page.get_by_role("searchbox")
    field.fill("wide")
    assert visible(page, ".section") == 1 and visible(page, "#wide") == 1 and visible(page, ".contents li") == 1
    assert page.locator("output[name=count]").text_content().startswith("1 section, 1 table")
    field.fill("Main Table")
    assert visible(page, ".scroll.table") == visible(page, ".section") == 1, "what has the name is unfolded"
    assert visible(page, "#diversity .plate") == visible(page, "#diversity .gallery") == 0
    field.fill("forest")
    assert visible(page, ".plate:not(.opening *)") > 0, "a figure is found by the name of its file, too"
    field.fill("no such name")
    assert visible(page, ".section") == visible(page, "main > section:not(.opening)") == 0
    assert "Nothing" in page.locator("output[name=count]").text_content()
    page.evaluate("location.hash = 'wide'")
    page.wait_for_function("!document.getElementById('wide').hidden")
    assert field.input_value() == "", "an address is shown whatever was looked for"
    field.fill("main table")
    field.fill("")
    assert visible(page, ".section") == sections and page.locator(".section[open]").count() == 1
    page.get_by_role("button", name="Unfold all").click()
    assert visible(page, ".scroll.table") == tables


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1920, 1280, 390])
def test_it_is_read_at_every_width(width, dark, open_page, address, check_accessibility):
    page = open_page(address, width=width, dark=dark)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    assert page.locator(".best img").first.bounding_box()["y"] < 300, "a picture is what is seen first"
    check_accessibility(page)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate(fits)
    check_accessibility(page)
    # A wide table scrolls by itself, and what says which row and column a number is of stays.
    table = page.get_by_role("region", name="all rows of wide")
    table.evaluate("box => { box.scrollLeft = 900; box.scrollTop = 300; }")
    assert page.evaluate(fits) and table.evaluate("box => box.scrollLeft") > 0
    box = table.bounding_box()
    for place in ("thead th:first-child", "tbody tr:last-child th"):
        assert table.locator(place).bounding_box()["x"] == pytest.approx(box["x"], abs=2)
    assert table.locator("thead th").last.bounding_box()["y"] == pytest.approx(box["y"], abs=2)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 64) == dark
    page.evaluate(f"location.hash = '{ODD}/2/1'")
    page.wait_for_function("document.querySelector('dialog').open")
    check_accessibility(page)
    assert page.locator("dialog").evaluate("one => one.scrollWidth <= innerWidth && one.scrollHeight <= innerHeight")


def test_without_a_script_everything_is_there_and_on_paper_what_is_unfolded(open_page, address, chromium):
    page = open_page(f"{address}#diversity")
    page.emulate_media(media="print")
    assert page.locator(".group:visible").count() == 6
    assert page.locator(".chooser:visible, .filter:visible").count() == 0
    assert page.locator("#diversity details:not([open]):visible").count() == 0, "what is folded stays out"
    assert page.locator("details.section:visible").count() == 1 and page.locator("main h2:visible").count() == 2
    page.emulate_media(media="screen")
    page.get_by_role("button", name="Unfold all").click()
    page.emulate_media(media="print")
    assert page.locator("details:not(:visible)").count() == 0
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}#{CAT}")
    assert page.locator(".group").count() == page.locator(".group:not([hidden])").count() == 6
    assert page.locator(".chooser[hidden]").count() == 1 and page.locator("dialog[open]").count() == 0
    page.locator("details.section#diversity > summary").click()
    assert page.locator(".group:visible").count() in (0, 6)
    context.close()


def test_in_one_file_it_does_the_same(open_page, tmp_path):
    scored_runs(tmp_path)
    page = report.report(tmp_path / "results", tmp_path / "outputs", tmp_path / "one", single_file=True)
    sent = page.rename(tmp_path / "sent.html")
    page = open_page(f"{sent.as_uri()}#{CAT}/2/1")
    assert "a cat, seed 0, image 1 of 4: NegToMe" in opened(page)
    page.wait_for_function("document.querySelector('.pair img').naturalWidth === 32")
    page.keyboard.press("Escape")
    page.get_by_role("searchbox").fill("no such name")
    assert visible(page, ".section") == 0


def shoot(page: Path, into: Path, image: str) -> None:
    """Take the pictures of a page in docs/images: its top at 1280 pixels, and an image, by its address, at 390."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width, height, address in ((1280, 900, ""), (390, 844, image)):
            tab = browser.new_page(viewport={"width": width, "height": height})
            tab.goto(page.resolve().as_uri() + address, timeout=300_000)
            with Image.open(io.BytesIO(tab.screenshot(timeout=300_000))) as taken:
                taken.save(into / f"report_{width}.webp", quality=70, method=6)
        browser.close()


if __name__ == "__main__":
    shoot(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
