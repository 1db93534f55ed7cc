"""Trainings that were cut off, torn checkpoints, and what comes of them: the numbers of a training that nothing disturbed."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_packing import PACKED, parts_of, policy_of

from meml_lib import config, runs
from meml_lib.pipeline import launch
from meml_lib.runs import RunFolder
from meml_lib.schema import OptimizerParams
from meml_lib.training import checkpoints, stage
from meml_lib.training import learner as learner_module
from meml_lib.training.learner import Learner

TIMES = ["sample_seconds", "train_seconds", "sample_tokens_per_s", "train_tokens_per_s", "seconds", "tokens_per_s"]
VALUES = ["mef.steps=6", "riel.steps=7", "riel.objective.buffer_sft.capacity=3", "riel.validate_every=2",
          "hardware.checkpoints.every=2", "hardware.checkpoints.kept=3", "evaluate.test_questions=4"]  # fmt: skip


def values(folder, *overrides):
    return config.load_run("params/smoke.yaml", [*VALUES, *overrides], run_dir=folder)


@pytest.fixture(autouse=True)
def _headless(monkeypatch):
    monkeypatch.setenv(runs.HEADLESS, "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    launch.train("mef", values(folder))
    launch.train("riel", values(folder))
    return folder


@pytest.fixture
def begun(whole, tmp_path):
    """A folder in which stage 1 is done."""
    shutil.copytree(whole / "stage1", tmp_path / "run" / "stage1")
    return tmp_path / "run"


def cut_off(which, p, after, monkeypatch, error=KeyboardInterrupt):
    """Train until `after` steps have been recorded, and break off there."""
    append = RunFolder.append_metrics

    def appended(folder, record):
        append(folder, record)
        if record["step"] + 1 == after:
            raise error

    with monkeypatch.context() as broken:
        broken.setattr(RunFolder, "append_metrics", appended)
        with pytest.raises(error):
            launch.train(which, p)
    return sorted(place.name for place in (p.folder(which) / "checkpoints").glob("step-*"))


def same(folder, other, which="stage2"):
    """Whether two runs have the same metrics, tables and weights, to the bit."""
    one, two = RunFolder(folder / which), RunFolder(other / which)
    pd.testing.assert_frame_equal(*(f.read_metrics().drop(columns=TIMES, errors="ignore") for f in (one, two)), check_exact=True)
    names = sorted(file.name for file in (one.path / "tables").iterdir())
    assert names == sorted(file.name for file in (two.path / "tables").iterdir())
    for name in names:
        pd.testing.assert_frame_equal(*(pd.read_parquet(f.path / "tables" / name) for f in (one, two)), check_exact=True)
    places = [sorted((run.path / "model").iterdir()) for run in (one, two)]  # all but the card, which tells of the checkpoint
    models = [{file.name: file.read_bytes() for file in place if file.name != "README.md"} for place in places]
    assert models[0] == models[1] and "model.safetensors" in models[0]


def test_the_undisturbed_run_fills_its_buffer_and_leaves_no_checkpoint(whole):
    metrics = RunFolder(whole / "stage2").read_metrics()
    assert metrics["buffer_flushes"].iloc[-1] >= 1 and metrics["buffer_size"].max() >= 1
    assert not (whole / "stage2" / "checkpoints").exists() and not (whole / "stage2" / "rollouts.jsonl").exists()


@pytest.mark.parametrize("after", [1, 3, 5, 7])
def test_stage_2_cut_off_anywhere_ends_as_if_nothing_had_happened(whole, begun, monkeypatch, capsys, after):
    kept = cut_off("riel", values(begun), after, monkeypatch)
    assert kept == [f"step-{n:08d}" for n in range(2, after, 2)][-3:]
    launch.train("riel", values(begun))
    same(begun, whole)
    told = capsys.readouterr().out
    resumed = RunFolder(begun / "stage2").read_json("manifest").get("resumed")
    if kept:
        assert f"goes on after step {int(kept[-1][5:])}" in told
        assert resumed == [{"after_steps": int(kept[-1][5:]), "refused": []}]
    else:
        assert resumed is None


def test_cut_off_again_and_again(whole, begun, monkeypatch):
    for after in (3, 4, 6, 6):
        cut_off("riel", values(begun), after, monkeypatch)
    launch.train("riel", values(begun))
    same(begun, whole)
    resumed = RunFolder(begun / "stage2").read_json("manifest")["resumed"]
    assert [entry["after_steps"] for entry in resumed] == [2, 2, 4, 4]


def test_stage_1_cut_off_goes_on(whole, tmp_path, monkeypatch):
    cut_off("mef", values(tmp_path), 5, monkeypatch)
    launch.train("mef", values(tmp_path))
    same(tmp_path, whole, "stage1")


def test_cut_off_while_it_evaluates_trains_no_step_again(whole, begun, monkeypatch):
    def broken(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(stage.evaluate, "measure", broken)
        with pytest.raises(MemoryError):
            launch.train("riel", values(begun))
    before = RunFolder(begun / "stage2").read_metrics()
    launch.train("riel", values(begun))
    pd.testing.assert_frame_equal(RunFolder(begun / "stage2").read_metrics(), before)  # times too
    same(begun, whole)


@pytest.mark.parametrize("after", [3, 4])
def test_early_stopping_goes_on_too_and_keeps_the_best_weights(begun, tmp_path, monkeypatch, after):
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(begun / "stage1", undisturbed / "stage1")
    launch.train("riel", values(undisturbed, "riel.patience=1"))
    assert len(RunFolder(undisturbed / "stage2").read_metrics()) == 4  # no better at its second validation
    cut_off("riel", values(begun, "riel.patience=1"), after, monkeypatch)
    launch.train("riel", values(begun, "riel.patience=1"))
    same(begun, undisturbed)


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def tamper(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "torn weights": (lambda c: tear(c / "weights.safetensors"), r"weights.safetensors has [\d,]+ bytes, not"),
    "a changed bit of the optimiser": (lambda c: tamper(c / "optimizer.safetensors"), "optimizer.safetensors has sha256"),
    "a changed state": (lambda c: tamper(c / "state.json"), "state.json has sha256"),
    "a missing file": (lambda c: (c / "random.safetensors").unlink(), "its files are"),
    "no sums": (lambda c: (c / "sums.json").unlink(), "sums.json"),
    "torn sums": (lambda c: tear(c / "sums.json"), "step-00000004 is refused"),
    "metrics cut short": (lambda c: tear(c.parents[1] / "metrics.jsonl"), "metrics.jsonl has .* bytes, and it goes on from"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_taken(whole, begun, monkeypatch, capsys, damage):
    harm, said = DAMAGES[damage]
    assert cut_off("riel", values(begun), 5, monkeypatch)[-1] == "step-00000004"
    harm(begun / "stage2" / "checkpoints" / "step-00000004")
    launch.train("riel", values(begun))
    same(begun, whole)
    told = capsys.readouterr().out
    assert "checkpoint step-00000004 is refused: " in told
    [resumed] = RunFolder(begun / "stage2").read_json("manifest")["resumed"]
    assert resumed["after_steps"] == 2 and re.search(said, resumed["refused"][0])


def test_with_all_checkpoints_torn_it_starts_at_its_beginning(whole, begun, monkeypatch, capsys):
    cut_off("riel", values(begun), 5, monkeypatch)
    for place in (begun / "stage2" / "checkpoints").iterdir():
        tear(place / "weights.safetensors")
    launch.train("riel", values(begun))
    assert "goes on after step 0, its start: no checkpoint is whole" in capsys.readouterr().out
    same(begun, whole)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(whole, begun, monkeypatch):
    def broken(place):
        if place.name.startswith("state") and ".step-00000004" in str(place):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_to_disk", broken)
        with pytest.raises(KeyboardInterrupt):
            launch.train("riel", values(begun))
    places = sorted(place.name for place in (begun / "stage2" / "checkpoints").iterdir())
    assert places[0].startswith(".step-00000004.") and places[1:] == ["step-00000002"]
    launch.train("riel", values(begun))
    same(begun, whole)


def test_sigterm_ends_a_training_after_its_step_with_a_checkpoint(whole, begun):
    p = values(begun, "hardware.checkpoints.every=1000")
    folder = RunFolder(p.folder("riel"))
    folder.write_json("values", p.model_dump(mode="json"))
    command = [sys.executable, "-m", launch.STAGE, "riel", str(folder.path / "values.json")]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        while not (folder.path / "metrics.jsonl").is_file() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    [kept] = (folder.path / "checkpoints").iterdir()
    steps = len(folder.read_metrics())
    assert kept.name == f"step-{steps:08d}" and steps < 7
    assert not (folder.path / "model").exists()
    folder.set_status("running", "killed", parts=launch.keys.stage_parts("riel", p))
    launch.train("riel", p)
    same(begun, whole)


def test_two_processes_whose_starter_is_killed_keep_their_last_step_and_one_process_goes_on(whole, begun):
    two = ["hardware.processes=2", "hardware.checkpoints.every=1000"]
    code = f"from tests.test_checkpoints import *; launch.train('riel', values({str(begun)!r}, *{two!r}))"
    folder = RunFolder(begun / "stage2")
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": f"{config.root()}:tests"}) as process:
        while not (folder.progress and (folder.path / "metrics.jsonl").is_file()) and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    launch.train("riel", values(begun))  # at once: it waits for the two, who write their checkpoint first
    [resumed] = folder.read_json("manifest")["resumed"]
    assert 1 <= resumed["after_steps"] < 7 and not resumed["refused"]
    other = RunFolder(whole / "stage2")
    pd.testing.assert_frame_equal(folder.read_table("rollouts"), other.read_table("rollouts"))
    one, two = (load_file(f.path / "model" / "model.safetensors") for f in (folder, other))
    assert sum((one[n] - two[n]).norm() ** 2 for n in one) ** 0.5 < 1e-5 * sum(w.norm() ** 2 for w in two.values()) ** 0.5


WAITING = """
import sys, time, torch.distributed as dist
from meml_lib.training import keeping
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
dist.barrier()
print("there", flush=True)
if rank:
    time.sleep(60)
keeping.GRACE_S = 1.0
with keeping.sigterm(together=True):
    dist.barrier()
"""


def test_a_process_that_waits_for_one_that_never_comes_ends_after_sigterm_all_the_same(tmp_path):
    start = [sys.executable, "-c", WAITING]
    ranks = [subprocess.Popen([*start, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE) for rank in (0, 1)]
    try:
        for rank in ranks:
            assert rank.stdout.readline() == b"there\n"
        time.sleep(0.5)
        ranks[0].send_signal(signal.SIGTERM)
        assert ranks[0].wait(10) == -signal.SIGKILL
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


# --- on with other values ---------------------------------------------------------------------------------------------


def test_more_steps_go_on_where_they_are_asked_to(whole, begun, capsys):
    keep = "hardware.checkpoints.kept_when_done=1"
    launch.train("riel", values(begun, "riel.steps=4", keep))
    go_on = values(begun, keep, "hardware.checkpoints.go_on=true")
    launch.train("riel", go_on)
    assert "goes on after step 4" in capsys.readouterr().out
    same(begun, whole)  # a constant learning rate: the same as in one go
    folder = RunFolder(begun / "stage2")
    assert folder.read_json("manifest")["continued"] == ["riel.steps: 4 -> 7"] == folder.status["continued"]
    assert len(RunFolder(begun / "stage2.old").read_metrics()) == 4  # the result before is kept
    launch.train("riel", go_on)
    assert "nothing to train" in capsys.readouterr().out
    launch.train("riel", values(begun))  # not a training of these values alone
    assert "because it went on with other values (riel.steps: 4 -> 7)" in capsys.readouterr().out
    assert "continued" not in folder.status and "continued" not in folder.read_json("manifest")


def test_another_learning_rate_goes_on_and_other_changes_are_refused(whole, begun, monkeypatch):
    cut_off("riel", values(begun), 5, monkeypatch)
    launch.train("riel", values(begun, "riel.lr=1e-4", "hardware.checkpoints.go_on=true"))
    metrics, before = (RunFolder(place / "stage2").read_metrics() for place in (begun, whole))
    assert metrics["lr"].tolist() == [before["lr"][0]] * 4 + [1e-4] * 3
    assert RunFolder(begun / "stage2").read_json("manifest")["continued"][0].startswith("riel.lr: ")
    with pytest.raises(RuntimeError, match=r"go_on=true, but more has changed .*riel.questions_per_step: .* set it to false"):
        launch.train("riel", values(begun, "riel.questions_per_step=3", "hardware.checkpoints.go_on=true"))
    with pytest.raises(RuntimeError, match="holds no checkpoint"):
        launch.train("riel", values(begun, "riel.steps=9", "riel.lr=1e-4", "hardware.checkpoints.go_on=true"))


def test_without_checkpoints_a_training_starts_over(whole, begun, monkeypatch):
    off = values(begun, "hardware.checkpoints.every=null")
    assert cut_off("riel", off, 5, monkeypatch) == []
    launch.train("riel", off)
    same(begun, whole)


# --- the learner ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("at_a_time", [learner_module.PART, 100])  # weights whole; and some rows at a time
def test_a_learner_goes_on_to_the_bit(tmp_path, monkeypatch, dtype, optimizer, lora, at_a_time):
    monkeypatch.setattr(learner_module, "PART", at_a_time)
    params = OptimizerParams(
        optimizer=optimizer, lr=1e-3, weight_decay=0.1, warmup_steps=3, decay="linear", max_grad_norm=1.0
    )
    policy = policy_of(PACKED["qwen2"])
    policy.model.to(dtype)
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = "all-linear"
        policy.model = get_peft_model(policy.model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))

    def learner(of):
        return Learner(of, Accelerator(cpu=True), params, steps=9, max_answer_tokens=32, micro_batch_tokens=60)

    other, parts = copy.deepcopy(policy), list(parts_of().values())
    one = learner(policy)
    for _ in range(3):
        one.update(parts)
    weights, moments, place = one.state()
    checkpoints.write(tmp_path, 3, {"weights": weights, "optimizer": moments}, {"learner": place}, kept=1)
    two = learner(other)
    kept, _ = checkpoints.newest(tmp_path)
    two.restore(kept.tensors("weights"), kept.tensors("optimizer"), kept.state["learner"])
    for _ in range(3):
        assert one.update(parts) == two.update(parts)
    for a, b in zip(policy.model.parameters(), other.model.parameters(), strict=True):
        assert a.equal(b)
    for a, b in zip(one.state()[:2], two.state()[:2], strict=True):
        assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    with pytest.raises(ValueError, match="another model's: 0.3.exp_avg"):  # as moments were named once
        two.restore(weights, {"0.3.exp_avg": torch.zeros(3)}, place)
    assert all(a.equal(b) for a, b in zip(policy.model.parameters(), other.model.parameters(), strict=True))  # untouched


def test_a_checkpoint_of_another_model_is_refused():
    params = OptimizerParams(optimizer="adamw", lr=1e-3, weight_decay=0.0, warmup_steps=0, decay="constant", max_grad_norm=None)
    one, two = (
        Learner(policy_of(PACKED[n]), Accelerator(cpu=True), params, steps=1, max_answer_tokens=32, micro_batch_tokens=60)
        for n in ("llama", "qwen2")
    )
    with pytest.raises(ValueError, match=r"weights are another model's: .*lm_head"):
        two.restore(*one.state())


def test_only_the_newest_are_kept_and_nothing_is_pickled(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoints.write(tmp_path, step, {"weights": {"w": torch.full((2,), float(step))}}, {"n": step}, kept=2)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["step-00000006", "step-00000008"]
    kept, refused = checkpoints.newest(tmp_path)
    assert kept.state == {"n": 8} and kept.tensors("weights")["w"].tolist() == [8.0, 8.0] and not refused
    assert {file.suffix for place in tmp_path.iterdir() for file in place.iterdir()} == {".json", ".safetensors"}
    assert json.loads((kept.folder / "sums.json").read_text()).keys() == {"state.json", "weights.safetensors"}
    checkpoints.prune(tmp_path, 0)
    assert not tmp_path.exists()
