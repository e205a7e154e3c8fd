"""Draw further uses of a reference image: style, quality, masks, interpolation and extrapolation.

    python -m experiments applications
    python -m experiments applications model=flux-dev applications.interpolation.reference=cat.png

Every application of conf/applications/ is one prompt, one reference and a row of strengths from the same seed. Writes
`<results>/applications/<name>_<model>.webp`: images to look at, not measurements.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tqdm import tqdm

import negtome
from eval.images import blurred, load_picture
from experiments import project_path, select_device
from experiments.compose import expand
from experiments.configs import build, flag
from experiments.figures.image_grid import ImageGrid, image_grid
from experiments.figures.style import save
from experiments.methods.negtome import NegToMe
from experiments.runs import checkpoints
from experiments.tables.paths import result_file

#: Sides of an image from which a mask may take its half.
HALVES = ("left", "right", "top", "bottom")


def draw(
    pipe: Any,
    call: dict[str, Any],
    config: negtome.NegToMeConfig,
    *,
    description: str,
    prompt: str,
    alphas: Sequence[float],
    reference: str | None = None,
    blur: float = 0.0,
    mask: str | None = None,
    seeds: Sequence[int] = (0, 1),
) -> ImageGrid:
    """Return the sheet of one use: for each seed the reference, the image without it, and one for each alpha.

    Args:
        pipe: a stock pipeline.
        call: the keyword arguments that it is called with.
        config: the settings other than alpha.
        description: what is to be seen, a sentence.
        prompt: what is generated.
        alphas: strengths, one image each; below 0 pulls towards the reference.
        reference: file of the image; None: what the pipeline makes of the prompt by itself.
        blur: radius of a Gaussian blur of the reference, as a share of its shorter side; 0 for none.
        mask: half of the reference that may be matched, one of `HALVES`, or None for all of it.
        seeds: one row of images each.

    Raises:
        ValueError: a setting is out of range.
    """
    if mask not in (None, *HALVES):
        raise ValueError(f"an application's mask must be null or one of {HALVES}, got {mask!r}")
    if not 0 <= blur <= 1:
        raise ValueError(f"an application's blur must be a share of the image's side in [0, 1], got {blur}")
    if not alphas or not seeds:
        raise ValueError("an application needs at least one alpha and one seed, got none")

    def generated(seed: int) -> Image.Image:
        return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]

    rows = []
    for seed in tqdm(seeds, desc=prompt, unit="row", dynamic_ncols=True):
        baseline = generated(seed)
        source = baseline if reference is None else load_picture(project_path(reference))
        if blur:
            source = blurred(source, blur)
        images = [source, baseline]
        for alpha in alphas:
            away = negtome.Reference(source, mask=None if mask is None else _half(mask, *source.size))
            with negtome.attach(pipe, config.replace(alpha=alpha), references=away):
                images.append(generated(seed))
        rows.append((f"{description}; seed {seed}", [[image] for image in images]))
    return image_grid(["reference", "baseline", *(f"alpha {alpha:g}" for alpha in alphas)], rows)


def _half(side: str, width: int, height: int) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    halves = (*mask.tensor_split(2, dim=1), *mask.tensor_split(2, dim=0))
    halves[HALVES.index(side)].fill_(True)
    return mask


def make_pictures(cfg: DictConfig) -> list[Path]:
    """Write the picture of every configured application and return the files.

    Raises:
        ValueError: the method is not NegToMe, whose strengths are taken.
    """
    method = build(cfg.method)
    if not isinstance(method, NegToMe):
        raise ValueError(f"expected NegToMe among the methods, got method={cfg.method.name}: give method=negtome")
    compiled, offload = flag(cfg, "compile"), flag(cfg, "offload")
    checkpoint = checkpoints.find_checkpoint(cfg.model)
    pipe = checkpoints.load(
        cfg.model, checkpoint, select_device(cfg.device), compile_denoiser=compiled, offload=offload
    )
    files = []
    for name, spec in OmegaConf.to_container(cfg.applications, resolve=True).items():
        sheet = draw(pipe, dict(cfg.model.call), method.config, **spec)
        files.append(save(sheet, result_file(cfg.results, "applications", f"{name}_{cfg.model.name}")))
    return files


def main(argv: list[str]) -> None:
    """Run the command."""
    for cfg in expand(["method=negtome", *argv]):
        for file in make_pictures(cfg):
            print(file)
