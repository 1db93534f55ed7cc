"""Execute one job's notebook, and say that it is done only when its outputs prove it.

`python -m meml_lib.pipeline.execute JOBS_JSON JOB`, a process of its own. papermill's own status is not enough: it
marks cells completed after a dead kernel or a time-out, and takes sys.exit(0) for success.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meml_lib import config, runs
from meml_lib.pipeline import graph, keys, processes
from meml_lib.runs import RunFolder

LARGEST_NOTEBOOK_MB = 5.0


class JobFailed(RuntimeError):
    """A job that did not do its work: where, and what to do."""


def execute(job: graph.Job, jobs: dict[str, graph.Job]) -> None:
    """Run a job's notebook unless nothing that it depends on has changed.

    Raises: JobFailed with the cell and its last lines; KeyboardInterrupt. The job's status.json says the same.
    """
    folder = RunFolder(job.folder)
    with runs.locked(folder.path / ".lock", f"job {job.name}", wait_s=60.0):  # a run just killed may still be unwinding
        parts = job.parts({name: jobs[name] for name in job.parents})
        status = folder.status
        why = keys.reasons(status.get("parts"), parts) if status["state"] == "done" else ["not done yet"]
        why = why or job.faults()
        if why:
            _say(job, "starts: " + "; ".join(why[:6]))
            folder.set_status("running", f"process {os.getpid()} is running it")
            started, trained_with = time.monotonic(), job.stage_parts()
            try:
                _run_notebook(job, folder)
                faults = job.faults(trained_with) and job.faults()  # code may have been edited before it trained
                if faults:
                    raise JobFailed(f"{job.notebook} ran to its end, but left: " + "; ".join(faults))
            except BaseException as error:
                other = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
                folder.set_status("failed", str(error) if isinstance(error, JobFailed) else other)
                raise
            seconds = round(time.monotonic() - started, 1)
            folder.write_manifest(
                job=job.name, notebook=job.notebook, parameters=job.parameters, parents=job.parents, wall_s=seconds
            )
            after = job.parts()["inputs"]
            parts["inputs"] |= {name: after[name] for name in job.adds_to if name in after}
            folder.set_status("done", f"ran in {seconds:g} s", parts=parts)
            _say(job, f"done in {seconds:g} s")
        else:
            _say(job, "unchanged")
        with runs.atomic(job.done) as file:
            file.write_text(job.results() + "\n")


def _run_notebook(job: graph.Job, folder: RunFolder) -> None:
    os.environ |= {
        runs.HEADLESS: "1",
        "TQDM_DISABLE": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not another one of the same name
        **{f"{library}_NUM_THREADS": str(job.threads) for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")},
    }
    import nbformat
    import papermill
    from nbclient.exceptions import CellControlSignal, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    lines = _Lines(job)

    def failure(cell: int, what: str) -> JobFailed:
        last = "".join(f"\n    {line}" for line in lines.last)
        return JobFailed(
            f"cell {cell + 1} of {job.notebook}: {what}"
            + (f"\n  its last lines:{last}" if last else "")
            + f"\n  see {config.label_of(job.executed)}; mend the cause and run the same command again"
        )

    try:
        # Sockets in a folder of its own: jobs that start at the same time could draw the same free TCP port.
        with tempfile.TemporaryDirectory(prefix="meml-") as sockets, _stderr_to(folder.path / "kernel.log"):
            kernel = {"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}
            notebook = papermill.execute_notebook(
                config.root() / job.notebook,
                job.executed,
                parameters=job.parameters,
                kernel_name="python3",
                cwd=config.root(),
                progress_bar=False,
                request_save_on_cell_execute=True,
                autosave_cell_every=30,
                stdout_file=lines,
                coalesce_streams=True,
                iopub_timeout=60,
                config=Config(KernelManager=kernel),
            )
    except PapermillExecutionError as error:
        raise failure(error.cell_index, f"{error.ename}: {error.evalue}") from error
    except (DeadKernelError, CellControlSignal) as error:
        cells = nbformat.read(job.executed, as_version=4).cells
        started = [n for n, cell in enumerate(cells) if cell.metadata.get("papermill", {}).get("start_time")]
        died = f"the kernel died: out of memory, or killed; its own words are in {folder.path / 'kernel.log'}"
        what = died if isinstance(error, DeadKernelError) else str(error).splitlines()[0]
        raise failure(started[-1] if started else 0, what) from error
    outputs = [(number, output) for number, cell in enumerate(notebook.cells) for output in cell.get("outputs", [])]
    for number, output in outputs:
        if output["output_type"] == "error":  # SystemExit, which papermill lets pass
            raise failure(number, f"{output['ename']}: {output['evalue']}")
    size = job.executed.stat().st_size / 1e6
    if size > LARGEST_NOTEBOOK_MB:
        _say(job, f"note: {config.label_of(job.executed)} has {size:.1f} MB, more than {LARGEST_NOTEBOOK_MB:g}")


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
        self._job, self._rest = job, ""
        self.last: list[str] = []

    def write(self, text: str) -> None:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            self.last = [*self.last[-9:], line]
            _say(self._job, line)

    def flush(self) -> None:
        pass


def _say(job: graph.Job, text: str) -> None:
    print(f"[{job.name}] {text}", flush=True)


def main() -> int:
    processes.end_with_parent()
    processes.sigterm_as_interrupt()
    jobs = graph.load(Path(sys.argv[1]).resolve())
    job = jobs[sys.argv[2]]
    try:
        execute(job, jobs)
    except JobFailed as error:
        _say(job, f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        _say(job, "interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
