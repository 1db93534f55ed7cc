"""A stage's checkpoints: written aside, checksummed, renamed; what is read back is the newest whole one.

CHECKPOINTS/step-00000040/ holds safetensors files by the caller's names, state.json (plain values), and sums.json, the size
and sha256 of all others. Nothing is unpickled. A folder takes its name once all of it is on the disk, so that a kill leaves
the ones before it; a file that was torn or changed since is refused by name, and the checkpoint before it is taken.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meml_lib import runs

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
SUMS, STATE = "sums.json", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole."""

    folder: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The file NAME.safetensors, on the CPU; empty where there is none."""
        from safetensors.torch import load_file

        file = self.folder / f"{name}.safetensors"
        return load_file(file) if file.is_file() else {}


def write(folder: Path, step: int, files: Mapping[str, Tensors], state: Mapping[str, Any], *, kept: int) -> Path:
    """Keep a checkpoint after `step` steps, and the `kept` newest in all.

    Args: files: name -> tensors, none shared. state: what JSON can hold.
    Returns: its folder.
    """
    from safetensors.torch import save_file

    whole = folder / f"step-{step:08d}"
    aside = folder / f".{whole.name}.{os.getpid()}"
    for left in folder.glob(".step-*"):  # by a process that was killed; the stage's lock keeps others away
        shutil.rmtree(left)
    aside.mkdir(parents=True)
    for name, tensors in files.items():
        if tensors:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, aside / f"{name}.safetensors")
    (aside / STATE).write_text(json.dumps(state, allow_nan=False))
    sums = {file.name: [file.stat().st_size, runs.hash_file(file)] for file in sorted(aside.iterdir())}
    (aside / SUMS).write_text(json.dumps(sums, indent=1))
    for file in (*aside.iterdir(), aside):
        _to_disk(file)
    shutil.rmtree(whole, ignore_errors=True)
    aside.rename(whole)
    _to_disk(folder)
    prune(folder, kept)
    return whole


def prune(folder: Path, kept: int) -> None:
    """Leave the newest ones; with none, no folder."""
    for old in sorted(folder.glob("step-*"), reverse=True)[kept:]:
        gone = old.with_name(f".{old.name}")  # renamed first: a kill must not leave half of it under its name
        old.rename(gone)
        shutil.rmtree(gone)
    if kept == 0 and folder.is_dir():
        shutil.rmtree(folder)


def newest(folder: Path, *, fits: Mapping[Path, str] | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and why each newer one is refused.

    Args: fits: files beside the checkpoints, and the key of a state that tells how many of their bytes belong to it; one
      that wants more than there are is refused too.
    """
    refused = []
    for place in sorted(folder.glob("step-*"), reverse=True):
        try:
            checkpoint = Checkpoint(place, _checked(place))
            for file, key in (fits or {}).items():
                there, wanted = file.stat().st_size if file.is_file() else 0, checkpoint.state[key]
                if there < wanted:
                    raise ValueError(f"{file.name} has {there:,} bytes, and it goes on from {wanted:,}")
            return checkpoint, refused
        except (OSError, ValueError, KeyError, TypeError) as error:
            refused.append(f"checkpoint {place.name} is refused: {error}")
    return None, refused


def _checked(place: Path) -> dict[str, Any]:
    """The state of a whole checkpoint. Raises: OSError or ValueError naming the file that is not as it was written."""
    sums = json.loads((place / SUMS).read_text())
    there = {file.name for file in place.iterdir()} - {SUMS}
    if there != sums.keys():
        raise ValueError(f"its files are {', '.join(sorted(there))}, and {SUMS} names {', '.join(sorted(sums))}")
    for name, (size, sha256) in sums.items():
        file = place / name
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size:,} bytes, not {size:,}")
        if (found := runs.hash_file(file)) != sha256:
            raise ValueError(f"{name} has sha256 {found[:12]}..., not {sha256[:12]}...")
    return json.loads((place / STATE).read_text())


def _to_disk(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
