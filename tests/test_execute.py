"""Jobs on light notebooks: what fails says so, what is done is kept, what is stale runs again and nothing else does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from meml_lib import config, runs, training
from meml_lib.pipeline import execute, graph, launch
from meml_lib.runs import RunFolder

HERE = Path(__file__).parent
STUDY = """
title: Light
run_file: light.yaml
seeds: [0]
arms:
  multi: {label: Multi, overrides: {riel.objective.mutual: null}}
  full: {label: Full}
"""
RUN = 'params_file = "params/light.yaml"\noverrides = {}\nrun_dir = None\nstage1_dir = None'
OF_STUDY = 'params_file = "params/studies/light.yaml"\noverrides = {}\nreports_dir = "reports"'
P = "from meml_lib import config\np = config.from_notebook(globals())"
S = "from meml_lib import config\ns = config.study_from_notebook(globals())"
TABLE = "import pandas; from meml_lib import runs\nruns.RunFolder(p.run_dir).write_table('{}', pandas.DataFrame([1]))"
FAKE = f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport fake_stage"
PAGE = "from meml_lib import runs\nwith runs.atomic(s.folder / 'report/report.html') as file: file.write_text(s.title)"
NOTEBOOKS = {
    "00_experts": (RUN, P, TABLE.format("teacher_answers")),
    "01_error_overlap": (RUN, P, TABLE.format("error_overlap")),
    "02_mef": (RUN, P, FAKE, "fake_stage.train('mef', p)"),
    "03_riel": (RUN, P, FAKE, "fake_stage.train('riel', p)"),
    "04_ablations": (OF_STUDY, S),
    "05_report": (OF_STUDY, S, PAGE),
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of six light notebooks. project(name, cells) rewrites one of them."""
    params = tmp_path / "params"
    (params / "studies").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    for file in ("base", "smoke", "tasks/wordproblems", "experts/wordproblems", "models/embedded", "hardware/cpu1"):
        (params / file).parent.mkdir(exist_ok=True)
        (params / f"{file}.yaml").write_text((HERE.parent / "params" / f"{file}.yaml").read_text())
    (params / "light.yaml").write_text("use: [smoke.yaml]\n")
    (params / "studies" / "light.yaml").write_text(STUDY)

    def write(name: str, *cells: str) -> None:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")

    for name, cells in NOTEBOOKS.items():
        write(name, *cells)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    environment = dict(os.environ)
    yield write
    os.environ.clear()  # a job sets its own process's environment
    os.environ.update(environment)


def study(*overrides: str) -> config.Study:
    return config.load_study("params/studies/light.yaml", list(overrides))


@pytest.fixture
def quick_run(project, monkeypatch, capsys):
    """quick_run(overrides) -> exit code, what is said: the graph without Snakemake, notebooks without a kernel."""

    def run_notebook(job: graph.Job, folder: RunFolder) -> None:
        first, *cells = nbformat.read(job.notebook, as_version=4).cells
        namespace: dict = {}
        exec(first.source, namespace)
        namespace |= job.parameters
        for cell in cells:
            exec(cell.source, namespace)
        job.executed.write_text("{}")

    def in_order(folder: Path, cores: int) -> int:
        jobs, ran, failed = graph.load(folder / "jobs.json"), set(), set()
        for name, job in jobs.items():
            if failed & {*job.parents}:
                failed.add(name)
            elif not job.done.exists() or ran & {*job.parents}:
                ran.add(name)
                try:
                    execute.execute(job, jobs)
                except Exception as error:
                    print(error)
                    failed.add(name)
        return int(bool(failed))

    monkeypatch.setitem(sys.modules, launch.STAGE, None)
    monkeypatch.setattr(training, "stage", None, raising=False)
    monkeypatch.setattr(execute, "_run_notebook", run_notebook)
    monkeypatch.setattr(graph, "_snakemake", in_order)

    def run(*overrides: str) -> tuple[int, str]:
        code = graph.run(study(*overrides), 1, print)
        return code, capsys.readouterr().out

    return run


def executed(said: str) -> set[str]:
    """The jobs whose notebook ran."""
    return {line[1:].split("]")[0].removesuffix("-seed-0") for line in said.splitlines() if "] done in" in line}


# --- one job ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("print('one'); print('two')\n1 / 0", "cell 4 of notebooks/00_experts.ipynb: ZeroDivisionError: division"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "the kernel died: out of memory, or killed"),
        ("import sys; sys.exit(0)", "cell 4 of notebooks/00_experts.ipynb: SystemExit: 0"),
        ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass", "left: .*teacher_answers.parquet: missing"),
    ],
    ids=["raises", "dies", "exits", "swallows"],
)
def test_a_job_that_did_not_do_its_work_has_failed(project, capsys, cell, message):
    project("00_experts", RUN, P, cell, "print('went on')")
    jobs = graph.jobs(study())
    job = jobs["00_experts"]
    with pytest.raises(execute.JobFailed, match=message) as caught:
        execute.execute(job, jobs)
    status = RunFolder(job.folder).status
    assert status["state"] == "failed" and status["message"] == str(caught.value)
    assert not job.done.exists() and job.executed.is_file()
    if "one" in cell:
        assert "its last lines:\n    one\n    two\n" in str(caught.value)
        assert "mend the cause and run the same command again" in str(caught.value)
        assert "[00_experts] one" in capsys.readouterr().out


def test_a_kernel_opens_no_network_port(project, capsys):
    """Two jobs that start at the same time drew the same free port about once in 70 starts; sockets are files."""
    transport = "from ipykernel.connect import get_connection_info\nprint(get_connection_info(unpack=True)['transport'])"
    project("00_experts", RUN, P, transport, TABLE.format("teacher_answers"))
    jobs = graph.jobs(study())
    execute.execute(jobs["00_experts"], jobs)
    assert "[00_experts] ipc\n" in capsys.readouterr().out


def test_a_misspelt_parameter_fails_in_the_first_cells(project):
    project("00_experts", RUN.replace("overrides", "overide"), P, TABLE.format("teacher_answers"))
    jobs = graph.jobs(study())
    with pytest.raises(execute.JobFailed, match="cell 3 .*overide: nothing reads.*did you mean 'overrides'"):
        execute.execute(jobs["00_experts"], jobs)


# --- a study ----------------------------------------------------------------------------------------------------------


def meml_run() -> subprocess.Popen:
    # A shell that starts a job in the background has it ignore SIGINT; a terminal does not.
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from meml_lib import cli\n"
    start += "sys.argv = ['meml', 'run', 'params/studies/light.yaml']; cli.main()"
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen([sys.executable, "-c", start], stdout=pipe, stderr=merged, text=True)


def test_snakemake_runs_a_study_to_its_report_and_the_next_run_does_nothing(project):
    said, _ = (process := meml_run()).communicate()
    assert process.returncode == 0 and said.endswith("report: reports/light/report/report.html\n"), said
    assert executed(said) == {job.removesuffix("-seed-0") for job in graph.jobs(study())}
    manifest = RunFolder("reports/light/jobs/03_riel-full-seed-0").read_json("manifest")
    assert manifest["parameters"]["run_dir"] == "reports/light/runs/full/seed-0" and manifest["wall_s"] > 0
    said, _ = meml_run().communicate()
    assert said == "light: 7 jobs, 7 up to date (reports/light)\nreport: reports/light/report/report.html\n"


def test_only_what_is_stale_runs_again(project, quick_run):
    code, said = quick_run()
    assert code == 0 and executed(said) == {job.removesuffix("-seed-0") for job in graph.jobs(study())}
    code, said = quick_run()
    assert code == 0 and "7 jobs, 7 up to date" in said and not executed(said)

    _, said = quick_run("riel.steps=2")
    assert "03_riel-full-seed-0: riel.steps: 3 -> 2" in said
    assert executed(said) == {"03_riel-multi", "03_riel-full", "04_ablations", "05_report"}
    full = study().run("full", 0)
    assert len(RunFolder(full.folder("riel")).read_metrics()) == 2

    project("03_riel", *NOTEBOOKS["03_riel"], "'another plot'")
    _, said = quick_run("riel.steps=2")
    assert "notebooks/03_riel.ipynb cell 3 new" in said and said.count("riel: nothing to train") == 2
    assert executed(said) == {"03_riel-multi", "03_riel-full"}  # what they left behind is the same

    RunFolder(full.folder("riel")).table("rollouts").unlink()
    code, said = quick_run("riel.steps=2")
    assert code == 0 and "rollouts.parquet: missing" in said
    assert "03_riel-full" in executed(said) and "03_riel-multi" not in executed(said)


def test_a_result_that_other_values_left_in_the_folder_is_no_result(project, quick_run):
    quick_run()
    project("03_riel", RUN, P, "'trains nothing'")  # as a cell would that swallows what was raised
    code, said = quick_run("riel.steps=2")
    assert code == 1 and "left: no riel result of these values and this code: riel.steps: 3 -> 2" in said


def test_a_failed_job_keeps_the_others_and_the_same_command_goes_on(project, quick_run):
    good = NOTEBOOKS["03_riel"]
    project("03_riel", *good[:2], "assert p.riel.objective.mutual, 'no mutual learning'", *good[2:])
    code, said = quick_run()
    assert code == 1 and "no mutual learning" in said
    assert executed(said) >= {"03_riel-full", "02_mef-stage1-equations+story+groups"}
    assert "04_ablations: did not run, for want of the above" in said and "03_riel-multi-seed-0: failed" in said
    project("03_riel", *good)
    code, said = quick_run()
    assert code == 0 and "03_riel-multi-seed-0: failed before: AssertionError" in said
    assert executed(said) == {"03_riel-multi", "03_riel-full", "04_ablations", "05_report"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_stopped_study_leaves_no_process_and_no_lock(project, number):
    project("00_experts", RUN, P, "import time\nprint('sleeping')\ntime.sleep(600)")
    process = meml_run()
    assert any("sleeping" in line for line in process.stdout)
    with pytest.raises(runs.InUse, match=f"study light is in use by process {process.pid}"):
        graph.run(study(), 1, print)
    os.kill(process.pid, number)
    assert process.wait(60) in (130, -signal.SIGKILL)
    until = time.monotonic() + 40
    while (left := _children_in(Path.cwd())) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left
    assert RunFolder("reports/light/jobs/00_experts").status["message"] == "interrupted"
    for folder in ("reports/light", "reports/light/jobs/00_experts"):
        with runs.locked(Path(folder) / ".lock", folder):
            pass


def _children_in(folder: Path) -> list[str]:
    """Command lines of live processes that work in this folder, apart from this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and (process / "cwd").resolve().is_relative_to(folder):
                found.append((process / "cmdline").read_text())
        except OSError:  # ended, or not ours to look at
            continue
    return [command for command in found if command]


def test_the_graph_names_parents_threads_and_files(project):
    jobs = graph.jobs(study("seeds=[0,1]"))
    stage1 = [f"02_mef-stage1-equations+story+groups-seed-{seed}" for seed in (0, 1)]
    assert [name for name in jobs if name.startswith("02")] == stage1
    assert jobs["03_riel-full-seed-1"].parents == (stage1[1],)
    assert len(jobs["05_report"].parents) == 6 and jobs["05_report"].threads == 1
    assert jobs["00_experts"].files == (str(study().folder / "experts/tables/teacher_answers.parquet"),)
    first = jobs[stage1[0]]
    assert first.run.folder("mef") == study().run("full", 0).folder("mef")
    assert graph.Job(**json.loads(json.dumps(first.__dict__))).run == first.run


STORE = "{kind: api, model: m, path: store.jsonl, base_url: 'http://x/v1', key_from: null, max_answer_tokens: 9}"


def test_collecting_comes_first_and_what_it_adds_makes_only_others_stale(project, quick_run):
    asked = f"experts.known.story.teacher={STORE}"
    jobs = graph.jobs(study(asked))
    waiting = {name for name, job in jobs.items() if "00_experts" in job.parents}
    assert waiting == {"01_error_overlap", "02_mef-stage1-equations+story+groups-seed-0"}
    assert "collect.budget.money" in jobs["00_experts"].values  # a larger budget has it ask again
    assert not any("00_experts" in job.parents for job in graph.jobs(study()).values())
    project("00_experts", RUN, P, "open('store.jsonl', 'a').write('{}\\n')", TABLE.format("teacher_answers"))
    assert quick_run(asked)[0] == 0
    code, said = quick_run(asked)  # 00 added to its own input, and need not run again for that
    assert code == 0 and not executed(said) and Path("store.jsonl").read_text() == "{}\n"
    with open("store.jsonl", "a") as file:
        file.write('{"more": 1}\n')
    code, said = quick_run(asked)
    assert code == 0 and "00_experts: answers of story changed" in said
    assert {"00_experts", "01_error_overlap"} <= executed(said)


def test_an_arm_of_fine_tuning_alone_has_no_stage_2():
    made = graph.jobs(config.load_study("params/studies/paper-rows-demo.yaml"))
    trained = [name for name, job in made.items() if job.stage]
    assert "02_mef-stage1-story-seed-2" in trained and "03_riel-expert1-grpo-seed-2" in trained
    assert not [name for name in trained if name.startswith("03_riel-") and "-sft-" in name]
    assert made["05_report"].parents == tuple(trained)
