"""The losses (eq. 4, 6, 9, 10): which rows each trains on, and a pure formula.

A loss is a `Part`: its weight in the objective, its rows, what each row counts, what the sum is divided by, and its
formula. `on_rollouts` builds those of one step; `learner.Learner.update` adds them up and takes the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from meml_lib.rollouts import Rollout
from meml_lib.schema import BufferSftParams, Divisor, GrpoParams, MutualParams, ObjectiveParams
from meml_lib.training.credit import advantages
from meml_lib.training.policy import Row

# --- formulas ---------------------------------------------------------------------------------------------------------


def weighted_nll(logp_NT: Tensor, mask_NT: Tensor, weight_N: Tensor) -> Tensor:
    """Raise the probability of answers, each by its weight.

        L = - sum_nt  weight_n mask_nt log p(answer_nt | prompt_n)

    With the advantage in the weight this is the policy gradient (eq. 6), whose importance ratio is 1 since each batch
    of rollouts is used once; with equal weights it is supervised fine-tuning (eq. 4, and the buffer's part of eq. 10).
    Minimising it raises log p where the weight is positive. Differs from the paper: a sum over tokens divided as
    `token_weights` says, where eq. 4 and 6 are printed without a divisor.

    Args:
      logp_NT: nats. mask_NT: bool; the answer's tokens, its end token included, padding not.
      weight_N: per token.
    Returns: scalar, nats.  Source: MEML-GRPO, arXiv 2508.09670, eq. 4 and 6.
    """
    return -(weight_N[:, None] * logp_NT.masked_fill(~mask_NT, 0.0)).sum()


def mutual_loss(logp_NT: Tensor, best_logp_NT: Tensor, mask_NT: Tensor, weight_N: Tensor) -> Tensor:
    """Draw the worst expert towards the best expert's correct answers O+.

        L = sum_nt  weight_n mask_nt ( stopgrad(log p(O+ | q, best)) - log p(O+ | q, worst) )

    An estimate of KL(best || worst) on O+. Differs from the paper: sign (minimising eq. 9 as printed would push the
    worst expert away) and stopgrad (the best expert stays put).

    Args:
      logp_NT, best_logp_NT: nats, the same tokens under the worst and the best expert's prompt.
      mask_NT: bool; the answer's tokens, its end token included, padding not.
      weight_N: per token; with divide_by "tokens", mask * weight sums to 1 over the whole step.
    Returns: scalar, nats per token.  Source: MEML-GRPO, arXiv 2508.09670, eq. 9.
    """
    gap_NT = best_logp_NT.detach() - logp_NT
    return (weight_N[:, None] * gap_NT.masked_fill(~mask_NT, 0.0)).sum()  # not *: 0 * inf is nan


def mutual_k2_loss(logp_NT: Tensor, best_logp_NT: Tensor, mask_NT: Tensor, weight_N: Tensor) -> Tensor:
    """Draw the worst expert's log-probabilities of O+ towards the best expert's, from either side.

        L = sum_nt  weight_n mask_nt  1/2 ( log p(O+ | q, worst) - stopgrad(log p(O+ | q, best)) )^2

    Never negative. Minimising it raises log p(worst) where it is below the best expert's and lowers it where above:
    unlike `mutual_loss` it fades as the two agree.

    Args, Returns: as `mutual_loss`; nats squared.  Source: the k2 estimator, J. Schulman, "Approximating KL
      divergence" (2020), in place of MEML-GRPO's eq. 9.
    """
    gap_NT = best_logp_NT.detach() - logp_NT
    return (weight_N[:, None] * 0.5 * gap_NT.masked_fill(~mask_NT, 0.0).square()).sum()


def mutual_token_kl_loss(log_probs_NTV: Tensor, best_log_probs_NTV: Tensor, mask_NT: Tensor, weight_N: Tensor) -> Tensor:
    """Draw the worst expert's whole next-token distribution along O+ towards the best expert's.

        L = sum_nt  weight_n mask_nt  sum_v stopgrad(p(v | best)) ( stopgrad(log p(v | best)) - log p(v | worst) )

    KL(best || worst) at each position of O+, never negative. Minimising it raises the worst expert's probability of
    what the best expert finds likely, so also of tokens that were not drawn.

    Args:
      log_probs_NTV, best_log_probs_NTV: nats, normalised over V. mask_NT, weight_N: as `mutual_loss`.
    Returns: scalar, nats per token.  Source: Deep Mutual Learning, arXiv 1706.00384, eq. 5, for MEML-GRPO's eq. 9.
    """
    best_NTV = best_log_probs_NTV.detach()
    kl_NT = (best_NTV.exp() * (best_NTV - log_probs_NTV)).sum(-1)
    return (weight_N[:, None] * kl_NT.masked_fill(~mask_NT, 0.0)).sum()


def token_weights(
    counts_N: Tensor,
    tokens_N: Tensor,
    *,
    divide_by: Divisor,
    total_rows: int,
    total_tokens: int,
    max_answer_tokens: int,
) -> Tensor:
    """What one token of each row weighs, so that micro-batches and processes simply add up.

    Args:
      counts_N: what each row counts: its advantage, or 1.
      tokens_N: answer tokens of each row.
      divide_by: "constant", total_rows * max_answer_tokens (MEML's parts, Dr.GRPO); "answer", total_rows * the row's
        tokens (GRPO); "tokens", total_tokens (a mean over the step's tokens).
      total_rows, total_tokens: over the whole step and all processes, rows that count 0 included.
    Returns: float32 [N], per token.
    Source: the three averages are compared in Dr.GRPO, arXiv 2503.20783.

    >>> options = dict(total_rows=2, total_tokens=10, max_answer_tokens=16)
    >>> [token_weights(torch.tensor([1.0]), torch.tensor([8]), divide_by=d, **options).item() for d in ("constant", "answer", "tokens")]
    [0.03125, 0.0625, 0.10000000149011612]
    """
    divisor_N = {
        "constant": torch.full_like(tokens_N, total_rows * max_answer_tokens),
        "answer": total_rows * tokens_N,
        "tokens": torch.full_like(tokens_N, total_tokens),
    }[divide_by]
    return counts_N / divisor_N


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeighedRow:
    """One row of one part."""

    row: Row
    count: float
    """Its advantage, or 1; a row that counts 0 is dropped before any forward pass."""
    best_prompt: tuple[int, ...] | None = None
    """The best expert's prompt (mutual learning)."""
    best_logp: tuple[float, ...] | None = None
    """Log-probability of each answer token under the best expert's prompt, from its rollout; nats."""


@dataclass(frozen=True)
class Part:
    """One term of the objective for one step."""

    name: Literal["mef", "grpo", "mutual", "buffer_sft"]
    weight: float
    rows: Sequence[WeighedRow]
    divide_by: Divisor
    formula: Callable[..., Tensor]
    """weighted_nll, or one with an argument that `against` names."""
    against: Literal["nothing", "rollouts", "distributions"] = "nothing"
    """What the formula takes of the best expert: nothing, the log-probabilities that its rollouts were drawn with, or its
    whole next-token distributions and the row's own."""


_MUTUAL_FORMS = {  # the formula, and what it takes of the best expert
    "forward_kl": (mutual_loss, "rollouts"),
    "k2": (mutual_k2_loss, "rollouts"),
    "token_kl": (mutual_token_kl_loss, "distributions"),
    "literal": (weighted_nll, "nothing"),
}

Groups = list[list[list[Rollout]]]
"""Rollouts by question (B), expert (E, panel order) and rollout (G)."""


def grpo(options: GrpoParams, rewards_BEG: Tensor, rollouts_BEG: Groups, prompts_BE: Sequence[Sequence[Any]]) -> Part:
    """Each expert's own rollouts under its own prompt, counted by their advantage (eq. 5, 6)."""
    advantage_BEG = advantages(rewards_BEG, scale=options.scale)
    if options.advantage == "positive":
        advantage_BEG = advantage_BEG.clamp(min=0.0)
    rows = [
        WeighedRow(Row(prompts_BE[b][e], rollout.tokens), count=advantage_BEG[b, e, g].item())
        for b, groups in enumerate(rollouts_BEG)
        for e, group in enumerate(groups)
        for g, rollout in enumerate(group)
    ]
    return Part("grpo", options.weight, rows, options.divide_by, weighted_nll)


def mutual(
    options: MutualParams,
    rewards_BEG: Tensor,
    rollouts_BEG: Groups,
    prompts_BE: Sequence[Sequence[Any]],
    experts_B: tuple[Tensor, Tensor, Tensor],
) -> Part:
    """The best expert's right rollouts O+ under the worst expert's prompt, where it did strictly better (eq. 7-9).

    The form "literal" is eq. 9 exactly as printed, kept to show that it fails:

        L = sum_nt  weight_n mask_nt ( log p(O+ | q, worst) - log p(O+ | q, best) )

    Minimising it LOWERS the worst expert's log p of right answers and raises the best expert's. Both sides have a
    gradient, so each is a row of `weighted_nll`, the first counted negatively; twice, since the rows are twice as many.

    Args: experts_B: best, worst and strict, as `credit.best_and_worst` returns them.
    """
    rows = []
    for b, (best, worst, strict) in enumerate(zip(*(x.tolist() for x in experts_B), strict=True)):
        if not strict:
            continue
        for reward, rollout in zip(rewards_BEG[b, best].tolist(), rollouts_BEG[b][best], strict=True):
            if reward == 1.0:
                row = Row(prompts_BE[b][worst], rollout.tokens)
                if options.form == "literal":
                    rows += [WeighedRow(row, -2.0), WeighedRow(Row(prompts_BE[b][best], rollout.tokens), 2.0)]
                else:
                    rows.append(WeighedRow(row, 1.0, best_prompt=prompts_BE[b][best], best_logp=rollout.logp))
    return Part("mutual", options.weight, rows, options.divide_by, *_MUTUAL_FORMS[options.form])


def on_rollouts(
    objective: ObjectiveParams,
    rewards_BEG: Tensor,
    rollouts_BEG: Groups,
    prompts_BE: Sequence[Sequence[Any]],
    experts_B: tuple[Tensor, Tensor, Tensor],
) -> list[Part]:
    """The parts of eq. 10 that train on a step's rollouts, of those that the objective holds."""
    parts = []
    if objective.grpo:
        parts.append(grpo(objective.grpo, rewards_BEG, rollouts_BEG, prompts_BE))
    if objective.mutual:
        parts.append(mutual(objective.mutual, rewards_BEG, rollouts_BEG, prompts_BE, experts_B))
    return parts


def buffer_sft(options: BufferSftParams, rows: Sequence[Row]) -> Part:
    """Ground-truth answers under the prompts of the experts that kept getting the question wrong (eq. 10)."""
    return Part("buffer_sft", options.weight, [WeighedRow(row, 1.0) for row in rows], options.divide_by, weighted_nll)


def mef(rows: Sequence[Row]) -> Part:
    """Teachers' answers, each under its expert's prompt; a mean over the batch's tokens (eq. 4)."""
    return Part("mef", 1.0, [WeighedRow(row, 1.0) for row in rows], "tokens", weighted_nll)
