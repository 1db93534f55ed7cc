"""A study on a Slurm cluster of one machine, with jobs killed and requeued half-way, ends with a local run's numbers.

    apt-get install -y --no-install-recommends slurm-wlm munge      # once, as root; this script installs nothing
    .venv/bin/pip install -c constraints.txt -e '.[slurm]'
    .venv/bin/python tests/slurm.py [--study params/studies/smoke.yaml]

As root. munged, slurmctld and slurmd run from a temporary folder, on free ports of 127.0.0.1, without an accounting
database. On a clone of the committed tree: `meml run STUDY --jobs 1`; then `meml run STUDY --profile PROFILE`, in which
the first job of stage 1 is killed as it trains (scancel --signal=KILL), and the first of stage 2 requeued (scontrol
requeue). All that both left is compared as in tests/kills.py: every table, metrics, weights, the report's numbers.
Daemons and jobs are ended in every case. Exit code: 0 the same; 1 a difference, or a process that stayed; 3 Slurm is not
installed or did not start here. Not run by pytest: some minutes on 2 cores.
"""

from __future__ import annotations

import argparse
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
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import kills

from meml_lib.pipeline import processes

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
NOT_HERE = 3
CONFIG = """
ClusterName=meml
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=5
MinJobAge=7200
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
PROFILE = """
partition: main
account: null
time_minutes: 60
memory_mb: 3000
cpus: null
gpus: null
retries: 1
requeue: true
grace_s: 10
check_every_s: 5
sbatch_options: null
"""


class NotHere(RuntimeError):
    """Slurm cannot run on this machine: why."""


# --- the cluster ------------------------------------------------------------------------------------------------------


def missing() -> str:
    """What Slurm lacks here, in words; empty: nothing."""
    if lacking := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(lacking)} not found: apt-get install -y --no-install-recommends slurm-wlm munge"
    return "" if os.getuid() == 0 else "its daemons need root here"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster of this machine alone; yields the environment that its commands need.

    Raises: NotHere.
    """
    if lacks := missing():
        raise NotHere(lacks)
    mark, host = uuid.uuid4().hex, socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, ports=free_ports(2)))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "bin").mkdir()
    srun = folder / "bin" / "srun"  # the executor plugin takes SLURM_CONF from srun's environment
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), kills.MARK: mark}
    environment["PATH"] = f"{folder}/bin:{environment['PATH']}"
    munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    commands = (
        ["munged", "--foreground", *(f"--{option}={folder}/munge.{name}" for option, name in munge.items())],
        ["slurmctld", "-D", "-L", str(folder / "slurmctld.log")],
        ["slurmd", "-D", "-L", str(folder / "slurmd.log")],
    )
    daemons = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "wb") as out:
                with_us = processes.with_parent(signal.SIGKILL)
                daemon = subprocess.Popen(command, env=environment, stdout=out, stderr=out, preexec_fn=with_us)
            daemons.append(daemon)
            time.sleep(1.0)
        wait_for(lambda: "idle" in said("sinfo", "-h", "-o", "%T", env=environment), 60.0, folder, daemons)
        yield environment
    finally:
        subprocess.run(["scancel", "--user", "root"], env=environment, capture_output=True, timeout=60, check=False)
        until = time.monotonic() + 30.0
        while time.monotonic() < until and said("squeue", "-h", env=environment).strip():
            time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(15.0)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        kills.kill(mark)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def said(*command: str, env: dict[str, str]) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False).stdout


def wait_for(true: Callable[[], bool], seconds: float, folder: Path, daemons: list[subprocess.Popen]) -> None:
    until = time.monotonic() + seconds
    while not true():
        dead = [daemon.args[0] for daemon in daemons if daemon.poll() is not None]
        if dead or time.monotonic() > until:
            logs = "\n".join(f"{file.name}: {file.read_text()[-800:]}" for file in sorted(folder.glob("*.[lo][ou]*")))
            raise NotHere(f"{', '.join(dead) or 'the node'} did not come up\n{logs}")
        time.sleep(0.5)


# --- the disturbed run ------------------------------------------------------------------------------------------------


def meml(tree: Path, study: str, reports: Path, environment: dict[str, str], *options: str) -> subprocess.Popen:
    """`meml run STUDY` on the tree."""
    command = [str(Path(sys.executable).with_name("meml")), "run", study, "--reports-dir", str(reports), *options]
    with open(reports.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, cwd=tree, env=environment, stdout=log, stderr=log)


def slurm_jobs(environment: dict[str, str]) -> list[tuple[str, str, str]]:
    """(number, the study's job, state) of all that Slurm remembers."""
    lines = said("squeue", "-h", "--states=all", "-o", "%i|%k|%T", env=environment).splitlines()
    return [(number, name.removeprefix("rule_"), state) for number, name, state in (line.split("|") for line in lines)]


def when_training(study: Path, stage: str, process: subprocess.Popen) -> str:
    """Wait until a stage has recorded a step; the name of its job. Raises: SystemExit where the run ended before."""
    notebook = {"stage1": "02_mef", "stage2": "03_riel"}[stage]
    while process.poll() is None:
        for file in study.glob(f"runs/*/*/{stage}/metrics.jsonl"):
            if json.loads(file.with_name("status.json").read_text())["state"] == "running":
                seed = file.parent.parent
                return f"{notebook}-{seed.parent.name}-{seed.name}"
        time.sleep(0.05)
    raise SystemExit(f"the run ended with {process.returncode} before {stage} trained")


def disturb(study: Path, process: subprocess.Popen, environment: dict[str, str]) -> Iterator[str]:
    """Kill a job of stage 1 and requeue one of stage 2 as they train; lines that say what became of each."""
    for stage, (what, *command) in {
        "stage1": ("killed", "scancel", "--signal=KILL"),
        "stage2": ("requeued", "scontrol", "requeue"),
    }.items():
        job = when_training(study, stage, process)
        number = next(number for number, name, state in slurm_jobs(environment) if name == job and state == "RUNNING")
        subprocess.run([*command, number], env=environment, check=True, timeout=60)
        file, before, started = study / "jobs" / job / "status.json", "", time.monotonic()
        before = file.read_text()
        while process.poll() is None and file.read_text() == before:  # it says "running, by process N"
            time.sleep(0.1)
        now = json.loads(file.read_text())
        again = f"status then {now['state']!r} ({now['message']}), {time.monotonic() - started:.0f} s later"
        yield f"{job} (Slurm job {number}) {what}: {again}"


def starts(environment: dict[str, str]) -> dict[str, int]:
    """How often Slurm started each of the study's jobs."""
    found: dict[str, int] = {}
    for number, name, _ in slurm_jobs(environment):
        restarts = re.search(r"Restarts=(\d+)", said("scontrol", "show", "job", number, env=environment))
        found[name] = found.get(name, 0) + 1 + int(restarts[1])
    return found


def compared(given: argparse.Namespace, folder: Path, environment: dict[str, str]) -> list[str]:
    """Both runs; what differs or went wrong."""
    tree, name = folder / "tree", Path(given.study).stem
    subprocess.run(["git", "clone", "--quiet", str(kills.ROOT), str(tree)], check=True)
    commit = subprocess.check_output(["git", "-C", str(tree), "rev-parse", "--short=10", "HEAD"], text=True).strip()
    (tree / "params" / "profiles" / "one-machine.yaml").write_text(PROFILE)
    environment = environment | {"PYTHONPATH": str(tree)}
    started = time.monotonic()
    if meml(tree, given.study, folder / "local", environment, "--jobs", "1").wait():
        return ["the local run failed:\n" + (folder / "local.log").read_text()[-3000:]]
    expected = kills.results(folder / "local" / name)
    print(f"{given.study} at commit {commit}: locally in {time.monotonic() - started:.0f} s, {len(expected)} files")
    started = time.monotonic()
    process = meml(tree, given.study, folder / "slurm", environment, "--profile", "one-machine")
    for line in disturb(folder / "slurm" / name, process, environment):
        print(f"- {line}", flush=True)
    code, log = process.wait(), (folder / "slurm.log").read_text()
    print(f"on Slurm {said('sbatch', '--version', env=environment).split()[-1]} in {time.monotonic() - started:.0f} s")
    times = starts(environment)
    print("jobs, and how often Slurm started each: " + ", ".join(f"{job} {n}" for job, n in sorted(times.items())))
    faults = [f"the run on Slurm ended with {code}:\n{log[-3000:]}"] if code else []
    if sorted(times.values())[-3:] != [1, 2, 2]:
        faults.append("not two of the jobs, and those twice, were started again")
    found = kills.results(folder / "slurm" / name)
    print(f"{len(found)} files compared: {sum(file.endswith('.parquet') for file in found)} tables among them")
    return faults + list(kills.differences(expected, found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", default="params/studies/smoke.yaml")
    parser.add_argument("--keep", action="store_true", help="leave the folder of both runs")
    given = parser.parse_args()
    processes.sigterm_as_interrupt()
    folder = Path(tempfile.mkdtemp(prefix="meml-slurm-"))
    folder.chmod(0o755)  # munge's clients must reach its socket
    (folder / "cluster").mkdir()
    try:
        with cluster(folder / "cluster") as environment:
            faults = compared(given, folder, environment)
        if left := kills.of_trial(environment[kills.MARK]):
            faults.append(f"{len(left)} processes stayed")
    except NotHere as error:
        print(f"Slurm does not run here: {error}")
        return NOT_HERE
    finally:
        if not given.keep:
            shutil.rmtree(folder)
    print("\n".join(["", *faults]) if faults else "identical")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
