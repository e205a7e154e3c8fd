"""How different do the images of one group look, patch by patch? LPIPS, and a distance of layers like it.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (CVPR 2018), version 0.1,
by the `lpips` package. Images are compared position by position, so a shifted copy is "different": LPIPS rewards
artefacts, noise and mere displacement. It is a second opinion on diversity, never the first.
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
# Images that go through a network together.
BATCH = 32
# The shortest side that leaves every network's last layer a pixel.
SMALLEST = 32


def _distances(batches: Sequence[Sequence[torch.Tensor]], weights: Sequence[float | torch.Tensor]) -> torch.Tensor:
    """Compare K images pair by pair, place by place, by activations whose channels are brought to length 1.

    Args:
        batches: of images; of each the activations of every layer, [N, channels, h, w].
        weights: for each layer, of the channels' squared differences, [1, channels, 1, 1] or one for all, >= 0.

    Returns:
        The weighted sums of squared differences, averaged over places, added up over layers: float64 [K (K - 1) / 2].
    """
    found = []
    for weight, parts in zip(weights, zip(*batches, strict=True), strict=True):
        layer = F.normalize(torch.cat(parts), dim=1) * weight**0.5
        # not by the Gram matrix, whose rounding may tell equal images apart
        found.append(torch.pdist(layer.flatten(1).double()).square().cpu() / layer[0, 0].numel())
    return torch.stack(found).sum(dim=0)


class Lpips(Network):
    """LPIPS with one of its three networks, and the linear heads that the `lpips` package ships.

    Args:
        net: "alex" (the authors' choice for measuring), "vgg" or "squeeze". Their numbers cannot be compared.
        weights_dir: folder with torchvision's file of the network's ImageNet weights; torch.hub's if not given.
    """

    ROW = "lpips"
    PLACE = "weights_dir"

    def __init__(self, net: str = "alex", weights_dir: str | Path | None = None, device: str = "cpu") -> None:
        if net not in BACKBONES:
            raise ValueError(f"expected a network among {sorted(BACKBONES)}, got {net!r}; alex is usual")
        file = BACKBONES[net]
        given = None if weights_dir is None else Path(weights_dir) / file
        super().__init__(f"LPIPS ({net})", f"lpips-{net}-v0.1", device, given, file=file)
        self.net = net

    def _load(self, facts: WeightsFacts) -> Any:
        import lpips

        state = torch.load(facts.files[0], map_location="cpu", weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of arguments that torchvision has renamed since
            model = lpips.LPIPS(net=self.net, pnet_rand=True, verbose=False)
        # `slice2.3.weight` there is `features.3.weight` in torchvision's file
        names = {name: f"features.{name.partition('.')[2]}" for name, _ in model.net.named_parameters()}
        model.net.load_state_dict({name: state[source] for name, source in names.items()})
        return model.requires_grad_(False).eval().to(self.device)

    @torch.inference_mode()
    def pairwise(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the distances of the pairs of K uint8 images [3, H, W] of one size, H and W >= 32.

        They are float64 [K (K - 1) / 2], of (0, 1), (0, 2) and so on, then (1, 2).
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
    """The mean of the distances among the images of a group, as `encoder.pairwise` finds them.

    `update` takes the images of one group, uint8 [K, 3, H, W].
    """

    encoder = Pixels()  # a subclass has what compares them
    minimum = 2

    def score(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(images) < self.minimum:
            raise ValueError(f"expected at least 2 images a group for {self.name}, got {len(images)}; generate more")
        return self.encoder.pairwise(images).mean()


class LpipsDistance(PairMetric):
    """Mean LPIPS over the pairs of images of a group.

    Args:
        net: "alex", "vgg" or "squeeze".
        size: images whose shorter side is longer are resized to it (bilinear, antialiased, aspect kept); None leaves
            all as they are. LPIPS depends on it: it sees details of fixed size in pixels.
        weights_dir: see `Lpips`.
    """

    name = "lpips"
    higher_is_better = True
    bounds = (0.0, None)
    unit = "LPIPS v0.1, >= 0"
    description = "mean LPIPS over the pairs of different images of a group"
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
    """Compares images by the stages of EfficientNet-lite0: LPIPS's arithmetic without its learned weights.

    At every position of every stage the channels are brought to length 1; the squared distance of two images there, 0
    to 4, is averaged over positions and then over the seven stages. Preparation and weights are the encoder's.
    """

    features, of = Scorer.features, Scorer.of  # images themselves are compared

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device=device)
        self.name, self.slug = f"layers of {self.name}", f"layers{len(self.STAGES)}-{self.slug}"

    def pairwise(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the distances of the pairs of K uint8 images [3, H, W] of any sizes; see `Lpips.pairwise`."""
        batches = [self.layers(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return _distances(batches, [1 / len(self.STAGES)] * len(self.STAGES))


class LayerDistance(PairMetric):
    """Mean distance of EfficientNet-lite0's layers over the pairs of images of a group. Not LPIPS."""

    name = "layer_distance_efflite0"
    higher_is_better = True
    unit = "squared distance of unit vectors, 0 to 4"
    bounds = (0, 4)
    description = (
        "mean over the pairs of different images of a group of the squared distance of EfficientNet-lite0's channels "
        "at the same place, averaged over places and stages"
    )

    def __init__(self, device: str = "cpu", **options: Any) -> None:
        super().__init__(EffNetLayers(device), **options)
