"""Error overlap and its relatives, on six questions and three experts that can be checked by hand."""

import numpy as np
import pandas as pd
import pytest

from meml_lib.analysis import overlap

RIGHT = {  # question -> what ann, bob and cem did; None: unreadable
    "q1": (True, True, True),
    "q2": (True, False, False),
    "q3": (False, True, False),
    "q4": (False, False, False),
    "q5": (False, False, None),
    "q6": (True, True, False),
}


def table(right=RIGHT, experts=("ann", "bob", "cem")) -> pd.DataFrame:
    rows = [
        (question, expert, 0, f"text {question}", None if ok is None else "8" if ok else f"{expert}'s", ok)
        for question, oks in right.items()
        for expert, ok in zip(experts, oks, strict=True)
    ]
    frame = pd.DataFrame(rows, columns=["question_id", "expert", "sample", "text", "answer", "correct"])
    return frame.astype({"correct": "boolean"})


def test_accuracy_counts_unreadable_as_not_right_but_apart():
    frame = overlap.accuracy(table()).set_index("expert")
    assert frame["right"].to_dict() == {"ann": 3, "bob": 3, "cem": 1}
    assert frame["unreadable"].to_dict() == {"ann": 0, "bob": 0, "cem": 1}
    assert frame.loc["cem", "share"] == pytest.approx(1 / 6)
    low, high = frame.loc["ann", ["low", "high"]]  # Wilson: (p + z2/2n +- z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)
    assert (low, high) == (pytest.approx(0.1876, abs=1e-4), pytest.approx(0.8124, abs=1e-4))


def test_error_sets_and_the_sets_that_part_the_questions():
    assert overlap.error_sets(table())["cem"] == {"q2", "q3", "q4", "q5", "q6"}
    sizes = overlap.wrong_together(table()).set_index(["ann", "bob", "cem"])["questions"].to_dict()
    assert sizes == {
        (True, True, True): 2,
        (False, False, False): 1,
        (False, True, True): 1,
        (True, False, True): 1,
        (False, False, True): 1,
    }


def test_overlap_is_intersection_over_union_and_says_the_other_reading_too():
    pairs = overlap.pairwise_overlap(table())
    assert pairs.loc["ann", "bob"] == pytest.approx(2 / 4)
    assert pairs.loc["ann", "cem"] == pytest.approx(3 / 5)
    assert pairs.loc["bob", "bob"] == 1
    assert overlap.overlap_all(table()) == overlap.Overlap(
        iou=2 / 5, all_wrong_share=2 / 6, all_wrong=2, any_wrong=5, questions=6
    )


def test_overlap_of_flawless_experts_is_undefined_not_zero():
    flawless = table({"q1": (True, True, True), "q2": (True, True, True)})
    assert np.isnan(overlap.overlap_all(flawless).iou) and overlap.overlap_all(flawless).all_wrong_share == 0
    assert overlap.pairwise_overlap(flawless).isna().all(axis=None)
    assert overlap.corrected_by_others(flawless)["share"].isna().all()
    assert overlap.phi(flawless).isna().all(axis=None)


def test_corrected_by_others_is_a_share_of_an_experts_errors():
    frame = overlap.corrected_by_others(table()).set_index("expert")
    assert frame["errors"].to_dict() == {"ann": 3, "bob": 3, "cem": 5}
    assert frame["corrected"].to_dict() == {"ann": 1, "bob": 1, "cem": 3}
    assert frame.loc["cem", "share"] == pytest.approx(0.6)


def test_a_lone_expert_is_corrected_by_nobody():
    alone = table({"q1": (True,), "q2": (False,)}, experts=("ann",))
    assert overlap.corrected_by_others(alone)["corrected"].tolist() == [0]
    assert overlap.overlap_all(alone).iou == 1


def test_phi_is_the_correlation_of_being_right():
    matrix = overlap.phi(table())
    assert matrix.loc["ann", "bob"] == pytest.approx((2 * 2 - 1 * 1) / 9)  # 2 both right, 2 both wrong, 1 + 1 apart
    assert matrix.loc["ann", "ann"] == 1


def test_coverage_grows_as_experts_are_added():
    frame = overlap.coverage(table())
    assert frame["added"].tolist() == ["ann", "bob", "cem"]
    assert frame["right"].tolist() == [3, 4, 4]


def voting(*answers_and_marks) -> pd.DataFrame:
    rows = [("q", f"e{i}", 0, "", answer, ok) for i, (answer, ok) in enumerate(answers_and_marks)]
    frame = pd.DataFrame(rows, columns=["question_id", "expert", "sample", "text", "answer", "correct"])
    return frame.astype({"correct": "boolean"})


def test_the_majority_wins_against_the_best_expert():
    won = overlap.vote(voting(("7", False), ("8", True), ("8", True)), prefer=["e0", "e1", "e2"]).iloc[0]
    assert (won["answer"], won["votes"], bool(won["correct"])) == ("8", 2, True)


@pytest.mark.parametrize(("prefer", "answer"), [(["e0", "e1", "e2"], "7"), (["e2", "e0", "e1"], "9")])
def test_a_tie_goes_to_the_best_validation_expert(prefer, answer):
    assert overlap.vote(voting(("7", False), ("8", True), ("9", False)), prefer).iloc[0]["answer"] == answer


def test_an_unreadable_answer_does_not_vote():
    won = overlap.vote(voting(("?", None), ("?", None), ("8", True)), prefer=["e0", "e1", "e2"]).iloc[0]
    assert (won["answer"], won["votes"]) == ("8", 1)
    nobody = overlap.vote(voting((None, None), (None, None)), prefer=["e0", "e1"]).iloc[0]
    assert nobody["votes"] == 0 and pd.isna(nobody["correct"])


def test_vote_needs_every_expert_in_the_order_of_preference():
    with pytest.raises(ValueError, match=r"prefer=\['e0'\]"):
        overlap.vote(voting(("7", False), ("8", True)), prefer=["e0"])


def samples(**marks) -> pd.DataFrame:
    rows = [(q, "e", i, "", "", ok) for q, oks in marks.items() for i, ok in enumerate(oks)]
    frame = pd.DataFrame(rows, columns=["question_id", "expert", "sample", "text", "answer", "correct"])
    return frame.astype({"correct": "boolean"})


def test_pass_at_k_is_unbiased():
    frame = overlap.pass_at_k(samples(q1=[True, False, None, False], q2=[True, True, False, False]), ks=[1, 2, 4])
    assert frame["share"].tolist() == pytest.approx([(1 / 4 + 2 / 4) / 2, (3 / 6 + 5 / 6) / 2, 1.0])
    assert frame["samples"].tolist() == [4, 4, 4]


def test_pass_at_k_does_not_overflow_and_checks_k():
    assert overlap.chance_of_a_hit(10_000, 1, 5_000) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="k=5 must be >= 1 and <= samples=4"):
        overlap.pass_at_k(samples(q1=[True, False, None, False]), ks=[5])


def test_unequal_numbers_of_samples_are_an_error():
    with pytest.raises(ValueError, match="numbers of samples differ: 1 to 2"):
        overlap.pass_at_k(samples(q1=[True, False], q2=[True]), ks=[1])


def test_by_difficulty_parts_the_questions():
    questions = pd.DataFrame({"question_id": list(RIGHT), "difficulty": [1, 1, 2, 2, 2, 1]})
    frame = overlap.by_difficulty(table(), questions).set_index(["difficulty", "expert"])
    assert frame["right"].to_dict() == {
        (1, "ann"): 3,
        (1, "bob"): 2,
        (1, "cem"): 1,
        (2, "ann"): 0,
        (2, "bob"): 1,
        (2, "cem"): 0,
    }
    with pytest.raises(ValueError, match="'q6'"):
        overlap.by_difficulty(table(), questions.iloc[:5])


def test_an_answer_twice_is_an_error():
    with pytest.raises(ValueError, match=r"question_id='q1', expert='ann'"):
        overlap.accuracy(pd.concat([table(), table().iloc[:1]]))


def test_experts_that_answered_different_questions_are_an_error():
    with pytest.raises(ValueError, match="expert 'cem' has no answer to question 'q6' \\(1 of 6 missing\\)"):
        overlap.overlap_all(table().iloc[:-1])


def test_an_empty_table_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        overlap.accuracy(table().iloc[:0])
