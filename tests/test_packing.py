"""Packing and the losses in slabs change no update: gradients against the losses written out over padded rows."""

import copy
import random

import pytest
import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from meml_lib.rollouts import cpu, pages, products
from meml_lib.schema import OptimizerParams
from meml_lib.training import head, losses, packing
from meml_lib.training.learner import Learner
from meml_lib.training.losses import Part, WeighedRow
from meml_lib.training.policy import Policy, Row

ADAMW = OptimizerParams(
    optimizer="adamw", lr=1e-3, weight_decay=0.0, warmup_steps=0, decay="constant", max_grad_norm=None
)
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"max_position_embeddings": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
PACKED = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
}
PADDED = {
    "mistral with a window": MistralConfig(**SIZES, sliding_window=8),
    "gemma": GemmaConfig(**SIZES),
}
FORMS = {
    "forward_kl": (losses.mutual_loss, "rollouts"),
    "k2": (losses.mutual_k2_loss, "rollouts"),
    "token_kl": (losses.mutual_token_kl_loss, "distributions"),
}


def policy_of(config) -> Policy:
    """A model with random weights, larger than usual so that its distributions are far from even."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    policy = Policy.__new__(Policy)  # no test here reads or writes text
    policy.model, policy.answer_end_id = model, 3
    return policy


def parts_of(form: str = "forward_kl") -> dict[str, Part]:
    """Three prompts; answers of 1 to 20 tokens, some drawn twice; the parts share rows and prompts."""
    draw = random.Random(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, 61) for _ in range(n))

    prompts = [tokens(n) for n in (5, 9, 1)]
    answers = [tokens(n) for n in (20, 7, 1, 12, 3)]
    grpo = [WeighedRow(Row(p, a), draw.choice([0.5, -0.25, 0.0, 1.0])) for p in prompts for a in [*answers, answers[0]]]
    mutual = [
        WeighedRow(Row(prompts[1], a), 1.0, best_prompt=prompts[0], best_logp=tuple(-3 * draw.random() for _ in a))
        for a in (answers[0], answers[3], tokens(4), answers[2])
    ]
    buffer = [WeighedRow(Row(prompts[2], a), 1.0) for a in (answers[0], tokens(6))]
    return {
        "grpo": Part("grpo", 1.0, grpo, "constant", losses.weighted_nll),
        "mutual": Part("mutual", 0.7, mutual, "tokens", *FORMS[form]),
        "buffer_sft": Part("buffer_sft", 0.3, buffer, "answer", losses.weighted_nll),
    }


def plain(policy: Policy, parts: list[Part]) -> tuple[torch.Tensor, dict[str, float]]:
    """Gradient and losses by autograd: each part's rows padded in one batch, as its formula is written."""
    told, total = {}, 0.0
    for part in parts:
        weight_N = losses.token_weights(
            torch.tensor([r.count for r in part.rows]),
            tokens_N := torch.tensor([len(r.row.answer) for r in part.rows]),
            divide_by=part.divide_by,
            total_rows=len(part.rows),
            total_tokens=int(tokens_N.sum()),
            max_answer_tokens=32,
        )
        logits_NTV, answer_NT, mask_NT = policy.logits([r.row for r in part.rows])
        log_probs_NTV = logits_NTV.log_softmax(-1)
        seen = [log_probs_NTV.gather(-1, answer_NT[..., None])[..., 0]]
        if part.against == "rollouts":
            seen.append(pad_sequence([torch.tensor(r.best_logp) for r in part.rows], batch_first=True))
        if part.against == "distributions":
            best = policy.logits([Row(r.best_prompt, r.row.answer) for r in part.rows])[0]
            seen = [log_probs_NTV, best.detach().log_softmax(-1)]
        loss = part.formula(*seen, mask_NT, weight_N)
        told[f"loss/{part.name}"] = loss.item()
        total = total + part.weight * loss
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    return torch.cat([g.float().flatten() for g in torch.autograd.grad(total, trained)]), told


def updated(policy: Policy, parts: list[Part], budget: int = 4096) -> tuple[torch.Tensor, dict[str, float]]:
    """Gradient and record of an update, the gradient caught before the optimiser sees it."""
    learner = Learner(policy, Accelerator(cpu=True), ADAMW, steps=1, max_answer_tokens=32, micro_batch_tokens=budget)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    caught = []
    learner._step = lambda: caught.append(torch.cat([p.grad.float().flatten() for p in trained])) or 0.0
    record = learner.update(parts)
    for parameter in trained:
        parameter.grad = None
    return caught[0], record


def assert_equal(policy: Policy, parts: list[Part], *, budget: int = 4096, within: float = 1e-5) -> None:
    (wanted, told), (found, record) = plain(policy, parts), updated(policy, parts, budget)
    assert wanted.norm() > 0 and (found - wanted).norm() < within * wanted.norm()
    assert {name: record[name] for name in told} == pytest.approx(told, rel=max(within, 1e-5), abs=1e-6)


@pytest.mark.parametrize("loops", ["compiled", "torch"])
@pytest.mark.parametrize("config", PACKED.values(), ids=PACKED)
def test_a_packed_update_is_the_plain_one_whatever_the_micro_batch(config, loops, monkeypatch):
    if loops == "torch":  # as on a GPU
        monkeypatch.setattr(cpu, "serves", lambda *_: False)
    policy = policy_of(config)
    assert packing.packs(policy.model)
    for budget in (1, 25, 60, 4096):
        assert_equal(policy, list(parts_of().values()), budget=budget)
    assert policy.model.config._attn_implementation == "sdpa"  # as before, for whoever samples next


@pytest.mark.parametrize("config", PADDED.values(), ids=PADDED)
def test_a_model_that_is_not_understood_runs_padded(config):
    policy = policy_of(config)
    assert not packing.packs(policy.model)
    for budget in (1, 60, 4096):
        assert_equal(policy, list(parts_of("token_kl").values()), budget=budget)


@pytest.mark.parametrize("form", FORMS)
def test_each_part_and_all_together_are_the_plain_ones(form, monkeypatch):
    policy, parts = policy_of(PACKED["llama"]), parts_of(form)
    for chosen in (*([part] for part in parts.values()), [*parts.values()]):
        assert_equal(policy, chosen)
        assert_equal(policy, chosen, budget=30)
    monkeypatch.setattr(head, "SLAB_BYTES", 43 * 61 * 4)  # slabs of 32 tokens, or 43 where logits are given, in chunks of 4
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 61 * 4)
    for config in (PACKED["llama"], PADDED["gemma"]):
        assert_equal(policy_of(config), [*parts.values()])


def test_gradient_checkpointing_changes_nothing():
    policy = policy_of(PACKED["qwen2"])
    wanted, _ = plain(policy, list(parts_of().values()))
    policy.model.gradient_checkpointing_enable()
    found, _ = updated(policy, list(parts_of().values()))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_adapters_get_the_plain_gradient_and_the_rest_none(targets):
    from peft import LoraConfig, get_peft_model

    policy = policy_of(PACKED["llama with biases"])
    options = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    policy.model = get_peft_model(policy.model, options)
    assert packing.packs(policy.model) is (targets == "all-linear")  # with adapters, an output layer is no plain one
    assert_equal(policy, list(parts_of("token_kl").values()), budget=60)
    assert all(p.grad is None for n, p in policy.model.named_parameters() if "lora_" not in n)


def test_an_output_layer_with_a_bias_learns_it():
    policy = policy_of(PACKED["llama with biases"])
    policy.model.lm_head = torch.nn.Linear(32, 61)
    assert_equal(policy, list(parts_of("token_kl").values()))


def test_bfloat16_is_as_near_to_float32_as_the_plain_path_is():
    exact = policy_of(PACKED["llama"])
    rough = copy.deepcopy(exact)
    rough.model.to(torch.bfloat16)
    exact.model.load_state_dict(rough.model.state_dict())  # the same values
    parts = list(parts_of().values())
    wanted, _ = plain(exact, parts)
    errors = [(found - wanted).norm() / wanted.norm() for found in (plain(rough, parts)[0], updated(rough, parts)[0])]
    assert errors[1] < 1.2 * errors[0] < 0.05


def test_each_prompt_and_each_row_is_run_once(monkeypatch):
    policy, parts = policy_of(PACKED["llama"]), list(parts_of().values())
    seen, forward = [], policy.model.forward

    def counted(**given):
        seen.append(given["input_ids"].numel())
        return forward(**given)

    monkeypatch.setattr(policy.model, "forward", counted)
    updated(policy, parts)
    rows = {r.row for part in parts for r in part.rows if r.count}
    tokens = sum(len(prompt) for prompt in {r.prompt for r in rows}) + sum(len(r.answer) - 1 for r in rows)
    assert tokens == 126 and seen == [128]  # and two that fill the line up


class Sizes(TorchDispatchMode):
    """The sizes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::bmm"):
            self.seen |= {size for x in args[:2] for size in x.shape[-2:]}
        return func(*args, **(kwargs or {}))


def test_texts_of_any_length_are_multiplied_in_few_sizes():
    policy, own = policy_of(PACKED["llama"]), {SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"], 16, 8}
    draw = random.Random(1)
    for n in (1, 2, 5, 9):
        rows = [Row((5,) * draw.randint(1, 30), (7,) * draw.randint(1, 30)) for _ in range(n)]
        part = Part("mef", 1.0, [WeighedRow(row, 1.0) for row in rows], "tokens", losses.weighted_nll)
        assert_equal(policy, [part])
        with Sizes() as sizes:
            updated(policy, [part])
        texts = {size for size in sizes.seen - own if size > n}  # smaller: so many prompts, and so many answers
        assert texts and all(size % 16 == 0 for size in texts)


def test_what_fills_the_line_up_finds_a_place_whatever_the_lengths():
    policy = policy_of(PACKED["llama"])
    for answer in (1, 2, 17, 32):
        for prompt in (1, 15, 16, 31):  # with padding to spare, and without
            row = Row(tuple(range(4, 4 + prompt)), tuple(range(20, 20 + answer)))
            assert_equal(policy, [Part("mef", 1.0, [WeighedRow(row, 1.0)], "tokens", losses.weighted_nll)])


@pytest.mark.parametrize("slab", [32, 4096])
@pytest.mark.parametrize("kind", ["tied", "untied, with a bias", "tied, bfloat16"])
def test_large_products_have_pages_of_their_own_and_the_same_numbers(kind, slab, monkeypatch):
    policy, parts = policy_of(PACKED["llama"]), [*parts_of().values()]
    if "untied" in kind:
        policy.model.lm_head = torch.nn.Linear(32, 61)
    if "bfloat16" in kind:
        policy.model.to(torch.bfloat16)
    monkeypatch.setattr(head, "SLAB_BYTES", slab * 61 * policy.model.dtype.itemsize)
    wanted, told = updated(policy, parts)
    made, plain_product = [], head._product
    monkeypatch.setattr(head, "_product", lambda *given: made.append(plain_product(*given)) or made[-1])
    monkeypatch.setattr(pages, "LEAST_BYTES", 1)
    found, record = updated(policy, parts)
    assert found.equal(wanted) and record == told
    assert len(made) == (2 if slab == 4096 else 2 * 4)
    from_heap = products.slow(policy.model.dtype, policy.model.device)  # then they are rounded copies
    assert all(product.untyped_storage().resizable() == from_heap for product in made)


@pytest.mark.parametrize("config", [PACKED["llama"], PADDED["gemma"]], ids=["packed", "padded"])
def test_a_pass_is_scaled_by_what_its_result_is(config):
    policy, row = policy_of(config), Row((5, 6), (7, 8, 9))
    part = Part("mef", 1.0, [WeighedRow(row, 1.0)], "tokens", losses.weighted_nll)
    gradients = []
    for scale in (1.0, 2.0):
        loss = head.AnswerLoss([part], [1.0], [row], [[head.Use(0, part.rows[0], 1.0)]], [], None)
        with packing.packed_attention(policy.model):
            (scale * packing.run(policy, policy.model, [row], loss)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
        policy.model.zero_grad()
    torch.testing.assert_close(gradients[1], 2 * gradients[0])
    assert gradients[0].norm() > 0


def test_a_pass_for_a_process_that_is_done_has_no_gradient():
    policy = policy_of(PACKED["llama"])
    for form in FORMS:
        parts = list(parts_of(form).values())
        learner = Learner(policy, Accelerator(cpu=True), ADAMW, steps=1, max_answer_tokens=32, micro_batch_tokens=60)
        for chosen in ([part] for part in parts):
            with packing.packed_attention(policy.model):
                (row, uses) = learner._idle()[0]
                assert learner._pass(chosen, [row], [uses]).tolist() == [0.0]
            assert all(not p.grad.any() for p in policy.model.parameters())


def test_trees_keep_to_the_budget_and_hold_each_row_once():
    draw = random.Random(0)
    rows = [Row((n % 7,) * (3 + n % 7), (9,) * draw.randrange(1, 30)) for n in range(60)]
    for budget in (1, 40, 100, 10_000):
        batches = list(packing.trees(rows, budget))
        assert sorted(n for batch in batches for n in batch) == list(range(60))
        for batch in batches:
            unique = sum(len(prompt) for prompt in {rows[n].prompt for n in batch})
            assert len(batch) == 1 or unique + sum(len(rows[n].answer) for n in batch) <= budget
    assert len(batches) == 1
