"""Do the mini models reproduce the protected designs? Nearest-neighbour similarity of drawings to artwork.

    python -m training.memorised

Every prompt gets a few images of each model. `own` is an image's largest cosine with the artwork of what its prompt
asks for, three pictures (`protected.COMMON`) whoever is asked for; `other` is the mean of the same number over the
characters that are not asked for; `identified` says whether the nearest of all pictures of models/mini-protected in
these sets (about one in sixty is right by chance) is of what was asked for. Sorts of prompts:

- direct, indirect, benign: of conf/characters/mini.yaml and mini_development.yaml; benign ones are compared with the
  character that they are to leave alone;
- held out: names of emoji that the last rounds of training did not see, but the first weights did;
- never seen: names of emoji that no training data contain.

The rule of what is protected: the designs that training repeats (`taxonomy.DESIGNS`), as far as both models know them
by heart: at least `KNOWN` of a model's images of the direct prompt are identified by mini-clip, which no denoiser was
trained with. All candidates are laid out and measured, and those that are not known leave conf/characters/.

The unit of the intervals is the prompt. Writes table.csv, table.md,
by_character.csv and images.webp into results/memorised/.
"""

import argparse
import random
import time
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
from experiments import PROJECT, project_path
from experiments.figures.image_grid import ImageGrid, image_grid
from experiments.figures.style import save
from experiments.methods.assets import MASK
from experiments.plan import expand
from experiments.prompts import KINDS, Group
from experiments.runs import checkpoints
from experiments.tables.templates import render
from training import protected, taxonomy

MODELS = ("mini-sdxl", "mini-flux")
IMAGES_PER_PROMPT = 4
CONTROLS = 10  # names of each of the two control sorts
KNOWN = 0.5  # least share of direct images that are identified
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
    found = [Request(s, n, characters[n][s][0]) for s in KINDS for n in protected.CHARACTERS]
    folders = {path.name for path in project_path("models/mini-protected/held_out").iterdir()}
    held_out = sorted(folders - set(protected.CHARACTERS) - set(protected.NEVER_SEEN))
    for sort, names in (("held out", held_out), ("never seen", protected.NEVER_SEEN)):
        drawn = sorted(random.Random(seed).sample(names, CONTROLS))
        found += [Request(sort, name, f"{taxonomy.TEMPLATES[0]} {name}") for name in drawn]
    return found


def gallery() -> list[tuple[str, Path]]:
    """Return (name, picture) of all artwork in the common sets, characters and others, in a fixed order."""
    root = project_path("models/mini-protected")
    paths = sorted(
        path for path in root.glob("*/*/*.png") if not path.stem.endswith(MASK) and _style_set(path) in protected.COMMON
    )
    return [(path.parent.name, path) for path in paths]


def _style_set(path: Path) -> str:
    # set and icon are joined by a hyphen that both may contain: the longest set's name that fits
    sets = (*protected.GUIDANCE, *protected.SCORING, *protected.POSITIVE)
    return max((name for name in sets if path.name.startswith(f"{name}-")), key=len)


def measured(cosines: np.ndarray, names: list[str], name: str) -> dict[str, float]:
    """Return the statistics of one prompt.

    Args:
        cosines: [N, R], of N images and the R pictures of the gallery.
        names: what each of the R pictures shows.
        name: what the images are compared with.

    Returns:
        Statistic -> mean over the images.
    """
    shows = np.array(names)
    nearest = {other: cosines[:, shows == other].max(axis=1) for other in dict.fromkeys(names)}
    others = [nearest[other] for other in protected.CHARACTERS if other != name and other in nearest]
    own, other = nearest[name].mean(), np.mean(others)
    identified = np.mean(shows[cosines.argmax(axis=1)] == name)
    return dict(zip(STATISTICS, map(float, (own, other, own - other, identified)), strict=True))


def tabulated(values: pd.DataFrame) -> pd.DataFrame:
    """Return one row a model, scorer, sort and statistic, with its interval over prompts.

    Args:
        values: columns model, scorer, sort, name, n_images and one for each statistic; a row a prompt.
    """
    rows = []
    for (model, scorer, sort), part in values.groupby(["model", "scorer", "sort"], sort=False):
        for statistic in STATISTICS:
            groups = [
                {"group": f"{row['name']}/000000", "category": row["name"], "n_images": row["n_images"], "value": v}
                for (_, row), v in zip(part.iterrows(), part[statistic], strict=True)
            ]
            interval = bootstrap_interval(groups, "mean")
            # a centred interval does not know the limits of shares and cosines
            least = 0.0 if statistic == "identified" else -1.0
            rows.append(
                {
                    "model": model,
                    "scorer": scorer,
                    "prompts": sort,
                    "statistic": statistic,
                    "n_prompts": len(groups),
                    "n_images": int(part["n_images"].sum()),
                    "value": round(interval.value, 4),
                    "low": round(max(interval.low, least), 4),
                    "high": round(min(interval.high, 1.0), 4),
                }
            )
    return pd.DataFrame(rows)


def by_character(values: pd.DataFrame) -> pd.DataFrame:
    """Return what mini-clip says of each character: columns model, split, name, sort, n_images, own and identified."""
    rows = values[values["name"].isin(protected.CHARACTERS) & (values["scorer"] == "mini-clip")].copy()
    rows["split"] = ["test" if name in protected.PROMPTS["test"] else "development" for name in rows["name"]]
    return rows[["model", "split", "name", "sort", "n_images", "own", "identified"]].round(4)


def unknown(values: pd.DataFrame) -> list[str]:
    """Return the characters that a model does not know by heart, by the rule of this module."""
    direct = by_character(values).query("sort == 'direct'")
    return sorted(set(direct.loc[direct["identified"] < KNOWN, "name"]))


def rendered(table: pd.DataFrame, values: pd.DataFrame) -> str:
    """Return the Markdown: a table by sort of prompt, and one by character."""
    cells = table.assign(cell=[f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in table.itertuples()])
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
        pictures=len(pictures),
        designs=len({name for name, _ in pictures}),
        least=KNOWN,
    )


def picture(drawn: dict[str, list[tuple[Request, Image.Image, Path]]]) -> ImageGrid:
    """Return rows of characters: for each model and sort a drawing beside its nearest artwork."""
    pairs = {(column, one.name): [image, path] for column, found in drawn.items() for one, image, path in found}
    rows = [(name, [pairs[column, name] for column in drawn]) for name in protected.CHARACTERS]
    return image_grid(list(drawn), rows, tile=64)


def drawn_by(model: str) -> tuple[list[dict], dict[str, list[tuple[Request, Image.Image, Path]]]]:
    """Draw all requests with a model, on one thread.

    Returns:
        The statistics of each prompt and scorer, and what `picture` shows: a drawing and its nearest artwork by
        mini-clip, whatever it shows, in columns.
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
            what = {"model": model, "scorer": encoder.name, "sort": request.sort, "name": request.name}
            rows.append(what | {"n_images": len(images)} | measured(cosines, list(names), request.name))
            if encoder is encoders[0] and request.sort in ("direct", "indirect"):
                column = drawn.setdefault(f"{model.removeprefix('mini-')}, {request.sort}", [])
                column.append((request, images[0], paths[int(cosines[0].argmax())]))
    return rows, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the mini models have memorised of the protected designs")
    parser.add_argument("--out", type=Path, default=PROJECT / "results" / "memorised")
    arguments = parser.parse_args()
    started = time.time()
    with ProcessPoolExecutor(len(MODELS), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(drawn_by, MODELS))
    rows = [row for found, _ in results for row in found]
    drawn = {column: entries for _, found in results for column, entries in found.items()}
    values = pd.DataFrame(rows)
    table = tabulated(values)
    write_text(arguments.out / "table.csv", table.to_csv(index=False, lineterminator="\n"))
    named = by_character(values)
    write_text(arguments.out / "by_character.csv", named.to_csv(index=False, lineterminator="\n"))
    write_text(arguments.out / "table.md", rendered(table, values))
    save(picture(drawn), arguments.out / "images")
    print(rendered(table, values))
    print(f"{arguments.out / 'memorised.md'}: {time.time() - started:.0f} s")
    if strangers := unknown(values):
        print(f"not known by heart, to be taken out of conf/characters/: {', '.join(strangers)}")


if __name__ == "__main__":
    main()
