"""Check results that people sent: one JSON file for each run, in results/community/.

    python -m experiments verify results/community/*.json
    python -m experiments verify --table                   # all of them, and write results/community/README.md

A file must match results/community/schema.json and its own digest. The run id must follow from the settings, and the
commit must be in this repository. Every group must be there once, with values in the range that the metric declares.
Means, intervals, differences and tests are recomputed from the values of groups.

Faults are listed one a line, and the exit code is then 1. The images are not here, so the values of groups themselves
cannot be recomputed.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import argparse
import functools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from eval.files import verify_checksum
from eval.images import ManifestRow, WithheldRow, rows_hash
from eval.imageset import ImageSet
from eval.intervals import SUBSETS, has_value
from experiments import PROJECT
from experiments.collect import metric_classes
from experiments.community.page import write_page
from experiments.community.submission import (
    COMMUNITY,
    SCHEMA,
    documents_of,
    file_name,
    is_small,
    read_submission,
    submission_files,
)
from experiments.runs.identity import git, short_digest
from experiments.tabulate import statistics_of

#: Largest difference between a number and the recomputed one, as a share of it: processors round differently.
ROUNDING = 1e-6
#: Number of groups that a fault names.
NAMED = 3
#: Keys of a document's details that list the categories that a metric leaves out.
LEFT_OUT = ("categories_left_out", "categories_too_small")
#: Keys of a document that list groups without images: those without a value, and those that have one nevertheless.
WITHHELD = ("withheld", "counted_without_images")


def find_faults(path: Path) -> list[str]:
    """Return everything that is wrong with a submission, one line each; none: it is accepted."""
    faults = []
    try:
        for fault in _faults(read_submission(path), path):
            faults.append(fault)  # one by one: those before an error count
    except Exception as error:  # a file of somebody else may hold anything
        kind = "" if isinstance(error, ValueError | OSError) else f"damaged or foreign: {type(error).__name__}: "
        faults.append(f"{kind}{error}")
    return list(dict.fromkeys(" ".join(fault.split()) for fault in faults))


def _faults(submission: dict[str, Any], path: Path) -> Iterator[str]:
    try:
        verify_checksum(submission, path)
    except ValueError as error:
        yield str(error)
    settings = submission["settings"]
    if (digest := short_digest(settings)) != submission["run_id"]:
        yield f"run_id: expected {digest}, which the settings hash to, got {submission['run_id']}"
    if path.name != file_name(submission):
        yield f"expected the file name {file_name(submission)}, got {path.name}"
    if submission["small_model"] != is_small(settings):
        yield f"small_model: expected {is_small(settings)} for model {settings['request']['model']['name']}"
    if fault := commit_fault(submission["environment"]["commit"]):
        yield fault
    rows = [ManifestRow(**row) for row in submission["images"]]
    images = ImageSet(Path(), rows, withheld=[WithheldRow(**row) for row in submission["withheld"]])
    yield from _group_faults(settings["request"]["prompts"], images)
    baseline = None
    if submission["baseline"] is not None:
        baseline = read_submission(path.with_name(file_name(submission, submission["baseline"]["run_id"])))
        yield from _baseline_faults(submission, baseline)
    elif settings["request"]["method"]["name"] != "none":
        yield "baseline: expected the run that the differences are to, got none"
    names = Counter(score["document"]["metric"] for score in submission["scores"])
    yield from (f"{name}: expected its score once, got {count}" for name, count in names.items() if count > 1)
    references = documents_of(baseline)
    for score in submission["scores"]:
        name = score["document"]["metric"]
        if baseline is not None and name not in references:
            yield f"{name}: expected a score of the baseline too, got none"
            continue
        try:
            for fault in _score_faults(submission, score, references.get(name), images):
                yield f"{name}: {fault}"
        except ValueError as error:
            yield f"{name}: {error}"


def commit_fault(commit: str) -> str | None:
    """Return why a commit is not accepted; None if it is, or if this checkout's history cannot tell."""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return f"commit: expected a commit without later changes, got {commit}: generate from a clean checkout"
    if has_history() and git(PROJECT, "cat-file", "-t", commit) != "commit":
        return f"commit: expected one of this repository, got {commit}: fetch it, or generate from a published one"
    return None


def has_history() -> bool:
    """Return whether git knows all commits: an unpacked archive has none, and a shallow clone not all."""
    return git(PROJECT, "rev-parse", "--is-shallow-repository") == "false"


def _group_faults(prompts: Mapping[str, Any], images: ImageSet) -> Iterator[str]:
    """Yield which groups of the request are missing, not requested, or of another number of images."""
    requested = Counter(tuple(group) for group in prompts["groups"])
    rows = [*images.rows, *images.withheld]
    groups = {(row.group_id, row.category, row.prompt, row.group_seed) for row in rows}
    present = Counter(group[1:] for group in groups)
    if missing := requested - present:
        yield f"expected every requested group, missing: {_some(missing.elements())}"
    if others := present - requested:
        yield f"expected requested groups only, got {_some(others.elements())}"
    size = prompts["images_per_prompt"]
    indices = {name: [images.rows[member].index for member in members] for name, members in images.groups.items()}
    if unequal := [name for name, of_group in indices.items() if of_group != list(range(size))]:
        yield f"expected {size} images in every group, got others in {_some(unequal)}"


def _some(items: Collection[Any] | Iterator[Any]) -> str:
    texts = sorted(str(item) for item in items)
    return f"{', '.join(texts[:NAMED])}{', ...' if len(texts) > NAMED else ''} ({len(texts)})"


def _baseline_faults(submission: Mapping[str, Any], baseline: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a run must not be compared with a baseline."""
    verify_checksum(baseline, file_name(baseline))
    if baseline["sha256"] != submission["baseline"]["sha256"]:
        yield f"baseline: expected the digest of {file_name(baseline)}, got another one"
    if baseline["baseline"] is not None:
        yield f"baseline: expected a run without a method, got {file_name(baseline)}"
    ours, theirs = ({**run["settings"], "code": None} for run in (submission, baseline))
    for run in (ours, theirs):
        run["request"] = {key: value for key, value in run["request"].items() if key != "method"}
    if ours != theirs:
        different = [key for key in ours if ours[key] != theirs.get(key)]
        yield f"baseline: expected the same {', '.join(different)}, got others"


def _score_faults(
    submission: Mapping[str, Any], score: Mapping[str, Any], reference: dict[str, Any] | None, images: ImageSet
) -> Iterator[str]:
    """Yield what is wrong with a metric's values, and with the numbers that follow from them."""
    document, metric = score["document"], score["document"]["metric"]
    try:
        verify_checksum(document, f"the score {metric}")
    except ValueError as error:
        yield str(error)
    classes = metric_classes().get(metric)
    if not classes:
        yield "expected a metric of conf/metric, got another one"
        return
    if document["version"] > (newest := max(kind.version for kind in classes)):
        yield f"expected version {newest} at most, got {document['version']}"
    if document["higher_is_better"] not in {kind.higher_is_better for kind in classes}:
        yield f"higher_is_better: the metric does not declare {document['higher_is_better']}"
    values = [entry["value"] for entry in [*document["groups"], *document.get("subsets", ())] if "value" in entry]
    values += [document["value"]] if has_value(document) else []
    declared = {kind.bounds for kind in classes}
    if (None, None) not in declared and tuple(document["bounds"]) not in declared:
        yield f"bounds: the metric does not declare {document['bounds']}"
    for limits in (document["bounds"], *declared):
        if outside := [value for value in values if not _is_within(value, limits)]:
            yield f"expected values from {limits[0]} to {limits[1]}, got {_some(outside)}"
    measured = images.only(document.get("only"))
    if _images_hash(measured) != document["manifest_sha256"]:
        yield "manifest_sha256: expected the digest of the images, got another one"
    yield from _measured_faults(document, measured)
    yield from _statistics_faults(score["statistics"], recomputed(submission, score, reference))
    if has_value(document) and not _is_same(document["value"], score["statistics"]["value"]):
        yield f"value: expected the mean of the groups, {score['statistics']['value']}, got {document['value']}"


@functools.lru_cache(maxsize=4)  # most metrics measure all images, and hashing 5,600 rows takes half a second
def _images_hash(images: ImageSet) -> str:
    return rows_hash(None, images.rows)


def _is_within(value: float, limits: tuple[float | None, float | None]) -> bool:
    low, high = limits
    return (low is None or value >= low - ROUNDING) and (high is None or value <= high + ROUNDING)


def _measured_faults(document: Mapping[str, Any], images: ImageSet) -> Iterator[str]:
    """Yield which groups, or pools of groups, a metric's document lacks or has too many."""
    left_out = {category for key in LEFT_OUT for category in document.get("details", {}).get(key, ())}
    yield from _withheld_faults(document, images, left_out)
    if not has_value(document):
        if not images.withheld:
            yield "expected a value, got none although no group is withheld"
        return
    if document["aggregate"] == SUBSETS:
        if (document["n_groups"], document["n_images"]) != (len(images.groups), len(images.rows)):
            yield f"expected {len(images.groups)} groups and {len(images.rows)} images, got other numbers"
        return
    entries = {entry["group"]: (entry["category"], entry["n_images"]) for entry in document["groups"]}
    expected = _measured_groups(entries, images)
    expected = {name: entry for name, entry in expected.items() if entry[0] not in left_out}
    for entry in document.get("counted_without_images", ()):
        expected[entry["group"]] = (entry["category"], 0)
    if missing := expected.keys() - entries.keys():
        yield f"expected a value of every group, missing: {_some(missing)}"
    if others := [name for name, entry in entries.items() if expected.get(name) != entry]:
        yield f"expected the groups of the run with their categories and numbers of images, got {_some(others)}"
    if (document["n_groups"], document["n_images"]) != (len(entries), sum(n for _, n in entries.values())):
        yield "n_groups, n_images: expected the numbers of the groups, got others"


def _withheld_faults(document: Mapping[str, Any], images: ImageSet, left_out: Collection[str]) -> Iterator[str]:
    """Yield which groups a document wrongly lists as withheld, or does not list.

    A metric may measure some categories only. If a category has no image at all, nothing tells whether it does.
    """
    listed = {entry["group"] for key in WITHHELD for entry in document.get(key, ())}
    withheld = {row.group_id for row in images.withheld}
    measured = {row.category for row in images.rows} - set(left_out)
    required = {row.group_id for row in images.withheld if row.category in measured}
    if missing := required - listed:
        yield f"expected the withheld groups to be listed, missing: {_some(missing)}"
    if others := listed - withheld:
        yield f"expected a list of the withheld groups, got others: {_some(others)}"


def _measured_groups(names: Collection[str], images: ImageSet) -> dict[str, tuple[str, int]]:
    """Return category and number of images of each group by its name, or of each pool if the names are those of pools.

    Args:
        names: of a document, which does not say what its metric pools.
        images: of the run.
    """
    kinds = []
    for shared in (None, "prompt", "category"):
        pools = images.pools(shared).items()
        kinds.append({name: (images.rows[members[0]].category, len(members)) for name, members in pools})
    return max(kinds, key=lambda kind: len(kind.keys() & names))


def recomputed(
    submission: Mapping[str, Any], score: Mapping[str, Any], reference: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the statistics of a score as JSON values, computed as for a table.

    Args:
        submission: has `bootstrap`, `primary` and `settings`.
        score: has the metric's `document` and its `role`.
        reference: the baseline's document; None for a baseline.
    """
    request = submission["settings"]["request"]
    parts = {key: submission[key] for key in ("bootstrap", "primary")}
    cfg = OmegaConf.create(parts | {part: {"name": request[part]["name"]} for part in ("model", "method")})
    document = score["document"]
    statistics = statistics_of(cfg, document["metric"], score["role"], document, reference)
    is_missing = {key: isinstance(value, float) and math.isnan(value) for key, value in statistics.items()}
    return {key: None if is_missing[key] else value for key, value in statistics.items()}


def _statistics_faults(statistics: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(statistics.keys() | expected.keys()):
        if not _is_same(statistics.get(key), expected.get(key)):
            yield f"{key}: expected {expected.get(key)}, got {statistics.get(key)}"


def _is_same(value: Any, other: Any) -> bool:
    numbers = [isinstance(one, int | float) and not isinstance(one, bool) for one in (value, other)]
    return math.isclose(value, other, rel_tol=ROUNDING, abs_tol=1e-12) if all(numbers) else value is other


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser("verify", usage="python -m experiments verify [--table] [FILE ...]")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.table and arguments.files:
        raise ValueError("expected --table without files: it writes the page of all files in results/community")
    files = [file for file in arguments.files or submission_files(COMMUNITY) if file.name != SCHEMA.name]
    faults = {file: find_faults(file) for file in files}
    for file, lines in faults.items():
        for line in lines:
            print(f"{file}: {line}")
    refused = sum(map(bool, faults.values()))
    if not has_history():
        print("commits were not checked: this clone has no history")
    print(f"{len(files) - refused} of {len(files)} results are accepted")
    if arguments.table and not refused:
        print(write_page(COMMUNITY))
    return int(refused > 0)
