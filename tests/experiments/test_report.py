"""The page: what it shows is there, beside it and escaped; nothing is fetched, invented or left over."""

import base64
import contextlib
import io
import itertools
import multiprocessing
import os
import re
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
from experiments.figures import called_for
from experiments.figures.style import encode
from experiments.report.galleries import spread
from experiments.report.pictures import PICTURES, reduced
from experiments.report.words import blocks
from experiments.tables import pages
from experiments.tables.columns import TEXT, commands, read_table, whole
from experiments.tables.pages import findings, main_table
from experiments.tabulate import merge_rows


class Page(HTMLParser):
    """The elements of a page, in order, with their text."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
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


def runs_of(results):
    """The run ids of the diversity table, by model and method."""
    rows = pd.read_csv(results / "diversity.csv", dtype=TEXT).drop_duplicates("run_id")
    return rows.set_index(["model", "method"])["run_id"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The committed diversity table with runs of mini-sdxl laid down, and those of mini-flux absent or damaged."""
    folder = tmp_path_factory.mktemp("made")
    results, outputs = folder / "results", folder / "outputs"
    results.mkdir()
    frame = diversity_table()
    frame["encoder"] = frame["encoder"] + "<b>&"
    for method in METHODS:
        mine = (frame["model"] == "mini-sdxl") & (frame["method"] == method)
        frame.loc[mine, "run_id"] = write_run(outputs, "mini-sdxl", method)
    damaged = (frame["model"] == "mini-flux") & (frame["method"] == "negtome")
    frame.loc[damaged, "run_id"] = run = write_run(outputs, "mini-flux", "negtome")
    manifest = outputs / "runs" / run / "manifest.jsonl"
    manifest.write_text(manifest.read_text()[:-40])
    frame.to_csv(results / "diversity.csv", index=False)
    for suffix in ("csv", "md", "png"):
        shutil.copyfile(PROJECT / "results" / f"memorised.{suffix}", results / f"memorised.{suffix}")
    Image.new("RGB", (64, 32)).save(results / "diversity_grid_mini-flux.png")
    page = report.report(results, outputs, folder / "report")
    return folder, frame, page, Page(page.read_text(encoding="utf-8"))


def pictures(page):
    """The contents of a page's pictures."""
    return {file.read_bytes() for file in (page.parent / PICTURES).iterdir()}


def test_the_page_needs_nothing_but_its_folder(made):
    folder, _, path, page = made
    for element in page.elements:
        for attribute in ("src", "href"):
            target = element.get(attribute)
            if target is None or target == "data:,":
                continue
            if target.startswith("#"):
                assert unquote(target[1:]) in {e.get("id") for e in page.elements}
            elif target.startswith("https://"):
                assert element["tag"] == "a", "only what a reader may follow"
            else:
                assert (path.parent / unquote(target)).is_file() and not target.startswith(("/", "..", "file:"))
    text = path.read_text()
    assert str(folder) not in text and str(PROJECT) not in text and "2020-01-01" not in text
    assert "@import" not in text and "url(" not in text and "fetch(" not in text


def test_the_page_can_be_read_by_everyone(made):
    page = made[3]
    assert page.all("html")[0]["lang"] == "en" and page.all("meta", name="viewport") and page.all("main")
    images = page.all("img")
    assert images and all(len(image["alt"]) > 10 for image in images)
    assert all(cell["scope"] in ("col", "row") for cell in page.all("th"))
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(set(ids)) == len(ids)
    levels = [int(element["tag"][1]) for element in page.elements if element["tag"] in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    # What is wider than a phone scrolls in a box of its own, by keyboard too.
    boxes = [box for box in page.all("div") if "scroll" in box.get("class", "").split()]
    assert len(boxes) >= len(page.all("table")) and all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert "prefers-color-scheme: dark" in page.all("style")[0]["text"]


def test_tables_findings_and_commands_are_those_of_the_table(made):
    _, frame, path, page = made
    text = " ".join(page.all("main")[0]["text"].split())
    for finding in findings(frame):
        assert " ".join(finding.removeprefix("- ").split()) in text
    cells = [cell["text"] for cell in page.all("td") + page.all("th")]
    for row in main_table(frame).itertuples(index=False):
        for cell in row:
            assert str(cell).replace("; ", "").replace(" [", "[").replace(" (", "(") in [
                found.replace(" [", "[").replace(" (", "(") for found in cells
            ]
    for command in commands("diversity"):
        assert command in page.all("pre")[0]["text"]
    assert "0.812" in cells, "the paper's number"
    memorised = pd.read_csv(PROJECT / "results" / "memorised.csv", dtype=str)
    assert {"own - other", memorised["value"][0]} <= set(cells), "of a table with columns of its own"
    for version in ("2.9.0", "0.42.1", "3.11.7", *frame["commit"].unique(), "cpu"):
        assert version in cells
    assert (PROJECT / "results" / "memorised.png").read_bytes() in pictures(path)
    assert {encode(figure, "svg") for figure, _ in called_for(whole(frame)).values()} <= pictures(path)
    shown = {image["src"] for image in page.all("img")}
    assert {f"{PICTURES}/{file.name}" for file in (path.parent / PICTURES).glob("*.[sp]*g")} <= shown


def groups(page):
    """Prompt and seed -> image sources by what stands beside them."""
    found = {}
    for element in page.elements:
        if "data-prompt" in element:
            group = found.setdefault((element["data-prompt"], int(element["data-seed"])), {})
        elif element.get("class") == "who" and found:
            strip = group.setdefault(element["text"], [])
        elif element["tag"] == "img" and found and "width" not in element:
            strip.append(element["src"])
    return found


def test_paired_images_stand_below_each_other(made):
    _, _, path, page = made
    labels = ["without NegToMe", "NegToMe", "NegToMe, released matching"]
    assert [label["text"] for label in page.all("label") if label["text"] in labels] == labels
    options = [option["text"] for option in page.all("option") if "value" in option]
    assert options == ["all", *(f"{prompt}, seed {seed}" for prompt, seed in groups(page))]
    found, names = groups(page), {prompt: prompt_id for prompt_id, (prompt, _) in PROMPTS.items()}
    assert set(found) == {(prompt, seed) for prompt in names for seed in (0, 1)}
    for (prompt, seed), strips in found.items():
        # A picture of the asset stands with those who ask for it.
        (*asset, none, pushed, released) = strips
        assert asset == ["to stay away from"] * (prompt == PROMPTS["odd"][0])
        assert [none, pushed, released] == [*labels[:2], f"{labels[2]}away from ogre/a.png (0.88)"]
        for method, strip in zip(METHODS, (none, pushed, released), strict=True):
            assert len(strips[strip]) == 4
            for index, file in enumerate(strips[strip]):
                with Image.open(path.parent / file) as image:
                    expected = colour("mini-sdxl", method, names[prompt], seed, index)
                    assert np.abs(np.array(image).reshape(-1, 3) - np.array(expected)).max() <= 6
    alts = {image["alt"] for image in page.all("img") if ", noise " in image["alt"]}
    assert len(alts) == 3 * 6 * 4 and "NegToMe, released matching: a cat, seed 0, noise 4" in alts


def test_what_is_not_here_is_said(made):
    text = " ".join(made[3].all("main")[0]["text"].split())
    assert "Not on this machine: the images of all 3 runs" in text and "3 of 6" in text
    assert {"not on this machine", "cannot be read"} <= {cell["text"] for cell in made[3].all("td")}
    assert (made[0] / "results" / "diversity_grid_mini-flux.png").read_bytes() in pictures(made[2]), "the kept sheet"


def test_a_sheet_of_all_colours_comes_before_one_of_before(made, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    for name in ("diversity.csv", "diversity_grid_mini-flux.png"):
        shutil.copyfile(made[0] / "results" / name, results / name)
    Image.new("RGB", (64, 32), "red").save(results / "diversity_grid_mini-flux.webp")
    shown = pictures(report.report(results, tmp_path / "nothing", tmp_path / "report", groups=0))
    assert (results / "diversity_grid_mini-flux.webp").read_bytes() in shown
    assert (results / "diversity_grid_mini-flux.png").read_bytes() not in shown


def test_everything_is_escaped(made):
    _, _, path, page = made
    (script,) = page.all("script")
    assert "alert" not in script["text"] and not page.all("b")
    assert PROMPTS["odd"][0] in {prompt for prompt, _ in groups(page)}
    assert "<b>&" in page.all("main")[0]["text"] and "<script>alert" not in path.read_text()


def tiles(found):
    """The images of groups among a page's files: all but the sheet that is published with this project."""
    sheets = [sheet.read_bytes() for sheet in (PROJECT / "results").glob("diversity_grid_*.webp")]
    return [file for file, content in found.items() if file.suffix == ".webp" and content not in sheets]


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_inputs_give_the_same_bytes(made):
    folder, _, path, _ = made
    files = contents(path.parent)
    report.report(folder / "results", folder / "outputs", path.parent)
    assert contents(path.parent) == files
    assert sorted(entry.name for entry in folder.iterdir()) == ["outputs", "report", "results"], "nothing half-written"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Scored runs of mini-sdxl and their page: folder, table, scores, page."""
    folder = tmp_path_factory.mktemp("scored")
    frame, scores = scored_runs(folder)
    return folder, frame, scores, report.report(folder / "results", folder / "outputs", folder / "report")


def test_the_clearest_group_is_the_one_that_gains_most_without_a_loss(scored):
    _, _, scores, path = scored
    gains, kept = (
        {group: value - scores["none", metric][group] for group, value in scores["negtome", metric].items()}
        for metric in ("pairwise_distance", "clip_score")
    )
    best = max((group for group in gains if kept[group] >= 0), key=gains.get)
    assert best == "odd/000000" and max(gains, key=gains.get) != best, "one that gains more loses quality"
    page = Page(path.read_text(encoding="utf-8"))
    (figure,) = page.all("figure", **{"class": "best"})
    prompt = PROMPTS["odd"][0]
    assert f"“{prompt}”" in figure["text"] and "Of the 6 groups of NegToMe" in " ".join(figure["text"].split())
    assert "0.5 (+0.3)" in figure["text"]
    links = [one["href"] for one in page.elements if one.get("class") == "tile" and "id" not in one]
    (group,) = page.all("div", **{"data-prompt": prompt, "data-seed": "0"})
    assert links == [f"#{group['id']}/{run}/{image}" for run in (1, 2) for image in (1, 2, 3, 4)]


def test_scores_stand_under_the_images_that_they_are_of(scored):
    _, _, scores, path = scored
    page, found = Page(path.read_text(encoding="utf-8")), []
    for element in page.elements:
        if element.get("class") == "group":
            prompt_id = next(name for name, (prompt, _) in PROMPTS.items() if prompt == element["data-prompt"])
            group, methods = f"{prompt_id}/{int(element['data-seed']):06d}", iter(METHODS)
        elif element.get("class") == "strip":
            found.append((group, next(methods), element["data-changes"], " ".join(element["text"].split())))
    assert len(found) == 6 * len(METHODS)
    for group, method, changes, text in found:
        value, base = (scores[name, "pairwise_distance"][group] for name in (method, "none"))
        assert f"pairwise distance {value:.3g}" in text
        if method == "none":
            assert changes == "," and "(" not in text.split("pairwise distance")[1]
        else:
            assert float(changes.split(",")[0]) == pytest.approx(value - base)
            assert f"{value:.3g} ({value - base:+.2g})" in text


@pytest.mark.parametrize("damage", ["table", "torn", "link", "edited"])
def test_scores_that_are_not_those_of_the_table_are_left_out(damage, scored, tmp_path, caplog):
    folder, frame, *_ = scored
    shutil.copytree(folder / "outputs", tmp_path / "outputs")
    results = tmp_path / "results"
    results.mkdir()
    mine = (frame["method"] == "negtome") & (frame["metric"] == "pairwise_distance")
    run = tmp_path / "outputs" / "runs" / frame.loc[mine, "run_id"].iloc[0]
    (file,) = (run / METRICS).glob("pairwise_distance-*")
    if damage == "table":
        frame = frame.assign(value=frame["value"].where(~mine, 0.9))
    elif damage == "torn":
        file.write_text(file.read_text()[:-40])
    elif damage == "edited":
        file.write_text(file.read_text().replace("0.5", "0.6"))
    else:
        shutil.move(file, tmp_path / "private.json")
        file.symlink_to(tmp_path / "private.json")
    frame.to_csv(results / "diversity.csv", index=False)
    page = Page(report.report(results, tmp_path / "outputs", tmp_path / "report").read_text(encoding="utf-8"))
    strips = [one for one in page.elements if one.get("class") == "strip" and one["data-title"] == "NegToMe"]
    assert len(strips) == 6 and all("pairwise distance" not in one["text"] for one in strips)
    assert all("clip score" in one["text"] for one in strips) and "left out" in caplog.text
    assert not page.all("figure", **{"class": "best"}), "nothing is called the clearest that was not measured"


def test_verdicts_are_the_findings_of_the_tables_that_are_there(scored, made):
    _, frame, _, path = scored
    (article,) = Page(path.read_text(encoding="utf-8")).all("article")
    text = " ".join(article["text"].split())
    mine = frame[(frame["method"] == "negtome") & frame["primary"].notna()]
    for _, row in mine.iterrows():
        assert pages.finding(row) in text
    (other,) = made[3].all("article")
    assert "mini-sdxl, NegToMe" in other["text"] and "mini-flux, NegToMe" in other["text"]


def test_in_one_file_the_pictures_are_in_the_page(scored, tmp_path):
    folder, _, _, path = scored
    page = report.report(folder / "results", folder / "outputs", tmp_path / "one", single_file=True)
    assert [entry.name for entry in page.parent.iterdir() if entry.name[0] != "."] == ["index.html"]
    inside = {image["src"].partition(";base64,")[2] for image in Page(page.read_text()).all("img")}
    assert {base64.b64decode(content, validate=True) for content in inside} == pictures(path)
    before = contents(page.parent)
    report.report(folder / "results", folder / "outputs", page.parent, single_file=True)
    assert contents(page.parent) == before
    # And one with pictures beside it in its place, and back.
    report.report(folder / "results", folder / "outputs", page.parent)
    assert contents(page.parent) == contents(path.parent)
    report.report(folder / "results", folder / "outputs", page.parent, single_file=True)
    assert contents(page.parent) == before


def test_an_image_that_is_reduced_has_a_copy_of_its_own_size_too(tmp_path):
    scored_runs(tmp_path, size=300)
    page = report.report(tmp_path / "results", tmp_path / "outputs", tmp_path / "report", groups=1)
    tiles = [one for one in Page(page.read_text()).elements if one.get("class") == "tile"]
    assert tiles
    for link, image in zip(
        tiles, (one for one in Page(page.read_text()).all("img") if "width" not in one), strict=True
    ):
        sizes = [load_picture(page.parent / file).size for file in (link["data-full"], image["src"])]
        assert sizes == [(300, 300), (256, 256)]


def test_nothing_of_the_folder_of_results_falls_through(tmp_path):
    """Tables, pages and pictures stand with the table whose name theirs begins with, each once."""
    results = tmp_path / "results"
    results.mkdir()
    for stem in ("judged", "judged_more", "judged_most", "other", "other_more"):
        (results / f"{stem}.csv").write_text(f"what,value\ncell of {stem}.,1\n")
    for stem in ("judged", "judged_most", "judged_most_extra", "alone", "README"):
        (results / f"{stem}.md").write_text(
            f"# {stem}\n\nWords of {stem}, **so** `much`.\n\n| a |\n|:--|\n| row of {stem} |\n"
        )
    for stem in ("judged_picture", "lonely_picture", "alone"):
        Image.new("RGB", (8, 8)).save(results / f"{stem}.png")
    page = Page(report.report(results, tmp_path / "outputs", tmp_path / "report").read_text())
    sections = {one["id"]: one["text"] for one in page.all("details", **{"class": "section"})}
    assert list(sections) == ["alone", "judged", "judged_most", "lonely", "other", "other_more"]
    places = {
        "cell of judged.": "judged", "cell of judged_more.": "judged", "cell of judged_most": "judged_most",
        "cell of other.": "other", "cell of other_more.": "other_more",
        "Words of judged, so much.": "judged", "row of judged_most_extra": "judged_most",
        "Words of judged_most, so": "judged_most", "row of alone": "alone", "judged_picture: a": "judged",
        "lonely_picture: a": "lonely", "alone: a picture": "alone",
    }  # fmt: skip
    for text, place in places.items():
        assert [name for name, content in sections.items() if text in content] == [place], text
    assert "README" not in page.all("main")[0]["text"]
    assert {link["href"] for link in page.all("a")} >= {f"#{name}" for name in sections}


def test_what_holds_nothing_is_left_out_of_the_page(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "full.csv").write_text("what,value\na cell,1\n")
    (results / "headed.csv").write_text("what,value\n")
    (results / "titled.md").write_text("# titled\n")
    page = Page(report.report(results, tmp_path / "outputs", tmp_path / "report").read_text())
    assert [one["id"] for one in page.all("details", **{"class": "section"})] == ["full"]
    assert {one["href"] for one in page.all("a")} & {"#headed", "#titled"} == set()


def test_where_no_image_is_here_no_heading_announces_some(made, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    shutil.copyfile(made[0] / "results" / "diversity.csv", results / "diversity.csv")
    page = Page(report.report(results, tmp_path / "outputs", tmp_path / "report").read_text())
    assert "Images" in [one["text"] for one in made[3].all("h4")]
    assert "Images" not in [one["text"] for one in page.all("h4")] and not page.all("h5")


@pytest.mark.parametrize("n_units", [1, 3, 20])
def test_a_difference_without_an_interval_says_of_few_units_that_they_are_few(n_units):
    rows = diversity_table()
    row = rows[(rows["metric"] == "pairwise_distance") & rows["difference"].notna()].iloc[0].copy()
    row[["difference_low", "difference_high", "p_value", "p_holm", "non_inferior"]] = np.nan
    row["n_units"] = n_units
    text = pages.finding(row)
    assert ("too few units" in text) == (n_units < 4) and "alike" not in text


@pytest.mark.parametrize("table", [path.stem for path in sorted((PROJECT / "results").glob("*.csv"))])
def test_no_finding_puts_a_column_s_name_where_a_noun_belongs(table):
    frame = pd.read_csv(PROJECT / "results" / f"{table}.csv", dtype=TEXT)
    if not report._is_experiment(table, frame) or "difference" not in frame:
        pytest.skip("no table of differences")
    adjective = r"\b(not (unsafe|overrefuse)|as said|the [a-z ]+ (unnamed|allowed|(in)?direct)) by\b"
    for text in findings(frame):
        assert not re.search(adjective, text), text


def test_every_published_table_has_its_chapter():
    stems = {path.stem for path in (PROJECT / "results").glob("*.csv")} - set(report.APART) | {"gate", "redteam"}
    chapters = report._chapters({stem: {"name": stem} for stem in stems})
    assert "Further" not in chapters and sum(map(len, chapters.values())) == len(stems)
    assert [section["name"] for section in chapters["Claims"]] == ["diversity", "copyright", "latency"]


def test_words_of_a_page_are_marked_and_nothing_else():
    text = """## Head & <tail>

One `a < b` and **two**
lines, [here](https://example.org/x) ![picture](y.png).

- first
  goes on
- **second**

| a \\| b   | c |
|:---------|:--|
| <script> | 2 |
|          | 3 |
"""
    (head, text_of, listed, table) = blocks(text)
    assert head == ("heading", "Head &amp; &lt;tail&gt;")
    assert text_of == ("text", "One <code>a &lt; b</code> and <strong>two</strong> lines, here picture.")
    assert listed == ("list", ["first goes on", "<strong>second</strong>"])
    assert table[1].to_dict("list") == {"a | b": ["<script>", ""], "c": ["2", "3"]}


@pytest.fixture
def small(made, tmp_path):
    """A table, a run and a picture of it, to be changed: results and outputs, in the test's folder."""
    results, outputs = tmp_path / "results", tmp_path / "outputs"
    results.mkdir()
    frame = made[1][(made[1]["model"] == "mini-sdxl") & (made[1]["method"] != "negtome_released")]
    frame.to_csv(results / "diversity.csv", index=False)
    shutil.copytree(made[0] / "outputs", outputs)
    return results, outputs, frame


def test_an_earlier_page_is_replaced_and_what_lies_beside_it_stays(small, tmp_path):
    results, outputs, frame = small
    page = report.report(results, outputs, tmp_path / "report", groups=1)
    before = contents(page.parent)
    (page.parent / "notes.txt").write_text("mine")
    (page.parent / "figures").mkdir()
    (page.parent / "figures" / "mine.png").write_text("mine")
    frame.assign(value=0.5).to_csv(results / "diversity.csv", index=False)
    report.report(results, outputs, page.parent, groups=2)
    after = contents(page.parent)
    assert {file for file in after if after[file] == b"mine"} == {Path("notes.txt"), Path("figures/mine.png")}
    assert len(tiles(after)) == 2 * 2 * 4
    (page.parent / "notes.txt").unlink()
    shutil.rmtree(page.parent / "figures")
    frame.to_csv(results / "diversity.csv", index=False)
    report.report(results, outputs, page.parent, groups=1)
    assert contents(page.parent) == before


def test_a_picture_that_is_gone_from_the_page_is_put_there_again(small, tmp_path):
    """Killed while it wrote the pictures of a page, a command leaves a part of one under its name."""
    results, outputs, _ = small
    page = report.report(results, outputs, tmp_path / "report", groups=1)
    before = contents(page.parent)
    gone, torn, *_ = (page.parent / PICTURES).glob("*.webp")
    gone.unlink()
    torn.write_bytes(torn.read_bytes()[:40])
    report.report(results, outputs, page.parent, groups=1)
    assert contents(page.parent) == before


@pytest.mark.slow
def test_killed_anywhere_there_is_a_whole_page_and_the_next_one_is_made(small, tmp_path, monkeypatch):
    """Stopped before some changes of a folder in turn, of the first page and of one in another's place."""
    results, outputs, frame = small
    for number in (1, 2):
        frame.assign(value=number / 10).to_csv(results / "diversity.csv", index=False)
        for steps in range(0, 20, 4):
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
            for image in Page(page.read_text()).all("img") if page.is_file() else ():
                assert (page.parent / unquote(image["src"])).is_file()
    assert f"{0.2}" in report.report(results, outputs, tmp_path / "report", groups=1).read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="it forks")
def test_several_at_once_leave_a_whole_page(small, tmp_path):
    results, outputs, _ = small
    processes = [
        multiprocessing.get_context("fork").Process(
            target=report.report, args=(results, outputs, tmp_path / "report", groups)
        )
        for groups in (1, 1, 2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    page = tmp_path / "report" / "index.html"
    left = contents(page.parent)
    assert all(Path(image["src"]) in left for image in Page(page.read_text()).all("img"))
    assert len(tiles(left)) in (2 * 4, 2 * 2 * 4), "those of one page"


@pytest.mark.parametrize(
    ("column", "value"),
    [("run_id", "../../../private"), ("run_id", "/etc"), ("method", ".."), ("model", "../out"), ("model", "/tmp/out")],
)
def test_a_table_cannot_name_other_folders(column, value, small, tmp_path):
    results, outputs, frame = small
    frame.assign(**{column: value}).to_csv(results / "diversity.csv", index=False)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"name of a folder for {column} in .*diversity\.csv, got '{value}'"):
        report.report(results, outputs, tmp_path / "report")
    with pytest.raises(ValueError, match=f"name of a folder for {column}"):
        read_table("diversity", results)
    assert contents(tmp_path) == before


def test_links_are_left_out(small, tmp_path, caplog):
    results, outputs, _ = small
    Image.new("RGB", (32, 32), (1, 2, 3)).save(tmp_path / "private.png")
    image = sorted((outputs / "runs" / runs_of(results).loc["mini-sdxl", "negtome"]).rglob("*.png"))[0]
    image.unlink()
    image.symlink_to(tmp_path / "private.png")
    for suffix in ("csv", "md"):
        shutil.copyfile(PROJECT / "results" / f"memorised.{suffix}", results / f"memorised.{suffix}")
    (results / "memorised.png").symlink_to(tmp_path / "private.png")
    (tmp_path / "private.csv").write_text("who,what\nsomebody,something of theirs\n")
    (results / "linked.csv").symlink_to(tmp_path / "private.csv")
    page = report.report(results, outputs, tmp_path / "report", groups=9)
    assert "something of theirs" not in page.read_text()
    assert "the images of 1 of 2 runs (NegToMe)" in page.read_text()
    assert f"{image} is left out: it is a link" in caplog.text and "memorised.png is left out" in caplog.text
    for file in page.parent.rglob("*.[pw]*"):
        with Image.open(file) as opened:
            assert np.abs(np.array(opened.convert("RGB"))[0, 0].astype(int) - (1, 2, 3)).max() > 8, file


@pytest.mark.parametrize("damage", ["empty", "bytes", "words", "ragged"])
def test_a_damaged_table_is_named_in_one_line_and_neither_merged_nor_lost(damage, small, tmp_path):
    results, outputs, frame = small
    table = results / "diversity.csv"
    damaged = {"empty": b"", "bytes": table.read_bytes() + b"\xff\xfe", "ragged": b'a,b\n1,2,3,4\n1\n"no end',
               "words": frame.assign(value="a lot").to_csv(index=False).encode()}[damage]  # fmt: skip
    table.write_bytes(damaged)
    for read in (
        lambda: report.report(results, outputs, tmp_path / "report"),
        lambda: read_table("diversity", results),
        lambda: merge_rows(table, frame.to_dict("records")),
    ):
        with pytest.raises(ValueError, match=r"expected a table in .*diversity\.csv, got a damaged file") as error:
            read()
        assert "\n" not in str(error.value) and table.read_bytes() == damaged


def test_a_folder_of_something_else_is_never_replaced(made, tmp_path):
    folder = made[0]
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"expected an earlier page.* choose another --into"):
        report.report(folder / "results", folder / "outputs", tmp_path)
    (tmp_path / "index.html").write_text("<html>")
    with pytest.raises(ValueError, match="expected an earlier page"):
        report.report(folder / "results", folder / "outputs", tmp_path)
    assert (tmp_path / "mine.txt").exists()
    with pytest.raises(FileNotFoundError, match="make reproduce-diversity"):
        report.report(tmp_path, folder / "outputs", tmp_path / "new")


def test_a_run_with_an_image_gone_is_not_shown_and_a_damaged_one_is_named(small, tmp_path):
    results, outputs, _ = small
    images = sorted((outputs / "runs" / runs_of(results).loc["mini-sdxl", "negtome"]).rglob("*.png"))
    images[0].write_bytes(images[0].read_bytes()[:40])
    with pytest.raises(ValueError, match=r"expected a readable image, got .*00\.png"):
        report.report(results, outputs, tmp_path / "report")
    assert {entry.name for entry in tmp_path.iterdir()} == {"outputs", "results"}, "something half-written"
    images[0].unlink()
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
        assert chosen == sorted(chosen) == sorted(set(chosen))


def test_large_images_are_reduced(tmp_path):
    Image.new("RGBA", (1024, 512), (255, 0, 0, 255)).save(tmp_path / "large.png")
    with Image.open(io.BytesIO(reduced(load_picture(tmp_path / "large.png")))) as image:
        assert image.size == (256, 128)
