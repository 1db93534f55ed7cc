"""How soon a command answers, and what it must not load for it. Seconds of the processor: the machine may be busy."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEML = str(Path(sys.executable).with_name("meml"))
HEAVY = {"torch", "transformers", "datasets", "pandas", "pyarrow", "matplotlib", "scipy", "papermill", "snakemake", "IPython"}


def processor_s(*words: str) -> float:
    """Of a command and its children; the least of three starts."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([MEML, *words], cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


@pytest.mark.alone
@pytest.mark.parametrize(
    ("words", "most_s"),
    [
        (["--help"], 0.5),
        (["check", "params/smoke.yaml"], 1.5),
        (["check", "params/studies/demo.yaml"], 1.5),
        (["check", "params/studies/paper-llama-gsm8k.yaml"], 1.5),  # 22 arms, each composed and checked
    ],
)
def test_a_command_answers_in_time(words, most_s):
    took = processor_s(*words)
    print(f"meml {' '.join(words)}: {took:.2f} s")
    assert took < most_s


@pytest.mark.parametrize("words", [["--help"], ["check", "params/studies/demo.yaml"]])
def test_nothing_heavy_is_loaded_for_it(words):
    code = (
        "import sys; from meml_lib import cli\n"
        f"sys.argv = ['meml', *{words!r}]\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        f"print('loaded', sorted({HEAVY!r} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_the_graph_of_jobs_is_known_without_anything_heavy():
    code = "import sys, meml_lib.pipeline.graph, meml_lib.pipeline.launch\n"
    code += f"print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
