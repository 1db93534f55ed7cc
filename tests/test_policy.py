"""Rendering under every kind of chat template, answers with their end token, and saving."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from meml_lib import schema
from meml_lib.training import policy as policies
from meml_lib.training.policy import Row, render

WORDS = "you are expert 1 how many 2 3 SYSTEM DEFAULT USER ANSWER".split()
SYSTEM_ROLE = (
    "{% for m in messages %}{{ m.role | upper }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}ANSWER {% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}SYSTEM DEFAULT {% endif %}" + SYSTEM_ROLE
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + SYSTEM_ROLE
IGNORES_SYSTEM = SYSTEM_ROLE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
OWN_BOS = "{{ bos_token }} " + SYSTEM_ROLE
TWO_BOS = "{{ bos_token }} {{ bos_token }} " + SYSTEM_ROLE


def tokenizer(template: str | None, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    made = policies.word_tokenizer(["<s>", *WORDS])
    made.add_special_tokens({"bos_token": "<s>"})
    made.chat_template = template
    if adds_bos:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
        )
    return made


def rendered(template: str | None, **options) -> str:
    made = tokenizer(template, **options)
    return made.decode(render(made, "you are expert 1", "how many"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (SYSTEM_ROLE, "SYSTEM you are expert 1 USER how many ANSWER"),
        (DEFAULT_SYSTEM, "SYSTEM you are expert 1 USER how many ANSWER"),  # the default must not appear
        (REFUSES_SYSTEM, "USER you are expert 1 how many ANSWER"),
        (IGNORES_SYSTEM, "USER you are expert 1 how many ANSWER"),
        (None, "you are expert 1 how many"),
    ],
)
def test_the_experts_prompt_is_rendered_once_under_every_template(template, expected):
    assert rendered(template) == expected


@pytest.mark.parametrize("template", [OWN_BOS, TWO_BOS])
def test_bos_is_not_doubled(template):
    text = rendered(template, adds_bos=True)
    assert text == "<s> SYSTEM you are expert 1 USER how many ANSWER"


def test_without_a_template_the_tokenizers_bos_is_kept():
    assert rendered(None, adds_bos=True) == "<s> you are expert 1 how many"


def test_an_empty_system_prompt_is_refused():
    with pytest.raises(ValueError, match="system=' '"):
        render(tokenizer(SYSTEM_ROLE), " ", "how many")


def test_an_answer_trains_its_end_token_even_where_pad_is_eos(policy):
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    row = Row(policy.prompt_ids("you are expert equations", "how many"), policy.answer_ids("#### 8"))
    longer = Row(row.prompt, policy.answer_ids("3 + 5 = 8 #### 8"))
    logp_NT, mask_NT = policy.score([row, longer])
    assert row.answer[-1] == policy.tokenizer.pad_token_id
    assert mask_NT[0].tolist() == [True] * 3 + [False] * 5
    alone, _ = policy.score([row])
    assert logp_NT[0, :3].tolist() == pytest.approx(alone[0].tolist(), abs=1e-5)


def test_the_answer_ends_as_the_template_ends_it():
    made = tokenizer(SYSTEM_ROLE.replace("{{ m.content }} ", "{{ m.content }} {% if m.role == 'assistant' %}<|user|> {% endif %}"))
    assert policies._answer_end_id(made) == made.convert_tokens_to_ids("<|user|>")
    assert policies._answer_end_id(tokenizer(SYSTEM_ROLE)) == made.eos_token_id


def test_text_round_trips(policy, task):
    for question in task.questions("train")[:20]:
        assert policy.text(policy.answer_ids(question.rationale)) == question.rationale


def test_an_empty_answer_is_refused():
    with pytest.raises(ValueError, match="1 and 0 tokens"):
        Row((1,), ())


def test_saved_policy_scores_as_before_and_the_same_seed_builds_the_same_model(policy, task, tmp_path):
    row = Row(policy.prompt_ids("you are expert story", "how many"), policy.answer_ids("#### 8"))
    policy.save(tmp_path)
    params = schema.HubModelParams(source="hub", path=str(tmp_path), dtype="float32")
    again = policies.load(params, device="cpu", words=(), seed=0)
    assert torch.equal(policy.score([row])[0], again.score([row])[0])
    assert again.end_ids == policy.end_ids


def test_lora_trains_adapters_only_and_saves_merged(policy, tmp_path):
    policy.save(tmp_path / "base")
    lora = schema.LoraParams(rank=2, alpha=4.0)
    params = schema.HubModelParams(source="hub", path=str(tmp_path / "base"), dtype="float32", lora=lora)
    adapted = policies.load(params, device="cpu", words=(), seed=0)
    trained = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    row = Row(adapted.prompt_ids("you are expert story", "how many"), adapted.answer_ids("#### 8"))
    adapted.model.eval()
    adapted.save(tmp_path / "merged")
    plain = schema.HubModelParams(source="hub", path=str(tmp_path / "merged"), dtype="float32")
    merged = policies.load(plain, device="cpu", words=(), seed=0)
    assert merged.score([row])[0][0].tolist() == pytest.approx(adapted.score([row])[0][0].tolist(), abs=1e-4)
    assert merged.score([row])[0][0].tolist() != pytest.approx(policy.score([row])[0][0].tolist(), abs=1e-3)


def test_a_missing_gguf_package_says_what_to_do():
    with pytest.raises(FileNotFoundError, match="make smollm2"):
        policies.gguf_file("package:no_such_package")


def test_without_a_network_a_model_comes_from_the_hubs_cache(tmp_path, policy):
    cached = tmp_path / "hub" / "models--a--b"
    policy.save(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    code = "from meml_lib import schema\nfrom meml_lib.training import policy\n"
    code += "model = schema.HubModelParams(source='hub', path='a/{}', dtype='float32')\n"
    code += "print(policy.load(model, device='cpu', words=(), seed=0).model.num_parameters())"
    offline = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    weights = f"{policy.model.num_parameters()}\n"
    for name, printed, said in (("b", weights, ""), ("c", "", "'a/c' could not be loaded")):
        command = [sys.executable, "-c", code.format(name)]
        found = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
        assert found.stdout == printed and said in found.stderr, found.stderr
