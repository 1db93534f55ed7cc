"""Sampling from the trainer's own weights: nothing to synchronise.

Each unique prompt is prefilled once, the answers' cache is reserved ahead, and finished rows leave the batch.
A token is drawn by inverting the cumulative distribution at one uniform number per row and position, so that a draw
costs no random number per vocabulary entry and depends on its key alone (`rollouts.uniforms`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from meml_lib.rollouts import Rollout, check, cpu, decoder
from meml_lib.rollouts.forward import Forward

# CUDA's rows are looked at rarely, since looking is waiting, and leave rarely, since a graph is then recorded anew.
_CHECK, _CUDA_CHECK = 1, 8  # tokens between two looks at which rows have finished
_REFILL, _CUDA_REFILL = 7 / 8, 1 / 2  # finished rows leave when fewer than this share are alive; the cache is copied
ENTRIES, CUDA_ENTRIES = 2**18, 2**25  # of [N, V], that a draw works on at a time

_IN_BLOCKS = 4096  # words from which sums of blocks are worth it


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    uniform_NT: np.ndarray,
    end_ids: Sequence[int],
    max_answer_tokens: int,
    rows_per_batch: int,
    temperature: float | None,
    top_p: float | None = None,
) -> list[Rollout]:
    """Answer each prompt once; equal prompts share their prefill.

    Args:
      model: a causal language model, on its device; set to eval mode by the caller.
      prompts: N token id lists, none empty.
      uniform_NT: float64 in [0, 1), [N, max_answer_tokens]; unused where temperature is None.
      end_ids: tokens that end an answer; each is part of the answer that it ends.
      max_answer_tokens: an answer that has not ended by then is returned with `ended` False.
      rows_per_batch: rows decoded side by side.
      temperature: > 0, or None for greedy.
      top_p: nucleus in (0, 1]; None is off.
    Returns: N rollouts, in the order of `prompts`.
    Raises: ValueError for an empty prompt or a uniform_NT of another shape.
    """
    check(prompts, uniform_NT, max_answer_tokens)
    if decoder.fits(model, max(map(len, prompts), default=0) + max_answer_tokens):
        engine, source = decoder.Decoder, decoder.Weights(model)
    else:
        engine, source = Forward, model
    by_length = sorted(range(len(prompts)), key=lambda n: (len(prompts[n]), tuple(prompts[n])))  # equal ones adjoin
    rollouts: list[Rollout | None] = [None] * len(prompts)
    for start in range(0, len(prompts), rows_per_batch):
        rows = by_length[start : start + rows_per_batch]
        unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(prompts[n]) for n in rows))}
        answers = engine(source, list(unique), [unique[tuple(prompts[n])] for n in rows], max_answer_tokens)
        uniform = torch.from_numpy(uniform_NT[rows]).to(model.device)
        for n, rollout in zip(rows, _decode(answers, uniform, end_ids, temperature, top_p), strict=True):
            rollouts[n] = rollout
    return rollouts


def _decode(answers: decoder.Decoder | Forward, uniform_NT, end_ids, temperature, top_p) -> list[Rollout]:
    device, (rows, limit) = uniform_NT.device, uniform_NT.shape
    check, refill = (_CUDA_CHECK, _CUDA_REFILL) if device.type == "cuda" else (_CHECK, _REFILL)
    ends = torch.tensor(tuple(end_ids), device=device)
    uniform_TN = uniform_NT.T.contiguous()
    token_TN = torch.zeros(limit, rows, dtype=torch.long, device=device)
    logp_TN, entropy_TN = torch.zeros(2, limit, rows, device=device)
    alive = torch.arange(rows, device=device)  # the original row of each row still in the batch
    ended_N = torch.zeros(rows, dtype=torch.bool, device=device)  # of those
    logits_NV = answers.logits_NV

    for t in range(limit):
        token_N, logp_N, entropy_N = choose(logits_NV, uniform_TN[t, alive], temperature=temperature, top_p=top_p)
        for told_TN, told_N in ((token_TN, token_N), (logp_TN, logp_N), (entropy_TN, entropy_N)):
            told_TN[t].index_copy_(0, alive, told_N)
        ended_N = ended_N | (token_N[:, None] == ends).any(-1)
        if t + 1 == limit:
            break
        if (t + 1) % check == 0:
            stay = (~ended_N).nonzero()[:, 0]
            if len(stay) == 0:
                break
            if len(stay) <= refill * len(alive):
                alive, token_N, ended_N = alive[stay], token_N[stay], ended_N[stay]
                answers.keep(stay)
        logits_NV = answers.step(token_N)

    # A row that had ended may have gone on until the next look; what came after its first end token is not its answer.
    is_end_TN = torch.isin(token_TN, ends)
    ended = is_end_TN.any(0).tolist()
    lengths = torch.where(is_end_TN.any(0), is_end_TN.int().argmax(0) + 1, limit).tolist()
    tokens, logps, entropies = token_TN.T.tolist(), logp_TN.T.tolist(), entropy_TN.T.tolist()
    return [
        Rollout(tuple(tokens[n][:k]), tuple(logps[n][:k]), sum(entropies[n][:k]) / k, ended[n])
        for n, k in enumerate(lengths)
    ]


def choose(
    logits_NV: Tensor, uniform_N: Tensor, *, temperature: float | None, top_p: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of each row, and what the policy at temperature 1 says of it, in few passes over the vocabulary.

    By compiled loops where there are; by torch a few rows at a time, whose copies stay in the processor's cache.

    Args:
      logits_NV: float; an impossible token's is -inf. uniform_N: float64 in [0, 1).
      temperature: > 0, or None for the most likely token. top_p: see `draw`.
    Returns: [N] token ids; their log-probabilities and the distributions' entropies, in nats.
    """
    if top_p in (None, 1.0):
        if logits_NV.is_cuda and temperature is not None:
            from meml_lib.rollouts import kernels

            return kernels.choose(logits_NV, uniform_N, temperature)
        if cpu.serves(logits_NV.device):
            return cpu.choose(logits_NV, uniform_N, temperature)
    rows = max(1, (CUDA_ENTRIES if logits_NV.is_cuda else ENTRIES) // logits_NV.shape[1])
    chunks = zip(logits_NV.split(rows), uniform_N.split(rows), strict=True)
    told = [_choose(logits_nV.float(), uniform_n, temperature, top_p) for logits_nV, uniform_n in chunks]
    return told[0] if len(told) == 1 else tuple(map(torch.cat, zip(*told, strict=True)))


def _choose(logits_NV: Tensor, uniform_N: Tensor, temperature, top_p) -> tuple[Tensor, Tensor, Tensor]:
    p_NV = logits_NV.softmax(-1)
    if temperature is None:
        token_N = logits_NV.argmax(-1)
    else:
        heated_NV = p_NV if temperature == 1.0 else (logits_NV / temperature).softmax(-1)
        token_N = draw(heated_NV, uniform_N, top_p=top_p)
    lse_N = logits_NV.amax(-1) - p_NV.amax(-1).log()
    logp_N = logits_NV.gather(-1, token_N[:, None])[:, 0] - lse_N
    # Entropy is E[-log p] = lse - E[logit]; finite, since 0 times an impossible token's -inf is nan.
    entropy_N = lse_N - torch.linalg.vecdot(p_NV, logits_NV.clamp(min=torch.finfo(torch.float32).min))
    return token_N, logp_N, entropy_N


def draw(p_NV: Tensor, uniform_N: Tensor, *, top_p: float | None) -> Tensor:
    """One token a row: the first whose cumulative probability exceeds the row's uniform number.

    The sums are float64; of many words in two levels, of blocks and inside the block that is hit: a tenth of the work.

    Args:
      p_NV: probabilities, float32. uniform_N: float64 in [0, 1).
      top_p: keeps the smallest set of most likely tokens that holds this mass; None keeps all, without sorting.
    Returns: [N] token ids.

    >>> p = torch.tensor([[0.2, 0.5, 0.3]])
    >>> [draw(p, torch.tensor([u], dtype=torch.float64), top_p=None).item() for u in (0.19, 0.21, 0.71)]
    [0, 1, 2]
    """
    if top_p is not None and top_p < 1.0:
        sorted_NV, order_NV = p_NV.sort(-1, descending=True)
        outside_NV = sorted_NV.cumsum(-1) - sorted_NV >= top_p  # the mass before a token already suffices
        p_NV = p_NV.masked_fill(torch.zeros_like(outside_NV).scatter(-1, order_NV, outside_NV), 0.0)
    rows, words = p_NV.shape
    size = next(k for k in range(math.isqrt(words), 0, -1) if words % k == 0) if words >= _IN_BLOCKS else 1
    p_NBK = p_NV.reshape(rows, -1, size)
    upto_NB = (p_NV if size == 1 else p_NBK.sum(-1, dtype=torch.float64)).cumsum(-1, dtype=torch.float64)
    # Scaled by the sum, which rounding leaves near 1; below it even for the largest uniform, so that an entry is found.
    target_N1 = (uniform_N * upto_NB[:, -1])[:, None]
    block_N1 = torch.searchsorted(upto_NB, target_N1, right=True)
    if size == 1:
        return block_N1[:, 0]
    p_NK = p_NBK.take_along_dim(block_N1[..., None], 1)[:, 0].double()
    p_NK[:, :1] += F.pad(upto_NB, (1, 0)).gather(-1, block_N1)
    upto_NK = p_NK.cumsum(-1)
    # Rounding may leave a block's end below the target: then the last token that is possible.
    last_N1 = torch.searchsorted(upto_NK, upto_NK[:, -1:].contiguous())
    within_N1 = torch.minimum(torch.searchsorted(upto_NK, target_N1, right=True), last_N1)
    return (block_N1 * size + within_N1)[:, 0]
