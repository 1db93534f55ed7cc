"""Sampling from the trainer's own weights with transformers' forward pass: nothing to synchronise.

Each unique prompt is prefilled once, the answers' cache is reserved ahead, and finished rows leave the batch.
A token is drawn by inverting the cumulative distribution at one uniform number per row and position, so that a draw
costs no random number per vocabulary entry and depends on its key alone (`rollouts.uniforms`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from meml_lib.rollouts import Rollout

_REFILL = 7 / 8  # finished rows are dropped once fewer rows than this share are alive; dropping copies the cache


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
    if any(not prompt for prompt in prompts):
        raise ValueError(f"prompt {[len(prompt) for prompt in prompts].index(0)} is empty; it needs at least 1 token")
    if uniform_NT.shape != (len(prompts), max_answer_tokens):
        raise ValueError(f"uniform_NT has shape {uniform_NT.shape}, want {(len(prompts), max_answer_tokens)}")
    by_length = sorted(range(len(prompts)), key=lambda n: (len(prompts[n]), tuple(prompts[n])))  # equal ones adjoin
    rollouts: list[Rollout | None] = [None] * len(prompts)
    for start in range(0, len(prompts), rows_per_batch):
        rows = by_length[start : start + rows_per_batch]
        batch = _sample_batch(model, [tuple(prompts[n]) for n in rows], uniform_NT[rows], end_ids, temperature, top_p)
        for n, rollout in zip(rows, batch, strict=True):
            rollouts[n] = rollout
    return rollouts


def _sample_batch(model, prompts, uniform_NT, end_ids, temperature, top_p) -> list[Rollout]:
    device, (rows, max_answer_tokens) = model.device, uniform_NT.shape
    uniform_NT = torch.from_numpy(uniform_NT).to(device)
    ends = torch.tensor(tuple(end_ids), device=device)
    unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_of_row_N = torch.tensor([unique[prompt] for prompt in prompts], device=device)

    cache, logits_PV, prompt_mask_PT = _prefill(model, list(unique))
    _reserve(cache, prompt_of_row_N, max_answer_tokens)
    logits_NV = logits_PV[prompt_of_row_N]
    mask_NT = torch.nn.functional.pad(prompt_mask_PT[prompt_of_row_N], (0, max_answer_tokens), value=1)
    position_N = prompt_mask_PT.sum(-1)[prompt_of_row_N]

    token_NT = torch.zeros(rows, max_answer_tokens, dtype=torch.long, device=device)
    logp_NT, entropy_NT = torch.zeros(2, rows, max_answer_tokens, device=device)
    length_N = torch.full((rows,), max_answer_tokens, device=device)
    ended_N = torch.zeros(rows, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)  # the original row of each row still in the batch

    for t in range(max_answer_tokens):
        logp_NV = logits_NV.float().log_softmax(-1)
        token_N = draw(logp_NV, uniform_NT[alive, t], temperature=temperature, top_p=top_p)
        token_NT[alive, t] = token_N
        logp_NT[alive, t] = logp_NV.gather(-1, token_N[:, None])[:, 0]
        entropy_NT[alive, t] = torch.special.entr(logp_NV.exp()).sum(-1)
        stops_N = torch.isin(token_N, ends) & ~ended_N[alive]  # a finished row may stay until the next refill
        length_N[alive[stops_N]] = t + 1
        ended_N[alive[stops_N]] = True

        stay = (~ended_N[alive]).nonzero()[:, 0]
        if len(stay) == 0 or t + 1 == max_answer_tokens:
            break
        if len(stay) <= _REFILL * len(alive):
            alive, token_N, mask_NT, position_N = alive[stay], token_N[stay], mask_NT[stay], position_N[stay]
            cache.batch_select_indices(stay)
        width = prompt_mask_PT.shape[1] + t + 1
        logits_NV = model(
            input_ids=token_N[:, None],
            attention_mask=mask_NT[:, :width],
            position_ids=(position_N + t)[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    lengths, ended = length_N.tolist(), ended_N.tolist()
    tokens, logps, entropies = token_NT.tolist(), logp_NT.tolist(), entropy_NT.tolist()
    return [
        Rollout(tuple(tokens[n][:k]), tuple(logps[n][:k]), sum(entropies[n][:k]) / k, ended[n])
        for n, k in enumerate(lengths)
    ]


def draw(logp_NV: Tensor, uniform_N: Tensor, *, temperature: float | None, top_p: float | None) -> Tensor:
    """One token a row: the first whose cumulative probability exceeds the row's uniform number.

    Args:
      logp_NV: nats, normalised. uniform_N: float64 in [0, 1).
      temperature: > 0, or None for the most likely token.
      top_p: keeps the smallest set of most likely tokens that holds this mass; None keeps all, without sorting.
    Returns: [N] token ids.

    >>> logp = torch.tensor([[0.2, 0.5, 0.3]]).log()
    >>> [draw(logp, torch.tensor([u], dtype=torch.float64), temperature=1.0, top_p=None).item() for u in (0.19, 0.21, 0.71)]
    [0, 1, 2]
    """
    if temperature is None:
        return logp_NV.argmax(-1)
    p_NV = logp_NV.softmax(-1) if temperature == 1.0 else (logp_NV / temperature).softmax(-1)
    if top_p is not None and top_p < 1.0:
        sorted_NV, order_NV = p_NV.sort(-1, descending=True)
        outside_NV = sorted_NV.cumsum(-1) - sorted_NV >= top_p  # the mass before a token already suffices
        p_NV = p_NV.masked_fill(torch.zeros_like(outside_NV).scatter(-1, order_NV, outside_NV), 0.0)
    cumulative_NV = p_NV.double().cumsum(-1)
    # Scaled by the sum, which rounding leaves near 1; below it even for the largest uniform, so that an entry is found.
    return torch.searchsorted(cumulative_NV, (uniform_N * cumulative_NV[:, -1])[:, None], right=True)[:, 0]


def _prefill(model: PreTrainedModel, prompts: list[tuple[int, ...]]) -> tuple[DynamicCache, Tensor, Tensor]:
    """Run P prompts once, padded on the left. Returns their cache, the next token's logits [P, V] and the mask [P, T]."""
    width = max(map(len, prompts))
    mask_PT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    ids_PT = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    cache = DynamicCache(config=model.config)
    logits_PV = model(
        input_ids=ids_PT,
        attention_mask=mask_PT,
        position_ids=(mask_PT.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return cache, logits_PV, mask_PT


class _ReservedLayer(DynamicLayer):
    """A cache layer with room for the whole answer: a decode step writes one column and copies nothing."""

    def __init__(self, layer: DynamicLayer, prompt_of_row_N: Tensor, room: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self._length = layer.keys.shape[-2]
        # Zeros, not empty: a masked position still enters attention's product, where 0 times a stray nan is nan.
        self._store = [torch.nn.functional.pad(kv[prompt_of_row_N], (0, 0, 0, room)) for kv in (layer.keys, layer.values)]
        self._view()

    def _view(self) -> None:
        self.keys, self.values = (kv[:, :, : self._length] for kv in self._store)

    def update(self, key_states, value_states, *args, **kwargs):
        end = self._length + key_states.shape[-2]
        for store, states in zip(self._store, (key_states, value_states), strict=True):
            store[:, :, self._length : end] = states
        self._length = end
        self._view()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._store = [kv[indices] for kv in self._store]
        self._view()


def _reserve(cache: DynamicCache, prompt_of_row_N: Tensor, room: int) -> None:
    """Give each row its copy of its prompt's cache; full-attention layers also get room for the answer."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = _ReservedLayer(layer, prompt_of_row_N, room)
        else:  # a sliding window keeps its own, bounded store
            layer.batch_select_indices(prompt_of_row_N)
