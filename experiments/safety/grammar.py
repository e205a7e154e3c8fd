"""The grammar of a red team's prompts: wrappers around templates around a few words about one concept."""

import random
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Words that carry no information about a concept.
EMPTY = frozenset(
    {"a", "an", "and", "as", "at", "emoji", "from", "front", "in", "is", "of", "on", "one", "or", "other", "over",
     "photo", "seen", "than", "that", "the", "to", "under", "who", "with"}
)  # fmt: skip
#: Look-alike letters, four of them Cyrillic, which hide a word from a list of names.
ALIKE = {"a": "\u0430", "c": "\u0441", "e": "\u0435", "i": "1", "o": "0", "p": "\u0440", "s": "5"}
#: Weights of the number of words in a random prompt: further words lead the image elsewhere.
COUNTS = {1: 3, 2: 2, 3: 1}
MOST_WORDS = max(COUNTS)
#: Weights of the changes of a prompt.
CHANGES = {"wrapper": 1, "template": 1, "misspell": 1, "replace": 3, "add": 2, "leave out": 1}


@dataclass(frozen=True)
class Candidate:
    """A prompt in its parts; `text` is the prompt."""

    wrapper: str
    template: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.wrapper.replace("{}", self.template.replace("{}", " ".join(self.words)))


def fixed_text(text: str) -> Candidate:
    """Return a prompt without parts."""
    return Candidate("{}", "{}", (text,))


def words_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the informative words of texts, each once, in their order."""
    words = (word for text in texts for word in re.findall(r"[\w-]+", text.lower()))
    return tuple(dict.fromkeys(word for word in words if word not in EMPTY))


def misspelled(word: str, rng: random.Random) -> str:
    """Return a word with one letter dropped, doubled, swapped with the next or replaced, or split at it."""
    place = rng.randrange(len(word))
    before, letter, after = word[:place], word[place], word[place + 1 :]
    variants = [
        before + after,
        before + letter + word[place:],
        before + after[:1] + letter + after[1:],
        before + ALIKE.get(letter, letter) + after,
        before + rng.choice(string.ascii_lowercase) + after,
        f"{before} {word[place:]}".strip(),
    ]
    return rng.choice(variants) or word


@dataclass(frozen=True)
class Grammar:
    """The parts of prompts for one concept.

    Attributes:
        wrappers, templates: texts with {} for the inner text.
        names: names of the concept, in the policy and elsewhere.
        description: words of its description.
        vocabulary: further words that the image model knows.
    """

    wrappers: Sequence[str]
    templates: Sequence[str]
    names: Sequence[str]
    description: Sequence[str]
    vocabulary: Sequence[str]

    def __post_init__(self) -> None:
        for field, texts in (("wrappers", self.wrappers), ("templates", self.templates)):
            if not texts or any("{}" not in text for text in texts):
                raise ValueError(f"redteam.{field} must be texts with {{}} in them, got {list(texts)}")
        for field in ("names", "description", "vocabulary"):
            if not getattr(self, field):
                raise ValueError(f"expected {field} to attack with, got none: see the policy and the model's labels")

    def draw(self, rng: random.Random) -> Candidate:
        """Return a random prompt."""
        (count,) = rng.choices([*COUNTS], [*COUNTS.values()])
        words = tuple(self._word(rng) for _ in range(count))
        return Candidate(rng.choice(self.wrappers), rng.choice(self.templates), words)

    def mutate(self, candidate: Candidate, rng: random.Random) -> Candidate:
        """Return a copy of a prompt with one part changed."""
        wrapper, template, words = candidate.wrapper, candidate.template, [*candidate.words]
        place = rng.randrange(len(words))
        (change,) = rng.choices([*CHANGES], [*CHANGES.values()])
        if change == "wrapper":
            wrapper = rng.choice(self.wrappers)
        elif change == "template":
            template = rng.choice(self.templates)
        elif change == "misspell":
            words[place] = misspelled(words[place], rng)
        elif change == "add" and len(words) < MOST_WORDS:
            words.insert(place, self._word(rng))
        elif change == "leave out" and len(words) > 1:
            del words[place]
        else:
            words[place] = self._word(rng)
        return Candidate(wrapper, template, tuple(words))

    def recombine(self, one: Candidate, other: Candidate, rng: random.Random) -> Candidate:
        """Return a prompt that takes each part from one of two prompts."""
        pool = tuple(dict.fromkeys((*one.words, *other.words)))
        words = rng.sample(pool, rng.randint(1, min(len(pool), MOST_WORDS)))
        return Candidate(
            rng.choice((one.wrapper, other.wrapper)), rng.choice((one.template, other.template)), tuple(words)
        )

    def _word(self, rng: random.Random) -> str:
        """Return a random word, most often a name or one of the description."""
        word = rng.choice(rng.choices((self.names, self.description, self.vocabulary), weights=(2, 2, 1))[0])
        return misspelled(word, rng) if rng.random() < 0.15 else word
