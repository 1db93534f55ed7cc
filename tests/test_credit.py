"""Advantages by (question, expert), best and worst experts, and the hard-example buffer."""

import pytest
import torch

from meml_lib.training.buffer import HardExampleBuffer
from meml_lib.training.credit import advantages, best_and_worst


def test_advantage_compares_a_rollout_with_its_own_expert_only():
    rewards = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])  # expert 0 always right, expert 1 half the time
    assert advantages(rewards, scale="none").tolist() == [[[0.0, 0.0], [0.5, -0.5]]]


def test_std_advantage_is_in_standard_deviations():
    rewards = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    expected = [0.75 / (3**0.5 / 4 + 1e-4), *[-0.25 / (3**0.5 / 4 + 1e-4)] * 3]
    assert advantages(rewards, scale="std")[0, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("scale", ["none", "std"])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7, 1.0])
def test_equal_rewards_give_exactly_zero(scale, reward):
    rewards = torch.full((2, 3, 7), reward)  # the mean of seven 0.1s is off by an ulp
    assert (advantages(rewards, scale=scale) == 0).all()


def test_a_lone_rollout_is_refused():
    with pytest.raises(ValueError, match="G=1.*at least 2"):
        advantages(torch.zeros(1, 1, 1), scale="none")


def test_best_and_worst_follow_the_mean_reward():
    rewards = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    best, worst, strict = best_and_worst(rewards, torch.tensor([[0.5, 0.5, 0.5], [0.1, 0.9, 0.5]]))
    assert best.tolist() == [1, 1]  # on the second question all tie: the draw decides
    assert worst.tolist() == [2, 0]
    assert strict.tolist() == [True, False]


def test_ties_favour_no_expert():
    draws = torch.rand(3000, 3, generator=torch.Generator().manual_seed(0))
    best, worst, _ = best_and_worst(torch.zeros(3000, 3, 2), draws)
    for chosen in (best, worst):
        assert all(900 < count < 1100 for count in chosen.bincount(minlength=3).tolist())


def test_buffer_takes_offers_only_above_wrong_over():
    buffer = HardExampleBuffer(capacity=9, wrong_over=6, rollouts=8)
    assert [buffer.offer("q", "e", wrong=wrong, chance=0.0) for wrong in range(5, 9)] == [False, False, True, True]


def test_buffer_keeps_an_offer_with_chance_k_over_g():
    buffer = HardExampleBuffer(capacity=9, wrong_over=6, rollouts=8)
    assert buffer.offer("q", "e", wrong=8, chance=0.7499)
    assert not buffer.offer("q", "e", wrong=8, chance=0.75)


def test_buffer_hands_over_its_oldest_when_full_and_keeps_the_rest():
    buffer = HardExampleBuffer(capacity=2, wrong_over=0, rollouts=1)
    buffer.held = [("a", "e"), ("b", "e"), ("c", "e")]
    assert buffer.take() == [("a", "e"), ("b", "e")]
    assert buffer.take() is None
    assert buffer.held == [("c", "e")]
