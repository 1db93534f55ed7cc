"""Rows through the model without padding, each prompt once: a forward pass over T flat tokens.

The rows of a micro-batch are trees: a prompt and its answers. Every layer but attention works on each token alone, so
the tokens stand in one flat line, prompts before answers, an answer's positions counted on from its prompt's; a few that
predict nothing fill it up (`rounded_up`). Attention takes its queries, keys and values out of that line into padded batches,
the prompts' own and the answers' over their prompt's keys and their own, calls torch's attention on them, and puts the
results back into the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from meml_lib.training.policy import Policy, Row
from meml_lib.training.tied import Tied

Head = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""From what the model holds at n places, and the output layer's weight [V, H] and bias [V], to the pass's result. The
model holds hidden states [n, H]; or its logits [n, V], and then there is no weight."""

MULTIPLE, COLUMNS = 32, 16
"""Of tokens in a pass and in a row of attention's batches: a product of bfloat16 on a CPU takes up to twice as long with some
odd sizes, and for every new one oneDNN compiles another, of which it keeps a part for good."""
_ATTENTION = "meml_packed"
# All but cuDNN's, which plans anew for each shape, and a pass's shapes are its own.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_TESTED = ("llama", "mistral", "qwen2", "qwen3")


def packs(model: PreTrainedModel) -> bool:
    """Whether the model's attention and output layer are known to be plain; others run padded (`Policy.logits`)."""
    plain = model.config.model_type in _TESTED and getattr(model.config, "sliding_window", None) is None
    return plain and isinstance(model.get_output_embeddings(), nn.Linear)


def rounded_up(tokens: int, multiple: int = MULTIPLE) -> int:
    """How many a product is given: the least multiple that is not smaller.

    >>> rounded_up(33), rounded_up(64), rounded_up(33, COLUMNS)
    (64, 64, 48)
    """
    return -(-tokens // multiple) * multiple


def trees(rows: Sequence[Row], budget: int) -> Iterator[list[int]]:
    """Split rows into micro-batches within a budget of tokens, a prompt counted once for all of its answers there.

    Args: budget: most tokens of a micro-batch; a row that exceeds it stands alone, and only a tree that does is split.
    Yields: row numbers, longest prompts first, a prompt's rows adjoining and the longest first; each row once.

    >>> a, b = (1, 1, 1), (2, 2)
    >>> list(trees([Row(a, (5, 5)), Row(b, (6,)), Row(a, (7, 7, 7)), Row(b, (8,))], budget=8))
    [[2, 0], [1, 3]]
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for n in sorted(range(len(rows)), key=lambda n: -len(rows[n].answer)):
        by_prompt.setdefault(rows[n].prompt, []).append(n)
    batch: list[int] = []
    left = budget
    for prompt, tree in sorted(by_prompt.items(), key=lambda item: -len(item[0])):
        whole, least = len(prompt) + sum(len(rows[n].answer) for n in tree), len(prompt) + len(rows[tree[0]].answer)
        if batch and (whole if whole <= budget else least) > left:
            yield batch
            batch, left = [], budget
        left -= len(prompt)
        for n in tree:
            if batch and len(rows[n].answer) > left:
                yield batch
                batch, left = [], budget - len(prompt)
            batch.append(n)
            left -= len(rows[n].answer)
    if batch:
        yield batch


def run(policy: Policy, model: nn.Module, rows: Sequence[Row], head: Head) -> Tensor:
    """Run the model over rows and give `head` what predicts their answers, row by row, token by token.

    Args:
      model: the policy's model, wrapped where one trains (DDP, FSDP), so that its hooks fire.
      rows: at least one. head: called once, inside the model's forward pass where the model packs.
    Returns: what `head` returns. Where the model packs, do the backward pass within the same `packed_attention`.
    """
    if not packs(policy.model):
        logits_NTV, _, mask_NT = policy.logits(rows, model=model)
        return head(logits_NTV[mask_NT], None, None)
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    parent_of = {prompt: i for i, prompt in enumerate(prompts)}
    parent_N = np.array([parent_of[row.prompt] for row in rows])
    prompt_tokens_P = np.array([len(prompt) for prompt in prompts])
    answer_tokens_N = np.array([len(row.answer) for row in rows])
    inputs = [*prompts, *(row.answer[:-1] for row in rows)]  # an answer's last token predicts nothing
    layout = Layout.of(prompt_tokens_P, answer_tokens_N - 1, parent_N, policy.model)
    first = [0] * len(prompts) + prompt_tokens_P[parent_N].tolist()
    start = np.cumsum([0, *map(len, inputs)])
    inputs.append((prompts[0][0],) * (len(layout.place_T) - int(start[-1])))
    positions = np.concatenate([np.arange(at, at + len(tokens)) for at, tokens in zip([*first, 0], inputs, strict=True)])
    # The prompt's last token predicts the answer's first.
    lasts, starts = start[1:][parent_N] - 1, start[len(prompts) : -1]
    places = zip(lasts, starts, answer_tokens_N, strict=True)
    predicts = np.concatenate([np.append(last, np.arange(at, at + n - 1)) for last, at, n in places])

    output, embedding = policy.model.get_output_embeddings(), policy.model.get_input_embeddings()
    changed, weight = [output], lambda: output.weight
    if embedding.weight is output.weight and type(embedding) is nn.Embedding and output.weight.requires_grad:
        tied = Tied()
        changed, weight = [output, embedding], lambda: tied.output(output.weight)
        embedding.forward = lambda token: tied.embed(embedding, token)
    output.forward = lambda hidden_1nH: head(hidden_1nH[0], weight(), output.bias)
    try:
        return model(
            input_ids=torch.tensor([[token for tokens in inputs for token in tokens]], device=policy.model.device),
            position_ids=torch.from_numpy(positions)[None].to(policy.model.device),
            logits_to_keep=torch.from_numpy(predicts).to(policy.model.device),
            use_cache=False,
            layout=layout,
        ).logits
    finally:
        for module in changed:
            del module.forward


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that packs attend as `attention` does; gradient checkpointing runs it in the backward pass too."""
    before = model.config._attn_implementation
    if packs(model):
        model.config._attn_implementation = _ATTENTION
    try:
        with sdpa_kernel(_BACKENDS):
            yield
    finally:
        model.config._attn_implementation = before


@dataclass(frozen=True)
class Layout:
    """Where each of T flat tokens, those that fill the line up included, stands once prompts [P, Tp] and answers are padded;
    answers in buckets [N, Ta] of similar length. The padded places of all of them, one batch after the other, are numbered by R."""

    token_R: Tensor
    """The flat token of each padded place; any where it is padding."""
    place_T: Tensor
    """The padded place of each flat token."""
    padding: Tensor
    """The padded places that hold no token."""
    shapes: list[tuple[int, int]]
    """[P, Tp], then [N, Ta] of each bucket."""
    parent_N: list[Tensor]
    """Of each bucket: each answer's prompt."""
    mask_PP: Tensor
    """Whether a prompt's token sees an earlier one. For torch's attention bool; for a CPU's products 0 or -inf."""
    mask_N1QK: list[Tensor]
    """Of each bucket, the same of an answer's token (Q = Ta) and one of its prompt or answer (K = Tp + Ta)."""

    @classmethod
    def of(cls, prompt_tokens_P: np.ndarray, answer_tokens_N: np.ndarray, parent_N: np.ndarray, model: PreTrainedModel) -> Layout:
        """Args: tokens of each prompt and answer, which stand in this order in the flat line; each answer's prompt; the
        model that computes."""
        lengths = np.concatenate([prompt_tokens_P, answer_tokens_N])
        start = np.cumsum(lengths) - lengths
        answers = np.flatnonzero(answer_tokens_N)
        # A bucket's answers are at least half as long as its longest, once rounded up.
        rounded_N = rounded_up(answer_tokens_N, COLUMNS)
        halvings = np.log2(rounded_N.max(initial=1) / rounded_N[answers]).astype(int)
        buckets = [answers[halvings == h] for h in np.unique(halvings)]
        batches = [np.arange(len(prompt_tokens_P)), *(len(prompt_tokens_P) + bucket for bucket in buckets)]
        widths = [rounded_up(lengths[batch].max(), COLUMNS) for batch in batches]
        tokens = lengths.sum()
        filling = rounded_up(tokens) - tokens
        missing = rounded_up(tokens) - sum(len(batch) * width for batch, width in zip(batches, widths, strict=True))
        widths[-1] += rounded_up(-(-max(0, missing) // len(batches[-1])), COLUMNS)
        token_R, shapes = [], []
        for batch, width in zip(batches, widths, strict=True):
            column_T = np.arange(width)
            token_NT = np.where(column_T < lengths[batch, None], start[batch, None] + column_T, -1)
            token_R.append(token_NT.ravel())
            shapes.append(token_NT.shape)
        prompt_NT = np.arange(shapes[0][1]) < prompt_tokens_P[:, None]
        masks = [np.tri(shapes[0][1], dtype=bool)]
        for bucket, (n, width) in zip(buckets, shapes[1:], strict=True):
            prompt_NQK = np.broadcast_to(prompt_NT[parent_N[bucket], None], (n, width, shapes[0][1]))
            own_NQK = np.broadcast_to(np.tri(width, dtype=bool), (n, width, width))
            masks.append(np.concatenate([prompt_NQK, own_NQK], -1)[:, None])
        token_R = np.concatenate(token_R)
        # What fills the line up stands where only other padding sees it.
        token_R[np.flatnonzero(token_R < 0)[:filling]] = tokens + np.arange(filling)
        held = np.flatnonzero(token_R >= 0)
        place_T = np.empty(len(held), dtype=np.int64)
        place_T[token_R[held]] = held
        numbers = [token_R.clip(0), place_T, np.flatnonzero(token_R < 0), *(parent_N[bucket] for bucket in buckets)]
        token_R, place_T, padding, *parents = (torch.from_numpy(x).to(model.device) for x in numbers)
        masks = [torch.from_numpy(mask).to(model.device) for mask in masks]
        if model.device.type == "cpu":
            masks = [torch.zeros(mask.shape, dtype=model.dtype).masked_fill_(~mask, -torch.inf) for mask in masks]
        return cls(token_R, place_T, padding, shapes, parents, *masks[:1], masks[1:])

    def pad(self, x_1HTD: Tensor) -> list[Tensor]:
        """[1, heads, T, D] -> [P, Tp, heads, D], then [N, Ta, heads, D] of each bucket."""
        _, heads, tokens, size = x_1HTD.shape
        x_RF = _Move.apply(x_1HTD.transpose(1, 2).reshape(tokens, heads * size), self.token_R, self.place_T, None)
        return [
            x_NF.view(*shape, heads, size)
            for x_NF, shape in zip(x_RF.split([n * width for n, width in self.shapes]), self.shapes, strict=True)
        ]

    def flat(self, batches: Sequence[Tensor]) -> Tensor:
        """The way back: [P, Tp, heads, D], [N, Ta, heads, D], ... -> [1, T, heads, D]."""
        heads, size = batches[0].shape[2:]
        x_RF = torch.cat([x.reshape(-1, heads * size) for x in batches])
        return _Move.apply(x_RF, self.place_T, self.token_R, self.padding).view(1, -1, heads, size)


class _Move(torch.autograd.Function):
    """Take rows by number. No row is wanted twice, so the gradient is taken the way back and nothing is summed."""

    @staticmethod
    def forward(ctx, x_SF: Tensor, taken_R: Tensor, back_S: Tensor, padding: Tensor | None) -> Tensor:
        ctx.save_for_backward(back_S, padding)
        return x_SF.index_select(0, taken_R)

    @staticmethod
    def backward(ctx, grad_RF: Tensor):
        back_S, padding = ctx.saved_tensors
        grad_SF = grad_RF.index_select(0, back_S)
        return (grad_SF if padding is None else grad_SF.index_fill_(0, padding, 0.0)), None, None, None


class _Shared(torch.autograd.Function):
    """Take rows by number, some more than once. Their gradients are summed in a product: torch's own sums one number at a
    time on a CPU, and in any order on CUDA."""

    @staticmethod
    def forward(ctx, x_PF: Tensor, taken_N: Tensor) -> Tensor:
        ctx.save_for_backward(taken_N)
        ctx.rows = len(x_PF)
        return x_PF.index_select(0, taken_N)

    @staticmethod
    def backward(ctx, grad_NF: Tensor):
        (taken_N,) = ctx.saved_tensors
        taken_PN = (taken_N == torch.arange(ctx.rows, device=taken_N.device)[:, None]).to(grad_NF.dtype)
        return (taken_PN @ grad_NF.flatten(1)).view(-1, *grad_NF.shape[1:]), None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    scaling: float,
    dropout: float = 0.0,
    **unused,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it, over flat tokens: [1, heads, T, D] -> [1, T, heads, D]."""
    (query_PT, *queries), (key_PT, *keys), (value_PT, *values) = (layout.pad(x) for x in (query, key, value))
    attend = _products if query.device.type == "cpu" else _fused
    out = [attend(query_PT, key_PT, value_PT, layout.mask_PP, scaling, dropout)]
    buckets = zip(queries, keys, values, layout.parent_N, layout.mask_N1QK, strict=True)
    for query_NT, key_NT, value_NT, parent_N, mask_N1QK in buckets:
        key_NT = torch.cat([_Shared.apply(key_PT, parent_N), key_NT], 1)
        value_NT = torch.cat([_Shared.apply(value_PT, parent_N), value_NT], 1)
        out.append(attend(query_NT, key_NT, value_NT, mask_N1QK, scaling, dropout))
    return layout.flat(out), None


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    """torch's attention over [N, T, heads, D]; fewer heads of keys and values are shared by those of queries."""
    causal = mask.ndim == 2
    options = {"is_causal": True} if causal else {"attn_mask": mask}
    if not causal:  # CUDA's fused kernels take a mask or shared heads, not both
        key, value = (x.repeat_interleave(query.shape[2] // key.shape[2], 2) for x in (key, value))
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    options |= {"scale": scale, "dropout_p": dropout, "enable_gqa": query.shape[2] != key.shape[2]}
    return nn.functional.scaled_dot_product_attention(*heads_first, **options).transpose(1, 2)


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    """The same by two products and a softmax. Where a CPU multiplies in bfloat16, this takes a third of the fused kernel's
    time there, forward and back; in float32 nine tenths."""
    n, tokens, heads, size = query.shape
    shared = key.shape[2]
    q = (query * scale).view(n, tokens, shared, -1, size).permute(0, 2, 3, 1, 4).reshape(n * shared, -1, size)
    k, v = key.permute(0, 2, 3, 1).reshape(n * shared, size, -1), value.transpose(1, 2).reshape(n * shared, -1, size)
    p = ((q @ k).view(n, heads, tokens, -1) + mask).softmax(-1)
    p = nn.functional.dropout(p, dropout) if dropout else p
    return (p.view(n * shared, -1, p.shape[-1]) @ v).view(n, heads, tokens, size).transpose(1, 2)


AttentionInterface.register(_ATTENTION, attention)
AttentionMaskInterface.register(_ATTENTION, lambda *args, **options: None)  # the layout holds the masks
