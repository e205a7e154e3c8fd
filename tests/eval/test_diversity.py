"""Closed forms and independent implementations of the measures within a group."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from eval.diversity import (
    CategoryPooledSimilarity,
    PairwiseDistance,
    PairwiseSimilarity,
    PromptPooledSimilarity,
    VendiScore,
    mean_pairwise_similarity,
    vendi_score,
)
from eval.images import read_manifest
from eval.imageset import ImageSet
from eval.intervals import interval_of
from eval.metric import measure

mean_pairwise_distance = PairwiseDistance().score
ORDERS = (0.5, 1, 2, math.inf)


def noise(groups=5, k=4, d=7, seed=0):
    return torch.randn(groups, k, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [2, 9])
def test_equal_and_orthogonal_images(k):
    equal, orthogonal = noise(3, 1, 6).repeat(1, k, 1), torch.eye(k)[None]
    torch.testing.assert_close(mean_pairwise_similarity(equal), torch.ones(3).double())
    torch.testing.assert_close(mean_pairwise_distance(equal), torch.zeros(3).double(), atol=1e-7, rtol=0)
    assert (mean_pairwise_similarity(orthogonal).tolist(), mean_pairwise_distance(orthogonal).tolist()) == ([0], [1])
    for q in ORDERS:
        torch.testing.assert_close(vendi_score(equal, q), torch.ones(3).double(), atol=1e-5, rtol=0)
        assert vendi_score(orthogonal, q).item() == pytest.approx(k)


def test_opposite_images_and_two_pairs_of_duplicates():
    assert mean_pairwise_distance(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])).item() == pytest.approx(2)
    # of 6 pairs 2 are equal and 4 orthogonal, which makes two different images
    embeddings = torch.eye(2)[[0, 0, 1, 1]][None]
    assert mean_pairwise_similarity(embeddings).item() == pytest.approx(1 / 3)
    assert vendi_score(embeddings).item() == pytest.approx(2)
    assert vendi_score(noise(k=1)).tolist() == pytest.approx([1] * 5)


@pytest.mark.parametrize("q", ORDERS)
def test_vendi_against_scipy(q):
    embeddings = noise(k=6, d=9)
    for group, score in zip(embeddings.double().numpy(), vendi_score(embeddings, q).tolist(), strict=True):
        unit = group / np.linalg.norm(group, axis=1, keepdims=True)
        # the d x d matrix has the same non-zero eigenvalues, and a general solver does not use the symmetry
        spectrum = scipy.linalg.eig(unit.T @ unit / len(unit), right=False).real
        spectrum = spectrum[spectrum > 1e-12]
        if q == 1:
            expected = math.exp(-sum(value * math.log(value) for value in spectrum))
        elif math.isinf(q):
            expected = 1 / max(spectrum)
        else:
            expected = math.exp(math.log(sum(value**q for value in spectrum)) / (1 - q))
        assert score == pytest.approx(expected, rel=1e-6)
    near_1 = vendi_score(embeddings, 1 + 1e-6)
    torch.testing.assert_close(near_1, vendi_score(embeddings, 1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("function", [mean_pairwise_similarity, mean_pairwise_distance, vendi_score])
def test_order_scale_and_other_groups_do_not_matter_and_nonsense_is_refused(function):
    embeddings = noise()
    expected = function(embeddings)
    torch.testing.assert_close(function(embeddings[:, [2, 0, 3, 1]]), expected)
    torch.testing.assert_close(function(embeddings * 17), expected)
    torch.testing.assert_close(torch.cat([function(group[None]) for group in embeddings]), expected)
    for wrong, message in (
        (torch.randn(5), r"\[\.\.\., K, D\]"),
        (torch.zeros(1, 3, 5), "not zero"),
        (torch.full((1, 3, 5), math.nan), "finite"),
        (noise(k=0 if function is vendi_score else 1), "K >= "),
    ):
        with pytest.raises(ValueError, match=message):
            function(wrong)
    for q in (0, -1, math.nan):
        with pytest.raises(ValueError, match="q > 0"):
            vendi_score(embeddings, q)


def test_metrics_by_hand(numbered_run, scripted):
    run = numbered_run(categories=("bird",), seeds=(0, 1), images=3)
    # the images of the first group are equal, those of the second orthogonal
    encoder = scripted([[1, 0, 0]] * 3 + np.eye(3).tolist())
    for kind, expected in ((PairwiseSimilarity, [1, 0]), (PairwiseDistance, [0, 1]), (VendiScore, [1, 3])):
        document = measure(kind(encoder), run)
        assert [group["value"] for group in document["groups"]] == pytest.approx(expected, abs=1e-5)
        assert document["value"] == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert document["settings"] == {"q": 1.0} and VendiScore(encoder, math.inf).settings() == {"q": "inf"}
    with pytest.raises(ValueError, match="q > 0"):
        VendiScore(encoder, 0)


def test_pairwise_metrics_take_groups_of_several_sizes(numbered_run, scripted):
    run = numbered_run(categories=("bird", "fish"), seeds=(0,), images=3)
    rows = read_manifest(run)[:5]  # 3 birds, 2 fish
    encoder = scripted([[1, 0], [1, 0], [0, 1], [1, 0], [0, 1], [1, 1]])
    images = ImageSet(run, rows[::-1])
    groups = PairwiseSimilarity(encoder).per_group(images)
    assert [(group["n_images"], group["value"]) for group in groups] == [(3, pytest.approx(1 / 3)), (2, 0)]
    with pytest.raises(ValueError, match="1 groups of 2, 1 groups of 3"):
        VendiScore(encoder).per_group(images)
    with pytest.raises(ValueError, match=r"at least 2 images.*fish/000000"):
        PairwiseDistance(encoder).per_group(ImageSet(run, rows[:4]))


def test_pooled_similarities_take_all_pairs_of_a_category_or_prompt(numbered_run, scripted):
    run = numbered_run(seeds=(0, 1), images=2)
    vectors = np.random.default_rng(0).normal(size=(8, 3))
    metric = CategoryPooledSimilarity(scripted(vectors))
    document = measure(metric, run)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = [np.mean([unit[i] @ unit[j] for i in range(k, k + 4) for j in range(k, i)]) for k in (0, 4)]
    assert [group["value"] for group in document["groups"]] == pytest.approx(expected, abs=1e-6)
    assert [group["group"] for group in document["groups"]] == ["bird/all", "fish/all"]
    assert document["value"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert (document["n_groups"], document["n_images"]) == (2, 8)
    # here every category is one prompt, so the prompts of another category have the same values
    rows = [replace(row, category="animal") for row in read_manifest(run)]
    by_prompt = measure(PromptPooledSimilarity(metric.encoder), ImageSet(run, rows))
    assert by_prompt["groups"] == [group | {"category": "animal"} for group in document["groups"]]
    assert interval_of(by_prompt, cluster="prompt") == interval_of(document, cluster="prompt")
    with pytest.raises(ValueError, match=r"at least 2 images in every category.*fish"):
        metric.per_group(ImageSet(run, read_manifest(run)[:5]))
