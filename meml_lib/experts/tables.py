"""Answers that stand in a file: rows of a table or of a store of collected answers, and which of them are used."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from meml_lib import config, schema
from meml_lib.experts import store
from meml_lib.tasks import Task, hub, plain

LEFT_OUT = ("unknown_question", "duplicate", "asked_otherwise", "another_model")
"""Why a row is not taken."""


class Given(NamedTuple):
    """An answer as its teacher gave it."""

    text: str
    reasoning: str = ""
    ended: bool = True
    """False: it was cut off."""
    sample: int | None = None
    """null: the place among the answers to its question."""


class _Row(NamedTuple):
    question_ids: Sequence[str]
    """Of equal questions several; empty: none of the task's."""
    asked: str
    """How the row names its question."""
    given: Given
    fault: str | None = None


def taken(task: Task, expert: str, teacher: schema.TableTeacher | schema.ApiTeacher) -> tuple[dict, Counter[str]]:
    """The answers of one teacher that are used, and what became of all its rows.

    Duplicate: the same answer to the same question again; collected: the same sample of it again. A store's samples
    beyond `teacher.samples`, and rows of other teachers in a file, do not count as its rows.

    Returns: question_id -> its answers (`Given`), by sample; counts of rows, taken, each of `LEFT_OUT`, and
      of those taken `empty` and `cut_off`.
    Raises: ValueError naming file and column where a row or `where` does not fit, or if no row is taken;
      FileNotFoundError for a missing table; RuntimeError if the hub cannot be read.
    """
    answers: dict[str, list[Given]] = {}
    counts, seen, strangers = Counter(), set(), []
    rows = _collected(task, expert, teacher) if teacher.kind == "api" else _read(task, teacher)
    for ids, asked, given, fault in rows:
        key = (asked, given.sample) if teacher.kind == "api" else (plain(asked), given.text, given.reasoning)
        fault = fault or ("unknown_question" if not ids else "duplicate" if key in seen else None)
        counts.update(["rows", fault or "taken"])
        strangers += [asked] if fault == "unknown_question" else []
        if fault:
            continue
        seen.add(key)
        counts.update(empty=not given.text, cut_off=not given.ended)
        for question_id in ids:
            there = answers.setdefault(question_id, [])
            there.append(given if given.sample is not None else given._replace(sample=len(there)))
    if not answers:
        faults = (f"{name.replace('_', ' ')}: {counts[name]}" for name in LEFT_OUT if counts[name])
        why = ", ".join(faults) or "it has none"
        if strangers:
            why += f" (such as {strangers[0][:60]!r}; this task has {task.every_question()[0].id!r})"
        todo = "; to collect them, and to see what fails: meml collect FILE" if teacher.kind == "api" else ""
        raise ValueError(f"expert {expert!r}: no answer in {place(teacher)} is taken: {why}{todo}")
    return {question_id: sorted(own, key=attrgetter("sample")) for question_id, own in answers.items()}, counts


def place(teacher: schema.Teacher) -> str:
    """Where a teacher's answers come from, as its values say it."""
    if teacher.kind == "derived":
        return f"the task's own solutions ({teacher.style})"
    return teacher.path or " ".join(filter(None, ("hub:", *dict(teacher.hub).values())))


def apart(text: str) -> tuple[str, str, bool]:
    """(reasoning, answer, whether the thinking ended) of a text that may begin with what its teacher thought.

    Templates of some models hold the opening mark themselves, so that it is not in the text.

    >>> apart("<think>2 + 2</think> It is 4."), apart("2 + 2</think>4"), apart("<think>2 + 2"), apart("4")
    (('2 + 2', 'It is 4.', True), ('2 + 2', '4', True), ('2 + 2', '', False), ('', '4', True))
    """
    thought, mark, answer = text.partition("</think>")
    opened = thought.lstrip().startswith("<think>")
    if not mark and not opened:
        return "", text.strip(), True
    return thought.strip().removeprefix("<think>").strip(), answer.strip(), bool(mark)


# --- tables -----------------------------------------------------------------------------------------------------------


def _read(task: Task, teacher: schema.TableTeacher) -> Iterator[_Row]:
    """The teacher's rows, through its column mapping."""
    rows, columns, file = _rows(teacher), teacher.columns, place(teacher)
    for column in teacher.where:
        if not any(column in row for row in rows):
            raise ValueError(f"{file}: no column {column!r} (where); it has {list(rows[0]) if rows else 'no row'}")
    own = [n for n, row in enumerate(rows) if all(_equal(row.get(key), value) for key, value in teacher.where.items())]
    if rows and not own:
        held = {column: sorted({str(row.get(column)) for row in rows}) for column in teacher.where}
        raise ValueError(f"{file}: no row has where={teacher.where}; " + _held(held))
    by_text = columns.question_id is None
    known: dict[str, list[str]] = {}
    for question in task.every_question():
        known.setdefault(plain(question.text) if by_text else question.id, []).append(question.id)

    def cell(n: int, name: str) -> str:
        spec = getattr(columns, name)
        try:
            value = _TEMPLATE.vformat(spec, (), rows[n]) if "{" in spec else rows[n][spec]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            what = f"columns.{name}={spec!r} does not fit row {n + 1}, which has {list(rows[n])}"
            raise ValueError(f"{file}: {what} ({type(error).__name__}: {error})") from error
        return _shown(value)

    for n in own:
        asked = cell(n, "question" if by_text else "question_id")
        thought, text, ended = apart(cell(n, "text"))
        thought = cell(n, "reasoning") if columns.reasoning else thought
        ended &= columns.ended is None or cell(n, "ended").lower() in ("true", "stop", "eos")
        yield _Row(known.get(plain(asked) if by_text else asked, ()), asked, Given(text, thought.strip(), ended))


def _shown(value: Any, spec: str = "") -> str:
    """A cell as text; null is empty, and so is NaN, as which pandas writes it."""
    if isinstance(value, float) and value.is_integer() and not spec:
        value = int(value)  # a column of whole numbers and nulls is written as floats
    return "" if value is None or value != value else format(value, spec)


class _Template(string.Formatter):
    """str.format over a row, in which what is null holds nothing."""

    def get_field(self, name: str, args: Sequence, row: Mapping[str, Any]) -> tuple[Any, str]:
        null = row.get(re.split(r"[.[]", name)[0], "") is None
        return (None, name) if null else super().get_field(name, args, row)

    def format_field(self, value: Any, spec: str) -> str:
        return _shown(value, spec)


_TEMPLATE = _Template()


def _equal(cell: Any, value: Any) -> bool:
    return cell == value or str(cell) == str(value)  # a CSV holds texts only


def _held(values: Mapping[str, list[str]]) -> str:
    some = {column: ", ".join(map(repr, held[:8])) + ", ..." * (len(held) > 8) for column, held in values.items()}
    return "; ".join(f"column {column!r} holds {listed}" for column, listed in some.items())


def _rows(teacher: schema.TableTeacher) -> list[dict]:
    if teacher.hub is not None:
        return _from_hub(*dict(teacher.hub).values())
    path = config.locate(teacher.path)
    if path.suffix not in _READERS:
        raise ValueError(f"teacher.path={teacher.path!r} must end in one of {list(_READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"teacher.path={teacher.path!r} is no file (looked for {path})")
    return _from_file(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)  # the experts of a panel often share a file
def _from_file(path: Path, changed: int) -> list[dict]:
    try:
        return _READERS[path.suffix](path)
    except (ValueError, OSError) as error:  # what json, pandas and pyarrow raise of a broken file
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error


@lru_cache(maxsize=4)
def _from_hub(name: str, part: str | None, split: str) -> list[dict]:
    import datasets

    local = config.locate(name)
    instead = "put the data set into a folder and name that, or save the split as parquet and give path: instead of hub:"
    with hub.asked_for(f"teacher.hub: {name!r}, config {part!r}, split {split!r}", instead, here=local.is_dir()):
        return datasets.load_dataset(str(local) if local.is_dir() else name, part, split=split).to_list()


def _parquet(path: Path) -> list[dict]:
    import pyarrow.parquet as parquet

    return parquet.read_table(path).to_pylist()


def _csv(path: Path) -> list[dict]:
    import pandas as pd

    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")


def _jsonl(path: Path) -> list[dict]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for count, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError as error:
                raise ValueError(f"line {count}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {count} holds no JSON object")
            rows += [row] if row else []
    return rows


_READERS = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl}


# --- stores -----------------------------------------------------------------------------------------------------------


def _collected(task: Task, expert: str, teacher: schema.ApiTeacher) -> Iterator[_Row]:
    """The teacher's records in the store that collecting writes."""
    text_of = {question.id: question.text for question in task.every_question()}
    for record in store.stored(teacher.path):
        if record["expert"] != expert or record["sample"] >= teacher.samples:
            continue
        asked, fault = record["question_id"], None
        if asked in text_of and record["asked"] != store.fingerprint(teacher, text_of[asked]):
            fault = "asked_otherwise"
        elif not store.accepted(teacher, record):
            fault = "another_model"
        thought, text, ended = apart(record["text"] or "")
        given = Given(text, (record["reasoning"] or thought).strip(), ended and record["ended"], record["sample"])
        yield _Row([asked] if asked in text_of else [], asked, given, fault)
