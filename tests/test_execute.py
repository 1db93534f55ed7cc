"""Jobs on light notebooks: what fails says so, what is done is kept, what is stale runs again and nothing else does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import light
import nbformat
import pytest
from light import ANSWERS, NOTEBOOKS, P, RUN, meml_run

from meml_lib import config, training
from meml_lib.pipeline import execute, graph, launch
from meml_lib.runs import RunFolder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The light project, in which the test works. project(name, cells) rewrites one of its notebooks."""
    light.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(light.HERE.parent))
    environment = dict(os.environ)
    yield partial(light.write, tmp_path)
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

    def in_order(folder: Path, *_) -> int:
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


def test_a_kernel_opens_no_network_port(project, capsys):
    """Two jobs that start at the same time drew the same free port about once in 70 starts; sockets are files."""
    transport = "from ipykernel.connect import get_connection_info\nprint(get_connection_info(unpack=True)['transport'])"
    project("00_experts", RUN, P, transport, ANSWERS)
    jobs = graph.jobs(study())
    execute.execute(jobs["00_experts"], jobs)
    assert "[00_experts] ipc\n" in capsys.readouterr().out


def test_a_line_is_one_write_with_its_end_for_jobs_share_a_pipe():
    says = "from types import SimpleNamespace as job; from meml_lib.pipeline import execute\n"
    says += "execute._say(job(name='05_report'), 'done in 1.9 s')"
    reading, writing = socket.socketpair(type=socket.SOCK_DGRAM)  # what is read at once was written at once
    unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
    subprocess.run([sys.executable, "-c", says], stdout=writing, env=unbuffered, cwd=light.HERE.parent, check=True)
    with reading, writing:
        reading.setblocking(False)
        assert reading.recv(4096) == b"[05_report] done in 1.9 s\n"
        with pytest.raises(BlockingIOError):
            reading.recv(4096)


def test_a_misspelt_parameter_fails_in_the_first_cells(project):
    project("00_experts", RUN.replace("overrides", "overide"), P, ANSWERS)
    jobs = graph.jobs(study())
    with pytest.raises(execute.JobFailed, match="cell 3 .*overide: nothing reads.*did you mean 'overrides'"):
        execute.execute(jobs["00_experts"], jobs)


# --- a study ----------------------------------------------------------------------------------------------------------


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
    assert "notebooks/03_riel.ipynb code cell 5 new" in said and said.count("riel: nothing to train") == 2
    assert executed(said) == {"03_riel-multi", "03_riel-full"}  # what they left behind is the same

    RunFolder(full.folder("riel")).table("rollouts").unlink()
    code, said = quick_run("riel.steps=2")
    assert code == 0 and "rollouts.parquet: missing" in said
    assert "03_riel-full" in executed(said) and "03_riel-multi" not in executed(said)


def test_what_is_trained_anew_by_hand_draws_the_reports_again(project, quick_run):
    quick_run()
    by_hand = RunFolder(study().run("full", 0).folder("riel"))
    by_hand.append_metrics({"step": 3, "loss": 0.1, "reward": 0.5})
    by_hand.write_json("status", by_hand.status)
    code, said = quick_run()
    assert code == 0 and "03_riel-full-seed-0: riel has been trained since, by hand" in said
    assert executed(said) == {"04_ablations", "05_report"}
    assert "7 up to date" in quick_run()[1]


def test_a_result_that_other_values_left_in_the_folder_is_no_result(project, quick_run):
    quick_run()
    project("03_riel", RUN, P, "'trains nothing'")  # as a cell would that swallows what was raised
    code, said = quick_run("riel.steps=2")
    assert code == 1 and "left: no riel result of these values and this code: riel.steps: 3 -> 2" in said


def test_a_rerun_that_was_stopped_half_way_is_gone_on_with(project, quick_run, monkeypatch):
    """The reports follow their stage 2 by nothing but its results: once it is done, they alone are behind."""
    quick_run()

    def stopped(folder: Path, *_) -> int:
        jobs = graph.load(folder / "jobs.json")
        for job in (job for job in jobs.values() if job.stage == "riel"):
            execute.execute(job, jobs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(graph, "_snakemake", stopped)
        quick_run("riel.steps=2")
    code, said = quick_run("riel.steps=2")
    assert code == 0 and executed(said) == {"03_riel-multi", "03_riel-full", "04_ablations", "05_report"}


def test_a_failed_job_keeps_the_others_and_the_same_command_goes_on(project, quick_run):
    good = NOTEBOOKS["03_riel"]
    project("03_riel", *good[:2], "assert p.riel.objective.mutual, 'no mutual learning'", *good[2:])
    code, said = quick_run()
    assert code == 1 and "no mutual learning" in said
    assert executed(said) >= {"03_riel-full", "02_mef-stage1-equations+story+groups"}
    assert "04_ablations: did not run, for want of the above" in said and "03_riel-multi-seed-0: failed" in said
    project("03_riel", *good)
    code, said = quick_run()
    assert code == 0 and "03_riel-multi-seed-0: failed: AssertionError" in said
    assert executed(said) == {"03_riel-multi", "03_riel-full", "04_ablations", "05_report"}


def test_a_job_that_failed_in_an_earlier_run_and_was_not_reached_in_this_one_did_not_run(project, quick_run):
    project("03_riel", *NOTEBOOKS["03_riel"][:2], "assert False, 'stage 2 broke'")
    assert "03_riel-full-seed-0: failed: AssertionError: stage 2 broke" in quick_run()[1]
    project("02_mef", *NOTEBOOKS["02_mef"][:2], "assert False, 'stage 1 broke'")
    code, said = quick_run("mef.lr=0.5")
    assert code == 1 and "03_riel-full-seed-0: did not run, for want of the above" in said


def test_magics_and_shell_lines_are_code_and_what_is_no_python_is_named_before_anything_runs(project):
    notebook = Path("notebooks/04_ablations.ipynb")
    project("04_ablations", light.OF_STUDY, light.S, "%%time\nx = 1", "names = !ls -a")
    assert graph.code_cells(notebook)[4] == "names = get_ipython().getoutput('ls -a')\n"
    before = graph.jobs(study())["04_ablations"].parts()["notebook"]
    project("04_ablations", light.OF_STUDY, light.S, "%%time\nx = 1", "names = !ls")
    after = graph.jobs(study())["04_ablations"].parts()["notebook"]
    assert [name for name in after if after[name] != before[name]] == ["notebooks/04_ablations.ipynb code cell 4"]
    project("04_ablations", light.OF_STUDY, light.S, "y = 1\nx = (")
    with pytest.raises(config.ParamsError, match="notebooks/04_ablations.ipynb, code cell 3, line 2: "):
        graph.run(study(), 1, print)


def test_the_graph_names_parents_threads_and_files(project):
    jobs = graph.jobs(study("seeds=[0,1]"))
    stage1 = [f"02_mef-stage1-equations+story+groups-seed-{seed}" for seed in (0, 1)]
    assert [name for name in jobs if name.startswith("02")] == stage1
    assert jobs["03_riel-full-seed-1"].parents == (stage1[1],)
    assert len(jobs["05_report"].parents) == 6 and jobs["05_report"].threads == 1
    assert jobs["00_experts"].files == (str(study().folder / "experts/tables/teacher_answers.parquet"),)
    first = jobs[stage1[0]]
    assert first.run.folder("mef") == study().run("full", 0).folder("mef")
    assert graph.Job(**json.loads(json.dumps(asdict(first)))).run == first.run


STORE = "{kind: api, model: m, path: store.jsonl, base_url: 'http://x/v1', key_from: null, max_answer_tokens: 9}"


def test_collecting_comes_first_and_what_it_adds_makes_only_others_stale(project, quick_run):
    asked = f"experts.known.story.teacher={STORE}"
    jobs = graph.jobs(study(asked))
    waiting = {name for name, job in jobs.items() if "00_experts" in job.parents}
    assert waiting == {"01_error_overlap", "02_mef-stage1-equations+story+groups-seed-0"}
    assert "collect.budget.money" in jobs["00_experts"].values  # a larger budget has it ask again
    assert not any("00_experts" in job.parents for job in graph.jobs(study()).values())
    project("00_experts", RUN, P, "open('store.jsonl', 'a').write('{}\\n')", ANSWERS)
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
