"""One update: micro-batches cannot change it, each loss keeps its weight, and rows that count nothing cost nothing."""

import copy

import pytest
import torch
from accelerate import Accelerator

from meml_lib.schema import OptimizerParams
from meml_lib.training import learner as learner_module
from meml_lib.training import losses
from meml_lib.training.learner import Learner, micro_batches, schedule
from meml_lib.training.losses import Part, WeighedRow
from meml_lib.training.policy import Policy, Row

ADAMW = OptimizerParams(optimizer="adamw", lr=1e-3, weight_decay=0.0, warmup_steps=0, decay="constant", max_grad_norm=None)


def learner_of(policy, *, params=ADAMW, budget=10_000):
    twin = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    return Learner(
        twin, Accelerator(cpu=True), params, steps=10, max_answer_tokens=32, micro_batch_tokens=budget
    )


@pytest.fixture
def rows(policy, task, panel):
    questions = task.questions("train")[:6]
    return [
        Row(policy.prompt_ids(panel[i % 3].system, q.text), policy.answer_ids(q.rationale)) for i, q in enumerate(questions)
    ]


def part(rows, *, counts=None, weight=1.0, name="grpo", divide_by="constant"):
    counts = counts or [1.0] * len(rows)
    return Part(name, weight, [WeighedRow(r, c) for r, c in zip(rows, counts, strict=True)], divide_by, losses.weighted_nll)


def weights(learner):
    return torch.cat([p.detach().flatten() for p in learner.policy.model.parameters()])


def gradient(policy, parts, *, budget=10_000):
    """The gradient of an update, caught before the optimiser sees it."""
    learner = learner_of(policy, budget=budget)
    caught = []
    learner._step = lambda: caught.append([p.grad.clone() for p in learner.policy.model.parameters()]) or 0.0
    learner.update(parts)
    return torch.cat([g.flatten() for g in caught[0]])


@pytest.mark.parametrize("divide_by", ["constant", "answer", "tokens"])
def test_micro_batch_size_cannot_change_the_update(policy, rows, divide_by):
    parts = [
        part(rows, counts=[0.5, -0.5, 0.25, 0.0, 1.0, -0.25], divide_by=divide_by),
        part(rows[:2], name="buffer_sft", weight=0.7, divide_by="tokens"),
    ]
    whole = gradient(policy, parts)
    for budget in (1, 60, 130):
        assert torch.allclose(gradient(policy, parts, budget=budget), whole, atol=1e-7, rtol=1e-5)


def test_the_update_is_the_plain_weighted_sum(policy, rows):
    """Against autograd on the formula written out, row by row."""
    counts = [0.5, -0.5, 0.25, 0.0, 1.0, -0.25]
    twin = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    loss = 0.0
    for row, count in zip(rows, counts, strict=True):
        logits = twin.model(torch.tensor([row.prompt + row.answer])).logits[0].log_softmax(-1)
        for t, token in enumerate(row.answer):
            loss = loss - 0.3 * count * logits[len(row.prompt) + t - 1, token] / (len(rows) * 32)
    loss.backward()
    plain = torch.cat([p.grad.flatten() for p in twin.model.parameters()])
    assert torch.allclose(gradient(policy, [part(rows, counts=counts, weight=0.3)]), plain, atol=1e-7, rtol=1e-4)


def test_doubling_a_weight_adds_exactly_its_loss_again(policy, rows):
    one, two = part(rows[:3]), part(rows[3:], name="buffer_sft", weight=0.4)
    doubled = part(rows[3:], name="buffer_sft", weight=0.8)
    base, more = gradient(policy, [one, two]), gradient(policy, [one, doubled])
    only = gradient(policy, [two])
    assert only.norm() > 0
    assert torch.allclose(more - base, only, atol=1e-7, rtol=1e-4)


def test_rows_that_count_nothing_change_only_the_divisor(policy, rows):
    with_zeros = gradient(policy, [part(rows[:4], counts=[1.0, 0.0, 1.0, 0.0])])
    without = gradient(policy, [part([rows[0], rows[2]])])
    assert torch.allclose(with_zeros, without / 2, atol=1e-8, rtol=1e-5)  # 4 rows in the constant instead of 2


def test_a_step_without_a_row_leaves_the_weights_alone(policy, rows):
    learner = learner_of(policy)
    learner.update([part(rows)])  # AdamW now has momentum
    before = weights(learner)
    record = learner.update([part(rows, counts=[0.0] * 6)])
    assert torch.equal(weights(learner), before)
    assert record["rows/grpo"] == 0 and record["grad_norm"] == 0.0


def test_an_update_lowers_the_loss_and_reports_it(policy, rows):
    for name in ("adamw", "muon"):
        learner = learner_of(policy, params=ADAMW.model_copy(update={"optimizer": name, "lr": 5e-3}))
        trace = [learner.update([part(rows, divide_by="tokens")])["loss"] for _ in range(8)]
        assert trace[-1] < 0.9 * trace[0]


def test_muon_takes_hidden_matrices_and_adamw_the_rest(policy):
    learner = learner_of(policy, params=ADAMW.model_copy(update={"optimizer": "muon"}))
    (_, rest), (_, matrices) = learner._optimizers
    assert len(matrices) == 2 * 7  # q, k, v, o, gate, up, down of two layers
    assert len(rest) == 1 + 2 * 2 + 1  # embedding, two norms a layer, the last norm


def test_bfloat16_weights_keep_updates_smaller_than_their_own_grid(policy, rows):
    policy.model.to(torch.bfloat16)
    learner = learner_of(policy, params=ADAMW.model_copy(update={"lr": 1e-5}))
    masters = list(learner._masters.values())
    before = [m.clone() for m in masters]
    for _ in range(3):
        learner.update([part(rows)])
    moved = max((m - b).abs().max().item() for m, b in zip(masters, before, strict=True))
    assert 2e-5 < moved < 4e-5  # three steps of 1e-5, none rounded away
    for p, m in zip(learner.policy.model.parameters(), masters, strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, m.bfloat16())


def test_gradients_are_clipped_to_the_given_norm(policy, rows):
    learner = learner_of(policy, params=ADAMW.model_copy(update={"max_grad_norm": 1e-6}))
    norms = []
    (optimizer, pieces), step = learner._optimizers[0], learner._optimizers[0][0].step
    optimizer.step = lambda: norms.append(torch.stack([p.master.grad.norm() for p in pieces]).norm().item()) or step()
    record = learner.update([part(rows, divide_by="tokens")])
    assert record["grad_norm"] > 0.1 and norms[0] == pytest.approx(1e-6, rel=1e-3)


def test_a_gradient_that_is_not_finite_raises_and_leaves_the_weights(policy, rows):
    learner = learner_of(policy)
    before = weights(learner)
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        learner.update([part(rows, counts=[float("nan")] * 6)])
    assert torch.equal(weights(learner), before)


def test_micro_batches_keep_to_the_budget_and_hold_each_row_once():
    lengths = [7, 50, 3, 9, 9, 120, 14]
    batches = list(micro_batches(lengths, budget=60))
    assert sorted(n for batch in batches for n in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[n] for n in batch) * len(batch) <= 60


def test_passes_are_as_few_as_the_budget_allows_and_then_of_one_size(policy):
    rows = [Row((1, 2, 3), (4,) * n) for n in (30, 30, 30, 20, 20, 10)]  # 140 answer tokens
    learner = learner_of(policy, budget=120)
    passes = learner._micro_batches(rows)
    tokens = [3 + sum(len(row.answer) for row in batch) for batch in passes]
    assert sorted(row.tokens for batch in passes for row in batch) == sorted(row.tokens for row in rows)
    assert len(passes) == 2 and max(tokens) <= 83  # greedily 113 and 33


def test_passes_of_one_size_do_not_compute_a_prompt_more_often(policy):
    a, b = (1,) * 100, (2,) * 99
    rows = [*(Row(a, (n,) * 100) for n in range(8)), Row(b, (9,) * 100)]
    passes = learner_of(policy, budget=1000)._micro_batches(rows)
    assert len(passes) == 2 and all(len({row.prompt for row in batch}) == 1 for batch in passes)


@pytest.mark.parametrize(("optimizer", "limit"), [("adamw", None), ("adamw", 0.01), ("muon", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_many_weights_the_optimiser_takes_at_a_time_changes_nothing(policy, rows, monkeypatch, optimizer, dtype, limit):
    policy.model.to(dtype)
    ends = []
    rows_of_embedding = policy.model.get_input_embeddings().weight.shape[0]
    for numbers in (learner_module.PART, 100, 1):
        monkeypatch.setattr(learner_module, "PART", numbers)
        learner = learner_of(policy, params=ADAMW.model_copy(update={"optimizer": optimizer, "max_grad_norm": limit}))
        for _ in range(3):
            norm = learner.update([part(rows)])["grad_norm"]
        pieces = [sum(p.name.startswith("model.embed") for p in pieces) for _, pieces in learner._optimizers]
        ends.append((learner.state(), norm, len(learner._optimizers), sum(pieces)))
    for end in ends[1:]:
        assert ends[0][1] == pytest.approx(end[1], rel=1e-5) and end[1] > 0.01
        for mine, theirs in zip(ends[0][0][:2], end[0][:2], strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.allclose(theirs[name], value, rtol=1e-4, atol=1e-7) for name, value in mine.items())
    assert ends[0][2] <= 2 < ends[1][2] < ends[2][2]
    assert ends[0][3] == 1 < ends[1][3] < ends[2][3] == rows_of_embedding


@pytest.mark.parametrize("limit", [None, 0.01])
def test_a_step_in_one_sweep_is_the_optimisers_own(policy, rows, monkeypatch, limit):
    policy.model.to(torch.bfloat16)
    ends, params = [], ADAMW.model_copy(update={"max_grad_norm": limit, "decay": "linear", "weight_decay": 0.1})
    for sweeps in (True, False):
        learner = learner_of(policy, params=params)
        own, swept = Learner._sweep, []
        monkeypatch.setattr(Learner, "_sweep", lambda *given, own=own, swept=swept: swept.append(1) or own(*given))
        if not sweeps:
            monkeypatch.setattr(Learner, "_sweeps", lambda _: False)
        for _ in range(4):
            learner.update([part(rows)])
        assert bool(swept) == sweeps
        ends.append(learner.state())
    for mine, theirs in zip(ends[0][:2], ends[1][:2], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(theirs[name], value, rtol=1e-4, atol=1e-7) for name, value in mine.items())
    assert all(ends[0].moments[name] == 4 for name in ends[0].moments if name.endswith(".step"))


@pytest.mark.parametrize(("decay", "late"), [("constant", 1.0), ("linear", 0.25), ("cosine", 0.1464)])
def test_schedule_warms_up_then_decays(decay, late):
    params = ADAMW.model_copy(update={"warmup_steps": 4, "decay": decay})
    assert [schedule(s, params, 24) for s in (0, 3, 4)] == pytest.approx([0.2, 0.8, 1.0])
    assert schedule(19, params, 24) == pytest.approx(late, abs=1e-4)


def test_update_moves_the_schedule_only_when_asked(policy, rows):
    learner = learner_of(policy, params=ADAMW.model_copy(update={"decay": "linear"}))
    learner.update([part(rows)], advance=False)
    assert learner.lr == pytest.approx(1e-3)
    learner.update([part(rows)])
    assert learner.lr == pytest.approx(0.9e-3)
