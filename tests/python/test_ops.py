"""The registered operators against plain PyTorch, torch's own checks of operators, and an
independent Philox in numpy."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import ntkcl
from ntkcl.ops import (
    attention,
    bias_relu_dropout,
    composed_linear,
    gelu,
    philox_keep_mask,
    residual_layer_norm,
    section_cosine,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Tolerances against a float64 reference of the same inputs.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3}
P = 0.3


def random(*shape, dtype=torch.float32, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_(requires_grad)


def assert_close(actual, reference, dtype, scale=0.0):
    """Relative to the largest value of the reference, or to `scale` where sums cancel."""
    assert actual.dtype == dtype
    assert actual.shape == reference.shape
    scale = max(scale, reference.detach().abs().max().item() if reference.numel() else 0.0)
    torch.testing.assert_close(
        actual.double(), reference.double(), rtol=0, atol=TOLERANCE[dtype] * scale
    )


def over_threads(run):
    """What run() gives with one thread and with three."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run())
        return results
    finally:
        torch.set_num_threads(threads)


def with_gradient(function, x):
    y = function(x)
    return y, *torch.autograd.grad(y.square().sum(), (x,))


# --- plain PyTorch references -------------------------------------------------------------------


def reference_bias_relu_dropout(x, bias, keep, p):
    y = F.relu(x + bias)
    return y if keep is None else y * keep.to(y.dtype) / (1 - p)


def reference_attention(qkv, heads, gate=None, prompts=0):
    query, key, value = (
        part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2)
    )
    is_prompt = torch.zeros(qkv.shape[1], dtype=torch.bool)
    is_prompt[1 : 1 + prompts] = True
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    mixed = scores[..., ~is_prompt].softmax(-1) @ value[:, :, ~is_prompt]
    if gate is not None:
        apart = scores[..., is_prompt].softmax(-1) @ value[:, :, is_prompt]
        mixed = mixed + gate[:, None, None] * apart
    return mixed.transpose(1, 2).flatten(2)


def reference_composed_weight(a):
    """(g, in, out) of the arguments by name, each A_i B_i formed."""
    weight = a["weight"].transpose(1, 2)
    weight = weight + torch.tensor(a["scale"])[:, None, None] * (a["down"] @ a["up"])
    if a["omega"] is not None:
        modules = a["omega"].shape[1]
        for i in range(modules):
            down = a["old_down"].chunk(modules, dim=2)[i]
            up = a["old_up"].chunk(modules, dim=1)[i]
            factor = torch.tensor(a["omega_scale"]) * a["omega"][:, i]
            weight = weight + factor[:, None, None] * (down @ up)
    return weight


def reference_composed_linear(a):
    weight = reference_composed_weight(a)
    y = torch.cat([a["x"] @ w for w in weight], dim=-1)
    return y if a["bias"] is None else y + a["bias"]


def reference_section_cosine(x, prototypes, weights):
    scores = 0
    parts = zip(
        x.chunk(len(weights), dim=1), prototypes.chunk(len(weights), dim=1), weights, strict=True
    )
    for x_section, prototype_section, weight in parts:
        scores = scores + weight * F.normalize(x_section) @ F.normalize(prototype_section).t()
    return scores


def numpy_keep_mask(key, n, p):
    """Philox4x32-10 of Salmon et al. (SC 2011), written for this test."""
    counter = np.arange((n + 3) // 4, dtype=np.uint64)
    low32 = np.uint64(0xFFFFFFFF)
    x = [counter & low32, counter >> np.uint64(32), counter * np.uint64(0), counter * np.uint64(0)]
    key %= 2**64
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        product0 = x[0] * np.uint64(0xD2511F53)
        product1 = x[2] * np.uint64(0xCD9E8D57)
        x = [
            (product1 >> np.uint64(32)) ^ x[1] ^ np.uint64(k[0]),
            product1 & low32,
            (product0 >> np.uint64(32)) ^ x[3] ^ np.uint64(k[1]),
            product0 & low32,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    uniform = (np.stack(x, axis=1).reshape(-1)[:n] >> np.uint64(8)).astype(np.float64) / 2**24
    return (uniform >= p).astype(np.uint8)


# --- random bits --------------------------------------------------------------------------------


def test_numpy_philox_gives_the_published_values():
    # Random123's known answers for counter 0, key 0 (kat_vectors, philox4x32 10): guards the
    # reference that the other tests trust. Thresholds are put right at each word's top 24 bits.
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for word in words:
        at = (word >> 8) / 2**24
        just_above = ((word >> 8) + 1) / 2**24
        assert numpy_keep_mask(0, 4, at)[words.index(word)] == 1
        assert numpy_keep_mask(0, 4, just_above)[words.index(word)] == 0


@pytest.mark.parametrize("key", [0, 1, -1, 0x0123456789ABCDEF, -(2**63)])
@pytest.mark.parametrize("n", [1, 3, 4, 255, 256, 257, 100_003])
def test_keep_mask_is_philox(key, n):
    # The vectorised rounds, whole and partial blocks, all 64 bits of the key.
    mask = philox_keep_mask(torch.tensor(key), [n], P)
    np.testing.assert_array_equal(mask.numpy(), numpy_keep_mask(key, n, P))


def test_keep_mask_at_the_edges_of_p():
    key = torch.tensor(5)
    assert philox_keep_mask(key, [1000], 0.0).all()
    assert not philox_keep_mask(key, [1000], 1 - 2.0**-30).any()  # above the largest draw
    # p between two 24-bit draws: the smaller one is dropped, the larger one kept.
    word = 0x6627E8D5 >> 8
    zero = torch.tensor(0)
    assert philox_keep_mask(zero, [1], (word - 0.5) / 2**24).item() == 1
    assert philox_keep_mask(zero, [1], (word + 0.5) / 2**24).item() == 0


def test_keep_mask_shapes():
    key = torch.tensor([9])
    flat = philox_keep_mask(key, [2 * 3 * 5], P)
    assert flat.dtype == torch.uint8
    torch.testing.assert_close(philox_keep_mask(key, (2, 3, 5), P), flat.reshape(2, 3, 5))
    assert philox_keep_mask(key, [], P).shape == ()
    assert philox_keep_mask(key, [0, 4], P).shape == (0, 4)


def test_keep_mask_does_not_depend_on_threads():
    key = torch.tensor(3)
    threads = torch.get_num_threads()
    masks = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            masks.append(philox_keep_mask(key, [200_001], 0.5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*masks)


# --- attention ----------------------------------------------------------------------------------

# B, T, H, d, P
ATTENTIONS = [(1, 1, 1, 1, 0), (2, 5, 3, 4, 0), (3, 40, 2, 64, 0), (2, 7, 2, 8, 3), (2, 2, 1, 4, 1)]
ATTENTIONS += [(2, 207, 3, 64, 10)]
# Of widths that processors with tiles multiply by them: at their edges, with most tokens prompts.
ATTENTIONS += [(1, 1, 1, 32, 0), (2, 16, 3, 32, 0), (1, 33, 2, 96, 31), (2, 32, 2, 128, 1)]
# And of others, and too long for tiles.
ATTENTIONS += [(2, 207, 3, 48, 10), (1, 65, 1, 8, 0), (1, 1025, 1, 32, 2)]


def attention_inputs(size, dtype=torch.float32):
    batch, tokens, heads, width, prompts = size
    qkv = random(batch, tokens, 3 * heads * width, dtype=dtype)
    gate = random(heads, dtype=dtype, seed=1) if prompts else None
    return qkv, gate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ATTENTIONS)
def test_attention_equals_pytorch(dtype, size):
    batch, tokens, heads, width, prompts = size
    qkv, gate = attention_inputs(size, dtype)
    grad = random(batch, tokens, heads * width, dtype=dtype, seed=2)
    outcomes = []
    for cast in (dtype, torch.float64):
        leaves = [t.detach().to(cast).requires_grad_() for t in (qkv, gate) if t is not None]
        function = attention if cast == dtype and not outcomes else reference_attention
        out = function(leaves[0], heads, *leaves[1:], **({"prompts": prompts} if prompts else {}))
        out.backward(grad.to(cast))
        outcomes.append([out.detach(), *(t.grad for t in leaves)])
    (out, *gradients), (expected, *references) = outcomes
    assert_close(out, expected, dtype, scale=2 * expected.abs().max().item())
    for ours, theirs in zip(gradients, references, strict=True):
        assert_close(ours, theirs, dtype, scale=2 * max(1.0, theirs.abs().max().item()))


def test_attention_equals_torchs_fused_kernel():
    # An independent implementation, on the tokens of a real vision transformer.
    qkv = random(4, 197, 3 * 192)
    query, key, value = (t.unflatten(2, (3, 64)).transpose(1, 2) for t in qkv.chunk(3, dim=2))
    fused = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(qkv, 3), fused, rtol=0, atol=2e-6)


def test_attention_behind_a_closed_gate_does_not_see_prompts():
    qkv = random(2, 9, 3 * 8)
    others = torch.cat([qkv[:, :1], qkv[:, 4:]], 1)
    out = attention(qkv, 2, torch.zeros(2), 3)
    torch.testing.assert_close(torch.cat([out[:, :1], out[:, 4:]], 1), attention(others, 2))


def test_attention_weights_are_softmaxes():
    # They sum to 1, far beyond where exp overflows; of scores 200 apart one has it all, exactly.
    qkv = 30 * random(2, 33, 3 * 16)
    qkv[..., 32:] = 1.0  # all values
    torch.testing.assert_close(attention(qkv, 2), torch.ones(2, 33, 16))
    torch.testing.assert_close(attention(qkv, 2, torch.ones(2), 4), 2 * torch.ones(2, 33, 16))
    one = torch.tensor([[[1.0, 0.0, 3.0], [0.0, -200.0, 5.0]]])
    assert torch.equal(attention(one, 1), torch.tensor([[[3.0], [4.0]]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_attention_lets_nan_through(bad, dtype):
    # A diverged run must not look healthy.
    qkv = random(1, 40, 3 * 32, dtype=dtype)
    qkv[0, 3, 32] = bad  # one key: every query of its head meets it
    out = attention(qkv, 1)
    assert out.isnan().all() if bad != bad else out.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 64])
def test_attention_of_scores_beyond_all_rounding(tokens, dtype):
    # A product of so large a score has an absolute error in which an exponent is lost.
    qkv = torch.full((1, tokens, 3 * 32), 29952.0, dtype=dtype)
    torch.testing.assert_close(attention(qkv, 1), qkv[..., :32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [16, 17])
def test_attention_backward_of_a_key_without_weight(tokens, dtype):
    # Minus infinity takes one key out; the gradients of the others are numbers.
    qkv = random(1, tokens, 3 * 32, dtype=dtype)
    qkv[..., :32] = qkv[..., :32].abs() + 1
    qkv[0, 5, 32] = -float("inf")
    grad = random(1, tokens, 32, dtype=dtype, seed=1)
    dqkv, _ = torch.ops.ntkcl.attention_backward(grad, qkv, 1, None, 0)
    assert attention(qkv, 1).isfinite().all()
    assert dqkv[..., 32:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_reads_only_its_head(dtype):
    # Another image's or head's NaN, also in the memory that is used again, reaches nothing.
    qkv = random(3, 37, 3 * 2 * 32, dtype=dtype)
    gate = random(2, dtype=dtype, seed=1)
    grad = random(3, 37, 2 * 32, dtype=dtype, seed=2)
    bad, bad_grad = qkv.clone(), grad.clone()
    bad.view(3, 37, 3, 2, 32)[1:, :, :, 0] = float("nan")
    bad_grad.view(3, 37, 2, 32)[1:, :, 0] = float("nan")
    results = []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # one memory for all heads
        for x, dout in ((bad, bad_grad), (qkv, grad)):
            out = attention(x, 2, gate, 4)
            dqkv, dgate = torch.ops.ntkcl.attention_backward(dout, x, 2, gate, 4)
            results.append((out.view(3, 37, 2, 32), dqkv.view(3, 37, 3, 2, 32), dgate))
    finally:
        torch.set_num_threads(threads)
    assert all(result.isnan().any() for result in results[0])
    for with_bad, without in zip(*(result[:2] for result in results), strict=True):
        assert torch.equal(with_bad[0], without[0])
        assert torch.equal(with_bad[..., 1, :], without[..., 1, :])
    assert torch.equal(results[0][2][1], results[1][2][1])


def test_attention_non_contiguous():
    qkv, gate = random(24, 6, 2).permute(2, 1, 0), random(4)[::2]
    out = attention(qkv, 2, gate, 2)
    assert torch.equal(out, attention(qkv.contiguous(), 2, gate.contiguous(), 2))
    # An expanded gradient, as sum() makes it.
    qkv = qkv.detach().requires_grad_()
    attention(qkv, 2).sum().backward()
    reference = qkv.detach().clone().requires_grad_()
    reference_attention(reference, 2).sum().backward()
    torch.testing.assert_close(qkv.grad, reference.grad)


@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12)])
def test_attention_zero_size(shape):
    qkv = torch.zeros(shape, requires_grad=True)
    out = attention(qkv, 2)
    assert out.shape == (*shape[:2], 4)
    out.sum().backward()
    assert qkv.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_depend_on_threads(dtype):
    qkv = random(3, 70, 3 * 64, dtype=dtype, requires_grad=True)
    gate = random(2, dtype=dtype, seed=1, requires_grad=True)

    def run():
        out = attention(qkv, 2, gate, 5)
        return out, *torch.autograd.grad(out.square().sum(), (qkv, gate))

    for first, second in zip(*over_threads(run), strict=True):
        assert torch.equal(first, second)


def test_attention_gradcheck():
    qkv = random(2, 5, 12, dtype=torch.float64, requires_grad=True)
    gate = random(2, dtype=torch.float64, seed=1, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x, 2), (qkv,))
    assert torch.autograd.gradcheck(lambda x, g: attention(x, 2, g, 2), (qkv, gate))


@pytest.mark.parametrize("size", ATTENTIONS)
def test_attention_of_torchs_operators_equals_ours(size):
    # What runs on CUDA is made of torch's operators: here they run on the CPU.
    qkv, gate = attention_inputs(size, torch.float64)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    arguments = (qkv, size[2], gate, size[4])
    out = torch.ops.ntkcl.attention(*arguments)
    grad = random(*out.shape, dtype=torch.float64, seed=3)
    ours = [out, *torch.ops.ntkcl.attention_backward(grad, *arguments)]
    theirs = [
        torch.ops.ntkcl.attention.default.redispatch(key, *arguments),
        *torch.ops.ntkcl.attention_backward.default.redispatch(key, grad, *arguments),
    ]
    for first, second in zip(ours, theirs, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-13)


def test_attention_errors():
    qkv, gate = torch.zeros(2, 5, 12), torch.zeros(2)
    where = r"^\[attention\] expected "
    with pytest.raises(ValueError, match=where + r"qkv of shape \(B, T, 3\*C\).*got \[5, 12\]"):
        attention(qkv[0], 2)
    with pytest.raises(ValueError, match=where + "qkv of shape .* a multiple of 3 heads"):
        attention(qkv, 3)
    with pytest.raises(ValueError, match=where + "at least 1 head, got 0"):
        attention(qkv, 0)
    with pytest.raises(ValueError, match=where + r"gate of shape \[2\], got \[3\]"):
        attention(qkv, 2, torch.zeros(3), 1)
    for prompts in (0, 5, -1):
        with pytest.raises(ValueError, match=where + "1 to 4 prompts beside a class token, got"):
            attention(qkv, 2, gate, prompts)
    with pytest.raises(ValueError, match=where + "a gate, as there are 2 prompts"):
        attention(qkv, 2, prompts=2)
    with pytest.raises(TypeError, match=where + "gate of qkv's type Float, got Double"):
        attention(qkv, 2, gate.double(), 1)
    with pytest.raises(TypeError, match=where + "qkv of float32, float64 or bfloat16, got Half"):
        attention(qkv.half(), 2)


# --- bias_relu_dropout --------------------------------------------------------------------------

SHAPES = [(1,), (16,), (7, 3), (5, 16), (2, 197, 16), (3, 300), (2, 2, 1031), (40, 64, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout", ["none", "mask", "key"])
def test_bias_relu_dropout_equals_pytorch(dtype, shape, dropout):
    x = random(*shape, dtype=dtype, requires_grad=True)
    bias = random(shape[-1], dtype=dtype, seed=1, requires_grad=True)
    key = torch.tensor(77)
    keep = None if dropout == "none" else philox_keep_mask(key, shape, P)
    if dropout == "mask":
        y = bias_relu_dropout(x, bias, P, mask=keep)
    else:
        y = bias_relu_dropout(x, bias, P, key=key if dropout == "key" else None)
    x64, bias64 = (t.detach().double().requires_grad_() for t in (x, bias))
    expected = reference_bias_relu_dropout(x64, bias64, keep, P)
    assert_close(y, expected, dtype)

    grad = random(*shape, dtype=dtype, seed=2)
    y.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, x64.grad, dtype)
    assert_close(bias.grad, bias64.grad, dtype)


GROUPED = [(1, 4, 8), (3, 5, 16), (2, 197, 64), (4, 3, 300), (3, 1000, 7), (2, 2, 3, 1031), (5, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GROUPED)
@pytest.mark.parametrize("dropout", ["none", "mask", "key"])
def test_bias_relu_dropout_of_groups(dtype, shape, dropout):
    x = random(*shape, dtype=dtype, requires_grad=True)
    bias = random(shape[0], shape[-1], dtype=dtype, seed=1, requires_grad=True)
    key = torch.tensor(77)
    keep = None if dropout == "none" else philox_keep_mask(key, shape, P)
    given = {"mask": {"mask": keep}, "key": {"key": key}, "none": {}}[dropout]
    y = bias_relu_dropout(x, bias, P, **given)
    x64, bias64 = (t.detach().double().requires_grad_() for t in (x, bias))
    of_row = bias64.view(shape[0], *[1] * (len(shape) - 2), shape[-1])
    expected = reference_bias_relu_dropout(x64, of_row, keep, P)
    assert_close(y, expected, dtype)

    grad = random(*shape, dtype=dtype, seed=2)
    y.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, x64.grad, dtype)
    assert bias.grad.shape == bias.shape
    assert_close(bias.grad, bias64.grad, dtype)


def test_bias_relu_dropout_non_contiguous():
    # Element numbers are those of the contiguous copy.
    x = random(6, 5, 4).permute(2, 0, 1)
    bias = random(10, seed=1)[::2]
    key = torch.tensor(1)
    y = bias_relu_dropout(x, bias, P, key=key)
    assert y.is_contiguous()
    assert torch.equal(y, bias_relu_dropout(x.contiguous(), bias.contiguous(), P, key=key))
    mask = philox_keep_mask(key, (6, 5, 4), P).permute(2, 0, 1)
    assert_close(
        bias_relu_dropout(x, bias, P, mask=mask),
        reference_bias_relu_dropout(x.double(), bias.double(), mask, P),
        torch.float32,
    )
    # An expanded gradient, as sum() makes it.
    x = x.detach().requires_grad_()
    bias_relu_dropout(x, bias, P, mask=mask).sum().backward()
    kept = ((x + bias > 0) & mask.bool()).float() / (1 - P)
    torch.testing.assert_close(x.grad, kept)


def test_bias_relu_dropout_unaligned_view():
    # Contiguous, but not at the start of its storage: vector loads must not assume alignment.
    storage = random(1 + 8 * 16)
    x = storage[1:].reshape(8, 16)
    bias = random(17, seed=1)[1:]
    y = bias_relu_dropout(x, bias, P, key=torch.tensor(2))
    assert torch.equal(y, bias_relu_dropout(x.clone(), bias.clone(), P, key=torch.tensor(2)))


@pytest.mark.parametrize("shape", [(0,), (0, 16), (4, 0), (2, 0, 3)])
def test_bias_relu_dropout_zero_size(shape):
    x = torch.zeros(shape, requires_grad=True)
    bias = torch.zeros(shape[-1], requires_grad=True)
    y = bias_relu_dropout(x, bias, P, key=torch.tensor(1))
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(bias.grad, torch.zeros(shape[-1]))


def test_bias_relu_dropout_lets_nan_through():
    # A diverged run must not look healthy.
    x = torch.tensor([[float("nan"), 1.0]], requires_grad=True)
    y = bias_relu_dropout(x, torch.zeros(2))
    assert y[0, 0].isnan()
    y.backward(torch.tensor([[2.0, 3.0]]))
    assert torch.equal(x.grad, torch.tensor([[2.0, 3.0]]))


def test_bfloat16_rounds_to_nearest_even():
    # Every bfloat16 survives a round trip; sums are rounded once, from float32, as torch does.
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    values = bits[bits.isfinite() & (bits > 0)]
    zero = torch.zeros_like(values)
    assert torch.equal(bias_relu_dropout(values, zero), values)
    other = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    expected = (values.float() + other.float()).to(torch.bfloat16)
    assert torch.equal(bias_relu_dropout(values, other), expected)


def test_bias_relu_dropout_equal_bits_for_any_thread_count():
    x = random(3000, 48, requires_grad=True)
    bias = random(48, seed=1, requires_grad=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = bias_relu_dropout(x, bias, P, key=torch.tensor(4))
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, bias))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_bias_relu_dropout_gradcheck():
    # Away from relu's kink, where differences are meaningless.
    x = random(4, 3, 5, dtype=torch.float64)
    x = (x + x.sign()).requires_grad_()
    bias = (0.1 * random(5, dtype=torch.float64, seed=1)).requires_grad_()
    key = torch.tensor(3)
    assert torch.autograd.gradcheck(lambda x, b: bias_relu_dropout(x, b, P, key=key), (x, bias))
    assert torch.autograd.gradcheck(lambda x, b: bias_relu_dropout(x, b), (x, bias))


def test_bias_relu_dropout_errors():
    x, bias, key = torch.zeros(2, 3), torch.zeros(3), torch.tensor(1)
    mask = torch.ones(2, 3, dtype=torch.uint8)
    where = r"^\[bias_relu_dropout\] expected "
    for wrong in ((4,), (3, 3), (2, 2), (1, 2, 3)):
        with pytest.raises(ValueError, match=where + r"bias \(r\), or \(g, r\) .*, got \["):
            bias_relu_dropout(x, torch.zeros(wrong))
    with pytest.raises(ValueError, match=where + r"x of shape \(\.\.\., r\), got a scalar"):
        bias_relu_dropout(torch.zeros(()), bias)
    with pytest.raises(TypeError, match=where + "x of float32, float64 or bfloat16, got Int"):
        bias_relu_dropout(x.int(), bias)
    with pytest.raises(TypeError, match=where + "bias of x's type Float, got Double"):
        bias_relu_dropout(x, bias.double())
    with pytest.raises(TypeError, match=where + "mask of uint8 or bool, got Float"):
        bias_relu_dropout(x, bias, P, mask=mask.float())
    with pytest.raises(ValueError, match=where + r"mask of x's shape \[2, 3\], got \[3\]"):
        bias_relu_dropout(x, bias, P, mask=mask[0, :])
    with pytest.raises(ValueError, match=where + "a mask or a key, got both"):
        bias_relu_dropout(x, bias, P, mask=mask, key=key)
    with pytest.raises(TypeError, match=where + "key of int64, got Int"):
        bias_relu_dropout(x, bias, P, key=key.int())
    with pytest.raises(ValueError, match=where + r"key with one element, got shape \[2\]"):
        bias_relu_dropout(x, bias, P, key=torch.tensor([1, 2]))
    for p in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=where + "a dropout probability 0 <= p < 1, got"):
            bias_relu_dropout(x, bias, p, key=key)
    with pytest.raises(ValueError, match=where + "bias on x's device cpu, got meta"):
        bias_relu_dropout(x, bias.to("meta"))


# --- gelu ---------------------------------------------------------------------------------------


def normal_gelu(x):
    """In float64, accurate for negative x: erfc does not cancel."""
    return x * torch.special.erfc(-x * 0.5**0.5) / 2


def every_bfloat16():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    return bits[bits.isfinite()]


def ulps(actual, exact):
    """Distance in units in the last place of the type, where the exact result is normal."""
    information = torch.finfo(actual.dtype)
    normal = exact.abs() >= 2 * information.tiny
    exact = exact[normal]
    unit = torch.exp2(exact.abs().log2().floor()) * information.eps
    return ((actual[normal].double() - exact).abs() / unit).max().item()


def test_gelu_is_accurate():
    # The bounds that its documentation states, also where 1 + erf would cancel.
    x = torch.cat(
        [random(200_000), -torch.logspace(-30, 1.14, 200_000), torch.linspace(0, 20, 9999)]
    )
    assert ulps(gelu(x), normal_gelu(x.double())) <= 8
    x = every_bfloat16()
    assert ulps(gelu(x), normal_gelu(x.double())) <= 0.52
    x = random(10_000, dtype=torch.float64)
    torch.testing.assert_close(gelu(x), normal_gelu(x), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_backward_is_accurate(dtype):
    # The derivative passes 0, so its error is absolute; the product is rounded once.
    x = every_bfloat16() if dtype == torch.bfloat16 else 3 * random(100_000, dtype=dtype)
    grad = random(*x.shape, dtype=dtype, seed=1)
    x.requires_grad_()
    gelu(x).backward(grad)
    x64 = x.detach().double()
    slope = torch.special.erfc(-x64 * 0.5**0.5) / 2
    slope += x64 * (-(x64**2) / 2).exp() / (2 * torch.pi) ** 0.5
    rounding = 0.5 * torch.finfo(dtype).eps
    allowed = {torch.float32: 4e-7, torch.float64: 1e-15, torch.bfloat16: 1e-4}[dtype]
    error = (x.grad.double() - grad.double() * slope).abs()
    assert (error <= grad.double().abs() * (allowed + rounding * slope.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_at_the_ends(dtype):
    x = torch.tensor([torch.inf, -torch.inf, 0.0, 1e30, -1e30, torch.nan], dtype=dtype)
    x.requires_grad_()
    y = gelu(x)
    expected = torch.tensor([torch.inf, 0.0, 0.0, 1e30, 0.0, torch.nan], dtype=dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    y.sum().backward()
    slopes = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, torch.nan], dtype=dtype)
    torch.testing.assert_close(x.grad, slopes, rtol=0, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_shapes_and_threads(dtype):
    x = random(41, 31, 51, dtype=dtype, requires_grad=True)
    permuted = x.permute(2, 0, 1)
    assert gelu(permuted).is_contiguous()
    assert torch.equal(gelu(permuted), gelu(permuted.contiguous()))
    assert gelu(x[:0]).shape == (0, 31, 51)
    assert gelu(x[0, 0, 0]).shape == ()
    for first, second in zip(*over_threads(lambda: with_gradient(gelu, x)), strict=True):
        assert torch.equal(first, second)


def test_gelu_gradcheck():
    assert torch.autograd.gradcheck(gelu, (3 * random(20, dtype=torch.float64).requires_grad_(),))


def test_gelu_errors():
    where = r"expected x of float32, float64 or bfloat16, got Half"
    with pytest.raises(TypeError, match=r"^\[gelu\] " + where):
        gelu(torch.zeros(2).half())
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"^\[gelu_backward\] expected grad of x's shape \[2\]"):
        torch.ops.ntkcl.gelu_backward(x[:1], x)
    with pytest.raises(TypeError, match=r"^\[gelu_backward\] expected grad of x's type Float"):
        torch.ops.ntkcl.gelu_backward(x.double(), x)


# --- residual_layer_norm ------------------------------------------------------------------------

# Types of stream, update and result.
STREAMS = [(d, d, d) for d in DTYPES] + [
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float32),
]
LAYERS = [(1,), (7,), (5, 192), (2, 197, 31), (3, 4, 33), (300, 64)]
EPS = 1e-6


def layer_inputs(shape, types, requires_grad=False):
    stream, update, _ = types
    return [
        random(*s, dtype=d, seed=i, requires_grad=requires_grad)
        for i, (s, d) in enumerate(
            [(shape, stream), (shape, update), (shape[-1:], stream), (shape[-1:], stream)]
        )
    ]


def reference_layer(x, update, weight, bias, stored=lambda s: s):
    total = x if update is None else stored(x + update)
    return total, F.layer_norm(total, x.shape[-1:], weight, bias, EPS)


@pytest.mark.parametrize("types", STREAMS)
@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("updated", [True, False])
def test_residual_layer_norm_equals_pytorch(types, shape, updated):
    inputs = layer_inputs(shape, types, requires_grad=True)
    inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    # The variance of one element is 0: what the reference rounds, it multiplies by 1 / sqrt(eps).
    least = 1.0 if shape[-1] > 1 else EPS**-0.5
    if not updated:
        inputs[1] = inputs64[1] = None
    total, out = residual_layer_norm(*inputs, EPS, types[2])

    class Stored(torch.autograd.Function):
        @staticmethod
        def forward(_, value):
            return value.to(types[0]).double()

        @staticmethod
        def backward(_, grad):
            return grad

    expected_total, expected = reference_layer(*inputs64, Stored.apply)
    assert torch.equal(total, expected_total.to(types[0]))
    worst = max(TOLERANCE[d] for d in types)
    assert out.dtype == types[2]
    torch.testing.assert_close(out.double(), expected, rtol=worst, atol=worst)

    # Both results have a gradient.
    grad, total_grad = (
        random(*shape, dtype=types[2], seed=5),
        random(*shape, dtype=types[0], seed=6),
    )
    torch.autograd.backward([total, out], [total_grad, grad])
    torch.autograd.backward([expected_total, expected], [total_grad.double(), grad.double()])
    for ours, theirs in zip(inputs, inputs64, strict=True):
        if ours is not None:
            assert ours.grad.dtype == ours.dtype
            scale = max(theirs.grad.abs().max().item(), least)
            tolerance = max(TOLERANCE[ours.dtype], 1e-5 if ours.dtype == torch.float32 else 0)
            error = (ours.grad.double() - theirs.grad).abs().max().item()
            assert error <= tolerance * scale


@pytest.mark.parametrize("wanted", ["stream", "update", "weight", "sum", "out"])
def test_residual_layer_norm_partial_gradients(wanted):
    # Each gradient is right whichever others are asked for, and frozen inputs get none.
    inputs, reference = (layer_inputs((4, 24), STREAMS[1]) for _ in range(2))
    leaf = {"stream": 0, "update": 1, "weight": 2}.get(wanted, 0)
    results = []
    for tensors, function in (
        (inputs, lambda *a: residual_layer_norm(*a, EPS)),
        (reference, reference_layer),
    ):
        tensors[leaf].requires_grad_()
        total, out = function(*tensors)
        loss = {"sum": total.pow(3), "out": out.pow(3)}.get(wanted, total.pow(3) + out.pow(3))
        loss.sum().backward()
        results.append([t.grad for t in tensors])
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        if i == leaf:
            torch.testing.assert_close(ours, theirs)
        else:
            assert ours is None


def test_residual_layer_norm_of_equal_and_far_off_values():
    # Variance 0, and a mean far from 0: the variance is of centred values.
    weight, bias = torch.ones(100), torch.full((100,), 0.5)
    _, out = residual_layer_norm(torch.full((2, 100), 3.0), None, weight, bias, EPS)
    assert torch.equal(out, torch.full((2, 100), 0.5))
    x = random(2, 100, dtype=torch.float64)
    _, out = residual_layer_norm((x + 1000).float(), None, weight, bias, EPS)
    expected = F.layer_norm(
        (x + 1000).float().double(), (100,), weight.double(), bias.double(), EPS
    )
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


def test_residual_layer_norm_lets_nan_through():
    x, update, weight, bias = layer_inputs((3, 8), STREAMS[0])
    update[1, 2] = float("nan")
    total, out = residual_layer_norm(x, update, weight, bias)
    assert total.isnan().sum() == 1
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


def test_residual_layer_norm_shapes_and_threads():
    x, update, weight, bias = layer_inputs((6, 5, 4), STREAMS[0])
    permuted = residual_layer_norm(x.permute(1, 0, 2), update.permute(1, 0, 2), weight, bias)
    for ours, theirs in zip(permuted, residual_layer_norm(x, update, weight, bias), strict=True):
        assert torch.equal(ours, theirs.permute(1, 0, 2))
    for shape in ((0, 4), (3, 0)):
        given = [t.requires_grad_() for t in layer_inputs(shape, STREAMS[0])]
        total, out = residual_layer_norm(*given)
        assert total.shape == out.shape == shape
        (total.sum() + out.sum()).backward()
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in given[2:])
    given = [t.requires_grad_() for t in layer_inputs((700, 192), STREAMS[1])]

    def run():
        total, out = residual_layer_norm(*given)
        return total, out, *torch.autograd.grad((total * out).square().sum(), given)

    for first, second in zip(*over_threads(run), strict=True):
        assert torch.equal(first, second)


def test_residual_layer_norm_gradcheck():
    inputs = [t.requires_grad_() for t in layer_inputs((3, 5), STREAMS[1])]
    assert torch.autograd.gradcheck(residual_layer_norm, inputs)
    x, _, weight, bias = inputs
    assert torch.autograd.gradcheck(lambda *a: residual_layer_norm(a[0], None, *a[1:])[1],
                                    (x, weight, bias))  # fmt: skip


def test_residual_layer_norm_errors():
    x, weight = torch.zeros(2, 6), torch.zeros(6)
    where = r"^\[residual_layer_norm\] expected "
    with pytest.raises(TypeError, match=where + "x of float32, float64 or bfloat16, got Half"):
        residual_layer_norm(x.half(), x, weight, weight)
    with pytest.raises(TypeError, match=where + "update of the stream's type Float, or bfloat16"):
        residual_layer_norm(x, x.double(), weight, weight)
    with pytest.raises(TypeError, match=where + "update of the stream's type Double"):
        residual_layer_norm(x.double(), x.bfloat16(), weight.double(), weight.double())
    with pytest.raises(TypeError, match=where + "a dtype of the stream's type Float.*got Double"):
        residual_layer_norm(x, x, weight, weight, dtype=torch.float64)
    with pytest.raises(ValueError, match=where + r"update of x's shape \[2, 6\], got \[6\]"):
        residual_layer_norm(x, x[0], weight, weight)
    with pytest.raises(ValueError, match=where + r"weight of shape \[6\], got \[5\]"):
        residual_layer_norm(x, x, weight[:5], weight)
    with pytest.raises(TypeError, match=where + "bias of the stream's type Float, got Double"):
        residual_layer_norm(x, x, weight, weight.double())
    with pytest.raises(ValueError, match=where + r"x of shape \(\.\.\., C\), got a scalar"):
        residual_layer_norm(torch.zeros(()), None, weight, weight)
    for eps in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=where + "eps >= 0, got"):
            residual_layer_norm(x, x, weight, weight, eps)
    with pytest.raises(ValueError, match=where + "update on x's device cpu, got meta"):
        residual_layer_norm(x, x.to("meta"), weight, weight)


# --- section_cosine -----------------------------------------------------------------------------

# B, n, S, C
SIZES = [(1, 1, 1, 1), (4, 3, 2, 5), (3, 10, 1, 192), (16, 7, 3, 64), (5, 100, 2, 67)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_section_cosine_equals_pytorch(dtype, size):
    batch, classes, sections, width = size
    inputs = [
        random(batch, sections * width, dtype=dtype),
        random(classes, sections * width, dtype=dtype, seed=1),
        random(sections, dtype=dtype, seed=2),
    ]
    grad = random(batch, classes, dtype=dtype, seed=3)
    inputs = [t.requires_grad_() for t in inputs]
    inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    scores = section_cosine(*inputs)
    expected = reference_section_cosine(*inputs64)
    assert_close(scores, expected, dtype)
    scores.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip(inputs, inputs64, strict=True):
        if width == 1:  # a cosine of numbers is a sign: the true gradient is 0
            scale = ours.detach().abs().min().item()
            assert ours is inputs[2] or ours.grad.abs().max() <= TOLERANCE[dtype] / scale
        else:
            assert_close(ours.grad, theirs.grad, dtype, scale=float(ours is inputs[2]))


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_section_cosine_partial_gradients(needs):
    # Each gradient is right whichever others are asked for, and frozen inputs get none.
    values = [random(6, 8), random(5, 8, seed=1), random(2, seed=2)]
    inputs = [v.clone().requires_grad_(bool(n)) for v, n in zip(values, needs, strict=True)]
    reference = [v.clone().requires_grad_() for v in values]
    grad = random(6, 5, seed=3)
    section_cosine(*inputs).backward(grad)
    reference_section_cosine(*reference).backward(grad)
    for ours, theirs, needed in zip(inputs, reference, needs, strict=True):
        if needed:
            assert_close(ours.grad, theirs.grad, torch.float32)
        else:
            assert ours.grad is None


def test_section_cosine_short_vectors():
    # Norms below 1e-12 are clamped, forward and backward, as F.normalize does; a class without a
    # prototype (a zero row) scores 0.
    x = torch.cat([torch.zeros(1, 4), 1e-13 * random(1, 4), random(1, 4)]).double()
    values = [x, random(2, 4, dtype=torch.float64, seed=1), torch.tensor([2.0, 0.5]).double()]
    inputs = [v.clone().requires_grad_() for v in values]
    reference = [v.clone().requires_grad_() for v in values]
    scores, expected = section_cosine(*inputs), reference_section_cosine(*reference)
    torch.testing.assert_close(scores, expected)
    assert torch.equal(scores[0], torch.zeros(2, dtype=torch.float64))
    scores.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(inputs, reference, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_section_cosine_non_contiguous():
    x, prototypes, weights = random(8, 6).t(), random(3, 16, seed=1)[:, ::2], random(4, seed=2)[::2]
    assert torch.equal(
        section_cosine(x, prototypes, weights),
        section_cosine(x.contiguous(), prototypes.contiguous(), weights.contiguous()),
    )


@pytest.mark.parametrize("size", [(0, 3, 8), (3, 0, 8), (0, 0, 8), (2, 3, 0)])
def test_section_cosine_zero_size(size):
    batch, classes, columns = size
    x = torch.ones(batch, columns, requires_grad=True)
    prototypes = torch.ones(classes, columns, requires_grad=True)
    weights = torch.ones(2, requires_grad=True)
    scores = section_cosine(x, prototypes, weights)
    assert torch.equal(scores, torch.zeros(batch, classes))
    scores.sum().backward()
    for t in (x, prototypes, weights):
        assert torch.equal(t.grad, torch.zeros_like(t))


def test_section_cosine_gradcheck():
    inputs = (random(3, 8), random(4, 8, seed=1), random(2, seed=2))
    inputs = tuple(t.double().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(section_cosine, inputs)


def test_section_cosine_errors():
    x, prototypes, weights = torch.zeros(2, 6), torch.zeros(3, 6), torch.zeros(2)
    where = r"^\[section_cosine\] expected "
    with pytest.raises(ValueError, match=where + r"x of shape \(B, S\*C\), got \[6\]"):
        section_cosine(x[0], prototypes, weights)
    with pytest.raises(ValueError, match=where + r"prototypes of shape \(n, 6\).*got \[3, 5\]"):
        section_cosine(x, prototypes[:, :5], weights)
    with pytest.raises(ValueError, match=where + r"weights of shape \(S\).*got \[0\]"):
        section_cosine(x, prototypes, weights[:0])
    with pytest.raises(ValueError, match=where + "x with columns in 4 sections.*got 6 columns"):
        section_cosine(x, prototypes, torch.zeros(4))
    with pytest.raises(TypeError, match=where + "x of float32, float64 or bfloat16, got Half"):
        section_cosine(x.half(), prototypes, weights)
    with pytest.raises(TypeError, match=where + "weights of x's type Float, got Double"):
        section_cosine(x, prototypes, weights.double())
    with pytest.raises(ValueError, match=where + "prototypes on x's device cpu, got meta"):
        section_cosine(x, prototypes.to("meta"), weights)


# --- composed_linear ----------------------------------------------------------------------------

# (shape of x without its width, g, in, out, rank, old modules)
COMPOSED = [
    ((1,), 1, 1, 1, 1, 0),
    ((2, 5), 3, 6, 6, 2, 0),  # few rows: gradients of rows
    ((4,), 3, 24, 24, 2, 3),
    ((300,), 2, 6, 10, 3, 4),  # many rows and columns: by the dense gradient
    ((3, 7), 1, 8, 20, 4, 1),
    ((50,), 1, 20, 8, 4, 2),
]
LEAVES = ["x", "weight", "bias", "down", "up", "omega"]


def composed_inputs(size, dtype=torch.float32, bias=True):
    rows, g, width, out, rank, modules = size
    arguments = {
        "x": random(*rows, width, seed=1),
        "weight": random(g, out, width, seed=2),
        "bias": random(g * out, seed=3) if bias else None,
        "down": random(g, width, rank, seed=4),
        "up": random(g, rank, out, seed=5),
        "scale": [0.5, 0.0, 0.25][:g],
        "old_down": random(g, width, modules * rank, seed=6) if modules else None,
        "old_up": random(g, modules * rank, out, seed=7) if modules else None,
        "omega": random(g, modules, seed=8) if modules else None,
        "omega_scale": [0.0, 0.5, 0.125][-g:] if modules else [],
    }
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def with_gradients(arguments, names=LEAVES, dtype=None):
    return {
        name: value.detach().clone().to(dtype or value.dtype).requires_grad_(name in names)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", COMPOSED)
def test_composed_linear_equals_pytorch(dtype, size):
    ours = with_gradients(composed_inputs(size, dtype))
    reference = with_gradients(ours, dtype=torch.float64)
    y = composed_linear(**ours)
    expected = reference_composed_linear(reference)
    assert_close(y, expected, dtype, scale=4)
    grad = random(*y.shape, seed=9).to(dtype)
    y.backward(grad)
    expected.backward(grad.double())
    for name in LEAVES:
        if ours[name] is not None:
            # Of bfloat16, what passes through x A or dy B^T is rounded on the way.
            scale = 3 * reference[name].grad.abs().max().item()
            assert_close(ours[name].grad, reference[name].grad, dtype, scale=scale)


@pytest.mark.parametrize("size", COMPOSED)
def test_composed_linear_takes_the_cheaper_way_to_the_same_gradients(size):
    # With the weight's gradient everything goes by the dense one; without it, by the cheaper.
    names = ["down", "up", "omega"]
    both = [
        with_gradients(composed_inputs(size, torch.float64), wanted)
        for wanted in (names, [*names, "weight"])
    ]
    for arguments in both:
        y = composed_linear(**arguments)
        y.backward(random(*y.shape, seed=9).double())
    for name in names:
        if both[0][name] is not None:
            assert_close(both[0][name].grad, both[1][name].grad, torch.float64, scale=100)


@pytest.mark.parametrize("size", COMPOSED)
def test_composed_linear_tells_the_importance(size):
    arguments = composed_inputs(size, torch.float64)
    weight = reference_composed_weight(arguments).transpose(1, 2).contiguous()
    probe = torch.zeros(size[1], dtype=torch.float64, requires_grad=True)
    y = composed_linear(**arguments, probe=probe)
    grad = random(*y.shape, seed=9).double()
    y.backward(grad)
    dense = torch.einsum("...o,...i->oi", grad, arguments["x"]).view_as(weight)
    torch.testing.assert_close(probe.grad, (weight * dense).abs().mean((1, 2)))
    entries = torch.zeros_like(weight, requires_grad=True)
    composed_linear(**arguments, probe=entries).backward(grad)
    torch.testing.assert_close(entries.grad, weight * dense)
    # Composed before: the same.
    arguments["weight"] = weight
    torch.testing.assert_close(composed_linear(**arguments, composed=True), y)


def test_composed_linear_of_bfloat16_with_float32_modules():
    # A run's mixed precision: the modules are the masters.
    arguments = composed_inputs(COMPOSED[3])
    for name in ("x", "weight", "bias"):
        arguments[name] = arguments[name].bfloat16()
    ours = with_gradients(arguments)
    reference = with_gradients(ours, dtype=torch.float64)
    y, expected = composed_linear(**ours), reference_composed_linear(reference)
    assert_close(y, expected, torch.bfloat16, scale=4)
    grad = random(*y.shape, seed=9)
    y.backward(grad.bfloat16())
    expected.backward(grad.bfloat16().double())
    for name in LEAVES:
        assert ours[name].grad.dtype == ours[name].dtype
        largest = reference[name].grad.abs().max().item()
        difference = (ours[name].grad.double() - reference[name].grad).abs().max().item()
        assert difference <= 0.02 * largest, name


def test_composed_linear_gradcheck():
    for size in COMPOSED[:5]:
        arguments = composed_inputs(size, torch.float64)
        names = [name for name in LEAVES if arguments[name] is not None]

        def function(*leaves, arguments=arguments, names=names):
            return composed_linear(**{**arguments, **dict(zip(names, leaves, strict=True))})

        leaves = [arguments[name][:3] if name == "x" else arguments[name] for name in names]
        assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


def test_composed_linear_errors():
    good = composed_inputs(COMPOSED[2])
    composed_linear(**good)
    for change, message in [
        ({"x": random(4, 23)}, r"expected x \(\.\.\., 24\), got \[4, 23\]"),
        (
            {"weight": random(24, 24)},
            r"expected weight \(g, out, in\) and down \(g, in, r\), got \[24, 24\]",
        ),
        ({"down": random(3, 23, 2)}, r"expected down of shape \[3, 24, 2\], got \[3, 23, 2\]"),
        ({"up": random(3, 3, 24)}, r"expected up of shape \[3, 2, 24\], got \[3, 3, 24\]"),
        ({"scale": [1.0]}, "expected 3 numbers in scale, got 1"),
        ({"omega_scale": []}, "expected 3 numbers in omega_scale, got 0"),
        ({"omega": None}, "expected old_down, old_up and omega together, or none"),
        ({"omega": random(3, 2)}, r"expected old_down of shape \[3, 24, 4\], got \[3, 24, 6\]"),
        ({"bias": random(3)}, r"expected bias of shape \[72\], got \[3\]"),
        ({"probe": random(2)}, r"expected probe \(g\) or of weight's shape .*, got \[2\]"),
        (
            {"old_up": good["old_up"].clone().requires_grad_()},
            "expected old_down and old_up that require no gradient",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            composed_linear(**{**good, **change})
    for name, value in [("x", random(4, 24).half()), ("weight", good["weight"].double())]:
        with pytest.raises(TypeError):
            composed_linear(**{**good, name: value})
    with pytest.raises(TypeError, match="expected up of down's type"):
        composed_linear(**{**good, "up": good["up"].double()})


# --- torch's view of the operators --------------------------------------------------------------


def ntk_samples(make, key, mask):
    ops = torch.ops.ntkcl
    for groups in ((), (2,)):
        weights = [make(*groups, *shape) for shape in ((16, 8), (16,), (8, 16), (8,))]
        x = make(2, 7, 8)
        yield ops.parallel_adapter.default, (x, *weights, 0.5, True, None, key, P)
        yield ops.parallel_adapter.default, (x, *weights, 0.5, False, mask, None, P)
        turned = make(7, 2, 8).detach().transpose(0, 1)
        yield ops.parallel_adapter.default, (turned, *weights, 0.5, True, None, None, 0.0)
        down, up = weights[0].detach(), weights[2].detach()
        grad, inner = make(2, 7, 8).detach(), make(2, 7, 16).detach()
        yield (
            ops.parallel_adapter_backward.default,
            (grad, x.detach(), inner, down, up, 0.5, True, P, [True, False, True, True, False]),
        )
    x, x4, row, square = make(2, 7, 8), make(4, 8), make(8), make(8, 8)
    for carried, insert in ((0, True), (3, False), (3, True)):
        weight = make(3, 7 - carried)
        yield ops.token_mix_prompts.default, (x, weight, row, row, carried, 0.5, EPS, insert)
        kept = [t.detach() for t in ops.token_mix_prompts(x, weight, row, row, carried)]
        out = ops.token_mix_prompts(x, weight, row, row, carried, insert=insert)[0].detach()
        kept = (x.detach(), *kept[1:], weight.detach(), row.detach(), carried, 0.5, insert)
        for x_grad in (None, x.detach()):
            arguments = (out, x_grad, *kept, [True, True, False, True])
            yield ops.token_mix_prompts_backward.default, arguments
    head_mask = mask[:1, :4, :2].reshape(4, 2)
    yield ops.feature_fusion.default, (x4, x4, square, row)
    yield ops.feature_fusion.default, (x4, x4, square, row, head_mask, P)
    yield (
        ops.feature_fusion_backward.default,
        (x4.detach(), x4.detach(), square.detach(), head_mask, P, 0.5, 0.1, [True] * 4),
    )
    labels = torch.tensor([0, 1, 0, 2], device=key.device)
    for kind in ("release", "infonce"):
        yield ops.dissimilarity.default, (x4, labels, square, labels.repeat(2), kind, 0.5)
        kept = [t.detach() for t in ops.dissimilarity(x4, labels, x4, labels, kind, 0.5)]
        yield ops.dissimilarity_backward.default, tuple(kept)
    scalar = make().detach()
    yield ops.projection_energy.default, (x4, make(8, 3))
    yield ops.projection_energy_backward.default, (scalar, x4.detach(), square.detach(), [True] * 2)
    yield ops.signed_projection.default, (x4, row)
    turned, wanted = make(8, 4).detach().t(), [True, False]
    for rows in (x4.detach(), turned):
        yield ops.signed_projection_backward.default, (scalar, rows, row.detach(), wanted)
    fused = (turned, x4.detach(), square.detach(), None, 0.0, 0.5, 0.1, [True] * 4)
    yield ops.feature_fusion_backward.default, fused


def step_samples(device):
    """Steps of optimisers, which change their arguments."""
    ops = torch.ops.ntkcl
    for dtype in (torch.float32, torch.float64):

        def lists(*seeds, dtype=dtype):
            shapes = ((2, 3, 5), (4,), (), (2, 0))
            return [[random(*s, dtype=dtype, seed=i).to(device) for s in shapes] for i in seeds]

        parameters, gradients, momenta, anchors, averages = lists(0, 1, 2, 3, 4)
        anchors[1] = None
        yield (
            ops.sgd_step_.default,
            (parameters, gradients, momenta, anchors, averages, 0.1, 0.9, 0.01, 0.5, 0.7),
        )
        yield ops.sgd_step_.default, (*lists(0, 1), [], [], [], 0.1, 0.0, 0.0, 0.0, 0.0)
        steps = torch.tensor(2.0, device=device)
        for decoupled in (False, True):
            moments = [averages, [t.abs() for t in momenta]]
            numbers = (0.1, 0.9, 0.99, 1e-8, 0.01, decoupled, 0.5, 0.7)
            yield (
                ops.adam_step_.default,
                (*lists(0, 1), *cloned(moments), steps, anchors, lists(5)[0], *numbers),
            )
        turned = [[random(5, 3, dtype=dtype).to(device).t()] for _ in range(2)]
        yield ops.sam_ascend_.default, (*lists(0, 1, 2), 0.3)
        yield ops.sam_ascend_.default, (*([t[0].contiguous()] for t in turned), turned[0], 0.3)
        for tau, together in ((None, False), (2.0, False), (2.0, True)):
            numbers = ([0.1] * 4, [0.01] * 4, [2, 0, 0, 1], 0.9, tau, together)
            yield ops.sam_step_.default, (*lists(0, 1, 2, 3, 4), *numbers)


def cloned(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return type(value)(map(cloned, value)) if isinstance(value, list | tuple) else value


def results_of(op, arguments):
    """What an operator returns, and what is in the lists that it may have changed."""
    arguments = cloned(arguments)
    returned = op(*arguments)
    returned = returned if isinstance(returned, tuple) else (returned,)
    lists = [t for a in arguments if isinstance(a, list) for t in a]
    return [t for t in (*returned, *lists) if isinstance(t, torch.Tensor)]


def operator_samples(device="cpu"):
    """(operator, arguments) with gradients, without, non-contiguous and zero-size."""
    ops = torch.ops.ntkcl
    key = torch.tensor(11, device=device)
    mask = philox_keep_mask(key, (2, 7, 16), P)
    for dtype in DTYPES:
        for grad in (False, True):

            def make(*shape, dtype=dtype, grad=grad):
                return random(*shape, dtype=dtype).to(device).requires_grad_(grad)

            yield ops.attention.default, (make(2, 6, 12), 2, None, 0)
            yield ops.attention.default, (make(2, 6, 12), 2, make(2), 3)
            yield ops.bias_relu_dropout.default, (make(2, 7, 16), make(2, 16), None, key, P)
            yield ops.bias_relu_dropout.default, (make(0, 7, 4), make(0, 4), None, None, 0.0)
            y = make(2, 7, 16).detach()  # the backward pass has no gradient of its own
            yield ops.bias_relu_dropout_backward.default, (y, y, P, 2)
            for size in (COMPOSED[1], COMPOSED[3]):
                leaves = [
                    value if value is None else value.detach().to(device).requires_grad_(grad)
                    for value in composed_inputs(size, dtype).values()
                    if not isinstance(value, list)
                ]
                x, weight, bias, down, up, old_down, old_up, omega = leaves
                if old_down is not None:
                    old_down, old_up = old_down.detach(), old_up.detach()
                scales = [[1.0] * size[1], [0.5] * size[1] if size[-1] else []]
                old = (old_down, old_up, omega)
                yield (
                    ops.composed_linear.default,
                    (x, weight, bias, down, up, scales[0], *old, scales[1]),
                )
                if not grad:
                    yield (
                        ops.composed_linear_backward.default,
                        (
                            torch.ones(*x.shape[:-1], len(bias), dtype=dtype, device=device),
                            *(x, weight, down, up, scales[0], *old, scales[1]),
                            [True, False, True, True, True, size[-1] > 0, True],
                        ),
                    )
            yield ops.bias_relu_dropout.default, (make(5, 16), make(16), None, key, P)
            yield ops.bias_relu_dropout.default, (make(2, 7, 16), make(16), mask, None, P)
            yield ops.gelu.default, (make(3, 5),)
            layer = (make(2, 3, 8), make(8), make(8), EPS)
            yield ops.residual_layer_norm.default, (layer[0], make(2, 3, 8), *layer[1:])
            yield ops.residual_layer_norm.default, (layer[0], None, *layer[1:])
            if dtype == torch.float32:
                half = make(2, 3, 8, dtype=torch.bfloat16)
                arguments = (layer[0], half, *layer[1:], torch.bfloat16)
                yield ops.residual_layer_norm.default, arguments
            yield ops.section_cosine.default, (make(4, 6), make(3, 6), make(2))
            yield from ntk_samples(make, key, mask)
    yield from step_samples(device)
    x, bias = random(2, 7, 3).to(device), random(3).to(device)
    y = bias_relu_dropout(x, bias)
    scores = random(4, 3).to(device)
    rows, prototypes, weights = (random(*s).to(device) for s in ((4, 6), (3, 6), (2,)))
    qkv, gate, mixed = (random(*s).to(device) for s in ((2, 6, 12), (2,), (2, 6, 4)))
    for with_gate in ((None, 0), (gate, 3)):
        yield ops.attention_backward.default, (mixed, qkv, 2, *with_gate)
    yield ops.attention.default, (qkv.transpose(0, 1), 2, None, 0)
    yield ops.attention.default, (qkv[:0].requires_grad_(), 2, gate, 3)
    yield ops.bias_relu_dropout.default, (x.transpose(0, 1), bias, None, None, 0.0)
    yield ops.bias_relu_dropout.default, (x[:0].requires_grad_(), bias, None, key, P)
    yield ops.bias_relu_dropout_backward.default, (x, y, P)
    yield ops.bias_relu_dropout_backward.default, (x.transpose(0, 1), y.transpose(0, 1), P)
    yield ops.bias_relu_dropout_backward.default, (x[:0], y[:0], P)
    yield ops.gelu.default, (x.transpose(0, 1),)
    yield ops.gelu.default, (x[:0].requires_grad_(),)
    yield ops.gelu_backward.default, (x, y)
    yield ops.gelu_backward.default, (x.transpose(0, 1), y.transpose(0, 1))
    means, half = x.mean(2), x.bfloat16()
    for sum_grad, update, affine in ((y, None, True), (None, torch.bfloat16, False)):
        results = (x, means, means, bias, update, affine)
        yield ops.residual_layer_norm_backward.default, (x, sum_grad, *results)
        yield ops.residual_layer_norm_backward.default, (half, sum_grad, *results)
    for dtype in (torch.float32, torch.bfloat16):
        yield ops.float8_rows.default, (random(2, 3, 8, dtype=dtype).to(device),)
        yield ops.float8_rows.default, (random(0, 4, dtype=dtype).to(device),)
    yield ops.philox_keep_mask.default, (key, [3, 5], P)
    yield ops.philox_keep_mask.default, (key, [0, 5], P)
    yield ops.section_cosine.default, (rows.t().contiguous().t(), prototypes, weights)
    yield ops.section_cosine.default, (rows[:0], prototypes, weights)
    yield ops.section_cosine_backward.default, (scores, rows, prototypes, weights)
    yield ops.section_cosine_backward.default, (scores.t(), prototypes, rows, weights)
    yield ops.section_cosine_backward.default, (scores[:0], rows[:0], prototypes, weights)


@pytest.mark.parametrize(
    "name", sorted({op._schema.name.split("::")[1] for op, _ in operator_samples()})
)
def test_opcheck(name):
    # Schema, autograd registration, fake tensors, and AOT dispatch with symbolic sizes.
    for op, arguments in operator_samples():
        if op._schema.name == f"ntkcl::{name}":
            torch.library.opcheck(op, arguments)


def test_every_operator_is_sampled():
    # A new operator needs a line in operator_samples.
    registered = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ntkcl::")
    }
    assert registered == {op._schema.name.split("::")[1] for op, _ in operator_samples()}


def test_every_operator_has_kernels():
    for op in {op for op, _ in operator_samples()}:
        for key in ("CPU", "CUDA", "Meta"):
            has = torch._C._dispatch_has_kernel_for_dispatch_key(op._schema.name, key)
            assert has, f"{op._schema.name} has no {key} kernel"


def adapter(x, down, bias, prototypes, weights, key):
    hidden = bias_relu_dropout(x @ down, bias, P, key=key)
    return section_cosine(hidden.mean(dim=1), prototypes, weights)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile(dynamic):
    # One graph without breaks, forward and backward, for two batch sizes.
    torch._dynamo.reset()
    compiled = torch.compile(adapter, fullgraph=True, dynamic=dynamic)
    for batch in (3, 5) if dynamic else (3,):
        leaves = [random(12, 8), random(8), random(6, 8), random(2)]
        outcomes = []
        for function in (adapter, compiled):
            parameters = [t.clone().requires_grad_() for t in leaves]
            scores = function(random(batch, 7, 12), *parameters, torch.tensor(8))
            scores.square().sum().backward()
            outcomes.append([scores.detach(), *(t.grad for t in parameters)])
        for eager, ours in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, eager)


def test_fake_cuda_tensors():
    # Shapes and devices without a GPU, as export and compilation for one ask for; the key may stay
    # on the CPU.
    with FakeTensorMode():
        x = torch.empty(2, 7, 16, device="cuda")
        bias = torch.empty(16, device="cuda")
        for key in (torch.empty((), dtype=torch.int64), torch.ones(1, device="cuda").long()):
            y = bias_relu_dropout(x, bias, P, key=key)
            assert (y.device.type, y.shape) == ("cuda", x.shape)
        dx, dbias = torch.ops.ntkcl.bias_relu_dropout_backward(x, y, P)
        assert (dx.device.type, dx.shape, dbias.shape) == ("cuda", x.shape, bias.shape)
        scores = section_cosine(y[0], y[1], torch.empty(4, device="cuda"))
        assert (scores.device.type, scores.shape) == ("cuda", (7, 7))


def test_autocast_casts_parameters():
    # Float32 parameters beside bfloat16 activations, as in anyone's mixed-precision training step.
    x, weight = random(6, 12), random(8, 12, seed=1)
    bias, prototypes, scale = (random(*s).requires_grad_() for s in ((8,), (3, 8), (1,)))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = bias_relu_dropout(F.linear(x, weight), bias, P, key=torch.tensor(1))
        scores = section_cosine(hidden, prototypes, scale)
    assert hidden.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    scores.square().sum().backward()
    for parameter in (bias, prototypes, scale):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0
    weight = torch.ones(12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        stream, out = residual_layer_norm(x.bfloat16(), x, weight, weight)
    assert stream.dtype == out.dtype == torch.bfloat16
    out.square().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_backward_within_autocast():
    # The products of a backward pass keep its operands' type.
    def scores(qkv):
        hidden = attention(qkv, 2)[:, 0]
        return section_cosine(hidden, torch.ones(3, 8), torch.ones(1)).square().sum()

    inside, outside = (random(2, 5, 24).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        scores(inside).backward()
    scores(outside).backward()
    torch.testing.assert_close(inside.grad, outside.grad)


def test_second_derivative_is_an_error():
    x = random(3, 4, requires_grad=True)
    y = bias_relu_dropout(x, torch.zeros(4), P, key=torch.tensor(1)).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="bias_relu_dropout_backward"):
        dx.sum().backward()


def test_build_without_cuda_says_so():
    if ntkcl._C.build_info["cuda"].startswith("on"):
        pytest.skip("this build has CUDA kernels")
    # Fake CUDA tensors would stop at Meta: ask the dispatcher for the CUDA kernel itself.
    with pytest.raises(ValueError, match=r"^\[section_cosine\] this build of ntkcl has no CUDA"):
        torch.ops.ntkcl.section_cosine.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA),
            torch.zeros(2, 4),
            torch.zeros(3, 4),
            torch.zeros(1),
        )


# --- CUDA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 4096, 100_003, 9_000_001])
def test_cuda_keep_mask_equals_cpu(cuda, n):
    # 9 million elements need more than one turn of the grid.
    for value in (0, -1, 0x0123456789ABCDEF):
        key = torch.tensor(value)
        assert torch.equal(
            philox_keep_mask(key.to(cuda), [n], P).cpu(), philox_keep_mask(key, [n], P)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70_000, 16), (3, 20_000), (9_000_001, 1)])
@pytest.mark.parametrize("dropout", ["none", "mask", "key", "host key"])
def test_cuda_bias_relu_dropout_equals_cpu(cuda, dtype, shape, dropout):
    # Bit for bit forward; sums of gradients in another order.
    key = torch.tensor(13)
    x, bias = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    outcomes = []
    for device in ("cpu", cuda):
        x_here = x.to(device).requires_grad_()
        bias_here = bias.to(device).requires_grad_()
        given = {}
        if dropout == "mask":
            given["mask"] = philox_keep_mask(key, shape, P).to(device)
        elif dropout != "none":
            given["key"] = key if dropout == "host key" else key.to(device)
        y = bias_relu_dropout(x_here, bias_here, P, **given)
        y.backward(x_here.detach())
        outcomes.append([t.detach().cpu() for t in (y, x_here.grad, bias_here.grad)])
    (y_cpu, dx_cpu, dbias_cpu), (y, dx, dbias) = outcomes
    assert torch.equal(y, y_cpu)
    assert torch.equal(dx, dx_cpu)
    assert_close(dbias, dbias_cpu, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GROUPED)
def test_cuda_bias_relu_dropout_of_groups_equals_cpu(cuda, dtype, shape):
    x, bias = random(*shape, dtype=dtype), random(shape[0], shape[-1], dtype=dtype, seed=1)
    outcomes = []
    for device in ("cpu", cuda):
        x_here, bias_here = (t.to(device).requires_grad_() for t in (x, bias))
        y = bias_relu_dropout(x_here, bias_here, P, key=torch.tensor(2))
        y.backward(x_here.detach())
        outcomes.append([t.detach().cpu() for t in (y, x_here.grad, bias_here.grad)])
    (y_cpu, dx_cpu, dbias_cpu), (y, dx, dbias) = outcomes
    assert torch.equal(y, y_cpu)
    assert torch.equal(dx, dx_cpu)
    assert_close(dbias, dbias_cpu, dtype)


def test_cuda_unaligned_views_equal_cpu(cuda):
    storage, bias = random(1 + 8 * 16), random(17, seed=1)
    grad = random(8, 16, seed=2)
    outcomes = []
    for device in ("cpu", cuda):
        x = storage.to(device)[1:].reshape(8, 16).requires_grad_()
        y = bias_relu_dropout(x, bias.to(device)[1:], P, key=torch.tensor(2))
        y.backward(grad.to(device))
        scores = section_cosine(y.detach(), x, torch.ones(2, device=device))
        outcomes.append([t.detach().cpu() for t in (y, x.grad, scores)])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, (96, 345, 3, 768), (70_000, 2, 2, 8)])
def test_cuda_section_cosine_equals_cpu(cuda, dtype, size):
    batch, classes, sections, width = size
    shapes = ((batch, sections * width), (classes, sections * width), (sections,))
    grad = random(batch, classes, dtype=dtype, seed=3)
    outcomes = []
    for device in ("cpu", cuda):
        inputs = [
            random(*shape, dtype=dtype, seed=i).to(device).requires_grad_()
            for i, shape in enumerate(shapes)
        ]
        scores = section_cosine(*inputs)
        scores.backward(grad.to(device))
        outcomes.append([scores.detach().cpu(), *(t.grad.cpu() for t in inputs)])
    for expected, ours in zip(*outcomes, strict=True):
        if width > 1 or ours is outcomes[1][0]:
            assert_close(ours, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 4096, 9_000_004])
def test_cuda_gelu_equals_cpu(cuda, dtype, n):
    outcomes = []
    for device in ("cpu", cuda):
        x = (3 * random(n, dtype=dtype)).to(device).requires_grad_()
        outcomes.append([t.cpu() for t in with_gradient(gelu, x)])
    for expected, ours in zip(*outcomes, strict=True):
        assert_close(ours, expected, dtype)


def test_cuda_gelu_at_the_ends(cuda):
    for dtype in DTYPES:
        x = torch.tensor([torch.inf, -torch.inf, -1e30, torch.nan], dtype=dtype, device=cuda)
        assert torch.equal(gelu(x).isnan(), x.isnan())
        assert torch.equal(gelu(x)[1:3], torch.zeros_like(x[1:3]))


@pytest.mark.parametrize("types", STREAMS)
@pytest.mark.parametrize("shape", [*LAYERS, (70_000, 12)])
@pytest.mark.parametrize("updated", [True, False])
def test_cuda_residual_layer_norm_equals_cpu(cuda, types, shape, updated):
    outcomes = []
    for device in ("cpu", cuda):
        inputs = [t.to(device).requires_grad_() for t in layer_inputs(shape, types)]
        given = inputs if updated else [inputs[0], None, *inputs[2:]]
        total, out = residual_layer_norm(*given, EPS, types[2])
        leaves = [t for t in given if t is not None]
        loss = (total.float() * out.float()).sum()
        found = [total, out, *torch.autograd.grad(loss, leaves)]
        outcomes.append([t.detach().cpu() for t in found])
    worst = max(TOLERANCE[d] for d in types)
    for expected, ours in zip(*outcomes, strict=True):
        scale = max(expected.abs().max().item(), 1.0)
        torch.testing.assert_close(ours, expected, rtol=0, atol=4 * worst * scale)


@pytest.mark.parametrize("shape", [(0, 16), (4, 0)])
def test_cuda_zero_size(cuda, shape):
    x = torch.zeros(shape, device=cuda, requires_grad=True)
    bias = torch.zeros(shape[-1], device=cuda, requires_grad=True)
    bias_relu_dropout(x, bias, P, key=torch.tensor(1)).sum().backward()
    assert torch.equal(bias.grad, torch.zeros_like(bias))
    scores = section_cosine(x, x, torch.ones(1, device=cuda))
    assert scores.shape == (shape[0], shape[0])
    assert philox_keep_mask(torch.tensor(1, device=cuda), [0], P).numel() == 0


def test_cuda_graph_reads_the_key_at_replay(cuda):
    # What a captured training step needs: new dropout each replay, without a new capture.
    key = torch.tensor(1, device=cuda)
    x, bias = random(64, 16).to(cuda), random(16).to(cuda)
    bias_relu_dropout(x, bias, P, key=key)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bias_relu_dropout(x, bias, P, key=key)
    for value in (1, 2, 3):
        key.fill_(value)
        graph.replay()
        assert torch.equal(y, bias_relu_dropout(x, bias, P, key=torch.tensor(value)))


def assert_same_results(op, expected, got):
    """Of one operator on two devices; integers and 8-bit numbers to the bit."""
    expected, got = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (expected, got))
    for here, there in zip(expected, got, strict=True):
        exact = not here.is_floating_point() or here.dtype == torch.float8_e4m3fn
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}
        at_most = 0.0 if exact else tolerance[here.dtype]
        torch.testing.assert_close(
            there.detach().cpu().double(),
            here.detach().double(),
            rtol=at_most,
            atol=at_most,
            equal_nan=True,
            msg=lambda text, op=op: f"{op}: {text}",
        )


def test_every_operator_gives_on_cuda_what_it_gives_on_the_cpu(cuda):
    for (op, here), (_, there) in zip(operator_samples(), operator_samples(cuda), strict=True):
        assert_same_results(op, results_of(op, here), results_of(op, there))


def test_the_comparison_of_devices_sees_a_difference():
    # Where there is no GPU the test above never runs: here on the CPU, and with one wrong result.
    for op, arguments in operator_samples():
        assert_same_results(op, results_of(op, arguments), results_of(op, arguments))
    with pytest.raises(AssertionError):
        assert_same_results(op, torch.ones(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(AssertionError):
        assert_same_results(op, torch.ones(3), torch.ones(3) * 1.01)


def test_cuda_opcheck(cuda):
    for op, arguments in operator_samples(cuda):
        torch.library.opcheck(op, arguments)


def test_cuda_tensors_with_a_cpu_bias_are_an_error(cuda):
    with pytest.raises(ValueError, match="bias on x's device cuda:0, got cpu"):
        bias_relu_dropout(torch.zeros(2, 3, device=cuda), torch.zeros(3))
