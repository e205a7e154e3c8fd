"""A guard by keywords: a clause applies if one of its names occurs in the prompt."""

import functools
import re
import unicodedata
from collections.abc import Sequence

import snowballstemmer
from confusable_homoglyphs import confusables

from negtome.guard.decision import Decision
from negtome.guard.policy import Clause, Policy, PolicyException

#: Characters that Unicode calls default ignorable and that are not in the category Cf; they are invisible in a word.
IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)

_STEMMER = snowballstemmer.stemmer("english")


class Keyword:
    """Looks for the names of clauses and exceptions, in the singular and the plural.

    It ignores case, accents, invisible characters and punctuation, and reads compatible and look-alike letters. It
    knows no other spelling, no description and no meaning.
    """

    name = "keyword"
    id = "keyword-2"

    def reply(self, policy: Policy, prompt: str) -> Decision:
        clauses, exceptions = _named_parts(policy, prompt)
        cited = (*(clause.id for clause in clauses), *(exception.id for exception in exceptions))
        quote = (exceptions or clauses)[0].line if cited else ""
        assets = ", ".join(clause.asset for clause in clauses)
        rationale = f"names {assets}" if assets else "names none of the assets"
        return Decision(policy.action_of(cited), cited, quote, rationale)


def named_ids(policy: Policy, text: str) -> list[str]:
    """Return the ids of the clauses whose names occur in a text, and of the named exceptions that one of them lists."""
    clauses, exceptions = _named_parts(policy, text)
    return [*(clause.id for clause in clauses), *(exception.id for exception in exceptions)]


def _named_parts(policy: Policy, text: str) -> tuple[list[Clause], list[PolicyException]]:
    readings = _readings(text)
    clauses = [clause for clause in policy.clauses if _named(clause, readings)]
    listed = {name for clause in clauses for name in clause.exceptions}
    return clauses, [part for part in policy.exceptions if part.id in listed and _named(part, readings)]


def is_named(part: Clause | PolicyException, text: str) -> bool:
    """Tell whether a name of a clause or an exception occurs in a text as a word, or as words in a row."""
    return _named(part, _readings(text))


def reading(name: str) -> str:
    """Return a name as it is compared: in lower case and Latin letters, its words joined by spaces."""
    text = _readings(name)[-1]
    return " ".join(_words(text)) or text.strip()


def _named(part: Clause | PolicyException, readings: Sequence[str]) -> bool:
    return any(_occurs(name, text) for spelling in part.names for name in _readings(spelling) for text in readings)


def _occurs(name: str, text: str) -> bool:
    name_words, words = _words(name), _words(text)
    if not name_words:  # an emoji or other signs; an invisible name is in no text
        return bool(name.strip()) and name.strip() in text
    starts = range(len(words) - len(name_words) + 1)
    return any(all(map(_inflected, words[start : start + len(name_words)], name_words)) for start in starts)


def _inflected(word: str, base: str) -> bool:
    """Return whether a word equals `base`, or is an inflection that changes at most its last letter."""
    return word == base or (word.startswith(base[:-1]) and _stem(word) == _stem(base))


@functools.lru_cache(maxsize=10_000)
def _stem(word: str) -> str:
    stem: str = _STEMMER.stemWord(word)
    return stem


@functools.lru_cache(maxsize=1000)
def _readings(text: str) -> tuple[str, ...]:
    """Return a text and its readings in Latin letters, in lower case."""
    text = unicodedata.normalize("NFKC", text)
    texts = [text]
    for stroke in "li":  # a vertical stroke may stand for either
        texts += ["".join(_latin(sign, stroke) for sign in form) for form in (text, text.casefold())]
    return tuple(dict.fromkeys(map(_visible, texts)))


def _visible(text: str) -> str:
    folded = unicodedata.normalize("NFD", IGNORABLE.sub("", text).casefold())
    return unicodedata.normalize("NFKC", "".join(sign for sign in folded if not _invisible(sign)))


@functools.lru_cache(maxsize=1000)
def _words(text: str) -> tuple[str, ...]:
    """Split a text into runs of letters, marks and digits."""
    return tuple("".join(sign if unicodedata.category(sign)[0] in "LMN" else " " for sign in text).split())


def _invisible(sign: str) -> bool:
    """Return whether a character is a format or control character, an accent, or a frame."""
    category = unicodedata.category(sign)
    return category in ("Cf", "Me") or (category == "Cc" and not sign.isspace()) or unicodedata.combining(sign) > 0


@functools.lru_cache(maxsize=10_000)
def _latin(sign: str, stroke: str) -> str:
    """Return the Latin letters that a character looks like by Unicode's table of confusables, or the character.

    The table has l for all vertical strokes; `stroke` replaces it.
    """
    if sign.isascii():
        return sign
    for entry in confusables.is_confusable(sign, greedy=True) or ():
        looks = [one["c"] for one in entry["homoglyphs"] if one["c"].isascii() and one["c"].isalpha()]
        if looks:
            return stroke if looks[0] == "l" else looks[0]
    return sign
