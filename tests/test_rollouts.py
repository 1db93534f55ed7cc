"""The engine's conformance test: what transformers' generate says, what the scorer says, and draws that keep to their key."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from meml_lib.rollouts import decoder, native, uniforms
from meml_lib.training.policy import Row


@pytest.fixture
def prompts(policy, task, panel):
    """Unequal lengths, and one prompt that stands twice."""
    ids = [policy.prompt_ids(panel[i % 3].system, q.text) for i, q in enumerate(task.questions("train")[:5])]
    return [*ids, ids[0]]


def sample(policy, prompts, *, temperature=1.0, top_p=None, keys=None, limit=24, rows_per_batch=99, end_ids=None):
    uniform_NT = np.stack([uniforms("test", k, count=limit) for k in (keys or range(len(prompts)))])
    policy.model.eval()
    return native.sample(
        policy.model,
        prompts,
        uniform_NT=uniform_NT,
        end_ids=end_ids or policy.end_ids,
        max_answer_tokens=limit,
        rows_per_batch=rows_per_batch,
        temperature=temperature,
        top_p=top_p,
    )


def test_greedy_equals_generate(policy, prompts):
    for prompt, rollout in zip(prompts, sample(policy, prompts, temperature=None), strict=True):
        ids = torch.tensor([prompt])
        out = policy.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert list(rollout.tokens) == out[0, len(prompt) :].tolist()


def test_sampled_logp_equals_the_scorers(policy, prompts):
    for temperature, top_p in ((1.0, None), (0.7, 0.9)):
        rollouts = sample(policy, prompts, temperature=temperature, top_p=top_p)
        logp_NT, mask_NT = policy.score([Row(p, r.tokens) for p, r in zip(prompts, rollouts, strict=True)])
        for n, rollout in enumerate(rollouts):
            assert logp_NT[n][mask_NT[n]].tolist() == pytest.approx(list(rollout.logp), abs=1e-4)


def test_draws_do_not_depend_on_batch_layout(policy, prompts):
    whole = sample(policy, prompts)
    split = sample(policy, prompts, rows_per_batch=2)
    order = [3, 0, 5, 1]
    some = sample(policy, [prompts[n] for n in order], keys=order)
    assert [r.tokens for r in whole] == [r.tokens for r in split]
    assert [whole[n].tokens for n in order] == [r.tokens for r in some]


def test_rollouts_of_one_prompt_differ_and_repeat_with_their_key(policy, prompts):
    first = sample(policy, [prompts[0]] * 8)
    assert len({r.tokens for r in first}) == 8
    assert first == sample(policy, [prompts[0]] * 8)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log().expand(20_000, 3) + 5.0
    uniform = torch.from_numpy(np.random.default_rng(0).random(20_000))
    token, _, _ = native.choose(logits, uniform, temperature=1.0, top_p=None)
    assert (token.bincount() / 20_000).tolist() == pytest.approx([0.1, 0.6, 0.3], abs=0.015)
    token, _, _ = native.choose(logits, uniform, temperature=0.5, top_p=None)
    assert (token.bincount() / 20_000).tolist() == pytest.approx([0.01 / 0.46, 0.36 / 0.46, 0.09 / 0.46], abs=0.015)


def test_top_p_keeps_the_smallest_set_that_holds_the_mass():
    p = torch.tensor([[0.1, 0.6, 0.3]]).expand(2_000, 3)
    uniform = torch.from_numpy(np.random.default_rng(0).random(2_000))
    assert native.draw(p, uniform, top_p=0.6).unique().tolist() == [1]
    assert native.draw(p, uniform, top_p=0.7).unique().tolist() == [1, 2]


@pytest.mark.parametrize("words", [49_152, 50_257, 9_973, 1_999, 3])  # 9,973 is prime
def test_a_draw_is_the_inverse_of_the_whole_cumulative_distribution(words):
    logits = 3 * torch.randn(512, words, generator=torch.Generator().manual_seed(0))
    logits[:, ::3] = -torch.inf
    p, uniform = logits.softmax(-1), torch.from_numpy(np.random.default_rng(0).random(512))
    for top_p in (None, 0.9):
        kept = p
        if top_p is not None:
            least = torch.stack([row.sort(descending=True).values[: native_nucleus(row, top_p)].min() for row in p])
            kept = p.masked_fill(p < least[:, None], 0.0)
        upto = kept.double().cumsum(-1)
        whole = torch.searchsorted(upto, (uniform * upto[:, -1])[:, None], right=True)[:, 0]
        assert native.draw(p, uniform, top_p=top_p).equal(whole)


def native_nucleus(p, top_p):
    return int((p.sort(descending=True).values.cumsum(-1) < top_p).sum()) + 1


def test_extreme_uniforms_still_find_a_possible_token():
    p = torch.full((2, 50_000), 1 / 49_998)
    p[:, [0, -1]] = 0.0
    extreme = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert native.draw(p, extreme, top_p=None).tolist() == [1, 49_998]


def test_logp_and_entropy_are_those_of_the_distribution_impossible_tokens_included():
    logits = 4 * torch.randn(64, 500, generator=torch.Generator().manual_seed(0)) + 30
    logits[:, 7] = -torch.inf
    for temperature in (None, 1.0, 0.3, 3.0):
        token, logp, entropy = native.choose(logits, torch.full((64,), 0.4, dtype=torch.float64), temperature=temperature, top_p=None)
        truth = torch.distributions.Categorical(logits=logits.double().clamp(min=-1e30))
        assert logp.double().allclose(truth.log_prob(token), atol=1e-5)
        assert entropy.double().allclose(truth.entropy(), atol=1e-4)


def test_several_end_tokens_end_and_belong_to_the_answer(policy, prompts):
    free = sample(policy, prompts, limit=12, end_ids=(len(policy.tokenizer) + 1,))
    assert not any(r.ended for r in free) and all(len(r.tokens) == 12 for r in free)
    stops = {free[0].tokens[3], free[1].tokens[5]}
    stopped = sample(policy, prompts, limit=12, end_ids=tuple(stops))
    for before, after in zip(free, stopped, strict=True):
        hits = [t for t, token in enumerate(before.tokens) if token in stops]
        assert after.ended == bool(hits)
        assert after.tokens == (before.tokens[: hits[0] + 1] if hits else before.tokens)


def test_entropy_is_the_policys_own(policy, prompts):
    (rollout,) = sample(policy, prompts[:1])
    logits_NTV, _, _ = policy.logits([Row(prompts[0], rollout.tokens)])
    entropy = torch.distributions.Categorical(logits=logits_NTV).entropy().mean().item()
    assert rollout.entropy == pytest.approx(entropy, abs=1e-4)


def test_bad_input_is_named(policy, prompts):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(policy, [prompts[0], ()])
    with pytest.raises(ValueError, match=r"uniform_NT has shape \(1, 3\), want \(2, 24\)"):
        native.sample(
            policy.model,
            prompts[:2],
            uniform_NT=np.zeros((1, 3)),
            end_ids=(0,),
            max_answer_tokens=24,
            rows_per_batch=1,
            temperature=None,
        )


def test_uniforms_depend_on_every_part_of_the_key():
    keys = [(0, 1, "q", "e", 2), (1, 1, "q", "e", 2), (0, 2, "q", "e", 2), (0, 1, "r", "e", 2), (0, 1, "q", "f", 2), (0, 1, "q", "e", 3)]
    draws = [uniforms(*key, count=4).tolist() for key in keys]
    assert len({tuple(d) for d in draws}) == len(keys)
    assert draws[0] == uniforms(*keys[0], count=4).tolist()


# --- models of every kind ---------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {  # name: its configuration, and whether `decoder` runs it; else transformers does
    "llama": ({}, True),
    "llama, untied, biases": ({"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, True),
    "llama, tied, head size": ({"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 1}, True),
    "llama, scaled positions": ({"rope_parameters": LLAMA3}, True),
    "llama, moving positions": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, False),
    "mistral": ({"sliding_window": None}, True),
    "mistral, unused window": ({"sliding_window": 64}, True),
    "mistral, window": ({"sliding_window": 12}, False),
    "qwen2": ({"tie_word_embeddings": True}, True),
    "qwen3": ({"head_dim": 8}, True),
    "gemma2": ({"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}, False),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}, False),
}
PROMPTS = [(3, 1, 4, 1, 5), (9, 2), (9, 2), (6, 5, 3, 5, 8, 9, 7, 9, 3), (2,), (9, 2), (6, 5, 3, 5, 8, 9, 7, 9, 3)]


def make(name: str, dtype=torch.float32) -> torch.nn.Module:
    """Random weights, norms and biases among them, large enough that the position of a token matters."""
    options, runs = MODELS[name]
    config = AutoConfig.for_model(name.split(",")[0], **(SIZES | options))
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        scale = 0.3 if weight.dim() == 1 else 2 / weight.shape[-1] ** 0.5
        weight.data.add_(scale * torch.randn(weight.shape, generator=generator))
    assert decoder.fits(model, 40) == runs
    return model.to(dtype)


def answers(model, prompts=PROMPTS, *, limit=24, rows_per_batch=99, end_ids=(99,), temperature=1.0):
    uniform_NT = np.stack([uniforms("test", n, count=limit) for n in range(len(prompts))])
    options = {"end_ids": end_ids, "max_answer_tokens": limit, "rows_per_batch": rows_per_batch}
    return native.sample(model, prompts, uniform_NT=uniform_NT, temperature=temperature, **options)


@torch.no_grad()
def scored(model, prompt, tokens) -> torch.Tensor:
    """Log-probabilities [T, V] by one plain forward pass, without cache, mask or padding."""
    logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


def agree(model, rollouts, prompts=PROMPTS, *, within=1e-4):
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        logp_TV = scored(model, prompt, rollout.tokens)
        logp_T = logp_TV.gather(-1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        assert list(rollout.logp) == pytest.approx(logp_T.tolist(), abs=within)
        assert rollout.entropy == pytest.approx(-(logp_TV.exp() * logp_TV).sum(-1).mean().item(), abs=within)


@pytest.fixture(params=MODELS)
def model(request):
    return make(request.param)


def test_every_model_samples_what_its_own_forward_pass_says(model):
    rollouts = answers(model)
    agree(model, rollouts)
    assert len({r.tokens for r in rollouts}) == len(rollouts)  # equal prompts have draws of their own
    assert [r.tokens for r in rollouts] == [r.tokens for r in answers(model, rows_per_batch=2)]
    for prompt, rollout in zip(PROMPTS, answers(model, temperature=None), strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert list(rollout.tokens) == out[0, len(prompt) :].tolist()


def test_rows_that_leave_early_do_not_move_the_others(model):
    free = answers(model)
    ends = tuple({free[n].tokens[t] for n, t in ((0, 3), (2, 7), (3, 5), (5, 12))})
    left = answers(model, end_ids=ends)
    agree(model, left)
    assert len({len(r.tokens) for r in left}) >= 4 and any(r.ended for r in left)
    for before, after in zip(free, left, strict=True):
        first = next((t for t, token in enumerate(before.tokens) if token in ends), len(before.tokens) - 1)
        assert after.tokens == before.tokens[: first + 1]


@pytest.mark.parametrize(("check", "refill", "block"), [(8, 0.5, 16), (3, 1.0, 5)])
def test_looking_rarely_and_attending_to_room_that_is_still_empty_change_nothing(monkeypatch, check, refill, block):
    model = make("qwen3")
    ends = tuple({answers(model)[n].tokens[t] for n, t in ((0, 3), (2, 7), (3, 5), (5, 12))})
    want = answers(model, end_ids=ends)
    monkeypatch.setattr(native, "_CHECK", check)
    monkeypatch.setattr(native, "_REFILL", refill)
    monkeypatch.setattr(decoder, "_BLOCK", block)
    got = answers(model, end_ids=ends)
    assert [(r.tokens, r.ended) for r in got] == [(r.tokens, r.ended) for r in want]
    agree(model, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_laid_out_ahead_give_the_same_products(monkeypatch, dtype):
    model = make("llama, untied, biases", dtype)
    plain = decoder.Weights(model)
    monkeypatch.setattr(decoder, "_PACK", 0)
    packed = decoder.Weights(model)
    for of in (lambda w: w.layers[1].qkv, lambda w: w.layers[1].gate_up, lambda w: w.head):
        for rows in (1, 7, 96):
            x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)).to(dtype)
            torch.testing.assert_close(of(packed)(x), of(plain)(x))
    if dtype is torch.float32:
        agree(model, answers(model))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_keeps_to_its_own_rounding(name):
    """The decoder's step is no further from the truth (float32, the same weights) than the model's own pass is."""
    model = make(name, torch.bfloat16)
    rollouts, truth = answers(model), make(name, torch.bfloat16).float()
    ours, theirs = [], []
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        at = torch.tensor(rollout.tokens)[:, None]
        true_T, plain_T = (scored(m, prompt, rollout.tokens).gather(-1, at)[:, 0] for m in (truth, model))
        ours += (torch.tensor(rollout.logp) - true_T).tolist()
        theirs += (plain_T - true_T).tolist()
    assert np.square(ours).mean() ** 0.5 < 1.5 * np.square(theirs).mean() ** 0.5


def test_the_next_sample_uses_the_updated_weights(model):
    before = answers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()
    optimizer.step()
    after = answers(model)
    agree(model, after)
    assert [r.logp for r in before] != [r.logp for r in after]


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_take_part(merged):
    from peft import LoraConfig, get_peft_model

    plain = make("qwen2")
    without = answers(plain)
    model = get_peft_model(plain, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(generator=torch.Generator().manual_seed(0))
    if merged:
        model.merge_adapter()
    assert decoder.fits(model, 40)
    rollouts = answers(model)
    agree(model, rollouts)
    assert [r.tokens for r in rollouts] != [r.tokens for r in without]


def test_adapters_that_are_more_than_a_sum_are_left_to_transformers():
    from peft import LoraConfig, get_peft_model

    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for kind, runs in (({}, True), ({"use_dora": True}, False), ({"lora_bias": True}, False)):
        model = get_peft_model(make("llama, untied, biases"), LoraConfig(**options, **kind)).eval()
        assert decoder.fits(model, 40) == runs
        agree(model, answers(model))
        with model.disable_adapter():
            assert not decoder.fits(model, 40)
