"""Each way to fail, provoked for real at the level of `meml run`, on light notebooks: what is said, what is left, what
the next run does. `python tests/test_failures.py FILE.md` writes the same cases as a table."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import light
import pytest

from meml_lib import runs
from meml_lib.runs import RunFolder

EXPERTS, OVERLAP = "00_experts", "01_error_overlap"
REPORTS = {"04_ablations", "05_report"}
AGAIN = "run the same command again"
SLEEPS = "import time\nprint('sleeping')\ntime.sleep(600)"


class InCell(NamedTuple):
    """A failure that a cell of stage 1's notebook brings about."""

    what: str
    cell: str
    """Runs after training, or instead of it where it begins with `#`."""
    said: tuple[str, ...]
    """What the job's failure must say; a part may be a regular expression."""


STAGE = "folder = p.folder('mef')\n"
METRICS = STAGE + "with open(folder / 'metrics.jsonl', 'a') as file: file.write('{\"step\": 4, \"loss\": NaN}\\n')"
TABLE = STAGE + "from meml_lib import runs\nfolder = runs.RunFolder(folder)\ntable = folder.read_table('prompt_teacher')\n"
NAN = TABLE + "folder.write_table('prompt_teacher', table.assign(logp=float('nan')))"
INFINITE = TABLE + "table.loc[1, 'logp'] = float('inf')\nfolder.write_table('prompt_teacher', table)"
KILL = "import os, signal, subprocess, time\nsubprocess.Popen(['sleep', '600'])  # must not stay behind\n"
KILL += "print('one')\ntime.sleep(1)\nos.kill(os.getpid(), signal.SIGKILL)"
SWALLOW = "# instead of training\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    pass"
GSM8K = """# instead of training
from meml_lib import schema, tasks
task = dict(name='gsm8k', source='{}', train_questions=None, validation_questions=1, split_seed=0)
tasks.load(schema.ReleasedParams(**task)).questions('train')"""
NOWHERE = "# instead of training\nimport os\nos.environ['MEML_DATA_DIR'] = '/nowhere'\n" + GSM8K.format("auto")
JSONL = """# instead of training
from meml_lib import schema, tasks
task = dict(name='jsonl', path='nowhere.jsonl', answer='text', validation_share=0, test_share=0, split_seed=0)
tasks.load(schema.JsonlParams(**task)).questions('train')"""
HUB_TABLE = "# instead of training\nfrom meml_lib.experts import tables\ntables._from_hub('a/b', None, 'train')"
HUB_MODEL = """# instead of training
from meml_lib import schema
from meml_lib.training import policy
model = schema.HubModelParams(source='hub', path='a/b', dtype='float32')
policy.load(model, device='cpu', words=(), seed=0)"""
NO_HUB = (
    r"could not be loaded from the cache in .*, nor from the hub \(.* cannot be reached: .*"
    "connect, or fill the cache .* HF_HUB_OFFLINE=1, or "
)
LEFT = "notebooks/02_mef.ipynb ran to its end, but left: "
MEND = "mend the cell that should write it and run"
ODD = "column logp: {} of 3 values are null, NaN or infinite, the first in row {}"
IN_CELLS = (
    InCell(
        "a cell raises an error",
        "print('one')\nprint('two', end='')\n1 / 0",
        ("cell 5 of notebooks/02_mef.ipynb: ZeroDivisionError: division", "its last lines:", "\n    two\n"),
    ),
    InCell(
        "the kernel is killed (kill -9, as for memory)",
        KILL,
        ("cell 5 .*the kernel died: out of memory, or killed", "kernel.log", "\n    one\n", "micro_batch_tokens"),
    ),
    InCell("`sys.exit(0)` in a cell", "import sys\nsys.exit(0)", ("cell 5 .*SystemExit: 0",)),
    InCell("a cell swallows its error and writes nothing", SWALLOW, (LEFT + "no mef result", MEND)),
    InCell(
        "an output is missing",
        STAGE + "(folder / 'tables/test_greedy.parquet').unlink()",
        (LEFT + ".*test_greedy.parquet: missing", MEND),
    ),
    InCell("NaN in the metrics", METRICS, (LEFT + ".*metrics.jsonl: loss = nan at step 4", MEND)),
    InCell("NaN in a table", NAN, (LEFT + ".*prompt_teacher.parquet: " + ODD.format(3, 1), MEND)),
    InCell("an infinite number in a table", INFINITE, (LEFT + ".*prompt_teacher.parquet: " + ODD.format(1, 2), MEND)),
    InCell(
        "MEML_DATA_DIR is not set",
        GSM8K.format("files"),
        ("cell 5 .*MEML_DATA_DIR is not set: set it to the folder .* gsm8k/",),
    ),
    InCell(
        "MEML_DATA_DIR points nowhere",
        NOWHERE,
        ("cell 5 .*none of .*train.jsonl in /nowhere/gsm8k, which is no folder; set it to",),
    ),
    InCell("a file of questions is not there", JSONL, ("cell 5 .*task.path='nowhere.jsonl' is no file",)),
    InCell(
        "no network, a data set of the hub",
        GSM8K.format("hub"),
        ("cell 5 .*task.name='gsm8k': openai/gsm8k main " + NO_HUB + "set MEML_DATA_DIR",),
    ),
    InCell(
        "no network, a table of the hub",
        HUB_TABLE,
        ("cell 5 .*teacher.hub: 'a/b', .* " + NO_HUB + "put the data set into a folder",),
    ),
    InCell(
        "no network, a model of the hub",
        HUB_MODEL,
        ("cell 5 .*model.path='a/b' " + NO_HUB + "set model.path to a folder",),
    ),
)
STUDY = f"""
title: Light
run_file: light.yaml
seeds: {list(range(len(IN_CELLS) + 1))}
arms:
  only: {{label: Only, last_stage: mef}}
"""
# Seed k takes what stands in cells/k.py, before or instead of training; the last seed has none.
CELL = "from pathlib import Path\nfile = Path(f'cells/{p.seed}.py')\ncell = file.read_text() if file.exists() else ''"
TRAIN = "if not cell.startswith('#'): fake_stage.train('mef', p)"
FOREIGN = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Another", "language": "python"}


class Project:
    """The light project, with a study of stage 1 alone, and what `meml run` did in it."""

    def __init__(self, folder: Path):
        self.folder, self._kept = folder, folder.with_name(f"{folder.name}.kept")
        light.make(folder)
        (folder / "params/studies/light.yaml").write_text(STUDY)
        light.write(folder, "02_mef", light.RUN, light.P, light.FAKE + "\n" + CELL, TRAIN + "\nexec(cell)")
        (folder / "cells").mkdir()
        unset = ("MEML_DATA_DIR", "HF_HUB_OFFLINE")
        self.environment = {name: value for name, value in os.environ.items() if name not in unset}
        self.environment["PYTHONPATH"] = str(light.HERE.parent)
        self.code, self.said, self.left, self.next = 0, "", "", ""

    def status(self, job: str) -> dict:
        return RunFolder(self.folder / "reports/light/jobs" / job).status

    def run(self, *options: str, env: dict[str, str] | None = None, on_line: Callable | None = None, **how) -> None:
        """`meml run`; `on_line(line, process)` hears each line as it comes."""
        with light.meml_run(*options, cwd=self.folder, env=self.environment | (env or {}), **how) as process:
            self.said = ""
            for line in process.stdout:
                self.said += line
                if on_line:
                    on_line(line, process)
        self.code = process.returncode
        until = time.monotonic() + 40
        while (left := light.processes_in(self.folder)) and time.monotonic() < until:
            time.sleep(0.1)
        assert not left, left
        for lock in self.folder.glob("reports/light/**/.lock"):
            with runs.locked(lock, str(lock)):
                pass

    def executed(self) -> set[str]:
        """The jobs whose notebook ran to its end."""
        return set(re.findall(r"^\[(.+)\] done in", self.said, re.MULTILINE))

    def failure(self, job: str) -> str:
        """What the job said when it failed."""
        found = re.search(rf"^\[{re.escape(job)}\] (FAILED: .*(?:\n  .*)*)", self.said, re.MULTILINE)
        assert found, self.said
        return found[1]

    def keep(self) -> None:
        """Keep the project as it is, for `restore`."""
        shutil.copytree(self.folder, self._kept, symlinks=True)

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self._kept, self.folder, symlinks=True)

    def breaks(self, cell: str, job: str = EXPERTS) -> None:
        """Put a cell into a job's notebook, before it writes its table."""
        parameters, p, table = light.NOTEBOOKS[job]
        light.write(self.folder, job, parameters, p, cell, table)

    def others(self, *jobs: str) -> dict[str, int]:
        """What other jobs left behind: file -> when it was written."""
        study = self.folder / "reports/light"
        own = [study / "experts", *(study / "jobs" / job for job in jobs)]
        seeds = [job.rpartition("seed-")[2] for job in jobs if "seed-" in job]
        own += [folder for seed in seeds for folder in study.glob(f"runs/*/seed-{seed}")]
        files = (file for part in ("experts", "jobs", "runs", "report") for file in (study / part).rglob("*"))
        mine = (file for file in files if not any(file.is_relative_to(folder) for folder in own) and file.is_file())
        return {str(file): file.stat().st_mtime_ns for file in mine if not file.name.endswith(("done", "lock"))}

    def fails(self, *said: str, jobs: Sequence[str] = (EXPERTS,), code: int = 1, options=(), **how) -> None:
        """The run fails in these jobs alone and says so, and the others' results are as they were."""
        before = self.others(*jobs)
        self.run(*options, **how)
        assert self.code == code, self.said
        for part in said:
            assert re.search(part, self.said), f"{part!r} is not in:\n{self.said}"
        assert "Traceback" not in self.said, self.said
        for job in jobs:
            assert self.status(job)["state"] in ("failed", "running")
            assert not (self.folder / "reports/light/jobs" / job / "done").exists()
        assert self.others(*jobs) == before and not self.executed()
        states = "; ".join(f"status of `{job[:10]}`: {self.status(job)['state']}" for job in jobs)
        self.left = f"{states or 'the status as it was'}; all other results"

    def finishes(self, *jobs: str) -> None:
        """After the cause is mended, the same command runs these jobs and no other, and finishes."""
        failed, code = self.said, self.code
        before = self.others(*jobs)
        for job in jobs:
            if job in light.NOTEBOOKS:
                light.write(self.folder, job, *light.NOTEBOOKS[job])
        self.run()
        assert self.code == 0 and self.said.endswith("report: reports/light/report/report.html\n"), self.said
        assert self.executed() == set(jobs) and self.others(*jobs) == before
        assert all(self.status(job)["state"] == "done" for job in jobs)
        assert not list(self.folder.glob("reports/light/**/.*.*-*"))  # what torn writes leave
        self.said, self.code, self.next = failed, code, self.said


def mef(seed: int) -> str:
    return f"02_mef-stage1-equations+story+groups-seed-{seed}"


class Study(NamedTuple):
    """The project, its first run, in which every cell of IN_CELLS failed, and its second, in which they were mended."""

    project: Project
    failed: str
    code: int
    states: dict[str, dict]
    mended: str


def failed_and_mended(folder: Path) -> Study:
    project = Project(folder)
    for seed, case in enumerate(IN_CELLS):
        (folder / f"cells/{seed}.py").write_text(case.cell)
    kernels = folder / "foreign/kernels/python3"
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text(json.dumps(FOREIGN))
    no_hub = {"HF_HOME": str(folder / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    project.run("--jobs", "2", env=no_hub | {"JUPYTER_PATH": str(folder / "foreign")})
    failed, code = project.said, project.code
    states = {mef(seed): project.status(mef(seed)) for seed in range(len(IN_CELLS) + 1)}
    shutil.rmtree(folder / "cells")
    project.run("--jobs", "2")
    assert project.code == 0, project.said
    project.keep()
    return Study(project, failed, code, states, project.said)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    return failed_and_mended(tmp_path_factory.mktemp("failures") / "light")


@pytest.fixture
def project(study) -> Project:
    """The finished study."""
    study.project.restore()
    return study.project


@pytest.mark.parametrize("seed", range(len(IN_CELLS)), ids=[case.what for case in IN_CELLS])
def test_a_cell_fails_its_job_says_why_and_the_next_run_finishes(study, seed):
    job, case = mef(seed), IN_CELLS[seed]
    study.project.said = study.failed
    message = study.project.failure(job)
    assert study.code == 1 and study.states[job]["state"] == "failed"
    assert message == f"FAILED: {study.states[job]['message']}" and AGAIN in message
    for part in case.said:
        assert re.search(part, message), f"{part!r} is not in:\n{message}"
    assert f"[{job}] done in" in study.mended and study.project.status(job)["state"] == "done"


def test_jobs_that_are_done_are_kept_while_others_fail(study):
    """A kernelspec python3 of another interpreter, found through JUPYTER_PATH, kept none of them from running."""
    kept = (EXPERTS, OVERLAP, mef(len(IN_CELLS)))
    for job in kept:
        assert f"[{job}] done in" in study.failed and f"[{job}]" not in study.mended
    assert all(f"{job}: did not run, for want of the above" in study.failed for job in REPORTS)
    assert study.mended.endswith("report: reports/light/report/report.html\n")


# --- a whole run ------------------------------------------------------------------------------------------------------


class OfRun(NamedTuple):
    """A failure of a whole run: provokes it, checks what is said and left, and mends it."""

    what: str
    case: Callable[[Project], None]


def stopped(number: int) -> Callable[[Project], None]:
    def case(project: Project) -> None:
        def stop(line: str, process: subprocess.Popen) -> None:
            if "sleeping" in line:
                os.kill(process.pid, number)

        project.breaks(SLEEPS)
        killed = number == signal.SIGKILL
        said = () if killed else ("interrupted; the same command goes on from here",)
        project.fails(*said, code=-number if killed else 130, on_line=stop)
        assert project.status(EXPERTS)["message"] == "interrupted"
        project.finishes(EXPERTS)

    return case


def killed_job(project: Project) -> None:
    """Nothing is left that could say why."""

    def kill(line: str, process: subprocess.Popen) -> None:
        if "sleeping" in line:
            os.kill(int(project.status(EXPERTS)["message"].split()[1]), signal.SIGKILL)

    project.breaks(SLEEPS)
    project.fails(f"{EXPERTS}: failed: .*cut off", on_line=kill)
    assert project.status(EXPERTS)["state"] == "running"
    project.finishes(EXPERTS)


def too_long(project: Project) -> None:
    """Of a cell that sleeps, and of a whole job whose kernel computes and hears no signal but SIGKILL."""
    deaf = "import signal, time\nfor number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
    computes = "until = time.monotonic() + 3\nwhile time.monotonic() < until: pass"
    project.breaks("print('one')\n" + SLEEPS)
    light.write(project.folder, OVERLAP, *light.NOTEBOOKS[OVERLAP], deaf + computes, *[computes] * 20)
    limits = ("--set", "hardware.cell_timeout_s=8.5", "--set", "hardware.job_timeout_s=20", "--jobs", "2")
    project.fails(
        r"cell 4 of notebooks/00_experts.ipynb: it ran longer than hardware.cell_timeout_s=8.5, and was ended",
        "\n  its last lines:\n    one",
        r"cell \d+ of notebooks/01_error_overlap.ipynb: the job ran longer than hardware.job_timeout_s=20, and was",
        "mend the cause or raise it and " + AGAIN,
        jobs=(EXPERTS, OVERLAP),
        options=limits,
    )
    project.finishes(EXPERTS, OVERLAP)


@contextmanager
def small_disk(project: Project, mib: int) -> Iterator[Path]:
    """The study on a disk of its own of this size, with what it holds."""
    place = project.folder / "reports"
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    kept = place.rename(project.folder / "kept")
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        shutil.copytree(kept, place, symlinks=True, dirs_exist_ok=True)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


FILL = """
import os
def fill(file):
    with open(file, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
"""


def fill(file: Path) -> None:
    exec(FILL, names := {})
    names["fill"](file)


LIGHT, LEAVES = r"\S+/reports/light", r"[\d,]+ bytes left: make room on it"


def full_disk(project: Project) -> None:
    """A run that finds the disk full."""
    with small_disk(project, 16) as place:
        (place / "light/experts/tables/teacher_answers.parquet").unlink()
        fill(place / "filler")
        project.fails("No space left on device", f"the disk of {LIGHT} has only {LEAVES}", "and " + AGAIN, jobs=())
        (place / "filler").unlink()
        project.finishes(EXPERTS)


def filled_disk(project: Project) -> None:
    """A cell fills the disk, so that its notebook and its status cannot be written."""
    with small_disk(project, 16) as place:
        project.breaks(f"{FILL}\nfill('reports/filler')\nprint('full')")
        project.fails("No space left on device", rf"the disk of {LIGHT}\S+ has only {LEAVES}", AGAIN)
        (place / "filler").unlink()
        project.finishes(EXPERTS)


def wrong_kernel(project: Project) -> None:
    """A notebook that was saved with another kernel, and one for whose own kernel ipykernel is missing."""
    light.write(project.folder, EXPERTS, *light.NOTEBOOKS[EXPERTS], "'new'", kernel="ir")
    project.breaks("'new'", OVERLAP)
    (project.folder / "broken/ipykernel").mkdir(parents=True)
    lacks = "raise ModuleNotFoundError('No module named ipykernel')"
    (project.folder / "broken/ipykernel/__init__.py").write_text(lacks)
    project.fails(
        "notebooks/00_experts.ipynb: asks for the kernel 'ir', and jobs run in 'python3'",
        "save it with the kernel 'python3' and " + AGAIN,
        r"notebooks/01_error_overlap.ipynb: no kernel started in \S+ \(No module named ipykernel\)",
        "mend this environment and " + AGAIN,
        jobs=(EXPERTS, OVERLAP),
        env={"PYTHONPATH": f"{project.folder / 'broken'}:{project.environment['PYTHONPATH']}"},
    )
    project.finishes(EXPERTS, OVERLAP)


def port_in_use(project: Project) -> None:
    job = mef(0)
    next(project.folder.glob("reports/light/runs/**/seed-0/**/test_greedy.parquet")).unlink()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (project.folder / "accelerate.yaml").write_text(f"main_process_port: {port}\nnum_machines: 1\n")
        options = ("--set", "hardware.accelerate_config=accelerate.yaml", "--set", "hardware.processes=2")
        said = rf"accelerate.yaml: main_process_port={port} is in use .*; end the process that holds it, or name another"
        project.fails(said, jobs=(job,), options=options)
    project.finishes(job)


def two_at_once(project: Project) -> None:
    """The second says whose turn it is, and the first goes on."""
    waits = "import time\nfrom pathlib import Path\nprint('waiting')\nwhile not Path('go').exists(): time.sleep(0.1)"
    project.breaks(waits)
    said = []

    def second(line: str, process: subprocess.Popen) -> None:
        if "waiting" in line:
            other = light.meml_run(cwd=project.folder, env=project.environment)
            said.append(other.communicate()[0])
            assert other.returncode == 1
            assert said[0] == f"study light is in use by process {process.pid}; wait for it, or end it\n"
            (project.folder / "go").touch()

    project.run(on_line=second)
    assert project.code == 0 and said and project.executed() == {EXPERTS}
    project.next, project.said, project.code, project.left = project.said, said[0], 1, "what the first run writes"


OF_RUNS = (
    OfRun("Ctrl-C (SIGINT)", stopped(signal.SIGINT)),
    OfRun("SIGTERM", stopped(signal.SIGTERM)),
    OfRun("SIGKILL of `meml run`, which leaves its lock", stopped(signal.SIGKILL)),
    OfRun("SIGKILL of a job's process", killed_job),
    OfRun("time-out of a cell, and of a job that hears no signal", too_long),
    OfRun("a full disk at the start", full_disk),
    OfRun("a cell fills the disk", filled_disk),
    OfRun("a notebook of another kernel; no ipykernel", wrong_kernel),
    OfRun("the port of an accelerate config is in use", port_in_use),
    OfRun("two runs of one study at once", two_at_once),
)


@pytest.mark.parametrize("of_run", OF_RUNS, ids=[of_run.what for of_run in OF_RUNS])
def test_a_run_fails_says_why_and_the_next_run_finishes(project, of_run):
    of_run.case(project)


# --- the table --------------------------------------------------------------------------------------------------------

HEAD = """# Every failure, provoked

Written by `python tests/test_failures.py FILE.md`: the cases of that test, on light notebooks. Each case checks what is
said, that other jobs' files are as they were, that no process and no lock is left, and that the next `meml run`
executes what failed and nothing else, to the report. `...` stands for what was cut from a line.

| provoked by | what the user sees | exit code | left on disk | the next `meml run` |
|---|---|---|---|---|
"""


def shown(lines: list[str], folder: Path) -> str:
    """Lines for a cell of a Markdown table, the longest shortened in their middle."""
    lines = [re.sub(r"[^\s\[]*-seed-", "02_mef-...-seed-", line.replace(f"{folder}/", "").rstrip()) for line in lines]
    lines = [line if len(line) < 260 else f"{line[:170]} ... {line[-80:]}" for line in lines]
    return "<br>".join(f"`{line.replace('|', '/')}`" for line in lines if line)


def table(folder: Path) -> str:
    """All cases as a Markdown table. Raises: AssertionError for a case that does not hold."""
    study, rows = failed_and_mended(folder), []
    for seed, case in enumerate(IN_CELLS):
        test_a_cell_fails_its_job_says_why_and_the_next_run_finishes(study, seed)
        said = shown(study.project.failure(mef(seed)).splitlines(), folder)
        left = f"the job's status: {study.states[mef(seed)]['state']}; the other {len(IN_CELLS) + 2} jobs' results"
        rows.append((case.what, said, study.code, left, f"executes `02_mef-...-seed-{seed}`; report"))
    test_jobs_that_are_done_are_kept_while_others_fail(study)
    kept = "nothing: the three jobs that are not meant to fail are done, in this interpreter"
    foreign = "`JUPYTER_PATH` holds a kernelspec python3 of another interpreter"
    rows.append((foreign, kept, 0, "their results", "executes none of them"))
    for of_run in OF_RUNS:
        study.project.restore()
        try:
            of_run.case(study.project)
        except pytest.skip.Exception as skipped:
            rows.append((of_run.what, f"not provoked: {skipped}", "", "", ""))
            continue
        lines = study.project.said.splitlines()
        own = [line for line in lines if not re.match(r"light: |\[\S+\] (starts|one)|  \S+: (/|notebooks/)", line)]
        ran = ", ".join(f"`{job}`" for job in re.findall(r"^\[(.+)\] done in", study.project.next, re.MULTILINE))
        ran = re.sub(r"`\S*-seed-", "`02_mef-...-seed-", ran)
        said = shown(own, folder)
        rows.append((of_run.what, said, study.project.code, study.project.left, f"executes {ran}; report"))
    return HEAD + "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        Path(sys.argv[1]).write_text(table(Path(scratch).resolve() / "light"), encoding="utf-8")
