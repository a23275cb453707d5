"""The operators that NTK-CL is made of, adapter, prompts, fusion and losses, against plain PyTorch
as their definitions read. That torch's own checks of operators pass is tested in test_ops.py."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from ntkcl.ops import (
    dissimilarity,
    feature_fusion,
    parallel_adapter,
    philox_keep_mask,
    projection_energy,
    signed_projection,
    token_mix_prompts,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Against a float64 reference of the same inputs, relative to the largest value (0.5 where it is
# smaller: there sums cancel).
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 3e-2}
P = 0.3


def random(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def tensors(dtype, *shapes):
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


# --- the definitions ----------------------------------------------------------------------------


def reference_adapter(x, down, down_bias, up, up_bias, *, scale, residual, p=0.0, mask=None):
    if down.dim() == 3:
        masks = [None] * len(x) if mask is None else mask
        parts = zip(x, down, down_bias, up, up_bias, masks, strict=True)
        return torch.stack(
            [
                reference_adapter(*part[:5], scale=scale, residual=residual, p=p, mask=part[5])
                for part in parts
            ]
        )
    hidden = F.relu(x @ down.t() + down_bias)
    if mask is not None:
        hidden = hidden * mask / (1 - p)
    out = scale * (hidden @ up.t() + up_bias)
    return x + out if residual else out


def reference_prompts(x, weight, norm_weight, norm_bias, *, carried, scale, insert):
    first, own, rest = x.split([1, carried, x.shape[1] - 1 - carried], dim=1)
    mixed = torch.einsum("pn,bnc->bpc", weight, torch.cat([first, rest], dim=1))
    prompts = F.layer_norm(mixed, x.shape[2:], norm_weight, norm_bias, 1e-6)
    if carried:
        prompts = prompts + scale * own
    return torch.cat([first, prompts, rest], dim=1) if insert else prompts


def reference_fusion(channel, patch, weight, bias, head_mask=None, p=0.0):
    value = channel @ weight.t() + bias
    if head_mask is not None:
        heads = value.unflatten(1, (head_mask.shape[1], -1))
        value = (heads * head_mask[:, :, None] / (1 - p)).flatten(1)
    return 0.5 * value + channel + 0.1 * patch


def reference_dissimilarity(features, old, labels, old_labels, kind, temperature):
    z = F.normalize(torch.cat([features, old]), eps=1e-12)
    y = [*labels.tolist(), *old_labels.tolist()]
    n, zero = len(y), features.sum() * 0
    s = z @ z.t() / temperature
    pairs = [[j for j in range(n) if j != i and y[j] == y[i]] for i in range(n)]
    others = [[j for j in range(n) if j != i] for i in range(n)]
    if not any(pairs):
        return zero
    if kind == "release":
        of_pairs = torch.cat([s[i, js] for i, js in enumerate(pairs)])
        return of_pairs.logsumexp(0) - sum(s[i, js].logsumexp(0) for i, js in enumerate(others)) / n
    terms = [
        s[i, others[i]].logsumexp(0) - s[i, pairs[i]].mean() for i in range(len(labels)) if pairs[i]
    ]
    return sum(terms) / len(terms) if terms else zero


def reference_energy(x, basis):
    return (F.normalize(x, eps=1e-12) @ basis).square().sum(1).mean()


def reference_signed(x, direction):
    return (F.normalize(x, eps=1e-12) * direction).sum()


# --- each operator on its arguments -------------------------------------------------------------


def adapter_case(dtype, shape, rank, out, dropped=False, **given):
    c, groups = shape[-1], shape[:1] if given.pop("grouped", False) else ()
    x, *weights = tensors(
        dtype, shape, (*groups, rank, c), (*groups, rank), (*groups, out, rank), (*groups, out)
    )
    settings = {"scale": 0.3, "residual": False} | given
    ours, theirs = dict(settings), dict(settings)
    if dropped:
        ours |= {"p": P, "key": torch.tensor(7)}
        theirs |= {"p": P, "mask": philox_keep_mask(torch.tensor(7), (*shape[:-1], rank), P)}
    return (
        [x, *weights],
        lambda *leaves: parallel_adapter(*leaves, **ours),
        lambda *leaves: reference_adapter(*leaves, **theirs),
    )


def prompts_case(dtype, batch, tokens, width, prompts, carried, insert):
    leaves = tensors(dtype, (batch, tokens + carried, width), (prompts, tokens), (width,), (width,))
    settings = {"carried": carried, "scale": 0.4, "insert": insert}
    return (
        leaves,
        lambda *a: token_mix_prompts(*a, **settings),
        lambda *a: reference_prompts(*a, **settings),
    )


def fusion_case(dtype, batch, width, heads):
    leaves = tensors(dtype, (batch, width), (batch, width), (width, width), (width,))
    mask = (random(batch, heads, seed=9) > 0).to(torch.uint8) if heads else None
    return (
        leaves,
        lambda *a: feature_fusion(*a, head_mask=mask, p=P),
        lambda *a: reference_fusion(*a, mask, P),
    )


def dissimilarity_case(dtype, kind, labels, old_labels, width=5):
    labels, old_labels = (torch.tensor(y, dtype=torch.int64) for y in (labels, old_labels))
    leaves = tensors(dtype, (len(labels), width), (len(old_labels), width))
    # Closer than orthogonal, so that no exponential takes all.
    return (
        leaves,
        lambda x, old: dissimilarity(x, labels, old, old_labels, kind=kind, temperature=0.5),
        lambda x, old: reference_dissimilarity(x, old, labels, old_labels, kind, 0.5),
    )


CASES = {
    "adapter": lambda d: adapter_case(d, (2, 7, 12), 4, 12),
    "adapter of a residual": lambda d: adapter_case(d, (2, 7, 12), 4, 12, residual=True),
    "adapter of other width": lambda d: adapter_case(d, (5, 12), 3, 8),
    "adapter of a vector": lambda d: adapter_case(d, (12,), 3, 12, residual=True),
    "adapter, dropout": lambda d: adapter_case(d, (3, 40, 24), 8, 24, dropped=True, residual=True),
    "adapters": lambda d: adapter_case(d, (3, 2, 5, 12), 4, 12, grouped=True),
    "adapters of residuals": lambda d: adapter_case(
        d, (2, 9, 12), 4, 12, grouped=True, residual=True
    ),
    "adapters, dropout": lambda d: adapter_case(
        d, (3, 2, 9, 12), 4, 12, grouped=True, dropped=True, residual=True
    ),
    "adapter without units": lambda d: adapter_case(d, (2, 7, 12), 0, 12, residual=True),
    "prompts": lambda d: prompts_case(d, 2, 6, 8, 3, 0, insert=False),
    "prompts inserted": lambda d: prompts_case(d, 2, 6, 8, 3, 0, insert=True),
    "prompts carried": lambda d: prompts_case(d, 3, 6, 8, 3, 3, insert=False),
    "prompts replaced": lambda d: prompts_case(d, 3, 6, 8, 3, 3, insert=True),
    "one prompt of one token": lambda d: prompts_case(d, 2, 1, 8, 1, 1, insert=True),
    "fusion": lambda d: fusion_case(d, 4, 12, 0),
    "fusion, heads dropped": lambda d: fusion_case(d, 6, 12, 4),
    "dissimilarity, release": lambda d: dissimilarity_case(d, "release", [0, 1, 0, 2, 1], [1, 3]),
    "dissimilarity, infonce": lambda d: dissimilarity_case(d, "infonce", [0, 1, 0, 2, 1], [1, 3]),
    "dissimilarity, no old": lambda d: dissimilarity_case(d, "release", [4, 4, 1], []),
    "dissimilarity, infonce, no old": lambda d: dissimilarity_case(d, "infonce", [4, 4, 1], []),
    "dissimilarity, old pairs alone": lambda d: dissimilarity_case(d, "infonce", [4, 5], [1, 1]),
    "projection energy": lambda d: (
        tensors(d, (4, 9), (9, 3)),
        projection_energy,
        reference_energy,
    ),
    "signed projection": lambda d: (tensors(d, (4, 9), (9,)), signed_projection, reference_signed),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def with_gradients(function, leaves, wanted=None):
    """The result, and the gradients of a loss that is not linear in it; None where not wanted."""
    leaves = [
        t.detach().clone().requires_grad_(wanted is None or i in wanted)
        for i, t in enumerate(leaves)
    ]
    result = function(*leaves)
    if result.requires_grad:
        (result + 0.5 * result.square()).sum().backward()
    return result.detach(), [t.grad for t in leaves]


@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_its_definition(case, dtype):
    leaves, ours, theirs = case(dtype)
    result, grads = with_gradients(ours, leaves)
    expected, expected_grads = with_gradients(theirs, [t.double() for t in leaves])
    assert result.dtype == dtype
    assert result.shape == expected.shape
    assert result.is_contiguous()
    # In bfloat16 the slope of the loss at a rounded result differs, too.
    for actual, reference in zip([result, *grads], [expected, *expected_grads], strict=True):
        if reference is None:
            reference = torch.zeros_like(actual, dtype=torch.float64)
        assert actual.dtype == dtype
        scale = reference.abs().max().clamp_min(0.5).item() if reference.numel() else 1.0
        error = (actual.double() - reference).abs().max().item() if reference.numel() else 0.0
        assert error <= TOLERANCE[dtype] * scale


@cases
def test_gradcheck(case):
    leaves, ours, _ = case(torch.float64)
    assert torch.autograd.gradcheck(ours, [t.requires_grad_() for t in leaves])


@cases
def test_each_gradient_alone_is_the_same(case):
    leaves, ours, _ = case(torch.float64)
    _, all_grads = with_gradients(ours, leaves)
    for i in range(len(leaves)):
        _, grads = with_gradients(ours, leaves, wanted={i})
        torch.testing.assert_close(grads[i], all_grads[i], rtol=1e-12, atol=1e-14)
        assert all(g is None for j, g in enumerate(grads) if j != i)


@cases
@pytest.mark.parametrize("kind", ["strided", "transposed"])
def test_non_contiguous_arguments(case, kind):
    leaves, ours, _ = case(torch.float64)
    if kind == "strided":
        others = [torch.stack([t, t], dim=-1)[..., 0] for t in leaves]
    else:
        others = [
            t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t for t in leaves
        ]
    result = ours(*leaves)
    # Not through with_gradients, whose clones are dense.
    again = ours(*[t.requires_grad_() for t in others])
    assert again.is_contiguous()
    torch.testing.assert_close(result, again, rtol=1e-12, atol=1e-14)
    (again + 0.5 * again.square()).sum().backward()
    for a, b in zip(with_gradients(ours, leaves)[1], others, strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-12, atol=1e-14)


@cases
def test_in_one_compiled_graph(case):
    torch._dynamo.reset()
    leaves, ours, _ = case(torch.float32)
    result, grads = with_gradients(ours, leaves)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    again, again_grads = with_gradients(compiled, leaves)
    torch.testing.assert_close(result, again)
    for a, b in zip(grads, again_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_one_compiled_graph_for_all_batch_sizes():
    torch._dynamo.reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), []

    def loss(x, labels):
        return dissimilarity(x, labels, x.detach(), labels, kind="release")

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for batch in (3, 5, 8, 9):
        x, labels = random(batch, 6).requires_grad_(), torch.arange(batch) // 2
        (ours,) = torch.autograd.grad(compiled(x, labels), x)
        (eager,) = torch.autograd.grad(loss(x, labels), x)
        torch.testing.assert_close(ours, eager)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1  # none after the first batch


# --- what is particular to one ------------------------------------------------------------------


def test_empty_batches():
    leaves, ours, _ = adapter_case(torch.float32, (0, 7, 12), 4, 12, residual=True)
    result, grads = with_gradients(ours, leaves)
    assert result.shape == (0, 7, 12)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    leaves, ours, _ = prompts_case(torch.float32, 0, 6, 8, 3, 3, insert=True)
    result, grads = with_gradients(ours, leaves)
    assert result.shape == (0, 9, 8)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_an_adapter_of_zeros_is_the_identity():
    x, *weights = (torch.zeros(s) for s in ((2, 5, 12), (4, 12), (4,), (12, 4), (12,)))
    x = x + random(2, 5, 12, dtype=torch.float32)
    assert torch.equal(parallel_adapter(x, *weights, residual=True), x)


def test_adapter_keys_and_masks_agree():
    leaves = tensors(torch.float32, (3, 5, 12), (4, 12), (4,), (12, 4), (12,))
    key = torch.tensor(3)
    mask = philox_keep_mask(key, (3, 5, 4), P)
    by_key, by_mask = (
        with_gradients(lambda *a, given=given: parallel_adapter(*a, p=P, **given), leaves)
        for given in ({"key": key}, {"mask": mask})
    )
    assert torch.equal(by_key[0], by_mask[0])
    assert all(torch.equal(a, b) for a, b in zip(by_key[1], by_mask[1], strict=True))


def test_prompts_do_not_see_the_prompts_they_replace():
    x, weight, norm_weight, norm_bias = tensors(torch.float32, (2, 9, 8), (3, 6), (8,), (8,))
    other = x.clone()
    other[:, 1:4] = 5.0
    first, second = (
        token_mix_prompts(t, weight, norm_weight, norm_bias, carried=3, scale=0.0)
        for t in (x, other)
    )
    assert torch.equal(first, second)


def test_a_batch_without_pairs_pulls_nothing():
    for kind in ("release", "infonce"):
        for labels, old_labels in (([1, 2, 3], [4]), ([1], []), ([], [])):
            leaves, ours, _ = dissimilarity_case(torch.float32, kind, labels, old_labels)
            loss, grads = with_gradients(ours, leaves)
            assert loss.item() == 0.0
            assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_zero_rows_have_the_gradients_of_a_division_by_1e_12():
    # The first task's kept rows are zeros in the released method.
    features = random(4, 6).requires_grad_()
    old = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2])
    for kind in ("release", "infonce"):
        loss = dissimilarity(features, labels, old, torch.arange(3), kind=kind, temperature=0.1)
        reference = reference_dissimilarity(features, old, labels, torch.arange(3), kind, 0.1)
        torch.testing.assert_close(loss, reference)
        ours, theirs = (torch.autograd.grad(v, (features, old)) for v in (loss, reference))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_a_short_row_is_divided_by_1e_12_in_every_type():
    direction = torch.tensor([1.0, 2.0, 3.0])
    for dtype in DTYPES:
        x = torch.tensor([[0.5e-12, 0.5e-12, 0.0]], dtype=dtype, requires_grad=True)
        signed_projection(x, direction.to(dtype)).backward()
        torch.testing.assert_close(x.grad, direction[None].to(dtype) * 1e12, rtol=8e-3, atol=0)


def test_no_rows_have_no_energy():
    x = torch.zeros(0, 4, requires_grad=True)
    energy = projection_energy(x, torch.eye(4)[:, :2])
    energy.backward()
    assert energy.item() == 0
    assert x.grad.shape == (0, 4)


def test_not_a_number_goes_through_losses():
    x = random(3, 4)
    x[1, 2] = math.nan
    basis = torch.linalg.qr(random(4, 2, seed=1)).Q
    assert projection_energy(x, basis).isnan()
    assert signed_projection(x, basis[:, 0]).isnan()
    labels = torch.tensor([0, 0, 1])
    for kind in ("release", "infonce"):
        assert dissimilarity(x, labels, x[:0], labels[:0], kind=kind).isnan()


def test_energy_within_and_beside_the_subspace():
    basis = torch.linalg.qr(random(6, 6)).Q
    inside, beside = (
        random(3, 2, seed=1) @ basis[:, :2].t(),
        random(3, 4, seed=2) @ basis[:, 2:].t(),
    )
    assert projection_energy(inside, basis[:, :2]).item() == pytest.approx(1.0)
    assert projection_energy(beside, basis[:, :2]).item() == pytest.approx(0.0, abs=1e-15)
    assert projection_energy(beside, basis[:, :0]).item() == 0.0


def test_autocast_keeps_the_types_of_parameters():
    x, *weights = tensors(torch.float32, (2, 7, 12), (4, 12), (4,), (12, 4), (12,))
    mixing = tensors(torch.float32, (3, 7), (12,), (12,))
    leaves = [t.requires_grad_() for t in (*weights, *mixing)]
    with torch.autocast("cpu", torch.bfloat16):
        adapted = parallel_adapter(x.bfloat16(), *weights, residual=True)
        prompted = token_mix_prompts(adapted, *mixing)
        features = prompted[:, 0]
        fused = feature_fusion(features, features, torch.eye(12), torch.zeros(12))
        loss = projection_energy(fused, torch.eye(12)[:, :3])
        loss = loss + signed_projection(fused, torch.ones(12))
        loss = loss + dissimilarity(fused, torch.tensor([1, 1]), fused[:0], torch.arange(0))
    assert adapted.dtype == prompted.dtype == torch.bfloat16
    assert fused.dtype == loss.dtype == torch.float32
    loss.backward()
    assert all(t.grad is None or t.grad.dtype == torch.float32 for t in leaves)
    assert weights[0].grad.abs().sum() > 0


def test_errors():
    x, down, down_bias, up, up_bias = (
        torch.zeros(s) for s in ((2, 7, 12), (4, 12), (4,), (12, 4), (12,))
    )
    where = r"^\[parallel_adapter\] expected "
    with pytest.raises(TypeError, match=where + "x of float32, float64 or bfloat16, got Half"):
        parallel_adapter(x.half(), down, down_bias, up, up_bias)
    with pytest.raises(TypeError, match=where + "down_weight of x's type Float, got Double"):
        parallel_adapter(x, down.double(), down_bias, up, up_bias)
    with pytest.raises(ValueError, match=where + r"x \(\.\.\., C\) for down_weight \[4, 12\]"):
        parallel_adapter(x[..., :5], down, down_bias, up, up_bias)
    with pytest.raises(
        ValueError, match=where + r"x \(g, \.\.\., C\) for down_weight \[3, 4, 12\]"
    ):
        parallel_adapter(x, down.expand(3, 4, 12), down_bias, up, up_bias)
    with pytest.raises(ValueError, match=where + r"up_weight \(D, r\) for down_weight \[4, 12\]"):
        parallel_adapter(x, down, down_bias, up_bias, up_bias)
    with pytest.raises(ValueError, match=where + r"up_weight of shape \[8, 4\], got \[8, 3\]"):
        parallel_adapter(x, down, down_bias, up[:8, :3], up_bias)
    with pytest.raises(ValueError, match=where + "up_weight with 12 outputs, as x is added"):
        parallel_adapter(x, down, down_bias, up[:8], up_bias[:8], residual=True)
    with pytest.raises(ValueError, match=where + r"up_bias of shape \[12\], got \[1\]"):
        parallel_adapter(x, down, down_bias, up, up_bias[:1])
    with pytest.raises(ValueError, match=where + r"mask of the hidden units' shape \[2, 7, 4\]"):
        parallel_adapter(x, down, down_bias, up, up_bias, p=P, mask=torch.ones(2, 4).byte())
    with pytest.raises(ValueError, match=where + "a dropout probability 0 <= p < 1, got 1"):
        parallel_adapter(x, down, down_bias, up, up_bias, p=1.0)

    weight, norm = torch.zeros(3, 7), torch.zeros(12)
    where = r"^\[token_mix_prompts\] expected "
    with pytest.raises(ValueError, match=where + r"x \(B, 7, C\) of 7 tokens and 0 prompts"):
        token_mix_prompts(x[:, :6], weight, norm, norm)
    with pytest.raises(ValueError, match=where + "carried 0 or 3, as many as are made, got 2"):
        token_mix_prompts(x, weight, norm, norm, carried=2)
    with pytest.raises(ValueError, match=where + r"norm_bias of shape \[12\], got \[11\]"):
        token_mix_prompts(x, weight, norm, norm[1:])
    with pytest.raises(ValueError, match=where + "eps >= 0"):
        token_mix_prompts(x, weight, norm, norm, eps=-1.0)

    features, square = torch.zeros(2, 12), torch.zeros(12, 12)
    where = r"^\[feature_fusion\] expected "
    with pytest.raises(ValueError, match=where + r"weight of shape \[12, 12\], got \[4, 12\]"):
        feature_fusion(features, features, down, norm)
    with pytest.raises(ValueError, match=where + r"head_mask \(2, H\) with H a divisor of 12"):
        feature_fusion(features, features, square, norm, head_mask=torch.ones(2, 5).byte())
    with pytest.raises(ValueError, match=where + "a dropout probability 0 <= p < 1, got 5"):
        feature_fusion(features, features, square, norm, p=5.0)
    with pytest.raises(TypeError, match=where + "head_mask of uint8 or bool, got Float"):
        feature_fusion(features, features, square, norm, head_mask=torch.ones(2, 4))

    labels = torch.zeros(2).long()
    where = r"^\[dissimilarity\] expected "
    with pytest.raises(ValueError, match=where + "kind 'release' or 'infonce', got 'mean'"):
        dissimilarity(features, labels, features, labels, kind="mean")
    with pytest.raises(ValueError, match=where + "a temperature above 0, got 0"):
        dissimilarity(features, labels, features, labels, temperature=0)
    with pytest.raises(TypeError, match=where + "labels of int64, got Float"):
        dissimilarity(features, labels.float(), features, labels)
    with pytest.raises(ValueError, match=where + r"old_labels of shape \[2\], got \[1\]"):
        dissimilarity(features, labels, features, labels[:1])
    with pytest.raises(ValueError, match=where + r"old \(R, 12\), got \[2, 5\]"):
        dissimilarity(features, labels, features[:, :5], labels)

    with pytest.raises(ValueError, match=r"^\[projection_energy\] expected basis \(12, k\)"):
        projection_energy(features, features)
    with pytest.raises(ValueError, match=r"^\[signed_projection\] expected direction of shape"):
        signed_projection(features, norm[1:])
