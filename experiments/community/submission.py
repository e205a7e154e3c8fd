"""The form of a submission: a JSON file for one run, its name and its schema."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from eval.files import canonical_json, read_json, read_regular
from experiments import PROJECT

#: Folder of the files that people sent.
COMMUNITY = PROJECT / "results" / "community"
SCHEMA = COMMUNITY / "schema.json"


def file_name(submission: Mapping[str, Any], run_id: str | None = None) -> str:
    """Return the name of a submission's file, or of that of another run of the same experiment."""
    return f"{submission['experiment']}-{run_id or submission['run_id']}.json"


def is_small(settings: Mapping[str, Any]) -> bool:
    """Return whether a run's settings are of one of this project's small models."""
    return settings["request"]["model"]["kind"] == "mini"


def documents_of(submission: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return the documents of a submission's scores by the names of their metrics; {} without a submission."""
    scores = [] if submission is None else submission["scores"]
    return {score["document"]["metric"]: score["document"] for score in scores}


def read_submission(path: Path) -> dict[str, Any]:
    """Read a submission and check its form.

    Raises:
        OSError: there is no such file.
        ValueError: it is not canonical JSON, or does not match the schema.
    """
    submission = read_json(path)
    try:
        text = canonical_json(submission)
    except ValueError:
        raise ValueError("expected finite numbers, got NaN or infinity") from None
    if read_regular(path).decode().strip() != text:
        raise ValueError("expected canonical JSON as submit writes it, got another spelling or a key twice")
    if error := best_match(_validator().iter_errors(submission)):
        message = error.message if len(error.message) < 200 else f"{error.message[:100]} ... {error.message[-100:]}"
        raise ValueError(f"{error.json_path}: {' '.join(message.split())}")
    return submission


@functools.cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def submission_files(folder: Path) -> list[Path]:
    """Return the submissions in a folder: all JSON files except the schema."""
    return sorted(file for file in folder.glob("*.json") if file.name != SCHEMA.name)
