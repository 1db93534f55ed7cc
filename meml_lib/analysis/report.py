"""A study's report: first the numbers (`gather`), then what people read (`write`): Markdown, one HTML file, figures.

Every number comes from the tables and metrics in the run folders, with its interval, the number of questions and the
seeds that it rests on. What has not run is listed as not run. In a notebook `compare` sets one run beside the paper.
"""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from meml_lib import config, runs
from meml_lib.analysis import checklist, claims, figures, latex, measures, overlap, signs, stats
from meml_lib.analysis.measures import STAGES, ArmResult
from meml_lib.runs import RunFolder

MOST_DRAWN = 7  # lines of one picture: as many as there are colours


# --- one run, in a notebook -------------------------------------------------------------------------------------------


def compare(p: config.Run, paper: str = "table-4", teachers: pd.DataFrame | None = None) -> pd.DataFrame:
    """paper | ours, interval, n, seeds | difference: the rows of a table of the paper that this run belongs to.

    Args: teachers: their answers; None: those that stage 1 was trained on, if it has run.
    Raises: ValueError for a table that paper.yaml does not have.
    """
    arm, folder = measures.of_run(p), RunFolder(p.folder("mef"))
    if teachers is None and folder.table("teacher_answers").is_file():
        teachers = folder.read_table("teacher_answers")
    rows = claims.rows(paper, [arm], [] if teachers is None else [_teachers(arm.panel, teachers)])
    return pd.DataFrame(claims.readable(row for row in rows if row["arm"]))


def run_tables(p: config.Run) -> dict[str, pd.DataFrame]:
    """One run's measures after each stage that is done, and how its stage 2 trained: as `tables` of a study."""
    arm, stage2 = measures.of_run(p), RunFolder(p.folder("riel"))
    facts = {"stage": STAGES["riel"], "name": arm.arm, "label": arm.label, "seed": p.seed, "state": "done"}
    facts |= {"training": _training(stage2.read_metrics()) if stage2.status["state"] == "done" else None}
    head = {"seeds": [p.seed], "arms": [_arm(arm, arm.arm, {})], "scores": arm.scores()}
    return _measured_tables(_plain({**head, "stages": [facts]}))


def run_picture(p: config.Run) -> figures.Picture:
    """Accuracy of each expert of one run, before and after stage 2."""
    arm = measures.of_run(p)
    scores = _each_expert({"arms": [_arm(arm, arm.arm, {})], "scores": arm.scores()})
    note = f"n = {scores['n_questions'].max():g} test questions, one seed; 95 % intervals (questions random)"
    return figures.before_after(scores, order=list(p.experts.known), note=note)


# --- the numbers of a study -------------------------------------------------------------------------------------------


def gather(study: config.Study) -> dict[str, Any]:
    """All numbers of a study's report, as plain JSON values: report.json.

    Arms stand in the order of the paper's tables that they belong to; what shares stage 1 has its scores once.
    """
    found = [measures.of_arm(study, name) for name in study.arms]
    results = sorted(found, key=lambda result: max(claims.tables_of(result), default="table-9"))
    order = [result.arm for result in results]
    speaks = {arm: max(arms, key=lambda a: study.arms[a].last_stage == "mef") for arms in study.stage1_groups().values() for arm in arms}
    fullest, base, here = _fullest(results), study.base_run(), runs.provenance()
    teachers = [_teachers(panel, folder.read_table("teacher_answers")) for panel, folder in _answered(study)]
    data = {
        "title": study.title,
        "notes": study.notes,
        "params_file": study.params_file,
        "run_file": study.run_params_file,
        "command": command(study),
        "commit": {key: here[key] for key in ("commit", "dirty")},
        "seeds": study.seeds,
        "values": base.values(),
        "panel": base.experts.panel,
        "arms": [_arm(result, speaks[result.arm], study.arms[result.arm].overrides) for result in results],
        "scores": [
            score
            for result in results
            for score in result.scores()
            if score["stage"] == STAGES["riel"] or speaks[result.arm] == result.arm
        ],
        "pairs": _pairs(study, {result.arm: result for result in results}),
        "teachers": teachers,
        "prompts": _prompts(study),
        "example": _example(results, study),
        "paper": [row for table in claims.values()["tables"] for row in claims.rows(table, results, teachers)],
        "settings": {"arm": fullest.label, "rows": claims.settings(fullest.run)},
        "stages": [_stage(study, *place) for place in _stages(study, order)],
    }
    machines: list[dict[str, Any]] = []
    for stage in data["stages"]:
        machine = {key: stage.pop(key) for key in ("python", "packages", "hardware")}
        if stage["state"] == "done" and machine not in machines:
            machines.append(machine)
        stage["machine"] = machines.index(machine) if machine in machines else None
    return _plain(data | {"machines": machines})


def _arm(result: ArmResult, stage1: str, differs: Mapping[str, Any]) -> dict[str, Any]:
    """stage1: the arm under which the scores of its stage 1 stand."""
    head = {"arm": result.arm, "label": result.label, "experts": result.panel, "stage1": stage1}
    head |= {"last_stage": "mef" if result.last == STAGES["mef"] else "riel"}
    return {**head, "kind": claims.kind(result), "tables": claims.tables_of(result), "differs": differs}


def _pairs(study: config.Study, results: Mapping[str, ArmResult]) -> Iterator[dict[str, Any]]:
    """The differences that the study names. Holm's correction is over the comparisons of one table that have run."""
    for table, comparisons in groupby(study.comparisons, lambda comparison: comparison.table):
        found = [(c, measures.paired(results[c.arm], results[c.against], c.measure)) for c in comparisons]
        corrected = stats.holm([difference and difference.p for _, difference in found])
        for (c, difference), p_holm in zip(found, corrected, strict=True):
            head = {"table": table, "arm": results[c.arm].label, "against": results[c.against].label}
            numbers = asdict(difference) if difference else {"mean": None}
            yield {**head, "measure": c.measure, **numbers, "p_holm": p_holm}


def command(study: config.Study) -> str:
    """The command line that makes this study."""
    given = study.overrides_of(None, study.seeds[0])
    extra = {k: v for k, v in given.items() if k != "seed" and (k not in study.overrides or study.overrides[k] != v)}
    words = [f"--set '{key}={json.dumps(value)}'" for key, value in {"seeds": list(study.seeds), **extra}.items()]
    return " ".join(["meml run", study.params_file, *words])


def _stages(study: config.Study, arms: Sequence[str]) -> Iterator[tuple[str, str, int, config.Stage]]:
    """(name, arm that speaks for it, seed, stage): stage 1 once for the arms that share it."""
    for group, members in study.stage1_groups().items():
        yield from ((group, members[0], seed, "mef") for seed in study.seeds)
    for arm in arms:
        if study.arms[arm].last_stage == "riel":
            yield from ((arm, arm, seed, "riel") for seed in study.seeds)


def _stage(study: config.Study, name: str, arm: str, seed: int, stage: config.Stage) -> dict[str, Any]:
    """One stage: its state ("not run" without a folder), what it was made with, how stage 2's training went."""
    run = study.run(arm, seed)
    folder = RunFolder(run.folder(stage))
    state, message = folder.status["state"], folder.status["message"]
    done, path = state == "done", folder.path.relative_to(study.folder)
    manifest = folder.read_json("manifest") if done else {}
    keys = ("commit", "dirty", "python", "packages", "hardware", "wall_s", "peak_memory_mib", "inputs")
    made = {key: manifest.get(key) for key in keys} | {"model_kept": any(folder.path.glob("model/*.safetensors"))}
    label = study.arms[arm].label if stage == "riel" else _stage1_label(run.experts.panel)
    head = {"name": name, "label": label, "seed": seed, "stage": STAGES[stage], "folder": str(path)}
    facts = {"state": "not run" if state == "absent" else state, "message": message, "training": None, "signs": []}
    if done and stage == "riel":
        facts["training"] = _training(folder.read_metrics())
        facts["signs"] = [asdict(sign) for sign in signs.replay(folder.metrics_from(0)[0], run.riel)]
    return {**head, **facts, **made}


def _stage1_label(panel: Iterable[str]) -> str:
    return f"Stage 1: {', '.join(panel)}"


BUDGET = ("rollouts", "ground_truth_items", "update_tokens")


def _training(metrics: pd.DataFrame) -> dict[str, Any]:
    """Shares in the first and last tenth of the steps, steps in which each loss had rows to train on, what was spent."""
    tenth = max(1, len(metrics) // 10)
    ends = {"start": metrics.head(tenth), "end": metrics.tail(tenth)}
    shares = ("reward", "groups_all_wrong", "groups_all_right", "questions_all_wrong", "truncated", "unreadable")
    rows = [column for column in metrics if column.startswith("rows/")]
    return {
        "steps": len(metrics),
        **{f"{name}_{end}": part[name].mean() for name in shares for end, part in ends.items()},
        "steps_with_gradient": {column.removeprefix("rows/"): (metrics[column] > 0).sum() for column in rows},
        "buffer_flushes": metrics["buffer_flushes"].max(),
        **{name: metrics[name].iloc[-1] if name in metrics else None for name in BUDGET},
    }


def _stage1_folders(study: config.Study, table: str) -> Iterator[tuple[list[str], int, RunFolder]]:
    """(panel, seed, folder) of each finished stage 1 that has a table."""
    for members in study.stage1_groups().values():
        for seed in study.seeds:
            run = study.run(members[0], seed)
            if (folder := RunFolder(run.folder("mef"))).table(table).is_file():
                yield list(run.experts.panel), seed, folder


def _answered(study: config.Study) -> list[tuple[list[str], RunFolder]]:
    """Each panel, and the folder of its first seed that has the teachers' answers; they are the same for every seed."""
    found = {}
    for panel, _, folder in _stage1_folders(study, "teacher_answers"):
        found.setdefault(folder.path.parents[1].name, (panel, folder))
    return list(found.values())


def _teachers(panel: Sequence[str], answers: pd.DataFrame) -> dict[str, Any]:
    """How far the teachers' errors overlap, on the questions that all of them answered."""
    common = overlap.answered_by_all(answers)
    left_out = answers["question_id"].nunique() - common["question_id"].nunique()
    tables = {"accuracy": overlap.accuracy(common), "corrected": overlap.corrected_by_others(common)}
    rows = {name: frame.to_dict("records") for name, frame in tables.items()}
    return {"experts": list(panel), "left_out": left_out, **overlap.overlap_all(common)._asdict(), **rows}


def _prompts(study: config.Study) -> Iterator[dict[str, Any]]:
    """How often each prompt makes its own teacher's answer the likeliest, after stage 1."""
    for panel, seed, folder in _stage1_folders(study, "prompt_teacher"):
        if len(panel) > 1:
            table = folder.read_table("prompt_teacher")
            nats = overlap.nats_per_token(table).groupby(level="prompt").mean().to_dict("index")
            for row in overlap.own_teacher_likeliest(table).to_dict("records"):
                yield {"experts": panel, "seed": seed, "nats_per_token": nats[row["prompt"]], **row}


def _fullest(results: Sequence[ArmResult]) -> ArmResult:
    """Most experts, then most losses: it stands for all where one arm is shown."""
    losses = {r.arm: sum(loss is not None for _, loss in r.run.riel.objective) for r in results}
    return max(results, key=lambda r: (r.last, len(r.panel), losses[r.arm]))


def _example(results: Sequence[ArmResult], study: config.Study) -> dict[str, Any] | None:
    """Every expert's answers to the first test question on which stage 1's experts disagree, by the fullest finished arm."""
    finished = [result for result in results if set(STAGES.values()) <= result.seeds.keys()]
    if not finished:
        return None
    shown = _fullest(finished)
    seed = shown.seeds["stage 2"][0]
    folders = {name: RunFolder(study.run(shown.arm, seed).folder(stage)) for stage, name in STAGES.items()}
    right = overlap.right_table(folders["stage 1"].read_table("test_greedy"))
    chosen = right.index[int(right.nunique(axis=1).gt(1).to_numpy().argmax())]
    answers = []
    for name, folder in folders.items():
        table = folder.read_table("test_greedy").query("question_id == @chosen")
        answers += table.assign(stage=name)[["expert", "stage", "text", "answer", "correct"]].to_dict("records")
    question = folders["stage 2"].read_table("test_questions").set_index("question_id").loc[chosen, ["text", "gold"]]
    head = {"arm": shown.arm, "label": shown.label, "seed": seed, "question_id": chosen}
    return {**head, **question.to_dict(), "answers": answers}


def _plain(value: Any) -> Any:
    """JSON values: numpy's numbers as Python's, NaN and NA as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, Iterator)):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if value is pd.NA or isinstance(value, float) and math.isnan(value) else value


# --- tables for people ------------------------------------------------------------------------------------------------

# name -> title, and what a reader has to know; the order is that of the report
TITLES = {
    "arms": "Accuracy of the arms",
    "differences": "Differences decided beforehand",
    "experts": "Each expert, before and after stage 2",
    "samples": "Several samples: one of k right",
    "training": "Training",
    "budgets": "What each arm spent",
    "signs": "Signs of trouble",
    "prompts": "Prompts and teachers after stage 1",
    "overlap": "Error overlap of the experts",
    "teachers": "The teachers",
    "difficulty": "By difficulty",
    "settings": "Where this differs from the paper",
    "paper": "Beside the paper",
    "checklist": "Reproducibility checklists",
    "runs": "Runs",
}
_AFTER = {"best_validation": "best on validation", "vote": "majority vote", "any_expert": "any expert"}
_AFTER |= {"unreadable": "unreadable"}
_OVERLAP = {"all_wrong": "wrong for all, %", "overlap_iou": "intersection / union, %", "mean_phi": "mean phi"}
_READ = {"mean_expert": "mean expert", "best_validation": "best on validation", "vote": "majority vote"}
_SHARES = {"reward": "reward", "groups_all_wrong": "groups all wrong", "groups_all_right": "groups all right"}
_SHARES |= {"questions_all_wrong": "questions all wrong", "unreadable": "unreadable", "truncated": "truncated"}


def tables(data: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The report's tables as they are read, in percent with 95 % intervals: name -> frame of texts."""
    rows = {
        "differences": [_pair_row(pair, data["panel"]) for pair in data["pairs"]],
        "signs": _sign_rows(data),
        "prompts": map(_prompt_row, data["prompts"]),
        "teachers": [row for group in data["teachers"] for row in _teacher_rows(group)],
        "settings": data["settings"]["rows"],
        "paper": claims.readable(data["paper"]),
        "checklist": checklist.rows(data),
        "runs": _run_rows(data["stages"]),
    }
    found = _measured_tables(data) | {name: _frame(of_table) for name, of_table in rows.items()}
    return {name: found[name] for name in TITLES}


def _frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), dtype=object)
    return frame.where(frame.notna(), "—")


def _scores_of(data: Mapping[str, Any], arm: Mapping[str, Any], stage: str) -> dict[str, Mapping[str, Any]]:
    """Measure -> score of an arm after a stage; a stage 1 that is shared stands under the arm that speaks for it."""
    owner = arm["stage1"] if stage == "stage 1" else arm["arm"]
    return {score["measure"]: score for score in data["scores"] if (score["arm"], score["stage"]) == (owner, stage)}


def _measured_tables(data: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The tables of what was measured on test and in training: of a study, or of one run."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("arms", "experts", "samples", "overlap", "difficulty")}
    seeds = len(data["seeds"])
    for arm in data["arms"]:
        stages = {stage: _scores_of(data, arm, stage) for stage in ("stage 1", "stage 2")}
        head, last = {"arm": arm["label"]}, stages[STAGES[arm["last_stage"]]]
        means = [scores["mean_expert"] for scores in stages.values() if scores]
        counts = {"n": means[-1]["n_questions"], "seeds": means[-1]["n_seeds"]} if means else {"n": "not run", "seeds": 0}
        row = head | {"paper": ", ".join(name.removeprefix("table-") for name in arm["tables"]) or "—"} | counts
        for stage, scores in stages.items():
            there = "—" if stage > STAGES[arm["last_stage"]] else "not run"
            row[f"mean expert, {stage}"] = _cell(scores["mean_expert"], seeds) if scores else there
        found["arms"].append(row | {name: _cell(last.get(key), seeds) for key, name in _AFTER.items()})
        for expert in arm["experts"]:
            each = {stage: scores.get(f"expert/{expert}") for stage, scores in stages.items()}
            cells = {stage: _cell(score, seeds) for stage, score in each.items()}
            found["experts"] += [{**head, "expert": expert, **counts, **cells}] if means else []
        passes = {key: _cell(score, seeds) for key, score in last.items() if key.startswith("pass@")}
        found["samples"] += [{**head, **counts, **passes}] if passes else []
        for stage, scores in stages.items():  # a shared stage 1 has a row of its own
            if not scores or stage == "stage 1" and arm["stage1"] != arm["arm"]:
                continue
            name = arm["label"] if stage == "stage 2" else _stage1_label(arm["experts"])
            mean = scores["mean_expert"]
            head_ = {"arm": name, "stage": stage, "n": mean["n_questions"], "seeds": mean["n_seeds"]}
            shared = {_OVERLAP[key]: _cell(scores.get(key), seeds, key) for key in _OVERLAP if key in scores}
            for key, score in scores.items():
                if key.startswith("corrected/"):
                    shared[f"errors of {key.removeprefix('corrected/')} that another answers rightly, %"] = _cell(score, seeds)
            found["overlap"] += [head_ | shared] if shared else []
            levels = {k.removeprefix("difficulty/"): s for k, s in scores.items() if k.startswith("difficulty/")}
            ns = ", ".join(f"{score['whole']:g}" for score in levels.values())
            cells = {f"difficulty {level}": _cell(score, seeds) for level, score in levels.items()}
            found["difficulty"].append(head_ | {"n": ns} | cells)
    trained = [stage for stage in data["stages"] if stage["stage"] == "stage 2"]
    by_arm = [(label, list(own)) for label, own in groupby(trained, lambda stage: stage["label"])]
    found["training"] = [_training_row(label, own) for label, own in by_arm]
    found["budgets"] = [_budget_row(label, own) for label, own in by_arm]
    return {name: _frame(rows) for name, rows in found.items()}


def _cell(score: Mapping[str, Any] | None, seeds: int, measure: str = "") -> str:
    """mean [low, high]; with its seeds where some have not run."""
    cell = stats.text(score, scale=1, digits=2) if measure == "mean_phi" else stats.text(score)
    if score and len(score["per_seed"]) < seeds:
        cell += f" ({len(score['per_seed'])}\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}{seeds} seeds)"
    return cell


def _pair_row(pair: Mapping[str, Any], panel: Sequence[str]) -> dict[str, Any]:
    name, _, place = pair["measure"].partition("expert-")
    measure = _READ.get(pair["measure"]) or f"expert {place} ({panel[int(place)]})"
    head = {"table": pair["table"], "arm": pair["arm"], "against": pair["against"], "accuracy of": measure}
    if pair["mean"] is None:
        return {**head, "difference (points)": "not run"}
    reading = "no difference shown" if pair["p_holm"] >= 0.05 else "higher" if pair["mean"] > 0 else "lower"
    counts = {"n": pair["n_questions"], "seeds": pair["n_seeds"]}
    seen = {"smallest detectable": f"{100 * pair['detectable']:.1f}", "p": _p(pair["p"]), "p, Holm": _p(pair["p_holm"])}
    return {**head, "difference (points)": stats.text(pair), **counts, **seen, "reading": reading}


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<\N{NO-BREAK SPACE}0.001"


def _mean_of(stages: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [stage["training"][key] for stage in stages]
    return None if None in values else sum(values) / len(values)


def _training_row(label: str, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds that are done."""
    done = [stage for stage in stages if stage["training"]]
    if not done:
        return {"arm": label, "seeds": 0, "steps": stages[0]["state"]}
    row = {"arm": label, "seeds": len(done), "steps": f"{_mean_of(done, 'steps'):g}"}
    for key, name in _SHARES.items():
        row[f"{name}, %"] = " → ".join(f"{100 * _mean_of(done, f'{key}_{end}'):.0f}" for end in ("start", "end"))
    losses = [stage["training"]["steps_with_gradient"] for stage in done]
    gradients = {loss: sum(of_seed[loss] for of_seed in losses) / len(done) for loss in losses[0]}
    row["steps with a gradient"] = ", ".join(f"{loss} {steps:.0f}" for loss, steps in gradients.items())
    return row | {"buffer flushes": f"{_mean_of(done, 'buffer_flushes'):.1f}"}


def _budget_row(label: str, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [stage for stage in stages if stage["training"]]
    if not done:
        return {"arm": label, "seeds": 0, "steps": stages[0]["state"]}
    spent = {key.replace("_", " ").replace("ground truth", "ground-truth"): _mean_of(done, key) for key in ("steps", *BUDGET)}
    return {"arm": label, "seeds": len(done)} | {k: None if v is None else f"{v:,.0f}" for k, v in spent.items()}


def _sign_rows(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row an arm and sign, all seeds in it."""
    found: dict[tuple[str, str], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for stage in data["stages"]:
        for sign in stage["signs"]:
            found.setdefault((stage["name"], sign["name"]), []).append((stage, sign))
    example = data["example"] or {"arm": None}
    for (arm, name), of_seeds in found.items():
        stage, sign = of_seeds[0]
        seen = "; ".join(f"seed {s['seed']}, step {at['step'] + 1}: {at['seen']}" for s, at in of_seeds)
        drawn_ = arm == example["arm"] and stage["seed"] == example["seed"]
        figure = f"figures/curves-{arm}" if drawn_ else f"jobs/03_riel-{arm}-seed-{stage['seed']}"
        head = {"arm": stage["label"], "sign": name, "seen": seen, "what to try": sign["advice"]}
        yield {**head, "figure": f"{figure}, panel {sign['look']}"}


def _prompt_row(row: Mapping[str, Any]) -> dict[str, Any]:
    head = {"stage 1": ", ".join(row["experts"]), "seed": row["seed"], "prompt": row["prompt"], "n": row["n"]}
    share = stats.text({**row, "mean": row["share"]})
    cells = {f"nats a token, {teacher}'s answers": f"{nats:.3f}" for teacher, nats in row["nats_per_token"].items()}
    return {**head, "own teacher's answer likeliest, %": share, "by chance, %": f"{100 * row['chance']:.1f}", **cells}


def _teacher_rows(group: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for row, corrected in zip(group["accuracy"], group["corrected"], strict=True):
        head = {"panel": ", ".join(group["experts"]), "teacher": row["expert"], "n": row["n"]}
        right, rightly = (stats.text({**part, "mean": part["share"]}) for part in (row, corrected))
        errors = {"unreadable": row["unreadable"], "errors": corrected["errors"]}
        yield {**head, "right, %": right, **errors, "errors answered rightly by another, %": rightly}


def _run_rows(stages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row a run and stage, its seeds in one cell each; what all seeds have in common stands once."""
    for (name, stage), group in groupby(stages, lambda s: (s["name"], s["stage"])):
        group = list(group)
        done = [s for s in group if s["state"] == "done"]

        def of_seeds(value: Callable[[Mapping[str, Any]], str], among: Sequence[Mapping[str, Any]]) -> str:
            values = {s["seed"]: value(s) for s in among}
            same = len(set(values.values())) == 1
            return next(iter(values.values())) if same else "; ".join(f"{seed}: {v}" for seed, v in values.items())

        yield {
            "run": name,
            "stage": stage,
            "seeds": ", ".join(str(s["seed"]) for s in group),
            "state": of_seeds(lambda s: s["state"] + (f": {s['message']}" if s["state"] == "failed" else ""), group),
            "wall time, s": ", ".join(f"{s['wall_s'] or 0:.0f}" for s in done),
            "commit": of_seeds(_commit, done) if done else "",
            "folder": f"{Path(group[0]['folder']).parents[1]}/seed-*/{Path(group[0]['folder']).name}",
        }


def _commit(made: Mapping[str, Any], digits: int = 10) -> str:
    return (made["commit"] or "unknown")[:digits] + (" + uncommitted changes" if made["dirty"] else "")


# --- pictures ---------------------------------------------------------------------------------------------------------


def pictures(study: config.Study, data: Mapping[str, Any]) -> dict[str, figures.Picture]:
    """The report's figures by name, of whatever has run; `data` as gathered."""
    return {name: picture for name, (_, picture) in _pictures(study, data).items()}


def _each_expert(data: Mapping[str, Any]) -> pd.DataFrame:
    """Accuracy under each expert's prompt, both stages, of the arms that have a stage 2 (else of all)."""
    arms = [arm for arm in data["arms"] if _scores_of(data, arm, "stage 2")] or data["arms"]
    rows = []
    for arm in arms:
        for stage in STAGES.values():
            for measure, score in _scores_of(data, arm, stage).items():
                if measure.startswith("expert/"):
                    rows.append({**score, "label": arm["label"], "expert": measure.removeprefix("expert/")})
    return pd.DataFrame(rows)


def drawn(data: Mapping[str, Any]) -> list[str]:
    """Labels of the arms that stand in pictures of lines: those of table 5 where all are too many to tell apart."""
    arms = [arm for arm in data["arms"] if arm["last_stage"] == "riel"]
    if len(arms) > MOST_DRAWN:
        arms = [arm for arm in arms if "table-5" in arm["tables"]] or arms
    return [arm["label"] for arm in arms[:MOST_DRAWN]]


def _pictures(study: config.Study, data: Mapping[str, Any]) -> dict[str, tuple[str, figures.Picture]]:
    """Name -> (caption, picture), of whatever has run."""
    if not data["scores"]:
        return {}
    experts, lines = list(study.base_run().experts.known), drawn(data)
    tested = ", ".join(f"{n:g}" for n in sorted({s["n_questions"] for s in data["scores"] if s["mean"] is not None}))
    chance = "seeds and questions" if len(data["seeds"]) > 1 else "questions"
    note = f"n = {tested} test questions; seeds {', '.join(map(str, data['seeds']))}; 95 % intervals ({chance} random)"
    some = f"; the {len(lines)} arms of table 5" if len(lines) < sum(a["last_stage"] == "riel" for a in data["arms"]) else ""
    after = [(arm, _scores_of(data, arm, STAGES[arm["last_stage"]])) for arm in data["arms"]]
    means = [{"label": a["label"], "kind": a["kind"], **own["mean_expert"]} for a, own in after if own]
    found: dict[str, tuple[str, figures.Picture]] = {}
    if means:
        picture = figures.arms(pd.DataFrame(means), note=f"{note}; small dots: seeds")
        found["arms"] = "Mean expert accuracy after each arm's last stage", picture
    found["before-after"] = "Before and after stage 2", figures.before_after(_each_expert(data), order=experts, note=note)
    samples = [
        {"label": arm["label"], "k": int(key.removeprefix("pass@")), **score}
        for arm, own in after
        for key, score in own.items()
        if arm["label"] in lines and key.startswith("pass@")
    ]
    if samples:
        picture = figures.pass_at_k(pd.DataFrame(samples), order=lines, note=f"{note}; mean of the experts{some}")
        found["pass-at-k"] = "pass@k", picture
    metrics: dict[str, list[pd.DataFrame]] = {}
    for stage in data["stages"]:
        if stage["stage"] == "stage 2" and stage["state"] == "done" and stage["label"] in lines:
            metrics.setdefault(stage["label"], []).append(RunFolder(study.folder / stage["folder"]).read_metrics())
    if metrics:
        found["rewards"] = f"Training reward and all-wrong groups{some}", figures.rewards(metrics, order=lines)
    answered = max(_answered(study), key=lambda found: len(found[0]), default=([], None))
    if len(answered[0]) > 1:
        answers = overlap.answered_by_all(answered[1].read_table("teacher_answers"))
        picture = figures.error_overlap(answers, title="Teachers, training questions")
        found["teachers-overlap"] = "Error overlap of the teachers", picture
    return found | _of_example(study, data, experts)


def _of_example(study: config.Study, data: Mapping[str, Any], experts: Sequence[str]) -> dict[str, tuple[str, figures.Picture]]:
    """How the fullest finished arm trained, and how its experts' errors hang together."""
    found: dict[str, tuple[str, figures.Picture]] = {}
    if not data["example"]:
        return found
    run, label = study.run(data["example"]["arm"], data["example"]["seed"]), data["example"]["label"]
    for stage, name in STAGES.items():
        folder, key = RunFolder(run.folder(stage)), name.replace(" ", "-")
        title = f"{label if stage == 'riel' else _stage1_label(run.experts.panel)}, seed {run.seed}"
        curves = f"curves-{data['example']['arm'] if stage == 'riel' else key}"
        found[curves] = title, figures.curves(folder.read_metrics(), order=experts, title=title)
        if len(run.experts.panel) > 1:
            answers, title = folder.read_table("test_greedy"), f"{label}, {name}, seed {run.seed}, test"
            found[f"overlap-{key}"] = f"Error overlap, {name}", figures.error_overlap(answers, title=title)
            found[f"phi-{key}"] = f"Phi, {name}", figures.phi(answers, title=f"Phi after {name}, seed {run.seed}")
    stage1 = RunFolder(run.folder("mef"))
    if len(run.experts.panel) > 1 and stage1.table("prompt_teacher").is_file():
        table, caption = stage1.read_table("prompt_teacher"), f"Prompts and teachers after stage 1, seed {run.seed}"
        found["prompt-teacher"] = caption, figures.prompt_teacher(table, order=experts)
    return found


# --- writing ----------------------------------------------------------------------------------------------------------


def write(study: config.Study) -> Path:
    """Write the study's report under its folder; the path of report.html.

    report.json; tables/: one CSV and one LaTeX file a table, and tables.tex; figures/: PDF, PNG and CSV; report.md, and
    report.html, which holds its figures and needs neither network nor JavaScript.
    """
    folder = study.folder / "report"
    data = gather(study)
    frames = tables(data)
    for part in ("tables", "figures"):  # what an earlier report left must not stand beside this one's
        shutil.rmtree(folder / part, ignore_errors=True)
    RunFolder(folder).write_json("report", data)
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for name, frame in {**frames, "scores": pd.json_normalize(data["scores"])}.items():
        frame.to_csv(folder / "tables" / f"{name}.csv", index=False, float_format="%.6g")
    papers = _paper_tables(frames["paper"])
    latex.write(folder / "tables", _sheets(data, frames, papers), data["title"])
    shown = {}
    for name, (caption, picture) in _pictures(study, data).items():
        file = figures.save(picture, folder / "figures" / re.sub(r"[^\w.+-]", "-", name))
        shown[name] = f"![{re.sub(r'[][]', '', caption)}]({file.relative_to(folder)})"
    done = [stage for stage in data["stages"] if stage["state"] == "done"]
    verdicts = [row["verdict"].split(" (")[0] for row in claims.readable(data["paper"]) if row["sure"] != "—"]
    text = _template("report.md.j2").render(
        data=data,
        tables={name: _markdown_table(frame) for name, frame in frames.items()},
        titles=TITLES,
        papers=[(title, _markdown_table(frame)) for title, frame in papers.values()],
        verdict=claims.values()["verdict"],
        verdicts={verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)},
        pictures=shown,
        drawn=drawn(data),
        missing=[row for row in _run_rows(data["stages"]) if row["state"] != "done"],
        trained=sorted({_commit(stage, 40) for stage in done}),
        written=_commit(data["commit"], 40),
    )
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(_page(data["title"], text, folder), encoding="utf-8")
    return folder / "report.html"


def _paper_tables(paper: pd.DataFrame) -> dict[str, tuple[str, pd.DataFrame]]:
    """Table of the paper -> (its title, its rows)."""
    titles = {name: table["title"] for name, table in claims.values()["tables"].items()}
    return {name: (title, paper[paper["table"] == name].drop(columns="table")) for name, title in titles.items()}


def _sheets(
    data: Mapping[str, Any], frames: Mapping[str, pd.DataFrame], papers: Mapping[str, tuple[str, pd.DataFrame]]
) -> dict[str, latex.Sheet]:
    """The tables for LaTeX: title and note; the paper's one by one."""
    note = f"Percent on test questions; brackets: 95 % intervals. Seeds {', '.join(map(str, data['seeds']))}."
    made = f"Made by {data['command']}, commit {_commit(data['commit'])}."
    found = {name: latex.Sheet(frame, TITLES[name], f"{note} {made}") for name, frame in frames.items() if name != "paper"}
    rule = claims.values()["verdict"]["rule"]
    return found | {f"paper-{name}": latex.Sheet(frame, title, f"{note} {rule} {made}") for name, (title, frame) in papers.items()}


def _markdown_table(frame: pd.DataFrame) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(re.sub(r"[ \n]+", " ", str(cell)).replace("|", "\\|") for cell in cells) + " |"

    if frame.empty:
        return "Not run."
    rule = line("---" for _ in frame.columns)
    return "\n".join([line(frame.columns), rule, *(line(row) for row in frame.itertuples(index=False))])


def _template(name: str):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Markdown is escaped when it is rendered (html=False), the page's own values by autoescape.
    settings = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=name.endswith(".html.j2"), **settings).get_template(name)


def _page(title: str, text: str, folder: Path) -> str:
    """Markdown as one self-contained page: images inline, a table of contents, raw HTML shown and not run."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens, contents = markdown.parse(text), []
    for place, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            heading = tokens[place + 1].content
            anchor = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")
            token.attrSet("id", anchor)
            contents.append((anchor, heading))
        for child in token.children or ():
            if child.type == "image" and (file := folder / str(child.attrGet("src"))).is_file():
                image = file.read_bytes()
                child.attrSet("src", f"data:image/png;base64,{base64.b64encode(image).decode()}")
                child.attrSet("width", str(int.from_bytes(image[16:20], "big") * 7 // 10))  # one scale for all figures
    body = markdown.renderer.render(tokens, markdown.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return _template("report.html.j2").render(title=title, contents=contents, body=Markup(body))
