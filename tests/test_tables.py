"""Answers out of tables and stores: what is taken, what is not and why, and errors that name file and column."""

import json

import pandas as pd
import pytest

from meml_lib import config, experts, schema, tasks
from meml_lib.experts import store, tables

QUESTIONS = ("How many legs have two cows?", "What is 3 + 4?", "Which number follows 8?", "How much is half of 8?")
GOLD = ("8", "7", "9", "4")


@pytest.fixture
def task(tmp_path):
    splits = ("train", "train", "validation", "test")
    lines = [
        {"id": f"q{n}", "question": text, "answer": gold, "split": split}
        for n, (text, gold, split) in enumerate(zip(QUESTIONS, GOLD, splits, strict=True))
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    params = {"path": str(tmp_path / "questions.jsonl"), "answer": "number", "split_seed": 0}
    return tasks.load(schema.JsonlParams(name="jsonl", validation_share=0, test_share=0, **params))


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows: dict):
        (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "answers.jsonl"

    return write


def expert(path=None, name="mine", reasoning="drop", **teacher):
    teacher = {"model": "gpt", "path": path and str(path), "reasoning": reasoning} | teacher
    return experts.Expert(name, "answer", schema.TableTeacher(kind="table", **teacher))


def row(question_id, text, **more):
    return {"question_id": question_id, "text": text, **more}


# --- columns ----------------------------------------------------------------------------------------------------------


def test_columns_may_be_templates_over_the_row_and_null_is_empty(task, jsonl):
    rows = [{"number": n, "gpt": {"says": [text]}} for n, text in enumerate(["It is 8.", None])]
    columns = {"question_id": "q{number}", "text": "{gpt[says][0]}"}
    panel = [expert(jsonl(*rows), columns=columns)]
    table = experts.teacher_answers(task, panel)
    assert table[["question_id", "text"]].values.tolist() == [["q0", "It is 8."], ["q1", ""]]
    assert table["correct"].tolist() == [True, pd.NA] and experts.imported(task, panel)["empty"].item() == 1
    panel = [expert(jsonl({"number": 0, "gpt": {"says": ["8"]}}, {"number": 1, "gpt": None}), columns=columns)]
    assert experts.teacher_answers(task, panel)["text"].tolist() == ["8", ""]
    assert experts.teacher_answers(task, [expert(jsonl(row("q0", None)))])["text"].tolist() == [""]


def test_whole_numbers_in_a_column_with_nulls_name_their_questions(task, tmp_path):
    rows = pd.DataFrame({"n": [0, 1, None], "text": ["8", "7", "9"]})  # pandas keeps 0.0, 1.0, NaN
    rows.to_parquet(tmp_path / "a.parquet")
    panel = [expert(tmp_path / "a.parquet", columns={"question_id": "q{n}"})]
    assert experts.teacher_answers(task, panel)["correct"].tolist() == [True, True]
    assert experts.imported(task, panel)["unknown_question"].item() == 1


def test_a_byte_order_mark_is_no_part_of_the_first_line(task, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row("q0", "8")) + "\n", encoding="utf-8-sig")
    assert experts.teacher_answers(task, [expert(tmp_path / "a.jsonl")])["correct"].tolist() == [True]


@pytest.mark.parametrize("column", ["text", "{text}"])
def test_nan_is_empty_as_null_is(task, jsonl, column):
    file = jsonl(row("q0", float("nan")), row("q1", [7]))  # json.dumps writes NaN
    assert experts.teacher_answers(task, [expert(file, columns={"text": column})])["text"].tolist() == ["", "[7]"]


def test_a_question_is_found_by_its_text_whatever_its_case_and_spaces(task, jsonl):
    file = jsonl({"asked": "  what is\n3 + 4? ", "text": "7"}, {"asked": "What is 3 + 5?", "text": "8"})
    panel = [expert(file, columns={"question_id": None, "question": "asked"})]
    table = experts.teacher_answers(task, panel)
    assert table["question_id"].tolist() == ["q1"] and table["correct"].tolist() == [True]
    assert experts.imported(task, panel)["unknown_question"].item() == 1


@pytest.mark.parametrize(
    ("value", "whole"),
    [(True, True), ("stop", True), ("EOS", True), ("true", True), (False, False), ("length", False), (None, False)],
)
def test_a_cut_off_answer_is_unreadable_and_stays_in_the_table(task, jsonl, value, whole):
    panel = [expert(jsonl(row("q0", "as yet #### 8", end=value)), columns={"ended": "end"})]
    table = experts.teacher_answers(task, panel)
    assert table["ended"].tolist() == [whole] and table["text"].tolist() == ["as yet #### 8"]
    assert table["correct"].tolist() == [True if whole else pd.NA]
    assert experts.imported(task, panel)["cut_off"].item() == (not whole)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer", "whole"),
    [
        ("<think>2 x 4 = 5?</think>\n\nIt is 8.", "2 x 4 = 5?", "It is 8.", True),
        ("2 x 4 = 5?\n</think>\nIt is 8.", "2 x 4 = 5?", "It is 8.", True),  # the template holds <think>
        ("<think>2 x 4 = 8, but", "2 x 4 = 8, but", "", False),
        ("It is 8.", "", "It is 8.", True),
        ("8 <think>", "", "8 <think>", True),
    ],
)
def test_leading_thoughts_are_set_apart(text, reasoning, answer, whole):
    assert tables.apart(text) == (reasoning, answer, whole)


def test_reasoning_is_dropped_or_stands_before_the_answer_and_is_not_read(task, jsonl):
    file = jsonl(row("q0", "<think>It is 5.</think>It is 8."), row("q1", "no number", why="7"), row("q1", "", why="7"))
    dropped = experts.teacher_answers(task, [expert(file)])
    assert dropped["text"].tolist() == ["It is 8.", "no number", ""]
    kept = experts.teacher_answers(task, [expert(file, reasoning="prepend")])
    assert kept["text"].tolist() == ["<think>\nIt is 5.\n</think>\n\nIt is 8.", "no number", ""]
    file = jsonl(row("q1", "no number", why="7"), row("q1", "", why="7"))
    asked = experts.teacher_answers(task, [expert(file, reasoning="prepend", columns={"reasoning": "why"})])
    assert asked["text"].tolist() == ["<think>\n7\n</think>\n\nno number", ""] and asked["correct"].isna().all()


# --- what is taken ----------------------------------------------------------------------------------------------------


def test_every_row_is_taken_or_counted_under_its_reason(task, jsonl):
    file = jsonl(
        row("q0", "8"), row("q0", "eight: 8"), row("q0", "8"), row("q1", "8"), row("q9", "1"), row("q1", " "),
        row("q3", "4"),
    )  # fmt: skip
    derived = experts.Expert("own", "answer", schema.DerivedTeacher(kind="derived", style="gold"))
    panel = [expert(file), derived]
    found = experts.imported(task, panel)
    assert found["expert"].tolist() == ["mine", "own"]
    assert found["source"].tolist() == [str(file), "the task's own solutions (gold)"]
    counts = found.iloc[0, 2:].to_dict()
    assert counts == {"rows": 7, "taken": 5, "unknown_question": 1, "duplicate": 1, "asked_otherwise": 0,
                      "another_model": 0, "empty": 1, "cut_off": 0}  # fmt: skip
    assert found.iloc[1, 2:].isna().all()
    mine = experts.teacher_answers(task, panel).query("expert == 'mine'")
    expected = [["q0", 0, "8"], ["q0", 1, "eight: 8"], ["q1", 0, "8"], ["q1", 1, ""]]
    assert mine[["question_id", "sample", "text"]].values.tolist() == expected


def test_the_same_reply_to_another_question_or_with_other_reasoning_is_no_duplicate(task, jsonl):
    file = jsonl(row("q0", "8"), row("q1", "8"), row("q0", "<think>2 x 4</think>8"))
    assert experts.imported(task, [expert(file)])[["taken", "duplicate"]].values.tolist() == [[3, 0]]


def test_the_questions_are_those_of_the_first_split_that_was_answered(task, jsonl):
    def ids(*panel):
        return [question.id for question in experts.answered_questions(task, panel)]

    file = jsonl(row("q3", "4"), row("q2", "9"))
    assert ids(expert(file)) == ["q2"]
    assert ids(expert(file, where={"question_id": "q3"})) == ["q3"]
    assert ids(expert(jsonl(row("q3", "4"), row("q1", "9")))) == ["q0", "q1"]
    assert ids(experts.Expert("own", "answer", schema.DerivedTeacher(kind="derived", style="gold"))) == ["q0", "q1"]


def test_a_file_is_read_once_for_all_experts_and_again_after_it_changed(task, jsonl, monkeypatch):
    reads = []
    monkeypatch.setitem(tables._READERS, ".jsonl", lambda path: reads.append(path) or tables._jsonl(path))
    file = jsonl(row("q0", "8", model="a"), row("q0", "9", model="b"))
    panel = [expert(file, name=name, where={"model": name}) for name in "ab"]
    assert experts.teacher_answers(task, panel)["text"].tolist() == ["8", "9"] and len(reads) == 1
    jsonl(row("q0", "10", model="a"), row("q0", "11", model="b"))
    assert experts.teacher_answers(task, panel)["text"].tolist() == ["10", "11"] and len(reads) == 2


def test_a_data_set_of_the_hub_may_be_a_local_folder(task, tmp_path):
    (tmp_path / "traces").mkdir()
    frame = pd.DataFrame({"question_id": ["q0", "q1"], "text": ["8", "7"]})
    frame.to_parquet(tmp_path / "traces" / "test.parquet")
    panel = [expert(hub={"name": str(tmp_path / "traces"), "split": "test"})]
    assert experts.teacher_answers(task, panel)["correct"].tolist() == [True, True]
    with pytest.raises(RuntimeError, match="traces', config None, split 'train' could not be loaded: .* path: instead"):
        experts.teacher_answers(task, [expert(hub={"name": str(tmp_path / "traces")})])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"columns": {"text": "answer"}}, r"answers.jsonl: columns.text='answer' .* row 1, which has \['question_id', 'text', 'model'\]"),
        ({"columns": {"text": "{model[x]}"}}, r"columns.text='\{model\[x\]\}' does not fit row 1"),
        ({"columns": {"text": "{text"}}, "columns.text='{text' does not fit"),
        ({"where": {"modle": "a"}}, r"no column 'modle' \(where\); it has \['question_id', 'text', 'model'\]"),
        ({"where": {"model": "c"}}, r"no row has where=\{'model': 'c'\}; column 'model' holds 'a', 'b'"),
        ({"columns": {"question_id": "model"}}, r"'mine': no answer in .*answers.jsonl is taken: unknown question: 2 \(such as 'a'; .* 'q0'\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_file_and_column(task, jsonl, teacher, message):
    with pytest.raises(ValueError, match=message):
        experts.teacher_answers(task, [expert(jsonl(row("q0", "8", model="a"), row("q1", "7", model="b")), **teacher)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl cannot be read as jsonl: line 2: "),
        ("a.jsonl", "[1]\n", "line 1 holds no JSON object"),
        ("a.parquet", "no parquet", "a.parquet cannot be read as parquet"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv cannot be read as csv: .*line 3"),
        ("a.xlsx", "", r"must end in one of \['.parquet', '.csv', '.jsonl'\]"),
        ("a.jsonl", "", "a.jsonl is taken: it has none"),
    ],
)
def test_files_that_cannot_be_read_are_named(task, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        experts.teacher_answers(task, [expert(tmp_path / name)])


def test_missing_files_and_variables_are_named(task, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="teacher.path='.*none.csv' is no file"):
        experts.imported(task, [expert(tmp_path / "none.csv")])
    monkeypatch.delenv("MEML_DATA_DIR", raising=False)
    with pytest.raises(config.ParamsError, match=r"\$MEML_DATA_DIR is not set"):
        experts.imported(task, [expert("$MEML_DATA_DIR/a.csv")])
    (tmp_path / "a.csv").write_text("question_id,text\nq0,8\n")
    monkeypatch.setenv("MEML_DATA_DIR", str(tmp_path))
    assert experts.imported(task, [expert("$MEML_DATA_DIR/a.csv")])["source"].item() == "$MEML_DATA_DIR/a.csv"


# --- stores -----------------------------------------------------------------------------------------------------------


def api(path, **teacher) -> schema.ApiTeacher:
    values = {"kind": "api", "model": "gpt-4o", "path": str(path), "base_url": "http://x/v1", "key_from": None}
    return schema.ApiTeacher(**values | {"max_answer_tokens": 64, "samples": 2} | teacher)


def test_collected_answers_are_used_only_as_they_would_be_asked_today(task, jsonl, tmp_path):
    teacher = api(tmp_path / "answers.jsonl")

    def record(question_id, sample, text, *, asked=None, **more):
        at = dict(zip(("q0", "q1", "q2", "q3"), QUESTIONS, strict=True)).get(question_id, "?")
        head = {"question_id": question_id, "expert": "mine", "sample": sample, "model": "gpt-4o-2024-08-06"}
        asked = asked or store.fingerprint(teacher, at)
        return head | {"asked": asked, "text": text, "reasoning": None, "ended": True} | more

    jsonl(
        record("q0", 1, "9"), record("q0", 0, "8", reasoning="2 x 4"), record("q0", 0, "8"), record("q0", 2, "a third"),
        record("q1", 0, "7", asked="before"), record("q1", 0, "7", model="gpt-4o-mini"), record("q9", 0, "7"),
        record("q1", 1, "8", ended=False), record("q1", 0, "7", expert="other"),
    )  # fmt: skip
    mine = experts.Expert("mine", "answer", teacher)
    table = experts.teacher_answers(task, [mine])
    expected = [["q0", 0, "8", True], ["q0", 1, "9", True], ["q1", 1, "8", False]]
    assert table[["question_id", "sample", "text", "ended"]].values.tolist() == expected
    assert table["correct"].tolist() == [True, False, pd.NA]
    thinking = experts.Expert("mine", "answer", teacher.model_copy(update={"reasoning": "prepend"}))
    assert experts.teacher_answers(task, [thinking])["text"][0] == "<think>\n2 x 4\n</think>\n\n8"
    counts = experts.imported(task, [mine]).iloc[0, 2:].to_dict()
    assert counts == {"rows": 7, "taken": 3, "unknown_question": 1, "duplicate": 1, "asked_otherwise": 1,
                      "another_model": 1, "empty": 0, "cut_off": 1}  # fmt: skip
    warmer = experts.Expert("mine", "answer", api(tmp_path / "answers.jsonl", temperature=1.0))
    with pytest.raises(ValueError, match="asked otherwise: 6 .*to see what fails: meml collect FILE"):
        experts.teacher_answers(task, [warmer])
    with pytest.raises(ValueError, match="is taken: it has none; to collect them"):
        experts.answered_questions(task, [experts.Expert("new", "answer", teacher)])
