"""The numbers of a report (report.json) as tables of texts: in percent, each with its interval, n and seeds. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from meml_lib.analysis import checklist, claims, show, stats
from meml_lib.analysis.measures import STAGES

TABLES = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))
"""Name -> title, note and whether it has seeds, in the report's order."""
BUDGETS = {"rollouts": "rollouts", "ground_truth_items": "ground-truth items", "update_tokens": "update tokens"}
SHARES = {"reward": "reward", "groups_all_wrong": "groups all wrong", "groups_all_right": "groups all right"}
SHARES |= {"questions_all_wrong": "questions all wrong", "unreadable": "unreadable", "truncated": "truncated"}
_MEANS = {"mean_expert": "mean expert", "best_validation": "best on validation", "vote": "majority vote"}
_OVERLAP = {"all_wrong": "wrong for all, %", "overlap_iou": "intersection / union, %", "mean_phi": "mean phi"}

Record = Mapping[str, Any]


def tables(data: Record) -> dict[str, pd.DataFrame]:
    """All tables of a report, `data` as `report.gather` found it: name (as in tables.yaml) -> frame."""
    rows = {
        "differences": [_pair_row(pair, data["panel"]) for pair in data["pairs"]],
        "signs": _sign_rows(data),
        "prompts": map(_prompt_row, data["prompts"]),
        "teachers": [row for group in data["teachers"] for row in _teacher_rows(group)],
        "shared": [row for group in data["teachers"] for row in _shared_rows(group)],
        "settings": data["settings"]["rows"],
        "paper": claims.readable(data["paper"]),
        "checklist": checklist.rows(data),
        "runs": run_rows(data["stages"]),
    }
    found = measured(data) | {name: _frame(of_table) for name, of_table in rows.items()}
    return {name: found[name] for name in TABLES}


def measured(data: Record) -> dict[str, pd.DataFrame]:
    """The tables of what arms, or one run, measured on test and in training."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    seeds = len(data["seeds"])
    for arm in data["arms"]:
        stages = {stage: scores_of(data, arm, stage) for stage in STAGES.values()}
        rows["arms"].append(_arm_row(arm, stages, seeds))
        rows["experts"] += _expert_rows(arm, stages, seeds)
        last = stages[STAGES[arm["last_stage"]]]
        passes = {key: cell(score, seeds) for key, score in last.items() if key.startswith("pass@")}
        rows["samples"] += [{"arm": arm["label"], **_counts(last), **passes}] if passes else []
        for stage, scores in stages.items():
            if scores and (stage == "stage 2" or arm["stage1"] == arm["arm"]):  # a shared stage 1 has a row of its own
                label = arm["label"] if stage == "stage 2" else stage1_label(arm["experts"])
                head = {"arm": label, "stage": stage, **_counts(scores)}
                rows["overlap"] += [head | found] if (found := _overlap_cells(scores, seeds)) else []
                rows["difficulty"].append(head | _difficulty_cells(scores, seeds))
    trained = [stage for stage in data["stages"] if stage["stage"] == "stage 2"]
    for _, group in groupby(trained, lambda stage: stage["name"]):
        own = list(group)
        done = [stage for stage in own if stage["training"]]
        head = {"arm": own[0]["label"], "seeds": len(done)}
        for name, row in (("training", _training_row), ("budgets", _budget_row)):
            rows[name].append(head | (row(done) if done else {"steps": own[0]["state"]}))
    names = ("arms", "experts", "samples", "overlap", "difficulty", "training", "budgets")
    return {name: _frame(rows[name]) for name in names}


def scores_of(data: Record, arm: Record, stage: str) -> dict[str, Record]:
    """Measure -> score of an arm after a stage; a stage 1 that is shared stands under the arm that speaks for it."""
    owner = arm["stage1"] if stage == "stage 1" else arm["arm"]
    return {score["measure"]: score for score in data["scores"] if (score["arm"], score["stage"]) == (owner, stage)}


def stage1_label(panel: Iterable[str]) -> str:
    return f"Stage 1: {', '.join(panel)}"


def cell(score: Record | None, seeds: int, **text: Any) -> str:
    """mean [low, high]; with its seeds where not all `seeds` have run."""
    shown = stats.text(score, **text)
    if score and len(score["per_seed"]) < seeds:
        shown += f" ({len(score['per_seed'])}\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}{seeds} seeds)"
    return shown


def commit(made: Record, digits: int = 10) -> str:
    return (made["commit"] or "unknown")[:digits] + (" + uncommitted changes" if made["dirty"] else "")


def uncommitted(data: Record) -> str:
    """What code that no commit holds has made, and where its changes stand; empty: nothing."""
    done = [stage for stage in data["stages"] if stage["state"] == "done"]
    dirty = [stage for stage in done if stage["dirty"]]
    made = [f"{len(dirty)} of {len(done)} training stages"] if dirty else []
    made += ["this report"] if data["commit"]["dirty"] else []
    if not made:
        return ""
    kept = {record["changes"] for record in (*dirty, data["commit"]) if record["dirty"]}
    files = ", ".join(f"`{file}`" for file in sorted(kept - {None})) + " (some were not kept)" * (None in kept)
    return (
        f"**Uncommitted changes: no commit makes these numbers again.** The code of {' and of '.join(made)} differed"
        f" from its commit. The changes, in the study's folder, for `git apply`: {files}. The table of runs says which"
        " run is meant."
    )


def _frame(rows: Iterable[Record]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), dtype=object)
    return frame.where(frame.notna(), "—")


# --- accuracies -------------------------------------------------------------------------------------------------------


def _counts(scores: Mapping[str, Record]) -> dict[str, Any]:
    if not scores:
        return {"n": "not run", "seeds": 0}
    return {"n": scores["mean_expert"]["n_questions"], "seeds": scores["mean_expert"]["n_seeds"]}


def _arm_row(arm: Record, stages: Mapping[str, Mapping[str, Record]], seeds: int) -> dict[str, Any]:
    last = STAGES[arm["last_stage"]]
    places = ", ".join(name.removeprefix("table-") for name in arm["tables"]) or "—"
    row = {"arm": arm["label"], "paper": places, **_counts(stages[last] or stages["stage 1"])}
    for stage, scores in stages.items():
        there = "—" if stage > last else "not run"
        row[f"mean expert, {stage}"] = cell(scores["mean_expert"], seeds) if scores else there
    row["validation, best expert"] = "—" if arm["validation"] is None else f"{100 * arm['validation']:.1f}"
    after = {"best_validation": "best on validation", "vote": "majority vote"}
    after |= {"any_expert": "any expert", "unreadable": "unreadable"}
    return row | {name: cell(stages[last].get(measure), seeds) for measure, name in after.items()}


def _expert_rows(arm: Record, stages: Mapping[str, Mapping[str, Record]], seeds: int) -> Iterator[dict[str, Any]]:
    shown = stages[STAGES[arm["last_stage"]]] or stages["stage 1"]
    for expert in arm["experts"] if shown else ():
        cells = {stage: cell(scores.get(f"expert/{expert}"), seeds) for stage, scores in stages.items()}
        yield {"arm": arm["label"], "expert": expert, **_counts(shown), **cells}


def _overlap_cells(scores: Mapping[str, Record], seeds: int) -> dict[str, str]:
    found = {}
    for measure, score in scores.items():
        name, _, expert = measure.partition("/")
        if name == "corrected":
            found[f"errors of {expert} that another answers rightly, %"] = cell(score, seeds)
        elif name in _OVERLAP:
            found[_OVERLAP[name]] = cell(score, seeds, **({"scale": 1, "digits": 2} if name == "mean_phi" else {}))
    return found


def _difficulty_cells(scores: Mapping[str, Record], seeds: int) -> dict[str, str]:
    levels = {name.replace("/", " "): score for name, score in scores.items() if name.startswith("difficulty/")}
    counts = ", ".join(f"{score['whole']:g}" for score in levels.values())
    return {"n": counts} | {level: cell(score, seeds) for level, score in levels.items()}


def _pair_row(pair: Record, panel: Sequence[str]) -> dict[str, Any]:
    place = pair["measure"].removeprefix("expert-")
    measure = _MEANS.get(pair["measure"]) or f"expert {place} ({panel[int(place)]})"
    head = {"table": pair["table"], "arm": pair["arm"], "against": pair["against"], "accuracy of": measure}
    if pair["mean"] is None:
        return {**head, "difference (points)": "not run"}
    reading = "no difference shown" if pair["p_holm"] >= 0.05 else "higher" if pair["mean"] > 0 else "lower"
    reading = reading if pair["n_seeds"] > 1 else "one seed: no reading"
    counts = {"n": pair["n_questions"], "seeds": pair["n_seeds"]}
    seen = {"smallest detectable": f"{100 * pair['detectable']:.1f}", "p": _p(pair["p"]), "p, Holm": _p(pair["p_holm"])}
    return {**head, "difference (points)": stats.text(pair), **counts, **seen, "reading": reading}


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<\N{NO-BREAK SPACE}0.001"


# --- training ---------------------------------------------------------------------------------------------------------


def _mean_of(stages: Sequence[Record], key: str) -> float | None:
    values = [stage["training"][key] for stage in stages]
    return None if None in values else sum(values) / len(values)


def _training_row(done: Sequence[Record]) -> dict[str, Any]:
    """An arm's means over the seeds that are done."""
    row = {"steps": f"{_mean_of(done, 'steps'):g}"}
    for key, name in SHARES.items():
        row[f"{name}, %"] = " → ".join(f"{100 * _mean_of(done, f'{key}_{end}'):.0f}" for end in ("start", "end"))
    losses = [stage["training"]["steps_with_gradient"] for stage in done]
    gradients = {loss: sum(of_seed[loss] for of_seed in losses) / len(done) for loss in losses[0]}
    row["steps with a gradient"] = ", ".join(f"{loss} {steps:.0f}" for loss, steps in gradients.items())
    return row | {"buffer flushes": f"{_mean_of(done, 'buffer_flushes'):.1f}"}


def _budget_row(done: Sequence[Record]) -> dict[str, Any]:
    spent = {name: _mean_of(done, key) for key, name in {"steps": "steps", **BUDGETS}.items()}
    numbers = {name: None if mean is None else f"{mean:,.0f}" for name, mean in spent.items()}
    limits = done[0]["training"].get("stop_at", {})
    short = [str(s["seed"]) for s in done if limits and all(s["training"][key] < most for key, most in limits.items())]
    asked = ", ".join(f"{most:,} {BUDGETS[key]}" for key, most in limits.items())
    asked += f"; not reached with seed {', '.join(short)}" if short else ""
    return {**numbers, "to stop at": asked or "—"}


def _sign_rows(data: Record) -> Iterator[dict[str, Any]]:
    """One row an arm and sign, all seeds in it."""
    found: dict[tuple[str, str], list[tuple[Record, Record]]] = defaultdict(list)
    for stage in data["stages"]:
        for sign in stage["signs"]:
            found[stage["name"], sign["name"]].append((stage, sign))
    example = data["example"] or {"arm": None, "seed": None}
    for (arm, name), of_seeds in found.items():
        stage, sign = of_seeds[0]
        seen = "; ".join(f"seed {s['seed']}, step {at['step'] + 1}: {at['seen']}" for s, at in of_seeds)
        drawn = (arm, stage["seed"]) == (example["arm"], example["seed"])
        figure = f"figures/curves-{arm}" if drawn else f"jobs/03_riel-{arm}-seed-{stage['seed']}"
        head = {"arm": stage["label"], "sign": name, "seen": seen, "what to try": sign["advice"]}
        yield {**head, "figure": f"{figure}, panel {sign['look']}"}


# --- teachers, runs ---------------------------------------------------------------------------------------------------


def _prompt_row(row: Record) -> dict[str, Any]:
    head = {"stage 1": ", ".join(row["experts"]), "seed": row["seed"], "prompt": row["prompt"]}
    head |= {"questions": row["split"], "n": row["n"]}
    likeliest = {"own teacher's answer likeliest, %": stats.text({**row, "mean": row["share"]})}
    nats = {f"nats a token, {teacher}'s answers": f"{mean:.3f}" for teacher, mean in row["nats_per_token"].items()}
    return {**head, **likeliest, "by chance, %": f"{100 * row['chance']:.1f}", **nats}


def _teacher_rows(group: Record) -> Iterator[dict[str, Any]]:
    for row, corrected in zip(group["accuracy"], group["corrected"], strict=True):
        head = {"panel": ", ".join(group["experts"]), "teacher": row["expert"], "n": row["n"]}
        right, rightly = (stats.text({**part, "mean": part["share"]}) for part in (row, corrected))
        errors = {"unreadable": row["unreadable"], "errors": corrected["errors"]}
        yield {**head, "right, %": right, **errors, "errors answered rightly by another, %": rightly}


def _shared_rows(group: Record) -> list[Record]:
    shown = show.percent(pd.DataFrame(group["shared"])).rename(columns={"experts": "teachers"})
    return shown.rename(columns=lambda name: name.replace("_", " ")).to_dict("records")


def run_rows(stages: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """One row a run and stage, its seeds together; what all seeds have in common stands once."""

    def of_seeds(among: Sequence[Record], value: Callable[[Record], str]) -> str:
        values = {stage["seed"]: value(stage) for stage in among}
        one = len(set(values.values())) == 1
        return next(iter(values.values())) if one else "; ".join(f"{seed}: {text}" for seed, text in values.items())

    for (name, stage), group in groupby(stages, lambda s: (s["name"], s["stage"])):
        own = list(group)
        done, folder = [s for s in own if s["state"] == "done"], Path(own[0]["folder"])
        yield {
            "run": name,
            "stage": stage,
            "seeds": ", ".join(str(s["seed"]) for s in own),
            "state": of_seeds(own, lambda s: s["state"] + (f": {s['message']}" if s["state"] == "failed" else "")),
            "wall time, s": ", ".join(f"{s['wall_s'] or 0:.0f}" for s in done) or "—",
            "commit": of_seeds(done, commit) if done else "—",
            "folder": f"{folder.parents[1]}/seed-*/{folder.name}",
        }
