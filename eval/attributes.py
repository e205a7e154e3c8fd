"""Which kinds of the thing asked for are shown, and how evenly? Zero-shot labels and the entropy of their
counts.

Labels are the argmax of the cosine to text embeddings, each the normalised mean over prompt templates
(Radford et al. 2021, Sec. 3.1.4). Entropies are in nats. The plug-in estimate is biased down by about (m - 1)
/ 2n (m labels seen, n images); Miller and Madow's correction adds just that, so it may lie a little above
log(number of labels). Neither helps where there are few images for the labels: see `minimum_images`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from eval.encoders import Encoder

# Fewer images than this have no entropy, however few the labels.
MINIMUM_IMAGES = 8
IMAGES_A_LABEL = 2


def minimum_images(labels: int) -> int:
    """Return how many images an entropy of so many labels needs: two a label, and `MINIMUM_IMAGES`.

    What bias the correction leaves depends on images a label. Simulated for 2 to 400 labels that are equally frequent,
    or as 1 / rank: at two images a label at most 0.13 nats are missing, at one 0.26, at 8 images of 20 labels 0.8, and
    more in the more even, more diverse set. It counts the labels to choose among, not those seen: who would go by
    those would refuse just the more diverse set.
    """
    return max(MINIMUM_IMAGES, IMAGES_A_LABEL * labels)


def label_embeddings(encoder: Encoder, labels: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Embed labels as the normalised mean of the embeddings of their texts.

    Args:
        encoder: one with a text tower.
        labels: L different labels, L >= 2.
        templates: texts with one `{}` for the label, e.g. "a photo of a {}".

    Returns:
        float32 [L, D], each row of length 1.
    """
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise ValueError(f"expected at least 2 different labels, got {list(labels)}; entropy needs a choice")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(f"expected templates with one {{}} for the label, got {wrong or 'none'}; 'a photo of a {{}}'")
    texts = [template.replace("{}", label) for label in labels for template in templates]
    embeddings = encoder.embed_texts(texts).reshape(len(labels), len(templates), -1)
    return F.normalize(embeddings.mean(dim=1), dim=-1)


def zero_shot_labels(image_embeddings: torch.Tensor, label_embeddings: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest label of each image: [N, D], [L, D] -> int64 [N]; the first one at a
    tie."""
    return (F.normalize(image_embeddings, dim=-1) @ F.normalize(label_embeddings, dim=-1).T).argmax(dim=-1)


def entropy(counts: np.ndarray, miller_madow: bool = True, minimum: int = MINIMUM_IMAGES) -> np.ndarray:
    """Estimate Shannon entropies from label counts, natural logarithm.

    Args:
        counts: [..., L] how often each label was seen, >= 0.
        miller_madow: add (m - 1) / 2n, m the number of labels seen.
        minimum: smallest n = sum of counts that is accepted.

    Returns:
        float64 [...], in nats, 0 where all images have one label.

    Raises:
        ValueError: n below `minimum`.
    """
    counts = np.asarray(counts, dtype=np.float64)
    n = counts.sum(axis=-1, keepdims=True)
    if (n < max(minimum, 1)).any():
        raise ValueError(
            f"expected at least {max(minimum, 1)} images for an entropy, got {int(n.min())}; "
            "its bias would exceed the differences looked for: generate more images or pool more groups"
        )
    p = counts / n
    plug_in = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
    if not miller_madow:
        return plug_in
    return plug_in + ((counts > 0).sum(axis=-1) - 1) / (2 * n[..., 0])
