"""What reruns after an edit: a study on a copy of the project, edited in ten ways. `python tests/edits.py`, minutes.

After each edit the same `meml run`. Which notebooks ran and which stages trained is read from their manifests' times;
the table says what should have, and the exit code is 1 where it differs. Not collected by pytest: see test_reach.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = """use: [smoke.yaml]
experts: {known: {story: {teacher: {kind: table, model: own, path: answers.jsonl}}}}
riel:
  lr: 3e-4
  objective: {mutual: {weight: 0.1}}
"""
STUDY = """title: Edits
run_file: edits.yaml
seeds: [0]
arms:
  multi: {label: Multi-expert GRPO, overrides: {riel.objective.mutual: null}}
  full: {label: MEML-GRPO}
"""
STAGE_2 = {"03 multi", "03 full"}
REPORTS = {"04", "05"}
ALL = {"00", "01", "02", *STAGE_2, *REPORTS}


class Edit(NamedTuple):
    """One edit, and what it should bring about."""

    what: str
    make: Callable[[], None]
    runs: set[str]
    trains: set[str]


def replace(file: str, old: str, new: str) -> Callable[[], None]:
    def edit() -> None:
        text = Path(file).read_text()
        assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
        Path(file).write_text(text.replace(old, new))

    return edit


def reword_comments() -> None:
    replace("meml_lib/training/losses.py", "# not *: 0 * inf is nan", "# masked_fill: 0 * inf is nan")()
    replace("meml_lib/training/riel.py", '"""What one step did."""', '"""All that one step did."""')()


def shorten_an_answer() -> None:
    first, *others = Path("answers.jsonl").read_text().splitlines(keepends=True)
    Path("answers.jsonl").write_text("".join([re.sub(r'\w+ ([^"]*"})$', r"\1", first), *others]))


def another_torch() -> None:
    """As though the records had been written with another torch."""
    for file in Path("reports/edits").rglob("status.json"):
        file.write_text(re.sub(r'"torch": "[^"]*"', '"torch": "2.12.1"', file.read_text()))


def delete_output() -> None:
    Path("reports/edits/runs/full/seed-0/stage2/tables/rollouts.parquet").unlink()


EDITS = [
    Edit("nothing", lambda: None, set(), set()),
    Edit("a value: `riel.lr`", replace("params/edits.yaml", "3e-4", "2e-4"), STAGE_2 | REPORTS, STAGE_2),
    Edit(
        "a value that one arm does not use: `riel.objective.mutual.weight`",
        replace("params/edits.yaml", "weight: 0.1", "weight: 0.2"),
        {"03 full"} | REPORTS,
        {"03 full"},
    ),
    Edit(
        "a plot cell of 03_riel",
        replace("notebooks/03_riel.ipynb", 'title=\\"After stage 2, test\\"', 'title=\\"Test, after stage 2\\"'),
        STAGE_2,
        set(),
    ),
    Edit("a text cell of 03_riel", replace("notebooks/03_riel.ipynb", "# 03 · ", "# 03: "), set(), set()),
    Edit(
        "a loss of stage 2: `losses.buffer_sft`",
        replace("meml_lib/training/losses.py", 'Part("buffer_sft", options.weight,', 'Part("buffer_sft", 2 * options.weight,'),
        STAGE_2 | REPORTS,
        STAGE_2,
    ),
    Edit("a comment and a docstring in modules of stage 2", reword_comments, set(), set()),
    Edit("an input file: a teacher's answers", shorten_an_answer, ALL, {"02"} | STAGE_2),
    Edit("the torch version in the records", another_torch, ALL, {"02"} | STAGE_2),
    # The report shows how long training took, so it follows a training whose results are the same.
    Edit("an output deleted: rollouts of `full`", delete_output, {"03 full"} | REPORTS, {"03 full"}),
    Edit(
        "a formula of both stages: `losses.weighted_nll`",
        replace("meml_lib/training/losses.py", "return -(weight_N[:, None] * logp_NT", "return -(1.5 * weight_N[:, None] * logp_NT"),
        {"02"} | STAGE_2 | REPORTS,
        {"02"} | STAGE_2,
    ),
]


def meml_run() -> str:
    command = [sys.executable, "-m", "meml_lib.cli", "run", "params/studies/edits.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}, check=False)
    if done.returncode:
        sys.exit(f"meml run failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def short(job: str) -> str:
    """`03_riel-full-seed-0` -> `03 full`."""
    return " ".join([job[:2], *re.findall(r"^03_riel-(\w+)-", job)])


def written() -> tuple[dict[str, int], dict[str, int]]:
    """When each job's and each stage's manifest was written."""
    jobs = {short(file.parent.name): file.stat().st_mtime_ns for file in Path("reports/edits/jobs").glob("*/manifest.json")}
    stages = {}
    for file in Path("reports/edits/runs").glob("*/seed-0/stage[12]/manifest.json"):
        stages["02" if file.parent.name == "stage1" else f"03 {file.parents[2].name}"] = file.stat().st_mtime_ns
    return jobs, stages


def project(folder: Path) -> None:
    for part in ("meml_lib", "notebooks", "params"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    os.chdir(folder)
    from meml_lib import config, experts, tasks

    p = config.load_run("params/smoke.yaml")
    answers = experts.teacher_answers(tasks.load(p.task), experts.load_panel(p.experts))
    own = answers[answers["expert"] == "story"][["question_id", "text"]]
    Path("answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in own.to_dict("records")))
    Path("params/edits.yaml").write_text(RUN_FILE)
    Path("params/studies/edits.yaml").write_text(STUDY)


def main() -> int:
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        project(Path(folder))
        meml_run()
        print("| edit | notebooks run | stages trained | why, as `meml run` said before the work | s | as it should |")
        print("|---|---|---|---|---|---|")
        for edit in EDITS:
            before, started = written(), time.monotonic()
            edit.make()
            said = meml_run()
            ran, trained = ({name for name, at in new.items() if old[name] != at} for old, new in zip(before, written()))
            as_it_should = (ran, trained) == (edit.runs, edit.trains)
            wrong += not as_it_should
            reasons = sorted({line.split(": ", 1)[1] for line in said.splitlines() if line.startswith("  ")})
            cells = [", ".join(sorted(ran)) or "none", ", ".join(sorted(trained)) or "none", "; ".join(f"`{r}`" for r in reasons)]
            seconds = f"{time.monotonic() - started:.0f}"
            verdict = "yes" if as_it_should else f"NO: {sorted(edit.runs)}, {sorted(edit.trains)}"
            print("|", " | ".join([edit.what, *cells, seconds, verdict]), "|", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
