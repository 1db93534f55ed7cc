"""A scaling plan: memory and time of a step for the paper's models on 1, 8 and 16 GPUs. A model, not a measurement.

`python tests/benchmarks/scaling.py` prints the table of README's "Scaling plan"; no download. MEASURED comes from one H100
(reports/log.md, 2026-11-27); ASSUMED was measured by nobody here.
"""

from __future__ import annotations

from dataclasses import dataclass

import limits
import yaml

from meml_lib import config
from meml_lib.training import dryrun

MODELS = {"Qwen2.5-Math-1.5B": "params/paper-qwen-gsm8k.yaml", "Llama-3.2-1B": "params/paper-llama-gsm8k.yaml"}
GPUS = (1, 8, 16)
SHARDED = {8: "params/hardware/gpu8-fsdp.yaml", 16: "params/hardware/node2x8-fsdp.yaml"}
MEASURED = {
    "copy": 2.91e12,  # bytes a second, read and written, of a device-to-device copy
    "product": 779e12,  # bf16 operations a second of a matrix product
    # Seconds a layer and decode step beyond reading bytes and the draw: of SmolLM2's shape (2.07 ms) and Qwen2.5-1.5B's (3.65).
    "layer": (37e-6, 57e-6),
    "draw": (0.62e-3, 4.8e-11),  # seconds at least; for each row and word of the vocabulary (0.70 ms of 96 x 151,936)
    "update": 0.20,  # of the product's rate, useful work: 2.92 s for 96 rows of 512 tokens of Qwen2.5-1.5B's shape
}
ASSUMED = {
    "update": 0.35,  # of the product's rate, once what held the measured update up is gone: the target, not a measurement
    "mean": 0.5,  # of the longest answer's tokens, the mean's
    "count": 0.5,  # of the rollouts, those that count in the update
    "prompt": 150,  # tokens
    "inside": 2e11,  # bytes a second between GPUs of a machine, each way (A800: NVLink)
    "between": 2.5e10,  # between machines of 8 GPUs, for each machine
}


@dataclass(frozen=True)
class Plan:
    """Of one model on so many GPUs; bytes of one GPU, seconds of a step."""

    rows: int
    plain: int
    """Every GPU holds the whole state."""
    sharded: int | None
    """By SHARDED's hardware, where there is one for so many GPUs."""
    sampling: tuple[float, float]
    update: tuple[float, float]
    exchange: float

    @property
    def step(self) -> tuple[float, float]:
        return tuple(self.exchange + self.sampling[k] + self.update[k] for k in (0, 1))


def plan(file: str, gpus: int) -> Plan:
    """Of a run file's model and its questions a step."""
    p = config.load_run(file, {"hardware.processes": gpus})
    model = dryrun.empty_model(p)
    shape, count = limits.Shape.of(model.config), model.num_parameters()
    rows = p.riel.questions_per_step * len(p.experts.panel) * p.riel.rollouts_per_expert // gpus
    plain, sharded = dryrun.memory(p, model)[1], None
    if gpus in SHARDED:
        hardware = yaml.safe_load(config.locate(SHARDED[gpus]).read_text())["hardware"]
        divided = config.load_run(file, {f"hardware.{key}": value for key, value in hardware.items()})
        sharded = dryrun.memory(divided, model)[1]

    longest, mean = p.sampling.max_answer_tokens, ASSUMED["mean"] * p.sampling.max_answer_tokens
    at_once = min(rows, p.sampling.rows_per_batch)
    # Rows leave as they end, so that a step reads the keys of those that are left: about the mean answer's, half grown.
    cached = at_once * 2 * shape.layers * shape.key * 2 * (ASSUMED["prompt"] + mean / 2) * ASSUMED["mean"]
    read = 2 * (shape.body + shape.head) + cached
    steps, draw = longest * -(-rows // at_once), max(MEASURED["draw"][0], MEASURED["draw"][1] * at_once * shape.vocabulary)
    sampling = tuple(steps * (read / MEASURED["copy"] + shape.layers * layer + draw) for layer in MEASURED["layer"])

    tokens = ASSUMED["count"] * rows * mean
    update = tuple(
        6 * (shape.body + shape.head) * tokens / share / MEASURED["product"] + 28 * count / MEASURED["copy"]
        for share in (ASSUMED["update"], MEASURED["update"])
    )
    machines = -(-gpus // 8)
    inside = 2 * (min(gpus, 8) - 1) / min(gpus, 8) * 2 * count / ASSUMED["inside"]
    between = 2 * (machines - 1) / machines * 2 * count / ASSUMED["between"]
    return Plan(rows, plain, sharded, sampling, update, inside + between)


def table() -> str:
    """Markdown."""
    lines = ["| model | GPUs | rollouts of a GPU | memory, GiB | with FSDP | sampling, s | update, s | exchange, s | step, s |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, file in MODELS.items():
        for gpus in GPUS:
            found = plan(file, gpus)
            sharded = f"{found.sharded / 2**30:.0f}" if found.sharded else "-"
            cells = (name, gpus, found.rows, f"{found.plain / 2**30:.0f}", sharded, _range(found.sampling), _range(found.update),
                     f"{found.exchange:.2f}", _range(found.step))  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _range(seconds: tuple[float, float]) -> str:
    return f"{seconds[0]:.1f} to {seconds[1]:.1f}"


if __name__ == "__main__":
    print(table())
