"""What else a reference is good for, a picture each: style, quality, masks, interpolation and extrapolation.

    python -m experiments.applications
    python -m experiments.applications model=flux-dev applications.interpolation.reference=cat.png

Every application of conf/applications/ is one prompt, one reference and a row of strengths; the first noise of every
row is the same. Writes `<results>/applications_<name>_<model>.png`. These are pictures to look at, not measurements.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from matplotlib import font_manager
from omegaconf import DictConfig
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

import negtome
from experiments import pipelines, project_path, select_device
from experiments.configs import expand, flag
from experiments.plot import save_sheet

#: Sides of an image from which a mask may take its half.
HALVES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Application:
    """One use of a reference.

    Args:
        description: what is to be seen, a sentence.
        prompt: what is generated.
        config: fields of `negtome.NegToMeConfig` other than alpha.
        alphas: strengths, one image each; below 0 pulls towards the reference.
        reference: file of the image; None: what the pipeline makes of the prompt by itself.
        blur: radius of a Gaussian blur of the reference, as a share of its shorter side; 0 for none.
        mask: half of the reference that may be matched, one of `HALVES`, or None for all of it.
        seeds: one row of images each.

    Raises:
        ValueError: a setting is out of range.
    """

    description: str
    prompt: str
    config: dict[str, Any]
    alphas: Sequence[float]
    reference: str | None = None
    blur: float = 0.0
    mask: str | None = None
    seeds: Sequence[int] = (0, 1)

    def __post_init__(self) -> None:
        if self.mask not in (None, *HALVES):
            raise ValueError(f"an application's mask must be null or one of {HALVES}, got {self.mask!r}")
        if not 0 <= self.blur <= 1:
            raise ValueError(f"an application's blur must be a share of the image's side in [0, 1], got {self.blur}")
        if not self.alphas or not self.seeds:
            raise ValueError("an application needs at least one alpha and one seed, got none")

    def run(self, pipe: Any, call: dict[str, Any]) -> list[list[Image.Image]]:
        """Generate the rows: for each seed the reference, the image without it, and one for each alpha."""
        rows = []
        for seed in tqdm(self.seeds, desc=self.prompt, unit="row", dynamic_ncols=True):
            plain = self._generate(pipe, call, seed)
            shown = plain if self.reference is None else Image.open(project_path(self.reference)).convert("RGB")
            if self.blur:
                shown = shown.filter(ImageFilter.GaussianBlur(self.blur * min(shown.size)))
            reference = negtome.Reference(shown, mask=self._mask(*shown.size))
            row = [shown, plain]
            for alpha in self.alphas:
                settings = {key: value for key, value in self.config.items() if value is not None}
                config = negtome.NegToMeConfig(alpha=alpha, **settings)
                with negtome.attach(pipe, config, given=reference):
                    row.append(self._generate(pipe, call, seed))
            rows.append(row)
        return rows

    def _generate(self, pipe: Any, call: dict[str, Any], seed: int) -> Image.Image:
        return pipe(self.prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]

    def _mask(self, width: int, height: int) -> torch.Tensor | None:
        if self.mask is None:
            return None
        mask = torch.zeros(height, width, dtype=torch.bool)
        rows = {"top": slice(0, height // 2), "bottom": slice(height // 2, None)}.get(self.mask, slice(None))
        columns = {"left": slice(0, width // 2), "right": slice(width // 2, None)}.get(self.mask, slice(None))
        mask[rows, columns] = True
        return mask


def sheet(application: Application, rows: list[list[Image.Image]], model: str, tile: int = 112) -> Image.Image:
    """Set the rows under their headings: reference, without, and every alpha."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 12)
    titles = ["reference", "without", *(f"alpha {alpha:g}" for alpha in application.alphas)]
    header = 40
    result = Image.new("RGB", (max(len(titles) * (tile + 4), 560), header + len(rows) * (tile + 4)), "white")
    draw = ImageDraw.Draw(result)
    draw.text((4, 2), f"{model}: {application.description}", "black", font)
    for column, title in enumerate(titles):
        draw.text((column * (tile + 4) + 4, 20), title, "black", font)
        for line, row in enumerate(rows):
            picture = row[column].convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS)
            result.paste(picture, (column * (tile + 4), header + line * (tile + 4)))
    return result


def make_pictures(cfg: DictConfig) -> list[Path]:
    """Write the picture of every configured application and return the files."""
    device = select_device(cfg.device)
    compiled, offload = flag(cfg, "compile"), flag(cfg, "offload")
    checkpoint = pipelines.find_checkpoint(cfg.model)
    pipe = pipelines.load(cfg.model, checkpoint, device, compile_denoiser=compiled, offload=offload)
    results = project_path(cfg.results)
    results.mkdir(parents=True, exist_ok=True)
    files = []
    for name, spec in cfg.applications.items():
        application: Application = instantiate(spec, _convert_="all")
        rows = application.run(pipe, dict(cfg.model.call))
        picture = sheet(application, rows, cfg.model.name)
        files.append(save_sheet(picture, results / f"applications_{name}_{cfg.model.name}.png"))
    return files


def main(argv: list[str]) -> None:
    for cfg in expand(argv):
        for file in make_pictures(cfg):
            print(file)
