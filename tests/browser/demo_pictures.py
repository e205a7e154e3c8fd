"""Make the pictures of the demo in docs/images anew, by a real Chromium: python tests/browser/demo_pictures.py"""

import io
import shutil
from pathlib import Path

from conftest import NAMES
from PIL import Image
from playwright.sync_api import sync_playwright

from experiments.demo.page import Page, launched
from experiments.demo.session import Session

FOLDER = Path(__file__).parents[2] / "docs" / "images"
#: Width of the window and height of the picture, in pixels.
SIZES = {1280: 1240, 390: 1400}


def main() -> None:
    served = Page("mini-sdxl", Session())
    address = launched(served)
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, NAMES)))
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for width, height in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce")
            page.set_default_timeout(600_000)
            page.goto(address)
            page.locator("#nt-go").click()
            page.locator(".nt-done").wait_for()
            if width < 900:
                page.locator(".nt-pair").nth(5).click()
                page.locator("#nt-right").evaluate("one => one.scrollIntoView()")
            image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            FOLDER.mkdir(exist_ok=True)
            image.save(FOLDER / f"demo_{width}.webp", quality=82, method=6)
        browser.close()
    served.blocks.close()


if __name__ == "__main__":
    main()
