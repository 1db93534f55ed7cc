"""A user's own questions, one JSON object a line."""

from __future__ import annotations

from typing import get_args

from pydantic import NonNegativeInt, ValidationError

from meml_lib import config, schema
from meml_lib.tasks import Question, Split, Task, reading
from meml_lib.tasks.released import hold_out

READERS = {
    "number": reading.number,
    "letter": reading.letter,
    "yes_no": reading.yes_no,
    "text": reading.free_text,
}


class Line(schema.Section):
    """What one line holds."""

    question: schema.Text
    answer: bool | int | float | schema.Text
    rationale: str = ""
    id: schema.Text | None = None
    """null: the file's name and the line."""
    split: Split | None = None
    """null: divided by the shares."""
    difficulty: NonNegativeInt = 1


class Jsonl(Task):
    """Each line is a `Line`; lines that name no split are divided by the shares.

    A rationale that does not end in its answer gets the line "#### answer". Style: `gold`, the rationale.
    """

    params: schema.JsonlParams

    def read(self, text: str) -> str | None:
        return READERS[self.params.answer](text)

    def _build(self) -> tuple[dict[str, list[Question]], dict[str, int]]:
        path = config.locate(self.params.path)
        if not path.is_file():
            raise FileNotFoundError(f"task.path={self.params.path!r} is no file (looked for {path})")
        splits: dict[str, list[Question]] = {name: [] for name in get_args(Split)}
        free: list[Question] = []
        places: dict[str, str] = {}
        for count, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                place = f"{path}:{count}"
                question, split = self._question(line, place, default_id=f"{path.stem}-{count}")
                for key, value in (("id", question.id), ("question", question.text)):
                    if f"{key} {value}" in places:
                        raise ValueError(f"{place}: {key}={value!r} stands in {places[f'{key} {value}']} already")
                    places[f"{key} {value}"] = place
                (free if split is None else splits[split]).append(question)
        if not free and not any(splits.values()):
            raise ValueError(f"{path} holds no question")
        size = len(free)
        for split in ("test", "validation"):
            held = round(getattr(self.params, f"{split}_share") * size)
            if held:
                drawn, free = hold_out(free, held, self.params.split_seed)
                splits[split] += drawn
        splits["train"] += free
        return splits, {}

    def _question(self, text: str, place: str, *, default_id: str) -> tuple[Question, Split | None]:
        """The line's question and the split it names. Raises: ValueError with file, line, key and value."""
        try:
            line = Line.model_validate_json(text)
        except ValidationError as error:
            fault = error.errors()[0]
            key = fault["loc"][0] if fault["loc"] else "line"
            keys = ", ".join(Line.model_fields)
            raise ValueError(f"{place}: {key}={fault['input']!r}: {fault['msg']} (keys: {keys})") from error
        gold = self.read(f"#### {line.answer}")
        if gold is None:
            raise ValueError(f"{place}: answer={line.answer!r} cannot be read as {self.params.answer}")
        rationale = line.rationale.strip()
        if self.read(rationale) != gold:
            rationale = f"{rationale}\n#### {line.answer}".strip()
        return Question(line.id or default_id, line.question.strip(), gold, rationale, line.difficulty), line.split
