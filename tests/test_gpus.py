"""GPUs handed out to jobs side by side, on a machine whose `nvidia-smi` is a script: none is used twice, none stays taken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import light
import pytest

from meml_lib import config, runs
from meml_lib.pipeline import gpus, graph


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """A machine that shows two GPUs, which nobody holds."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "nvidia-smi").write_text("#!/bin/sh\nprintf 'Card, 24 GiB\\nCard, 24 GiB\\n'\n")
    (programs / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(gpus.SHOWN, raising=False)


def test_the_gpus_are_those_that_the_user_shows_else_all(two_gpus, monkeypatch):
    assert gpus.known() == ["0", "1"]
    for shown, names in (("1", ["1"]), ("0, 1", ["0", "1"]), ("", []), ("-1", [])):
        monkeypatch.setenv(gpus.SHOWN, shown)
        assert gpus.known() == names
    monkeypatch.setattr(runs, "gpus", list)
    monkeypatch.setenv(gpus.SHOWN, "0")
    assert gpus.known() == []  # no driver


def run(**hardware) -> config.Run:
    return config.load_run("params/smoke.yaml", {f"hardware.{name}": value for name, value in hardware.items()})


def test_a_stage_takes_a_gpu_for_each_process_and_no_more_than_there_are():
    assert gpus.needed(run(device="cpu", processes=2), ["0", "1"]) == 0
    assert gpus.needed(run(device="auto", processes=2), ["0", "1", "2"]) == 2
    assert gpus.needed(run(device="auto", processes=2), []) == 0
    with pytest.raises(config.ParamsError, match=r"hardware.processes \(override\) = 2: .*here are 1 .*set it to at most 1"):
        gpus.needed(run(device="cuda", processes=2), ["3"])


def test_a_gpu_is_held_by_one_alone_and_free_again_when_its_process_is_killed(two_gpus, tmp_path):
    hold = "import sys, time; from meml_lib.pipeline import gpus\n"
    hold += "with gpus.held(int(sys.argv[1]), ['0', '1']) as mine: print(*mine, flush=True); time.sleep(600)"

    def start(count: int) -> subprocess.Popen:
        command = [sys.executable, "-c", hold, str(count)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    first, second = start(1), start(1)
    others = [first, second]
    try:
        assert {first.stdout.readline(), second.stdout.readline()} == {"0\n", "1\n"}
        third, both = start(1), start(2)
        others += [third, both]
        time.sleep(1.5)
        assert third.poll() is None and both.poll() is None
        first.send_signal(signal.SIGKILL)
        assert third.stdout.readline() in ("0\n", "1\n")
        for each in (second, third):
            each.send_signal(signal.SIGKILL)
        assert both.stdout.readline() == "0 1\n"
    finally:
        for each in others:
            each.kill()
            each.communicate()


SEES = "import json, os, time; from pathlib import Path\nbegan = time.time(); time.sleep(1.0)\n"
SEES += "Path(p.run_dir).mkdir(parents=True, exist_ok=True)\n"
SEES += "told = [os.environ.get('CUDA_VISIBLE_DEVICES'), began, time.time()]\n"
SEES += "Path(p.run_dir, 'seen.json').write_text(json.dumps(told))"


def test_jobs_side_by_side_see_a_gpu_of_their_own(two_gpus, tmp_path, monkeypatch):
    project = tmp_path / "project"
    light.make(project)
    light.write(project, "03_riel", light.RUN, light.P, light.FAKE, SEES, "fake_stage.train('riel', p)")
    arms = "  third: {label: Third, overrides: {riel.steps: 2}}\n"
    (project / "params" / "studies" / "light.yaml").write_text(light.STUDY + arms)
    monkeypatch.setenv("PYTHONPATH", str(light.HERE.parent))
    said, _ = (process := light.meml_run("--jobs", "3", "--set", "hardware.device=auto", cwd=project)).communicate()
    assert process.returncode == 0, said
    seen = [json.loads(file.read_text()) for file in Path(project, "reports/light/runs").glob("*/*/seen.json")]
    assert len(seen) == 3 and {gpu for gpu, _, _ in seen} == {"0", "1"}
    for n, (gpu, began, ended) in enumerate(seen):
        others = [other for other in seen[:n] + seen[n + 1 :] if other[0] == gpu]
        assert all(ended < other[1] or other[2] < began for other in others)  # never two at a time on one


def test_a_study_on_the_cpu_is_handed_none_and_only_training_jobs_of_others_are(two_gpus):
    study = config.load_study("params/studies/smoke.yaml")
    made, options = graph._on_this_machine(graph.jobs(study), None)
    assert {job.gpus for job in made.values()} == {None}
    study = config.load_study("params/studies/smoke.yaml", ["hardware.device=cuda"])
    made, options = graph._on_this_machine(graph.jobs(study), None)
    assert {name: job.gpus for name, job in made.items() if job.gpus} == {name: 1 for name, job in made.items() if job.stage}
    assert options[:4] == ["--cores", "2", "--resources", "gpu=2"] and made["05_report"].gpus == 0
