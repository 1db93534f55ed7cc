"""A run's folder: tables, metrics, status and manifest. Each write is atomic: readers see the old file or the new."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

_SELF_AND_CHILDREN = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
HEADLESS = "MEML_HEADLESS"
"""Environment variable that `pipeline.execute` sets: inside a kernel nothing else tells that nobody watches."""
QUIET = "MEML_QUIET"
"""Environment variable: a live display stands in the terminal, so that notebooks' own lines stay in them."""
LOG_EVERY_S = 5.0
LITTLE_SPACE = 16 * 2**20
"""Bytes."""
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "pandas", "snakemake", "papermill")


class RunFolder:
    """Where one stage of one run (or one job) keeps its results.

    tables/NAME.parquet, metrics.jsonl (one record a step), model/, checkpoints/; values, manifest, status and progress (.json).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r}, {self.status['state']})"

    def table(self, name: str) -> Path:
        """The file of a table."""
        return self.path / "tables" / f"{name}.parquet"

    def write_table(self, name: str, frame: pd.DataFrame) -> Path:
        """Keep a table, without its index."""
        with atomic(self.table(name)) as file:
            frame.to_parquet(file, index=False)
        return self.table(name)

    def read_table(self, name: str) -> pd.DataFrame:
        """Raises: FileNotFoundError naming the tables that are there."""
        import pandas as pd

        if not self.table(name).is_file():
            there = sorted(file.stem for file in self.table(name).parent.glob("*.parquet"))
            raise FileNotFoundError(f"no table {name!r} in {self.path} (tables there: {there}; {self._standing()})")
        return pd.read_parquet(self.table(name))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one step's record. None where a step has no such number (no row of a loss, no validation).

        Raises: ValueError naming the metric that is nan or infinite: a broken step must not pass for a result.
        """
        if odd := not_finite(record):
            raise ValueError(f"metric {odd}: must be finite")
        self.append("metrics", [dict(record)])

    def append(self, name: str, records: Iterable[Any]) -> None:
        """Add lines to NAME.jsonl. Raises: ValueError for nan or infinity."""
        self.path.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with open(self.path / f"{name}.jsonl", "ab", buffering=0) as file:  # one write call: the lines or nothing
            file.write(lines.encode())

    def read_metrics(self) -> pd.DataFrame:
        """One row a step. Raises: FileNotFoundError where no step has been recorded."""
        import pandas as pd

        file = self.path / "metrics.jsonl"
        if not file.is_file():
            raise FileNotFoundError(f"no metrics.jsonl in {self.path} ({self._standing()})")
        return pd.DataFrame(self.metrics_from(0)[0])

    def metrics_from(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """(records after `offset` bytes, the offset after them); a line still being written is left for later."""
        lines, offset = lines_from(self.path / "metrics.jsonl", offset)
        return [json.loads(line) for line in lines], offset

    def write_json(self, name: str, value: Any) -> Path:
        """Keep NAME.json. Raises: ValueError for nan or infinity."""
        with atomic(self.path / f"{name}.json") as file:
            file.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        return self.path / f"{name}.json"

    def read_json(self, name: str) -> Any:
        return json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))

    @property
    def status(self) -> dict[str, Any]:
        """{state: absent | running | done | failed, message, ...}."""
        try:
            return self.read_json("status")
        except FileNotFoundError:
            return {"state": "absent", "message": "nothing has run here"}

    def set_status(self, state: str, message: str = "", **facts: Any) -> None:
        self.write_json("status", {"state": state, "message": message, **facts})

    @property
    def progress(self) -> dict[str, Any]:
        """{steps: how many this training takes, doing: training | evaluating}; empty before its first step."""
        try:
            return self.read_json("progress")
        except FileNotFoundError:
            return {}

    def _standing(self) -> str:
        return f"{self.status['state']}: {self.status['message'] or 'no message'}"


def not_finite(record: Mapping[str, Any]) -> str | None:
    """The first number of a step's record that is nan or infinite, in words."""
    odd = (name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value))
    return next((f"{name} = {record[name]} at step {record.get('step')}" for name in odd), None)


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A place to write to, beside `file`, that takes its name once the block has ended without an error.

    What a process that was killed while it wrote has left there is removed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for torn in file.parent.glob(f".{glob.escape(file.name)}.*-*"):
        writer = torn.name.rpartition(".")[2].partition("-")[0]
        if writer.isdigit() and not _lives(int(writer)):
            torn.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.{os.getpid()}-")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def little_space(folder: Path, before: str = "") -> str:
    """How much the disk of a folder has left, after `before`, where that is little enough to be why a write failed."""
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free
    told = f"{free:,} bytes" if free < 2**20 else f"{free / 2**20:.0f} MiB"
    return f"{before}the disk of {folder} has only {told} left: make room on it" if free < LITTLE_SPACE else ""


def lines_from(file: Path, offset: int) -> tuple[list[str], int]:
    """(whole lines after `offset` bytes, the offset after them) of a file that may still grow, or not exist yet."""
    if not file.is_file():
        return [], offset
    with open(file, "rb") as stream:
        stream.seek(offset)
        whole, newline, _ = stream.read().rpartition(b"\n")
    return whole.decode(errors="replace").splitlines(), offset + len(whole) + len(newline)


def hash_file(file: Path) -> str:
    """sha256 of a file's content, in hex."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class InUse(RuntimeError):
    """Another living process holds this folder."""


@contextmanager
def locked(file: Path, what: str, wait_s: float = 0.0) -> Iterator[int]:
    """Hold a lock for the block; the system drops it when the process ends, however it ends. Yields its file's handle: a
    child that inherits it holds the lock too.

    Raises: InUse, with the holder's process id, if it is still held after wait_s seconds (math.inf: wait, and say so).
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    started, told, held = time.monotonic(), False, False
    try:
        while not held:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError as error:
                holder = os.pread(handle, 32, 0).decode().strip() or "unknown"
                waited = time.monotonic() - started
                if waited >= wait_s:
                    raise InUse(f"{what} is in use by process {holder}; wait for it, or end it") from error
                if waited > 5 and not told:
                    print(f"waiting for process {holder}, which uses {what}", flush=True)
                    told = True
                time.sleep(0.2)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield handle
    finally:
        os.close(handle)


# --- who watches ------------------------------------------------------------------------------------------------------


def in_kernel() -> bool:
    """Whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def watched() -> bool:
    """Whether a person sees what is printed, so that a bar may move; else a line every LOG_EVERY_S seconds will do."""
    return not os.environ.get(HEADLESS) and (in_kernel() or sys.stderr.isatty())


class Pace:
    """How fast a count goes, from the counts that were seen: start-up, a slow first step, and what a resumed run had
    done before, all of which precede the first of them, do not matter.

    Args: clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._seen = clock, deque[tuple[float, int]](maxlen=200)

    def see(self, done: int) -> None:
        if not self._seen or done != self._seen[-1][1]:
            self._seen.append((self._clock(), done))

    @property
    def rate(self) -> float | None:
        """Per second, over the last 200 counts; None before the second."""
        if len(self._seen) < 2:
            return None
        (since, first), (until, last) = self._seen[0], self._seen[-1]
        return (last - first) / max(until - since, 1e-9)

    def told(self, total: int | None, unit: str) -> tuple[str, str]:
        """("1.8 s/step", "0:03:14 left"); empty texts for what is not known."""
        if not (rate := self.rate):
            return "", ""
        speed = f"{rate:.1f} {unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit}"
        if total is None:
            return speed, ""
        at, done = self._seen[-1]
        return speed, f"{duration((total - done) / rate - (self._clock() - at))} left"


def duration(seconds: float) -> str:
    """
    >>> duration(194.4)
    '0:03:14'
    """
    return str(timedelta(seconds=max(0, round(seconds))))


class Progress:
    """A bar where a person watches; where nobody does, a line every LOG_EVERY_S seconds, and one at the end."""

    def __init__(self, name: str, unit: str):
        self._name, self._unit, self._pace = name, unit, Pace()
        self._bar: Any = None
        self._hidden, self._line, self._line_at = not watched(), "", 0.0

    def show(self, done: int, total: int | None, told: str) -> None:
        """So many of so many units are done, and what else there is to tell."""
        from tqdm.auto import tqdm

        if self._bar is None:  # now, so that its rate leaves start-up out
            self._bar = tqdm(desc=self._name, unit=self._unit, total=total, initial=done, disable=self._hidden)
        self._pace.see(done)
        self._bar.set_postfix_str(told, refresh=False)
        self._bar.update(done - self._bar.n)
        of = f"/{total}" if total else ""
        said = (f"{self._name} {self._unit} {done}{of}", *self._pace.told(total, self._unit), told)
        self._line = ", ".join(filter(None, said))
        if time.monotonic() - self._line_at >= LOG_EVERY_S:
            self._print_line()

    def write(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._print_line()

    def _print_line(self) -> None:
        if self._hidden and self._line:
            print(self._line, flush=True)
            self._line, self._line_at = "", time.monotonic()


# --- provenance -------------------------------------------------------------------------------------------------------


_SOURCES = ("meml_lib", "notebooks", "params")
COMMAND = "MEML_COMMAND"
"""Environment variable by which `meml` tells the processes that it starts what a person typed."""


def write_manifest(folder: RunFolder, **facts: Any) -> None:
    """Keep what results are about to be made with: call it before the work, and `end_manifest` after it.

    manifest.json holds `provenance()` and the caller's facts, no secret and no environment. What differs from the commit
    is a patch: this folder's, or that of a folder above that keeps the same one (a study's, for its jobs and stages).
    """
    code = tree()
    changes = keep_changes(code, folder.path)
    folder.write_json("manifest", {**provenance(code), "changes": changes, **_without_secrets(facts)})


def end_manifest(folder: RunFolder, **facts: Any) -> None:
    """Add what only the end of the work tells: the caller's facts (wall_s), and peak memory.

    That is of the largest of this process and its children that have ended, with theirs: the kernel, for a job.
    """
    peak = max(resource.getrusage(who).ru_maxrss for who in _SELF_AND_CHILDREN) // 1024
    folder.write_json("manifest", {**folder.read_json("manifest"), "peak_memory_mib": peak, **facts})


def provenance(code: Tree | None = None) -> dict[str, Any]:
    """Commit, versions, hardware, and the command that a person typed."""
    code = code or tree()
    return {
        "commit": code.commit,
        "dirty": code.dirty,
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
        "hardware": hardware(),
        "command": command(),
    }


class Tree(NamedTuple):
    """The code that runs, as git knows it."""

    commit: str | None
    """None outside a git checkout."""
    changes: bytes | None
    """What differs from the commit, for `git apply`; empty: nothing. None outside a git checkout."""

    @property
    def dirty(self) -> bool | None:
        return None if self.changes is None else bool(self.changes)


def tree() -> Tree:
    """The library's commit, and what differs: in files that git tracks, and new ones of meml_lib, notebooks and params.

    Files under reports/ are results: a run that writes a committed report anew does not change what made it.
    """
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():  # an installed copy inside somebody else's checkout has no commit of its own
        return Tree(None, None)
    git = ("git", "--no-optional-locks", "-C", str(here))  # jobs side by side, and a person who commits meanwhile
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")
    commit, diff = _said_by(*git, "rev-parse", "HEAD"), (*git, "diff", "--binary", *plain)
    changes = _said_by(*diff, "HEAD", "--", ":/", ":(exclude,top)reports")
    new = _said_by(*git, "ls-files", "-z", "--others", "--exclude-standard", "--", *_SOURCES)
    if commit is None or changes is None:
        return Tree(None, None)
    for name in (new or b"").split(b"\0")[:-1]:
        changes += _said_by(*diff, "--no-index", "--", os.devnull, os.fsdecode(name), fine=(0, 1)) or b""
    text = _masked(changes.decode("utf-8", "surrogateescape"))
    return Tree(commit.decode().strip(), text.encode("utf-8", "surrogateescape"))


def keep_changes(code: Tree, folder: Path) -> str | None:
    """Keep the patch of a dirty tree, once; its path from the folder, None where nothing differs."""
    if not code.changes:
        return None
    name = f"changes-{hashlib.sha256(code.changes).hexdigest()[:12]}.patch"
    place = next((place for place in (folder, *folder.parents) if (place / name).is_file()), folder)
    if not (place / name).is_file():
        with atomic(place / name) as file:
            file.write_bytes(code.changes)
    return os.path.relpath(place / name, folder)


def command() -> str:
    """What a person typed: `meml ...`, or what started this notebook's kernel (papermill, Jupyter), or this process."""
    told, words = os.environ.get(COMMAND), sys.argv
    if not told and in_kernel():
        started_by = Path(f"/proc/{os.getppid()}/cmdline")  # Linux alone tells it
        words = os.fsdecode(started_by.read_bytes()).split("\0")[:-1] if started_by.is_file() else words
        words = [*words, *filter(None, [os.environ.get("JPY_SESSION_NAME")])]  # the notebook, where Jupyter started it
    return told or shlex.join(_without_secrets([Path(words[0]).name, *words[1:]]))


_SECRET_NAME = r"(?:key|token|secret|pass|passwd|password|auth|credentials?)"


def _without_secrets(value: Any, name: str = "") -> Any:
    """Nested texts; what a name that speaks of a secret stands for is left out, and what `_masked` leaves out."""
    if isinstance(value, Mapping):
        return {key: _without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    if re.search(f"(?i){_SECRET_NAME}$", name):
        return "..."
    return _masked(re.sub(rf"(?i)([\w.-]*{_SECRET_NAME}\W?[=:]\s*)(?:\"[^\"]*\"|'[^']*'|[^\s,}}]+)", r"\1...", value))


def _masked(text: str) -> str:
    """A text without the secrets that the environment holds, and without what is built like a well-known one."""
    for name, secret in os.environ.items():
        if len(secret) >= 8 and re.search(f"(?i){_SECRET_NAME}$", name):
            text = text.replace(secret, "...")
    return re.sub(r"\b(?:sk-|hf_|ghp_|github_pat_)[\w-]{16,}", "...", text)


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed versions, without importing the packages; None: not installed."""
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GiB, GPUs (name, memory)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"machine": platform.machine(), "cores": cores(), "memory_gib": round(memory, 1), "gpus": gpus()}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver shows, without importing torch."""
    listed = _said_by("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return [line.strip() for line in (listed or b"").decode().splitlines()]


def _said_by(*command: str, fine: tuple[int, ...] = (0,)) -> bytes | None:
    """What a command prints; None where it is not installed, fails, or takes longer than a minute."""
    if shutil.which(command[0]) is None:
        return None
    try:
        answer = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:  # a driver that hangs
        return None
    return answer.stdout if answer.returncode in fine else None
