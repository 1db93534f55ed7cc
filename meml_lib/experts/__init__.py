"""Experts: a system prompt and a teacher each; the panel of a run, and the table of its teachers' answers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meml_lib import config, schema
from meml_lib.tasks import Question, Split, Task

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Expert:
    """One way in which the model is asked to answer, and whose answers teach it that."""

    name: str
    system: str
    teacher: schema.DerivedTeacher | schema.TableTeacher | schema.PublishedTeacher


class Panel(tuple[Expert, ...]):
    """The experts of a run; their order is axis E everywhere."""

    @property
    def names(self) -> list[str]:
        return [expert.name for expert in self]

    def _repr_html_(self) -> str:
        rows = [
            (str(place), expert.name, expert.system, ", ".join(f"{k}: {v}" for k, v in expert.teacher if v is not None))
            for place, expert in enumerate(self)
        ]
        cells = ("".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row) for row in rows)
        names = ("E", "expert", "system prompt", "teacher")
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in names)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def load_panel(params: schema.ExpertsParams) -> Panel:
    """The experts that `params.panel` names, in its order."""
    return Panel(Expert(name, params.known[name].system, params.known[name].teacher) for name in params.panel)


def answered_split(panel: Sequence[Expert]) -> Split:
    """Which questions the panel's teachers answered: the training ones; published models, GSM8K's test questions."""
    return "test" if any(isinstance(expert.teacher, schema.PublishedTeacher) for expert in panel) else "train"


def teacher_answers(
    task: Task, panel: Sequence[Expert], split: Split = "train", questions: Sequence[Question] | None = None
) -> pd.DataFrame:
    """What the experts' teachers answer, graded: questions in order, under each the experts in panel order.

    Args:
      questions: of the task; default: all of the split.
    Returns: columns question_id, expert, sample, text, answer, correct. `attrs["left_out"]` holds, for each expert, how
      many questions its teacher has no answer to (they have no row).
    Raises: ValueError if a teacher's style, mistake or table does not fit; FileNotFoundError for a missing table.
    """
    questions = task.questions(split) if questions is None else list(questions)
    tables = {e.name: _read_table(e.teacher) for e in panel if not isinstance(e.teacher, schema.DerivedTeacher)}
    rows = []
    left_out = {expert.name: 0 for expert in panel}
    for question in questions:
        for expert in panel:
            if expert.name in tables:
                texts = tables[expert.name].get(question.id, [])
            else:
                text = task.teach(question, expert.teacher)
                texts = [] if text is None else [text]
            left_out[expert.name] += not texts
            rows += [(question, expert.name, sample, text) for sample, text in enumerate(texts)]
    table = graded(task, rows)
    table.attrs["left_out"] = left_out
    return table


def graded(task: Task, rows: Sequence[tuple[Question, str, int, str]]) -> pd.DataFrame:
    """The answers table of (question, expert, sample, text) rows, read and compared by the task."""
    import pandas as pd

    grades = [task.grade(text, question) for question, _, _, text in rows]
    return pd.DataFrame(
        {
            "question_id": pd.Series([question.id for question, *_ in rows], dtype=object),
            "expert": pd.Series([expert for _, expert, _, _ in rows], dtype=object),
            "sample": pd.Series([sample for _, _, sample, _ in rows], dtype="int64"),
            "text": pd.Series([text for *_, text in rows], dtype=object),
            "answer": pd.Series([grade.answer for grade in grades], dtype=object),
            "correct": pd.array([grade.correct for grade in grades], dtype="boolean"),
        }
    )


def _read_table(teacher: schema.TableTeacher | schema.PublishedTeacher) -> dict[str, list[str]]:
    """question_id -> texts of the rows that carry this teacher's name, in the file's order."""
    import pandas as pd

    if isinstance(teacher, schema.PublishedTeacher):
        from meml_lib.experts import published

        table = published.gsm8k_solutions()
        return table[table["expert"] == teacher.model].groupby("question_id")["text"].agg(list).to_dict()
    path = config.locate(teacher.path)
    readers = {
        ".parquet": pd.read_parquet,
        ".csv": lambda file: pd.read_csv(file, dtype=str, keep_default_na=False),
        ".jsonl": lambda file: pd.read_json(file, lines=True, dtype=False),
    }
    if path.suffix not in readers:
        raise ValueError(f"teacher.path={teacher.path!r} must end in one of {list(readers)}")
    if not path.is_file():
        raise FileNotFoundError(f"teacher.path={teacher.path!r} is no file (looked for {path})")
    table = readers[path.suffix](path)
    for column in ("question_id", "expert", "text"):
        if column not in table:
            raise ValueError(f"{path} has no column {column!r}; it has {list(table.columns)}")
    own = table[table["expert"] == teacher.column_value]
    if own.empty:
        names = sorted(map(str, table["expert"].unique()))
        raise ValueError(f"column_value={teacher.column_value!r} is in no row of {path}; its experts are {names}")
    return own.groupby("question_id", sort=False)["text"].agg(list).to_dict()
