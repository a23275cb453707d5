"""The training step that benchmarks/step.py measures: sizes, weights, batch and matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

IMAGE, PATCH, BLOCKS = 224, 16, 12
MODELS = {"vit-ti": (192, 3), "vit-s": (384, 6), "vit-b": (768, 12), "vit-l": (1024, 16)}
CLASSES = 10  # a task
Tensors = dict[str, torch.Tensor]


def moved(tensors: Tensors, device: str) -> Tensors:
    return {name: value.to(device) for name, value in tensors.items()}


@dataclass(frozen=True)
class Problem:
    """One step of the released NTK-CL, mode both, K = 1, in task ``task`` (counted from 0)."""

    model: str
    batch: int
    task: int = 1
    rank: int = 16
    prompts: int = 10
    scale: float = 0.1  # s of both kinds
    dropout: float = 0.1  # of adapters and of the fusion's heads
    fusion_heads: int = 8
    eta: float = 0.03
    upsilon: float = 1e-4
    lambda_: float = 1e-3
    orth_rank: int = 40
    temperature: float = 0.1
    learning_rate: float = 0.025
    momentum: float = 0.9
    weight_decay: float = 5e-4

    @property
    def width(self) -> int:
        return MODELS[self.model][0]

    @property
    def heads(self) -> int:
        return MODELS[self.model][1]

    @property
    def blocks(self) -> int:
        return BLOCKS if self.model != "vit-l" else 24

    @property
    def tokens(self) -> int:
        return 1 + (IMAGE // PATCH) ** 2

    @property
    def old_classes(self) -> int:
        return CLASSES * self.task

    @cached_property
    def backbone(self) -> Tensors:
        """Random weights under timm's names; times do not depend on the values."""
        c, g = self.width, torch.Generator().manual_seed(1)

        def linear(out: int, into: int, name: str) -> Tensors:
            weight = torch.randn(out, into, generator=g) / into**0.5
            return {f"{name}.weight": weight, f"{name}.bias": torch.randn(out, generator=g) * 0.02}

        def norm(name: str) -> Tensors:
            return {
                f"{name}.weight": 1 + 0.1 * torch.randn(c, generator=g),
                f"{name}.bias": 0.1 * torch.randn(c, generator=g),
            }

        weights = linear(c, 3 * PATCH**2, "patch_embed.proj")
        weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].view(c, 3, 16, 16)
        weights["cls_token"] = torch.randn(1, 1, c, generator=g)
        weights["pos_embed"] = torch.randn(1, self.tokens, c, generator=g)
        for i in range(self.blocks):
            block = f"blocks.{i}"
            weights |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
            weights |= linear(3 * c, c, f"{block}.attn.qkv") | linear(c, c, f"{block}.attn.proj")
            weights |= linear(4 * c, c, f"{block}.mlp.fc1") | linear(c, 4 * c, f"{block}.mlp.fc2")
        return weights | norm("norm")

    @cached_property
    def state(self) -> Tensors:
        """Trained and frozen lists, fusion, head and prototypes, as in the middle of a run."""
        c, d, g = self.width, 2 * self.width, torch.Generator().manual_seed(2)

        def normal(*shape: int, std: float) -> torch.Tensor:
            return torch.randn(*shape, generator=g) * std

        state = {}
        for prefix in ("", "pre1."):
            for i in range(self.blocks):
                channel, patch = f"{prefix}channel.{i}", f"{prefix}patch.{i}"
                state[f"{channel}.down.weight"] = normal(self.rank, c, std=c**-0.5)
                state[f"{channel}.down.bias"] = normal(self.rank, std=0.1)
                state[f"{channel}.up.weight"] = normal(c, self.rank, std=0.1)
                state[f"{channel}.up.bias"] = normal(c, std=0.1)
                state[f"{patch}.mix.weight"] = normal(self.prompts, self.tokens, std=0.1)
                state[f"{patch}.mix.bias"] = normal(self.prompts, std=0.1)
                state[f"{patch}.norm.weight"] = normal(c, std=0.5)
                state[f"{patch}.norm.bias"] = normal(c, std=0.5)
        for name in ("query", "key", "value"):
            state[f"fusion.{name}.weight"] = normal(d, d, std=d**-0.5)
            state[f"fusion.{name}.bias"] = normal(d, std=0.1)
        state["prototypes"] = normal(self.old_classes, d, std=1.0)
        state["head.weight"] = normal(CLASSES, d, std=d**-0.5)
        return state

    @cached_property
    def previous(self) -> Tensors:
        """Regularised weights at the end of the task before."""
        g = torch.Generator().manual_seed(3)
        return {
            name: value + 0.01 * torch.randn(value.shape, generator=g)
            for name, value in self.state.items()
            if name.startswith(("channel.", "patch.", "fusion.")) and name.endswith(".weight")
        }

    @cached_property
    def images(self) -> torch.Tensor:
        return torch.rand(self.batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(4))

    @cached_property
    def labels(self) -> torch.Tensor:
        """Class numbers in pairs, so that L_dis has some."""
        return self.old_classes + torch.arange(self.batch) // 2 % CLASSES

    @cached_property
    def drawn(self) -> torch.Tensor:
        """The old prototypes that take part in L_dis of the step that is verified."""
        generator = torch.Generator().manual_seed(5)
        return torch.randperm(self.old_classes, generator=generator)[: self.batch]

    @cached_property
    def masks(self) -> Tensors:
        """What dropout keeps in the step that is verified: ``<list>.<block>`` and ``fusion``."""
        g = torch.Generator().manual_seed(6)

        def keep(*shape: int) -> torch.Tensor:
            return (torch.rand(*shape, generator=g) >= self.dropout).to(torch.uint8)

        masks = {"fusion": keep(self.batch, self.fusion_heads)}
        for number in range(2):  # 0: the trained list
            for i in range(self.blocks):
                masks[f"{number}.{i}"] = keep(self.batch, self.tokens, self.rank)
        return masks


class Product(NamedTuple):
    """``count`` products (batch of) m x k times k x n; the form says which factor is transposed."""

    name: str
    count: int
    form: str  # nt: x W^T, nn: g W, tn: g^T x
    m: int
    n: int
    k: int
    batch: int = 1
    frozen: bool = True  # False: of trained parameters, which stay in float32

    @property
    def flops(self) -> int:
        return 2 * self.count * self.batch * self.m * self.n * self.k


def products_published(p: Problem) -> list[Product]:
    """Of the step as published: four whole passes, two of them there and back."""
    b, c, n, last = p.batch, p.width, p.tokens, p.blocks
    result = [Product("patch embedding", 1, "nt", b * (n - 1), c, 3 * PATCH**2)]
    for kind, t in (("channel", n), ("patch", n + p.prompts)):
        first = 1 if kind == "patch" else 0  # its first block attends before there are prompts
        for count, go in ((2, block_forward), (1, block_backward)):
            result += go(p, f"{kind}, all blocks", count * last, b * t)
            result += attention_products(p, kind, count * (last - first), t, go is block_backward)
            if first:
                result += attention_products(p, kind, count, n, go is block_backward)
        result += peft_products(p, kind, last, last)
    return result


def products_needed(p: Problem) -> list[Product]:
    """Of the step after all exact savings: a shared first block, the last for the class token."""
    b, c, h, n = p.batch, p.width, p.heads, p.tokens
    middle, width = p.blocks - 2, c // h
    result = [Product("patch embedding", 1, "nt", b * (n - 1), c, 3 * PATCH**2)]
    result += block_forward(p, "first block", 1, b * n)
    result += attention_products(p, "first block", 1, n, False)
    for kind, t in (("channel", n), ("patch", n + p.prompts)):
        for count, go in ((2, block_forward), (1, block_backward)):
            backward = go is block_backward
            result += go(p, kind, count * middle, b * t)
            result += attention_products(p, kind, count * middle, t, backward)
            # The last block: keys and values of all tokens, everything else of one.
            form = "nn" if backward else "nt"
            sizes = (c, 2 * c) if backward else (2 * c, c)
            result.append(Product(f"{kind}, last block", count, form, b * t, *sizes))
            result += go(p, f"{kind}, last block", count, b)
            vectors = 2 if not backward else 4
            result.append(Product(f"{kind}, last block", count * vectors, "nt", 1, t, width, b * h))
            if kind == "patch":  # the prompts' own share of the first block
                result += mlp_products(p, "patch, first block", count, b * p.prompts, form)
        result += peft_products(p, kind, p.blocks - 1, p.blocks - 2)
    return result


def block_forward(p: Problem, name: str, count: int, rows: int) -> list[Product]:
    c = p.width
    return [
        Product(f"{name}: qkv", count, "nt", rows, 3 * c, c),
        Product(f"{name}: proj", count, "nt", rows, c, c),
        *mlp_products(p, name, count, rows, "nt"),
    ]


def block_backward(p: Problem, name: str, count: int, rows: int) -> list[Product]:
    c = p.width
    return [
        Product(f"{name}: d qkv", count, "nn", rows, c, 3 * c),
        Product(f"{name}: d proj", count, "nn", rows, c, c),
        *mlp_products(p, f"{name}: d", count, rows, "nn"),
    ]


def mlp_products(p: Problem, name: str, count: int, rows: int, form: str) -> list[Product]:
    c = p.width
    return [
        Product(f"{name}: mlp up", count, form, rows, 4 * c, c),
        Product(f"{name}: mlp down", count, form, rows, c, 4 * c),
    ]


def attention_products(p: Problem, name: str, count: int, t: int, backward: bool) -> list[Product]:
    width, batch = p.width // p.heads, p.batch * p.heads
    scores = Product(f"{name}: attention scores", count, "nt", t, t, width, batch)
    values = Product(f"{name}: attention values", count, "nn", t, width, t, batch)
    if not backward:
        return [scores, values]
    transposed = Product(f"{name}: attention d", 2 * count, "tn", t, width, t, batch)
    return [scores, values, transposed]


def peft_products(p: Problem, kind: str, used: int, through: int) -> list[Product]:
    """Of ``used`` blocks' PEFT, forward twice and back once, ``through`` of them to their input."""
    b, c, n, r = p.batch, p.width, p.tokens, p.rank
    if kind == "channel":
        rows = b * n
        return [
            Product("adapter down", 2 * used, "nt", rows, r, c, frozen=False),
            Product("adapter up", 2 * used, "nt", rows, c, r, frozen=False),
            Product("adapter d up", used, "nn", rows, r, c, frozen=False),
            Product("adapter d down", through, "nn", rows, c, r, frozen=False),
            Product("adapter d weights", 2 * used, "tn", r, c, rows, frozen=False),
        ]
    return [
        Product("prompts", 2 * used, "nn", p.prompts, c, n, b, frozen=False),
        Product("prompts d weights", used, "nt", p.prompts, n, c, b, frozen=False),
        Product("prompts d tokens", through, "tn", n, c, p.prompts, b, frozen=False),
    ]


def product_steps(
    product: Product, dtype: torch.dtype, device: str
) -> Iterator[Callable[[], None]]:
    """Ways to compute one of ``product``; none allocates."""
    lead = [product.batch] if product.batch > 1 else []

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(*lead, rows, columns, device=device).to(dtype)

    m, n, k = product.m, product.n, product.k
    x = matrix(k, m).mT if product.form == "tn" else matrix(m, k)
    w = matrix(n, k).mT if product.form == "nt" else matrix(k, n)
    out = matrix(m, n)
    yield lambda: torch.matmul(x, w, out=out)
    if product.form == "nt" and not lead:
        packed = w.contiguous()
        yield lambda: torch.matmul(x, packed, out=out)
