"""A guard of under a million parameters that was trained on one policy, which is not in its prompt.

It is deliberative alignment (arXiv 2412.16339) as small as it gets: the policy is in the weights. Asked, it writes what
is asked for, cites the clause that it takes to apply and quotes it, and then decides. A table of names would do as
well; what each part of the training adds is in results/deliberation/table.md.
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

#: Words of the vocabulary that no prompt can hold, whose words are split at such signs.
PADDING, UNKNOWN, BEGIN, REPLY, END = "<pad>", "<unk>", "<s>", "<reply>", "<end>"
QUOTE, UNQUOTE, ANSWER = "<quote>", "</quote>", "<answer>"
#: Before an action, and before every letter of an id. Ids are spelt, so that one can be invented, as by larger models.
ACTION, LETTER = "=", "@"
#: Words of a reply, at most; signs around a prompt.
LONGEST, AROUND = 64, 2


class Mini:
    """Decides by the one policy that it was trained on, greedily: the same prompt has the same reply.

    A prompt with words that it was not trained on (other languages and alphabets, codes) it does not decide. It says
    so and replies "escalate" without a clause, which follows from no policy whose default is another action: `decide`
    makes "invalid" of that, never "allow".

    Args:
        folder: with config.json, model.safetensors and tokenizer.json, as models/mini-guard.

    Raises:
        FileNotFoundError: there is none.
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
        """Return its decision; the rationale is what it wrote before, the confidence its answer's probability.

        Raises:
            ValueError: the policy is another one than it was trained on, as it reads none; or the prompt is too long.
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
        places = zip(encoded.tokens, encoded.offsets, strict=True)
        if unknown := [prompt[start:end] for token, (start, end) in places if token == UNKNOWN]:
            shown = ", ".join(unknown[:5])
            return Decision("escalate", rationale=f"words that I was not trained on: {shown}")
        return read(*self._write(encoded.ids))

    @torch.inference_mode()
    def _write(self, ids: Sequence[int]) -> tuple[list[str], list[float]]:
        """Return the likeliest words after a prompt's, one by one, and the probability of each."""
        given = torch.tensor([ids])
        output = self.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            use_cache=True,  # which a model that was just trained does without
            max_new_tokens=LONGEST,
            output_logits=True,
            return_dict_in_generate=True,
        )
        written = output.sequences[0, len(ids) :]
        chances = torch.cat(output.logits).softmax(-1).gather(1, written[:, None])[:, 0]
        return [self.tokenizer.id_to_token(int(number)) or UNKNOWN for number in written], chances.tolist()


def read(words: Sequence[str], chances: Sequence[float] | None = None) -> Decision:
    """Return the decision in what a model wrote: `trace... <answer> =action @C @1 , @E @1 <end>`, with a quote in it.

    Args:
        words: of the vocabulary.
        chances: the probability of each word; without them there is no confidence.

    Returns:
        A decision whose action is "", which verifies against no policy, where there is not one whole answer.
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
    confidence = None if chances is None else math.prod(chances[start + 1 : start + 1 + len(answer)])
    return Decision(answer[0][len(ACTION) :], clauses, quote, spaced(words[:start]), confidence)


def spaced(words: Sequence[str]) -> str:
    """Return words as they are written: ids in one piece, quotes in marks, no space before a comma or full stop."""
    pieces: list[str] = []
    for spelt, group in itertools.groupby(words, lambda word: len(word) > 1 and word[0] == LETTER):
        part = list(group)
        pieces += ["".join(word[len(LETTER) :] for word in part)] if spelt else part
    text = " ".join('"' if word in (QUOTE, UNQUOTE) else word for word in pieces)
    return re.sub(r" ([,.:;])", r"\1", text)
