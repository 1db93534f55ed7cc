"""A stage from its values to its folder: load, train, validate, stop, evaluate, save.

Runs in process (`run`) and as each of many processes: `python -m meml_lib.training.stage STAGE VALUES_JSON`.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed

from meml_lib import config, experts, runs, tasks
from meml_lib.analysis import card
from meml_lib.rollouts import vllm
from meml_lib.runs import RunFolder
from meml_lib.schema import MefParams, OptimizerParams, RielParams
from meml_lib.training import evaluate, keeping, mef, policy, riel, sharding
from meml_lib.training.learner import Learner
from meml_lib.training.profile import profiled

if TYPE_CHECKING:
    import pandas as pd

OnRecord = Callable[[dict], None]


def run(stage: config.Stage, p: config.Run, on_record: OnRecord | None = None) -> None:
    """Train one stage and write its folder: metrics.jsonl, tables, model.

    Goes on from the newest whole checkpoint that the folder holds. On SIGTERM it writes one after the step under way, and
    then ends as SIGTERM would have ended it.

    Args:
      p: the run; stage 1's model is read from `p.folder("mef")` for "riel".
      on_record: called with each step's record, in the main process; those from before a checkpoint come first.
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
    best = keeping.Best(learned, begun.params.patience)
    kept = keeping.Keeping(p, folder, accelerator, begun.learner, best)
    state = kept.restore()
    if accelerator.is_main_process and on_record:
        for record in folder.metrics_from(0)[0]:
            on_record(record)
    doing("training")
    steps = () if best.exhausted else begun.steps(state)
    with _trackers(p, accelerator), keeping.sigterm(together=accelerator.num_processes > 1) as terminated:
        for record in profiled(map(kept.see, steps), p.tracking.profile_steps, folder.path / "profile", accelerator):
            if validate_every and (record["step"] + 1) % validate_every == 0:
                record |= evaluate.accuracy(evaluate.greedy(p, learned, task, panel, accelerator, "validation"))
                best.see(record["validation_accuracy"])
            if accelerator.is_main_process:
                folder.append_metrics(record)
                accelerator.log({k: v for k, v in record.items() if v is not None and k != "step"}, record["step"])
                if on_record:
                    on_record(record)
            ending = begun.learner.anywhere(terminated.is_set())
            if kept.due or ending:
                kept.write()
            if ending:
                terminated.set()
            if best.exhausted or ending:
                break
        kept.write()  # evaluation may be cut off too
    best.restore()

    doing("evaluating")
    tables = evaluate.measure(p, learned, task, panel, accelerator) | begun.tables()
    if accelerator.is_main_process:
        for name, table in tables.items():
            folder.write_table(name, table)
    learned.save(folder.path / "model", write=accelerator.is_main_process)
    if accelerator.is_main_process:
        card.write(folder, stage, p)
    if p.sampling.engine == "vllm":
        vllm.stop()
    end_together(accelerator)


def end_together(accelerator: Accelerator) -> None:
    """End all processes' group: one that leaves earlier would end what the others still gather."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # A thread of gloo's may not have let go of that yet, for which it needs the interpreter's lock; torch ends the group
        # with the lock held, and waits for the thread: for good.
        time.sleep(0.1)
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
    learner: Learner
    params: MefParams | RielParams
    count: int
    """Of the steps, if nothing stops it early."""
    steps: Callable[[dict | None], Iterator[tuple[dict, dict]]]
    """From where to go on (None: the start) to each step's record, and where to go on from after it; trains as it is read."""
    tables: Callable[[], dict[str, pd.DataFrame]]
    """The stage's own tables of what was trained; called in every process, and good in the main one."""


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

    def steps(state: dict | None) -> Iterator[tuple[dict, dict]]:
        for record in mef.train(p.mef, learner, rows, seed=p.seed, start=state["steps"] if state else 0):
            yield record, {"steps": record["step"] + 1}

    def tables() -> dict[str, pd.DataFrame]:
        return {"prompt_teacher": evaluate.prompt_teacher(p, learned, task, panel, compared, accelerator)}

    return _Begun(learned, learner, p.mef, count, steps, tables)


def _riel(p: config.Run, task: tasks.Task, panel: experts.Panel, accelerator: Accelerator) -> _Begun:
    trained = p.folder("mef") / "model"
    if not trained.is_dir():
        raise FileNotFoundError(f"{trained} is missing: train stage 1 first (notebook 02_mef or launch.train)")
    learned = policy.load_trained(trained, p.model, device=str(accelerator.device), seed=p.seed)
    learner = learner_of(p, p.riel, learned, accelerator, steps=p.riel.steps)
    folder = RunFolder(p.folder("riel"))

    def steps(state: dict | None) -> Iterator[tuple[dict, dict]]:
        for step in riel.train(p, learned, learner, task, panel, state):
            if accelerator.is_main_process:
                folder.append("rollouts", step.rollouts)
            yield step.metrics, step.state

    def tables() -> dict[str, pd.DataFrame]:
        import pandas as pd

        if not accelerator.is_main_process:
            return {}
        lines, _ = runs.lines_from(folder.path / "rollouts.jsonl", 0)
        return {"rollouts": pd.DataFrame(map(json.loads, lines)).astype({"correct": "boolean"})}

    return _Begun(learned, learner, p.riel, p.riel.steps, steps, tables)


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
    """Let glibc keep what is freed, but for blocks of 32 MiB and more, of which it never keeps any by itself. Else it gives
    smaller ones back too, and a step on a CPU spends up to a tenth of its time on fetching them again, page by page. Kept, the
    largest would leave holes that nothing else fills: a sampler's output matrix, an update's gradient of it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # not on macOS
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes


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


if __name__ == "__main__":
    stage_name, values_file = sys.argv[1:]
    run(stage_name, config.load_values(values_file))
