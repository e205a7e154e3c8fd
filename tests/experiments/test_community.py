"""Results that people send: what is sent is what was measured, and whatever was changed afterwards is refused."""

import copy
import json
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laid_runs import PROMPTS, write_run, write_scores
from plans import plan_of

from eval.diversity import PairwiseDistance
from eval.files import canonical_json, content_hash, read_document, with_checksum
from eval.images import METRICS, ManifestRow, read_manifest, rows_hash
from experiments import PROJECT, tabulate
from experiments.__main__ import main
from experiments.community import verify
from experiments.community.every_eval_ever import to_every_eval_ever
from experiments.community.page import write_page
from experiments.community.submission import COMMUNITY, submission_files
from experiments.community.submit import submissions_of, write_submissions
from experiments.runs.identity import short_digest
from experiments.runs.store import Run
from experiments.tables.columns import merge_rows

GROUPS = [f"{prompt_id}/{seed:06d}" for prompt_id in PROMPTS for seed in (0, 1)]
#: Values of the six groups of both runs.
VALUES = {
    ("none", "pairwise_distance_aligned"): [0.20, 0.25, 0.31, 0.22, 0.27, 0.24],
    ("negtome", "pairwise_distance_aligned"): [0.28, 0.26, 0.38, 0.29, 0.33, 0.25],
    ("none", "clip_score"): [31.0, 29.5, 33.2, 30.1, 28.4, 32.0],
    ("negtome", "clip_score"): [30.8, 29.9, 32.1, 30.0, 28.0, 31.5],
    ("none", "pairwise_similarity"): [0.80, 0.75, 0.69, 0.78, 0.73, 0.76],
    ("negtome", "pairwise_similarity"): [0.72, 0.74, 0.62, 0.71, 0.67, 0.75],
}
POOLED = ("category_pooled_similarity",)
BOUNDS = {"pairwise_distance_aligned": [0, 2], "clip_score": [0, 100], "pairwise_similarity": [-1, 1]}


@pytest.fixture(scope="module")
def commit(tmp_path_factory):
    """A commit of a repository of its own, which stands for this one in the module's tests."""
    folder, patch = tmp_path_factory.mktemp("repository"), pytest.MonkeyPatch()
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@example.com"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "first"], check=True)
    patch.setattr(verify, "PROJECT", folder)
    yield subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    patch.undo()


def request_of(method, name="sdxl", kind="real"):
    groups = [[category, prompt, seed] for prompt, category in PROMPTS.values() for seed in (0, 1)]
    return {
        "version": 1,
        "model": {"name": name, "kind": kind, "architecture": "sdxl", "revision": "main", "source": "maker/model",
                  "dtype": "float16", "call": {"num_inference_steps": 20, "guidance_scale": 5.0}},
        "prompts": {"name": "diversity", "split": "test", "images_per_prompt": 4, "groups": groups},
        "method": {"name": method, "settings": {} if method == "none" else {"alpha": 0.9, "threshold": 0.65}},
        "compile": False,
    }  # fmt: skip


def lay_down(folder, commit, kind="real"):
    """Lay down two scored runs with their plan and their table; return the plan."""
    overrides = ["experiment=diversity", "model=sdxl", "method=none,negtome", "bootstrap.cluster=null"]
    places = [f"outputs={folder / 'outputs'}", f"results={folder / 'results'}", "bootstrap.n_resamples=200"]
    plan = plan_of([*overrides, *places, "primary.quality=clip_score"])
    scores = []
    for spec in plan.runs:
        method = spec.cfg.method.name
        spec.id = write_run(folder / "outputs", "sdxl", method, request=request_of(method, kind=kind), commit=commit)
        run = Run(folder / "outputs" / "runs" / spec.id)
        manifest = {"manifest_sha256": rows_hash(run.folder, read_manifest(run.folder)), "version": 1, "settings": {}}
        for metric, bounds in BOUNDS.items():
            write_scores(
                run.folder, metric, "clip-vit", dict(zip(GROUPS, VALUES[method, metric], strict=True)), **manifest,
                bounds=bounds, higher_is_better=metric != "pairwise_similarity", unit="u", n_groups=6, n_images=24,
            )  # fmt: skip
        # A metric of pools, and one of the whole set with its halves.
        pooled = [{"group": f"{c}/all", "category": c, "n_images": 8, "value": 0.5} for c in ("bus", "cat", "ogre")]
        halves = [{"seed": seed, "n_units": 2, "n_images": 12, "value": 0.1 + seed / 100} for seed in range(20)]
        halved = {"aggregate": "subsets", "groups": [], "groups_sha256": "0" * 64, "n_units": 4, "subsets": halves}
        for metric, more in (
            ("category_pooled_similarity", {"groups": pooled, "value": 0.5, "n_groups": 3}),
            ("kernel_distance_scorer", {**halved, "value": 0.2, "n_groups": 6}),
        ):
            usual = {"bounds": [-1, 1] if metric in POOLED else [None, None], "higher_is_better": False, "unit": "u"}
            write_scores(
                run.folder, metric, "clip-vit", dict.fromkeys(GROUPS, 0.5), **manifest, **usual, n_images=24, **more
            )
        scores += [(spec, run, metric) for metric in (*BOUNDS, *POOLED, "kernel_distance_scorer")]
    plan.write()
    documents = {(run.id, metric): read_document(score_file(run.folder, metric)) for _, run, metric in scores}
    roles = {"pairwise_distance_aligned": "diversity", "clip_score": "quality"}
    rows = []
    for spec, run, metric in scores:
        reference = None if spec.baseline is spec else documents[spec.baseline.id, metric]
        score = tabulate.Score(spec, run, metric, roles.get(metric), documents[run.id, metric], reference, [])
        rows.append(tabulate.row_of(score))
    merge_rows(plan.result_file(), rows)
    return plan


def score_file(folder, metric):
    return folder / METRICS / f"{metric}-clip-vit.json"


@pytest.fixture(scope="module")
def laid(tmp_path_factory, commit):
    """Two laid runs, and the folder of what was submitted of them. Not to be changed."""
    folder = tmp_path_factory.mktemp("laid")
    plan = lay_down(folder, commit)
    assert main(["submit", "experiment=diversity", f"outputs={folder / 'outputs'}", "--to", str(folder / "sent")]) == 0
    return plan, folder / "sent"


@pytest.fixture
def sent(laid, tmp_path):
    """Copies of the two files, of the baseline and of negtome."""
    shutil.copytree(laid[1], tmp_path / "sent")
    return [tmp_path / "sent" / f"diversity-{spec.id}.json" for spec in laid[0].runs]


def read(file):
    return json.loads(file.read_text())


def resign(submission):
    """Return a submission whose digests are right again, as a forger would make them."""
    for score in submission["scores"]:
        score["document"] = with_checksum(score["document"])
    return with_checksum(submission)


def put(file, submission):
    file.write_text(canonical_json(submission) + "\n")
    return verify.find_faults(file)


def score_of(submission, metric):
    (score,) = [score for score in submission["scores"] if score["document"]["metric"] == metric]
    return score


def test_what_is_sent_is_what_was_measured(laid, commit):
    plan, folder = laid
    for spec in plan.runs:
        submission, run = read(folder / f"diversity-{spec.id}.json"), plan_folder(plan, spec)
        assert submission["run_id"] == spec.id == short_digest(submission["settings"])
        assert submission["environment"]["commit"] == commit and not submission["small_model"]
        assert [row["sha256"] for row in submission["images"]] == [
            content_hash(run / row.path) for row in read_manifest(run)
        ]
        for (method, metric), values in VALUES.items():
            if method == spec.cfg.method.name:
                score = score_of(submission, metric)
                assert [group["value"] for group in score["document"]["groups"]] == values
                assert score["statistics"]["value"] == pytest.approx(np.mean(values))
                difference = np.mean(np.subtract(values, VALUES["none", metric]))
                assert method == "none" or score["statistics"]["difference"] == pytest.approx(difference)
    assert score_of(submission, "clip_score")["statistics"]["non_inferior"] is True
    assert main(["verify", *map(str, folder.glob("*.json"))]) == 0


def plan_folder(plan, spec):
    return plan.file.parents[1] / "runs" / spec.id


def leaves(tree, path=()):
    """Yield the path of every value in nested lists and objects."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def change(tree, path):
    """Return a copy in which one value is another one of its kind."""
    changed = copy.deepcopy(tree)
    *parents, last = path
    place = changed
    for key in parents:
        place = place[key]
    value = place[last]
    if isinstance(value, bool):
        place[last] = not value
    elif isinstance(value, int | float):
        place[last] = value + 1
    elif isinstance(value, str):
        place[last] = value[:-1] + ("1" if value.endswith("0") else "0")  # a digest stays one for the schema
    else:
        place[last] = 1 if value is None else ["x"]
    return changed


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_changed_value_is_refused(laid, data):
    """By the digest; and, signed again, by what was recomputed, but for the date and the version of Python."""
    plan, folder = laid
    submission = read(folder / f"diversity-{plan.runs[1].id}.json")
    # By part, or the images, which have most values, would be drawn most often.
    part = data.draw(st.sampled_from(sorted(submission)))
    path = data.draw(st.sampled_from([path for path in leaves(submission) if path[0] == part]))
    changed = change(submission, path)
    file = folder.parent / "changed" / f"diversity-{submission['run_id']}.json"
    file.parent.mkdir(exist_ok=True)
    baseline = f"diversity-{plan.runs[0].id}.json"
    shutil.copy(folder / baseline, file.with_name(baseline))
    assert put(file, changed), path
    if path not in (("sha256",), ("environment", "date"), ("environment", "python")):
        assert put(file, with_checksum(changed)), path


def impossible(submission, metric, value):
    document = score_of(submission, metric)["document"]
    document["groups"][0]["value"] = value
    document["value"] = float(np.mean([group["value"] for group in document["groups"]]))


def drop_group(submission):
    document = score_of(submission, "clip_score")["document"]
    del document["groups"][2]
    document |= {"n_groups": 5, "n_images": 20, "value": float(np.mean([g["value"] for g in document["groups"]]))}


def repeat_group(submission):
    groups = score_of(submission, "clip_score")["document"]["groups"]
    groups[1] = dict(groups[0])


def drop_images(submission):
    submission["images"] = submission["images"][4:]


def repeat_metric(submission):
    submission["scores"].append(submission["scores"][0])


def without_value(submission):
    score = score_of(submission, "clip_score")
    score["document"] |= {"value": None, "groups": [], "n_groups": 0, "n_images": 0}


def drop_count(submission):
    score_of(submission, "kernel_distance_scorer")["document"]["n_groups"] = 5


def drop_pool(submission):
    document = score_of(submission, "category_pooled_similarity")["document"]
    del document["groups"][0]
    document |= {"n_groups": 2, "n_images": 16}


def invent_withheld(submission):
    listing = [{"group": "bus/000000", "category": "bus", "status": "refused"}]
    score_of(submission, "category_pooled_similarity")["document"]["withheld"] = listing


def set_in(*path):
    *parents, last, value = path

    def edit(submission):
        for key in parents:
            submission = score_of(submission, key) if key in BOUNDS else submission[key]
        submission[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda s: impossible(s, "clip_score", 140.0), "clip_score: expected values from 0 to 100, got 140.0"),
        (lambda s: impossible(s, "pairwise_similarity", 1.2), "pairwise_similarity: expected values from -1 to 1, got"),
        (drop_group, "clip_score: expected a value of every group, missing: odd/000000 (1)"),
        (repeat_group, "clip_score: expected every group once, got [a-cat/000000] (1) repeatedly"),
        (drop_count, "kernel_distance_scorer: expected 6 groups and 24 images, got other numbers"),
        (drop_pool, "category_pooled_similarity: expected a value of every group, missing: bus/all (1)"),
        (invent_withheld, "expected a list of the withheld groups, got others: bus/000000 (1)"),
        (drop_images, "expected every requested group, missing: ('cat', 'a cat', 0) (1)"),
        (repeat_metric, "expected its score once, got 2"),
        (without_value, "clip_score: expected a value, got none although no group is withheld"),
        (set_in("clip_score", "document", "value", 45.0), "clip_score: value: expected the mean of the groups"),
        (set_in("clip_score", "document", "version", 99), "clip_score: expected version"),
        (
            set_in("clip_score", "document", "bounds", [0, 31]),
            "clip_score: bounds: the metric does not declare [0, 31]",
        ),
        (set_in("clip_score", "document", "higher_is_better", False), "the metric does not declare False"),
        (set_in("clip_score", "document", "metric", "mine"), "mine: expected"),
        (set_in("clip_score", "statistics", "p_value", 0.0001), "clip_score: p_value: expected"),
        (set_in("clip_score", "statistics", "difference_low", None), "clip_score: difference_low: expected"),
        (set_in("environment", "commit", "0" * 40), "commit: expected one of this repository, got 0000"),
        (set_in("environment", "commit", "abc+changes"), "commit: expected a commit without later changes"),
        (set_in("run_id", "0" * 12), "run_id: expected"),
        (set_in("small_model", True), "small_model: expected False for model sdxl"),
        (set_in("baseline", None), "baseline: expected the run that the differences are to, got none"),
        (set_in("baseline", "sha256", "0" * 64), "baseline: expected the digest of diversity-"),
        (set_in("baseline", "run_id", "0" * 12), "No such file"),
        (set_in("settings", "machine", "device", "a | b"), "$.settings.machine.device"),
        (set_in("scores", []), "$.scores: [] should be non-empty"),
    ],
)
def test_a_forged_file_with_right_digests_is_refused_in_one_line(edit, line, sent):
    submission = read(sent[1])
    edit(submission)
    faults = put(sent[1], resign(submission))
    assert any(line in fault for fault in faults), faults
    assert all("\n" not in fault and len(fault) < 400 for fault in faults)


def withhold(submission, group):
    """Withhold a group of a run, as a method does that refuses its prompt, and compute the statistics anew."""
    category = next(row["category"] for row in submission["images"] if row["path"].startswith(f"images/{group}/"))
    removed = [row for row in submission["images"] if row["path"].startswith(f"images/{group}/")]
    submission["images"] = [row for row in submission["images"] if row not in removed]
    place = {key: removed[0][key] for key in ("prompt_id", "prompt", "category", "group_seed")}
    submission["withheld"] = [{"status": "refused", "reason": "why", "clauses": [], **place}]
    submission["scores"] = [score for score in submission["scores"] if score["document"]["metric"] in BOUNDS]
    for score in submission["scores"]:
        document = score["document"]
        document["groups"] = [entry for entry in document["groups"] if entry["group"] != group]
        document["value"] = float(np.mean([entry["value"] for entry in document["groups"]]))
        document |= {"n_groups": 5, "n_images": 20}
        document["withheld"] = [{"group": group, "category": category, "status": "refused"}]
        document["manifest_sha256"] = rows_hash(None, [ManifestRow(**row) for row in submission["images"]])


def test_withheld_groups_are_listed_and_not_counted(sent):
    baseline, submission = map(read, sent)
    withhold(submission, "odd/000001")
    references = {score["document"]["metric"]: score["document"] for score in baseline["scores"]}
    for score in submission["scores"]:
        score["document"] = with_checksum(score["document"])
        score["statistics"] = verify.recomputed(submission, score, references[score["document"]["metric"]])
    assert put(sent[1], with_checksum(submission)) == []
    assert score_of(submission, "clip_score")["statistics"]["n_paired"] == 5
    del score_of(submission, "clip_score")["document"]["withheld"]
    faults = put(sent[1], resign(submission))
    assert "clip_score: expected the withheld groups to be listed, missing: odd/000001 (1)" in faults
    submission["withheld"] = []
    assert any("expected every requested group, missing: ('ogre'" in fault for fault in put(sent[1], submission))


def test_a_baseline_of_another_machine_or_with_other_values_is_refused(sent):
    baseline, submission = map(read, sent)
    baseline["settings"]["machine"]["device"] = "another"
    put(sent[0], with_checksum(baseline))
    submission["baseline"]["sha256"] = with_checksum(baseline)["sha256"]
    assert "baseline: expected the same machine, got others" in put(sent[1], with_checksum(submission))
    impossible(baseline, "clip_score", 50.0)
    put(sent[0], baseline)
    assert any("expected what was written into diversity-" in fault for fault in verify.find_faults(sent[1]))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (lambda text: text.replace("31.0", "NaN"), "expected finite numbers, got NaN or infinity"),
        (lambda text: text.replace('"format": 1', '"format": 1, "format": 1'), "or a key twice"),
        (lambda text: text[:-9], "expected JSON in"),
        (lambda text: "[]", "$: [] is not of type 'object'"),
    ],
)
def test_what_is_not_canonical_json_is_refused(text, line, sent, capsys):
    sent[0].write_text(text(sent[0].read_text()))
    assert main(["verify", str(sent[0])]) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and line in out[0] and out[1] == "0 of 1 results are accepted"


def test_without_history_a_commit_is_not_looked_for(sent, monkeypatch, tmp_path, capsys):
    submission = read(sent[0])
    submission["environment"]["commit"] = "1" * 40
    monkeypatch.setattr(verify, "PROJECT", tmp_path)
    assert put(sent[0], with_checksum(submission)) == []
    assert main(["verify", str(sent[0])]) == 0 and "commits were not checked" in capsys.readouterr().out


@pytest.mark.slow
def test_only_what_would_be_accepted_is_written(laid, commit, tmp_path, capsys):
    folder = tmp_path / "laid"
    plan = lay_down(folder, f"{commit}+changes")
    arguments = ["submit", "experiment=diversity", f"outputs={folder / 'outputs'}", "--to", str(tmp_path / "sent")]
    assert main(arguments) == 1 and not (tmp_path / "sent").exists()
    assert capsys.readouterr().out.count("commit: expected a commit without later changes") == 2
    run = plan_folder(plan, plan.runs[1])
    path = score_file(run, "clip_score")
    document = read_document(path)
    document["groups"][0]["value"] += 1
    path.write_text(json.dumps(with_checksum(document)))
    assert main(arguments) == 2 and "tabulate with the same overrides" in capsys.readouterr().err
    next(run.glob("images/*/*/00.png")).write_bytes(b"")
    assert main(arguments) == 2 and "expected the image that was generated" in capsys.readouterr().err
    assert main([*arguments, "model=sdxl"]) == 2 and "expected experiment=NAME, and" in capsys.readouterr().err
    assert main(["submit", "experiment=absent"]) == 2 and "expected a plan in" in capsys.readouterr().err


def test_small_models_stand_apart_on_the_page(laid, commit, tmp_path):
    plan, folder = laid
    small = lay_down(tmp_path, commit, kind="mini")
    files, faults = write_submissions(submissions_of(small), tmp_path / "sent")
    assert not faults and all(read(file)["small_model"] for file in files)
    for file in folder.glob("*.json"):
        shutil.copy(file, tmp_path / "sent")
    page = write_page(tmp_path / "sent").read_text()
    large, _, apart = page.partition("### Small models")
    for runs, text, other in ((plan.runs, large, apart), (small.runs, apart, large)):
        for spec in runs:
            assert f"[{spec.id}](diversity-{spec.id}.json)" in text and spec.id not in other
    (row,) = [line for line in large.splitlines() if plan.runs[1].id in line]
    assert "0.298; +0.050" in row and "| cpu" in row and commit[:8] in row


def test_the_committed_page_is_of_the_committed_files(tmp_path):
    written = (COMMUNITY / "README.md").read_text()
    for file in [*submission_files(COMMUNITY), COMMUNITY / "schema.json"]:
        shutil.copy(file, tmp_path)
    assert write_page(tmp_path).read_text() == written


def test_the_export_has_the_numbers_and_what_its_schema_requires(laid):
    plan, folder = laid
    submission = read(folder / f"diversity-{plan.runs[1].id}.json")
    export = to_every_eval_ever(submission)
    assert {"schema_version", "evaluation_id", "retrieved_timestamp", "source_metadata", "model_info", "eval_library",
            "evaluation_results"} <= export.keys()  # fmt: skip
    assert export["model_info"]["id"] == "maker/model"
    results = {result["metric_config"]["metric_name"]: result for result in export["evaluation_results"]}
    assert results.keys() == {*BOUNDS, *POOLED, "kernel_distance_scorer"}
    result, values = results["pairwise_similarity"], VALUES["negtome", "pairwise_similarity"]
    assert result["score_details"]["score"] == pytest.approx(np.mean(values))
    config = result["metric_config"]
    assert (config["lower_is_better"], config["min_score"], config["max_score"]) == (True, -1, 1)
    interval = result["score_details"]["uncertainty"]["confidence_interval"]
    assert interval["lower"] < np.mean(values) < interval["upper"]


def test_real_runs_by_the_command_line(scored_copy, tmp_path, monkeypatch):
    """From generated images to accepted files, as somebody would do it."""
    plan, outputs, folders = scored_copy
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True).stdout.strip()
    for folder in folders:  # this checkout may have changes
        environment = read(folder / "environment.json") | {"commit": head or "0" * 40}
        (folder / "environment.json").write_text(json.dumps(environment))
    plan.write()
    tabulate.write_table(plan)
    places = [f"outputs={outputs}", f"results={tmp_path / 'results'}", "--to", str(tmp_path / "sent")]
    export = ["--every-eval-ever", str(tmp_path / "export")]
    monkeypatch.setattr(verify, "PROJECT", PROJECT)
    assert main(["submit", "experiment=sweep", *places, *export]) == 0
    files = sorted((tmp_path / "sent").glob("*.json"))
    assert [file.name for file in files] == sorted(f"sweep-{folder.name}.json" for folder in folders)
    assert len(list((tmp_path / "export" / "data" / "negtome-sweep").rglob("*.json"))) == 2
    submission = read(tmp_path / "sent" / f"sweep-{folders[1].name}.json")
    (score,) = [s for s in submission["scores"] if s["document"]["metric"] == PairwiseDistance.name]
    assert score["role"] == "diversity" and score["statistics"]["ci_low"] is None  # two categories are too few
    assert main(["verify", *map(str, files)]) == 0
