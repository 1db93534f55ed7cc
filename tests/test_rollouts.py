"""The engines' conformance test: what transformers' generate says, what the scorer says, and draws that keep to their key.

vLLM's part runs where vllm can be imported (`make vllm`, then .venv-vllm/bin/python -m pytest tests/test_rollouts.py).
"""

import copy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoConfig, AutoModelForCausalLM

from meml_lib import config
from meml_lib.analysis import figures
from meml_lib.pipeline import launch, watch
from meml_lib.rollouts import cpu, decoder, native, uniforms, vllm
from meml_lib.runs import RunFolder
from meml_lib.training import dryrun
from meml_lib.training.policy import Row

NEEDS_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed here")


@pytest.fixture(params=["native", pytest.param("vllm", marks=NEEDS_VLLM)])
def engine(request):
    return {"native": native, "vllm": vllm}[request.param]


@pytest.fixture
def prompts(policy, task, panel):
    """Unequal lengths, and one prompt that stands twice."""
    ids = [policy.prompt_ids(panel[i % 3].system, q.text) for i, q in enumerate(task.questions("train")[:5])]
    return [*ids, ids[0]]


@pytest.fixture
def sample(engine):
    def sample(policy, prompts, *, temperature=1.0, top_p=None, keys=None, limit=24, rows_per_batch=99, end_ids=None):
        uniform_NT = np.stack([uniforms("test", k, count=limit) for k in (keys or range(len(prompts)))])
        policy.model.eval()
        return engine.sample(
            policy.model,
            prompts,
            uniform_NT=uniform_NT,
            end_ids=end_ids or policy.end_ids,
            max_answer_tokens=limit,
            rows_per_batch=rows_per_batch,
            temperature=temperature,
            top_p=top_p,
        )

    return sample


def generated(policy, prompt):
    ids = torch.tensor([prompt])
    out = policy.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_generate(sample, policy, prompts):
    for prompt, rollout in zip(prompts, sample(policy, prompts, temperature=None), strict=True):
        assert list(rollout.tokens) == generated(policy, prompt)


def test_it_answers_from_the_weights_as_they_are_now(sample, policy, prompts):
    policy.model.config.max_position_embeddings = 512
    prompts = [*prompts, prompts[0] * 12]  # long enough for a cache of prompts, which must not outlive the weights
    assert len(prompts[-1]) > 256
    before = sample(policy, prompts, temperature=None)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    after = sample(policy, prompts, temperature=None)
    assert before != after
    assert [list(rollout.tokens) for rollout in after] == [generated(policy, prompt) for prompt in prompts]


def test_adapters_count(sample, policy, prompts):
    from peft import LoraConfig, get_peft_model

    before = sample(policy, prompts, temperature=None)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    policy.model = get_peft_model(policy.model, lora)
    after = sample(policy, prompts, temperature=None)
    assert before != after
    assert [list(rollout.tokens) for rollout in after] == [generated(policy, prompt) for prompt in prompts]


def test_what_torch_draws_elsewhere_is_left_as_it_was(sample, policy, prompts):
    torch.manual_seed(3)
    sample(policy, prompts)
    drawn, threads = torch.rand(4), torch.get_num_threads()
    torch.manual_seed(3)
    assert drawn.equal(torch.rand(4))
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, None), (0.7, 0.8)])
def test_first_tokens_follow_the_policy(sample, policy, prompts, temperature, top_p):
    with torch.no_grad():  # sharpened: a new model's words are all as likely
        policy.model.lm_head.weight.mul_(3)
    drawn = sample(policy, [prompts[0]] * 4000, temperature=temperature, top_p=top_p, end_ids=range(len(policy.tokenizer)))
    seen = np.bincount([r.tokens[0] for r in drawn], minlength=len(policy.tokenizer))
    logits = policy.logits([Row(prompts[0], (0,))])[0][0, 0].detach().double()
    p = (logits / temperature).softmax(-1).numpy()
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]), top_p or 1.0) + 1]
    assert seen[kept].sum() == 4000
    expected = 4000 * p[kept] / p[kept].sum()
    often, rest = expected >= 8, expected[expected < 8].sum()
    counts, wanted = [*seen[kept][often], seen[kept][~often].sum()], [*expected[often], rest]
    assert often.sum() >= 8
    assert chisquare(*((counts, wanted) if rest else (counts[:-1], wanted[:-1]))).pvalue > 1e-3


def test_sampled_logp_equals_the_scorers(sample, policy, prompts):
    for temperature, top_p in ((1.0, None), (0.7, 0.9)):
        rollouts = sample(policy, prompts, temperature=temperature, top_p=top_p)
        logp_NT, mask_NT = policy.score([Row(p, r.tokens) for p, r in zip(prompts, rollouts, strict=True)])
        for n, rollout in enumerate(rollouts):
            assert logp_NT[n][mask_NT[n]].tolist() == pytest.approx(list(rollout.logp), abs=1e-4)


def test_draws_do_not_depend_on_batch_layout(sample, policy, prompts):
    whole = sample(policy, prompts)
    split = sample(policy, prompts, rows_per_batch=2)
    order = [3, 0, 5, 1]
    some = sample(policy, [prompts[n] for n in order], keys=order)
    assert [r.tokens for r in whole] == [r.tokens for r in split]
    assert [whole[n].tokens for n in order] == [r.tokens for r in some]


def test_rollouts_of_one_prompt_differ_and_repeat_with_their_key(sample, policy, prompts):
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


def test_several_end_tokens_end_and_belong_to_the_answer(sample, policy, prompts):
    free = sample(policy, prompts, end_ids=(len(policy.tokenizer) + 1,))
    assert not any(r.ended for r in free) and all(len(r.tokens) == 24 for r in free)
    stops = {free[0].tokens[3], free[1].tokens[5]}
    stopped = sample(policy, prompts, end_ids=tuple(stops))
    for before, after in zip(free, stopped, strict=True):
        hits = [t for t, token in enumerate(before.tokens) if token in stops]
        assert after.ended == bool(hits)
        assert after.tokens == (before.tokens[: hits[0] + 1] if hits else before.tokens)


def test_entropy_is_the_policys_own_or_not_told(engine, sample, policy, prompts):
    (rollout,) = sample(policy, prompts[:1])
    if engine is vllm:
        assert rollout.entropy is None
        return
    logits_NTV, _, _ = policy.logits([Row(prompts[0], rollout.tokens)])
    entropy = torch.distributions.Categorical(logits=logits_NTV).entropy().mean().item()
    assert rollout.entropy == pytest.approx(entropy, abs=1e-4)


def test_bad_input_is_named(engine, sample, policy, prompts):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(policy, [prompts[0], ()])
    with pytest.raises(ValueError, match=r"uniform_NT has shape \(1, 3\), want \(2, 24\)"):
        engine.sample(
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
    known = AutoConfig.for_model(name.split(",")[0], **(SIZES | options))
    torch.manual_seed(0)
    model, generator = AutoModelForCausalLM.from_config(known).eval(), torch.Generator().manual_seed(0)
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


@pytest.mark.parametrize(("check", "refill"), [(8, 0.5), (3, 1.0)])
def test_looking_rarely_changes_nothing(monkeypatch, check, refill):
    model = make("qwen3")
    ends = tuple({answers(model)[n].tokens[t] for n, t in ((0, 3), (2, 7), (3, 5), (5, 12))})
    want = answers(model, end_ids=ends)
    monkeypatch.setattr(native, "_CHECK", check)
    monkeypatch.setattr(native, "_REFILL", refill)
    got = answers(model, end_ids=ends)
    assert [(r.tokens, r.ended) for r in got] == [(r.tokens, r.ended) for r in want]
    agree(model, got)


@pytest.mark.parametrize(("name", "one"), [("llama", True), ("qwen3", False)])  # qwen3 norms queries and keys
def test_a_step_is_one_call_where_it_can_be(name, one):
    answers = decoder.Decoder(decoder.Weights(make(name)), [(3, 4), (5, 6, 7)], [0, 1, 1], 4)
    calls, attend = [], answers._attend
    answers._attend = lambda *given: calls.append(given) or attend(*given)
    with torch.inference_mode():
        whole_N = answers.step(torch.tensor([8, 9, 10]))
        others = decoder.Decoder(decoder.Weights(make(name)), [(3, 4), (5, 6, 7)], [0, 1, 1], 4)
        others._layers = None
        torch.testing.assert_close(whole_N, others.step(torch.tensor([8, 9, 10])))
        for kept in (answers, others):
            kept.keep(torch.tensor([0, 2]))
        others._layers = None
        torch.testing.assert_close(answers.step(torch.tensor([8, 9])), others.step(torch.tensor([8, 9])))
    assert (answers._layers is not None) == one and len(calls) == (0 if one else 2 * SIZES["num_hidden_layers"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_the_same_compiled_laid_out_for_onednn_or_not(monkeypatch, dtype):
    model = make("llama, untied, biases", dtype)
    compiled = decoder.Weights(model)
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)
    others = [decoder.Weights(model)]
    monkeypatch.setattr(decoder, "_PACK", 0)
    others.append(decoder.Weights(model))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    others.append(decoder.Weights(model))
    apart = 1e-5 if dtype == torch.float32 else 0.02  # oneDNN's outputs are rounded to bfloat16 too
    for rows in (1, 7, 17, 32, 96):
        x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows))
        for weights in others:
            one, other = (w.layers[1] for w in (weights, compiled))
            pairs = [(getattr(one, product)(x), getattr(other, product)(x)) for product in ("qkv", "gated")]
            pairs.append((one.down(one.gated(x), x.clone()), other.down(other.gated(x), x.clone())))
            for got, want in (*pairs, (weights.head(x), compiled.head(x))):
                assert got.dtype == want.dtype == torch.float32 and (got - want).norm() < apart * want.norm()
    monkeypatch.undo()
    if dtype is torch.float32:
        agree(model, answers(model))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_keeps_to_its_own_rounding(name):
    """The decoder's step is no further from the truth (float32, the same weights) than the model's own pass is."""
    ours, theirs = distances_from_float32(make(name, torch.bfloat16))
    assert ours < 1.5 * theirs


def distances_from_float32(model) -> tuple[float, float]:
    """How far log-probabilities are from those of the same weights in float32: the decoder's, and the model's own."""
    rollouts, truth = answers(model), copy.deepcopy(model).float()
    ours, theirs = [], []
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        at = torch.tensor(rollout.tokens)[:, None]
        true_T, plain_T = (scored(m, prompt, rollout.tokens).gather(-1, at)[:, 0] for m in (truth, model))
        ours += (torch.tensor(rollout.logp) - true_T).tolist()
        theirs += (plain_T - true_T).tolist()
    return np.square(ours).mean() ** 0.5, np.square(theirs).mean() ** 0.5


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


def test_adapters_of_float32_are_merged_in_the_models_own_precision():
    from peft import LoraConfig, get_peft_model

    model = make("llama", torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            assert weight.dtype == torch.float32
            weight.data.normal_(generator=torch.Generator().manual_seed(0))
    ours, theirs = distances_from_float32(model)
    assert 0 < ours < 2 * theirs  # theirs adds the adapters' part in float32


def test_adapters_that_are_more_than_a_sum_are_left_to_transformers():
    from peft import LoraConfig, get_peft_model

    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for kind, runs in (({}, True), ({"use_dora": True}, False), ({"lora_bias": True}, False)):
        model = get_peft_model(make("llama, untied, biases"), LoraConfig(**options, **kind)).eval()
        assert decoder.fits(model, 40) == runs
        agree(model, answers(model))
        with model.disable_adapter():
            assert not decoder.fits(model, 40)


# --- vLLM, where it is not installed ----------------------------------------------------------------------------------


def test_vllm_is_refused_before_any_work_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "find_spec", lambda name: None)
    p = config.load_run("params/smoke.yaml", ["sampling.engine=vllm"], run_dir=tmp_path / "run")
    with pytest.raises(config.ParamsError, match=r"sampling.engine \(override\): vllm is not installed here: make vllm"):
        launch.train("mef", p)
    assert not p.folder("mef").exists()
    watch.check_packages(config.load_run("params/smoke.yaml"))


def test_vllm_is_refused_beside_other_processes():
    with pytest.raises(config.ParamsError, match="sampling.engine=vllm runs inside one process"):
        config.load_run("params/smoke.yaml", ["sampling.engine=vllm", "hardware.processes=2"])


def test_a_dry_run_counts_what_vllm_holds():
    runs = [config.load_run("params/smoke.yaml", {"sampling.engine": engine}) for engine in ("native", "vllm")]
    (native_parts, _), (parts, most) = (dryrun.memory(p, dryrun.empty_model(p)) for p in runs)
    held = {name: size for name, size, _ in parts}
    model, c = dryrun.empty_model(runs[1]), dryrun.empty_model(runs[1]).config
    answer, rows = runs[1].sampling.max_answer_tokens, runs[1].sampling.rows_per_batch
    tokens = rows * min(c.max_position_embeddings, 512 + answer)
    kept = tokens * c.num_hidden_layers * 2 * c.hidden_size * 4
    assert held["vLLM"] == (model.num_parameters() + c.vocab_size * c.hidden_size) * 4 + kept
    assert "or: sampling" not in held and "or: sampling" in {name for name, _, _ in native_parts}
    assert most == sum(held[n] for n in ("weights", "gradients", "moments", "vLLM")) + max(held["or: a pass"], held["or: an update"])


@NEEDS_VLLM
def test_both_stages_run_with_vllm_and_stage_2_once_more_alike(tmp_path, monkeypatch):
    small = ["sampling.engine=vllm", "mef.steps=3", "mef.epochs=null", "riel.steps=2"]
    tables = []
    for name in ("first", "again"):
        p = config.load_run("params/smoke.yaml", small, run_dir=tmp_path / name)
        launch.train("mef", p)
        metrics = launch.train("riel", p)
        assert metrics["entropy"].isna().all()
        figures.curves(metrics)
        tables.append(RunFolder(p.folder("riel")).read_table("rollouts"))
    assert tables[0].equals(tables[1])
