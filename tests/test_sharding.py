"""Weights divided over two processes (FSDP2): every kind of model, sampling, early stopping, states and saving."""

from pathlib import Path

import layouts
import pytest
import ranks
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from meml_lib import config, runs
from meml_lib.pipeline import launch
from meml_lib.runs import RunFolder
from meml_lib.schema import HubModelParams
from meml_lib.training import policy
from meml_lib.training.ask import ask
from meml_lib.training.learner import Learner

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def two(folder):
    """What `layouts.py` found in two processes."""
    ranks.launch(2, "layouts.py", str(folder), "cpu", timeout_s=300)
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.fixture(scope="module")
def one():
    return layouts.updates(Accelerator(cpu=True), sharded=False)


def distance(one, other):
    """Norm of the difference over the norm of the weights."""
    assert one.keys() == other.keys()
    return (sum((one[n] - other[n]).square().sum() for n in one) / sum(w.square().sum() for w in one.values())).sqrt().item()


def test_each_process_holds_half(two):
    assert sum(two["held"]) == sum(weight.numel() for weight in layouts.policy_of().model.parameters())
    assert min(two["held"]) > 0.45 * sum(two["held"])


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp"])
@pytest.mark.parametrize("kind", layouts.KINDS, ids=str)
def test_every_kind_of_model_takes_the_same_step_in_every_layout(one, two, kind, layout):
    dtype, lora, again = kind
    plain, found = one[kind], one[kind] if layout == "plain" else two[layout][kind]
    for record, expected in zip(found["records"], plain["records"], strict=True):
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5 if dtype == "float32" else 2e-3)
        assert record["rows/mef"] == 5 and torch.tensor([*record.values()]).isfinite().all()
    moved = {name for name, weight in found["after"].items() if not torch.equal(weight, found["before"][name])}
    assert moved == {name for name in found["after"] if not lora or "lora_" in name}
    assert found["masters"] == {"torch.float32"}
    steps = distance(plain["before"], plain["after"])
    # bfloat16 gradients are rounded before they are summed over processes: a fiftieth of what was moved.
    assert distance(plain["after"], found["after"]) < (1e-5 if dtype == "float32" else 0.02 * steps)


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp"])
def test_gradient_checkpointing_computes_layers_twice_and_changes_nothing(one, two, layout):
    found = one if layout == "plain" else two[layout]
    for dtype, lora, again in layouts.KINDS:
        if again:
            with_it, without = found[dtype, lora, True], found[dtype, lora, False]
            assert with_it["passes"] == 2 * without["passes"] > 0
            assert distance(without["after"], with_it["after"]) < 1e-6


def test_a_state_goes_from_any_layout_to_any_other(two):
    """Through four updates, or saved after two and taken up by a new learner: also by one process from two."""
    for (optimizer, dtype), found in two["restored"].items():
        assert distance(found["through"], found["again"]) == 0
        again = layouts.learner_of(layouts.policy_of(dtype), Accelerator(cpu=True), optimizer=optimizer)
        again.restore(*found["state"])
        layouts.steps(again, 2)
        exact = (optimizer, dtype) == ("adamw", "float32")
        assert distance(found["through"], layouts.whole(again.model)) < (1e-6 if exact else 1e-3)
        if exact:
            fresh = layouts.learner_of(layouts.policy_of(dtype), Accelerator(cpu=True), optimizer=optimizer)
            weights, _, place = found["state"]
            fresh.restore(weights, {}, place)  # moments lost
            layouts.steps(fresh, 2)
            assert distance(found["through"], layouts.whole(fresh.model)) > 1e-4


def test_an_undivided_state_is_restored_exactly():
    for found in layouts.restored(Accelerator(cpu=True), sharded=False).values():
        assert distance(found["through"], found["again"]) == 0


def test_processes_sample_unequal_shares_and_draw_what_one_process_draws(two):
    """The first way reads the gathered weights; the second runs the model, whose hooks must not wait for the other process."""
    learned, (task, panel) = layouts.policy_of(), layouts.setting()
    assert len(two["decoder [2, 0]"]) == len(two["forward [2, 0]"]) == 2 * 2 * 2
    assert two["decoder [1, 2]"] == two["decoder [2, 0]"][:4] and two["forward [1, 2]"] == two["forward [2, 0]"][:4]
    questions = task.questions("train")[:2]
    asked = ask(learned, task, panel, questions, layouts.SAMPLING, rollouts=2, key=(0,))
    assert [row["text"] for row in asked.rows] == two["decoder [2, 0]"] == two["forward [2, 0]"]
    learner = layouts.learner_of(learned, Accelerator(cpu=True))
    layouts.steps(learner, 1)  # the one that early stopping took back, all but the optimiser's moments
    learned.model.load_state_dict(layouts.policy_of().model.state_dict())
    expected = [record["grad_norm"] for record in layouts.steps(learner, 2)]
    assert two["after asking"] == pytest.approx(expected, rel=1e-5)


def test_early_stopping_keeps_and_restores_divided_weights(two):
    assert two["moved"] and two["best"]


def test_a_divided_model_is_saved_whole_and_adapters_merged(two, folder):
    for name, lora in (("saved", False), ("merged", True)):
        saved = HubModelParams(source="hub", path=str(folder / name), dtype="float32", lora=None)
        read = policy.load(saved, device="cpu", words=(), seed=0)
        assert type(read.model).__name__ == "LlamaForCausalLM" == read.model.config.architectures[0]
        if not lora:
            assert distance(two["saved"], layouts.whole(read.model)) == 0
        learned = layouts.policy_of(lora=lora)
        layouts.steps(layouts.learner_of(learned, Accelerator(cpu=True)), 2)
        learned.save(folder / f"{name}-plain")
        saved = saved.model_copy(update={"path": str(folder / f"{name}-plain")})
        plain = policy.load(saved, device="cpu", words=(), seed=0)
        assert distance(layouts.whole(plain.model), layouts.whole(read.model)) < 1e-5
        assert read.end_ids == plain.end_ids


def test_a_stage_started_by_its_values_alone_is_divided_and_gives_what_one_process_gives(tmp_path, monkeypatch):
    """launch.train with the layout cpu2-fsdp and gradient checkpointing, against training inside this process."""
    monkeypatch.setenv(runs.HEADLESS, "1")
    monkeypatch.chdir(ROOT)
    layout = yaml.safe_load((ROOT / "params" / "hardware" / "cpu2-fsdp.yaml").read_text())["hardware"]
    divided = {f"hardware.{key}": value for key, value in (layout | {"gradient_checkpointing": True}).items()}
    models, tables = [], []
    for name, values in (("one", {}), ("two", divided)):
        values = values | {"mef.optimizer": "adamw", "mef.lr": 3e-4, "mef.patience": 3}
        p = config.load_run("params/smoke.yaml", values, run_dir=tmp_path / name)
        metrics = launch.train("mef", p)
        tables.append([metrics["loss"].tolist(), RunFolder(p.folder("mef")).read_table("test_sampled")["text"].tolist()])
        models.append(load_file(p.folder("mef") / "model" / "model.safetensors"))
    assert distance(*models) < 1e-5
    assert tables[0][0] == pytest.approx(tables[1][0], rel=1e-5) and tables[0][1] == tables[1][1]


def test_a_layout_that_is_not_what_was_asked_for_is_told(two):
    found = "embed_tokens.weight is a Parameter over 1 process(es), in a DistributedDataParallel"
    assert "fsdp.yaml asks for FSDP: weights divided over 2 process(es)" in two["faults"]["data parallel"]
    assert found in two["faults"]["data parallel"]
    assert "weights are another model's" in two["faults"]["another model"]
    alone = Accelerator(cpu=True)
    if not torch.distributed.is_initialized():
        with pytest.raises(RuntimeError, match="FSDP needs a process group"):
            layouts.learner_of(layouts.policy_of(), alone, sharded=True)
    learner = layouts.learner_of(layouts.policy_of(), alone)
    assert isinstance(learner, Learner)
    state = learner.state()
    state.weights["model.norm.weight"] = state.weights["model.norm.weight"][:3]
    with pytest.raises(ValueError, match=r"weights are another model's: model.norm.weight \(1 differ\)"):
        learner.restore(*state)
