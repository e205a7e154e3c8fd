"""Make an experiment's table of the scores of its runs: a CSV, one row per number, and the same as Markdown.

    python -m experiments tabulate experiment=diversity
    python -m experiments tabulate --against random_match experiment=ablate_matching

The overrides are those of `experiments.generate`, or plan=FILE, which it wrote. Rows of models that are not among
them stay as they are in the CSV.
With paper_comparison=true, `comparison.md` has the paper's table with ours in it.
With --against METHOD, all methods are paired with that one instead of the baseline, and only a page is written,
`<results>/<experiment>/against_<method>.md`. With style=paper, `paper/table.tex` is written too.

An experiment declares primary metrics of what it is for and of what that may cost: they are tested, corrected for their
number, and make the main table and the findings. All other metrics are described, with intervals, in a table below.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import argparse
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from eval.files import write_text
from eval.images import METRICS, scores_path
from eval.imageset import ImageSet
from eval.intervals import SUBSETS, difference_of, interval_of, n_shared, n_units, paired_differences, shared_groups
from eval.metric import Metric, current_document
from eval.significance import bootstrap_t_p, effect_size, non_inferior, win_rate
from experiments.configs import flag
from experiments.plan import Plan, RunSpec
from experiments.runs import catalogue
from experiments.runs.identity import code_digest
from experiments.runs.metrics import check_table, measured, metric_of_run, primary_metrics
from experiments.runs.store import Run
from experiments.tables import columns
from experiments.tables.groups import GROUPS, group_rows, put_groups
from experiments.tables.pages import paper_table, render_against, render_latex, render_markdown
from experiments.tables.paper import COMPARISON, render_comparison
from experiments.tables.paths import TABLE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """A number of the table: what a metric found in a run, and in the run that it is paired with.

    Attributes:
        spec, run: whose images were measured.
        metric: its name.
        role: what the metric is primary for, or None.
        document: what was found.
        reference: the same of the run it is paired with; None: there is no such run.
        statistics: what the method's log keeps of every group that has images.
    """

    spec: RunSpec
    run: Run
    metric: str
    role: str | None
    document: dict[str, Any]
    reference: dict[str, Any] | None
    statistics: list[dict[str, Any]]


def rows_of_runs(plan: Plan, against: str | None = None) -> list[dict[str, Any]]:
    """Return one row for every run and metric, each with its paired difference to the baseline; see `read_scores`."""
    return [row_of(score) for score in read_scores(plan, against)]


def read_scores(plan: Plan, against: str | None = None) -> list[Score]:
    """Read the scores of a plan's runs.

    Args:
        plan: each of its runs is paired with its baseline.
        against: name of the method whose run takes the baseline's place. Only primary metrics are then read, and only
            of runs whose baseline has a run of that method, with the same number of steps for example.

    Raises:
        FileNotFoundError: a run or its baseline was not generated or not scored; the message names the command.
        ValueError: the primary metrics are not two of the configured ones that can be tested; there is no run of
            `against` on a model, or several with one baseline; or a run and the one it is paired with are of two
            machines.
    """
    for spec in plan.runs:
        check_table(spec.cfg)  # before anything is read
    runs = {Run.of(spec): spec for spec in plan.runs}  # equal settings are one run
    others = _paired_with(plan, against, runs) if against else {}
    images = functools.cache(lambda run: ImageSet.open(run.folder))  # which hashes the files once
    scores = []
    for run, spec in runs.items():
        baseline = others.get(spec.baseline) if against else Run.of(spec.baseline)
        if baseline is None:
            continue
        run.check_alike(baseline)
        roles, statistics = primary_metrics(spec.cfg), run.statistics()
        for name in measured(spec.cfg):
            if name in roles or not against:
                metric = metric_of_run(spec, name)  # one by one, so that no two encoders need to be held at a time
                reference = None if baseline == run else find_document(images(baseline), metric)
                document = find_document(images(run), metric)
                scores.append(Score(spec, run, name, roles.get(name), document, reference, statistics))
    return scores


def _paired_with(plan: Plan, against: str, runs: dict[Run, RunSpec]) -> dict[RunSpec, Run]:
    """Return the run of the method `against` for each baseline, in whose place it stands."""
    others: dict[RunSpec, Run] = {}
    for run, spec in runs.items():
        if spec.cfg.method.name == against and others.setdefault(spec.baseline, run) != run:
            model = spec.cfg.model.name
            raise ValueError(f"expected one run of {against} on {model} to pair with, got several: choose one")
    if not others:
        names = ", ".join(dict.fromkeys(spec.cfg.method.name for spec in plan.runs))
        raise ValueError(f"expected one of the experiment's methods ({names}), got {against!r}")
    models = dict.fromkeys(spec.cfg.model.name for spec in plan.runs)
    paired_models = {spec.cfg.model.name for spec in others}
    if unpaired := [model for model in models if model not in paired_models]:
        raise ValueError(
            f"expected a run of {against} on every model, got none on {', '.join(unpaired)}: give "
            f"model={','.join(model for model in models if model in paired_models)}"
        )
    return others


def row_of(score: Score) -> dict[str, Any]:
    """Return the row of a score in the table."""
    cfg, run, document = score.spec.cfg, score.run, score.document
    settings = run.identity["request"]["method"]["settings"]

    def share(part: str, total: str) -> float | None:
        amount = sum(group.get(total, 0) for group in score.statistics)
        return sum(group.get(part, 0) for group in score.statistics) / amount if amount else None

    return {
        "experiment": cfg.name,
        "model": cfg.model.name,
        "method": cfg.method.name,
        **setting_columns(cfg.model.call, settings),
        "metric": score.metric,
        "encoder": document["encoder"]["id"],
        "primary": score.role,
        "higher_is_better": document["higher_is_better"],
        **statistics_of(cfg, score.metric, score.role, document, score.reference),
        "pushed_share": share("tokens_pushed", "tokens_compared"),
        columns.EQUAL_SHARE: share("equal_matches", "approximate_matches"),
        # Only where asked for: a rerun gives every other number again, to the last digit.
        "seconds": (
            median(group["seconds"] for group in score.statistics) / cfg.prompts.images_per_prompt
            if flag(cfg, "report_seconds") and score.statistics
            else None
        ),
        "run_id": run.id,
        "code": code_digest(score.spec.settings, run.identity["weights"], document["version"]),
        "commit": run.environment["commit"],
        "device": run.identity["machine"]["device"],
    }


def setting_columns(call: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a run's settings.

    Args:
        call: arguments of the model's call.
        settings: of the method. One of the call's arguments replaces the model's; None leaves it to the model.
    """
    of_call = {
        "guidance_scale": call.get("guidance_scale"),
        "true_cfg_scale": call.get("true_cfg_scale"),
        "steps": call.get("num_inference_steps"),
    }
    of_call |= {name: settings[name] for name in of_call if settings.get(name) is not None}
    cells: dict[str, Any] = {}
    for setting in catalogue.settings():
        cells |= setting.cells(settings)
    return cells | of_call


def statistics_of(
    cfg: DictConfig, name: str, role: str | None, document: dict[str, Any], reference: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the columns that follow from a metric's document, and from that of the run it is paired with.

    Differences are over the groups that both runs show.

    Args:
        cfg: has `bootstrap`, `primary.quality_margin`, `model.name` and `method.name`.
        name, role, document, reference: see `Score`.
    """
    resampling, aggregate, higher = cfg.bootstrap, document["aggregate"], document["higher_is_better"]
    value, low, high = interval_of(document, **resampling)
    columns = {
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "n_units": n_units(document, resampling.cluster),
        "n_groups": document["n_groups"],
        "n_images": document["n_images"],
        "n_withheld": len(document.get("withheld", document.get("counted_without_images", ()))),
    }
    if reference is None:
        return columns
    if document.get("withheld") or reference.get("withheld"):
        columns["n_paired"] = n_shared(document, reference)
        if not columns["n_paired"]:
            why = "it is of a whole set, and the runs' differ" if aggregate == SUBSETS else "the runs share no group"
            log.warning("%s %s: there is no difference in %s: %s", cfg.model.name, cfg.method.name, name, why)
            return columns
    difference = difference_of(document, reference, **resampling)
    columns |= {
        "difference": difference.difference,
        "difference_low": difference.low,
        "difference_high": difference.high,
    }
    # A number of a whole set has no results of groups that could be resampled.
    if aggregate != SUBSETS:
        pairs = paired_differences(*shared_groups(document, reference), aggregate)
        columns["p_value"] = bootstrap_t_p(pairs, resampling.n_resamples, resampling.seed, resampling.cluster)
        columns["effect_size"] = effect_size(pairs, resampling.cluster)
        columns["win_rate"] = None if higher is None else win_rate(pairs, higher, resampling.cluster)
    least, base = reference["bounds"][0], reference["value"]
    # A share of a number that may be 0 or less is no margin.
    if role == "quality" and least is not None and least >= 0 and base > 0:
        shares = cfg.primary.quality_margin
        columns["margin"] = (shares[name] if isinstance(shares, DictConfig) else shares) * base
        columns["non_inferior"] = non_inferior(difference, columns["margin"], higher)
    return columns


def find_document(images: ImageSet, metric: Metric) -> dict[str, Any]:
    """Read the score of a run's images.

    Raises:
        FileNotFoundError: it was not measured, or by another version or of other images.
        ValueError: the file, or an image, is not as it was written; the message names it.
    """
    folder = images.folder / METRICS
    if (document := current_document(metric, images, folder)) is None:
        path = scores_path(folder, metric.name, metric.encoder.id)
        state = "of another version" if path.exists() else "missing"
        raise FileNotFoundError(f"{path} is {state}: run python -m experiments evaluate with the same overrides")
    return document


def write_table(plan: Plan) -> tuple[pd.DataFrame, str]:
    """Write `table.csv`, `table.md` and `groups.csv.gz` of a plan's runs into `<results>/<experiment>/`.

    With style=paper, `paper/table.tex` too; with paper_comparison=true, `comparison.md`.

    Returns:
        The table with all rows that were in it before, and the Markdown of `table.md` and `comparison.md`.
    """
    path, scores = plan.result_file(), read_scores(plan)
    rows = [row_of(score) for score in scores]
    columns.merge_rows(path, rows)
    groups = [entry for row, score in zip(rows, scores, strict=True) for entry in group_rows(row, score.document)]
    with columns.lock(path):
        frame = columns.whole(columns.read_csv(path))  # another process may have merged its rows meanwhile
        put_groups(plan.result_file(GROUPS), groups, frame)
        page = render_markdown(frame, plan.cfg.description, paper_table(plan.name))
        write_text(path.with_suffix(".md"), page)
        if plan.cfg.style == "paper":
            write_text(path.parent / "paper" / "table.tex", render_latex(frame))
        if flag(plan.cfg, "paper_comparison"):
            write_text(plan.result_file(COMPARISON), comparison := render_comparison(frame))
            page += f"\n{comparison}"
    return frame, page


def write_comparison(plan: Plan, against: str) -> tuple[pd.DataFrame, str]:
    """Write `<results>/<experiment>/against_<method>.md`: all methods of a plan paired with the method `against`.

    Returns:
        The rows, in full precision, and the Markdown.
    """
    frame = pd.DataFrame(rows_of_runs(plan, against), columns=columns.COLUMNS)
    columns.correct_p_values(frame)
    page = render_against(frame, against)
    write_text(plan.result_file(f"against_{against}.md"), page)
    return frame, page


def main(argv: list[str], plan: Plan | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("tabulate", add_help=False)
    parser.add_argument("--against", metavar="METHOD")
    arguments, overrides = parser.parse_known_args(argv)
    plan, against = plan or Plan.of(overrides), arguments.against
    print((write_comparison(plan, against) if against else write_table(plan))[1])
    files = [f"against_{against}.md"] if against else [TABLE, "table.md", GROUPS]
    if flag(plan.cfg, "paper_comparison") and not against:
        files.append(COMPARISON)
    for name in files:
        print(plan.result_file(name))
