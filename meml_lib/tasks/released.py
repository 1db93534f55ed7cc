"""Public data sets: from their released files under MEML_DATA_DIR, or from the hub; and splits held out of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from meml_lib import schema
from meml_lib.tasks import Question, Task, draw, hub, plain


class ReleasedTask(Task):
    """A task over released rows. A subclass names its files and its hub data set, and makes a question of a row."""

    params: schema.ReleasedParams | schema.Gsm8kResplitParams
    files: dict[str, tuple[str, ...]]
    """Part -> file names; the first that exists is read. On the hub a part is a split."""

    @property
    def folder(self) -> str:
        """Of the files; the ids of rows begin with it."""
        return self.name

    def _rows(self, part: str) -> list[tuple[str, dict]]:
        """(row id, row) of one part, in the released order; the id names the file and the 0-based row.

        Raises: ValueError if files are asked for and MEML_DATA_DIR is unset; FileNotFoundError if it lacks them;
          RuntimeError if the hub cannot be read.
        """
        if self.params.source == "hub" or (self.params.source == "auto" and not os.environ.get("MEML_DATA_DIR")):
            return [(f"{self.folder}-{part}-{i}", row) for i, row in enumerate(self._from_hub(part))]
        folder = data_folder(self.folder)
        found = [folder / file for file in self.files[part] if (folder / file).is_file()]
        if not found:
            what = f"MEML_DATA_DIR has none of {', '.join(self.files[part])} in {folder}"
            lacks = "" if folder.is_dir() else ", which is no folder"
            raise FileNotFoundError(f"{what}{lacks}; set it to the folder that holds the released files in {self.folder}/")
        return [(f"{self.folder}-{found[0].stem}-{i}", row) for i, row in enumerate(read_rows(found[0]))]

    def _from_hub(self, part: str) -> list[dict]:
        import datasets

        instead = f"set MEML_DATA_DIR to the folder that holds the released files in {self.folder}/"
        with hub.asked_for(f"task.name={self.name!r}: {' '.join(self.hub)}", instead):
            return datasets.load_dataset(*self.hub, split=part).to_list()

    def _splits(self, pool: list[Question], test: list[Question]) -> dict[str, list[Question]]:
        """Validation held out of the pool, and of the rest at most train_questions."""
        validation, train = hold_out(pool, self.params.validation_questions, self.params.split_seed)
        if self.params.train_questions is not None and self.params.train_questions < len(train):
            train, _ = hold_out(train, self.params.train_questions, self.params.split_seed)
        return {"train": train, "validation": validation, "test": test}


def data_folder(name: str) -> Path:
    """MEML_DATA_DIR/name. Raises: ValueError if the variable is unset."""
    root = os.environ.get("MEML_DATA_DIR")
    if not root:
        raise ValueError(f"MEML_DATA_DIR is not set: set it to the folder that holds the released files in {name}/")
    return Path(root) / name


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSON array file, or of a file with one JSON object a line."""
    with path.open(encoding="utf-8") as file:  # not splitlines(): it would also split at U+2028 inside a text
        return json.load(file) if path.suffix == ".json" else [json.loads(line) for line in file if line.strip()]


def hold_out(questions: Sequence[Question], size: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Split off the questions of `size` texts, drawn by text: the same whatever the order or source of the rows.

    Questions with equal texts stay together, so that none straddles two splits.

    Returns: (held out, the rest), both in the given order. Raises: ValueError if nothing would be left.
    """
    texts = sorted({plain(question.text) for question in questions}, key=lambda text: draw(seed, text))
    if size >= len(texts):
        raise ValueError(f"{size} questions to hold out must be fewer than the {len(texts)} there are")
    held = set(texts[:size])
    return (
        [question for question in questions if plain(question.text) in held],
        [question for question in questions if plain(question.text) not in held],
    )
