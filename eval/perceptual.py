"""How different do the images of a group look, position by position? LPIPS, and a similar distance of layers.

LPIPS is version 0.1 of Zhang et al. (CVPR 2018), by the `lpips` package. A shifted copy counts as different, so these
distances reward noise, artefacts and displacement: do not use them as the only measure of diversity.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from eval.encoders import Network, Pixels, Scorer
from eval.features import EffNetLite0
from eval.metric import Metric
from eval.weights import FACTS, WeightsFacts

BACKBONES = FACTS["lpips"]["backbones"]
# images per pass through a network
BATCH = 32
# the shortest side for which every network's last layer has a pixel
SMALLEST = 32


def _distances(batches: Sequence[Sequence[torch.Tensor]], weights: Sequence[float | torch.Tensor]) -> torch.Tensor:
    """Compare all pairs of K images, position by position, by activations whose channels are scaled to length 1.

    Args:
        batches: the activations [N, channels, h, w] of every layer, for each batch of images.
        weights: of the channels' squared differences in each layer, [1, channels, 1, 1] or a number, >= 0.

    Returns:
        Weighted squared differences, averaged over positions and added over layers: float64 [K (K - 1) / 2].
    """
    distances = []
    for weight, parts in zip(weights, zip(*batches, strict=True), strict=True):
        layer = F.normalize(torch.cat(parts), dim=1) * weight**0.5
        # a Gram matrix would be faster, but its rounding may make equal images different
        distances.append(torch.pdist(layer.flatten(1).double()).square().cpu() / layer[0, 0].numel())
    return torch.stack(distances).sum(dim=0)


class Lpips(Network):
    """LPIPS with one of its three networks and the linear heads of the `lpips` package.

    Args:
        net: "alex" (recommended by the authors), "vgg" or "squeeze"; their numbers are not comparable.
        weights_dir: folder with torchvision's ImageNet weights; torch.hub's folder of checkpoints by default.
    """

    ROW = "lpips"
    PLACE = "weights_dir"

    def __init__(self, net: str = "alex", weights_dir: str | Path | None = None, device: str = "cpu") -> None:
        if net not in BACKBONES:
            raise ValueError(f"expected a network among {sorted(BACKBONES)}, got {net!r}; alex is usual")
        file = BACKBONES[net]
        path = None if weights_dir is None else Path(weights_dir) / file
        super().__init__(f"LPIPS ({net})", f"lpips-{net}-v0.1", device, path, file=file)
        self.net = net

    def _load(self, facts: WeightsFacts) -> Any:
        import lpips

        state = torch.load(facts.files[0], map_location="cpu", weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision has renamed some arguments
            model = lpips.LPIPS(net=self.net, pnet_rand=True, verbose=False)
        # `slice2.3.weight` is `features.3.weight` in torchvision's file
        names = {name: f"features.{name.partition('.')[2]}" for name, _ in model.net.named_parameters()}
        model.net.load_state_dict({name: state[source] for name, source in names.items()})
        return model.requires_grad_(False).eval().to(self.device)

    @torch.inference_mode()
    def pairwise(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the distances of all pairs (0, 1), (0, 2), ..., (1, 2), ... of K images: float64 [K (K - 1) / 2].

        The images are uint8 [3, H, W] of one size, with H and W >= 32.
        """
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) != 1 or not all(image.dtype == torch.uint8 and image.ndim == 3 for image in images):
            raise ValueError(
                f"expected uint8 images [3, H, W] of one size, got {sorted(sizes)}; LPIPS compares position by position"
            )
        if min(images[0].shape[1:]) < SMALLEST:
            raise ValueError(
                f"expected images of at least {SMALLEST} pixels a side, got {list(images[0].shape)}; LPIPS's networks "
                "need them: leave LPIPS out"
            )
        network = self._network
        batches = (batch.to(self.device).float() / 127.5 - 1 for batch in torch.stack(list(images)).split(BATCH))
        weights = [head.model[-1].weight for head in network.lins]
        return _distances([network.net(network.scaling_layer(batch)) for batch in batches], weights)


class PairMetric(Metric):
    """The mean of `encoder.pairwise` over the pairs of images of a group.

    `update` takes the images of one group, uint8 [K, 3, H, W].
    """

    encoder: Any = Pixels()  # subclasses replace it
    minimum = 2

    def score(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(images) < self.minimum:
            raise ValueError(f"expected at least 2 images a group for {self.name}, got {len(images)}; generate more")
        return self.encoder.pairwise(images).mean()


class LpipsDistance(PairMetric):
    """Mean LPIPS over the pairs of images of a group.

    Args:
        net: see `Lpips`.
        size: shorter side to which larger images are resized (bilinear, antialiased); None keeps all sizes. LPIPS
            depends on it, because it sees details of a fixed size in pixels.
        weights_dir: see `Lpips`.
        device: device of the network.
    """

    name = "lpips"
    higher_is_better = True
    bounds = (0.0, None)
    unit = "LPIPS v0.1, >= 0"
    SETTINGS = ("size",)

    def __init__(
        self,
        net: str = "alex",
        size: int | None = 256,
        weights_dir: str | Path | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(Lpips(net, weights_dir, device), **options)
        if size is not None and size < SMALLEST:
            raise ValueError(f"expected a size of at least {SMALLEST} pixels, got {size}; 256 is usual")
        self.size = size

    def score(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        return super().score([self._smaller(image) for image in images])

    def _smaller(self, image: torch.Tensor) -> torch.Tensor:
        if self.size is None or min(image.shape[1:]) <= self.size:
            return image
        return resize(image, [self.size], InterpolationMode.BILINEAR, antialias=True)


class EffNetLayers(EffNetLite0):
    """Compares images by the stages of EfficientNet-lite0, like LPIPS but without learned weights.

    The channels at every position of every stage are scaled to length 1. The squared distance of two images, 0 to 4, is
    averaged over positions and then over the seven stages.
    """

    features, of = Scorer.features, Scorer.of  # of the images themselves, not of embeddings

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device=device)
        self.name, self.slug = f"layers of {self.name}", f"layers{len(self.STAGES)}-{self.slug}"

    def pairwise(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the distances of all pairs of uint8 images [3, H, W] of any sizes; see `Lpips.pairwise`."""
        batches = [self.layers(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return _distances(batches, [1 / len(self.STAGES)] * len(self.STAGES))


class LayerDistance(PairMetric):
    """Mean over the pairs of images of a group of the squared distance of EfficientNet-lite0's stages.

    It is not LPIPS; see `EffNetLayers`.
    """

    name = "layer_distance_efflite0"
    higher_is_better = True
    unit = "squared distance of unit vectors, 0 to 4"
    bounds = (0, 4)

    def __init__(self, device: str = "cpu", **options: Any) -> None:
        super().__init__(EffNetLayers(device), **options)
