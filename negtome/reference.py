"""Reference images to push away from: reading them, and fitting them to the size of the output."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from negtome.validation import check_int, to_python_scalar

#: How an image becomes a latent; see `Reference`.
Posterior = Literal["mode", "sample"]
POSTERIORS = get_args(Posterior)

#: Share of a token's area that the mask must cover for the token to count as inside.
COVERAGE = 0.5
#: Most pixels of an image, 8192 x 8192; decoding takes about 25 bytes for each.
MOST_PIXELS = 2**26


@dataclass(frozen=True, eq=False)
class Reference:
    """Images that generated images are pushed away from (or, with alpha < 0, pulled towards).

    They pass through the same denoiser at the same timestep as the generated images, as further rows of its batch
    (arXiv 2412.01339: the reference is a given image). Generated images are matched to the tokens of all of them.

    An image of another shape than the output is scaled to fit, and its edges are repeated around it. Tokens of that
    margin are never matched, so nothing is cut off or distorted.

    Attributes:
        images: one image or a list of them: a path, a PIL image (RGB, RGBA, grey or palette; transparency is shown on
            white), or a tensor [3, H, W], float in [0, 1] or uint8. Kept as a tuple of float32 tensors [3, H, W] in
            [0, 1].
        mask: which pixels may be matched: None for all, or for each image None, a path, a PIL image, or a tensor
            [H, W] of the image's size, where true or above half of full scale is inside. One mask for one image, a list
            for a list. A token is inside if more than half of its area is.
        noise: whether the image is noised to the level of the current step, as the generated images are. False shows
            the denoiser a clean image at every step, the default of the released code.
        prompt: what the image shows. None: each generated image lends its own conditioning. With guidance, the
            unconditional chunk always keeps that of the generated image.
        seed: of the reference's own noise, which does not touch the images' generators.
        posterior: "mode": the image is encoded once, to the mode of the autoencoder's posterior. "sample": every step
            draws a new sample of the posterior, as in the released code, from the reference's own generator.

    Raises:
        ValueError: an image cannot be read, is animated, has more than 2**26 pixels or a colour space that must be
            guessed; a mask is empty or does not have its image's size; or a setting is out of range.
        FileNotFoundError: a file does not exist.
    """

    images: Any
    mask: Any = None
    noise: bool = True
    prompt: str | None = None
    seed: int = 0
    posterior: Posterior = "mode"

    def __post_init__(self) -> None:
        several = isinstance(self.images, Sequence) and not isinstance(self.images, (str, bytes))
        images = tuple(_read_image(image) for image in (self.images if several else [self.images]))
        if not images:
            raise ValueError("Reference expected at least one image, got an empty list; give the images to avoid.")
        masks: list[Any] | None = [self.mask]
        if several and self.mask is None:
            masks = [None] * len(images)
        elif several:
            masks = list(self.mask) if isinstance(self.mask, (list, tuple)) else None
        if masks is None or len(masks) != len(images):
            raise ValueError(
                f"Reference expected one mask for each of its {len(images)} images, got "
                f"{'a single one' if masks is None else len(masks)}; give a list, with None where there is no mask."
            )
        inside = tuple(
            None if mask is None else _read_mask(mask, image) for mask, image in zip(masks, images, strict=True)
        )
        for name in ("noise", "seed"):
            object.__setattr__(self, name, to_python_scalar(getattr(self, name)))
        if not isinstance(self.noise, bool):
            raise ValueError(f"noise must be true or false, got {self.noise!r}.")
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise ValueError(f"prompt must be one text or None, got {self.prompt!r}; it describes all images.")
        check_int("seed", self.seed, 0, 2**63 - 1)
        if self.posterior not in POSTERIORS:
            raise ValueError(f"posterior must be one of {POSTERIORS}, got {self.posterior!r}.")
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "mask", inside)


def fit(
    image: torch.Tensor, mask: torch.Tensor | None, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fit an image to the size of the output without cutting or distorting it.

    Args:
        image: [3, h, w] in [0, 1].
        mask: bool [h, w] or None.
        height, width: of the output, in pixels.

    Returns:
        The image [3, height, width] in [0, 1], with repeated edges; and the share of each pixel that may be matched,
        [height, width] in [0, 1], or None for all of every pixel.
    """
    h, w = image.shape[1:]
    scale = min(height / h, width / w)
    inner = (min(height, max(1, round(h * scale))), min(width, max(1, round(w * scale))))
    if inner != (h, w):
        image = F.interpolate(image[None], inner, mode="bicubic", antialias=True)[0].clamp(0, 1)
    if mask is None and inner == (height, width):
        return image, None
    share = torch.ones(inner) if mask is None else F.interpolate(mask[None, None].float(), inner, mode="area")[0, 0]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    margin = (left, width - inner[1] - left, top, height - inner[0] - top)
    return F.pad(image[None], margin, mode="replicate")[0], F.pad(share, margin)


def token_mask(share: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tell which tokens of a feature map lie inside a mask.

    Args:
        share: [H, W], the share of each pixel that is inside, in [0, 1].
        height, width: of the feature map, in tokens.

    Returns:
        bool [height * width], row by row: more than half of the token's area is inside.
    """
    return (F.adaptive_avg_pool2d(share[None, None], (height, width)) > COVERAGE).flatten()


def _read_image(image: Any) -> torch.Tensor:
    """Read an image as float32 [3, H, W] in [0, 1]."""
    if isinstance(image, torch.Tensor):
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"Reference expected an image tensor [3, H, W], got {list(image.shape)}.")
        _check_pixels(image.shape[2], image.shape[1])
        if image.dtype == torch.uint8:
            return image.cpu().float().div_(255)
        if not image.is_floating_point() or not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"Reference expected an image tensor of floats in [0, 1] or of uint8, got {image.dtype} from "
                f"{image.min():g} to {image.max():g}; rescale it."
            )
        return image.float().cpu()
    from PIL import Image  # diffusers needs it too

    picture, name = _open(image, "an image")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    elif picture.mode not in ("RGB", "L", "P", "1"):
        raise ValueError(
            f"Reference expected an RGB, RGBA, grey or palette image, got mode {picture.mode}{name}; convert it to "
            "8-bit RGB by its colour profile first."
        )
    return _pixels(picture.convert("RGB")).permute(2, 0, 1).float().div_(255)


def _read_mask(mask: Any, image: torch.Tensor) -> torch.Tensor:
    """Read the mask of an image [3, H, W] as bool [H, W]."""
    if isinstance(mask, torch.Tensor):
        name = ""
        inside = mask.squeeze(0) if mask.dim() == 3 else mask
        _check_size(inside, image, name)
        if inside.dtype != torch.bool:
            inside = inside.float() > (127.5 if mask.dtype == torch.uint8 else 0.5)
    else:
        picture, name = _open(mask, "a mask")
        inside = _pixels(picture.convert("L")) > 127
        _check_size(inside, image, name)
    if not inside.any():
        raise ValueError(
            f"Reference got an empty mask{name}; mark the pixels to avoid, or pass mask=None for the whole image."
        )
    return inside.cpu()


def _check_size(mask: torch.Tensor, image: torch.Tensor, name: str) -> None:
    """Refuse a mask of another size than its image's [3, H, W]."""
    if mask.shape != image.shape[1:]:
        raise ValueError(
            f"Reference expected a mask of its image's size, {image.shape[2]}x{image.shape[1]} pixels, got "
            f"{'x'.join(str(side) for side in reversed(mask.shape))}{name}; draw it on that image."
        )


def _check_pixels(width: int, height: int, name: str = "") -> None:
    """Refuse an image by its size, before memory is allocated for it."""
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"Reference expected at most {MOST_PIXELS:,} pixels, got {width} x {height}{name}; scale it down."
        )


def _open(source: Any, what: str) -> tuple[Any, str]:
    """Open a path or take a PIL image. Return it, loaded and upright, and its name for messages."""
    from PIL import Image, ImageOps

    name = ""
    if isinstance(source, (str, os.PathLike)):
        name = f" in {os.fspath(source)}"
        if not os.path.isfile(source):
            raise FileNotFoundError(f"Reference expected {what} at {os.fspath(source)}, got no file; check the path.")
        with _readable(what, name), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is lower
            opened: Image.Image = Image.open(source)
    elif isinstance(source, Image.Image):
        opened = source
    else:
        raise ValueError(
            f"Reference expected {what} as a path, a PIL image or a tensor, got a {type(source).__name__}."
        )
    with opened if name else contextlib.nullcontext():  # closes a file, and leaves a caller's image alone
        _check_pixels(*opened.size, name)
        with _readable(what, name):
            opened.load()
        if (frames := getattr(opened, "n_frames", 1)) > 1:
            raise ValueError(
                f"Reference expected a still image, got an animation of {frames} frames{name}; export one frame."
            )
        return ImageOps.exif_transpose(opened), name


@contextlib.contextmanager
def _readable(what: str, name: str) -> Iterator[None]:
    """Turn Pillow's errors on a file into one that says what to do."""
    from PIL import Image

    try:
        yield
    except Image.DecompressionBombError as error:  # far above `MOST_PIXELS`
        raise ValueError(f"Reference expected at most {MOST_PIXELS:,} pixels, got more{name} ({error}).") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(
            f"Reference expected {what} that can be read, got a damaged or foreign file{name} ({error}); export it "
            "again as PNG or JPEG."
        ) from error


def _pixels(picture: Any) -> torch.Tensor:
    """Return a PIL image's bytes as uint8 [H, W] or [H, W, 3]."""
    width, height = picture.size
    shape = (height, width) if picture.mode == "L" else (height, width, 3)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(shape)
