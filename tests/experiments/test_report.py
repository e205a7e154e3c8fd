"""The report: what it shows is in its folder and escaped; nothing is fetched, invented or left over."""

import base64
import contextlib
import io
import itertools
import multiprocessing
import os
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from laid_runs import METHODS, PROMPTS, colour, diversity_table, scored_runs, write_run
from PIL import Image

from eval.images import METRICS, ManifestRow, load_picture
from experiments import PROJECT, report
from experiments.figures import figures_for
from experiments.figures.style import Drawing, encode
from experiments.report import sections
from experiments.report.galleries import spread
from experiments.report.headlines import effect
from experiments.report.markdown import render_page
from experiments.report.pictures import PICTURES, reduced
from experiments.tables.columns import TEXT, commands, merge_rows, read_table, whole
from experiments.tables.pages import main_table


class Page(HTMLParser):
    """The elements of a page, in order, with their text."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, file):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(file.read_text(encoding="utf-8"))
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})
        if tag not in self.VOID:
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e["tag"] == tag and attributes.items() <= e.items()]

    def of_class(self, name):
        return [element for element in self.elements if element.get("class") == name]


def laid(results, frame):
    """Make a folder of results with a table of diversity and a folder beside it; return it."""
    for name in ("diversity", "memorised"):
        (results / name).mkdir(parents=True)
    frame.to_csv(results / "diversity" / "table.csv", index=False)
    return results


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The page of the committed diversity table: mini-sdxl's runs are here, mini-flux's are absent or damaged."""
    folder = tmp_path_factory.mktemp("full")
    outputs, frame = folder / "outputs", diversity_table()
    frame["encoder"] = frame["encoder"] + "<b>&"
    for method in METHODS:
        rows = (frame["model"] == "mini-sdxl") & (frame["method"] == method)
        frame.loc[rows, "run_id"] = write_run(outputs, "mini-sdxl", method)
    damaged = (frame["model"] == "mini-flux") & (frame["method"] == "negtome")
    frame.loc[damaged, "run_id"] = run = write_run(outputs, "mini-flux", "negtome")
    manifest = outputs / "runs" / run / "manifest.jsonl"
    manifest.write_text(manifest.read_text()[:-40])
    results = laid(folder / "results", frame)
    (results / "memorised" / "table.csv").write_text("what,value\nown - other,0.25\n")
    Image.new("RGB", (8, 8)).save(results / "memorised" / "image.png")
    Image.new("RGB", (64, 32)).save(results / "diversity" / "grid_mini-flux.png")
    page = report.report(results, outputs, folder / "report")
    return folder, frame, page, Page(page)


@pytest.fixture(scope="module")
def one_figure():
    """An empty figure in the place of a table's own, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "figures_for", lambda frame: {"figure": (Drawing(figsize=(1, 1)), "a figure")})
        yield


@pytest.fixture
def small(full, tmp_path, one_figure):
    """A table and two runs to be changed: results, outputs and the table."""
    frame = full[1][(full[1]["model"] == "mini-sdxl") & (full[1]["method"] != "negtome_released")]
    shutil.copytree(full[0] / "outputs", tmp_path / "outputs")
    return laid(tmp_path / "results", frame), tmp_path / "outputs", frame


@pytest.fixture(scope="module")
def scored(tmp_path_factory, full, one_figure):
    """Scored runs of mini-sdxl and their page: folder, table, scores, page."""
    folder = tmp_path_factory.mktemp("scored")
    frame, scores = scored_runs(folder)
    return folder, frame, scores, report.report(folder / "results", folder / "outputs", folder / "report")


def pictures(page):
    """The contents of a page's images."""
    return {file.read_bytes() for file in (page.parent / PICTURES).iterdir()}


def tiles(files):
    """The images of groups among a page's files: all but the published image grid."""
    grids = [file.read_bytes() for file in (PROJECT / "results" / "diversity").glob("grid_*.webp")]
    return [file for file, content in files.items() if file.suffix == ".webp" and content not in grids]


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_page_is_self_contained_accessible_and_escaped(full):
    folder, _, path, page = full
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(set(ids)) == len(ids)
    for element, attribute in itertools.product(page.elements, ("src", "href")):
        target = element.get(attribute, "data:,")
        if target.startswith("#"):
            assert unquote(target[1:]) in ids
        elif target.startswith("https://"):
            assert element["tag"] == "a", "only what a reader may follow"
        elif target != "data:,":
            assert (path.parent / unquote(target)).is_file() and not target.startswith(("/", "..", "file:"))
    text = path.read_text()
    assert not any(one in text for one in (str(folder), str(PROJECT), "2020-01-01", "@import", "url(", "fetch("))
    assert page.all("html")[0]["lang"] == "en" and page.all("meta", name="viewport")
    assert all(len(image["alt"]) > 10 for image in page.all("img"))
    assert all(cell["scope"] in ("col", "row") for cell in page.all("th"))
    levels = [int(element["tag"][1]) for element in page.elements if element["tag"] in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    boxes = [box for box in page.all("div") if "scroll" in box.get("class", "").split()]
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert len(boxes) + len(page.of_class("forest")) >= len(page.all("table")), "a wide table scrolls by itself"
    (script,) = page.all("script")
    assert "alert" not in script["text"] and "<script>alert" not in text
    assert "<b>&" in page.all("main")[0]["text"] and PROMPTS["odd"][0] in {prompt for prompt, _ in groups(page)}


def test_tables_figures_and_commands_are_those_of_the_results(full):
    folder, frame, path, page = full
    cells = {cell["text"].replace("; ", "").replace(" ", "") for cell in page.all("td") + page.all("th")}
    for cell in itertools.chain.from_iterable(main_table(frame).itertuples(index=False)):
        assert str(cell).replace("; ", "").replace(" ", "") in cells
    assert {"0.812", "own-other", "0.25", "2.9.0", "0.42.1", "3.11.7", "cpu", *frame["commit"].unique()} <= cells
    assert all(command in page.all("pre")[0]["text"] for command in commands("diversity"))
    figures = {encode(figure, "svg") for figure, _ in figures_for(whole(frame)).values()}
    assert figures | {(folder / "results" / "memorised" / "image.png").read_bytes()} <= pictures(path)
    shown = {image["src"] for image in page.all("img")}
    assert {f"{PICTURES}/{file.name}" for file in (path.parent / PICTURES).glob("*.[sp]*g")} <= shown


def groups(page):
    """Prompt and seed -> image sources by the label of their row."""
    found = {}
    for element in page.elements:
        if "data-prompt" in element:
            group = found.setdefault((element["data-prompt"], int(element["data-seed"])), {})
        elif element.get("class") == "who" and found:
            strip = group.setdefault(element["text"], [])
        elif element["tag"] == "img" and found and "width" not in element:
            strip.append(element["src"])
    return found


def test_images_with_the_same_seed_are_in_one_column(full):
    _, _, path, page = full
    labels = ["without NegToMe", "NegToMe", "NegToMe, released matching"]
    assert [label["text"] for label in page.all("label") if label["text"] in labels] == labels
    by_group, names = groups(page), {prompt: prompt_id for prompt_id, (prompt, _) in PROMPTS.items()}
    assert set(by_group) == set(itertools.product(names, (0, 1)))
    for (prompt, seed), strips in by_group.items():
        *asset, none, pushed, released = strips
        assert asset == ["to stay away from"] * (prompt == PROMPTS["odd"][0])
        assert [none, pushed, released] == [*labels[:2], f"{labels[2]}away from ogre/a.png (0.88)"]
        for method, strip in zip(METHODS, (none, pushed, released), strict=True):
            assert len(strips[strip]) == 4
            for index, file in enumerate(strips[strip]):
                with Image.open(path.parent / file) as image:
                    expected = colour("mini-sdxl", method, names[prompt], seed, index)
                    assert np.abs(np.array(image).reshape(-1, 3) - np.array(expected)).max() <= 6


def test_runs_whose_images_are_not_here_are_named(full, tmp_path, one_figure):
    folder, _, path, page = full
    text = " ".join(page.all("main")[0]["text"].split())
    assert "Not on this machine: the images of all 3 runs" in text and "3 of 6" in text
    assert {"not on this machine", "cannot be read"} <= {cell["text"] for cell in page.all("td")}
    grid = folder / "results" / "diversity" / "grid_mini-flux.png"
    assert grid.read_bytes() in pictures(path), "the image grid that was kept with the table"
    results = laid(tmp_path / "results", full[1])
    page = Page(report.report(results, tmp_path / "nothing", tmp_path / "report"))
    assert "Images" not in [one["text"] for one in page.all("h4")] and not page.all("h5")


def test_the_clearest_group_gains_most_without_a_loss(scored):
    _, _, scores, path = scored
    gains, kept = (
        {group: value - scores["none", metric][group] for group, value in scores["negtome", metric].items()}
        for metric in ("pairwise_distance_aligned", "clip_score")
    )
    best = max((group for group in gains if kept[group] >= 0), key=gains.get)
    assert best == "odd/000000" and max(gains, key=gains.get) != best, "one that gains more loses quality"
    page = Page(path)
    (figure,) = page.of_class("best")
    prompt = PROMPTS["odd"][0]
    assert f"“{prompt}”" in figure["text"] and "of 6 groups" in figure["text"] and "0.5 (+0.3)" in figure["text"]
    links = [one["href"] for one in page.of_class("tile") if "id" not in one]
    (group,) = page.all("div", **{"data-prompt": prompt, "data-seed": "0"})
    assert links == [f"#{group['id']}/{run}/{image}" for run in (1, 2) for image in (1, 2, 3, 4)]


def test_scores_stand_under_their_images(scored):
    _, _, scores, path = scored
    strips = []
    for element in Page(path).elements:
        if element.get("class") == "group":
            prompt_id = next(name for name, (prompt, _) in PROMPTS.items() if prompt == element["data-prompt"])
            group, methods = f"{prompt_id}/{int(element['data-seed']):06d}", iter(METHODS)
        elif element.get("class") == "strip":
            strips.append((group, next(methods), element["data-changes"], " ".join(element["text"].split())))
    assert len(strips) == 6 * len(METHODS)
    for group, method, changes, text in strips:
        value, base = (scores[name, "pairwise_distance_aligned"][group] for name in (method, "none"))
        if method == "none":
            assert changes == "," and f"pairwise distance aligned {value:.3g}" in text and "clip score 50" in text
        else:
            assert float(changes.split(",")[1]) == pytest.approx(value - base)
            assert f"pairwise distance aligned {value:.3g} ({value - base:+.2g})" in text


@pytest.mark.parametrize("damage", ["table", "link", "edited"])
def test_scores_that_are_not_those_of_the_table_are_left_out(damage, scored, tmp_path, caplog):
    folder, frame, *_ = scored
    shutil.copytree(folder / "outputs", tmp_path / "outputs")
    rows = (frame["method"] == "negtome") & (frame["metric"] == "pairwise_distance_aligned")
    run = tmp_path / "outputs" / "runs" / frame.loc[rows, "run_id"].iloc[0]
    (file,) = (run / METRICS).glob("pairwise_distance_aligned-*")
    if damage == "table":
        frame = frame.assign(value=frame["value"].where(~rows, 0.9))
    elif damage == "edited":
        file.write_text(file.read_text().replace("0.5", "0.6"))
    else:
        shutil.move(file, tmp_path / "private.json")
        file.symlink_to(tmp_path / "private.json")
    page = Page(report.report(laid(tmp_path / "results", frame), tmp_path / "outputs", tmp_path / "report"))
    strips = [one for one in page.of_class("strip") if one["data-title"] == "NegToMe"]
    assert len(strips) == 6 and all("pairwise distance" not in one["text"] for one in strips)
    assert all("clip score" in one["text"] for one in strips) and "left out" in caplog.text
    assert not page.of_class("best"), "a group without scores is not the clearest"


@pytest.mark.parametrize(
    ("changes", "verdict", "kind"),
    [
        ({"higher_is_better": "False"}, "more", "worse"),
        ({"p_holm": 0.051}, "not significant", ""),
        ({"value": 0.4, "difference": -0.1, "difference_low": -0.2, "difference_high": -0.05}, "less", "worse"),
        ({"non_inferior": True}, "non-inferior", ""),
        ({"non_inferior": False}, "more", "better"),
        ({"difference_low": np.nan, "difference_high": np.nan, "p_holm": np.nan}, "not estimable", ""),
    ],
)
def test_a_verdict_follows_from_the_interval_and_the_corrected_p(changes, verdict, kind):
    row = {
        "metric": "clip_score", "value": 0.6, "difference": 0.1, "difference_low": 0.05, "difference_high": 0.2,
        "p_holm": 0.01, "non_inferior": np.nan, "higher_is_better": "True",
    }  # fmt: skip
    line = effect(pd.Series(row | changes))
    assert (line["verdict"], line["kind"]) == (verdict, kind)
    assert line["middle"] == pytest.approx(-20 if verdict == "less" else 20), "percent of the baseline's 0.5"


def test_headlines_show_the_effects_of_the_table(full):
    _, frame, _, page = full
    (article,) = page.all("article")
    text = " ".join(article["text"].split())
    rows = frame[(frame["method"] == "negtome") & frame["primary"].notna()]
    assert len(rows) == 4
    for _, row in rows.iterrows():
        base = (row["value"] - row["difference"]) / 100
        low, high = (row[f"difference_{end}"] / base for end in ("low", "high"))
        assert f"{row['difference'] / base:+.1f} % [{low:+.1f}, {high:+.1f}]" in text
    assert [cell["text"] for cell in page.of_class("verdict")] == ["not significant", "more", "non-inferior", "more"]


def test_equal_inputs_give_equal_bytes_beside_the_page_and_in_one_file(scored, tmp_path):
    folder, _, _, path = scored
    inputs, one = (folder / "results", folder / "outputs"), tmp_path / "one"
    page = report.report(*inputs, one, single_file=True)
    assert [entry.name for entry in one.iterdir() if entry.name[0] != "."] == ["index.html"]
    inside = {image["src"].partition(";base64,")[2] for image in Page(page).all("img")}
    assert {base64.b64decode(content, validate=True) for content in inside} == pictures(path)
    before = contents(one)
    report.report(*inputs, one)
    assert contents(one) == contents(path.parent), "one page replaces the other"
    report.report(*inputs, one, single_file=True)
    assert contents(one) == before
    assert sorted(entry.name for entry in folder.iterdir()) == ["outputs", "report", "results"], "nothing half-written"


def test_large_images_are_reduced_and_kept_in_full_too(tmp_path, one_figure):
    scored_runs(tmp_path, size=300)
    page = report.report(tmp_path / "results", tmp_path / "outputs", tmp_path / "report", groups=1)
    links, images = Page(page).of_class("tile"), [one for one in Page(page).all("img") if "width" not in one]
    assert links
    for link, image in zip(links, images, strict=True):
        sizes = [load_picture(page.parent / file).size for file in (link["data-full"], image["src"])]
        assert sizes == [(300, 300), (256, 256)]
    Image.new("RGBA", (1024, 512), (255, 0, 0, 255)).save(tmp_path / "large.png")
    with Image.open(io.BytesIO(reduced(load_picture(tmp_path / "large.png")))) as image:
        assert image.size == (256, 128)


def test_every_file_of_results_is_shown_once_in_the_section_of_its_folder(tmp_path):
    """A table beside the folders has a section of its own."""
    results = tmp_path / "results"
    for name in ("judged", "other", "lonely", "headed", "titled"):
        (results / name).mkdir(parents=True)
    for path in ("judged/table", "judged/more", "other/table", "flat"):
        (results / f"{path}.csv").write_text(f"what,value\ncell of {path}.,1\n")
    for path in ("judged/table", "judged/extra", "README"):
        (results / f"{path}.md").write_text(
            f"# {path}\n\nWords of {path}, **so** `much`.\n\n| a |\n|:--|\n| row of {path} |\n"
        )
    for path in ("judged/picture", "lonely/picture"):
        Image.new("RGB", (8, 8)).save(results / f"{path}.png")
    (results / "headed" / "table.csv").write_text("what,value\n")
    (results / "titled" / "table.md").write_text("# titled\n")
    page = Page(report.report(results, tmp_path / "outputs", tmp_path / "report"))
    texts = {one["id"]: one["text"] for one in page.of_class("section")}
    assert list(texts) == ["flat", "judged", "lonely", "other"]
    owners = {
        "cell of judged/table.": "judged", "cell of judged/more.": "judged", "cell of other/table.": "other",
        "cell of flat.": "flat", "Words of judged/table, so much.": "judged", "row of judged/extra": "judged",
        "judged/picture: an": "judged", "lonely/picture: an": "lonely",
    }  # fmt: skip
    for text, owner in owners.items():
        assert [name for name, content in texts.items() if text in content] == [owner], text
    assert "README" not in page.all("main")[0]["text"]
    assert {link["href"] for link in page.all("a")} >= {f"#{name}" for name in texts}


def test_markdown_keeps_its_structure_and_no_tag_or_link():
    page = render_page(
        "# T\n\n## Head & <tail>\n\nOne `a < b` and **two**, [here](https://example.org/x) ![image](y.png).\n\n"
        "- first\n  goes on\n\n| a \\| b | c |\n|:--|:--|\n| <script> | 2 |\n",
        "some",
    )
    for part in (
        "<h4>Head &amp; &lt;tail&gt;</h4>", "<p>One <code>a &lt; b</code> and <strong>two</strong>, here image.</p>",
        'aria-label="some, table 1"', '<th scope="col">a | b</th>', "<td>&lt;script&gt;</td>",
    ):  # fmt: skip
        assert part in page
    assert "href" not in page and "T" not in page


def test_an_earlier_page_is_replaced_and_other_files_stay(small, tmp_path):
    results, outputs, frame = small
    page = report.report(results, outputs, tmp_path / "report", groups=1)
    before = contents(page.parent)
    (page.parent / "notes.txt").write_text("mine")
    (page.parent / "figures").mkdir()
    (page.parent / "figures" / "mine.png").write_text("mine")
    frame.assign(value=0.5).to_csv(results / "diversity" / "table.csv", index=False)
    report.report(results, outputs, page.parent, groups=2)
    after = contents(page.parent)
    assert {file for file in after if after[file] == b"mine"} == {Path("notes.txt"), Path("figures/mine.png")}
    assert len(tiles(after)) == 2 * 2 * 4
    (page.parent / "notes.txt").unlink()
    shutil.rmtree(page.parent / "figures")
    frame.to_csv(results / "diversity" / "table.csv", index=False)
    gone, torn, *_ = (page.parent / PICTURES).glob("*.webp")
    gone.unlink()
    torn.write_bytes(torn.read_bytes()[:40])  # as a command leaves it that is killed while it writes
    report.report(results, outputs, page.parent, groups=1)
    assert contents(page.parent) == before


@pytest.mark.slow
def test_killed_anywhere_there_is_a_complete_page_and_the_next_one_is_made(small, tmp_path, monkeypatch):
    """Stop before some changes of a folder in turn, of the first page and of one that replaces it."""
    results, outputs, frame = small
    for number, steps in itertools.product((1, 2), range(0, 20, 4)):
        frame.assign(value=number / 10).to_csv(results / "diversity" / "table.csv", index=False)
        left = iter(range(steps))

        def killing(function, left=left):
            def killed(*arguments, **options):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return function(*arguments, **options)

            return killed

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", killing(os.replace))
            patch.setattr(Path, "write_bytes", killing(Path.write_bytes))
            patch.setattr(Path, "unlink", killing(Path.unlink))
            report.report(results, outputs, tmp_path / "report", groups=1)
        page = tmp_path / "report" / "index.html"
        assert number == 1 or page.is_file()
        for image in Page(page).all("img") if page.is_file() else ():
            assert (page.parent / unquote(image["src"])).is_file()
    assert f"{0.2}" in report.report(results, outputs, tmp_path / "report", groups=1).read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it forks")
def test_several_at_once_leave_one_complete_page(small, tmp_path):
    results, outputs, _ = small
    fork, page = multiprocessing.get_context("fork"), tmp_path / "report" / "index.html"
    processes = [
        fork.Process(target=report.report, args=(results, outputs, page.parent, groups)) for groups in (1, 1, 2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    left = contents(page.parent)
    assert all(Path(image["src"]) in left for image in Page(page).all("img"))
    assert len(tiles(left)) in (2 * 4, 2 * 2 * 4), "those of one page"


@pytest.mark.parametrize(
    ("column", "value"),
    [("run_id", "../../../private"), ("run_id", "/etc"), ("method", ".."), ("model", "../out"), ("model", "/tmp/out")],
)
def test_a_table_cannot_name_other_folders(column, value, small, tmp_path):
    results, outputs, frame = small
    frame.assign(**{column: value}).to_csv(results / "diversity" / "table.csv", index=False)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"for {column} in .*diversity/table\.csv, got '{value}'"):
        report.report(results, outputs, tmp_path / "report")
    with pytest.raises(ValueError, match=f"for {column} in"):
        read_table("diversity", results)
    assert contents(tmp_path) == before


def negtome_images(results, outputs):
    """The images of mini-sdxl's run of NegToMe."""
    rows = pd.read_csv(results / "diversity" / "table.csv", dtype=TEXT)
    run = rows.loc[(rows["model"] == "mini-sdxl") & (rows["method"] == "negtome"), "run_id"].iloc[0]
    return sorted((outputs / "runs" / run).rglob("*.png"))


def test_links_are_left_out(small, tmp_path, caplog):
    results, outputs, _ = small
    Image.new("RGB", (32, 32), (1, 2, 3)).save(tmp_path / "private.png")
    (tmp_path / "private.csv").write_text("who,what\nsomebody,something private\n")
    image = negtome_images(results, outputs)[0]
    image.unlink()
    for link, target in (
        (image, "png"),
        (results / "memorised" / "image.png", "png"),
        (results / "memorised" / "linked.csv", "csv"),
    ):
        link.symlink_to(tmp_path / f"private.{target}")
    page = report.report(results, outputs, tmp_path / "report", groups=9)
    assert "something private" not in page.read_text()
    assert "the images of 1 of 2 runs (NegToMe)" in page.read_text()
    assert f"{image} is left out: it is a link" in caplog.text and "image.png is left out" in caplog.text
    for file in page.parent.rglob("*.[pw]*"):
        with Image.open(file) as opened:
            assert np.abs(np.array(opened.convert("RGB"))[0, 0].astype(int) - (1, 2, 3)).max() > 8, file


@pytest.mark.parametrize("damage", ["empty", "bytes", "words", "ragged"])
def test_a_damaged_table_is_named_in_one_line_and_neither_merged_nor_lost(damage, small, tmp_path):
    results, outputs, frame = small
    table = results / "diversity" / "table.csv"
    damaged = {"empty": b"", "bytes": table.read_bytes() + b"\xff\xfe", "ragged": b'a,b\n1,2,3,4\n1\n"no end',
               "words": frame.assign(value="a lot").to_csv(index=False).encode()}[damage]  # fmt: skip
    table.write_bytes(damaged)
    for read in (
        lambda: report.report(results, outputs, tmp_path / "report"),
        lambda: read_table("diversity", results),
        lambda: merge_rows(table, frame.to_dict("records")),
    ):
        with pytest.raises(ValueError, match=r"expected a table in .*table\.csv, got a damaged file") as error:
            read()
        assert "\n" not in str(error.value) and table.read_bytes() == damaged


def test_a_folder_of_something_else_is_never_replaced(full, tmp_path):
    folder = full[0]
    (tmp_path / "mine.txt").touch()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"expected an earlier page.* choose another --into"):
            report.report(folder / "results", folder / "outputs", tmp_path)
        (tmp_path / "index.html").write_text("<html>")
    assert (tmp_path / "mine.txt").exists()
    with pytest.raises(FileNotFoundError, match="make reproduce-diversity"):
        report.report(tmp_path, folder / "outputs", tmp_path / "new")


def test_a_run_with_a_missing_image_is_not_shown_and_a_damaged_image_is_named(small, tmp_path):
    results, outputs, _ = small
    image = negtome_images(results, outputs)[0]
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"expected a readable image, got .*00\.png"):
        report.report(results, outputs, tmp_path / "report")
    assert {entry.name for entry in tmp_path.iterdir()} == {"outputs", "results"}, "something half-written"
    image.unlink()
    text = report.report(results, outputs, tmp_path / "report").read_text()
    assert "the images of 1 of 2 runs (NegToMe)" in text
    text = report.report(results, outputs, tmp_path / "report", groups=0).read_text()
    assert 'class="gallery"' not in text and not tiles(contents(tmp_path / "report"))
    with pytest.raises(ValueError, match="at least 0, got -1"):
        report.report(results, outputs, tmp_path / "report", groups=-1)


def test_few_groups_are_spread_over_the_categories():
    rows = {
        f"{category}-{number}/{seed:06d}": [ManifestRow("a.png", f"{category}-{number}", "p", category, seed, 0, 0)]
        for category in "cab" for number in range(3) for seed in range(2)
    }  # fmt: skip
    for limit in (1, 3, 4, 7, 18, 100):
        chosen = spread(rows, limit)
        counts = [sum(group.startswith(category) for group in chosen) for category in "abc"]
        assert len(chosen) == min(limit, 18) and max(counts) - min(counts) <= 1
        assert chosen == sorted(set(chosen))
