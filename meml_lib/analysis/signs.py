"""Signs of trouble, recognised from stage 2's metrics while it trains: each is said once, with what to look at and try.

The four ways in which MEML-GRPO (arXiv 2508.09670) is known to fail. A sign says what the steps so far show, not how
the run will end. Questions differ much in difficulty and a step holds few, so a sign must hold two standard errors
away, where chance could make one; a reward's error comes from how the steps vary (rollouts of one question go together,
so that a binomial error would be too small). Simulated on 150 steps as noisy as the demo's, whose groups agree: a
reward that stays level is called flat in 65 % of runs, one that rises by 0.1 in 12 %, by 0.2 in 2 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meml_lib.schema import RielParams

Record = Mapping[str, Any]

MIN_STEPS = 20
"""Before that a third of the steps is six: too few to say how steps vary."""
LOOK_AGAIN = 1.1
"""Looks are this far apart, in steps so far: each look gives chance another turn."""
EARLY, LATE = 1 / 2, 2 / 3
"""Shares of the run before which a reward that is still flat is no trouble, where the metrics show a cause and where
they show none: rewards of runs that ended well have stood still, or fallen, for the first half."""
WORTH = 0.05
"""Reward; a smaller difference is not worth changing a run for."""
HIGH = 0.9
"""Reward above which there is little left to learn."""
MOST = 0.5
"""Share of groups that agree, or of questions that nobody solves, above which it explains a flat reward."""
ONE_ANSWER = math.log(2)
"""Nats in an answer's choice; below, rollouts are as varied as from fewer than two equally likely answers."""
ALWAYS = 0.75
"""Share that counts as always. Of runs that ended well, an expert that began stronger was best on up to 0.80 of the
questions where experts differ at a third of the run, and on 0.60 from its half on."""

LONGER = "a longer stage 1 (`mef.steps` or `mef.epochs`)"
BUFFER = "riel.objective.buffer_sft"


@dataclass(frozen=True)
class Sign:
    """One sign of trouble, in words."""

    name: str
    step: int
    """Of the record at which it was recognised; from 0."""
    seen: str
    look: str
    """Panels of `figures.curves` that show it."""
    advice: str
    """Names the keys of a run file to change."""

    def __str__(self) -> str:
        told = f"sign of trouble at step {self.step + 1}, {self.name}: {self.seen}"
        return f"{told}. Look at: {self.look} (curves). Try: {self.advice}."


class Watch:
    """Sees a run's records one at a time, as they come.

    Args: riel: the run's values of stage 2.
    """

    def __init__(self, riel: RielParams):
        self._riel, self._records, self._look_at = riel, [], float(MIN_STEPS)
        self._checks = [_reward_flat, _never_fills, _always_fills, _always_best]

    def see(self, record: Record) -> list[Sign]:
        """Take note of one step's metrics, in order; the signs that it completes, each once in a run."""
        self._records.append(record)
        if len(self._records) < self._look_at:
            return []
        self._look_at = LOOK_AGAIN * len(self._records)
        found = {check: sign for check in self._checks if (sign := check(self._records, self._riel))}
        self._checks = [check for check in self._checks if check not in found]
        return list(found.values())


def replay(records: Iterable[Record], riel: RielParams) -> list[Sign]:
    """The signs that watching a run with these records has shown, or would have."""
    watch = Watch(riel)
    return [sign for record in records for sign in watch.see(record)]


# --- the four ---------------------------------------------------------------------------------------------------------


def _reward_flat(records: Sequence[Record], riel: RielParams) -> Sign | None:
    """No rise from the first third of the steps so far to the last, and a worthwhile one out of the question."""
    third, done, step = len(records) // 3, _done(records, riel), records[-1]["step"]
    recent = records[-third:]
    before, now = ([record["reward"] for record in part] for part in (records[:third], recent))
    rise, error = fmean(now) - fmean(before), math.sqrt((variance(before) + variance(now)) / third)
    if done < EARLY or rise > 0 or rise + 2 * error > WORTH or fmean(now) > HIGH:
        return None
    unsolved, mixed = _mean(recent, "questions_all_wrong"), _mean(recent, "groups_mixed")
    nats = [record["entropy"] * record["answer_tokens"] for record in recent if record["entropy"] is not None]
    seen = f"reward {fmean(before):.2f} in the first {third} steps, {fmean(now):.2f} in the last {third}; "
    if unsolved > MOST:
        seen += f"all experts fail on {unsolved:.0%} of the questions"
        advice = f"easier questions, {LONGER}, or answers to learn hard ones from (`{BUFFER}`, its `{BUFFER}.capacity`)"
        return Sign("reward does not rise", step, seen, "Reward and Groups of rollouts", advice)
    if 1 - mixed > MOST and nats and fmean(nats) < ONE_ANSWER:
        seen += f"{1 - mixed:.0%} of the groups agree, with {fmean(nats):.2f} nats of choice in an answer"
        advice = "a higher `sampling.temperature`, more `riel.rollouts_per_expert`, an `experts.panel` that errs apart"
        return Sign("reward does not rise", step, seen, "Reward and Entropy of the policy", advice)
    if done < LATE:
        return None
    seen += f"the metrics show no cause ({mixed:.0%} of the groups are mixed)"
    advice = "another `riel.lr` or more `riel.questions_per_step`"
    return Sign("reward does not rise", step, seen, "Reward and Groups of rollouts", advice)


def _never_fills(records: Sequence[Record], riel: RielParams) -> Sign | None:
    """No supervised step so far, and none to be expected before the run ends."""
    hard, last = riel.objective.buffer_sft, records[-1]
    if hard is None or last["buffer_flushes"]:
        return None
    most = (math.sqrt(last["buffer_size"] + 1) + 1) ** 2 / _done(records, riel)  # Poisson, two standard errors up
    if most >= hard.capacity:
        return None
    seen = f"at most {most:.0f} of {hard.capacity} to be expected by the end, {last['buffer_size']} so far; "
    seen += f"{_mean(records, 'groups_all_wrong'):.0%} of the groups are all wrong"
    advice = f"harder questions, a smaller `{BUFFER}.capacity` or `{BUFFER}.wrong_over`, or no buffer"
    return Sign("buffer never fills", last["step"], seen, "Buffer and Groups of rollouts", advice)


def _always_fills(records: Sequence[Record], riel: RielParams) -> Sign | None:
    """A supervised step with every batch; where a batch cannot hold that much, three quarters of the most it can."""
    hard, third = riel.objective.buffer_sft, len(records) // 3
    if hard is None:
        return None
    start, last = records[-third - 1], records[-1]
    flushes = last["buffer_flushes"] - start["buffer_flushes"]
    kept = flushes * hard.capacity + last["buffer_size"] - start["buffer_size"]
    offers = third * riel.questions_per_step * len(_experts(last))
    most = offers * hard.wrong_over / riel.rollouts_per_expert
    if not kept or kept < min(third * hard.capacity, ALWAYS * most):
        return None
    seen = f"{flushes} supervised steps in the last {third} steps; "
    seen += f"{_mean(records[-third:], 'groups_all_wrong'):.0%} of the groups are all wrong"
    advice = f"easier questions, {LONGER}, or a larger `{BUFFER}.capacity` or `{BUFFER}.wrong_over`"
    return Sign("buffer fills every batch", last["step"], seen, "Buffer and Groups of rollouts", advice)


def _always_best(records: Sequence[Record], riel: RielParams) -> Sign | None:
    """One expert best on most questions where experts differ, by a worthwhile margin, the others not reaching it."""
    third, experts, done = len(records) // 3, _experts(records[-1]), _done(records, riel)
    if len(experts) < 2 or done < EARLY:
        return None
    wins = {expert: sum(record[f"best/{expert}"] for record in records[-third:]) for expert in experts}
    first, decided = max(experts, key=wins.__getitem__), sum(wins.values())
    before, now = (
        _mean(part, f"reward/{first}") - max(_mean(part, f"reward/{other}") for other in experts if other != first)
        for part in (records[:third], records[-third:])
    )
    reached = done < LATE and before - now > WORTH
    if _at_least(wins[first], decided) < ALWAYS or now < WORTH or reached:
        return None
    seen = f"where experts differ, {first} is best on {wins[first]} of {decided} questions (last {third} steps); "
    seen += f"its reward leads by {now:.2f}, in the first {third} steps by {before:.2f}"
    advice = "a larger `riel.objective.mutual.weight`, another `riel.objective.mutual.form`, or for the others better "
    advice += f"teachers (`experts.panel`) or {LONGER}"
    return Sign("one expert always best", records[-1]["step"], seen, "Reward", advice)


def _experts(record: Record) -> list[str]:
    return [name.removeprefix("best/") for name in record if name.startswith("best/")]


def _mean(records: Sequence[Record], name: str) -> float:
    return fmean(record[name] for record in records)


def _done(records: Sequence[Record], riel: RielParams) -> float:
    """Share of the run that lies behind, by the budget that ends it."""
    budgets = [(len(records), riel.steps), *((records[-1][name], limit) for name, limit in riel.stop_at if limit)]
    return max(spent / limit for spent, limit in budgets)


def _at_least(count: int, n: int) -> float:
    """The share that `count` of n are at least: two standard errors down (Wilson); 0 of 0 gives 0.

    >>> _at_least(12, 12), round(_at_least(90, 100), 3)
    (0.75, 0.824)
    """
    return (count + 2 - 2 * math.sqrt(1 + (count * (n - count) / n if n else 0))) / (n + 4)
