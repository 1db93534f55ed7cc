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
    assert "25.0 % of all" in picture.figure._suptitle.get_text()  # q3 of 4
    assert "33.3 % of union" in picture.figure._suptitle.get_text()  # q3 of q1, q2, q3


def test_overlap_of_flawless_experts_is_drawn_as_undefined():
    picture = figures.error_overlap(answers().assign(correct=pd.array([True] * 12, dtype="boolean")))
    assert "undefined of union, 0.0 % of all" in picture.figure._suptitle.get_text()
    assert figures.phi(answers()).data.loc[0, "bob"] == 0  # 1 both right, 1 both wrong, 1 + 1 apart


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
    axes = figures.arms(scores().iloc[1:2]).figure.axes[0]
    assert [tuple(np.round(line.get_xdata(), 6)) for line in axes.get_lines()] == [(40, 60), (40, 60), (50,)]
    axes = figures.pass_at_k(scores().iloc[:2].assign(k=[1, 2])).figure.axes[0]
    assert line(axes, "full").get_ydata().tolist() == pytest.approx([30, 50])


def test_a_name_keeps_its_colour_marker_and_line_wherever_it_stands():
    alone, among = figures.looks(["bob"], order=["ann", "bob"]), figures.looks(["ann", "bob"])
    assert alone["bob"] == among["bob"] != among["ann"]
    assert len({look.color for look in figures.looks(list("abcdefg")).values()}) == 7


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
