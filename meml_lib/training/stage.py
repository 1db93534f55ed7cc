"""A stage from its values to its folder: load, train, validate, stop, evaluate, save.

Runs in process (`run`) and as each of many processes: `python -m meml_lib.training.stage STAGE VALUES_JSON`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from meml_lib import config, experts, tasks
from meml_lib.runs import RunFolder
from meml_lib.schema import OptimizerParams
from meml_lib.training import evaluate, mef, policy, riel
from meml_lib.training.learner import Learner

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
    accelerator = accelerator_of(p)
    set_seed(p.seed, device_specific=True)  # dropout only: whatever decides a result has a seed of its own
    task, panel = tasks.load(p.task), experts.load_panel(p.experts)
    folder = RunFolder(p.folder(stage))
    device = str(accelerator.device)

    if stage == "mef":
        words = [*task.words(), *(word for expert in panel for word in expert.system.split())]
        learned = policy.load(p.model, device=device, words=words, seed=p.seed)
        compared = evaluate.answered_by_all_teachers(p, learned, task, panel)  # before training: it may have to refuse
        answers = experts.teacher_answers(task, panel)
        kept, selection = mef.select(p.mef, answers, learned)
        if not p.mef.allow_test_questions:
            mef.refuse_test_questions(task, kept)
        if accelerator.is_main_process:
            folder.write_table("teacher_answers", answers)
            folder.write_table("training_answers", selection)
        rows = mef.rows_of(learned, panel, task.questions("train"), kept)
        learner = learner_of(p, p.mef, learned, accelerator, steps=mef.steps_of(p.mef, len(rows)))
        steps = mef.train(p.mef, learner, rows, seed=p.seed)
        patience, validate_every = p.mef.patience, p.mef.validate_every
    else:
        trained = p.folder("mef") / "model"
        if not trained.is_dir():
            raise FileNotFoundError(f"{trained} is missing: train stage 1 first (notebook 02_mef or launch.train)")
        learned = policy.load_trained(trained, p.model, device=device, seed=p.seed)
        learner = learner_of(p, p.riel, learned, accelerator, steps=p.riel.steps)
        rollouts: list[dict] = []
        steps = _keeping(rollouts, riel.train(p, learned, learner, task, panel))
        patience, validate_every = p.riel.patience, p.riel.validate_every

    best = Best(learned, patience)
    for record in steps:
        if validate_every and (record["step"] + 1) % validate_every == 0:
            record |= evaluate.accuracy(evaluate.greedy(p, learned, task, panel, accelerator, "validation"))
            best.see(record["validation_accuracy"])
        if accelerator.is_main_process:
            folder.append_metrics(record)
            if on_record:
                on_record(record)
        if best.exhausted:
            break
    best.restore()

    tables = evaluate.measure(p, learned, task, panel, accelerator)
    if stage == "mef":
        tables["prompt_teacher"] = evaluate.prompt_teacher(p, learned, task, panel, compared, accelerator)
    if accelerator.is_main_process:
        if stage == "riel":
            tables["rollouts"] = _table(rollouts)
        for name, table in tables.items():
            folder.write_table(name, table)
        learned.save(folder.path / "model")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def accelerator_of(p: config.Run) -> Accelerator:
    """This process's device, and its share of the threads.

    Raises: RuntimeError if hardware.device asks for CUDA where torch finds none.
    """
    if p.hardware.threads:
        torch.set_num_threads(p.hardware.threads)
    accelerator = Accelerator(cpu=p.hardware.device == "cpu")
    if p.hardware.device == "cuda" and accelerator.device.type != "cuda":
        raise RuntimeError(f"hardware.device=cuda, but torch finds {accelerator.device}; use auto or cpu")
    return accelerator


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
            self._weights = {name: tensor.detach().cpu().clone() for name, tensor in self._model.state_dict().items()}
        else:
            self._waited += 1

    def restore(self) -> None:
        """Put the best weights back, if any were kept."""
        if self._weights is not None:
            self._model.load_state_dict(self._weights)


def learner_of(
    p: config.Run, params: OptimizerParams, learned: policy.Policy, accelerator: Accelerator, *, steps: int
) -> Learner:
    return Learner(
        learned,
        accelerator,
        params,
        steps=steps,
        max_answer_tokens=p.sampling.max_answer_tokens,
        micro_batch_tokens=p.hardware.micro_batch_tokens,
    )


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
