"""What the paper's scripts compute in ways of their own."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from eval.fidelity import InceptionScore
from eval.released import ReleasedInceptionScore, imagenet_templates


def test_its_inception_score_is_of_parts_in_order_without_the_rest():
    logits = torch.cat([3 * torch.randn(20, 7, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 7)])
    found = ReleasedInceptionScore(splits=2)
    found.update(logits)
    p = logits[:20].double().softmax(dim=1).numpy()
    parts = [np.exp(np.mean([entropy(row, part.mean(axis=0)) for row in part])) for part in (p[:10], p[10:])]
    assert found.compute().item() == pytest.approx(np.mean(parts))
    shuffled = InceptionScore(splits=2)
    shuffled.update(logits)
    assert shuffled.compute().item() != pytest.approx(np.mean(parts), rel=1e-3)
    few = ReleasedInceptionScore(splits=3)
    few.update(logits)
    with pytest.raises(ValueError, match="at least 10 images"):
        few.compute()


def test_the_templates_have_one_place_for_the_class():
    assert len(set(imagenet_templates())) == 80
    assert all(template.count("{}") == 1 for template in imagenet_templates())
