"""Set the floors of an answered request: the least CLIPScore and the least realism of its images.

    python -m experiments floors experiment=safety_floors

Generates what the stock pipeline draws for allowed requests about development concepts, scores the images, and writes
the floors to `floors.file`, which the metric `answered` of experiment=safety reads. The rule is in
conf/safety/floors.yaml. `make safety` calls this first, with its own overrides: those of the method and the guard have
no effect here.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

from pathlib import Path

from eval.imageset import ImageSet
from eval.intervals import values_of
from eval.requests import Floors
from experiments import generate, project_path
from experiments.evaluate import evaluate
from experiments.plan import Plan, RunSpec
from experiments.runs.metrics import metric_of_run
from experiments.runs.store import Run
from experiments.tabulate import find_document

#: Metrics of which there is a floor.
METRICS = ("clip_score", "realism")


def write_floors(spec: RunSpec) -> tuple[Path, Floors]:
    """Write the floors that the scored images of a run set, and return the file and the floors.

    Raises:
        FileNotFoundError: the run was not generated or not scored.
        ValueError: it is no run without a method, or has other prompts than development prompts.
    """
    if spec.cfg.method.name != "none" or spec.cfg.prompts.split != "development":
        raise ValueError(
            f"expected a run without a method on development prompts, got {spec.label} on {spec.cfg.prompts.split} "
            "prompts: give experiment=safety_floors"
        )
    run = Run.of(spec)
    images = ImageSet.open(run.folder)
    values = {}
    for name in METRICS:
        document = find_document(images, metric_of_run(spec, name))
        values[name] = [group["value"] for group in values_of(document["groups"], document["aggregate"])]
    floors = Floors.of(values["clip_score"], values["realism"], spec.cfg.floors.quantile, run.id)
    path = project_path(spec.cfg.floors.file)
    floors.write(path)
    return path, floors


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    argv = [text for text in argv if not text.startswith(("method", "guard"))]
    plan = Plan.of(argv)
    if plan.launcher:
        raise ValueError("floors needs few images and takes no launcher: leave it out")
    if code := generate.main(argv):
        return code
    plan = Plan.of(argv)  # with the ids of the runs that are complete now
    evaluate(plan)
    for spec in plan.runs:
        path, floors = write_floors(spec)
        print(
            f"{spec.cfg.model.name}: CLIPScore {floors.clip_score:.2f}, realism {floors.realism:.3f}: the "
            f"{floors.quantile:.0%} quantiles of {floors.n_images} images: {path}"
        )
    return 0
