"""GPUs of this machine, handed out to a study's jobs: never two jobs on one, and free again however a job ends."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from meml_lib import config, runs

SHOWN = "CUDA_VISIBLE_DEVICES"


def known() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them: those of its own value, where the user set one."""
    shown, there = os.environ.get(SHOWN), runs.gpus()
    if shown is None or not there:
        return [str(number) for number in range(len(there))]
    return [name for name in (part.strip() for part in shown.split(",")) if name not in ("", "-1")]


def needed(run: config.Run, names: Sequence[str]) -> int:
    """GPUs that a stage of the run takes of those; 0: it trains on the CPU.

    Raises: config.ParamsError where there are fewer than it has processes.
    """
    hardware = run.hardware
    if hardware.device == "cpu" or not names:
        return 0
    if hardware.accelerate_config:  # which says itself how many of its processes run on this machine
        return len(names)
    if hardware.processes > len(names):
        place = run.sources.get("hardware.processes", "default")
        found = f"hardware.processes ({place}) = {hardware.processes}: each takes a GPU, and here are {len(names)}"
        raise config.ParamsError(f"{found} ({SHOWN}: {','.join(names)}); set it to at most {len(names)}")
    return hardware.processes


@contextmanager
def held(count: int, names: Sequence[str]) -> Iterator[list[str]]:
    """Hold so many of these GPUs for the block; waits until they are free. Other studies of this user keep off them too.

    A lock that the system drops with its process, so that a killed job's GPU is free at once.
    """
    folder = Path(tempfile.gettempdir()) / f"meml-gpus-{os.getuid()}"
    while True:
        with ExitStack() as locks, runs.locked(folder / "all.lock", "the list of GPUs", math.inf):
            mine: list[str] = []
            for name in names:
                if len(mine) < count:
                    with suppress(runs.InUse):
                        locks.enter_context(runs.locked(folder / f"{name.replace('/', '-')}.lock", f"GPU {name}"))
                        mine.append(name)
            if len(mine) == count:
                kept = locks.pop_all()
                break
        time.sleep(0.5)  # all or none: two jobs that each hold a part would wait for ever
    with kept:
        yield mine
