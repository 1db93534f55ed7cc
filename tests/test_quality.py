"""Teachers' answers as training data: every share against a count made by hand."""

import json

import pandas as pd
import pytest

from meml_lib import schema, tasks
from meml_lib.analysis import quality, stats

TEST_QUESTION = "Ann has 31 apples and gives 4 of them to Bob, how many has she?"
ANSWERS = pd.DataFrame(
    [
        ("q0", "a", 0, "one two three four five six", True, True),
        ("q0", "a", 1, "seven", False, True),
        ("q1", "a", 0, "seven", True, True),
        ("q1", "a", 1, "", None, True),
        ("q2", "a", 0, f"Like {TEST_QUESTION} 27", None, False),
        ("q0", "b", 0, "ONE two three  four five", True, True),
        ("q1", "b", 0, "seven", True, True),
        ("q2", "b", 0, "", None, True),
        ("q3", "b", 0, "eight nine", False, True),
    ],
    columns=["question_id", "expert", "sample", "text", "correct", "ended"],
).astype({"correct": "boolean"})


@pytest.fixture
def task(tmp_path):
    lines = [{"question": "What is 3 + 4?", "answer": 7, "split": "train"},
             {"question": TEST_QUESTION, "answer": 27, "split": "test"}]  # fmt: skip
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    params = {"validation_share": 0, "test_share": 0, "split_seed": 0}
    return tasks.load(schema.JsonlParams(name="jsonl", path=str(tmp_path / "q.jsonl"), answer="number", **params))


def test_shares_count_what_the_answers_are(task):
    table = quality.shares(ANSWERS, task)
    counts = {what: own["answers"].tolist() for what, own in table.groupby("what", sort=False)}
    assert counts == {
        "right": [2, 2], "unreadable": [2, 1], "cut_off": [1, 0], "empty": [1, 1],
        "repeated": [2, 0],  # "seven" to q0 and q1
        "shared": [1, 1],  # "seven" of both to q1; two empty answers are no text
        "test_question": [1, 0],
    }  # fmt: skip
    assert table["expert"].tolist() == ["a", "b"] * 7 and table["n"].tolist() == [5, 4] * 7
    first, wilson = table.iloc[0], stats.wilson(2, 5)
    assert (first["share"], first["low"], first["high"]) == (wilson.mean, wilson.low, wilson.high)


def test_lengths_are_words_of_answers_that_say_something():
    answers = pd.DataFrame({"expert": ["a"] * 21 + ["b"] * 2, "text": ["w " * n for n in range(21)] + ["x  y", " "]})
    table = quality.lengths(answers)
    assert table.columns.tolist() == ["expert", "n", "words_5", "words_median", "words_95"]
    assert table.values.tolist() == [["a", 20, pytest.approx(1.95), 10.5, pytest.approx(19.05)], ["b", 1, 2, 2, 2]]


def test_shared_runs_of_words_are_of_the_first_experts_and_of_questions_that_both_answered():
    answers = ANSWERS[["question_id", "expert", "text"]]
    more = pd.DataFrame([("q3", "a", "Eight nine ten"), ("q4", "a", "x y")], columns=list(answers))
    answers = pd.concat([answers, more])
    table = quality.ngrams_shared(answers, size=2)
    assert table[["expert", "other", "n"]].values.tolist() == [["a", "b", 3], ["b", "a", 2]]
    # a: 4 of 5 pairs of q0 stand in b's, 1 of 2 of q3, none of q2 (b says nothing); q1 has no pair, q4 no answer of b
    assert table["share"].tolist() == pytest.approx([(4 / 5 + 1 / 2 + 0) / 3, 1.0])
    assert (table["low"] <= table["share"]).all() and (table["share"] <= table["high"]).all()
    few = quality.ngrams_shared(answers, size=6)
    assert few["n"].tolist() == [2, 0] and few["share"].isna().tolist() == [False, True]
    assert quality.ngrams_shared(answers[answers["expert"] == "a"]).empty
