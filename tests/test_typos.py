"""Misspelt and mistyped values, wherever a user may give one: each is named, with its place, and nothing runs."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
RUN = "use: [smoke.yaml]\n"
STUDY = "title: t\nrun_file: smoke.yaml\nseeds: [0]\narms:\n  a: {label: A}\n"


def typed(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    """A command of this environment, as a user types it in the project folder."""
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    environment = os.environ | {"HOME": str(tmp_path), "COLUMNS": "400"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


IN_A_FILE = [
    (RUN + "riel:\n  stps: 3\n", "FILE:3: riel.stps is not a known key; did you mean 'riel.steps'?"),
    (RUN + "riell: {steps: 3}\n", "FILE:2: riell is not a known key; did you mean 'riel'?"),
    (RUN + "riel: {steps: 3.5}\n", "FILE:2: riel.steps = 3.5: must be a valid integer"),
    (RUN + "riel: {lr: 0}\n", "FILE:2: riel.lr = 0: must be greater than 0"),
    (RUN + "riel: {objective: {grpo: {scale: sdt}}}\n", "FILE:2: riel.objective.grpo.scale = 'sdt': must be one of 'none' or"),
    (RUN + "experts: {panel: [storry]}\n", "FILE:2: experts: panel names 'storry', which experts.known lacks"),
    ("use: [smok.yaml]\n", "FILE:1: no file 'smok.yaml' in params/; did you mean 'smoke.yaml'?"),
    (STUDY.replace("seeds", "sedes"), "FILE:3: sedes is not a known key; did you mean 'seeds'?"),
    (STUDY.replace("label", "lable"), "FILE:5: arms.a.lable is not a known key; did you mean 'arms.a.label'?"),
    (STUDY + "overrides:\n  riel.objective.mutal: null\n", "FILE:7: riel.objective.mutal is not a known key; did you"),
    (STUDY + "compare: {t: {a: {b: vote}}}\n", "FILE:6, FILE:4: compare.t.a.b names 'b', which is no arm; the arms are"),
]


@pytest.mark.parametrize(("text", "message"), IN_A_FILE)
def test_meml_refuses_it_in_a_file(tmp_path, text, message):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    done = typed(tmp_path, "meml", "run", str(file), "--reports-dir", str(tmp_path / "reports"))
    assert done.returncode == 2 and message.replace("FILE", str(file)) in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr and os.listdir(tmp_path) == ["own.yaml"]


SET = [
    ("riel.stpes=3", "override: riel.stpes is not a known key; did you mean 'riel.steps'?"),
    ("riel.rollouts_per_expert=1", "override: riel.rollouts_per_expert = 1: must be greater than or equal to 2"),
    ("hardware.device=gpu", "override: hardware.device = 'gpu': must be one of 'auto', 'cpu' or 'cuda'"),
    ("arms.ful.label=x", "override: arms.ful is not a known key; did you mean 'arms.full'?"),
    ("steps=3", "override: steps is not a known key; did you mean 'mef.steps' or 'riel.steps'?"),
]


@pytest.mark.parametrize(("override", "message"), SET)
def test_meml_refuses_it_behind_set(tmp_path, override, message):
    words = ("run", "params/studies/smoke.yaml", "--set", override, "--reports-dir", str(tmp_path / "reports"))
    done = typed(tmp_path, "meml", *words)
    assert done.returncode == 2 and message in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr and os.listdir(tmp_path) == []


ALONE = '(sections are a whole run file: add use = ["smoke.yaml"]; overrides changes single values)'
NOTHING_READS = "nothing reads a parameter of this name; did you mean"
TO_PAPERMILL = [
    ("02_mef", ["-p", "parms_file", "params/demo.yaml"], f"parms_file: {NOTHING_READS} 'params_file'?"),
    ("05_report", ["-p", "params_file", "params/studies/dmo.yaml"], "did you mean 'studies/demo.yaml'?"),
    ("03_riel", ["-f", "use: [smoke.yaml]\nriel: {stps: 3}\n"], "notebook: riel.stps is not a known key; did you mean 'riel.steps'?"),
    ("05_report", ["-f", STUDY.replace("A}", "A, last_stage: mf}")], "notebook: arms.a.last_stage = 'mf': must be one of"),
    ("03_riel", ["-y", "riel: {stps: 3}"], "notebook: riel.stps is not a known key; did you mean 'riel.steps'?"),
    ("03_riel", ["-y", "riel: {steps: 3}"], ALONE),
    ("00_experts", ["-y", "overrides: {mef.lr: fast}"], "override: mef.lr = 'fast': must be a valid number"),
    ("02_mef", ["-y", "overides: {mef.lr: 1e-3}"], f"overides: {NOTHING_READS} 'overrides'?"),
    ("04_ablations", ["-b", "overrides: {seeds: 3}"], "override: seeds = 3: must be a list, e.g. [..]"),
]


@pytest.mark.parametrize(("notebook", "words", "message"), TO_PAPERMILL)
def test_papermill_refuses_it_in_the_second_cell(tmp_path, notebook, words, message):
    if words[0] == "-f":
        (tmp_path / "own.yaml").write_text(words[1])
        words = ["-f", str(tmp_path / "own.yaml")]
    elif words[0] == "-b":
        words = ["-b", base64.b64encode(words[1].encode()).decode()]
    place = "reports_dir" if notebook in ("04_ablations", "05_report") else "run_dir"
    out = tmp_path / "out.ipynb"
    words = [f"notebooks/{notebook}.ipynb", str(out), "-k", "python3", "-p", place, str(tmp_path / "run"), *words]
    done = typed(tmp_path, "papermill", *words)
    assert done.returncode != 0 and message in done.stderr
    cells = [cell for cell in nbformat.read(out, as_version=4).cells if cell.cell_type == "code"]
    given, injected, checks, *others = cells
    assert "parameters" in given.metadata.tags and "injected-parameters" in injected.metadata.tags
    assert "from_notebook(globals())" in checks.source and checks.outputs[-1].ename == "ParamsError"
    assert others and not any(cell.execution_count or cell.outputs for cell in others)
    assert not (tmp_path / "run").exists()


def test_there_are_twenty_and_every_way_of_giving_a_value_is_among_them():
    ways = [*("file" for _ in IN_A_FILE), *("set" for _ in SET), *(words[0] for _, words, _ in TO_PAPERMILL)]
    assert len(ways) >= 20 and {*ways} == {"file", "set", "-p", "-f", "-y", "-b"}
