"""A guard of under a million parameters that was trained on one policy, which its prompt does not contain.

It is a small example of deliberative alignment (arXiv 2412.16339): it writes down the request, cites and quotes the
clause, and then decides. results/deliberation/table.md shows the effect of each part of the training.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from negtome.guard.decision import Decision
from negtome.guard.policy import Policy

#: Special words; no prompt contains them, since the tokenizer splits prompts at such signs.
PADDING, UNKNOWN, BEGIN, REPLY, END = "<pad>", "<unk>", "<s>", "<reply>", "<end>"
QUOTE, UNQUOTE, ANSWER = "<quote>", "</quote>", "<answer>"
#: Prefixes of an action, and of every letter of an id. The model spells ids, so that it can invent one.
ACTION, LETTER = "=", "@"
#: Longest reply in words, and special words around a prompt.
LONGEST, AROUND = 64, 2


class Mini:
    """Decides by the policy that it was trained on; the same prompt always has the same reply.

    If a prompt has words that it was not trained on (other languages, alphabets, codes), it replies "escalate" without
    a clause. Unless that is the policy's default, `decide` makes it "invalid", never "allow".

    Args:
        folder: with config.json, model.safetensors and tokenizer.json, as models/mini-guard.

    Raises:
        FileNotFoundError: the folder has no model.
    """

    name = "mini"

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"expected a trained guard in {folder}, got no config.json: make mini-guard trains one"
            )
        weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        self.id = f"mini-1-{weights[:12]}"
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.policy_sha256 = json.loads((folder / "config.json").read_text(encoding="utf-8"))["policy_sha256"]
        self.longest = self.model.config.max_position_embeddings - LONGEST - AROUND

    def reply(self, policy: Policy, prompt: str) -> Decision:
        """Return its decision; the rationale is its text before the answer, the confidence the answer's probability.

        Raises:
            ValueError: it was trained on another policy, or the prompt is too long.
        """
        if policy.sha256 != self.policy_sha256:
            raise ValueError(
                f"expected the policy that this guard was trained on, sha256 {self.policy_sha256[:12]}, got "
                f"{policy.sha256[:12]}: it reads none; train one with make mini-guard, or ask another guard"
            )
        encoded = self.tokenizer.encode(prompt)
        if len(encoded.ids) > self.longest + AROUND:
            got = len(encoded.ids) - AROUND
            raise ValueError(f"expected a prompt of at most {self.longest} words and signs, got {got}: shorten it")
        spans = zip(encoded.tokens, encoded.offsets, strict=True)
        if unknown := [prompt[start:end] for token, (start, end) in spans if token == UNKNOWN]:
            return Decision("escalate", rationale=f"words that I was not trained on: {', '.join(unknown[:5])}")
        return read(*self._write(encoded.ids))

    @torch.inference_mode()
    def _write(self, ids: Sequence[int]) -> tuple[list[str], list[float]]:
        """Return the likeliest reply, word by word, and the probability of each word."""
        prompt = torch.tensor([ids])
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            use_cache=True,  # training leaves it off
            max_new_tokens=LONGEST,
            output_logits=True,
            return_dict_in_generate=True,
        )
        written = output.sequences[0, len(ids) :]
        probabilities = torch.cat(output.logits).softmax(-1).gather(1, written[:, None])[:, 0]
        return [self.tokenizer.id_to_token(int(token)) or UNKNOWN for token in written], probabilities.tolist()


def read(words: Sequence[str], probabilities: Sequence[float] | None = None) -> Decision:
    """Read the decision in a reply such as `trace... <answer> =action @C @1 , @E @1 <quote> ... </quote> <end>`.

    Args:
        words: of the vocabulary.
        probabilities: of the words; None: the decision has no confidence.

    Returns:
        The decision; its action is "", which verifies against no policy, unless there is one complete answer.
    """
    words = list(words)
    if words.count(END) != 1 or words.count(ANSWER) != 1 or words.count(QUOTE) != words.count(UNQUOTE):
        return Decision("", rationale=spaced(words))
    end, start = words.index(END), words.index(ANSWER)
    quote = spaced(words[words.index(QUOTE) + 1 : words.index(UNQUOTE)]) if QUOTE in words else ""
    answer = list(itertools.takewhile(lambda word: word != QUOTE, words[start + 1 : end]))
    spelt = [[*part] for sign, part in itertools.groupby(answer[1:], lambda word: word == ",") if not sign]
    if not answer or not answer[0].startswith(ACTION) or any(word[0] != LETTER for part in spelt for word in part):
        return Decision("", rationale=spaced(words))
    clauses = tuple("".join(word[len(LETTER) :] for word in part) for part in spelt)
    confidence = None if probabilities is None else math.prod(probabilities[start + 1 : start + 1 + len(answer)])
    return Decision(answer[0][len(ACTION) :], clauses, quote, spaced(words[:start]), confidence)


def spaced(words: Sequence[str]) -> str:
    """Return words as a text: ids joined, quotes in quotation marks, no space before punctuation."""
    pieces: list[str] = []
    for spelt, group in itertools.groupby(words, lambda word: len(word) > 1 and word[0] == LETTER):
        part = list(group)
        pieces += ["".join(word[len(LETTER) :] for word in part)] if spelt else part
    text = " ".join('"' if word in (QUOTE, UNQUOTE) else word for word in pieces)
    return re.sub(r" ([,.:;])", r"\1", text)
