"""The decode step's own loops against plain torch: in C, and Triton's on a GPU or, where Triton is installed alone, by its
interpreter (which needs a numpy before 2.4)."""

import math
import os
import re
import subprocess
from importlib.util import find_spec

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from meml_lib.rollouts import cpu, native

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["c", pytest.param("triton", marks=pytest.mark.skipif(not find_spec("triton"), reason="no Triton"))])
def loops(request):
    """The module, and the device that its tensors are on."""
    if request.param == "c":
        return cpu, "cpu"
    from meml_lib.rollouts import kernels

    return kernels, DEVICE


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 64), (9, 3, 64), (4, 4, 8), (12, 2, 80), (3, 1, 20), (2, 2, 6)])
@pytest.mark.parametrize("at", [0, 1, 64, 78])
def test_a_token_attends_to_its_prompt_its_answer_and_itself(loops, heads, kv_heads, size, at):
    module, device = loops
    torch.manual_seed(at)
    rows, longest, room, group = 5, 70, 79, heads // kv_heads
    qkv = torch.randn(rows, kv_heads, group + 2, size, device=device)
    turn_N = torch.polar(torch.ones(rows, size // 2), torch.randn(rows, size // 2)).to(device)
    prompt_k, prompt_v = torch.randn(2, 2 * kv_heads, longest, size, device=device)
    own_k, own_v = torch.randn(2, rows * kv_heads, room, size, device=device)
    prompt_of_row_N, length_P = torch.tensor([0, 1, 1, 0, 1], device=device), torch.tensor([70, 13], device=device)
    if module is cpu:
        later = torch.arange(room)[:, None] > at  # not written yet: whatever the memory held
        nothing = (x.masked_fill(later, torch.nan) for x in (own_k, own_v))
        prompt, own = cpu.prompts_cache(prompt_k, prompt_v), cpu.prompts_cache(*nothing)
        assert [x.shape for x in own] == [x.shape for x in cpu.answers_cache(rows * kv_heads, room, size, torch.float32)]
    else:
        prompt, own = (prompt_k, prompt_v), (own_k.clone(), own_v.clone())
    out = module.attend(qkv, turn_N, prompt, own, prompt_of_row_N, length_P, torch.tensor([at], device=device))
    turned = torch.view_as_real(torch.view_as_complex(qkv.unflatten(-1, (-1, 2))) * turn_N[:, None, None]).flatten(-2)
    q, k, v = turned[:, :, :-2], turned[:, :, -2], qkv[:, :, -1]
    for n, p in enumerate(prompt_of_row_N.tolist()):
        for h in range(heads):
            asked, mine = p * kv_heads + h // group, n * kv_heads + h // group
            keys = torch.cat([prompt_k[asked, : length_P[p]], own_k[mine, :at], k[n, h // group][None]])
            values = torch.cat([prompt_v[asked, : length_P[p]], own_v[mine, :at], v[n, h // group][None]])
            expected = (keys.double() @ q[n, h // group, h % group].double()).softmax(0) @ values.double()
            torch.testing.assert_close(out[n, h // group, h % group], expected.float(), atol=2e-5, rtol=2e-5)
    if module is cpu:
        own = own[0].mT.flatten(1, 2)[:, :room], own[1][:, :room, :size]
    torch.testing.assert_close(own[0].reshape(rows, kv_heads, room, size)[:, :, at], k)
    assert own[1].reshape(rows, kv_heads, room, size)[:, :, at].equal(v)
    for kept, was in zip(own, (own_k, own_v), strict=True):
        assert kept[:, :at].equal(was[:, :at])
        assert kept[:, at + 1 :].isnan().all() if module is cpu else kept[:, at + 1 :].equal(was[:, at + 1 :])


@pytest.mark.parametrize("at", [0, 20])
def test_keys_and_values_in_bfloat16_are_the_rounded_ones(at):
    torch.manual_seed(at)
    rows, heads, shared, size, room = 3, 2, 3, 20, 24
    qkv, turn_N = torch.randn(rows, heads, shared + 2, size), torch.polar(torch.ones(rows, size // 2), torch.randn(rows, size // 2))
    kept, before = torch.randn(2, 2 * heads, 21, size).bfloat16(), torch.randn(2, rows * heads, room, size).bfloat16()
    prompt, own, of_row, length = cpu.prompts_cache(*kept), cpu.prompts_cache(*before), [0, 1, 1], [21, 5]
    assert [(x.dtype, x.shape) for x in own] == [(x.dtype, x.shape) for x in cpu.answers_cache(6, room, size, torch.bfloat16)]
    out = cpu.attend(qkv, turn_N, prompt, own, torch.tensor(of_row), torch.tensor(length), torch.tensor([at]))
    turned = torch.view_as_real(torch.view_as_complex(qkv.unflatten(-1, (-1, 2))) * turn_N[:, None, None]).flatten(-2)
    k, v = own[0].mT.flatten(1, 2)[:, at], own[1][:, at, :size]
    exact = turned[:, :, -2].flatten(0, 1)
    assert ((k.float() - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all()  # half of a bfloat16's last place: cut, it may be a whole
    assert v.equal(qkv[:, :, -1].flatten(0, 1).bfloat16())
    for n, h in ((n, h) for n in range(rows) for h in range(heads)):
        asked, mine, far = of_row[n] * heads + h, n * heads + h, length[of_row[n]]
        keys, values = (torch.cat([kept[i, asked, :far], before[i, mine, :at], x[mine, None]]) for i, x in enumerate((k, v)))
        expected = (turned[n, h, :-2].double() @ keys.double().T).softmax(-1) @ values.double()
        torch.testing.assert_close(out[n, h], expected.float(), atol=2e-5, rtol=2e-5)


def test_queries_of_a_long_text_attend_as_many_do():
    torch.manual_seed(0)
    (heads, shared, size, longest), at = (2, 3, 8, 2**14), torch.tensor([1])
    qkv, turn_N = torch.randn(2, heads, shared + 2, size), torch.ones(2, size // 2, dtype=torch.complex64)
    kept, own = torch.randn(2, heads, longest, size), torch.randn(2, 2 * heads, 16, size)
    rest = torch.zeros(2, dtype=torch.long), torch.tensor([7]), at
    some, all_of_it = (cpu.prompts_cache(*(x[:, :n].contiguous() for x in kept)) for n in (7, longest))
    few, many = (cpu.attend(qkv, turn_N, prompt, cpu.prompts_cache(*own), *rest) for prompt in (some, all_of_it))
    torch.testing.assert_close(few, many)


def test_scores_far_apart_leave_the_largest_alone():
    torch.manual_seed(0)
    qkv = 100 * torch.randn(2, 2, 3, 16)
    turn_N, own = torch.ones(2, 8, dtype=torch.complex64), cpu.answers_cache(4, 8, 16, torch.float32)
    k, v = torch.randn(2, 2, 5, 16)
    prompt = cpu.prompts_cache(k, v)
    out = cpu.attend(qkv, turn_N, prompt, own, torch.zeros(2, dtype=torch.long), torch.tensor([5]), torch.zeros(1))
    for n, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        q, key, value = qkv[n, h]
        expected = (torch.cat([k[h], key[None]]) @ q).softmax(0) @ torch.cat([v[h], value[None]])
        torch.testing.assert_close(out[n, h, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("words", [61, 2048, 5000, 49152])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_a_draw_is_the_plain_one(loops, words, temperature):
    module, device = loops
    torch.manual_seed(0)
    logits_NV = 4 * torch.randn(48, words)
    logits_NV[3, ::2] = logits_NV[4, 5:] = -torch.inf
    logits_NV[5, : words // 2] = -torch.inf
    uniform_N = torch.rand(48, dtype=torch.float64)
    uniform_N[0] = uniform_N[5] = 0.0
    token_N, logp_N, entropy_N = module.choose(logits_NV.to(device), uniform_N.to(device), temperature)
    assert token_N.cpu().equal(native.draw((logits_NV / temperature).softmax(-1), uniform_N, top_p=None))
    exact_NV = logits_NV.double().log_softmax(-1)
    torch.testing.assert_close(logp_N.cpu().double(), exact_NV.gather(-1, token_N.cpu()[:, None])[:, 0], atol=2e-6, rtol=2e-6)
    entropy = -(exact_NV.exp() * exact_NV.clamp(min=-1e300)).sum(-1)
    torch.testing.assert_close(entropy_N.cpu().double(), entropy, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("words", [61, 5000])
def test_the_largest_number_draws_a_possible_word(loops, words):
    module, device = loops
    torch.manual_seed(0)
    logits_NV = 4 * torch.randn(64, words)
    logits_NV[:, words // 2 :] = -torch.inf
    almost_1 = torch.full((64,), 1 - 2**-53, dtype=torch.float64)
    token_N, logp_N, _ = module.choose(logits_NV.to(device), almost_1.to(device), 1.0)
    assert (token_N < words // 2).all() and logp_N.isfinite().all()


def test_without_a_temperature_the_likeliest_word_is_chosen():
    logits_NV = torch.randn(64, 500)
    logits_NV[0] = 0.0  # of equal ones the first
    token_N, logp_N, _ = cpu.choose(logits_NV, torch.rand(64, dtype=torch.float64), None)
    assert token_N.equal(logits_NV.argmax(-1)) and token_N[0] == 0
    torch.testing.assert_close(logp_N, logits_NV.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("shape", [(7, 96), (3, 5, 2, 6), (400, 576)])
def test_a_norm_is_torchs(shape):
    x = 3 * torch.randn(shape)
    expected = torch.nn.functional.rms_norm(x, shape[-1:], None, 1e-5)
    torch.testing.assert_close(cpu.rms_norm(x, 1e-5), expected)
    aside = torch.cat((x, x), -1)[..., : shape[-1]]  # does not adjoin
    assert cpu.rms_norm(aside, 1e-5).equal(cpu.rms_norm(x, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 6, 12, 13, 16, 17, 27, 45, 96])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 288), (33, 32), (8, 157), (20, 5)])
@pytest.mark.parametrize("epsilon", [None, 1e-5])
def test_a_product_is_torchs_normed_gated_or_added(rows, inputs, outputs, epsilon, dtype):
    if not cpu.multiplies(dtype):
        pytest.skip("the processor does not multiply bfloat16, or the compiler does not know how")
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    normed = x if epsilon is None else torch.nn.functional.rms_norm(x, (inputs,), None, epsilon)
    exact = (normed.to(dtype).double(), weight.double(), bias.double())
    expected, into = torch.nn.functional.linear(*exact).float(), torch.randn(rows, outputs)
    # A number may be rounded to bfloat16 upwards here and downwards there, 2^-9 of it apart.
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 1e-4}
    kind = cpu.Product if dtype == torch.float32 else cpu.TileProduct
    product = kind(weight, bias, epsilon, gated=False)
    torch.testing.assert_close(product(x), expected, **close)
    torch.testing.assert_close(product(x, into.clone()), into + expected, **close)
    torch.testing.assert_close(kind(weight, None, epsilon, gated=False)(x), expected - bias.float(), **close)
    if cpu.gates(outputs):
        gate, up = expected.chunk(2, dim=-1)
        gated = kind(weight, bias, epsilon, gated=True)(x)
        close["atol"] *= 1 if dtype == torch.float32 else 10  # what is multiplied has two errors, and the other's size
        torch.testing.assert_close(gated, torch.nn.functional.silu(gate) * up, **close)


@pytest.mark.parametrize("rows", [1, 16, 27, 45])
def test_a_product_is_the_same_with_amx_and_without(rows):
    if cpu.library().tiles < 2:
        pytest.skip("no AMX")
    x, product = torch.randn(rows, 70), cpu.TileProduct(torch.randn(90, 70).bfloat16(), None, 1e-5, gated=False)
    with_amx = product(x)
    try:
        assert cpu.library().way_of_tiles(1) == 1
        torch.testing.assert_close(product(x), with_amx, atol=1e-4, rtol=1e-4)
    finally:
        assert cpu.library().way_of_tiles(2) == 2


@pytest.mark.parametrize("given", [("columns",), ("rows",), ("order",), ("columns", "rows", "order")])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 64), (33, 157)])
def test_a_matrix_in_tiles_is_the_scaled_and_ordered_one(given, inputs, outputs):
    if not cpu.multiplies(torch.bfloat16):
        pytest.skip("the processor does not multiply bfloat16, or the compiler does not know how")
    weight, parts = torch.randn(outputs, inputs).bfloat16(), {"columns": torch.rand(inputs), "rows": torch.rand(outputs)}
    parts = {name: value for name, value in (parts | {"order": torch.randperm(outputs)}).items() if name in given}
    scaled = weight * parts.get("columns", torch.ones(inputs)) * parts.get("rows", torch.ones(outputs))[:, None]
    scaled = scaled.bfloat16()[parts.get("order", slice(None))]
    x, bias = torch.randn(3, inputs), torch.randn(outputs).bfloat16()
    for gated in (False, True)[: 1 + cpu.gates(outputs)]:
        assert cpu.TileProduct(weight, bias, None, gated, **parts)(x).equal(cpu.TileProduct(scaled, bias, None, gated)(x))
    with pytest.raises(ValueError, match=r"cpu.TileProduct: .* and \(5,\) do not match"):
        cpu.TileProduct(weight, bias, None, False, **{given[0]: torch.ones(5)})
    with pytest.raises(IndexError):
        cpu.TileProduct(weight, bias, None, False, order=torch.arange(outputs) + 1)


def layers_of(kind, kept, layers=3, rows=5):
    """Products and caches of a small model, with what `cpu.Layers` wants to know of heads, and a step's other arguments."""
    torch.manual_seed(0)
    heads, shared, size, hidden, inner, room, longest = 2, 3, 20, 48, 64, 24, 21
    weights = torch.bfloat16 if kind is cpu.TileProduct else torch.float32
    forms = [(heads * (shared + 2) * size, hidden, 1e-5, False), (hidden, heads * shared * size, None, False)]
    forms += [(2 * inner, hidden, 1e-5, True), (hidden, inner, None, False)]

    def product(outputs, inputs, epsilon, gated):
        weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs) / 9
        return kind(weight.to(weights), bias.to(weights), epsilon, gated)

    def caches(of):
        return [cpu.prompts_cache(*torch.randn(2, of * heads, length, size).to(kept)) for length in [longest if of == 2 else room] * layers]

    turn_N = torch.polar(torch.ones(rows, size // 2), torch.randn(rows, size // 2))
    rest = turn_N, torch.arange(rows) % 2, torch.tensor([longest, 5])
    return [[product(*form) for form in forms] for _ in range(layers)], caches(2), caches(rows), (heads, size), rest


KINDS = [(cpu.Product, torch.float32), (cpu.Product, torch.bfloat16), (cpu.TileProduct, torch.bfloat16)]


@pytest.mark.parametrize(("kind", "kept"), KINDS)
@pytest.mark.parametrize(("rows", "at"), [(5, 0), (5, 23), (17, 1), (40, 17)])
def test_all_layers_in_one_call_are_one_after_the_other(kind, kept, rows, at, monkeypatch):
    if kind is cpu.TileProduct and not cpu.multiplies(torch.bfloat16):
        pytest.skip("the processor does not multiply bfloat16, or the compiler does not know how")
    monkeypatch.setattr(cpu.TileProduct, "_narrow", torch.empty(0, dtype=torch.bfloat16))  # no room that others left
    products, prompts, own, (heads, size), rest = layers_of(kind, kept, rows=rows)
    start, at, steps = torch.randn(rows, 48), torch.tensor([at]), [*zip(products, prompts, [[x.clone() for x in own_] for own_ in own], strict=True)]
    x = start.clone()
    for (qkv, out, gated, down), prompt, mine in steps:
        mixed = cpu.attend(qkv(x).view(rows, heads, 5, size), rest[0], prompt, mine, *rest[1:], at)
        down(gated(out(mixed.view(rows, -1), x)), x)
    cpu.TileProduct._narrow = torch.empty(0, dtype=torch.bfloat16)
    whole = cpu.Layers(products, prompts, own, heads, size)
    given = start.clone()
    assert whole(given, *rest, at) is given and given.equal(x) and not given.equal(start)
    for mine, (_, _, theirs) in zip(own, steps, strict=True):
        assert all(kept.equal(other) for kept, other in zip(mine, theirs, strict=True))


def test_layers_that_do_not_fit_are_refused():
    products, prompts, own, (heads, size), rest = layers_of(cpu.Product, torch.float32)
    others, _, few, _, _ = layers_of(cpu.Product, torch.float32, rows=4)
    half = layers_of(cpu.Product, torch.bfloat16)[2]
    turned = [products[0], products[1][::-1], products[2]]
    wider = [*products[:2], [cpu.Product(torch.randn(192, 48), None, 1e-5, False), *products[2][1:]]]
    strange = [*products[:2], [*products[2][:3], cpu.Product(torch.randn(48, 64), None, 1e-5, False)]]
    for refused in (turned, wider, strange, [others[0], [*others[1][:3], torch.nn.Linear(64, 48)], others[2]]):
        with pytest.raises(ValueError, match=r"cpu.Layers: .* do not match"):
            cpu.Layers(refused, prompts, own, heads, size)
    for kept in ([*own[:2], few[2]], [*own[:2], (own[2][0], own[2][0])]):
        with pytest.raises(ValueError, match="cpu.Layers: .* do not match"):
            cpu.Layers(products, prompts, kept, heads, size)
    for kept in ([*own[:2], half[2]], [*own[:2], (own[2][0], own[2][1].mT.contiguous().mT)]):
        with pytest.raises(TypeError, match="cpu.Layers: a torch.* tensor"):
            cpu.Layers(products, prompts, kept, heads, size)
    with pytest.raises(TypeError, match="cpu.Layers: a torch.float64 tensor"):
        cpu.Layers(products, *([(k.double(), v.double()) for k, v in caches] for caches in (prompts, own)), heads, size)
    whole, at = cpu.Layers(products, prompts, own, heads, size), torch.tensor([3])
    for x, turn_N, of_row, length in ((4, 5, 5, 2), (5, 4, 5, 2), (5, 5, 4, 2), (5, 5, 5, 1)):
        with pytest.raises(ValueError, match="cpu.Layers: .* do not match"):
            whole(torch.randn(x, 48), rest[0][:turn_N], rest[1][:of_row], rest[2][:length], at)
    for x, turn_N in ((torch.randn(5, 47), rest[0]), (torch.randn(5, 48), rest[0][:, 1:])):
        with pytest.raises(ValueError, match="cpu.Layers: .* do not match"):
            whole(x, turn_N, *rest[1:], at)
    narrower = [(k[:, :, 2:].contiguous(), v) for k, v in prompts]
    with pytest.raises(ValueError, match="cpu.Layers: .* do not match"):
        cpu.Layers(products, narrower, own, heads, size)
    with pytest.raises(TypeError, match="cpu.decode: a torch.bfloat16 tensor"):
        whole(torch.randn(5, 48).bfloat16(), *rest, at)
    room = own[0][1].shape[-2]
    with pytest.raises(IndexError, match=f"token {room} of an answer with room for {room}"):
        whole(torch.randn(5, 48), *rest, torch.tensor([room]))


def test_a_processor_that_multiplies_bfloat16_does_so():
    compiler = (os.environ.get("CC") or "cc").split()
    known = subprocess.run([*compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True)
    if not re.search("__(AMX_BF16|AVX512BF16)__", known.stdout):
        pytest.skip("the processor does not multiply bfloat16, or the compiler does not know how")
    assert cpu.multiplies(torch.bfloat16)  # else a compiler's error hid, and slower settings were taken


def plain_and_compiled(plain, compiled, *inputs):
    """Both results and both gradients of the inputs, the compiled ones as one list."""
    inputs = [x.requires_grad_() for x in inputs]
    out = plain(*inputs)
    grad = torch.randn_like(out)
    return [out, *torch.autograd.grad(out, inputs, grad)], compiled(grad, *(x.detach() for x in inputs))


CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 0.02, "rtol": 0.02}}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (5000,), (3, 4097), (2, 2, 2**15 + 1)])
def test_a_sum_of_squares_is_that_of_float64(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert cpu.square_sum(x) == pytest.approx(x.double().square().sum().item(), rel=1e-5)
    assert cpu.square_sum(x.mT if x.ndim > 1 else x) == pytest.approx(cpu.square_sum(x), rel=1e-5)
    assert math.isnan(cpu.square_sum(torch.cat([x.flatten(), torch.tensor([torch.nan], dtype=dtype)])))


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(1, 576), (3, 7, 20), (1, 700, 96)])
def test_an_updates_norm_and_its_gradients_are_torchs(dtype, shape):
    def plain(x, weight):
        return torch.nn.functional.rms_norm(x, shape[-1:], None, 1e-5) * weight

    def compiled(grad, x, weight):
        y, scale = cpu.norm(x, weight, 1e-5)
        return y, *cpu.norm_back(grad, x, weight, scale)

    x, weight = 3 * torch.randn(shape), torch.rand(shape[-1]) + 0.5
    wanted, found = plain_and_compiled(plain, compiled, x.to(dtype), weight.to(dtype))
    for want, got in zip(wanted, found, strict=True):
        assert got.dtype == dtype and (got - want).norm() < CLOSE[dtype]["rtol"] * want.norm()
    aside = torch.cat((x, x), -1)[..., : shape[-1]].to(dtype)  # does not adjoin
    assert cpu.norm(aside, weight.to(dtype), 1e-5)[0].equal(found[0])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(1, 5, 3, 8), (2, 37, 2, 20), (1, 700, 9, 64)])
def test_a_rotation_and_its_gradient_are_transformers(dtype, shape):
    def plain(x):
        return apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]

    angle = torch.randn(*shape[:2], shape[-1] // 2).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    x = torch.randn(shape).to(dtype)
    wanted, found = plain_and_compiled(plain, lambda grad, x: [cpu.rotate(x, cos, sin), cpu.rotate(grad, cos, sin, back=True)], x)
    for want, got in zip(wanted, found, strict=True):
        torch.testing.assert_close(got, want, **({"rtol": 0, "atol": 0} if dtype == torch.bfloat16 else CLOSE[dtype]))


ADAMW = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(5,), (3, 4097), (300, 41)])
def test_a_step_of_adamw_is_torchs(dtype, shape):
    draw = torch.Generator().manual_seed(0)
    master = torch.nn.Parameter(torch.randn(shape, generator=draw))
    own, moments = master.detach().clone(), [torch.zeros(shape), torch.zeros(shape)]
    weight, optimizer = own.to(dtype), torch.optim.AdamW([master], fused=True, **ADAMW)
    for step in (1, 2, 3, 4):
        grad = (10.0 ** (step - 3) * torch.randn(shape, generator=draw)).to(dtype)
        master.grad = grad.float() * 0.3
        optimizer.step()
        cpu.adamw(weight, grad, own, *moments, step=step, share=0.3, **ADAMW)
        torch.testing.assert_close(own, master.detach(), rtol=1e-6, atol=1e-7)
        assert weight.equal(own.to(dtype))
    for found, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        torch.testing.assert_close(found, optimizer.state[master][name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(1, 5), (2, 37, 48), (1, 700, 96)])
def test_a_gate_and_its_gradients_are_torchs(dtype, shape):
    def plain(gate, up):
        return torch.nn.functional.silu(gate) * up

    def compiled(grad, gate, up):
        return cpu.gate(gate, up), *cpu.gate_back(grad, gate, up)

    gate, up = 20 * torch.randn(shape), torch.randn(shape)
    gate.flatten()[:3] = torch.tensor([-200.0, 0.0, 200.0])
    for want, got in zip(*plain_and_compiled(plain, compiled, gate.to(dtype), up.to(dtype)), strict=True):
        torch.testing.assert_close(got, want, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("rows", "words"), [(1, 61), (33, 157), (9, 49152)])
def test_a_tokens_score_and_its_gradient_are_torchs(dtype, rows, words):
    logits_NV, token_N = (4 * torch.randn(rows, words)).to(dtype), torch.randint(words, (rows,))
    logits_NV[0, ::2] = -torch.inf
    token_N[0] = 1
    exact_NV = logits_NV.double().requires_grad_()
    logp_N = exact_NV.log_softmax(-1).gather(-1, token_N[:, None])[:, 0]
    grad_N = torch.randn(rows)
    [expected] = torch.autograd.grad(logp_N, exact_NV, grad_N.double())
    lse_N, told_N = cpu.score(logits_NV, token_N)
    torch.testing.assert_close(lse_N.double(), exact_NV.logsumexp(-1), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(told_N.double(), logp_N, atol=2e-6, rtol=2e-6)
    cpu.score_back(logits_NV, token_N, lse_N, grad_N)
    torch.testing.assert_close(logits_NV, expected.to(dtype), atol=1e-6, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_has_no_gradient_either(bad):
    logits_NV, token_N = torch.randn(2, 9), torch.tensor([3, 4])
    logits_NV[0, 5] = bad
    lse_N, logp_N = cpu.score(logits_NV, token_N)
    cpu.score_back(logits_NV, token_N, lse_N, torch.ones(2))
    assert logp_N.isfinite().tolist() == [False, True] and logits_NV.isfinite().all(-1).tolist() == [False, True]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that has compiled nothing yet. Returns: where the compiled loops are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.library.cache_clear()
    yield tmp_path / "meml_lib"
    cpu.library.cache_clear()


def test_the_loops_are_compiled_once(machine, monkeypatch):
    assert cpu.library() is not None
    [kept] = machine.iterdir()
    monkeypatch.setenv("CC", "/no/compiler")
    cpu.library.cache_clear()
    assert cpu.library() is not None and [*machine.iterdir()] == [kept]


@pytest.mark.parametrize("refused", ["-mprefer*", "-fopenmp", "-fopenmp|-march=native", "-fopenmp*|-march=native"])
def test_a_compiler_that_knows_less_will_do(machine, monkeypatch, tmp_path, refused):
    compiler = tmp_path / "cc"
    refuse = f'for given; do case "$given" in {refused}) echo no such thing >&2; exit 1;; esac; done'
    compiler.write_text(f'#!/bin/sh\n{refuse}\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    x, weight = torch.randn(5, 40), torch.randn(24, 40)
    expected = torch.nn.functional.linear(torch.nn.functional.rms_norm(x, (40,), None, 1e-5), weight)
    torch.testing.assert_close(cpu.Product(weight, None, 1e-5, gated=False)(x), expected, atol=1e-4, rtol=1e-5)


def test_loops_that_cannot_be_kept_are_compiled_anew(machine, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert cpu.library() is not None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cpu.os.path, "expanduser", lambda path: path)  # a user without a home
    cpu.library.cache_clear()
    assert cpu.library() is not None and not machine.exists()


def test_what_c_could_not_read_is_refused():
    logits_NV, uniform_N = torch.randn(4, 9), torch.rand(4, 2, dtype=torch.float64)[:, 1]
    told = cpu.choose(logits_NV, uniform_N, 1.0)[0]
    assert told.equal(native.draw(logits_NV.softmax(-1), uniform_N.contiguous(), top_p=None))
    assert told.equal(cpu.choose(logits_NV.double().T.contiguous().T, uniform_N, 1.0)[0])
    product = cpu.Product(torch.randn(32, 8), None, None, gated=False)
    for x in (torch.randn(3, 8).bfloat16(), torch.randn(3, 8).double()):
        with pytest.raises(TypeError, match=rf"cpu.product: a {x.dtype} tensor .* for torch.float32"):
            product(x)
    with pytest.raises(TypeError, match="strides"):
        product(torch.randn(3, 8), into=torch.randn(32, 3).T)
    for norm in (torch.ones(8).bfloat16(), torch.ones(8).double()):
        with pytest.raises(TypeError, match=rf"cpu.norm: a {norm.dtype} tensor .* for torch.float32"):
            cpu.norm(torch.randn(3, 8), norm, 1e-5)
    wide, narrow = torch.randn(3, 80), torch.randn(3, 8)
    for name, call in {
        "product": lambda: product(wide),
        "norm": lambda: cpu.norm(wide, torch.ones(8), 1e-5),
        "norm_back": lambda: cpu.norm_back(narrow, wide, torch.ones(80), torch.ones(3, 1)),
        "gate": lambda: cpu.gate(wide, narrow),
        "gate_back": lambda: cpu.gate_back(narrow, wide, wide),
        "score_back": lambda: cpu.score_back(narrow, torch.arange(3), torch.zeros(3), torch.zeros(2)),
        "rotate": lambda: cpu.rotate(torch.ones(3, 2, 9), narrow, narrow),
        "adamw": lambda: cpu.adamw(wide, wide, wide, wide, narrow, step=1, share=1.0, **ADAMW),
    }.items():
        with pytest.raises(ValueError, match=rf"cpu.{name}: .* and .* do not match"):
            call()
    for token in (8, -1, 10**6):
        with pytest.raises(IndexError, match=rf"{token}.* not all in \[0, 8\)"):
            cpu.score(narrow, torch.tensor([0, token, 1]))
    own, prompt = cpu.answers_cache(1, 16, 8, torch.float32), cpu.prompts_cache(*torch.randn(2, 1, 5, 8))
    of = torch.ones(1, 4, dtype=torch.complex64), prompt, own, torch.zeros(1, dtype=torch.long), torch.tensor([5])
    with pytest.raises(IndexError, match="token 16 of an answer with room for 16"):
        cpu.attend(torch.randn(1, 1, 3, 8), *of, torch.tensor([16]))


def test_without_a_compiler_transformers_answers_and_says_why(machine, monkeypatch, policy):
    def answers():
        uniform_NT = torch.rand(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
        limits = {"max_answer_tokens": 12, "rows_per_batch": 9, "temperature": 1.0, "end_ids": policy.end_ids}
        return native.sample(policy.model, [(3, 4, 5), (6, 7)], uniform_NT=uniform_NT, **limits)

    policy.model.eval()
    compiled = answers()
    monkeypatch.setenv("CC", "/no/compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine / "elsewhere"))
    cpu.library.cache_clear()
    with pytest.warns(UserWarning, match="/no/compiler"):
        plain = answers()
    assert [rollout.tokens for rollout in plain] == [rollout.tokens for rollout in compiled]
