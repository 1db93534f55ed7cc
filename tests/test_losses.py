"""Each formula against a worked number, its gradient's direction, and padding."""

import pytest
import torch

from meml_lib.rollouts import Rollout
from meml_lib.schema import GrpoParams, MutualParams
from meml_lib.training import losses

MASK = torch.tensor([[True, True, False]])  # third token is padding
INF = float("-inf")


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor([values], requires_grad=True)


def test_weighted_nll_raises_an_answer_with_positive_weight():
    logp = leaf(-2.0, -1.0, INF)
    loss = losses.weighted_nll(logp, MASK, torch.tensor([0.25]))
    loss.backward()
    assert loss.item() == pytest.approx(0.75)  # 0.25 * (2 + 1)
    assert logp.grad.tolist() == [[-0.25, -0.25, 0.0]]


def test_weighted_nll_lowers_an_answer_with_negative_weight():
    logp = leaf(-2.0, -1.0, -9.0)
    losses.weighted_nll(logp, MASK, torch.tensor([-0.5])).backward()
    assert logp.grad.tolist() == [[0.5, 0.5, 0.0]]


def test_mutual_loss_raises_the_worst_experts_probability():
    logp, best = leaf(-2.0, -1.0, INF), leaf(-0.5, -0.5, 0.0)
    loss = losses.mutual_loss(logp, best, MASK, torch.tensor([0.5]))
    loss.backward()
    assert loss.item() == pytest.approx(1.0)  # (1.5 + 0.5) / 2 tokens
    assert logp.grad.tolist() == [[-0.5, -0.5, 0.0]]  # descent raises logp, skips padding
    assert best.grad is None  # the best expert is a constant


def test_mutual_k2_loss_pulls_from_both_sides_and_fades():
    logp, best = leaf(-2.0, -0.25, -9.0), leaf(-0.5, -0.5, 0.0)
    loss = losses.mutual_k2_loss(logp, best, MASK, torch.tensor([0.5]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 0.5 * (1.5**2 + 0.25**2))
    assert logp.grad.tolist() == [[-0.75, 0.125, 0.0]]  # too low is raised, too high is lowered
    assert best.grad is None


def test_mutual_token_kl_loss_moves_the_whole_distribution():
    worst = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]], requires_grad=True)  # logits: 1/2, 1/2
    best = torch.tensor([[[0.9, 0.1], [0.9, 0.1]]]).log().requires_grad_()
    mask = torch.tensor([[True, False]])
    loss = losses.mutual_token_kl_loss(worst.log_softmax(-1), best, mask, torch.tensor([1.0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.3681, abs=1e-4)  # 0.9 ln 1.8 + 0.1 ln 0.2
    assert worst.grad[0, 0].tolist() == pytest.approx([-0.4, 0.4])  # p_worst - p_best
    assert worst.grad[0, 1].tolist() == [0.0, 0.0]
    assert best.grad is None


def test_masked_equals_removed():
    logp, best = torch.tensor([[-2.0, -1.0, -7.0]]), torch.tensor([[-1.0, -3.0, -4.0]])
    weight = torch.tensor([0.5])
    for formula in (losses.mutual_loss, losses.mutual_k2_loss):
        cut = formula(logp[:, :2], best[:, :2], MASK[:, :2], weight)
        assert formula(logp, best, MASK, weight).item() == pytest.approx(cut.item())


@pytest.mark.parametrize(
    ("divide_by", "expected"), [("constant", [1 / 32, 1 / 32]), ("answer", [1 / 8, 1 / 4]), ("tokens", [1 / 6, 1 / 6])]
)
def test_token_weights_divide_as_named(divide_by, expected):
    weight = losses.token_weights(
        torch.tensor([1.0, 1.0]),
        torch.tensor([4, 2]),
        divide_by=divide_by,
        total_rows=2,
        total_tokens=6,
        max_answer_tokens=16,
    )
    assert weight.tolist() == pytest.approx(expected)


def rollout(*tokens: int) -> Rollout:
    return Rollout(tokens, tuple(-0.1 * t for t in tokens), entropy=0.5, ended=True)


PROMPTS = [[(1,), (2,)]]  # one question, two experts
ROLLOUTS = [[[rollout(10, 11), rollout(12)], [rollout(13), rollout(14)]]]
REWARDS = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
EXPERTS = torch.tensor([0]), torch.tensor([1]), torch.tensor([True])


def test_grpo_part_keeps_an_all_wrong_group_at_exactly_zero():
    options = GrpoParams(weight=1.0, advantage="signed", scale="none", divide_by="constant")
    rows = losses.grpo(options, REWARDS, ROLLOUTS, PROMPTS).rows
    assert [row.count for row in rows] == [0.5, -0.5, 0.0, 0.0]
    assert [row.row.prompt for row in rows] == [(1,), (1,), (2,), (2,)]


def test_positive_advantage_drops_wrong_rollouts():
    options = GrpoParams(weight=1.0, advantage="positive", scale="none", divide_by="constant")
    assert [row.count for row in losses.grpo(options, REWARDS, ROLLOUTS, PROMPTS).rows] == [0.5, 0.0, 0.0, 0.0]


def test_mutual_part_shows_the_worst_expert_the_best_ones_right_rollouts_only():
    options = MutualParams(weight=0.1, form="forward_kl", divide_by="tokens")
    (row,) = losses.mutual(options, REWARDS, ROLLOUTS, PROMPTS, EXPERTS).rows
    assert (row.row.prompt, row.row.answer, row.best_prompt) == ((2,), (10, 11), (1,))
    assert row.best_logp == pytest.approx((-1.0, -1.1))


def test_mutual_part_is_empty_where_no_expert_is_strictly_better():
    options = MutualParams(weight=0.1, form="forward_kl", divide_by="tokens")
    tied = torch.tensor([0]), torch.tensor([1]), torch.tensor([False])
    assert not losses.mutual(options, torch.ones(1, 2, 2), ROLLOUTS, PROMPTS, tied).rows


@pytest.mark.parametrize("divide_by", ["constant", "answer", "tokens"])
def test_literal_mutual_part_pushes_the_worst_expert_away(divide_by):
    """Eq. 9 as printed: sum of w (log p(worst) - log p(best)), w as if only the worst expert's row were there."""
    options = MutualParams(weight=0.1, form="literal", divide_by=divide_by)
    part = losses.mutual(options, REWARDS, ROLLOUTS, PROMPTS, EXPERTS)
    assert [(row.row.prompt, row.row.answer) for row in part.rows] == [((2,), (10, 11)), ((1,), (10, 11))]
    total = {"total_rows": 2, "total_tokens": 4, "max_answer_tokens": 8}
    counts = torch.tensor([row.count for row in part.rows])
    weight = losses.token_weights(counts, torch.tensor([2, 2]), divide_by=divide_by, **total)
    w = {"constant": 1 / 8, "answer": 1 / 2, "tokens": 1 / 2}[divide_by]
    logp = torch.tensor([[-2.0, -1.0], [-0.5, -0.25]], requires_grad=True)  # the worst expert's, the best expert's
    loss = part.formula(logp, torch.ones(2, 2, dtype=torch.bool), weight)
    loss.backward()
    assert loss.item() == pytest.approx(w * (-3.0 + 0.75))
    assert logp.grad.tolist() == [[w, w], [-w, -w]]  # descent lowers the worst expert's and raises the best expert's
