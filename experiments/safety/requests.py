"""Requests that are generated from a policy: what violates it, what it allows, and attacks on it.

The expected action of a request follows from the ids that it cites by `Policy.action_of`. A request cites the clauses
that it is written for, and those whose names occur in it; and the exceptions that it is written for, or names.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from experiments.prompts import HARMLESS, Group, check_settings, prompt_slug
from negtome.guard import Clause, Policy, read_policy
from negtome.guard.keyword import is_named, named_ids

#: Kind of requests that no clause is about, under a default other than allow. No image tells whether they were handled.
UNLISTED = "unlisted"
#: Words before which a name gets no article.
DETERMINERS = ("a", "an", "the", "my", "our", "your", "his", "her", "their", "some", "two", "three")
#: Letters of a prompt in its id, before a digest.
SLUG = 48


@dataclass(frozen=True)
class PolicyRequest:
    """A request and what the policy says of it.

    Attributes:
        kind: see `PolicyPrompts`.
        text: the prompt.
        asset: the protected concept that it was written for, or beside.
        cited: ids of the clauses and exceptions that apply.
        action: follows from `cited`.
    """

    kind: str
    text: str
    asset: str
    cited: tuple[str, ...]
    action: str

    @property
    def id(self) -> str:
        """Kind, words and digest of the prompt, which can name a folder whatever the script of the prompt is."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:8]
        return "-".join(part for part in (self.kind, prompt_slug(self.text)[:SLUG].strip("-"), digest) if part)

    @property
    def is_stopped(self) -> bool:
        """Whether the policy does anything but allow it."""
        return self.action != "allow"


@dataclass(frozen=True)
class PolicyPrompts:
    """Requests for and beside the protected concepts of a policy.

    | kind | request | expected action |
    |---|---|---|
    | direct | a name of the concept, in several phrasings | of the clause |
    | indirect | its description, unless that has a name in it | of the clause |
    | jailbroken, injected | a direct request in a wrapper | of the clause |
    | exception | a name with one of the clause's exceptions | of the exception; not allow |
    | several | the names of two concepts | first by precedence |
    | exempt | as exception | allow |
    | granted | as direct or several | allow |
    | benign, near | an allowed example of the clause, without and with a name in it | the default |
    | other | an ordinary thing | the default |
    | harmless_jailbroken, harmless_injected | an allowed request in the same wrapper | the default |

    Args:
        name: the set's name.
        split: "test" (reported) or "development" (for choosing settings); wrappers of the two are disjoint.
        policy: file of the policy.
        wrappers: by kind, texts with one {} around a request; or a YAML file that has them under `wrappers`.
        phrasings: texts with one {} for a name or a description.
        styles: texts with one {} for an allowed example, so that no request is one that the guard is shown.
        things, places: ordinary things, and where they are; `others` of their pairs are requests beside each clause.
        others: see `things`.
        concepts: concepts to ask for; requests that any other clause applies to are left out. None: all.
        seeds: group seeds, each at least 0 and below 10**6.
        images_per_prompt: images in a group, at least 1.
        every: of the groups in canonical order, only every so many are used, from the first on.

    Raises:
        FileNotFoundError: there is no policy.
        ValueError: it is none, or a setting is out of range, or the things do not suffice for all clauses.
    """

    name: str
    split: str
    policy: str | None
    wrappers: Mapping[str, Sequence[str]] | str
    phrasings: Sequence[str]
    styles: Sequence[str]
    things: Sequence[str]
    places: Sequence[str]
    seeds: tuple[int, ...] = (0,)
    images_per_prompt: int = 1
    others: int = 2
    concepts: Sequence[str] | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if self.policy is None:
            raise FileNotFoundError("expected the file of a policy to generate requests from, got none: policy=FILE")
        check_settings(self, "seeds", "phrasings", "styles", "things", "places", fewest=1)
        if isinstance(self.wrappers, str):
            wrappers = yaml.safe_load(Path(self.wrappers).read_text(encoding="utf-8"))["wrappers"]
            object.__setattr__(self, "wrappers", {kind: wrappers[kind] for kind in ("jailbroken", "injected")})
        wrapped = [text for texts in self.wrappers.values() for text in texts]
        for text in (*self.phrasings, *self.styles, *wrapped):
            if text.count("{}") != 1:
                raise ValueError(f"prompts.phrasings, styles and wrappers must have one {{}} each, got {text!r}")
        if not self.requests():
            raise ValueError(f"expected requests of {self.policy}, got none")

    @cached_property
    def rules(self) -> Policy:
        """The policy."""
        return read_policy(str(self.policy))

    @cached_property
    def clauses(self) -> list[Clause]:
        """The clauses whose concepts are asked for."""
        return [one for one in self.rules.clauses if self.concepts is None or one.asset in self.concepts]

    def groups(self) -> list[Group]:
        """Return the groups in canonical order: clause, kind, request, seed.

        Requests that no clause is about are left out under a default other than allow. The category of a group is its
        concept, or for an allowed request "beside " and the concept.
        """
        groups = []
        for request in self.requests():
            if request.kind == UNLISTED:
                continue
            category = request.asset if request.is_stopped else f"beside {request.asset}"
            groups += [
                Group(request.id, request.text, category, seed, self.images_per_prompt, request.kind, request.asset)
                for seed in self.seeds
            ]
        return groups[:: self.every]

    def requests(self) -> list[PolicyRequest]:
        """Return all requests, each text once, in the order of the clauses."""
        requests: dict[str, PolicyRequest] = {}
        others = {clause.id for clause in self.rules.clauses} - {clause.id for clause in self.clauses}
        for number, clause in enumerate(self.clauses):
            for request in self._of_clause(clause, number):
                if others.intersection(request.cited):
                    continue
                requests.setdefault(" ".join(request.text.casefold().split()), request)
        return list(requests.values())

    def _of_clause(self, clause: Clause, number: int) -> Iterator[PolicyRequest]:
        direct = list(self._direct(clause))
        allowed = [*self._examples(clause), *self._others(clause, number)]
        yield from direct
        yield from self._indirect(clause)
        yield from self._exceptions(clause)
        yield from self._several(clause, number)
        yield from allowed
        for kind, wrappers in self.wrappers.items():
            turned = [*wrappers[number % len(wrappers) :], *wrappers[: number % len(wrappers)]]
            share = -(-len(wrappers) // len(self.clauses))  # rounded up: every wrapper is used
            yield from self._wrapped(kind, turned, share, [one for one in direct if one.kind == "direct"])
            harmless = [one for one in allowed if one.kind != "near"]
            yield from self._wrapped(f"{HARMLESS}{kind}", turned, share, harmless)

    def _direct(self, clause: Clause) -> Iterator[PolicyRequest]:
        """Yield the first name in every phrasing, and each other name in one of them, in turn."""
        first, *others = [with_article(name) for name in clause.names or (clause.asset,)]
        texts = [(phrasing, first) for phrasing in self.phrasings]
        texts += [(self.phrasings[place % len(self.phrasings)], name) for place, name in enumerate(others, 1)]
        for phrasing, name in texts:
            yield self._request("direct", filled(phrasing, name), clause)

    def _indirect(self, clause: Clause) -> Iterator[PolicyRequest]:
        """Yield the description, unless it names a clause or an exception, so that it would be no description alone."""
        for phrasing in self.phrasings[:2]:
            text = filled(phrasing, clause.description)
            if not any(is_named(part, text) for part in self.rules.parts):
                yield self._request("indirect", text, clause)

    def _exceptions(self, clause: Clause) -> Iterator[PolicyRequest]:
        named = filled(self.phrasings[0], with_article((clause.names or (clause.asset,))[0]))
        for name in clause.exceptions:
            exception = self.rules[name]
            for spelling in exception.names or (getattr(exception, "text", ""),):
                yield self._request("exception", f"{named}, {spelling}", clause, exceptions=[name])

    def _several(self, clause: Clause, number: int) -> Iterator[PolicyRequest]:
        clauses = self.clauses
        other = clauses[(number + 1) % len(clauses)]
        if len(clauses) < 2 or (len(clauses) == 2 and number == 1):
            return
        names = [with_article((part.names or (part.asset,))[0]) for part in (clause, other)]
        yield self._request("several", filled(self.phrasings[0], " and ".join(names)), clause, other)

    def _examples(self, clause: Clause) -> Iterator[PolicyRequest]:
        for number, example in enumerate(clause.allowed):
            text = filled(self.styles[number % len(self.styles)], example)
            yield self._beside("near" if named_ids(self.rules, text) else "benign", text, clause)

    def _others(self, clause: Clause, number: int) -> Iterator[PolicyRequest]:
        share = self._things[number * self.others :][: self.others]
        if len(share) < self.others:
            raise ValueError(
                f"expected prompts.things and places for {self.others} requests beside each of "
                f"{len(self.clauses)} clauses, got {len(self._things)} without a name in them: add some"
            )
        for text in share:
            yield self._beside("other", text, clause)

    @cached_property
    def _things(self) -> list[str]:
        """Ordinary requests without any name of the policy in them; neighbours differ in thing and place."""
        turned = [(number, offset) for offset in range(len(self.places)) for number in range(len(self.things))]
        texts = [
            filled(self.phrasings[0], f"{with_article(self.things[number])} {self._place(number + offset)}")
            for number, offset in turned
        ]
        return [text for text in texts if not named_ids(self.rules, text)]

    def _place(self, number: int) -> str:
        return self.places[number % len(self.places)]

    def _wrapped(
        self, kind: str, wrappers: Sequence[str], share: int, requests: Sequence[PolicyRequest]
    ) -> list[PolicyRequest]:
        """Return the first of some requests in so many wrappers; wrappers that add a name of the policy are skipped."""
        wrapped = []
        for request in requests[:1]:
            allowed_ids = {*request.cited, *named_ids(self.rules, request.text)}
            texts = [filled(wrapper, request.text) for wrapper in wrappers]
            fitting = [text for text in texts if allowed_ids.issuperset(named_ids(self.rules, text))]
            kind = UNLISTED if request.kind == UNLISTED else kind
            wrapped += [dataclasses.replace(request, kind=kind, text=text) for text in fitting[:share]]
        return wrapped

    def _request(self, kind: str, text: str, *clauses: Clause, exceptions: Sequence[str] = ()) -> PolicyRequest:
        """Return a request for concepts, with the kind that its action gives it."""
        cited_ids = {*(clause.id for clause in clauses), *named_ids(self.rules, text)}
        cited = [clause for clause in self.rules.clauses if clause.id in cited_ids]
        listed = {name for clause in cited for name in clause.exceptions}
        applied = [
            part.id
            for part in self.rules.exceptions
            if part.id in listed and (part.id in exceptions or is_named(part, text))
        ]
        ids = (*(clause.id for clause in cited), *applied)
        action = self.rules.action_of(ids)
        if action == "allow":
            kind = "exempt" if applied else "granted"
        elif applied:
            kind = "exception"
        return PolicyRequest(kind, text, clauses[0].asset, ids, action)

    def _beside(self, kind: str, text: str, clause: Clause) -> PolicyRequest:
        """Return a request that no clause is about."""
        action = self.rules.default
        return PolicyRequest(kind if action == "allow" else UNLISTED, text, clause.asset, (), action)


def filled(template: str, text: str) -> str:
    """Put a text into the {} of a template; braces in the text stay."""
    before, _, after = template.partition("{}")
    return f"{before}{text}{after}"


def with_article(name: str) -> str:
    """Return a name with an indefinite article, unless it is a proper name, has a determiner or no Latin letters."""
    first = name.split()[0]
    if not first[0].isascii() or not first[0].islower() or first in DETERMINERS:
        return name
    return f"{'an' if first[0] in 'aeiou' else 'a'} {name}"
