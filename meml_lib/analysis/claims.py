"""The paper's numbers beside ours: paper.yaml, which runs its rows speak of, and when the two may be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from meml_lib import config
from meml_lib.analysis.stats import Interval, text, wilson

if TYPE_CHECKING:
    from meml_lib.analysis.report import ArmResult

LARGEST_MISS = 0.05  # a design that cannot see a difference of 5 points is too small to judge the paper's number


@cache
def values() -> dict[str, Any]:
    """paper.yaml."""
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))


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
        fitting = [arm for arm in arms if row["recipe"].items() <= recipe(arm.run).items()]
        if row["measure"].startswith(("teachers/", "stage-1/")):  # arms that share stage 1 have one answer to this
            keys = [json.dumps(arm.run.reads("mef")) for arm in fitting]
            fitting = [arm for place, arm in enumerate(fitting) if keys.index(keys[place]) == place]
        for arm in fitting or [None]:
            run = (arm or arms[0]).run
            ours = _ours(row["measure"], arm, teachers) if arm else None
            for model, task, value in _cells(row["cells"], run):
                delta, verdict = _verdict(value, ours, run, model, task)
                head = {"table": table, "row": row["row"], "model": model, "task": task, "paper": value}
                mine = {"arm": arm and arm.label, "ours": ours and asdict(ours)}
                found.append({**head, "sure": row["sure"], **mine, "delta": delta, "verdict": verdict})
    return found


def recipe(run: config.Run) -> dict[str, Any]:
    """What paper.yaml knows a method by."""
    objective = run.riel.objective
    parts = {"buffer": objective.buffer_sft is not None, "mutual": objective.mutual is not None}
    form = {"advantage": objective.grpo.advantage, "scale": objective.grpo.scale} if objective.grpo else {}
    return {"several_experts": len(run.experts.panel) > 1, **parts, **form}


def readable(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """paper | ours, interval, n, seeds | difference, verdict, as texts; both models' cells stand in one row."""
    shown = []
    for _, group in groupby(found, lambda r: (r["table"], r["row"], r["arm"], r["verdict"])):
        cells = list(group)
        first, ours = cells[0], cells[0]["ours"]
        known = [(f"{cell['paper']:g}", cell["model"]) for cell in cells if cell["paper"] is not None]
        numbers = [number if model == "any" else f"{number} ({model})" for number, model in known]
        head = {key: first[key] for key in ("table", "row", "task")}
        head |= {"paper": ", ".join(numbers) or "unknown", "sure": first["sure"]}
        mine = {"our arm": first["arm"] or "none of this kind", "ours": text(ours)}
        counts = {"n": ours["n_questions"], "seeds": ours["n_seeds"]} if ours else {"n": "", "seeds": ""}
        detectable = f"{100 * ours['detectable']:.1f}" if ours and ours["detectable"] else ""
        delta = {"delta": "" if first["delta"] is None else f"{first['delta']:+.1f}", "smallest detectable": detectable}
        shown.append({**head, **mine, **counts, **delta, "verdict": first["verdict"]})
    return shown


def _model(run: config.Run) -> str | None:
    """The paper's short name of a run's model; None: another model."""
    return next((name for name, path in values()["models"].items() if getattr(run.model, "path", None) == path), None)


def _cells(cells: Mapping[str, Mapping[str, float | None]], run: config.Run) -> Iterable[tuple[str, str, float | None]]:
    """The cells that stand nearest to a run: its model or all, its task or the average."""
    for model in [_model(run)] if _model(run) in cells else cells:
        task = next(task for task in (run.task.name, "average", *cells[model]) if task in cells[model])
        yield model, task, cells[model][task]


def _ours(measure: str, arm: ArmResult, teachers: Sequence[Mapping]) -> Interval | None:
    if measure.startswith("teachers/"):
        own = next((t for t in teachers if t["experts"] == arm.panel), None)
        if own is None:
            return None
        weakest = max(own["corrected"], key=lambda row: row["errors"])
        overlap = measure == "teachers/overlap_iou"
        part, whole = (own["all_wrong"], own["any_wrong"]) if overlap else (weakest["corrected"], weakest["errors"])
        return wilson(part, whole) if whole else None
    stage = "stage 1" if measure.startswith("stage-1/") else "stage 2"
    name = measure.removeprefix("stage-1/").replace("expert-1", f"expert/{arm.panel[min(1, len(arm.panel) - 1)]}")
    measured = arm.measures.get(stage, {}).get(name)
    return measured and measured.interval()


def _verdict(
    value: float | None, ours: Interval | None, run: config.Run, model: str, task: str
) -> tuple[float | None, str]:
    """(ours - paper in points, verdict); no difference where it would mean nothing."""
    if ours is None:
        return None, "not run"
    teachers = [run.experts.known[name].teacher for name in run.experts.panel]
    reasons = {
        f"other task: {run.task.name}": task not in ("average", run.task.name),
        "the paper's is an average over three data sets": task == "average",
        f"other model: {getattr(run.model, 'path', 'trained from scratch')}": model not in ("any", _model(run)),
        "other teachers": any(t.kind != "table" and getattr(t, "style", "") != "gold" for t in teachers),
        "the paper's value is unknown": value is None,
    }
    if any(reasons.values()):
        return None, f"not comparable ({'; '.join(reason for reason, holds in reasons.items() if holds)})"
    delta = 100 * ours.mean - value
    if (ours.detectable or ours.high - ours.low) > LARGEST_MISS:
        return delta, "too few data"
    return delta, "reproduced" if ours.low <= value / 100 <= ours.high else "not reproduced"
