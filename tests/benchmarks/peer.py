"""TRL's GRPOTrainer on the same work, as a user would set it for speed; its own loop calls back between steps."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from limits import synchronise
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workload import Timed, Work

from meml_lib.training.policy import Policy

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


class Peer(GRPOTrainer):
    """GRPOTrainer that notes when it samples and scores, and what it sampled."""

    sampled_s = scored_s = 0.0
    sampled: dict[str, Any]
    """What the step trains on, before it is shuffled."""

    def _generate_single_turn(self, prompt_ids, *args, **options):
        started = time.perf_counter()
        answers = super()._generate_single_turn(prompt_ids, *args, **options)  # lists: the device is done
        self.sampled_s = time.perf_counter() - started
        return answers

    def _generate_and_score_completions(self, inputs):
        started = time.perf_counter()
        self.sampled = super()._generate_and_score_completions(inputs)
        synchronise(self.accelerator.device)
        self.scored_s = time.perf_counter() - started - self.sampled_s
        return self.sampled


class Between(TrainerCallback):
    """What happens around each of TRL's steps, and how long the step took."""

    def __init__(self, before: Callable[[int], None], after: Callable[[int, Timed], None]):
        self.trainer: Peer | None = None
        self._before, self._after = before, after
        self._started = self._cpu = 0.0

    def on_step_begin(self, args, state, control, **_):
        self._before(state.global_step)
        synchronise(args.device)
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **_):
        synchronise(args.device)
        total, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
        sampling, scoring = self.trainer.sampled_s, self.trainer.scored_s
        self._after(state.global_step - 1, Timed(sampling, scoring, total - sampling - scoring, cpu))


def trainer(
    work: Work,
    learned: Policy,
    prompts: Sequence[tuple[int, ...]],
    rewards: Callable[[], list[float]],
    *,
    steps: int,
    checkpointing: bool,
    max_grad_norm: float | None = 1.0,
    before: Callable[[int], None] = lambda step: None,
    after: Callable[[int, Timed], None] = lambda step, timed: None,
    passes: int = 1,
) -> Peer:
    """A trainer whose every step is this work, signed advantages in Dr.GRPO's form.

    Args:
      prompts: question by question, under each the experts.
      rewards: of the current step's rollouts, in the order of prompts, G a prompt.
      checkpointing: recompute activations (TRL's default, which saves memory) or keep them (faster).
      max_grad_norm: of clipping; None: no clipping. Ours clips at base.yaml's 1.0.
      before, after: called around each step with its number.
      passes: forward and backward passes that a step is split into.
    Raises: RuntimeError if a prompt's text is not read back as its ids, or an answer is not of the forced length.
    """
    texts = [learned.tokenizer.decode(list(prompt)) for prompt in prompts]
    for text, prompt in zip(texts, prompts, strict=True):
        if tuple(learned.tokenizer(text)["input_ids"]) != tuple(prompt):
            raise RuntimeError(f"TRL would read {text!r} as other token ids than ours")
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        num_iterations=1,
        num_generations=work.group,
        max_completion_length=work.tokens,
        generation_kwargs={"eos_token_id": [work.end_id(learned)]},
        per_device_train_batch_size=work.rows // passes,
        gradient_accumulation_steps=passes,
        gradient_checkpointing=checkpointing,
        bf16=False,  # the weights have the dtype; autocast over them would only add casts
        learning_rate=work.values("signed").riel.lr,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=max_grad_norm or 0.0,  # 0: no clipping
        max_steps=steps,
        shuffle_dataset=False,
        use_cpu=work.device == "cpu",
        seed=work.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    between = Between(before, after)
    peer = Peer(
        model=learned.model,
        reward_funcs=lambda prompts, **_: rewards(),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": texts * steps}),
        processing_class=learned.tokenizer,
        callbacks=[between],
    )
    peer.remove_callback(PrinterCallback)
    peer.eos_token_ids = [work.end_id(learned)]  # else an answer is cut at the tokenizer's own
    between.trainer = peer
    return peer


def check_sampled(peer: Peer, work: Work, prompts: Sequence[tuple[int, ...]]) -> None:
    """Raises: RuntimeError if the last step had other prompts than these, G times each, or other answer lengths."""
    batch = peer.sampled
    masks = batch["prompt_mask"].bool()
    had = [tuple(ids[mask].tolist()) for ids, mask in zip(batch["prompt_ids"], masks, strict=True)]
    if had != [tuple(prompt) for prompt in prompts for _ in range(work.group)]:
        raise RuntimeError("TRL's prompts are not ours")
    lengths = batch["completion_mask"].sum(-1).unique().tolist()
    if lengths != [work.tokens]:
        raise RuntimeError(f"TRL's answers have lengths {lengths}; all should have {work.tokens}")
