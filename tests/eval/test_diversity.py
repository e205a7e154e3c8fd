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
from eval.encoders import PixelEncoder
from eval.images import read_manifest
from eval.imageset import ImageSet
from eval.intervals import interval_of
from eval.metric import measure


def mean_pairwise_distance(embeddings):
    return PairwiseDistance().score(embeddings)


def noise(groups=5, k=4, d=7, seed=0):
    return torch.randn(groups, k, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [2, 4, 9])
def test_identical_images(k):
    embeddings = noise(3, 1, 6).repeat(1, k, 1)
    torch.testing.assert_close(mean_pairwise_similarity(embeddings), torch.ones(3).double())
    torch.testing.assert_close(mean_pairwise_distance(embeddings), torch.zeros(3).double(), atol=1e-7, rtol=0)
    for q in (0.5, 1, 2, math.inf):
        torch.testing.assert_close(vendi_score(embeddings, q), torch.ones(3).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [2, 4, 9])
def test_orthogonal_images(k):
    embeddings = torch.eye(k)[None]
    assert mean_pairwise_similarity(embeddings).tolist() == [0]
    assert mean_pairwise_distance(embeddings).tolist() == [1]
    for q in (0.5, 1, 2, math.inf):
        assert vendi_score(embeddings, q).item() == pytest.approx(k)


def test_two_pairs_of_duplicates():
    # of 6 pairs 2 are equal and 4 orthogonal; two different images in effect
    embeddings = torch.eye(2)[[0, 0, 1, 1]][None]
    assert mean_pairwise_similarity(embeddings).item() == pytest.approx(1 / 3)
    assert vendi_score(embeddings).item() == pytest.approx(2)


def test_opposite_images():
    assert mean_pairwise_distance(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])).item() == pytest.approx(2)


def test_similarity_against_a_double_loop():
    embeddings = noise()
    for group, found in zip(embeddings.numpy(), mean_pairwise_similarity(embeddings).tolist(), strict=True):
        pairs = []
        for i in range(len(group)):
            for j in range(i):
                pairs.append(group[i] @ group[j] / np.linalg.norm(group[i]) / np.linalg.norm(group[j]))
        assert found == pytest.approx(np.mean(pairs), abs=1e-6)


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0, math.inf])
def test_vendi_against_scipy(q):
    embeddings = noise(k=6, d=9)
    for group, found in zip(embeddings.double().numpy(), vendi_score(embeddings, q).tolist(), strict=True):
        unit = group / np.linalg.norm(group, axis=1, keepdims=True)
        # the d x d matrix has the same non-zero eigenvalues, and a general solver knows nothing of symmetry
        spectrum = scipy.linalg.eig(unit.T @ unit / len(unit), right=False).real
        spectrum = spectrum[spectrum > 1e-12]
        if q == 1:
            expected = math.exp(-sum(value * math.log(value) for value in spectrum))
        elif math.isinf(q):
            expected = 1 / max(spectrum)
        else:
            expected = math.exp(math.log(sum(value**q for value in spectrum)) / (1 - q))
        assert found == pytest.approx(expected, rel=1e-6)


def test_vendi_is_continuous_in_q():
    embeddings = noise()
    torch.testing.assert_close(vendi_score(embeddings, 1 + 1e-6), vendi_score(embeddings, 1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("measure", [mean_pairwise_similarity, mean_pairwise_distance, vendi_score])
def test_order_scale_and_neighbours_do_not_matter(measure):
    embeddings = noise()
    expected = measure(embeddings)
    torch.testing.assert_close(measure(embeddings[:, [2, 0, 3, 1]]), expected)
    torch.testing.assert_close(measure(embeddings * 17), expected)
    torch.testing.assert_close(torch.cat([measure(group[None]) for group in embeddings]), expected)


@pytest.mark.parametrize("measure", [mean_pairwise_similarity, vendi_score])
def test_what_is_refused(measure):
    with pytest.raises(ValueError, match=r"\[\.\.\., K, D\]"):
        measure(torch.randn(5))
    with pytest.raises(ValueError, match="not zero"):
        measure(torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match="finite"):
        measure(torch.full((1, 3, 5), math.nan))


def test_bounds():
    with pytest.raises(ValueError, match="K >= 2"):
        mean_pairwise_similarity(noise(k=1))
    assert vendi_score(noise(k=1)).tolist() == pytest.approx([1] * 5)
    for q in (0, -1, math.nan):
        with pytest.raises(ValueError, match="q > 0"):
            vendi_score(noise(), q)


def test_pairwise_values_by_hand(numbered_run, scripted):
    run = numbered_run(categories=("bird",), seeds=(0, 1), images=3)
    # first group: all equal; second: mutually orthogonal
    encoder = scripted([[1, 0, 0]] * 3 + np.eye(3).tolist())
    assert [group["value"] for group in measure(PairwiseSimilarity(encoder), run)["groups"]] == pytest.approx([1, 0])
    assert measure(PairwiseSimilarity(encoder), run)["value"] == pytest.approx(0.5)
    assert [group["value"] for group in measure(PairwiseDistance(encoder), run)["groups"]] == pytest.approx([0, 1])
    assert [group["value"] for group in measure(VendiScore(encoder), run)["groups"]] == pytest.approx([1, 3], abs=1e-5)


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


def test_pooled_similarity_takes_all_pairs_of_a_category(numbered_run, make_run, scripted):
    run = numbered_run(categories=("bird", "fish"), seeds=(0, 1), images=2)
    vectors = np.random.default_rng(0).normal(size=(8, 3))
    metric = CategoryPooledSimilarity(scripted(vectors))
    document = measure(metric, run)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    by_hand = [np.mean([unit[i] @ unit[j] for i in range(k, k + 4) for j in range(k, i)]) for k in (0, 4)]
    assert [group["value"] for group in document["groups"]] == pytest.approx(by_hand, abs=1e-6)
    assert [group["group"] for group in document["groups"]] == ["bird/all", "fish/all"]
    assert document["value"] == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert (document["n_groups"], document["n_images"]) == (2, 8)
    # categories are the units, whatever is clustered
    more = measure(CategoryPooledSimilarity(PixelEncoder()), make_run("more", categories="abcde"))
    found = [interval_of(more, cluster=cluster, n_resamples=500) for cluster in (None, "prompt", "category")]
    assert len(set(found)) == 1 and found[0].low is not None
    with pytest.raises(ValueError, match=r"at least 2 images in every category.*fish"):
        metric.per_group(ImageSet(run, read_manifest(run)[:5]))


def test_prompts_are_pooled_over_their_seeds_alone(make_run):
    """As the categories are of the same images, where every prompt is one."""
    run, encoder = make_run(seeds=(0, 1), images=2), PixelEncoder()
    by_category = measure(CategoryPooledSimilarity(encoder), run)
    rows = [replace(row, category="animal") for row in read_manifest(run)]
    by_prompt = measure(PromptPooledSimilarity(encoder), ImageSet(run, rows))
    assert [group["group"] for group in by_prompt["groups"]] == ["bird/all", "fish/all"]
    assert [group["value"] for group in by_prompt["groups"]] == [group["value"] for group in by_category["groups"]]
    assert {group["category"] for group in by_prompt["groups"]} == {"animal"}
    assert interval_of(by_prompt, cluster="prompt") == interval_of(by_category, cluster="prompt")


def test_where_a_category_is_one_group_pooled_is_within(make_run):
    run = make_run(seeds=(0,))
    values = [measure(kind(PixelEncoder()), run)["value"] for kind in (CategoryPooledSimilarity, PairwiseSimilarity)]
    assert values[0] == pytest.approx(values[1])


def test_vendi_order_is_a_setting(numbered_run, scripted):
    run = numbered_run(categories=("bird",), seeds=(0,), images=4)
    encoder = scripted([[1, 0], [1, 0], [1, 0], [0, 1]])
    values = [measure(VendiScore(encoder, q), run) for q in (1, 2, math.inf)]
    assert [document["value"] for document in values] == pytest.approx([4 / 3**0.75, 1.6, 4 / 3])
    assert [document["settings"] for document in values] == [{"q": 1.0}, {"q": 2.0}, {"q": "inf"}]
    with pytest.raises(ValueError, match="q > 0"):
        VendiScore(encoder, 0)
