"""What a stage or a job must leave behind. Done means that these exist and hold what they should."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from meml_lib import config
from meml_lib.runs import RunFolder, not_finite

ANSWERS = ("question_id", "expert", "sample", "text", "answer", "correct")
QUESTIONS = ("question_id", "text", "gold", "difficulty")
NULLABLE = {"answer", "correct"}
"""Null where an answer is unreadable; in no other column that a table must have."""
STAGE_1 = {
    "teacher_answers": ANSWERS,
    "training_answers": ("expert", "given", "kept"),
    "prompt_teacher": ("question_id", "prompt", "teacher", "logp", "tokens"),
}
# What jobs leave besides stages. error_overlap also has a column an expert.
TABLES = {"teacher_answers": ANSWERS, "error_overlap": ("questions", "share")}


def stage_faults(stage: config.Stage, p: config.Run) -> list[str]:
    """What is missing or wrong in a stage's folder; empty: complete."""
    folder, panel = RunFolder(p.folder(stage)), len(p.experts.panel)
    tables = {f"{split}_questions": QUESTIONS for split in ("validation", "test")}
    tables |= {f"{split}_greedy": (*ANSWERS, "tokens", "ended") for split in ("validation", "test")}
    tables |= STAGE_1 if stage == "mef" else {"rollouts": ANSWERS}
    tables |= {"test_sampled": ANSWERS} if p.evaluate.samples_per_expert else {}
    faults = metrics_faults(folder)
    faults += [fault for name, columns in tables.items() for fault in table_faults(folder, name, columns)]
    if not faults:
        asked, answered = (len(folder.read_table(f"test_{name}")) for name in ("questions", "greedy"))
        if answered != asked * panel:
            faults.append(f"{folder.table('test_greedy')}: {answered} rows, not {asked} questions x {panel} experts")
    model = folder.path / "model"
    if not (model / "config.json").is_file() or not any(model.glob("*.safetensors")):
        faults.append(f"{model}: no trained model")
    return faults


def metrics_faults(folder: RunFolder) -> list[str]:
    """Metrics must hold at least one step, and finite numbers only."""
    file = folder.path / "metrics.jsonl"
    try:
        records, _ = folder.metrics_from(0)
    except ValueError as error:
        return [f"{file}: broken ({error})"]
    if not records:
        return [f"{file}: no step"]
    odd = next((found for record in records if (found := not_finite(record))), None)
    return [f"{file}: {odd}"] if odd else []


def table_faults(folder: RunFolder, name: str, columns: Iterable[str]) -> list[str]:
    """A table must exist, hold at least one row and these columns, no null in them, and finite numbers only."""
    file = folder.table(name)
    if not file.is_file():
        return [f"{file}: missing"]
    try:
        table = folder.read_table(name)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        return [f"{file}: broken ({str(error).splitlines()[0]})"]
    if missing := [column for column in columns if column not in table]:
        return [f"{file}: no column {', '.join(missing)}"]
    checked = {*columns, *table.select_dtypes("float")} - NULLABLE
    for name in (name for name in table if name in checked):
        odd = table[name].isna() | table[name].isin([math.inf, -math.inf])
        if odd.any():
            what = f"{odd.sum()} of {len(table)} values are null, NaN or infinite"
            return [f"{file}: column {name}: {what}, the first in row {odd.argmax() + 1}"]
    return [f"{file}: no row"] if table.empty else []


def file_faults(file: Path) -> list[str]:
    """A file must exist and hold something; a table of a run's folder, its columns and rows."""
    if file.suffix == ".parquet":
        return table_faults(RunFolder(file.parents[1]), file.stem, TABLES[file.stem])
    return [] if file.is_file() and file.stat().st_size else [f"{file}: {'empty' if file.is_file() else 'missing'}"]
