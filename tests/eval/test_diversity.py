"""Closed forms and independent implementations of the measures within a group."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from eval.diversity import mean_pairwise_distance, mean_pairwise_similarity, vendi_score


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
    with pytest.raises(ValueError, match=r"\[G, K, D\]"):
        measure(torch.randn(4, 5))
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
