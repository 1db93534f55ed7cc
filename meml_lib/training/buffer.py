"""The hard-example buffer: questions that an expert keeps getting wrong, waiting for a supervised step."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class HardExampleBuffer:
    """Keeps (question id, expert) pairs in the order of their arrival.

    An expert with MORE than `wrong_over` wrong rollouts offers the question, and the offer is kept with chance
    `wrong_over / rollouts`. Once `capacity` are held, `take` hands the oldest `capacity` over.

    Source: MEML-GRPO, arXiv 2508.09670 (hard examples; paper: capacity B = 64, wrong_over K = 6 of G = 8).

    >>> buffer = HardExampleBuffer(capacity=1, wrong_over=6, rollouts=8)
    >>> buffer.offer("q", "expert", wrong=6, chance=0.0), buffer.offer("q", "expert", wrong=7, chance=0.0)
    (False, True)
    >>> buffer.take(), buffer.take()
    ([('q', 'expert')], None)
    """

    capacity: int
    wrong_over: int
    rollouts: int
    held: list[tuple[str, str]] = field(default_factory=list)

    def offer(self, question_id: str, expert: str, *, wrong: int, chance: float) -> bool:
        """Keep the pair if it is hard enough and chance allows.

        Args:
          wrong: wrong rollouts of the group, unreadable ones included.
          chance: uniform random number in [0, 1).
        Returns: whether it was kept.
        """
        keep = wrong > self.wrong_over and chance < self.wrong_over / self.rollouts
        if keep:
            self.held.append((question_id, expert))
        return keep

    def take(self) -> list[tuple[str, str]] | None:
        """Remove and return the oldest `capacity` pairs, or None while fewer are held."""
        if len(self.held) < self.capacity:
            return None
        full, self.held = self.held[: self.capacity], self.held[self.capacity :]
        return full
