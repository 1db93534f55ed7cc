"""Experts: panels in order, the table of teachers' answers, tables of others' answers."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from pydantic import TypeAdapter

from meml_lib import config, experts, schema, tasks

needs_data = pytest.mark.skipif(
    not os.environ.get("MEML_DATA_DIR"), reason="set MEML_DATA_DIR to the released data sets"
)
PARAMS = Path(__file__).parents[1] / "params"
NAMES = ("wordproblems", "gsm8k", "mathqa", "strategyqa")


def shipped(name, **changes):
    values = yaml.safe_load((PARAMS / "experts" / f"{name}.yaml").read_text())["experts"]
    return experts.load_panel(schema.ExpertsParams(**(values | changes)))


@pytest.fixture(scope="module")
def task():
    values = yaml.safe_load((PARAMS / "tasks" / "wordproblems.yaml").read_text())["task"]
    return tasks.load(schema.WordProblemsParams(**(values | {"train_questions": 2000})))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_panels_have_three_distinct_experts_whose_styles_exist(name):
    panel = shipped(name)
    values = yaml.safe_load((PARAMS / "tasks" / f"{name}.yaml").read_text())["task"]
    params = TypeAdapter(schema.TaskParams).validate_python(values)
    assert len(panel) == 3 and len({expert.system for expert in panel}) == 3
    assert {expert.teacher.style for expert in panel} <= set(tasks.load(params).styles)


def test_the_panels_order_is_the_one_asked_for():
    panel = shipped("wordproblems", panel=["groups", "equations"])
    assert panel.names == ["groups", "equations"] == [expert.name for expert in panel]
    assert panel[1].system == "you are expert 0 : equations"
    page = panel._repr_html_()
    assert page.index("groups") < page.index("equations") and "mistaken_on: sharing" in page


def test_a_panel_shows_its_prompts_as_text_not_as_html():
    expert = experts.Expert("a", "<b>&", schema.DerivedTeacher(kind="derived", style="gold"))
    assert "&lt;b&gt;&amp;" in experts.Panel([expert])._repr_html_()


def test_teachers_of_the_demo_err_often_and_on_different_questions(task):
    table = experts.teacher_answers(task, shipped("wordproblems"))
    assert list(table.columns) == ["question_id", "expert", "sample", "text", "answer", "correct", "ended"]
    assert table["correct"].dtype == "boolean" and len(table) == 6000 and (table["sample"] == 0).all()
    assert table["expert"][:4].tolist() == ["equations", "story", "groups", "equations"]
    right = table.pivot(index="question_id", columns="expert", values="correct").astype(float)
    assert right.mean().between(0.4, 0.65).all()
    assert (right.corr().where(lambda r: r < 1).max() < 0).all()  # errors are rather apart than together
    assert (right.max(axis=1) == 0).mean() < 0.08  # hardly any question has no right answer to learn from
    assert table.attrs["left_out"] == {"equations": 0, "story": 0, "groups": 0}


def test_questions_can_be_named(task):
    questions = task.questions("validation")[:3]
    table = experts.teacher_answers(task, shipped("wordproblems"), questions=questions)
    assert table["question_id"].unique().tolist() == [question.id for question in questions]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_teachers_answers_can_come_from_a_table(task, tmp_path, suffix):
    questions = task.questions("train")[:3]
    path = tmp_path / f"answers{suffix}"
    rows = [
        (questions[0].id, "r1", f"#### {questions[0].gold}"),
        (questions[0].id, "r1", "no idea"),
        (questions[1].id, "r1", "#### 0"),
        (questions[1].id, "r2", "#### 1"),
        ("another-7", "r1", "#### 1"),
    ]
    frame = pd.DataFrame(rows, columns=["question_id", "model", "text"])
    write = {".parquet": frame.to_parquet, ".csv": lambda p: frame.to_csv(p, index=False)}
    write.get(suffix, lambda p: frame.to_json(p, orient="records", lines=True))(path)
    panel = [of_table(path, where={"model": "r1"})]
    table = experts.teacher_answers(task, panel, questions=questions)
    assert table["question_id"].tolist() == [questions[0].id, questions[0].id, questions[1].id]
    assert table["sample"].tolist() == [0, 1, 0] and table["ended"].all()
    assert table["correct"].tolist() == [True, pd.NA, False]
    assert table.attrs["left_out"] == {"mine": 1}


def of_table(path, name="mine", **teacher):
    teacher = schema.TableTeacher(kind="table", model="r1", path=str(path), **teacher)
    return experts.Expert(name, "answer", teacher)


@needs_data
def test_published_gsm8k_answers_reproduce_their_known_accuracies_and_overlap():
    task = tasks.load(config.load_run("gsm8k-published.yaml").task)
    panel = shipped("gsm8k-published")
    table = experts.teacher_answers(task, panel, questions=experts.answered_questions(task, panel))
    wrong = ~table.assign(correct=table["correct"].fillna(False).astype(bool)).pivot(
        index="question_id", columns="expert", values="correct"
    )
    percent = 100 * (1 - wrong.mean())
    known = {"6b_finetuning": 21.7, "6b_verification": 39.0, "175b_finetuning": 34.7, "175b_verification": 56.3}
    assert len(wrong) == 1319 and percent.to_dict() == pytest.approx(known, abs=0.2)
    all_wrong = wrong.all(axis=1)
    assert 100 * all_wrong.mean() == pytest.approx(32.8, abs=0.2)
    assert 100 * all_wrong.sum() / wrong.any(axis=1).sum() == pytest.approx(37.1, abs=0.2)


def test_importing_experts_and_tasks_loads_nothing_heavy():
    code = (
        "import sys\nfrom meml_lib.experts import tables\nfrom meml_lib.tasks import jsonl, mathqa, wordproblems\n"
        "print([name for name in ('torch', 'pandas', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PARAMS.parent)
    assert done.stdout.strip() == "[]"
