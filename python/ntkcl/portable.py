"""The operators that a model scores with, in torch's own: what lets a program of torch.export run,
and become ONNX, where ntkcl is not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def portable(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program without operators of ntkcl. Results differ by rounding.

    Raises:
      ValueError: the program has one that is not for scoring.
    """
    plain: torch.export.ExportedProgram = program.run_decompositions(dict(_TABLE))
    for node in plain.graph.nodes:
        if str(node.target).startswith("ntkcl."):
            raise ValueError(f"[portable] expected operators for scoring, got {node.target}")
    return plain


def _attention(qkv: Tensor, heads: int, gate: Tensor | None, prompts: int) -> Tensor:
    q, k, v = (torch.unflatten(part, 2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, 2))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if gate is None:
        mixed = scores.softmax(-1) @ v
    else:
        mixed = _others(scores, 3, prompts).softmax(-1) @ _others(v, 2, prompts)
        apart = scores.narrow(3, 1, prompts).softmax(-1) @ v.narrow(2, 1, prompts)
        mixed = mixed + gate[:, None, None] * apart
    return torch.flatten(mixed.transpose(1, 2), 2)


def _others(tokens: Tensor, dim: int, prompts: int) -> Tensor:
    """All but the prompts, which follow the class token."""
    rest = tokens.narrow(dim, 1 + prompts, tokens.shape[dim] - 1 - prompts)
    return torch.cat([tokens.narrow(dim, 0, 1), rest], dim)


def _residual_layer_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x if update is None else x + update
    out, mean, scale = torch.native_layer_norm(total, [x.shape[-1]], weight, bias, eps)
    kept = x.new_zeros(0) if update is None else total
    return kept, out.to(dtype or x.dtype), mean.squeeze(-1), scale.squeeze(-1)


def _bias_relu_dropout(
    x: Tensor, bias: Tensor, mask: Tensor | None, key: Tensor | None, p: float
) -> Tensor:
    if mask is not None or key is not None:
        raise ValueError("[portable] expected no dropout in a program that scores")
    if bias.dim() == 2:  # one for each of several adapters side by side
        bias = bias.reshape(bias.shape[0], *[1] * (x.dim() - 2), bias.shape[1])
    return (x + bias).relu()


def _composed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Sequence[float],
    old_down: Tensor | None = None,
    old_up: Tensor | None = None,
    omega: Tensor | None = None,
    omega_scale: Sequence[float] = (),
    composed: bool = False,
    probe: Tensor | None = None,  # for gradients alone
) -> Tensor:
    if not composed:
        matrices = [weight[j].T + s * (down[j] @ up[j]) for j, s in enumerate(scale)]
        if old_down is not None and old_up is not None and omega is not None:
            rank = old_down.shape[2] // omega.shape[1]
            shares = omega.repeat_interleave(rank, 1)  # of each column of the old modules
            matrices = [
                matrix + s * ((old_down[j] * shares[j]) @ old_up[j])
                for j, (matrix, s) in enumerate(zip(matrices, omega_scale, strict=True))
            ]
        weight = torch.stack(matrices).transpose(1, 2)
    return F.linear(x, weight.flatten(0, 1), bias)


def _feature_fusion(
    channel: Tensor,
    patch: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_mask: Tensor | None = None,
    p: float = 0.0,
    value_scale: float = 0.5,
    patch_scale: float = 0.1,
) -> Tensor:
    if head_mask is not None:
        raise ValueError("[portable] expected no dropout in a program that scores")
    return value_scale * F.linear(channel, weight, bias) + channel + patch_scale * patch


def _parallel_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    scale: float = 1.0,
    residual: bool = False,
    mask: Tensor | None = None,
    key: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    if mask is not None or key is not None:
        raise ValueError("[portable] expected no dropout in a program that scores")

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        # One for each of several adapters side by side.
        product = torch.bmm(x.flatten(1, -2), weight.transpose(1, 2)) + bias.unsqueeze(1)
        return product.reshape(*x.shape[:-1], weight.shape[1])

    inner = linear(x, down_weight, down_bias).relu()
    out = scale * linear(inner, up_weight, up_bias)
    return (x + out if residual else out), inner


def _token_mix_prompts(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    carried: int = 0,
    scale: float = 1.0,
    eps: float = 1e-6,
    insert: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = _others(x, 1, carried) if carried else x
    mixed = weight @ own
    prompts, mean, norm_scale = torch.native_layer_norm(
        mixed, [x.shape[-1]], norm_weight, norm_bias, eps
    )
    if carried:
        prompts = prompts + scale * x.narrow(1, 1, carried)
    if insert:
        rest = own.narrow(1, 1, own.shape[1] - 1)
        prompts = torch.cat([x.narrow(1, 0, 1), prompts, rest], 1)
    return prompts, mixed, mean.squeeze(-1), norm_scale.squeeze(-1)


def _section_cosine(x: Tensor, prototypes: Tensor, weights: Tensor) -> Tensor:
    sections = weights.shape[0]
    unit, others = (
        F.normalize(torch.unflatten(t, 1, (sections, -1)), dim=2) for t in (x, prototypes)
    )
    return (unit * weights[:, None]).flatten(1) @ others.flatten(1).T


_OPS = torch.ops.ntkcl
_TABLE = {
    _OPS.attention.default: _attention,
    _OPS.bias_relu_dropout.default: _bias_relu_dropout,
    _OPS.composed_linear.default: _composed_linear,
    _OPS.feature_fusion.default: _feature_fusion,
    _OPS.gelu.default: F.gelu,
    _OPS.parallel_adapter.default: _parallel_adapter,
    _OPS.residual_layer_norm.default: _residual_layer_norm,
    _OPS.section_cosine.default: _section_cosine,
    _OPS.token_mix_prompts.default: _token_mix_prompts,
}
