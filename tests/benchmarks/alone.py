"""Ours alone, without TRL: seconds and shares of the machine's limit, then where a decode step's and an update's time goes.

`python tests/benchmarks/alone.py --device cuda --model qwen2.5-1.5b-shape`. A first look at a new machine, under a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import limits
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from workload import MODELS, Ours, Work, trained_rows

from meml_lib.rollouts import decoder, native, uniforms

PROFILED = 5  # decode steps


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-shape")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--prompts", default="4x3", help="questions x experts, 8 rollouts each")
    parser.add_argument("--layers", type=int, help="fewer than the shape's own, to rehearse")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=3, help="of sampling and update; the first ones warm up")
    asked = parser.parse_args(arguments)
    questions, panel = map(int, asked.prompts.split("x"))
    work = Work(asked.model, questions, panel, 8, asked.tokens, asked.device, "bfloat16", torch.get_num_threads(),
                micro_batch_tokens=asked.micro_batch_tokens, layers=asked.layers)  # fmt: skip
    learned = work.policy()
    device = learned.model.device
    product, copied = limits.machine_rates(device, learned.model.dtype)
    print(f"matrix product {product / 1e12:.1f} TFLOP/s, copy {copied / 1e9:.0f} GB/s read and written")

    shape, prompts_BE = limits.Shape.of(learned.model.config), work.prompts_BE(learned)
    every = {prompt: [asked.tokens] * work.group for row in prompts_BE for prompt in row}
    moved, useful = limits.sampling_bytes(shape, every, item=2), {}
    for arm in ("meml", "signed"):
        useful[arm] = limits.update_flops(shape, trained_rows(work, arm, 0.5, prompts_BE))
    ours = Ours(work, learned)
    for _ in range(asked.steps):
        for arm, flops in useful.items():
            took = ours.step(arm, 0.5)
            print(f"{arm}: sampling {took.sampling:.3f} s ({moved / took.sampling / copied:.1%} of the copy rate), "
                  f"scoring {took.scoring:.3f} s, update {took.update:.3f} s ({flops / took.update / product:.1%} of the "
                  "product's rate)", flush=True)  # fmt: skip
    if device.type == "cuda":
        print(f"most memory allocated: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    with torch.inference_mode():
        token_N = torch.zeros(work.rows, dtype=torch.long, device=device)
        uniform_NT = np.stack([uniforms("alone", n, count=PROFILED) for n in range(work.rows)])
        uniform_NT = torch.from_numpy(uniform_NT).to(device)
        prompt_of_row = [p for p in range(len(every)) for _ in range(work.group)]
        answers = decoder.Decoder(decoder.Weights(learned.model), list(every), prompt_of_row, asked.tokens + PROFILED)
        for _ in range(asked.tokens // 2):
            answers.step(token_N)

        def decode() -> None:
            for t in range(PROFILED):
                native.choose(answers.step(token_N), uniform_NT[:, t], temperature=1.0, top_p=None)

        _print(f"{PROFILED} decode steps at half the length", decode, device)
    _print("a signed step", lambda: ours.step("signed", 0.5), device)


def _print(what: str, work, device: torch.device) -> None:
    """The functions that take longest, on the device and on the host."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiled:
        work()
        limits.synchronise(device)
    events = profiled.key_averages()
    for where, took in (("device", "self_device_time_total"), ("host", "self_cpu_time_total"))[0 if cuda else 1 :]:
        longest = sorted(events, key=lambda event: -getattr(event, took))  # noqa: B023
        print(f"\n{what}, on the {where}: {sum(getattr(event, took) for event in events) / 1e3:.2f} ms")
        for event in longest[:20]:
            print(f"{getattr(event, took) / 1e3:10.3f} ms {event.count:7d}  {event.key[:100]}")


if __name__ == "__main__":
    main()
