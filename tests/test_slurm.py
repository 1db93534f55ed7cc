"""What jobs ask Slurm for. With Slurm installed, a light study runs on a cluster of this machine; see also tests/slurm.py."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import light
import pytest
import slurm as machine

from meml_lib import config, schema
from meml_lib.pipeline import execute, graph, slurm
from meml_lib.runs import RunFolder


def profile(**values) -> schema.ClusterProfile:
    return config.load_profile("slurm").model_copy(update=values)


def asked(profile: schema.ClusterProfile, *overrides: str) -> dict[str, graph.Job]:
    study = config.load_study("params/studies/smoke.yaml", list(overrides))
    hardware = study.base_run().hardware
    return {name: slurm.asked(job, profile, hardware) for name, job in graph.jobs(study).items()}


def test_a_job_asks_for_what_the_profile_says():
    jobs = asked(profile(partition="long", account="lab", time_minutes=90, memory_mb=5000, cpus=6, sbatch_options="--nice=5"))
    assert jobs["05_report"].threads == 6
    assert jobs["05_report"].resources == {
        "runtime": 90,
        "mem_mb": 5000,
        "slurm_partition": "long",
        "slurm_account": "lab",
        "slurm_extra": "--signal=TERM@60 --nice=5",
    }
    assert jobs["05_report"].gpus is None  # Slurm hands them out


def test_what_the_profile_leaves_open_comes_from_the_hardware():
    jobs = asked(profile(), "hardware.device=cuda", "hardware.processes=2", "hardware.threads=3")
    assert jobs["03_riel-full-seed-0"].threads == 6 and jobs["03_riel-full-seed-0"].resources["gpu"] == 2
    assert not {"gpu", "slurm_partition", "slurm_account"} & jobs["05_report"].resources.keys()
    assert "gpu" not in asked(profile())["03_riel-full-seed-0"].resources  # device: cpu
    with pytest.raises(config.ParamsError, match="gpus = 1: 02_mef.* has .*processes=2; .*gpus: 2, or gpus: null"):
        asked(profile(gpus=1), "hardware.device=cuda", "hardware.processes=2")


@pytest.mark.parametrize(("database", "command"), [(True, "sacct"), (False, "squeue")])
def test_the_options_of_a_cluster(monkeypatch, tmp_path, database, command):
    (tmp_path / "sacct").write_text(f"#!/bin/sh\nexit {0 if database else 1}\n")
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = slurm.options(profile(retries=2, requeue=False), "a study, of 2", 7)
    assert options[options.index("--slurm-status-command") + 1] == command
    assert {"--executor slurm", "--jobs 7", "--retries 2"} < {" ".join(pair) for pair in zip(options, options[1:])}
    assert "--slurm-no-requeue" in options and "--slurm-requeue" not in options
    assert options[options.index("--slurm-jobname-prefix") + 1] == "meml-a-study--of-2"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("partitoin: long", "own.yaml:2: partitoin is not a known key; did you mean 'partition'?"),
        ("time_minutes: 0", "own.yaml:2: time_minutes = 0: must be greater than 0"),
        ("memory_mb: 4G", "own.yaml:2: memory_mb = '4G': must be a valid integer"),
        ("check_every_s: 200", "own.yaml:2: check_every_s = 200: must be less than or equal to 100"),
    ],
)
def test_a_wrong_value_of_a_profile_is_named_with_its_place(tmp_path, line, message):
    shutil.copy(config.root() / "params" / "profiles" / "slurm.yaml", tmp_path / "shipped.yaml")
    (tmp_path / "own.yaml").write_text(f"use: [{tmp_path}/shipped.yaml]\n{line}\n")
    with pytest.raises(config.ParamsError) as error:
        config.load_profile(str(tmp_path / "own.yaml"))
    assert message in str(error.value)


def test_a_profile_that_is_not_there_and_a_machine_without_slurm_are_named(monkeypatch):
    with pytest.raises(config.ParamsError, match="no file 'profiles/slrm.yaml' in params/; did you mean 'profiles/slurm.yaml'"):
        config.load_profile("slrm")
    monkeypatch.setattr(slurm.runs, "versions", dict.fromkeys)
    with pytest.raises(config.ParamsError, match=r"snakemake-executor-plugin-slurm is not installed here: .*\[slurm\]"):
        slurm.check()
    monkeypatch.setattr(slurm.runs, "versions", lambda names: dict.fromkeys(names, "2"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(config.ParamsError, match="sbatch is not found here: .*login node"):
        slurm.check()


@pytest.mark.parametrize(
    ("state", "message", "own"), [("failed", "cell 3", True), ("failed", execute.INTERRUPTED, False), ("running", "", False)]
)
def test_only_a_job_that_failed_by_itself_since_the_run_began_is_not_tried_again(tmp_path, state, message, own):
    job = graph.jobs(config.load_study("params/studies/smoke.yaml", [], tmp_path))["05_report"]
    began = tmp_path / "jobs.json"
    began.write_text("{}")
    RunFolder(job.folder).set_status(state, message)
    assert execute._failed_since(job, began) is own
    later = (Path(job.folder) / "status.json").stat().st_mtime_ns + 10**9
    os.utime(began, ns=(later, later))
    assert not execute._failed_since(job, began)


@pytest.mark.skipif(bool(machine.missing()), reason=machine.missing())
@pytest.mark.skipif(not slurm.runs.versions([slurm.PLUGIN])[slurm.PLUGIN], reason=f"{slurm.PLUGIN} is not installed")
def test_a_light_study_runs_on_slurm_and_a_job_of_it_that_fails_is_started_once():
    with tempfile.TemporaryDirectory(prefix="meml-slurm-") as name:
        folder, project = Path(name), Path(name) / "project"
        folder.chmod(0o755)
        (folder / "cluster").mkdir()
        light.make(project)
        (project / "params" / "profiles").mkdir()
        (project / "params" / "profiles" / "own.yaml").write_text(machine.PROFILE)
        light.write(project, "04_ablations", light.OF_STUDY, light.S, "assert False, 'no ablation'")
        with machine.cluster(folder / "cluster") as environment:
            environment = environment | {"PYTHONPATH": str(light.HERE.parent)}
            process = light.meml_run("--profile", "own", cwd=project, env=environment)
            said, _ = process.communicate(timeout=600)
            starts = machine.starts(environment)
        assert process.returncode == 1 and "6/7 jobs done" in said, said
        assert "of notebooks/04_ablations.ipynb: AssertionError: no ablation\n" in said.partition("04_ablations: failed: ")[2]
        assert starts.pop("04_ablations") == 2 and set(starts.values()) == {1}  # its second start does nothing
