"""What a stage keeps of its training to go on from: checkpoints, the best weights; and what SIGTERM makes of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from meml_lib import config
from meml_lib.runs import RunFolder
from meml_lib.training import checkpoints, sharding
from meml_lib.training.learner import Learner
from meml_lib.training.policy import Policy

GRACE_S = 8.0
APPENDED = {"metrics": "metrics_bytes", "rollouts": "rollouts_bytes"}
"""Files that grow with every step (.jsonl), and where a checkpoint says how many of their bytes belong to it."""


class Best:
    """Early stopping on validation accuracy; keeps the best weights only where patience is set."""

    def __init__(self, learned: Policy, patience: int | None):
        self._model, self._patience = learned.model, patience
        self._accuracy, self._weights, self._waited = -1.0, None, 0

    @property
    def exhausted(self) -> bool:
        return self._patience is not None and self._waited >= self._patience

    def see(self, accuracy: float) -> None:
        """Take note of one validation (share right, all experts)."""
        if self._patience is None:
            return
        if accuracy > self._accuracy:
            self._accuracy, self._waited = accuracy, 0
            state = self._model.state_dict()
            self._weights = {name: sharding.local(tensor).detach().cpu().clone() for name, tensor in state.items()}
        else:
            self._waited += 1

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """What `go_on` takes: whole weights; all processes call it."""
        now = self._model.state_dict() if self._weights else {}
        weights = {name: sharding.joined(self._weights[name], like=tensor) for name, tensor in now.items()}
        return weights, {"accuracy": self._accuracy, "waited": self._waited}

    def go_on(self, weights: dict[str, torch.Tensor], numbers: dict[str, float]) -> None:
        self._accuracy, self._waited = numbers["accuracy"], numbers["waited"]
        now = self._model.state_dict() if weights else {}
        parts = {name: sharding.local(sharding.divided(weights[name], like=tensor)).cpu() for name, tensor in now.items()}
        self._weights = parts or None

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights back, if any were kept."""
        if self._weights is not None:
            for name, tensor in self._model.state_dict().items():
                sharding.local(tensor).copy_(self._weights[name])


class Keeping:
    """A stage's checkpoints, and the way back from one. Every method is called in every process."""

    def __init__(self, p: config.Run, folder: RunFolder, accelerator: Accelerator, learner: Learner, best: Best):
        self._params, self._folder, self._accelerator = p.hardware.checkpoints, folder, accelerator
        self._learner, self._best, self._state, self._kept_at = learner, best, None, 0

    def see(self, step: tuple[dict, dict]) -> dict:
        """Note where to go on from after a step; its record."""
        record, self._state = step
        return record

    @property
    def due(self) -> bool:
        return self._params.every is not None and self._state["steps"] % self._params.every == 0

    def write(self) -> None:
        """Keep what the last step led to, unless it is kept, or nothing is to be."""
        if self._params.every is None or self._state is None or self._kept_at == self._state["steps"]:
            return
        self._kept_at = self._state["steps"]
        weights, moments, place = self._learner.state(keep=self._accelerator.is_main_process)
        best, numbers = self._best.state()
        random = gather_object([_random_state(self._accelerator)])
        if self._accelerator.is_main_process:
            sizes = {key: _size(self._folder.path / f"{name}.jsonl") for name, key in APPENDED.items()}
            checkpoints.write(
                self._folder.path / "checkpoints",
                self._kept_at,
                {"weights": weights, "optimizer": moments, "best": best, "random": {k: v for r in random for k, v in r.items()}},
                {"train": self._state, "learner": place, "best": numbers, **sizes},
                kept=self._params.kept,
            )
        self._accelerator.wait_for_everyone()  # a process that ends first would take the writer with it

    def restore(self) -> dict | None:
        """Go back to the newest whole checkpoint. Returns: where the training goes on from; None: at its start."""
        found: list[Any] = [None]
        if self._accelerator.is_main_process:
            path = self._folder.path
            fits = {path / f"{name}.jsonl": key for name, key in APPENDED.items()}
            checkpoint, refused = checkpoints.newest(path / "checkpoints", fits=fits)
            for file, key in fits.items():
                if file.is_file():
                    os.truncate(file, checkpoint.state[key] if checkpoint else 0)
            for why in refused:
                print(why, flush=True)
            if checkpoint or refused:
                self._tell(checkpoint.state["train"]["steps"] if checkpoint else 0, refused)
            found = [checkpoint]
        (checkpoint,) = broadcast_object_list(found)
        if checkpoint is None:
            return None
        self._learner.restore(checkpoint.tensors("weights"), checkpoint.tensors("optimizer"), checkpoint.state["learner"])
        self._best.go_on(checkpoint.tensors("best"), checkpoint.state["best"])
        _set_random_state(self._accelerator, checkpoint.tensors("random"))
        self._state = checkpoint.state["train"]
        self._kept_at = self._state["steps"]
        return self._state

    def _tell(self, steps: int, refused: list[str]) -> None:
        print(f"goes on after step {steps}" + ("" if steps else ", its start: no checkpoint is whole"), flush=True)
        if (self._folder.path / "manifest.json").is_file():
            manifest = self._folder.read_json("manifest")
            resumed = [*manifest.get("resumed", []), {"after_steps": steps, "refused": refused}]
            self._folder.write_json("manifest", manifest | {"resumed": resumed})


def _random_state(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """torch's generators in this process, which dropout draws from; all else is drawn by a key of its own."""
    rank, states = accelerator.process_index, {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return {f"{rank}.{name}": state for name, state in states.items()}


def _set_random_state(accelerator: Accelerator, states: dict[str, torch.Tensor]) -> None:
    """A process that was not there before keeps the state that the seed gave it."""
    rank = accelerator.process_index
    if f"{rank}.cpu" in states:
        torch.set_rng_state(states[f"{rank}.cpu"])
    if f"{rank}.cuda" in states and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"{rank}.cuda"], accelerator.device)


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


@contextmanager
def sigterm(*, together: bool) -> Iterator[threading.Event]:
    """An event that SIGTERM sets; once the block has ended, the signal does what it did before.

    Args: together: with other processes, one of which may have failed: then no step ends, nor does Python come to its
      handlers while it waits for that one. A thread therefore ends this process GRACE_S after the signal.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield came
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    wakeup = signal.set_wakeup_fd(writes, warn_on_full_buffer=False) if together else None
    watching = threading.Thread(target=_end_later, args=(reads,), daemon=True)
    watching.start()
    try:
        yield came
    finally:
        if together:
            signal.set_wakeup_fd(wakeup)
        os.close(writes)
        signal.signal(signal.SIGTERM, before)
        if came.is_set():
            os.kill(os.getpid(), signal.SIGTERM)


def _end_later(pipe: int) -> None:
    """Once SIGTERM's number has come through the pipe, and GRACE_S have gone by."""
    while told := os.read(pipe, 1):
        if told[0] == signal.SIGTERM:
            time.sleep(GRACE_S)
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(pipe)
