"""On a GPU: what runs on CUDA alone (a captured graph, kernels) says and learns what the CPU does."""

import copy

import layouts
import pytest
import ranks
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_packing import PACKED, parts_of, plain, policy_of
from test_riel import learner_of, run_params, trained, twin  # noqa: F401
from test_rollouts import MODELS, agree, answers, make

from meml_lib.rollouts import decoder, native
from meml_lib.schema import OptimizerParams
from meml_lib.training import riel
from meml_lib.training.learner import Learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(autouse=True)
def _on_cuda():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", MODELS)
def test_rollouts_are_the_cpus(name):
    on_cpu = make(name)
    on_cuda = copy.deepcopy(on_cpu).cuda()
    want, got = answers(on_cpu), answers(on_cuda)
    assert [r.tokens for r in got] == [r.tokens for r in want]
    agree(on_cpu, got)
    ends = tuple({want[n].tokens[t] for n, t in ((0, 3), (2, 7), (3, 5), (5, 12))})
    assert [(r.tokens, r.ended) for r in answers(on_cuda, end_ids=ends)] == [
        (r.tokens, r.ended) for r in answers(on_cpu, end_ids=ends)
    ]


@pytest.mark.parametrize("refill", [0.5, 1.0])
def test_long_answers_and_rows_that_leave_at_any_time(monkeypatch, refill):
    monkeypatch.setattr(native, "_CUDA_CHECK", 3)
    monkeypatch.setattr(native, "_CUDA_REFILL", refill)
    model, prompts = make("qwen2"), [tuple(range(2, 60))] * 3 + [(7,)] * 2 + [tuple(range(9, 41))]
    options = {"limit": 150, "end_ids": (5,)}
    want, got = answers(model, prompts, **options), answers(copy.deepcopy(model).cuda(), prompts, **options)
    assert [(r.tokens, r.ended) for r in got] == [(r.tokens, r.ended) for r in want]
    agree(model, got, prompts)


def test_in_bfloat16_a_step_is_as_near_to_float32_as_the_models_own():
    exact = make("qwen2")
    rounded = copy.deepcopy(exact).to("cuda", torch.bfloat16)
    assert decoder.fits(rounded, 200)
    agree(exact, answers(rounded), within=0.15)


def updated(policy, parts, budget):
    """Gradient and record of an update on CUDA, the gradient caught before the optimiser sees it."""
    params = OptimizerParams(
        optimizer="adamw", lr=1e-3, weight_decay=0.0, warmup_steps=0, decay="constant", max_grad_norm=None
    )
    learner = Learner(policy, Accelerator(), params, steps=1, max_answer_tokens=32, micro_batch_tokens=budget)
    assert learner.accelerator.device.type == "cuda"
    caught = []

    def step():
        caught.append(torch.cat([p.grad.flatten().float().cpu() for p in policy.model.parameters()]))
        return 0.0

    learner._step = step
    record = learner.update(parts)
    policy.model.zero_grad()
    return caught[0], record


@pytest.mark.parametrize("form", ["forward_kl", "token_kl"])
@pytest.mark.parametrize("config", PACKED.values(), ids=PACKED)
def test_an_updates_gradient_is_the_cpus(config, form):
    policy, parts = policy_of(config), list(parts_of(form).values())
    wanted, told = plain(policy, parts)
    policy.model.cuda()
    for budget in (25, 4096):
        found, record = updated(policy, parts, budget)
        assert (found - wanted).norm() < 1e-5 * wanted.norm()
        assert {name: record[name] for name in told} == pytest.approx(told, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("config", PACKED.values(), ids=PACKED)
def test_a_bfloat16_updates_gradient_is_as_near_to_float32_as_the_cpus(config):
    policy, parts = policy_of(config), list(parts_of().values())
    wanted, _ = plain(policy, parts)
    policy.model.to(torch.bfloat16)
    rounded, _ = plain(policy, parts)
    policy.model.cuda()
    for budget in (25, 4096):
        assert (updated(policy, parts, budget)[0] - wanted).norm() < 1.5 * (rounded - wanted).norm()


def test_stage_2_takes_the_cpus_steps(trained, task, panel):  # noqa: F811
    def run(device):
        AcceleratorState._reset_state(reset_partial_state=True)
        learned = twin(trained)
        learned.model.to(device)
        learner = learner_of(learned, Accelerator(cpu=device == "cpu"), lr=3e-4)
        steps = list(riel.train(run_params(task, panel, steps=4), learned, learner, task, panel))
        weights = torch.cat([w.detach().flatten().cpu() for w in learned.model.parameters()])
        return [row["text"] for step in steps for row in step.rollouts], [s.metrics["buffer_size"] for s in steps], weights

    (texts, buffer, weights), (on_cuda, its_buffer, its_weights) = run("cpu"), run("cuda")
    assert texts == on_cuda and buffer == its_buffer
    assert (its_weights - weights).norm() < 1e-4 * weights.norm()


def test_weights_divided_over_one_gpu_take_the_cpus_steps(tmp_path):
    """FSDP2 over NCCL, by the same code as over two CPU processes; with one card there is nothing to divide."""
    ranks.launch(1, "layouts.py", str(tmp_path), "cuda", timeout_s=300)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for kind, alone in layouts.updates(Accelerator(cpu=True), sharded=False).items():
        own = found["fsdp"][kind]
        moved = sum((alone["after"][n] - alone["before"][n]).square().sum() for n in alone["after"]).sqrt()
        differ = sum((alone["after"][n] - own["after"][n]).square().sum() for n in alone["after"]).sqrt()
        assert differ < 0.05 * moved, kind
    for of_one in found["restored"].values():
        assert all(torch.equal(of_one["through"][name], weight) for name, weight in of_one["again"].items())
    assert found["best"] and found["moved"] and len(found["decoder [2, 0]"]) == 8
