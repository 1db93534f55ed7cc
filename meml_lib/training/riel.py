"""Stage 2, RIEL: reinforcement learning in which the experts of one policy learn from each other.

`train` is the algorithm of the paper: sample -> grade -> credit -> buffer -> loss parts -> one update.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object

from meml_lib.experts import Expert
from meml_lib.rollouts import uniforms
from meml_lib.schema import RunParams
from meml_lib.tasks import Question, Task
from meml_lib.training import losses
from meml_lib.training.ask import ask, in_order
from meml_lib.training.buffer import HardExampleBuffer
from meml_lib.training.credit import best_and_worst
from meml_lib.training.learner import Learner
from meml_lib.training.mef import batches
from meml_lib.training.policy import Policy, Row


@dataclass(frozen=True)
class Step:
    """What one step did."""

    metrics: dict[str, float]
    """One line of metrics.jsonl; the README's glossary gives each unit."""
    rollouts: list[dict]
    """The answers table of all processes, with `step`."""
    state: dict
    """What `train` goes on from after this step, beside the learner's own; plain values."""


def train(
    p: RunParams, policy: Policy, learner: Learner, task: Task, panel: Sequence[Expert], state: dict | None = None
) -> Iterator[Step]:
    """MEML-GRPO, arXiv 2508.09670: eq. 5-10 and the hard-example buffer. Yields after each step's update; ends
    after `riel.steps` of them, or once a budget of `riel.stop_at` is spent.

    Each process takes its share of the step's questions, which may be none; the buffer, the losses' denominators, the
    metrics and the random draws are those of all processes together.

    Args: state: of the step to go on from, see `Step.state`.
    """
    objective, group, seed = p.riel.objective, p.riel.rollouts_per_expert, p.seed
    rank, processes = learner.accelerator.process_index, learner.accelerator.num_processes
    questions = task.questions("train")
    by_id = {question.id: question for question in questions}
    systems = {expert.name: expert.system for expert in panel}
    hard = objective.buffer_sft
    buffer = hard and HardExampleBuffer(hard.capacity, hard.wrong_over, group)
    state = state or {"steps": 0, "held": [], "flushes": 0, "spent": dict.fromkeys(dict(p.riel.stop_at), 0)}
    stream = itertools.islice(batches(len(questions), p.riel.questions_per_step, seed=seed), state["steps"], p.riel.steps)
    flushes, spent = state["flushes"], dict(state["spent"])
    if hard:
        buffer.held += map(tuple, state["held"])

    for step, numbers in enumerate(stream, start=state["steps"]):
        if any(most is not None and spent[budget] >= most for budget, most in p.riel.stop_at):
            return
        batch = [questions[n] for n in numbers]
        share = batch[rank::processes]
        started = time.perf_counter()
        asked = ask(policy, task, panel, share, p.sampling, rollouts=group, key=(seed, step))
        rewards_BEG = asked.rewards_BEG
        sampled = time.perf_counter()

        experts_B = best_and_worst(rewards_BEG, _ties(share, panel, seed, step))
        parts = losses.on_rollouts(objective, rewards_BEG, asked.rollouts_BEG, asked.prompts_BE, experts_B)

        rollouts = in_order(gather_object([row | {"step": step} for row in asked.rows]), batch, panel)
        ground_truth: list[Row] = []
        if hard:
            _offer(buffer, rollouts, seed, step)
            while (full := buffer.take()) is not None:
                flushes += 1
                ground_truth += [_ground_truth(policy, by_id[q], systems[expert]) for q, expert in full]
        supervised = [losses.buffer_sft(hard, ground_truth[rank::processes])] if ground_truth else []

        lr = learner.lr
        if hard and hard.update == "in_sum":
            record = learner.update([*parts, *supervised])
        else:
            record = learner.update(parts, advance=not supervised)
            if supervised:
                own = learner.update(supervised)
                own["grad_norm/buffer_sft"] = own.pop("grad_norm")
                record = own | record | {"loss": record["loss"] + own["loss"]}
        trained = time.perf_counter()

        best_worst = gather_object([(b, w) for b, w, strict in zip(*(x.tolist() for x in experts_B)) if strict])
        tokens_in_updates = sum(r.row.tokens for part in [*parts, *supervised] for r in part.rows if r.count)
        spent["rollouts"] += len(rollouts)
        spent["ground_truth_items"] += len(ground_truth)
        spent["update_tokens"] += sum(gather_object([tokens_in_updates]))
        entropies = [r.entropy for groups in asked.rollouts_BEG for rs in groups for r in rs if r.entropy is not None]
        metrics = {
            "step": step,
            **summary(rollouts, panel, group),
            **({"rows/buffer_sft": 0} if hard else {}),
            **record,
            **{f"best/{e.name}": sum(b == i for b, _ in best_worst) for i, e in enumerate(panel)},
            **{f"worst/{e.name}": sum(w == i for _, w in best_worst) for i, e in enumerate(panel)},
            "entropy": _mean(entropies) if entropies else None,
            "buffer_size": len(buffer.held) if hard else 0,
            "buffer_flushes": flushes,
            **spent,
            "lr": lr,
            "sample_seconds": sampled - started,
            "sample_tokens_per_s": sum(row["tokens"] for row in asked.rows) / (sampled - started),
            "train_seconds": trained - sampled,
            "train_tokens_per_s": tokens_in_updates / (trained - sampled),
        }
        held = list(buffer.held) if hard else []
        yield Step(metrics, rollouts, {"steps": step + 1, "held": held, "flushes": flushes, "spent": dict(spent)})


def summary(rollouts: Sequence[dict], panel: Sequence[Expert], group: int) -> dict[str, float]:
    """Rewards and shares of one step's rollouts.

    Args: rollouts: the answers table in (question, expert, rollout) order; group: G, rollouts a (question, expert).
    Returns: reward (mean, 0 to 1) overall and by expert; shares of groups all wrong, all right and mixed, of questions
      that every rollout of every expert gets wrong, of truncated and unreadable rollouts; mean answer tokens.
    """
    reward_BEG = torch.tensor([float(row["correct"] is True) for row in rollouts]).view(-1, len(panel), group)
    none_BE, all_BE = (reward_BEG == 0).all(-1), (reward_BEG == 1).all(-1)
    return {
        "reward": reward_BEG.mean().item(),
        **{f"reward/{expert.name}": reward_BEG[:, e].mean().item() for e, expert in enumerate(panel)},
        "groups_all_wrong": none_BE.float().mean().item(),
        "groups_all_right": all_BE.float().mean().item(),
        "groups_mixed": (~none_BE & ~all_BE).float().mean().item(),
        "questions_all_wrong": none_BE.all(-1).float().mean().item(),
        "answer_tokens": _mean([row["tokens"] for row in rollouts]),
        "truncated": _mean([not row["ended"] for row in rollouts]),
        "unreadable": _mean([row["correct"] is None for row in rollouts]),
    }


def _offer(buffer: HardExampleBuffer, rollouts: Sequence[dict], seed: int, step: int) -> None:
    """Offer every (question, expert) of the step, in order. Groups adjoin: BEG order."""
    for start in range(0, len(rollouts), buffer.rollouts):
        group = rollouts[start : start + buffer.rollouts]
        question_id, expert = group[0]["question_id"], group[0]["expert"]
        chance = uniforms(seed, step, question_id, expert, "buffer", count=1)[0]
        wrong = sum(row["correct"] is not True for row in group)
        buffer.offer(question_id, expert, wrong=wrong, chance=chance)


def _ground_truth(policy: Policy, question: Question, system: str) -> Row:
    return Row(policy.prompt_ids(system, question.text), policy.answer_ids(question.rationale))


def _ties(questions: Sequence[Question], panel: Sequence[Expert], seed: int, step: int) -> torch.Tensor:
    draws = [[uniforms(seed, step, q.id, e.name, "tie", count=1)[0] for e in panel] for q in questions]
    return torch.tensor(draws, dtype=torch.float64).view(len(questions), len(panel))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
