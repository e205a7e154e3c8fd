"""What each emoji is an example of: the words that the small models must understand.

A category maps emoji labels (emojibase, English) to how typical they are. Typical examples are drawn more often for a
generic caption such as "a photo of a bird": large models prefer the mode in the same way, and without such a
preference an experiment about diversity would have nothing to restore.
"""

from __future__ import annotations

TEMPLATES = (
    "a photo of a",
    "a good photo of a",
    "a high contrast photo of a",
    "a photo of the",
    "a high contrast photo of the",
    "a good photo of the",
    "a high quality image of a",
)

_BUST = {"person": 5.0, "man": 5.0, "woman": 5.0}

# People are matched by rule (see `people_categories`), everything else by label.
OBJECTS: dict[str, dict[str, float]] = {
    "bird": {
        "bird": 5,
        "eagle": 3,
        "duck": 3,
        "parrot": 3,
        "chicken": 2,
        "rooster": 2,
        "baby chick": 2,
        "penguin": 2,
        "owl": 2,
        "dove": 2,
        "goose": 1,
        "swan": 1,
        "flamingo": 1,
        "peacock": 1,
        "turkey": 1,
        "black bird": 1,
        "front-facing baby chick": 1,
        "dodo": 0.5,
        "hatching chick": 0.3,
    },
    "mammal": {
        "elephant": 3,
        "lion": 2,
        "horse": 2,
        "cow": 2,
        "bear": 3,
        "fox": 2,
        "dog": 2,
        "cat": 2,
        "tiger": 2,
        "pig": 2,
        "rabbit": 1,
        "monkey": 2,
        "panda": 2,
        "koala": 1,
        "wolf": 2,
        "deer": 1,
        "giraffe": 1,
        "zebra": 1,
        "camel": 1,
        "gorilla": 1,
        "leopard": 1,
        "ox": 1,
        "goat": 1,
        "ram": 1,
        "ewe": 1,
        "hippopotamus": 1,
        "rhinoceros": 1,
        "kangaroo": 1,
        "sloth": 1,
        "otter": 1,
        "beaver": 1,
        "mouse": 1,
        "rat": 1,
        "hamster": 1,
        "chipmunk": 1,
        "bat": 1,
        "raccoon": 1,
        "badger": 1,
        "skunk": 1,
        "hedgehog": 1,
        "llama": 1,
        "donkey": 1,
        "moose": 1,
        "bison": 1,
        "polar bear": 1,
        "boar": 1,
        "mammoth": 1,
        "water buffalo": 1,
        "whale": 0.5,
        "dolphin": 0.5,
        "seal": 0.5,
        "orangutan": 1,
        "two-hump camel": 1,
        "dog face": 1,
        "cat face": 1,
        "cow face": 1,
        "pig face": 1,
        "horse face": 1,
        "tiger face": 1,
        "mouse face": 1,
        "rabbit face": 1,
        "monkey face": 1,
        "orca": 0.3,
    },
    "animal": {
        "dog face": 3,
        "cat face": 3,
        "lion": 3,
        "bear": 3,
        "tiger face": 2,
        "elephant": 3,
        "fox": 2,
        "panda": 2,
        "monkey": 2,
        "rabbit": 2,
        "horse": 2,
        "cow": 2,
        "pig": 2,
        "dog": 2,
        "cat": 2,
        "tiger": 2,
        "mouse": 1,
        "frog": 1,
        "turtle": 1,
        "wolf": 1,
        "giraffe": 1,
        "zebra": 1,
        "koala": 1,
        "deer": 1,
        "goat": 1,
        "gorilla": 1,
        "camel": 1,
        "hippopotamus": 1,
        "kangaroo": 1,
        "crocodile": 1,
        "snake": 0.5,
        "bird": 1,
        "fish": 0.5,
        "penguin": 1,
        "raccoon": 1,
        "hedgehog": 1,
        "leopard": 1,
        "rabbit face": 1,
        "cow face": 1,
        "pig face": 1,
        "monkey face": 1,
        "horse face": 1,
        "mouse face": 1,
        "hamster": 1,
        "sloth": 1,
        "rhinoceros": 1,
        "ram": 1,
        "ewe": 1,
        "ox": 1,
        "boar": 0.5,
        "chicken": 0.5,
        "owl": 0.5,
        "whale": 0.3,
        "octopus": 0.2,
        "crab": 0.2,
        "chipmunk": 0.5,
        "beaver": 0.5,
    },
    "fish": {"fish": 5, "tropical fish": 4, "blowfish": 2, "shark": 1},
    "building": {
        "office building": 4,
        "hospital": 2,
        "bank": 3,
        "hotel": 3,
        "school": 3,
        "post office": 2,
        "Japanese post office": 2,
        "department store": 2,
        "convenience store": 1,
        "love hotel": 1,
        "factory": 1,
        "classical building": 2,
        "house": 1,
        "castle": 1,
        "Japanese castle": 1,
        "church": 1,
        "derelict house": 0.5,
        "mosque": 0.5,
        "synagogue": 0.5,
        "hindu temple": 0.5,
    },
    "bus": {"bus": 5, "oncoming bus": 3, "trolleybus": 2, "minibus": 1},
    "car": {
        "automobile": 5,
        "oncoming automobile": 3,
        "sport utility vehicle": 3,
        "taxi": 2,
        "police car": 1,
        "racing car": 0.7,
        "oncoming taxi": 1,
        "oncoming police car": 0.7,
        "pickup truck": 0.5,
    },
    "airplane": {"airplane": 5, "small airplane": 3, "airplane departure": 1.5, "airplane arrival": 1.5},
    "insect": {
        "ant": 2,
        "honeybee": 4,
        "beetle": 3,
        "lady beetle": 4,
        "bug": 1,
        "butterfly": 3,
        "cricket": 1.5,
        "cockroach": 1,
        "mosquito": 1.5,
        "fly": 1.5,
    },
    "dog": {"dog face": 4, "dog": 4, "poodle": 2, "guide dog": 2, "service dog": 1.5},
    "cat": {"cat face": 4, "cat": 4, "black cat": 2, "grinning cat": 0.4, "smiling cat with heart-eyes": 0.2},
    "dragon": {"dragon": 4, "dragon face": 4},
    "boat": {
        "sailboat": 4,
        "speedboat": 3,
        "motor boat": 3,
        "ship": 3,
        "passenger ship": 2,
        "ferry": 2,
        "canoe": 1.5,
    },
    "bridge": {"bridge at night": 5, "foggy": 2},
    "shirt": {"t-shirt": 5, "running shirt": 3, "woman's clothes": 3},
    "dress": {"dress": 5, "kimono": 1.5, "sari": 1},
    # Development categories: for choosing settings, never for the numbers of the evaluation.
    "flower": {
        "cherry blossom": 2,
        "lotus": 1,
        "rose": 3,
        "hibiscus": 2,
        "sunflower": 3,
        "blossom": 2,
        "tulip": 3,
        "hyacinth": 1,
        "white flower": 0.5,
        "bouquet": 1,
        "wilted flower": 0.5,
        "rosette": 0.3,
    },
    "fruit": {
        "grapes": 2,
        "melon": 1,
        "watermelon": 2,
        "tangerine": 2,
        "lemon": 2,
        "lime": 1,
        "banana": 2,
        "pineapple": 2,
        "mango": 1,
        "red apple": 4,
        "green apple": 2,
        "pear": 2,
        "peach": 2,
        "cherries": 2,
        "strawberry": 2,
        "blueberries": 1,
        "kiwi fruit": 1,
        "coconut": 1,
        "tomato": 0.5,
        "olive": 0.3,
    },
    "vegetable": {
        "avocado": 1,
        "eggplant": 2,
        "potato": 1,
        "carrot": 3,
        "ear of corn": 2,
        "hot pepper": 1,
        "bell pepper": 2,
        "cucumber": 2,
        "leafy green": 2,
        "broccoli": 3,
        "garlic": 1,
        "onion": 1,
        "beans": 0.5,
        "pea pod": 1,
        "root vegetable": 1,
        "tomato": 1,
        "ginger root": 0.3,
        "brown mushroom": 0.5,
    },
    "horse": {"horse": 4, "horse face": 4, "carousel horse": 1, "zebra": 0.2},
    "reptile": {"crocodile": 3, "turtle": 3, "lizard": 3, "snake": 3, "sauropod": 1, "T-Rex": 1},
    "truck": {"delivery truck": 4, "articulated lorry": 4, "pickup truck": 2, "fire engine": 2},
    "train": {
        "locomotive": 3,
        "high-speed train": 3,
        "bullet train": 2,
        "train": 3,
        "metro": 2,
        "light rail": 2,
        "railway car": 1,
        "tram": 2,
        "monorail": 1,
        "mountain railway": 1,
        "tram car": 1,
        "station": 0.5,
    },
    "hat": {
        "top hat": 4,
        "woman's hat": 4,
        "billed cap": 3,
        "graduation cap": 1.5,
        "rescue worker's helmet": 0.7,
        "military helmet": 0.7,
    },
    "shoe": {
        "man's shoe": 3,
        "running shoe": 4,
        "hiking boot": 2,
        "flat shoe": 2,
        "high-heeled shoe": 3,
        "woman's sandal": 1,
        "ballet shoes": 1,
        "woman's boot": 2,
    },
    "smiley face": {
        "grinning face": 4,
        "grinning face with big eyes": 4,
        "grinning face with smiling eyes": 3,
        "beaming face with smiling eyes": 3,
        "slightly smiling face": 4,
        "smiling face with smiling eyes": 3,
        "smiling face": 3,
        "winking face": 2,
        "smiling face with sunglasses": 1,
        "face with tears of joy": 1,
        "smiling face with heart-eyes": 1,
        "grinning squinting face": 1,
        "smiling face with halo": 0.5,
    },
    "drink": {
        "glass of milk": 2,
        "hot beverage": 3,
        "teacup without handle": 2,
        "wine glass": 3,
        "cocktail glass": 2,
        "tropical drink": 2,
        "beer mug": 3,
        "tumbler glass": 2,
        "cup with straw": 2,
        "bubble tea": 2,
        "beverage box": 1,
        "mate": 1,
        "bottle with popping cork": 1,
        "sake": 1,
    },
    "musical instrument": {
        "saxophone": 2,
        "trumpet": 2,
        "accordion": 1,
        "guitar": 4,
        "musical keyboard": 2,
        "violin": 3,
        "banjo": 2,
        "drum": 2,
        "long drum": 1,
        "flute": 1,
        "maracas": 1,
        "trombone": 1,
        "harp": 1,
    },
    "house": {"house": 4, "house with garden": 4, "houses": 1, "derelict house": 1, "hut": 1},
    "tree": {
        "evergreen tree": 3,
        "deciduous tree": 4,
        "palm tree": 3,
        "Christmas tree": 1,
        "tanabata tree": 0.5,
        "leafless tree": 1,
    },
}
# Fantastic and real animals elsewhere in the set are left to the captions of their own labels.

EVALUATED = (
    "bird",
    "mammal",
    "animal",
    "fish",
    "building",
    "bus",
    "car",
    "airplane",
    "insect",
    "dog",
    "cat",
    "dragon",
    "boat",
    "bridge",
    "person",
    "woman",
    "man",
    "child",
    "shirt",
    "dress",
)
DEVELOPMENT = (
    "flower",
    "fruit",
    "vegetable",
    "horse",
    "reptile",
    "truck",
    "train",
    "hat",
    "shoe",
    "smiley face",
    "doctor",
    "firefighter",
    "drink",
    "musical instrument",
    "house",
    "tree",
)
PEOPLE = ("person", "woman", "man", "child", "doctor", "firefighter")

# How often a category is drawn relative to the others: diverse ones need more rows than a bus or a bridge.
CATEGORY_WEIGHT = {
    "mammal": 1.6,
    "animal": 1.6,
    "bird": 1.5,
    "insect": 1.2,
    "person": 1.4,
    "man": 1.2,
    "woman": 1.2,
    "fish": 1.2,
    "bus": 0.8,
    "bridge": 0.6,
    "dragon": 0.9,
    "dress": 0.8,
}

_SUBGROUP_WEIGHT = {
    "person": 5.0,
    "person-role": 1.5,
    "person-gesture": 1.2,
    "person-fantasy": 0.25,
    "person-activity": 0.25,
    "person-sport": 0.2,
    "person-resting": 0.15,
}
_CHILDREN = {"child": 5.0, "boy": 5.0, "girl": 5.0, "baby": 3.0, "baby angel": 0.3}
_OLD = {"older person", "old man", "old woman"}


def concept_of(label: str) -> str:
    """Name shared by the gendered forms of one emoji, so that a split by concept keeps them together.

    Args:
        label: emojibase label without skin tone, for example "woman firefighter" or "person: red hair".

    Returns:
        The label without its gender word: "firefighter", "red hair"; "person" for the plain man, woman and person.
    """
    words = label.replace(":", " ").split()
    gendered = ("man", "woman", "person", "men", "women", "people", "mr.", "mrs.", "mx")
    kept = [w for w in words if w.lower() not in gendered]
    return " ".join(kept) if kept else "person"


def people_categories(label: str, subgroup: str, gender: str | None) -> dict[str, float]:
    """Categories of an emoji of a human, by rule.

    Args:
        label: emojibase label without skin tone.
        subgroup: emojibase subgroup, for example "person-role".
        gender: "man", "woman" or None.

    Returns:
        Category to typicality; empty when the emoji shows no single person.
    """
    if subgroup not in _SUBGROUP_WEIGHT:
        return {}
    if label in _CHILDREN:
        return {"child": _CHILDREN[label], "person": 0.3}
    weight = _SUBGROUP_WEIGHT[subgroup] * (0.4 if label in _OLD else 1.0)
    weight = _BUST.get(label, weight) * (3.0 if label in _BUST else 1.0)
    found = {"person": weight * (1.0 if gender != "woman" else 0.6)}
    if gender:
        found[gender] = weight
    concept = concept_of(label)
    if concept == "health worker":
        found["doctor"] = {"man": 3.0, "woman": 1.0}.get(gender or "", 1.5)
    if concept == "firefighter":
        found["firefighter"] = {"man": 3.0, "woman": 1.0}.get(gender or "", 1.5)
    return found


def categories_of(label: str, subgroup: str, gender: str | None) -> dict[str, float]:
    """All categories of an emoji with their typicality (empty for the rest of the world)."""
    found = {name: float(members[label]) for name, members in OBJECTS.items() if label in members}
    found.update(people_categories(label, subgroup, gender))
    return found
