"""Large blocks of a CPU's memory in pages of their own, kept for the next of about their size.

In the heap, blocks that are a little larger or smaller each time leave holes that the next one does not fit into. Given back to
the system, each has to be fetched again, and not only from the kernel, which would be quick with huge pages: many virtual
machines hand pages that lie free for two seconds on to their host, and to have 50 MiB back takes 50 ms.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from contextlib import suppress
from functools import cache

import numpy as np
import torch
from torch import Tensor

LEAST_BYTES = 2**24
"""Smaller blocks come from the heap, which fills its holes with them."""
KEPT_BYTES = 2**28
"""Of blocks of one size that nobody has, if there are several: what an update takes, not all that a large sampler had."""


@cache
def _free(size: int) -> deque[mmap.mmap]:
    return deque(maxlen=max(1, KEPT_BYTES // size))


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`, on a CPU."""
    needed = math.prod(shape) * dtype.itemsize
    if needed < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    size = 1 << (needed - 1).bit_length()  # pages that nobody writes take no memory
    free = _free(size)
    try:
        block = free.pop()
    except IndexError:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # a system may know no huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    numbers = np.frombuffer(block, np.uint8)  # what tensors hold on to, and goes with the last of them
    weakref.finalize(numbers, free.append, block).atexit = False
    return torch.from_numpy(numbers)[:needed].view(dtype).view(shape)
