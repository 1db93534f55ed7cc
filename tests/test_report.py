"""The report on a small made-up study: its numbers recomputed from the tables, what is missing said, one plain page."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from meml_lib import config
from meml_lib.analysis import claims, report
from meml_lib.runs import RunFolder

ARMS = """
title: "Made-up study"
run_file: smoke.yaml
seeds: [0, 1]
arms:
  single:
    label: Single expert
    overrides: {experts.panel: [equations], riel.objective.mutual: null, riel.objective.buffer_sft: null}
  multi:
    label: "Multi | expert"
    overrides: {riel.objective.mutual: null, riel.objective.buffer_sft: null}
  full: {label: MEML-GRPO}
compare: [[full, multi], [multi, single]]
notes: |
  It shows **nothing**. <script>alert(1)</script>
"""
QUESTIONS, SAMPLES = 30, 4


def greedy(rng, panel, chance, split="test", samples=1) -> pd.DataFrame:
    rows = []
    for q in range(QUESTIONS):
        for expert in panel:
            for sample in range(samples):
                ok = None if rng.random() < 0.1 else bool(rng.random() < chance)
                answer = None if ok is None else "8" if ok else str(rng.integers(3))
                rows.append((f"made-{split}-{q}", expert, sample, f"step | one\n```\n<b>#### {answer}", answer, ok))
    frame = pd.DataFrame(rows, columns=["question_id", "expert", "sample", "text", "answer", "correct"])
    return frame.astype({"correct": "boolean"}).assign(tokens=9, ended=True)


def metrics(rng, panel, losses) -> list[dict]:
    records = []
    for step in range(20):
        wrong = 0.8 - step / 40
        groups = {
            "groups_all_wrong": wrong,
            "groups_mixed": 0.1,
            "groups_all_right": 0.9 - wrong,
            "questions_all_wrong": wrong / 2,
        }
        rows = {f"rows/{loss}": int(step % 4 == 3 or loss != "buffer_sft") for loss in losses}
        records.append(
            {"step": step, "reward": 1 - wrong, **{f"reward/{expert}": 1 - wrong for expert in panel}, **groups}
            | {
                "loss": 1.0,
                **{f"loss/{loss}": float(rng.random()) for loss in losses},
                **rows,
                "grad_norm": 1.0,
                "entropy": 0.5,
            }
            | {"truncated": 0.0, "unreadable": 0.1, "buffer_size": step % 4, "buffer_flushes": step // 4, "lr": 1e-4}
            | {"sample_seconds": 0.5, "train_seconds": 0.25}
        )
    return records


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> config.Study:
    """Three arms, two seeds; one run is missing. Read only."""
    place = tmp_path_factory.mktemp("study")
    (place / "made-up.yaml").write_text(ARMS)
    study = config.load_study(place / "made-up.yaml", reports_dir=place / "reports")
    rng = np.random.default_rng(5)
    for arm in study.arms:
        for seed in study.seeds:
            run = study.run(arm, seed)
            panel = list(run.experts.panel)
            losses = [name for name, values in run.riel.objective if values is not None]
            for stage in ("mef", "riel"):
                folder = RunFolder(run.folder(stage))
                if folder.status["state"] == "done" or (arm, seed) == ("multi", 1) and stage == "riel":
                    continue  # a shared stage 1; and one run that is left out
                chance = 0.4 if stage == "mef" else {"single": 0.5, "multi": 0.6, "full": 0.8}[arm]
                folder.write_table("test_greedy", greedy(rng, panel, chance))
                folder.write_table("validation_greedy", greedy(rng, panel, chance, split="validation"))
                folder.write_table("test_sampled", greedy(rng, panel, chance, samples=SAMPLES))
                texts = [(f"made-test-{q}", f"question {q}", "8", 1 + q % 2) for q in range(QUESTIONS)]
                folder.write_table(
                    "test_questions", pd.DataFrame(texts, columns=["question_id", "text", "gold", "difficulty"])
                )
                if stage == "mef":
                    teachers = greedy(rng, panel, 0.7, split="train")
                    folder.write_table(
                        "teacher_answers",
                        teachers[~((teachers["question_id"] == "made-train-3") & (teachers["expert"] == "story"))],
                    )
                    for step in range(20):
                        folder.append_metrics({"step": step, "loss": 2.0 - step / 20, "lr": 1e-3, "grad_norm": 1.0})
                else:
                    for record in metrics(rng, panel, losses):
                        folder.append_metrics(record)
                folder.write_manifest(wall_s=12.0)
                folder.set_status("done")
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


def test_every_score_is_that_of_the_tables(study, data):
    each = [right(table(study, "full", seed)) for seed in (0, 1)]
    got = score(data, "full", "mean_expert")
    assert got["mean"] == pytest.approx(np.mean([frame.to_numpy().mean() for frame in each]))
    assert got["per_seed"] == {
        "0": pytest.approx(each[0].to_numpy().mean()),
        "1": pytest.approx(each[1].to_numpy().mean()),
    }
    assert (got["n_questions"], got["n_seeds"]) == (QUESTIONS, 2)
    assert got["low"] < got["mean"] < got["high"]
    assert score(data, "full", "expert/story")["mean"] == pytest.approx(
        np.mean([frame["story"].mean() for frame in each])
    )
    any_right = np.mean([frame.max(axis=1).mean() for frame in each])
    assert score(data, "full", "any_expert")["mean"] == pytest.approx(any_right)
    assert score(data, "full", "all_wrong")["mean"] == pytest.approx(1 - any_right)
    unreadable = np.mean([table(study, "full", seed)["correct"].isna().mean() for seed in (0, 1)])
    assert score(data, "full", "unreadable")["mean"] == pytest.approx(unreadable) and unreadable > 0
    both = pd.concat(each)
    assert score(data, "full", "overlap_iou")["mean"] == pytest.approx(
        (both.max(axis=1) == 0).sum() / (both.min(axis=1) == 0).sum()
    )
    story = both[both["story"] == 0]
    assert score(data, "full", "corrected/story")["mean"] == pytest.approx(story.max(axis=1).mean())
    off = np.triu_indices(3, 1)
    assert score(data, "full", "mean_phi")["mean"] == pytest.approx(
        np.mean([frame.corr().to_numpy()[off].mean() for frame in each])
    )
    odd = both[both.index.str.extract(r"(\d+)$")[0].astype(int).to_numpy() % 2 == 1]
    assert score(data, "full", "difficulty/2")["mean"] == pytest.approx(odd.to_numpy().mean())


def test_the_best_expert_is_chosen_on_validation_in_each_seed(study, data):
    best = []
    for seed in (0, 1):
        chosen = (
            right(table(study, "full", seed, name="validation_greedy"))[["equations", "story", "groups"]]
            .mean()
            .idxmax()
        )
        best.append(right(table(study, "full", seed))[chosen].mean())
    assert score(data, "full", "best_validation")["mean"] == pytest.approx(np.mean(best))


def test_pass_at_k_is_the_mean_over_experts_and_seeds(study, data):
    chances = []
    for seed in (0, 1):
        sampled = table(study, "full", seed, name="test_sampled")
        hits = sampled["correct"].fillna(False).astype(int).groupby([sampled["question_id"], sampled["expert"]]).sum()
        chances.append(
            {
                k: np.mean([1 - np.prod([(SAMPLES - c - i) / (SAMPLES - i) for i in range(k)]) for c in hits])
                for k in (1, 2, 4)
            }
        )
    for k in (1, 2, 4):
        assert score(data, "full", f"pass@{k}")["mean"] == pytest.approx(np.mean([chance[k] for chance in chances]))


def test_a_single_expert_has_neither_vote_nor_overlap(data):
    measures = {row["measure"] for row in data["scores"] if row["arm"] == "single"}
    assert "mean_expert" in measures and not measures & {"vote", "overlap_iou", "mean_phi", "all_wrong"}


def test_pairs_are_compared_on_the_seeds_that_both_have(study, data):
    pair = next(p for p in data["pairs"] if (p["arm"], p["measure"]) == ("MEML-GRPO", "mean_expert"))
    difference = right(table(study, "full", 0)).mean(axis=1) - right(table(study, "multi", 0)).mean(axis=1)
    assert pair["n_seeds"] == 1  # multi's seed 1 has not run
    assert pair["mean"] == pytest.approx(difference.mean())
    half = 2.045 * difference.std() / np.sqrt(QUESTIONS)  # t with 29 degrees of freedom
    assert pair["high"] - pair["mean"] == pytest.approx(half, rel=1e-3)


def test_training_is_summed_up_from_the_metrics(data):
    row = next(s["training"] for s in data["stages"] if (s["name"], s["seed"]) == ("full", 1))
    assert row["groups_all_wrong_start"] == pytest.approx((0.8 + 0.775) / 2)  # the first 2 of 20 steps
    assert row["groups_all_wrong_end"] == pytest.approx(0.8 - (18 + 19) / 80)
    assert row["steps_with_gradient"] == {"grpo": 20, "mutual": 20, "buffer_sft": 5}
    assert row["buffer_flushes"] == 4 and row["steps"] == 20


def test_teachers_are_compared_on_questions_that_all_answered(study, data):
    three, one = sorted(data["teachers"], key=lambda group: -len(group["experts"]))
    answers = table(study, "full", 0, stage="mef", name="teacher_answers")
    marks = right(answers).dropna()
    assert (three["left_out"], three["questions"]) == (1, QUESTIONS - 1)
    assert three["iou"] == pytest.approx((marks.max(axis=1) == 0).sum() / (marks.min(axis=1) == 0).sum())
    assert one["experts"] == ["equations"]


def test_what_has_not_run_is_listed(spare):
    missing = [
        (s["name"], s["seed"], s["stage"], s["state"]) for s in report.gather(spare)["stages"] if s["state"] != "done"
    ]
    assert missing == [("multi", 1, "stage 2", "not run")]
    RunFolder(spare.run("multi", 1).folder("riel")).set_status("failed", "killed by the system")
    data = report.gather(spare)
    assert data["stages"][-3]["state"] == "failed"
    tables = report.tables(data)
    assert "failed: killed by the system" in tables["runs"]["state"].tolist()
    assert tables["arms"]["mean expert, stage 2"][1].endswith("(1\xa0of\xa02 seeds)")


def test_a_study_without_any_run_still_reports(tmp_path):
    page = report.write(config.load_study("studies/smoke.yaml", reports_dir=tmp_path)).read_text()
    assert "3 of 3 training stages have no result" in page and "multi seed 0 stage 2: not run" in page


def test_the_report_is_one_page_without_scripts_or_network_and_shows_the_numbers_of_the_json(study, data):
    file = report.write(study)
    page = file.read_text()
    assert "<script" not in page and "&lt;script&gt;" in page  # notes are Markdown, not HTML
    assert not re.search(r"""(src|href)=["'](?!data:image/png;base64,|#)""", page)
    assert page.count("data:image/png;base64,") == len(list((file.parent / "figures").glob("*.png"))) >= 8
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{anchor}"' in page
    assert "Multi | expert" in page and "<strong>nothing</strong>" in page
    assert page.count("<table>") == 10
    for row in re.findall(r"<tr>.*?</tr>", page, flags=re.S):
        assert "|" not in row.replace("Multi | expert", "") and "<td>Multi</td>" not in row  # no cell has spilt over
    for suffix in (".csv", ".pdf"):
        assert (file.parent / "figures" / "arms").with_suffix(suffix).stat().st_size > 0
    assert json.loads((file.parent / "report.json").read_text()) == data
    full = score(data, "full", "mean_expert")
    cell = f"{100 * full['mean']:.1f} [{100 * full['low']:.1f},\xa0{100 * full['high']:.1f}]"
    assert cell in page and cell in (file.parent / "report.md").read_text()
    assert pd.read_csv(file.parent / "tables" / "arms.csv")["mean expert, stage 2"].tolist()[2] == cell


def test_a_changed_table_changes_the_report(spare):
    before = score(report.gather(spare), "full", "mean_expert")["mean"]
    answers = table(spare, "full", 0)
    RunFolder(spare.run("full", 0).folder("riel")).write_table(
        "test_greedy", answers.assign(correct=pd.array([True] * len(answers), dtype="boolean"))
    )
    assert score(report.gather(spare), "full", "mean_expert")["mean"] > before


def test_seeds_tested_on_other_questions_are_an_error(spare):
    folder = RunFolder(spare.run("full", 1).folder("riel"))
    folder.write_table("test_greedy", table(spare, "full", 1).replace({"question_id": {"made-test-4": "made-test-99"}}))
    with pytest.raises(
        ValueError, match="full, stage 2: seeds 0 and 1 were tested on different questions \\(made-test-4\\)"
    ):
        report.gather(spare)


def test_arms_tested_on_different_questions_make_no_pairs(spare):
    for seed in (0, 1):
        folder = RunFolder(spare.run("single", seed).folder("riel"))
        folder.write_table(
            "test_greedy", table(spare, "single", seed).replace({"question_id": {"made-test-4": "made-test-99"}})
        )
    with pytest.raises(ValueError, match="multi and single were tested on different questions"):
        report.gather(spare)


def test_the_command_makes_the_same_study_again(study):
    assert report.command(study).endswith("made-up.yaml --set 'seeds=[0, 1]'")
    other = config.load_study(study.params_file, ["riel.steps=7"])
    assert "--set 'riel.steps=7'" in report.command(other)


def test_a_small_world_is_never_comparable_to_the_paper(data):
    rows = data["paper"]
    assert {row["verdict"].split(" (")[0] for row in rows} == {"not comparable", "not run"}
    assert [row["arm"] for row in rows if row["table"] == "table-1"] == [
        "Multi | expert"
    ] * 2  # one panel, not two arms
    full = next(row for row in rows if row["row"] == "MEML-GRPO (Expert1)")
    reasons = "the paper's is an average over three data sets; other model: trained from scratch; other teachers"
    assert full["verdict"] == f"not comparable ({reasons})"
    assert full["delta"] is None
    assert full["ours"]["mean"] == score(data, "full", "expert/story")["mean"]  # Expert1: second of the panel


def test_the_paper_s_own_setting_gets_a_verdict(study):
    run = study.run("full", 0)
    teacher = {"kind": "table", "path": "answers.parquet", "column_value": "r1"}
    known = {name: {"system": name, "teacher": teacher} for name in run.experts.panel}
    values = {"experts": {"panel": run.experts.panel, "known": known}}
    values |= {"model": {"source": "hub", "path": "Qwen/Qwen2.5-Math-1.5B", "dtype": "bfloat16"}}
    values |= {
        "task": {
            "name": "gsm8k",
            "source": "files",
            "train_questions": None,
            "validation_questions": 500,
            "split_seed": 0,
        }
    }
    run = config.Run.model_validate(run.model_dump() | values)
    rng = np.random.default_rng(0)

    def row(right_SQ: np.ndarray) -> dict:
        measures = {"stage 2": {"expert/story": report.Measured("share", right_SQ.astype(float))}}
        arm = report.ArmResult("full", "Full", run, seeds={"stage 2": [0]}, measures=measures)
        return next(row for row in claims.rows("table-4", [arm]) if row["row"] == "MEML-GRPO (Expert1)")

    for chance, verdict in ((0.8, "reproduced"), (0.3, "not reproduced")):
        story = rng.random((5, 1319)) < chance
        assert (row(story)["paper"], row(story)["verdict"]) == (79.6, verdict)
        assert row(story)["delta"] == pytest.approx(100 * story.mean() - 79.6)
    assert row(story[:1, :60])["verdict"] == "too few data"


def test_compare_shows_one_run_beside_the_paper(study):
    shown = report.compare(study.run("full", 0), paper="table-4")
    assert shown[["row", "paper"]].to_numpy().tolist() == [["MEML-GRPO (Expert1)", "77.1 (qwen), 60.9 (llama)"]]
    assert shown["verdict"][0].startswith("not comparable") and shown["n"][0] == QUESTIONS
    teachers = report.compare(study.run("full", 0), paper="table-1")
    assert teachers["n"][0] > 0 and teachers["paper"].tolist() == ["3.06", "90.11"]
    with pytest.raises(ValueError, match="table 'table-9' is not in paper.yaml"):
        report.compare(study.run("full", 0), paper="table-9")
