"""Times each operator beside plain PyTorch eager code that computes the same.

    python benchmarks/ops.py                       # CPU, one thread
    python benchmarks/ops.py --device cuda --json ops.json

Both sides are verified against each other first, then run by turns in the same process; a time is
the minimum over the rounds (the machine may be shared), and a ratio above 1 means that ours is
faster.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

import ntkcl
from ntkcl import _C
from ntkcl.ops import (
    adam_step_,
    attention,
    bias_relu_dropout,
    composed_linear,
    dissimilarity,
    feature_fusion,
    gelu,
    parallel_adapter,
    philox_keep_mask,
    projection_energy,
    residual_layer_norm,
    section_cosine,
    sgd_step_,
    signed_projection,
    token_mix_prompts,
)

Step = Callable[[], list[torch.Tensor]]


@dataclass
class Case:
    name: str
    sizes: dict[str, int]
    ours: Step
    theirs: Step
    verify: Callable[[], None]
    bytes_moved: int  # the least that must be read and written


def gradients(outputs: torch.Tensor, grad: torch.Tensor, *inputs: torch.Tensor):
    return [outputs, *torch.autograd.grad(outputs, inputs, grad)]


def attention_case(
    batch: int, heads: int, width: int, dtype: torch.dtype, device: str, backward: bool, fused: bool
) -> Case:
    tokens = 197
    columns = heads * width
    qkv = torch.randn(
        batch, tokens, 3 * columns, dtype=dtype, device=device, requires_grad=backward
    )
    grad = torch.randn(batch, tokens, columns, dtype=dtype, device=device)

    def ours():
        out = attention(qkv, heads)
        return gradients(out, grad, qkv) if backward else [out]

    def theirs():
        query, key, value = qkv.unflatten(2, (3, heads, width)).permute(2, 0, 3, 1, 4)
        if fused:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query * width**-0.5 @ key.transpose(2, 3)).softmax(-1) @ value
        out = mixed.transpose(1, 2).flatten(2)
        return gradients(out, grad, qkv) if backward else [out]

    return Case(
        f"attention, torch {'fused' if fused else 'plain'}" + (" + backward" if backward else ""),
        {"batch": batch, "tokens": tokens, "heads": heads, "width": width},
        ours,
        theirs,
        lambda: check(ours(), theirs()),
        qkv.element_size() * batch * tokens * columns * (8 if backward else 4),
    )


def dropout_case(rows: int, width: int, dtype: torch.dtype, device: str, backward: bool) -> Case:
    p = 0.1
    x = torch.randn(rows, width, dtype=dtype, device=device, requires_grad=backward)
    bias = torch.randn(width, dtype=dtype, device=device, requires_grad=backward)
    grad = torch.randn(rows, width, dtype=dtype, device=device)
    key = torch.tensor(1, device=device)

    def ours():
        y = bias_relu_dropout(x, bias, p, key=key)
        return gradients(y, grad, x, bias) if backward else [y]

    def theirs():
        y = F.dropout(F.relu(x + bias), p)
        return gradients(y, grad, x, bias) if backward else [y]

    def verify():
        mask = philox_keep_mask(key, (rows, width), p)
        expected = F.relu(x + bias) * mask / (1 - p)
        check(ours(), gradients(expected, grad, x, bias) if backward else [expected])

    element = x.element_size()
    return Case(
        "bias_relu_dropout" + (" + backward" if backward else ""),
        {"rows": rows, "width": width},
        ours,
        theirs,
        verify,
        rows * width * element * (5 if backward else 2),
    )


def gelu_case(rows: int, width: int, dtype: torch.dtype, device: str, backward: bool) -> Case:
    x = torch.randn(rows, width, dtype=dtype, device=device, requires_grad=backward)
    grad = torch.randn(rows, width, dtype=dtype, device=device)

    def run(function: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        y = function(x)
        return gradients(y, grad, x) if backward else [y]

    return Case(
        "gelu" + (" + backward" if backward else ""),
        {"rows": rows, "width": width},
        lambda: run(gelu),
        lambda: run(F.gelu),
        lambda: check(run(gelu), run(F.gelu)),
        rows * width * x.element_size() * (5 if backward else 2),
    )


def layer_norm_case(rows: int, width: int, dtype: torch.dtype, device: str, backward: bool) -> Case:
    """A float32 stream, and an update and a result of `dtype`; the LayerNorm is frozen."""

    def make(*shape, dtype=torch.float32):
        return torch.randn(*shape, dtype=dtype, device=device)

    x, update = make(rows, width), make(rows, width, dtype=dtype)
    weight, bias = make(width), make(width)
    grads = make(rows, width), make(rows, width, dtype=dtype)
    leaves = [t.requires_grad_(backward) for t in (x, update)]

    def theirs_of(x, update):
        total = x + update
        return total, F.layer_norm(total, (width,), weight, bias, 1e-6).to(dtype)

    def run(function):
        results = function(*leaves)
        return [*results, *torch.autograd.grad(results, leaves, grads)] if backward else results

    def ours():
        return run(lambda x, u: residual_layer_norm(x, u, weight, bias, 1e-6, dtype))

    def theirs():
        return run(theirs_of)

    return Case(
        "residual_layer_norm" + (" + backward" if backward else ""),
        {"rows": rows, "width": width},
        ours,
        theirs,
        lambda: check(ours(), theirs()),
        rows * width * ((20 + 4 * update.element_size()) if backward else
                        (8 + 2 * update.element_size())),
    )  # fmt: skip


def mask_case(n: int, device: str) -> Case:
    key = torch.tensor(1, device=device)
    draws = torch.empty(n, device=device)

    def verify():
        kept = philox_keep_mask(key, (n,), 0.5).double().mean().item()
        assert abs(kept - 0.5) < 5 / n**0.5, f"half should be kept, got {kept}"

    return Case(
        "philox_keep_mask",
        {"elements": n},
        lambda: [philox_keep_mask(key, (n,), 0.1)],
        lambda: [draws.bernoulli_(0.9).to(torch.uint8)],
        verify,
        n,
    )


def cosine_case(
    batch: int, classes: int, sections: int, width: int, dtype: torch.dtype, device: str, backward
) -> Case:
    def make(*shape):
        return torch.randn(*shape, dtype=dtype, device=device, requires_grad=backward)

    x, prototypes = make(batch, sections * width), make(classes, sections * width)
    weights = make(sections)
    grad = torch.randn(batch, classes, dtype=dtype, device=device)

    def ours():
        scores = section_cosine(x, prototypes, weights)
        return gradients(scores, grad, x, prototypes, weights) if backward else [scores]

    def theirs():
        parts = zip(x.split(width, 1), prototypes.split(width, 1), weights, strict=True)
        scores = sum(w * F.normalize(a) @ F.normalize(b).t() for a, b, w in parts)
        return gradients(scores, grad, x, prototypes, weights) if backward else [scores]

    rows = batch + classes
    element = x.element_size()
    return Case(
        "section_cosine" + (" + backward" if backward else ""),
        {"batch": batch, "classes": classes, "sections": sections, "width": width},
        ours,
        theirs,
        lambda: check(ours(), theirs()),
        element * rows * sections * width * (3 if backward else 1),
    )


def composed_case(
    rows: int, width: int, modules: int, dtype: torch.dtype, device: str, backward: bool
) -> Case:
    """q, k and v with `modules` old LoRA modules of rank 16 beside the current one."""
    rank, scale = 16, [1 / 16] * 3

    def make(*shape, grad=False):
        return torch.randn(*shape, dtype=dtype, device=device, requires_grad=grad and backward)

    x, weight, bias = make(rows, width, grad=True), make(3, width, width), make(3 * width)
    down, up = make(3, width, rank, grad=True), make(3, rank, width, grad=True)
    old_down, old_up = make(3, width, modules * rank), make(3, modules * rank, width)
    omega = make(3, modules, grad=True)
    grad = torch.randn(rows, 3 * width, dtype=dtype, device=device)
    leaves = (x, down, up, omega)

    def ours():
        y = composed_linear(
            *(x, weight, bias, down, up, scale),
            **{"old_down": old_down, "old_up": old_up, "omega": omega, "omega_scale": scale},
        )
        return gradients(y, grad, *leaves) if backward else [y]

    def theirs():
        a, b = old_down.chunk(modules, 2), old_up.chunk(modules, 1)
        w = weight.transpose(1, 2) + scale[0] * (down @ up)
        for i in range(modules):
            w = w + scale[0] * omega[:, i, None, None] * (a[i] @ b[i])
        y = torch.cat([x @ matrix for matrix in w], 1) + bias
        return gradients(y, grad, *leaves) if backward else [y]

    return Case(
        "composed_linear" + (" + backward" if backward else ""),
        {"rows": rows, "width": width, "modules": modules},
        ours,
        theirs,
        lambda: check(ours(), theirs()),
        x.element_size() * (rows * width * (8 if backward else 4) + 3 * width * width),
    )


def case_of(
    name: str,
    sizes: dict[str, int],
    leaves: list[torch.Tensor],
    ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
    backward: bool,
    least_bytes: int,
) -> Case:
    """Two functions of the same leaves, all of which want a gradient with `backward`."""
    for leaf in leaves:
        leaf.requires_grad_(backward)
    grad = torch.randn_like(ours(*leaves).detach())

    def run(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t if t.dtype == dtype else t.detach().to(dtype) for t in leaves]
        inputs = [t.requires_grad_(backward) for t in inputs]
        result = function(*inputs)
        return gradients(result, grad.to(dtype), *inputs) if backward else [result]

    def verify() -> None:
        # Where bfloat16 rounds a hidden unit to the other side of 0, both are off, differently.
        results = run(ours, grad.dtype), run(theirs, grad.dtype), run(theirs, torch.float64)
        for a, b, exact in zip(*results, strict=True):
            off, theirs_off = ((t.double() - exact).norm() / exact.norm() for t in (a, b))
            assert off < 2 * theirs_off + 1e-6, f"{name} is off by {off:.1e}, not {theirs_off:.1e}"

    return Case(
        name + (" + backward" if backward else ""),
        sizes,
        lambda: run(ours, grad.dtype),
        lambda: run(theirs, grad.dtype),
        verify,
        least_bytes,
    )


def adapter_case(rows: int, width: int, dtype: torch.dtype, device: str, backward: bool) -> Case:
    """An adapter of rank 16 in its residual stream."""
    rank, scale = 16, 0.1
    shapes = [(rows, width), (rank, width), (rank,), (width, rank), (width,)]
    leaves = [torch.randn(s, dtype=dtype, device=device) / width**0.5 for s in shapes]
    return case_of(
        "parallel_adapter",
        {"rows": rows, "width": width},
        leaves,
        lambda x, *w: parallel_adapter(x, *w, scale=scale, residual=True),
        lambda x, d, db, u, ub: x + scale * F.linear(F.relu(F.linear(x, d, db)), u, ub),
        backward,
        leaves[0].element_size() * rows * width * (6 if backward else 2),
    )


def prompts_case(width: int, dtype: torch.dtype, device: str, backward: bool) -> Case:
    """Ten prompts of a batch of 16, in the place of those from the block before."""
    batch, tokens, prompts, scale = 16, 197, 10, 0.1
    shapes = [(batch, tokens + prompts, width), (prompts, tokens), (width,), (width,)]
    leaves = [torch.randn(s, dtype=dtype, device=device) for s in shapes]

    def theirs(x, weight, norm_weight, norm_bias):
        first, carried, rest = x.split([1, prompts, tokens - 1], 1)
        mixed = weight @ torch.cat([first, rest], 1)
        new = F.layer_norm(mixed, (width,), norm_weight, norm_bias, 1e-6) + scale * carried
        return torch.cat([first, new, rest], 1)

    return case_of(
        "token_mix_prompts",
        {"batch": batch, "tokens": tokens, "prompts": prompts, "width": width},
        leaves,
        lambda *a: token_mix_prompts(*a, carried=prompts, scale=scale),
        theirs,
        backward,
        leaves[0].element_size() * leaves[0].numel() * (5 if backward else 2),
    )


def fusion_case(batch: int, width: int, dtype: torch.dtype, device: str, backward: bool) -> Case:
    shapes = [(batch, width), (batch, width), (width, width), (width,)]
    leaves = [torch.randn(s, dtype=dtype, device=device) / width**0.25 for s in shapes]
    mask = (torch.arange(batch * 8, device=device) % 9 > 0).view(batch, 8)

    def theirs(channel, patch, weight, bias):
        value = F.linear(channel, weight, bias).unflatten(1, (8, -1))
        value = (value * (mask.to(value.dtype) / 0.9).unsqueeze(2)).flatten(1)
        return 0.5 * value + channel + 0.1 * patch

    return case_of(
        "feature_fusion",
        {"batch": batch, "width": width},
        leaves,
        lambda *a: feature_fusion(*a, head_mask=mask, p=0.1),
        theirs,
        backward,
        leaves[0].element_size() * width * (width + 3 * batch) * (3 if backward else 1),
    )


def dissimilarity_case(batch: int, width: int, device: str, backward: bool) -> Case:
    """As released, a batch and as many old rows."""
    rows = torch.randn(2 * batch, width, device=device)
    labels, old_labels = torch.arange(batch, device=device) // 2, torch.arange(batch, device=device)
    old = rows[batch:].clone()

    def theirs(x):
        z = F.normalize(torch.cat([x, old]))
        y = torch.cat([labels, old_labels + 1000])
        s, others = z @ z.t() / 0.1, ~torch.eye(len(y), dtype=torch.bool, device=device)
        positive = (y[:, None] == y[None]) & others
        rest = s.masked_fill(~others, float("-inf")).logsumexp(1).mean()
        return s[positive].logsumexp(0) - rest

    def ours(x):
        return dissimilarity(x, labels, old, old_labels + 1000, kind="release")

    return case_of(
        "dissimilarity",
        {"batch": batch, "old": batch, "width": width},
        [rows[:batch].clone()],
        ours,
        theirs,
        backward,
        4 * rows.numel() * (2 if backward else 1),
    )


def signed_case(batch: int, width: int, device: str, backward: bool) -> Case:
    direction, x = torch.randn(width, device=device), torch.randn(batch, width, device=device)
    return case_of(
        "signed_projection",
        {"batch": batch, "width": width},
        [x],
        lambda x: signed_projection(x, direction),
        lambda x: (F.normalize(x) * direction.to(x.dtype)).sum(),
        backward,
        4 * (width + x.numel()) * (2 if backward else 1),
    )


def energy_case(batch: int, width: int, device: str, backward: bool) -> Case:
    """A batch beside 40 old directions, which are a constant."""
    basis = torch.linalg.qr(torch.randn(width, 40)).Q.to(device)
    x = torch.randn(batch, width, device=device)
    return case_of(
        "projection_energy",
        {"batch": batch, "width": width, "directions": 40},
        [x],
        lambda x: projection_energy(x, basis),
        lambda x: (F.normalize(x) @ basis.to(x.dtype)).square().sum(1).mean(),
        backward,
        4 * (basis.numel() + x.numel()) * (2 if backward else 1),
    )


def step_case(kind: str, width: int, device: str) -> Case:
    """A step on NTK-CL's adapters, prompts and fusion of 12 blocks, with a pull to the task before
    and a running average, beside the same by torch's multi-tensor operators."""
    rate, decay, weight, average = 0.01, 5e-4, 1e-3, 0.9
    shapes = [(12, 16, width), (12, 16), (12, width, 16), (12, width), (12, 10, 197), (12, width)]
    shapes += [(12, width)] + 3 * [(2 * width, 2 * width), (2 * width,)]

    def make() -> list[torch.Tensor]:
        return [torch.randn(*shape, device=device) for shape in shapes]

    given, anchors = make(), make()
    state = [make(), make(), [t.square() for t in make()], make()]
    steps = torch.tensor(10.0, device=device)
    own, their = ([[t.clone() for t in tensors] for tensors in state] for _ in range(2))

    def ours():
        parameters, first, second, averages = own
        more = {"anchors": anchors, "anchor_weight": weight, "weight_decay": decay}
        more |= {"averages": averages, "average_decay": average}
        if kind == "sgd":
            sgd_step_(parameters, given, first, lr=rate, momentum=0.9, **more)
        else:
            adam_step_(parameters, given, first, second, steps, lr=rate, **more)
        return [*parameters, *averages]

    def theirs():
        parameters, first, second, averages = their
        moved = torch._foreach_sub(parameters, anchors)
        torch.stack(torch._foreach_norm(moved)).square().sum()
        pulled = torch._foreach_add(given, moved, alpha=2 * weight)
        if kind == "sgd":
            torch._fused_sgd_(
                parameters, pulled, first, weight_decay=decay, momentum=0.9, lr=rate,
                dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip
        else:
            torch._fused_adamw_(
                parameters, pulled, first, second, [], [steps] * len(parameters), lr=rate,
                beta1=0.9, beta2=0.999, weight_decay=decay, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip
        torch._foreach_lerp_(averages, parameters, 1 - average)
        return [*parameters, *averages]

    count = sum(t.numel() for t in given)
    return Case(
        f"{kind}_step_",
        {"width": width, "parameters": count},
        ours,
        theirs,
        lambda: check(ours(), theirs()),
        4 * count * (8 if kind == "sgd" else 10),
    )


def sam_case(kind: str, width: int, branches: int, device: str) -> Case:
    """A step of SAM or SAM+ on adapters of 12 blocks, beside the loops over modules of the
    published way; gradients are given, so that the optimiser alone is timed."""
    rank, blocks, rho, tau, rate, momentum, decay = 64, 12, 0.01, 25.0, 0.01, 0.9, 5e-4
    shapes = [(rank, width), (rank,), (width, rank), (width,)]
    make = [torch.randn(branches, blocks, *shape, device=device) for shape in shapes]
    stacked = [t.clone() for t in make]
    given = [[torch.randn_like(t) for t in make] for _ in range(2)]
    group = _C.ParameterGroup("adapters", stacked, stacked_dims=2)
    keys = {"rho": rho, "tau": tau, "momentum": momentum, "weight_decay": decay}
    optimizer = _C.make_optimizer({"optimizer": kind} | keys, [group])
    optimizer.set_learning_rate(rate)

    def fill(number: int) -> None:
        for parameter, gradient in zip(stacked, given[number], strict=True):
            parameter.grad = gradient

    def ours():
        optimizer.step(fill)
        return stacked

    apart = [t.clone() for stack in make for t in stack.flatten(0, 1)]
    first, second = ([t for stack in g for t in stack.flatten(0, 1)] for g in given)
    velocity = [torch.zeros_like(t) for t in apart]

    def theirs():
        norm = torch.stack([g.norm() for g in first]).norm()
        ascent = [g * (rho / (norm + 1e-16)) for g in first]
        for p, e in zip(apart, ascent, strict=True):
            p.add_(e)
        for p, e in zip(apart, ascent, strict=True):
            p.sub_(e)
        for p, g, v, e in zip(apart, second, velocity, ascent, strict=True):
            v.mul_(momentum).add_(g + decay * p)
            damping = 1.0
            if kind == "sam+":
                cos = (v * e).sum() / (v.norm() * e.norm())
                damping = (tau * (1 - torch.exp(cos - 1))).clamp(0, 1)
            p.sub_(rate * damping * v)
        return apart

    def verify() -> None:
        check([t for stack in ours() for t in stack.flatten(0, 1)], theirs())

    count = sum(t.numel() for t in stacked)
    return Case(
        f"{kind} step",
        {"width": width, "branches": branches, "parameters": count},
        ours,
        theirs,
        verify,
        4 * count * 9,
    )


def check(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        tolerance = 2e-2 if a.dtype == torch.bfloat16 else 1e-5
        error = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        assert error < tolerance, f"relative difference {error:.1e}, allowed {tolerance:.0e}"


def seconds(step: Step, repeats: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(case: Case, rounds: int, device: str) -> tuple[float, float]:
    """Least seconds of ours and theirs, run by turns."""
    case.verify()
    once = max(seconds(case.ours, 3, device), 1e-6)
    repeats = max(1, int(0.005 / once))
    times = [
        (seconds(case.ours, repeats, device), seconds(case.theirs, repeats, device))
        for _ in range(rounds)
    ]
    ours, theirs = zip(*times, strict=True)
    return min(ours), min(theirs)


def cases(device: str):
    # Attention in ViT-Ti and ViT-B at batch 16; the adapter's middle in ViT-B at batch 16 (3152 x
    # 16), a whole MLP's activation, and a large matrix for the GPU; the inside of an MLP and its
    # LayerNorm in both; scores of a training batch and of an evaluation batch; q, k and v of ViT-Ti
    # and ViT-B in the second and the tenth task; NTK-CL's adapters, prompts and fusion of both.
    heights = [(3152, 16), (3152, 3072)] + ([(197 * 256, 3072)] if device == "cuda" else [])
    for dtype in (torch.float32, torch.bfloat16):
        for heads in (3, 12):
            for fused in (False, True):
                for backward in (False, True):
                    yield dtype, attention_case(16, heads, 64, dtype, device, backward, fused)
        for rows, width in heights:
            for backward in (False, True):
                yield dtype, dropout_case(rows, width, dtype, device, backward)
        for width in (192, 768):
            for backward in (False, True):
                yield dtype, gelu_case(3152, 4 * width, dtype, device, backward)
                yield dtype, layer_norm_case(3152, width, dtype, device, backward)
        for batch, classes, sections in ((48, 10, 1), (96, 100, 2), (256, 345, 3)):
            for backward in (False, True):
                yield dtype, cosine_case(batch, classes, sections, 768, dtype, device, backward)
        for width, modules in ((192, 1), (192, 9), (768, 1), (768, 9)):
            for backward in (False, True):
                yield dtype, composed_case(3152, width, modules, dtype, device, backward)
        for width in (192, 768):
            for backward in (False, True):
                yield dtype, adapter_case(3152, width, dtype, device, backward)
                yield dtype, prompts_case(width, dtype, device, backward)
                yield dtype, fusion_case(16, 2 * width, dtype, device, backward)
    # What is computed of whole images' features is float32's.
    for width in (384, 1536):
        for backward in (False, True):
            yield torch.float32, dissimilarity_case(16, width, device, backward)
            yield torch.float32, energy_case(16, width, device, backward)
            yield torch.float32, signed_case(16, width, device, backward)
    # NTK-CL's parameters and RAA's two branches on ViT-Ti and ViT-B.
    for width in (192, 768):
        for kind in ("sgd", "adam"):
            yield torch.float32, step_case(kind, width, device)
        for kind in ("sam", "sam+"):
            yield torch.float32, sam_case(kind, width, 2, device)
    yield torch.uint8, mask_case(1 << 20, device)
    yield torch.uint8, mask_case(1 << 25, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--matmul-precision",
        choices=["highest", "high", "medium"],
        default="highest",
        help="torch.set_float32_matmul_precision, for both sides (default: highest)",
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="operators whose names begin so")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision(arguments.matmul_precision)
    torch.manual_seed(0)

    device = arguments.device
    print(f"torch {torch.__version__}, {device}, {arguments.threads} CPU thread(s)")
    print(f"{'operator':34} {'type':9} {'ours us':>10} {'torch us':>10} {'ratio':>6} {'GB/s':>7}")
    results = []
    for dtype, case in cases(device):
        if not case.name.startswith(arguments.only):
            continue
        ours, theirs = measure(case, arguments.rounds, device)
        kind = str(dtype).removeprefix("torch.")
        print(
            f"{case.name:34} {kind:9} {ours * 1e6:10.1f} {theirs * 1e6:10.1f} {theirs / ours:6.2f}"
            f" {case.bytes_moved / ours * 1e-9:7.2f}  {case.sizes}"
        )
        results.append(
            {
                "operator": case.name,
                "dtype": kind,
                **case.sizes,
                "seconds": ours,
                "pytorch_seconds": theirs,
                "ratio": theirs / ours,
                "bytes_moved": case.bytes_moved,
            }
        )
    if arguments.json:
        report = {
            "ntkcl": ntkcl.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": arguments.threads,
            "matmul_precision": arguments.matmul_precision,
            "rounds": arguments.rounds,
            "results": results,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
