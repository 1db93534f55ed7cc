"""Child processes that never outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
PATIENCE_S = 8.0
"""From SIGTERM to SIGKILL."""


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Have the system send this process a signal when its parent ends, even by SIGKILL (Linux only).

    Args: parent: its process id; where that one has ended already, the signal is sent at once.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def with_parent(number: int = signal.SIGTERM) -> Callable[[], None]:
    """What a child of this process calls before it starts (`preexec_fn`), so that it ends with this process."""
    return partial(end_with_parent, os.getpid(), number)


def end_group(process: subprocess.Popen, patience_s: float = PATIENCE_S, number: int = signal.SIGTERM) -> None:
    """End a process that was started in a session of its own, and all in it; with force after patience_s seconds."""
    until = time.monotonic() + patience_s
    try:
        os.killpg(process.pid, number)
        while time.monotonic() < until:  # the members that unwind may outlive the first process
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all gone
        pass
    process.wait()


def sigterm_as_interrupt() -> None:
    """Unwind on SIGTERM as on Ctrl-C, so that what was started is ended; once, for a second one would break that off."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt(f"signal {number}")

    signal.signal(signal.SIGTERM, interrupt)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Unwind the block on SIGTERM as on Ctrl-C: Slurm sends it to all of a job's processes, and a kernel would end at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    sigterm_as_interrupt()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
