"""Error overlap and its relatives, on six questions and three experts that can be checked by hand."""

import numpy as np
import pandas as pd
import pytest

from meml_lib.analysis import overlap, stats

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


def test_the_sets_of_errors_part_the_questions():
    sizes = overlap.wrong_together(table()).set_index(["ann", "bob", "cem"])["questions"].to_dict()
    assert sizes == {
        (True, True, True): 2,
        (False, False, False): 1,
        (False, True, True): 1,
        (True, False, True): 1,
        (False, False, True): 1,
    }


def test_shared_errors_of_each_two_and_of_all():
    frame = overlap.shared_errors(table()).set_index("experts")
    assert frame["all_wrong"].to_dict() == {"ann + bob": 2, "ann + cem": 3, "bob + cem": 3, "ann + bob + cem": 2}
    assert frame["any_wrong"].tolist() == [4, 5, 5, 5] and (frame["n"] == 6).all()
    assert frame["iou"].tolist() == pytest.approx([2 / 4, 3 / 5, 3 / 5, 2 / 5])
    assert frame["all_wrong_share"].tolist() == pytest.approx([2 / 6, 3 / 6, 3 / 6, 2 / 6])
    low, high = frame.loc["ann + bob", ["iou_low", "iou_high"]]  # P(2 or more of 4) = 2.5 % at a share of 0.0676
    assert (low, high) == (pytest.approx(0.0676, abs=1e-4), pytest.approx(1 - 0.0676, abs=1e-4))
    low, high = frame.loc["ann + cem", ["all_wrong_share_low", "all_wrong_share_high"]]  # Wilson, 3 of 6
    assert (low, high) == (pytest.approx(0.1876, abs=1e-4), pytest.approx(0.8124, abs=1e-4))


def test_phi_of_each_two_is_the_correlation_of_being_right():
    frame = overlap.shared_errors(table()).set_index("experts")
    # ann and bob: 2 both right, 2 both wrong, 1 + 1 apart
    assert frame.loc["ann + bob", "phi"] == pytest.approx((2 * 2 - 1 * 1) / 9)
    assert frame.loc["ann + cem", "phi"] == pytest.approx((1 * 3 - 2 * 0) / np.sqrt(3 * 3 * 1 * 5))
    assert np.isnan(frame.loc["ann + bob + cem", "phi"])
    # half an answer added to each cell: phi 0.25, its variance (1 - 0.25^2) / 8; arctanh 0.2554 -+ 1.96 * 0.3651
    low, high = frame.loc["ann + bob", ["phi_low", "phi_high"]]
    assert (low, high) == (pytest.approx(-0.4303, abs=1e-4), pytest.approx(0.7491, abs=1e-4))


def test_overlap_of_flawless_experts_is_undefined_not_zero():
    flawless = table({"q1": (True, True, True), "q2": (True, True, True)})
    frame = overlap.shared_errors(flawless)
    assert frame[["iou", "iou_low", "iou_high", "phi", "phi_low"]].isna().all(axis=None)
    assert (frame["all_wrong_share"] == 0).all()
    assert frame["all_wrong_share_high"].tolist() == pytest.approx([0.6576] * 4, abs=1e-4)  # Wilson, 0 of 2
    assert overlap.corrected_by_others(flawless)["share"].isna().all()
    assert overlap.wrong_for_all(flawless, questions_of("q1", "q2")).empty


def questions_of(*ids: str) -> pd.DataFrame:
    return pd.DataFrame({"question_id": ids, "text": [f"ask {i}" for i in ids], "gold": "8", "difficulty": 1})


def test_the_questions_that_all_get_wrong_are_listed_with_what_each_answered():
    listed = overlap.wrong_for_all(table(), questions_of(*reversed(RIGHT)))
    assert listed.columns.tolist() == ["question_id", "text", "gold", "answers"]
    assert listed.to_numpy().tolist() == [
        ["q4", "ask q4", "8", "ann: ann's; bob: bob's; cem: cem's"],
        ["q5", "ask q5", "8", "ann: ann's; bob: bob's; cem: unreadable"],
    ]
    with pytest.raises(KeyError, match="q5"):
        overlap.wrong_for_all(table(), questions_of("q4"))


def test_corrected_by_others_is_a_share_of_an_experts_errors():
    frame = overlap.corrected_by_others(table()).set_index("expert")
    assert frame["errors"].to_dict() == {"ann": 3, "bob": 3, "cem": 5}
    assert frame["corrected"].to_dict() == {"ann": 1, "bob": 1, "cem": 3}
    assert frame.loc["cem", "share"] == pytest.approx(0.6)


def test_a_lone_expert_is_corrected_by_nobody():
    alone = table({"q1": (True,), "q2": (False,)}, experts=("ann",))
    assert overlap.corrected_by_others(alone)["corrected"].tolist() == [0]
    assert overlap.shared_errors(alone)[["experts", "iou"]].to_numpy().tolist() == [["ann", 1]]
    assert overlap.coverage(alone)["share"].tolist() == [0.5, 0.5, 0.5]


def orders(answers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return dict(list(overlap.coverage(answers).groupby("order", sort=False)))


def test_coverage_grows_as_experts_are_added():
    right = {question: (c, a, b) for question, (a, b, c) in RIGHT.items()}
    frames = orders(table(right, experts=("cem", "ann", "bob")))
    assert list(frames) == ["as listed", "greedy", "mean over orders"]
    assert [frame["experts"].tolist() for frame in frames.values()] == [[1, 2, 3]] * 3
    assert frames["as listed"]["added"].tolist() == ["cem", "ann", "bob"]
    assert frames["as listed"]["share"].tolist() == pytest.approx([1 / 6, 3 / 6, 4 / 6])
    assert frames["as listed"]["low"].tolist() == pytest.approx([stats.wilson(k, 6).low for k in (1, 3, 4)])
    assert frames["greedy"]["added"].tolist() == ["ann", "bob", "cem"]
    assert frames["greedy"]["share"].tolist() == pytest.approx([3 / 6, 4 / 6, 4 / 6])
    # of one and of two experts, at least one is right: q1 always; q2, q3 1/3, 2/3; q6 2/3, always
    shares = [(1 + 1 / 3 + 1 / 3 + 2 / 3) / 6, (1 + 2 / 3 + 2 / 3 + 1) / 6, 4 / 6]
    assert frames["mean over orders"]["share"].tolist() == pytest.approx(shares)
    assert frames["mean over orders"]["added"].isna().all() and (frames["mean over orders"]["n"] == 6).all()


def test_greedys_low_limit_is_of_an_order_chosen_on_other_questions():
    right = {question: (c, a, b) for question, (a, b, c) in RIGHT.items()}
    frame = orders(table(right, experts=("cem", "ann", "bob")))["greedy"]
    # q1, q3, q5 choose bob, cem, ann: 1, 1, 2 of q2, q4, q6; those choose ann, cem, bob: 1, 1, 2 of q1, q3, q5.
    # Together 2, 2, 4. Halved as q1, q2, q5, q6 | q3, q4 also 2, 2, 4; as q1 to q4 | q5, q6 3, 3, 4.
    # Means 2.3, 2.3, 4, rounded down.
    assert frame["low"].tolist() == pytest.approx([stats.wilson(k, 6).low for k in (2, 2, 4)])
    assert frame["high"].tolist() == pytest.approx([stats.wilson(k, 6).high for k in (3, 4, 4)])


def test_simulation_of_coverage_holds_the_truth_where_greedy_has_nothing_to_choose_by():
    """Six experts alike, independent, right half the time: any k of them cover 1 - 1/2^k of all questions there are."""
    rng, n, truth, found = np.random.default_rng(4), 200, np.tile(1 - 0.5 ** np.arange(1, 7), 3), []
    frame = pd.DataFrame({"question_id": np.repeat(np.arange(n), 6), "expert": np.tile(list("abcdef"), n)})
    for _ in range(400):
        right = (rng.random((n, 6)) < 0.5).ravel()
        found.append(overlap.coverage(frame.assign(sample=0, answer="8", correct=right))[["share", "low", "high"]])
    share, low, high = np.array(found).transpose(2, 0, 1)  # [studies, orders x experts]
    covered = np.mean((low <= truth) & (truth <= high), axis=0)
    flattered = np.mean([stats.wilson(round(best * n), n).low <= 0.5 for best in share[:, 6]])
    print(f"\ncovered: {covered.round(3).tolist()}; greedy's first by Wilson's own low limit: {flattered:.3f}")
    assert covered.min() >= 0.93 > flattered
    assert covered[:4].max() <= 0.98  # an interval of everything would cover as well


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
        overlap.shared_errors(table().iloc[:-1])


def test_an_empty_table_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        overlap.accuracy(table().iloc[:0])
