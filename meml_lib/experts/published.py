"""Answers that others have published, as answers tables: real models whose errors can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from meml_lib import schema, tasks
from meml_lib.experts import graded
from meml_lib.tasks.released import data_folder, read_rows

if TYPE_CHECKING:
    import pandas as pd

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def gsm8k_solutions(path: str | Path | None = None) -> pd.DataFrame:
    """Four language models' answers to GSM8K's 1,319 test questions, read and graded by us (not by `is_correct`).

    Args:
      path: example_model_solutions.jsonl; default: in MEML_DATA_DIR/gsm8k. test.jsonl stands beside it.
    Returns: an answers table; `expert` is the model, `question_id` as in the gsm8k task.
    Raises: ValueError if MEML_DATA_DIR is unset, or if a row is about another question than test.jsonl's.
    Source: openai/grade-school-math, commit 3101c7d; Cobbe et al., arXiv 2110.14168.
    """
    path = data_folder("gsm8k") / "example_model_solutions.jsonl" if path is None else Path(path)
    params = schema.ReleasedParams(
        name="gsm8k", source="files", train_questions=None, validation_questions=1, split_seed=0
    )
    task = tasks.load(params)
    rows = []
    for question, row in zip(task.questions("test"), read_rows(path), strict=True):
        if row["question"].strip() != question.text:
            raise ValueError(f"{path}: the row of {question.id} asks another question: {row['question'][:60]!r}")
        rows += [(question, model, 0, row[model]["solution"]) for model in MODELS]
    return graded(task, rows)
