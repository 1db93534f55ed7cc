"""GSM8K: 8,792 grade-school word problems with written solutions (arXiv 2110.14168; MIT)."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cached_property
from string import ascii_lowercase

from meml_lib.tasks import Question
from meml_lib.tasks.reading import number
from meml_lib.tasks.released import ReleasedTask, hold_out

_MARK = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_NUMERAL = re.compile(r"\d+\.?\d*|\.\d+")


class Gsm8k(ReleasedTask):
    """The released train and test files; validation is held out of train. Difficulty: number of calculations.

    Styles: `gold`, the solution without its calculator marks; `equations`, its calculations alone, one a line;
    `program`, a short Python program that makes them. The last two are None for the 113 solutions without marks.
    """

    folder = "gsm8k"
    files = {"train": ("train.jsonl",), "test": ("test.jsonl",)}
    hub = ("openai/gsm8k", "main")

    def read(self, text: str) -> str | None:
        return number(text)

    def _build(self) -> tuple[dict[str, list[Question]], dict[str, int]]:
        return self._splits(self._released("train"), self._released("test")), {}

    def _released(self, part: str) -> list[Question]:
        return [self._question(*row) for row in self._rows(part)]

    @cached_property
    def _calculations(self) -> dict[str, list[tuple[str, str]]]:
        return {}

    def _question(self, row_id: str, row: dict) -> Question:
        solution, gold = row["answer"].rsplit("####", 1)
        self._calculations[row_id] = steps = _MARK.findall(solution)
        return Question(
            id=row_id,
            text=row["question"].strip(),
            gold=number(gold),
            rationale=_MARK.sub("", row["answer"]).strip(),
            difficulty=len(steps) or len(solution.strip().splitlines()),
        )

    def _rewrite(self, question: Question, style: str) -> str | None:
        steps = self._calculations[question.id]
        if not steps:
            return None
        lines = [f"{left} = {result}" for left, result in steps] if style == "equations" else _program(question, steps)
        return "\n".join([*lines, f"#### {question.gold}"])


class Gsm8kResplit(Gsm8k):
    """GSM8K's released TEST questions alone, split anew by question; they keep their ids. Results on its test split
    cannot be compared with any on GSM8K's."""

    def _build(self) -> tuple[dict[str, list[Question]], dict[str, int]]:
        test, pool = hold_out(self._released("test"), self.params.test_questions, self.params.split_seed)
        return self._splits(pool, test), {}


def _program(question: Question, steps: list[tuple[str, str]]) -> list[str]:
    """A variable a calculation; a number that an earlier calculation gave is taken for that variable.

    The last line prints the latest variable that holds the gold answer; in the 5 % of solutions whose last calculation
    carries no mark there is none, and it prints the number.
    """
    names: dict[Fraction, str] = {}
    lines = []
    for name, (left, result) in zip(ascii_lowercase, steps):
        expression = _NUMERAL.sub(lambda numeral: names.get(Fraction(numeral[0].rstrip(".")), numeral[0]), left.strip())
        lines.append(f"{name} = {expression}  # {result.strip()}")
        names[Fraction(result.strip())] = name
    return [*lines, f"print({names.get(Fraction(question.gold), question.gold)})"]
