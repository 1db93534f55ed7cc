"""Experts: a system prompt and a teacher each; the panel of a run, and the table of its teachers' answers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from meml_lib import schema
from meml_lib.experts import tables
from meml_lib.tasks import Graded, Question, Split, Task

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Expert:
    """One way in which the model is asked to answer, and whose answers teach it that."""

    name: str
    system: str
    teacher: schema.DerivedTeacher | schema.TableTeacher | schema.ApiTeacher

    def __hash__(self) -> int:
        return hash((self.name, self.system))  # a teacher may hold a mapping


class Panel(tuple[Expert, ...]):
    """The experts of a run; their order is axis E everywhere."""

    @property
    def names(self) -> list[str]:
        return [expert.name for expert in self]

    def _repr_html_(self) -> str:
        told = [expert.teacher.model_dump(exclude_defaults=True, exclude_none=True).items() for expert in self]
        rows = [
            (str(place), expert.name, expert.system, ", ".join(f"{key}: {value}" for key, value in values))
            for place, (expert, values) in enumerate(zip(self, told, strict=True))
        ]
        cells = ("".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row) for row in rows)
        names = ("E", "expert", "system prompt", "teacher")
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in names)
        return f"<table class='mathjax_ignore'><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def load_panel(params: schema.ExpertsParams) -> Panel:
    """The experts that `params.panel` names, in its order."""
    return Panel(Expert(name, params.known[name].system, params.known[name].teacher) for name in params.panel)


def answered_questions(task: Task, panel: Sequence[Expert]) -> list[Question]:
    """The first split's questions that a teacher of a table or an API answers any of; where there is none, train's.

    Raises: as `teacher_answers`.
    """
    given = [tables.taken(task, expert.name, expert.teacher)[0] for expert in _imported(panel)]
    splits = [task.questions(split) for split in get_args(Split)]
    return next((own for own in splits if any(q.id in answers for answers in given for q in own)), splits[0])


def imported(task: Task, panel: Sequence[Expert]) -> pd.DataFrame:
    """What was taken from tables and collected answers, and why the rest was not; of derived teachers nothing is.

    Returns: one row an expert: expert, source, rows, taken, `tables.LEFT_OUT`; of those taken: empty, cut_off.
    Raises: as `teacher_answers`.
    """
    import pandas as pd

    counts = {e.name: tables.taken(task, e.name, e.teacher)[1] for e in _imported(panel)}
    columns = ["rows", "taken", *tables.LEFT_OUT, "empty", "cut_off"]
    rows = [[counts[e.name][column] if e.name in counts else pd.NA for column in columns] for e in panel]
    table = pd.DataFrame(rows, columns=columns).astype("Int64")
    table.insert(0, "source", [tables.place(expert.teacher) for expert in panel])
    table.insert(0, "expert", [expert.name for expert in panel])
    return table


def teacher_answers(
    task: Task, panel: Sequence[Expert], split: Split = "train", questions: Sequence[Question] | None = None
) -> pd.DataFrame:
    """What the experts' teachers answer, graded: questions in order, under each the experts in panel order.

    An answer that is empty or was cut off is unreadable, whatever stands in it. `text` begins with the reasoning where
    teacher.reasoning is prepend; it is not read.

    Args:
      questions: of the task; default: all of the split.
    Returns: columns question_id, expert, sample, text, answer, correct, ended. `attrs["left_out"]` holds, for each
      expert, how many questions its teacher has no answer to (they have no row).
    Raises: ValueError if a teacher's style, mistake or table does not fit or gives no answer to any question of the
      task; FileNotFoundError for a missing table; RuntimeError where the hub cannot be read.
    """
    import pandas as pd

    questions = task.questions(split) if questions is None else list(questions)
    given = {e.name: tables.taken(task, e.name, e.teacher)[0] for e in _imported(panel)}
    rows = []
    left_out = {expert.name: 0 for expert in panel}
    for question in questions:
        for expert in panel:
            if expert.name in given:
                answers = given[expert.name].get(question.id, [])
            else:
                text = task.teach(question, expert.teacher)
                answers = [] if text is None else [tables.Given(text, sample=0)]
            left_out[expert.name] += not answers
            for answer in answers:
                text = answer.text
                grade = task.grade(text, question) if text and answer.ended else Graded(None, None)
                if text and answer.reasoning and expert.teacher.reasoning == "prepend":
                    text = f"<think>\n{answer.reasoning}\n</think>\n\n{text}"
                rows.append((question.id, expert.name, answer.sample, text, grade.answer, grade.correct, answer.ended))
    columns = ["question_id", "expert", "sample", "text", "answer", "correct", "ended"]
    kinds = dict.fromkeys(columns, object) | {"sample": "int64", "correct": "boolean", "ended": bool}
    table = pd.DataFrame(rows, columns=columns, dtype=object).astype(kinds)
    table.attrs["left_out"] = left_out
    return table


def _imported(panel: Sequence[Expert]) -> list[Expert]:
    return [expert for expert in panel if expert.teacher.kind != "derived"]
