"""A run's folder: tables, metrics, status and manifest. Each write is atomic: readers see the old file or the new."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_SELF_AND_CHILDREN = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
HEADLESS = "MEML_HEADLESS"
"""Environment variable that `pipeline.execute` sets: inside a kernel nothing else tells that nobody watches."""
LOG_EVERY_S = 5.0
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "pandas", "snakemake", "papermill")


class RunFolder:
    """Where one stage of one run (or one job) keeps its results.

    tables/NAME.parquet, metrics.jsonl (one record a step), values.json, manifest.json, status.json, model/.
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
        self.path.mkdir(parents=True, exist_ok=True)
        line = json.dumps(dict(record), allow_nan=False) + "\n"
        with open(self.path / "metrics.jsonl", "ab", buffering=0) as file:  # one write call: a line or nothing
            file.write(line.encode())

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

    def _standing(self) -> str:
        return f"{self.status['state']}: {self.status['message'] or 'no message'}"

    def write_manifest(self, **facts: Any) -> None:
        """Keep what these results were made with: `provenance()` and the caller's own facts."""
        self.write_json("manifest", {**provenance(), **facts})


def not_finite(record: Mapping[str, Any]) -> str | None:
    """The first number of a step's record that is nan or infinite, in words."""
    odd = (name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value))
    return next((f"{name} = {record[name]} at step {record.get('step')}" for name in odd), None)


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A place to write to, beside `file`, that takes its name once the block has ended without an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


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
def locked(file: Path, what: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock for the block; the system drops it when the process ends, however it ends.

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
        yield
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


# --- provenance -------------------------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """Commit, versions, hardware, command and peak memory. No environment variables: they hold secrets."""
    return {
        **_commit(),
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
        "hardware": hardware(),
        "command": [_without_secret(word) for word in sys.argv],
        "peak_memory_mib": max(resource.getrusage(who).ru_maxrss for who in _SELF_AND_CHILDREN) // 1024,
    }


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
    return [line.strip() for line in (listed or "").splitlines()]


def _commit() -> dict[str, Any]:
    """The library's commit, and whether tracked files differ from it; None outside a git checkout.

    Files under reports/ are results: a run that writes a committed report anew does not change what made it.
    """
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():  # an installed copy inside somebody else's checkout has no commit of its own
        return {"commit": None, "dirty": None}
    git, sources = ("git", "-C", str(here)), (":/", ":(exclude,top)reports")
    changes = _said_by(*git, "status", "--porcelain", "--untracked-files=no", "--", *sources)
    return {"commit": _said_by(*git, "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _said_by(*command: str) -> str | None:
    """What a command prints; None where it is not installed, or fails."""
    if shutil.which(command[0]) is None:
        return None
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def _without_secret(word: str) -> str:
    """A word of the command line; a value whose name speaks of a secret is left out."""
    return re.sub(r"(?i)([\w.-]*(?:key|token|secret|password)=).+", r"\1...", word)
