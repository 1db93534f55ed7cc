"""What a policy can do: greedy answers of every expert, and samples for pass@k. Nothing else in training opens the test split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from meml_lib import experts, tasks
from meml_lib.experts import Expert
from meml_lib.schema import RunParams, SamplingParams
from meml_lib.tasks import Question, Task
from meml_lib.training import mef, sharding
from meml_lib.training.ask import ask, in_order
from meml_lib.training.learner import micro_batches
from meml_lib.training.policy import Policy, Row

if TYPE_CHECKING:
    import pandas as pd


def questions_of(p: RunParams, task: Task, split: Literal["validation", "test"]) -> list[Question]:
    """The first `evaluate.SPLIT_questions` questions of the split (null: all); the same for every run.

    Raises: ValueError if the split holds fewer.
    """
    questions = task.questions(split)
    wanted = getattr(p.evaluate, f"{split}_questions")
    if wanted is not None and wanted > len(questions):
        raise ValueError(f"evaluate.{split}_questions={wanted} exceeds the {len(questions)} questions of {task.name}")
    return questions[:wanted]


def answers(
    policy: Policy,
    task: Task,
    panel: Sequence[Expert],
    questions: Sequence[Question],
    sampling: SamplingParams,
    accelerator: Accelerator,
    *,
    rollouts: int,
    seed: int,
) -> pd.DataFrame:
    """Ask every expert every question; each process asks its share.

    Args: sampling: temperature None for greedy. rollouts: answers per expert and question. seed: of the draws.
    Returns: the answers table, with `tokens` and `ended`, in (question, expert, sample) order.
    """
    import pandas as pd

    share = list(questions)[accelerator.process_index :: accelerator.num_processes]
    rows = ask(policy, task, panel, share, sampling, rollouts=rollouts, key=(seed, "evaluate")).rows
    return pd.DataFrame(in_order(gather_object(rows), questions, panel)).astype({"correct": "boolean"})


def greedy(
    p: RunParams,
    policy: Policy,
    task: Task,
    panel: Sequence[Expert],
    accelerator: Accelerator,
    split: Literal["validation", "test"],
) -> pd.DataFrame:
    """Every expert's most likely answer to the split's questions, as `answers`."""
    sampling = p.sampling.model_copy(update={"temperature": None})
    questions = questions_of(p, task, split)
    return answers(policy, task, panel, questions, sampling, accelerator, rollouts=1, seed=p.seed)


def measure(p: RunParams, policy: Policy, task: Task, panel: Sequence[Expert], accelerator: Accelerator) -> dict:
    """The tables that a stage leaves behind: validation_greedy, test_greedy, test_sampled and their questions."""
    tables = {}
    for split in ("validation", "test"):
        tables[f"{split}_questions"] = tasks.table(questions_of(p, task, split))
        tables[f"{split}_greedy"] = greedy(p, policy, task, panel, accelerator, split)
    if p.evaluate.samples_per_expert:
        questions, samples = questions_of(p, task, "test"), p.evaluate.samples_per_expert
        tables["test_sampled"] = answers(
            policy, task, panel, questions, p.sampling, accelerator, rollouts=samples, seed=p.seed
        )
    return tables


def answered_by_all_teachers(p: RunParams, policy: Policy, task: Task, panel: Sequence[Expert]) -> pd.DataFrame:
    """Teachers' answers to compare under all prompts: question_id, expert, text, split.

    The first that stage 1 could train on, right or wrong, to those of the first `evaluate.validation_questions` validation
    questions that all teachers answered; where there is none (tables of answers to training questions), to as many
    training questions.
    Raises: ValueError if all teachers have no question in common.
    """
    for split in ("validation", "train"):
        questions = task.questions(split)
        questions = questions[: p.evaluate.validation_questions] if split == "validation" else questions
        usable = p.mef.model_copy(update={"keep": "all", "answers_per_question": 1})
        answers, _ = mef.select(usable, experts.teacher_answers(task, panel, questions=questions), policy)
        by_all = answers.groupby("question_id")["expert"].transform("nunique") == len(panel)
        asked_ids = list(dict.fromkeys(answers.loc[by_all, "question_id"]))[: p.evaluate.validation_questions]
        if asked_ids:
            break
    else:
        names = [expert.name for expert in panel]
        raise ValueError(f"the teachers of {names} have no answered question in common: give each an answer to at least one")
    return answers.loc[answers["question_id"].isin(asked_ids), ["question_id", "expert", "text"]].assign(split=split)


@torch.no_grad()
def prompt_teacher(
    p: RunParams, policy: Policy, task: Task, panel: Sequence[Expert], answers: pd.DataFrame, accelerator: Accelerator
) -> pd.DataFrame:
    """How likely each teacher's answers are under each expert's prompt: whether stage 1 made the experts distinct.

    Args: answers: of `answered_by_all_teachers`.
    Returns: question_id, split, prompt, teacher (names of experts), logp (nats, over the answer), tokens.
    """
    import pandas as pd

    split = answers["split"].iloc[0]
    text_of = {question.id: question.text for question in task.questions(split)}
    firsts = answers[["question_id", "expert", "text"]].itertuples(index=False)
    asked = [(q, expert, teacher, text) for q, teacher, text in firsts for expert in panel]
    share = list(enumerate(asked))[accelerator.process_index :: accelerator.num_processes]
    rows = [Row(policy.prompt_ids(e.system, text_of[q]), policy.answer_ids(text)) for _, (q, e, _, text) in share]
    found = []
    policy.model.eval()
    with sharding.gathered(policy.model):
        for batch in micro_batches([row.tokens for row in rows], p.hardware.micro_batch_tokens):
            logp_NT, mask_NT = policy.score([rows[n] for n in batch])
            for n, logp in zip(batch, logp_NT.masked_fill(~mask_NT, 0.0).sum(-1).tolist(), strict=True):
                place, (question_id, expert, teacher, _) = share[n]
                head = {"question_id": question_id, "split": split, "prompt": expert.name, "teacher": teacher}
                found.append((place, head | {"logp": logp, "tokens": len(rows[n].answer)}))
    return pd.DataFrame([row for _, row in sorted(gather_object(found), key=lambda numbered: numbered[0])])


def accuracy(table: pd.DataFrame) -> dict[str, float]:
    """Share right, over all experts and by expert; unreadable counts as wrong."""
    right = table.assign(correct=table.correct.fillna(False).astype(float))
    by_expert = right.groupby("expert", sort=False).correct.mean()
    return {"validation_accuracy": right.correct.mean()} | {
        f"validation_accuracy/{expert}": share for expert, share in by_expert.items()
    }
