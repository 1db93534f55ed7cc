"""A stage that writes what training would, at once: for tests of what stands around training."""

from __future__ import annotations

import sys
import types

import pandas as pd

from meml_lib import config, training
from meml_lib.pipeline import launch
from meml_lib.runs import RunFolder


def run(stage: str, p: config.Run, on_record=None) -> None:
    folder = RunFolder(p.folder(stage))
    steps = p.riel.steps if stage == "riel" else p.mef.steps
    folder.write_json("progress", {"steps": steps, "doing": "training"})
    for step in range(steps):
        record = {"step": step, "loss": 1.0 / (step + 1), "reward": 0.5}
        folder.append_metrics(record)
        on_record(record)
    questions = pd.DataFrame({"question_id": ["q"], "text": ["?"], "gold": ["1"], "difficulty": [1]})
    answers = pd.DataFrame({"question_id": "q", "expert": p.experts.panel, "sample": 0, "text": "1", "answer": "1"})
    answers = answers.assign(correct=pd.array([True] * len(answers), dtype="boolean"), tokens=1, ended=True)
    for split in ("validation", "test"):
        folder.write_table(f"{split}_questions", questions)
        folder.write_table(f"{split}_greedy", answers)
    folder.write_table("test_sampled", answers)
    folder.write_table("teacher_answers" if stage == "mef" else "rollouts", answers)
    if stage == "mef":
        table = pd.DataFrame({"question_id": "q", "prompt": p.experts.panel, "teacher": p.experts.panel, "logp": -1.0})
        folder.write_table("prompt_teacher", table.assign(tokens=2))
        folder.write_table("training_answers", pd.DataFrame({"expert": p.experts.panel, "given": 1, "kept": 1}))
    (folder.path / "model").mkdir()
    (folder.path / "model" / "config.json").write_text("{}")
    (folder.path / "model" / "model.safetensors").write_text(f"weights of {stage}, seed {p.seed}")


def install(run=run):
    """Put `run` in training's place."""
    module = types.ModuleType(launch.STAGE)
    module.run = run
    sys.modules[launch.STAGE] = training.stage = module


def train(stage: str, p: config.Run) -> pd.DataFrame:
    install()
    return launch.train(stage, p)
