"""The benchmarks: counts of work that a counter confirms, one table of rewards, and speed only after agreement."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).with_name("benchmarks")))

import cost
import limits
import scaling
import speed
import workload

from meml_lib import config
from meml_lib.training import dryrun

WORK = workload.Work("embedded", questions=2, experts=2, group=4, tokens=5, device="cpu", dtype="float32", threads=1)
TINY = limits.Shape(layers=1, hidden=2, query=2, key=2, mlp=3, vocabulary=5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=40, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def counted(run):
    """Operations of the matrix products that a call runs; attention's (batched) apart."""
    with FlopCounterMode(display=False) as counter:
        run()
    by_name = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for name, flops in by_name.items() if "bmm" in name)
    return sum(by_name.values()) - attention, attention


def test_an_updates_count_is_what_the_model_runs(model):
    shape, prompt, answer = limits.Shape.of(model.config), 7, 4
    ids = torch.randint(50, (1, prompt + answer - 1))
    products, attention = counted(lambda: model(ids, logits_to_keep=answer).logits.sum().backward())
    without = limits.update_flops(replace(shape, query=0, key=shape.key + shape.query), {(1,) * prompt: [answer]})
    told = limits.update_flops(shape, {(1,) * prompt: [answer]})
    assert without == products  # attention's own products left out, every matrix kept
    # Run in full, attention takes n x n products; counted are the n (n + 1) / 2 that are not masked.
    n = prompt + answer - 1
    assert told - without == attention * (n + 1) // (2 * n)


def test_samplings_count_is_prefill_and_decode_steps(model):
    shape, prompt, answer = limits.Shape.of(model.config), (1,) * 7, 4
    prefill, _ = counted(lambda: model(torch.randint(50, (1, 7)), logits_to_keep=1))
    step, _ = counted(lambda: model(torch.randint(50, (1, 1))))
    bare = replace(shape, query=0, key=shape.key + shape.query)
    assert limits.sampling_flops(bare, {prompt: [answer] * 3}) == prefill + 3 * (answer - 1) * step
    with_attention = limits.sampling_flops(shape, {prompt: [answer] * 3}) - limits.sampling_flops(
        bare, {prompt: [answer] * 3}
    )
    assert with_attention == 4 * 2 * 24 * (28 + 3 * (8 + 9 + 10))


def test_bytes_are_the_weights_once_a_step_and_each_rows_cache():
    assert TINY.body == 34 and TINY.head == 10
    read = limits.sampling_bytes(TINY, {(1, 1): [3, 3]}, item=4)
    assert read == 4 * (2 * 44 + 2 * 2 * 2 * (3 + 4))  # two steps; two rows, contexts 3 and 4, keys and values


def test_a_shared_prompt_is_counted_once():
    rows = {(1, 1, 1): [2, 2]}
    once, each = (limits.update_flops(TINY, rows, share_prompts=share) for share in (True, False))
    assert each - once == 3 * TINY.forward(0, 3, heads=0) > 0
    assert limits.update_flops(TINY, {}) == 0


def test_the_table_holds_the_rate_and_is_drawn_once_a_seed():
    for rate, right in ((0, 0), (0.1, 2), (0.5, 8), (0.9, 14)):
        assert WORK.rewards(rate).sum() == right and WORK.rewards(rate).shape == (2, 2, 4)
    assert (WORK.rewards(0.5) == WORK.rewards(0.5)).all()
    assert (WORK.rewards(0.5) != replace(WORK, seed=1).rewards(0.5)).any()
    right_BE = replace(WORK, questions=9).mixed_rewards().sum(-1)
    assert set(right_BE.ravel().tolist()) == {1, 2, 3}


def test_our_step_trains_on_the_tables_rows_at_the_forced_length():
    learned = WORK.policy()
    ours = workload.Ours(WORK, learned)
    before = [weight.detach().clone() for weight in learned.model.parameters()]
    for arm in workload.ARMS:
        assert ours.step(arm, 0.0).total > 0
    assert all(
        torch.equal(old, new) for old, new in zip(before, learned.model.parameters(), strict=True)
    )  # nothing to learn
    for rate in (0.5, 0.9):
        ours.task.set_rewards(WORK.rewards(rate))
        for arm, steps in ours._steps.items():
            with workload.forced_length() as sampled:
                metrics = next(steps).metrics
            assert (
                len(sampled) == 1 and metrics["answer_tokens"] == 5 and metrics["reward"] == WORK.rewards(rate).mean()
            )
            rows = workload.trained_rows(WORK, arm, rate, WORK.prompts_BE(learned))
            assert sum(map(len, rows.values())) == metrics["rows/grpo"] + metrics.get("rows/mutual", 0) > 0
    assert not torch.equal(before[0], next(iter(learned.model.parameters())))


def test_exponents_of_linear_and_of_square_growth():
    fitted = cost.exponents([1, 2, 4, 8], np.array([[1.0, 2, 4, 8], [3.0, 6, 12, 96]]))
    assert fitted["all"]["high"] > 1.3 and fitted["all"]["low"] == pytest.approx(1.0)
    assert fitted["last"]["high"] == pytest.approx(3.0)


def test_a_median_has_an_interval_within_its_values():
    found = speed.median(np.array([1.0, 2.0, 3.0, 4.0, 50.0]))
    assert found["median"] == 3.0 and 1.0 <= found["low"] < 3.0 < found["high"] <= 50.0 and found["n"] == 5


def test_trl_and_ours_agree_and_the_smallest_benchmark_is_written(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    arguments = [
        "--tokens",
        "4",
        "--prompts",
        "2x2",
        "--group",
        "2",
        "--pairs",
        "1",
        "--success",
        "0.5",
        "--threads",
        "1",
    ]
    speed.main([*arguments, "--no-memory", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert 0 < result["gradient"]["relative_error"] < 1e-4 and result["gradient"]["norm_ours"] > 0
    entries = result["by_success"]["0.5"]
    assert set(entries) == set(speed.LABELS)
    for arm in workload.ARMS:
        steps = {row["who"]: row for row in result["steps"]}
        assert entries[arm]["trl_over_ours"]["total"]["median"] == pytest.approx(
            steps["trl"]["total"] / steps[arm]["total"]
        )
        assert result["limit"]["by_success"]["0.5"][arm]["sampling_share_of_limit"] > 0
    assert [row["round"] for row in result["steps"]] == [1, 1, 1]  # the first round is thrown away
    assert all(row["sampling"] > 0 and row["update"] > 0 for row in result["steps"])
    assert {"commit", "packages", "hardware", "command", "date"} <= set(result["manifest"]) and result["manifest"][
        "packages"
    ]["trl"]
    assert file.with_suffix(".png").stat().st_size > 5000

    monkeypatch.setitem(workload.ARMS, "signed", ())  # other mathematics: positive advantages and mutual learning
    with pytest.raises(SystemExit, match="do not compute the same gradient"):
        speed.main([*arguments, "--no-memory", "--out", str(tmp_path)])


def test_the_scaling_plan_in_the_readme_is_what_its_script_says():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert scaling.table() in readme and "**A model, not a measurement**" in readme
    one, eight = (scaling.plan("params/paper-qwen-gsm8k.yaml", gpus) for gpus in (1, 8))
    assert (one.rows, eight.rows) == (768, 96) and one.sharded is None
    divided = {"accelerate_config": "params/hardware/accelerate/gpu8-fsdp.yaml", "gradient_checkpointing": True}
    p = config.load_run("params/paper-qwen-gsm8k.yaml", {f"hardware.{key}": value for key, value in divided.items()})
    assert eight.sharded == dryrun.memory(p, dryrun.empty_model(p))[1] < eight.plain / 2
    assert one.step[0] > eight.step[0] > one.step[0] / 8  # sampling's length does not shrink
