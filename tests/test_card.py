"""A trained model as others get it: an ordinary folder that answers, under each expert's prompt, as it did here."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from meml_lib import config, runs, tasks
from meml_lib.analysis import card
from meml_lib.pipeline import keys, launch
from meml_lib.runs import RunFolder
from meml_lib.training import policy


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Stage 1 long enough that its answers end, and stage 2."""
    os.environ[runs.HEADLESS] = "1"
    os.environ["SOME_API_KEY"] = "secret-secret-secret"
    values = {"mef.steps": 30, "riel.steps": 1, "evaluate.test_questions": 4, "tracking.project": "secret-secret-secret"}
    p = config.load_run("params/smoke.yaml", values, run_dir=tmp_path_factory.mktemp("run"))
    launch.train("mef", p)
    launch.train("riel", p)
    del os.environ["SOME_API_KEY"]
    return p


@pytest.mark.parametrize("stage", ["mef", "riel"])
def test_a_pipeline_answers_under_each_experts_prompt_as_the_evaluation_did(trained, stage):
    folder = RunFolder(trained.folder(stage))
    place, answers = str(folder.path / "model"), folder.read_table("test_greedy").set_index(["question_id", "expert"])
    told = json.loads((folder.path / "model" / "experts.json").read_text())
    assert [expert["name"] for expert in told] == list(trained.experts.panel)
    answer = pipeline("text-generation", model=place)
    for question in tasks.load(trained.task).questions("test")[:4]:
        for expert in told:
            chat = [{"role": "system", "content": expert["system"]}, {"role": "user", "content": question.text}]
            said = answer(chat, max_new_tokens=trained.sampling.max_answer_tokens, do_sample=False)
            assert said[0]["generated_text"][-1]["content"].strip() == answers.loc[(question.id, expert["name"]), "text"]


def test_it_is_an_ordinary_folder(trained):
    place = trained.folder("riel") / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    assert tokenizer.chat_template and len(tokenizer) == model.config.vocab_size
    assert set(model.generation_config.eos_token_id) == set(policy.Policy(model, tokenizer).end_ids)


def test_the_card_says_what_made_it_how_well_it_answers_and_no_secret(trained):
    folder = RunFolder(trained.folder("riel"))
    text = (folder.path / "model" / card.NAME).read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "text-generation" and "riel" in head["tags"]
    made = folder.read_json("manifest")
    assert made["commit"] in text and f"`{made['command']}`" in text and "secret" not in text
    right = folder.read_table("test_greedy").query("expert == @trained.experts.panel[0]")["correct"].fillna(False).mean()
    assert f"| {trained.experts.panel[0]} | {100 * right:.1f} [" in text and "the 4 test questions" in text


def test_the_cards_lines_of_code_run(trained):
    place = trained.folder("riel") / "model"
    code = (place / card.NAME).read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]


def test_another_card_trains_nothing_again(trained):
    parts, place = keys.stage_parts("riel", trained), trained.folder("mef") / "model"
    (place / card.NAME).write_text("another command")
    assert keys.stage_parts("riel", trained) == parts


@pytest.mark.parametrize(("base", "licence"), [("Qwen/Qwen2.5-Math-1.5B", "apache-2.0"), ("someone/else", "other")])
def test_a_base_from_the_hub_is_named_with_its_licence(base, licence):
    p = config.load_run("params/paper-qwen-gsm8k.yaml", {"model.path": base})
    answers = pd.DataFrame({"question_id": "q", "expert": list(p.experts.panel)}).assign(correct=pd.array([True] * 3, "boolean"))
    head = yaml.safe_load(card.text("mef", p, {}, answers).split("---")[1])
    assert (head["base_model"], head["license"]) == (base, licence)


def test_adapters_stand_alone_too(tmp_path, task, panel):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    from meml_lib import schema

    words = [*task.words(), *(word for expert in panel for word in expert.system.split())]
    size = schema.ScratchModelParams(
        source="scratch", dtype="float32", hidden_size=32, layers=2, heads=1, mlp_size=64, max_positions=128
    )
    learned = policy.load(size, device="cpu", words=words, seed=0)
    learned.save(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    learned.model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    learned.save(tmp_path / "stage" / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "stage" / "model")
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "stage" / "adapter").merge_and_unload()
    for (name, one), two in zip(merged.named_parameters(), alone.parameters(), strict=True):
        assert (one - two).abs().max() < 1e-6, name
