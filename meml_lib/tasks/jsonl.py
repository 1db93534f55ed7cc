"""A user's own questions, one JSON object a line."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from meml_lib import schema
from meml_lib.tasks import Question, Split, Task, reading
from meml_lib.tasks.released import hold_out

READERS = {
    "number": reading.number,
    "letter": reading.letter,
    "yes_no": reading.yes_no,
    "text": reading.free_text,
}
KEYS = {
    "id": str,
    "question": str,
    "answer": str | int | float,
    "rationale": str,
    "split": str,
    "difficulty": int,
}


class Jsonl(Task):
    """Lines {id?, question, answer, rationale?, split?, difficulty?}; what names no split is divided by the shares.

    A rationale that does not end in its answer gets the line "#### answer". Style: `gold`, the rationale.
    """

    params: schema.JsonlParams

    def read(self, text: str) -> str | None:
        return READERS[self.params.answer](text)

    def _build(self) -> tuple[dict[str, list[Question]], dict[str, int]]:
        path = Path(self.params.path)
        if not path.is_file():
            raise FileNotFoundError(f"task.path={self.params.path!r} is no file (looked in {Path.cwd()})")
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

    def _question(self, line: str, place: str, *, default_id: str) -> tuple[Question, str | None]:
        """The line's question and the split it names. Raises: ValueError with file, line, key and value."""
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: no JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: {line.strip()[:60]!r} must be a JSON object")
        for key, value in row.items():
            if key not in KEYS:
                near = get_close_matches(key, KEYS, 1)
                raise ValueError(f"{place}: unknown key {key!r}{f'; did you mean {near[0]!r}?' if near else ''}")
            if not isinstance(value, KEYS[key]):
                raise ValueError(f"{place}: {key}={value!r} must be {getattr(KEYS[key], '__name__', KEYS[key])}")
        for key in ("question", "answer"):
            if not str(row.get(key, "")).strip():
                raise ValueError(f"{place}: key {key!r} is missing or empty")
        if row.get("split") not in (None, *get_args(Split)):
            raise ValueError(f"{place}: split={row['split']!r} must be one of {list(get_args(Split))}")
        gold = self.read(f"#### {row['answer']}")
        if gold is None:
            raise ValueError(f"{place}: answer={row['answer']!r} cannot be read as {self.params.answer}")
        rationale = row.get("rationale", "").strip()
        if self.read(rationale) != gold:
            rationale = f"{rationale}\n#### {row['answer']}".strip()
        text, difficulty = row["question"].strip(), row.get("difficulty", 1)
        return Question(row.get("id", default_id), text, gold, rationale, difficulty), row.get("split")
