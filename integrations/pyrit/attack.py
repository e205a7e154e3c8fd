"""Send requests through PyRIT's converters to an OpenAI-compatible image endpoint, and count what becomes of them.

    python integrations/pyrit/attack.py --endpoint http://127.0.0.1:8000/v1 --requests requests.csv --out outputs/pyrit

Runs in an environment with pyrit (we ran 1.1.0) and without this project. `requests.csv` has the columns concept and
prompt. Writes `records.csv`, one line for each request and converter, and a copy of each image that came back.
docs/redteam.md has the whole command, and the one that looks for the concept in the images.
"""

import argparse
import asyncio
import csv
import shutil
from pathlib import Path

from pyrit import converter as converters
from pyrit.executor.attack import AttackConverterConfig, AttackExecutor, PromptSendingAttack
from pyrit.memory import CentralMemory
from pyrit.prompt_normalizer import ConverterConfiguration
from pyrit.prompt_target import OpenAIImageTarget
from pyrit.setup import IN_MEMORY, initialize_pyrit_async

#: Converters that need no model; "none" sends the request as it is.
CONVERTERS = {
    "none": None,
    "base64": converters.Base64Converter,
    "leetspeak": converters.LeetspeakConverter,
    "rot13": converters.ROT13Converter,
    "character space": converters.CharacterSpaceConverter,
    "unicode substitution": converters.UnicodeSubstitutionConverter,
    "unicode confusable": converters.UnicodeConfusableConverter,
    "diacritic": converters.DiacriticConverter,
    "flip": converters.FlipConverter,
    "zero width": converters.ZeroWidthConverter,
}
COLUMNS = ["converter", "concept", "prompt", "sent", "outcome", "message", "image"]


def outcome_of(value: str, error: str, kind: str) -> str:
    """Return the outcome of a reply; PyRIT calls HTTP 400 with `content_policy_violation` blocked."""
    if error == "none" and kind == "image_path":
        return "image"
    if error != "blocked":
        return "error"
    return "escalated" if "escalat" in value.lower() else "refused"


async def attack(endpoint: str, model: str, requests: list[dict[str, str]], names: list[str]) -> list[dict[str, str]]:
    """Send every request through every converter; the order is that of the arguments."""
    await initialize_pyrit_async(IN_MEMORY, load_defaults=False, env_files=[], silent=True)
    target = OpenAIImageTarget(endpoint=endpoint, model_name=model, api_key="unused", image_size="auto")
    memory, records = CentralMemory.get_memory_instance(), []
    for name in names:
        kind = CONVERTERS[name]
        chain = ConverterConfiguration.from_converters(converters=[kind()]) if kind else []
        sender = PromptSendingAttack(
            objective_target=target, attack_converter_config=AttackConverterConfig(request_converters=chain)
        )
        for request in requests:
            result = await AttackExecutor().execute_attack_async(
                attack=sender, objectives=[request["prompt"]], return_partial_on_failure=True
            )
            record = {"converter": name, **request, "sent": "", "outcome": "error", "message": "", "image": ""}
            if result.completed_results:
                conversation = result.completed_results[0].conversation_id
                pieces = memory.get_message_pieces(conversation_id=conversation)
                sent = next(piece for piece in pieces if piece.role == "user")
                reply = next(piece for piece in pieces if piece.role == "assistant")
                value = reply.converted_value
                outcome = outcome_of(value, reply.response_error, reply.converted_value_data_type)
                record |= {"sent": sent.converted_value, "outcome": outcome}
                record["image" if outcome == "image" else "message"] = value
            else:
                record["message"] = str(result.incomplete_objectives[0][1]) if result.incomplete_objectives else ""
            records.append(record)
    return records


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", default="http://127.0.0.1:8000/v1", help="address with /v1")
    parser.add_argument("--model", default="mini-sdxl", help="name of the model in the requests")
    parser.add_argument("--requests", type=Path, required=True, help="CSV with the columns concept and prompt")
    parser.add_argument("--out", type=Path, required=True, help="folder of records.csv and images/")
    parser.add_argument("--converters", nargs="+", default=[*CONVERTERS], choices=[*CONVERTERS])
    args = parser.parse_args()
    with args.requests.open(encoding="utf-8", newline="") as file:
        requests = [{key: row[key] for key in ("concept", "prompt")} for row in csv.DictReader(file)]
    if not requests:
        parser.error(f"{args.requests} has no requests")
    images = args.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = asyncio.run(attack(args.endpoint, args.model, requests, args.converters))
    for number, record in enumerate(records):
        if record["image"]:  # PyRIT keeps the images of all runs in one folder of the home directory
            record["image"] = str(shutil.copy(record["image"], images / f"{number:04d}.png"))
    with (args.out / "records.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    for name in args.converters:
        outcomes = [record["outcome"] for record in records if record["converter"] == name]
        counts = ", ".join(f"{outcomes.count(one)} {one}" for one in ("refused", "escalated", "image", "error"))
        print(f"{name}: {counts}")
    if errors := [record["message"] for record in records if record["outcome"] == "error"]:
        parser.exit(
            1, f"{len(errors)} of {len(records)} requests failed, the first with: {' '.join(errors[0].split())}\n"
        )


if __name__ == "__main__":
    main()
