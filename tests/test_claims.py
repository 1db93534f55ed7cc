"""The paper's values beside ours: which arms a row speaks of, when they may be compared, and by which rule."""

import numpy as np
import pandas as pd
import pytest

from meml_lib import config
from meml_lib.analysis import claims
from meml_lib.analysis.measures import ArmResult, Measured

PANEL = ["equations", "story", "groups"]
PAPER_TEACHERS = {name: {"kind": "table", "path": "a.parquet", "model": value} for name, value in
                  zip(PANEL, ("gold", "deepseek-r1", "doubao-1.5-thinking"), strict=True)}  # fmt: skip


def arm(
    overrides: dict | None = None, *, last="stage 2", right_SQ=None, measure="expert/story", base=None, label=""
) -> ArmResult:
    """An arm of the smoke study at G = 8, whose one measure is given."""
    base = base or config.load_run("smoke.yaml", {"riel.rollouts_per_expert": 8})
    run = config.load_run("smoke.yaml", {"riel.rollouts_per_expert": 8} | (overrides or {}))
    run = config.Run.model_validate(run.model_dump() | {key: getattr(base, key) for key in ("task", "model")} | {
        "experts": run.experts.model_dump() | {"known": base.experts.model_dump()["known"]}
    })  # fmt: skip
    result = ArmResult(label or "arm", label or "Arm", run, PANEL, base.riel.rollouts_per_expert, last)
    if right_SQ is not None:
        values = np.asarray(right_SQ, dtype=float)
        kind = "share" if measure.startswith(("expert", "best")) else "number"
        result.seeds, result.measures = {last: list(range(len(values)))}, {last: {measure: Measured(kind, values)}}
    return result


def paper_run(task="gsm8k", model="Qwen/Qwen2.5-Math-1.5B", **teachers) -> config.Run:
    """The paper's own setting."""
    run = config.load_run("smoke.yaml", {"riel.rollouts_per_expert": 8})
    known = {name: {"system": name, "teacher": PAPER_TEACHERS[name] | teachers.get(name, {})} for name in PANEL}
    released = {"source": "files", "train_questions": None, "validation_questions": 500, "split_seed": 0}
    released |= {"test_questions": 319} if task == "gsm8k-test-resplit" else {}
    values = {"experts": {"panel": PANEL, "known": known}, "task": {"name": task, **released}}
    values |= {"model": {"source": "hub", "path": model, "dtype": "bfloat16"}}
    return config.Run.model_validate(run.model_dump() | values)


NULL = {"riel.objective.mutual": None, "riel.objective.buffer_sft": None}
SIGNED = {"riel.objective.grpo.advantage": "signed"}
GRPO = NULL | SIGNED | {"riel.objective.grpo.scale": "std"}


def fitting(own: ArmResult) -> dict[str, list[str]]:
    """Table -> the rows that speak of this arm."""
    found = {name: [row["row"] for row in claims.rows(name, [own]) if row["arm"]] for name in claims.values()["tables"]}
    return {name: list(dict.fromkeys(rows)) for name, rows in found.items() if rows}


def test_each_arm_has_the_rows_of_its_recipe():
    full = fitting(arm())
    assert full["table-4"] == [f"MEML-GRPO (Expert{i})" for i in range(3)]
    assert full["table-5"] == ["MoE + HSFT + IML"] and full["table-6"] == full["figure-2"] == ["MEML-GRPO"]
    assert full["table-2"] == [f"MoE-SFT (Expert{i})" for i in range(3)] and len(full["table-1"]) == 2
    assert fitting(arm(GRPO))["table-4"] == [f"MoE-SFT-GRPO (Expert{i})" for i in range(3)]
    assert fitting(arm(NULL | SIGNED))["table-4"] == [f"MoE-SFT-Dr.GRPO (Expert{i})" for i in range(3)]
    assert fitting(arm(NULL))["table-5"] == ["MoE"] and "table-4" not in fitting(arm(NULL))
    assert fitting(arm({"riel.objective.mutual": None}))["table-5"] == ["MoE + HSFT"]
    assert fitting(arm({"riel.objective.buffer_sft": None}))["table-5"] == ["MoE + IML"]


@pytest.mark.parametrize("place", range(3))
def test_expert_i_is_the_position_in_the_studys_panel(place):
    only = {"experts.only": [place]}
    one = fitting(arm(GRPO | only))
    assert one["table-4"] == [f"Expert{place}-SFT-GRPO"] and one["table-2"] == [f"Expert{place}-SFT"]
    assert fitting(arm(NULL | SIGNED | only))["table-4"] == [f"Expert{place}-SFT-Dr.GRPO"]
    matched = fitting(arm(GRPO | only | {"riel.rollouts_per_expert": 24}))
    assert matched["table-4"] == [f"Expert{place}-SFT-GRPO, matched budget"]
    assert "table-4" not in fitting(arm(GRPO | only | {"riel.rollouts_per_expert": 16}))
    assert fitting(arm(NULL | only))["table-5"] == ["no MoE, no HSFT, no IML"]
    assert set(fitting(arm({"riel.objective.mutual": None} | only))) == {"table-2"}  # the control that the paper lacks


def test_two_experts_and_supervised_arms_have_rows_of_their_own():
    two = fitting(arm({"experts.only": [0, 1]}))
    assert (
        two["table-4"] == ["MEML-GRPO with N = 2 (Expert0)", "MEML-GRPO with N = 2 (Expert1)"] and "table-5" not in two
    )
    assert "table-1" not in two  # not all of the study's teachers
    assert set(fitting(arm({"experts.only": [1]}, last="stage 1"))) == {"table-2"}
    spent = {"experts.only": [0], "riel.stop_at.rollouts": 9}
    assert set(fitting(arm(GRPO | spent))) == {"table-2"}  # a budget of its own is not the paper's
    longer = arm(GRPO)
    longer.asked = 7  # the study's; this arm takes 3 steps of 2 questions
    assert "table-4" not in fitting(longer)
    longer.asked = 6
    assert "table-4" in fitting(longer)
    assert "table-4" not in fitting(arm({"riel.objective.mutual.form": "literal"}))  # eq. 9's other form is another method
    assert fitting(arm({"experts.only": [1]})) == fitting(arm({"experts.only": [1], "riel.objective.mutual": None}))


def test_ours_is_the_expert_at_that_position():
    chance = np.random.default_rng(0).random((2, 40))
    own = arm(measure="expert/groups", right_SQ=chance < 0.7)
    row = next(row for row in claims.rows("table-4", [own]) if row["row"] == "MEML-GRPO (Expert2)")
    assert row["ours"]["mean"] == pytest.approx((chance < 0.7).mean()) and row["ours"]["n_questions"] == 40


def test_rows_that_no_arm_fits_are_not_run_and_ours_alone_stay_away():
    rows = claims.rows("table-4", [arm(NULL)])
    assert {(row["verdict"], row["arm"]) for row in rows} == {("not run", None)} and all(
        row["in_paper"] for row in rows
    )
    shown = claims.readable(rows)
    assert len(shown) == 15 and {row["our arm"] for row in shown} == {"none of this kind"}


def test_arms_that_share_stage_1_answer_once_and_an_arm_of_stage_1_alone_speaks_for_them():
    right = np.random.default_rng(1).random((2, 30)) < 0.5
    arms = [arm(NULL, label="multi"), arm(last="stage 1", label="moe-sft", right_SQ=right), arm(label="full")]
    rows = [row for row in claims.rows("table-2", arms) if row["row"] == "MoE-SFT (Expert1)"]
    assert [row["arm"] for row in rows] == ["moe-sft"] and rows[0]["ours"]["mean"] == pytest.approx(right.mean())


def test_unknown_cells_are_shown_as_unknown():
    shown = {row["row"]: row for row in claims.readable(claims.rows("table-4", [arm()]))}
    assert (shown["MEML-GRPO (Expert0)"]["paper"], shown["MEML-GRPO (Expert0)"]["sure"]) == ("unknown", "unknown")
    assert shown["MEML-GRPO (Expert1)"]["paper"] == "77.1 (qwen), 60.9 (llama)"
    ours = claims.readable(claims.rows("table-4", [arm({"experts.only": [0, 1]})]))
    assert {row["paper"] for row in ours if "N = 2" in row["row"]} == {"—"}


# --- verdicts ---------------------------------------------------------------------------------------------------------


def verdict(right_SQ, base=None, measure="expert/story", table="table-4", row="MEML-GRPO (Expert1)") -> tuple:
    own = arm(base=base or paper_run(), right_SQ=right_SQ, measure=measure)
    found = next(found for found in claims.rows(table, [own]) if found["row"] == row)
    return found["verdict"], found["delta"], found["paper"]


def like(share: float, seeds: int, questions: int = 1319) -> np.ndarray:
    """Seeds that agree on most questions, so that the design sees small differences."""
    rng = np.random.default_rng(0)
    return (np.linspace(0, 1, questions) < share) ^ (rng.random((seeds, questions)) < 0.02)


def test_an_interval_of_the_difference_without_0_is_not_reproduced():
    said, delta, paper = verdict(right := like(0.60, 5))
    assert (said, paper) == ("not reproduced", 79.6)
    assert delta["mean"] == pytest.approx(right.mean() - 0.796) and delta["high"] < 0
    assert verdict(like(0.95, 5))[0] == "not reproduced"


def test_an_interval_with_0_is_reproduced_only_by_a_design_that_could_have_seen_the_smaller_headline_gain():
    said, delta, _ = verdict(like(0.80, 5))
    assert said == "reproduced" and delta["low"] < 0 < delta["high"] and 100 * delta["detectable"] <= 3.6
    said, delta, _ = verdict(like(0.80, 5, questions=400))
    assert said == "too few data" and 100 * delta["detectable"] > 3.6
    said, delta, _ = verdict(like(0.80, 1))  # one seed sees 3.6 points among questions, but nothing of other seeds
    assert said == "too few data" and 100 * delta["detectable"] <= 3.6


def test_the_papers_sampling_error_is_in_the_interval_where_its_test_size_is_known():
    right = like(0.75, 5)
    gsm8k = verdict(right)[1]
    strategyqa = verdict(right, paper_run("strategyqa"))[1]  # the size of its test set is not known
    alone = arm(right_SQ=right).measured("expert-1").interval()
    assert strategyqa["high"] - strategyqa["low"] == pytest.approx(alone.high - alone.low)
    paper = 0.796 * 0.204 / 1319
    half = np.hypot(alone.high - alone.mean, 1.96 * np.sqrt(paper))
    assert gsm8k["high"] - gsm8k["mean"] == pytest.approx(half, rel=0.05)
    near = like(0.782, 5)  # our interval alone leaves the paper's number out
    assert arm(right_SQ=near).measured("expert-1").interval().high < 0.796 and verdict(near)[0] == "reproduced"


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (paper_run(model="Qwen/Qwen2.5-0.5B"), "other model: Qwen/Qwen2.5-0.5B"),
        (paper_run(story={"model": "gpt-4o"}), "other teachers"),
        (paper_run("gsm8k-test-resplit"), "other task: gsm8k-test-resplit"),
        (config.load_run("smoke.yaml", {"riel.rollouts_per_expert": 8}), "other task: wordproblems"),
    ],
)
def test_another_model_task_or_teacher_is_not_comparable(base, reason):
    said, delta, _ = verdict(like(0.8, 5), base)
    assert said.startswith("not comparable (") and reason in said and delta is None


def test_another_group_size_and_an_average_over_data_sets_are_not_comparable():
    said, delta, paper = verdict(like(0.8, 5), measure="best_validation", table="table-5", row="MoE + HSFT + IML")
    assert (said, delta, paper) == ("not comparable (the paper's is an average over three data sets)", None, 77.3)
    own = arm({"riel.rollouts_per_expert": 4}, base=paper_run(), right_SQ=like(0.8, 5))
    own.group = 4
    row = next(row for row in claims.rows("table-4", [own]) if row["row"] == "MEML-GRPO (Expert1)")
    assert row["verdict"] == "not comparable (G = 4)"
    assert (
        verdict(like(0.8, 5), row="MEML-GRPO (Expert0)", measure="expert/equations")[0]
        == "not comparable (the paper's value is unknown)"
    )


def test_the_headline_is_relative_and_in_points_against_the_preferred_baseline():
    rng = np.random.default_rng(4)
    truth = rng.random(200) < 0.6
    full, weak, strong = (truth ^ (rng.random((3, 200)) < noise) for noise in (0.05, 0.35, 0.25))
    arms = []
    for label, overrides, right, validation in (
        ("full", {}, full, 0.9),
        ("weak", NULL, weak, 0.7),
        ("strong", GRPO, strong, 0.8),
    ):
        arms.append(arm(overrides, right_SQ=right, measure="best_validation", label=label))
        arms[-1].validation = {"stage 2": dict.fromkeys(arms[-1].seeds["stage 2"], validation)}
        arms[-1].questions = {"stage 2": pd.Index(range(200))}
    points, relative = (row for row in claims.rows("headline", arms) if row["model"] == "qwen")
    assert (
        points["arm"] == relative["arm"] == "full against strong"
        and points["paper"] == 3.6
        and relative["paper"] == 4.89
    )
    assert points["ours"]["mean"] == pytest.approx(full.mean() - strong.mean())
    assert relative["ours"]["mean"] == pytest.approx(full.mean() / strong.mean() - 1)
    width = (relative["ours"]["high"] - relative["ours"]["low"]) / (points["ours"]["high"] - points["ours"]["low"])
    assert width == pytest.approx(1 / strong.mean(), rel=0.25)  # the baseline's own error comes on top


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_name_what_differs_and_what_the_paper_does_not_give_and_nothing_else():
    base = config.load_run("smoke.yaml", {"riel.rollouts_per_expert": 8, "riel.objective.buffer_sft.wrong_over": 6})
    own = {row["setting"]: row for row in claims.settings(base)}
    assert (own["Task"]["paper"], own["Task"]["ours"]) == ("gsm8k or strategyqa or mathqa", "wordproblems")
    assert (
        own["B, examples that fill the buffer"]["ours"] == "4"
        and own["B, examples that fill the buffer"]["sure"] == "A"
    )
    assert own["Eq. 9, mutual learning"]["ours"].startswith("forward_kl (as printed")
    assert own["lambda1, weight of mutual learning"]["paper"] == "not given"
    same = (
        "Experts N",
        "G, rollouts of an expert to a question",
        "K, more wrong rollouts than this offer the question",
    )
    assert not set(same) & set(own)
    paper = {row["setting"] for row in claims.settings(paper_run())}
    assert not {"Task", "Model", "Teachers"} & paper
    literal = config.load_run(
        "smoke.yaml", {"riel.objective.mutual.form": "literal", "mef.epochs": 1, "mef.steps": None}
    )
    assert not {"Eq. 9, mutual learning", "Length of stage 1"} & {row["setting"] for row in claims.settings(literal)}
    without = {row["setting"] for row in claims.settings(config.load_run("smoke.yaml", NULL))}
    assert not {name for name in without if "buffer" in name or "Eq. 9" in name}


def test_every_setting_names_a_value_that_a_run_has():
    run = config.load_run("smoke.yaml")
    for item in claims.values()["settings"]:
        assert claims._setting(run, item["key"]) != "—", item
    with pytest.raises(KeyError):
        claims._setting(run, "riel.no_such_key")


def test_every_row_of_the_paper_is_there_once_and_says_how_sure_it_is():
    tables = claims.values()["tables"]
    names = [(table, row["row"]) for table in tables for row in tables[table]["rows"]]
    assert len(set(names)) == len(names)
    assert {row["sure"] for table in tables.values() for row in table["rows"] if row["in_paper"]} <= {
        "A",
        "B",
        "C",
        "unknown",
    }
    cells = tables["table-4"]["rows"]
    known = {row["row"]: row["cells"]["qwen"]["gsm8k"] for row in cells if "qwen" in row["cells"]}
    assert known == {
        "Expert1-SFT-GRPO": 73.1, "Expert1-SFT-Dr.GRPO": 76.1, "MoE-SFT-GRPO (Expert1)": 75.6,
        "MoE-SFT-Dr.GRPO (Expert1)": 77.7, "MEML-GRPO (Expert1)": 79.6,
    }  # fmt: skip
    assert [row["cells"]["llama"]["average"] for row in tables["table-5"]["rows"]] == [54.3, 55.5, 59.8, 57.5, 61.8]
