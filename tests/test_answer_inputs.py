"""What teachers' answers are to a result: an input by content, whatever their place and however they were asked for."""

from pathlib import Path

import pandas as pd
import pytest

from meml_lib import config
from meml_lib.pipeline import keys

API = {"kind": "api", "model": "gpt-4o", "base_url": "https://x.example/v1", "key_from": None, "max_answer_tokens": 64}


def run(teacher: dict, **values) -> config.Run:
    return config.load_run("smoke.yaml", {"experts.known.story.teacher": teacher} | values)


def why(old: config.Run, new: config.Run) -> list[str]:
    """What the first run's result would be stale for, were the second run's asked for."""
    return keys.reasons(keys.stage_parts("mef", old), keys.stage_parts("mef", new))


def files_of(parts: keys.Parts) -> set[str]:
    """The files whose definitions a result depends on."""
    return {place.partition(":")[0] for place in parts["code"]}


@pytest.fixture
def store(tmp_path) -> Path:
    (tmp_path / "store.jsonl").write_text("{}\n")
    return tmp_path / "store.jsonl"


def test_where_and_how_answers_are_asked_for_makes_nothing_stale(store):
    before = run(API | {"path": str(store)})
    elsewhere = store.with_name("moved.jsonl")
    elsewhere.write_bytes(store.read_bytes())
    same = {"base_url": "http://localhost:1/v1", "key_from": "A_KEY", "price": {"input": 1, "output": 2}}
    now = run(API | same | {"path": str(elsewhere)}, **{"collect.concurrency": 3, "collect.retries": 0})
    assert why(before, now) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", "gpt-4"), ("system", "Think."), ("temperature", 0.5), ("samples", 2), ("max_answer_tokens", 65),
     ("replies_as", "ep-1"), ("reasoning", "prepend")],
)  # fmt: skip
def test_a_value_that_decides_the_answers_makes_them_stale(store, key, value):
    before = run(API | {"path": str(store)})
    [line] = why(before, run(API | {"path": str(store), key: value}))
    assert line.startswith(f"experts.known.story.teacher.{key}: ")


def test_the_content_of_a_store_a_table_and_a_hubs_local_folder_is_an_input(store, tmp_path, monkeypatch):
    monkeypatch.setenv("ANSWERS", str(tmp_path))
    (tmp_path / "set").mkdir()
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "set" / "train.parquet")
    (tmp_path / "table.csv").write_text("a\n1\n")
    table = {"kind": "table", "model": "m"}
    part = tmp_path / "set" / "train.parquet"
    for teacher, file, name in (
        (API | {"path": str(store)}, store, "answers of story"),
        (table | {"path": "$ANSWERS/table.csv"}, tmp_path / "table.csv", "answers of story"),
        (table | {"hub": {"name": str(tmp_path / "set")}}, part, "answers of story: train.parquet"),
    ):
        before = keys.stage_parts("mef", run(teacher))
        assert keys.reasons(before, keys.stage_parts("mef", run(teacher))) == []
        file.write_bytes(file.read_bytes() + b"\n")
        assert keys.reasons(before, keys.stage_parts("mef", run(teacher))) == [f"{name} changed"]


def test_answers_are_read_by_stage_1_and_collecting_them_is_no_part_of_it():
    files = files_of(keys.stage_parts("mef", config.load_run("smoke.yaml")))
    assert {"experts/tables.py", "experts/store.py", "tasks/leaks.py"} <= files and "experts/collect.py" not in files


def test_the_re_split_depends_on_gsm8ks_code_and_files(monkeypatch, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("{}\n")
    monkeypatch.setenv("MEML_DATA_DIR", str(tmp_path))
    parts = keys.stage_parts("mef", config.load_run("gsm8k-published-experts.yaml"))
    assert "tasks/gsm8k.py" in files_of(parts) and "tasks/mathqa.py" not in files_of(parts)
    assert "gsm8k/test.jsonl" in parts["inputs"]
