"""LoRAC-IPC in plain PyTorch, written from the specification: as the published system computes.

Every module's product A_i B_i is formed for every matrix in every forward pass, the penalty and its
gradient come from the whole Q^T Q, every matrix's dense gradient is kept for its importance, the
optimiser holds the whole pool, and an image is evaluated by itself.
"""

from __future__ import annotations

import torch
from step_problem import PATCH, Tensors
from step_pytorch import EPS, patches_of
from torch.nn import functional as F

TYPES = ("q", "k", "v", "o", "f1", "f2")


def pretrained(weights: Tensors, kind: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W0 (in, out) and bias of one matrix."""
    prefix = f"blocks.{block}."
    if kind in "qkv":
        rows = "qkv".index(kind)
        part = [weights[f"{prefix}attn.qkv.{n}"].chunk(3)[rows] for n in ("weight", "bias")]
    else:
        name = {"o": "attn.proj", "f1": "mlp.fc1", "f2": "mlp.fc2"}[kind]
        part = [weights[f"{prefix}{name}.{n}"] for n in ("weight", "bias")]
    return part[0].t(), part[1]


class PlainLorac:
    """Pools A (T, L, in, r), B (T, L, r, out), omega (T, L) of each type; task `task` trains."""

    def __init__(
        self, weights: Tensors, heads: int, pools: dict[str, Tensors], head: Tensors, task: int,
        n_old: int, n_new: int, strength: float, rate: float, omega_factor: float,
    ) -> None:  # fmt: skip
        self.weights, self.heads, self.task = weights, heads, task
        self.n_old, self.n_new, self.strength = n_old, n_new, strength
        self.blocks = len(pools["A"]["q"][0])
        self.rank = pools["A"]["q"].shape[3]
        self.pools = {
            name: {kind: pool.clone().requires_grad_() for kind, pool in of.items()}
            for name, of in pools.items()
        }
        self.head = {name: value.clone().requires_grad_() for name, value in head.items()}
        modules = [*self.pools["A"].values(), *self.pools["B"].values(), *self.head.values()]
        omega = list(self.pools["omega"].values())
        self.parameters = [*modules, *omega]
        self.optimizer = torch.optim.Adam(
            [{"params": modules, "lr": rate}, {"params": omega, "lr": rate * omega_factor}],
            eps=1e-8,
        )
        self.mean = {kind: torch.zeros(self.blocks) for kind in TYPES}
        self.doubt = {kind: torch.zeros(self.blocks) for kind in TYPES}

    def composed(self, kind: str, block: int, task: int, omega: torch.Tensor) -> torch.Tensor:
        """W (in, out) with modules 0 .. task."""
        w, _ = pretrained(self.weights, kind, block)
        for i in range(task + 1):
            a, b = self.pools["A"][kind][i, block], self.pools["B"][kind][i, block]
            if i < self.task:
                a, b = a.detach(), b.detach()
            w = w + (1.0 if i == task else omega[i, block]) * (a @ b) / self.rank
        return w

    def features(self, images: torch.Tensor, task: int, composed: Tensors | None = None,
                 omega: Tensors | None = None) -> torch.Tensor:  # fmt: skip
        """(B, C); the composed weights are put into `composed`, where given."""
        w = self.weights
        width = w["cls_token"].shape[2]
        x = patches_of(images, w)
        of = omega or self.pools["omega"]
        for block in range(self.blocks):

            def product(y: torch.Tensor, kind: str, block: int = block) -> torch.Tensor:
                weight = self.composed(kind, block, task, of[kind])
                if composed is not None:
                    weight.retain_grad()
                    composed[f"{kind}.{block}"] = weight
                return y @ weight + pretrained(w, kind, block)[1]

            def norm(y: torch.Tensor, name: str, block: int = block) -> torch.Tensor:
                prefix = f"blocks.{block}.{name}"
                return F.layer_norm(y, (width,), w[f"{prefix}.weight"], w[f"{prefix}.bias"], EPS)

            y = norm(x, "norm1")
            q, k, v = (
                product(y, kind).unflatten(2, (self.heads, -1)).transpose(1, 2) for kind in "qkv"
            )
            scores = (q @ k.transpose(2, 3)) * (width // self.heads) ** -0.5
            x = x + product((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), "o")
            x = x + product(F.gelu(product(norm(x, "norm2"), "f1")), "f2")
        return F.layer_norm(x, (width,), w["norm.weight"], w["norm.bias"], EPS)[:, 0]

    def penalty(self) -> torch.Tensor:
        total = torch.zeros(())
        for kind in TYPES:
            pool = self.pools["A"][kind]
            for block in range(self.blocks):
                q = torch.cat([pool[: self.task, block].detach().transpose(0, 1).flatten(1),
                               pool[self.task, block]], 1)  # fmt: skip
                total = total + (q.t() @ q - torch.eye(q.shape[1], device=q.device)).norm()
        return total

    def step(self, images: torch.Tensor, labels: torch.Tensor, move: bool) -> dict[str, float]:
        composed: Tensors = {}
        logits = F.linear(self.features(images, self.task, composed), *self.head.values())
        mask = torch.full_like(logits, -torch.inf)
        mask[:, self.n_old : self.n_old + self.n_new] = 0
        ce = F.cross_entropy(logits + mask, labels)
        orth = self.penalty()
        self.optimizer.zero_grad()
        (ce + self.strength * orth).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if move:
            self.optimizer.step()
        for kind in TYPES:
            for block in range(self.blocks):
                w = composed[f"{kind}.{block}"]
                assert w.grad is not None
                importance = (w * w.grad).abs().mean().item()
                mean, doubt = self.mean[kind], self.doubt[kind]
                mean[block] = 0.85 * mean[block] + 0.15 * importance
                doubt[block] = 0.85 * doubt[block] + 0.15 * abs(importance - mean[block].item())
        return {"ce": ce.item(), "l_orth": orth.item(), "grad_norm": norm.item()}


def precision_matrices(factors: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """P = R^-1 (m, C, C) of each cluster by a pseudo-inverse, from its covariance's factors."""
    result = []
    for factor in factors.split(rows):
        covariance = factor.t() @ factor + 1e-4 * torch.eye(factor.shape[1])
        covariance = covariance + covariance.diag().mean() * torch.eye(factor.shape[1])
        deviation = covariance.diag().sqrt()
        result.append(torch.linalg.pinv(covariance / deviation[:, None] / deviation))
    return torch.stack(result)


@torch.no_grad()
def predict_one(
    plain: PlainLorac, image: torch.Tensor, bank: list[Tensors], means: torch.Tensor,
    precisions: torch.Tensor, class_of_cluster: torch.Tensor, task_of_class: torch.Tensor,
) -> int:  # fmt: skip
    """The class of one image (1, 3, S, S): its task by snapshot 0, then that snapshot's head."""
    feature = F.normalize(plain.features(image, 0, omega=bank[0]))
    difference = feature - means
    distance = torch.einsum("mc,mcd,md->m", difference, precisions, difference)
    task = int(task_of_class[class_of_cluster[distance.argmin()]])
    feature = plain.features(image, task, omega=bank[task])
    return int(F.linear(feature, *plain.head.values())[0, : len(task_of_class)].argmax())


__all__ = ["PATCH", "TYPES", "PlainLorac", "precision_matrices", "predict_one"]
