"""What a decode step leaves to loops of its own on a CPU, in C: the counterpart of `kernels`.

torch's operations on a step's few numbers take longer to begin than to end. `cpu.c` is compiled by the machine's own
compiler (`CC`, else cc), for its own instructions, and kept in the user's cache; that takes a second or two, once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from meml_lib import runs

_SOURCE = Path(__file__).with_name("cpu.c")
_LANES, PANEL = 8, 16  # as in cpu.c
_SETTINGS = (("-march=native", "-fopenmp"), ("-march=native", "-fopenmp-simd"), ("-fopenmp-simd",), ())
"""Tried in this order: a compiler may know no OpenMP, torch bring none, or a processor have no name."""


_POINTER, _WHOLE = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "attend": [_POINTER] * 9 + [_WHOLE] * 8,
    "product": [_POINTER] * 4 + [_WHOLE] * 3 + [ctypes.c_double] + [_WHOLE] * 3,
    "rms_norm": [_POINTER] * 2 + [_WHOLE] * 2 + [ctypes.c_double, _WHOLE],
    "choose": [_POINTER] * 5 + [_WHOLE] * 2 + [ctypes.c_double, _WHOLE],
}


def _loaded(file: str) -> ctypes.CDLL:
    found = ctypes.CDLL(file)
    for name, types in _ARGUMENTS.items():
        getattr(found, name).argtypes = types
    return found


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None, with a warning, where no C compiler works."""
    source = _SOURCE.read_bytes()
    with suppress(OSError):
        source += b"".join(line for line in Path("/proc/cpuinfo").read_bytes().splitlines() if line.startswith(b"flags"))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meml_lib"
    kept = folder / f"cpu-{hashlib.sha256(source).hexdigest()[:16]}.so"
    with suppress(OSError):
        return _loaded(str(kept))
    compiler, said = os.environ.get("CC") or "cc", ""
    for settings in _SETTINGS:
        with tempfile.TemporaryDirectory() as made:
            part, whole = f"{made}/cpu.o", f"{made}/cpu.so"
            # Linked without OpenMP: its functions are those that torch has loaded, and the threads are torch's.
            steps = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", *settings, "-c", str(_SOURCE), "-o", part], ["-shared", part, "-o", whole]
            try:
                for step in steps:
                    subprocess.run([*compiler.split(), *step], check=True, capture_output=True, text=True)
                found = _loaded(whole)
            except (OSError, subprocess.CalledProcessError) as error:
                said = said or getattr(error, "stderr", None) or str(error)
                continue
            with suppress(OSError), runs.atomic(kept) as file:
                file.write_bytes(Path(whole).read_bytes())
            return found
    warnings.warn(f"sampling on this CPU is slower by half: {compiler!r} compiles no C ({said.strip()[:200]})", stacklevel=2)
    return None


def _run(name: str, *arguments: Tensor | int | float) -> None:
    """Tensors must adjoin, and be of the types that cpu.c takes."""
    getattr(library(), name)(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments), torch.get_num_threads())


def whole(n: int) -> int:
    """The least multiple of a vector that is not smaller."""
    return -(-n // _LANES) * _LANES


def prompts_cache(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `attend` reads of a prompt [.., T, D]: keys [.., D, T'] and values [.., T', D'], in whole vectors."""
    longer, wider = whole(k.shape[-2]) - k.shape[-2], whole(k.shape[-1]) - k.shape[-1]
    pad = torch.nn.functional.pad
    return pad(k, (0, 0, 0, longer)).unflatten(-2, (-1, _LANES)).mT.contiguous(), pad(v, (0, wider, 0, longer)).contiguous()


def answers_cache(rows: int, room: int, size: int) -> tuple[Tensor, Tensor]:
    """Room for the answers' keys and values, in the same layout."""
    return torch.empty(rows, whole(room) // _LANES, size, _LANES), torch.empty(rows, whole(room), whole(size))


def attend(
    qkv: Tensor,
    turn_N: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    prompt_of_row_N: Tensor,
    length_P: Tensor,
    at: Tensor,
) -> Tensor:
    """`kernels.attend`, computed in float32; prompt and own as `prompts_cache` and `answers_cache` lay them out."""
    exact = qkv.float().contiguous()
    rows, heads, shared, size = (*qkv.shape[:2], qkv.shape[2] - 2, qkv.shape[3])
    out = torch.empty(rows, heads, shared, size)
    sizes = rows, heads, shared, size, prompt[1].shape[-2], own[1].shape[-2], int(at)
    _run("attend", exact, turn_N, *prompt, *own, prompt_of_row_N, length_P, out, *sizes)
    return out.to(qkv.dtype)


def rms_norm(x: Tensor, epsilon: float) -> Tensor:
    """x over its last dimension's root mean square, in float32; returned in x's dtype."""
    exact, size = x.float().contiguous(), x.shape[-1]
    out = torch.empty_like(exact)
    _run("rms_norm", exact, out, out.numel() // size, size, float(epsilon))
    return out.to(x.dtype)


class Product:
    """x -> x W^T + b of a small float32 matrix, which torch's products begin slowly; x may be normed first, by `rms_norm`.

    Args:
      weight: [M, K]. bias: [M]. epsilon: of the norm, None for none.
      gated: W's first half is a gate's, and what is returned is silu(gate) * the second half, [N, M / 2].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, epsilon: float | None, gated: bool):
        outputs, bias = len(weight), weight.new_zeros(len(weight)) if bias is None else bias
        if gated:  # half a panel of gates beside their other halves
            order = torch.arange(outputs).view(2, -1, PANEL // 2).transpose(0, 1).flatten()
            weight, bias = weight[order], bias[order]
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % PANEL))
        self._panels = padded.unflatten(0, (-1, PANEL)).mT.contiguous()
        self._bias = torch.nn.functional.pad(bias, (0, -outputs % PANEL))
        self._outputs, self._gated, self._epsilon = outputs, gated, -1.0 if epsilon is None else epsilon

    def __call__(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """Args: x: [N, K]. into: what the product is added to, in place."""
        x, outputs = x.contiguous(), self._outputs
        out = torch.empty(len(x), outputs // 2 if self._gated else outputs) if into is None else into
        how = self._epsilon, into is not None, self._gated
        _run("product", x, self._panels, self._bias, out, *x.shape, outputs, *how)
        return out


def choose(logits_NV: Tensor, uniform_N: Tensor, temperature: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """`native.choose` without top_p; sums of probabilities in float64."""
    exact = logits_NV.float().contiguous()
    token_N, logp_N, entropy_N = torch.empty(len(exact), dtype=torch.long), *torch.empty(2, len(exact))
    _run("choose", exact, uniform_N, token_N, logp_N, entropy_N, *exact.shape, float(temperature or 0.0))
    return token_N, logp_N, entropy_N
