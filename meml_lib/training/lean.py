"""What a pass need not keep for its backward pass, because computing it again costs nearly nothing: an MLP's activation and
what goes into its last product, and the float32 copies inside norms. Of a layer of SmolLM2 this is four tenths of what is
kept. And queries and keys turned in one operation instead of ten."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from transformers import PreTrainedModel

from meml_lib.rollouts import cpu
from meml_lib.training import packing


@contextmanager
def lean(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's MLPs and RMSNorms keep less; forward and backward pass happen within. No gradient changes.

    A model that does not pack (`packing.packs`) stays as it is, and so does one that checkpoints, which keeps less still.
    """
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    changed, attend = [], {}
    for module in model.modules() if packing.packs(model) and not checkpoints else ():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module)
        elif is_gated(module):
            module.forward = partial(_mlp, module)
        elif type(module).__name__.endswith("Attention"):
            of_family = sys.modules[type(module).__module__]
            attend.setdefault(of_family, of_family.apply_rotary_pos_emb)
            continue
        else:
            continue
        changed.append(module)
    for of_family, rotate in attend.items():
        of_family.apply_rotary_pos_emb = partial(_rotated, rotate)
    try:
        yield
    finally:
        for of_family, rotate in attend.items():
            of_family.apply_rotary_pos_emb = rotate
        for module in changed:
            del module.forward


def is_gated(module: nn.Module) -> bool:
    """Whether it is an MLP that `lean` knows."""
    return type(module).__name__.endswith("MLP") and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


def _compiled(x: Tensor, other: Tensor) -> bool:
    """Whether loops of our own compute it; torch does on other devices and in other precisions."""
    return cpu.serves(x.device, x.dtype) and other.dtype == x.dtype


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    return _Norm.apply(x, module.weight, module.variance_epsilon)


class _Norm(torch.autograd.Function):
    """y = weight * x / rms(x), each row in float32; keeps x and one number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        if _compiled(x, weight):
            y, scale = cpu.norm(x, weight, epsilon)
        else:
            exact = x.float()
            scale = torch.linalg.vecdot(exact, exact).div_(x.shape[-1]).add_(epsilon).rsqrt_()[..., None]
            y = weight * (exact * scale).to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        if _compiled(x, weight):
            grad_x, grad_weight = cpu.norm_back(grad, x, weight, scale)
            return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None
        unit = x.float() * scale
        grad_weight = (grad * unit.to(x.dtype)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad_unit = (grad * weight).float()
        along = torch.linalg.vecdot(grad_unit, unit)[..., None]
        return grad_unit.addcmul_(unit, along, value=-1 / x.shape[-1]).mul_(scale).to(x.dtype), grad_weight, None


def _rotated(plain: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`plain`, transformers' own, of q, k [B, H, T, D] and cos, sin [B or 1, T, D]. In bfloat16, where its rounding is the same."""
    if not (_compiled(q, cos) and k.dtype == q.dtype == torch.bfloat16):
        return plain(q, k, cos, sin)
    return _Rotated.apply(q, k, *(x.expand(len(q), -1, -1) for x in (cos, sin)))


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return tuple(cpu.rotate(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        return *(cpu.rotate(grad.transpose(1, 2), *ctx.saved_tensors, back=True).transpose(1, 2) for grad in grads), None, None


def _mlp(module: nn.Module, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    gated = _Gated.apply(gate, up)
    storage, parts = gated.untyped_storage()._cdata, (gate.detach(), up.detach())

    def keep(tensor: Tensor) -> Tensor | torch.Size:
        return tensor.shape if tensor.untyped_storage()._cdata == storage else tensor

    def give(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else _Gated.of(*parts).view(kept)

    with saved_tensors_hooks(keep, give):  # down_proj may have adapters, which want the same input
        return module.down_proj(gated)


class _Gated(torch.autograd.Function):
    """silu(gate) * up; keeps these two."""

    @staticmethod
    def of(gate: Tensor, up: Tensor) -> Tensor:
        return cpu.gate(gate, up) if _compiled(gate, up) else functional.silu(gate).mul_(up)

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _Gated.of(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        if _compiled(gate, up):
            return cpu.gate_back(grad, gate, up)
        return torch.ops.aten.silu_backward(grad * up, gate), functional.silu(gate).mul_(grad)
