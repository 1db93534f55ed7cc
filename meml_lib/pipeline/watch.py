"""What a person sees while a study runs: a live block on a terminal, plain lines anywhere else.

All of it is read from what jobs write down: markers and status.json, the notebook that papermill saves at each cell,
a stage's progress.json and metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meml_lib import config, runs
from meml_lib.analysis import signs
from meml_lib.pipeline import processes
from meml_lib.runs import RunFolder

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from meml_lib.pipeline.graph import Job

LOOK_EVERY_S = 0.5
BAR, ROOMY = 20, 90
"""Columns of a bar, and of the narrowest terminal that has room for one."""


class Watch:
    """How far a study is; rich renders it as a table of the jobs that run.

    Args: study: its name; clock: seconds.
    """

    def __init__(self, study: str, jobs: dict[str, Job], clock: Callable[[], float] = time.monotonic):
        self._study, self._jobs, self._clock, self._started = study, jobs, clock, clock()
        self._before = {name: _changed(_status(job)) for name, job in jobs.items()}
        self._running: dict[str, _Running] = {}
        self._done = self._failed = 0

    def look(self) -> list[str]:
        """Read what has changed; the signs of trouble that are new."""
        undone = [job for job in self._jobs.values() if not job.done.exists()]
        states = {job.name: self.state(job) for job in undone}
        self._done, self._failed = len(self._jobs) - len(undone), list(states.values()).count("failed")
        running = [job for job in undone if states[job.name] == "running"]
        self._running = {job.name: self._running.get(job.name) or _Running(job, self._clock) for job in running}
        return [f"[{name}] {sign}" for name, job in self._running.items() for sign in job.look()]

    def state(self, job: Job) -> str:
        """A job's in this run; empty: it has not begun, whatever an earlier run left."""
        return RunFolder(job.folder).status["state"] if _changed(_status(job)) != self._before[job.name] else ""

    @property
    def standing(self) -> tuple[str, ...]:
        """Jobs done of all, and how many failed."""
        failed = (f"{self._failed} failed",) if self._failed else ()
        return f"{self._done}/{len(self._jobs)} jobs done", *failed

    def __str__(self) -> str:
        return f"{self._study}: {', '.join(self.standing)}, {runs.duration(self._clock() - self._started)}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        elapsed = runs.duration(self._clock() - self._started)
        names, running, bars = [self._study, *self._running], self._running.values(), options.max_width >= ROOMY
        shares = [(self._done, len(self._jobs)), *(job.share for job in running)]
        rows = [(self.standing[0], "".join(self.standing[1:]), elapsed), *(job.told() for job in running)]
        others = sum(max(12, *(len(row[column]) for row in rows)) + 2 for column in range(3)) + (BAR + 2) * bars
        room = options.max_width - 2 - others  # 2 for the ^C that a terminal echoes: it must not wrap
        grid = Table.grid(padding=(0, 2, 0, 0))
        for justify, width in (("left", 0), *[("left", BAR)] * bars, ("left", 12), ("right", 12), ("right", 12)):
            grid.add_column(justify=justify, min_width=width, no_wrap=True, overflow="crop")
        for name, (done, total), row in zip(names, shares, rows):
            bar = (ProgressBar(total=total or 1, completed=done, width=BAR),) if bars else ()
            grid.add_row(_cut(name, room), *bar, *row)
        yield grid


class _Running:
    """A job that runs: what its files said last."""

    def __init__(self, job: Job, clock: Callable[[], float]):
        run = job.run
        self._job, self._since = job, _changed(_status(job))
        self._stage = RunFolder(run.folder(job.stage)) if job.stage else None
        self._signs = signs.Watch(run.riel) if job.stage == "riel" else None
        self._pace, self._offset, self._doing = runs.Pace(clock), 0, ""
        self._step = self._cell = (0, 0)
        self._cell_at = self._since

    @property
    def share(self) -> tuple[int, int]:
        """(done, of how many): steps while it trains, else cells."""
        return self._step if self._doing else self._cell

    def look(self) -> list[signs.Sign]:
        self._read_cell()
        stage, self._doing = self._stage, ""
        newer = stage is not None and _changed(stage.path / "status.json") > self._since
        if not newer or stage.status["state"] != "running":
            return []
        self._doing = stage.progress.get("doing", "")
        if not self._doing:  # what stands there may still be cut back to a checkpoint
            return []
        records, self._offset = stage.metrics_from(self._offset)
        if records:
            self._step = records[-1]["step"] + 1, stage.progress.get("steps", 0)
            self._pace.see(self._step[0])
        return [sign for record in records for sign in self._signs.see(record)] if self._signs else []

    def _read_cell(self) -> None:
        changed = _changed(self._job.executed)
        if changed <= self._cell_at:
            return
        try:
            cells = json.loads(self._job.executed.read_text(encoding="utf-8"))["cells"]
        except ValueError:  # papermill is writing it
            return
        started = [n for n, cell in enumerate(cells) if cell["metadata"].get("papermill", {}).get("start_time")]
        self._cell, self._cell_at = (started[-1] + 1 if started else 0, len(cells)), changed

    def told(self) -> tuple[str, str, str]:
        """Where it is, how fast it goes or what it does there, and how long that will take."""
        (step, steps), (cell, cells) = self._step, self._cell
        if not self._doing or not step:
            return f"cell {cell}/{cells}" if cell else "starting", self._doing, ""
        rate = self._pace.told(steps or None, "step") if self._doing == "training" else (self._doing, "")
        return f"step {step}/{steps}" if steps else f"step {step}", *rate


def check_packages(p: config.Run) -> None:
    """Raises: config.ParamsError for an engine or a tracker that is not installed; accelerate would leave the tracker out."""
    if p.sampling.engine == "vllm" and find_spec("vllm") is None:
        place = p.sources.get("sampling.engine", "default")
        todo = "make vllm, then .venv-vllm/bin/meml instead of meml; or sampling.engine=native"
        raise config.ParamsError(f"sampling.engine ({place}): vllm is not installed here: {todo}")
    for name, version in runs.versions(p.tracking.trackers).items():
        if version is None:
            place = p.sources.get("tracking.trackers", "default")
            raise config.ParamsError(f"tracking.trackers ({place}): {name} is not installed here: pip install {name}")


def _status(job: Job) -> Path:
    return Path(job.folder) / "status.json"


def _changed(file: Path) -> int:
    """When, in the file system's ns; 0: it does not exist."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _cut(text: str, width: int) -> str:
    """A name's two ends: both tell jobs apart.

    >>> _cut("02_mef-equations+story-seed-0", 16)
    '02_mef-...seed-0'
    """
    width = max(width, 8)
    half = (width - 2) // 2
    return text if len(text) <= width else f"{text[:half]}...{text[half + 3 - width:]}"


# --- while it runs ----------------------------------------------------------------------------------------------------


def run(command: Sequence[str], watch: Watch, say: Callable[[str], None], end_by: int = signal.SIGTERM) -> int:
    """Run a study's command and show how far it is.

    Args: say: prints a line; end_by: the signal that ends it early.
    Returns: its exit code.
    """
    from rich.console import Console

    console = Console()
    live = sys.stdout.isatty() and not console.is_dumb_terminal and not console.no_color
    with _live(watch, say, console) if live else _plain(watch, say) as (streams, refresh):
        with_meml = processes.with_parent(signal.SIGKILL)

        def begin() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background job ignores, and its children
            with_meml()

        process = subprocess.Popen(command, start_new_session=True, preexec_fn=begin, **streams)
        try:
            while process.poll() is None:
                time.sleep(LOOK_EVERY_S)
                refresh()
            return process.returncode
        finally:
            processes.end_group(process, patience_s=30.0, number=end_by)


Shown = tuple[dict[str, Any], Callable[[], None]]
"""Where the command is to write (Popen's arguments), and what to call now and then."""


@contextmanager
def _plain(watch: Watch, say: Callable[[str], None]) -> Iterator[Shown]:
    """Lines: those of the jobs as they come, and one whenever a job has ended."""

    def refresh() -> None:
        before = watch.standing
        watch.look()
        if watch.standing != before:
            say(str(watch))

    watch.look()
    yield {}, refresh
    refresh()


@contextmanager
def _live(watch: Watch, say: Callable[[str], None], console: Console) -> Iterator[Shown]:
    """A block at the end of the terminal; what the jobs say of themselves scrolls above it."""
    from rich.live import Live
    from rich.text import Text

    def above(line: str) -> None:
        console.print(Text.from_ansi(line), soft_wrap=True)

    def pass_on() -> None:
        with open(reading, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                above(line.rstrip("\n"))

    def refresh() -> None:
        for sign in watch.look():
            above(sign)
        block.refresh()

    reading, writing = os.pipe()
    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    with Live(watch, console=console, auto_refresh=False, transient=True) as block:
        try:
            refresh()
            yield {"stdout": writing, "stderr": writing, "env": os.environ | {runs.QUIET: "1"}}, refresh
        finally:
            os.close(writing)
            reader.join(timeout=5.0)
    watch.look()
    say(str(watch))
