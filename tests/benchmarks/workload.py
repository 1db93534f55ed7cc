"""The work that both trainers are given: a model, prompts, an answer length, and rewards out of a table."""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from limits import synchronise

from meml_lib import config, experts, tasks
from meml_lib.rollouts import Rollout, native
from meml_lib.training import losses, policy, riel, stage

SHAPES = {  # public configs; weights drawn at random
    "smollm2-shape": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    "qwen2.5-1.5b-shape": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}
MODELS = ("embedded", "smollm2", *SHAPES)
PARTS = ("base.yaml", "tasks/wordproblems.yaml", "experts/wordproblems.yaml")
ARMS = {"meml": (), "signed": ("objectives/dr-grpo.yaml",)}
"""Our objectives, by name: the paper's, and Dr.GRPO's on the rows that TRL trains on."""
NEVER_FLUSHED = 10**6  # examples that the buffer holds: offers are made and kept, and no step is a supervised one


@dataclass(frozen=True)
class Work:
    """One step's work; the same values give the same weights, prompts and rewards."""

    model: str
    questions: int
    experts: int
    group: int
    """Rollouts of each question and expert."""
    tokens: int
    """Of every answer: its length is forced."""
    device: str
    dtype: str
    threads: int
    micro_batch_tokens: int | None = None
    """Of ours; None: as the hardware preset has it."""
    layers: int | None = None
    """Of a shape, where fewer than its own are wanted."""
    vocabulary: int | None = None
    """Tokens of the embedded model's vocabulary, where more than the task's are wanted."""
    seed: int = 0

    @property
    def rows(self) -> int:
        return self.questions * self.experts * self.group

    def values(self, arm: str) -> config.Run:
        """The values of a run whose every step is this work."""
        model = {"smollm2": "smollm2-135m"}.get(self.model, "embedded")
        on_cpu = "cpu1" if self.model == "embedded" else "cpu1-2threads"
        hardware = "gpu1" if self.device == "cuda" else on_cpu  # as the presets
        uses = [
            *PARTS,
            f"models/{model}.yaml",
            f"hardware/{hardware}.yaml",
            *ARMS[arm],
        ]
        overrides = {
            "seed": self.seed,
            "model.dtype": self.dtype,
            "sampling.max_answer_tokens": self.tokens,
            "hardware.threads": self.threads,
            "riel.steps": 10**6,
            "riel.questions_per_step": self.questions,
            "riel.rollouts_per_expert": self.group,
            "evaluate.validation_questions": 1,  # never asked; base.yaml's are more than the task has
        }
        if self.micro_batch_tokens is not None:
            overrides["hardware.micro_batch_tokens"] = self.micro_batch_tokens
        if self.model == "embedded":
            overrides["model.max_positions"] = 256 + self.tokens
        if not ARMS[arm]:
            overrides["riel.objective.buffer_sft.capacity"] = NEVER_FLUSHED
            overrides["riel.objective.buffer_sft.wrong_over"] = self.group * 3 // 4  # the paper's 6 of 8
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{arm}.yaml"
            file.write_text(yaml.safe_dump({"use": uses}))
            return config.load_run(file, overrides)

    def panel(self) -> experts.Panel:
        """The task's experts; more of them are told by their number alone."""
        named = experts.load_panel(self.values("meml").experts)
        more = (
            experts.Expert(f"more{i}", f"you are expert {i} : story", named[0].teacher)
            for i in itertools.count(len(named))
        )
        return experts.Panel(itertools.islice(itertools.chain(named, more), self.experts))

    def policy(self) -> policy.Policy:
        """The policy, on its device; its answers end at their length alone."""
        p = self.values("meml")
        task = tasks.load(p.task)
        words = [*task.words(), *(word for expert in self.panel() for word in expert.system.split())]
        if self.model in SHAPES:
            learned = _random(SHAPES[self.model], self, words)
        else:
            words = words if self.vocabulary is None else _padded(words, self.vocabulary)
            learned = policy.load(p.model, device=self.device, words=words, seed=self.seed)
        learned.end_ids = (self.end_id(learned),)
        return learned

    def asked(self) -> list[tasks.Question]:
        """The questions of every step."""
        return tasks.load(self.values("meml").task).questions("train")[: self.questions]

    def prompts_BE(self, learned: policy.Policy) -> list[list[tuple[int, ...]]]:
        """What the policy is asked, by question and expert."""
        return [
            [learned.prompt_ids(expert.system, question.text) for expert in self.panel()] for question in self.asked()
        ]

    @staticmethod
    def end_id(learned: policy.Policy) -> int:
        """An id outside the vocabulary: no answer ends before its length."""
        return learned.model.config.vocab_size

    def rewards(self, success: float) -> np.ndarray:
        """The table of rewards, bool [B, E, G]: that share of the rollouts, rounded, placed at random."""
        right = np.arange(self.rows) < round(success * self.rows)
        drawn = np.random.default_rng([self.seed, round(1000 * success)]).permutation(right)
        return drawn.reshape(self.questions, self.experts, self.group)

    def mixed_rewards(self) -> np.ndarray:
        """Another table, bool [B, E, G]: every group has right and wrong rollouts, of varying number."""
        rng, shape = np.random.default_rng(self.seed), (self.questions, self.experts, self.group)
        rank_BEG = rng.random(shape).argsort(-1).argsort(-1)
        return rank_BEG < rng.integers(1, self.group, (*shape[:2], 1))


def _padded(words: Sequence[str], size: int) -> list[str]:
    """The words and as many more, never asked, as make a vocabulary of this size."""
    return [*words, *(f"word{i}" for i in range(size - len(policy.word_tokenizer(words))))]


def _random(shape: Mapping, work: Work, words: Sequence[str]) -> policy.Policy:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(shape) | ({"num_hidden_layers": work.layers} if work.layers else {})
    tokenizer = policy.word_tokenizer(_padded(words, sizes["vocab_size"]))
    values = AutoConfig.for_model(
        **sizes,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(work.seed)
    with torch.device(work.device):
        model = AutoModelForCausalLM.from_config(values, dtype=getattr(torch, work.dtype))
    return policy.Policy(model, tokenizer)


class TableTask:
    """A task of B questions, whose grades are read off a table, whatever the answer says."""

    def __init__(self, questions: Sequence[tasks.Question]):
        self._questions = list(questions)
        self._given: dict[str, Iterator[bool]] = {}

    def set_rewards(self, rewards_BEG: np.ndarray) -> None:
        """Grade the answers of all steps to come by this table; they are asked for in (expert, rollout) order."""
        by_question = zip(self._questions, rewards_BEG, strict=True)
        self._given = {question.id: itertools.cycle(table.ravel().tolist()) for question, table in by_question}

    def questions(self, split: tasks.Split) -> list[tasks.Question]:
        return self._questions

    def grade(self, text: str, question: tasks.Question) -> tasks.Graded:
        return tasks.Graded("", next(self._given[question.id]))


@dataclass(frozen=True)
class Timed:
    """Seconds of one step."""

    sampling: float
    scoring: float
    """Between sampling and update: reading and grading answers, rewards, advantages, a second pass if there is one."""
    update: float
    cpu: float
    """Of the whole step, all threads together: other load on the machine changes it little."""

    @property
    def total(self) -> float:
        return self.sampling + self.scoring + self.update


class Ours:
    """`riel.train`, a step at a time: both arms train one policy with one learner."""

    def __init__(self, work: Work, learned: policy.Policy, arms: Sequence[str] = tuple(ARMS)):
        self.work, self.task = work, TableTask(work.asked())
        p = work.values("meml")
        learner = stage.learner_of(p, p.riel, learned, stage.accelerator_of(p), steps=p.riel.steps)
        self._steps = {arm: riel.train(work.values(arm), learned, learner, self.task, work.panel()) for arm in arms}

    def step(self, arm: str, success: float) -> Timed:
        """One step of the shipped algorithm."""
        self.task.set_rewards(self.work.rewards(success))
        with forced_length() as sampled:
            synchronise(self.work.device)
            started, cpu = time.perf_counter(), time.process_time()
            metrics = next(self._steps[arm]).metrics
            synchronise(self.work.device)
            total, cpu = time.perf_counter() - started, time.process_time() - cpu
        if metrics["answer_tokens"] != self.work.tokens or metrics.get("rows/buffer_sft"):
            raise RuntimeError(f"not the step that was meant: {metrics}")
        sampling = sum(sampled)
        return Timed(sampling, metrics["sample_seconds"] - sampling, total - metrics["sample_seconds"], cpu)


@contextmanager
def forced_length() -> Iterator[list[float]]:
    """Count answers of the forced length as ended (`ask` would read a truncated one as unreadable); seconds sampled."""
    plain, taken = native.sample, []

    def sample(model, *args, **options) -> list[Rollout]:
        started = time.perf_counter()
        rollouts = plain(model, *args, **options)  # lists of numbers: the device is done
        taken.append(time.perf_counter() - started)
        return [replace(rollout, ended=True) for rollout in rollouts]

    native.sample = sample
    try:
        yield taken
    finally:
        native.sample = plain


def trained_rows(
    work: Work, arm: str, success: float, prompts_BE: Sequence[Sequence[tuple[int, ...]]]
) -> dict[tuple[int, ...], list[int]]:
    """Answer lengths, by prompt, of the rows that count in an arm's update; by `losses.on_rollouts` itself."""
    rewards_BEG = torch.from_numpy(work.rewards(success)).float()
    some = Rollout((0,) * work.tokens, (0.0,) * work.tokens, 0.0, True)
    rollouts_BEG = [[[some] * work.group for _ in row] for row in prompts_BE]
    ties_BE = torch.rand(
        work.questions, work.experts, dtype=torch.float64, generator=torch.Generator().manual_seed(work.seed)
    )
    experts_B = riel.best_and_worst(rewards_BEG, ties_BE)
    parts = losses.on_rollouts(work.values(arm).riel.objective, rewards_BEG, rollouts_BEG, prompts_BE, experts_B)
    rows: dict[tuple[int, ...], list[int]] = {}
    for row in (row for part in parts for row in part.rows if row.count):
        rows.setdefault(row.row.prompt, []).append(len(row.row.answer))
    return rows


def twin(learned: policy.Policy, dtype: torch.dtype | None = None) -> policy.Policy:
    """A copy of its own; in another dtype where one is named."""
    copied = policy.Policy(copy.deepcopy(learned.model).to(dtype or learned.model.dtype), learned.tokenizer)
    copied.end_ids = learned.end_ids
    return copied
