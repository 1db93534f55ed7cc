"""What a decode step and an update leave to loops of their own on a CPU, in C; a decode step's are the counterpart of `kernels`.

torch's operations on a step's few numbers take longer to begin than to end; on an update's many, each fetches them from
memory again. `cpu.c` is compiled by the machine's own compiler (`CC`, else cc), for its own instructions, and kept in the
user's cache; that takes a second or two, once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from meml_lib.rollouts import pages

_SOURCE = Path(__file__).with_name("cpu.c")
_PANEL, _TILE, _DEPTH = 16, 16, 32  # as in cpu.c
_KEPT = 2**21  # numbers of a product's rounded rows that are kept room for; a decode step's are fewer, long prompts' are not
_EVERY = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC")  # but for marked sums, arithmetic stays as written
_SETTINGS = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),  # else gcc takes half of a vector of AVX-512
    ("-march=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd"),
    ("-fopenmp-simd",),
    (),
)
"""Tried in this order: a compiler may know no such vectors or no OpenMP, torch bring none, or a processor have no name."""
_ARGUMENTS = {
    "attend": "FFAAAALLFiiiiiiiii",
    "product": "FFFFiiidiii",
    "lay_tiles": "BLFFBiii",
    "tile_product": "FBBFFiiidiii",
    "rms_norm": "FFiidi",
    "decode": "FLFLLFFFBiiiiiiiiiidiii",
    "choose": "FDLFFiidi",
    "norm": "AAAFiidii",
    "norm_back": "AAAFAFiiii",
    "rotate": "AAAAiiidii",
    "gate": "AAAiii",
    "gate_back": "AAAAAiii",
    "score": "ALFFiiii",
    "score_back": "ALFFiiii",
    "square_sums": "ADiiii",
    "adamw": "AAFFFidddddddii",
}
"""Of each function of cpu.c: tensors (F: float32, B: bfloat16, D: float64, L: int64, A: either of the first two, all of the
same), i: int64, d: double. The last is the number of threads; where there are A, whether they are bfloat16 comes before it."""
_TENSORS = {"F": torch.float32, "B": torch.bfloat16, "D": torch.float64, "L": torch.int64}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None, with a warning, where no C compiler works."""
    made_of = _SOURCE.read_bytes() + Path(__file__).read_bytes()
    with suppress(OSError):  # a home folder may be shared by machines of several kinds
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        made_of += b"".join(sorted({line for line in lines if line.lower().startswith((b"flags", b"features"))}))
    place = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "meml_lib")
    kept = place / f"cpu-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    with suppress(OSError):
        return _loaded(kept)
    with suppress(OSError):
        if place.is_absolute():  # else this user has no home
            place.mkdir(parents=True, exist_ok=True)
    compiler, said = os.environ.get("CC") or "cc", ""
    for settings in _SETTINGS:
        try:
            with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
                part, made = f"{folder}/cpu.o", f"{folder}/cpu.so"
                # Linked without OpenMP: its functions are those that torch has loaded, and the threads are torch's.
                for step in ((*_EVERY, *settings, "-c", str(_SOURCE), "-o", part), ("-shared", part, "-lm", "-o", made)):
                    subprocess.run([*compiler.split(), *step], check=True, capture_output=True, text=True)
                found = _loaded(made)
                with suppress(OSError):
                    os.replace(made, kept)
                return found
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)  # of the last settings, which ask for the least
    told = f"{compiler!r} compiles no C ({said.strip()[:200]}): transformers samples on this CPU, which is slower; install a compiler"
    warnings.warn(told, stacklevel=2)
    return None


def serves(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the loops run there, on such numbers; the first answer for a CPU compiles them."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and library() is not None


def multiplies(dtype: torch.dtype) -> bool:
    """Whether `Product` (float32) or `TileProduct` (bfloat16) takes a matrix of this dtype here."""
    return dtype == torch.float32 or dtype == torch.bfloat16 and library().tiles > 0


def gates(outputs: int) -> bool:
    """Whether products take a gate and what it is multiplied by, together so many outputs."""
    return outputs % (2 * _TILE) == 0


def _loaded(file: str | Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(file))
    found.way_of_tiles.argtypes = [ctypes.c_int64]
    found.tiles = found.way_of_tiles(2)
    for name, kinds in _ARGUMENTS.items():
        if "tile" in name and not found.tiles:
            continue
        types = {"i": ctypes.c_int64, "d": ctypes.c_double}
        getattr(found, name).argtypes = [types.get(kind, ctypes.c_void_p) for kind in kinds]
    return found


@cache
def _function(name: str) -> tuple[Callable[..., None], list[tuple[int, torch.dtype | None]]]:
    """A function, and where its tensors stand, with their dtype: None for either."""
    return getattr(library(), name), [(i, _TENSORS.get(kind)) for i, kind in enumerate(_ARGUMENTS[name]) if kind not in "id"]


def _run(name: str, *arguments: Tensor | float | None) -> None:
    # A decode step may come here 150 times: each microsecond counts.
    (function, tensors), told, either = _function(name), list(arguments), None
    for i, dtype in tensors:
        x = told[i]
        if x is None:
            continue
        if dtype is None:
            if either is None and x.dtype in (torch.float32, torch.bfloat16):
                either = x.dtype
            dtype = either
        told[i] = _place(name, x, dtype)
    if either is not None:
        told.append(either is torch.bfloat16)
    function(*told, torch.get_num_threads())


def _place(name: str, x: Tensor, dtype: torch.dtype | None) -> int:
    """Where C finds its numbers."""
    if not (x.dtype is dtype and x.is_cpu and x.is_contiguous()):
        raise TypeError(f"cpu.{name}: a {x.dtype} tensor on {x.device}, strides {x.stride()}, for {dtype}")
    return x.data_ptr()


def _match(name: str, shape: tuple[int, ...], *others: tuple[int, ...]) -> None:
    for other in others:
        if other != shape:
            raise ValueError(f"cpu.{name}: {' and '.join(str(tuple(x)) for x in (shape, *others))} do not match")


def _whole(n: int) -> int:
    """The least multiple of a vector that is not smaller."""
    lanes = library().lanes()
    return -(-n // lanes) * lanes


def prompts_cache(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `attend` reads of a prompt [.., T, D], in whole vectors of L numbers: keys [.., T' / L, D, L], values [.., T', D']."""
    longer, wider = _whole(k.shape[-2]) - k.shape[-2], _whole(k.shape[-1]) - k.shape[-1]
    pad, lanes = torch.nn.functional.pad, library().lanes()
    return pad(k, (0, 0, 0, longer)).unflatten(-2, (-1, lanes)).mT.contiguous(), pad(v, (0, wider, 0, longer)).contiguous()


def answers_cache(rows: int, room: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for the answers' keys and values, in the same layout."""
    lanes = library().lanes()
    shapes = (rows, _whole(room) // lanes, size, lanes), (rows, _whole(room), _whole(size))
    return tuple(torch.empty(shape, dtype=dtype, device="cpu") for shape in shapes)


def _step(at: Tensor, room: int) -> int:
    step = int(at)
    if not 0 <= step < room:
        raise IndexError(f"token {step} of an answer with room for {room}")
    return step


def attend(
    qkv: Tensor,
    turn_N: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    prompt_of_row_N: Tensor,
    length_P: Tensor,
    at: Tensor,
) -> Tensor:
    """`kernels.attend` in float32; prompt and own, float32 or bfloat16, as `prompts_cache` and `answers_cache` lay them out."""
    room = own[1].shape[-2]
    step = _step(at, room)
    rows, heads, shared, size = (*qkv.shape[:2], qkv.shape[2] - 2, qkv.shape[3])
    out = qkv.new_empty(rows, heads, shared, size)
    sizes = rows, heads, shared, size, prompt[1].shape[-2], room, step
    _run("attend", qkv, torch.view_as_real(turn_N), *prompt, *own, prompt_of_row_N, length_P, out, *sizes)
    return out


def rms_norm(x: Tensor, epsilon: float) -> Tensor:
    """x, float32, over its last dimension's root mean square."""
    x, size = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    _run("rms_norm", x, out, out.numel() // size, size, float(epsilon))
    return out


class Product:
    """x -> x W^T + b, float32; x may be normed first, by `rms_norm`. Of a small matrix, whose products torch begins slowly.

    Args:
      weight: [M, K], float32. bias: [M]. epsilon: of the norm, None for none.
      gated: W's first half is a gate's, and what is returned is silu(gate) * the second half, [N, M / 2].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, epsilon: float | None, gated: bool):
        order = self._takes(weight, bias, epsilon, gated, _PANEL)
        padded = torch.nn.functional.pad(weight[order], (0, 0, 0, len(self._bias) - len(weight)))
        self._weight = padded.unflatten(0, (-1, _PANEL)).mT.contiguous()

    def _takes(self, weight: Tensor, bias: Tensor | None, epsilon: float | None, gated: bool, block: int) -> Tensor:
        """Returns: which output stands where: half a block of gates beside their other halves."""
        outputs, inputs = weight.shape
        self.form = outputs, inputs, -1.0 if epsilon is None else float(epsilon), gated
        """Outputs, those of a gate included, inputs, epsilon and whether there is a gate."""
        order = torch.arange(outputs)
        if gated:
            order = order.view(2, -1, block // 2).transpose(0, 1).flatten()
        bias = weight.new_zeros(outputs) if bias is None else bias[order]
        self._bias = torch.nn.functional.pad(bias.float(), (0, -outputs % block))
        return order

    def __call__(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """Args: x: [N, K]. into: what the product is added to, in place."""
        x, (outputs, inputs, epsilon, gated) = x.contiguous(), self.form
        _match("product", x.shape[1:], (inputs,))
        out = x.new_empty(len(x), outputs // 2 if gated else outputs) if into is None else into
        self._multiply(x, out, len(x), inputs, outputs, epsilon, into is not None, gated)
        return out

    @property
    def places(self) -> tuple[int, int]:
        """Where C finds matrix and bias."""
        return self._weight.data_ptr(), self._bias.data_ptr()

    def _multiply(self, x: Tensor, out: Tensor, *how: float) -> None:
        _run("product", x, self._weight, self._bias, out, *how)


class TileProduct(Product):
    """The same of a bfloat16 matrix, where `multiplies(bfloat16)`. It is laid out so that it comes from memory once for up
    to 32 rows, from end to end; x is rounded to bfloat16 for it.

    Args:
      bias: as it is added: multiplied, and in order.
      columns, rows: what the weight's inputs and its outputs are multiplied by, float32; it is rounded once.
      order: which of the weight's outputs each is.
    """

    _narrow = torch.empty(0, dtype=torch.bfloat16)
    """Room for any product's rounded rows: one runs at a time, in one thread, and finds it in the processor's cache."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        epsilon: float | None,
        gated: bool,
        columns: Tensor | None = None,
        rows: Tensor | None = None,
        order: Tensor | None = None,
    ):
        own = self._takes(weight, bias, epsilon, gated, 2 * _TILE)
        outputs, inputs = weight.shape
        for size, given in ((inputs, columns), (outputs, rows), (outputs, order)):
            _match("TileProduct", (size,), *(() if given is None else (given.shape,)))
        blocks = -(-outputs // (2 * _TILE)), -(-inputs // _DEPTH)
        self._weight = pages.empty((*blocks, 2, _TILE, _TILE, 2), weight.dtype)
        line = own if order is None else torch.arange(outputs)[order[own]]  # an error where there is no such output
        _run("lay_tiles", weight.contiguous(), line, rows, columns, self._weight, outputs, inputs)

    @staticmethod
    def narrow_room(rows: int, inputs: int) -> Tensor:
        """Room for so many rounded rows."""
        needed, narrow = -(-rows // _TILE) * _TILE * -(-inputs // _DEPTH) * _DEPTH, TileProduct._narrow
        if needed > len(narrow):
            narrow = torch.empty(needed, dtype=torch.bfloat16)
            if needed <= _KEPT:
                TileProduct._narrow = narrow
        return narrow

    def _multiply(self, x: Tensor, out: Tensor, rows: int, inputs: int, *how: float) -> None:
        _run("tile_product", x, self.narrow_room(rows, inputs), self._weight, self._bias, out, rows, inputs, *how)


class Layers:
    """A token of each row through all layers in one call: their products, and `attend` between them.

    Args:
      products: of each layer four of one kind: to queries, keys and values, normed; from what attention mixed; to the gated,
        normed; and from it. The second and the fourth are added.
      prompts, own: of each layer what `attend` takes. heads: of keys. size: of one.
    Raises: ValueError, TypeError if these do not fit each other.
    """

    def __init__(
        self,
        products: Sequence[Sequence[Product]],
        prompts: Sequence[tuple[Tensor, Tensor]],
        own: Sequence[tuple[Tensor, Tensor]],
        heads: int,
        size: int,
    ):
        wide, hidden, epsilon, _ = products[0][0].form
        inner, asked, kind = products[0][3].form[1], wide - 2 * heads * size, type(products[0][0])
        forms = (wide, hidden, epsilon, False), (hidden, asked, -1.0, False)
        forms += (2 * inner, hidden, epsilon, True), (hidden, inner, -1.0, False)
        kept, lanes, places = torch.bfloat16 if own[0][0].dtype == torch.bfloat16 else torch.float32, library().lanes(), []
        for layer, caches in zip(products, zip(prompts, own, strict=True), strict=True):
            _match("Layers", (kind,) * 4, tuple(map(type, layer)))
            _match("Layers", forms, tuple(product.form for product in layer))
            for (k, v), like in zip(caches, (prompts[0], own[0]), strict=True):
                _match("Layers", (*like[0].shape[:2], size, lanes), k.shape)
                _match("Layers", (len(k), k.shape[1] * lanes, _whole(size)), like[1].shape, v.shape)
            weights, biases = zip(*(product.places for product in layer), strict=True)
            places.append([*weights, *biases, *(_place("Layers", x, kept) for cache in caches for x in cache)])
        self._alive, self._places = (products, prompts, own), torch.tensor(places)
        self._how = epsilon, kind is TileProduct, kept == torch.bfloat16
        self._rows, self._asked, self._room = len(own[0][0]) / heads, len(prompts[0][0]) / heads, own[0][1].shape[-2]
        self._widths = wide, asked, inner
        self._sizes = hidden, heads, asked // (heads * size), size, inner, prompts[0][1].shape[-2], self._room

    def __call__(self, x: Tensor, turn_N: Tensor, prompt_of_row_N: Tensor, length_P: Tensor, at: Tensor) -> Tensor:
        """Args: x: [N, hidden size], float32; overwritten. The others are `attend`'s. Returns: x."""
        step, (rows, hidden), (_, asked, inner) = _step(at, self._room), x.shape, self._widths
        _match("Layers", (self._rows, self._sizes[0]), x.shape, (*prompt_of_row_N.shape, hidden))
        _match("Layers", (rows, self._sizes[3] // 2), turn_N.shape)
        _match("Layers", (self._asked,), length_P.shape)
        rooms = [x.new_empty(rows, width) for width in self._widths]
        narrow = TileProduct.narrow_room(rows, max(hidden, asked, inner)) if self._how[1] else None
        rest = *rooms, narrow, len(self._places), rows, *self._sizes, step, *self._how
        _run("decode", x, self._places, torch.view_as_real(turn_N), prompt_of_row_N, length_P, *rest)
        return x


def choose(logits_NV: Tensor, uniform_N: Tensor, temperature: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """`native.choose` without top_p; sums of probabilities in float64."""
    exact = logits_NV.float().contiguous()
    token_N = exact.new_empty(len(exact), dtype=torch.long)
    logp_N, entropy_N = exact.new_empty(2, len(exact))
    uniform_N = uniform_N.double().contiguous()
    _run("choose", exact, uniform_N, token_N, logp_N, entropy_N, *exact.shape, float(temperature or 0.0))
    return token_N, logp_N, entropy_N


# --- an update's ------------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x [.., D], in float32, and what each row was multiplied by [.., 1], which `norm_back` wants."""
    _match("norm", x.shape[-1:], weight.shape)
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _run("norm", x, weight, y, scale, scale.numel(), x.shape[-1], float(epsilon))
    return y, scale


def norm_back(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by x and by the weight."""
    _match("norm_back", x.shape, grad.shape)
    x, size = x.contiguous(), x.shape[-1]
    grad_x, sums = torch.empty_like(x), x.new_zeros(torch.get_num_threads(), size, dtype=torch.float32)
    _run("norm_back", grad.contiguous(), x, weight, scale, grad_x, sums, scale.numel(), size)
    return grad_x, sums.sum(0).to(weight.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotary embedding: each head's pairs (d, d + D / 2) of x [.., H, D] turned by their angle; cos, sin: [.., D], whose halves
    are alike. back: the other way, as a gradient goes."""
    _match("rotate", (*x.shape[:-2], x.shape[-1]), cos.shape, sin.shape)
    x, (heads, size) = x.contiguous(), x.shape[-2:]
    y = torch.empty_like(x)
    _run("rotate", x, cos.contiguous(), sin.contiguous(), y, x.numel() // (heads * size), heads, size, -1.0 if back else 1.0)
    return y


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    _match("gate", gate.shape, up.shape)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _run("gate", gate, up, out, out.numel())
    return out


def gate_back(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by gate and by up."""
    _match("gate_back", gate.shape, up.shape, grad.shape)
    gate, up = gate.contiguous(), up.contiguous()
    grads = torch.empty_like(gate), torch.empty_like(up)
    _run("gate_back", grad.contiguous(), gate, up, *grads, gate.numel())
    return grads


def score(logits_NV: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp of each row, and its token's log-probability, [N], float32. Raises: IndexError for no word's number."""
    rows, words = logits_NV.shape
    _match("score", (rows,), token_N.shape)
    if rows and not 0 <= int(token_N.min()) <= int(token_N.max()) < words:
        raise IndexError(f"tokens {int(token_N.min())} to {int(token_N.max())} are not all in [0, {words})")
    lse_N, logp_N = torch.empty(2, rows, dtype=torch.float32, device="cpu")
    _run("score", logits_NV, token_N, lse_N, logp_N, *logits_NV.shape)
    return lse_N, logp_N


def score_back(logits_NV: Tensor, token_N: Tensor, lse_N: Tensor, grad_N: Tensor) -> None:
    """Logits become the gradient by them, of a gradient by the log-probabilities that `score` told of the same tokens."""
    _match("score_back", logits_NV.shape[:1], token_N.shape, lse_N.shape, grad_N.shape)
    _run("score_back", logits_NV, token_N, lse_N, grad_N, *logits_NV.shape)


def square_sum(x: Tensor) -> float:
    """The sum of all numbers' squares, in float32 of a thousand at a time, in float64 of these sums."""
    sums = torch.empty(torch.get_num_threads(), dtype=torch.float64, device="cpu")
    _run("square_sums", x.contiguous(), sums, len(sums), x.numel())
    return sums.sum().item()


def adamw(
    weight: Tensor,
    grad: Tensor,
    master: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    step: int,
    share: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """A step of `torch.optim.AdamW`, in place; its number begins at 1. Args: weight: becomes the rounded master. grad: taken share
    times. master, mean, square: float32 weights and moments."""
    _match("adamw", weight.shape, grad.shape, master.shape, mean.shape, square.shape)
    length, unbiased = lr / (1.0 - betas[0] ** step), (1.0 - betas[1] ** step) ** -0.5
    how = share, 1.0 - lr * weight_decay, *betas, length, unbiased, eps
    _run("adamw", weight, grad.contiguous(), master, mean, square, master.numel(), *map(float, how))
