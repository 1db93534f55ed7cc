"""What a pass does not keep, it computes again: no gradient changes. How much less is kept, test_dryrun.py traces."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from meml_lib.rollouts import cpu
from meml_lib.training import lean as lean_module
from meml_lib.training.lean import lean

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": 50,
}  # fmt: skip


def model_of(kind, dtype=torch.float32, **others):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **others), dtype=dtype)
    for name, weight in model.named_parameters():
        if "norm" in name:  # all ones at first: then a norm's weight could be forgotten
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def gradients(model, within):
    model.zero_grad()
    ids = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(1))
    with within(model):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad]), loss.item()


def plainly(model):
    return torch.enable_grad()


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def loops(request, monkeypatch):
    if request.param == "torch":  # as on a GPU
        monkeypatch.setattr(cpu, "serves", lambda *_: False)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_gradients_are_those_of_the_plain_model(kind):
    model = model_of(kind)
    (plain, loss), (kept_less, same) = (gradients(model, within) for within in (plainly, lean))
    assert same == pytest.approx(loss, rel=1e-6)
    assert ((kept_less - plain).norm() / plain.norm()) < 5e-6


def test_in_bfloat16_they_are_no_further_from_float32_than_the_plain_ones():
    exact, _ = gradients(model_of("llama"), plainly)
    model = model_of("llama").bfloat16()
    apart = [(gradients(model, within)[0].float() - exact).norm() / exact.norm() for within in (plainly, lean)]
    assert apart[1] < 1.2 * apart[0] < 0.05


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_turned_in_one_operation_they_are_the_same_numbers(kind, monkeypatch):
    model, turned = model_of(kind).bfloat16(), []
    rotate = cpu.rotate
    monkeypatch.setattr(cpu, "rotate", lambda *given, **how: turned.append(1) or rotate(*given, **how))
    found, _ = gradients(model, lean)
    assert len(turned) == (2 * 2 * 2 if cpu.serves(model.device, model.dtype) else 0)  # layers, q and k, there and back
    monkeypatch.setattr(lean_module, "_rotated", lambda plain, *given: plain(*given))
    assert gradients(model, lean)[0].equal(found)


@pytest.mark.parametrize("modules", ["all-linear", ["down_proj"], ["gate_proj", "q_proj"]])
def test_adapters_learn_as_in_the_plain_model(modules):
    model = get_peft_model(model_of("llama"), LoraConfig(target_modules=modules, r=4, init_lora_weights=False))
    plain, kept_less = (gradients(model, within)[0] for within in (plainly, lean))
    assert ((kept_less - plain).norm() / plain.norm()) < 5e-6


def test_other_activations_and_checkpointed_models_stay_as_they_are():
    other = model_of("llama", hidden_act="gelu")
    assert torch.allclose(gradients(other, lean)[0], gradients(copy.deepcopy(other), plainly)[0], rtol=1e-5, atol=1e-7)
    with lean(other):
        changed = [name for name, module in other.named_modules() if "forward" in vars(module)]
    assert changed and all(name.endswith("norm") for name in changed)
    other.gradient_checkpointing_enable()
    with lean(other):
        assert not [name for name, module in other.named_modules() if "forward" in vars(module)]


def test_a_model_is_itself_again_also_after_an_error():
    model, rotate = model_of("qwen3"), modeling_qwen3.apply_rotary_pos_emb
    with pytest.raises(KeyError), lean(model):
        assert modeling_qwen3.apply_rotary_pos_emb is not rotate
        raise KeyError
    assert modeling_qwen3.apply_rotary_pos_emb is rotate
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
