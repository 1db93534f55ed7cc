"""What the machine could do, and what a step of work needs of it: matrix products, copies, and counts.

Useful work is counted from tokens, the same for every framework: a token that a framework runs beyond it (padding, a
group's prompt again, a row without weight) lowers its share of the limit. With `body` and `head` the matrices' numbers:

  sampling    2 (body + head) a decoded token; 2 body a token of each unique prompt, and 2 head for its last one;
              4 layers x query width x context for attention's two products, each token attending to those before it.
  update      three times the forward pass (once forward, twice backward) of the rows that count: each prompt that
              they share once, each answer without its last token (nothing follows it), the head at answer positions.
  bytes       a decode step reads all weights once, for all rows together, and each row's keys and values.

Norms, softmax, the optimiser's step and the lookup of embeddings are left out: under 1 % of the products here, except
in the smallest models.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from meml_lib.rollouts import products


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with gated MLPs (Llama, Qwen2)."""

    layers: int
    hidden: int
    query: int
    """Width of all query heads together."""
    key: int
    """Width of all key heads together; the values' too."""
    mlp: int
    vocabulary: int

    @classmethod
    def of(cls, config) -> Shape:
        """Of a transformers config."""
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        key = size * config.num_key_value_heads
        return cls(
            config.num_hidden_layers, config.hidden_size, size * heads, key, config.intermediate_size, config.vocab_size
        )

    @property
    def body(self) -> int:
        """Numbers in the layers' matrices."""
        return self.layers * self.hidden * (2 * self.query + 2 * self.key + 3 * self.mlp)

    @property
    def head(self) -> int:
        """Numbers in the output matrix."""
        return self.hidden * self.vocabulary

    def forward(self, first: int, last: int, *, heads: int) -> int:
        """Floating-point operations of one row's tokens at positions first to last - 1 (from 0), those before cached.

        Args: heads: at how many of them the logits are wanted.

        >>> Shape(layers=1, hidden=2, query=2, key=2, mlp=3, vocabulary=5).forward(0, 2, heads=1)
        180
        """
        contexts = (last * (last + 1) - first * (first + 1)) // 2
        return 2 * self.body * (last - first) + 4 * self.layers * self.query * contexts + 2 * self.head * heads


Rows = Mapping[tuple[int, ...], Sequence[int]]
"""Answer lengths, in tokens, by prompt."""


def sampling_flops(shape: Shape, rows: Rows) -> int:
    """Floating-point operations of sampling these answers, each unique prompt run once."""
    prefill = sum(shape.forward(0, len(prompt), heads=1) for prompt in rows)
    return prefill + sum(
        shape.forward(len(prompt), len(prompt) + answer - 1, heads=answer - 1)
        for prompt, answers in rows.items()
        for answer in answers
    )


def sampling_bytes(shape: Shape, rows: Rows, *, item: int) -> int:
    """Bytes read by the decode steps of these answers, all rows side by side. Args: item: bytes of one number."""
    steps = max(answer for answers in rows.values() for answer in answers) - 1
    cached = sum(
        sum(range(len(prompt) + 1, len(prompt) + answer)) for prompt, answers in rows.items() for answer in answers
    )
    return item * (steps * (shape.body + shape.head) + 2 * shape.layers * shape.key * cached)


def update_flops(shape: Shape, rows: Rows, *, share_prompts: bool = True) -> int:
    """Floating-point operations of one pass forward and back over these rows.

    Args: share_prompts: count a prompt once for all its answers, as `useful work` has it; False: once an answer.
    """
    total = 0
    for prompt, answers in rows.items():
        # The prompt's last token predicts the answer's first, hence as many logits as answer tokens.
        times = min(1, len(answers)) if share_prompts else len(answers)
        total += times * shape.forward(0, len(prompt), heads=0)
        total += sum(shape.forward(len(prompt), len(prompt) + answer - 1, heads=answer) for answer in answers)
    return 3 * total


def synchronise(device: torch.device | str) -> None:
    """Wait for what was started on the device, so that a clock reads its end."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device, *, times: int = 5) -> float:
    """Median seconds of a call, after one that is thrown away."""
    taken = []
    for _ in range(times + 1):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def machine_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The best rate of a matrix product (operations a second) and of a copy (bytes a second, read and written)."""
    cuda = device.type == "cuda"
    dtype = torch.float32 if products.slow(dtype, device) else dtype  # the machine's limit, not torch's in bfloat16
    rates = []
    for n in (2048, 4096, 8192) if cuda else (1024, 2048):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates.append(2 * n**3 / seconds(lambda a=a, b=b: torch.nn.functional.linear(a, b), device))
    source = torch.ones(2**30 if cuda else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return max(rates), 2 * source.numel() / seconds(lambda: target.copy_(source), device)
