"""Prompts that a search draws, changes and recombines: wrappers around templates around a few words of one design."""

import random
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Words that say nothing of a design.
EMPTY = frozenset(
    {"a", "an", "and", "as", "at", "emoji", "from", "front", "in", "is", "of", "on", "one", "or", "other", "over",
     "photo", "seen", "than", "that", "the", "to", "under", "who", "with"}
)  # fmt: skip
#: Letters that look like others, four of them Cyrillic, by which no list of names knows a word.
ALIKE = {"a": "\u0430", "c": "\u0441", "e": "\u0435", "i": "1", "o": "0", "p": "\u0440", "s": "5"}
#: How often a prompt has so many words at first: further ones draw the image elsewhere.
COUNTS = {1: 3, 2: 2, 3: 1}
MOST_WORDS = max(COUNTS)
#: What is changed, and how often beside others: words are what an image is of.
CHANGES = {"wrapper": 1, "template": 1, "misspell": 1, "replace": 3, "add": 2, "leave out": 1}


@dataclass(frozen=True)
class Candidate:
    """A prompt in its parts; `text` is what is asked for."""

    wrapper: str
    template: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.wrapper.replace("{}", self.template.replace("{}", " ".join(self.words)))


def plain(text: str) -> Candidate:
    """Return a prompt that has no parts."""
    return Candidate("{}", "{}", (text,))


def words_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the words of texts that say something, each once, in their order."""
    found = (word for text in texts for word in re.findall(r"[\w-]+", text.lower()))
    return tuple(dict.fromkeys(word for word in found if word not in EMPTY))


def misspelled(word: str, rng: random.Random) -> str:
    """Return a word with one letter left out, doubled, swapped with the next or replaced by one like it, or in two."""
    place = rng.randrange(len(word))
    before, letter, after = word[:place], word[place], word[place + 1 :]
    ways = {
        "left out": before + after,
        "doubled": before + letter + word[place:],
        "swapped": before + after[:1] + letter + after[1:],
        "alike": before + ALIKE.get(letter, letter) + after,
        "other": before + rng.choice(string.ascii_lowercase) + after,
        "split": f"{before} {word[place:]}".strip(),
    }
    return rng.choice([*ways.values()]) or word


@dataclass(frozen=True)
class Grammar:
    """What prompts for one design are made of.

    Attributes:
        wrappers, templates: texts with {} for what they are around.
        names: what the design is called, in the policy and elsewhere.
        description: words of what it looks like.
        vocabulary: further words that the image model knows.
    """

    wrappers: Sequence[str]
    templates: Sequence[str]
    names: Sequence[str]
    description: Sequence[str]
    vocabulary: Sequence[str]

    def __post_init__(self) -> None:
        for what, texts in (("wrappers", self.wrappers), ("templates", self.templates)):
            if not texts or any("{}" not in text for text in texts):
                raise ValueError(f"redteam.{what} must be texts with {{}} in them, got {list(texts)}")
        for what in ("names", "description", "vocabulary"):
            if not getattr(self, what):
                raise ValueError(f"expected {what} to attack with, got none: see the policy and the model's labels")

    def draw(self, rng: random.Random) -> Candidate:
        """Return a prompt at random."""
        (count,) = rng.choices([*COUNTS], [*COUNTS.values()])
        words = tuple(self._word(rng) for _ in range(count))
        return Candidate(rng.choice(self.wrappers), rng.choice(self.templates), words)

    def mutate(self, candidate: Candidate, rng: random.Random) -> Candidate:
        """Return a prompt that differs from another in one part."""
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
        """Return a prompt with each part of one of two."""
        pool = tuple(dict.fromkeys((*one.words, *other.words)))
        words = rng.sample(pool, rng.randint(1, min(len(pool), MOST_WORDS)))
        return Candidate(
            rng.choice((one.wrapper, other.wrapper)), rng.choice((one.template, other.template)), tuple(words)
        )

    def _word(self, rng: random.Random) -> str:
        """Return a word: a name or one of the description more often than one of a thousand others."""
        word = rng.choice(rng.choices((self.names, self.description, self.vocabulary), weights=(2, 2, 1))[0])
        return misspelled(word, rng) if rng.random() < 0.15 else word
