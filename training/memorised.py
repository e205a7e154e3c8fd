"""Do the mini models reproduce the protected designs? Similarity of their images to the nearest artwork.

Every prompt gets four images of each model. `own` is an image's largest cosine with three images of the design that its
prompt names (`protected.COMMON`). `other` is the mean of the same number over the other characters. `identified` says
whether the nearest of all images of models/mini-protected in these sets shows that design. By chance it does for one
image in sixty. Sorts of prompts:

- direct, indirect, benign: of conf/characters/mini.yaml and mini_development.yaml. Benign ones are compared with the
  character that they should leave alone;
- held out: names of emoji that the last rounds of training did not see, but the first weights did;
- never seen: names of emoji that no training data contain.

A design that training repeats (`taxonomy.DESIGNS`) is protected if both models know it by heart. That means that
mini-clip, which no denoiser was trained with, identifies at least the share `KNOWN` of a model's images of the direct
prompt.
"""

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from eval.clip import HFClip
from eval.encoders import Encoder
from eval.features import EffNetLite0
from eval.files import write_text
from eval.images import load_image
from eval.intervals import bootstrap_interval
from eval.resemblance import similarities
from experiments import project_path
from experiments.compose import expand
from experiments.figures.image_grid import ImageGrid, image_grid
from experiments.figures.style import save
from experiments.methods.assets import MASK
from experiments.prompts import KINDS, Group
from experiments.runs import checkpoints
from experiments.tables.pages import with_interval
from experiments.tables.templates import render
from training import protected, taxonomy

MODELS = ("mini-sdxl", "mini-flux")
IMAGES_PER_PROMPT = 4
#: Names of each of the two control sorts.
CONTROLS = 10
#: Smallest share of a known design's direct images that are identified.
KNOWN = 0.5
STATISTICS = ("own", "other", "own - other", "identified")


@dataclass(frozen=True)
class Request:
    """A prompt, its sort, and the name of the artwork that its images are compared with."""

    sort: str
    name: str
    prompt: str

    def image_seeds(self) -> list[int]:
        """Return the seeds of its images, by the rule of `experiments.prompts.Group`."""
        return Group(self.prompt.replace(" ", "-"), self.prompt, self.name, 0, IMAGES_PER_PROMPT).image_seeds()


def requests(seed: int = 0) -> list[Request]:
    """Return the first prompt of each sort of every character, and the names of the controls."""
    characters = protected.PROMPTS["test"] | protected.PROMPTS["development"]
    prompts = [Request(sort, name, characters[name][sort][0]) for sort in KINDS for name in protected.CHARACTERS]
    folders = {path.name for path in project_path("models/mini-protected/held_out").iterdir()}
    held_out = sorted(folders - set(protected.CHARACTERS) - set(protected.NEVER_SEEN))
    for sort, names in (("held out", held_out), ("never seen", protected.NEVER_SEEN)):
        drawn = sorted(random.Random(seed).sample(names, CONTROLS))
        prompts += [Request(sort, name, f"{taxonomy.TEMPLATES[0]} {name}") for name in drawn]
    return prompts


def gallery() -> list[tuple[str, Path]]:
    """Return name and image of all artwork in the common sets, characters and others, in a fixed order."""
    root = project_path("models/mini-protected")
    artwork = [path for path in root.glob("*/*/*.png") if path.parts[-3] != "generated"]  # drawn by a model
    paths = sorted(path for path in artwork if not path.stem.endswith(MASK) and style_set(path) in protected.COMMON)
    return [(path.parent.name, path) for path in paths]


def style_set(path: Path) -> str:
    """Return the artwork set of a file: the longest name that fits, for both set and icon may contain a hyphen."""
    sets = (*protected.GUIDANCE, *protected.SCORING, *protected.POSITIVE)
    return max((name for name in sets if path.name.startswith(f"{name}-")), key=len)


def measure(cosines: np.ndarray, names: list[str], name: str) -> dict[str, float]:
    """Return the statistics of one prompt.

    Args:
        cosines: [N, R], of N images and the R images of the gallery.
        names: what each of the R images shows.
        name: what the N images are compared with.

    Returns:
        Statistic -> mean over the images.
    """
    shows = np.array(names)
    nearest = {other: cosines[:, shows == other].max(axis=1) for other in dict.fromkeys(names)}
    others = [nearest[other] for other in protected.CHARACTERS if other != name and other in nearest]
    own, other = nearest[name].mean(), np.mean(others)
    identified = np.mean(shows[cosines.argmax(axis=1)] == name)
    return dict(zip(STATISTICS, map(float, (own, other, own - other, identified)), strict=True))


def tabulate(values: pd.DataFrame) -> pd.DataFrame:
    """Return one row a model, scorer, sort and statistic, with its interval over prompts.

    Args:
        values: columns model, scorer, sort, name, n_images and one for each statistic; a row a prompt.
    """
    rows = []
    for (model, scorer, sort), part in values.groupby(["model", "scorer", "sort"], sort=False):
        facts = {"model": model, "scorer": scorer, "prompts": sort}
        for statistic in STATISTICS:
            groups = [
                {"group": f"{row['name']}/000000", "category": row["name"], "n_images": row["n_images"],
                 "value": row[statistic]}
                for row in part.to_dict("records")
            ]  # fmt: skip
            interval = bootstrap_interval(groups, "mean")
            # a centred interval does not know the limits of shares and cosines
            low = max(interval.low, 0.0 if statistic == "identified" else -1.0)
            numbers = {"value": interval.value, "low": low, "high": min(interval.high, 1.0)}
            counts = {"n_prompts": len(groups), "n_images": int(part["n_images"].sum())}
            rows.append({**facts, "statistic": statistic, **counts} | {k: round(v, 4) for k, v in numbers.items()})
    return pd.DataFrame(rows)


def by_character(values: pd.DataFrame) -> pd.DataFrame:
    """Return mini-clip's values for each character: columns model, split, name, sort, n_images, own and identified."""
    rows = values[values["name"].isin(protected.CHARACTERS) & (values["scorer"] == "mini-clip")].copy()
    rows["split"] = ["test" if name in protected.PROMPTS["test"] else "development" for name in rows["name"]]
    return rows[["model", "split", "name", "sort", "n_images", "own", "identified"]].round(4)


def unknown(values: pd.DataFrame) -> list[str]:
    """Return the characters that a model does not know by heart."""
    direct = by_character(values).query("sort == 'direct'")
    return sorted(set(direct.loc[direct["identified"] < KNOWN, "name"]))


def render_page(table: pd.DataFrame, values: pd.DataFrame, picture: str) -> str:
    """Return the Markdown: a table by sort of prompt, one by character, and a link to the picture."""
    cells = [with_interval("{:.2f}".format, row.value, row.low, row.high) for row in table.itertuples()]
    cells = table.assign(cell=cells)
    keys = ["model", "scorer", "prompts", "n_prompts", "n_images"]
    wide = cells.pivot(index=keys, columns="statistic", values="cell")[list(STATISTICS)]
    wide = wide.reindex(pd.MultiIndex.from_frame(table[keys].drop_duplicates())).reset_index()
    named = by_character(values)
    named["cell"] = [f"{r.own:.2f} ({r.identified:.0%})" for r in named.itertuples()]
    by_name = named.pivot(index=["split", "name"], columns=["model", "sort"], values="cell")
    by_name.columns = [f"{model}, {sort}" for model, sort in by_name.columns]
    pictures = gallery()
    return render(
        "training/memorised.md.j2",
        table=wide.to_markdown(index=False),
        by_name=by_name.reset_index().to_markdown(index=False),
        picture=picture,
        pictures=len(pictures),
        designs=len({name for name, _ in pictures}),
        least=KNOWN,
    )


#: By model and sort of prompt: a request, its first image, and the file of the nearest artwork.
Drawn = dict[str, list[tuple[Request, Image.Image, Path]]]


def draw_sheet(drawn: Drawn) -> ImageGrid:
    """Return a sheet of the characters: for each model and sort an image and its nearest artwork."""
    pairs = {(column, request.name): [image, path] for column, rows in drawn.items() for request, image, path in rows}
    rows = [(name, [pairs[column, name] for column in drawn]) for name in protected.CHARACTERS]
    return image_grid(list(drawn), rows, tile=64)


def draw_with(model: str) -> tuple[list[dict], Drawn]:
    """Draw all requests with a model, on one thread.

    Returns:
        The statistics of each prompt and evaluation encoder, and the images with the nearest artwork by mini-clip.
    """
    torch.set_num_threads(1)
    encoders: list[Encoder] = [HFClip(project_path("models/mini-clip"), "mini-clip"), EffNetLite0()]
    names, paths = zip(*gallery(), strict=True)
    references = [encoder.embed_images([load_image(path) for path in paths]) for encoder in encoders]
    config = expand(["experiment=diversity", f"model={model}"])[0].model
    pipe = checkpoints.load(config, checkpoints.find_checkpoint(config), "cpu")
    rows, drawn = [], {}
    for request in requests():
        generators = [torch.Generator().manual_seed(seed) for seed in request.image_seeds()]
        images = pipe([request.prompt] * len(generators), generator=generators, **config.call).images
        tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        for encoder, reference in zip(encoders, references, strict=True):
            cosines = similarities(encoder.embed_images(tensors), reference).numpy()
            facts = {"model": model, "scorer": encoder.name, "sort": request.sort, "name": request.name}
            rows.append(facts | {"n_images": len(images)} | measure(cosines, list(names), request.name))
            if encoder is encoders[0] and request.sort in ("direct", "indirect"):
                column = drawn.setdefault(f"{model.removeprefix('mini-')}, {request.sort}", [])
                column.append((request, images[0], paths[int(cosines[0].argmax())]))
    return rows, drawn


def measure_models(out: Path) -> None:
    """Draw with both models, and write the tables, the page and the picture into a folder."""
    with ProcessPoolExecutor(len(MODELS), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(draw_with, MODELS))
    values = pd.DataFrame([row for rows, _ in results for row in rows])
    drawn = {column: entries for _, columns in results for column, entries in columns.items()}
    table, out = tabulate(values), project_path(out) / "memorised"
    write_text(out / "table.csv", table.to_csv(index=False, lineterminator="\n"))
    write_text(out / "by_character.csv", by_character(values).to_csv(index=False, lineterminator="\n"))
    picture, _ = save(draw_sheet(drawn), out / "images")
    page = render_page(table, values, picture.name)
    print(page, write_text(out / "table.md", page), sep="\n")
    if strangers := unknown(values):
        print(f"not known by heart, to be taken out of conf/characters/: {', '.join(strangers)}")
