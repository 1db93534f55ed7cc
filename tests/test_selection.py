"""What stage 1 trains on: each answer kept or left out for one reason, and no test question in it."""

import time
from types import SimpleNamespace

import pandas as pd
import pytest

from meml_lib import config, tasks
from meml_lib.runs import RunFolder
from meml_lib.tasks import Question, leaks
from meml_lib.training import mef, stage


def params(**values):
    return config.load_run("smoke.yaml").mef.model_copy(update=values)


ANSWERS = pd.DataFrame(
    [
        ("q0", "a", 0, "one two three", True, True),
        ("q0", "a", 1, "one two", False, True),
        ("q0", "a", 2, "one", True, True),
        ("q1", "a", 0, " ", None, True),
        ("q1", "a", 1, "", None, False),
        ("q2", "a", 0, "no number", None, True),
        ("q0", "b", 0, "one two three four", True, True),
        ("q1", "b", 0, "one", None, False),
    ],
    columns=["question_id", "expert", "sample", "text", "correct", "ended"],
).astype({"correct": "boolean"})
ALL_FILTERS = {"keep": "right", "max_answer_tokens": 3, "answers_per_question": 1}
WORDS = SimpleNamespace(answer_ids=lambda text: (*text.split(), "end"))


@pytest.mark.parametrize(
    ("values", "kept", "a", "b"),
    [  # cut_off, empty, wrong, too_long, beyond, kept
        ({}, [0, 1, 2, 5, 6], [1, 1, 0, 0, 0, 4], [1, 0, 0, 0, 0, 1]),
        ({"keep": "right"}, [0, 2, 6], [1, 1, 2, 0, 0, 2], [1, 0, 0, 0, 0, 1]),
        ({"max_answer_tokens": 3}, [1, 2, 5], [1, 1, 0, 1, 0, 3], [1, 0, 0, 1, 0, 0]),
        ({"answers_per_question": 1}, [0, 5, 6], [1, 1, 0, 0, 2, 2], [1, 0, 0, 0, 0, 1]),
        (ALL_FILTERS, [2], [1, 1, 2, 1, 0, 1], [1, 0, 0, 1, 0, 0]),
    ],
)
def test_each_answer_is_kept_or_left_out_for_the_first_reason(values, kept, a, b):
    chosen, told = mef.select(params(**values), ANSWERS, WORDS)
    assert chosen.index.tolist() == kept and chosen["text"].tolist() == ANSWERS.loc[kept, "text"].tolist()
    assert told.columns.tolist() == ["expert", "given", *mef.LEFT_OUT, "kept"]
    assert told.values.tolist() == [["a", 6, *a], ["b", 2, *b]]


def test_without_a_policy_no_answer_is_too_long():
    assert mef.select(params(max_answer_tokens=1), ANSWERS, None)[0].index.tolist() == [0, 1, 2, 5, 6]


def test_none_of_no_answers_is_kept():
    chosen, told = mef.select(params(), ANSWERS[:0], WORDS)
    assert chosen.empty and told.empty and "kept" in told


# --- test questions ---------------------------------------------------------------------------------------------------

LONG = "Ann has 31 apples and gives 4 of them to Bob. How many has she?"
SHORT = "Is it 1 + 1?"


class Quiz(tasks.Task):
    def __init__(self, test, train=()):
        self.made = {"train": train, "test": test}

    def questions(self, split):
        return [Question(f"{split}-{n}", text, "1", "#### 1", 1) for n, text in enumerate(self.made[split])]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (LONG, ["test-0"]),
        (f'So: "{LONG.upper()}"\nShe has 27.', ["test-0"]),
        (LONG.replace(" ", "  \n"), ["test-0"]),
        (LONG.replace("31", "32"), []),
        ("Jo" + LONG, []),  # another name
        (LONG[:-1] + "n?", []),
        (LONG + "x", []),
        (f"{SHORT}\nNo.", ["test-1"]),
        ("is it  1 + 1?", ["test-1"]),
        (f"But then, {SHORT} No.", []),  # so few words stand anywhere
        (f"{LONG}\n{SHORT}", ["test-0", "test-1"]),
        ("", []),
    ],
)
def test_a_test_question_is_found_word_for_word(text, held):
    quiz = Quiz([LONG, SHORT])
    assert sorted(leaks.test_questions_in(quiz, ["nothing", text])) == [(1, question) for question in held]


def test_a_test_question_in_what_is_trained_on_is_an_error_that_names_it():
    answers = pd.DataFrame({"question_id": ["train-0"], "expert": ["r1"], "text": [f"Like {LONG} 27."]})
    mef.refuse_test_questions(Quiz([LONG], ["Another?"]), answers.assign(text="27"))
    with pytest.raises(ValueError, match="r1's answer to train-0 holds the test question test-0: leave it out, or"):
        mef.refuse_test_questions(Quiz([LONG], ["Another?"]), answers)
    with pytest.raises(ValueError, match=r"training question train-1 holds the test question test-0 \(2 such texts\)"):
        mef.refuse_test_questions(Quiz([LONG], ["Another?", LONG]), answers)


def test_all_of_gsm8ks_size_takes_seconds():
    words = [f"w{n % 5003}" for n in range(80_000)]
    test = [" ".join(words[60 * n + n % 7 : 60 * n + 40 + n % 11]) + f" {n}?" for n in range(1_319)]
    texts = [" ".join(words[3 * n : 3 * n + 120]) for n in range(22_000)] + [f"So {test[77]} yes"]
    started = time.process_time()
    assert leaks.test_questions_in(Quiz(test), texts) == [(22_000, "test-77")]
    assert time.process_time() - started < 30  # 2 s on an idle core; of all real sets 0.5 s


# --- in stage 1 -------------------------------------------------------------------------------------------------------


def smoke(tmp_path, **values) -> config.Run:
    return config.load_run("smoke.yaml", values, run_dir=tmp_path / "run")


def test_stage_1_trains_on_the_kept_answers_alone(tmp_path):
    p = smoke(tmp_path, **{"mef.keep": "right", "mef.answers_per_step": 190})
    with pytest.raises(ValueError, match="fewer than mef.answers_per_step=190"):  # of 192, half of them wrong
        stage.run("mef", p)
    told = RunFolder(p.folder("mef")).read_table("training_answers")
    assert (told["given"] == 64).all() and (told["wrong"] + told["kept"] == 64).all() and 60 < told["kept"].sum() < 150


def test_stage_1_refuses_a_test_question_unless_it_is_allowed(tmp_path):
    task = tasks.load(smoke(tmp_path).task)
    asked, leaked = task.questions("train"), task.questions("test")[0]
    rows = [{"question_id": q.id, "text": q.rationale} for q in asked[1:]]
    rows.append({"question_id": asked[0].id, "text": f"{leaked.text} {leaked.rationale}"})
    pd.DataFrame(rows).to_json(tmp_path / "answers.jsonl", orient="records", lines=True)
    teacher = {"kind": "table", "model": "m", "path": str(tmp_path / "answers.jsonl")}
    p = smoke(tmp_path, **{"experts.known.story.teacher": teacher})
    with pytest.raises(ValueError, match=f"story's answer to {asked[0].id} holds the test question {leaked.id}"):
        stage.run("mef", p)
    assert not (p.folder("mef") / "metrics.jsonl").exists()
    allowed = {"experts.known.story.teacher": teacher, "mef.allow_test_questions": True, "mef.answers_per_step": 193}
    with pytest.raises(ValueError, match="stage 1 has 192 answers"):  # past the check
        stage.run("mef", smoke(tmp_path, **allowed))
