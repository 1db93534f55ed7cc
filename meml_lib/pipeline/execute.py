"""Execute one job's notebook, and say that it is done only when its outputs prove it.

`python -m meml_lib.pipeline.execute JOBS_JSON JOB PARENT`, a process of its own that ends with its parent.
papermill's own status is not enough: it marks cells completed after a dead kernel or a time-out, and takes
sys.exit(0) for success.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from meml_lib import config, runs
from meml_lib.pipeline import gpus, graph, keys, processes
from meml_lib.runs import RunFolder

KERNEL = "python3"
INTERRUPTED = "interrupted"
LARGEST_NOTEBOOK_MB = 5.0


class JobFailed(RuntimeError):
    """A job that did not do its work: where, and what to do."""


def execute(job: graph.Job, jobs: dict[str, graph.Job]) -> None:
    """Run a job's notebook unless nothing that it depends on has changed.

    Raises: JobFailed with the cell and its last lines; KeyboardInterrupt. The job's status.json says the same.
    """
    folder = RunFolder(job.folder)
    # A run just killed may still be unwinding here; on a cluster, its jobs go on to their end without it.
    wait_s = math.inf if os.environ.get("SLURM_JOB_ID") else 60.0
    with runs.locked(folder.path / ".lock", f"job {job.name}", wait_s=wait_s):
        parts = job.parts({name: jobs[name] for name in job.parents})
        status = folder.status
        why = keys.reasons(status.get("parts"), parts) if status["state"] == "done" else ["not done yet"]
        why = why or job.faults()
        if why:
            _say(job, "starts: " + "; ".join(why[:6]))
            folder.set_status("running", f"process {os.getpid()} is running it")
            runs.write_manifest(
                folder,
                job=job.name,
                notebook=job.notebook,
                parameters=job.parameters,
                seed=job.run.seed if job.run else None,
                inputs=parts["inputs"],
                parents=job.parents,
            )
            started, trained_with = time.monotonic(), job.stage_parts()
            try:
                with _gpus_of_its_own(job):
                    _run_notebook(job, folder)
                faults = job.faults(trained_with) and job.faults()  # code may have been edited before it trained
                if faults:
                    left = f"{job.notebook} ran to its end, but left: " + "; ".join(faults)
                    raise JobFailed(f"{left}\n  mend the cell that should write it and run the same command again")
                if job.adds_to:
                    after = job.parts()["inputs"]
                    parts["inputs"] |= {name: after[name] for name in job.adds_to if name in after}
            except BaseException as error:
                other = INTERRUPTED if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
                with suppress(OSError):  # on a full disk "running" stays, by a process that is gone
                    folder.set_status("failed", str(error) if isinstance(error, JobFailed) else other)
                raise
            seconds = round(time.monotonic() - started, 1)
            runs.end_manifest(folder, wall_s=seconds)
            folder.set_status("done", f"ran in {seconds:g} s", parts=parts)
            _say(job, f"done in {seconds:g} s")
        else:
            _say(job, "unchanged")
        with runs.atomic(job.done) as file:
            file.write_text(job.results() + "\n")


@contextmanager
def _gpus_of_its_own(job: graph.Job) -> Iterator[None]:
    """Show what the job starts those GPUs alone that it is handed."""
    if job.gpus is None:
        yield
        return
    with gpus.held(job.gpus, gpus.known()) as mine:
        if mine:
            _say(job, f"on GPU {', '.join(mine)}")
        os.environ[gpus.SHOWN] = ",".join(mine)
        yield


def _run_notebook(job: graph.Job, folder: RunFolder) -> None:
    os.environ |= {
        runs.HEADLESS: "1",
        "TQDM_DISABLE": "1",
        **{f"{library}_NUM_THREADS": str(job.threads) for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")},
    }
    # nbformat's jsonschema would compile a grammar of web addresses, which no notebook needs: half of a job's start-up.
    sys.modules.setdefault("rfc3987_syntax", None)
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it reports the cell that an interruption threw away
    lines, own_words = _Lines(job), folder.path / "kernel.log"

    def failure(what: str, todo: str = "mend the cause") -> JobFailed:
        last = "".join(f"\n    {line}" for line in lines.last)
        return JobFailed(
            f"{lines.place}: {what}"
            + (f"\n  its last lines:{last}" if last else "")
            + runs.little_space(folder.path, "\n  ")
            + f"\n  see {config.label_of(job.executed)}; {todo} and run the same command again"
        )

    metadata = nbformat.read(config.root() / job.notebook, as_version=4).metadata
    asked = metadata.get("kernelspec", {}).get("name", KERNEL)
    if asked != KERNEL:
        what = f"asks for the kernel {asked!r}, and jobs run in {KERNEL!r}"
        raise failure(what, f"save it with the kernel {KERNEL!r}")
    try:
        # Sockets in a folder of its own: jobs that start at the same time could draw the same free TCP port.
        sockets_in = tempfile.TemporaryDirectory(prefix="meml-")
        with sockets_in as sockets, _stderr_to(own_words), _ends_after(job.job_timeout_s):
            kernel = {"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}
            notebook = papermill.execute_notebook(
                config.root() / job.notebook,
                job.executed,
                parameters=job.parameters,
                kernel_name=KERNEL,
                kernel_manager_class=_kernel(),
                cwd=config.root(),
                progress_bar=False,
                request_save_on_cell_execute=True,
                autosave_cell_every=30,
                stdout_file=lines,
                on_cell_start=lines.start,
                coalesce_streams=True,
                start_timeout=300,
                timeout_func=lambda cell: job.cell_timeout_s,  # `timeout` takes whole seconds only
                iopub_timeout=60,
                config=Config(KernelManager=kernel),
            )
    except PapermillExecutionError as error:
        lines.start(None, error.cell_index)
        raise failure(f"{error.ename}: {error.evalue}") from error
    except DeadKernelError as error:
        died = f"the kernel died: out of memory, or killed; its own words are in {own_words}"
        raise failure(died, "give it more memory (fewer --jobs, a smaller hardware.micro_batch_tokens)") from error
    except _OutOfTime as error:
        late = f"the job ran longer than hardware.job_timeout_s={job.job_timeout_s:g}, and was ended"
        raise failure(late, "mend the cause or raise it") from error
    except CellTimeoutError as error:
        if job.cell_timeout_s is None:  # the kernel's output stopped
            raise failure(str(error).splitlines()[0]) from error
        late = f"it ran longer than hardware.cell_timeout_s={job.cell_timeout_s:g}, and was ended"
        raise failure(late, "mend the cause or raise it") from error
    except OSError as error:
        raise failure(f"{type(error).__name__}: {error}") from error
    except (ImportError, RuntimeError) as error:  # no kernel started
        words = own_words.read_text(errors="replace").strip().splitlines()
        why = "".join(f"\n    {line}" for line in words[-5:])
        raise failure(f"no kernel started in {sys.executable} ({error}){why}", "mend this environment") from error
    outputs = [(number, output) for number, cell in enumerate(notebook.cells) for output in cell.get("outputs", [])]
    for number, output in outputs:
        if output["output_type"] == "error":  # SystemExit, which papermill lets pass
            lines.start(None, number)
            raise failure(f"{output['ename']}: {output['evalue']}")
    size = job.executed.stat().st_size / 1e6
    if size > LARGEST_NOTEBOOK_MB:
        _say(job, f"note: {config.label_of(job.executed)} has {size:.1f} MB, more than {LARGEST_NOTEBOOK_MB:g}")


def _kernel() -> type:
    """This interpreter's own kernel, whatever JUPYTER_PATH holds; it and what its cells started end with the job."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class Kernel(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict())

        async def start_kernel(self, **options: Any) -> None:
            await super().start_kernel(preexec_fn=processes.with_parent(signal.SIGKILL), **options)
            self._group = self.provisioner.pgid

        async def cleanup_resources(self, restart: bool = False) -> None:
            with suppress(AttributeError, ProcessLookupError):  # it never started, or all have ended
                # A training keeps its last step at the first signal, and unwinds; a later one then ends the kernel.
                for _ in range(round(processes.PATIENCE_S / 0.25)):
                    os.killpg(self._group, signal.SIGTERM)
                    await asyncio.sleep(0.25)
                os.killpg(self._group, signal.SIGKILL)
            await super().cleanup_resources(restart)

    return Kernel


class _OutOfTime(KeyboardInterrupt):
    """Unwinds like an interruption: asyncio, in which notebooks run, holds other errors of a signal back."""


@contextmanager
def _ends_after(seconds: float | None) -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise _OutOfTime

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


@contextmanager
def _stderr_to(file: Path) -> Iterator[None]:
    """Let the kernel, which inherits standard error, write there and not between the jobs' lines."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(file, "wb") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class _Lines:
    """A file-like object that passes a notebook's lines on, marked with the job's name, and remembers the last."""

    def __init__(self, job: graph.Job):
        self._job, self._whole, self._rest = job, [], ""
        self.place = job.notebook
        """The cell that runs, in words."""

    def start(self, cell: object, cell_index: int) -> None:
        self.place = f"cell {cell_index + 1} of {self._job.notebook}"

    @property
    def last(self) -> list[str]:
        """The last lines, of which the very last may be unfinished."""
        return [*self._whole, *filter(None, [self._rest])][-10:]

    def write(self, text: str) -> None:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            self._whole = [*self._whole[-9:], line]
            if not os.environ.get(runs.QUIET):
                _say(self._job, line)

    def flush(self) -> None:
        pass


def _say(job: graph.Job, text: str) -> None:
    # In one write: jobs share a pipe, and unbuffered (PYTHONUNBUFFERED) print writes the line's end by itself.
    sys.stdout.write(f"[{job.name}] {text}\n")
    sys.stdout.flush()


def _failed_since(job: graph.Job, file: Path) -> bool:
    """Whether the job has failed, by nobody's interruption, since a file was written."""
    folder = RunFolder(job.folder)
    failed = folder.status["state"] == "failed" and folder.status["message"] != INTERRUPTED
    return failed and (folder.path / "status.json").stat().st_mtime_ns > file.stat().st_mtime_ns


def main() -> int:
    processes.end_with_parent(int(sys.argv[3]))
    processes.sigterm_as_interrupt()
    file = Path(sys.argv[1]).resolve()
    jobs = graph.load(file)
    job = jobs[sys.argv[2]]
    if _failed_since(job, file):  # a cluster's retries are for jobs that were killed
        _say(job, "FAILED already in this run, by itself: not tried again")
        return 1
    try:
        execute(job, jobs)
    except (JobFailed, runs.InUse) as error:
        _say(job, f"FAILED: {error}")
        return 1
    except OSError as error:
        _say(job, f"FAILED: {error}{runs.little_space(Path(job.folder), '; ')}; then run the same command again")
        return 1
    except KeyboardInterrupt:
        _say(job, "interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
