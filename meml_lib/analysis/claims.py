"""The paper's numbers beside ours: paper.yaml, which arms its rows speak of, and what may be said of the difference."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import groupby
from math import hypot
from pathlib import Path
from typing import Any

import yaml

from meml_lib import config
from meml_lib.analysis.measures import ArmResult, paired
from meml_lib.analysis.stats import Interval, text, wilson


@cache
def values() -> dict[str, Any]:
    """paper.yaml, its rows written out: one for each expert where a row has `experts`."""
    paper = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))
    for table in paper["tables"].values():
        table["rows"] = [row for pattern in table["rows"] for row in _written_out(pattern)]
    return paper


def _written_out(row: dict[str, Any]) -> Iterable[dict[str, Any]]:
    pattern = json.dumps({key: row.get(key) for key in ("row", "measure", "recipe")})
    for place, cells in row.get("experts", {None: row.get("cells", {"any": {"any": None}})}).items():
        named = json.loads(pattern.replace("{i}", str(place)))
        models = {model: numbers for model, numbers in cells.items() if model != "sure"}
        yield {"in_paper": True, **row, **named, "sure": cells.get("sure", row.get("sure", "")), "cells": models}


# --- which arms a row speaks of ---------------------------------------------------------------------------------------


def recipe(arm: ArmResult) -> dict[str, Any]:
    """What paper.yaml knows a method by.

    experts: how many. only_expert: the position, in the study's full panel, of an arm's one expert. whole_panel:
    several experts, none left out. budget: "paper" at the study's own G and number of questions; "matched" where one expert draws as many
    rollouts as the full panel would; else "other". buffer, mutual, mutual_form, advantage, scale: of eq. 10, if there is a
    stage 2.
    """
    objective, group, positions = arm.run.riel.objective, arm.run.riel.rollouts_per_expert, arm.positions
    one, everyone = len(positions) == 1, len(arm.full_panel)
    found = {"experts": len(positions), "only_expert": str(positions[0]) if one else None}
    found |= {"whole_panel": len(positions) == everyone > 1, "buffer": False, "mutual": False, "budget": "paper"}
    if arm.last == "stage 1":
        return found | {"last_stage": "mef"}
    limited = any(limit is not None for _, limit in arm.run.riel.stop_at)
    limited |= arm.asked not in (None, arm.run.riel.steps * arm.run.riel.questions_per_step)
    if group != arm.group or limited:
        found["budget"] = "matched" if one and group == arm.group * everyone and not limited else "other"
    found |= {"buffer": objective.buffer_sft is not None, "mutual": objective.mutual is not None and not one}
    if found["mutual"]:
        found["mutual_form"] = objective.mutual.form
    form = {"advantage": objective.grpo.advantage, "scale": objective.grpo.scale} if objective.grpo else {}
    return found | {"last_stage": "riel", **form}


def kind(arm: ArmResult) -> str:
    """A name for what an arm does, coarser than its recipe: arms of a kind share a colour."""
    own = recipe(arm)
    parts = own["buffer"] + own["mutual"]
    if own["experts"] > 1 and parts == 2:
        return "MEML-GRPO"
    head = "one expert" if own["experts"] == 1 else "several experts"
    added = " + buffer" if own["experts"] == 1 and own["buffer"] else " + buffer or mutual learning" if parts else ""
    return f"{head}, {'SFT' if own['last_stage'] == 'mef' else 'RL' + added}"


def tables_of(arm: ArmResult) -> list[str]:
    """The paper's tables of accuracies (2, 4, 5) that an arm has a row in, by what it measures after its last stage."""
    rows_of = {name: values()["tables"][name]["rows"] for name in ("table-2", "table-4", "table-5")}
    return [name for name, own in rows_of.items() if any(_stage(row) == arm.last and _fits(row, arm) for row in own)]


def _stage(row: Mapping[str, Any]) -> str:
    return "stage 1" if (row["measure"] or "").startswith(("stage-1/", "teachers/")) else "stage 2"


def _fits(row: Mapping[str, Any], arm: ArmResult) -> bool:
    place = (row["measure"] or "").partition("expert-")[2]
    return row["recipe"].items() <= recipe(arm).items() and (not place or int(place) in arm.positions)


def _baselines(row: Mapping[str, Any], arms: Sequence[ArmResult]) -> list[ArmResult]:
    """The arms that a gain may be measured against."""
    return [arm for arm in arms if row.get("against", {}).items() <= recipe(arm).items()]


# --- beside ours ------------------------------------------------------------------------------------------------------


def rows(table: str, arms: Sequence[ArmResult], teachers: Sequence[Mapping] = ()) -> list[dict[str, Any]]:
    """The rows of one of the paper's tables with ours beside them: one for each cell and each arm that it speaks of.

    A study on another task or model is set beside the paper's average, and the verdict says that it cannot be compared.
    Args: teachers: what `report` found of each panel's teachers.
    Raises: ValueError for a table that paper.yaml does not have.
    """
    tables = values()["tables"]
    if table not in tables:
        raise ValueError(f"table {table!r} is not in paper.yaml; it has {list(tables)}")
    found = []
    for row in tables[table]["rows"]:
        fitting = [arm for arm in arms if _fits(row, arm)] if _baselines(row, arms) else []
        if _stage(row) == "stage 1":  # arms that share it have one answer to this; one that ends there speaks first
            fitting.sort(key=lambda arm: arm.last)
            keys = [json.dumps(arm.run.reads("mef")) for arm in fitting]
            fitting = [arm for place, arm in enumerate(fitting) if keys.index(keys[place]) == place]
        for arm in fitting or ([None] if row["in_paper"] else []):
            run = (arm or arms[0]).run
            label, ours = _ours(row, arm, arms, teachers) if arm else (None, None)
            see = row.get("see") if arm and arm.seeds.get("stage 2") else None
            for model, task, value in _cells(row["cells"], run):
                delta, verdict = _judged(row, value, ours, arm, model, task) if ours or see else (None, "not run")
                head = {"table": table, "row": row["row"], "model": model, "task": task, "paper": value}
                mine = {"arm": label, "see": see, "ours": ours and asdict(ours), "delta": delta and asdict(delta)}
                found.append({**head, "sure": row["sure"], "in_paper": row["in_paper"], **mine, "verdict": verdict})
    return found


def readable(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """paper | ours | interval | n, seeds | delta | detectable | verdict, as texts; both models' cells in one row."""
    shown = []
    for _, group in groupby(found, lambda r: (r["table"], r["row"], r["arm"], r["verdict"])):
        cells = list(group)
        first, ours, delta = cells[0], cells[0]["ours"], cells[0]["delta"]
        known = [(cell["paper"], cell["model"]) for cell in cells if cell["paper"] is not None]
        numbers = [_number(number) if model == "any" else f"{_number(number)} ({model})" for number, model in known]
        head = {key: first[key] for key in ("table", "row")}
        head |= {"data set": "—" if first["task"] == "any" else first["task"]}
        unknown, sure = ("unknown", first["sure"]) if first["in_paper"] else ("—", "—")
        head |= {"paper": ", ".join(numbers) or unknown, "sure": sure}
        mean, _, interval = text(ours).partition(" ")
        mine = {"our arm": first["arm"] or "none of this kind", "ours": first["see"] or mean}
        counts = {"n": ours["n_questions"], "seeds": ours["n_seeds"] or "—"} if ours else {"n": "—", "seeds": "—"}
        judged = {"delta": text(delta), "smallest detectable": f"{100 * _detectable(ours):.1f}" if ours else "—"}
        mine |= {"95 % interval of ours": interval or "—", **counts}
        shown.append({**head, **mine, **judged, "verdict": first["verdict"]})
    return shown


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _model(run: config.Run) -> str | None:
    """The paper's short name of a run's model; None: another model."""
    return next((name for name, path in values()["models"].items() if getattr(run.model, "path", None) == path), None)


def _cells(cells: Mapping[str, Mapping[str, Any]], run: config.Run) -> Iterable[tuple[str, str, float | str | None]]:
    """The cells that stand nearest to a run: its model or all, its task or the average."""
    for model in [_model(run)] if _model(run) in cells else cells:
        task = next(task for task in (run.task.name, "average", *cells[model]) if task in cells[model])
        yield model, task, cells[model][task]


def _ours(
    row: Mapping[str, Any], arm: ArmResult, arms: Sequence[ArmResult], teachers: Sequence[Mapping]
) -> tuple[str, Interval | None]:
    """(who, what we measured)."""
    about, _, name = (row["measure"] or "").rpartition("/")
    if about == "gain":
        seeds = arm.seeds.get(arm.last, [])
        able = [other for other in _baselines(row, arms) if set(seeds) <= other.validation.get(other.last, {}).keys()]
        if not able:
            return arm.label, None
        best = max(able, key=lambda other: sum(other.validation[other.last][seed] for seed in seeds))
        gain = paired(arm, best, "best_validation", relative=name == "relative")
        return f"{arm.label} against {best.label}", gain
    if about == "teachers":
        own = next((t for t in teachers if t["experts"] == arm.panel), None)
        if not own:
            return arm.label, None
        weakest = max(own["corrected"], key=lambda of_one: of_one["errors"])
        cells = {
            "overlap_iou": (own["shared"][-1], "iou", "iou_low", "iou_high", "any_wrong"),
            "corrected_by_others": (weakest, "share", "low", "high", "errors"),
        }
        row, *columns = cells[name]
        *interval, whole = (row[column] for column in columns)
        return arm.label, Interval(*interval, whole, 0) if whole else None  # teachers have no seed
    measured = arm.measured(name, _stage(row)) if name else None
    return arm.label, measured and measured.interval()


# --- verdicts: paper.yaml says the rule and why -----------------------------------------------------------------------


def _judged(
    row: Mapping[str, Any], value: Any, ours: Interval | None, arm: ArmResult, model: str, task: str
) -> tuple[Interval | None, str]:
    """(ours - paper, verdict); no difference where it would mean nothing."""
    reasons = _reasons(row, value, arm, model, task)
    if reasons:
        return None, f"not comparable ({'; '.join(reasons)})"
    of_answers = row["measure"].startswith(("expert-", "best_"))
    delta = difference(ours, value / 100, values()["test_sizes"].get(task) if of_answers else None)
    if not delta.low <= 0 <= delta.high:
        return delta, "not reproduced"
    sees = 100 * _detectable(ours) <= values()["verdict"]["smallest_gain"]
    return delta, "reproduced" if sees and ours.n_seeds != 1 else "too few data"


def _reasons(row: Mapping[str, Any], value: Any, arm: ArmResult, model: str, task: str) -> list[str]:
    """Why a row of the paper and ours cannot be compared."""
    if not row["in_paper"]:
        return ["not in the paper"]
    run, paper, group = arm.run, values(), arm.run.riel.rollouts_per_expert
    theirs = [dict(enumerate(paper["teachers"])).get(place) for place in arm.positions]
    known_task, known_model = run.task.name in paper["test_sizes"], model in ("any", _model(run)) and _model(run)
    trained = not (row["measure"] or "").startswith("teachers/")
    reasons = {
        f"other task: {run.task.name}": not known_task or task not in ("any", "average", run.task.name),
        "the paper's is an average over three data sets": known_task and task == "average",
        f"other model: {_setting(run, 'model')}": trained and not known_model,
        "other teachers": [_teacher(run.experts.known[name].teacher) for name in arm.panel] != theirs,
        f"G = {group}": _stage(row) == "stage 2" and group != paper["group"],
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return found or ["the paper's value is unknown"] * (value is None)


def difference(ours: Interval, theirs: float, n: int | None) -> Interval:
    """ours - theirs, with an interval that also holds the sampling error of theirs on n questions (None: not known).

    The two intervals' half-widths are joined by their squares (Newcombe, Statistics in Medicine 17, 1998, method 10).
    `detectable` is ours alone.

    >>> delta = difference(Interval(0.70, 0.66, 0.74, 300, 3), 0.75, 1319); round(delta.low, 3), round(delta.high, 3)
    (-0.096, -0.003)
    """
    paper = wilson(round(theirs * n), n) if n else Interval(theirs, theirs, theirs, 0, 0)
    mean = ours.mean - theirs
    low = mean - hypot(ours.mean - ours.low, paper.high - theirs)
    high = mean + hypot(ours.high - ours.mean, theirs - paper.low)
    return Interval(mean, low, high, ours.n_questions, ours.n_seeds, ours.detectable)


def _detectable(ours: Interval | Mapping[str, Any]) -> float:
    """Smallest true difference from a fixed number found with 80 % power; of Wilson's interval it is 2.8 / 3.92."""
    numbers = ours if isinstance(ours, Mapping) else asdict(ours)
    return numbers["detectable"] or (numbers["high"] - numbers["low"]) * 2.8 / 3.92


# --- settings ---------------------------------------------------------------------------------------------------------


def settings(run: config.Run) -> list[dict[str, Any]]:
    """Where a run differs from the paper, and what the paper does not give: setting, paper, sure, ours."""
    found = []
    for item in values()["settings"]:
        ours, paper = _setting(run, item["key"]), item["paper"]
        accepted = paper if isinstance(paper, list) else [paper]
        if ours == "—" or paper is not None and any(ours == value or str(ours) == str(value) for value in accepted):
            continue
        given = "not given" if paper is None else " or ".join(map(str, accepted))
        shown = f"{ours}" + (f" ({item['why']})" if "why" in item else "")
        found.append({"setting": item["what"], "paper": given, "sure": item.get("sure", "—"), "ours": shown})
    return found


def _setting(run: config.Run, key: str) -> Any:
    """A value by its dotted key, or one of a few that are made of several; a dash where an arm has no such part."""
    experts, stage = run.experts, getattr(run, key.partition(".")[0], None)
    match key:
        case "experts":
            return len(experts.panel)
        case "teachers":
            return ", ".join(_teacher(experts.known[name].teacher) for name in experts.panel)
        case "prompts":
            return " / ".join(experts.known[name].system for name in experts.panel)
        case "model":
            return getattr(run.model, "path", "trained from scratch")
        case "mef.length":
            return f"{stage.epochs:g} epoch{'s' * (stage.epochs != 1)}" if stage.epochs else f"{stage.steps} steps"
        case "riel.length":
            limits = [f"{limit} {name.replace('_', ' ')}" for name, limit in stage.stop_at if limit]
            return " or ".join([f"{stage.steps} steps", *limits]) + f" of {stage.questions_per_step} questions"
        case "mef.schedule" | "riel.schedule":
            return f"{stage.warmup_steps} steps, {stage.decay}, {stage.weight_decay:g}, {stage.max_grad_norm or 'none'}"
    value: Any = run.values()
    for part in key.split("."):
        if value is None:
            return "—"
        value = value[part]
    return "null" if value is None else value


def _teacher(teacher: Any) -> str:
    return getattr(teacher, "style", None) or teacher.model
