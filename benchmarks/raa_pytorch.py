"""RAA's training step in plain PyTorch, written from the specification: as the published system
computes. The images pass once for each stream, as one batch of so many times their number, through
every block and every token; the whole step is done twice for SAM+, with one tensor for each
branch, block and kind.
"""

from __future__ import annotations

import math

import torch
from step_problem import Tensors
from step_pytorch import EPS, patches_of
from torch.nn import functional as F

KINDS = ("down.weight", "down.bias", "up.weight", "up.bias")


class PlainRaa:
    """Branches' tensors "branch{i}.{block}.{kind}"; from the second task on the first rests."""

    def __init__(
        self, weights: Tensors, heads: int, branches: Tensors, head: list[torch.Tensor],
        count: int, mode: str, dropout: float, rho: float, rate: float,
    ) -> None:  # fmt: skip
        self.weights, self.heads, self.count, self.mode = weights, heads, count, mode
        self.dropout, self.rho, self.rate = dropout, rho, rate
        self.blocks = sum(name.startswith("branch0.") for name in branches) // len(KINDS)
        self.task = len(head) - 1
        self.branches = {name: value.clone() for name, value in branches.items()}
        self.head = [value.clone().requires_grad_() for value in head]
        self.parameters = []
        for name, value in self.branches.items():
            if self.task == 0 or not name.startswith("branch0."):
                self.parameters.append(value.requires_grad_())
        self.parameters += self.head
        self.momentum = [torch.zeros_like(p) for p in self.parameters]
        self.scale, self.margin, self.logit_scale, self.weight = 0.1, 0.0, 20.0, 2.0

    def adapter(self, x: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
        down, down_bias, up, up_bias = tensors
        hidden = F.dropout(F.relu(F.linear(x, down, down_bias)), self.dropout)
        return F.linear(hidden, up, up_bias)

    def added(self, x: torch.Tensor, block: int, alpha: torch.Tensor) -> torch.Tensor:
        """What the adapters add to every stream, (streams * b, N, C)."""
        streams = x.chunk(self.count + 1)
        of = [
            [self.branches[f"branch{i}.{block}.{kind}"] for kind in KINDS]
            for i in range(self.count)
        ]
        out = [self.adapter(stream, of[i]) for i, stream in enumerate(streams[: self.count])]
        if self.mode == "code":
            mixture = sum(alpha[block, i] * out[i] for i in range(self.count))
        else:
            mixed = [
                sum(alpha[block, i] * of[i][kind] for i in range(self.count))
                for kind in range(len(KINDS))
            ]
            mixture = self.adapter(streams[-1], mixed)
        return torch.cat([*out, mixture])

    def features(self, images: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        w = self.weights
        width = w["cls_token"].shape[2]
        x = patches_of(torch.cat([images] * (self.count + 1)), w)
        for block in range(self.blocks):

            def norm(y: torch.Tensor, name: str, block: int = block) -> torch.Tensor:
                prefix = f"blocks.{block}.{name}"
                return F.layer_norm(y, (width,), w[f"{prefix}.weight"], w[f"{prefix}.bias"], EPS)

            def linear(y: torch.Tensor, name: str, block: int = block) -> torch.Tensor:
                prefix = f"blocks.{block}.{name}"
                return F.linear(y, w[f"{prefix}.weight"], w[f"{prefix}.bias"])

            q, k, v = (
                part.unflatten(2, (self.heads, -1)).transpose(1, 2)
                for part in linear(norm(x, "norm1"), "attn.qkv").chunk(3, 2)
            )
            scores = (q @ k.transpose(2, 3)) * (width // self.heads) ** -0.5
            x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), "attn.proj")
            mlp = linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")
            x = x + mlp + self.scale * self.added(x, block, alpha)
        return F.layer_norm(x, (width,), w["norm.weight"], w["norm.bias"], EPS)[:, 0]

    def loss(self, images: torch.Tensor, labels: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """labels: within the task."""
        features = self.features(images, alpha)
        cosines = F.linear(F.normalize(features), F.normalize(self.head[-1]))
        labels = labels.repeat(self.count + 1)
        shifted = cosines - self.margin * F.one_hot(labels, cosines.shape[1])
        rows = F.cross_entropy(self.logit_scale * shifted, labels, reduction="none")
        branches = self.count * len(images)
        return self.weight * rows[:branches].mean() + rows[branches:].mean()

    def gradients(self) -> list[torch.Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def step(self, images: torch.Tensor, labels: torch.Tensor, alphas: torch.Tensor, move: bool):
        """alphas (2, L, count); losses and gradients of both passes."""
        passes = []
        ascent: list[torch.Tensor] = []
        for alpha in alphas:
            for p in self.parameters:
                p.grad = None
            loss = self.loss(images, labels, alpha)
            loss.backward()
            gradients = [g.clone() for g in self.gradients()]
            passes.append((loss.item(), gradients))
            with torch.no_grad():
                if not ascent:
                    norm = torch.stack([g.norm() for g in gradients]).norm() + 1e-16
                    ascent = [self.rho / norm * g for g in gradients]
                    for p, e in zip(self.parameters, ascent, strict=True):
                        p.add_(e)
        with torch.no_grad():
            for p, e in zip(self.parameters, ascent, strict=True):
                p.sub_(e)
            if move:
                self.descend(ascent, passes[1][1])
        return passes

    def descend(self, ascent: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        for p, v, e, g in zip(self.parameters, self.momentum, ascent, gradients, strict=True):
            v.mul_(0.9).add_(g + 5e-4 * p)
            lengths = (v.norm() * e.norm()).item()
            cos = (v * e).sum().item() / lengths if lengths else 0.0
            gamma = min(1.0, max(0.0, 25 * (1 - math.exp(cos - 1))))
            p.sub_(v, alpha=self.rate * gamma)
