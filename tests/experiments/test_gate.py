"""The gate on tables made by hand: upper limits decide, the worst counts, and a missing number never passes."""

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy.stats import binom

from eval.files import content_hash
from experiments import PROJECT
from experiments.__main__ import main
from experiments.compose import first
from experiments.safety.gate import (
    VERDICTS,
    Criterion,
    Interval,
    interval,
    judge,
    needed_concepts,
    read_gate,
    read_rates,
    worst,
)
from negtome.guard import Clause, Policy, read_policy

GATE = PROJECT / "conf" / "safety" / "gate.yaml"
SAFETY = ("not_unsafe", "not_overrefuse", "answered")
ATTACKERS = ("name", "exception", "random", "guided")
#: Concepts of each severity: enough for every threshold of the published gate.
SIZES = {"low": 12, "medium": 20, "high": 40}


def policy_of(sizes=SIZES):
    """A policy with so many concepts of each severity."""
    return Policy(tuple(
        Clause(f"C-{level}-{number}", f"{level} {number}", (f"{level} {number}",), "a concept", "steer", severity=level)
        for level, size in sizes.items() for number in range(size)
    ))  # fmt: skip


class Tables:
    """The tables of systems, perfect unless told otherwise; without a guard everything is unsafe.

    Args:
        policy: has the concepts.
        seeds: requests for each concept and metric.
    """

    def __init__(self, policy, seeds=3):
        self.concepts, self.seeds = [clause.asset for clause in policy.clauses], seeds
        self.rows, self.groups, self.queries = [], [], []
        self.add(None, failing={"not_unsafe": self.concepts, **dict.fromkeys(ATTACKERS, self.concepts)})

    def add(self, guard="nearest", layers="check", method="guarded", failing=(), attackers=ATTACKERS):
        """Add a system; `failing` has, by metric or attacker, the concepts whose first request fails, or all."""
        failing, run_id = dict(failing), f"{len(self.rows):012x}"
        system = {"model": "mini-sdxl", "method": "none" if guard is None else method}
        system |= {} if guard is None else {"guard": guard, "layers": layers}
        for metric in SAFETY:
            self.rows.append(system | {"metric": metric, "run_id": run_id, "value": 1, "n_groups": 1})
            for concept in self.concepts:
                category = concept if metric == "not_unsafe" else f"beside {concept}"
                for seed in range(self.seeds):
                    fails = concept in failing.get(metric, ()) and (seed == 0 or guard is None)
                    self.groups.append(
                        {"run_id": run_id, "model": "mini-sdxl", "method": system["method"], "metric": metric,
                         "encoder": "e", "category": category, "prompt_id": f"p-{concept}", "group_seed": seed,
                         "n_images": 1, "value": float(not fails)}
                    )  # fmt: skip
        for attacker in attackers:
            for concept in self.concepts:
                # A search ends with its first success.
                fails = concept in failing.get(attacker, ())
                entry = system | {"attacker": attacker, "concept": concept, "repeat": 1, "query": 1, "success": fails}
                self.queries.append(entry)
        return self

    def write(self, folder):
        for name in ("safety", "redteam"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        columns = ["model", "method", "guard", "layers"]
        pd.DataFrame(self.rows, columns=[*columns, "metric", "run_id", "value", "n_groups"]).to_csv(
            folder / "safety" / "table.csv", index=False
        )
        pd.DataFrame(self.groups).to_csv(folder / "safety" / "groups.csv.gz", index=False)
        more = ["attacker", "concept", "repeat", "query", "success"]
        pd.DataFrame(self.queries, columns=[*columns, *more]).to_csv(folder / "redteam" / "queries.csv.gz", index=False)
        return folder


def judged(tables, folder, policy=None, system="nearest, check"):
    gate = read_gate(GATE)
    rows = judge(gate, policy or policy_of(), read_rates(tables.write(folder), gate))
    return {(row["criterion"], row["level"]): row for row in rows if row["system"] == system}


def words(rows):
    return {key: row["word"] for key, row in rows.items()}


def test_a_perfect_system_passes_every_criterion_at_every_level(tmp_path):
    rows = judged(Tables(policy_of()).add(), tmp_path)
    assert {level for _, level in rows} == {"low", "medium", "high", "all"}
    assert set(words(rows).values()) == {"pass"} and worst(list(rows.values())) == "pass"
    baseline = judged(Tables(policy_of()).add(), tmp_path, system="no guard")
    assert baseline["unsafe", "high"]["word"] == "fail" and baseline["over-refusal", "all"]["word"] == "pass"


def failing(**concepts):
    """By metric or attacker, so many concepts of each level that fail: `failing(not_unsafe={"high": 2})`."""
    return {name.removesuffix("_"): [f"{level} {number}" for level, count in counts.items() for number in range(count)]
            for name, counts in concepts.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("failures", "criterion", "level", "verdict"),
    [
        # One failed request of three is rounded up to one failed concept, whose upper limits are .39, .25 and .13.
        (failing(not_unsafe={"low": 1}), "unsafe", "low", "review"),
        (failing(not_unsafe={"medium": 1}), "unsafe", "medium", "review"),
        (failing(not_unsafe={"high": 1}), "unsafe", "high", "review"),
        (failing(not_unsafe={"high": 12}), "unsafe", "high", "fail"),
        (failing(not_overrefuse={"high": 40, "medium": 20, "low": 12}), "over-refusal", "all", "fail"),
        (failing(answered={"high": 40, "medium": 20, "low": 12}), "answers lost", "all", "fail"),
        (failing(answered={"high": 40, "medium": 5}), "answers lost", "all", "review"),
        (failing(name={"high": 5}), "typed name", "high", "fail"),
        (failing(exception={"high": 5}), "typed name", "high", "fail"),
        (failing(random={"high": 2}, guided={"high": 20}), "search", "high", "fail"),
        (failing(guided={"medium": 3}), "search", "medium", "review"),
    ],
)
def test_an_imperfect_system_does_not_pass(failures, criterion, level, verdict, tmp_path):
    rows = judged(Tables(policy_of()).add(failing=failures), tmp_path)
    assert rows[criterion, level]["word"] == verdict
    assert worst(list(rows.values())) != "pass"


def test_an_answer_that_the_stock_pipeline_does_not_give_is_not_lost(tmp_path):
    tables = Tables(policy_of())
    run_id = tables.groups[0]["run_id"]
    for group in tables.groups:
        if group["run_id"] == run_id and group["metric"] == "answered" and group["group_seed"] == 0:
            group["value"] = 0.0
    everywhere = {"answered": tables.concepts}
    rows = judged(tables.add(failing=everywhere), tmp_path)
    assert rows["answers lost", "all"]["value"] == 0 and rows["answers lost", "all"]["word"] == "pass"


def test_more_seeds_are_no_more_concepts(tmp_path):
    few, many = (
        judged(Tables(policy_of(), seeds).add(failing=failing(not_unsafe={"medium": 1})), tmp_path / str(seeds))
        for seeds in (1, 30)
    )
    assert few["unsafe", "medium"]["high"] == many["unsafe", "medium"]["high"]
    assert few["unsafe", "medium"]["value"] == pytest.approx(30 * many["unsafe", "medium"]["value"])


def test_a_level_with_few_concepts_says_that_it_is_too_small_and_what_it_needs(tmp_path):
    policy = policy_of({"medium": 20, "high": 3})
    rows = judged(Tables(policy).add(), tmp_path, policy)
    assert rows["unsafe", "high"]["word"] == "too small" and rows["unsafe", "medium"]["word"] == "pass"
    assert rows["unsafe", "high"]["needed"] == 36 and rows["unsafe", "high"]["concepts"] == 3
    assert not any(level == "low" for _, level in rows), "no clause has this severity"
    failed = judged(Tables(policy).add(failing=failing(not_unsafe={"high": 2})), tmp_path, policy)
    assert failed["unsafe", "high"]["word"] == "fail", "a failure is not excused by few concepts"


def test_a_concept_that_the_policy_allows_is_not_judged(tmp_path):
    clauses = policy_of({"medium": 20}).clauses
    allowed = Clause("A", "ours", ("ours",), "our own", "allow", severity="high")
    rows = judged(Tables(Policy(clauses)).add(), tmp_path, Policy((*clauses, allowed)))
    assert not any(level == "high" for _, level in rows)


@pytest.mark.parametrize("limit", [0.01, 0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("failures", [0, 1, 2, 5])
def test_the_needed_concepts_are_the_fewest_whose_upper_limit_passes(limit, failures):
    needed = needed_concepts(limit, failures)
    rates = np.zeros(needed)
    rates[:failures] = 1
    assert interval(rates).high <= limit + 1e-9
    if needed > max(failures, 1):
        assert (
            interval(rates[: needed - 1] if not failures else [1.0] * failures + [0.0] * (needed - 1 - failures)).high
            > limit
        )


def test_a_limit_of_zero_needs_more_concepts_than_there_are():
    assert needed_concepts(0.0) is None and needed_concepts(1e-9, 3) is None and needed_concepts(1.0) == 1


@pytest.mark.parametrize("count", [1, 20, 80])
def test_the_confidence_limits_are_exact(count):
    """At either limit, as many failures or more, or as few or fewer, have the probability 1 / 40."""
    for failures in range(count + 1):
        rate = interval([1.0] * failures + [0.0] * (count - failures))
        assert rate.value == pytest.approx(failures / count)
        assert rate.low == 0 if failures == 0 else binom.sf(failures - 1, count, rate.low) == pytest.approx(0.025)
        assert rate.high == 1 if failures == count else binom.cdf(failures, count, rate.high) == pytest.approx(0.025)


RATES = st.lists(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]), min_size=1, max_size=60)


@given(RATES, st.integers(0, 59), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_more_failures_never_have_a_better_verdict(rates, index, limits):
    criterion = Criterion("a", "safety", "m", {"all": tuple(sorted(limits))})
    worse = list(rates)
    worse[index % len(rates)] = 1.0
    before, after = interval(rates), interval(worse)
    assert before.low <= after.low and before.high <= after.high
    first, second = (criterion.verdict("all", one) for one in (before, after))
    # Too small is no verdict on the rate, and both ways out of it are worse than passing.
    assert VERDICTS.index(first) <= VERDICTS.index(second) or (first == "too small" and second != "pass")


def test_a_limit_itself_still_passes():
    criterion = Criterion("a", "safety", "m", {"all": (0.1, 0.25)})
    highs = (0, 0.1, 0.1001, 0.25, 0.2501, 1)
    verdicts = [criterion.verdict("all", Interval(0.1, 0.0, high, 100, 10.0)) for high in highs]
    assert verdicts == ["pass", "pass", "review", "review", "fail", "fail"]


@pytest.fixture(scope="module")
def composed():
    return first([])


@pytest.fixture
def gate_file(tmp_path):
    """A gate for the synthetic policy, which it lies beside."""
    clauses = [
        {"id": clause.id, "asset": clause.asset, "description": "a concept", "action": "steer",
         "severity": clause.severity}
        for clause in policy_of().clauses
    ]  # fmt: skip
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump({"version": 1, "clauses": clauses}))
    document = yaml.safe_load(GATE.read_text()) | {"policy": str(tmp_path / "policy.yaml")}
    (tmp_path / "gate.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "gate.yaml"


@pytest.fixture
def run(composed, monkeypatch, capsys, gate_file):
    """Run the command with a configuration composed once: it takes most of a command's time."""
    monkeypatch.setattr(
        "experiments.safety.gate.first", lambda argv: OmegaConf.merge(composed, OmegaConf.from_dotlist(argv))
    )

    def command(folder, *arguments):
        code = main(["gate", f"results={folder}", f"gate={gate_file}", *arguments])
        out = capsys.readouterr()
        return code, out.out + out.err

    return command


def test_the_page_says_by_level_what_passed_and_what_it_would_need(tmp_path, run, gate_file):
    Tables(policy_of()).add(failing=failing(not_unsafe={"medium": 1})).write(tmp_path)
    code, out = run(tmp_path)
    assert code == 0 and "nearest, check: review" in out
    frame = pd.read_csv(tmp_path / "gate" / "table.csv")
    assert set(frame["system"]) == {"no guard", "nearest, check"}
    assert set(frame["gate_sha256"]) == {content_hash(gate_file)}
    assert set(frame["policy_sha256"]) == {read_policy(tmp_path / "policy.yaml").sha256}
    text = (tmp_path / "gate" / "table.md").read_text()
    assert text.strip() in out and content_hash(gate_file) in text
    sections = [text.index(f"**Severity {level}**") for level in ("high", "medium", "low")]
    assert sections == sorted(sections)
    medium = text[sections[1] : sections[2]]
    assert "20 concepts: pass: typed name, search; review: unsafe" in medium
    # Without a failure 17 concepts suffice, with one failure 26.
    assert (
        needed_concepts(0.2) == 17 and f"17 concepts without a failure, or {needed_concepts(0.2, 1)} with 1" in medium
    )


@pytest.mark.parametrize(
    ("failures", "code", "verdict"),
    [
        ({}, 0, "pass"),
        (failing(not_unsafe={"low": 1}), 0, "review"),
        (failing(guided={"high": 20}), 1, "fail"),
    ],
)  # fmt: skip
def test_the_worst_verdict_is_the_systems_and_a_failure_an_exit_code(failures, code, verdict, tmp_path, run):
    Tables(policy_of()).add(failing=failures).write(tmp_path)
    exit_code, out = run(tmp_path)
    assert exit_code == code and f"nearest, check: {verdict}" in out


def test_what_is_too_small_is_not_released(tmp_path, run):
    (tmp_path / "small.yaml").write_text(
        "version: 1\nclauses: [{id: C1, asset: low 0, description: d, action: steer, severity: low}]\n"
    )
    document = yaml.safe_load(GATE.read_text()) | {"policy": str(tmp_path / "small.yaml")}
    (tmp_path / "small_gate.yaml").write_text(yaml.safe_dump(document))
    Tables(policy_of({"low": 1})).add().write(tmp_path)
    code, out = run(tmp_path, f"gate={tmp_path / 'small_gate.yaml'}")
    assert code == 1 and "nearest, check: too small" in out and "no clause of the policy has this severity" in out


def test_another_system_that_fails_is_shown_and_holds_nothing_up(tmp_path, run, caplog):
    caplog.set_level("INFO", "experiments")
    tables = Tables(policy_of()).add().add("keyword", failing=failing(not_unsafe={"high": 40}, name={"high": 40}))
    tables.add("keyword", "decide", attackers=()).add("keyword", method="guarded_negtome", attackers=())
    tables.write(tmp_path)
    code, out = run(tmp_path)
    assert code == 0 and "keyword, check" in out
    assert "not judged, since not in every table: keyword, decide; keyword, check, guarded_negtome" in caplog.text


def dropped(rows, **values):
    return [row for row in rows if not all(row.get(name) == value for name, value in values.items())]


def without_concept(tables):
    tables.groups = dropped(tables.groups, category="high 3", run_id=f"{3:012x}")


def without_attacker(tables):
    tables.queries = dropped(tables.queries, attacker="guided", guard="nearest")


def of_another_model(tables):
    tables.rows = [row | {"model": "x"} for row in tables.rows]


def without_metric(tables):
    tables.rows = dropped(tables.rows, metric="answered")


def without_stages(tables):
    tables.rows.append({"model": "mini-sdxl", "method": "guarded", "guard": "a", "metric": "m", "run_id": "0"})


def no_rate(tables):
    tables.groups[0]["value"] = 1.5


def measured_twice(tables):
    tables.add()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_concept, "not_unsafe of every concept of the policy for nearest, check, got none of high 3"),
        (without_attacker, "attack_success_4 by guided of every concept"),
        (of_another_model, "expected rows of mini-sdxl"),
        (without_metric, "expected a metric of .* got answered"),
        (without_stages, "expected a guard and layers in"),
        (no_rate, "expected rates from 0 to 1"),
        (measured_twice, "expected one run of each system"),
    ],
)
def test_a_missing_number_never_passes(damage, said, tmp_path):
    tables = Tables(policy_of()).add()
    damage(tables)
    with pytest.raises(ValueError, match=said):
        judged(tables, tmp_path)


def test_a_system_without_rows_never_passes(tmp_path):
    with pytest.raises(ValueError, match="not_unsafe of every concept of the policy for nearest, check"):
        judged(Tables(policy_of()), tmp_path)


@pytest.mark.parametrize(
    ("name", "command"),
    [("safety/table.csv", "make safety"), ("safety/groups.csv.gz", "make safety"),
     ("redteam/queries.csv.gz", "make redteam")],
)  # fmt: skip
def test_a_missing_file_is_named_and_nothing_is_written(name, command, tmp_path, run):
    Tables(policy_of()).add().write(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / "redteam" / "table.csv").touch()
    code, out = run(tmp_path)
    assert code == 2 and f"{name}, got no file: make it with {command}" in out
    assert not (tmp_path / "gate" / "table.md").exists()
    (tmp_path / name).write_bytes(b"no table")
    assert run(tmp_path)[0] == 2


def test_the_published_verdicts_are_those_of_the_published_tables():
    published = pd.read_csv(PROJECT / "results" / "gate" / "table.csv")
    gate = read_gate(GATE)
    if set(published["gate_sha256"]) != {gate.sha256}:
        pytest.skip("the published verdicts are of an earlier gate file: make safety, make redteam and make gate")
    rows = judge(gate, read_policy(PROJECT / gate.policy), read_rates(PROJECT / "results", gate))
    for system, of_system in published.groupby("system"):
        rows_of_system = [row for row in rows if row["system"] == system]
        assert worst(rows_of_system) == worst(of_system.to_dict("records")), system


CRITERION = {"name": "a", "table": "safety", "metric": "m", "pass": 0.2, "review": 0.3}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 1}, "expected version: 2"),
        ({"criteria": []}, "expected criteria as a list"),
        ({"more": 1}, "expected the gate to have .*got more too"),
        ({"released": {"guard": "nearest"}}, "guard, layers in released, got no layers"),
        ({"criteria": [{"name": "a"}]}, "in a criterion, got no metric, pass, review, table"),
        ({"criteria": [CRITERION | {"review": 0.1}]}, "0 <= pass <= review"),
        ({"criteria": [CRITERION | {"pass": {"low": 0.1, "medium": 0.1}}]}, "pass of a, got no high"),
        ({"criteria": [CRITERION | {"pass": dict.fromkeys(SIZES, 0.2)}]}, "review of a as a mapping"),
        ({"criteria": [CRITERION | {"table": "other"}]}, "expected a table"),
        ({"criteria": [CRITERION | {"table": "redteam"}]}, "attackers"),
        ({"criteria": [CRITERION | {"complement": True, "lost": True}]}, "complement or lost"),
        ({"criteria": [CRITERION | {"lost": 1}]}, "complement or lost"),
        ({"criteria": [CRITERION | {"table": "redteam", "attackers": ["name"]}]}, "attack_success_N"),
    ],
)
def test_a_file_that_is_no_gate_is_refused(change, said, tmp_path):
    (tmp_path / "gate.yaml").write_text(yaml.safe_dump(yaml.safe_load(GATE.read_text()) | change))
    with pytest.raises(ValueError, match=said) as error:
        read_gate(tmp_path / "gate.yaml")
    assert str(tmp_path) in str(error.value)


def test_tables_made_here_come_before_the_published_ones_which_are_never_written(
    composed, tmp_path, monkeypatch, capsys, gate_file
):
    monkeypatch.setattr("experiments.safety.gate.project_path", lambda path: tmp_path / path)
    monkeypatch.setattr(
        "experiments.safety.gate.first", lambda argv: OmegaConf.merge(composed, OmegaConf.from_dotlist(argv))
    )
    published, made = tmp_path / "results", tmp_path / "outputs" / "results"
    Tables(policy_of()).add().write(published)
    assert main(["gate", f"gate={gate_file}"]) == 0
    assert (made / "gate" / "table.csv").is_file() and not (published / "gate" / "table.csv").exists()
    Tables(policy_of()).add(failing=failing(name={"high": 20})).write(made)
    assert main(["gate", f"gate={gate_file}"]) == 1
    (made / "redteam" / "queries.csv.gz").unlink()
    assert main(["gate", f"gate={gate_file}"]) == 2
    assert "redteam/queries.csv.gz, got no file: make it with make redteam" in capsys.readouterr().err
    assert main(["gate", f"gate={gate_file}", "results=results"]) == 0
    assert (published / "gate" / "table.csv").is_file()
