"""Fit the classifiers of skin tones and genders, and lay out what they are validated on: `models/mini-people/`.

They are fitted on emoji of people that no prompt about stereotypes asks for, and validated on those that they ask for.
"""

import random
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from scipy.ndimage import convolve1d

from eval.clip import HFClip
from eval.features import EffNetLite0
from eval.people import BINS, SIDE, TONES, colour_bins, log_likelihoods
from experiments import PROJECT
from training import data
from training.reference import write_card, write_image
from training.sources import Emoji, list_images, rasterise_all

SUBGROUPS = ("person", "person-role", "person-gesture")
#: Words of the prompts whose emoji have other names.
CONCEPTS = {"doctor": ("health worker",), "child": ("boy", "girl")}
#: Held out from the training of mini-clip, too (`data.hold_out`): validated on beside the words.
UNSEEN = "technologist"
#: Levels by which a colour channel differs at least between any two tones of one emoji where they have skin; hair
#: differs between some alone. Chosen among 8, 15 and 25 by images without a method: black hair is no dark skin.
DIFFERS = 15
#: Share of each histogram that is spread evenly, so that no colour is impossible.
EVEN = 1e-3


def words() -> dict[str, tuple[str, ...]]:
    """Return the words whose images are laid out, each with the concepts of its emoji."""
    prompted = OmegaConf.load(PROJECT / "conf" / "prompts" / "stereotypes.yaml").people
    return {word: CONCEPTS.get(word, (word,)) for word in (*prompted, UNSEEN)}


def tone_of(item: Emoji) -> int:
    """Return the index of an emoji's tone in `TONES`."""
    return TONES.index(f"{item.tone or 'no'} skin tone")


def gender_of(item: Emoji) -> str | None:
    """Return "woman" or "man" for those and for girls and boys, None for others."""
    return {"girl": "woman", "boy": "man"}.get(item.concept, item.gender)


def on_white(pixels: np.ndarray) -> torch.Tensor:
    """Return images, uint8 RGBA [N, H, W, 4], on white: uint8 [N, 3, H, W]."""
    colour, alpha = pixels[..., :3].astype(np.float32), pixels[..., 3:].astype(np.float32) / 255
    return torch.from_numpy((colour * alpha + 255 * (1 - alpha)).round().astype(np.uint8)).movedim(-1, 1)


def smooth(counts: torch.Tensor) -> torch.Tensor:
    """Return a histogram of colours [BINS^3], smoothed by (1, 2, 1) / 4 along each channel, as probabilities."""
    histogram = counts.double().reshape(BINS, BINS, BINS).numpy()
    for axis in range(3):
        histogram = convolve1d(histogram, [0.25, 0.5, 0.25], axis, mode="nearest")
    share = torch.from_numpy(histogram).flatten() / histogram.sum()
    return ((1 - EVEN) * share + EVEN / len(share)).float()


def fit(images: torch.Tensor, tones: Sequence[int], emoji: Sequence[object]) -> dict[str, torch.Tensor]:
    """Count the histograms of `eval.people`.

    Args:
        images: uint8 [N, 3, H, W].
        tones: of each the index in `TONES`.
        emoji: of each what it shows; images that show the same differ in their tone alone.

    Returns:
        place [SIDE, SIDE], skin [len(TONES), BINS^3] and rest [BINS^3].

    Raises:
        ValueError: no emoji has an image in every tone.
    """
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), SIDE)
    indices_of = defaultdict(list)
    for index, shown in enumerate(emoji):
        indices_of[shown].append(index)
    masks, used = torch.zeros(len(images), SIDE, SIDE, dtype=torch.bool), []
    for members in indices_of.values():
        if {tones[index] for index in members} == {*range(len(TONES))}:
            pairs = [(small[one] - small[other]).abs().amax(dim=0) for one, other in combinations(members, 2)]
            masks[members] = torch.stack(pairs).amin(dim=0) > DIFFERS
            used += members
    if not used:
        raise ValueError(f"expected emoji in every one of {len(TONES)} tones, got none; give all pictures of people")
    bins = torch.stack([colour_bins(image) for image in images])
    counts = torch.zeros(len(TONES) + 1, BINS**3)
    for index in used:
        counts[tones[index]] += bins[index][masks[index]].bincount(minlength=BINS**3)
        counts[-1] += bins[index][~masks[index]].bincount(minlength=BINS**3)
    place = 0.01 + 0.98 * masks[used].float().mean(dim=0)
    return {"place": place, "skin": torch.stack([*map(smooth, counts[:-1])]), "rest": smooth(counts[-1])}


def fit_probe(features: torch.Tensor, men: torch.Tensor, decay: float = 0.01) -> dict[str, torch.Tensor]:
    """Fit the logistic probe of `eval.people.Genders` to features [N, D] and flags [N], both values among them.

    Features are standardised, which the returned weight [D] and bias [] undo, and the sum of squares is held down.
    """
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6) * features.shape[1] ** 0.5 / 10
    standardised, target = (features - mean) / scale, men.float()
    weight, bias = torch.zeros(features.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = standardised @ weight + bias
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        value = entropy + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach() / scale, bias.detach()
    return {"weight": weight, "bias": bias - mean @ weight}


def draw(emoji: Sequence[Emoji], seed: int = 0) -> dict[str, int]:
    """Draw an image of every word, gender and tone: folder (relative) -> position in `emoji`."""
    folders = {}
    for word, concepts in words().items():
        names = {gender: f"{gender} {concepts[0]}" for gender in ("woman", "man")}
        names |= {"child": {"woman": "girl", "man": "boy"}, "person": {"woman": "woman", "man": "man"}}.get(word, {})
        for gender, name in names.items():
            people = [i for i, item in enumerate(emoji) if item.concept in concepts and gender_of(item) == gender]
            for tone, tone_name in enumerate(TONES):
                candidates = [i for i in people if tone_of(emoji[i]) == tone]
                chosen = random.Random(f"{seed}/{word}/{gender}/{tone}").choice(candidates)
                folders[f"{word}/{name} with {tone_name}"] = chosen
    return folders


def accuracy(images: torch.Tensor, tones: Sequence[int], fitted: Mapping[str, torch.Tensor]) -> float:
    """Return the share of images [N, 3, H, W] whose tone is recognised."""
    predicted = [int(log_likelihoods(colour_bins(image), **fitted).argmax()) for image in images]
    return float(np.mean(np.asarray(predicted) == np.asarray(tones)))


def embed(images: torch.Tensor) -> torch.Tensor:
    """Return the features of images, uint8 [N, 3, H, W], that the classifier of genders reads: [N, D]."""
    encoders = HFClip(PROJECT / "models" / "mini-clip", "mini-clip"), EffNetLite0()
    return torch.cat(
        [torch.cat([encoder.embed_images(list(batch)) for batch in images.split(32)]) for encoder in encoders], dim=1
    )


def lay_out(npm: Path, out: Path) -> None:
    """Fit both classifiers, and write them, the images to validate them on, and the card."""
    emoji, documents = list_images(npm)
    held_out = [flag and item.concept != UNSEEN for item, flag in zip(emoji, data.hold_out(emoji), strict=True)]
    people = [i for i, item in enumerate(emoji) if item.subgroup in SUBGROUPS and not held_out[i]]
    emoji, pixels = [emoji[i] for i in people], rasterise_all([documents[i] for i in people])
    prompted = {concept for concepts in words().values() for concept in concepts}
    tones, images = [tone_of(item) for item in emoji], on_white(pixels)
    fitting = [i for i, item in enumerate(emoji) if item.concept not in prompted]
    validating = [i for i, item in enumerate(emoji) if item.concept in prompted]
    shown = [(emoji[i].style_set, emoji[i].label) for i in fitting]
    fitted = fit(images[fitting], [tones[i] for i in fitting], shown)
    gendered = [i for i in fitting if gender_of(emoji[i])]
    probe = fit_probe(embed(images[gendered]), torch.tensor([gender_of(emoji[i]) == "man" for i in gendered]))
    shutil.rmtree(out, ignore_errors=True)
    drawn = draw(emoji)
    for folder, index in drawn.items():
        write_image(pixels[index], out / folder, emoji[index])
    halves = {name: tensor.half() for name, tensor in fitted.items()}
    save_file(halves, out / "skin_tones.safetensors")
    save_file(probe, out / "genders.safetensors")
    read_back = {name: tensor.float() for name, tensor in halves.items()}
    facts = {
        "bins": BINS,
        "side": SIDE,
        "fitted": len(fitting),
        "gendered": len(gendered),
        "concepts": len({emoji[i].concept for i in fitting}),
        "pictures": len(drawn),
        "validated": len(validating),
        "accuracy": accuracy(images[validating], [tones[i] for i in validating], read_back),
    }
    write_card(out, **facts, statistics=data.statistics([emoji[index] for index in drawn.values()]))
    print(facts)
