"""Ours against TRL's GRPOTrainer, side by side on identical work: `python tests/benchmarks/speed.py --help`.

First both must compute the same gradient from one batch (float32, signed advantages, Dr.GRPO's form); then TRL's own
training loop runs, and between two of its steps come one MEML step and one signed step of `riel.train`, all in this
process, in turns. Peak memory is measured apart, in a process for each. What a number means stands in README.md.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import limits
import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_pre_hook
from workload import ARMS, MODELS, Ours, Timed, Work, trained_rows, twin

from meml_lib import runs
from meml_lib.analysis import figures
from meml_lib.rollouts import Rollout
from meml_lib.training import losses
from meml_lib.training.learner import Learner

AGREE = 1e-4  # largest relative error of the gradient at which speed is compared at all
LABELS = {"trl": "TRL", "meml": "ours, MEML", "signed": "ours, signed"}
MEMORY = ("trl", "trl-checkpointing", *ARMS)
PHASES = ("sampling", "scoring", "update")


# --- the same mathematics ---------------------------------------------------------------------------------------------


def gradient_error(work: Work) -> dict[str, float]:
    """How far TRL's gradient of one batch lies from ours: the norm of the difference over the norm.

    Both start from the same float32 weights; TRL samples, ours trains on TRL's rollouts and the same rewards.
    """
    import peer

    work = replace(work, dtype="float32")
    learned = work.policy()
    model, prompts_BE = twin(learned), work.prompts_BE(learned)
    prompts = [prompt for row in prompts_BE for prompt in row]
    rewards_BEG = work.mixed_rewards()

    trl = peer.trainer(
        work,
        model,
        prompts,
        lambda: rewards_BEG.ravel().astype(float).tolist(),
        steps=1,
        checkpointing=False,
        max_grad_norm=None,
    )
    theirs = _gradient(trl.train, model.model)
    peer.check_sampled(trl, work, prompts)
    answers = iter(trl.sampled["completion_ids"].tolist())
    del trl, model
    free(work.device)

    logp = (0.0,) * work.tokens
    rollouts_BEG = [
        [[Rollout(tuple(next(answers)), logp, 0.0, True) for _ in range(work.group)] for _ in row] for row in prompts_BE
    ]
    p = work.values("signed")
    ties = (
        torch.zeros(work.questions, work.experts),
        torch.zeros(work.questions, work.experts),
        torch.zeros(work.questions),
    )
    parts = losses.on_rollouts(p.riel.objective, torch.from_numpy(rewards_BEG).float(), rollouts_BEG, prompts_BE, ties)
    learner = Learner(
        learned,
        Accelerator(cpu=work.device == "cpu"),
        p.riel.model_copy(update={"max_grad_norm": None}),
        steps=1,
        max_answer_tokens=work.tokens,
        micro_batch_tokens=p.hardware.micro_batch_tokens,
    )
    ours = _gradient(lambda: learner.update(parts), learned.model)
    return {
        "relative_error": (_norm(theirs - ours) / _norm(ours)),
        "norm_trl": _norm(theirs),
        "norm_ours": _norm(ours),
        "rows": work.rows,
        "answer_tokens": work.tokens,
        "bound": AGREE,
    }


def _gradient(step, model: torch.nn.Module) -> torch.Tensor:
    """The gradient when a step's first optimiser begins, as one vector in the order of the model's weights."""
    given: list[torch.Tensor] = []

    def note(*_):
        if not given:
            given.extend(weight.grad.detach().flatten().to("cpu", copy=True) for weight in model.parameters())

    handle = register_optimizer_step_pre_hook(note)
    try:
        step()
    finally:
        handle.remove()
    return torch.cat(given)


def _norm(vector: torch.Tensor) -> float:
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()


def free(device: str) -> None:
    """Give back what is no longer used: a trainer is held by cycles, and CUDA's memory by torch's cache."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# --- seconds ----------------------------------------------------------------------------------------------------------


def timed_pairs(work: Work, success: Sequence[float], pairs: int, passes: int) -> tuple[list[dict], list[dict]]:
    """Time TRL's step and ours in turns; the first round, which warms up, is left out.

    In odd rounds ours go before TRL's.

    Returns: one row a step (round, success, who; sampling, scoring, update, cpu, total: seconds); one row a round: the
      machine's rates just before it.
    """
    import peer

    learned = work.policy()
    theirs, ours = twin(learned), Ours(work, learned)
    prompts = [prompt for row in work.prompts_BE(learned) for prompt in row]
    schedule = [(number, rate) for number in range(pairs + 1) for rate in success]
    steps, rates = [], []

    def note(who: str, number: int, rate: float, timed: Timed) -> None:
        steps.append({"round": number, "success": rate, "who": who, **asdict(timed), "total": timed.total})
        print(f"round {number} of {pairs}, success {rate:4.0%}, {LABELS[who]}: {timed.total:.3f} s", flush=True)

    def run_ours(number: int, rate: float) -> None:
        for arm in sorted(ARMS, reverse=bool(number % 2)):
            note(arm, number, rate, ours.step(arm, rate))

    def before(step: int) -> None:
        number, rate = schedule[step]
        if rate == success[0]:
            product, copied = limits.machine_rates(learned.model.device, learned.model.dtype)
            rates.append({"round": number, "flops_per_s": product, "bytes_per_s": copied})
        if number % 2:
            run_ours(number, rate)

    def after(step: int, timed: Timed) -> None:
        number, rate = schedule[step]
        peer.check_sampled(trainer, work, prompts)
        note("trl", number, rate, timed)
        if not number % 2:
            run_ours(number, rate)

    trainer = peer.trainer(
        work,
        theirs,
        prompts,
        lambda: work.rewards(schedule[trainer.state.global_step][1]).ravel().astype(float).tolist(),
        steps=len(schedule),
        checkpointing=False,
        before=before,
        after=after,
        passes=passes,
    )
    trainer.train()
    return [row for row in steps if row["round"]], [row for row in rates if row["round"]]


def summary(steps: pd.DataFrame, work: Work) -> dict:
    """Medians with their spread, and ratios of TRL's seconds to ours in the same pair, by success rate."""
    found: dict = {}
    for (rate, who), rows in steps.groupby(["success", "who"]):
        entry = found.setdefault(f"{rate:g}", {}).setdefault(who, {})
        for phase in (*PHASES, "total", "cpu"):
            entry[f"{phase}_s"] = {"median": rows[phase].median(), "min": rows[phase].min(), "max": rows[phase].max()}
        entry["sampled_tokens_per_s"] = work.rows * work.tokens / rows["sampling"].median()
        entry["tokens_per_s"] = work.rows * work.tokens / rows["total"].median()
    for rate, entries in found.items():
        here = steps[steps["success"] == float(rate)].set_index("round")
        trl = here[here["who"] == "trl"]
        for arm in ARMS:
            ours = here[here["who"] == arm]
            entries[arm]["trl_over_ours"] = {
                phase: median((trl[phase] / ours[phase]).dropna().to_numpy())
                for phase in ("sampling", "update", "total", "cpu")
            }
    return found


def median(values: np.ndarray) -> dict:
    """The median, with the middle 95 % of 10,000 bootstrapped ones.

    >>> median(np.array([2.0, 2.0, 4.0]))["median"]
    2.0
    """
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high), "n": len(values)}


def shares(found: Mapping, rates: Sequence[Mapping], work: Work) -> dict:
    """How near the machine's limit each came: useful work (`limits`) over the measured rates and its own seconds."""
    learned = work.policy()
    prompts_BE, shape = work.prompts_BE(learned), limits.Shape.of(learned.model.config)
    product, copied = (statistics.median(row[of] for row in rates) for of in ("flops_per_s", "bytes_per_s"))
    every = {prompt: [work.tokens] * work.group for row in prompts_BE for prompt in row}
    item = torch.finfo(getattr(torch, work.dtype)).bits // 8
    flops, moved = limits.sampling_flops(shape, every), limits.sampling_bytes(shape, every, item=item)
    result: dict = {
        "shape": asdict(shape) | {"body_weights": shape.body, "head_weights": shape.head},
        "prompt_tokens": sorted(len(prompt) for prompt in every),
        "flops_per_s": product,
        "bytes_per_s": copied,
        "sampling": {"flops": flops, "bytes": moved, "bytes_per_token": moved / (work.rows * work.tokens)},
        "by_success": {},
    }
    for rate, entries in found.items():
        told = result["by_success"][rate] = {}
        for who, entry in entries.items():
            rows = trained_rows(work, "meml" if who == "meml" else "signed", float(rate), prompts_BE)
            useful, unshared = (limits.update_flops(shape, rows, share_prompts=share) for share in (True, False))
            sampling, update = entry["sampling_s"]["median"], entry["update_s"]["median"]
            told[who] = {
                "rows_that_count": sum(map(len, rows.values())),
                "update_flops": useful,
                "update_share_of_product_rate": useful / update / product,
                "update_share_with_prompts_once_a_row": unshared / update / product,
                "sampling_share_of_product_rate": flops / sampling / product,
                "sampling_share_of_copy_rate": moved / sampling / copied,
                "sampling_share_of_limit": max(flops / product, moved / copied) / sampling,
            }
    return result


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_above_model(work: Work, who: str, success: Sequence[float], passes: int) -> dict:
    """Peak memory above the loaded model, in MiB: of two steps of TRL's, or two of ours at every success rate.

    To be called in a fresh process.
    """
    import peer

    learned = work.policy()
    free(work.device)
    before = _memory(work.device, start=True)
    if who in ARMS:
        ours = Ours(work, learned, [who])
        for rate in (*success, *success):
            ours.step(who, rate)
    else:
        prompts = [prompt for row in work.prompts_BE(learned) for prompt in row]
        trainer = peer.trainer(
            work,
            learned,
            prompts,
            lambda: work.rewards(success[0]).ravel().astype(float).tolist(),
            steps=2,
            checkpointing=who == "trl-checkpointing",
            passes=passes,
        )
        trainer.train()
    return {"model_mib": before, "peak_above_model_mib": _memory(work.device, start=False) - before}


def _memory(device: str, *, start: bool) -> float:
    """MiB in use at the start, whose peak is forgotten; else the peak since."""
    if device == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats()
        return (torch.cuda.memory_allocated() if start else torch.cuda.max_memory_allocated()) / 2**20
    if start:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak that loading and importing left
    wanted = "VmRSS" if start else "VmHWM"
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(f"{wanted}:")) / 2**10


def memory_of_each(arguments: Sequence[str]) -> dict:
    """`peak_above_model` of each, in a process of its own."""
    found = {}
    for who in MEMORY:
        done = subprocess.run(
            [sys.executable, __file__, *arguments, "--memory-of", who], stdout=subprocess.PIPE, text=True, check=True
        )
        found[who] = json.loads(done.stdout.splitlines()[-1])
        print(f"memory, {who}: {found[who]}", flush=True)
    for arm in ARMS:
        found[arm]["share_of_trl"] = {
            who: found[arm]["peak_above_model_mib"] / found[who]["peak_above_model_mib"] for who in MEMORY[:2]
        }
    return found


# --- what is written --------------------------------------------------------------------------------------------------


def picture(found: Mapping, note: str) -> figures.Picture:
    """Seconds of a step by phase, and how many times TRL's seconds are ours, by success rate."""
    rows = []
    for rate, entries in found.items():
        for who, entry in entries.items():
            row = {"success": float(rate), "who": who} | {phase: entry[f"{phase}_s"]["median"] for phase in PHASES}
            for phase, numbers in entry.get("trl_over_ours", {}).items():
                row |= {f"ratio_{phase}_{name}": numbers[name] for name in ("median", "low", "high")}
            rows.append(row)
    data = pd.DataFrame(rows)
    whos = list(LABELS)
    with figures._figure(9.2, 3.6, note) as figure:
        stacked, ratios = figure.subplots(1, 2)
        rates = sorted(data["success"].unique())
        for k, who in enumerate(whos):
            mine = data[data["who"] == who].set_index("success").loc[rates]
            bottom = np.zeros(len(rates))
            for colour, hatch, phase in zip(figures.COLOURS[:3], figures.HATCHES, PHASES, strict=True):
                at = np.arange(len(rates)) + 0.27 * (k - 1)
                label = phase if k == 0 else None
                stacked.bar(
                    at, mine[phase], 0.24, bottom=bottom, color=colour, hatch=hatch, edgecolor="white", label=label
                )
                bottom += mine[phase].to_numpy()
            for at, height in enumerate(bottom):
                stacked.annotate(LABELS[who].removeprefix("ours, "), (at + 0.27 * (k - 1), height), (0, 2),
                                 textcoords="offset points", ha="center", fontsize=6.5)  # fmt: skip
        stacked.set(title="A step, seconds (medians)", ylabel="seconds", ylim=(0, stacked.get_ylim()[1] * 1.05))
        stacked.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3)
        looks = figures.looks(["whole step, MEML", "whole step, signed", "sampling", "update, MEML", "update, signed"])
        drawn = [
            ("meml", "total"),
            ("signed", "total"),
            ("signed", "sampling"),
            ("meml", "update"),
            ("signed", "update"),
        ]
        for k, ((arm, phase), (name, look)) in enumerate(zip(drawn, looks.items(), strict=True)):
            mine = data[data["who"] == arm].set_index("success").loc[rates]
            middle, low, high = (mine[f"ratio_{phase}_{of}"] for of in ("median", "low", "high"))
            at = np.arange(len(rates)) + 0.12 * (k - 2)
            ratios.errorbar(
                at, middle, [middle - low, high - middle], fmt=look.marker, color=look.color, label=name, capsize=2
            )
        ratios.axhline(1, color="#222222", linewidth=0.8)
        ratios.set(title="TRL's seconds / ours (95 % interval)", ylabel="times", yscale="log")
        ticks = [
            t
            for t in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
            if t < 1.2 * np.nanmax(data.filter(like="_high"))
        ]
        ratios.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ratios.minorticks_off()
        ratios.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3)
        for axes in (stacked, ratios):
            axes.set_xticks(range(len(rates)), [f"{rate:.0%}" for rate in rates])
            axes.set_xlabel("success rate of the rewards' table", loc="right")
    return figures.Picture(figure, data)


def manifest(load: Sequence[float]) -> dict:
    """What made these numbers. Args: load: the machine's load averages before the first of them."""
    found = runs.provenance()
    found["packages"] |= runs.versions(["trl"])
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return found | {"date": now, "gpus": runs.gpus(), "load_before": load, "load_after": os.getloadavg()}


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="embedded")
    parser.add_argument("--success", default="0,0.1,0.5,0.9", help="success rates, by commas")
    parser.add_argument("--tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--prompts", default="4x3", help="questions x experts")
    parser.add_argument("--group", type=int, default=8, help="rollouts of each prompt")
    parser.add_argument("--pairs", type=int, default=5, help="after one round of warming up")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 for embedded, else bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, help="of a shape: fewer than its own, to rehearse")
    parser.add_argument(
        "--passes", type=int, default=1, help="TRL: forward and backward passes a step; 1 where memory allows"
    )
    parser.add_argument(
        "--micro-batch-tokens", type=int, help="ours: of a forward and backward pass; default: the hardware preset's"
    )
    parser.add_argument("--out", type=Path, default=Path("reports/speed"))
    parser.add_argument(
        "--no-memory", action="store_true", help="leave peak memory out: four processes, two steps each"
    )
    parser.add_argument("--memory-of", choices=MEMORY, help="only measure this one's peak memory, in this process")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    asked = parsed(arguments)
    torch.set_num_threads(asked.threads)
    questions, panel = map(int, asked.prompts.split("x"))
    success = [float(rate) for rate in asked.success.split(",")]
    dtype = asked.dtype or ("float32" if asked.model == "embedded" else "bfloat16")
    work = Work(
        asked.model,
        questions,
        panel,
        asked.group,
        asked.tokens,
        asked.device,
        dtype,
        asked.threads,
        micro_batch_tokens=asked.micro_batch_tokens,
        layers=asked.layers,
    )
    if asked.memory_of:
        print(json.dumps(peak_above_model(work, asked.memory_of, success, asked.passes)))
        return

    load = os.getloadavg()
    agreement = gradient_error(replace(work, tokens=min(work.tokens, 16)))
    print(f"gradients: {agreement}", flush=True)
    if not agreement["relative_error"] < AGREE:
        raise SystemExit(f"TRL and ours do not compute the same gradient ({agreement}): their speed cannot be compared")
    free(work.device)
    memory = None if asked.no_memory else memory_of_each(arguments)
    steps, rates = timed_pairs(work, success, asked.pairs, asked.passes)
    found = summary(pd.DataFrame(steps), work)
    result = {
        "work": asdict(work)
        | {"rows": work.rows, "success": success, "trl_passes": asked.passes, "pairs": asked.pairs},
        "gradient": agreement,
        "by_success": found,
        "limit": shares(found, rates, work),
        "memory": memory,
        "steps": steps,
        "manifest": manifest(load),
    }
    name = work.model.replace(".", "_")  # what follows a point would be taken for a suffix
    stem = asked.out / f"{name}-{work.tokens}-tokens-{work.rows}-rows-{work.device}"
    asked.out.mkdir(parents=True, exist_ok=True)
    with runs.atomic(stem.with_suffix(".json")) as file:
        file.write_text(json.dumps(result, indent=1) + "\n")
    note = (
        f"{work.model}, {dtype}, {work.device}, {asked.threads} threads; {questions} questions x {panel} experts x "
        f"{work.group}, forced {work.tokens} tokens; {asked.pairs} pairs in turns, one process; "
        f"TRL {result['manifest']['packages']['trl']} without checkpointing"
    )
    print(figures.save(picture(found, note), stem))


if __name__ == "__main__":
    main(sys.argv[1:])
