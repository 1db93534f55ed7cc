"""Our step's seconds against the size of its work, embedded model: `python tests/benchmarks/cost.py --out FOLDER`.

One size at a time is changed from 4 questions x 3 experts x 8 rollouts of 64 tokens, success rate 50 %, and all sizes
take their MEML step in turns. Then three experts against one, with as many rollouts in all and with three times those.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from speed import manifest, median
from workload import Ours, Work

from meml_lib import runs
from meml_lib.analysis import figures

BASE = Work("embedded", questions=4, experts=3, group=8, tokens=64, device="cpu", dtype="float32", threads=2)
SIZES = {
    "group": (2, 4, 8, 16, 32),
    "experts": (1, 2, 3, 4, 6),
    "tokens": (16, 32, 64, 128),
    "vocabulary": (512, 2048, 8192, 32768),
    "questions": (1, 2, 4, 8, 16),
}
SAID = {
    "group": "rollouts of each question and expert (G)",
    "experts": "experts (E)",
    "tokens": "answer length, tokens",
    "vocabulary": "vocabulary, tokens",
    "questions": "questions a step (B)",
}
SUCCESS = 0.5


def timed(works: Sequence[Work], rounds: int) -> np.ndarray:
    """Seconds of a MEML step of each, in turns, after a round of warming up; [rounds, works]."""
    ours = [Ours(work, work.policy(), ["meml"]) for work in works]
    return np.array([[own.step("meml", SUCCESS).total for own in ours] for _ in range(rounds + 1)])[1:]


def exponents(sizes: Sequence[int], seconds_RS: np.ndarray) -> dict:
    """The power of the size that the seconds grow with, fitted to each round's logarithms: over all sizes, and from
    the last but one to the last, where a step's fixed costs weigh least.

    >>> exponents([1, 2, 4], np.array([[3.0, 6.0, 12.0]]))["all"]["median"]
    1.0
    """
    x, y = np.log(sizes), np.log(seconds_RS)
    whole = np.array([np.polyfit(x, row, 1)[0] for row in y]).round(6)
    return {"all": median(whole), "last": median((y[:, -1] - y[:, -2]) / (x[-1] - x[-2]))}


def picture(size: str, sizes: Sequence[int], seconds_RS: np.ndarray, fitted: Mapping, note: str) -> figures.Picture:
    """Seconds of a step against one size, both axes logarithmic, with the line of proportional growth."""
    low, middle, high = np.min(seconds_RS, 0), np.median(seconds_RS, 0), np.max(seconds_RS, 0)
    data = pd.DataFrame({size: sizes, "median_s": middle, "min_s": low, "max_s": high})
    with figures._figure(4.6, 3.2, note) as figure:
        axes = figure.subplots()
        axes.errorbar(
            sizes, middle, [middle - low, high - middle], fmt="o-", color=figures.COLOURS[0], capsize=2, label="a step"
        )
        proportional = middle[-1] * np.array(sizes) / sizes[-1]
        axes.plot(sizes, proportional, "--", color="#7F7F7F", label="proportional to the last")
        axes.set(xscale="log", yscale="log", xlabel=SAID[size], ylabel="seconds (median, min to max)")
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axes.minorticks_off()
        ticks = [
            t
            for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
            if min(proportional.min(), low.min()) / 2 < t < 2 * high.max()
        ]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        told = {of: "{median:.2f} ({low:.2f} to {high:.2f})".format_map(numbers) for of, numbers in fitted.items()}
        axes.set_title(f"Exponent {told['all']}\nlast two sizes {told['last']}")
        axes.legend()
    return figures.Picture(figure, data)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", default=",".join(SIZES), help="which sizes to change, by commas")
    parser.add_argument("--out", type=Path, default=Path("reports/speed"))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    base, load = replace(BASE, threads=asked.threads), os.getloadavg()
    asked.out.mkdir(parents=True, exist_ok=True)

    result: dict = {"base": asdict(base), "success": SUCCESS, "sizes": {}}
    for size in asked.sizes.split(","):
        sizes = SIZES[size]
        seconds_RS = timed([replace(base, **{size: n}) for n in sizes], asked.rounds)
        fitted = exponents(sizes, seconds_RS)
        result["sizes"][size] = {"values": sizes, "seconds": seconds_RS.tolist(), "exponent": fitted}
        note = "embedded, 4 questions x 3 experts x 8 of 64 tokens, one of them varied; "
        note += f"{asked.rounds} rounds in turns, {asked.threads} threads"
        print(
            figures.save(picture(size, sizes, seconds_RS, fitted, note), asked.out / f"cost-{size}"),
            fitted["all"],
            flush=True,
        )

    three, one = base, replace(base, experts=1)
    seconds_RS = timed([three, one, replace(one, group=3 * base.group)], asked.rounds)
    result["three_experts_against_one"] = {
        "seconds": dict(zip(("three", "one", "one_with_three_times_the_rollouts"), seconds_RS.T.tolist(), strict=True)),
        "three_times_the_rollouts": median(seconds_RS[:, 0] / seconds_RS[:, 1]),
        "equal_rollouts": median(seconds_RS[:, 0] / seconds_RS[:, 2]),
        "paper": "20 to 30 % more",
    }
    result["manifest"] = manifest(load)
    for told in ("equal_rollouts", "three_times_the_rollouts"):
        print(f"three experts / one, {told}: {result['three_experts_against_one'][told]}")
    with runs.atomic(asked.out / "cost.json") as file:
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
