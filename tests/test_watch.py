"""Watching a study: what stands on a terminal, what is printed anywhere else, and how rate and time left are found."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import light
import pytest
from rich.console import Console

from meml_lib import config, runs
from meml_lib.pipeline import graph, watch
from meml_lib.runs import RunFolder

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STAGE_1 = "02_mef-stage1-equations+story+groups-seed-0"
FULL = "03_riel-full-seed-0"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


# --- rate and time left -----------------------------------------------------------------------------------------------


def test_neither_start_up_nor_a_slow_first_step_counts(clock):
    pace = runs.Pace(clock)
    assert pace.told(50, "step") == ("", "")
    clock.now += 60  # loading, and a first step that compiles
    pace.see(1)
    assert pace.told(50, "step") == ("", "")
    for done in (2, 3, 4, 5):
        clock.now += 2
        pace.see(done)
    assert pace.rate == pytest.approx(0.5)  # four steps in 8 s
    assert pace.told(50, "step") == ("2.0 s/step", "0:01:30 left")  # 45 steps of 2 s
    assert pace.told(None, "step") == ("2.0 s/step", "")


def test_what_a_resumed_run_had_done_before_makes_it_no_faster(clock):
    pace = runs.Pace(clock)
    pace.see(1000)
    clock.now += 10
    pace.see(1030)
    assert pace.told(1330, "step") == ("3.0 steps/s", "0:01:40 left")


def test_time_left_runs_while_a_step_takes_its_time_and_never_below_nothing(clock):
    pace = runs.Pace(clock)
    pace.see(1)
    clock.now += 60
    pace.see(2)
    clock.now += 25
    pace.see(2)  # looked at again; nothing new
    assert pace.told(4, "step") == ("60.0 s/step", "0:01:35 left")
    clock.now += 600
    assert pace.told(4, "step") == ("60.0 s/step", "0:00:00 left")


def test_a_change_of_pace_shows_within_200_steps(clock):
    pace = runs.Pace(clock)
    for done in range(400):
        clock.now += 10 if done < 200 else 1
        pace.see(done)
    assert pace.rate == pytest.approx(1.0)


def test_a_line_says_step_rate_and_time_left_and_the_last_line_comes_once(capsys, monkeypatch):
    monkeypatch.setenv(runs.HEADLESS, "1")
    monkeypatch.setattr(runs, "LOG_EVERY_S", 0.0)
    progress = runs.Progress("mef", "step")
    progress.show(7, 9, "loss 2.000")
    progress.show(8, 9, "loss 1.000")
    progress.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "mef step 7/9, loss 2.000"
    assert re.fullmatch(r"mef step 8/9, [\d.]+ steps/s, 0:00:00 left, loss 1\.000", second)


# --- how far a study is -----------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch) -> dict[str, graph.Job]:
    """The jobs of a study of light notebooks, none of which has run."""
    light.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(light.HERE.parent))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return graph.jobs(config.load_study("params/studies/light.yaml"))


def at(seconds: int, file: Path) -> Path:
    """Give a file its time."""
    os.utime(file, (seconds, seconds))
    return file


def finish(job: graph.Job) -> None:
    with runs.atomic(job.done) as file:
        file.write_text("hash\n")


def train(job: graph.Job, seconds: int) -> RunFolder:
    """What stands on the disk once a job trains: 7 of 40 steps done."""
    folder = RunFolder(job.run.folder(job.stage))
    for step in range(7):
        folder.append_metrics({"step": step, "loss": 1.0})
    folder.write_json("progress", {"steps": 40, "doing": "training"})
    folder.set_status("running")
    at(seconds, folder.path / "status.json")
    return folder


def rendered(watching: watch.Watch, width: int) -> list[str]:
    """Its lines, each bar as one character repeated."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    console.print(watching)
    plain = re.sub("[╸╺]", "━", ESCAPES.sub("", console.file.getvalue()))
    return [line.rstrip() for line in plain.splitlines()]


def start(job: graph.Job, seconds: int = 1000) -> None:
    """What stands on the disk once a job has started."""
    RunFolder(job.folder).set_status("running")
    at(seconds, Path(job.folder) / "status.json")


def test_a_job_that_trains_shows_its_step_rate_and_time_left(project, clock):
    watching = watch.Watch("light", project, clock)
    finish(project["00_experts"])
    start(project[STAGE_1])
    start(project[FULL])
    folder = train(project[STAGE_1], 1010)
    started = ["9:00", None, "9:01", None, None]  # text cells start too
    cells = [{"metadata": {"papermill": {"start_time": time}}} for time in started]
    project[FULL].executed.write_text(json.dumps({"cells": cells}))
    watching.look()
    clock.now += 30
    for step in range(7, 17):
        folder.append_metrics({"step": step, "loss": 1.0})
    watching.look()
    assert rendered(watching, 120) == [
        f"light{' ' * 40}{'━' * 20}  1/7 jobs done                     0:00:30",
        f"{STAGE_1}  {'━' * 20}  step 17/40       3.0 s/step  0:01:09 left",
        f"{FULL}{' ' * 26}{'━' * 20}  cell 3/5",
    ]
    folder.write_json("progress", {"steps": 40, "doing": "evaluating"})
    folder.append_metrics({"step": 39, "loss": 1.0})
    watching.look()
    assert rendered(watching, 60) == [
        "light            1/7 jobs done                     0:00:30",
        "02_mef...seed-0  step 40/40       evaluating",
        "03_rie...seed-0  cell 3/5",
    ]
    narrow = rendered(watching, 30)
    assert len(narrow) == 3 and all(len(line) <= 30 for line in narrow)


def test_what_an_earlier_run_left_is_not_taken_for_this_ones(project, clock):
    train(project[FULL], 900)  # its process was killed
    start(project[STAGE_1], 900)
    RunFolder(project["01_error_overlap"].folder).set_status("failed", "earlier")
    project[FULL].executed.parent.mkdir(parents=True)
    project[FULL].executed.write_text('{"cells": [{"metadata": {"papermill": {"start_time": "9:00"}}}]}')
    at(900, project[FULL].executed)
    watching = watch.Watch("light", project, clock)
    watching.look()
    assert str(watching) == "light: 0/7 jobs done, 0:00:00" and len(rendered(watching, 100)) == 1
    start(project[FULL])
    watching.look()
    assert rendered(watching, 80)[1:] == ["03_riel-full-seed-0  starting"]
    RunFolder(project[FULL].folder).set_status("failed", "now")
    finish(project["00_experts"])
    clock.now += 3700
    watching.look()
    assert str(watching) == "light: 1/7 jobs done, 1 failed, 1:01:40"


def test_signs_of_trouble_are_told_from_the_metrics_once(project, clock):
    watching = watch.Watch("light", project, clock)
    start(project[FULL])
    folder = train(project[FULL], 1010)
    empty = {"buffer_flushes": 0, "buffer_size": 0, "groups_all_wrong": 0.0}
    (folder.path / "metrics.jsonl").unlink()
    for step in range(30):
        folder.append_metrics({"step": step, "reward": step / 100, **empty})
    (sign,) = watching.look()
    assert sign.startswith(f"[{FULL}] sign of trouble at step 20, buffer never fills")
    assert not watching.look()


# --- what is printed --------------------------------------------------------------------------------------------------

JOB = """
import sys, time
from pathlib import Path
folder = Path("reports/light/jobs/00_experts")
folder.mkdir(parents=True)
(folder / "status.json").write_text('{"state": "running", "message": ""}')
print("[00_experts] starts: not done yet", flush=True)
time.sleep(1.5)
(folder / "done").touch()
print("[00_experts] done in 1 s" + COLOUR, file=sys.stderr)
"""
COLOURED = JOB.replace("COLOUR", r"' \x1b[31mred\x1b[0m'")
WATCH = """
import sys
from meml_lib import config
from meml_lib.pipeline import graph, watch
study = config.load_study("params/studies/light.yaml")
sys.exit(watch.run([sys.executable, "-c", {job!r}], watch.Watch("light", graph.jobs(study)), print))
"""


def seen_on_a_terminal(*command: str, columns: int = 100, **environment: str) -> tuple[int, str]:
    """(exit code, all that a terminal receives)."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, columns))
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True, **streams)
    os.close(theirs)
    received = b""
    while True:
        try:
            received += os.read(ours, 65536)
        except OSError:  # the last process that wrote there has ended
            break
    os.close(ours)
    return process.wait(), received.decode()


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}], ids=str)
def test_a_terminal_gets_a_live_block_unless_it_wants_plain_lines(project, environment):
    code, seen = seen_on_a_terminal(sys.executable, "-c", WATCH.format(job=COLOURED), **environment)
    assert code == 0
    lines = re.split(r"[\r\n]+", ESCAPES.sub("", seen))
    assert "[00_experts] starts: not done yet" in lines and "[00_experts] done in 1 s red" in lines
    assert any(re.fullmatch(r"light: 1/7 jobs done, 0:\d\d:\d\d", line) for line in lines)
    assert ("\x1b[?25l" in seen) == (not environment)  # a live block hides the cursor,
    assert ("\x1b[?25h" in seen) == (not environment)  # and gives it back


def test_a_pipe_gets_lines_without_control_characters(project):
    command = [sys.executable, "-c", WATCH.format(job=JOB.replace("COLOUR", "''"))]
    coloured = os.environ | {"FORCE_COLOR": "1"}
    plain = subprocess.run(command, capture_output=True, env=coloured, check=True).stdout.decode()
    assert not re.search(r"[^\n -~]", plain)
    assert plain.startswith("[00_experts] starts: not done yet\n")
    assert re.search(r"^light: 1/7 jobs done, 0:\d\d:\d\d$", plain, re.MULTILINE)


SLOW = """
import time
from meml_lib.pipeline import launch
def slow(stage, p, on_record):
    def late(record):
        on_record(record)
        time.sleep(0.5)
    fake_stage.run(stage, p, late)
fake_stage.install(slow)
print("a line of the notebook")
launch.train("mef", p)
"""


@pytest.mark.alone  # what a terminal shows in which moment
def test_a_person_sees_jobs_steps_rate_time_left_and_failures(project):
    Path("params/light.yaml").write_text("use: [smoke.yaml]\nmef: {steps: 12}\n")
    here = Path.cwd()
    light.write(here, "02_mef", light.RUN, light.P, light.FAKE, SLOW)
    light.write(here, "03_riel", light.RUN, light.P, "raise ValueError('no such luck')")
    command = (sys.executable, "-m", "meml_lib.cli", "run", "params/light.yaml", "--jobs", "1")
    stage1, stage2 = (name for name, job in graph.jobs(config.load_study("params/light.yaml")).items() if job.stage)
    code, seen = seen_on_a_terminal(*command, columns=60)
    assert code == 1
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", seen))]
    block = [line for line in lines if re.search(r"jobs done  |step \d+/|cell \d+/|starting$", line)]
    assert block and all(len(line) <= 58 for line in block)  # ^C has room beside it
    told = re.compile(r"02_mef.*seed-0 +step \d+/12 +[\d.]+ (s/step|steps/s)  0:00:\d\d left")
    assert any(told.fullmatch(line) for line in block), seen
    assert f"[{stage1}] starts: not done yet" in lines
    assert any(line.startswith(f"[{stage1}] done in") for line in lines)
    assert f"[{stage2}] FAILED: cell 4 of notebooks/03_riel.ipynb: ValueError: no such luck" in lines
    assert any(line.startswith("light-run: 3/6 jobs done, 1 failed, 0:") for line in lines)
    assert any("2/6 jobs done  " in line for line in block)
    assert "a line of the notebook" not in seen and "mef step" not in seen
    assert "a line of the notebook" in (here / "reports/light-run/jobs" / stage1 / "02_mef.ipynb").read_text()
