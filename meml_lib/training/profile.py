"""Where a step's time goes: a table of spans and operations, and a trace that https://ui.perfetto.dev opens.

A span is a function that `torch.profiler.record_function` decorates; its name begins with SPAN.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from meml_lib import runs

SPAN = "meml: "


def span(name: str) -> record_function:
    """Decorates a function whose time a profile shows apart."""
    return record_function(SPAN + name)


def profiled(steps: Iterable[dict], count: int, folder: Path, accelerator: Accelerator) -> Iterator[dict]:
    """Pass steps on; of `count` of them, after the first two, rank 0 writes folder/time.csv and folder/trace.json.gz.

    Where training ends earlier, of those that there were.
    """
    if not count or not accelerator.is_main_process:
        yield from steps
        return

    cuda = accelerator.device.type == "cuda"

    def write(profiler: profile) -> None:
        rows = _rows(profiler, taken, cuda)
        folder.mkdir(parents=True, exist_ok=True)
        with runs.atomic(folder / "time.csv") as file, open(file, "w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        print(_text(rows, folder), flush=True)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    plan, taken = schedule(skip_first=1, wait=0, warmup=1, active=count, repeat=1), 0
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        for number, record in enumerate(steps):
            taken = min(max(0, number - 1), count)
            profiler.step()
            yield record
    if not taken:
        print("no profile: training ended within its first two steps, and a profile shows those after them", flush=True)


def _rows(profiler: profile, steps: int, cuda: bool) -> list[dict]:
    """Spans in the order in which they began, then operations by their own time; seconds and calls a step."""
    averages = profiler.key_averages()
    spans = [event for event in averages if event.key.startswith(SPAN)]
    others = [event for event in averages if not event.key.startswith((SPAN, "ProfilerStep"))]
    others.sort(key=lambda event: -(event.self_device_time_total if cuda else event.self_cpu_time_total))

    def row(kind: str, event) -> dict:
        device = {"device_s": event.device_time_total / 1e6 / steps} if cuda else {}
        return {
            "kind": kind,
            "name": event.key.removeprefix(SPAN),
            "calls": event.count / steps,
            "seconds": event.cpu_time_total / 1e6 / steps,
            "own_seconds": event.self_cpu_time_total / 1e6 / steps,
            **device,
        }

    return [*(row("span", event) for event in spans), *(row("operation", event) for event in others[:40])]


def _text(rows: list[dict], folder: Path) -> str:
    head = f"time of a step, by span ({folder / 'time.csv'} has operations too, trace.json.gz opens in ui.perfetto.dev):"
    lines = (f"  {row['name']:<24} {row['seconds']:9.4f} s  {row['calls']:7.1f} calls" for row in rows if row["kind"] == "span")
    return "\n".join([head, *lines])
