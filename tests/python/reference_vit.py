"""A plain PyTorch vision transformer in timm's layout: the slow truth that other code is held to.

Written for reading: one function per equation, no option, any floating dtype, differentiable.
"""

import re

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6


def depth_of(weights: dict[str, Tensor]) -> int:
    """Number of blocks, from the key names."""
    blocks = {int(m[1]) for key in weights if (m := re.match(r"blocks\.(\d+)\.", key))}
    return len(blocks)


def expected_shapes(
    width: int, depth: int, tokens: int, patch: int, mlp: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Every key of a headless transformer and its shape; tokens counts the class token."""
    mlp = mlp or 4 * width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    layers = {
        "norm1": (width,),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "norm2": (width,),
        "mlp.fc1": (mlp, width),
        "mlp.fc2": (width, mlp),
    }
    for block in range(depth):
        for layer, shape in layers.items():
            shapes[f"blocks.{block}.{layer}.weight"] = shape
            shapes[f"blocks.{block}.{layer}.bias"] = shape[:1]
    return shapes


def layer_norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return functional.layer_norm(x, weight.shape, weight, bias, EPS)


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def tokens_of(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """(b, 3, S, S), normalised -> (b, 1 + patches, width): class token first, positions added."""
    kernel = weights["patch_embed.proj.weight"]
    x = functional.conv2d(
        images, kernel, weights["patch_embed.proj.bias"], stride=kernel.shape[-2:]
    )
    x = x.flatten(2).transpose(1, 2)  # (b, patches, width)
    cls = weights["cls_token"].expand(len(x), -1, -1)
    return torch.cat([cls, x], dim=1) + weights["pos_embed"]


def attention(weights: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    b, n, width = x.shape
    head = width // heads
    qkv = linear(weights, f"{name}.qkv", x).view(b, n, 3, heads, head)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (b, heads, n, head)
    share = (q @ k.transpose(-2, -1) * head**-0.5).softmax(dim=-1)
    return linear(weights, f"{name}.proj", (share @ v).transpose(1, 2).reshape(b, n, width))


def mlp(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return linear(weights, f"{name}.fc2", functional.gelu(linear(weights, f"{name}.fc1", x)))


def block(weights: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    x = x + attention(weights, f"{name}.attn", layer_norm(weights, f"{name}.norm1", x), heads)
    return x + mlp(weights, f"{name}.mlp", layer_norm(weights, f"{name}.norm2", x))


def adapter(adapters: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    inner = functional.relu(linear(adapters, f"{name}.down", x))
    return linear(adapters, f"{name}.up", inner)


def reference_features(weights: dict[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """The class token after the last norm, (b, width); weights and images share one dtype."""
    x = tokens_of(weights, images)
    for index in range(depth_of(weights)):
        x = block(weights, f"blocks.{index}", x, heads)
    return layer_norm(weights, "norm", x)[:, 0]


def adapted_features(
    weights: dict[str, Tensor],
    images: Tensor,
    heads: int,
    adapters: dict[str, Tensor],
    scale: float,
) -> Tensor:
    """The same with an adapter beside each MLP, which reads what stands before its LayerNorm."""
    x = tokens_of(weights, images)
    for index in range(depth_of(weights)):
        name = f"blocks.{index}"
        h = x + attention(weights, f"{name}.attn", layer_norm(weights, f"{name}.norm1", x), heads)
        own = mlp(weights, f"{name}.mlp", layer_norm(weights, f"{name}.norm2", h))
        x = h + own + scale * adapter(adapters, str(index), h)
    return layer_norm(weights, "norm", x)[:, 0]


def gated_attention(
    weights: dict[str, Tensor], name: str, x: Tensor, heads: int, prompts: int, gate: Tensor
) -> Tensor:
    """Prompts stand after the class token. All tokens attend to the others as if there were none,
    and to the prompts apart, by each head's gate."""
    b, n, width = x.shape
    head = width // heads
    qkv = linear(weights, f"{name}.qkv", x).view(b, n, 3, heads, head)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    k, key_of_prompts = (
        torch.cat([k[:, :, :1], k[:, :, 1 + prompts :]], 2),
        k[:, :, 1 : 1 + prompts],
    )
    v, value_of_prompts = (
        torch.cat([v[:, :, :1], v[:, :, 1 + prompts :]], 2),
        v[:, :, 1 : 1 + prompts],
    )
    share = (q @ k.transpose(-2, -1) * head**-0.5).softmax(dim=-1)
    apart = (q @ key_of_prompts.transpose(-2, -1) * head**-0.5).softmax(dim=-1)
    mixed = share @ v + gate[:, None, None] * (apart @ value_of_prompts)
    return linear(weights, f"{name}.proj", mixed.transpose(1, 2).reshape(b, n, width))


def prompted_features(
    weights: dict[str, Tensor],
    images: Tensor,
    heads: int,
    modules: dict[str, Tensor],
    scale: float,
) -> Tensor:
    """The same with prompts that each block mixes from its tokens and hands on."""
    x = tokens_of(weights, images)
    count, width = len(modules["0.mix.weight"]), x.shape[2]
    handed_on = x.new_zeros(len(x), count, width)
    for index in range(depth_of(weights)):
        name = f"blocks.{index}"
        normed = layer_norm(weights, f"{name}.norm1", x)
        if index == 0:
            h = x + attention(weights, f"{name}.attn", normed, heads)
            others = h
        else:
            gate = modules[f"{index}.gate"]
            h = x + gated_attention(weights, f"{name}.attn", normed, heads, count, gate)
            handed_on = h[:, 1 : 1 + count]
            others = torch.cat([h[:, :1], h[:, 1 + count :]], 1)
        mixed = modules[f"{index}.mix.weight"] @ others + modules[f"{index}.mix.bias"][:, None]
        norm = modules[f"{index}.norm.weight"], modules[f"{index}.norm.bias"]
        prompts = functional.layer_norm(mixed, (width,), *norm, EPS) + scale * handed_on
        inner = torch.cat([others[:, :1], prompts, others[:, 1:]], 1)
        residual = torch.cat([others[:, :1], handed_on, others[:, 1:]], 1)
        x = residual + mlp(weights, f"{name}.mlp", layer_norm(weights, f"{name}.norm2", inner))
    return layer_norm(weights, "norm", x)[:, 0]


def with_lora(weights: dict[str, Tensor], modules: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with A B / r added to every matrix; `modules` holds A and B of each block as
    "<block>.attention.down" (q, k, v and o, in, r), "<block>.attention.up", "<block>.fc1.down"
    (1, in, r) and so on."""
    merged = dict(weights)
    for index in range(depth_of(weights)):
        delta = {
            kind: (down := modules[f"{index}.{kind}.down"])
            @ modules[f"{index}.{kind}.up"]
            / down.shape[-1]
            for kind in ("attention", "fc1", "fc2")
        }
        q, k, v, o = delta["attention"].transpose(1, 2)  # stored weights are (out, in)
        for layer, added in (
            ("attn.qkv", torch.cat([q, k, v])),
            ("attn.proj", o),
            ("mlp.fc1", delta["fc1"][0].T),
            ("mlp.fc2", delta["fc2"][0].T),
        ):
            key = f"blocks.{index}.{layer}.weight"
            merged[key] = weights[key] + added
    return merged
