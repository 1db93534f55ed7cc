"""What a run would take, told without a download, a GPU or a step: its model's size, its memory by part, its work.

The model is built from its public config on torch's `meta` device, whose tensors have shapes and no content.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from meml_lib import config, experts, schema, tasks
from meml_lib.experts import Expert
from meml_lib.rollouts import native, products, vllm
from meml_lib.training import evaluate, head, lean, learner, mef, packing, policy, sharding

PROMPT_TOKENS = 288
"""Assumed length of a prompt; the longest of the public sets' training prompts has 269 tokens of SmolLM2's tokenizer."""
PUBLISHED = {"gsm8k": (7473, 1319), "mathqa": (29837, 2985), "strategyqa": (1832, 458), "gsm8k-test-resplit": (1319, 0)}
"""Questions that train and validation share, and test ones: arXiv 2110.14168, arXiv 1905.13319; StrategyQA has 2,290
labelled questions (arXiv 2101.02235), of which a fifth is test here. The re-split takes its test questions of the pool."""
NEVER_RUN = "Never run by us."
"""How a preset's file says so."""


# --- the model --------------------------------------------------------------------------------------------------------


def empty_model(p: config.Run) -> PreTrainedModel:
    """The run's model without weights.

    Raises: ValueError for a hub model of which neither the values nor this machine hold a config, and for LoRA.
    """
    if p.model.lora is not None:
        raise ValueError("model.lora: a dry run counts full fine-tuning only; set model.lora=null")
    if p.model.source == "scratch":
        prompts = " ".join(expert.system for expert in experts.load_panel(p.experts))
        words = [*tasks.load(p.task).words(), *prompts.split()]
        model = policy.load(p.model, device="meta", words=words, seed=p.seed).model
        model.tie_weights()  # moving to meta unties them
        return model
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(p.model), dtype=getattr(torch, p.model.dtype))


def _config(params: schema.HubModelParams | schema.GgufModelParams):
    if params.source == "gguf":
        file = policy.gguf_file(params.path)
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    if params.config is not None:
        return AutoConfig.for_model(**params.config)
    if not config.locate(params.path).is_dir():
        raise ValueError(f"model.path={params.path!r} is no folder here: a dry run then needs model.config")
    return AutoConfig.from_pretrained(config.locate(params.path))


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(p: config.Run, model: PreTrainedModel) -> tuple[list[tuple[str, int, str]], int]:
    """Bytes of each process's device by part, with the formula of each, and the most that is held at once.

    Longest prompts and answers everywhere; without what CUDA and its allocator keep for themselves.

    Returns: (part, bytes, formula), the parts that stay first; the most at once: those, and the largest of the others.
    Raises: ValueError if the longest answer leaves no room for a prompt.
    """
    c, count, size = model.config, model.num_parameters(), model.dtype.itemsize
    answer, rows, layers = p.sampling.max_answer_tokens, p.sampling.rows_per_batch, c.num_hidden_layers
    prompt = min(PROMPT_TOKENS, c.max_position_embeddings - answer)
    if prompt < 1:
        most = c.max_position_embeddings
        raise ValueError(f"sampling.max_answer_tokens={answer} must be < the model's {most} positions")
    sharded = config.accelerate_values(p).get("distributed_type") == "FSDP"
    parts, half = p.hardware.processes if sharded else 1, size < 4
    buckets, over = p.hardware.processes > 1 and not sharded, f" / {parts} processes" * sharded
    of_gradients = f"parameters x {size} bytes{over}{', and all-reduce buckets' * buckets}"
    head_size = _head(c)
    cpu = p.hardware.device == "cpu"
    exact = 4 if cpu else size  # of what `decoder` computes
    cache = rows * (prompt + answer) * layers * 2 * c.num_key_value_heads * head_size * size
    # The sampler's copies of weights (q, k and v, and gate and up, fused; on a CPU all, laid out for its products), logits
    # of two steps, and a draw's work, of each entry float32 logits, p and two more.
    fused = layers * c.hidden_size * ((c.num_attention_heads + 2 * c.num_key_value_heads) * head_size + 2 * c.intermediate_size)
    copied, each = (count, 4 if products.slow(model.dtype, torch.device("cpu")) else size) if cpu else (fused, size)
    words = rows * c.vocab_size
    step = copied * each + words * 2 * exact + min(words, native.CUDA_ENTRIES) * 16
    uncut = sharded or "muon" in (p.mef.optimizer, p.riel.optimizer)  # weights that the optimiser takes whole
    at_a_time = min(count, max([learner.PART, *(weight.numel() for weight in model.parameters() if uncut)]))
    at_once = max(1, (p.hardware.micro_batch_tokens - prompt) // answer)
    stay = [
        ("weights", count * size // parts, f"{count:,} parameters x {size} bytes{over}"),
        ("float32 copies", half * count * 4 // parts, f"parameters x 4 bytes{over}, which the optimiser works on"),
        ("gradients", count * size * (1 + buckets) // parts, of_gradients),
        ("moments", count * 8 // parts, f"parameters x 8 bytes{over}: Adam's two, float32 (Muon: fewer)"),
    ]
    sampling = [
        ("or: sampling", cache, f"KV cache of {rows} rows x ({prompt} + {answer}) tokens x {layers} "
         f"layers x 2 x {c.num_key_value_heads} heads x {head_size} x {size} bytes"),
        ("", step, f"{copied:,} weights {'laid out' if cpu else 'fused'} x {each} bytes; "
         f"{rows} rows x {c.vocab_size:,} words x 2 x {exact} bytes, and 16 bytes of at most {native.CUDA_ENTRIES:,} at once"),
    ]  # fmt: skip
    gathered = 0
    if sharded:
        sampling.append(("", count * size, "whole weights, gathered"))
        layer = sum(weight.numel() for weight in sharding.layers(model)[0].parameters())
        gathered = (2 * (count - layers * layer) + 3 * layer) * size
    if p.sampling.engine == "vllm":
        sampling, tied = [], c.tie_word_embeddings * c.vocab_size * c.hidden_size
        kept = vllm.cache_bytes(c.to_dict(), rows, answer, min(vllm.POSITIONS, c.max_position_embeddings), size)
        stay.append(("vLLM", (count + tied) * size + kept, f"its weights; keys and values of {rows} rows x "
                     f"({vllm.PROMPT_TOKENS} + {answer}) tokens at most: {_size(kept)}; without its draws"))  # fmt: skip
    held = pass_bytes(model, at_once, prompt, answer, p.hardware.device, p.hardware.gradient_checkpointing)
    whole = ", and whole: the outer weights with their gradients, two layers, one's gradients" * sharded
    turns = [
        ("or: a pass", held + gathered, f"forward and backward of {at_once} answers x {answer} tokens to a prompt of {prompt}, "
         f"within 30 %{whole}"),
        ("or: an update", at_a_time * 4 * (1 + half) // parts, "the optimiser's float32 intermediates and gradients of "
         f"{at_a_time:,} weights at a time{over}"),
    ]  # fmt: skip
    largest = max(sum(part[1] for part in sampling), *(part[1] for part in turns))
    return [*(part for part in stay if part[1]), *sampling, *turns], sum(part[1] for part in stay) + largest


def pass_bytes(
    model: PreTrainedModel, answers: int, prompt_tokens: int, answer_tokens: int, device: str = "cuda", again: bool = False
) -> int:
    """About the most bytes alive at once while a prompt and its answers are trained on, beside weights and gradients.

    Of each token, a layer keeps four vectors as wide as the model, two as its MLP (`lean`; else four), three as its heads,
    and has one and a half more as its MLP (`again`: two) and two of the model's in float32 as it passes; of each answer it
    keeps keys and values of all it sees for all heads, and the attention's mask. The output layer holds a slab of logits, a
    chunk of it in float32 (also where a CPU's compiled loops need none), and its weight's gradient: summed in float32 where
    there are several slabs. With `again` (gradient checkpointing) a layer keeps what comes into it, and one at a time the
    rest and its gradients. A tied output layer's gradient waits for the embedding's.
    Traced passes of Llama- and Qwen-shaped models differ by 5 %, of very small ones by 30 % (`tests/test_dryrun.py`).
    """
    c, size, heads = model.config, model.dtype.itemsize, model.config.num_attention_heads * _head(model.config)
    tokens, predicted = prompt_tokens + answers * answer_tokens, answers * answer_tokens
    packs, wide, seen = packing.packs(model), answer_tokens, prompt_tokens + answer_tokens
    if packs:
        tokens, predicted = packing.rounded_up(tokens), packing.rounded_up(predicted)
        wide = packing.rounded_up(answer_tokens - 1, packing.COLUMNS)
        seen = packing.rounded_up(prompt_tokens, packing.COLUMNS) + wide
    kept = 2 if packs and any(map(lean.is_gated, model.modules())) else 4
    layer = tokens * size * (4 * c.hidden_size + kept * c.intermediate_size + 3 * heads)
    passing = tokens * ((4 if again else 3) * size * c.intermediate_size // 2 + 2 * 4 * c.hidden_size)
    layer += answers * seen * size * (2 * heads + wide)
    logits = predicted * c.vocab_size * size
    slab, chunk = head.sizes(device)
    weights = c.vocab_size * c.hidden_size * (size if logits <= slab else 2 * size + 4)
    copies = 1 + (size < 4)
    output = min(logits, slab) + max(weights, min(copies * logits * 4 // size, copies * chunk))
    waiting = c.tie_word_embeddings * c.vocab_size * c.hidden_size * size
    if again:
        inputs = c.num_hidden_layers * tokens * c.hidden_size * size
        return inputs + max(4 * (layer + passing) // 3 + waiting, output)
    return c.num_hidden_layers * layer + max(output, waiting + passing)


def _head(c: PreTrainedConfig) -> int:
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


# --- work -------------------------------------------------------------------------------------------------------------


def questions(p: config.Run) -> tuple[dict[str, int], str]:
    """How many questions the run trains on, validates on and is tested on, and who says so.

    Raises: ValueError if it asks for more than there are; FileNotFoundError where MEML_DATA_DIR lacks the task.
    """
    if p.task.name in PUBLISHED and (p.task.source == "hub" or not os.environ.get("MEML_DATA_DIR")):
        pool, test = PUBLISHED[p.task.name]
        held = getattr(p.task, "test_questions", 0)
        train, test = pool - p.task.validation_questions - held, test or held
        there = {"validation": p.task.validation_questions, "test": test}
        asked = {"validation": p.evaluate.validation_questions, "test": p.evaluate.test_questions or test}
        for split, many in asked.items():
            if many > there[split]:
                raise ValueError(f"evaluate.{split}_questions={many} exceeds the {there[split]} questions of {p.task.name}")
        return {"train": min(train, p.task.train_questions or train), **asked}, "published counts, no row left out"
    task = tasks.load(p.task)
    asked = {split: len(evaluate.questions_of(p, task, split)) for split in ("validation", "test")}
    return {"train": len(task.questions("train")), **asked}, "read here"


def stage1(p: config.Run) -> Counter[str]:
    """What stage 1 does at most. Raises: ValueError if it has fewer answers than a step takes."""
    found, source = questions(p)
    panel = experts.load_panel(p.experts)
    samples = [getattr(expert.teacher, "samples", 1) for expert in panel]
    most = [found["train"] * min(count, p.mef.answers_per_question or count) for count in samples]
    answers = sum(_answers(p.task, e, p.mef) for e in panel) if source == "read here" else sum(most)
    if answers < p.mef.answers_per_step:
        raise ValueError(f"stage 1 has {answers} answers, fewer than mef.answers_per_step={p.mef.answers_per_step}")
    steps = mef.steps_of(p.mef, answers)
    told = {"teachers' answers": answers, "steps": steps, "answers trained on": steps * p.mef.answers_per_step}
    return Counter(told) + _evaluated(p, found, steps, p.mef)


def stage2(p: config.Run) -> Counter[str]:
    """What stage 2 does at most."""
    found, _ = questions(p)
    experts_, group, asked = len(p.experts.panel), p.riel.rollouts_per_expert, p.riel.questions_per_step
    steps, objective = p.riel.steps, p.riel.objective
    if p.riel.stop_at.rollouts:
        steps = min(steps, math.ceil(p.riel.stop_at.rollouts / (asked * experts_ * group)))
    rollouts = steps * asked * experts_ * group
    rows = rollouts * bool(objective.grpo) + steps * asked * group * bool(objective.mutual and experts_ > 1)
    rows += steps * asked * experts_ * bool(objective.buffer_sft)
    told = {"steps": steps, "rollouts": rollouts, "tokens in them": rollouts * p.sampling.max_answer_tokens}
    return Counter(told | {"rows trained on": rows}) + _evaluated(p, found, steps, p.riel)


def _evaluated(p: config.Run, found: dict[str, int], steps: int, stage: schema.StageParams) -> Counter[str]:
    times = 1 + (steps // stage.validate_every if stage.validate_every else 0)
    one_expert = times * found["validation"] + found["test"] * (1 + p.evaluate.samples_per_expert)
    return Counter({"answers to evaluate": one_expert * len(p.experts.panel)})


@lru_cache
def _answers(task: schema.TaskParams, expert: Expert, params: schema.MefParams) -> int:
    kept, _ = mef.select(params, experts.teacher_answers(tasks.load(task), [expert]), None)
    return len(kept)


# --- the report -------------------------------------------------------------------------------------------------------


def describe(study: config.Study) -> Iterator[str]:
    """A study's dry run, line by line: whether it has run, its models' memory, and the work of all arms and seeds.

    Raises: ValueError or FileNotFoundError for what would keep a run from starting, or this from being known.
    """
    yield f"report of it: {evidence(study)}"
    runs = {arm: study.run(arm, study.seeds[0]) for arm in study.arms}
    alike: dict[str, list[str]] = {}
    for arm, p in runs.items():
        alike.setdefault(repr((p.model, p.sampling, p.hardware)), []).append(arm)
    for arms in alike.values():
        p = runs[arms[0]]
        model = empty_model(p)
        name = f"{p.model.path}, " if p.model.source != "scratch" else ""
        yield f"\nmodel: {name}{model.num_parameters():,} parameters, {p.model.dtype}"
        more = f" and {len(arms) - 3} more" if len(arms) > 3 else ""
        yield f"memory of each of {p.hardware.processes} process(es), of {', '.join(arms[:3])}{more}:"
        parts, most = memory(p, model)
        paper = "the paper: about 60 GB on each of 8 A800" if p.model.source == "hub" else ""
        for part, size, formula in [*parts, ("most at once", most, paper)]:
            yield f"  {part:<15}{_size(size):>10}  {formula}".rstrip()
    base = study.base_run()
    found, source = questions(base)
    passes = base.riel.steps * base.riel.questions_per_step / found["train"]
    yield f"\nquestions: {', '.join(f'{count:,} {split}' for split, count in found.items())} ({source})"
    yield f"{base.riel.steps} steps of stage 2 are {passes:.2f} passes over them"
    first = {group: stage1(runs[arms[0]]) for group, arms in study.stage1_groups().items()}
    second = {arm: stage2(p) for arm, p in runs.items() if study.arms[arm].last_stage == "riel"}
    for title, counts in (("stage 1", first), ("stage 2", second)):
        yield from _table(f"{title}, at most", counts, len(study.seeds))


def evidence(study: config.Study) -> str:
    """Where this checkout shows that the study has run."""
    report = study.folder / "report" / "report.json"
    if report.is_file() and any(stage["state"] == "done" for stage in json.loads(report.read_text())["stages"]):
        return config.label_of(report.parent)
    log, file = config.root() / "reports" / "log.md", config.locate(study.params_file)
    logged = log.read_text(encoding="utf-8") if log.is_file() else ""
    if any(f"meml run {study.params_file}{end}" in logged for end in "` "):
        return config.label_of(log)
    says_so = file.is_file() and NEVER_RUN in file.read_text(encoding="utf-8")
    return f"none. {NEVER_RUN}" if says_so else "none here"


def _table(title: str, counts: dict[str, Counter[str]], seeds: int) -> Iterator[str]:
    """Counts of one seed, row by row, and of all seeds."""
    table = pd.DataFrame.from_dict(counts, orient="index").fillna(0).astype(int)
    table.loc[f"{seeds * len(counts)} in all ({seeds} seed(s))"] = seeds * table.sum()
    shown = table.map("{:,}".format).rename_axis(columns=title)
    yield from ("", *shown.to_string(col_space=[len(what) + 1 for what in shown]).splitlines())


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
