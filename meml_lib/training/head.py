"""The losses of a micro-batch at its answers' tokens, some of them at a time, and their gradient in the same go.

Logits are as wide as the vocabulary: a micro-batch's would often outweigh the model. They are computed once, in slabs;
a slab gives its losses, its own memory takes their gradient, and it is gone before the next. The backward pass only
hands the gradients on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from meml_lib.rollouts import cpu, pages, products
from meml_lib.training.losses import Part, WeighedRow
from meml_lib.training.packing import MULTIPLE, rounded_up
from meml_lib.training.policy import Row

SLAB_BYTES, CUDA_SLAB_BYTES = 2**28, 2**30
"""Of a slab's logits, in the model's dtype; the more tokens, the faster the matrix products."""
CHUNK_BYTES, CUDA_CHUNK_BYTES = 2**24, 2**28
"""Of a chunk of a slab in float32, about twice alive, where no compiled loops do without. A CPU's stays in its caches; a GPU
needs many rows to be busy."""


@dataclass(frozen=True)
class Use:
    """What one part of the objective makes of a row."""

    part: int
    row: WeighedRow
    weight: float
    """Of a token, see `losses.token_weights`."""

    @property
    def best_row(self) -> Row:
        return Row(self.row.best_prompt, self.row.row.answer)


@dataclass(frozen=True)
class _Term:
    """A part's k tokens among a micro-batch's n answer tokens; on the CPU, since chunks are cut there."""

    part: int
    at_k: Tensor
    weight_k: Tensor
    best_k: Tensor
    """The best expert's log-probability of each, or the place of its distribution; empty where neither is wanted."""

    def within(self, start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        inside_k = (self.at_k >= start) & (self.at_k < end)
        best_k = self.best_k[inside_k] if len(self.best_k) else self.best_k
        return tuple(x.to(device) for x in (self.at_k[inside_k] - start, self.weight_k[inside_k], best_k))


class AnswerLoss:
    """sum over parts of scale * loss, over a micro-batch's answer tokens: a `packing.Head`.

    Args:
      parts: of the objective. scales: what the sum takes each part's loss times.
      rows: of the micro-batch. uses: of each row, at least one.
      best_rows: different ones, the best expert's rows for parts against "distributions"; best_mF: what the model holds
        at their answers' tokens.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        scales: Sequence[float],
        rows: Sequence[Row],
        uses: Sequence[Sequence[Use]],
        best_rows: Sequence[Row],
        best_mF: Tensor | None,
    ):
        self._parts, self._scales, self._best_mF = parts, scales, best_mF
        self._token_n = torch.tensor([token for row in rows for token in row.answer])
        self.losses = torch.zeros(len(parts))
        """Of each part, without its scale; nats."""
        best_places = dict(zip(best_rows, _places(best_rows), strict=True))
        placed = [(place, use) for place, of_row in zip(_places(rows), uses, strict=True) for use in of_row]
        self._terms = []
        for i, part in enumerate(parts):
            used = [(place, use) for place, use in placed if use.part == i]
            if used:
                best = [torch.empty(0)]
                if part.against == "rollouts":
                    best = [torch.tensor(use.row.best_logp) for _, use in used]
                elif part.against == "distributions":
                    best = [best_places[use.best_row] for _, use in used]
                weight_k = torch.cat([torch.full((len(place),), use.weight) for place, use in used])
                at_k = torch.cat([place for place, _ in used])
                self._terms.append(_Term(i, at_k, weight_k, torch.cat(best)))

    def __call__(self, x_nF: Tensor, weight_VF: Tensor | None, bias_V: Tensor | None) -> Tensor:
        self._token_n, self.losses = self._token_n.to(x_nF.device), self.losses.to(x_nF.device)
        return _InSlabs.apply(x_nF, weight_VF, bias_V, self)

    def of(self, logits_cV: Tensor, start: int, head: Callable[[Tensor], Tensor]) -> Tensor:
        """The scaled sum over the answer tokens from `start` on; their logits become its gradient by them."""
        end = start + len(logits_cV)
        scored = _scored_compiled if self.is_compiled(logits_cV) else _scored
        logp_c1, wide_cV, give_gradient = scored(logits_cV, self._token_n[start:end], self._best_mF is not None)
        with torch.enable_grad():
            total = 0.0
            for term in self._terms:
                at_k, weight_k, best_k = term.within(start, end, logits_cV.device)
                part = self._parts[term.part]
                seen = [logp_c1[at_k]]  # each token is a row of its own: [N, T] = [k, 1]
                if part.against == "rollouts":
                    seen.append(best_k[:, None])
                elif part.against == "distributions":
                    best_kV = head(self._best_mF[best_k]).float().log_softmax(-1)
                    seen = [wide_cV[0][at_k, None], best_kV[:, None]]
                loss = part.formula(*seen, torch.ones(len(at_k), 1, dtype=torch.bool, device=at_k.device), weight_k)
                self.losses[term.part] += loss.detach()
                total = total + self._scales[term.part] * loss
        give_gradient(*torch.autograd.grad(total, [logp_c1, *wide_cV], materialize_grads=True))
        return total.detach()

    def is_compiled(self, x: Tensor) -> bool:
        """Whether compiled loops make probabilities and gradients of such logits, without copies of them."""
        return self._best_mF is None and cpu.serves(x.device, x.dtype)


def _scored(logits_cV: Tensor, token_c: Tensor, wide: bool) -> tuple[Tensor, list[Tensor], Callable[..., None]]:
    """Returns: log-probabilities [c, 1] of the tokens and, if wanted, of all words [c, V], both to be differentiated by;
    and what takes these gradients and writes that by the logits in their place."""
    exact_cV, token_c1 = logits_cV.float(), token_c[:, None]
    p_cV = exact_cV.softmax(-1)
    # The largest probability is exp(largest logit - logsumexp): no further pass of exponentials.
    lse_c1 = exact_cV.amax(-1, keepdim=True) - p_cV.amax(-1, keepdim=True).log()

    def give_gradient(grad_c1: Tensor, *wide_grad_cV: Tensor) -> None:
        # log p = logits - logsumexp(logits): a gradient g by log p is g - sum(g) p by the logits.
        sum_c1 = sum((g_cV.sum(-1, keepdim=True) for g_cV in wide_grad_cV), grad_c1)
        grad_cV = p_cV.mul_(-sum_c1)
        for g_cV in wide_grad_cV:
            grad_cV += g_cV
        logits_cV.copy_(grad_cV.scatter_add_(-1, token_c1, grad_c1))

    logp_c1 = (exact_cV.gather(-1, token_c1) - lse_c1).requires_grad_()
    return logp_c1, [(exact_cV - lse_c1).requires_grad_()] if wide else [], give_gradient


def _scored_compiled(logits_cV: Tensor, token_c: Tensor, wide: bool) -> tuple[Tensor, list[Tensor], Callable[..., None]]:
    lse_c, logp_c = cpu.score(logits_cV, token_c)
    return logp_c[:, None].requires_grad_(), [], lambda grad_c1: cpu.score_back(logits_cV, token_c, lse_c, grad_c1[:, 0])


class _InSlabs(torch.autograd.Function):
    """`AnswerLoss.of`, slab after slab; the gradients are ready before the backward pass asks for them."""

    @staticmethod
    def forward(ctx, x_nF: Tensor, weight_VF: Tensor | None, bias_V: Tensor | None, loss: AnswerLoss) -> Tensor:
        def head(x_cF: Tensor) -> Tensor:
            return x_cF if weight_VF is None else functional.linear(x_cF, weight_VF, bias_V)

        wide = x_nF.shape[-1] if weight_VF is None else len(weight_VF)
        slab_bytes, chunk_bytes = sizes(x_nF.device.type)
        slab = max(1, slab_bytes // (wide * x_nF.itemsize))
        if weight_VF is not None:
            slab = max(1, slab // MULTIPLE) * MULTIPLE
        chunk = slab if loss.is_compiled(x_nF) else max(1, chunk_bytes // (wide * 4))
        total, grad_x, grad_weight, grad_bias = 0.0, torch.empty_like(x_nF), None, None
        for start in range(0, len(x_nF), slab):
            x_sF = x_nF[start : start + slab]
            count = len(x_sF)
            if weight_VF is None:
                grad_sV = x_sF.clone()
            else:
                x_sF = functional.pad(x_sF, (0, 0, 0, rounded_up(count) - count))
                grad_sV = _product(x_sF, weight_VF.T, bias_V)
            for at, logits_cV in enumerate(grad_sV[:count].split(chunk)):
                total = total + loss.of(logits_cV, start + at * chunk, head)
            grad_sV[count:] = 0.0
            grad_x[start : start + count] = grad_sV if weight_VF is None else (grad_sV @ weight_VF)[:count]
            if ctx.needs_input_grad[1]:
                grad_weight = _plus(grad_weight, _product(grad_sV.T, x_sF))
            if ctx.needs_input_grad[2]:
                grad_bias = _plus(grad_bias, grad_sV.sum(0))
            del grad_sV, logits_cV  # before the next slab
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        ctx.dtype = None if weight_VF is None else weight_VF.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_x, *outer = ctx.saved_tensors
        unscaled = grad.device.type == "cpu" and grad.item() == 1.0  # as nearly always; elsewhere to know it is to wait
        grad_x, *outer = (g if g is None or unscaled else g.mul_(grad) for g in (grad_x, *outer))
        return grad_x, *(g if g is None else g.to(ctx.dtype) for g in outer), None


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias; a large one of a CPU's in pages of its own."""
    own = a.device.type == "cpu" and not products.slow(a.dtype, a.device)
    out = pages.empty((len(a), b.shape[1]), a.dtype) if own else None
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def sizes(device: str) -> tuple[int, int]:
    """Bytes of a slab and of a chunk on this type of device."""
    return (SLAB_BYTES, CHUNK_BYTES) if device == "cpu" else (CUDA_SLAB_BYTES, CUDA_CHUNK_BYTES)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    """A sum over slabs, in float32: bfloat16 would lose the later ones."""
    return more if total is None else total.float().add_(more)


def _places(rows: Sequence[Row]) -> list[Tensor]:
    """Of each row: where its answer's tokens stand among those of all rows."""
    start, places = 0, []
    for row in rows:
        places.append(torch.arange(start, start + len(row.answer)))
        start += len(row.answer)
    return places
