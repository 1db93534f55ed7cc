"""Tasks: a data set's questions, their gold solutions, and how an answer to them is read and compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal, get_args

from meml_lib import schema

if TYPE_CHECKING:
    import pandas as pd

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Question:
    """A question, with what its authors hold to be right."""

    id: str
    """Unique over the task's splits; the same in every run with the same task params."""
    text: str
    """As the user turn shows it, options included."""
    gold: str
    """The final answer, canonical: what `Task.read` returns for a right answer."""
    rationale: str
    """The gold solution, final answer line included."""
    difficulty: int
    """Number of steps, as the task counts them."""


@dataclass(frozen=True)
class Graded:
    """What was read out of an answer, and whether it is right."""

    answer: str | None
    """Canonical final answer; None: unreadable."""
    correct: bool | None
    """None: unreadable, which is reward 0 but counted apart from wrong."""


class Task:
    """A data set. A subclass writes `_build` and `read`, and `_teach` where it has styles beyond `gold`."""

    hub: tuple[str, ...] = ()
    """Name of its data set on the hub and, where that has one, configuration."""

    def __init__(self, params: schema.TaskParams):
        self.params = params

    @property
    def name(self) -> str:
        return self.params.name

    @property
    def styles(self) -> tuple[str, ...]:
        """Ways in which `teach` can write a solution."""
        return schema.STYLES[self.name]

    def questions(self, split: Split) -> list[Question]:
        """The split's questions, in a fixed order. Raises: ValueError for another split's name."""
        if split not in get_args(Split):
            raise ValueError(f"split={split!r} must be one of {list(get_args(Split))}")
        return self._built[0][split]

    def every_question(self) -> list[Question]:
        """Of all splits: to find the question that an answer is to, or a test question where none may be."""
        return [question for split in self._built[0].values() for question in split]

    @property
    def malformed(self) -> dict[str, int]:
        """Released rows that were left out: reason -> number of rows."""
        return self._built[1]

    def read(self, text: str) -> str | None:
        """The final answer stated by a solution, canonical; None where there is none to be read."""
        raise NotImplementedError

    def grade(self, text: str, question: Question) -> Graded:
        """Read an answer and compare it with the question's gold."""
        answer = self.read(text)
        return Graded(answer, None if answer is None else answer == question.gold)

    def teach(self, question: Question, teacher: schema.DerivedTeacher) -> str | None:
        """The solution that a teacher of this style writes; None where the question admits none in this style.

        Raises: ValueError for a style or a mistake that this task does not know.
        """
        if teacher.style not in self.styles:
            raise ValueError(f"style={teacher.style!r} is none of the styles {list(self.styles)} of {self.name}")
        return self._teach(question, teacher)

    def words(self) -> list[str]:
        """The vocabulary that a word-level tokenizer needs: whitespace-separated tokens, sorted."""
        questions = self.questions("train")
        return sorted({word for question in questions for word in f"{question.text} {question.rationale}".split()})

    def _build(self) -> tuple[dict[str, list[Question]], dict[str, int]]:
        """All splits, and the malformed rows by reason."""
        raise NotImplementedError

    def _teach(self, question: Question, teacher: schema.DerivedTeacher) -> str | None:
        if teacher.mistaken_on is not None:
            raise ValueError(f"mistaken_on={teacher.mistaken_on!r} must be null: {self.name} has no kinds of mistake")
        return question.rationale if teacher.style == "gold" else self._rewrite(question, teacher.style)

    def _rewrite(self, question: Question, style: str) -> str | None:
        """The gold solution in a style other than `gold`."""
        raise NotImplementedError

    @cached_property
    def _built(self) -> tuple[dict[str, list[Question]], dict[str, int]]:
        return self._build()


def table(questions: Sequence[Question]) -> pd.DataFrame:
    """The questions table: question_id, text, gold, difficulty."""
    import pandas as pd

    columns = ["question_id", "text", "gold", "difficulty"]
    return pd.DataFrame([(q.id, q.text, q.gold, q.difficulty) for q in questions], columns=columns)


def plain(text: str) -> str:
    """A text in which neither case nor spaces count."""
    return " ".join(text.casefold().split())


def draw(*parts: object) -> float:
    """A number in [0, 1) that depends on its parts alone: no state, the same on every platform and Python version.

    >>> draw(7, "gsm8k-train-0") == draw(7, "gsm8k-train-0") != draw(8, "gsm8k-train-0")
    True
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@lru_cache(maxsize=16)
def load(params: schema.TaskParams) -> Task:
    """The task that these values describe. Nothing is read or generated before its questions are asked for."""
    if params.name == "wordproblems":
        from meml_lib.tasks.wordproblems import WordProblems as task
    elif params.name == "gsm8k":
        from meml_lib.tasks.gsm8k import Gsm8k as task
    elif params.name == "gsm8k-test-resplit":
        from meml_lib.tasks.gsm8k import Gsm8kResplit as task
    elif params.name == "mathqa":
        from meml_lib.tasks.mathqa import MathQA as task
    elif params.name == "strategyqa":
        from meml_lib.tasks.strategyqa import StrategyQA as task
    else:
        from meml_lib.tasks.jsonl import Jsonl as task
    return task(params)
