"""Large blocks of a CPU's memory in pages of their own, each kept for the next that is not larger.

In the heap, blocks that are a little larger or smaller each time leave holes that the next one does not fit into. Given back to
the system, each has to be fetched again, and not only from the kernel, which would be quick with huge pages: many virtual
machines hand pages that lie free for two seconds on to their host, and to have 50 MiB back takes 50 ms.
"""

from __future__ import annotations

import math
import mmap
import weakref
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

LEAST_BYTES = 2**24
"""Smaller blocks come from the heap, which fills its holes with them."""

_free: list[mmap.mmap] = []


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`, on a CPU."""
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    fitting = [block for block in _free if len(block) >= size]
    block = min(fitting, key=len) if fitting else max(_free, key=len, default=None)
    if block is not None:
        _free.remove(block)
    if block is None or len(block) < size:  # the largest that is free is too small, and goes
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # a system may know no huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    numbers = np.frombuffer(block, np.uint8)  # what tensors hold on to, and goes with the last of them
    weakref.finalize(numbers, _free.append, block).atexit = False
    return torch.from_numpy(numbers)[:size].view(dtype).view(shape)
