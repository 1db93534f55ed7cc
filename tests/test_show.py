"""What notebooks show: worked numbers, the right question, text that stays text."""

import pandas as pd
import pytest

from meml_lib.analysis import figures, overlap, show
from meml_lib.runs import RunFolder

ROWS = [  # q1: both wrong; q2: b alone right; q3: both right; q4: only a answered
    ("q1", "a", "1", False), ("q1", "b", None, None),
    ("q2", "a", "1", False), ("q2", "b", "8", True),
    ("q3", "a", "8", True), ("q3", "b", "8", True),
    ("q4", "a", "8", True),
]  # fmt: skip


@pytest.fixture
def answers() -> pd.DataFrame:
    rows = [(question, expert, 0, f"<b>{answer}</b>", answer, correct) for question, expert, answer, correct in ROWS]
    columns = ["question_id", "expert", "sample", "text", "answer", "correct"]
    return pd.DataFrame(rows, columns=columns).astype({"correct": "boolean"})


@pytest.fixture
def questions() -> pd.DataFrame:
    return pd.DataFrame({"question_id": ["q1", "q2", "q3", "q4"], "text": "how many & why", "gold": "8", "difficulty": 1})


def test_only_questions_that_all_answered_are_compared(answers):
    common = overlap.answered_by_all(pd.concat([answers, answers[:1].assign(sample=1)]))
    assert common["question_id"].unique().tolist() == ["q1", "q2", "q3"] and (common["sample"] == 0).all()
    with pytest.raises(ValueError, match="no question is answered by all of the experts .'b', 'a'"):
        overlap.answered_by_all(answers[answers["question_id"].eq("q4") | answers["expert"].eq("b")])


def test_intervals_are_shown_in_percent_and_phi_as_it_is(answers):
    pair = show.percent(overlap.shared_errors(overlap.answered_by_all(answers)))  # q1 both, q2 b alone, q3 both right
    assert pair.columns.tolist()[:4] == ["experts", "n", "all_wrong", "any_wrong"] and len(pair) == 1
    texts = pair.iloc[0, 4:].str.replace("\N{NO-BREAK SPACE}", " ").to_dict()
    assert texts["wrong for all, %"] == "33.3 [6.1, 79.2]" and texts["intersection / union, %"] == "50.0 [1.3, 98.7]"
    assert texts["phi"].startswith("0.50 [")
    shares = show.percent(overlap.accuracy(overlap.answered_by_all(answers)))
    assert shares["% [95 % interval]"].str.slice(0, 5).tolist() == ["33.3 ", "66.7 "]


def test_a_wide_table_keeps_order_n_and_gaps():
    shares = [("right", "b", 4, 0.5, 0.25, 0.75), ("right", "a", 2, 1.0, 0.5, 1.0), ("empty", "b", 4, 0.0, 0.0, 0.5)]
    table = show.wide(pd.DataFrame(shares, columns=["what", "expert", "n", "share", "low", "high"]), "what", "expert")
    assert table.index.tolist() == ["right", "empty"] and table.columns.tolist() == ["b", "a"]
    texts = table.map(lambda text: text.replace("\N{NO-BREAK SPACE}", " "))
    assert texts.loc["right"].tolist() == ["50.0 [25.0, 75.0], n = 4", "100.0 [50.0, 100.0], n = 2"]
    assert texts.loc["empty"].tolist() == ["0.0 [0.0, 50.0], n = 4", "\N{EM DASH}"]


def test_an_overlap_of_no_errors_is_a_dash(answers):
    shared = show.percent(overlap.shared_errors(answers[answers["question_id"] == "q3"])).iloc[0]
    assert shared["intersection / union, %"] == shared["phi"] == "—" and shared["wrong for all, %"].startswith("0.0 [")


def test_the_first_question_on_which_experts_disagree_is_shown_as_text(answers, questions):
    shown = show.side_by_side(answers, questions)
    assert shown.question_id == "q2"
    page = shown._repr_html_()
    assert "how many &amp; why" in page and "&lt;b&gt;1&lt;/b&gt;" in page and "<b>1</b>" not in page
    assert page.index("wrong") < page.index("right</b>")
    assert "unreadable" in show.side_by_side(answers, questions, "q1")._repr_html_()


def test_where_all_agree_the_first_question_is_shown(answers, questions):
    assert show.side_by_side(answers[answers["question_id"].isin(["q1", "q3"])], questions).question_id == "q1"


def test_without_samples_pass_at_k_says_so(answers, tmp_path):
    assert "samples_per_expert is 0" in show.pass_at_k(RunFolder(tmp_path))
    sampled = pd.concat([answers[:6], answers[:6].assign(sample=1)])
    RunFolder(tmp_path).write_table("test_sampled", sampled)
    picture = show.pass_at_k(RunFolder(tmp_path))
    scores = picture.data
    assert scores["k"].tolist() == [1, 1, 2, 2]
    assert scores["share"].tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 3, 2 / 3])
    assert "n = 3 questions a point; 2 samples each" in picture.figure._supxlabel.get_text()


def test_shares_are_drawn_with_their_numbers(answers, questions):
    common = overlap.answered_by_all(answers)
    levels = overlap.by_difficulty(common, questions)
    picture = figures.shares(levels, "difficulty", title="by difficulty")
    assert picture.data is levels and picture.png()[:4] == b"\x89PNG"
    assert len(picture.figure.axes[0].containers) == 2  # a line an expert
    alone = figures.shares(overlap.accuracy(common), "expert", title="any").figure.axes[0]
    (points,) = alone.containers
    assert points.lines[0].get_ydata().tolist() == pytest.approx([100 / 3, 200 / 3])
    reach = [segment[:, 1].tolist() for segment in points.lines[2][0].get_segments()]
    assert reach == [pytest.approx([6.15, 79.23], abs=0.01), pytest.approx([20.77, 93.85], abs=0.01)]  # Wilson


def test_texts_of_a_table_are_neither_markup_nor_formulas():
    page = show.table(pd.DataFrame({"text": ["<img src=x> costs $5 or $6"]})).to_html()
    assert "<img" not in page and "&lt;img" in page and 'class="mathjax_ignore"' in page
