"""Faults of a policy, and of the folder of its reference images, that its format does not exclude."""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from negtome.guard.keyword import is_named, named_ids, reading
from negtome.guard.policy import ACTIONS, Clause, Policy, PolicyException
from negtome.guard.references import SUFFIXES, References, digest_of, is_folder_name

#: Ids that a verdict or a command gives a meaning of its own.
RESERVED = frozenset({*ACTIONS, "invalid", "default", "none", "null", "all"})
#: Images of a concept below which `check` says that there are few: three for the methods, three for measuring.
FEW_IMAGES = 6
#: Held-out images that the scorecard and the output check need: 19 each, for thresholds at the false positive rate 0.05
FEWEST_HELD_OUT = 38
#: Joiners that emoji and some scripts need within a word.
JOINERS = "\u200c\u200d"


@dataclass
class Report:
    """Faults of a policy: `errors` make it unusable, `advice` may be meant so. Each is a line."""

    errors: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def lint(policy: Policy, references: References | None = None) -> Report:
    """Look for faults of a policy and of its reference images, whose pixels are compared.

    Args:
        policy: the policy.
        references: the images; None leaves them out.
    """
    report = Report()
    for part in policy.parts:
        report.errors += _faults_of_id(part.id)
        report.errors += _faults_of_names(part)
    report.errors += _alike("ids", ((part.id, part.id) for part in policy.parts))
    report.errors += _alike("assets", ((clause.asset, clause.id) for clause in policy.clauses))
    report.errors += _alike("names", ((name, clause.id) for clause in policy.clauses for name in clause.names))
    if policy.default == "steer":
        report.errors.append("default: steer names no concept to stay away from: use allow, refuse or escalate")
    report.errors += _contradictions(policy)
    report.advice += _advice_on_examples(policy)
    report.advice += _advice_on_parts(policy)
    if references is not None:
        _check_references(policy, references, report)
    return report


def _faults_of_id(name: str) -> Iterator[str]:
    if name.casefold() in RESERVED:
        yield f"the id {name!r} is reserved: choose another, such as C1"
    if invisible := _invisible(name):
        yield f"the id {name!r} has invisible characters, {invisible}: remove them"
    elif any(sign.isspace() or sign in "\"'[]{}," for sign in name):
        yield f"the id {name!r} has spaces, quotes, brackets or commas: use letters, digits, - and _"


def _faults_of_names(part: Clause | PolicyException) -> Iterator[str]:
    if isinstance(part, Clause) and not part.names:
        yield f"{part.id} has an empty list of names: leave names out, and the asset's name counts, or list some"
    for name in (part.asset, *part.names) if isinstance(part, Clause) else part.names:
        invisible = _invisible(name.translate(dict.fromkeys(map(ord, JOINERS))))
        if not reading(name):
            yield f"{part.id} has the name {name!a}, of which nothing can be seen: remove it"
        elif invisible:
            yield f"{part.id} has the name {name!a} with invisible characters, {invisible}: remove them"


def _invisible(text: str) -> str:
    """Name the characters of a text that cannot be seen, or that change the direction of others; "" for none."""
    signs = [sign for sign in text if unicodedata.category(sign) in ("Cf", "Cc", "Co", "Cn")]
    return ", ".join(dict.fromkeys(f"U+{ord(sign):04X}" for sign in signs))


def _alike(kind: str, names: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a line for each group of different parts with a name that reads the same."""
    owners: dict[str, dict[str, str]] = {}
    for name, owner in names:
        owners.setdefault(reading(name) or name, {})[owner] = name
    for parts in owners.values():
        if len(parts) > 1:
            listed = ", ".join(f"{owner} ({name!r})" for owner, name in parts.items())
            yield f"the same {kind} in several places: {listed}: rename one, or make one clause of them"


def _contradictions(policy: Policy) -> Iterator[str]:
    for clause in policy.clauses:
        for text in clause.violates:
            others = [name for name in named_ids(policy, text) if name != clause.id]
            action = policy.action_of([clause.id, *others])
            if action != clause.action:
                yield (
                    f"{clause.id} lists {text!r} as a violation, which is to {clause.action}, but {', '.join(others)} "
                    f"applies by name too, and the action is {action}: move it to the policy's examples"
                )


def _advice_on_examples(policy: Policy) -> Iterator[str]:
    for clause in policy.clauses:
        for text in clause.allowed:
            for other in (part for part in policy.clauses if is_named(part, text)):
                whose = "its own name" if other is clause else f"a name of {other.id}"
                yield (
                    f"{clause.id} allows {text!r}, which has {whose} in it: the keyword guard will {other.action} it; "
                    "keep it only as a near-miss"
                )
    for example in policy.examples:
        if left_out := [name for name in named_ids(policy, example.request) if name not in example.clauses]:
            yield f"the example {example.request!r} names {', '.join(left_out)}, but does not cite it: is that meant?"


def _advice_on_parts(policy: Policy) -> Iterator[str]:
    listed = {name for clause in policy.clauses for name in clause.exceptions}
    for exception in policy.exceptions:
        if exception.id not in listed:
            yield f"no clause lists the exception {exception.id}: it has no effect"
        elif not exception.names:
            yield f"{exception.id} has no names: the keyword guard never applies it"
    for clause in policy.clauses:
        if is_named(clause, clause.description):
            yield f"the description of {clause.id} has its name in it: describe the looks without it"
        for other in policy.clauses:
            if other is not clause and (names := [name for name in clause.names if is_named(other, name)]):
                yield f"{clause.id} is named {names[0]!r}, which has a name of {other.id} in it: both apply to it"


def _check_references(policy: Policy, references: References, report: Report) -> None:
    for clause in policy.clauses:
        if not is_folder_name(clause.asset):
            report.errors.append(f"the asset {clause.asset!r} of {clause.id} cannot name a folder: leave / and \\ out")
    absent = set(references.absent)
    for clause in policy.clauses:
        if clause.asset in absent and clause.action == "steer":
            report.errors.append(
                f"no image of {clause.asset!r} in {references.folder}, away from which {clause.id} steers: add a "
                f"folder {clause.asset}/ with its images, or let {clause.id} refuse"
            )
        elif clause.asset in absent:
            report.advice.append(
                f"no image of {clause.asset!r} in {references.folder}: {clause.id} acts on prompts alone, and neither "
                "the output check nor the scorecard can detect it"
            )
    if len(absent) == len(references.images):
        report.errors.append(f"no image of any asset in {references.folder}: add a folder named as the asset")
    for file in references.foreign:
        report.errors.append(f"{file} has a format that is not read: convert it to {' or '.join(SUFFIXES[:2])}")
    _compare_pixels(references, report)
    for name, files in references.images.items():
        if 0 < len(files) < FEW_IMAGES:
            report.advice.append(
                f"{len(files)} images of {name!r}: {FEW_IMAGES} give three to the methods and three to the scorecard, "
                "which needs two at least"
            )
    if references.unassigned:
        names = ", ".join(references.unassigned[:5])
        report.advice.append(f"no clause has an asset of this name, so it is not used: {names}")
    if 0 < len(references.held_out) < FEWEST_HELD_OUT:
        report.advice.append(
            f"{len(references.held_out)} held-out images: the output check and the scorecard need {FEWEST_HELD_OUT} "
            "together"
        )


def _compare_pixels(references: References, report: Report) -> None:
    """Read all images, and compare each with each."""
    files = [(name, file) for name, files in references.images.items() for file in files]
    files += [("held_out", file) for _, file in references.held_out]
    shown_by: dict[str, list[tuple[str, str]]] = {}
    for name, file in files:
        try:
            shown_by.setdefault(digest_of(file), []).append((name, str(file)))
        except (ValueError, OSError) as error:
            report.errors.append(f"{file} cannot be read: {' '.join(str(error).split())}")
    for copies in shown_by.values():
        listed = " = ".join(file for _, file in copies)
        if len({name for name, _ in copies}) > 1:
            report.errors.append(f"one image under several names: {listed}: keep it where it belongs")
        elif len(copies) > 1:
            report.advice.append(f"the same image more than once: {listed}: it counts as one")
