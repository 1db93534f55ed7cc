"""Stage 1, MEF: multi-expert supervised fine-tuning on the teachers' answers (eq. 4)."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from meml_lib.experts import Expert
from meml_lib.schema import MefParams
from meml_lib.tasks import Question, Task, leaks
from meml_lib.training import losses
from meml_lib.training.policy import Policy, Row

if TYPE_CHECKING:
    from meml_lib.training.learner import Learner


LEFT_OUT = ("cut_off", "empty", "wrong", "too_long", "beyond")
"""Why stage 1 does not train on an answer: the first of these that holds."""


def select(params: MefParams, answers: pd.DataFrame, policy: Policy | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The teachers' answers that stage 1 trains on.

    wrong: mef.keep is right, and it is wrong or unreadable; too_long: more tokens, its end token included, than
    mef.max_answer_tokens; beyond: after the first mef.answers_per_question that the others leave.

    Args: answers: of `experts.teacher_answers`. policy: whose tokens are counted; None: too_long never holds.
    Returns: the rows that are kept; a row an expert: expert, given, each of `LEFT_OUT`, kept (counts).
    """
    most = params.max_answer_tokens if policy else None
    tests = {
        "cut_off": ~answers["ended"],
        "empty": answers["text"].str.strip() == "",
        "wrong": ~answers["correct"].fillna(False).astype(bool) & (params.keep == "right"),
        "too_long": answers["text"].map(lambda text: most is not None and len(policy.answer_ids(text)) > most),
    }
    fate = pd.Series(np.select([test.astype(bool) for test in tests.values()], list(tests), "kept"), answers.index)
    place = answers[fate == "kept"].groupby(["question_id", "expert"]).cumcount()
    fate[place.index[place >= (params.answers_per_question or math.inf)]] = "beyond"
    told = pd.crosstab(answers["expert"], fate).reindex(answers["expert"].unique(), columns=[*LEFT_OUT, "kept"])
    told = told.fillna(0).astype(int)
    told.insert(0, "given", told.sum(axis=1))
    return answers[fate == "kept"], told.rename_axis("expert", axis=0).rename_axis(None, axis=1).reset_index()


def refuse_test_questions(task: Task, answers: pd.DataFrame) -> None:
    """Raises: ValueError naming a test question that a training question, or an answer to one, holds word for word."""
    questions = task.questions("train")
    told = answers["expert"] + "'s answer to " + answers["question_id"]
    names = [*(f"the training question {question.id}" for question in questions), *told]
    found = leaks.test_questions_in(task, [*(question.text for question in questions), *answers["text"]])
    if found:
        place, test_id = found[0]
        more = f" ({len(found)} such texts)" if len(found) > 1 else ""
        todo = "leave it out, or set mef.allow_test_questions=true"
        raise ValueError(f"{names[place]} holds the test question {test_id}{more}: {todo}")


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


def train(params: MefParams, learner: Learner, rows: Sequence[Row], *, seed: int, start: int = 0) -> Iterator[dict]:
    """Train on shuffled passes over the rows; one record a step.

    Args: start: steps that are done already.
    Raises: ValueError if there are fewer rows than params.answers_per_step.
    """
    if len(rows) < params.answers_per_step:
        raise ValueError(f"stage 1 has {len(rows)} answers, fewer than mef.answers_per_step={params.answers_per_step}")
    rank, processes = learner.accelerator.process_index, learner.accelerator.num_processes
    stream = batches(len(rows), params.answers_per_step, seed=seed)
    for step, numbers in enumerate(itertools.islice(stream, start, steps_of(params, len(rows))), start):
        started = time.perf_counter()
        batch = [rows[n] for n in numbers]
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
