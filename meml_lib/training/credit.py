"""Who did well: advantages within a group, and the best and the worst expert of each question (eq. 5, 7, 8)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def advantages(rewards_BEG: Tensor, *, scale: Literal["none", "std"]) -> Tensor:
    """How much better each rollout did than the others to the same (question, expert).

    Args:
      rewards_BEG: float, in reward units (0 or 1 here); G >= 2.
      scale: "none", r - mean (MEML, Dr.GRPO); "std", that over population std + 1e-4 (GRPO).
    Returns: [B, E, G]; reward units ("none") or standard deviations ("std"); exactly 0 where a group agrees.
    Raises: ValueError if G < 2 (a lone rollout has nothing to be compared with).
    Source: MEML-GRPO, arXiv 2508.09670, eq. 5; for "std", DeepSeekMath, arXiv 2402.03300.

    >>> advantages(torch.tensor([[[0., 0., 1., 0.]]]), scale="none").tolist()
    [[[-0.25, -0.25, 0.75, -0.25]]]
    """
    if rewards_BEG.shape[-1] < 2:
        raise ValueError(f"rewards_BEG has G={rewards_BEG.shape[-1]} rollouts a group; it needs at least 2")
    gap_BEG = rewards_BEG - rewards_BEG.mean(-1, keepdim=True)
    if scale == "std":
        gap_BEG = gap_BEG / (rewards_BEG.std(-1, keepdim=True, correction=0) + 1e-4)
    agrees_BE1 = (rewards_BEG == rewards_BEG[..., :1]).all(-1, keepdim=True)  # the mean of equal floats may be off by an ulp
    return gap_BEG.masked_fill(agrees_BE1, 0.0)


def best_and_worst(rewards_BEG: Tensor, tie_BE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The experts with the highest and the lowest mean reward on each question.

    Args:
      rewards_BEG: float, in reward units.
      tie_BE: float in [0, 1), random; ties go to its largest (best) and smallest (worst) entry. The paper gives no
        tie rule, and panel order would favour the experts named first.
    Returns: best_B, worst_B: index into the panel; strict_B: True where the best did strictly better than the worst.
    Source: MEML-GRPO, arXiv 2508.09670, eq. 7 and 8.

    >>> best, worst, strict = best_and_worst(torch.tensor([[[0., 1.], [1., 1.], [0., 0.]]]), torch.rand(1, 3))
    >>> best.item(), worst.item(), strict.item()
    (1, 2, True)
    """
    mean_BE = rewards_BEG.double().mean(-1)
    highest_B1, lowest_B1 = mean_BE.amax(-1, keepdim=True), mean_BE.amin(-1, keepdim=True)
    best_B = tie_BE.masked_fill(mean_BE < highest_B1, -1.0).argmax(-1)
    worst_B = tie_BE.masked_fill(mean_BE > lowest_B1, 2.0).argmin(-1)
    return best_B, worst_B, (highest_B1 > lowest_B1)[:, 0]
