"""Matrix products of bfloat16 on a CPU without instructions for them: in float32, and rounded, as the instructions do.

torch's own take 8 to 70 times as long there, where oneDNN has none: without AVX-512, as AMD's processors before Zen 4 and
most of Intel's for laptops. torch's fused attention is no product here and stays as it is; `packing` attends
by products, `decoder` in float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = [getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear")]


def slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies such matrices element by element."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def in_float32(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Within it, products are taken in float32 where they would be slow, those of a backward pass too."""
    return _InFloat32() if slow(dtype, device) else nullcontext()


class _InFloat32(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in _PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        exact = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
        return func(*exact, **(kwargs or {})).to(torch.bfloat16)
