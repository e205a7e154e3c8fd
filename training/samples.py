"""Contact sheets of the small models: one row a category, seeds 0 to 3, unchosen, on the CPU."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from experiments.figures.image_grid import ImageGrid, image_grid
from experiments.figures.style import pixels
from training import taxonomy

SCALES = (5.0, 3.5)
#: Arguments of the models' calls, at any of the scales.
SETTINGS = {
    "mini-sdxl": {"num_inference_steps": 20},
    "mini-flux": {"num_inference_steps": 20, "height": 128, "width": 128, "max_sequence_length": 32},
}


def sheet(
    pipe: DiffusionPipeline,
    settings: dict,
    categories: Sequence[str],
    scales: Sequence[float] = SCALES,
    images: int = 4,
) -> ImageGrid:
    """Draw every category at every scale of guidance, from the seeds 0, 1, ...: nothing is chosen."""
    rows = []
    for name in categories:
        blocks = []
        for scale in scales:
            generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
            call = settings | {"guidance_scale": scale, "num_images_per_prompt": images, "generator": generators}
            blocks.append(pipe(f"{taxonomy.TEMPLATES[0]} {name}", **call).images)
        rows.append((name, blocks))
    return image_grid([f"guidance scale {scale:g}" for scale in scales], rows)


def draw_samples(models: Path) -> None:
    """Write `samples.jpg` into the folder of each pipeline."""
    for name, settings in SETTINGS.items():
        pipe = DiffusionPipeline.from_pretrained(models / name, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        pixels(sheet(pipe, settings, taxonomy.EVALUATED)).save(models / name / "samples.jpg", quality=80)
