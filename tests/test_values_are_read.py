"""Every value that a file may give is read by the library: reads are recorded while everything runs once, small."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import FaultyServer
from pydantic import BaseModel

from meml_lib import config, experts, runs, schema, tasks
from meml_lib.analysis import claims, report
from meml_lib.experts import collect
from meml_lib.pipeline import graph, launch
from meml_lib.training import dryrun, policy

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "meml_lib"
COMPOSES = {"schema.py", "config.py"}  # reading a value there proves nothing: all are composed, checked and shown
Field = tuple[type[BaseModel], str]

# Values that say how values are composed: config.py and schema.py are their readers.
OF_COMPOSING = {
    ("ExpertsParams", "only"): "schema.py",
    ("StudyParams", "run_file"): "config.py",
    ("StudyParams", "compare"): "schema.py",
}
# Needs a package that a plain installation lacks; the reader is policy.load, which reads these of every kind of model.
NOT_RUN = {("GgufModelParams", name): "training/policy.py" for name in ("dtype", "lora", "path", "source")}


def sections(*roots: Any) -> Iterator[type[BaseModel]]:
    """Every section that these hold, however deep."""
    found: dict[type[BaseModel], None] = {}
    waiting = list(roots)
    while waiting:
        for kind in config._kinds(waiting.pop()):
            if kind not in found:
                found[kind] = None
                waiting += [info.annotation for info in kind.model_fields.values()]
    return iter(found)


def unread(kinds: list[type[BaseModel]], reads: set[Field]) -> list[str]:
    """Fields of these sections that no code of the library has read."""
    known = OF_COMPOSING.keys() | NOT_RUN.keys()
    fields = [(kind, name) for kind in kinds for name in kind.model_fields if (kind.__name__, name) not in known]
    return [f"{kind.__name__}.{name}" for kind, name in fields if (kind, name) not in reads]


class Recorder:
    """Notes which fields of a section the library's code reads, whatever the instance is called there."""

    def __init__(self) -> None:
        self.reads: set[Field] = set()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        plain_get, plain_iter = schema.Section.__getattribute__, schema.Section.__iter__

        def get(section: BaseModel, name: str) -> Any:
            if self._by_the_library():
                self._note(type(section), [name])
            return plain_get(section, name)

        def iterate(section: BaseModel) -> Iterator:
            if self._by_the_library():  # for name, value in section: reads whatever it holds
                self._note(type(section), list(type(section).model_fields))
            return plain_iter(section)

        patch.setattr(schema.Section, "__getattribute__", get)
        patch.setattr(schema.Section, "__iter__", iterate)

    def _by_the_library(self) -> bool:
        file = Path(sys._getframe(2).f_code.co_filename)
        return file.is_relative_to(LIBRARY) and file.name not in COMPOSES

    def _note(self, kind: type[BaseModel], names: list[str]) -> None:
        holders = [base for base in kind.__mro__ if issubclass(base, BaseModel)]
        self.reads |= {(base, name) for base in holders for name in names if name in base.model_fields}


# --- everything, once and small ---------------------------------------------------------------------------------------


def train(folder: Path) -> None:
    """Both stages, and what is said of them before and after."""
    small = {"mef.steps": 2, "riel.steps": 1, "riel.validate_every": 1}
    p = config.load_run("params/smoke.yaml", small, run_dir=folder / "run")
    for which, more in (("mef", {}), ("riel", {}), ("riel", {"riel.steps": 2})):
        launch.train(which, config.load_run("params/smoke.yaml", small | more, run_dir=folder / "run"))
    many = config.load_run("params/smoke.yaml", {"hardware.processes": 2, "hardware.device": "cuda"})
    launch._command(many, folder, [])
    study = config.load_study("params/studies/smoke.yaml", reports_dir=folder)
    graph.jobs(study)
    report.gather(study)
    report.command(config.load_study("params/studies/demo-short.yaml"))  # has overrides of its own
    for file in ("params/smoke.yaml", "params/paper-qwen-gsm8k.yaml"):
        list(dryrun.describe(config.load_study(file, reports_dir=folder)))
    lora = schema.LoraParams(rank=2, alpha=2)
    policy.load(p.model.model_copy(update={"lora": lora}), device="cpu", words=["a"], seed=0)


def released_sets(folder: Path, patch: pytest.MonkeyPatch) -> None:
    for part in ("train", "test"):
        rows = [{"question": f"What is {n}?", "answer": f"<<{n}+0={n}>>\n#### {n}"} for n in range(20)]
        (folder / "gsm8k").mkdir(exist_ok=True)
        (folder / "gsm8k" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    patch.setenv("MEML_DATA_DIR", str(folder))
    held = {"source": "auto", "train_questions": 5, "validation_questions": 3, "split_seed": 0}
    tasks.load(schema.ReleasedParams(name="gsm8k", **held)).questions("train")
    tasks.load(schema.Gsm8kResplitParams(name="gsm8k-test-resplit", test_questions=4, **held)).questions("train")


def answers(folder: Path) -> None:
    """Teachers' answers: from a file, a local data set of the hub's kind, and an endpoint that is asked."""
    rows = [{"id": f"q{n}", "question": f"What is {n}?", "answer": "1"} for n in range(6)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shares = {"validation_share": 0.2, "test_share": 0.2, "split_seed": 0}
    task_values = {"name": "jsonl", "path": str(folder / "questions.jsonl"), "answer": "number", **shares}
    task = tasks.load(schema.JsonlParams(**task_values))
    own = [{"q": row["question"], "id": row["id"], "text": "1", "why": "so", "whole": "stop", "who": "me"} for row in rows]
    (folder / "own").mkdir()
    (folder / "own" / "train.jsonl").write_text("\n".join(map(json.dumps, own)))
    columns = {"question_id": None, "question": "q", "reasoning": "why", "ended": "whole"}
    for place in ({"path": str(folder / "own" / "train.jsonl")}, {"hub": {"name": str(folder / "own")}}):
        teacher = {"kind": "table", "model": "m", "where": {"who": "me"}, "columns": columns, **place}
        experts.teacher_answers(task, [experts.Expert("mine", "x", schema.TableTeacher(**teacher))])
    claims.settings(config.load_run("params/gsm8k-published.yaml"))  # who the teachers are, as the report tells it
    with FaultyServer() as server:
        teacher = {"kind": "api", "model": "m", "base_url": server.url, "path": str(folder / "store.jsonl")}
        teacher |= {"max_answer_tokens": 20, "price": {"input": 1, "output": 1}}
        values = {"task": task_values, "experts": {"panel": ["a"], "known": {"a": {"system": "x", "teacher": teacher}}}}
        limits = {"evaluate.validation_questions": 1, "evaluate.test_questions": 1}
        p = config.load_run("params/smoke.yaml", values | limits | {"collect.budget.money": 9}, run_dir=folder / "asked")
        assert collect.run(p).missing == 0
        store = folder / "store.jsonl"
        store.write_text(store.read_text().replace('"reasoning": ""', '"reasoning": "so"'))
        experts.teacher_answers(task, experts.load_panel(p.experts))


@pytest.fixture(scope="module")
def reads(tmp_path_factory) -> set[Field]:
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        tasks.load.cache_clear()  # what other tests loaded has been read already
        patch.chdir(ROOT)
        patch.setenv(runs.HEADLESS, "1")
        recorder.install(patch)
        train(tmp_path_factory.mktemp("trained"))
        answers(tmp_path_factory.mktemp("answers"))
        released_sets(tmp_path_factory.mktemp("released"), patch)
    return recorder.reads


# --- what must hold ---------------------------------------------------------------------------------------------------


def test_the_library_reads_every_value(reads):
    left = unread([*sections(schema.RunParams, schema.StudyParams)], reads)
    assert not left, f"nothing reads {', '.join(left)}"


class UnreadBuffer(schema.BufferSftParams):
    refill: int = 1


class UnreadSharedName(schema.HardwareParams):
    """Other sections have steps, which the library reads there."""

    steps: int = 1


class UnreadDeeper(schema.RunParams):
    hardware: UnreadSharedName


@pytest.mark.parametrize(
    ("mutant", "found"),
    [
        (UnreadBuffer, ["UnreadBuffer.refill"]),
        (UnreadSharedName, ["UnreadSharedName.steps"]),
        (UnreadDeeper, ["UnreadSharedName.steps"]),
    ],
)
def test_a_value_that_is_added_and_not_read_is_reported(reads, mutant, found):
    as_if_read = reads | {(kind, name) for kind in sections(mutant) for base, name in reads if issubclass(kind, base)}
    assert unread(list(sections(mutant)), as_if_read) == found


@pytest.mark.parametrize("part", ["mef", "riel"])
def test_a_value_counts_as_read_only_where_its_own_section_is_read(part):
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        p = config.load_run("params/smoke.yaml")
        recorder.install(patch)
        exec(compile(f"p.{part}.lr", str(LIBRARY / "training" / "x.py"), "eval"), {"p": p})
        exec(compile("p.hardware.threads", str(LIBRARY / "config.py"), "eval"), {"p": p})
        exec(compile("p.evaluate.test_questions", str(ROOT / "tests" / "x.py"), "eval"), {"p": p})
    holder, other = (schema.MefParams, schema.RielParams) if part == "mef" else (schema.RielParams, schema.MefParams)
    assert (holder, "lr") in recorder.reads and (other, "lr") not in recorder.reads
    assert not {(schema.HardwareParams, "threads"), (schema.EvaluateParams, "test_questions")} & recorder.reads


def test_what_is_not_run_here_names_a_file_that_reads_it():
    for (kind, name), file in (OF_COMPOSING | NOT_RUN).items():
        assert name in getattr(schema, kind).model_fields, f"{kind}.{name} is no more"
        tree = ast.parse((LIBRARY / file).read_text())
        named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        named |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert name in named, f"{file} does not read {kind}.{name}"
