"""StrategyQA: yes/no questions whose steps of reasoning are implicit (arXiv 2101.02235; MIT)."""

from __future__ import annotations

from meml_lib.tasks import Question
from meml_lib.tasks.reading import yes_no
from meml_lib.tasks.released import ReleasedTask, hold_out

TEST_SHARE = 0.2
"""Of the labelled questions, held out as test: the official test set has no labels. Paper: split not given."""


class StrategyQA(ReleasedTask):
    """The 2,290 labelled questions, with test and validation held out by question text (one text stands twice).

    Difficulty: number of sub-questions (of facts, on the hub, which lacks them).
    Styles: `gold`, the facts and the answer; `decomposition`, the sub-questions and the answer; `plain`, the answer.
    """

    files = {"train": ("train.json",), "test": ("dev.json",)}  # both labelled; pooled
    hub = ("ChilleD/StrategyQA",)

    def read(self, text: str) -> str | None:
        return yes_no(text)

    def _build(self) -> tuple[dict[str, list[Question]], dict[str, int]]:
        self._steps: dict[str, list[str]] = {}
        labelled = [self._question(row) for part in ("train", "test") for _, row in self._rows(part)]
        test, pool = hold_out(labelled, round(TEST_SHARE * len(labelled)), self.params.split_seed)
        return self._splits(pool, test), {}

    def _question(self, row: dict) -> Question:
        question_id = f"strategyqa-{row['qid']}"  # not the row: the hub's two parts are other ones
        facts = [row["facts"]] if isinstance(row["facts"], str) else row["facts"]
        self._steps[question_id] = steps = row.get("decomposition") or []
        gold = "yes" if row["answer"] else "no"
        return Question(
            id=question_id,
            text=row["question"].strip(),
            gold=gold,
            rationale="\n".join([*(fact.strip() for fact in facts), f"#### {gold}"]),
            difficulty=len(steps or facts),
        )

    def _rewrite(self, question: Question, style: str) -> str | None:
        steps = self._steps[question.id]
        if style == "decomposition" and not steps:
            return None
        lines = [f"{i}. {step}" for i, step in enumerate(steps, 1)] if style == "decomposition" else []
        return "\n".join([*lines, f"#### {question.gold}"])
