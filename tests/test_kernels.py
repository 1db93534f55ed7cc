"""The decode step's own kernels against plain torch: on a GPU, or where Triton is installed alone, by its interpreter (which
needs a numpy before 2.4)."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton")

from meml_lib.rollouts import kernels, native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 64), (9, 3, 64), (4, 4, 8), (12, 2, 80)])
@pytest.mark.parametrize("at", [0, 1, 64, 79])
def test_a_token_attends_to_its_prompt_its_answer_and_itself(heads, kv_heads, size, at):
    torch.manual_seed(at)
    rows, longest, room, group = 5, 70, 80, heads // kv_heads
    qkv = torch.randn(rows, kv_heads, group + 2, size, device=DEVICE)
    turn_N = torch.polar(torch.ones(rows, size // 2), torch.randn(rows, size // 2)).to(DEVICE)
    prompt_k, prompt_v = torch.randn(2, 2 * kv_heads, longest, size, device=DEVICE)
    own_k, own_v = torch.randn(2, rows * kv_heads, room, size, device=DEVICE)
    prompt_of_row_N, length_P = torch.tensor([0, 1, 1, 0, 1], device=DEVICE), torch.tensor([70, 13], device=DEVICE)
    before_k, before_v = own_k.clone(), own_v.clone()
    out = kernels.attend(
        qkv, turn_N, (prompt_k, prompt_v), (own_k, own_v), prompt_of_row_N, length_P, torch.tensor([at], device=DEVICE)
    )
    turned = torch.view_as_real(torch.view_as_complex(qkv.unflatten(-1, (-1, 2))) * turn_N[:, None, None]).flatten(-2)
    q, k, v = turned[:, :, :-2], turned[:, :, -2], qkv[:, :, -1]
    for n, p in enumerate(prompt_of_row_N.tolist()):
        for h in range(heads):
            asked, own = p * kv_heads + h // group, n * kv_heads + h // group
            keys = torch.cat([prompt_k[asked, : length_P[p]], before_k[own, :at], k[n, h // group][None]])
            values = torch.cat([prompt_v[asked, : length_P[p]], before_v[own, :at], v[n, h // group][None]])
            expected = (keys @ q[n, h // group, h % group]).softmax(0) @ values
            torch.testing.assert_close(out[n, h // group, h % group], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own_k.view(rows, kv_heads, room, size)[:, :, at], k)
    assert own_v.view(rows, kv_heads, room, size)[:, :, at].equal(v)
    for kept, was in ((own_k, before_k), (own_v, before_v)):
        assert kept[:, :at].equal(was[:, :at]) and kept[:, at + 1 :].equal(was[:, at + 1 :])


@pytest.mark.parametrize("words", [61, 2048, 5000, 49152])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_a_draw_is_the_plain_one(words, temperature):
    torch.manual_seed(0)
    logits_NV = 4 * torch.randn(48, words)
    logits_NV[3, ::2] = logits_NV[4, 5:] = -torch.inf
    logits_NV[5, : words // 2] = -torch.inf
    uniform_N = torch.rand(48, dtype=torch.float64)
    uniform_N[0] = 0.0
    token_N, logp_N, entropy_N = kernels.choose(logits_NV.to(DEVICE), uniform_N.to(DEVICE), temperature)
    assert token_N.cpu().equal(native.choose(logits_NV, uniform_N, temperature=temperature, top_p=None)[0])
    exact_NV = logits_NV.double().log_softmax(-1)
    torch.testing.assert_close(logp_N.cpu().double(), exact_NV.gather(-1, token_N.cpu()[:, None])[:, 0], atol=2e-6, rtol=2e-6)
    entropy = -(exact_NV.exp() * exact_NV.clamp(min=-1e300)).sum(-1)
    torch.testing.assert_close(entropy_N.cpu().double(), entropy, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("words", [61, 5000])
def test_the_largest_number_draws_a_possible_word(words):
    logits_NV = 4 * torch.randn(64, words)
    logits_NV[:, words // 2 :] = -torch.inf
    almost_1 = torch.full((64,), 1 - 2**-53, dtype=torch.float64)
    token_N, logp_N, _ = kernels.choose(logits_NV.to(DEVICE), almost_1.to(DEVICE), 1.0)
    assert (token_N < words // 2).all() and logp_N.isfinite().all()
