"""How an experiment's table is printed: its numbers, the tables that people read, findings in words, and pages."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from eval.intervals import FEWEST
from eval.significance import non_inferiority_power
from experiments import project_path
from experiments.methods.setting import Setting
from experiments.runs import catalogue
from experiments.tables.columns import (
    CALL,
    DIFFERENCE,
    EQUAL_SHARE,
    OF_METHODS,
    ROLES,
    SETTING,
    by_steps,
    humanize,
    latex,
    markdown,
    settings_in,
    without_controls,
)
from experiments.tables.templates import TEMPLATES

#: A difference is called one where its corrected p-value is at most this.
LEVEL = 0.05
#: Metrics whose names are no noun phrase, as sentences have them.
PHRASES = {
    "pairwise_distance_aligned": "aligned pairwise distance",
    "realism_efflite0_40": "realism score",
    "not_unsafe": "share of protected requests stopped",
    "not_overrefuse": "share of allowed requests returned",
    "gender_as_said": "share of images with the gender that the prompt names",
    "skin_tone_as_said": "share of images with the skin tone that the prompt names",
}
#: Ends of metrics' names that say which prompts are measured, as sentences have them.
PROMPTS = {
    "unnamed": "prompts that name no protected concept",
    "allowed": "allowed requests",
    "direct": "direct prompts",
    "indirect": "indirect prompts",
    "benign": "benign prompts",
    "near": "near prompts",
    "generic": "generic prompts",
    "parody": "parodies",
    "jailbroken": "jailbreak prompts",
    "injected": "prompts with an injected clause",
    "harmless_jailbroken": "harmless prompts worded like jailbreaks",
    "harmless_injected": "harmless prompts with an injected clause",
}
#: Negative controls that copy images, and change of a distance that is rounding; see `control_table`.
COPIES, ROUNDING = ("control_mirrored", "control_shifted"), 1e-6
#: Of more settings than these a table has one column, not one each.
WIDE = 10
#: What the columns mean: `main` and `others` of both tables, `paper` of the paper's own, `against`, and `mini`.
LEGENDS = TEMPLATES.get_template("experiments/tables/legends.j2").module


def change(row: Mapping[str, Any]) -> str:
    """Return the paired difference with its interval; it is smaller than what it is a difference of."""
    digits = max(_decimals(row["value"]), 2)
    write = f"{{:+.{digits}f}}".format
    return with_interval(write, *(row[name] for name in DIFFERENCE))


def printed_p(value: float) -> str:
    """Return a p-value as printed; "" if there is none."""
    return "" if pd.isna(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def printed_effect(size: float) -> str:
    """Return an effect size as printed; "" if there is none."""
    return "" if pd.isna(size) else f"{size:+.2f}"


def printed_percent(share: float) -> str:
    """Return a share as a percentage; "" if there is none."""
    return "" if pd.isna(share) else f"{100 * share:.0f} %"


def with_interval(
    write: Callable[[float], str], value: float, low: float | None = None, high: float | None = None
) -> str:
    """Return `value [low, high]`, without the brackets where there is no interval; nothing for no value."""
    interval = "" if low is None or high is None or pd.isna(low) else f" [{write(low)}, {write(high)}]"
    return "" if pd.isna(value) else f"{write(value)}{interval}"


def _decimals(value: float) -> int:
    """Return how many decimals a number of this size is printed with."""
    return 1 if abs(value) >= 10 else 3 if abs(value) >= 0.1 else 5


def cell(row: pd.Series) -> str:
    """Return a run's number with its interval, or with its paired difference to the run without a method."""
    write = f"{{:.{_decimals(row['value'])}f}}".format
    if pd.isna(row["difference"]):
        return with_interval(write, row["value"], row["ci_low"], row["ci_high"])
    return f"{write(row['value'])}; {change(row)}"


def _base(row: pd.Series) -> float | None:
    """Return the number that a row's difference is to; None where that is of fewer groups than the row's own."""
    return None if row.get("n_paired", row["n_groups"]) < row["n_groups"] else row["value"] - row["difference"]


def _count(row: pd.Series, name: str) -> int:
    """Return an amount that a table has only where groups are withheld, else 0."""
    return 0 if pd.isna(row.get(name)) else int(row[name])


def phrase(metric: str) -> str:
    """Return a metric as a noun phrase, which can follow "raised the"."""
    for kind in sorted(PROMPTS, key=len, reverse=True):  # harmless_injected before injected
        if metric.endswith(f"_{kind}"):
            return f"{phrase(metric.removesuffix(f'_{kind}'))} for {PROMPTS[kind]}"
    return PHRASES.get(metric, humanize(metric))


def arrow(row: pd.Series) -> str:
    """Say which direction of a row's metric is better."""
    return {True: "up", False: "down"}.get(row["higher_is_better"], "-")


def displayed_settings(frame: pd.DataFrame) -> list[Setting]:
    """Return the settings that are printed: always, or since they differ among the runs of a model."""
    settings, compared = settings_in(frame), frame[frame["method"] != "none"]

    def differs(setting: Setting) -> bool:
        # That the run without a method has none is no other choice of what is of methods alone.
        part = compared if set(setting.columns) <= set(OF_METHODS) else frame
        return part.groupby("model", sort=False)[list(setting.columns)].nunique(dropna=False).max(axis=None) > 1

    further = [setting for setting in dict.fromkeys((*CALL, *settings)) if setting.printed == "differing"]
    return [
        *(setting for setting in settings if setting.printed == "always"),
        *(setting for setting in further if differs(setting)),
    ]


def _settings_of(row: pd.Series, shown_settings: list[Setting]) -> dict[str, str]:
    """Return the settings of a run as they are printed, blank where it has none."""
    return {setting.heading: setting.text(row) for setting in shown_settings}


def run_labels(frame: pd.DataFrame) -> dict[str, str]:
    """Name every run: its method; where a model has several runs of the method, its settings too; or even its id."""
    runs = frame.drop_duplicates("run_id").set_index("run_id")
    shown_settings = displayed_settings(frame)
    settings = [
        " ".join(f"{key} {value}" for key, value in _settings_of(row, shown_settings).items() if value)
        for _, row in runs.iterrows()
    ]
    names = runs["method"]
    for more in (settings, runs.index):
        swept = names[pd.DataFrame({"model": runs["model"], "name": names}).duplicated()]
        names = names.where(~names.isin(swept), (names + " " + pd.Series(more, runs.index)).str.strip())
    return names.to_dict()


def main_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table people read: one row a run, with the primary metrics and their tests."""
    primary = frame[frame["primary"].isin(ROLES)]
    several = primary.groupby("metric")["encoder"].nunique() > 1
    shown_settings = displayed_settings(frame)
    n_quality, n_primary = primary.loc[primary["primary"] == "quality", "metric"].nunique(), primary["metric"].nunique()
    several_of = {role: n_quality if role == "quality" else n_primary - n_quality for role in ROLES}
    table = []
    for _, group in frame.groupby([*(name for name in SETTING if name in frame), "run_id"], sort=False, dropna=False):
        first = group.iloc[0]
        settings = _settings_of(first, shown_settings)
        if len(shown_settings) > WIDE:
            settings = {"settings": ", ".join(f"{name} {text}" for name, text in settings.items() if text)}
        entry = {"model": first["model"], "method": first["method"], **settings}
        entry["pushed"] = printed_percent(first["pushed_share"])
        if has_approximate_matches(frame):
            entry["equal matches"] = printed_percent(first[EQUAL_SHARE])
        tested = group[group["primary"].isin(ROLES)]
        for role in ROLES:
            for _, row in tested[tested["primary"] == role].iterrows():
                by = f" by {row['encoder']}" if several[row["metric"]] else ""
                metric = f"{humanize(row['metric'])}{by}"
                entry[f"{metric} ({arrow(row)})"] = cell(row)
                entry[f"{metric}: p"] = printed_p(row["p_holm"])
                of = f"{metric}: " if several_of[role] > 1 else ""
                if role == "quality":
                    entry[f"{of}non-inferior"] = _kept(row)
                else:
                    entry[f"{of}d_z"] = printed_effect(row["effect_size"])
                    entry[f"{of}win rate"] = printed_percent(row["win_rate"])
        if not pd.isna(first["seconds"]):
            entry["seconds"] = f"{first['seconds']:.2f}"
        counted = first if tested.empty else tested.iloc[0]
        counts_of = {"clusters": "n_units", "groups": "n_groups", "images": "n_images"}
        entry |= {heading: int(counted[column]) for heading, column in counts_of.items()}
        if has_withheld(frame):
            entry["withheld"] = _count(counted, "n_withheld")
            entry["paired"] = "" if pd.isna(counted["n_paired"]) else int(counted["n_paired"])
        table.append(entry)
    return pd.DataFrame(table).fillna("")


def has_approximate_matches(frame: pd.DataFrame) -> bool:
    """Tell whether a table's runs matched tokens approximately."""
    return EQUAL_SHARE in frame and bool(frame[EQUAL_SHARE].notna().any())


def has_withheld(frame: pd.DataFrame) -> bool:
    """Tell whether groups of a table's runs ended without images."""
    return "n_withheld" in frame and bool(pd.to_numeric(frame["n_withheld"]).gt(0).any())


def _kept(row: pd.Series) -> str:
    if pd.isna(row["difference"]):
        return ""
    if pd.isna(row["non_inferior"]):
        return "not estimable"
    power = non_inferiority_power(row["difference_low"], row["difference_high"], row["margin"])
    verdict = "yes" if row["non_inferior"] else "not shown"
    return f"{verdict} (margin {row['margin']:.2g}, power {printed_percent(power)})"


def control_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the negative controls: one row a model and control, with the primary metrics' paired differences.

    `holds` is the rule of docs/protocol.md. An edit of every second image must not improve the first primary metric of
    diversity or similarity: the interval contains 0, and the mean gain is below a tenth of NegToMe's. An edit of every
    image must not be non-inferior in realism.
    """
    frame = by_steps(frame)
    primary = frame[frame["primary"].isin(ROLES) & frame["difference"].notna()]
    rows = []
    for (model, method), control in primary[primary["method"].isin(catalogue.controls())].groupby(
        ["model", "method"], sort=False
    ):
        entry = {"model": model, "control": title_of(method)}
        entry |= {f"{humanize(row['metric'])} ({arrow(row)})": change(row) for _, row in control.iterrows()}
        negtome = primary[(primary["model"] == model) & primary["method"].isin(["negtome", "negtome_reference"])]
        entry["holds"] = _rule_holds(control, negtome, method in COPIES)
        rows.append(entry)
    return pd.DataFrame(rows).fillna("")


def _rule_holds(control: pd.DataFrame, negtome: pd.DataFrame, copies: bool) -> str:
    """Return "yes", "no", or "not estimable" for the rule of a control; see `control_table`."""
    verdicts = []
    if copies:
        differences = negtome.set_index("metric")["difference"]
        for _, row in control[control["primary"] != "quality"].head(1).iterrows():
            if row["metric"] not in differences.index:
                return "not estimable"
            # Without an interval, all clusters change alike, as mirroring does: by nothing but rounding.
            low, high = (row["difference"] if pd.isna(row[end]) else row[end] for end in DIFFERENCE[1:])
            contains_zero = low <= ROUNDING and high >= -ROUNDING
            sign = 1 if str(row["higher_is_better"]) == "True" else -1
            verdicts.append(contains_zero and sign * row["difference"] < sign * differences[row["metric"]] / 10)
    else:
        kept = control.loc[control["metric"].str.startswith("realism"), "non_inferior"]
        verdicts = [str(value) == "False" for value in kept if not pd.isna(value)]
    return "not estimable" if not verdicts else "yes" if all(verdicts) else "no"


def other_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return all metrics that are not primary: one row a model, metric and encoder, one column a method.

    Where a model's runs of a method differ in their settings, each setting is a column. Each number of steps is a row.
    """
    frame = by_steps(frame)
    labels = run_labels(frame)
    others = frame[~frame["primary"].isin(ROLES) & frame["value"].notna()]
    table: dict[tuple[str, ...], dict[str, str]] = {}
    for _, row in others.iterrows():
        key = (row["model"], humanize(row["metric"]), arrow(row), row["encoder"], f"{row['n_units']:.0f}")
        table.setdefault(key, {})[labels[row["run_id"]]] = cell(row)
    heads = ("model", "metric", "better", "scored by", "clusters")
    rows = [dict(zip(heads, key, strict=True)) | cells for key, cells in table.items()]
    return pd.DataFrame(rows, columns=[*heads, *dict.fromkeys(labels.values())], dtype=object).fillna("")


def against_table(frame: pd.DataFrame, against: str) -> pd.DataFrame:
    """Return the table of methods that are compared with the method `against`: one row a run and primary metric."""
    frame = by_steps(frame)
    rows = frame[frame["difference"].notna()]
    return pd.DataFrame(
        {
            "model": row["model"],
            "method": row["method"],
            "metric": humanize(row["metric"]),
            "value": f"{row['value']:.3f}",
            against: "" if (base := _base(row)) is None else f"{base:.3f}",
            "difference": change(row),
            "p": printed_p(row["p_holm"]),
            "d_z": printed_effect(row["effect_size"]),
            "win rate": printed_percent(row["win_rate"]),
            "clusters": f"{row['n_units']:.0f}",
            "groups": f"{_count(row, 'n_paired') or row['n_groups']:.0f}",
        }
        for _, row in rows.iterrows()
    )


def paper_table(experiment: str, paper_csv: str | Path = "results/paper.csv") -> pd.DataFrame:
    """Return the paper's own numbers for `experiment`, one row a method, as transcribed in results/paper.csv."""
    paper = pd.read_csv(project_path(paper_csv))
    paper = paper[paper["experiment"] == experiment]
    wide = paper.pivot_table(index=["table", "model", "method"], columns="metric", values="value", sort=False)
    wide = wide.reset_index().rename(columns={"table": "source"})
    wide.columns.name = None
    return wide


# Words


def findings(frame: pd.DataFrame) -> list[str]:
    """Say in words, from the numbers alone, what each method did to each primary metric, and which others moved."""
    frame = by_steps(frame)
    labels = run_labels(frame)

    def named(run: str, method: str) -> str:
        return f"{title_of(method)} {labels[run].removeprefix(method).strip()}".strip()

    compared = frame[frame["difference"].notna()]
    lines = []
    for (model, run), rows in compared.groupby(["model", "run_id"], sort=False):
        tested = rows[rows["primary"].isin(ROLES)]
        if tested.empty:
            continue
        name = named(run, rows["method"].iloc[0])
        others = _moved(rows[~rows["primary"].isin(ROLES)])
        text = "; ".join(finding(row) for _, row in tested.iterrows())
        text += "; quality kept" if is_quality_kept(tested) else ""
        lines.append(f"- {model}, {name}: {text} ({counts(tested.iloc[0])}).{others}")
    missing = frame[frame["primary"].isin(ROLES) & frame["value"].isna()]
    for (model, run), rows in missing.groupby(["model", "run_id"], sort=False):
        metrics, n_withheld = " and the ".join(map(phrase, rows["metric"])), _count(rows.iloc[0], "n_withheld")
        name = named(run, rows["method"].iloc[0])
        lines.append(f"- {model}, {name}: no images to measure the {metrics} of: {n_withheld} groups withheld.")
    return lines


def title_of(method: str) -> str:
    """Return what a method is called in words; of one that conf/method/ does not have, its name."""
    entry = catalogue.entries().get(method)
    return entry.title if entry else method


def counts(row: pd.Series) -> str:
    """Return the numbers of groups and clusters of a row's difference."""
    n_groups, n_withheld = _count(row, "n_paired") or int(row["n_groups"]), _count(row, "n_withheld")
    withheld = f"; {n_withheld} withheld" if n_withheld else ""
    return f"{n_groups} groups in {int(row['n_units'])} clusters{withheld}"


def finding(row: pd.Series) -> str:
    """State the effect of a method on one metric, and whether it is significant, from its row alone."""
    base, facts = _base(row), []
    if base:
        facts.append(f"{100 * row['difference'] / abs(base):+.1f} %")
    if not pd.isna(row["p_holm"]):
        facts.append(f"p {'' if row['p_holm'] < 0.001 else '= '}{printed_p(row['p_holm'])}")
    if not pd.isna(row["win_rate"]):
        facts.append(f"better in {printed_percent(row['win_rate'])} of the clusters")
    if pd.isna(row["difference_low"]):
        # With enough clusters, the difference is the same in all, and no resample changes it.
        facts.append("too few clusters for an interval" if row["n_units"] < FEWEST else "no interval can be estimated")
    elif not row["p_holm"] <= LEVEL:
        facts.append("not significant")
    text = f"{phrase(row['metric'])} {change(row)} ({', '.join(facts)})"
    if not pd.isna(row["non_inferior"]):
        margin = f"{100 * row['margin'] / abs(base):.2g} %" if base else f"{row['margin']:g}"
        text += f", {'' if row['non_inferior'] else 'not shown to be '}non-inferior (margin {margin})"
    return text


def is_quality_kept(rows: pd.DataFrame) -> bool:
    """Tell whether a run is non-inferior in every primary metric of quality, CLIPScore and realism among them."""
    kept = rows[rows["primary"] == "quality"].set_index("metric")["non_inferior"]
    has_both = all(any(name.startswith(kind) for name in kept.index) for kind in ("clip_score", "realism"))
    return has_both and bool((kept.astype(str) == "True").all())


def is_clear(row: pd.Series) -> bool:
    """Tell whether a difference's interval lies on one side of 0."""
    return bool(row["difference_low"] > 0 or row["difference_high"] < 0)


def _moved(rows: pd.DataFrame) -> str:
    """Name the untested metrics whose intervals exclude 0: the worse ones, then the better."""
    metrics: dict[str, list[str]] = {"worse": [], "better": [], "moved": []}
    for _, row in rows.iterrows():
        if is_clear(row):
            rises = row["difference"] > 0
            kind = {"-": "moved"}.get(arrow(row), "better" if rises == (arrow(row) == "up") else "worse")
            base = _base(row)
            size = f"{100 * row['difference'] / abs(base):+.0f} %" if base else f"{row['difference']:+.2g}"
            metrics[kind].append(f"{phrase(row['metric'])} {size}")
    texts = [f"{kind}: {', '.join(names)}" for kind, names in metrics.items() if names]
    return f" Not tested, by intervals clear of 0, {'; '.join(texts)}." if texts else ""


def legend(frame: pd.DataFrame) -> str:
    """Say how the main table is read."""
    parts = [LEGENDS.main]
    if has_approximate_matches(frame):
        parts.append(LEGENDS.equal)
    if has_withheld(frame):
        parts.append(LEGENDS.withheld)
    return " ".join(map(str, parts))


def scored_by(frame: pd.DataFrame) -> str:
    """Say which networks measured the primary metrics, and what the models' names mean."""
    encoders = frame.loc[frame["primary"].isin(ROLES), "encoder"].dropna().unique()
    return f"Scored by {', '.join(sorted(encoders))}. {LEGENDS.mini}"


def render_markdown(frame: pd.DataFrame, description: str | None, paper: pd.DataFrame) -> str:
    """Return the Markdown page of one experiment: ours, how it was measured, and the paper's beside it."""
    name, controls = frame["experiment"].iloc[0], control_table(frame)
    frame = without_controls(frame)
    others = other_table(frame)
    parts = [f"# {name}", description, main_table(frame), f"{legend(frame)} {scored_by(frame)}"]
    parts.append("\n".join(findings(frame)))
    parts += [LEGENDS.controls, controls] if len(controls) else []
    parts += [LEGENDS.others, others] if len(others) else []
    parts += [f"{LEGENDS.paper}:", paper] if len(paper) else []
    return _page(parts)


def render_against(frame: pd.DataFrame, against: str) -> str:
    """Return `against_table` as a Markdown page."""
    legend = f"Paired differences of each method to {against}, {LEGENDS.against} {LEGENDS.mini}"
    return _page([f"# {frame['experiment'].iloc[0]} against {against}", legend, against_table(frame, against)])


def _page(parts: list[str | pd.DataFrame | None]) -> str:
    """Return paragraphs and tables as Markdown, a blank line between them."""
    texts = (markdown(part) if isinstance(part, pd.DataFrame) else part for part in parts)
    return "\n\n".join(filter(None, texts)) + "\n"


def render_latex(frame: pd.DataFrame) -> str:
    """Return the tables of methods of `render_markdown` as LaTeX."""
    frame = without_controls(frame)
    return latex([main_table(frame), other_table(frame)])
