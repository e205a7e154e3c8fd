"""The demo's page in a real browser: what a visitor does with it, and that it asks for nothing from anywhere."""

import re
from urllib.parse import parse_qsl

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("gradio", reason="make test-browser needs gradio: pip install -e '.[browser]'")

from experiments.demo import request
from experiments.demo.page import Page, launch
from experiments.demo.request import MODES, save_picture
from experiments.demo.session import Session

#: Milliseconds that anything may take, on a machine that is busy.
PATIENCE = 120_000


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Serve one page with mini-sdxl; its files lie in temporary folders."""
    with pytest.MonkeyPatch.context() as patch:
        uploads = tmp_path_factory.mktemp("gradio")
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        patch.setattr(request, "PICTURES", tmp_path_factory.mktemp("pictures"))
        page = Page("mini-sdxl", Session(preview_share=1))
        yield launch(page)
        page.blocks.close()
        assert not [path for path in uploads.rglob("*") if path.is_file()], "uploads are deleted with the page"


@pytest.fixture
def visit(open_page, address):
    """Open the page, ready to be used: `visit(query, width=1280, dark=False)`."""

    def opened(query="?steps=3&images=2", **options):
        page = open_page(address + query, **options)
        page.set_default_timeout(PATIENCE)
        fields = dict(parse_qsl(query.removeprefix("?")))
        description = MODES[fields.get("mode", "diversity")].description
        page.locator("#nt-description").get_by_text(description).wait_for()
        page.wait_for_function(
            "n => document.querySelector('#nt-steps input')?.value === n", arg=fields.get("steps", "20")
        )
        return page

    return opened


@pytest.fixture
def picture(tmp_path):
    """A file to upload: a red square with a blue ball."""
    image = Image.new("RGB", (128, 128), "red")
    ImageDraw.Draw(image).ellipse((30, 30, 100, 100), fill="blue")
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def generate(page):
    page.locator("#nt-go").click()
    page.locator(".nt-done").wait_for()
    page.locator("#nt-results").get_by_text("Export").wait_for()  # the last of the results


def choose(page, mode):
    page.locator("#nt-mode").get_by_text(mode, exact=True).click()


def upload(page, picture):
    page.locator("#nt-picture canvas").first.wait_for()
    page.wait_for_timeout(1000)  # the editor takes no file before it is ready, and does not say when it is
    page.locator("#nt-picture input[type=file]").first.set_input_files(picture)
    page.locator(".nt-mask").wait_for()


def overflow(page):
    """Return by how many pixels the page is wider than its window, and the elements that stick out."""
    return page.evaluate(
        "() => [document.documentElement.scrollWidth - innerWidth, ...[...document.querySelectorAll('body *')]"
        ".filter((one) => one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.nt-scroll, pre'))"
        ".map((one) => one.outerHTML.slice(0, 120)).slice(0, 4)]"
    )


def test_an_untouched_page_generates(visit):
    page = visit("")
    page.wait_for_function("() => location.search.includes('alpha=')")  # the last event when a page is opened
    buttons = [page.locator(name).inner_text() for name in ("#nt-go", "#nt-stop")]
    assert buttons == ["Generate", "Stop"] and page.locator("#nt-progress").inner_text()
    generate(page)
    assert page.locator(".nt-pair").count() == 8 and "negtome" in page.title()
    assert [page.locator(name).inner_text() for name in ("#nt-go", "#nt-stop")] == buttons


def test_results_are_aligned_compared_with_a_slider_and_exported(visit):
    page = visit()
    generate(page)
    pairs, slider = page.locator(".nt-pair"), page.locator(".nt-slider")
    boxes = [pairs.nth(number).bounding_box() for number in range(pairs.count())]
    assert len(boxes) == 4 and [boxes[0]["x"], boxes[1]["x"]] == [boxes[2]["x"], boxes[3]["x"]], "one seed a column"
    assert page.locator("#nt-results tbody tr").count() == 2 and page.locator(".nt-bars span").count() == 3
    page.get_by_text("Command line").click()
    assert "negtome generate" in page.locator("pre:visible").inner_text()
    grid = page.locator("a[download='negtome-grid.png']")
    assert grid.get_attribute("href").startswith("data:image/png;base64,")
    assert slider.is_hidden()
    pairs.nth(3).click()
    assert slider.is_visible() and "image 2" in page.locator(".nt-which").inner_text()
    baseline = page.locator(".nt-pair img").nth(1).get_attribute("src")
    assert page.locator(".nt-before").get_attribute("src") == baseline
    for value in ("0", "100"):
        page.locator(".nt-slider input").fill(value)
        assert page.locator(".nt-frame").evaluate("one => one.style.getPropertyValue('--cut')") == f"{value}%"
    with page.expect_download() as download:
        page.locator(".nt-save").click()
    with Image.open(download.value.path()) as image:
        assert "a photo of a dog" in image.text["negtome"]


def test_an_image_is_uploaded_and_its_mask_painted_with_the_mouse(visit, picture):
    page = visit()
    choose(page, "Away from an image")
    assert page.locator("#nt-blur").is_hidden() and page.locator("#nt-methods").is_hidden()
    upload(page, picture)
    page.wait_for_function("() => location.search.includes('picture=')")
    caption = page.locator(".nt-mask figcaption")
    assert "256 of 256" in caption.inner_text(), "all of it, while nothing is painted"
    canvas = page.locator("#nt-picture canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    left, middle = box["x"] + box["width"] / 2 - 60, box["y"] + box["height"] / 2
    page.mouse.move(left, middle)
    page.mouse.down()
    for step in range(13):
        page.mouse.move(left + 10 * step, middle)
    page.mouse.up()
    page.wait_for_function("() => !document.querySelector('.nt-mask figcaption').textContent.includes('256 of 256')")
    assert 0 < int(re.search(r"(\d+) of 256", caption.inner_text())[1]) < 256
    generate(page)
    assert page.locator(".nt-pair").count() == 4
    assert "similarity" in page.locator("#nt-results thead").inner_text()
    page.get_by_text("Python", exact=True).click()
    assert "mask=" in page.locator("pre:visible").inner_text()


def test_a_reload_keeps_the_settings_and_the_run_and_stop_ends_it(visit):
    page = visit("")
    page.locator("#nt-prompt textarea").fill("a photo of a cat")
    page.locator("#nt-seed input").fill("7")
    page.get_by_label("Keep this seed").uncheck()
    page.wait_for_function("() => ['cat', 'seed=7', 'lock=0'].every((one) => location.search.includes(one))")
    page.reload()
    page.wait_for_function("() => document.querySelector('#nt-seed input')?.value === '7'")
    assert page.locator("#nt-prompt textarea").input_value() == "a photo of a cat"
    assert not page.get_by_label("Keep this seed").is_checked() and page.locator("#nt-stop").is_disabled()
    page.get_by_label("Keep this seed").check()
    page.locator("#nt-steps input").fill("200")
    page.locator("#nt-go").click()
    page.wait_for_function("() => location.search.includes('job=')")
    page.reload()
    page.get_by_text(re.compile(r"step \d+ of 200")).wait_for()
    assert page.locator("#nt-go").is_disabled(), "nobody clicked again"
    page.locator(".nt-preview img").first.wait_for()
    page.locator("#nt-stop").click()
    page.locator(".nt-stopped").wait_for()
    assert page.locator(".nt-preview img").count() == 4, "the last preview stays"
    assert re.search(r"Stopped after step \d+ of 200", page.locator(".nt-text").inner_text())
    assert page.locator("#nt-go").is_enabled() and page.locator(".nt-pair").count() == 0
    page.reload()
    page.locator(".nt-stopped").wait_for()


def test_an_empty_prompt_is_a_toast_and_a_drawn_seed_is_kept(visit):
    page = visit()
    prompt, seed = page.locator("#nt-prompt textarea"), page.locator("#nt-seed input")
    prompt.fill(" ")
    page.locator("#nt-go").click()
    page.get_by_text("The prompt is empty: write what the images should show").wait_for()
    assert page.locator("#nt-go").is_enabled()
    prompt.fill("a photo of a dog")
    page.locator("#nt-dice").click()
    page.wait_for_function("() => document.querySelector('#nt-seed input').value !== '0'")
    drawn = seed.input_value()
    generate(page)
    assert seed.input_value() == drawn


def test_methods_are_compared_and_missing_weights_are_named(visit):
    page = visit("?mode=compare&steps=3&images=2&methods=negtome,lower_guidance&model=sdxl")
    page.get_by_text("Its weights are not on this machine").wait_for()
    assert page.locator("#nt-strength").is_hidden()
    generate(page)
    assert page.locator("#nt-right h2").all_inner_texts()[:3] == ["Baseline", "NegToMe", "lower guidance"]
    assert "These images are by mini-sdxl" in page.locator(".nt-note").inner_text()


def test_a_link_restores_the_page(visit, picture, address):
    page = visit()
    choose(page, "Towards an image")
    upload(page, picture)
    page.locator("#nt-prompt textarea").fill("a photo of a cat & a dög")
    generate(page)
    link = page.locator("#nt-results a[href*='?']").get_attribute("href")
    before = page.locator(".nt-pair img").nth(3).get_attribute("src")
    again = visit(link.removeprefix(address))
    assert again.locator("#nt-prompt textarea").input_value() == "a photo of a cat & a dög"
    again.locator(".nt-mask").wait_for()
    generate(again)
    assert again.locator(".nt-pair img").nth(3).get_attribute("src") == before, "the very same image"


def test_a_link_with_invalid_values_opens_the_page(visit):
    name, mask = save_picture(Image.new("RGB", (96, 64), "red")), save_picture(Image.new("L", (64, 96), "white"))
    page = visit(f"?mode=away&steps=3&images=2&picture={name}&mask={mask}&methods=nothing&model={'a' * 400}")
    page.get_by_text("A link may not name a folder as model: mini-sdxl is chosen instead.").wait_for()
    page.locator(".nt-mask").wait_for()
    generate(page)
    assert page.locator(".nt-pair").count() == 4
    control = page.locator("#nt-model input")
    control.fill("b" * 400)
    control.press("Enter")
    page.get_by_text("expected a name of conf/model").wait_for()


@pytest.mark.parametrize("width", [1280, 768, 390])
def test_nothing_is_wider_than_the_window(visit, width):
    for mode in ("away", "compare"):
        assert overflow(visit(f"?mode={mode}&steps=2&images=8", width=width)) == [0]
    page = visit("?mode=diversity&steps=2&images=8", width=width)
    generate(page)
    page.locator(".nt-pair").last.click()
    page.get_by_text("Python", exact=True).click()
    assert page.locator(".nt-scroll").evaluate("one => one.scrollWidth - one.clientWidth") == 0, "the table fits"
    assert overflow(page) == [0]
    results, controls = (page.locator(name).bounding_box() for name in ("#nt-results", "#nt-left"))
    assert (results["y"] + results["height"] <= controls["y"]) == (width == 390), "on a phone results come first"


@pytest.mark.parametrize("dark", [False, True])
def test_everybody_can_read_it(visit, check_accessibility, dark):
    page = visit(dark=dark)
    generate(page)
    page.locator(".nt-pair").last.click()
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (np.array(re.findall(r"\d+", background)[:3], int).mean() < 100) == dark
    check_accessibility(page)
    choose(page, "Away from an image")
    page.locator("#nt-picture").wait_for()
    check_accessibility(page)
