"""Fit the classifiers of skin tones and genders, and lay out what they are validated on: `models/mini-people/`.

    python -m training.people --npm DIR

Fitted on emoji of people that no prompt about stereotypes asks for; validated on those that they ask for.
"""

import argparse
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
from experiments.tables.templates import render
from training import data
from training.reference import write_picture
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
    """Return the words that pictures are laid out of, each with the concepts of its emoji."""
    asked = OmegaConf.load(PROJECT / "conf" / "prompts" / "stereotypes.yaml").people
    return {word: CONCEPTS.get(word, (word,)) for word in (*asked, UNSEEN)}


def tone_of(item: Emoji) -> int:
    """Return the index of an emoji's tone in `TONES`."""
    return TONES.index(f"{item.tone or 'no'} skin tone")


def gender_of(item: Emoji) -> str | None:
    """Return "woman" or "man" for those and for girls and boys, None for others."""
    return {"girl": "woman", "boy": "man"}.get(item.concept, item.gender)


def composed(pixels: np.ndarray) -> torch.Tensor:
    """Return pictures, uint8 RGBA [N, H, W, 4], on white: uint8 [N, 3, H, W]."""
    colour, alpha = pixels[..., :3].astype(np.float32), pixels[..., 3:].astype(np.float32) / 255
    return torch.from_numpy((colour * alpha + 255 * (1 - alpha)).round().astype(np.uint8)).movedim(-1, 1)


def smoothed(counts: torch.Tensor) -> torch.Tensor:
    """Return a histogram of colours [BINS^3], smoothed by (1, 2, 1) / 4 along each channel, as probabilities."""
    smooth = counts.double().reshape(BINS, BINS, BINS).numpy()
    for axis in range(3):
        smooth = convolve1d(smooth, [0.25, 0.5, 0.25], axis, mode="nearest")
    share = torch.from_numpy(smooth).flatten() / smooth.sum()
    return ((1 - EVEN) * share + EVEN / len(share)).float()


def fit(images: torch.Tensor, tones: Sequence[int], emoji: Sequence[object]) -> dict[str, torch.Tensor]:
    """Count the histograms of `eval.skin`.

    Args:
        images: uint8 [N, 3, H, W].
        tones: of each the index in `TONES`.
        emoji: what it shows; pictures that show the same differ in their tone alone.

    Returns:
        place [SIDE, SIDE], skin [len(TONES), BINS^3] and rest [BINS^3].

    Raises:
        ValueError: no emoji is there in every tone.
    """
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), SIDE)
    alike = defaultdict(list)
    for index, shown in enumerate(emoji):
        alike[shown].append(index)
    masks, used = torch.zeros(len(images), SIDE, SIDE, dtype=torch.bool), []
    for members in alike.values():
        if {tones[index] for index in members} == {*range(len(TONES))}:
            pairs = [(small[one] - small[other]).abs().amax(dim=0) for one, other in combinations(members, 2)]
            masks[members] = torch.stack(pairs).amin(dim=0) > DIFFERS
            used += members
    if not used:
        raise ValueError(f"expected emoji in every one of {len(TONES)} tones, got none; give all pictures of people")
    bins = torch.stack([colour_bins(image) for image in images])
    counted = torch.zeros(len(TONES) + 1, BINS**3)
    for index in used:
        counted[tones[index]] += bins[index][masks[index]].bincount(minlength=BINS**3)
        counted[-1] += bins[index][~masks[index]].bincount(minlength=BINS**3)
    place = 0.01 + 0.98 * masks[used].float().mean(dim=0)
    return {"place": place, "skin": torch.stack([*map(smoothed, counted[:-1])]), "rest": smoothed(counted[-1])}


def fit_probe(features: torch.Tensor, men: torch.Tensor, decay: float = 0.01) -> dict[str, torch.Tensor]:
    """Fit the logistic probe of `eval.people.Genders` to features [N, D] and flags [N], both values among them.

    Features are standardised, which the returned weight [D] and bias [] undo, and the sum of squares is held down.
    """
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6) * features.shape[1] ** 0.5 / 10
    given, truth = (features - mean) / scale, men.float()
    weight, bias = torch.zeros(features.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        odds = given @ weight + bias
        found = torch.nn.functional.binary_cross_entropy_with_logits(odds, truth) + decay * weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    weight, bias = weight.detach() / scale, bias.detach()
    return {"weight": weight, "bias": bias - mean @ weight}


def draw(emoji: Sequence[Emoji], seed: int = 0) -> dict[str, list[int]]:
    """Draw a picture of every word, gender and tone: folder (relative) -> positions in `emoji`."""
    folders = {}
    for word, concepts in words().items():
        for gender in ("woman", "man"):
            for tone, name in enumerate(TONES):
                found = [
                    i
                    for i, item in enumerate(emoji)
                    if item.concept in concepts and gender_of(item) == gender and tone_of(item) == tone
                ]
                said = {"child": {"woman": "girl", "man": "boy"}[gender], "person": gender}.get(
                    word, f"{gender} {concepts[0]}"
                )
                chosen = random.Random(f"{seed}/{word}/{gender}/{tone}").choice(found)
                folders[f"{word}/{said} with {name}"] = [chosen]
    return folders


def right(images: torch.Tensor, tones: Sequence[int], fitted: Mapping[str, torch.Tensor]) -> float:
    """Return the share of pictures [N, 3, H, W] whose tone is found."""
    found = [int(log_likelihoods(colour_bins(image), **fitted).argmax()) for image in images]
    return float(np.mean(np.asarray(found) == np.asarray(tones)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit the classifier of skin tones and lay out people to validate on")
    parser.add_argument("--npm", type=Path, default=Path(".npm"), help="folder of the npm tarballs; fetched if absent")
    parser.add_argument("--out", type=Path, default=PROJECT / "models" / "mini-people")
    arguments = parser.parse_args()
    emoji, documents = list_images(arguments.npm)
    held = [flag and item.concept != UNSEEN for item, flag in zip(emoji, data.hold_out(emoji), strict=True)]
    people = [i for i, item in enumerate(emoji) if item.subgroup in SUBGROUPS and not held[i]]
    emoji, pixels = [emoji[i] for i in people], rasterise_all([documents[i] for i in people])
    asked = {concept for concepts in words().values() for concept in concepts}
    tones, images = [tone_of(item) for item in emoji], composed(pixels)
    parts = [[i for i, item in enumerate(emoji) if (item.concept in asked) == inside] for inside in (False, True)]
    others, own = parts
    shown = [(emoji[i].style_set, emoji[i].label) for i in others]
    fitted = fit(images[others], [tones[i] for i in others], shown)
    gendered = [i for i in others if gender_of(emoji[i])]
    encoders = (HFClip(PROJECT / "models" / "mini-clip", "mini-clip"), EffNetLite0())
    batches = [list(images[gendered[start : start + 32]]) for start in range(0, len(gendered), 32)]
    features = [torch.cat([encoder.embed_images(batch) for batch in batches]) for encoder in encoders]
    probe = fit_probe(torch.cat(features, dim=1), torch.tensor([gender_of(emoji[i]) == "man" for i in gendered]))
    shutil.rmtree(arguments.out, ignore_errors=True)
    used = []
    for folder, positions in draw(emoji).items():
        (arguments.out / folder).mkdir(parents=True)
        for index in positions:
            write_picture(pixels[index], arguments.out / folder, emoji[index])
            used.append(emoji[index])
    halves = {name: tensor.half() for name, tensor in fitted.items()}
    save_file(halves, arguments.out / "skin_tones.safetensors")
    save_file(probe, arguments.out / "genders.safetensors")
    facts = {
        "bins": BINS,
        "side": SIDE,
        "fitted": len(others),
        "gendered": len(gendered),
        "concepts": len({emoji[i].concept for i in others}),
        "pictures": len(used),
        "validated": len(own),
        "accuracy": right(images[own], [tones[i] for i in own], {k: t.float() for k, t in halves.items()}),
        "statistics": data.statistics(used),
    }
    (arguments.out / "README.md").write_text(render("training/cards/mini-people.md.j2", **facts))
    print({key: value for key, value in facts.items() if key != "statistics"})


if __name__ == "__main__":
    main()
