"""MathQA: multiple-choice word problems with rationales and formulas (arXiv 1905.13319; Apache-2.0)."""

from __future__ import annotations

import ast
import re
from collections import Counter

from meml_lib.tasks import Question
from meml_lib.tasks.reading import letter
from meml_lib.tasks.released import ReleasedTask

_OPTIONS = re.compile(r" , ".join(rf"{name} \)(.*?)" for name in "abcde"))
_LETTER_AGAIN = re.compile(r"^[a-e] [).] (?=\S)")  # "a ) a ) 4 inches"


class MathQA(ReleasedTask):
    """Options a to e stand in the question's text. Difficulty: number of operations of the linear formula.

    The training file is train.json; where only dev.json is at hand, that is trained on, and validation held out of it.
    Rows whose options or letter cannot be read are left out and counted in `malformed`.
    Styles: `gold`, the rationale and a line with the letter (about 1,000 rationales never name theirs); `formula`, the
    annotated formula and that line; `plain`, that line alone.
    """

    files = {"train": ("train.json", "dev.json"), "test": ("test.json",)}
    # As parquet; allenai/math_qa is a script. Equal to it by hash, says lm-evaluation-harness, pull request 3943.
    hub = ("regisss/math_qa",)

    def read(self, text: str) -> str | None:
        return letter(text)

    def _build(self) -> tuple[dict[str, list[Question]], dict[str, int]]:
        self._formulas: dict[str, str] = {}
        malformed: Counter[str] = Counter()
        parts = []
        for part in ("train", "test"):
            made = [self._question(*row) for row in self._rows(part)]
            malformed.update(reason for reason in made if isinstance(reason, str))
            parts.append([question for question in made if isinstance(question, Question)])
        return self._splits(*parts), dict(malformed)

    def _question(self, row_id: str, row: dict) -> Question | str:
        """The row's question, or the reason why it makes none."""
        options = read_options(row["options"])
        if options is None:
            return "options are not a to e"
        if row["correct"] not in options:
            return "correct names no option"
        if list(options.values()).count(options[row["correct"]]) > 1:
            return "the right option stands twice"
        if not row["Problem"].strip():
            return "problem is empty"
        self._formulas[row_id] = row["annotated_formula"]
        return Question(
            id=row_id,
            text="\n".join([row["Problem"].strip(), *(f"{name} ) {option}" for name, option in options.items())]),
            gold=row["correct"],
            rationale=row["Rationale"].strip(' "') + f"\n#### {row['correct']}",
            difficulty=sum(1 for step in row["linear_formula"].split("|") if step),
        )

    def _rewrite(self, question: Question, style: str) -> str:
        line = f"#### {question.gold}"
        return f"{self._formulas[question.id]}\n{line}" if style == "formula" else line


def read_options(text: str) -> dict[str, str] | None:
    """Letter -> option, from "a ) 24 , b ) 120 , ..." or from a printed list of such; None unless a to e each has one.

    >>> read_options("['a ) 1,500', 'b ) 2', 'c ) 3', 'd ) 4', 'e ) none']")["a"]
    '1,500'
    """
    if text.startswith("["):
        try:
            text = " , ".join(ast.literal_eval(text))
        except (SyntaxError, ValueError, TypeError):
            return None
    found = _OPTIONS.fullmatch(text.strip())
    if found is None:
        return None
    options = {name: _LETTER_AGAIN.sub("", option.strip()) for name, option in zip("abcde", found.groups())}
    return options if all(options.values()) else None
