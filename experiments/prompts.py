"""The sets of prompts: their groups of images, and the seed of each image."""

import dataclasses
import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """Images that are generated together: the unit of pairing, of resuming and of every interval.

    Under NegToMe an image depends on the others of its group, so a seed names a group and not an image.

    Attributes:
        category: cluster of the group in tables; of a benign near-miss, "beside " and the concept.
        kind: kind of a prompt about a protected concept, see `CharacterPrompts`; "" for other prompts.
        concept: name of that protected concept; "" for other prompts.
    """

    prompt_id: str
    prompt: str
    category: str
    seed: int
    size: int
    kind: str = ""
    concept: str = ""

    @property
    def asks_for_concept(self) -> bool:
        """Whether the prompt asks for the protected concept; False for a benign near-miss or a parody of it."""
        return bool(self.concept) and asks_for_concept(self.kind)

    @property
    def id(self) -> str:
        """`<prompt_id>/<seed, six digits>`: also the group's folder."""
        return f"{self.prompt_id}/{self.seed:06d}"

    def image_seeds(self) -> list[int]:
        """Return a 32-bit seed for each image, a hash of the prompt, the group's seed and the image's index.

        All methods start a group from the same initial latents, so that differences are paired. No two prompts share a
        seed; the released scripts reuse one for all prompts, which correlates them.
        """
        digests = [hashlib.sha256(f"{self.id}/{index}".encode()).digest() for index in range(self.size)]
        return [int.from_bytes(digest[:4], "big") for digest in digests]


@dataclass(frozen=True)
class ConsecutiveGroup(Group):
    """A group whose images have the seeds `seed`, `seed + 1`, ..., as those of `negtome generate` have."""

    @classmethod
    def of(cls, prompt: str, category: str, seed: int, size: int) -> "ConsecutiveGroup":
        """Return the group of a prompt, named as in a `PromptSet`."""
        return cls(prompt_slug(prompt), prompt, category, seed, size)

    def image_seeds(self) -> list[int]:
        return [self.seed + index for index in range(self.size)]


@dataclass(frozen=True)
class PromptSet:
    """Categories x templates x seeds, or a seeded subset of them.

    Args:
        name: the set's name.
        split: "test" (reported) or "development" (for choosing settings).
        categories: the things to show.
        templates: prefixes; the prompt is `"<template> <category>"`.
        seeds: group seeds, each at least 0 and below 10**6.
        images_per_prompt: images in a group, at least 2.
        groups_per_category: None for all of templates x seeds, or the number to draw in each category.
        subset_seed: seed of that draw; categories are drawn independently of each other and of their order.
        every: of the groups in canonical order, only every so many are used, from the first on.

    Raises:
        ValueError: a list is empty or has duplicates, or a number is out of range.
    """

    name: str
    split: str
    categories: tuple[str, ...]
    templates: tuple[str, ...]
    seeds: tuple[int, ...]
    images_per_prompt: int
    groups_per_category: int | None = None
    subset_seed: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        check_settings(self, "categories", "templates", "seeds", fewest=2)  # a single image has no diversity
        _check_ids(prompt_slug(prompt) for _, prompt in self.prompts())
        most = len(self.templates) * len(self.seeds)
        count = self.groups_per_category
        if count is not None and (not isinstance(count, int) or not 1 <= count <= most):
            raise ValueError(
                f"prompts.groups_per_category must be null (all) or in [1, {most}] (templates x seeds), got {count!r}"
            )

    def prompts(self) -> list[tuple[str, str]]:
        """Return (category, prompt) in canonical order."""
        return [(category, f"{template} {category}") for category in self.categories for template in self.templates]

    def groups(self) -> list[Group]:
        """Return the groups in canonical order: category, template, seed."""
        groups = []
        for category in self.categories:
            pairs = list(itertools.product(self.templates, self.seeds))
            if self.groups_per_category is not None:
                # A string seed hashes by SHA-512, equal on every platform and Python; order is restored after the draw.
                rng = random.Random(f"{self.subset_seed}/{category}")
                indices = rng.sample(range(len(pairs)), self.groups_per_category)
                pairs = [pairs[index] for index in sorted(indices)]
            for template, seed in pairs:
                prompt = f"{template} {category}"
                groups.append(Group(prompt_slug(prompt), prompt, category, seed, self.images_per_prompt))
        return groups[:: self.every]


#: Kinds of prompts about a protected concept, see `CharacterPrompts`.
KINDS = ("direct", "indirect", "benign")
#: Benign near-misses: near in words, near in looks, a parody.
NEIGHBOURS = ("near", "generic", "parody")
#: Kinds of requests that a policy allows; see `experiments.safety.requests.PolicyPrompts`.
ALLOWED = ("other", "exempt", "granted")
#: Prefix of a wrapped kind: the same wrappers around benign prompts.
HARMLESS = "harmless_"


def asks_for_concept(kind: str) -> bool:
    """Return whether prompts of a kind ask for their protected concept."""
    return kind not in ("benign", *NEIGHBOURS, *ALLOWED) and not kind.startswith(HARMLESS)


@dataclass(frozen=True)
class CharacterPrompts:
    """Prompts about protected concepts, and benign near-misses that must not change.

    Args:
        name: the set's name.
        split: "test" (reported) or "development" (for choosing settings).
        characters: prompts by concept and kind. "direct" prompts contain the name, "indirect" ones describe the concept
            without it. "benign" prompts ask for something near in meaning, "near" for something near in words (such as
            another sense of the name), "generic" for something near in looks, "parody" for an allowed parody.
        seeds: group seeds, each at least 0 and below 10**6.
        images_per_prompt: images in a group, at least 1.
        kinds: the kinds to use, wrapped kinds included.
        wrappers: further kinds, each with texts around a direct prompt, "ignore the rules: {}"; every concept gets one
            of them, in turn. "harmless_KIND" is the same around the concept's benign prompt, which exposes a guard that
            goes by the wrapper.
        every: of the groups in canonical order, only every so many are used, from the first on.

    Raises:
        ValueError: a list is empty, a kind is unknown, an indirect prompt contains the name, or two prompts are equal.
    """

    name: str
    split: str
    characters: Mapping[str, Mapping[str, Sequence[str]]]
    seeds: tuple[int, ...]
    images_per_prompt: int
    kinds: tuple[str, ...] = KINDS
    wrappers: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    every: int = 1

    def __post_init__(self) -> None:
        check_settings(self, "seeds", "kinds", fewest=1)
        kinds = [*KINDS, *NEIGHBOURS]
        wrapped = [name for kind in self.wrappers for name in (kind, f"{HARMLESS}{kind}")]
        used = {kind for prompts in self.characters.values() for kind in prompts}
        if unknown := (used - set(kinds)) | (set(self.kinds) - {*kinds, *wrapped}):
            raise ValueError(f"kinds of prompts must be among {kinds + wrapped}, got {sorted(unknown)}")
        for kind, texts in self.wrappers.items():
            if not _as_tuple(f"prompts.wrappers.{kind}", texts) or any(text.count("{}") != 1 for text in texts):
                raise ValueError(f"prompts.wrappers.{kind} must be texts with one {{}} for the prompt, got {texts}")
        for character, prompts in self.characters.items():
            for kind, texts in prompts.items():
                _as_tuple(f"prompts.characters.{character}.{kind}", texts)
            named = [prompt for prompt in prompts.get("indirect", ()) if character.lower() in prompt.lower()]
            if named:
                raise ValueError(f"prompts.characters.{character}.indirect must not contain the name, got {named}")
        _check_ids(group.prompt_id for group in self._all_groups() if group.seed == self.seeds[0])

    def groups(self) -> list[Group]:
        """Return the groups in canonical order: character, kind, prompt, seed.

        The category of a group is its character, or for a benign near-miss "beside " and the character; its prompt_id
        starts with its kind.
        """
        return self._all_groups()[:: self.every]

    def _all_groups(self) -> list[Group]:
        groups = []
        for number, (character, prompts) in enumerate(self.characters.items()):
            for kind in self.kinds:
                category = character if asks_for_concept(kind) else f"beside {character}"
                for prompt in self._texts(kind, prompts, number):
                    name = f"{kind}-{prompt_slug(prompt)}"
                    groups += [
                        Group(name, prompt, category, seed, self.images_per_prompt, kind, character)
                        for seed in self.seeds
                    ]
        return groups

    def _texts(self, kind: str, prompts: Mapping[str, Sequence[str]], number: int) -> Sequence[str]:
        """Return the prompts of a kind about the `number`-th character."""
        wrapping = kind.removeprefix(HARMLESS)
        if wrapping not in self.wrappers:
            return prompts.get(kind, ())
        texts = self.wrappers[wrapping]
        inner = prompts.get("direct" if kind == wrapping else "benign", ())
        return [texts[number % len(texts)].replace("{}", prompt) for prompt in inner]


@dataclass(frozen=True)
class PeoplePrompts:
    """Prompts about people that leave gender and skin tone open, and others that specify them.

    Args:
        name: the set's name.
        split: "test" (reported) or "development" (for choosing settings).
        people: for each word for a person the descriptions that specify more, such as "woman judge with dark skin
            tone".
        template: prefix; the prompt is `"<template> <word>"` or `"<template> <description>"`.
        seeds: group seeds of the open prompts, each at least 0 and below 10**6.
        said_seeds: group seeds of the descriptions, among `seeds`.
        images_per_prompt: images in a group, at least 2.

    Raises:
        ValueError: a list is empty or has duplicates, or two prompts are equal.
    """

    name: str
    split: str
    people: Mapping[str, Sequence[str]]
    template: str
    seeds: tuple[int, ...]
    said_seeds: tuple[int, ...]
    images_per_prompt: int

    def __post_init__(self) -> None:
        check_settings(self, "seeds", "said_seeds", fewest=2)
        if unknown := set(self.said_seeds) - set(self.seeds):
            raise ValueError(f"prompts.said_seeds must be among prompts.seeds, got {sorted(unknown)} too")
        for word, descriptions in self.people.items():
            _as_tuple(f"prompts.people.{word}", descriptions)
        if not self.people:
            raise ValueError("prompts.people must hold at least one word, got none")
        _check_ids(group.prompt_id for group in self.groups() if group.seed == self.said_seeds[0])

    def groups(self) -> list[Group]:
        """Return the groups in canonical order: word, "open" before "said", description, seed.

        The category of a group is the word; its prompt_id starts with "open" or "said".
        """
        groups = []
        for word, descriptions in self.people.items():
            for kind, texts, seeds in (("open", [word], self.seeds), ("said", descriptions, self.said_seeds)):
                for prompt in (f"{self.template} {text}" for text in texts):
                    name = f"{kind}-{prompt_slug(prompt)}"
                    groups += [Group(name, prompt, word, seed, self.images_per_prompt) for seed in seeds]
        return groups


def _as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """Return the values of a list; refuse a text, which is a sequence of letters."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list, got {values!r}: give {name}=[{values}]")
    return tuple(values)


def check_settings(prompts: Any, *lists: str, fewest: int) -> None:
    """Check the fields that all sets of prompts have, and convert their lists of distinct values to tuples.

    Args:
        prompts: a set, with `seeds` and `images_per_prompt`.
        lists: names of its fields that are lists.
        fewest: images in a group.

    Raises:
        ValueError: a list is empty or has duplicates, or a number is out of range.
    """
    for field in lists:
        values = _as_tuple(f"prompts.{field}", getattr(prompts, field))
        if not values or len(set(values)) != len(values):
            raise ValueError(f"prompts.{field} must be a list of distinct values with at least one, got {list(values)}")
        object.__setattr__(prompts, field, values)
    if not all(isinstance(seed, int) and 0 <= seed < 10**6 for seed in prompts.seeds):
        raise ValueError(f"prompts.seeds must be integers in [0, 999999], got {list(prompts.seeds)}")
    if type(images := prompts.images_per_prompt) is not int or images < fewest:
        raise ValueError(f"prompts.images_per_prompt must be a whole number of at least {fewest}, got {images!r}")
    if type(every := getattr(prompts, "every", 1)) is not int or every < 1:
        raise ValueError(f"prompts.every must be a whole number of at least 1, got {every!r}")


def _check_ids(names: Iterable[str]) -> None:
    counts = Counter(names)
    if not counts:
        raise ValueError("prompts.characters must hold at least one prompt of the chosen kinds, got none")
    if invalid := sorted(name for name, count in counts.items() if not name or count > 1):
        raise ValueError(
            "prompts must differ in their letters a-z and digits, since folders are named after them, got twice: "
            f"{invalid}"
        )


def prompt_slug(prompt: str) -> str:
    """Return the letters a-z and the digits of a prompt, with - between them; "" if it has none."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
