"""Train one stage: here or in processes of its own, with its result kept until something that it depends on changes."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meml_lib import config, runs, schema
from meml_lib.analysis import signs
from meml_lib.pipeline import keys, outputs, processes, reach, watch
from meml_lib.runs import RunFolder
from meml_lib.training import checkpoints

if TYPE_CHECKING:
    import pandas as pd

CURVE_EVERY_S = 3.0
STAGE = keys.STAGE
GO_ON = ("steps", "epochs", "lr", "warmup_steps", "decay", "stop_at")
"""Values of a stage with which it may go on from a checkpoint that others led to."""
KEPT = ("checkpoints", "metrics.jsonl", "rollouts.jsonl", "tracking")
"""What a training that goes on needs of its folder."""


def _code() -> dict[str, str]:
    return reach.code_of(f"import {STAGE}\n{STAGE}", keys.not_reached(None, None))


# A kernel that has loaded the training code goes on with it when the file is edited. The key is made of the files, so
# edited code trains in a process of its own.
_CODE_AT_IMPORT = _code()


def train(stage: config.Stage, p: config.Run) -> pd.DataFrame:
    """Train a stage unless its folder holds the result already; the metrics, one row a step.

    Where another process trains in the same folder, waits for its result.

    Raises: whatever the training raises; FileNotFoundError or RuntimeError where stage 2 finds no fitting stage 1.
    """
    watch.check_packages(p)
    folder = RunFolder(p.folder(stage))
    with runs.locked(folder.path.parent / f".{folder.path.name}.lock", str(folder.path), wait_s=math.inf) as lock:
        if stage == "riel":
            _check_stage1(p)
        parts = keys.stage_parts(stage, p)
        status = folder.status
        why = keys.reasons(status.get("parts"), parts)
        going_on, changed = _goes_on(stage, p, status, parts)
        if status.get("continued") and not p.hardware.checkpoints.go_on:
            why.append(f"it went on with other values ({'; '.join(status['continued'])})")
        if status["state"] == "done" and not why:
            why = outputs.stage_faults(stage, p)
            if not why:
                print(f"{stage}: nothing to train, {folder.path} holds this result ({status['message']})")
                _keep_when_done(folder, p.hardware.checkpoints.kept_when_done)
                return folder.read_metrics()
        elif status["state"] in ("running", "failed"):
            why = [f"the last training did not end well ({status['message'] or status['state']})", *why]
        if not _alone(p):
            _check_port(p)
        print(f"{stage}: training in {folder.path}, because " + "; ".join(why[:8]) + ("; ..." if why[8:] else ""))
        continued = [*status.get("continued", []), *changed] if going_on else []
        known = (folder.path / "manifest.json").is_file()  # a training killed at its very start has none
        earlier = folder.read_json("manifest").get("resumed", []) if going_on and known else []
        if not going_on:
            _clear_aside(folder)
        elif status["state"] == "done":
            _copy_aside(folder, parts, continued)
        facts = {"parts": parts} | ({"continued": continued} if continued else {})
        folder.set_status("running", f"process {os.getpid()} is training", **facts)  # first: whose folder it is
        if going_on:
            _clear_all_but_checkpoints(folder)
        folder.write_json("values", p.model_dump(mode="json"))
        parents = [config.label_of(p.folder("mef"))] if stage == "riel" else []
        resumed = {"resumed": earlier, "continued": continued} if going_on else {}
        runs.write_manifest(folder, stage=stage, seed=p.seed, inputs=parts["inputs"], parents=parents, **resumed)
        started = time.monotonic()
        try:
            with closing(_Display(stage, p, folder)) as display, processes.sigterm_interrupts():
                if _alone(p) and _code() == _CODE_AT_IMPORT:
                    from meml_lib.training import stage as stages

                    stages.run(stage, p, display.show)
                else:
                    _train_in_processes(stage, p, folder, display.show, lock)
            faults = outputs.stage_faults(stage, p)
            if faults:
                raise RuntimeError(f"{stage} ended, but its results are not complete: " + "; ".join(faults))
        except BaseException as error:
            with suppress(OSError):  # on a full disk "running" stays, by a process that is gone
                folder.set_status("failed", f"{type(error).__name__}: {error}", **facts)
            raise
        seconds = round(time.monotonic() - started, 1)
        runs.end_manifest(folder, wall_s=seconds)
        folder.set_status("done", f"trained in {seconds:g} s", **facts)
        _keep_when_done(folder, p.hardware.checkpoints.kept_when_done)
        return folder.read_metrics()


def _goes_on(stage: str, p: config.Run, status: dict[str, Any], parts: keys.Parts) -> tuple[bool, list[str]]:
    """Whether training goes on from a checkpoint in the folder, and which values were others before it.

    Raises: RuntimeError where hardware.checkpoints.go_on asks for it and something else has changed, or none is there.
    """
    before, there = status.get("parts"), any((p.folder(stage) / "checkpoints").glob("step-*"))
    if before is None:
        return False, []
    changed = keys.reasons({"values": before["values"]}, {"values": parts["values"]})
    if not keys.reasons(before, parts):
        return there and status["state"] != "done", []
    if not p.hardware.checkpoints.go_on:
        return False, []
    may = {f"{stage}.{name}" for name in GO_ON} | {f"{stage}.stop_at.{name}" for name in schema.StopAtParams.model_fields}
    others = [line for line in keys.reasons(before, parts) if line.partition(": ")[0] not in may]
    if others:
        todo = "set it to false to train anew, or change back"
        raise RuntimeError(f"hardware.checkpoints.go_on=true, but more has changed than {', '.join(GO_ON)}: "
                           f"{'; '.join(others[:4])}; {todo}")  # fmt: skip
    if not there:
        raise RuntimeError(f"hardware.checkpoints.go_on=true, but {p.folder(stage)} holds no checkpoint (kept_when_done keeps "
                           "some); set it to false to train anew")  # fmt: skip
    return True, changed


def _copy_aside(folder: RunFolder, parts: keys.Parts, continued: list[str]) -> None:
    """Keep a complete result as NAME.old, and go on in a copy of its checkpoints."""
    old, new = (folder.path.with_name(name) for name in (f"{folder.path.name}.old", f".{folder.path.name}.next"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for name in KEPT:
        source = folder.path / name
        if source.is_dir():
            shutil.copytree(source, new / name)
        elif source.is_file():
            shutil.copy2(source, new / name)
    RunFolder(new).set_status("failed", "about to go on", parts=parts, continued=continued)
    shutil.rmtree(old, ignore_errors=True)
    folder.path.rename(old)
    new.rename(folder.path)


def _clear_all_but_checkpoints(folder: RunFolder) -> None:
    for place in folder.path.iterdir():
        if place.name not in (*KEPT, "status.json", "manifest.json"):
            shutil.rmtree(place) if place.is_dir() else place.unlink()


def _keep_when_done(folder: RunFolder, count: int) -> None:
    """Checkpoints are large; the rollouts' lines stand in a table too."""
    checkpoints.prune(folder.path / "checkpoints", count)
    if not count:
        (folder.path / "rollouts.jsonl").unlink(missing_ok=True)


def _check_stage1(p: config.Run) -> None:
    """Stage 2 must not go on from a stage 1 that other values made."""
    folder, again = RunFolder(p.folder("mef")), "notebook 02_mef, or launch.train('mef', p)"
    status = folder.status
    if status["state"] != "done":
        found = f"stage 1 in {folder.path} is {status['state']} ({status['message']})"
        raise FileNotFoundError(f"{found}; train it first: {again}")
    parts = keys.stage_parts("mef", p)
    why = keys.reasons(status["parts"], parts | {"code": status["parts"]["code"]})
    if why:
        found = f"stage 1 in {folder.path} was trained with other values ({'; '.join(why)})"
        raise RuntimeError(f"{found}; train it again: {again}")
    if status["parts"]["code"] != parts["code"]:
        print(f"note: code has changed since stage 1 in {folder.path} was trained")


def _clear_aside(folder: RunFolder) -> None:
    """Make way: the last complete result is kept as NAME.old, an incomplete one is removed."""
    if not folder.path.exists() or not any(folder.path.iterdir()):
        return
    state, old = folder.status["state"], folder.path.with_name(f"{folder.path.name}.old")
    if state == "absent" and not all(file.name.startswith(".status.json.") for file in folder.path.iterdir()):
        raise RuntimeError(f"{folder.path} holds files that no training wrote; give another run_dir, or move them")
    if state != "done":  # renamed first: killed while it removes, it would leave files without a status
        old = folder.path.with_name(f".{folder.path.name}.gone")
    shutil.rmtree(old, ignore_errors=True)
    folder.path.rename(old)
    if state != "done":
        shutil.rmtree(old)


# --- in processes of their own ----------------------------------------------------------------------------------------


def _train_in_processes(
    stage: str, p: config.Run, folder: RunFolder, show: Callable[[dict], None], lock: int | None = None
) -> None:
    """Start one process for each rank, pass rank 0's lines on, and end them all if anything goes wrong.

    Args: lock: which the processes hold on to: where this one is killed, they may still be writing a checkpoint.
    """
    logs = folder.path / "logs"
    logs.mkdir()
    threads = str(p.hardware.threads or max(1, runs.cores() // p.hardware.processes))
    with open(logs / "launcher.log", "wb") as log:
        process = subprocess.Popen(
            _command(p, logs, ["-m", STAGE, stage, str(folder.path / "values.json")]),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": threads},
            start_new_session=True,  # a group of its own, that can be ended as one
            preexec_fn=processes.with_parent(),
            pass_fds=() if lock is None else (lock,),
        )
    seen = read = 0
    try:
        ended = False
        while not ended:
            time.sleep(0.2)
            ended = process.poll() is not None
            records, seen = folder.metrics_from(seen) if folder.progress else ([], 0)  # not before it is cut back
            for record in records:
                show(record)
            lines, read = runs.lines_from(logs / "launcher.log", read)
            for line in lines:
                if _alone(p) or line.startswith("[default0]:"):
                    print(line.removeprefix("[default0]:"))
    finally:
        processes.end_group(process)
    if process.returncode:
        raise RuntimeError(_first_failure(logs, process.returncode))


def _command(p: config.Run, logs: Path, worker: list[str]) -> list[str]:
    if _alone(p):
        return [sys.executable, *worker]
    count, file = str(p.hardware.processes), p.hardware.accelerate_config
    if p.hardware.device == "cpu" or not runs.gpus():  # accelerate's --cpu starts one process, with a file too
        machines = config.accelerate_values(p).get("num_machines", 1)
        if machines != 1:
            raise config.ParamsError(f"{file}: num_machines={machines} must be 1 where there is no GPU")
        options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
        options += ["--nproc-per-node", count, "--tee", "3", "--log-dir", str(logs)]
        return [sys.executable, "-m", "torch.distributed.run", *options, *worker]
    options = ["--num_processes", count, "--tee", "3", "--log_dir", str(logs)]
    if file:  # machines, their addresses and ports, FSDP: all in the file
        options += ["--config_file", str(config.locate(file))]
    else:  # port 0: a free one
        options += ["--multi_gpu", "--num_machines", "1", "--main_process_port", "0"]
        options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, *worker]


def _check_port(p: config.Run) -> None:
    """Say that the port which an accelerate config names is taken; accelerate takes another one, or gives up late.

    Raises: OSError on the machine of rank 0, which opens it.
    """
    values, file = config.accelerate_values(p), p.hardware.accelerate_config
    port = values.get("main_process_port")
    if not port or int(values.get("machine_rank") or 0):  # 0: a free one
        return
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", int(port)))
        except OSError as error:
            todo = "end the process that holds it, or name another (0: a free one)"
            raise OSError(f"{file}: main_process_port={port} is in use ({error.strerror}); {todo}") from error


def _alone(p: config.Run) -> bool:
    """Whether one plain process does it, so that a kernel can be that process."""
    return p.hardware.processes == 1 and not p.hardware.accelerate_config


def _first_failure(logs: Path, code: int) -> str:
    """The message of the rank that failed first: what the other ranks say is only that it is gone."""
    launcher = (logs / "launcher.log").read_text(encoding="utf-8", errors="replace")
    cause = re.search(r"Root Cause.*?rank\s*:\s*(\d+)", launcher, re.DOTALL)
    rank = cause.group(1) if cause else "0"
    own = "".join(file.read_text(errors="replace") for file in logs.glob(f"**/{rank}/stderr.log"))
    tail = "\n".join((own or launcher).splitlines()[-15:])
    ended = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"training ended {ended}; rank {rank} failed first ({logs}):\n{tail}"


# --- what a person sees -----------------------------------------------------------------------------------------------


class _Display:
    """A stage's progress; curves too, where a person watches in a notebook."""

    def __init__(self, stage: config.Stage, p: config.Run, folder: RunFolder):
        self._folder, self._progress = folder, runs.Progress(stage, "step")
        self._order = list(p.experts.known)  # one colour an expert, also in arms without the others
        self._watch = signs.Watch(p.riel) if stage == "riel" else None
        self._curve_at, self._curve = time.monotonic(), None

    def show(self, record: dict[str, Any]) -> None:
        self._progress.show(record["step"] + 1, self._folder.progress.get("steps"), _numbers(record))
        for sign in self._watch.see(record) if self._watch else ():
            self._progress.write(str(sign))
        if runs.in_kernel() and runs.watched() and time.monotonic() - self._curve_at >= CURVE_EVERY_S:
            from IPython.display import display

            from meml_lib.analysis import figures

            self._curve_at, self._curve = time.monotonic(), self._curve or display(display_id=True)
            self._curve.update(figures.curves(self._folder.read_metrics(), order=self._order))

    def close(self) -> None:
        self._progress.close()
        if self._curve is not None:  # the notebook shows the finished curves itself
            self._curve.update({}, raw=True)


def _numbers(record: dict[str, Any]) -> str:
    shown = ("reward", "loss", "validation_accuracy")
    return ", ".join(f"{name} {record[name]:.3f}" for name in shown if record.get(name) is not None)
