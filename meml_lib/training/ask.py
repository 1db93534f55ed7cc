"""Every expert answers every question: render, sample, read, compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meml_lib.experts import Expert
from meml_lib.rollouts import Rollout, native, uniforms, vllm
from meml_lib.schema import SamplingParams
from meml_lib.tasks import Question, Task
from meml_lib.training import sharding
from meml_lib.training.policy import Policy
from meml_lib.training.profile import span


@dataclass(frozen=True)
class Asked:
    """B questions, E experts, G rollouts each."""

    prompts_BE: list[list[tuple[int, ...]]]
    rollouts_BEG: list[list[list[Rollout]]]
    shape: tuple[int, int, int]
    """B, E, G."""
    rows: list[dict]
    """The answers table, one row a rollout, in BEG order: question_id, expert, sample, text, answer, correct, tokens, ended."""

    @property
    def rewards_BEG(self) -> Tensor:
        """1 for a right answer, 0 for a wrong or unreadable one; float32."""
        return torch.tensor([float(row["correct"] is True) for row in self.rows]).view(self.shape)


def in_order(rows: Sequence[dict], questions: Sequence[Question], panel: Sequence[Expert]) -> list[dict]:
    """Rows of the answers table, of all processes, in BEG order whatever the number of processes."""
    question_at = {question.id: b for b, question in enumerate(questions)}
    expert_at = {expert.name: e for e, expert in enumerate(panel)}
    return sorted(rows, key=lambda row: (question_at[row["question_id"]], expert_at[row["expert"]], row["sample"]))


@span("ask: sample and grade")
def ask(
    policy: Policy,
    task: Task,
    panel: Sequence[Expert],
    questions: Sequence[Question],
    sampling: SamplingParams,
    *,
    rollouts: int,
    key: tuple[int | str, ...],
) -> Asked:
    """Sample `rollouts` answers from every expert to every question, and grade them.

    A truncated answer counts as unreadable, whatever could be read in it: it never came to its end. All processes call it
    together, each with its share of the questions; a share may be empty.

    Args:
      questions: B. sampling: temperature None asks greedily.
      key: start of the random key, e.g. (seed, step); question, expert and rollout number complete it.
    """
    prompts_BE = [[policy.prompt_ids(expert.system, question.text) for expert in panel] for question in questions]
    limit = sampling.max_answer_tokens
    keys = [(question.id, expert.name, g) for question in questions for expert in panel for g in range(rollouts)]
    if sampling.temperature is None:
        uniform_NT = np.zeros((len(keys), limit))
    else:
        uniform_NT = np.array([uniforms(*key, *k, count=limit) for k in keys]).reshape(len(keys), limit)
    policy.model.eval()
    engine = {"native": native, "vllm": vllm}[sampling.engine]
    with span("sample"), sharding.gathered(policy.model):
        flat = engine.sample(
            policy.model,
            [prompt for row in prompts_BE for prompt in row for _ in range(rollouts)],
            uniform_NT=uniform_NT,
            end_ids=policy.end_ids,
            max_answer_tokens=limit,
            rows_per_batch=sampling.rows_per_batch,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
    by_id = {question.id: question for question in questions}
    rows = []
    for (question_id, expert, sample), rollout in zip(keys, flat, strict=True):
        text = policy.text(rollout.tokens)
        graded = task.grade(text, by_id[question_id])
        answer, correct = (graded.answer, graded.correct) if rollout.ended else (None, None)
        row = {"question_id": question_id, "expert": expert, "sample": sample, "text": text, "answer": answer}
        rows.append(row | {"correct": correct, "tokens": len(rollout.tokens), "ended": rollout.ended})
    it = iter(flat)
    rollouts_BEG = [[[next(it) for _ in range(rollouts)] for _ in panel] for _ in questions]
    return Asked(prompts_BE, rollouts_BEG, (len(questions), len(panel), rollouts), rows)
