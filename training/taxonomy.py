"""The categories of each emoji, by taxonomy.yaml and by rules for people."""

from pathlib import Path

import yaml

_DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())

TEMPLATES = tuple(_DATA["templates"])
OBJECTS: dict[str, dict[str, float]] = _DATA["objects"]
EVALUATED = tuple(_DATA["evaluated"])
DEVELOPMENT = tuple(_DATA["development"])
PEOPLE = tuple(_DATA["people"])
DESIGNS = tuple(_DATA["designs"])
CATEGORY_WEIGHT: dict[str, float] = _DATA["category_weight"]


def concept_of(label: str) -> str:
    """Return the name that the gendered forms of an emoji share, so that a split by concept keeps them together.

    Args:
        label: emojibase label without skin tone, for example "woman firefighter" or "person: red hair".

    Returns:
        The label without its gender word: "firefighter", "red hair"; "person" for the man, woman and person.
    """
    words = label.replace(":", " ").split()
    gendered = ("man", "woman", "person", "men", "women", "people", "mr.", "mrs.", "mx")
    kept = [w for w in words if w.lower() not in gendered]
    return " ".join(kept) if kept else "person"


def people_categories(label: str, subgroup: str, gender: str | None) -> dict[str, float]:
    """Return the categories of an emoji of a human, by rule.

    Args:
        label: emojibase label without skin tone.
        subgroup: emojibase subgroup, for example "person-role".
        gender: "man", "woman" or None.

    Returns:
        Category to typicality; empty when the emoji shows no single person.
    """
    if subgroup not in _DATA["subgroup_weight"]:
        return {}
    if label in _DATA["children"]:
        return {"child": _DATA["children"][label], "person": 0.3}
    weight = _DATA["subgroup_weight"][subgroup] * (0.4 if label in _DATA["old"] else 1.0)
    weight = _DATA["bust"].get(label, weight) * (3.0 if label in _DATA["bust"] else 1.0)
    categories = {"person": weight * (1.0 if gender != "woman" else 0.6)}
    if gender:
        categories[gender] = weight
    concept = concept_of(label)
    if concept == "health worker":
        categories["doctor"] = {"man": 3.0, "woman": 1.0}.get(gender or "", 1.5)
    if concept == "firefighter":
        categories["firefighter"] = {"man": 3.0, "woman": 1.0}.get(gender or "", 1.5)
    return categories


def categories_of(label: str, subgroup: str, gender: str | None) -> dict[str, float]:
    """Return all categories of an emoji with their typicality; emoji outside of the taxonomy have none."""
    objects = {name: float(members[label]) for name, members in OBJECTS.items() if label in members}
    return objects | people_categories(label, subgroup, gender)
