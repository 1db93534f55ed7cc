"""What a decode step leaves to kernels of its own on CUDA, in Triton, which comes with torch there.

`attend`: each program answers for one row and one head of keys. It turns the new token's queries and key to their position,
writes key and value, then reads those of the row's prompt and of its answer once, for all queries that share them, and
keeps the softmax in registers. `choose`: logits are read once, instead of some ten passes over float32 copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64  # keys read at a time
_WORDS = 2048  # of the vocabulary, that one program of `choose` sums


# --- attention --------------------------------------------------------------------------------------------------------


@triton.jit
def _over(q, k, v, length, most, mass, mixed, size: tl.constexpr, wide: tl.constexpr, block: tl.constexpr):
    """Go on with the softmax over `length` more keys."""
    d = tl.arange(0, wide)
    for start in range(0, length, block):
        t = start + tl.arange(0, block)
        there = (t[:, None] < length) & (d[None, :] < size)
        keys = tl.load(k + t[:, None] * size + d[None, :], mask=there, other=0.0)
        values = tl.load(v + t[:, None] * size + d[None, :], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        scores = tl.where(t[None, :] < length, scores, float("-inf"))
        more = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp(scores - more[:, None])
        shrink = tl.exp(most - more)
        mass = mass * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        most = more
    return most, mass, mixed


@triton.jit
def _attend(
    qkv_N, turn_N, out_N, prompt_k, prompt_v, own_k, own_v, prompt_of_row_N, length_P, at, row, width, room,
    kv_heads: tl.constexpr, shared: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, wide: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d = tl.arange(0, rows), tl.arange(0, wide)
    there = d < size
    real = (g[:, None] < shared) & there[None, :]
    # Numbers 2i and 2i + 1 of a head are a complex number, times cos + i sin; `d ^ 1` is the other of the two.
    cos = tl.load(turn_N + n * size + d // 2 * 2, mask=there, other=0.0)
    sin = tl.load(turn_N + n * size + d // 2 * 2 + 1, mask=there, other=0.0)
    sin = tl.where(d % 2 == 0, -sin, sin)
    head = qkv_N + n * row + h * (shared + 2) * size
    q = tl.load(head + g[:, None] * size + d[None, :], mask=real, other=0.0).to(tl.float32) * cos[None, :]
    q += tl.load(head + g[:, None] * size + (d ^ 1)[None, :], mask=real, other=0.0).to(tl.float32) * sin[None, :]
    head += shared * size
    k = tl.load(head + d, mask=there, other=0.0).to(tl.float32) * cos
    k += tl.load(head + (d ^ 1), mask=there, other=0.0).to(tl.float32) * sin
    q, k = q.to(qkv_N.dtype.element_ty), k.to(qkv_N.dtype.element_ty)
    v = tl.load(head + size + d, mask=there, other=0.0)
    step = tl.load(at)
    own = (n * kv_heads + h) * room * size
    tl.store(own_k + own + step * size + d, k, mask=there)
    tl.store(own_v + own + step * size + d, v, mask=there)
    # The new token comes first, out of registers: what was just stored need not be visible yet.
    most = tl.sum(q.to(tl.float32) * k[None, :].to(tl.float32), 1)
    mass = tl.full((rows,), 1.0, tl.float32)
    mixed = tl.zeros((rows, wide), tl.float32) + v[None, :].to(tl.float32)
    p = tl.load(prompt_of_row_N + n)
    asked = (p * kv_heads + h) * width * size
    most, mass, mixed = _over(
        q, prompt_k + asked, prompt_v + asked, tl.load(length_P + p), most, mass, mixed, size, wide, block
    )
    most, mass, mixed = _over(q, own_k + own, own_v + own, step, most, mass, mixed, size, wide, block)
    out = (mixed / mass[:, None]).to(out_N.dtype.element_ty)
    tl.store(out_N + (n * kv_heads + h) * shared * size + g[:, None] * size + d[None, :], out, mask=real)


def attend(
    qkv: Tensor,
    turn_N: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    prompt_of_row_N: Tensor,
    length_P: Tensor,
    at: Tensor,
) -> Tensor:
    """What one token of each row attends to: its prompt, its answer so far, and itself. Its key and value are kept.

    Args:
      qkv: [N, kv heads, R + 2, D], of each head of keys its R queries, scaled, its key, neither turned, and its value.
      turn_N: complex [N, D / 2], of each token's position; numbers 2i and 2i + 1 of a head are turned together.
      prompt: keys and values [P * kv heads, T, D]. own: those of the answers, [N * kv heads, room, D]; written at `at`.
      prompt_of_row_N: int64. length_P: tokens of each prompt, int64. at: int64 [1], tokens of the answers so far.
    Returns: [N, kv heads, R, D].
    """
    rows, kv_heads, shared, size = (*qkv.shape[:2], qkv.shape[2] - 2, qkv.shape[3])
    out = qkv.new_empty(rows, kv_heads, shared, size)
    _attend[rows, kv_heads](
        qkv, torch.view_as_real(turn_N), out, *prompt, *own, prompt_of_row_N, length_P, at, qkv.stride(0),
        prompt[0].shape[1], own[0].shape[1], kv_heads=kv_heads, shared=shared, size=size,
        rows=max(16, triton.next_power_of_2(shared)), wide=max(16, triton.next_power_of_2(size)), block=_BLOCK,
    )  # fmt: skip
    return out


# --- the next token ---------------------------------------------------------------------------------------------------


@triton.jit
def _sums(logits_NV, most_NB, mass_NB, heated_NB, mixed_NB, row, words, blocks, heat, size: tl.constexpr):
    n, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = b * size + tl.arange(0, size)
    x = tl.load(logits_NV + n * row + t, mask=t < words, other=float("-inf")).to(tl.float32)
    most = tl.max(x, 0)
    above = x - tl.where(most == float("-inf"), 0.0, most)
    p = tl.exp(above)
    tl.store(most_NB + n * blocks + b, most)
    tl.store(mass_NB + n * blocks + b, tl.sum(p, 0))
    tl.store(heated_NB + n * blocks + b, tl.sum(tl.exp(above * heat), 0))
    tl.store(mixed_NB + n * blocks + b, tl.sum(tl.where(x == float("-inf"), 0.0, p * x), 0))


def choose(logits_NV: Tensor, uniform_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """`native.choose` without top_p: blocks of words are summed, one is drawn, then a word inside it; in float64."""
    rows, words = logits_NV.shape
    shape, heat = (rows, triton.cdiv(words, _WORDS)), 1.0 / temperature
    most_NB, mass_NB, heated_NB, mixed_NB = logits_NV.new_empty((4, *shape), dtype=torch.float32)
    _sums[shape](logits_NV, most_NB, mass_NB, heated_NB, mixed_NB, logits_NV.stride(0), words, shape[1], heat, size=_WORDS)
    most_N1 = most_NB.amax(-1, keepdim=True)
    below_NB = (most_NB - most_N1).double()
    mass_N, mixed_N = (torch.stack((mass_NB, mixed_NB)) * below_NB.exp()).sum(-1)
    lse_N = most_N1[:, 0] + mass_N.log()

    upto_NB = (heated_NB * (below_NB * heat).exp()).cumsum(-1)
    target_N1 = uniform_N[:, None] * upto_NB[:, -1:]
    block_N1 = torch.searchsorted(upto_NB, target_N1, right=True)
    at_NK = block_N1 * _WORDS + torch.arange(_WORDS, device=logits_NV.device)
    inside_NK = logits_NV.gather(-1, at_NK.clamp(max=words - 1)).float()
    p_NK = torch.where(at_NK < words, ((inside_NK - most_N1) * heat).double().exp(), 0.0)
    p_NK[:, :1] += torch.nn.functional.pad(upto_NB, (1, 0)).gather(-1, block_N1)
    upto_NK = p_NK.cumsum(-1)
    # Rounding may leave a block's end below the target: then the last token that is possible.
    last_N1 = torch.searchsorted(upto_NK, upto_NK[:, -1:].contiguous())
    within_N1 = torch.minimum(torch.searchsorted(upto_NK, target_N1, right=True), last_N1)
    token_N1 = block_N1 * _WORDS + within_N1
    logp_N = logits_NV.gather(-1, token_N1)[:, 0] - lse_N
    return token_N1[:, 0], logp_N.float(), (lse_N - mixed_N / mass_N).float()
