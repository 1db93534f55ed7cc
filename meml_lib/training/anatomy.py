"""What stage 2 is about to do, shown before it trains: a prompt, a graded rollout and a row of each loss."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from meml_lib import config, experts, tasks
from meml_lib.training import losses, policy, riel, stage
from meml_lib.training.ask import ask
from meml_lib.training.credit import best_and_worst

_COLOURS = {"prompt": "#e8e8e8", "answer": "#9fd3a8", "end": "#f2b36b"}


@dataclass(frozen=True)
class Preview:
    """Shows itself in a notebook; `rollouts` is the answers table of the question that is shown."""

    rollouts: list[dict]
    sections: list[tuple[str, str]]
    """Heading and HTML."""

    def _repr_html_(self) -> str:
        parts = "".join(f"<h4>{html.escape(heading)}</h4>{body}" for heading, body in self.sections)
        return f'<div style="max-width:60em">{parts}</div>'


def preview(p: config.Run, *, questions: int = 4) -> Preview:
    """Ask a few training questions with stage 1's model and build, without training, the rows of each loss.

    Args: questions: how many are looked through for the one on which the experts differ most.
    Raises: FileNotFoundError if stage 1 has not been trained.
    """
    task, panel = tasks.load(p.task), experts.load_panel(p.experts)
    learned = _stage1(p, stage.accelerator_of(p))
    asked = ask(
        learned, task, panel, task.questions("train")[:questions], p.sampling, rollouts=p.riel.rollouts_per_expert,
        key=(p.seed, "preview"),
    )  # fmt: skip
    rewards_BEG = asked.rewards_BEG
    ties_BE = torch.rand(rewards_BEG.shape[:2], generator=torch.Generator().manual_seed(p.seed))
    experts_B = best_and_worst(rewards_BEG, ties_BE)
    shown = int(rewards_BEG.mean(-1).var(-1, correction=0).argmax()) if len(panel) > 1 else 0
    question, group = task.questions("train")[shown], p.riel.rollouts_per_expert
    rows = asked.rows[shown * len(panel) * group :][: len(panel) * group]

    sections = [(f"Question {question.id}, gold answer {question.gold}", f"<p>{html.escape(question.text)}</p>")]
    for e, expert in enumerate(panel):
        first, right = rows[e * group], int(rewards_BEG[shown, e].sum())
        verdict = {True: "right", False: "wrong", None: "unreadable"}[first["correct"]]
        body = (
            f"<b>prompt</b>{_pre(learned.tokenizer.decode(asked.prompts_BE[shown][e]))}"
            f"<b>first rollout</b>, read as {html.escape(str(first['answer']))}: {verdict}{_pre(first['text'])}"
        )
        sections.append((f"Expert {expert.name}: {right} of {group} right", body))

    objective = p.riel.objective
    parts = losses.on_rollouts(objective, rewards_BEG, asked.rollouts_BEG, asked.prompts_BE, experts_B)
    if objective.buffer_sft:
        prompt = asked.prompts_BE[shown][int(experts_B[1][shown])]
        gold = [policy.Row(prompt, learned.answer_ids(question.rationale))]
        parts.append(losses.buffer_sft(objective.buffer_sft, gold))
    sections += [_one_row(learned, part) for part in parts]
    legend = " ".join(f'<span style="background:{colour}">{name}</span>' for name, colour in _COLOURS.items())
    sections.append(("Colours", f"{legend}: only answer and end tokens count in a loss"))
    return Preview(rows, sections)


def steps(p: config.Run, *, questions_per_step: int) -> Iterator[riel.Step]:
    """Stage 2 by hand: each `next` asks, grades and updates a copy of stage 1's model in this process.

    Writes nothing. Raises: FileNotFoundError or OSError if stage 1 has not been trained.
    """
    alone = p.hardware.model_copy(update={"processes": 1, "accelerate_config": None})
    asked = p.riel.model_copy(update={"questions_per_step": questions_per_step})
    p = p.model_copy(update={"riel": asked, "hardware": alone})
    accelerator = stage.accelerator_of(p)
    learned = _stage1(p, accelerator)
    learner = stage.learner_of(p, p.riel, learned, accelerator, steps=p.riel.steps)
    yield from riel.train(p, learned, learner, tasks.load(p.task), experts.load_panel(p.experts))


def _stage1(p: config.Run, accelerator: Accelerator) -> policy.Policy:
    return policy.load_trained(p.folder("mef") / "model", p.model, device=str(accelerator.device), seed=p.seed)


def _one_row(learned: policy.Policy, part: losses.Part) -> tuple[str, str]:
    """The first row of a loss that counts, token by token, coloured by what `Policy.logits` masks in."""
    counted = [row for row in part.rows if row.count]
    heading = f"Loss {part.name}, weight {part.weight:g}: {len(counted)} of {len(part.rows)} rows count"
    if not counted:
        return heading, "<p>No row counts here: this loss has no gradient on these questions.</p>"
    row = counted[0]
    _, answer_NT, mask_NT = learned.logits([row.row])
    counting = answer_NT[0][mask_NT[0]].tolist()
    tokens = (*row.row.prompt, *counting)
    kinds = ["prompt"] * len(row.row.prompt) + ["end" if i in learned.end_ids else "answer" for i in counting]
    spans = (
        f'<span style="background:{_COLOURS[kind]}" title="{kind}, id {token}">{html.escape(learned.tokenizer.decode([token]))}</span>'
        for kind, token in zip(kinds, tokens, strict=True)
    )
    note = f"<p>counts {row.count:+.3g} (its advantage, or 1)</p>"
    return heading, note + f'<div style="white-space:pre-wrap;font-family:monospace">{" ".join(spans)}</div>'


def _pre(text: str) -> str:
    style = "white-space:pre-wrap;font-family:monospace;background:#f6f6f6;padding:0.5em"  # themes break words in <pre>
    return f'<div style="{style}">{html.escape(text)}</div>'
