"""Methods that choose among candidates: which they choose, and that these are the images of their seeds."""

import functools
import itertools

import numpy as np
import pytest
import torch
from stand_ins import Colours
from test_methods import CALLS, PAIR, shape_of

from eval.encoders import Encoder
from experiments.methods.group_inference import GroupInference, best_subset, counts
from experiments.methods.method import Baseline, sample
from experiments.methods.selection import BestOf, farthest_first
from experiments.methods.steps import decoded
from experiments.prompts import Group

#: Its seeds begin with those of the pair.
FIVE = Group("one", "a red thing", "red", 0, 5)


class Corners(Encoder):
    """Embeds an image as its pixels at 4 x 4 positions, less their mean: images of random weights differ in them."""

    name, id = "corners", "corners-1"

    def embed_images(self, images):
        pixels = torch.nn.functional.adaptive_avg_pool2d(torch.stack(images).float(), 4).flatten(1)
        return pixels - pixels.mean(dim=1, keepdim=True)


class Ranked(Encoder):
    """Embeds the last image of a list nearest to every text, whatever it shows."""

    name, id = "ranked", "ranked-1"

    def embed_images(self, images):
        angle = torch.linspace(1.5, 0, len(images))
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    def embed_texts(self, texts):
        return torch.tensor([[1.0, 0.0]] * len(texts))


def random_problem(n, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=1)
    return torch.rand(n, generator=generator), 1 - points @ points.T


def worth(chosen, score, distance, weight):
    pairs = sum(float(distance[i, j]) for i, j in itertools.combinations(chosen, 2))
    return sum(float(score[i]) for i in chosen) + weight * pairs


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.5])
def test_the_best_subset_is_that_of_a_search_through_all(weight):
    for seed in range(8):
        score, distance = random_problem(9, seed)
        chosen = best_subset(score, distance, 4, weight)
        best = max(itertools.combinations(range(9), 4), key=lambda some: worth(some, score, distance, weight))
        assert chosen == sorted(set(chosen)) and len(chosen) == 4
        assert worth(chosen, score, distance, weight) == pytest.approx(worth(best, score, distance, weight), rel=1e-6)
        if not weight:
            assert chosen == sorted(score.topk(4).indices.tolist())


def test_no_exchange_of_two_makes_the_subset_better():
    score, distance = random_problem(30, 1)
    chosen = best_subset(score, distance, 6, 1.5)
    for out, into in itertools.product(chosen, set(range(30)) - set(chosen)):
        other = [into if one == out else one for one in chosen]
        assert worth(other, score, distance, 1.5) <= worth(chosen, score, distance, 1.5) + 1e-6


def test_the_farthest_come_first_and_each_step_drops_a_candidate():
    _, distance = random_problem(8, 0)
    chosen = [0]
    while len(chosen) < 4:
        rest = [i for i in range(8) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in chosen)))
    assert farthest_first(distance, 4) == chosen
    assert farthest_first(torch.zeros(3, 3), 3) == [0, 1, 2], "none twice, however alike"
    assert counts(128, 0.5, 4) == [64, 32, 16, 8, 4] and counts(64, 0.1, 4) == [7, 4]
    assert counts(6, 0.9, 4) == [5, 4] and counts(4, 0.5, 4) == []


METHODS = {
    "best of": lambda candidates: BestOf("m", Corners(), candidates),
    "group inference": lambda candidates: GroupInference("m", Corners(), candidates, keep=0.8),
    "group inference, scored": lambda candidates: GroupInference("m", Corners(), candidates, scorer=Colours()),
}


@pytest.fixture(params=METHODS)
def make(request):
    return METHODS[request.param]


def test_the_chosen_images_are_those_of_their_seeds(make, pipe, kind):
    call = CALLS[kind] | {"num_inference_steps": 3}
    Baseline().generate(pipe, PAIR, call)  # a pipeline keeps its call's options
    shape = shape_of(pipe), sorted(vars(pipe.vae))
    result = make(5).generate(pipe, PAIR, call)
    chosen, seeds = result.statistics["chosen"], list(result.seeds)
    assert len(set(chosen)) == 2 and seeds == [FIVE.image_seeds()[index] for index in chosen]
    assert FIVE.image_seeds()[:2] == PAIR.image_seeds()
    assert np.allclose(result.images, sample(pipe, PAIR, call, seeds), atol=2e-3)  # batches differ in rounding
    assert (shape_of(pipe), sorted(vars(pipe.vae))) == shape


@pytest.mark.parametrize(("size", "candidates"), [(2, 2), (1, 4)])
def test_without_a_choice_it_is_the_baseline_bit_for_bit(make, pipe, kind, size, candidates):
    group = Group("one", "a red thing", "red", 0, size)
    stock = Baseline().generate(pipe, group, CALLS[kind]).images
    assert np.array_equal(make(candidates).generate(pipe, group, CALLS[kind]).images, stock)


def test_the_best_of_several_are_the_farthest_of_all(pipe, kind):
    result = BestOf("m", Corners(), 5).generate(pipe, PAIR, CALLS[kind])
    candidates = np.concatenate([sample(pipe, FIVE, CALLS[kind], [seed]) for seed in FIVE.image_seeds()])
    pixels = [torch.from_numpy((255 * image).round().astype(np.uint8)).permute(2, 0, 1) for image in candidates]
    features = Corners().embed_images(pixels)
    cosines = torch.nn.functional.cosine_similarity(features[:1], features, dim=1)
    assert result.statistics["chosen"] == [0, int(cosines.argmin())]
    assert np.array_equal(result.images[0], Baseline().generate(pipe, PAIR, CALLS[kind]).images[0])


def test_a_dropped_candidate_is_denoised_no_further(pipe, kind):
    rows = []
    denoiser = pipe.unet if kind == "sdxl" else pipe.transformer
    forward = denoiser.forward

    @functools.wraps(forward)
    def counted(**arguments):
        rows.append(len(arguments["sample"]) // 2 if kind == "sdxl" else len(arguments["hidden_states"]))
        return forward(**arguments)

    denoiser.forward = counted
    GroupInference("m", Corners(), 6).generate(pipe, PAIR, CALLS[kind] | {"num_inference_steps": 4})
    assert rows == [6, 3, 2, 2]


def test_the_score_of_the_text_decides_if_distances_have_no_weight(pipe, kind):
    method = GroupInference("m", Corners(), 5, distance_weight=0, scorer=Ranked())
    assert method.generate(pipe, PAIR, CALLS[kind]).statistics["chosen"] == [3, 4]


def test_previews_are_decoded_as_the_pipeline_decodes(pipe, kind):
    call = {"num_images_per_prompt": 2, **CALLS[kind]}
    latents, images = (
        pipe("a red thing", generator=torch.Generator().manual_seed(0), output_type=output, **call).images
        for output in ("latent", "np")
    )
    if kind == "flux":
        latents = pipe._unpack_latents(latents, 32, 32, pipe.vae_scale_factor)
    with torch.no_grad():
        assert np.allclose(decoded(pipe, latents).numpy(), images, atol=1e-4)


def test_too_few_candidates_or_steps_are_refused_and_encoders_are_part_of_the_identity(tiny_sdxl):
    with pytest.raises(ValueError, match=r"chooses the 2 images of a group among 1: set method.candidates"):
        BestOf("m", Corners(), 1).generate(tiny_sdxl, PAIR, CALLS["sdxl"])
    with pytest.raises(ValueError, match=r"takes 4 steps to leave 2 of 20, got 2: keep"):
        GroupInference("m", Corners(), 20).generate(tiny_sdxl, PAIR, CALLS["sdxl"])
    settings = {"encoder": "corners-1", "candidates": 6}
    assert BestOf("m", Corners(), 6).settings() == settings
    settings |= {"keep": 0.5, "distance_weight": 1.5, "scorer": "colours-1"}
    assert GroupInference("m", Corners(), 6, scorer=Colours()).settings() == settings
