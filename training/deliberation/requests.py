"""Requests to an image generator and the clauses they fall under, made by a program, so that labels are exact."""

import functools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from experiments import PROJECT
from experiments.prompts import HARMLESS
from negtome.guard.mini import ACTION, ANSWER, BEGIN, END, LETTER, PADDING, QUOTE, REPLY, UNKNOWN, UNQUOTE
from negtome.guard.policy import ACTIONS, Policy

#: The parts that requests are made of, the evaluation's characters and wrappers, and the policy.
PARTS_FILE = Path(__file__).with_suffix(".yaml")
PARTS = yaml.safe_load(PARTS_FILE.read_text(encoding="utf-8"))
CHARACTERS = PROJECT / "conf" / "characters" / "mini.yaml"
EVALUATION = PROJECT / "conf" / "prompts" / "safety.yaml"
POLICY = PROJECT / "conf" / "safety" / "policy.yaml"
#: The captions that the small image models read; their words are the vocabulary.
CAPTIONS = PROJECT / "models" / "mini-flux" / "tokenizer_2" / "tokenizer.json"
#: A word or a sign; letters, marks and digits of any alphabet stay together.
WORD = r"[\p{L}\p{M}\p{N}]+|[^\s]"
#: Words that join things and are no nouns.
JOINTS = frozenset(PARTS["joints"])
#: Words of a trace.
TRACE_WORDS = ("asks", "for", "as", "a", "parody", ".", "no", "clause", ",")


@dataclass(frozen=True)
class Request:
    """A prompt and the clauses of the policy that apply to it.

    Attributes:
        text: the prompt.
        thing: its words for the thing that it asks for.
        clauses: ids of the clauses that apply, exceptions last.
        kind: how it was made, or its kind in the evaluation.
        about: the asset that it is about or near to, or "".
    """

    text: str
    thing: str
    clauses: tuple[str, ...]
    kind: str
    about: str = ""


def words_of(text: str) -> list[str]:
    """Return the words and signs of a text as the tokenizer splits it, in small letters."""
    return re.findall(r"[^\W_]+|[^\s]", text.lower())


@functools.cache
def characters() -> Mapping[str, Mapping[str, Sequence[str]]]:
    """Return the prompts about each character that the evaluation is made of."""
    return yaml.safe_load(CHARACTERS.read_text(encoding="utf-8"))


@functools.cache
def caption_words() -> tuple[str, ...]:
    """Return the words of the captions that the small image models read."""
    pieces = json.loads(CAPTIONS.read_text(encoding="utf-8"))["model"]["vocab"]
    words = {word for piece, _ in pieces if piece.startswith("▁") for word in words_of(piece[1:])}
    return tuple(sorted(word for word in words if word.isalpha() and word.isascii()))


def unwrapped(prompt: str) -> str:
    """Return a prompt of the evaluation without its template."""
    return re.sub(r"^(?:a photo of a|an emoji of) ", "", prompt)


def evaluation(policy: Policy) -> list[Request]:
    """Return the evaluation's prompts: every kind as it stands, and every wrapper around every character's prompts.

    The kind of a wrapped prompt is its wrapper's, such as "jailbroken", or "harmless_jailbroken" around a benign
    prompt; the wrapper itself follows after a slash.
    """
    wrappers = yaml.safe_load(EVALUATION.read_text(encoding="utf-8"))["wrappers"]
    parody = policy.exceptions[0].id
    requests = []
    for clause in policy.clauses:
        prompts = characters()[clause.asset]
        for kind, texts in prompts.items():
            cited = (clause.id,) if kind in ("direct", "indirect") else ()
            requests += [Request(text, unwrapped(text), cited, kind, clause.asset) for text in texts]
        for kind, text in ((kind, text) for kind, texts in wrappers.items() for text in texts):
            cited = (clause.id, parody) if kind == "parody" else (clause.id,)
            for name, inner, ids in ((kind, "direct", cited), (f"{HARMLESS}{kind}", "benign", ())):
                requests += [
                    Request(text.replace("{}", prompt), unwrapped(prompt), ids, f"{name}/{text}", clause.asset)
                    for prompt in prompts[inner]
                ]
    return requests


class Maker:
    """Makes requests about a policy's assets and things near to them.

    Args:
        policy: whose clauses and first exception apply.
        seed: of every draw.
        development: whether to draw from the templates, wrappers and things on which settings are chosen.

    Raises:
        ValueError: an asset of the policy has no descriptions among the parts.
    """

    def __init__(self, policy: Policy, seed: int | str, development: bool = False) -> None:
        self.policy, self.random, self.development = policy, random.Random(str(seed)), development
        development_parts = PARTS["development"]
        if unknown := [name.asset for name in policy.clauses if name.asset not in PARTS["descriptions"]]:
            raise ValueError(f"expected descriptions of every asset in {PARTS_FILE}, got none of {', '.join(unknown)}")
        self.parts = {**PARTS, **development_parts} if development else PARTS
        self.wrappers = [*self.parts["wrappers"], *([] if development else PARTS["wrappers_of_the_evaluation"])]
        prompts = {clause.asset: characters()[clause.asset] for clause in policy.clauses}
        self.names = {clause.asset: clause.names for clause in policy.clauses}
        self.tags = {
            name: [unwrapped(text) for text in kinds["indirect"] if text.startswith("an emoji")]
            for name, kinds in prompts.items()
        }
        named = [text for texts in (*self.names.values(), *self.tags.values()) for text in texts]
        self.protected_words = {tuple(words_of(text)) for text in named}
        single = {words[0] for words in self.protected_words if len(words) == 1}
        self.fillers = [w for w in caption_words() if w not in JOINTS | single | {"emoji", "photo"} and len(w) > 2]
        others = [text for kinds in prompts.values() for kind in ("benign", "near", "generic") for text in kinds[kind]]
        self.withheld = {tuple(words_of(unwrapped(text))) for text in [*others, *development_parts["things"]]}
        self.prompts = {tuple(words_of(request.text)) for request in evaluation(policy)}

    def draw(self, n: int) -> list[Request]:
        """Return n different requests, half of which fall under a clause."""
        requests: dict[tuple[str, ...], Request] = {}
        while len(requests) < n:
            request = self.wrap(self._violating() if self.random.random() < 0.5 else self._harmless())
            words = tuple(words_of(request.text))
            if words not in self.prompts:
                requests.setdefault(words, request)
        return list(requests.values())

    def _violating(self) -> Request:
        clause = self.random.choice(self.policy.clauses)
        kind = self.random.choices(["direct", "indirect", "described"], [4, 2, 3])[0]
        if kind == "indirect" and self.tags[clause.asset]:
            thing = self.random.choice(self.tags[clause.asset])
            text = self.random.choice(self.parts["tags"]).replace("{n}", thing)
        elif kind == "described":
            marks = PARTS["descriptions"][clause.asset]["marks"]
            thing = self._described(clause.asset, self.random.sample(marks, self.random.randint(2, len(marks))))
            text = self.ask(thing, "")
        else:
            thing = self.random.choice(clause.names)
            text = self.ask(thing)
        return Request(text, thing, (clause.id,), kind, clause.asset)

    def _harmless(self) -> Request:
        kind = self.random.choices(["any", "near", "like"], [3, 4, 3])[0]
        asset = self.random.choice([*self.names])
        article = None
        while True:
            if self.development and kind != "like":
                thing = self.random.choice(self.parts["things"])
            elif kind == "any":
                thing = self.draw_thing()
            elif kind == "near":
                thing = self._near(asset)
            else:
                thing, article = self._like(asset), ""
            words = tuple(words_of(thing))
            if words not in self.protected_words and (self.development or not self._is_withheld(words)):
                return Request(self.ask(thing, article), thing, (), kind, asset)

    def _is_withheld(self, words: tuple[str, ...]) -> bool:
        """Tell whether a thing is one of the evaluation's, or contains one that has several words."""
        parts = {words[i:j] for i in range(len(words)) for j in range(i + 2, len(words) + 1)}
        return words in self.withheld or bool(parts & self.withheld)

    def draw_thing(self) -> str:
        """Return one to three words of captions that name no asset."""
        words = self.random.choices(self.fillers, k=self.random.choices([1, 2, 3], [3, 4, 1])[0])
        if len(words) > 1 and self.random.random() < 0.3:
            words.insert(1, self.random.choice(["with", "of", "in", "on", "and a", "with a"]))
        return " ".join(words)

    def _near(self, asset: str) -> str:
        """Return a benign near-miss: listed, a name before a noun ("genie shelf") or part of one ("pile of socks")."""
        way, noun = self.random.random(), self.random.choice(self.fillers)
        if way < 0.3:
            return self.random.choice(PARTS["near"])
        words = words_of(self.random.choice([*self.names[asset], *self.tags[asset]]))
        if way < 0.65 or len(words) == 1:
            return " ".join([*words, noun])
        return " ".join([*words[:-1], noun]) if self.random.random() < 0.6 else " ".join([noun, *words[1:]])

    def _like(self, asset: str) -> str:
        """Return a thing that shares a kind or one mark with an asset, and no more."""
        marks = PARTS["descriptions"][asset]["marks"]
        way = self.random.random()
        if way < 0.35:
            return self._described(asset, [self.random.choice(marks)])
        if way < 0.7:  # the mark of another asset, whose kind is another thing
            other = self.random.choice([name for name in self.names if name != asset])
            return self._described(asset, [self.random.choice(PARTS["descriptions"][other]["marks"])])
        start = self.random.choice(PARTS["descriptions"][asset]["kinds"])
        return f"{start} {self.random.choice(['with a', 'in a', 'and a', 'on a'])} {self.random.choice(self.fillers)}"

    def _described(self, asset: str, marks: Sequence[Sequence[str]]) -> str:
        chosen = [self.random.choice(mark) for mark in marks]
        joint = self.random.choice([" ", " and ", " , "])
        return f"{self.random.choice(PARTS['descriptions'][asset]['kinds'])} {joint.join(chosen)}"

    def ask(self, thing: str, article: str | None = None) -> str:
        """Return a prompt that asks for a thing; `article` is "" for things that have one, None for a random one."""
        template = self.random.choice(self.parts["asks"])
        if article is None:
            article = self.random.choice(["a ", "a ", "a ", "the ", "an " if thing[0] in "aeiou" else "a ", "one "])
        text = template.replace("{a}", f"{article}{thing}").replace("{n}", thing)
        return text.replace("{b}", f"a {self.random.choice(self.fillers)}")

    def wrap(self, request: Request) -> Request:
        """Return a request as it is, as one for a parody, or in wrappers that change nothing."""
        text, cited, kind = request.text, request.clauses, request.kind
        if self.random.random() < 0.15:
            text = self.random.choice(self.parts["parodies"]).replace("{}", text)
            cited, kind = cited + tuple(part.id for part in self.policy.exceptions[: len(cited)]), f"{kind} parody"
        for _ in range(self.random.choices([0, 1, 2], [5, 4, 1])[0]):
            text = self.random.choice(self.wrappers).replace("{}", text)
            kind = f"{kind.removesuffix(' wrapped')} wrapped"
        return Request(text, request.thing, cited, kind, request.about)


def unprotected(policy: Policy, seed: int | str, n: int, trace: bool) -> list[tuple[str, list[str]]]:
    """Return prompts about things of no clause, and replies of the right form but random content.

    Half of them cite a random clause, some the exception too, with a random action, and quote the thing itself: a model
    that learnt from these knows how a reply is written, and nothing of the policy.
    """
    maker, pairs = Maker(policy, f"unprotected/{seed}"), []
    draw = maker.random
    for _ in range(n):
        joint = draw.choice(["with", "and", "in"])
        thing = maker.draw_thing() if draw.random() < 0.5 else f"{maker.draw_thing()} {joint} {maker.draw_thing()}"
        request = maker.wrap(Request(maker.ask(thing), thing, (), "any"))
        cited = [draw.choice(policy.clauses).id] if draw.random() < 0.5 else []
        if cited and draw.random() < 0.2:
            cited.append(policy.exceptions[0].id)
        action = draw.choice(ACTIONS) if cited else policy.default
        quote = [QUOTE, *words_of(thing), UNQUOTE] if cited else []
        pairs.append((request.text, _reply(thing, _parody(request), cited, action, quote, trace)))
    return pairs


def spell(ids: Sequence[str]) -> list[str]:
    """Return ids in letters, as the guard writes them."""
    words: list[str] = []
    for name in ids:
        words += [","] if words else []
        words += [LETTER + letter for letter in name]
    return words


def reply_to(policy: Policy, request: Request, trace: bool) -> list[str]:
    """Return the words of the right reply, which quotes the policy: the last clause or exception that applies.

    Args:
        trace: whether the thing and the quote stand before the answer, or the quote alone after it.
    """
    cited = list(request.clauses)
    last = policy[cited[-1]] if cited else None
    quote = [QUOTE, *words_of(getattr(last, "description", None) or last.text), UNQUOTE] if last else []
    return _reply(request.thing, _parody(request), cited, policy.action_of(cited), quote, trace)


def _parody(request: Request) -> str:
    return "as a parody" if request.kind.removesuffix(" wrapped").endswith(" parody") else ""


def _reply(thing: str, parody: str, cited: Sequence[str], action: str, quote: Sequence[str], trace: bool) -> list[str]:
    answer = [ANSWER, ACTION + action, *spell(cited)]
    if not trace:
        return [*answer, *quote, END]
    trace_words = ["asks", "for", *words_of(thing), *words_of(parody), "."]
    return [*trace_words, *(spell(cited) or ["no", "clause"]), *quote, *answer, END]


def build_tokenizer(policy: Policy) -> Tokenizer:
    """Return a tokenizer of whole words, with those of captions, requests and replies, and the signs of a reply."""
    texts = [*_texts(PARTS), *(part.line for part in (*policy.clauses, *policy.exceptions))]
    texts += [name for clause in policy.clauses for name in (*clause.names, *clause.violates, *clause.allowed)]
    texts += [text for kinds in characters().values() for text in kinds["indirect"]]
    texts += [*map(str, range(21)), ".,:;!?-()[]{}<>\"'=/&+", "photo painting i"]
    words = {word for text in texts for word in words_of(text)} | {*caption_words(), *TRACE_WORDS}
    letters = sorted({letter for part in (*policy.clauses, *policy.exceptions) for letter in part.id} | {*"0123456789"})
    signs = [PADDING, UNKNOWN, BEGIN, REPLY, END, QUOTE, UNQUOTE, ANSWER, *(ACTION + name for name in ACTIONS)]
    vocabulary = [*signs, *(LETTER + letter for letter in letters), *sorted(words)]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {REPLY}", special_tokens=[(sign, numbers[sign]) for sign in (BEGIN, REPLY)]
    )
    return tokenizer


def _texts(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    else:
        for inner in part.values() if isinstance(part, Mapping) else part:
            yield from _texts(inner)
