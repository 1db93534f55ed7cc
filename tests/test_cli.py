"""The commands as a user types them: what they print, and their exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from meml_lib import config
from meml_lib.cli import app

ROOT = Path(__file__).parents[1]


@pytest.fixture
def meml(monkeypatch):
    monkeypatch.chdir(ROOT)
    return lambda *words: CliRunner().invoke(app, list(words))


def test_check_prints_every_value_with_its_source(meml):
    result = meml("check", "params/demo.yaml", "--set", "riel.steps=7")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[-1] == "params/demo.yaml: good"
    assert any(line.split() == ["riel.steps", "7", "override"] for line in lines)
    assert any(line.startswith("mef.keep") and "params/base.yaml:" in line for line in lines)
    assert len(lines) >= len(config.load_run("params/demo.yaml").rows())


def test_check_of_a_study_prints_what_each_arm_changes(meml):
    said = meml("check", "params/studies/demo.yaml").stdout
    assert "6 arm(s) x seeds [0]" in said and "single-buffer (" in said and "shares stage1-equations)" in said
    assert '    experts.panel = ["equations"]  (params/studies/rows/table-5.yaml:' in said
    own = [line.split() for line in said.split("\nparams/studies/demo.yaml:\n")[1].splitlines()]
    assert ["seeds", "[0]", "params/studies/demo.yaml:5"] in own
    assert ["compare.table-5.full.multi", '"mean_expert"', "params/studies/rows/table-5.yaml:23"] in own
    assert "memory" not in said and "jobs" not in said


def test_a_dry_run_says_what_a_study_would_take_after_its_values(meml, monkeypatch):
    monkeypatch.delenv("MEML_DATA_DIR", raising=False)
    said = meml("check", "params/studies/paper-llama-gsm8k.yaml", "--dry-run").stdout
    assert said.index("mef.lr") < said.index("report of it: none. Never run by us.") < said.index("memory of each of 8")
    assert "meta-llama/Llama-3.2-1B-Instruct, 1,235,814,400 parameters" in said
    assert said.count("memory of each") == 1  # one model for all arms
    assert "jobs: 85 notebooks" in said  # 2 on teachers, 5 stages 1 and 22 stages 2 x 3 seeds, 2 on the study
    assert said.splitlines()[-1] == "params/studies/paper-llama-gsm8k.yaml: good"


def test_a_dry_run_that_finds_a_fault_fails_and_names_it(meml):
    result = meml("check", "params/smoke.yaml", "--dry-run", "--set", "mef.answers_per_step=193")
    assert result.exit_code == 2 and "good" not in result.stdout
    assert "dry run: stage 1 has 192 answers, fewer than mef.answers_per_step=193" in result.stderr


@pytest.mark.parametrize("command", ["check", "run", "report"])
@pytest.mark.parametrize(
    ("file", "override", "message"),
    [
        ("params/demo.yaml", "riel.stpes=1", "riel.stpes is not a known key; did you mean 'riel.steps'?"),
        ("params/studies/demo.yaml", "sedes=[1]", "sedes is not a known key"),
        ("params/studies/dmo.yaml", "seeds=[1]", "no file 'params/studies/dmo.yaml'"),
    ],
)
def test_a_wrong_value_ends_every_command_before_it_starts(meml, command, file, override, message):
    result = meml(command, file, "--set", override)
    assert result.exit_code == 2 and message in result.stderr


def test_report_of_what_has_not_run_says_how_to_run_it(meml, tmp_path):
    result = meml("report", "params/studies/smoke.yaml", "--reports-dir", str(tmp_path))
    assert result.exit_code == 1 and "holds no runs yet: meml run params/studies/smoke.yaml" in result.stderr


def test_doctor_says_what_is_missing_and_what_to_do(meml, monkeypatch):
    monkeypatch.delenv("MEML_DATA_DIR", raising=False)
    monkeypatch.setattr("meml_lib.runs.versions", lambda names: dict.fromkeys(names))
    monkeypatch.setenv("CC", "/no/compiler -m64")
    result = meml("doctor")
    assert result.exit_code == 0 and "no C compiler '/no/compiler -m64'" in result.stdout
    assert "make smollm2" in result.stdout and "torch is not installed" in result.stdout
    assert "unless MEML_DATA_DIR is a folder" in result.stdout
