"""Every file in params/: it composes, it says nothing twice, and the paper's presets hold the paper's values."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from meml_lib import config
from meml_lib.training import dryrun

ROOT = Path(__file__).parents[1]
PARAMS = ROOT / "params"
RUNS = sorted(file for file in PARAMS.glob("*.yaml") if file.name != "base.yaml")
STUDIES = sorted((PARAMS / "studies").glob("*.yaml"))
FOLDERS = ("tasks", "experts", "models", "objectives", "hardware", "studies/rows")
PARTS = sorted(file for folder in FOLDERS for file in (PARAMS / folder).glob("*.yaml"))
PAPER = [f"paper-{model}-{task}" for model in ("qwen", "llama") for task in ("gsm8k", "mathqa", "strategyqa")]
SMOLLM2 = [f"smollm2-{task}" for task in ("gsm8k", "mathqa", "strategyqa")]
CHOSEN = {f"hardware/{name}.yaml" for name in ("cpu2", "cpu2-fsdp", "gpu8-fsdp", "node2x8-fsdp")}
"""Layouts that no preset takes, for a user's own run file."""
SAID_AGAIN = {"demo.yaml": {"mef.answers_per_step", "riel.rollouts_per_expert"}}  # the demo shows its whole size


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("MEML_DATA_DIR", raising=False)


def short(file: Path) -> str:
    return str(file.relative_to(PARAMS))


@pytest.mark.parametrize("file", [*RUNS, *STUDIES], ids=short)
def test_it_composes_and_all_its_arms_differ(file):
    study = config.load_study(file)
    arms = {}
    for arm in study.arms:
        values = study.run(arm, study.seeds[0]).values() | {"last_stage": study.arms[arm].last_stage}
        twin = arms.setdefault(json.dumps(values, sort_keys=True), arm)
        assert twin == arm, f"{arm} is {twin} again"


@pytest.mark.parametrize("file", [*RUNS, *STUDIES, *PARTS], ids=short)
def test_it_says_no_value_that_what_it_uses_has_said_already(file):
    own = yaml.safe_load(file.read_text())
    used = config._Values()
    used.add_used(own.pop("use", []), file)
    before = dict(config.leaves(used.tree))
    again = {".".join(path) for path, value in config.leaves(own) if path in before and before[path] == value}
    assert again == SAID_AGAIN.get(short(file), set())


def test_every_part_is_used():
    def names(value) -> set[str]:
        if isinstance(value, dict):
            return set(value.get("use", [])) | {name for item in value.values() for name in names(item)}
        return set()

    used = set().union(*(names(yaml.safe_load(file.read_text())) for file in [*RUNS, *STUDIES, *PARTS]))
    assert {short(file) for file in PARTS} == used & {short(file) for file in PARTS} | CHOSEN


@pytest.mark.parametrize("file", sorted((PARAMS / "hardware").glob("*.yaml")), ids=short)
def test_a_layout_fits_its_accelerate_config_and_says_whether_it_has_run(file, tmp_path):
    own = tmp_path / "params" / "own.yaml"
    own.parent.mkdir()
    own.write_text(f"use: [{PARAMS / 'smoke.yaml'}, {file}]\n")
    p = config.load_run(own)
    device, machines, each = re.match(r"(cpu|gpu|node)(?:(\d+)x)?(\d+)", file.stem).groups()
    assert p.hardware.device == ("cpu" if device == "cpu" else "cuda")
    assert p.hardware.processes == int(machines or 1) * int(each)
    values = config.accelerate_values(p)
    assert (values.get("distributed_type") == "FSDP") is file.stem.endswith("-fsdp")
    assert values.get("num_machines", 1) == int(machines or 1)
    ours = device == "cpu" or p.hardware.processes == 1
    for each_file in [file, *([config.locate(p.hardware.accelerate_config)] if values else [])]:
        assert each_file.read_text().startswith(f"# {dryrun.NEVER_RUN}") is not ours


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_preset_holds_the_papers_values(name):
    p = config.load_run(f"{name}.yaml")
    _, model, task = name.split("-")
    assert p.task.name == task and len(p.experts.panel) == 3 and p.hardware.processes == 8
    assert p.model.path == {"qwen": "Qwen/Qwen2.5-Math-1.5B", "llama": "meta-llama/Llama-3.2-1B-Instruct"}[model]
    assert (p.mef.lr, p.mef.epochs, p.riel.lr, p.riel.rollouts_per_expert) == (1e-5, 1, 1e-6, 8)
    objective = p.riel.objective
    assert (objective.buffer_sft.capacity, objective.buffer_sft.wrong_over) == (64, 6)
    assert (objective.grpo.advantage, objective.grpo.scale, objective.mutual.form) == ("positive", "none", "forward_kl")
    train = dryrun.questions(p)[0]["train"]
    assert p.riel.questions_per_step == 32 and p.riel.steps == math.ceil(train / 32)  # one epoch
    assert p.sampling.max_answer_tokens == 1024 and p.evaluate.test_questions is None


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_study_has_every_row_of_tables_2_4_and_5_three_times(name):
    study = config.load_study(f"studies/{name}.yaml")
    rows = [yaml.safe_load((PARAMS / "studies" / "rows" / f"table-{n}.yaml").read_text())["arms"] for n in (2, 4, 5)]
    assert set().union(*rows) <= set(study.arms) and {"single-buffer", "single-buffer-rollouts"} <= set(study.arms)
    assert len(study.seeds) == 3 and study.run_params_file == f"params/{name}.yaml"
    both = study.run("single-buffer-rollouts", 0).riel
    assert both.rollouts_per_expert == 3 * 8 and both.objective.buffer_sft.wrong_over == 3 * 6


@pytest.mark.parametrize("name", SMOLLM2)
def test_a_smollm2_study_holds_three_arms_and_two_seeds_on_one_gpu(name):
    study = config.load_study(f"studies/{name}.yaml")
    assert set(study.arms) == {"multi", "full", "single-buffer"} and len(study.seeds) == 2
    p = study.base_run()
    assert p.task.name == name.split("-")[1] and p.model.source == "gguf" and p.hardware.processes == 1
    asked, _ = dryrun.questions(p)
    assert asked["test"] >= 400
    rollouts = p.riel.questions_per_step * len(p.experts.panel) * p.riel.rollouts_per_expert
    assert rollouts <= p.sampling.rows_per_batch  # a step's rollouts are decoded side by side


@pytest.mark.parametrize("name", [*PAPER, *SMOLLM2])
def test_never_run_by_us_stands_where_nothing_shows_a_run_and_nowhere_else(monkeypatch, name, tmp_path):
    for file, in_notes in ((PARAMS / f"{name}.yaml", False), (PARAMS / "studies" / f"{name}.yaml", True)):
        study = config.load_study(file, reports_dir=str(tmp_path))  # what we publish counts, not what this machine ran
        ran = not dryrun.evidence(study).startswith("none")
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert (dryrun.NEVER_RUN in "\n".join(head)) is not ran
        if in_notes:
            assert study.notes.startswith(dryrun.NEVER_RUN) is not ran


def test_what_travels_to_a_gpu_machine_is_pinned_and_small_enough_for_a_call():
    script = (ROOT / ".ci" / "gpu").read_text()
    travels = re.search(r'^missing="(.*?)"', script, re.S | re.M).group(1).split()
    travels += re.findall(r"^from_source=(\S+)", script, re.M)
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    pins = {line.partition("==")[0] for line in lines}
    assert len(travels) > 60 and set(travels) <= pins
    assert int(re.search(r"split -b (\d+)m - .gpu/part-", script).group(1)) <= 56  # of 64 MiB a call; the tree takes 4
