"""The store of collected answers: JSONL, one line an answer, appended durably, and never written again.

A line holds question_id, expert, sample, asked, text, reasoning, ended, finish_reason, model, prompt_tokens,
answer_tokens, cost, seconds, at; `values`, what it was asked with; `requests`, the HTTP requests that it took. A request
that failed for good leaves its line in `failures`: what it spent counts in the budget, and no result depends on it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meml_lib import config, schema


def stored(path: str) -> list[dict[str, Any]]:
    """A store's answers, in the file's order; [] where there is no file. A line that is still being written is left out.

    Raises: ValueError naming the line that is no record.
    """
    return list(lines(path))


def failures(path: Path) -> Path:
    """The file beside a store that holds what failed."""
    return path.with_name(f"{path.name}.failed")


def lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a store or of its failures, one at a time. Raises: as `stored`."""
    file = config.locate(path)
    if not file.is_file():
        return
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                _ = [record[field] for field in ("question_id", "expert", "sample", "asked")]
            except (ValueError, KeyError, TypeError):  # their messages would show the line
                raise ValueError(f"{file}:{number} is no record of a store; mend it or take it out") from None
            yield record


def asked_name(teacher: schema.ApiTeacher) -> str:
    """The model's name in the request."""
    return teacher.api_model or teacher.model


def values(teacher: schema.ApiTeacher) -> dict[str, Any]:
    """What decides a reply, beside the question's text."""
    keys = ("system", "temperature", "top_p", "max_answer_tokens", "extra")
    return {"model": asked_name(teacher)} | {key: getattr(teacher, key) for key in keys}


def fingerprint(teacher: schema.ApiTeacher, question_text: str) -> str:
    """The `asked` of a request: a hash of all that decides the reply, and of nothing else (no address, key, price)."""
    text = json.dumps([values(teacher), question_text], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def accepted(teacher: schema.ApiTeacher, record: dict[str, Any]) -> bool:
    """Whether a reply came from the model that was asked for.

    It did if it names no model, the same (case does not count), `replies_as`, or one of these with a date or a tag more
    or less: gpt-4o and gpt-4o-2024-08-06, llama3 and llama3:latest; not gpt-4o and gpt-4o-mini.
    """
    named = (record["model"] or "").lower()
    for wanted in (asked_name(teacher).lower(), (teacher.replies_as or "").lower()):
        short, long = sorted((named, wanted), key=len)
        if short and long.startswith(short) and re.fullmatch(_SAME_MODEL, long[len(short) :]):
            return True
    return not named


_SAME_MODEL = r"([-@:](\d{4}-\d\d-\d\d|\d{4,8}|latest|main))?"


class Store:
    """A store that is open for appending; the caller holds its lock.

    A line that was `put` is written by `close` at the latest; it counts as stored once `sync` returns. Lines that arrive
    while the disk is busy go there together.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.torn = _cut_torn_line(path)
        """Bytes that a killed process left of a line, now cut off."""
        self._file = open(path, "ab")
        self._waiting: deque[bytes] = deque()
        self._turn, self._writing = asyncio.Lock(), threading.Lock()

    def put(self, line: str) -> None:
        """Nothing is awaited, so that no interruption can come between an answer and its place here."""
        self._waiting.append(line.encode() + b"\n")

    async def sync(self) -> None:
        """All lines that were put are on the disk. Raises: OSError if it does not take them."""
        async with self._turn:
            if self._waiting:
                await asyncio.to_thread(self._write)

    def _write(self) -> None:
        with self._writing:  # a thread may be at it when the loop is interrupted, and close() comes
            batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
            self._file.write(b"".join(batch))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what still waits, also after an interruption."""
        try:
            self._write()
        finally:
            self._file.close()


def _cut_torn_line(path: Path) -> int:
    if not path.exists():
        return 0
    with open(path, "rb+") as stream:
        size = keep = stream.seek(0, os.SEEK_END)
        while keep:
            start = max(0, keep - 65536)
            stream.seek(start)
            found = stream.read(keep - start).rfind(b"\n")
            keep = start + found + 1 if found >= 0 else start
            if found >= 0:
                break
        stream.truncate(keep)
    return size - keep
