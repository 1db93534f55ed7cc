"""Engines: prompts in, rollouts out. Every engine passes `tests/test_rollouts.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np


@dataclass(frozen=True)
class Rollout:
    """One sampled answer."""

    tokens: tuple[int, ...]
    """Token ids; the end token is the last one where `ended`."""
    logp: tuple[float, ...]
    """Natural log-probability of each token under the policy at temperature 1, whatever temperature drew it."""
    entropy: float | None
    """Mean over the tokens of the policy's entropy at temperature 1, in nats; None: the engine does not tell."""
    ended: bool
    """False: truncated at the most tokens an answer may have."""


def check(prompts: Sequence[Sequence[int]], uniform_NT: np.ndarray, max_answer_tokens: int) -> None:
    """Raises: ValueError for an empty prompt or a uniform_NT of another shape than [N, max_answer_tokens]."""
    if any(not prompt for prompt in prompts):
        raise ValueError(f"prompt {[len(prompt) for prompt in prompts].index(0)} is empty; it needs at least 1 token")
    if uniform_NT.shape != (len(prompts), max_answer_tokens):
        raise ValueError(f"uniform_NT has shape {uniform_NT.shape}, want {(len(prompts), max_answer_tokens)}")


def uniforms(*key: int | str, count: int) -> np.ndarray:
    """Random numbers that depend on their key alone, hence not on batch layout, process or order.

    Args:
      key: e.g. (seed, step, question id, expert name, rollout); strings are hashed.
      count: how many.
    Returns: float64 [count], in [0, 1).

    >>> uniforms(0, "gsm8k-train-17", count=2).round(3).tolist() == uniforms(0, "gsm8k-train-17", count=3)[:2].round(3).tolist()
    True
    """
    entropy = [part if isinstance(part, int) else _hash(part) for part in key]
    return np.random.default_rng(entropy).random(count)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
