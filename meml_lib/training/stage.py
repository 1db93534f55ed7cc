"""A stage from its values to its folder: load, train, validate, stop, evaluate, save.

Runs in process (`run`) and as each of many processes: `python -m meml_lib.training.stage STAGE VALUES_JSON`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed

from meml_lib import config, experts, tasks
from meml_lib.rollouts import vllm
from meml_lib.runs import RunFolder
from meml_lib.schema import MefParams, OptimizerParams, RielParams
from meml_lib.training import evaluate, mef, policy, riel, sharding
from meml_lib.training.learner import Learner
from meml_lib.training.profile import profiled

if TYPE_CHECKING:
    import pandas as pd

OnRecord = Callable[[dict], None]


def run(stage: config.Stage, p: config.Run, on_record: OnRecord | None = None) -> None:
    """Train one stage and write its folder: metrics.jsonl, tables, model.

    Args:
      p: the run; stage 1's model is read from `p.folder("mef")` for "riel".
      on_record: called with each step's record, in the main process.
    Raises: FileNotFoundError if stage 2 finds no model of stage 1.
    """
    folder = RunFolder(p.folder(stage))
    places = ProjectConfiguration(str(folder.path), logging_dir=str(folder.path / "tracking"))
    accelerator = accelerator_of(p, log_with=list(p.tracking.trackers) or None, project_config=places)
    set_seed(p.seed, device_specific=True)  # dropout only: whatever decides a result has a seed of its own
    task, panel = tasks.load(p.task), experts.load_panel(p.experts)
    begun = {"mef": _mef, "riel": _riel}[stage](p, task, panel, accelerator)

    def doing(what: str) -> None:
        if accelerator.is_main_process:
            folder.write_json("progress", {"steps": begun.count, "doing": what})

    learned, validate_every = begun.learned, begun.params.validate_every
    doing("training")
    best = Best(learned, begun.params.patience)
    with _trackers(p, accelerator):
        for record in profiled(begun.steps, p.tracking.profile_steps, folder.path / "profile", accelerator):
            if validate_every and (record["step"] + 1) % validate_every == 0:
                record |= evaluate.accuracy(evaluate.greedy(p, learned, task, panel, accelerator, "validation"))
                best.see(record["validation_accuracy"])
            if accelerator.is_main_process:
                folder.append_metrics(record)
                accelerator.log({k: v for k, v in record.items() if v is not None and k != "step"}, record["step"])
                if on_record:
                    on_record(record)
            if best.exhausted:
                break
    best.restore()

    doing("evaluating")
    tables = evaluate.measure(p, learned, task, panel, accelerator) | begun.tables()
    if accelerator.is_main_process:
        for name, table in tables.items():
            folder.write_table(name, table)
    learned.save(folder.path / "model", write=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if p.sampling.engine == "vllm":
        vllm.stop()
    accelerator.end_training()


@contextmanager
def _trackers(p: config.Run, accelerator: Accelerator) -> Iterator[None]:
    """Where else each step goes (tracking.trackers), with all values of the run; closed however the block ends."""
    values = {".".join(path): value for path, value in config.leaves(p.values())}
    plain = {k: v if isinstance(v, (str, int, float)) else json.dumps(v) for k, v in values.items()}
    accelerator.init_trackers(p.tracking.project, plain)
    try:
        yield
    finally:
        while accelerator.trackers:  # end_training would also wait for the other processes
            accelerator.trackers.pop().finish()


@dataclass(frozen=True)
class _Begun:
    """A stage that is ready to train."""

    learned: policy.Policy
    params: MefParams | RielParams
    count: int
    """Of the steps, if nothing stops it early."""
    steps: Iterator[dict]
    """Trains as it is read: each step's record."""
    tables: Callable[[], dict[str, pd.DataFrame]]
    """The stage's own tables of what was trained; called in every process."""


def _mef(p: config.Run, task: tasks.Task, panel: experts.Panel, accelerator: Accelerator) -> _Begun:
    words = [*task.words(), *(word for expert in panel for word in expert.system.split())]
    learned = policy.load(p.model, device=str(accelerator.device), words=words, seed=p.seed)
    compared = evaluate.answered_by_all_teachers(p, learned, task, panel)  # before training: it may have to refuse
    answers = experts.teacher_answers(task, panel)
    kept, selection = mef.select(p.mef, answers, learned)
    if not p.mef.allow_test_questions:
        mef.refuse_test_questions(task, kept)
    if accelerator.is_main_process:  # now: they tell what was kept, should training refuse it
        folder = RunFolder(p.folder("mef"))
        folder.write_table("teacher_answers", answers)
        folder.write_table("training_answers", selection)
    rows = mef.rows_of(learned, panel, task.questions("train"), kept)
    count = mef.steps_of(p.mef, len(rows))
    learner = learner_of(p, p.mef, learned, accelerator, steps=count)

    def tables() -> dict[str, pd.DataFrame]:
        return {"prompt_teacher": evaluate.prompt_teacher(p, learned, task, panel, compared, accelerator)}

    return _Begun(learned, p.mef, count, mef.train(p.mef, learner, rows, seed=p.seed), tables)


def _riel(p: config.Run, task: tasks.Task, panel: experts.Panel, accelerator: Accelerator) -> _Begun:
    trained = p.folder("mef") / "model"
    if not trained.is_dir():
        raise FileNotFoundError(f"{trained} is missing: train stage 1 first (notebook 02_mef or launch.train)")
    learned = policy.load_trained(trained, p.model, device=str(accelerator.device), seed=p.seed)
    learner = learner_of(p, p.riel, learned, accelerator, steps=p.riel.steps)
    rollouts: list[dict] = []
    steps = _keeping(rollouts, riel.train(p, learned, learner, task, panel))
    return _Begun(learned, p.riel, p.riel.steps, steps, lambda: {"rollouts": _table(rollouts)})


def accelerator_of(p: config.Run, **tracking: Any) -> Accelerator:
    """This process's device, its share of the threads, and its memory.

    Args: tracking: accelerate's own options.
    Raises: RuntimeError if hardware.device asks for CUDA where torch finds none.
    """
    if p.hardware.threads:
        torch.set_num_threads(p.hardware.threads)
    accelerator = Accelerator(cpu=p.hardware.device == "cpu", **tracking)
    if p.hardware.device == "cuda" and accelerator.device.type != "cuda":
        raise RuntimeError(f"hardware.device=cuda, but torch finds {accelerator.device}; use auto or cpu")
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
    return accelerator


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed. Else it gives large blocks back to the system, and a step on a CPU spends a tenth of
    its time on fetching them again, page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # not on macOS
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes


class Best:
    """Early stopping on validation accuracy; keeps the best weights only where patience is set."""

    def __init__(self, learned: policy.Policy, patience: int | None):
        self._model, self._patience = learned.model, patience
        self._accuracy, self._weights, self._waited = -1.0, None, 0

    @property
    def exhausted(self) -> bool:
        return self._patience is not None and self._waited >= self._patience

    def see(self, accuracy: float) -> None:
        """Take note of one validation (share right, all experts)."""
        if self._patience is None:
            return
        if accuracy > self._accuracy:
            self._accuracy, self._waited = accuracy, 0
            state = self._model.state_dict()
            self._weights = {name: sharding.local(tensor).detach().cpu().clone() for name, tensor in state.items()}
        else:
            self._waited += 1

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights back, if any were kept."""
        if self._weights is not None:
            for name, tensor in self._model.state_dict().items():
                sharding.local(tensor).copy_(self._weights[name])


def learner_of(
    p: config.Run, params: OptimizerParams, learned: policy.Policy, accelerator: Accelerator, *, steps: int
) -> Learner:
    """Raises: RuntimeError where FSDP is asked for and the weights are not divided."""
    if p.hardware.gradient_checkpointing:
        learned.model.gradient_checkpointing_enable({"use_reentrant": False})
    sharded = config.accelerate_values(p).get("distributed_type") == "FSDP"
    learner = Learner(
        learned,
        accelerator,
        params,
        steps=steps,
        max_answer_tokens=p.sampling.max_answer_tokens,
        micro_batch_tokens=p.hardware.micro_batch_tokens,
        sharded=sharded,
    )
    if sharded:
        sharding.check(learner.model, accelerator.num_processes, f"hardware.accelerate_config={p.hardware.accelerate_config}")
    return learner


def _keeping(rollouts: list[dict], steps: Iterator[riel.Step]) -> Iterator[dict]:
    for step in steps:
        rollouts += step.rollouts
        yield step.metrics


def _table(rows: list[dict]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows).astype({"correct": "boolean"})


if __name__ == "__main__":
    stage_name, values_file = sys.argv[1:]
    run(stage_name, config.load_values(values_file))
