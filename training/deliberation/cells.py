"""The models that are compared: which stages a guard is trained by, with a trace or without, from which seed."""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from eval.files import content_hash, write_json
from experiments.runs.identity import short_digest
from experiments.runs.locks import locked
from negtome.guard.policy import Policy
from training.deliberation import fit, requests
from training.deliberation.requests import Maker

#: Each stage goes on from another one. The model of "none" knows the form of a reply, and nothing of the policy.
STAGES: Mapping[str, str | None] = {"none": None, "SFT": "none", "RL": "none", "SFT + RL": "SFT"}
#: Files that every model depends on.
SOURCES = [Path(requests.__file__), Path(requests.__file__).with_suffix(".yaml"), Path(fit.__file__)]


@dataclass(frozen=True)
class Sizes:
    """Amounts of training data, by stage.

    Attributes:
        form: replies about things of no clause, before all stages.
        examples: right replies; chosen on the development requests, so that rewards have room to add.
        steps: of rewards, each of `fit.PROMPTS` requests.
        rate: learning rate of rewards; the best of 5e-4, 1e-4 and 3e-5 on the development requests.
    """

    form: int = 4000
    examples: int = 6000
    steps: int = 40
    rate: float = 3e-5


@dataclass(frozen=True)
class Cell:
    """One trained model."""

    stage: str
    trace: bool
    seed: int

    @property
    def before(self) -> "Cell | None":
        """The cell that this one goes on from; the model of the form alone is one for all seeds."""
        stage = STAGES[self.stage]
        if stage is None:
            return None
        return Cell(stage, self.trace, self.seed if STAGES[stage] else 0)


def all_cells(seeds: int) -> list[Cell]:
    """Return all cells, each after the one that it goes on from."""
    product = itertools.product(range(seeds), (True, False), STAGES)
    return [Cell(stage, trace, seed) for seed, trace, stage in product if seed == 0 or STAGES[stage]]


def train_cell(cell: Cell, sizes: Sizes, policy: Policy, root: Path) -> Path:
    """Train a cell and those before it, unless they are trained already.

    Returns:
        Its folder, named by a digest of all that it depends on.
    """
    folder = root / digest(cell, sizes, policy)
    with locked(root / f".{folder.name}.lock"):  # other cells may go on from it too
        if (folder / "cell.json").exists():
            return folder
        tokenizer = requests.build_tokenizer(policy)
        if cell.before is None:
            model = fit.new_model(policy, tokenizer, cell.seed)
            pairs = requests.unprotected(policy, cell.seed, sizes.form, cell.trace)
            fit.fit_examples(model, tokenizer, pairs, cell.seed)
        else:
            before = train_cell(cell.before, sizes, policy, root)
            model = LlamaForCausalLM.from_pretrained(before, dtype=torch.float32, attn_implementation="eager")
            if cell.stage == "SFT":
                pairs = draw_examples(policy, f"examples/{cell.seed}", sizes.examples, cell.trace)
                fit.fit_examples(model, tokenizer, pairs, cell.seed)
            else:
                rewarded = Maker(policy, f"rewards/{cell.seed}").draw(sizes.steps * fit.PROMPTS)
                fit.fit_rewards(model, tokenizer, policy, rewarded, cell.seed, sizes.rate)
        save(model, tokenizer, folder)
        write_json(folder / "cell.json", asdict(cell) | asdict(sizes))
    return folder


def digest(cell: Cell, sizes: Sizes, policy: Policy) -> str:
    """Return 12 digits of all that a cell's model depends on; the sizes of stages after it are not among them."""
    used = asdict(sizes)
    if "RL" not in cell.stage:
        del used["steps"], used["rate"]
    if "SFT" not in cell.stage:
        del used["examples"]
    return short_digest([asdict(cell), used, policy.sha256, [content_hash(path) for path in SOURCES]])


def draw_examples(policy: Policy, seed: int | str, n: int, trace: bool) -> list[tuple[str, list[str]]]:
    """Return n requests and the right replies to them."""
    drawn = Maker(policy, seed).draw(n)
    return [(request.text, requests.reply_to(policy, request, trace)) for request in drawn]


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that `negtome.guard.Mini` reads, weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
