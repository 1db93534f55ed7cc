"""A run's tables as measures: values for each seed and question, so that each has an interval and arms make pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from meml_lib import config
from meml_lib.analysis import overlap, stats
from meml_lib.runs import RunFolder

STAGES: dict[config.Stage, str] = {"mef": "stage 1", "riel": "stage 2"}


class Measured(NamedTuple):
    """One measure: its values for each seed and question, and how they become a number with an interval."""

    kind: Literal["share", "number", "ratio"]
    """share: 0 to 1. ratio: sum of the values / sum of the whole."""
    values_SQ: np.ndarray
    whole_SQ: np.ndarray | None = None

    def interval(self) -> stats.Interval | None:
        """None for a ratio to nothing, e.g. the overlap of no errors."""
        if self.kind == "ratio":
            return stats.crossed_ratio(self.values_SQ, self.whole_SQ) if self.whole_SQ.sum() > 0 else None
        return stats.crossed_mean(self.values_SQ, share=self.kind == "share")

    def seed_means(self) -> list[float | None]:
        whole_SQ = np.ones_like(self.values_SQ) if self.whole_SQ is None else self.whole_SQ
        sums = zip(self.values_SQ.sum(axis=1), whole_SQ.sum(axis=1), strict=True)
        return [part / whole if whole > 0 else None for part, whole in sums]


@dataclass
class ArmResult:
    """What one arm's finished runs measured, by stage ("stage 1", "stage 2")."""

    arm: str
    label: str
    run: config.Run
    full_panel: Sequence[str]
    """The study's panel before any arm reduces it: "Expert i" of the paper is position i there."""
    group: int
    """The study's G, rollouts of an expert to a question, before any arm changes it."""
    last: str = "stage 2"
    """The stage after which the arm is judged; stage 1 for supervised fine-tuning only."""
    asked: int | None = None
    """The study's questions of stage 2, steps x questions a step, before any arm changes it; None: the run's own."""
    seeds: dict[str, list[int]] = field(default_factory=dict)
    questions: dict[str, pd.Index] = field(default_factory=dict)
    measures: dict[str, dict[str, Measured]] = field(default_factory=dict)
    validation: dict[str, dict[int, float]] = field(default_factory=dict)
    """Accuracy of the best expert on validation, of each seed; for choosing among arms."""

    @property
    def panel(self) -> list[str]:
        return list(self.run.experts.panel)

    @property
    def positions(self) -> list[int]:
        """Of the arm's experts in the full panel."""
        return [list(self.full_panel).index(name) for name in self.panel]

    def measured(self, measure: str, stage: str | None = None) -> Measured | None:
        """A measure after a stage (None: the last); expert-N stands for the expert at position N of the full panel."""
        if measure.startswith("expert-"):
            measure = f"expert/{self.full_panel[int(measure.removeprefix('expert-'))]}"
        if measure == "vote" and len(self.panel) == 1:  # a panel of one agrees with itself
            measure = "best_validation"
        return self.measures.get(stage or self.last, {}).get(measure)

    def scores(self) -> list[dict[str, Any]]:
        """One record a stage and measure: interval, mean of each seed (None where undefined), a ratio's mean whole."""
        records = []
        for stage, measures in self.measures.items():
            for name, measured in measures.items():
                interval = measured.interval()
                per_seed = dict(zip(self.seeds[stage], measured.seed_means(), strict=True))
                head = {"arm": self.arm, "stage": stage, "measure": name}
                head["whole"] = None if measured.whole_SQ is None else measured.whole_SQ.sum(axis=1).mean()
                records.append({**head, **(asdict(interval) if interval else {"mean": None}), "per_seed": per_seed})
        return records


def of_arm(study: config.Study, name: str) -> ArmResult:
    """One arm of a study. Raises: ValueError if seeds were tested on different questions."""
    base, arm = study.base_run(), study.arms[name]
    runs = {seed: study.run(name, seed) for seed in study.seeds}
    run, asked = runs[study.seeds[0]], base.riel.steps * base.riel.questions_per_step
    last, group = STAGES[arm.last_stage], base.riel.rollouts_per_expert
    return _read(ArmResult(name, arm.label, run, base.experts.panel, group, last, asked), runs)


def of_run(p: config.Run) -> ArmResult:
    """One run by itself. It does not know a study's full panel; the experts that it knows, in their order, stand in."""
    whole = set(p.experts.panel) == set(p.experts.known)
    full_panel = list(p.experts.panel if whole else p.experts.known)
    return _read(ArmResult(p.run_dir.name, "this run", p, full_panel, p.riel.rollouts_per_expert), {p.seed: p})


def _read(result: ArmResult, runs: Mapping[int, config.Run]) -> ArmResult:
    """Add the finished stages up to the arm's last, seed by seed."""
    for stage, name in STAGES.items():
        if name > result.last:
            break
        folders = {seed: RunFolder(run.folder(stage)) for seed, run in runs.items()}
        each = {seed: _measure(f, result.panel) for seed, f in folders.items() if f.status["state"] == "done"}
        if not each:
            continue
        first, *others = each
        questions, measures, _ = each[first]
        for seed in others:
            if not each[seed][0].equals(questions):
                odd = [*each[seed][0].symmetric_difference(questions), "their order"][0]
                seeds = f"seeds {first} and {seed} were tested on different questions ({odd})"
                raise ValueError(f"{result.arm}, {name}: {seeds}")
        result.seeds[name], result.questions[name] = list(each), questions
        result.validation[name] = {seed: best for seed, (_, _, best) in each.items()}
        for key, (kind, *_) in measures.items():
            if all(key in found for _, found, _ in each.values()):
                columns = zip(*(found[key][1:] for _, found, _ in each.values()), strict=True)
                result.measures.setdefault(name, {})[key] = Measured(kind, *(np.stack(rows) for rows in columns))
    return result


def _measure(folder: RunFolder, panel: Sequence[str]) -> tuple[pd.Index, dict[str, tuple], float]:
    """Question ids; measure -> (kind, values_Q[, whole_Q]) from one stage's tables; best validation accuracy."""
    greedy = folder.read_table("test_greedy")
    right = overlap.right_table(greedy)[list(panel)]
    validation = overlap.right_table(folder.read_table("validation_greedy"))[list(panel)].mean()
    prefer = list(validation.sort_values(ascending=False, kind="stable").index)  # ties: panel order
    unreadable = greedy["correct"].isna().groupby(greedy["question_id"]).mean().reindex(right.index)
    right_QE = right.to_numpy(float)
    mean, best, none = right_QE.mean(axis=1), right[prefer[0]].to_numpy(float), 1 - right_QE.max(axis=1)
    found: dict[str, tuple] = {"mean_expert": ("share", mean), "best_validation": ("share", best)}
    found |= {f"expert/{expert}": ("share", right_QE[:, e]) for e, expert in enumerate(panel)}
    if len(panel) > 1:
        vote = overlap.vote(greedy, prefer)["correct"].fillna(False).to_numpy(float)
        found |= {"vote": ("share", vote), "vote_gain": ("number", vote - best), "any_expert": ("share", 1 - none)}
        found |= {"all_wrong": ("share", none), "overlap_iou": ("ratio", none, 1 - right_QE.min(axis=1))}
        for e, expert in enumerate(panel):
            wrong = 1 - right_QE[:, e]
            found[f"corrected/{expert}"] = ("ratio", wrong * (1 - none), wrong)
        if (right_QE.std(axis=0) > 0).all():
            found["mean_phi"] = ("number", _phi_values(right_QE))
    difficulty = folder.read_table("test_questions").set_index("question_id")["difficulty"].reindex(right.index)
    for level in sorted(difficulty.unique()):
        of_level = (difficulty == level).to_numpy(float)
        found[f"difficulty/{level}"] = ("ratio", mean * of_level, of_level)
    if folder.table("test_sampled").is_file():
        sampled = folder.read_table("test_sampled")
        for k in (2**n for n in range(sampled["sample"].nunique().bit_length())):
            found[f"pass@{k}"] = ("share", overlap.hits(sampled, k).mean(axis=1).reindex(right.index).to_numpy())
    found["unreadable"] = ("share", unreadable.to_numpy(float))
    return right.index, found, float(validation.max())


def _phi_values(right_QE: np.ndarray) -> np.ndarray:
    """Values whose mean is phi, averaged over pairs of experts, and whose spread is each question's influence on it."""
    z = (right_QE - right_QE.mean(axis=0)) / right_QE.std(axis=0)
    pairs = [(z[:, a], z[:, b]) for a in range(z.shape[1]) for b in range(a)]
    return np.mean([x * y + (x * y).mean() * (1 - (x**2 + y**2) / 2) for x, y in pairs], axis=0)


def paired(one: ArmResult, other: ArmResult, measure: str, *, relative: bool = False) -> stats.Interval | None:
    """one - other, each after its last stage, on the same questions and seeds; None where they share none of them.

    Args: relative: one / other - 1 instead, linearised (delta method).
    Raises: ValueError if they were tested on different questions.
    """
    found = [arm.measured(measure) for arm in (one, other)]
    one_seeds, other_seeds = (arm.seeds.get(arm.last, []) for arm in (one, other))
    seeds = [seed for seed in one_seeds if seed in other_seeds]
    if None in found or not seeds:
        return None
    if not one.questions[one.last].equals(other.questions[other.last]):
        raise ValueError(f"{one.arm} and {other.arm} were tested on different questions: their answers make no pairs")
    places = ([own.index(seed) for seed in seeds] for own in (one_seeds, other_seeds))
    a_SQ, b_SQ = (measured.values_SQ[own] for measured, own in zip(found, places, strict=True))
    if not relative:
        return stats.crossed_mean(a_SQ - b_SQ)
    if not b_SQ.any():
        return None
    ratio = a_SQ.mean() / b_SQ.mean()
    return stats.crossed_mean(ratio - 1 + (a_SQ - ratio * b_SQ) / b_SQ.mean())
