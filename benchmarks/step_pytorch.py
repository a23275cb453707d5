"""The step of step_problem.py in plain and in careful PyTorch, written from the paper.

`PlainStep` computes as the published system does. `CarefulStep` makes every saving that ntkcl makes
and that torch's own operators allow. Both give the same losses and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from step_problem import IMAGE, PATCH, Problem, Tensors, moved
from torch.nn import functional as F

EPS = 1e-6
REGULARISED = ("channel.", "patch.", "fusion.")


def trained(p: Problem, state: Tensors, device: str) -> Tensors:
    """Leaves, by name: the current lists, the fusion, the head."""
    leaves = {
        name: value.to(device, copy=True).requires_grad_()
        for name, value in state.items()
        if not name.startswith(("pre1.", "prototypes"))
    }
    return leaves | {"head.sigma": torch.ones(1, device=device, requires_grad=True)}


def dropout(x: torch.Tensor, mask: torch.Tensor | None, p: float) -> torch.Tensor:
    return F.dropout(x, p) if mask is None else x * mask / (1 - p)


def patches_of(images: torch.Tensor, weights: Tensors) -> torch.Tensor:
    """(B, N, C): embedded patches behind the class token."""
    projection = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    x = F.conv2d(images, *projection, PATCH).flatten(2).transpose(1, 2)
    return torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], 1) + weights["pos_embed"]


def cross_entropy(features: torch.Tensor, weights: Tensors, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(F.normalize(features), F.normalize(weights["head.weight"]))
    return F.cross_entropy(weights["head.sigma"] * logits, labels)


def dissimilarity(fused: torch.Tensor, labels: torch.Tensor, old: torch.Tensor, drawn: torch.Tensor,
                  temperature: float) -> torch.Tensor:  # fmt: skip
    z = F.normalize(torch.cat([fused, old]))
    y = torch.cat([labels, drawn])
    off_diagonal = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (y[:, None] == y[None, :]) & off_diagonal
    s = z @ z.t() / temperature
    minus_infinity = torch.tensor(-torch.inf, device=z.device)
    each = torch.where(off_diagonal, s, minus_infinity).logsumexp(1)
    return torch.where(positive, s, minus_infinity).flatten().logsumexp(0) - each.mean()


def common_losses(
    p: Problem, features: tuple[torch.Tensor, ...], labels: torch.Tensor, weights: Tensors,
    old: torch.Tensor, drawn: torch.Tensor,
) -> Tensors:  # fmt: skip
    """What both steps compute alike: the cross-entropies and L_dis of (F_c, F_p, F_m)."""
    names = ("ce_channel", "ce_patch", "ce_fused")
    losses = {
        name: cross_entropy(f, weights, labels - p.old_classes)
        for name, f in zip(names, features, strict=True)
    }
    losses["l_dis"] = dissimilarity(features[2], labels, old[drawn], drawn, p.temperature)
    return losses


class PlainStep:
    """One pass after another, every constant computed in every step, torch's default settings."""

    def __init__(self, problem: Problem, device: str = "cpu") -> None:
        self.p, self.device = problem, device
        self.frozen = moved(problem.state, device)
        self.weights = moved(problem.backbone, device)
        self.previous = moved(problem.previous, device)
        self.parameters = trained(problem, problem.state, device)
        self.optimizer = torch.optim.SGD(
            self.parameters.values(),
            lr=problem.learning_rate,
            momentum=problem.momentum,
            weight_decay=problem.weight_decay,
        )

    def step(self, images: torch.Tensor, labels: torch.Tensor, verify: bool) -> dict[str, float]:
        p, masks = self.p, moved(self.p.masks, self.device) if verify else {}
        tokens = patches_of(images, self.weights)
        channel = torch.cat(
            [
                self.channel_pass(tokens, self.frozen, "pre1.", masks, 1),
                self.channel_pass(tokens, self.parameters, "", masks, 0),
            ],
            1,
        )
        patch = torch.cat(
            [
                self.patch_pass(tokens, self.frozen, "pre1."),
                self.patch_pass(tokens, self.parameters, ""),
            ],
            1,
        )
        fused = self.fuse(channel, patch, masks.get("fusion"))

        drawn = p.drawn if verify else torch.randperm(p.old_classes)[: p.batch]
        features = channel, patch, fused
        losses = common_losses(
            p, features, labels, self.parameters, self.frozen["prototypes"], drawn.to(self.device)
        ) | {
            "l_orth": self.orthogonality(channel) + self.orthogonality(patch),
            "l_reg": self.regulariser(),
        }
        weights = {"l_dis": p.eta, "l_orth": p.upsilon, "l_reg": p.lambda_}
        total = sum(weights.get(name, 1.0) * value for name, value in losses.items())
        self.optimizer.zero_grad()
        total.backward()
        values = {name: value.item() for name, value in losses.items()}
        if not verify:
            self.optimizer.step()
        return values | {"total": total.item()}

    def gradients(self) -> Tensors:
        return {n: torch.zeros_like(t) if t.grad is None else t.grad
                for n, t in self.parameters.items()}  # fmt: skip

    def attention(self, i: int, x: torch.Tensor) -> torch.Tensor:
        w, block, heads = self.weights, f"blocks.{i}", self.p.heads
        y = F.layer_norm(x, x.shape[-1:], w[f"{block}.norm1.weight"], w[f"{block}.norm1.bias"], EPS)
        qkv = F.linear(y, w[f"{block}.attn.qkv.weight"], w[f"{block}.attn.qkv.bias"])
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + F.linear(mixed, w[f"{block}.attn.proj.weight"], w[f"{block}.attn.proj.bias"])

    def mlp(self, i: int, h: torch.Tensor) -> torch.Tensor:
        w, block = self.weights, f"blocks.{i}"
        y = F.layer_norm(h, h.shape[-1:], w[f"{block}.norm2.weight"], w[f"{block}.norm2.bias"], EPS)
        inner = F.gelu(F.linear(y, w[f"{block}.mlp.fc1.weight"], w[f"{block}.mlp.fc1.bias"]))
        return F.linear(inner, w[f"{block}.mlp.fc2.weight"], w[f"{block}.mlp.fc2.bias"])

    def feature(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weights
        return F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"], EPS)[:, 0]

    def channel_pass(
        self, x: torch.Tensor, lists: Tensors, prefix: str, masks: Tensors, number: int
    ) -> torch.Tensor:
        for i in range(self.p.blocks):
            h = self.attention(i, x)
            adapter = f"{prefix}channel.{i}"
            inner = F.linear(h, lists[f"{adapter}.down.weight"], lists[f"{adapter}.down.bias"])
            inner = dropout(F.relu(inner), masks.get(f"{number}.{i}"), self.p.dropout)
            added = F.linear(inner, lists[f"{adapter}.up.weight"], lists[f"{adapter}.up.bias"])
            x = h + self.mlp(i, h) + self.p.scale * added
        return self.feature(x)

    def patch_pass(self, x: torch.Tensor, lists: Tensors, prefix: str) -> torch.Tensor:
        p = self.p.prompts
        for i in range(self.p.blocks):
            h = self.attention(i, x)
            tokens = h if i == 0 else torch.cat([h[:, :1], h[:, 1 + p :]], 1)
            name = f"{prefix}patch.{i}"
            mixed = F.linear(
                tokens.transpose(1, 2), lists[f"{name}.mix.weight"], lists[f"{name}.mix.bias"]
            ).transpose(1, 2)
            norm = lists[f"{name}.norm.weight"], lists[f"{name}.norm.bias"]
            prompts = F.layer_norm(mixed, mixed.shape[-1:], *norm, EPS)
            carried = torch.zeros_like(prompts)
            if i > 0:
                carried = h[:, 1 : 1 + p]
                prompts = prompts + self.p.scale * carried
            z = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1)
            x = self.mlp(i, z) + torch.cat([tokens[:, :1], carried, tokens[:, 1:]], 1)
        return self.feature(x)

    def fuse(
        self, channel: torch.Tensor, patch: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        w, heads = self.parameters, self.p.fusion_heads

        def project(x: torch.Tensor, name: str) -> torch.Tensor:
            x = F.linear(x, w[f"fusion.{name}.weight"], w[f"fusion.{name}.bias"])
            return x.view(len(x), heads, 1, -1)

        q, k, v = project(patch, "query"), project(channel, "key"), project(channel, "value")
        attention = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        if mask is not None:
            mask = mask.view(attention.shape)
        mixed = (dropout(attention, mask, self.p.dropout) @ v).flatten(1)
        return 0.5 * mixed + channel + 0.1 * patch

    def orthogonality(self, features: torch.Tensor) -> torch.Tensor:
        rows = F.normalize(self.frozen["prototypes"])
        u, s, _ = torch.linalg.svd(rows.t(), full_matrices=True)
        basis = u[:, : min(self.p.orth_rank, int((s > 1e-4).sum()))]
        x = F.normalize(features)
        return (x - x @ basis @ basis.t()).sum()

    def regulariser(self) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for name, parameter in self.parameters.items():
            if name.startswith(REGULARISED) and name.endswith("weight"):
                total = total + ((parameter - self.previous[name]) ** 2).sum()
        return total


class CarefulStep:
    """Shared first block, frozen passes without a graph, the last block for the class token alone,
    constants once a task, multi-tensor regulariser, fused optimiser; ``products`` bfloat16: the
    frozen matrices and what goes into them. ``compiled``: blocks through torch.compile."""

    def __init__(
        self, problem: Problem, device: str = "cpu", products: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        self.p, self.device, self.products = problem, device, products
        self.frozen = moved(problem.state, device)
        self.weights = {
            name: value.to(device, products if ".attn." in name or ".mlp." in name else None)
            for name, value in problem.backbone.items()
        }
        self.parameters = trained(problem, problem.state, device)
        self.regularised = [self.parameters[name] for name in problem.previous]
        self.previous = [value.to(device) for value in problem.previous.values()]
        self.optimizer = torch.optim.SGD(
            self.parameters.values(),
            lr=problem.learning_rate,
            momentum=problem.momentum,
            weight_decay=problem.weight_decay,
            fused=True,
        )
        rows = F.normalize(self.frozen["prototypes"].double())
        _, s, vh = torch.linalg.svd(rows, full_matrices=False)
        basis = vh[: min(problem.orth_rank, int((s > 1e-4).sum()))].t()
        self.direction = (1 - basis @ basis.sum(0)).float()
        compile_: Callable[[Any], Any] = torch.compile if compiled else lambda f: f
        self.attention = compile_(self._attention)
        self.mlp = compile_(self._mlp)
        self.adapter = compile_(self._adapter)
        self.prompts = compile_(self._prompts)

    def step(self, images: torch.Tensor, labels: torch.Tensor, verify: bool) -> dict[str, float]:
        p, masks = self.p, moved(self.p.masks, self.device) if verify else {}
        with torch.no_grad():
            h = self.attention(0, self.embed(images), False)
            first = h, self.mlp(0, h)
            frozen_channel = self.channel_pass(*first, self.frozen, "pre1.", masks, 1)
            frozen_patch = self.patch_pass(*first, self.frozen, "pre1.")
        current = self.channel_pass(*first, self.parameters, "", masks, 0)
        channel = torch.cat([frozen_channel, current], 1)
        patch = torch.cat([frozen_patch, self.patch_pass(*first, self.parameters, "")], 1)
        fused = self.fuse(channel, patch, masks.get("fusion"))

        drawn = p.drawn if verify else torch.randperm(p.old_classes)[: p.batch]
        features = channel, patch, fused
        losses = common_losses(
            p, features, labels, self.parameters, self.frozen["prototypes"], drawn.to(self.device)
        ) | {
            "l_orth": sum((F.normalize(f) @ self.direction).sum() for f in (channel, patch)),
        }
        weights = {"l_dis": p.eta, "l_orth": p.upsilon}
        total = sum(weights.get(name, 1.0) * value for name, value in losses.items())
        self.optimizer.zero_grad()
        total.backward()
        losses["l_reg"] = self.regularise()
        total = total + p.lambda_ * losses["l_reg"]
        values = torch.stack([*losses.values(), total]).detach().tolist()
        if not verify:
            self.optimizer.step()
        return dict(zip([*losses, "total"], values, strict=True))

    gradients = PlainStep.gradients

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        w, b, g, c = self.weights, len(images), IMAGE // PATCH, self.p.width
        rows = images.view(b, 3, g, PATCH, g, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(b, g * g, -1)
        x = F.linear(rows, w["patch_embed.proj.weight"].view(c, -1), w["patch_embed.proj.bias"])
        return torch.cat([w["cls_token"].expand(b, -1, -1), x], 1) + w["pos_embed"]

    def _attention(self, i: int, x: torch.Tensor, last: bool) -> torch.Tensor:
        w, block, heads, c = self.weights, f"blocks.{i}", self.p.heads, self.p.width
        y = F.layer_norm(x, (c,), w[f"{block}.norm1.weight"], w[f"{block}.norm1.bias"], EPS)
        y = y.to(self.products)
        weight, bias = w[f"{block}.attn.qkv.weight"], w[f"{block}.attn.qkv.bias"]
        if last:
            q = F.linear(y[:, :1], weight[:c], bias[:c]).unflatten(2, (heads, -1)).transpose(1, 2)
            kv = F.linear(y, weight[c:], bias[c:]).unflatten(2, (2, heads, -1))
            k, v = kv.permute(2, 0, 3, 1, 4)
            x = x[:, :1]
        else:
            q, k, v = F.linear(y, weight, bias).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        if x.is_cuda:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:  # two large products are faster than torch's fused kernel at 197 tokens
            mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).flatten(2)
        return x + F.linear(mixed, w[f"{block}.attn.proj.weight"], w[f"{block}.attn.proj.bias"])

    def _mlp(self, i: int, h: torch.Tensor) -> torch.Tensor:
        w, block, c = self.weights, f"blocks.{i}", self.p.width
        y = F.layer_norm(h, (c,), w[f"{block}.norm2.weight"], w[f"{block}.norm2.bias"], EPS)
        y = F.linear(y.to(self.products), w[f"{block}.mlp.fc1.weight"], w[f"{block}.mlp.fc1.bias"])
        return F.linear(F.gelu(y), w[f"{block}.mlp.fc2.weight"], w[f"{block}.mlp.fc2.bias"])

    def _adapter(
        self, h: torch.Tensor, mlp: torch.Tensor, down: torch.Tensor, down_bias: torch.Tensor,
        up: torch.Tensor, up_bias: torch.Tensor, mask: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        inner = dropout(F.relu(F.linear(h, down, down_bias)), mask, self.p.dropout)
        return h + mlp + self.p.scale * F.linear(inner, up, up_bias)

    def _prompts(
        self, tokens: torch.Tensor, mix: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        # LayerNorm takes the generator's bias away: it is left out.
        return F.layer_norm(mix @ tokens, tokens.shape[-1:], weight, bias, EPS)

    def feature(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weights
        return F.layer_norm(x[:, 0], x.shape[-1:], w["norm.weight"], w["norm.bias"], EPS)

    def channel_pass(
        self, h: torch.Tensor, mlp: torch.Tensor, lists: Tensors, prefix: str, masks: Tensors,
        number: int,
    ) -> torch.Tensor:  # fmt: skip
        for i in range(self.p.blocks):
            if i > 0:
                h = self.attention(i, x, i + 1 == self.p.blocks)  # noqa: F821
                mlp = self.mlp(i, h)
            mask = masks.get(f"{number}.{i}")
            if mask is not None:
                mask = mask[:, : h.shape[1]]
            names = ("down.weight", "down.bias", "up.weight", "up.bias")
            x = self.adapter(h, mlp, *(lists[f"{prefix}channel.{i}.{n}"] for n in names), mask)
        return self.feature(x)

    def patch_pass(
        self, h: torch.Tensor, mlp: torch.Tensor, lists: Tensors, prefix: str
    ) -> torch.Tensor:
        p = self.p.prompts
        for i in range(self.p.blocks - 1):
            tokens = h
            if i > 0:
                h = self.attention(i, x, False)  # noqa: F821
                tokens = torch.cat([h[:, :1], h[:, 1 + p :]], 1)
            names = ("mix.weight", "norm.weight", "norm.bias")
            prompts = self.prompts(tokens, *(lists[f"{prefix}patch.{i}.{n}"] for n in names))
            if i == 0:
                image = tokens + mlp
                x = torch.cat([image[:, :1], self.mlp(0, prompts), image[:, 1:]], 1)
            else:
                prompts = prompts + self.p.scale * h[:, 1 : 1 + p]
                x = h + self.mlp(i, torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1))
        h = self.attention(self.p.blocks - 1, x, True)
        return self.feature(h + self.mlp(self.p.blocks - 1, h))

    def fuse(
        self, channel: torch.Tensor, patch: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        w, heads = self.parameters, self.p.fusion_heads
        value = F.linear(channel, w["fusion.value.weight"], w["fusion.value.bias"])
        if mask is None:
            mask = torch.rand(len(value), heads, device=value.device) >= self.p.dropout
        scale = mask / (1 - self.p.dropout)
        mixed = (value.view(len(value), heads, -1) * scale[:, :, None]).flatten(1)
        return 0.5 * mixed + channel + 0.1 * patch

    @torch.no_grad()
    def regularise(self) -> torch.Tensor:
        for parameter in self.parameters.values():
            if parameter.grad is None:  # of what the loss does not reach; it still decays
                parameter.grad = torch.zeros_like(parameter)
        moved = torch._foreach_sub(self.regularised, self.previous)
        gradients = [parameter.grad for parameter in self.regularised]
        torch._foreach_add_(gradients, moved, alpha=2 * self.p.lambda_)
        return torch.stack(torch._foreach_norm(moved)).square().sum()
