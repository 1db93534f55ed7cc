"""Sampling by vLLM, an optional package (`make vllm`), inside the trainer's process; the weights are handed over anew.

What differs from the native engine: a draw keeps to its key, but is another one (the first of a key's numbers seeds a
generator of vLLM's); rounding may change it with the rows decoded beside it; entropies are not told.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from meml_lib.rollouts import Rollout, check

if TYPE_CHECKING:
    from vllm import LLM

PROMPT_TOKENS = 512  # for which the cache has room beside each answer; where prompts are longer, fewer rows run at once
POSITIONS = 8192  # by which the longest text that an engine takes is widened
# Read when vLLM is imported: in this process, quiet, without reports of use.
_SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    uniform_NT: np.ndarray,
    end_ids: Sequence[int],
    max_answer_tokens: int,
    rows_per_batch: int,
    temperature: float | None,
    top_p: float | None = None,
) -> list[Rollout]:
    """Answer each prompt once. The first call starts vLLM, and so does one with other sizes.

    Args: see `native.sample`; of uniform_NT the first number of each row counts alone.
    Returns: N rollouts, in the order of `prompts`, without entropies.
    Raises: ValueError as `native.sample`, and for a model that vLLM cannot run; ModuleNotFoundError without vLLM.
    """
    check(prompts, uniform_NT, max_answer_tokens)
    if not prompts:
        return []
    os.environ |= _SETTINGS | os.environ
    from vllm import SamplingParams

    drawn = {"temperature": 0.0} if temperature is None else {"temperature": temperature, "top_p": top_p or 1.0}
    asked = [
        SamplingParams(
            **drawn,
            seed=int(uniform * 2**53),
            max_tokens=max_answer_tokens,
            stop_token_ids=[end for end in end_ids if end < model.config.vocab_size],  # vLLM refuses others
            ignore_eos=True,  # end_ids alone end an answer
            detokenize=False,
            logprobs=0,  # the drawn token's own
        )
        for uniform in uniform_NT[:, 0]
    ]
    longest = max(map(len, prompts)) + max_answer_tokens
    with torch.random.fork_rng():  # vLLM seeds torch's own generator, and reads it
        engine = _engine(_config(model), str(model.dtype).removeprefix("torch."), model.device.type, rows_per_batch,
                         max_answer_tokens, -(-longest // POSITIONS) * POSITIONS)  # fmt: skip
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": _weights(model)})
        engine.reset_prefix_cache()  # of the weights before
        told = engine.generate([{"prompt_token_ids": list(p)} for p in prompts], asked, use_tqdm=False)
    return [_rollout(request.outputs[0]) for request in told]


def cache_bytes(config: Mapping[str, Any], rows: int, answer_tokens: int, positions: int, itemsize: int) -> int:
    """What an engine keeps for keys and values: of `rows` answers, and of one text of `positions` tokens at least.

    Args: config: a model's config.json. itemsize: bytes of a number.
    """
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tokens = max(positions, rows * min(positions, PROMPT_TOKENS + answer_tokens))
    return tokens * config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head * itemsize


def _rollout(answer) -> Rollout:
    logp = tuple(at[token].logprob for token, at in zip(answer.token_ids, answer.logprobs, strict=True))
    return Rollout(tuple(answer.token_ids), logp, None, answer.finish_reason == "stop")


def _config(model: PreTrainedModel) -> str:
    """The model's config.json, by which vLLM builds its own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # A tied head is handed over as one of its own: on a CPU vLLM packs it, and would go on with the packed one.
    own = {"architectures": [type(base).__name__], "tie_word_embeddings": False, "_name_or_path": ""}
    return json.dumps(base.config.to_dict() | own, default=str)


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names as in a saved model; adapters merged, in a copy, since merging and unmerging would round the weights."""
    merged = deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return iter(merged.state_dict().items())


_started: dict[tuple, LLM] = {}
"""One at most: what vLLM keeps for an engine, it keeps for the process."""


def _engine(*key) -> LLM:
    if key not in _started:
        stop()
        _started[key] = _start(*key)
    return _started[key]


def stop() -> None:
    """End what `sample` started, and give back its memory: before accelerate ends the process group, which it shares."""
    while _started:
        _started.popitem()[1].llm_engine.engine_core.shutdown()


def _start(config: str, dtype: str, device: str, rows: int, answer_tokens: int, positions: int) -> LLM:
    """An engine without weights. On CUDA never run by us."""
    from vllm import LLM

    known, itemsize = json.loads(config), getattr(torch, dtype).itemsize
    positions = min(positions, known["max_position_embeddings"])
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    with tempfile.TemporaryDirectory(prefix="meml-") as folder:
        (Path(folder) / "config.json").write_text(config)
        engine = LLM(
            folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            generation_config="vllm",  # no defaults of a model's own
            logprobs_mode="raw_logprobs",  # at temperature 1, before top_p
            dtype=dtype,
            max_model_len=positions,
            max_num_batched_tokens=positions,
            enable_chunked_prefill=False,  # a prompt in pieces would need what a CPU's generators lack
            max_num_seqs=rows,
            kv_cache_memory_bytes=cache_bytes(known, rows, answer_tokens, positions, itemsize),
            enforce_eager=device == "cpu",
        )
    torch.set_num_threads = set_num_threads  # vLLM makes it do nothing, or leaves 1, for the whole process
    torch.set_num_threads(threads)
    return engine
