"""Engines: prompts in, rollouts out. Every engine passes `tests/test_rollouts.py`."""

from __future__ import annotations

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
    entropy: float
    """Mean over the tokens of the policy's entropy at temperature 1, in nats."""
    ended: bool
    """False: truncated at the most tokens an answer may have."""


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
