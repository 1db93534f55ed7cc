"""A study's graph of jobs: one notebook execution each. Snakemake decides the order and runs them side by side."""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from meml_lib import config, runs, schema
from meml_lib.analysis import card
from meml_lib.pipeline import gpus, keys, outputs, reach, slurm, watch
from meml_lib.runs import RunFolder


RESULTS_OF = "results of "


@dataclass(frozen=True)
class Job:
    """One notebook with its parameters, what must exist after it, and which jobs it waits for."""

    name: str
    notebook: str
    parameters: dict[str, Any]
    folder: str
    """Its executed notebook, status and manifest."""
    values: dict[str, Any]
    """What it reads, dotted key -> value: a part of its key."""
    threads: int
    parents: tuple[str, ...] = ()
    resources: dict[str, Any] = field(default_factory=dict)
    """What Snakemake counts, or asks a cluster for."""
    gpus: int | None = None
    """How many of this machine's GPUs it is handed; None: it sees what its environment shows."""
    stage: config.Stage | None = None
    files: tuple[str, ...] = ()
    """Files that it must leave behind, besides the stage's own."""
    adds_to: tuple[str, ...] = ()
    """Inputs to which it adds itself: stores of collected answers."""
    cell_timeout_s: float | None = None
    job_timeout_s: float | None = None

    @cached_property
    def run(self) -> config.Run | None:
        """The run of a job whose notebook takes a run file."""
        if "run_dir" not in self.parameters:
            return None
        places = {name: value for name, value in self.parameters.items() if name != "params_file"}
        return config.load_run(self.parameters["params_file"], **places)

    @property
    def done(self) -> Path:
        """Snakemake's marker: exists while the job's outputs are complete."""
        return Path(self.folder) / "done"

    @property
    def executed(self) -> Path:
        """The notebook with its outputs."""
        return Path(self.folder) / Path(self.notebook).name

    def parts(self, parents: dict[str, Job] | None = None) -> keys.Parts:
        """All that the job's outputs depend on; with `parents`, also what those left behind."""
        notebook, run = config.root() / self.notebook, self.run
        cells = code_cells(notebook)
        files = keys.input_files(run) if run else {}
        parts: keys.Parts = {
            "values": self.values,
            "code": reach.code_of("\n".join(cells.values()), keys.not_reached(self.stage, run)),
            "notebook": {f"{self.notebook} code cell {n}": reach.normalised(cell) for n, cell in cells.items()},
            "inputs": {name: runs.hash_file(file) for name, file in files.items()},
            "versions": runs.versions(keys.VERSIONS),
        }
        if parents is not None:
            parts["inputs"] |= {RESULTS_OF + name: parent.results() for name, parent in parents.items()}
        return parts

    def stage_parts(self) -> keys.Parts | None:
        """What its stage's result depends on now; None: it trains nothing."""
        return keys.stage_parts(self.stage, self.run) if self.stage else None

    def faults(self, trained_with: keys.Parts | None = None) -> list[str]:
        """What is missing or wrong in the job's outputs; empty: complete.

        Args: trained_with: what its stage must have been trained with; None: what it would be trained with now.
        """
        faults = []
        if self.stage:
            status = RunFolder(self.run.folder(self.stage)).status
            why = keys.reasons(status.get("parts"), trained_with or self.stage_parts())
            if status.get("continued") and not self.run.hardware.checkpoints.go_on:
                why.append(f"it went on with other values ({'; '.join(status['continued'])})")
            if status["state"] != "done" or why:
                return [f"no {self.stage} result of these values and this code: {'; '.join(why) or status['message']}"]
            faults = outputs.stage_faults(self.stage, self.run)
        return faults + [fault for file in (self.executed, *self.files) for fault in outputs.file_faults(Path(file))]

    def results(self) -> str:
        """Hash of what the job left behind, apart from logs and times."""
        files = [Path(file) for file in self.files]
        if self.stage:
            stage = self.run.folder(self.stage)
            files += [file for part in ("tables", "model") for file in (stage / part).glob("*") if file.name != card.NAME]
            files.append(stage / "metrics.jsonl")
        return keys.key({str(file): {"": runs.hash_file(file)} for file in sorted(files)})


def code_cells(notebook: Path) -> dict[int, str]:
    """Number among the code cells, from 1 -> code; without the parameter cell.

    Text cells are not counted: a new one must not rename those behind it.

    Raises: config.ParamsError for a cell that is no Python, nor IPython's.
    """
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    code = {n: cell for n, cell in enumerate(cells, start=1) if "parameters" not in cell["metadata"].get("tags", [])}
    place = f"{config.label_of(notebook)}, code cell"
    return {n: _python("".join(cell["source"]), f"{place} {n}") for n, cell in code.items()}


def _python(source: str, place: str) -> str:
    """A cell's code, with magics and shell lines (% and !), which can matter too, as the calls that they stand for."""
    with suppress(SyntaxError):
        ast.parse(source)
        return source
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        code = TransformerManager().transform_cell(source)
        ast.parse(code)
    except SyntaxError as error:
        raise config.ParamsError(f"{place}, line {error.lineno}: {error.msg}") from error
    return code


def jobs(study: config.Study) -> dict[str, Job]:
    """Experts and overlap once; stage 1 for each group of arms and seed; stage 2 for each arm and seed; the report."""
    made: dict[str, Job] = {}

    def add(name: str, notebook: str, parameters: dict, values: dict, run: config.Run, **more: Any) -> str:
        made[name] = Job(
            name=name,
            notebook=f"notebooks/{notebook}.ipynb",
            parameters=parameters,
            folder=str(study.folder / "jobs" / name),
            values={".".join(path): value for path, value in config.leaves(values)},
            threads=min(run.hardware.threads or runs.cores(), runs.cores()) * run.hardware.processes,
            cell_timeout_s=run.hardware.cell_timeout_s,
            job_timeout_s=run.hardware.job_timeout_s,
            **more,
        )
        return name

    def of_run(name: str, notebook: str, arm: str | None, seed: int, run: config.Run, values: dict, **more: Any) -> str:
        parameters = {"params_file": study.run_params_file, "overrides": study.overrides_of(arm, seed)}
        parameters |= {"run_dir": config.label_of(run.run_dir)}
        if run.stage1_dir:
            parameters |= {"stage1_dir": config.label_of(run.stage1_dir)}
        return add(name, notebook, parameters, values, run, **more)

    base = study.base_run()
    asked = {"task": base.reads("mef")["task"], "experts": base.reads("mef")["experts"]}
    teachers = {name: base.experts.known[name].teacher for name in base.experts.panel}
    stores = tuple(key for name, own in teachers.items() if own.kind == "api" for key in keys.answer_files(name, own))
    collected = ("00_experts",) if stores else ()
    collects = {"collect": base.values()["collect"]} if stores else {}
    answers, errors = (str(RunFolder(base.run_dir).table(name)) for name in ("teacher_answers", "error_overlap"))
    first = (None, study.seeds[0], base)
    of_run("00_experts", "00_experts", *first, asked | collects, files=(answers,), adds_to=stores)
    of_run("01_error_overlap", "01_error_overlap", *first, asked, files=(errors,), parents=collected)
    for group, arms in study.stage1_groups().items():
        for seed in study.seeds:
            arm = study.run(arms[0], seed)
            alone = arm.model_copy(update={"run_dir": arm.folder("mef").parent, "stage1_dir": None})
            name, values = f"02_mef-{group}-seed-{seed}", arm.reads("mef")
            stage1 = of_run(name, "02_mef", arms[0], seed, alone, values, stage="mef", parents=collected)
            for name in arms:
                if study.arms[name].last_stage == "mef":
                    continue
                run = study.run(name, seed)
                more = {"stage": "riel", "parents": (stage1,)}
                of_run(f"03_riel-{name}-seed-{seed}", "03_riel", name, seed, run, run.reads("riel"), **more)
    told = study.model_dump(mode="json", include=set(schema.StudyParams.model_fields))
    told |= {"run": {name: value for name, value in base.values().items() if name not in ("hardware", "tracking", "collect")}}
    trained = tuple(name for name, job in made.items() if job.stage)
    add("04_ablations", "04_ablations", study.parameters(), told, base, parents=trained)
    report = str(study.folder / "report" / "report.html")
    add("05_report", "05_report", study.parameters(), told, base, parents=trained, files=(report,))
    return made


# --- running it -------------------------------------------------------------------------------------------------------


def run(
    study: config.Study,
    at_once: int | None,
    say: Callable[[str], None],
    profile: schema.ClusterProfile | None = None,
) -> int:
    """Bring a study up to date.

    Args:
      at_once: jobs side by side; None: as many as there are cores for, or GPUs where they are used; on a cluster, all.
      say: prints a line.
      profile: what each job asks a cluster for; None: they run on this machine.
    Returns: exit code: 0, or Snakemake's.
    Raises: runs.InUse while another process runs the same study; config.ParamsError for GPUs or a cluster that are not here.
    """
    made = jobs(study)
    if profile:
        slurm.check()
        base = study.base_run()
        made = {name: slurm.asked(job, profile, (job.run or base).hardware) for name, job in made.items()}
        options = slurm.options(profile, study.name, at_once or len(made))
    else:
        made, options = _on_this_machine(made, at_once)
    missing = sorted({job.notebook for job in made.values() if not (config.root() / job.notebook).is_file()})
    if missing:
        raise config.ParamsError(f"{', '.join(missing)} missing in {config.root()}: work in a checkout of the project")
    for arm in study.arms:
        watch.check_packages(study.run(arm, study.seeds[0]))
    with runs.locked(study.folder / ".lock", f"study {study.name}", wait_s=2.0):
        parts = {name: job.parts() for name, job in made.items()}
        described = [asdict(job) | {"key": keys.key(parts[job.name])} for job in made.values()]
        RunFolder(study.folder).write_json("jobs", {"root": str(config.root()), "jobs": described})
        stale = {name: why for name, job in made.items() if (why := _why_stale(job, parts[name]))}
        say(f"{study.name}: {len(made)} jobs, {len(made) - len(stale)} up to date ({config.label_of(study.folder)})")
        for name, why in stale.items():
            say(f"  {name}: {'; '.join(why[:4])}{'; ...' if why[4:] else ''}")
        waiting: set[str] = set()
        for name, job in made.items():  # what follows a stale job is behind too, also after an interruption
            if name in stale or waiting & {*job.parents}:
                waiting.add(name)
                job.done.unlink(missing_ok=True)
        code, folder, watching = 0, RunFolder(study.folder), watch.Watch(study.name, made)
        if stale:
            inputs = {name: value for of_job in parts.values() for name, value in of_job["inputs"].items()}
            facts = {"study": study.name, "params_file": study.params_file, "seeds": study.seeds, "inputs": inputs}
            runs.write_manifest(folder, **facts, jobs={name: why[:8] for name, why in stale.items()})
            started = time.monotonic()
            code = _snakemake(study.folder, options, watching, say)
            runs.end_manifest(folder, wall_s=round(time.monotonic() - started, 1))
        undone = [job for job in made.values() if not job.done.exists()]
        for job in undone:
            say(f"  {job.name}: {(watching.state(job) and _failed(job)) or 'did not run, for want of the above'}")
        return code or int(bool(undone))


def _on_this_machine(made: dict[str, Job], at_once: int | None) -> tuple[dict[str, Job], list[str]]:
    """The jobs with GPUs of their own where they use some, and Snakemake's options for so many side by side."""
    known, threads = gpus.known(), max(job.threads for job in made.values())
    needed = {name: gpus.needed(job.run, known) for name, job in made.items() if job.stage}
    if most := max(needed.values(), default=0):
        made = {
            name: replace(job, gpus=(count := needed.get(name, 0)), resources={"gpu": count}) for name, job in made.items()
        }
        at_once = at_once or len(known) // most
    at_once = at_once or max(1, runs.cores() // threads)
    return made, ["--cores", str(at_once * threads), "--resources", f"gpu={len(known)}", "--retries", "0"]


def _failed(job: Job) -> str | None:
    """How the job failed, in a line; None: it did not."""
    status = RunFolder(job.folder).status
    if status["state"] == "running":
        return "failed: cut off before it could say why (killed, or a full disk)"
    return f"failed: {status['message'].splitlines()[0]}" if status["state"] == "failed" else None


def _why_stale(job: Job, parts: keys.Parts) -> list[str]:
    """Why the job has to run, from its own record."""
    status = RunFolder(job.folder).status
    if status["state"] == "done" and job.done.exists():
        recorded = status["parts"]
        own = {name: value for name, value in recorded["inputs"].items() if not name.startswith(RESULTS_OF)}
        why = keys.reasons(recorded | {"inputs": own}, parts) or job.faults()
        trained = RunFolder(job.run.folder(job.stage)).path / "status.json" if job.stage else None
        if trained and not why and trained.stat().st_mtime_ns > job.done.stat().st_mtime_ns:
            why = [f"{job.stage} has been trained since, by hand"]  # the same values may give other numbers
    else:
        why = [_failed(job) or "not done yet"]
    return why


def _snakemake(folder: Path, options: list[str], watching: watch.Watch, say: Callable[[str], None]) -> int:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(Path(__file__).with_name("Snakefile"))]
    on_cluster = "--executor" in options
    quiet = ("progress", "rules", "host", "reason") if on_cluster else ("all",)
    command += ["--directory", str(folder), "--keep-going", "--rerun-incomplete", *options]
    command += ["--rerun-triggers", "params", "input", "mtime"]
    command += ["--nolock", "--quiet", *quiet]  # our own lock ends with its process; job lines are execute's
    return watch.run(command, watching, say, signal.SIGINT if on_cluster else signal.SIGTERM)  # SIGINT: it cancels jobs


def load(file: Path) -> dict[str, Job]:
    """The jobs that `run` wrote down. Also moves to the project folder, which all their paths start from."""
    written = json.loads(file.read_text(encoding="utf-8"))
    os.chdir(written["root"])
    fields = set(Job.__dataclass_fields__)
    jobs_ = [Job(**{key: _tuple(value) for key, value in job.items() if key in fields}) for job in written["jobs"]]
    return {job.name: job for job in jobs_}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
