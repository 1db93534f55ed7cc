"""Figures: the numbers they draw, one colour a name, the same bytes twice, no state left behind."""

import sys
import warnings

import numpy as np
import pandas as pd
import pytest

from meml_lib.analysis import figures, overlap


@pytest.fixture(autouse=True)
def _no_warning_from_the_layout():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def answers() -> pd.DataFrame:
    marks = {"ann": [True, True, False, False], "bob": [True, False, True, False], "cem": [True, False, False, None]}
    rows = [(f"q{i}", expert, 0, "", "8", ok) for expert, oks in marks.items() for i, ok in enumerate(oks)]
    frame = pd.DataFrame(rows, columns=["question_id", "expert", "sample", "text", "answer", "correct"])
    return frame.astype({"correct": "boolean"})


def metrics(steps: int = 40, **columns) -> pd.DataFrame:
    step = np.arange(steps)
    wrong = np.linspace(0.8, 0.2, steps)
    groups = {"groups_all_wrong": wrong, "groups_mixed": (1 - wrong) / 2, "groups_all_right": (1 - wrong) / 2}
    losses = {
        "loss": 0.5 + 0 * step,
        "loss/grpo": 0.1 + 0 * step,
        "rows/grpo": 8,
        "loss/buffer_sft": 1.0,
        "rows/buffer_sft": step % 9 == 8,
    }
    rest = {"entropy": 0.4, "truncated": 0.1, "unreadable": 0.2, "buffer_size": step % 9, "buffer_flushes": step // 9}
    return pd.DataFrame(
        {"step": step, "reward": 1 - wrong, "reward/ann": 1 - wrong, **groups, **losses, **rest, **columns}
    )


def line(axes, label: str):
    return next(line for line in axes.get_lines() if line.get_label() == label)


def test_error_overlap_draws_the_sizes_that_overlap_counts():
    picture = figures.error_overlap(answers())
    bars = next(axes for axes in picture.figure.axes if axes.patches)
    assert [bar.get_height() for bar in bars.patches] == overlap.wrong_together(answers())["questions"].tolist()
    title = picture.figure._suptitle.get_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "33.3 [0.8, 90.6] % of union, 25.0 [4.6, 69.9] % of all" in title  # q3 of q1, q2, q3; of 4


def cell_texts(picture: figures.Picture) -> dict[tuple[int, int], str]:
    texts = {text.get_position(): text.get_text() for text in picture.figure.axes[0].texts}
    return {place: text.replace("\N{NO-BREAK SPACE}", " ") for place, text in texts.items()}


def test_pairs_are_drawn_twice_with_their_intervals_and_the_diagonal_is_empty():
    shown = cell_texts(figures.error_overlap(answers()))
    assert shown[0, 1] == shown[1, 0] == "33\n[1, 91]" and shown[0, 0] == ""  # ann, bob: q3 of q1, q2, q3
    assert shown[0, 2] == shown[2, 0] == "67\n[9, 99]"  # ann, cem: q2, q3 of q1, q2, q3
    shown = cell_texts(figures.phi(answers()))
    assert shown[1, 0].startswith("0.00\n[-0.") and shown[2, 0].startswith("0.58\n[")  # (1 * 2 - 1 * 0) / sqrt(12)


def test_a_pair_without_a_number_and_a_lone_expert_say_so():
    flawless = answers().assign(correct=pd.array([True] * 12, dtype="boolean"))
    picture = figures.error_overlap(flawless)
    assert "— % of union, 0.0 [0.0," in picture.figure._suptitle.get_text() and cell_texts(picture)[0, 1] == "—"
    assert cell_texts(figures.phi(flawless))[0, 1] == "—"
    assert cell_texts(figures.error_overlap(answers().iloc[:4])) == {(0, 0): "one expert: no pair"}


def test_many_experts_leave_no_room_for_intervals():
    marks = answers().iloc[:4]
    many = pd.concat([marks.assign(expert=f"e{i}") for i in range(6)])
    assert cell_texts(figures.error_overlap(many))[0, 1] == "100"


def test_coverage_is_drawn_in_three_orders_with_each_added_experts_colour():
    picture = figures.coverage(answers(), order=["cem", "bob", "ann"])
    axes = picture.figure.axes[0]
    listed, greedy, mean = axes.containers
    assert listed.lines[0].get_ydata().tolist() == pytest.approx([50, 75, 75])
    assert mean.lines[0].get_ydata().tolist() == pytest.approx([100 * 5 / 12, 100 * 2 / 3 - 100 / 12, 75])
    reach = listed.lines[2][0].get_segments()[1][:, 1].tolist()
    assert reach == [pytest.approx(100 * limit, abs=0.01) for limit in (0.3006, 0.9544)]  # Wilson, 3 of 4
    points = [line for line in axes.get_lines() if line.get_marker() in "osD" and len(line.get_xdata())]
    assert [line.get_color() for line in points[:3]] == [figures.COLOURS[place] for place in (2, 1, 0)]  # ann, bob, cem
    assert len({container.lines[0].get_linestyle() for container in axes.containers}) == 3
    assert picture.data.equals(overlap.coverage(answers()))


@pytest.mark.parametrize("validated", [False, True])
def test_curves_of_stage_2(validated):
    frame = metrics(**({"validation_accuracy/ann": [np.nan] * 39 + [0.5]} if validated else {}))
    panels = {axes.get_title(loc="left"): axes for axes in figures.curves(frame).figure.axes}
    assert ("Validation accuracy (greedy)" in panels) == validated
    assert "Buffer: 4 flushes (ticks)" in panels
    smooth = line(panels["Reward"], "ann").get_ydata()
    assert smooth[20] == pytest.approx(frame["reward"][19:21].mean())  # 40 steps: a window of 2
    assert (
        len(line(panels["Losses, before their weights"], "buffer_sft").get_xdata()) == 4
    )  # only the steps that had rows


def test_curves_of_stage_1_and_of_an_unused_buffer():
    steps = pd.DataFrame({"step": range(10), "loss": 1.0, "validation_loss": [np.nan] * 9 + [1.2]})
    assert [axes.get_title(loc="left") for axes in figures.curves(steps).figure.axes] == ["Loss"]
    unused = figures.curves(metrics(buffer_size=0, buffer_flushes=0))
    assert "Buffer: unused" in [axes.get_title(loc="left") for axes in unused.figure.axes]


def test_rewards_averages_seeds_and_keeps_each():
    picture = figures.rewards({"full": [metrics(), metrics(reward=0.9)], "single": [metrics()]})
    drawn = line(picture.figure.axes[0], "full (2)").get_ydata()
    one = picture.data[(picture.data["arm"] == "full") & (picture.data["measure"] == "reward")]
    assert drawn == pytest.approx((one["seed_0"] + one["seed_1"]) / 2)
    assert drawn[-1] == pytest.approx((0.9 + metrics()["reward"][38:].mean()) / 2)


def scores() -> pd.DataFrame:
    rows = [("full", "ann", "stage 1", 0.3), ("full", "ann", "stage 2", 0.5), ("full", "bob", "stage 2", 0.6)]
    frame = pd.DataFrame(rows, columns=["label", "expert", "stage", "mean"])
    return frame.assign(low=frame["mean"] - 0.1, high=frame["mean"] + 0.1, k=[1, 2, 2], per_seed=[{0: 0.4, 1: 0.6}] * 3)


def test_scores_are_drawn_in_percent_with_their_intervals():
    axes = figures.before_after(scores(), note="n = 4").figure.axes[0]
    drawn = [tuple(np.round(line.get_xdata(), 6)) for line in axes.get_lines()]
    assert drawn == [(20, 40), (30,), (40, 60), (50,), (50, 70), (60,)]
    axes = figures.arms(scores().iloc[1:2].assign(kind="all")).figure.axes[0]
    assert [tuple(np.round(line.get_xdata(), 6)) for line in axes.get_lines()] == [(40, 60), (40, 60), (50,)]
    shares = scores().iloc[:2].assign(k=[1, 2], n=4).rename(columns={"mean": "share"})
    axes = figures.shares(shares, "k", title="pass@k", by="label").figure.axes[0]
    assert axes.containers[0].lines[0].get_ydata().tolist() == pytest.approx([30, 50])


def test_arms_of_a_kind_stand_together_below_its_name_in_its_colour():
    labels, kinds = [f"arm {i}" for i in range(5)], ["one", "many", "one", "many", "one"]
    frame = pd.DataFrame({"label": labels, "kind": kinds, "mean": 0.5, "low": 0.4, "high": 0.6})
    picture = figures.arms(frame.assign(per_seed=[{0: 0.5}] * 5))
    axes = picture.figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [labels[i] for i in (0, 2, 4, 1, 3)]
    heights, colour = {}, {}
    for row, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
        heights[label.get_text()] = row
        colour[label.get_text()] = next(line.get_color() for line in axes.get_lines() if line.get_ydata()[0] == row)
    assert [colour[label] for label in labels] == [figures.COLOURS[kind == "many"] for kind in kinds]
    heading = {text.get_text(): text.get_position()[1] for text in axes.texts if text.get_text() in kinds}
    assert heading["one"] < heights["arm 0"] and heights["arm 4"] + 1 < heading["many"] < heights["arm 1"]
    assert picture.data["label"].tolist() == [labels[i] for i in (0, 2, 4, 1, 3)]


def likelihoods() -> pd.DataFrame:
    """Nats per token of 3 questions; `bob` did not answer the fourth."""
    nats = {("ann", "ann"): (-1, -2, -3, -9), ("ann", "bob"): (-4, -1, -3)}
    nats |= {("bob", "ann"): (-5, -6, -7, -9), ("bob", "bob"): (-1, -2, -3)}
    rows = [(f"q{i}", *names, 4 * v, 4, "validation") for names, values in nats.items() for i, v in enumerate(values)]
    return pd.DataFrame(rows, columns=["question_id", "prompt", "teacher", "logp", "tokens", "split"])


def test_a_prompt_is_distinct_where_its_own_teacher_is_likeliest_and_a_tie_is_not():
    found = overlap.own_teacher_likeliest(likelihoods())
    assert found[["prompt", "n", "own", "chance"]].to_numpy().tolist() == [["ann", 3, 1, 0.5], ["bob", 3, 3, 0.5]]
    assert found["share"].tolist() == pytest.approx([1 / 3, 1])
    assert found["low"].tolist() == pytest.approx([0.0615, 0.4385], abs=1e-4)  # Wilson, 1 and 3 of 3
    longer = likelihoods().assign(tokens=lambda frame: 4 + 4 * (frame["teacher"] == "ann"))  # half the nats per token
    assert overlap.own_teacher_likeliest(longer)["own"].tolist() == [2, 3]
    alone = likelihoods().query("prompt == 'ann' and teacher == 'ann'")
    assert overlap.own_teacher_likeliest(alone)[["n", "own", "chance"]].to_numpy().tolist() == [[4, 4, 1]]


def test_prompt_by_teacher_shows_nats_per_token_of_common_questions_and_frames_the_own_teacher():
    picture = figures.prompt_teacher(likelihoods(), order=["bob", "ann", "not here"])
    cells = picture.data.set_index(["prompt", "teacher"])
    assert cells["nats_per_token"].to_dict() == pytest.approx(
        {("ann", "ann"): -2, ("ann", "bob"): -8 / 3, ("bob", "ann"): -6, ("bob", "bob"): -2}
    )
    assert cells.loc[("ann", "ann"), ["low", "high"]].tolist() == pytest.approx([-2 - 2.4841, -2 + 2.4841], abs=1e-3)
    axes = picture.figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["bob", "ann"]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown[1, 0].startswith("-6.000\n[") and shown[0, 1].startswith("-2.667\n[")  # x: teacher, y: prompt
    assert sorted((frame.get_x(), frame.get_y()) for frame in axes.patches) == [(-0.46, -0.46), (0.54, 0.54)]
    assert "n = 3 validation questions" in picture.figure._supxlabel.get_text()
    lone = figures.prompt_teacher(likelihoods().query("prompt == 'bob'"))  # an arm of one expert still has its teachers
    assert len(lone.figure.axes[0].patches) == 1


def test_a_name_keeps_its_colour_marker_and_line_wherever_it_stands():
    alone, among = figures.looks(["bob"], order=["ann", "bob"]), figures.looks(["ann", "bob"])
    assert alone["bob"] == among["bob"] != among["ann"]
    assert len({look.color for look in figures.looks(list("abcdefg")).values()}) == 7
    many = figures.looks([str(place) for place in range(28)])
    assert len(set(many.values())) == 28 and many["0"].color == many["7"].color


def test_a_picture_shows_itself_and_saves_the_same_bytes_twice(tmp_path):
    picture = figures.error_overlap(answers())
    assert picture._repr_png_().startswith(b"\x89PNG")
    for name in ("one", "two"):
        figures.save(figures.error_overlap(answers()), tmp_path / "deep" / name)
    for suffix in (".pdf", ".png", ".csv"):
        one, two = ((tmp_path / "deep" / name).with_suffix(suffix).read_bytes() for name in ("one", "two"))
        assert one == two and len(one) > 50
    assert pd.read_csv(tmp_path / "deep" / "one.csv")["questions"].sum() == 4


def test_pictures_leave_the_style_and_pyplot_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.phi(answers())
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []
