"""A study killed at random moments and started again ends with the numbers of one that nothing disturbed.

    .venv/bin/python tests/kills.py [--kills 50] [--seed 0] [--study params/studies/demo-short.yaml] [--set KEY=VALUE ...]

One undisturbed `meml run STUDY`; then, each in a folder of its own, runs that are killed with SIGKILL. In turn: the `meml`
process alone, at a random moment of the undisturbed run's time; every process of its tree at once, as a power cut does, at a
random moment; and every process at once while one of them is inside each of PLACES, a random while after it was first seen
there. The study is smoke's or the like with a checkpoint after every step, so that runs go on from one. It waits until no
process of the killed run is left (60 s at most), runs the same command to its end, and compares all that is left: every
parquet table, metrics.jsonl, trained weights, report.json, and the CSVs of the report and its figures, apart from LEFT_OUT.
All of it runs on a clone of the committed tree, so that edits meanwhile disturb nothing. Ends with 1 on any difference. Not
run by pytest: about half an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
MARK = "MEML_KILLS_TRIAL"  # an environment variable that all processes of a trial inherit, whoever becomes their parent
PATIENCE_S = 60.0
PLACES = {  # what a process must be inside of, file:function of the library, all of them
    "sampling": "training/riel.py:train rollouts/native.py:sample",
    "update": "training/riel.py:train training/learner.py:update",
    "buffer flush": "training/riel.py:train training/riel.py:_ground_truth",
    "checkpoint write": "training/checkpoints.py:write",
    "evaluation": "training/evaluate.py:measure",
    "report": "analysis/report.py:write",
}
# Looks at the main thread's stack; at the asked place, for the asked many looks, it says so and stops the process for good.
WATCHER = """
import os, signal, sys, threading, time
def watch(place, looks, said, main=threading.main_thread().ident):
    sought = {tuple(part.split(":")) for part in place.split()}
    while looks:
        time.sleep(0.0005)
        frame, missing = sys._current_frames().get(main), set(sought)
        while frame and missing:
            name, file = frame.f_code.co_name, frame.f_code.co_filename
            missing = {part for part in missing if part[1] != name or not file.endswith(part[0])}
            frame = frame.f_back
        looks -= not missing
    try:
        os.close(os.open(said, os.O_CREAT | os.O_EXCL))
    except FileExistsError:  # another process was there first
        return
    os.kill(os.getpid(), signal.SIGSTOP)
if "MEML_KILLS_AT" in os.environ:
    place, looks, said = os.environ["MEML_KILLS_AT"].split("|")
    threading.Thread(target=watch, args=(place, int(looks), said), daemon=True).start()
"""
LEFT_OUT = {
    "seconds": "a step's time",
    "tokens_per_s": "the same",
    "sample_seconds": "the same",
    "train_seconds": "the same",
    "sample_tokens_per_s": "the same",
    "train_tokens_per_s": "the same",
    "wall_s": "a stage's time",
    "wall time, s": "the same, in runs.csv",
    "peak_memory_mib": "a stage's memory",
    "message": "a stage's status in words: 'trained in 4.6 s'",
    "Experiments compute resources": "a line of checklist.csv that adds up time and memory",
}
"""Keys of records, columns and lines that are not compared, and why."""


@dataclass
class Trial:
    """One run that was killed, and what became of it."""

    number: int
    how: str
    at_s: float
    """After the start, as drawn or as it came."""
    whole_s: float
    """Of an undisturbed run, as last seen: the machine may be busier or less so than at the beginning."""
    running: str = ""
    left_s: float = 0.0
    """Until no process of it was left."""
    up_to_date: str = ""
    """Jobs that the rerun found done."""
    resumed: str = ""
    """The steps after which the rerun's stages went on."""
    rerun_s: float = 0.0
    tables: int = 0
    faults: list[str] = field(default_factory=list)

    def row(self) -> str:
        result = "; ".join(self.faults[:3]) or "identical"
        cells = (self.number, self.how, f"{self.at_s:.1f}", self.running, f"{self.left_s:.1f}", self.up_to_date, self.resumed,
                 f"{self.rerun_s:.0f}", self.tables, result)  # fmt: skip
        return f"| {' | '.join(str(cell) for cell in cells)} |"


HEAD = "| | killed | at, s | running then | all gone after, s | jobs kept | went on after step | rerun, s | files compared | result |\n"
HEAD += "|---|---|---|---|---|---|---|---|---|---|"


# --- processes --------------------------------------------------------------------------------------------------------


def start(given: argparse.Namespace, tree: Path, reports: Path, mark: str, at: str = "") -> subprocess.Popen:
    """`meml run STUDY` on the tree, as a person starts it. Args: at: where WATCHER stops it."""
    environment = os.environ | {MARK: mark, "PYTHONPATH": f"{tree.with_name('watcher')}:{tree}"}
    environment |= {"MEML_KILLS_AT": at} if at else {}
    meml = Path(sys.executable).with_name("meml")
    with open(reports.with_suffix(".log"), "ab") as log:
        command = [str(meml), "run", given.study, "--reports-dir", str(reports)]
        command += [word for value in given.set for word in ("--set", value)]
        return subprocess.Popen(command, cwd=tree, env=environment, stdout=log, stderr=log)


def of_trial(mark: str) -> list[int]:
    """Living processes that carry the mark."""
    sought, found = f"{MARK}={mark}".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if sought in (place / "environ").read_bytes().split(b"\0") and " Z " not in (place / "stat").read_text():
                found.append(int(place.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended meanwhile, or somebody else's
            continue
    return found


def kill(mark: str) -> None:
    """All of a trial's processes at once: stopped first, so that none sees another end."""
    while found := of_trial(mark):
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in found:
                try:
                    os.kill(process, number)
                except ProcessLookupError:
                    continue


def seconds_until_gone(mark: str) -> float:
    started = time.monotonic()
    while of_trial(mark) and time.monotonic() - started < PATIENCE_S:
        time.sleep(0.1)
    return time.monotonic() - started


def running(study: Path) -> str:
    """The jobs that were under way, and how far the stage that trained had come."""
    found = []
    for file in sorted(study.glob("jobs/*/status.json")):
        if json.loads(file.read_text())["state"] == "running":
            found.append(file.parent.name)
    for file in sorted(study.glob("runs/*/*/stage?/status.json")):
        if json.loads(file.read_text())["state"] == "running":
            metrics = file.with_name("metrics.jsonl")
            steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            found.append(f"{file.parent.relative_to(study / 'runs')} after step {steps}")
    done = len(list(study.glob("jobs/*/done")))
    return ", ".join(found) or f"no job ({done} done)"


# --- results ----------------------------------------------------------------------------------------------------------


def results(study: Path) -> dict[str, object]:
    """File -> what must be the same in every run."""
    found: dict[str, object] = {}
    for file in sorted(file for file in study.rglob("*") if file.is_file() and not _aside(file.relative_to(study))):
        name = str(file.relative_to(study))
        if file.suffix == ".parquet":
            found[name] = pd.read_parquet(file)
        elif name.endswith("metrics.jsonl"):
            found[name] = [_without(json.loads(line)) for line in file.read_text().splitlines()]
        elif name == "report/report.json":
            found[name] = _without(json.loads(file.read_text()))
        elif file.suffix == ".csv":
            rows = csv.DictReader(file.read_text().splitlines())
            found[name] = [_without(row) for row in rows if LEFT_OUT.keys().isdisjoint(row.values())]
        elif file.parent.name == "model" and file.name != "README.md":  # which names the command
            found[name] = file.read_bytes()
        else:
            found[name] = "is there"  # manifests, status, notebooks, pictures: they hold times, or show the above
    return found


def _aside(path: Path) -> bool:
    """Locks, Snakemake's own records, logs."""
    return ".snakemake" in path.parts or path.suffix in (".lock", ".log") or path.name == ".lock"


def _without(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if key not in LEFT_OUT}
    return [_without(item) for item in value] if isinstance(value, list) else value


def differences(expected: dict[str, object], found: dict[str, object]) -> Iterator[str]:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            yield f"{name} is {'missing' if name not in found else 'left over'}"
        elif isinstance(expected[name], pd.DataFrame):
            try:
                pd.testing.assert_frame_equal(expected[name], found[name], check_exact=True)
            except AssertionError as error:
                yield f"{name}: {' '.join(str(error).split())[:200]}"
        elif expected[name] != found[name]:
            yield f"{name} differs"


# --- the trials -------------------------------------------------------------------------------------------------------


def trial(
    given: argparse.Namespace, draw: random.Random, number: int, whole_s: float, tree: Path, folder: Path
) -> Trial:
    """Kill one run and bring it to its end. A run that ended before its moment came tells how long one takes now."""
    ways = ["`meml` alone", "all at once", *(f"in {place}" for place in PLACES)]
    how, looks = ways[number % len(ways)], int(10 ** draw.uniform(0, 2.5))
    place = how.removeprefix("in ") if how.startswith("in ") else None
    for attempt in range(8):
        reports, mark, at_s = folder / f"trial-{number}-{attempt}", uuid.uuid4().hex, draw.uniform(0.0, whole_s)
        found = Trial(number, how, at_s, whole_s)
        said, started = reports.with_suffix(".stopped"), time.monotonic()
        at = "|".join([PLACES[place], str(max(1, looks // 3**attempt)), str(said)]) if place else ""
        process = start(given, tree, reports, mark, at)
        try:
            while place and not said.exists() and process.poll() is None:
                time.sleep(0.01)
            found.at_s = time.monotonic() - started if place else at_s
            process.wait(0.05 if place else at_s)
            whole_s = time.monotonic() - started
            continue
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL) if how == ways[0] else kill(mark)
        process.wait()
        study = reports / Path(given.study).stem
        found.running = running(study)
        found.left_s = seconds_until_gone(mark)
        if left := of_trial(mark):
            found.faults.append(f"{len(left)} processes were left after {PATIENCE_S:g} s")
            kill(mark)
        break
    else:
        raise SystemExit(f"trial {number}: eight runs ended before they could be killed ({how})")
    started, mark = time.monotonic(), uuid.uuid4().hex
    log = reports.with_suffix(".log")
    before = log.stat().st_size
    process = start(given, tree, reports, mark)
    try:
        code = process.wait(10 * whole_s + 300)
    except subprocess.TimeoutExpired:
        kill(mark)
        code = process.wait()
    found.rerun_s = time.monotonic() - started
    said = log.read_bytes()[before:].decode()
    found.resumed = ", ".join(re.findall(r"goes on after step (\d+)", said))
    found.up_to_date = next((line.split(", ")[1].split()[0] for line in said.splitlines() if "up to date" in line), "?")
    if code:
        found.faults.append(f"the rerun ended with {code}: " + " / ".join(said.splitlines()[-4:]))
    if of_trial(mark):
        found.faults.append("the rerun left processes")
        kill(mark)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--study", default="params/studies/demo-short.yaml")
    parser.add_argument("--set", action="append", default=["hardware.checkpoints.every=1"], help="as for `meml run`")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="meml-kills-") as name:
        folder, tree = Path(name), Path(name) / "tree"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
        tree.with_name("watcher").mkdir()
        (tree.with_name("watcher") / "sitecustomize.py").write_text(WATCHER)
        commit = subprocess.check_output(["git", "-C", str(tree), "rev-parse", "--short=10", "HEAD"], text=True).strip()
        started = time.monotonic()
        process = start(given, tree, folder / "whole", "whole")
        if process.wait():
            print((folder / "whole.log").read_text()[-3000:])
            return 1
        whole_s = time.monotonic() - started
        study = Path(given.study).stem
        expected = results(folder / "whole" / study)
        values = " ".join(f"--set {value}" for value in given.set)
        print(f"{given.study} {values} at commit {commit}: undisturbed in {whole_s:.0f} s, {len(expected)} files\n", flush=True)
        print(HEAD, flush=True)
        trials = []
        for number in range(1, given.kills + 1):
            found = trial(given, draw, number, whole_s, tree, folder)
            reports = max(folder.glob(f"trial-{number}-*/"), key=lambda place: place.stat().st_mtime)
            after = results(reports / study)
            found.tables = len(after)
            found.faults += differences(expected, after)
            trials.append(found)
            whole_s = found.whole_s
            print(found.row(), flush=True)
        bad = [found for found in trials if found.faults]
        print(f"\n{len(trials) - len(bad)} of {len(trials)} identical. Not compared:")
        print("\n".join(f"- `{name}`: {why}" for name, why in LEFT_OUT.items()))
        for found in bad:
            print(f"\ntrial {found.number}:\n" + "\n".join(found.faults))
        return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
