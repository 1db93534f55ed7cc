"""The checklists: change what a study recorded, and the answer changes with it."""

from copy import deepcopy

import pytest

from meml_lib.analysis import checklist

STAGE = {"state": "done", "commit": "0123456789abcdef", "dirty": False, "machine": 0, "wall_s": 1800.0}
STAGE |= {"peak_memory_mib": 700, "inputs": {"stage1/model": "ee" * 32}, "model_kept": False}


@pytest.fixture
def data() -> dict:
    optimiser = {"optimizer": "adamw", "lr": 1e-5}
    values = {
        "task": {"name": "wordproblems"},
        "model": {"source": "scratch"},
        "experts": {"panel": ["a", "b"], "known": {name: {"teacher": {"kind": "derived"}} for name in "abc"}},
        "mef": optimiser,
        "riel": optimiser,
        "evaluate": {"validation_questions": 40},
    }
    machine = {"python": "3.11.7", "packages": {"torch": "2.13.0", "peft": None}}
    machine |= {"hardware": {"cores": 2, "memory_gib": 23.5, "gpus": []}}
    score = {"measure": "mean_expert", "mean": 0.5, "n_questions": 300, "n_seeds": 3}
    return {
        "notes": "Small.\n",
        "command": "meml run x.yaml",
        "seeds": [0, 1, 2],
        "values": values,
        "machines": [machine, {**machine, "python": "3.12.1"}],
        "arms": [
            {"arm": "sft", "stage1": "full", "last_stage": "mef"},
            {"arm": "full", "stage1": "full", "last_stage": "riel"},
        ],
        "scores": [{**score, "arm": "full", "stage": stage} for stage in ("stage 1", "stage 2")],
        "pairs": [{"mean": 0.1}, {"mean": 0.2}],
        "stages": [deepcopy(STAGE), {**deepcopy(STAGE), "wall_s": 5400.0}],
    }


def answers(data: dict) -> dict[str, tuple[str, str]]:
    found = checklist.rows(data)
    assert {row["answer"] for row in found} <= {"yes", "no", "partly", "n.a."}
    return {row["item"]: (row["answer"], row["evidence"]) for row in found}


def test_a_complete_study_on_generated_data_says_so_with_its_own_numbers(data):
    found = answers(data)
    assert {item: answer for item, (answer, _) in found.items() if answer != "yes"} == {
        "Pre-trained models": "no",
        "Licenses for existing assets": "n.a.",
    }
    assert found["Experiments compute resources"][1].startswith("2.00 h wall time for 2 of 2")  # 1,800 s + 5,400 s
    assert "2 cores, 23.5 GiB memory, no GPU" in found["Experiments compute resources"][1]
    assert found["Specification of dependencies"][1] == "Python 3.11.7, torch 2.13.0"
    assert (
        "0123456789:" in found["Training code"][1]
        and "`meml run x.yaml`" in found["README with results and commands"][1]
    )
    assert "3 of 3 seeds" in found["Experiment statistical significance"][1]
    assert found["Limitations"][1].startswith("1 words in the study file")
    assert "no input files" in found["Open access to data and code"][1]  # stage 1's weights are none


def test_one_seed_is_no_statistical_significance(data):
    for score in data["scores"]:
        score["n_seeds"] = 1
    answer, evidence = answers(data | {"seeds": [0]})["Experiment statistical significance"]
    assert answer == "no" and "another seed may differ by more" in evidence


def test_seeds_or_comparisons_that_did_not_run_make_it_partly_significant(data):
    data["scores"][0]["n_seeds"] = 2
    for pairs in (data["pairs"], []):
        assert answers(data | {"pairs": pairs})["Experiment statistical significance"][0] == "partly"
    data["scores"][0]["n_seeds"], data["pairs"][1]["mean"] = 3, None
    answer, evidence = answers(data)["Experiment statistical significance"]
    assert answer == "partly" and "1 of 2 comparisons" in evidence


@pytest.mark.parametrize(
    ("change", "items"),
    [
        ({"dirty": True}, ["Training code", "Experimental result reproducibility"]),
        ({"commit": None, "dirty": None}, ["Training code", "Experimental result reproducibility"]),
        ({"machine": 1}, ["Specification of dependencies"]),
        ({"wall_s": None}, ["Specification of dependencies", "Experiments compute resources"]),
        (
            {"state": "failed"},
            ["Specification of dependencies", "Training code", "Experimental result reproducibility",
             "Experimental setting/details", "Experiments compute resources"],
        ),
    ],
)  # fmt: skip
def test_what_holds_for_one_stage_of_two_is_partly(data, change, items):
    before = answers(data)
    data["stages"][1] |= change
    after = answers(data)
    assert [item for item in after if after[item][0] != before[item][0]] == items
    assert {after[item][0] for item in items} == {"partly"}


def test_a_study_that_has_not_run_answers_no(data):
    for stage in data["stages"]:
        stage |= dict.fromkeys(("commit", "dirty", "machine", "wall_s", "peak_memory_mib", "inputs"))
        stage |= {"state": "not run", "model_kept": False}
    data |= {"scores": [], "notes": " "}
    found = answers(data)
    open_or_none = {"Open access to data and code": "yes", "Licenses for existing assets": "n.a."}
    assert {item: answer for item, (answer, _) in found.items() if answer != "no"} == open_or_none


def test_an_arm_of_stage_1_rests_on_the_stage_that_it_shares(data):
    del data["scores"][0]
    answer, evidence = answers(data)["Evaluation code"]
    assert answer == "partly" and evidence.startswith("1 of 2 arms")


def test_weights_that_are_kept_are_not_yet_published(data):
    data["stages"][0]["model_kept"] = True
    answer, evidence = answers(data)["Pre-trained models"]
    assert answer == "partly" and evidence.startswith("1 of 2")


def test_openness_and_licences_follow_the_task_the_model_and_the_teachers(data):
    values = data["values"]
    values["task"]["name"], values["model"]["path"] = "gsm8k", "Qwen/Qwen2.5-Math-1.5B"
    data["stages"][0]["inputs"]["gsm8k/train.jsonl"] = "ab" * 32
    found = answers(data)
    assert found["Open access to data and code"][0] == found["Licenses for existing assets"][0] == "yes"
    assert "gsm8k/train.jsonl sha256 abababababab;" in found["Open access to data and code"][1]
    assert found["Licenses for existing assets"][1] == "gsm8k: MIT, Qwen/Qwen2.5-Math-1.5B: Apache-2.0"

    values["model"]["path"] = "meta-llama/Llama-3.2-1B-Instruct"
    found = answers(data)
    assert found["Open access to data and code"][0] == "partly" and found["Licenses for existing assets"][0] == "yes"

    values["experts"]["known"]["b"]["teacher"] = {"kind": "table", "path": "mine.csv"}
    values["experts"]["known"]["c"]["teacher"] = {"kind": "table", "path": "off the panel.csv"}
    values["task"] = {"name": "jsonl", "path": "my.jsonl"}
    found = answers(data)
    assert found["Open access to data and code"][0] == "no" and found["Licenses for existing assets"][0] == "partly"
    assert "mine.csv: unknown" in found["Licenses for existing assets"][1]
    assert "off the panel" not in found["Licenses for existing assets"][1]

    values["experts"]["known"]["b"]["teacher"] = {"kind": "table", "path": None, "hub": {"name": "some/traces"}}
    assert "some/traces: unknown" in answers(data)["Licenses for existing assets"][1]
    values["experts"]["known"]["b"]["teacher"] = {"kind": "api", "model": "deepseek-r1", "path": "store.jsonl"}
    assert "answers of deepseek-r1, by API: unknown" in answers(data)["Licenses for existing assets"][1]
