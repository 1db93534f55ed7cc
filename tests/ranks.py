"""What ten steps of stage 2 come to on one CPU process, on several, and divided over them: the same, and how nearly.

    python tests/ranks.py reports/published/ranks.md

A model of 50,000 weights (float32) after a stage 1 in one process; then, in each layout, three more steps of stage 1 and ten
of stage 2 at a learning rate of 3e-4: two experts, four rollouts each, three questions a step, so that of four processes one
has none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from meml_lib.pipeline.processes import end_group

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[1]
STEPS = 10
TIMEOUT_S = 240.0
OPTIONS = {"optimizer": "adamw", "sharded": False, "questions": 3, "capacity": 8, "steps": STEPS, "dtype": "float32"}


@dataclass(frozen=True)
class Outcome:
    """What `riel_over_processes.py` saved."""

    processes: int
    told: list[dict]
    """Of each step: its rollouts' texts, the pairs that the buffer holds after it, what is spent."""
    trained: list[list[dict[str, int]]]
    """Of each process, of each update: the rows of each part that count."""
    start: torch.Tensor
    weights: torch.Tensor


def launch(processes: int, script: str, *arguments: str, timeout_s: float) -> None:
    """Run a script of tests/ in so many processes.

    Raises: subprocess.TimeoutExpired for processes that wait for one another, which are ended; RuntimeError with what they said.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, str(ROOT / "tests" / script), *arguments]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT, start_new_session=True)
        try:
            process.wait(timeout_s)
        finally:
            end_group(process)
        said.seek(0)
        if process.returncode:
            raise RuntimeError(said.read()[-20000:])


def run(processes: int, folder: Path, **changed) -> Outcome:
    """Ten steps in so many processes. Args: changed: of `OPTIONS`. Raises: as `launch`."""
    import riel_over_processes

    out, begun = folder / "out.pt", folder / "begun"
    if not begun.is_dir():
        riel_over_processes.begin(begun)
    values = json.dumps({"begun": str(begun), **OPTIONS, **changed})
    launch(processes, "riel_over_processes.py", str(out), values, timeout_s=TIMEOUT_S)
    saved = torch.load(out, weights_only=True)
    return Outcome(**json.loads(saved["found"]), start=saved["start"], weights=saved["weights"])


def difference(one: Outcome, other: Outcome) -> float:
    """Norm of the weights' difference over the norm of the weights."""
    return ((one.weights - other.weights).norm() / one.weights.norm()).item()


def moved(one: Outcome) -> float:
    """How far both stages moved the weights in this layout, in the same unit."""
    return ((one.weights - one.start).norm() / one.weights.norm()).item()


def same(one: Outcome, other: Outcome, what: str) -> int:
    """How many steps from the first on are equal in texts, buffer or spent."""
    pairs = zip(one.told, other.told, strict=True)
    return next((n for n, (a, b) in enumerate(pairs) if a[what] != b[what]), len(one.told))


def table() -> str:
    """Each layout against one process, in Markdown."""
    heads = ["optimizer", "processes", "layout", "weights: difference / norm", "moved / norm", "rollouts equal", "buffer equal"]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    with tempfile.TemporaryDirectory() as folder:
        for optimizer in ("adamw", "muon"):
            one = run(1, Path(folder), optimizer=optimizer)
            for processes, sharded in ((1, False), (2, False), (4, False), (2, True), (4, True)):
                found = run(processes, Path(folder), optimizer=optimizer, sharded=sharded)
                layout = "divided (FSDP2)" if sharded else "data parallel (DDP)" if processes > 1 else "one process, again"
                equal = [f"{same(one, found, what)} of {STEPS} steps" for what in ("texts", "buffer")]
                numbers = [f"{difference(one, found):.1e}", f"{moved(found):.1e}"]
                rows.append("| " + " | ".join([optimizer, str(processes), layout, *numbers, *equal]) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    text = f"""# One update, any layout

Written by `python tests/ranks.py reports/published/ranks.md`, on CPUs.

{__doc__.split(chr(10) * 2)[2].strip()}

Each row is compared with one process. Muon multiplies in bfloat16, whose rounding follows the order of sums: soon another token
is drawn. "3 of 10 steps": the first three are equal, the fourth is not.

{table()}
"""
    Path(sys.argv[1]).write_text(text)
    print(text)
