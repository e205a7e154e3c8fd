"""The fixtures do find what they look for."""

import pytest


def test_a_page_that_nobody_can_read_is_found(open_page, check_accessibility, tmp_path):
    (tmp_path / "good.html").write_text("<html lang=en><title>good</title><main><h1>good</h1></main>")
    (tmp_path / "bad.html").write_text("<html><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>")
    check_accessibility(open_page(f"file://{tmp_path}/good.html"))
    with pytest.raises(AssertionError, match="image-alt"):
        check_accessibility(open_page(f"file://{tmp_path}/bad.html"))
