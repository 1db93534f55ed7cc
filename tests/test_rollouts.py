"""The engines' conformance test: what transformers' generate says, what the scorer says, and draws that keep to their key.

vLLM's part runs where vllm can be imported (`make vllm`, then .venv-vllm/bin/python -m pytest tests/test_rollouts.py).
"""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from meml_lib import config
from meml_lib.analysis import figures
from meml_lib.pipeline import launch, watch
from meml_lib.rollouts import native, uniforms, vllm
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


@pytest.mark.parametrize("words", [49_152, 50_257, 1_999, 3])  # 1,999 is prime: blocks of one word
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
