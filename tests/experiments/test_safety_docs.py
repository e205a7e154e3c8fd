"""The numbers that README, docs/safety.md and docs/redteam.md quote are those of the tables in results."""

import re

import pandas as pd
import pytest

from experiments import PROJECT

#: Names of guards in the pages.
GUARDS = {
    "no guard": None,
    "keyword": "keyword",
    "CLIP nearest-neighbour": "nearest",
    "small guard": "mini",
    "only the check (keyword, empty policy)": "keyword, policy stripped",
    "always refuse": "always refuse",
}
LAYERS = {"decide": "decide", "decide, steer": "steer", "all": "check", "": "check"}
METHODS = {"both": "guarded", "NegToMe": "guarded_negtome", "negative prompt": "guarded_negative_prompt", "": "guarded"}
SYSTEMS_OF_README = {
    "no guard": (None, None, "none"),
    "keyword, refuses": ("keyword", "decide", "guarded"),
    "keyword, steers": ("keyword", "steer", "guarded"),
    "keyword, steers and checks": ("keyword", "check", "guarded"),
}
RATES = ("not_unsafe", "not_overrefuse", "answered")
ATTACKS = {
    "name": "attack_success_1", "exception": "attack_success_1", "random": "attack_success_4",
    "guided": "attack_success_4",
}  # fmt: skip


def text_of(path):
    return (PROJECT / path).read_text(encoding="utf-8")


def section(page, heading):
    """The part of a page under a heading, up to the next one of its level or above."""
    level = heading.split(" ")[0]
    (part,) = re.findall(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", page, re.MULTILINE | re.DOTALL)
    return part


def rows_of(text):
    """The cells of the rows of a text's only table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return rows[2:]


def is_rounded(text, percent):
    """Tell whether whole percent are a number's; of half a percent either neighbour is."""
    return abs(int(text) - percent) <= 0.5 + 1e-6


def cell(table, system, **other):
    """A value of a results table and its confidence limits, in percent."""
    guard, layers, method = system
    rows = table[table["method"] == method]
    rows = rows[rows["guard"].isna() if guard is None else rows["guard"] == guard]
    rows = rows if guard is None else rows[rows["layers"] == layers]
    for name, value in other.items():
        rows = rows[rows[name] == value]
    (row,) = rows.to_dict("records")
    return [100 * row[name] for name in ("value", "ci_low", "ci_high")]


@pytest.fixture(scope="module")
def safety():
    return pd.read_csv(PROJECT / "results" / "safety" / "table.csv")


def assert_quoted(cells, expected):
    """Each cell is a value of the table, or the value with its interval."""
    for quoted, numbers in zip(cells, expected, strict=True):
        shown = re.findall(r"\d+", quoted)
        assert len(shown) in (1, 3), quoted
        assert all(map(is_rounded, shown, numbers)), f"{quoted}, but {numbers[0]:.2f} % {numbers[1:]} in the table"


def test_the_scorecard_of_the_safety_page(safety):
    cells, expected = [], []
    for guard, stages, steering, *rates in rows_of(section(text_of("docs/safety.md"), "### What the scorecard says")):
        method = "none" if GUARDS[guard] is None else METHODS[steering]
        system = (GUARDS[guard], LAYERS[stages], method)
        shown = RATES if len(rates) == len(RATES) else RATES[:2]
        cells += rates
        expected += [cell(safety, system, metric=name) for name in shown]
    assert len(cells) > 3 * 10
    assert_quoted(cells, expected)


def test_the_percentages_in_the_safety_pages_findings(safety):
    """Of one table, so this finds a number that is not there, and not one that is at the wrong place."""
    part = section(text_of("docs/safety.md"), "### What the scorecard says")
    prose = " ".join(line for line in part.splitlines() if line[:1] not in ("|", ">"))
    quoted = set(re.findall(r"(\d+) %", prose)) - {"95"}
    columns = ["value", "ci_low", "ci_high"]
    shares = safety.loc[safety["metric"].str.startswith(RATES), columns].to_numpy().ravel()
    assert quoted
    assert not [text for text in quoted if not any(is_rounded(text, 100 * share) for share in shares)]


def test_the_numbers_of_requests_on_the_safety_page(safety):
    part = " ".join(section(text_of("docs/safety.md"), "### What the scorecard says").split())
    counts = safety[safety["method"] == "none"].set_index("metric")
    concepts = counts.loc["not_unsafe", "n_units"]
    asked, allowed, total = map(int, re.search(
        rf"(\d+) prompts for {concepts} concepts and (\d+) allowed ones, .*? \((\d+) requests a row\)", part
    ).groups())  # fmt: skip
    groups = counts.loc[["not_unsafe", "not_overrefuse"], "n_groups"]
    assert total == groups.sum() and asked * groups["not_overrefuse"] == allowed * groups["not_unsafe"]


def test_the_guards_of_the_readme(safety):
    part = section(text_of("README.md"), "## Guard")
    cells, expected = [], []
    for system, *rates in rows_of(part):
        cells += rates
        expected += [cell(safety, SYSTEMS_OF_README[system], metric=name) for name in RATES[:2]]
    assert_quoted(cells, expected)
    (baseline,) = re.findall(r"fails to draw the concept in (\d+) %", " ".join(part.split()))
    assert_quoted([baseline], [cell(safety, SYSTEMS_OF_README["no guard"], metric="not_unsafe")])


def test_the_attacks_of_the_red_team_page():
    table = pd.read_csv(PROJECT / "results" / "redteam" / "table.csv")
    gate = pd.read_csv(PROJECT / "results" / "gate" / "table.csv")
    cells, expected = [], []
    for system, *rates, verdict in rows_of(section(text_of("docs/redteam.md"), "## What we found")):
        guard = GUARDS[system.removesuffix(", with check")]
        system = (guard, "check", "none" if guard is None else "guarded")
        cells += rates
        expected += [cell(table, system, attacker=name, metric=metric) for name, metric in ATTACKS.items()]
        judged = gate[gate["system"] == ("no guard" if guard is None else f"{guard}, check")]
        assert ("fail" in set(judged["word"])) == (verdict == "fail")
    assert_quoted(cells, expected)


def test_the_numbers_of_queries_on_the_red_team_page():
    queries = pd.read_csv(PROJECT / "results" / "redteam" / "queries.csv.gz").fillna({"guard": "none"})
    # A seed is that of the attacker, the concept, the repeat and the number of the query, the same in every system.
    pairs = queries[["attacker", "concept", "repeat", "query", "prompt"]].drop_duplicates()
    page = " ".join(text_of("docs/redteam.md").split())
    assert f"has {len(queries):,} queries with {len(pairs):,} distinct pairs of prompt and seed" in page
