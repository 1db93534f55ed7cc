"""A CPU without bfloat16 products: all of them run in float32, sampling's and training's, and say the same."""

import pytest
import torch
from test_dryrun import Bare
from test_lean import gradients, model_of, plainly
from test_learner import ADAMW, learner_of, part, rows  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from meml_lib.rollouts import cpu, native, products
from meml_lib.training.policy import Row

PROMPTS = [(3, 4, 5), (6, 7)]


@pytest.fixture
def lacking(monkeypatch):
    """This CPU, and it has no such products."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: dtype == torch.float32)


class Seen(TorchDispatchMode):
    """The products that are taken, by their operands' dtype."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "_linear_pointwise"):
            self.taken.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # without and with biases
def test_gradients_are_no_further_from_float32_than_by_products_in_bfloat16(kind, lacking):
    model = model_of(kind, attn_implementation="eager")
    exact, _ = gradients(model, plainly)
    model = model.bfloat16()
    plain, _ = gradients(model, plainly)
    with Seen() as seen:
        found, _ = gradients(model, lambda model: products.in_float32(model.dtype, model.device))
    assert seen.taken and set(seen.taken) == {torch.float32} and found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 1.1 * (plain.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("kind", ["llama", "phi"])  # the decoder's, and transformers' own forward pass
def test_a_sampler_multiplies_in_float32_and_draws_what_scoring_says(kind, lacking):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), **options).eval()
    uniform = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    with torch.inference_mode(), Seen() as seen:
        options = {"end_ids": (0,), "max_answer_tokens": 6, "rows_per_batch": 2, "temperature": 1.0}
        answers = native.sample(model, PROMPTS, uniform_NT=uniform, **options)
        rows = [Row(prompt, answer.tokens) for prompt, answer in zip(PROMPTS, answers, strict=True)]
        logp_NT, mask_NT = Bare(model).score(rows)
    assert len(seen.taken) > 10 and set(seen.taken) == {torch.float32}
    told = torch.tensor([logp for answer in answers for logp in answer.logp])
    assert torch.allclose(told, logp_NT[mask_NT], atol=0.02)


def test_an_update_multiplies_in_float32_and_so_does_muon(policy, rows, lacking):
    for dtype in (torch.bfloat16, torch.float32):  # Muon's own products are bfloat16's in any case
        policy.model.to(dtype)
        learner = learner_of(policy, params=ADAMW.model_copy(update={"optimizer": "muon"}))
        with Seen() as seen:
            learner.update([part(rows)])
        assert len(seen.taken) > 100 and set(seen.taken) == {torch.float32}


def test_other_machines_and_dtypes_keep_their_products(monkeypatch):
    for supported in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
        for dtype, device in ((torch.bfloat16, "cpu"), (torch.float32, "cpu"), (torch.bfloat16, "cuda")):
            slow = not supported and (dtype, device) == (torch.bfloat16, "cpu")
            assert products.slow(dtype, torch.device(device)) == slow
            assert isinstance(products.in_float32(dtype, torch.device(device)), TorchDispatchMode) == slow
