"""A causal language model run by transformers: prompts through its forward pass, and answers too where need be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from meml_lib.rollouts import products


def _next(model: PreTrainedModel, cache: DynamicCache, **inputs: Tensor) -> Tensor:
    """The next token's logits [N, V]; what is run joins the cache."""
    with products.in_float32(model.dtype, model.device):
        return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def _prefill(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> tuple[DynamicCache, Tensor, Tensor]:
    """Run P prompts once, padded on the left.

    Returns: their cache, the next token's logits [P, V], and the mask [P, T], 1 on a prompt's tokens.
    """
    width = max(map(len, prompts))
    mask_PT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    ids_PT = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    cache = DynamicCache(config=model.config)
    positions_PT = (mask_PT.cumsum(-1) - 1).clamp(min=0)
    logits_PV = _next(model, cache, input_ids=ids_PT, attention_mask=mask_PT, position_ids=positions_PT)
    return cache, logits_PV, mask_PT


class Forward:
    """Answers of any causal language model, a token of every row at a time: transformers' own forward pass.

    Args:
      prompts: P, unequal. prompt_of_row: N indices into them. room: most tokens of an answer.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], prompt_of_row: list[int], room: int):
        self._model, self._step = model, 0
        self._cache, logits_PV, mask_PT = _prefill(model, prompts)
        row_N = torch.tensor(prompt_of_row, device=model.device)
        _reserve(self._cache, row_N, room)
        self.logits_NV = logits_PV[row_N]
        """The first token's."""
        self._prompt_tokens = mask_PT.shape[1]
        self._mask_NT = torch.nn.functional.pad(mask_PT[row_N], (0, room), value=1)
        self._position_N = mask_PT.sum(-1)[row_N]

    def step(self, token_N: Tensor) -> Tensor:
        """Append a token to every row. Returns: the next one's logits [N, V]."""
        self._step += 1
        return _next(
            self._model,
            self._cache,
            input_ids=token_N[:, None],
            attention_mask=self._mask_NT[:, : self._prompt_tokens + self._step],
            position_ids=(self._position_N + self._step - 1)[:, None],
        )

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self._mask_NT, self._position_N = self._mask_NT[rows], self._position_N[rows]
        self._cache.batch_select_indices(rows)


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
