"""Export of submissions in the format of Every Eval Ever, https://github.com/evaleval/every_eval_ever."""

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.files import canonical_json, write_json
from negtome.version import __version__

#: Version of its schema, every_eval_ever/schemas/eval.schema.json.
SCHEMA_VERSION = "0.3.0"


def write_export(submission: Mapping[str, Any], folder: Path) -> Path:
    """Write a submission's export where the database keeps it: `data/<benchmark>/<developer>/<model>/<uuid>.json`."""
    export = to_every_eval_ever(submission)
    developer, model = _developer_and_model(submission["settings"]["request"]["model"])
    name = f"{uuid.uuid5(uuid.NAMESPACE_URL, submission['sha256'])}.json"
    return write_json(folder / "data" / f"negtome-{submission['experiment']}" / developer / model / name, export)


def to_every_eval_ever(submission: Mapping[str, Any]) -> dict[str, Any]:
    """Return a submission as a record of one model and method, with a result for each metric that has a value.

    Metrics without a better direction are left out, because the format needs one.
    """
    request, machine = submission["settings"]["request"], submission["settings"]["machine"]
    model, method = request["model"], request["method"]
    developer, name = _developer_and_model(model)
    created = str(int(time.time()))
    scores = [score for score in submission["scores"] if score["document"]["higher_is_better"] is not None]
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"negtome-{submission['experiment']}/{developer}_{name}/{submission['run_id']}/{created}",
        "evaluation_timestamp": submission["environment"]["date"],
        "retrieved_timestamp": created,
        "source_metadata": {
            "source_name": "negtome",
            "source_type": "evaluation_run",
            "source_organization_name": "contributors of negtome",
            "evaluator_relationship": "third_party",
        },
        "eval_library": {
            "name": "negtome",
            "version": __version__,
            "additional_details": {"commit": submission["environment"]["commit"]},
        },
        "model_info": {
            "name": f"{model['name']} with {method['name']}",
            "id": f"{developer}/{name}",
            "developer": developer,
            "inference_engine": {"name": "diffusers", "version": machine["diffusers"]},
            "additional_details": {
                "deployment_type": "self_deployed",
                "model_availability": "open_weights",
                "revision": str(model["revision"]),
                "dtype": model["dtype"],
                "weights": submission["settings"]["weights"],
                "method": method["name"],
                "method_settings": canonical_json(method["settings"]),
                "small_model": str(submission["small_model"]).lower(),
                "device": machine["device"],
            },
        },
        "evaluation_results": [
            _result(submission, score) for score in scores if score["statistics"]["value"] is not None
        ],
    }


def _developer_and_model(model: Mapping[str, Any]) -> tuple[str, str]:
    """Return the two parts of a checkpoint's name on the hub; a local folder is named by its configuration."""
    parts = model["source"].split("/")
    on_hub = model["kind"] != "mini" and len(parts) == 2 and all(parts)
    return (parts[0], parts[1]) if on_hub else ("local", model["name"])


def _result(submission: Mapping[str, Any], score: Mapping[str, Any]) -> dict[str, Any]:
    document, statistics = score["document"], score["statistics"]
    request, metric = submission["settings"]["request"], document["metric"]
    metric_config = {
        "metric_id": f"negtome.{metric}",
        "metric_name": metric,
        "metric_unit": document["unit"],
        "evaluation_description": document.get("description", metric),
        "lower_is_better": not document["higher_is_better"],
        "additional_details": {"encoder": document["encoder"]["id"], "version": str(document["version"])},
    }
    low, high = document["bounds"]
    if low is not None and high is not None:  # the format knows no scale that is open at an end
        metric_config |= {"score_type": "continuous", "min_score": low, "max_score": high}
    compared = ("difference", "difference_low", "difference_high", "p_value", "n_units")
    details = {key: str(statistics[key]) for key in compared if statistics.get(key) is not None}
    uncertainty: dict[str, Any] = {"num_samples": statistics["n_groups"]}
    if statistics["ci_low"] is not None:
        uncertainty["confidence_interval"] = {
            "lower": statistics["ci_low"],
            "upper": statistics["ci_high"],
            "confidence_level": submission["bootstrap"]["level"],
            "method": "half-sampling" if document["aggregate"] == "subsets" else "bootstrap over clusters",
        }
    return {
        "evaluation_result_id": f"{submission['run_id']}/{metric}",
        "evaluation_name": f"negtome {submission['experiment']}: {metric}",
        "source_data": {"dataset_name": f"negtome prompts: {request['prompts']['name']}", "source_type": "other"},
        "evaluation_timestamp": submission["environment"]["date"],
        "metric_config": metric_config,
        "score_details": {"score": statistics["value"], "details": details, "uncertainty": uncertainty},
        "generation_config": {"additional_details": {"call": canonical_json(request["model"]["call"])}},
    }
