"""Llama-shaped models without transformers between: prompts, then a token of every row a step, from the trainer's weights.

What it saves over a model's own forward pass, in which a step of few tokens is mostly overhead:
- q, k and v are one product, gate and up another, with the norm's weights and attention's scale in their matrices; large
  matrices are laid out for the CPU once, not at every product.
- The keys of a prompt are kept once for all its rollouts.
- An answer's keys are written in place; attention, norms and draws are compiled loops (`kernels` on CUDA, `cpu`).
- On CUDA a step is one captured graph, the same for all tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from meml_lib.rollouts import cpu, products

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROPES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long the text is
_PACK = 2**18  # weights; the product of a smaller float32 matrix takes longer when oneDNN lays it out


def fits(model: PreTrainedModel, positions: int) -> bool:
    """Whether `Weights` can decode this model over so many positions; else `forward.Forward` does."""
    if model.device.type != "cuda" and not cpu.serves(model.device):
        return False
    base, config = _base(model), model.config
    window = getattr(config, "sliding_window", None)
    if config.model_type not in _FAMILIES or config.rope_parameters["rope_type"] not in _ROPES:
        return False
    linear = [module for layer in base.model.layers for part in (layer.self_attn, layer.mlp) for module in part.children()]
    linear = [base.lm_head, *(module for module in linear if hasattr(module, "in_features"))]
    unwindowed = window is None or positions < window
    return unwindowed and type(base.model.embed_tokens) is nn.Embedding and all(map(_is_plain, linear))


Attend = Callable[[int, Tensor], Tensor]
"""From a layer's number and [N, kv heads, R + 2, head size], of each head of keys its R scaled queries, its key and its value,
none yet turned to its position, to what the layer's attention makes of them: [N, kv heads, R, head size] or as many numbers
in this order. It may overwrite what it is given."""


class _Layer(NamedTuple):
    """Products of [N, hidden size], normed; those of `out` and `down` are added to their second argument, in place."""

    qkv: Callable[[Tensor], Tensor]
    qk_norm: Tensor | None
    """[R + 1, head size], Qwen3's of queries and key."""
    out: Callable[[Tensor, Tensor], Tensor]
    gated: Callable[[Tensor], Tensor]
    down: Callable[[Tensor, Tensor], Tensor]


class Weights:
    """A model's weights as a decode step reads them: copies, to be made anew after each update of the model.

    LoRA adapters are merged into the copies, in the model's own precision.
    """

    def __init__(self, model: PreTrainedModel):
        base = _base(model)
        attention = base.model.layers[0].self_attn
        self.head_size, self.scale = attention.head_dim, attention.scaling
        self.heads, self.kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        self._epsilon = base.model.norm.variance_epsilon
        self.shared = self.heads // self.kv_heads
        # Rotary embedding turns the pairs (i, i + half). Side by side they are complex numbers, turned in one product.
        self._pairs = torch.arange(self.head_size, device=model.device).view(2, -1).T.flatten()
        numbers = torch.arange((self.heads + 2 * self.kv_heads) * self.head_size, device=model.device)
        q, k, v = numbers.view(-1, self.head_size).split((self.heads, self.kv_heads, self.kv_heads))
        q = q[:, self._pairs].unflatten(0, (self.kv_heads, self.shared))
        self._order = torch.cat((q, k[:, None, self._pairs], v[:, None]), dim=1).flatten()
        self.rotary = base.model.rotary_emb
        on_cuda, own = model.device.type == "cuda", base.model.embed_tokens.weight.dtype
        self.dtype = own if on_cuda else torch.float32
        """Of what stands between products."""
        self.kept = own if on_cuda or own == torch.bfloat16 else torch.float32
        """Of keys and values."""
        self.embedding, self.head = base.model.embed_tokens.weight, _linear(base.lm_head)
        self._final = base.model.norm.weight.float()
        self.layers = [self._layer(layer) for layer in base.model.layers]

    def _layer(self, layer: nn.Module) -> _Layer:
        attention, mlp, qk_norm, scale_R = layer.self_attn, layer.mlp, None, None
        if hasattr(attention, "q_norm"):
            q, k = (norm.weight[self._pairs] for norm in (attention.q_norm, attention.k_norm))
            qk_norm = torch.cat(((q * self.scale).expand(self.shared, -1), k[None]))
        else:
            scale_R = torch.ones(len(self._order), device=self._order.device)
            scale_R[: self.heads * self.head_size] = self.scale
        before, between = (norm.weight.float() for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        return _Layer(
            _linear(*_qkv(attention), order=self._order, columns=before, rows=scale_R, epsilon=self._epsilon),
            qk_norm,
            _linear(attention.o_proj),
            _linear(mlp.gate_proj, mlp.up_proj, columns=between, epsilon=self._epsilon, act=mlp.act_fn),
            _linear(mlp.down_proj),
        )

    def products(self) -> list[tuple[cpu.Product, ...]] | None:
        """Of each layer, where `cpu.Layers` takes them; else None."""
        found = [(layer.qkv, layer.out, layer.gated, layer.down) for layer in self.layers]
        kinds = {type(product) for of_layer in found for product in of_layer}
        plain = all(layer.qk_norm is None for layer in self.layers)
        return found if plain and len(kinds) == 1 and issubclass(kinds.pop(), cpu.Product) else None

    def embedded(self, token_N: Tensor) -> Tensor:
        return F.embedding(token_N, self.embedding).to(self.dtype)

    def hidden(self, token_N: Tensor, attend: Attend) -> Tensor:
        """What N tokens come to after all layers, [N, hidden size]."""
        rows, shape = len(token_N), (len(token_N), self.kv_heads, self.shared + 2, self.head_size)
        x = self.embedded(token_N)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(x).view(shape)
            if layer.qk_norm is not None:
                qkv[:, :, :-1] = _normed(qkv[:, :, :-1], self._epsilon) * layer.qk_norm
            layer.out(attend(i, qkv).reshape(rows, -1), x)
            layer.down(layer.gated(x), x)
        return x

    def turned(self, qkv: Tensor, turn_N: Tensor) -> Tensor:
        """Queries and keys at their positions, and values, float32; in place where they are. Args: turn_N: complex [N, size / 2]."""
        exact = qkv.float()
        torch.view_as_complex(exact.unflatten(-1, (-1, 2)))[:, :, :-1] *= turn_N[:, None, None]
        return exact

    def logits(self, x_NF: Tensor) -> Tensor:
        """The next token's logits [N, V], of what `hidden` returned."""
        return self.head((_normed(x_NF, self._epsilon) * self._final).to(self.dtype))


class Decoder:
    """Answers, a token of every row at a time.

    Args:
      prompts: P, unequal. prompt_of_row: N indices into them. room: most tokens of an answer.
    """

    def __init__(self, weights: Weights, prompts: Sequence[tuple[int, ...]], prompt_of_row: list[int], room: int):
        self._w, self._step = weights, 0
        device, size = weights.embedding.device, weights.head_size
        positions = torch.arange(max(map(len, prompts)) + room, device=device)[None]
        cos, sin = (table[0, :, : size // 2].float() for table in weights.rotary(weights.embedding, positions))
        self._turns_T = torch.complex(cos, sin)
        rows_N = torch.tensor(prompt_of_row, device=device)
        self._length_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.logits_NV = self._prefill(prompts)[rows_N]
        """The first token's."""
        self._position_N, self._at = self._length_P[rows_N], torch.zeros(1, dtype=torch.long, device=device)
        self._prompt_of_row_N, self._graph = rows_N, None
        shape = len(prompt_of_row) * weights.kv_heads, room, size
        self._own = [self._reserved(*shape) for _ in weights.layers]
        """Of each layer the answers' keys and values, as the prompts' are kept."""
        self._layers = self._in_one_call()

    def _in_one_call(self) -> cpu.Layers | None:
        """All layers, where that can be."""
        w, taken = self._w, self._w.products()
        return None if taken is None else cpu.Layers(taken, self._prompts, self._own, w.kv_heads, w.head_size)

    def _reserved(self, *shape: int) -> tuple[Tensor, ...]:
        if self._length_P.is_cuda:
            return tuple(torch.empty(2, *shape, dtype=self._w.kept, device=self._length_P.device))
        return cpu.answers_cache(*shape, self._w.kept)

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Run the prompts, padded on the right, and keep their keys and values. Returns: the next token's logits [P, V]."""
        w, length_P, width = self._w, self._length_P, max(map(len, prompts))
        batch = len(prompts), width
        self._prompts = []
        """Of each layer keys and values [P * kv heads, T, size], on a CPU as `cpu.prompts_cache` lays them out."""

        def attend(_: int, qkv: Tensor) -> Tensor:
            qkv = w.turned(qkv, turn_N).to(w.dtype)
            qkv = qkv.unflatten(0, batch).permute(0, 2, 3, 1, 4)  # [P, kv heads, R + 2, T, size]
            q, k, v = (x.contiguous() for x in (qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]))
            kept = k.flatten(0, 1).to(w.kept), v.flatten(0, 1).to(w.kept)
            self._prompts.append(kept if k.is_cuda else cpu.prompts_cache(*kept))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=w.shared > 1)
            return out.transpose(1, 2)

        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=length_P.device)
        turn_N = self._turns_T[:width].repeat(len(prompts), 1)
        x = w.hidden(ids.flatten(), attend)
        return w.logits(x.unflatten(0, batch)[torch.arange(len(prompts), device=x.device), length_P - 1])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self._position_N, self._prompt_of_row_N, self._graph = self._position_N[rows], self._prompt_of_row_N[rows], None
        heads = torch.arange(self._w.kv_heads, device=rows.device)
        kept = (rows[:, None] * len(heads) + heads).flatten()
        self._own = [(k[kept], v[kept]) for k, v in self._own]
        self._layers = self._in_one_call()

    def step(self, token_N: Tensor) -> Tensor:
        """Append a token to every row. Returns: the next one's logits [N, V], which the step after may overwrite."""
        self._at.fill_(self._step)
        self._step += 1
        if token_N.device.type != "cuda":
            return self._forward(token_N)
        if self._graph is None:
            self._capture(token_N)
        self._token_N.copy_(token_N)
        self._graph.replay()
        return self._logits_NV

    def _capture(self, token_N: Tensor) -> None:
        """Record a step of so many rows."""
        self._token_N = token_N.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once before recording: kernels are compiled, libraries have their workspaces
            self._forward(self._token_N)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_NV = self._forward(self._token_N)

    def _forward(self, token_N: Tensor) -> Tensor:
        """Append token number `at`. Doing it twice is harmless."""
        w, self._turn_N = self._w, self._turns_T[self._position_N + self._at]
        if self._layers is None:
            return w.logits(w.hidden(token_N, self._attend))
        return w.logits(self._layers(w.embedded(token_N), self._turn_N, self._prompt_of_row_N, self._length_P, self._at))

    def _attend(self, i: int, qkv: Tensor) -> Tensor:
        if qkv.is_cuda:
            from meml_lib.rollouts import kernels as loops
        else:
            loops = cpu
        rows = self._prompt_of_row_N, self._length_P
        return loops.attend(qkv, self._turn_N, self._prompts[i], self._own[i], *rows, self._at)


# --- weights ----------------------------------------------------------------------------------------------------------


def _base(model: PreTrainedModel) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's wrapper


def _is_plain(module: nn.Module) -> bool:
    """A linear layer whose weight can be read as it stands: neither quantised, sharded nor another kind of adapter's."""
    base = getattr(module, "base_layer", module)  # peft's wrapper has one; DoRA and its like are variants
    special = base is not module and (module.disable_adapters or module.lora_variant or any(module.lora_bias.values()))
    return type(base) is nn.Linear and type(base.weight) is nn.Parameter and not special


def _merged(module: nn.Module) -> Tensor:
    weight = module.weight
    for adapter in getattr(module, "active_adapters", ()):
        if adapter in module.lora_A and adapter not in module.merged_adapters:
            weight = weight + module.get_delta_weight(adapter).to(weight.dtype)  # peft keeps adapters in float32
    return weight


def _qkv(attention: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _normed(x: Tensor, epsilon: float) -> Tensor:
    """RMSNorm, without its weight."""
    return F.rms_norm(x, x.shape[-1:], None, epsilon) if x.is_cuda else cpu.rms_norm(x, epsilon)


def _linear(
    *modules: nn.Module,
    order: Tensor | None = None,
    columns: Tensor | None = None,
    rows: Tensor | None = None,
    epsilon: float | None = None,
    act: nn.Module | None = None,
) -> Callable[..., Tensor]:
    """x -> the outputs of all modules, side by side, or in another order; or they are added to a second argument, in place.

    Args: columns, rows: what the inputs and, biases included, the outputs are multiplied by; float32, so that each weight
      is rounded once. epsilon: of the norm that x goes through first. act: of a gate, which the first module is to the second.
    """
    weights, biases = [_merged(module) for module in modules], [module.bias for module in modules]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    bias = None if biases[0] is None else torch.cat(biases)
    dtype, known = weight.dtype, act is None or type(act) is type(ACT2FN["silu"]) and cpu.gates(len(weight))
    if bias is not None and rows is not None:
        bias = (bias * rows).to(dtype)
    if bias is not None and order is not None:
        bias = bias[order]
    on_cpu = weight.device.type == "cpu"
    if on_cpu and known and dtype == torch.bfloat16 and cpu.multiplies(dtype):
        return cpu.TileProduct(weight, bias, epsilon, act is not None, columns, rows, order)
    if columns is not None:
        weight = weight * columns
    if rows is not None:
        weight = weight * rows[:, None]
    weight = weight.to(dtype)
    if order is not None:
        weight = weight[order]
    if products.slow(dtype, weight.device):
        dtype, weight, bias = torch.float32, weight.float(), None if bias is None else bias.float()
    if on_cpu and known and dtype == torch.float32 and weight.numel() < _PACK and cpu.multiplies(dtype):
        return cpu.Product(weight, bias, epsilon, gated=act is not None)
    product = _product(weight, bias)

    def linear(x: Tensor, into: Tensor | None = None) -> Tensor:
        y = product(x if epsilon is None else _normed(x, epsilon))
        if act is not None:
            gate, up = y.chunk(2, dim=-1)
            y = act(gate).mul_(up)
        return y if into is None else into.add_(y)

    return linear


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Of what has the dtype `Weights.dtype`."""
    dtype = weight.dtype
    if weight.device.type == "cuda" or dtype == torch.float32 and weight.numel() < _PACK:
        return lambda x: F.linear(x, weight, bias)
    if dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available():
        # F.linear lays such a matrix out for oneDNN at every product, in a third of its time.
        packed, product = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn._linear_pointwise
        return lambda x: product(x.to(dtype), packed, bias, "none", [], "").float()
    return lambda x: F.linear(x.to(dtype), weight, bias).float()
