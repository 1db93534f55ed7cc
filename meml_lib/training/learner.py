"""One update: the parts of the objective, in micro-batches, over all processes, to one optimiser step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from meml_lib.rollouts import cpu, products
from meml_lib.schema import OptimizerParams
from meml_lib.training import packing, sharding
from meml_lib.training.head import AnswerLoss, Use
from meml_lib.training.lean import lean
from meml_lib.training.losses import Part, WeighedRow, token_weights
from meml_lib.training.policy import Policy, Row
from meml_lib.training.profile import span

PART = 2**22
"""Numbers of the weights that the optimiser works on at a time; of a larger weight some rows."""


class State(NamedTuple):
    """What a learner goes on from; whole tensors on the CPU."""

    weights: dict[str, Tensor]
    """Those that are trained, as the optimiser has them: float32."""
    moments: dict[str, Tensor]
    """The optimiser's own tensors, by the weight's name, a dot, and their own."""
    place: dict[str, int]
    """In the schedule."""


class Learner:
    """The optimiser's side of a policy.

    Args:
      policy: what is trained.
      params: optimiser and learning-rate schedule.
      steps: length of the schedule, in steps.
      max_answer_tokens: the constant of divide_by "constant".
      micro_batch_tokens: of one forward and backward pass; a prompt counts once for all of its answers there, padding
        only where the model cannot be packed (`packing.packs`).
      sharded: divide weights, gradients and moments over the processes (`sharding.wrap`); changes no update.
    """

    def __init__(
        self,
        policy: Policy,
        accelerator: Accelerator,
        params: OptimizerParams,
        *,
        steps: int,
        max_answer_tokens: int,
        micro_batch_tokens: int,
        sharded: bool = False,
    ):
        self.policy, self.accelerator, self.params = policy, accelerator, params
        self.max_answer_tokens, self.micro_batch_tokens = max_answer_tokens, micro_batch_tokens
        self.model = sharding.wrap(policy.model, accelerator, sharded=sharded)
        # A bfloat16 weight keeps 8 bits: an update of 1e-5 on a weight of 0.05 would round away. The optimiser
        # therefore works on float32 copies, which are rounded into the weights after each step.
        self._weights = {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}
        self._masters = {name: weight.detach().float() for name, weight in self._weights.items()}
        self._optimizers = _optimizers(params, self._masters)
        self._steps, self._done = steps, 0

    def state(self, *, keep: bool = True) -> State:
        """What `restore` goes on from, whatever the processes and their layout are then; all processes call it.

        Args: keep: whether this process wants it; else it is empty. What is not divided is not copied.
        """
        weights, moments = {}, {}

        def note(told: dict[str, Tensor], name: str, value: Tensor) -> None:
            whole = sharding.full(value.detach())
            if keep:
                told[name] = whole.cpu()

        for name, master in self._masters.items():
            note(weights, name, master)
        of_pieces: dict[str, list[Tensor]] = {}
        for optimizer, pieces in self._optimizers:
            for piece in pieces:
                for own, value in optimizer.state.get(piece.master, {}).items():
                    of_pieces.setdefault(f"{piece.name}.{own}", []).append(value)
        for name, values in of_pieces.items():
            note(moments, name, torch.cat(values) if len(values) > 1 and values[0].ndim else values[0])
        return State(weights, moments, {"done": self._done})

    def restore(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], place: Mapping[str, int]) -> None:
        """Go on from what `state` gave, with this learner's own learning rate and length of schedule.

        All processes have it; the moments are taken over, not copied.

        Raises: ValueError if weights or moments have other names, or weights other shapes.
        """
        have = {name: tuple(master.shape) for name, master in self._masters.items()}
        if have != {name: tuple(weight.shape) for name, weight in weights.items()}:
            odd = sorted(name for name in have.keys() | weights.keys()
                         if name not in have or name not in weights or have[name] != tuple(weights[name].shape))  # fmt: skip
            raise ValueError(f"the checkpoint's weights are another model's: {', '.join(odd[:3])} ({len(odd)} differ)")
        of_weight: dict[str, dict[str, Tensor]] = {}
        for key, value in moments.items():
            name, _, own = key.rpartition(".")
            if name not in self._masters:
                raise ValueError(f"the checkpoint's moments are another model's: {key}")
            of_weight.setdefault(name, {})[own] = sharding.divided(value, like=self._masters[name])
        with torch.no_grad():
            for name, master in self._masters.items():
                sharding.local(master).copy_(sharding.local(sharding.divided(weights[name], like=master)))
                self._weights[name].copy_(master)
        for optimizer, pieces in self._optimizers:
            held = {
                n: {own: piece.of(value) if value.ndim else value.clone() for own, value in of_weight[piece.name].items()}
                for n, piece in enumerate(pieces)
                if piece.name in of_weight
            }
            optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})
        self._done = place["done"]

    @property
    def lr(self) -> float:
        """Of the step to come."""
        return self.params.lr * schedule(self._done, self.params, self._steps)

    @span("update")
    def update(self, parts: Sequence[Part], *, advance: bool = True) -> dict[str, float]:
        """Minimise sum over parts of weight * loss (eq. 10) by one optimiser step.

        The update depends neither on micro-batch size nor on the number of processes: each row's weight is fixed over
        the whole step before anything is split. Without a single row that counts, the weights stay as they are.

        Args:
          parts: this process's rows of each part; all processes name the same parts in the same order.
          advance: move the learning-rate schedule (False for a step between two steps of the schedule).
        Returns: "loss" and "loss/NAME" (unweighted, nats), "rows/NAME" (rows that count, all processes), "grad_norm"
          before clipping.
        Raises: FloatingPointError if the gradient is not finite; the weights are left as they were.
        """
        weighed = [self._weigh(part) for part in parts]
        uses: dict[Row, list[Use]] = {}  # a row is computed once, for all parts and however often it was drawn
        for i, (part, (rows, weight_N)) in enumerate(zip(parts, weighed, strict=True)):
            for row, weight in zip(rows, weight_N.tolist(), strict=True):
                if part.weight > 0:
                    uses.setdefault(row.row, []).append(Use(i, row, weight))
        batches = [[(row, uses[row]) for row in batch] for batch in self._micro_batches(list(uses))]
        most = int(self._over_processes([len(batches)], "max")[0])
        # Collective passes need the same number everywhere: a process that is done adds passes with weight 0.
        batches += [self._idle()] * (most - len(batches))
        self.model.train()
        losses = torch.zeros(len(parts), device=self.accelerator.device)
        # Divided gradients are summed over processes pass by pass: kept until the last one, they would be whole.
        waits = not sharding.is_sharded(self.model)
        model = self.policy.model
        with packing.packed_attention(model), lean(model), products.in_float32(model.dtype, model.device):
            for k, batch in enumerate(batches, start=1):
                with self.accelerator.no_sync(self.model) if waits and k < most else nullcontext():
                    losses += self._pass(parts, *zip(*batch, strict=True))
        grad_norm = self._step() if most else 0.0
        self._done += advance
        losses = self._over_processes(losses.tolist())
        counts = self._over_processes([len(rows) for rows, _ in weighed])
        record = {"loss": sum(part.weight * loss for part, loss in zip(parts, losses, strict=True))}
        for part, loss, count in zip(parts, losses, counts, strict=True):
            record |= {f"loss/{part.name}": loss, f"rows/{part.name}": int(count)}
        return record | {"grad_norm": grad_norm}

    def _weigh(self, part: Part) -> tuple[list[WeighedRow], Tensor]:
        """Fix each row's weight over the whole step, then drop the rows that count 0."""
        count_N = torch.tensor([r.count for r in part.rows])
        tokens_N = torch.tensor([len(r.row.answer) for r in part.rows])
        total_rows, total_tokens = self._over_processes([len(part.rows), int(tokens_N.sum())])
        weight_N = token_weights(
            count_N,
            tokens_N,
            divide_by=part.divide_by,
            total_rows=int(total_rows),
            total_tokens=int(total_tokens),
            max_answer_tokens=self.max_answer_tokens,
        )
        kept = count_N.nonzero()[:, 0].tolist()
        return [part.rows[n] for n in kept], weight_N[kept]

    def _micro_batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """As few as the budget allows, and then as equal as they come without computing a prompt more often: the largest
        decides what memory a step needs."""
        lengths = [row.tokens for row in rows]

        def split(budget: int) -> list[list[int]]:
            return list(packing.trees(rows, budget) if packing.packs(self.policy.model) else micro_batches(lengths, budget))

        def of_prompts(batches: list[list[int]]) -> int:
            return sum(len(prompt) for batch in batches for prompt in {rows[n].prompt for n in batch})

        enough = self.micro_batch_tokens
        batches, below = split(enough), 0
        while len(batches) > 1 and enough - below > max(1, self.micro_batch_tokens // 32):
            middle = (enough + below) // 2
            closer = split(middle)
            if len(closer) == len(batches) and of_prompts(closer) <= of_prompts(batches):
                batches, enough = closer, middle
            else:
                below = middle
        return [[rows[n] for n in batch] for batch in batches]

    def _idle(self) -> list[tuple[Row, list[Use]]]:
        end = (self.policy.answer_end_id,)
        row = Row(end, end)
        return [(row, [Use(0, WeighedRow(row, 0.0, best_prompt=end, best_logp=(0.0,)), 0.0)])]

    @span("forward and backward pass")
    def _pass(self, parts: Sequence[Part], rows: Sequence[Row], uses: Sequence[Sequence[Use]]) -> Tensor:
        """Forward and backward of one micro-batch. Returns: the loss of each part, unweighted; nats."""
        best_rows, best = [], None
        wide = {i for i, part in enumerate(parts) if part.against == "distributions"}
        if wide:  # in every process alike: the pass is collective
            best_rows = list(dict.fromkeys(use.best_row for of_row in uses for use in of_row if use.part in wide))
            with torch.no_grad():
                best = packing.run(self.policy, self.model, best_rows or rows, lambda x_nF, *output: x_nF)
        # DDP and FSDP average gradients over processes, while row weights already hold the global denominator.
        scales = [part.weight * self.accelerator.num_processes for part in parts]
        loss = AnswerLoss(parts, scales, rows, uses, best_rows, best)
        self.accelerator.backward(packing.run(self.policy, self.model, rows, loss))
        return loss.losses

    def anywhere(self, here: bool) -> bool:
        """Whether it is so in any process; to be asked in all."""
        return self._over_processes([float(here)], "max")[0] > 0

    def _over_processes(self, values: list[float], how: str = "sum") -> list[float]:
        if self.accelerator.num_processes == 1:
            return values
        gathered = self.accelerator.gather(torch.tensor([values], dtype=torch.float64, device=self.accelerator.device))
        return (gathered.sum(0) if how == "sum" else gathered.amax(0)).tolist()

    @span("optimizer step")
    def _step(self) -> float:
        """Clip the gradient and take a step, a part of the weights at a time: float32 gradients of all would be as large as
        the weights that they change, and come back from memory for every pass over them."""
        grad_norm = self._grad_norm()
        if not math.isfinite(grad_norm):
            self.model.zero_grad()
            raise FloatingPointError(f"gradient norm is {grad_norm}; no step was taken. Try a lower lr or float32")
        limit = self.params.max_grad_norm
        share = 1.0 if limit is None else min(1.0, limit / (grad_norm + 1e-6))
        sweeps = self._sweeps()
        for optimizer, pieces in self._optimizers:
            optimizer.param_groups[0]["lr"] = self.lr
            if sweeps and isinstance(optimizer, torch.optim.AdamW):
                self._sweep(optimizer, pieces, share)
                continue
            for piece in pieces:
                if (grad := self._weights[piece.name].grad) is not None:
                    grad = piece.of(grad).float()
                    piece.master.grad = grad if share == 1.0 else grad.mul_(share)
            with products.in_float32(torch.bfloat16, self.accelerator.device):  # Muon's, whatever the weights' dtype
                optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for piece in pieces:
                    if (weight := self._weights[piece.name]).dtype != torch.float32:  # else they are the same numbers
                        piece.of(weight).copy_(piece.master)
        self.model.zero_grad()
        return grad_norm

    def _sweeps(self) -> bool:
        """Whether a step of AdamW's is one loop of C: torch's takes float32 gradients, and leaves the weights to be rounded."""
        weights = self._weights.values()
        copied = all(weight.dtype == torch.bfloat16 and cpu.serves(weight.device, weight.dtype) for weight in weights)
        return copied and not sharding.is_sharded(self.model)

    def _sweep(self, optimizer: torch.optim.AdamW, pieces: Sequence[_Piece], share: float) -> None:
        options = optimizer.param_groups[0]
        for piece in pieces:
            weight = self._weights[piece.name]
            if weight.grad is not None:
                state = optimizer.state[piece.master]
                state["step"] += 1
                tensors = piece.of(weight.detach()), piece.of(weight.grad), piece.master, state["exp_avg"], state["exp_avg_sq"]
                how = {name: options[name] for name in ("lr", "betas", "eps", "weight_decay")}
                cpu.adamw(*tensors, step=int(state["step"]), share=share, **how)

    def _grad_norm(self) -> float:
        grads = [sharding.local(weight.grad).flatten() for weight in self._weights.values() if weight.grad is not None]
        if all(cpu.serves(grad.device, grad.dtype) for grad in grads):
            square = sum(map(cpu.square_sum, grads))
        else:
            pieces = (piece.float() for grad in grads for piece in grad.split(PART))
            squares = [torch.dot(piece, piece) for piece in pieces]  # `vector_norm` of millions loses a hundredth on a CPU
            square = torch.stack(squares).double().sum().item()
        # Whole gradients are alike everywhere but for rounding, and would be clipped, and part, by it.
        return math.sqrt(self._over_processes([square], "sum" if sharding.is_sharded(self.model) else "max")[0])


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Split rows into batches of similar length whose padded size stays within a token budget.

    Args:
      lengths: tokens of each row. budget: most tokens of a batch, padding included; a longer row stands alone.
    Yields: row numbers, longest rows first; each row once.

    >>> list(micro_batches([3, 9, 4, 4], budget=12))
    [[1], [2, 3, 0]]
    """
    batch: list[int] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def schedule(step: int, params: OptimizerParams, steps: int) -> float:
    """Share of the learning rate at a step: a linear warm-up, then constant, linear or cosine to 0 at `steps`."""
    if step < params.warmup_steps:
        return (step + 1) / (params.warmup_steps + 1)
    done = min(1.0, (step - params.warmup_steps) / max(1, steps - params.warmup_steps))
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[params.decay]


@dataclass(frozen=True, eq=False)
class _Piece:
    """A weight as the optimiser has it, or some rows of a large one."""

    name: str
    rows: slice | None
    master: Tensor
    """Float32."""

    def of(self, whole: Tensor) -> Tensor:
        return whole if self.rows is None else whole[self.rows]


def _pieces(name: str, master: Tensor) -> list[_Piece]:
    divided = sharding.local(master) is not master  # over processes
    if divided or master.numel() <= PART:
        return [_Piece(name, None, master)]
    rows = max(1, PART * len(master) // master.numel())
    starts = range(0, len(master), rows)
    return [_Piece(name, slice(start, start + rows), master[start : start + rows]) for start in starts]


def _optimizers(params: OptimizerParams, masters: Mapping[str, Tensor]) -> list[tuple[torch.optim.Optimizer, list[_Piece]]]:
    """AdamW for all, or Muon for the hidden matrices and AdamW for the rest; each for a part of them (`PART`)."""
    outer = ("embed", "lm_head", "wte", "wpe")
    matrices, rest = [], []
    for name, master in masters.items():
        if params.optimizer == "muon" and master.ndim == 2 and not any(word in name for word in outer):
            matrices.append(_Piece(name, None, master))  # whole: it makes all of its rows orthogonal
        else:
            rest += _pieces(name, master)
    options = {"lr": params.lr, "weight_decay": params.weight_decay}
    optimizers: list[tuple[torch.optim.Optimizer, list[_Piece]]] = []
    for part in _parts(rest):
        adamw = torch.optim.AdamW([piece.master for piece in part], betas=(0.9, 0.95), fused=True, **options)
        # Moments now, as torch would make them at the first step: made later, they would lie scattered among what passes
        # and samplers give back, which then no longer fit there.
        for piece in part:
            moments = {name: torch.zeros_like(piece.master) for name in ("exp_avg", "exp_avg_sq")}
            adamw.state[piece.master] = {"step": torch.zeros((), device=piece.master.device), **moments}
        optimizers.append((adamw, part))
    for part in _parts(matrices):  # scaled so that one learning rate serves both
        muon = torch.optim.Muon([piece.master for piece in part], adjust_lr_fn="match_rms_adamw", **options)
        optimizers.append((muon, part))
    return optimizers


def _parts(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    part: list[_Piece] = []
    for piece in pieces:
        if part and sum(other.master.numel() for other in part) + piece.master.numel() > PART:
            yield part
            part = []
        part.append(piece)
    if part:
        yield part
