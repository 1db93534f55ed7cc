"""Signs of trouble: each is said once, where it is due, and none where a careless threshold would see one."""

from __future__ import annotations

import random
import re
from functools import cache, reduce
from typing import get_args

import pandas as pd
import pytest
from pydantic import BaseModel

from meml_lib import config, schema
from meml_lib.analysis import figures, signs

FLAT, NEVER, ALWAYS, BEST = "reward does not rise", "buffer never fills", "buffer fills every batch", "one expert always best"
SAME = {"groups_mixed": 0.2, "entropy": 0.01}  # groups agree, and 20 tokens hold 0.2 nats


@cache
def riel(*overrides: str) -> schema.RielParams:
    """150 steps of 4 questions, 3 experts and 8 rollouts; a buffer of 16, K = 6: a batch adds 9 at most."""
    return config.load_run("params/demo.yaml", overrides).riel


def records(steps: int = 150, **columns) -> list[dict]:
    """A healthy run of ann, bob and cem, except for `columns`: name -> value, or function of the step."""
    healthy = {
        "reward": lambda step: 0.5 + 0.3 * step / steps + 0.05 * (-1) ** step,
        **{f"reward/{name}": lambda step: 0.5 + 0.3 * step / steps for name in ("ann", "bob", "cem")},
        **{f"best/{name}": 1 for name in ("ann", "bob", "cem")},
        "questions_all_wrong": 0.1,
        "groups_all_wrong": 0.3,
        "groups_mixed": 0.6,
        "entropy": 0.1,
        "answer_tokens": 20.0,
        "buffer_size": lambda step: 2 * (step + 1) % 16,
        "buffer_flushes": lambda step: 2 * (step + 1) // 16,
    }
    values = (healthy | columns).items()
    at = [{name: value(step) if callable(value) else value for name, value in values} for step in range(steps)]
    return [{"step": step, **columns} for step, columns in enumerate(at)]


def kept(each: float, capacity: int = 16) -> dict:
    """Columns of a buffer that keeps so many examples a step."""
    return {
        "buffer_size": lambda step: int(each * (step + 1)) % capacity,
        "buffer_flushes": lambda step: int(each * (step + 1)) // capacity,
    }


def leading(lead, wins: int = 3) -> dict:
    """Columns of a run in which ann alone is best, on so many questions a step, by `lead` (a function of the step)."""
    rewards = {"reward/ann": lambda step: 0.6 + lead(step), "reward/bob": 0.6, "reward/cem": 0.5}
    return rewards | {"best/ann": wins, "best/bob": 0, "best/cem": 0}


def names(seen: list[signs.Sign]) -> list[str]:
    return [sign.name for sign in seen]


GALLERY = {  # what is seen -> the sign, the step of its look, the panels, a key to change
    "too little diversity": (dict(reward=0.5, **SAME), FLAT, 79, "Reward and Entropy of the policy", "temperature"),
    "all experts fail": (
        dict(reward=0.1, questions_all_wrong=0.7, **SAME),
        FLAT,
        79,
        "Reward and Groups of rollouts",
        "mef.epochs",
    ),
    "no cause shows": (dict(reward=0.5), FLAT, 106, "Reward and Groups of rollouts", "riel.lr"),
    "too easy": (kept(0), NEVER, 38, "Buffer and Groups of rollouts", "wrong_over"),
    "too hard": (kept(8), ALWAYS, 19, "Buffer and Groups of rollouts", "mef.steps"),
    "not reached": (leading(lambda step: 0.3), BEST, 79, "Reward", "mutual.weight"),
}


@pytest.mark.parametrize("columns, name, step, look, key", GALLERY.values(), ids=GALLERY)
def test_a_sign_is_said_once_at_its_step_with_its_panels_and_keys(columns, name, step, look, key):
    [sign] = signs.replay(records(**columns), riel())
    assert (sign.name, sign.step, sign.look) == (name, step, look)
    assert key in sign.advice
    told = f"sign of trouble at step {step + 1}, {name}: {sign.seen}. Look at: {look} (curves). Try: {sign.advice}."
    assert str(sign) == told


def test_a_healthy_run_has_no_sign_and_a_short_one_has_none_whatever_happens():
    assert signs.replay(records(), riel()) == []
    worst = dict(reward=0.1, questions_all_wrong=1.0, **SAME, **leading(lambda step: 0.5), **kept(9))
    assert signs.replay(records(19, **worst), riel("riel.steps=19")) == []
    assert signs.replay(records(20, **worst), riel("riel.steps=20")) != []


def test_signs_come_while_the_run_goes_on_and_all_that_hold():
    watch, columns = signs.Watch(riel()), dict(reward=0.5, **SAME, **kept(0), **leading(lambda step: 0.3))
    said = {record["step"]: names(seen) for record in records(**columns) if (seen := watch.see(record))}
    assert said == {38: [NEVER], 79: [FLAT, BEST]}


def test_what_was_seen_is_told_in_numbers():
    told = {name: signs.replay(records(**columns), riel())[0].seen for name, (columns, *_) in GALLERY.items()}
    assert told["too little diversity"] == (
        "reward 0.50 in the first 26 steps, 0.50 in the last 26; "
        "80% of the groups agree, with 0.20 nats of choice in an answer"
    )
    assert "all experts fail on 70% of the questions" in told["all experts fail"]
    assert "60% of the groups are mixed" in told["no cause shows"]
    assert told["too easy"] == "at most 15 of 16 to be expected by the end, 0 so far; 30% of the groups are all wrong"
    assert told["too hard"] == "3 supervised steps in the last 6 steps; 30% of the groups are all wrong"
    assert told["not reached"] == (
        "where experts differ, ann is best on 78 of 78 questions (last 26 steps); "
        "its reward leads by 0.30, in the first 26 steps by 0.30"
    )


# --- reward does not rise ------------------------------------------------------------------------------------------------------

NOT_FLAT = {
    "a slow rise": lambda step: 0.5 + 0.1 * step / 150 + 0.02 * (-1) ** step,
    "level, but too noisy to say": lambda step: 0.3 + 0.4 * (step % 2),
    "little left to learn": 0.95,
    "a fall that ends, and a rise": lambda step: 0.5 + abs(step - 50) / 300,
}


@pytest.mark.parametrize("reward", NOT_FLAT.values(), ids=NOT_FLAT)
@pytest.mark.parametrize("cause", [{}, SAME], ids=["no cause", "cause"])
def test_no_flat_reward(reward, cause):
    if cause and callable(reward) and reward(0) > reward(50):
        cause = {}  # half of this run is flat, and a cause would be said
    assert signs.replay(records(reward=reward, **cause), riel()) == []


def test_chance_seldom_calls_a_rising_reward_flat():
    draw = random.Random(0)
    runs = [records(reward=lambda step: 0.5 + step / 750 + draw.gauss(0, 0.13), **SAME) for _ in range(100)]
    assert sum(bool(signs.replay(run, riel())) for run in runs) <= 5
    flat = [records(reward=lambda step: 0.5 + draw.gauss(0, 0.05), **SAME) for _ in range(100)]
    assert sum(bool(signs.replay(run, riel())) for run in flat) >= 65


@pytest.mark.parametrize("other", [{"groups_mixed": 0.6}, {"entropy": 0.04}, {"entropy": None}])
def test_too_little_diversity_needs_groups_that_agree_and_a_policy_with_little_choice(other):
    [sign] = signs.replay(records(reward=0.5, **SAME | other), riel())
    assert sign.step == 106 and "no cause" in sign.seen  # 0.04 x 20 tokens = 0.8 nats: more than two answers


def test_the_budget_that_ends_a_run_tells_how_much_lies_behind():
    columns = dict(reward=0.5, update_tokens=lambda step: 1000 * (step + 1), **SAME)
    assert signs.replay(records(**columns), riel("riel.steps=4000")) == []
    budget = riel("riel.steps=4000", "riel.stop_at.update_tokens=150000")
    assert [(sign.name, sign.step) for sign in signs.replay(records(**columns), budget)] == [(FLAT, 79)]


# --- buffer -----------------------------------------------------------------------------------------------------------


def test_a_buffer_that_will_fill_late_is_no_sign_and_one_that_misses_it_by_far_is():
    assert signs.replay(records(**kept(1 / 9)), riel()) == []  # the 16th comes at step 144
    assert names(signs.replay(records(**kept(1 / 30)), riel())) == [NEVER]  # 5 by the end
    assert signs.replay(records(**kept(1 / 30)), riel("riel.objective.buffer_sft.capacity=5")) == []
    once = {"buffer_size": 0, "buffer_flushes": lambda step: int(step > 5)}
    assert signs.replay(records(**once), riel()) == []  # then nothing was hard any more


def test_an_arm_without_a_buffer_has_no_sign_of_one():
    assert signs.replay(records(**kept(0)), riel("riel.objective.buffer_sft=null")) == []


def test_every_batch_is_what_a_batch_can_hold():
    large = "riel.questions_per_step=32", "riel.objective.buffer_sft.capacity=64"  # a batch adds 72 at most
    assert signs.replay(records(**kept(6)), riel()) == []  # two thirds of 9
    assert names(signs.replay(records(**kept(7)), riel())) == [ALWAYS]
    assert signs.replay(records(**kept(50, 64)), riel(*large)) == []  # three steps of four
    assert names(signs.replay(records(**kept(64, 64)), riel(*large))) == [ALWAYS]
    small = "riel.questions_per_step=32", "riel.objective.buffer_sft.capacity=16"
    assert names(signs.replay(records(**kept(17)), riel(*small))) == [ALWAYS]  # with a quarter of the groups hard
    early = {name: lambda step, column=column: column(min(step, 9)) for name, column in kept(9).items()}
    assert signs.replay(records(**early), riel()) == []  # the first ten steps only


def test_a_buffer_that_keeps_nothing_by_its_own_rule_never_fills():
    assert names(signs.replay(records(**kept(0)), riel("riel.objective.buffer_sft.wrong_over=0"))) == [NEVER]


# --- one expert always best -------------------------------------------------------------------------------------------

NOT_ALWAYS_BEST = {
    "too few questions": leading(lambda step: 0.3) | {"best/ann": lambda step: step % 10 == 0},
    "best on 60 %": leading(lambda step: 0.3) | {"best/bob": 2},
    "best on 86 % of too few": leading(lambda step: 0.3)
    | {"best/ann": lambda step: 6 * (step % 10 == 0), "best/cem": lambda step: step % 10 == 0},
    "hardly ahead": leading(lambda step: 0.04),
    "caught up in time": leading(lambda step: 0.4 * max(0, 1 - step / 95)),
    "nobody ever": leading(lambda step: 0.0, wins=0),
}


@pytest.mark.parametrize("columns", NOT_ALWAYS_BEST.values(), ids=NOT_ALWAYS_BEST)
def test_nobody_is_always_best(columns):
    assert signs.replay(records(**columns), riel()) == []


def test_a_lead_that_shrinks_but_stays_is_told_later():
    [sign] = signs.replay(records(**leading(lambda step: 0.4 - 0.2 * step / 150)), riel())
    assert (sign.name, sign.step) == (BEST, 106)


def test_a_single_expert_is_not_always_best():
    alone = records(**{"best/ann": 4})
    for record in alone:
        for column in [name for name in record if name.endswith(("bob", "cem"))]:
            del record[column]
    assert signs.replay(alone, riel()) == []


# --- what it names ----------------------------------------------------------------------------------------------------


def advised() -> set[str]:
    said = [sign for columns, *_ in GALLERY.values() for sign in signs.replay(records(**columns), riel())]
    return {key for sign in said for key in re.findall(r"`([^`]+)`", sign.advice)}


def fields(section: type, name: str) -> type:
    """The type of a section's field, without null. Raises: KeyError where the schema has no such field."""
    kind = section.model_fields[name].annotation
    return next((part for part in get_args(kind) if isinstance(part, type) and issubclass(part, BaseModel)), kind)


@pytest.mark.parametrize("key", sorted(advised()))
def test_every_key_that_a_sign_advises_to_change_is_one_of_a_run_file(key):
    reduce(fields, key.split("."), schema.RunParams)


def test_every_panel_that_a_sign_names_is_drawn_by_curves():
    run = pd.DataFrame(records()).assign(groups_all_right=0.1)
    titles = {axes.get_title(loc="left").partition(":")[0] for axes in figures.curves(run).figure.axes}
    assert {panel for _, _, _, look, _ in GALLERY.values() for panel in look.split(" and ")} <= titles
