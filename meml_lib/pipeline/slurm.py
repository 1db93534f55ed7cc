"""A study's jobs on a Slurm cluster, by Snakemake's executor plugin: what each job asks for, and the plugin's options.

Every node is to see the same checkout, environment, data and reports folder, at the same paths.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

from meml_lib import config, runs, schema

if TYPE_CHECKING:
    from meml_lib.pipeline.graph import Job

PLUGIN = "snakemake-executor-plugin-slurm"
LATENCY_S = 60
"""How long a file that a node wrote may take to be seen here."""


def check() -> None:
    """Raises: config.ParamsError where jobs cannot be handed to Slurm from here."""
    if runs.versions([PLUGIN])[PLUGIN] is None:
        raise config.ParamsError(f"{PLUGIN} is not installed here: pip install -c constraints.txt -e '.[slurm]'")
    if shutil.which("sbatch") is None:
        raise config.ParamsError("sbatch is not found here: run the command where Slurm's are (a login node)")


def asked(job: Job, profile: schema.ClusterProfile, hardware: schema.HardwareParams) -> Job:
    """The job with what it asks Slurm for.

    Args: hardware: of its run, or of its study's run file.
    Raises: config.ParamsError where the profile gives it fewer GPUs than it has processes.
    """
    signal = f"--signal=TERM@{profile.grace_s}" if profile.grace_s else ""
    wanted = {
        "runtime": profile.time_minutes,
        "mem_mb": profile.memory_mb,
        "slurm_partition": profile.partition,
        "slurm_account": profile.account,
        "slurm_extra": " ".join(filter(None, [signal, profile.sbatch_options])),
        "gpu": _gpus(job, profile, hardware),
    }
    threads = profile.cpus or (hardware.threads or 1) * hardware.processes
    return replace(job, threads=threads, resources={name: value for name, value in wanted.items() if value})


def _gpus(job: Job, profile: schema.ClusterProfile, hardware: schema.HardwareParams) -> int:
    if job.stage is None:
        return 0
    takes = hardware.processes if hardware.device == "cuda" else 0
    given = takes if profile.gpus is None else profile.gpus
    if given < takes and not hardware.accelerate_config:
        found = f"the profile's gpus = {given}: {job.name} has hardware.device=cuda, hardware.processes={takes}"
        raise config.ParamsError(f"{found}; give each process a GPU: gpus: {takes}, or gpus: null")
    return given


def options(profile: schema.ClusterProfile, study: str, at_once: int) -> list[str]:
    """Snakemake's options for a study whose jobs Slurm runs, so many at once."""
    name = re.sub(r"[^A-Za-z0-9_-]", "-", f"meml-{study}")[:50]
    given = ["--executor", "slurm", "--jobs", str(at_once), "--retries", str(profile.retries)]
    given += ["--latency-wait", str(LATENCY_S), "--slurm-jobname-prefix", name]
    given += ["--slurm-requeue" if profile.requeue else "--slurm-no-requeue"]
    given += ["--slurm-init-seconds-before-status-checks", str(profile.check_every_s)]
    return given + ["--slurm-status-command", "sacct" if _keeps_accounts() else "squeue"]


def _keeps_accounts() -> bool:
    """Whether sacct tells of ended jobs; it is installed everywhere, and fails where the cluster has no database."""
    if shutil.which("sacct") is None:
        return False
    return subprocess.run(["sacct", "-X", "--noheader"], capture_output=True, timeout=60, check=False).returncode == 0
