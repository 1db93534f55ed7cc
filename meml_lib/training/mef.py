"""Stage 1, MEF: multi-expert supervised fine-tuning on the teachers' answers (eq. 4)."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from meml_lib.experts import Expert
from meml_lib.schema import MefParams
from meml_lib.tasks import Question
from meml_lib.training import losses
from meml_lib.training.policy import Policy, Row

if TYPE_CHECKING:
    import pandas as pd

    from meml_lib.training.learner import Learner


def rows_of(policy: Policy, panel: Sequence[Expert], questions: Sequence[Question], answers: pd.DataFrame) -> list[Row]:
    """Each teacher's answer under its expert's prompt: D = {(Q_j, P_i, A_ji)} (eq. 1-3)."""
    text_of = {question.id: question.text for question in questions}
    system_of = {expert.name: expert.system for expert in panel}
    return [
        Row(policy.prompt_ids(system_of[expert], text_of[question_id]), policy.answer_ids(text))
        for question_id, expert, text in answers[["question_id", "expert", "text"]].itertuples(index=False)
    ]


def steps_of(params: MefParams, rows: int) -> int:
    """Optimiser steps of the stage for this many answers."""
    return params.steps or max(1, math.ceil(params.epochs * rows / params.answers_per_step))


def train(params: MefParams, learner: Learner, rows: Sequence[Row], *, seed: int) -> Iterator[dict]:
    """Train on shuffled passes over the rows; one record a step.

    Raises: ValueError if there are fewer rows than params.answers_per_step.
    """
    if len(rows) < params.answers_per_step:
        raise ValueError(f"stage 1 has {len(rows)} answers, fewer than mef.answers_per_step={params.answers_per_step}")
    rank, processes = learner.accelerator.process_index, learner.accelerator.num_processes
    stream = batches(len(rows), params.answers_per_step, seed=seed)
    for step in range(steps_of(params, len(rows))):
        started = time.perf_counter()
        batch = [rows[n] for n in next(stream)]
        lr = learner.lr
        record = learner.update([losses.mef(batch[rank::processes])])
        seconds = time.perf_counter() - started
        tokens = sum(row.tokens for row in batch)
        yield {
            "step": step,
            "loss": record["loss"],
            "lr": lr,
            "grad_norm": record["grad_norm"],
            "answer_tokens": sum(len(row.answer) for row in batch) / len(batch),
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
        }


def batches(count: int, size: int, *, seed: int) -> Iterator[list[int]]:
    """Endless batches of numbers below count; one random order a pass, each pass its own, no number twice in a batch.

    The end of a pass that does not fill a batch is left out; being random, it is another one each pass.
    Raises: ValueError if size exceeds count.

    >>> stream = batches(3, 2, seed=0)
    >>> len(set(next(stream))), len(set(next(stream)))
    (2, 2)
    """
    if size > count:
        raise ValueError(f"a batch of {size} needs as many rows, and there are {count}")
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))
