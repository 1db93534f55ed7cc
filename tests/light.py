"""A project of six light notebooks, which do in no time what the real ones do: for tests of what stands around them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
STUDY = """
title: Light
run_file: light.yaml
seeds: [0]
arms:
  multi: {label: Multi, overrides: {riel.objective.mutual: null}}
  full: {label: Full}
"""
RUN = 'params_file = "params/light.yaml"\noverrides = {}\nrun_dir = None\nstage1_dir = None'
OF_STUDY = 'params_file = "params/studies/light.yaml"\noverrides = {}\nreports_dir = "reports"'
P = "from meml_lib import config\np = config.from_notebook(globals())"
S = "from meml_lib import config\ns = config.study_from_notebook(globals())"
FAKE = f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport fake_stage"
TABLE = "import pandas; from meml_lib import runs\nruns.RunFolder(p.run_dir).write_table('{}', pandas.DataFrame([{}]))"
ANSWER = "dict(question_id='q', expert='story', sample=0, text='1', answer='1', correct=True)"
ANSWERS = TABLE.format("teacher_answers", ANSWER)
OVERLAP = TABLE.format("error_overlap", "dict(questions=1, share=1.0)")
PAGE = "from meml_lib import runs\nwith runs.atomic(s.folder / 'report/report.html') as file: file.write_text(s.title)"
NOTEBOOKS = {
    "00_experts": (RUN, P, ANSWERS),
    "01_error_overlap": (RUN, P, OVERLAP),
    "02_mef": (RUN, P, FAKE, "fake_stage.train('mef', p)"),
    "03_riel": (RUN, P, FAKE, "fake_stage.train('riel', p)"),
    "04_ablations": (OF_STUDY, S),
    "05_report": (OF_STUDY, S, PAGE),
}


def make(folder: Path) -> None:
    """Write the project: its values and its notebooks."""
    params = folder / "params"
    for file in ("base", "smoke", "tasks/wordproblems", "experts/wordproblems", "models/embedded", "hardware/cpu1"):
        (params / file).parent.mkdir(parents=True, exist_ok=True)
        (params / f"{file}.yaml").write_text((HERE.parent / "params" / f"{file}.yaml").read_text())
    (params / "light.yaml").write_text("use: [smoke.yaml]\n")
    (params / "studies").mkdir()
    (params / "studies" / "light.yaml").write_text(STUDY)
    for name, cells in NOTEBOOKS.items():
        write(folder, name, *cells)


def write(folder: Path, name: str, *cells: str, kernel: str = "python3") -> None:
    """Write one of a project's notebooks; its first cell holds the parameters."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
    (folder / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")


def meml_run(*options: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.Popen:
    """`meml run params/studies/light.yaml`; what it says can be read from `stdout`."""
    # A shell that starts a job in the background has it ignore SIGINT; a terminal does not.
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from meml_lib import cli\n"
    start += f"sys.argv = ['meml', 'run', 'params/studies/light.yaml', *{options!r}]; cli.main()"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", start], cwd=cwd, env=env, text=True, **streams)


def processes_in(folder: Path) -> list[str]:
    """Command lines of live processes that work in this folder, apart from this one's."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and (process / "cwd").resolve().is_relative_to(folder):
                found.append((process / "cmdline").read_text().replace("\0", " ").strip())
        except OSError:  # ended, or not ours to look at
            continue
    return [command for command in found if command]
