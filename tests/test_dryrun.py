"""What a dry run says, against published counts, the code that it speaks of, and numbers worked out by hand."""

from __future__ import annotations

import json
import socket
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from meml_lib import config
from meml_lib.rollouts import cpu, decoder, native
from meml_lib.training import dryrun, packing, policy
from meml_lib.training.head import AnswerLoss, Use
from meml_lib.training.lean import lean
from meml_lib.training.losses import Part, WeighedRow, weighted_nll

ROOT = Path(__file__).parents[1]
GIB = 2**30


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("MEML_DATA_DIR", raising=False)


def tiny(p: config.Run, **sizes) -> config.Run:
    return p.model_copy(update={"model": p.model.model_copy(update=sizes)})


def parts_of(p: config.Run) -> dict[str, int]:
    parts, most = dryrun.memory(p, dryrun.empty_model(p))
    return {name or "and: sampling": size for name, size, _ in parts} | {"most": most}


@pytest.mark.parametrize(
    ("file", "parameters"), [("paper-qwen-gsm8k.yaml", 1_543_714_304), ("paper-llama-gsm8k.yaml", 1_235_814_400)]
)
def test_the_papers_models_have_their_published_sizes_and_are_not_downloaded(monkeypatch, file, parameters):
    def refuse(*args):
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = dryrun.empty_model(config.load_run(file))
    assert model.num_parameters() == parameters
    assert model.device.type == "meta" and model.dtype == torch.bfloat16


def test_a_hub_model_without_a_config_is_told_so(tmp_path):
    p = config.load_run("paper-qwen-gsm8k.yaml", {"model.config": None})
    with pytest.raises(ValueError, match="Qwen/Qwen2.5-Math-1.5B.*is no folder here.*model.config"):
        dryrun.empty_model(p)
    scratch = config.load_run("smoke.yaml")
    dryrun.empty_model(scratch).config.save_pretrained(tmp_path)
    local = {"model": {"source": "hub", "path": str(tmp_path), "dtype": "float32", "lora": None}}
    there = dryrun.empty_model(config.load_run("smoke.yaml", local))
    assert there.num_parameters() == dryrun.empty_model(scratch).num_parameters()


def test_lora_is_refused_and_not_miscounted():
    with pytest.raises(ValueError, match="model.lora"):
        dryrun.empty_model(config.load_run("smoke.yaml", {"model.lora": {"rank": 4, "alpha": 8}}))


# --- what a pass holds, traced ---------------------------------------------------------------------------------------


class Bare(policy.Policy):
    """A policy that only scores: rows of a dry run have lengths, and no text."""

    def __init__(self, model: PreTrainedModel):
        self.model = model


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations make, alive at once."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False  # transformers asks whether a mask can be left out
        out = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


_attention = torch.nn.functional.scaled_dot_product_attention


def fused_attention(query, key, value, **options):
    """Attention as a GPU computes it, keeping no probabilities; meta alone would keep them."""
    if not query.is_meta:
        return _attention(query, key, value, **options)
    if options.get("is_causal"):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
    bias = torch.zeros_like(options["attn_mask"], dtype=query.dtype).expand(-1, query.shape[1], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]


def traced(model: PreTrainedModel, rows: int, prompt_tokens: int, answer_tokens: int) -> int:
    """Most bytes alive at once while a micro-batch goes forward and backward, weights and gradients aside."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    group = [policy.Row((0,) * prompt_tokens, (n,) * answer_tokens) for n in range(rows)]
    part = Part("grpo", 1.0, [WeighedRow(row, 1.0) for row in group], "constant", weighted_nll)
    loss = AnswerLoss([part], [1.0], group, [[Use(0, row, 1.0)] for row in part.rows], [], None)
    model.train()
    known = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())]
    fused = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
    with fused, Live(known) as live, packing.packed_attention(model), lean(model):
        packing.run(Bare(model), model, group, loss).backward()
    return live.peak


# --- memory -----------------------------------------------------------------------------------------------------------


def test_each_part_of_the_papers_memory_follows_its_formula():
    count = 1_543_714_304
    told = parts_of(config.load_run("paper-qwen-gsm8k.yaml"))
    assert told["weights"] == 2 * count and told["float32 copies"] == 4 * count and told["moments"] == 8 * count
    assert told["gradients"] == 4 * count  # bfloat16, and once more in the buckets of eight processes
    assert told["or: sampling"] == 256 * (288 + 1024) * 28 * 2 * 2 * 128 * 2  # 9.6e9
    assert told["and: sampling"] == 2 * 28 * 1536 * (16 * 128 + 2 * 8960) + 256 * 151_936 * 4 + 2**25 * 16
    assert told["or: an update"] == 8 * 2**22  # of some rows of its weights
    turns = (told["or: sampling"] + told["and: sampling"], told["or: a pass"], told["or: an update"])
    assert told["most"] == 18 * count + max(turns)
    assert 35 * GIB < told["most"] < 60 * GIB  # the paper: about 60 GB, with vLLM's weights and cache beside


def test_one_process_has_no_buckets_and_float32_needs_no_copies():
    p = config.load_run("smoke.yaml")
    count = dryrun.empty_model(p).num_parameters()
    told = parts_of(p)
    assert "float32 copies" not in told
    assert (told["weights"], told["gradients"], told["or: an update"]) == (4 * count, 4 * count, 4 * count)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_is_what_the_sampler_reserves(task, panel, policy, dtype):
    p = config.load_run("smoke.yaml", {"sampling.rows_per_batch": 6, "model.dtype": dtype})
    policy.model.to(getattr(torch, dtype))
    p = tiny(p, hidden_size=32, layers=2, heads=1, mlp_size=64, max_positions=128)
    prompt, answer = 128 - 48, 48  # as long as its positions allow
    prompts = [(1, *(n,) * (prompt - 1)) for n in range(6)]
    answers = decoder.Decoder(decoder.Weights(policy.model), prompts, list(range(6)), answer)
    held = sum(kv.nbytes for layer in (*answers._prompts, *answers._own) for kv in layer)
    assert parts_of(p)["or: sampling"] == held == 6 * 128 * 2 * 2 * 32 * policy.model.dtype.itemsize


@pytest.mark.parametrize(("supported", "bytes_kept"), [(True, 2), (False, 4)])
def test_a_cpus_sampler_keeps_all_weights_laid_out_for_its_products(monkeypatch, supported, bytes_kept):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    p = config.load_run("smoke.yaml", {"model.dtype": "bfloat16"})
    model, rows = dryrun.empty_model(p), p.sampling.rows_per_batch
    words = rows * model.config.vocab_size
    assert parts_of(p)["and: sampling"] == model.num_parameters() * bytes_kept + words * 2 * 4 + words * 16


def test_a_draw_holds_at_most_16_bytes_an_entry_at_once(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)  # whose draws hold less
    logits_NV = torch.randn(4, native.ENTRIES // 4).bfloat16()
    with Live([logits_NV]) as live:
        native.choose(logits_NV, torch.full((4,), 0.5, dtype=torch.float64), temperature=1.0, top_p=None)
    assert live.peak / native.ENTRIES == pytest.approx(16, abs=0.2)


@pytest.mark.parametrize(
    ("file", "within"),
    [("paper-qwen-gsm8k.yaml", 0.05), ("paper-llama-mathqa.yaml", 0.05), ("demo.yaml", 0.2), ("smoke.yaml", 0.3)],
)
def test_a_pass_takes_what_is_alive_at_once_when_it_is_traced(file, within):
    p = config.load_run(file)
    model, answer = dryrun.empty_model(p), p.sampling.max_answer_tokens
    prompt = min(288, model.config.max_position_embeddings - answer)
    for rows in (1, 3):
        held = traced(model, rows, prompt, answer)
        assert dryrun.pass_bytes(model, rows, prompt, answer) == pytest.approx(held, rel=within)


@pytest.mark.parametrize("file", ["paper-qwen-gsm8k.yaml", "paper-llama-mathqa.yaml", "demo.yaml", "smoke.yaml"])
def test_with_gradient_checkpointing_too(file):
    p = config.load_run(file)
    model, answer = dryrun.empty_model(p), p.sampling.max_answer_tokens
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for rows in (1, 12):
        held = traced(model, rows, min(288, model.config.max_position_embeddings - answer), answer)
        told = dryrun.pass_bytes(model, rows, min(288, model.config.max_position_embeddings - answer), answer, again=True)
        assert told == pytest.approx(held, rel=0.15)


def test_fsdp_divides_what_stays_and_gathers_to_sample():
    whole = parts_of(config.load_run("paper-qwen-gsm8k.yaml"))
    file = "params/hardware/accelerate/gpu8-fsdp.yaml"
    told = parts_of(config.load_run("paper-qwen-gsm8k.yaml", {"hardware.accelerate_config": file}))
    count = 1_543_714_304
    assert told["weights"] == 2 * count // 8 and told["float32 copies"] == 4 * count // 8 == told["moments"] // 2
    assert told["gradients"] == 2 * count // 8  # and no buckets
    assert told["or: an update"] == 151_936 * 1536
    assert told["and: sampling"] == 2 * count  # gathered
    outer, layer = 151_936 * 1536 + 1536, (count - 151_936 * 1536 - 1536) // 28
    assert told["or: a pass"] == whole["or: a pass"] + 2 * (2 * outer + 3 * layer)
    assert told["most"] < whole["most"] - 18 * count * 7 // 8 + 3 * count
    again = {"hardware.accelerate_config": file, "hardware.gradient_checkpointing": True}
    assert parts_of(config.load_run("paper-qwen-gsm8k.yaml", again))["or: a pass"] < told["or: a pass"] / 2


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_size_of_a_model_counts_as_much_as_in_a_traced_pass(kind, dtype):
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 16, "vocab_size": 1000}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}

    def takes(**others: int | str) -> tuple[int, int]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(kind(**(sizes | others)), dtype=dtype)
        return dryrun.pass_bytes(model, 4, 100, 60), traced(model, 4, 100, 60)

    told, held = takes()
    assert told == pytest.approx(held, rel=0.2)
    other, other_held = takes(hidden_act="gelu")  # an MLP that keeps all
    assert told < other == pytest.approx(other_held, rel=0.3)
    for name, size in sizes.items():
        if name not in ("num_key_value_heads", "head_dim"):
            more = takes(**{name: 2 * size})
            assert more[0] - told == pytest.approx(more[1] - held, rel=0.2), name


def test_a_trace_without_content_takes_what_the_same_pass_takes_on_a_cpu(policy):
    scratch = config.load_run("smoke.yaml", {"model.layers": 2, "model.hidden_size": 128, "model.mlp_size": 256})
    empty = dryrun.empty_model(scratch)
    real = policy.model.__class__(empty.config)
    assert real.device.type == "cpu" and real.num_parameters() == empty.num_parameters()
    for rows, prompt, answer in ((3, 20, 50), (6, 20, 50), (3, 60, 10)):
        told, held = (traced(model, rows, prompt, answer) for model in (empty, real))
        assert told == pytest.approx(held, rel=0.06)  # attention keeps its mask otherwise on a GPU
        assert told > 3 * rows * (answer + 1) * empty.config.vocab_size * 4  # logits, and their gradients' parts


def test_an_answer_that_leaves_no_room_for_a_prompt_is_an_error():
    with pytest.raises(ValueError, match="max_answer_tokens=256 must be < the model's 256 positions"):
        parts_of(config.load_run("smoke.yaml", {"sampling.max_answer_tokens": 256}))


# --- work -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "train", "test"), [("gsm8k", 6973, 1319), ("mathqa", 29337, 2985), ("strategyqa", 1632, 458)]
)
def test_without_data_the_published_counts_are_taken(task, train, test):
    found, source = dryrun.questions(config.load_run(f"paper-qwen-{task}.yaml"))
    assert (found["train"], found["test"]) == (train, test) and "published" in source
    some = config.load_run(f"paper-qwen-{task}.yaml", {"task.train_questions": 100, "evaluate.test_questions": 50})
    assert dryrun.questions(some)[0] == {"train": 100, "validation": found["validation"], "test": 50}


def test_the_re_splits_test_questions_are_taken_out_of_the_1319():
    sizes = {"task.train_questions": None, "task.validation_questions": 100, "task.test_questions": 300}
    p = config.load_run("gsm8k-published-experts.yaml", sizes | {"evaluate.test_questions": None})
    assert dryrun.questions(p)[0] == {"train": 919, "validation": p.evaluate.validation_questions, "test": 300}


def test_questions_that_are_here_are_counted(monkeypatch, tmp_path):
    rows = [json.dumps({"question": f"{n} + 1?", "answer": f"<<{n}+1={n + 1}>>\n#### {n + 1}"}) for n in range(40)]
    (tmp_path / "gsm8k").mkdir()
    for part, share in (("train", rows[:30]), ("test", rows[30:])):
        (tmp_path / "gsm8k" / f"{part}.jsonl").write_text("\n".join(share))
    monkeypatch.setenv("MEML_DATA_DIR", str(tmp_path))
    few = {"task.validation_questions": 10, "evaluate.validation_questions": 5, "mef.answers_per_step": 8}
    p = config.load_run("paper-qwen-gsm8k.yaml", few)
    assert dryrun.questions(p) == ({"train": 20, "validation": 5, "test": 10}, "read here")
    assert dryrun.stage1(p) == {
        "teachers' answers": 60, "steps": 8, "answers trained on": 64, "answers to evaluate": (5 + 10) * 3,
    }  # fmt: skip


def test_more_questions_than_a_public_set_has_is_an_error(monkeypatch):
    monkeypatch.delenv("MEML_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match="evaluate.test_questions=1320 exceeds the 1319 questions"):
        dryrun.questions(config.load_run("paper-qwen-gsm8k.yaml", {"evaluate.test_questions": 1320}))


def test_too_few_answers_for_a_step_is_an_error():
    with pytest.raises(ValueError, match="stage 1 has 192 answers, fewer than mef.answers_per_step=193"):
        dryrun.stage1(config.load_run("smoke.yaml", {"mef.answers_per_step": 193}))


def test_wrong_teachers_answers_count_only_where_they_are_kept():
    every, right = (dryrun.stage1(config.load_run("demo.yaml", {"mef.keep": keep})) for keep in ("all", "right"))
    assert every["teachers' answers"] == 12_000 > right["teachers' answers"] > 6_000


def test_stage_2_counts_its_rollouts_rows_and_evaluations():
    told = dryrun.stage2(config.load_run("smoke.yaml"))  # 3 steps of 2 questions x 3 experts x 4 rollouts
    assert told == {
        "steps": 3,
        "rollouts": 72,
        "tokens in them": 72 * 48,
        "rows trained on": 72 + 3 * 2 * 4 + 3 * 2 * 3,  # GRPO's, mutual learning's, the buffer's
        "answers to evaluate": 3 * ((1 + 1) * 8 + 8 * (1 + 2)),  # validated after step 2 and at the end; 2 samples of 8
    }
    fewer = {"riel.objective.mutual": None, "riel.objective.buffer_sft": None, "riel.stop_at.rollouts": 25}
    assert dryrun.stage2(config.load_run("smoke.yaml", fewer))["rows trained on"] == 48  # the second step passes 25
    alone = dryrun.stage2(config.load_run("smoke.yaml", {"experts.only": [0]}))
    assert alone["rows trained on"] == 24 + 3 * 2  # nobody to learn from


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_study_counts_a_shared_stage_1_once_a_seed_and_no_stage_2_of_sft_arms():
    arms = {"sft": {"label": "x", "last_stage": "mef"}, "one": {"label": "y", "overrides": {"experts.only": [0]}}}
    study = config.load_study("params/studies/smoke.yaml", {"seeds": [0, 1, 2], "arms": arms, "compare": {}})
    said = list(dryrun.describe(study))
    start1, start2 = (next(n for n, line in enumerate(said) if line.startswith(f"stage {stage}")) for stage in (1, 2))
    total = next(line.split() for line in said[start1:start2] if " in all " in line)
    assert total == ["6", "in", "all", "(3", "seed(s))", "768", "24", "192", "576"]  # (192 + 64) answers x 3 seeds, ...
    assert [line.split()[0] for line in said[start2 + 1 :]] == ["multi", "full", "one", "9"]


def test_it_has_run_only_where_a_report_or_a_logged_command_shows_it(monkeypatch, tmp_path):
    (tmp_path / "params").mkdir()
    text = (ROOT / "params" / "smoke.yaml").read_text()
    (tmp_path / "params" / "never.yaml").write_text(f"# {dryrun.NEVER_RUN}\n" + text)
    (tmp_path / "params" / "smoke.yaml").write_text(text)
    for part in ("base.yaml", "tasks", "experts", "models", "hardware"):
        (tmp_path / "params" / part).symlink_to(ROOT / "params" / part)
    (tmp_path / "reports" / "smoke-run" / "report").mkdir(parents=True)
    log = tmp_path / "reports" / "log.md"
    log.write_text("`meml run params/never.yaml.old` and `meml run params/studies/never.yaml`")
    monkeypatch.chdir(tmp_path)
    smoke, never = config.load_study("params/smoke.yaml"), config.load_study("params/never.yaml")
    assert dryrun.evidence(smoke) == "none here" and dryrun.evidence(never) == "none. Never run by us."
    report = tmp_path / "reports" / "smoke-run" / "report" / "report.json"
    report.write_text('{"stages": [{"state": "not run"}]}')
    assert dryrun.evidence(smoke) == "none here"
    report.write_text('{"stages": [{"state": "not run"}, {"state": "done"}]}')
    assert dryrun.evidence(smoke) == "reports/smoke-run/report"
    for command in ("`meml run params/never.yaml` on a fresh clone", "`X=x meml run params/never.yaml --jobs 1`"):
        log.write_text(command)
        assert dryrun.evidence(never) == "reports/log.md"
