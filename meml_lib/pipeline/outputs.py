"""What a stage or a job must leave behind. Done means that these exist and hold what they should."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from meml_lib import config
from meml_lib.runs import RunFolder, not_finite

ANSWERS = ("question_id", "expert", "sample", "text", "answer", "correct")
QUESTIONS = ("question_id", "text", "gold", "difficulty")
STAGE_1 = {
    "teacher_answers": ANSWERS,
    "training_answers": ("expert", "given", "kept"),
    "prompt_teacher": ("question_id", "prompt", "teacher", "logp", "tokens"),
}


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
    """A table must exist, hold these columns and at least one row, and no infinite number."""
    file = folder.table(name)
    if not file.is_file():
        return [f"{file}: missing"]
    try:
        table = folder.read_table(name)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        return [f"{file}: broken ({str(error).splitlines()[0]})"]
    missing = [column for column in columns if column not in table]
    numbers = table.select_dtypes("float")
    infinite = [column for column in numbers if numbers[column].isin([math.inf, -math.inf]).any()]
    if missing:
        return [f"{file}: no column {', '.join(missing)}"]
    if infinite:
        return [f"{file}: infinite number in {', '.join(infinite)}"]
    return [f"{file}: no row"] if table.empty else []


def file_faults(file: Path) -> list[str]:
    """A file must exist and hold something."""
    return [] if file.is_file() and file.stat().st_size else [f"{file}: {'empty' if file.is_file() else 'missing'}"]
