"""The gradient of a weight that embeds and gives logits, in one block instead of two: each is as long as the vocabulary.

The output layer's part is made first, in a backward pass, and is waited for where it goes on to the weight. It goes through
the embedding instead, whose own part is added to the rows of the few tokens that were looked up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Tied:
    """Of one forward pass, which embeds, and later gives logits, once."""

    def __init__(self):
        self.of_output: Tensor | None = None

    def output(self, weight: Tensor) -> Tensor:
        """The weight, whose gradient by what follows `embed` hands on."""
        return _Output.apply(weight, self)

    def embed(self, module: nn.Embedding, token: Tensor) -> Tensor:
        return _Embedding.apply(token, module.weight, module.padding_idx, self)


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, tied: Tied) -> Tensor:
        ctx.tied = tied
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        # `AnswerLoss` made it for this weight alone: it may be added to.
        before = ctx.tied.of_output
        ctx.tied.of_output = grad.contiguous() if before is None else before.add_(grad)
        return None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token: Tensor, weight: Tensor, padding: int | None, tied: Tied) -> Tensor:
        ctx.save_for_backward(token)
        ctx.shape, ctx.padding, ctx.tied = weight.shape, padding, tied
        return functional.embedding(token, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (token,), total = ctx.saved_tensors, ctx.tied.of_output
        total, ctx.tied.of_output = grad.new_zeros(ctx.shape) if total is None else total, None
        grad = grad if ctx.padding is None else grad.masked_fill((token == ctx.padding)[..., None], 0.0)
        # The rows of equal tokens are summed in float32. How many are different could only be known by waiting for the device:
        # there is a place for every token, and what is left over holds zeros.
        ordered, order = token.flatten().sort(stable=True)
        place = functional.pad(ordered.diff() != 0, (1, 0)).cumsum(0)
        found = ordered.scatter(0, place, ordered)
        place = torch.empty_like(place).scatter_(0, order, place)
        rows = torch.ops.aten.embedding_dense_backward(grad.flatten(0, -2).float(), place, len(found), -1, False)
        return None, total.index_add_(0, found, rows.to(total.dtype)), None, None
