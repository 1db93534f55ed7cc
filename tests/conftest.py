"""Shared pieces: a model small enough that a test takes a second, and a task to ask it."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: over-subscription slows small models several times
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from meml_lib import experts, schema, tasks

collect_ignore = ["benchmarks"]  # test_benchmarks.py tests them; doctests would import trl, which only they need


@pytest.fixture(scope="session")
def task() -> tasks.Task:
    return tasks.load(
        schema.WordProblemsParams(
            name="wordproblems",
            train_questions=64,
            validation_questions=8,
            test_questions=8,
            min_operations=1,
            max_operations=2,
            largest_number=40,
            world_seed=3,
        )
    )


@pytest.fixture(scope="session")
def panel() -> experts.Panel:
    known = {
        name: schema.ExpertParams(
            system=f"you are expert {name}", teacher=schema.DerivedTeacher(kind="derived", style=name)
        )
        for name in ("equations", "story", "groups")
    }
    return experts.load_panel(schema.ExpertsParams(panel=tuple(known), known=known))


@pytest.fixture
def policy(task, panel):
    from meml_lib.training import policy

    words = [*task.words(), *(word for expert in panel for word in expert.system.split())]
    params = schema.ScratchModelParams(
        source="scratch", dtype="float32", hidden_size=32, layers=2, heads=1, mlp_size=64, max_positions=128
    )
    return policy.load(params, device="cpu", words=words, seed=0)
