"""The report on a small made-up study: every number traced to its table, what is missing said, one plain page."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.proportion import proportion_confint

from meml_lib import config, runs, schema
from meml_lib.analysis import claims, readable, report
from meml_lib.analysis.measures import ArmResult, Measured
from meml_lib.runs import RunFolder

ARMS = """
title: "Made-up study"
run_file: smoke.yaml
overrides: {experts.panel: [equations, story, groups]}
seeds: [0, 1]
arms:
  single:
    label: Single expert
    overrides: {experts.only: [0], riel.objective.mutual: null, riel.objective.buffer_sft: null}
  multi:
    label: "Multi | expert"
    overrides: {riel.objective.mutual: null, riel.objective.buffer_sft: null}
  full: {label: MEML-GRPO}
  story-sft: {label: Story SFT, last_stage: mef, overrides: {experts.only: [1]}}
  story-grpo: {label: Story GRPO, use: [objectives/grpo.yaml], overrides: {experts.only: [1]}}
  story-g12:
    label: "Story GRPO, G = 12"
    use: [objectives/grpo.yaml]
    overrides: {experts.only: [1], riel.rollouts_per_expert: 12}
compare:
  table-5: {full: {multi: mean_expert}, multi: {single: best_validation}}
  table-4: {full: {story-grpo: expert-1, story-sft: expert-1, single: vote}}
notes: |
  It shows **nothing**. <script>alert(1)</script>
"""
PANEL = ("equations", "story", "groups")
CHANCE = {"single": 0.5, "multi": 0.6, "full": 0.8, "story-grpo": 0.55, "story-g12": 0.65}
QUESTIONS, SAMPLES = 30, 4
MISSING = ("multi", 1)  # the run whose stage 2 is left out


def answers(rng, panel, chance, split="test", samples=1, questions=QUESTIONS) -> pd.DataFrame:
    rows = []
    for q in range(questions):
        for expert in panel:
            for sample in range(samples):
                ok = None if rng.random() < 0.1 else bool(rng.random() < chance)
                answer = None if ok is None else "8" if ok else str(rng.integers(3))
                rows.append((f"made-{split}-{q}", expert, sample, f"step | one\n```\n<b>#### {answer}", answer, ok))
    frame = pd.DataFrame(rows, columns=["question_id", "expert", "sample", "text", "answer", "correct"])
    return frame.astype({"correct": "boolean"}).assign(tokens=9, ended=True)


def likelihoods(rng, panel) -> pd.DataFrame:
    rows = [(f"made-validation-{q}", p, t) for q in range(8) for p in panel for t in panel]
    frame = pd.DataFrame(rows, columns=["question_id", "prompt", "teacher"]).assign(split="validation", tokens=4)
    return frame.assign(logp=-rng.random(len(frame)) - 2.0 * (frame["prompt"] != frame["teacher"]))


def metrics(rng, panel, losses, rise=1 / 40, steps=20) -> list[dict]:
    records = []
    for step in range(steps):
        wrong = 0.8 - step * rise
        shares = {"groups_all_wrong": wrong, "groups_mixed": 0.1, "groups_all_right": 0.9 - wrong}
        rows = {f"rows/{loss}": int(step % 4 == 3 or loss != "buffer_sft") for loss in losses}
        parts = {f"loss/{loss}": float(rng.random()) for loss in losses} | rows
        experts = {
            f"{name}/{e}": value for e in panel for name, value in (("reward", 1 - wrong), ("best", 1), ("worst", 1))
        }
        spent = {"rollouts": 24 * (step + 1), "ground_truth_items": step // 4 * 4, "update_tokens": 1000 * (step + 1)}
        buffer = {"buffer_size": step % 4, "buffer_flushes": step // 4}
        rest = {
            "questions_all_wrong": wrong / 2,
            "truncated": step / 1000,
            "unreadable": step / 500,
            "answer_tokens": 9.0,
        }
        rest |= {"loss": 1.0, "grad_norm": 1.0, "entropy": 0.5, "lr": 1e-4}
        records.append({"step": step, "reward": 1 - wrong, **shares, **parts, **experts, **spent, **buffer, **rest})
    return records


def fill(study: config.Study, rng: np.random.Generator) -> None:
    """Every stage's tables and metrics, but of the missing run's stage 2."""
    texts = [(f"made-test-{q}", f"question {q}", "8", 1 + q % 2) for q in range(QUESTIONS)]
    questions = pd.DataFrame(texts, columns=["question_id", "text", "gold", "difficulty"])
    for arm in study.arms:
        for seed in study.seeds:
            run = study.run(arm, seed)
            panel = list(run.experts.panel)
            for stage in ("mef", "riel"):
                folder = RunFolder(run.folder(stage))
                left_out = stage == "riel" and ((arm, seed) == MISSING or study.arms[arm].last_stage == "mef")
                if left_out or folder.status["state"] == "done":  # a shared stage 1
                    continue
                chance = 0.4 if stage == "mef" else CHANCE[arm]
                folder.write_table("test_greedy", answers(rng, panel, chance))
                folder.write_table("validation_greedy", answers(rng, panel, chance, split="validation"))
                folder.write_table("test_sampled", answers(rng, panel, chance, samples=SAMPLES))
                folder.write_table("test_questions", questions)
                if stage == "mef":
                    known = answers(rng, panel, 0.7, split="train")
                    left_out = (known["question_id"] == "made-train-3") & (known["expert"] == "groups")
                    folder.write_table("teacher_answers", known[~left_out])
                    folder.write_table("prompt_teacher", likelihoods(rng, panel))
                    records = [{"step": n, "loss": 2.0 - n / 20, "lr": 1e-3, "grad_norm": 1.0} for n in range(20)]
                else:
                    records = metrics(rng, panel, [name for name, values in run.riel.objective if values is not None])
                for record in records:
                    folder.append_metrics(record)
                runs.write_manifest(folder, inputs={})
                runs.end_manifest(folder, wall_s=12.0)
                folder.set_status("done")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> config.Study:
    """Six arms, two seeds; one run is missing. Read only."""
    place = tmp_path_factory.mktemp("study")
    (place / "made-up.yaml").write_text(ARMS)
    study = config.load_study(place / "made-up.yaml", reports_dir=place / "reports")
    fill(study, np.random.default_rng(5))
    return study


@pytest.fixture(scope="module")
def data(study) -> dict:
    return report.gather(study)


@pytest.fixture
def spare(study, tmp_path) -> config.Study:
    """A copy to change."""
    shutil.copytree(study.folder, tmp_path / study.name)
    return config.load_study(study.params_file, reports_dir=tmp_path)


def table(study, arm, seed, stage="riel", name="test_greedy") -> pd.DataFrame:
    return RunFolder(study.run(arm, seed).folder(stage)).read_table(name)


def right(frame) -> pd.DataFrame:
    return frame.assign(ok=frame["correct"].fillna(False).astype(float)).pivot(
        index="question_id", columns="expert", values="ok"
    )


def score(data, arm, measure, stage="stage 2") -> dict:
    found = [row for row in data["scores"] if (row["arm"], row["stage"], row["measure"]) == (arm, stage, measure)]
    assert len(found) == 1, (arm, measure, len(found))
    return found[0]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_every_score_is_that_of_the_tables(study, data):
    each = [right(table(study, "full", seed)) for seed in (0, 1)]
    got = score(data, "full", "mean_expert")
    means = [frame.to_numpy().mean() for frame in each]
    assert got["mean"] == pytest.approx(np.mean(means))
    assert got["per_seed"] == {str(seed): pytest.approx(mean) for seed, mean in enumerate(means)}
    assert (got["n_questions"], got["n_seeds"]) == (QUESTIONS, 2)
    assert got["low"] < got["mean"] < got["high"]
    story = np.mean([frame["story"].mean() for frame in each])
    assert score(data, "full", "expert/story")["mean"] == pytest.approx(story)
    any_right = np.mean([frame.max(axis=1).mean() for frame in each])
    assert score(data, "full", "any_expert")["mean"] == pytest.approx(any_right)
    assert score(data, "full", "all_wrong")["mean"] == pytest.approx(1 - any_right)
    unreadable = np.mean([table(study, "full", seed)["correct"].isna().mean() for seed in (0, 1)])
    assert score(data, "full", "unreadable")["mean"] == pytest.approx(unreadable) and unreadable > 0
    both = pd.concat(each)
    shared = (both.max(axis=1) == 0).sum() / (both.min(axis=1) == 0).sum()
    assert score(data, "full", "overlap_iou")["mean"] == pytest.approx(shared)
    story = both[both["story"] == 0]
    assert score(data, "full", "corrected/story")["mean"] == pytest.approx(story.max(axis=1).mean())
    off = np.triu_indices(3, 1)
    phi = np.mean([frame.corr().to_numpy()[off].mean() for frame in each])
    assert score(data, "full", "mean_phi")["mean"] == pytest.approx(phi)
    odd = both[both.index.str.extract(r"(\d+)$")[0].astype(int).to_numpy() % 2 == 1]
    assert score(data, "full", "difficulty/2")["mean"] == pytest.approx(odd.to_numpy().mean())


def test_the_best_expert_is_chosen_on_validation_in_each_seed(study, data):
    best = []
    for seed in (0, 1):
        validation = right(table(study, "full", seed, name="validation_greedy"))[list(PANEL)]
        best.append(right(table(study, "full", seed))[validation.mean().idxmax()].mean())
    assert score(data, "full", "best_validation")["mean"] == pytest.approx(np.mean(best))


def test_pass_at_k_is_the_mean_over_experts_and_seeds(study, data):
    def chance(wrong: int, k: int) -> float:
        return 1 - np.prod([(wrong - i) / (SAMPLES - i) for i in range(k)])

    for k in (1, 2, 4):
        means = []
        for seed in (0, 1):
            sampled = table(study, "full", seed, name="test_sampled")
            hits = sampled["correct"].fillna(False).astype(int).groupby([sampled["question_id"], sampled["expert"]])
            means.append(np.mean([chance(SAMPLES - c, k) for c in hits.sum()]))
        assert score(data, "full", f"pass@{k}")["mean"] == pytest.approx(np.mean(means))


def test_a_single_expert_has_neither_vote_nor_overlap(data):
    measures = {row["measure"] for row in data["scores"] if row["arm"] == "single"}
    assert "mean_expert" in measures and not measures & {"vote", "overlap_iou", "mean_phi", "all_wrong"}


def pair_of(data, arm, against) -> dict:
    return next(pair for pair in data["pairs"] if (pair["arm"], pair["against"]) == (arm, against))


def test_pairs_are_compared_on_the_seeds_that_both_have(study, data):
    pair = pair_of(data, "MEML-GRPO", "Multi | expert")
    difference = right(table(study, "full", 0)).mean(axis=1) - right(table(study, "multi", 0)).mean(axis=1)
    assert pair["n_seeds"] == 1  # multi's seed 1 has not run
    assert pair["mean"] == pytest.approx(difference.mean())
    half = 2.045 * difference.std() / np.sqrt(QUESTIONS)  # t with 29 degrees of freedom
    assert pair["high"] - pair["mean"] == pytest.approx(half, rel=1e-3)


def test_a_pair_is_compared_in_its_measure_after_each_arms_last_stage(study, data):
    def mean(frames: Iterable[pd.DataFrame]) -> float:
        return np.mean([right(frame)["story"].mean() for frame in frames])

    full, sft = (
        [table(study, arm, seed, stage) for seed in (0, 1)] for arm, stage in (("full", "riel"), ("story-sft", "mef"))
    )
    pair = pair_of(data, "MEML-GRPO", "Story SFT")
    assert pair["measure"] == "expert-1" and pair["mean"] == pytest.approx(mean(full) - mean(sft))
    vote = pair_of(data, "MEML-GRPO", "Single expert")["mean"]  # the vote of one is its own
    assert vote == pytest.approx(score(data, "full", "vote")["mean"] - score(data, "single", "mean_expert")["mean"])


def test_p_values_are_corrected_within_a_table_and_only_they_make_a_reading(data):
    family = [pair for pair in data["pairs"] if pair["table"] == "table-4"]
    ordered = sorted(pair["p"] for pair in family)
    corrected = np.maximum.accumulate([min(1.0, p * (len(ordered) - n)) for n, p in enumerate(ordered)])
    assert sorted(pair["p_holm"] for pair in family) == pytest.approx(list(corrected)) and len(family) == 3
    base = {
        "table": "t",
        "arm": "a",
        "against": "b",
        "measure": "vote",
        "n_questions": 9,
        "n_seeds": 2,
        "detectable": 0.1,
    }

    def reading(mean: float, p: float, p_holm: float) -> str:
        pair = {**base, "mean": mean, "low": mean - 0.01, "high": mean + 0.01, "p": p, "p_holm": p_holm}
        return readable._pair_row(pair, PANEL)["reading"]

    assert reading(0.2, 0.001, 0.04) == "higher" and reading(-0.2, 0.001, 0.04) == "lower"
    assert reading(0.2, 0.04, 0.08) == "no difference shown"  # though its interval leaves 0 out
    base["n_seeds"] = 1
    assert reading(0.2, 0.001, 0.004) == "one seed: no reading"


def test_comparisons_to_come_count_in_holms_family():
    study_ = SimpleNamespace(comparisons=[schema.Comparison("t", *pair, "vote") for pair in (("a", "b"), ("a", "c"))])
    values_SQ = np.array([[0.0, 1.0, 0.0, 0.0, 1.0] * 6] * 2)
    values_SQ[1, 7] = 1.0
    arms = {name: ArmResult(name, name, None, ["x", "y"], 8) for name in "abc"}
    arms["a"].run = arms["b"].run = arms["c"].run = SimpleNamespace(experts=SimpleNamespace(panel=["x", "y"]))
    for name, sign in (("a", 1.0), ("b", -1.0)):  # c has not run
        arms[name].seeds["stage 2"], arms[name].questions["stage 2"] = [0, 1], pd.Index(range(30))
        arms[name].measures["stage 2"] = {"vote": Measured("number", sign * values_SQ)}
    ran, to_come = report._pairs(study_, arms)
    assert ran["p"] is not None and ran["p_holm"] == pytest.approx(min(1.0, 2 * ran["p"]))
    assert to_come["mean"] is None and to_come["p_holm"] is None


def test_training_is_summed_up_from_the_metrics(data):
    row = next(s["training"] for s in data["stages"] if (s["name"], s["seed"]) == ("full", 1))
    assert row["groups_all_wrong_start"] == pytest.approx((0.8 + 0.775) / 2)  # the first 2 of 20 steps
    assert row["groups_all_wrong_end"] == pytest.approx(0.8 - (18 + 19) / 80)
    assert row["steps_with_gradient"] == {"grpo": 20, "mutual": 20, "buffer_sft": 5}
    assert row["buffer_flushes"] == 4 and row["steps"] == 20
    assert [row[name] for name in readable.BUDGETS] == [480, 16, 20000]  # the last step's, which counts from the start


def test_teachers_are_compared_on_questions_that_all_answered(study, data):
    (three,) = data["teachers"]  # a teacher alone shares no error
    marks = right(table(study, "full", 0, stage="mef", name="teacher_answers")).dropna()
    *pairs, everyone = three["shared"]
    assert (three["left_out"], everyone["n"], len(pairs)) == (1, QUESTIONS - 1, 3)
    assert everyone["iou"] == pytest.approx((marks.max(axis=1) == 0).sum() / (marks.min(axis=1) == 0).sum())
    beside = next(row["ours"] for row in data["paper"] if row["row"].startswith("Errors shared by all teachers"))
    assert [beside[key] for key in ("mean", "low", "high")] == [everyone[key] for key in ("iou", "iou_low", "iou_high")]
    assert beside["n_questions"] == everyone["any_wrong"] > pairs[0]["any_wrong"]


def test_a_sign_of_trouble_stands_with_its_seeds_steps_and_figure(spare):
    for seed in spare.seeds:
        folder = RunFolder(spare.run("story-g12", seed).folder("riel"))
        (folder.path / "metrics.jsonl").unlink()
        for record in metrics(np.random.default_rng(0), ["story"], ["grpo"], rise=0.0, steps=60):
            folder.append_metrics(record | {"groups_mixed": 0.0, "groups_all_wrong": 0.8, "entropy": 0.001})
    data = report.gather(spare)
    found = [(stage["name"], stage["seed"], sign["name"]) for stage in data["stages"] for sign in stage["signs"]]
    assert ("story-g12", 0, "reward does not rise") in found and ("story-g12", 1, "reward does not rise") in found
    row = next(row for row in report.tables(data)["signs"].to_dict("records") if row["arm"] == "Story GRPO, G = 12")
    assert "seed 0, step " in row["seen"] and "seed 1, step " in row["seen"] and "`" in row["what to try"]
    assert row["figure"].startswith("jobs/03_riel-story-g12-seed-0, panel Reward")


# --- what is there and what is not ------------------------------------------------------------------------------------


def test_an_arm_of_stage_1_alone_misses_nothing(data):
    assert not [stage for stage in data["stages"] if stage["name"] == "story-sft"]  # no stage 2, ever
    frames = report.tables(data)
    row = frames["arms"].set_index("arm").loc["Story SFT"]
    assert row["mean expert, stage 2"] == "—" and row["mean expert, stage 1"] == row["best on validation"] != "—"
    assert "Story SFT" not in [*frames["training"]["arm"], *frames["budgets"]["arm"]]


def test_arms_stand_in_the_order_of_the_papers_tables(data):
    order = [(arm["arm"], arm["tables"]) for arm in data["arms"]]
    assert order == [
        ("story-sft", ["table-2"]),
        ("story-grpo", ["table-4"]),
        ("story-g12", ["table-4"]),
        ("single", ["table-5"]),
        ("multi", ["table-5"]),
        ("full", ["table-4", "table-5"]),
    ]


def test_what_has_not_run_is_listed(spare):
    stages = report.gather(spare)["stages"]
    missing = [(s["name"], s["seed"], s["stage"], s["state"]) for s in stages if s["state"] != "done"]
    assert missing == [("multi", 1, "stage 2", "not run")]
    RunFolder(spare.run("multi", 1).folder("riel")).set_status("failed", "killed by the system")
    tables = report.tables(report.gather(spare))
    assert "0: done; 1: failed: killed by the system" in tables["runs"]["state"].tolist()
    assert tables["arms"].set_index("arm")["mean expert, stage 2"]["Multi | expert"].endswith("(1\xa0of\xa02 seeds)")


def test_a_study_without_any_run_still_reports(tmp_path):
    page = report.write(config.load_study("studies/smoke.yaml", reports_dir=tmp_path)).read_text()
    assert "Some training stages have no result" in page and "multi stage 2: not run" in page


def test_a_report_by_uncommitted_code_says_so_first_and_where_the_changes_are(tmp_path, monkeypatch):
    study = config.load_study("studies/smoke.yaml", reports_dir=tmp_path)
    monkeypatch.setattr(runs, "tree", lambda: runs.Tree("c" * 40, b"a diff"))
    page = report.write(study).read_text()
    head, mark = [line for line in (study.folder / "report" / "report.md").read_text().splitlines() if line][:2]
    assert head.startswith("# ") and mark.startswith("> **Uncommitted changes:") and "The code of this report differed" in mark
    (file,) = re.findall(r"`(report/changes-\w+\.patch)`", mark)
    assert (study.folder / file).read_bytes() == b"a diff"
    assert page.index("</h1>") < page.index("<blockquote>") < page.index("Uncommitted changes:") < page.index("<h2")
    monkeypatch.setattr(runs, "tree", lambda: runs.Tree("c" * 40, b""))
    assert "Uncommitted" not in report.write(study).read_text()


def test_stages_by_uncommitted_code_are_counted_and_their_changes_named(spare):
    dirty = {"dirty": True, "changes": "../../../../changes-1.patch"}
    folders = [RunFolder(spare.run("full", seed).folder("riel")) for seed in (0, 1)]
    folders += [RunFolder(spare.run("multi", 0).folder("riel"))]
    for folder, changes in zip(folders, ({}, {"changes": "changes-2.patch"}, {"changes": None}), strict=True):
        folder.write_json("manifest", folder.read_json("manifest") | dirty | changes)
    data = report.gather(spare)
    marked = {("full", 0, "stage 2"), ("full", 1, "stage 2"), ("multi", 0, "stage 2")}
    for stage in data["stages"]:  # whatever the tree is that this test runs on
        stage["dirty"] = (stage["name"], stage["seed"], stage["stage"]) in marked
    data["commit"]["dirty"] = False
    said = readable.uncommitted(data)
    done = sum(stage["state"] == "done" for stage in data["stages"])
    assert f"The code of 3 of {done} training stages differed" in said and "(some were not kept)" in said
    assert "`changes-1.patch`, `runs/full/seed-1/stage2/changes-2.patch`" in said


def test_seeds_tested_on_other_questions_are_an_error(spare):
    folder = RunFolder(spare.run("full", 1).folder("riel"))
    folder.write_table("test_greedy", table(spare, "full", 1).replace({"question_id": {"made-test-4": "made-test-99"}}))
    message = "full, stage 2: seeds 0 and 1 were tested on different questions \\(made-test-4\\)"
    with pytest.raises(ValueError, match=message):
        report.gather(spare)


def test_arms_tested_on_different_questions_make_no_pairs(spare):
    for seed in (0, 1):
        for name in ("test_greedy", "test_sampled", "test_questions"):
            other = table(spare, "single", seed, name=name).replace({"question_id": {"made-test-4": "made-test-99"}})
            RunFolder(spare.run("single", seed).folder("riel")).write_table(name, other)
    with pytest.raises(ValueError, match="and single were tested on different questions"):
        report.gather(spare)


def test_the_command_makes_the_same_study_again(study):
    assert report.command(study).endswith("made-up.yaml --set 'seeds=[0, 1]'")
    other = config.load_study(study.params_file, ["riel.steps=7"])
    assert "--set 'riel.steps=7'" in report.command(other)


# --- every number traced ----------------------------------------------------------------------------------------------

Cell = tuple[str, tuple[str, ...], str]  # table, its row's names, column
NAMES = {
    "differences": ["table", "arm", "against"],
    "experts": ["arm", "expert"],
    "signs": ["arm", "sign"],
    "prompts": ["stage 1", "seed", "prompt"],
    "teachers": ["panel", "teacher"],
    "shared": ["teachers"],
    "difficulty": ["arm", "stage"],
    "overlap": ["arm", "stage"],
    "paper": ["table", "row"],
    "checklist": ["checklist", "item"],
    "runs": ["run", "stage"],
}
FIXED = {"arms": ["paper"], "runs": ["seeds", "folder"], "paper": ["paper", "sure", "data set", "our arm", "verdict"]}
FIXED |= {
    "checklist": ["evidence"],
    "differences": ["accuracy of"],
    "prompts": ["by chance, %"],
    "signs": ["what to try", "figure"],
}
"""Columns whose digits come from params or paper.yaml, not from a run; the table of settings is all of that kind."""


def cells(study: config.Study) -> dict[Cell, str]:
    """Every cell of the report's tables, but those that name a row."""
    found = {}
    for name, frame in report.tables(report.gather(study)).items():
        keys = NAMES.get(name, [frame.columns[0]]) if len(frame) else []
        for row in frame.to_dict("records"):
            of_row = tuple(str(row[key]) for key in keys)
            found |= {(name, of_row, column): str(row[column]) for column in frame if column not in keys}
    return found


@pytest.fixture(scope="module")
def before(study) -> dict[Cell, str]:
    return cells(study)


def changed(study: config.Study, before: dict[Cell, str], after: dict[Cell, str] | None = None) -> set[Cell]:
    after = after or cells(study)
    return {cell for cell in before.keys() | after.keys() if before.get(cell) != after.get(cell)}


def redrawn(study, name: str, where: Iterable[tuple[str, int, str]], chance: float = 0.25) -> None:
    """Write other answers into a table of these (arm, seed, stage)."""
    rng = np.random.default_rng(7)
    for arm, seed, stage in where:
        folder, panel = RunFolder(study.run(arm, seed).folder(stage)), list(study.run(arm, seed).experts.panel)
        old = folder.read_table(name)
        new = likelihoods(rng, panel) if name == "prompt_teacher" else old.assign(correct=rng.random(len(old)) < chance)
        new = new if name == "prompt_teacher" else new.assign(answer=new["correct"].map({True: "8", False: "1"}))
        folder.write_table(name, new.astype({"correct": "boolean"}) if "correct" in new else new)


AFTER = ["best on validation", "unreadable"]
DIFFERENCE = ["difference (points)", "smallest detectable", "p", "p, Holm"]
OURS = ["ours", "95 % interval of ours", "smallest detectable"]
ERRORS = ["wrong for all, %", "intersection / union, %", "mean phi"]
ERRORS += [f"errors of {expert} that another answers rightly, %" for expert in PANEL]
LEVELS = ["difficulty 1", "difficulty 2"]


def of(name: str, rows: Iterable[tuple[str, ...]], columns: Iterable[str]) -> set[Cell]:
    return {(name, row, column) for row in rows for column in columns}


def paper_rows(*rows: tuple[str, str]) -> set[Cell]:
    return of("paper", rows, OURS)


HEADLINE = [("headline", row["row"]) for row in claims.values()["tables"]["headline"]["rows"]]
MEML = [("table-4", f"MEML-GRPO (Expert{i})") for i in range(3)] + [
    ("table-5", "MoE + HSFT + IML"),
    ("table-6", "MEML-GRPO"),
]
PAIRS = [("table-4", "MEML-GRPO", other) for other in ("Story GRPO", "Story SFT", "Single expert")]
PAIRS += [("table-5", "MEML-GRPO", "Multi | expert"), ("table-5", "Multi | expert", "Single expert")]
HOLM = of("differences", PAIRS, ["p, Holm", "reading"])  # may change with any pair of their table


def test_a_test_answer_of_stage_2_moves_its_own_arms_numbers_and_no_other(spare, before):
    redrawn(spare, "test_greedy", [("full", 0, "riel"), ("full", 1, "riel")])
    must = of("arms", [("MEML-GRPO",)], ["mean expert, stage 2", "majority vote", "any expert", *AFTER])
    must |= of("experts", [("MEML-GRPO", expert) for expert in PANEL], ["stage 2"])
    must |= of("overlap", [("MEML-GRPO", "stage 2")], ERRORS) | of("difficulty", [("MEML-GRPO", "stage 2")], LEVELS)
    must |= of("differences", PAIRS[:4], DIFFERENCE[:3]) | paper_rows(*HEADLINE, *MEML)
    moved = changed(spare, before)
    assert must <= moved, must - moved
    assert moved <= must | HOLM, moved - must - HOLM


def test_a_test_answer_of_stage_1_moves_all_that_share_it_and_no_other(spare, before):
    redrawn(spare, "test_greedy", [("full", 0, "mef"), ("story-sft", 1, "mef")], chance=0.9)
    three, story = ["Multi | expert", "MEML-GRPO"], ["Story SFT", "Story GRPO", "Story GRPO, G = 12"]
    must = of("arms", [(arm,) for arm in three + story], ["mean expert, stage 1"]) | of("arms", [("Story SFT",)], AFTER)
    must |= of("experts", [(arm, expert) for arm in three for expert in PANEL], ["stage 1"])
    must |= of("experts", [(arm, "story") for arm in story], ["stage 1"])
    stages = ["Stage 1: equations, story, groups", "Stage 1: story"]
    must |= of("overlap", [(stages[0], "stage 1")], ERRORS) | of(
        "difficulty", [(name, "stage 1") for name in stages], LEVELS
    )
    must |= of("differences", [("table-4", "MEML-GRPO", "Story SFT")], DIFFERENCE[:3])
    must |= paper_rows(*[("table-2", f"MoE-SFT (Expert{i})") for i in range(3)], ("table-2", "Expert1-SFT"))
    moved = changed(spare, before)
    assert must <= moved, must - moved
    assert moved <= must | HOLM, moved - must - HOLM


def test_validation_answers_choose_the_best_expert_the_tie_breaker_and_the_baseline(spare, before):
    chosen = table(spare, "full", 0, name="validation_greedy")
    best = right(chosen)[list(PANEL)].mean().idxmin()
    RunFolder(spare.run("full", 0).folder("riel")).write_table(
        "validation_greedy", chosen.assign(correct=pd.array(chosen["expert"] == best, dtype="boolean"))
    )
    must = of("arms", [("MEML-GRPO",)], ["validation, best expert", "best on validation"])
    must |= paper_rows(*HEADLINE, *MEML[-2:])
    may = must | of("arms", [("MEML-GRPO",)], ["majority vote"]) | HOLM
    may |= of("differences", [("table-4", "MEML-GRPO", "Single expert")], DIFFERENCE)  # of the vote
    moved = changed(spare, before)
    assert must <= moved, must - moved
    assert moved <= may, moved - may


def test_the_headline_is_against_the_baseline_that_validation_prefers(spare, data):
    def shown(data) -> dict:
        row = next(row for row in data["paper"] if row["table"] == "headline")
        return {**row["ours"], "arm": row["arm"]}

    best = {arm: [right(table(spare, arm, s, name="validation_greedy")).mean().max() for s in seeds]
            for arm, seeds in {"single": (0, 1), "multi": (0,), "story-grpo": (0, 1)}.items()}  # fmt: skip
    assert np.mean(best.pop("multi")) > max(map(np.mean, best.values()))  # on one seed alone: it takes no part
    preferred, other = sorted(best, key=lambda arm: -np.mean(best[arm]))
    assert shown(data)["arm"] == f"MEML-GRPO against {spare.arms[preferred].label}"
    for seed in (0, 1):  # perfect on validation, not on test
        RunFolder(spare.run(other, seed).folder("riel")).write_table(
            "validation_greedy",
            table(spare, other, seed, name="validation_greedy").assign(correct=pd.array([True] * 30)),
        )
    after = report.gather(spare)
    full, baseline = (score(after, arm, "best_validation")["mean"] for arm in ("full", other))
    assert shown(after)["arm"] == f"MEML-GRPO against {spare.arms[other].label}"
    assert shown(after)["mean"] == pytest.approx(full - baseline)
    relative = next(row["ours"] for row in after["paper"] if row["row"].startswith("Gain, relative"))
    assert relative["mean"] == pytest.approx(full / baseline - 1)
    assert relative["low"] < relative["mean"] < relative["high"]


OTHER_TABLES: dict[str, tuple[Callable[[config.Study], None], set[Cell]]] = {
    "sampled answers": (
        lambda s: redrawn(s, "test_sampled", [("full", 0, "riel"), ("full", 1, "riel")]),
        of("samples", [("MEML-GRPO",)], ["pass@1", "pass@2", "pass@4"]),
    ),
    "teachers' answers": (
        lambda s: redrawn(s, "teacher_answers", [("full", 0, "mef")]),
        of("teachers", [(", ".join(PANEL), expert) for expert in PANEL],
           ["right, %", "unreadable", "errors", "errors answered rightly by another, %"])
        | of("shared", [(" + ".join(group),) for group in [*combinations(PANEL, 2), PANEL]],
             ["all wrong", "any wrong", "intersection / union, %", "wrong for all, %", "phi"])
        - of("shared", [(" + ".join(PANEL),)], ["phi"])
        | of("paper", [("table-1", row["row"]) for row in claims.values()["tables"]["table-1"]["rows"]], [*OURS, "n"]),
    ),
    "likelihoods": (
        lambda s: redrawn(s, "prompt_teacher", [("full", 1, "mef")]),
        of("prompts", [(", ".join(PANEL), "1", e) for e in PANEL], [f"nats a token, {e}'s answers" for e in PANEL]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_TABLES)
def test_another_table_moves_its_own_numbers_and_no_other(spare, before, name):
    change, must = OTHER_TABLES[name]
    change(spare)
    assert changed(spare, before) == must


def new_metrics(study, arm, seed) -> None:
    folder = RunFolder(study.run(arm, seed).folder("riel"))
    old = folder.read_metrics()
    (folder.path / "metrics.jsonl").unlink()
    panel, losses = study.run(arm, seed).experts.panel, [c[5:] for c in old if c.startswith("rows/")]
    for record in metrics(np.random.default_rng(3), panel, losses, rise=1 / 70, steps=44):
        rows = {f"rows/{loss}": record["step"] % 5 for loss in losses}
        more = {key: record[key] + 0.4 for key in ("truncated", "unreadable", "questions_all_wrong")}
        folder.append_metrics(record | rows | more)


def test_metrics_move_training_and_budgets_of_their_own_arm_and_no_other(spare, before):
    new_metrics(spare, "full", 0)
    after, row = cells(spare), ("MEML-GRPO",)
    own = {cell for cell in before if cell[0] in ("training", "budgets") and cell[1] == row}
    must = {cell for cell in own if cell[2] not in ("seeds", "to stop at")}
    assert {cell for cell in changed(spare, before, after) if cell[0] != "signs"} == must and len(must) == 13
    spent = [after["budgets", row, column] for column in ("steps", "rollouts", "ground-truth items", "update tokens")]
    assert spent == ["32", "768", "28", "32,000"]  # means of 44 and 20 steps, 1056 and 480 rollouts, ...
    assert after["training", row, "buffer flushes"] == "7.0"


def test_a_budget_that_was_not_reached_is_said():
    def stage(seed: int, items: int) -> dict:
        spent = {"steps": 9, "rollouts": 99, "ground_truth_items": items, "update_tokens": 999}
        return {"label": "a", "seed": seed, "training": spent | {"stop_at": {"ground_truth_items": 20}}}

    asked = [readable._budget_row([stage(0, 24), stage(1, items)])["to stop at"] for items in (20, 19)]
    assert asked == ["20 ground-truth items", "20 ground-truth items; not reached with seed 1"]


def test_every_digit_of_the_tables_comes_from_a_run_or_is_known_not_to(study, tmp_path, before):
    """Change everything that runs leave behind, a kind at a time: no number may stay as it was."""
    trained = [arm for arm in study.arms if study.arms[arm].last_stage == "riel"]
    places = [(arm, seed) for arm in trained for seed in study.seeds if (arm, seed) != MISSING]
    stage1 = [(arms[0], seed, "mef") for arms in study.stage1_groups().values() for seed in study.seeds]
    both = [(arm, seed, "riel") for arm, seed in places] + stage1

    def fewer(s) -> None:
        for arm, seed, stage in both:
            folder = RunFolder(s.run(arm, seed).folder(stage))
            for name in ("test_greedy", "test_sampled", "teacher_answers", "prompt_teacher"):
                if folder.table(name).is_file():
                    old = folder.read_table(name)
                    folder.write_table(name, old[~old["question_id"].str.endswith("-7")])

    def failed(s, only) -> None:
        for arm, seed, stage in both:
            if seed == only:
                RunFolder(s.run(arm, seed).folder(stage)).set_status("failed", "no reason")

    def manifests(s) -> None:
        for arm, seed, stage in both:
            folder = RunFolder(s.run(arm, seed).folder(stage))
            other = {"wall_s": 345.0, "commit": f"{seed}bc" * 14}
            folder.write_json("manifest", folder.read_json("manifest") | other)

    def completed(s) -> None:
        there, missing = (RunFolder(s.run(MISSING[0], seed).folder("riel")).path for seed in (0, MISSING[1]))
        shutil.copytree(there, missing)

    changes = [lambda s: [new_metrics(s, *place) for place in places], fewer, manifests, completed]
    changes += [lambda s, seed=seed: failed(s, seed) for seed in study.seeds]
    for name in ("test_greedy", "test_sampled", "validation_greedy", "teacher_answers", "prompt_teacher"):
        where = stage1 if name in ("teacher_answers", "prompt_teacher") else both
        changes.append(lambda s, name=name, where=where: redrawn(s, name, where))
    left = {cell for cell, text in before.items() if re.search(r"\d", text)}
    for n, change in enumerate(changes):
        shutil.copytree(study.folder, tmp_path / str(n) / study.name)
        copy = config.load_study(study.params_file, reports_dir=tmp_path / str(n))
        change(copy)
        left -= changed(copy, before)
    left = {cell for cell in left if cell[2] not in FIXED.get(cell[0], ()) and cell[0] != "settings"}
    assert not left, sorted(left)


# --- what people read -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(study):
    """The folder of the written report; an earlier one left a figure there."""
    old = study.folder / "report" / "figures" / "of-an-arm-that-is-gone.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    return report.write(study).parent


def test_report_md_names_the_task_that_its_accuracies_are_on(written, data):
    assert f"on test questions of {data['values']['task']['name']} that" in (written / "report.md").read_text()


def test_report_md_holds_the_tables_as_they_are(written, data):
    blocks = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", (written / "report.md").read_text(), re.M)]
    shown = [[re.split(r"(?<!\\) \| ", line[2:-2]) for line in (block[0], *block[2:])] for block in blocks]
    frames = report.tables(data)
    paper = frames.pop("paper")
    wanted = [*frames.values(), *(part.drop(columns="table") for _, part in paper.groupby("table", sort=False))]

    def texts(row) -> list[str]:
        return [re.sub(r"[ \n]+", " ", str(cell)).replace("|", "\\|") for cell in row]

    found = [[texts(row) for row in (frame.columns, *frame.to_numpy())] for frame in wanted if len(frame)]
    missing = [frame[0] for frame in found if frame not in shown]
    assert not missing and len(shown) == len(found) + 1  # and the arms' values


def test_the_page_has_no_scripts_and_no_network_and_shows_the_numbers_of_the_json(written, data):
    page = (written / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page  # notes are Markdown, not HTML
    assert not re.search(r"""(src|href)=["'](?!data:image/png;base64,|#)""", page)
    assert page.count("data:image/png;base64,") == len(list((written / "figures").glob("*.png"))) >= 8
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{anchor}"' in page
    assert "Multi | expert" in page and "<strong>nothing</strong>" in page
    for row in re.findall(r"<tr>.*?</tr>", page, flags=re.S):
        assert "|" not in row.replace("Multi | expert", "") and "<td>Multi</td>" not in row  # no cell has spilt over
    for suffix in (".csv", ".pdf"):
        assert (written / "figures" / "arms").with_suffix(suffix).stat().st_size > 0
    assert json.loads((written / "report.json").read_text()) | {"commit": 0} == data | {"commit": 0}
    full = score(data, "full", "mean_expert")
    cell = f"{100 * full['mean']:.1f} [{100 * full['low']:.1f},\xa0{100 * full['high']:.1f}]"
    assert cell in page and cell in (written / "report.md").read_text()
    assert cell in pd.read_csv(written / "tables" / "arms.csv")["mean expert, stage 2"].tolist()


def test_it_names_the_command_the_commits_and_the_rule(written, data):
    text = (written / "report.md").read_text()
    trained = {stage["commit"] for stage in data["stages"] if stage["commit"]}
    wrote = json.loads((written / "report.json").read_text())["commit"]["commit"]
    assert data["command"] in text and wrote in text and all(commit in text for commit in trained)
    assert claims.values()["verdict"]["rule"] in text and claims.values()["verdict"]["why"] in text


def test_each_table_is_csv_and_latex_and_nothing_old_stays(written):
    stems = {file.stem for file in (written / "tables").glob("*.csv")} - {"scores"}
    assert stems == set(readable.TABLES)
    tex = {file.stem for file in (written / "tables").glob("*.tex")}
    assert tex == stems - {"paper"} | {"tables"} | {f"paper-{name}" for name in claims.values()["tables"]}
    assert not (written / "figures" / "of-an-arm-that-is-gone.png").exists()


def test_at_most_seven_arms_are_drawn_as_lines_those_of_table_5_first():
    def arms(count: int, of_table_5: int) -> dict:
        names = [f"arm {n}" for n in range(count)]
        tables = [["table-5"] if n < of_table_5 else [] for n in reversed(range(count))]
        return {"arms": [{"label": n, "last_stage": "riel", "tables": t} for n, t in zip(names, tables, strict=True)]}

    assert len(report.drawn(arms(7, 0))) == 7 and report.drawn(arms(9, 2)) == ["arm 7", "arm 8"]
    assert len(report.drawn(arms(9, 0))) == 7


# --- one run, in a notebook -------------------------------------------------------------------------------------------


def test_compare_shows_one_run_beside_the_paper(study):
    shown = report.compare(study.run("full", 0), paper="table-4")
    assert shown[["row", "paper"]].to_numpy().tolist() == [
        ["MEML-GRPO (Expert0)", "unknown"],
        ["MEML-GRPO (Expert1)", "77.1 (qwen), 60.9 (llama)"],
        ["MEML-GRPO (Expert2)", "unknown"],
    ]
    assert shown["verdict"][1].startswith("not comparable") and shown["n"][1] == QUESTIONS
    story = report.compare(study.run("story-grpo", 0), paper="table-4")  # its panel is reduced; story is expert 1
    assert story["row"].tolist() == ["Expert1-SFT-GRPO"]
    teachers = report.compare(study.run("full", 0), paper="table-1")
    assert teachers["n"][0] > 0 and teachers["paper"].tolist() == ["3.06", "90.11"]
    with pytest.raises(ValueError, match="table 'table-9' is not in paper.yaml"):
        report.compare(study.run("full", 0), paper="table-9")


def test_table_1_stands_beside_any_panels_answers_and_says_what_is_unknown():
    p = config.load_run("smollm2-strategyqa.yaml")
    panel = list(p.experts.panel)[:2]  # of more that the file knows
    p = config.load_run("smollm2-strategyqa.yaml", {"experts.panel": panel})
    teachers = answers(np.random.default_rng(0), panel, 0.6, split="train")
    marks = right(teachers)
    wrong_all, wrong_any = int((marks.max(axis=1) == 0).sum()), int((marks.min(axis=1) == 0).sum())
    shown = report.compare(p, "table-1", teachers)
    assert shown["paper"].tolist() == ["unknown", "unknown"] and shown["verdict"].str.startswith("not comparable").all()
    assert shown["ours"][0] == f"{100 * wrong_all / wrong_any:.1f}" and shown["n"][0] == wrong_any
    low, high = proportion_confint(wrong_all, wrong_any, method="beta")
    assert shown["95 % interval of ours"][0].split() == [f"[{100 * low:.1f},", f"{100 * high:.1f}]"]
    errors = (marks == 0).sum()
    corrected = errors.max() - wrong_all  # of two teachers' errors, those that are not shared
    assert shown["ours"][1] == f"{100 * corrected / errors.max():.1f}" and shown["n"][1] == errors.max()


def test_a_run_alone_has_the_same_tables_as_in_its_study(study, data):
    tables, of_study = report.run_tables(study.run("full", 0)), report.tables(data)
    assert tables["training"]["reward, %"][0] == of_study["training"].set_index("arm")["reward, %"]["MEML-GRPO"]
    assert tables["overlap"]["stage"].tolist() == ["stage 1", "stage 2"] and len(tables["experts"]) == 3
    mean = right(table(study, "full", 0)).to_numpy().mean()
    assert tables["arms"]["mean expert, stage 2"][0].startswith(f"{100 * mean:.1f} [")
    assert report.run_picture(study.run("full", 0)).data["expert"].nunique() == 3
