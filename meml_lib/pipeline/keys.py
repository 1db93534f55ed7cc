"""What a result depends on: values, code, input files, versions. Equal parts, equal key: nothing to do again."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

from meml_lib import config, runs, schema, tasks

Parts = dict[str, dict[str, Any]]
PACKAGE = Path(__file__).resolve().parents[1]
VERSIONS = ("torch", "transformers")
# The values that these two resolve are in the key themselves; a reworded message must not retrain anything.
VALUES_ONLY = {"meml_lib.config", "meml_lib.schema"}
# Shows what a step does; takes no part in it.
SHOW_ONLY = {"meml_lib.training.anatomy"}
# stage.py serves both stages; these take part in stage 2 alone.
RIEL_ONLY = {f"meml_lib.training.{name}" for name in ("riel", "credit", "buffer")}
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
        files |= {f"stage1/{file.name}": file for file in sorted(model.glob("*")) if file.is_file()}
    skip = VALUES_ONLY | SHOW_ONLY | (RIEL_ONLY if stage == "mef" else set())
    return {
        "values": _flat(p.reads(stage)),
        "code": code(["meml_lib.training.stage"], skip | other_tasks(p.task.name)),
        "inputs": {name: runs.hash_file(file) for name, file in files.items()},
        "versions": runs.versions(VERSIONS),
    }


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


# --- code -------------------------------------------------------------------------------------------------------------


def code(modules: Iterable[str], skip: Iterable[str] = ()) -> dict[str, str]:
    """File -> hash of its code, for these modules and all of meml_lib that they import, wherever they import it."""
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        file = _file(name)
        place = str(file.relative_to(PACKAGE)) if file else name
        if file is None or place in found or name in skip:
            continue
        found[place], imported = _read(file, name)
        waiting += imported
    return dict(sorted(found.items()))


def other_tasks(name: str) -> set[str]:
    """Modules of the tasks that a run with this task does not read."""
    modules = {task: f"meml_lib.tasks.{task.partition('-')[0]}" for task in TASKS}  # gsm8k.py holds its re-split
    return {*modules.values()} - {modules[name]}


def normalised(source: str) -> str:
    """Code without comments, layout, docstrings and documented fields: what decides its results."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
            node.body = kept or [ast.Pass()]
    return ast.unparse(tree)


def imports(source: str, package: str = "meml_lib") -> set[str]:
    """Modules of meml_lib that code imports, at its top or inside a function, with the packages that hold them."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1] + [base] * bool(base))
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    ours = {name for name in names if name.split(".")[0] == "meml_lib" and _file(name)}
    return ours | {".".join(name.split(".")[:n]) for name in ours for n in range(1, name.count(".") + 1)}


def _read(file: Path, name: str) -> tuple[str, set[str]]:
    stat = file.stat()
    return _hash_and_imports(file, name, stat.st_mtime_ns, stat.st_size)


@cache
def _hash_and_imports(file: Path, name: str, mtime: int, size: int) -> tuple[str, set[str]]:
    source = file.read_text(encoding="utf-8")
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    return hashlib.sha256(normalised(source).encode()).hexdigest()[:16], imports(source, package)


def _file(module: str) -> Path | None:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    places = (path / "__init__.py", path.with_suffix(".py"))
    return next((place for place in places if place.is_file()), None)


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
                lines.append(f"{name}: {_word(before, name)} -> {_word(now, name)}")
            else:
                what = "new" if name not in before else "gone" if name not in now else "changed"
                lines.append(f"{name} {what}")
    return lines


def _word(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"
