"""Pretrain the small vision transformer that ships with ntkcl on images drawn by formula.

No photograph, no scan and no digit is used: formula_images.py computes every training image from
random numbers. Every step draws classes that were never seen before and never come again. The loss
is a softmax over the cosines between the feature of an image and the mean features of the batch's
classes, the image itself left out of its own class's mean: features learn to be told apart by
nearest class mean. The training part of the default data set, scikit-learn's digits, serves for
figures alone: what the finished features are worth. Reading it needs the built package.

  python examples/pretrain_formula_vit.py --out vit.safetensors       train (or resume), write
  python examples/pretrain_formula_vit.py --evaluate vit.safetensors  figures of a checkpoint
"""

import argparse
import json
import math
import time
from pathlib import Path
from statistics import mean

import numpy
import torch
from formula_images import Draw, contours, fractals, strokes, textures
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from ntkcl import _C
from ntkcl.datasets import load_dataset

SHAPE = {"image_size": 32, "patch_size": 8, "width": 96, "depth": 6, "heads": 3}

RECIPE = {
    "stroke_classes": 36,  # per step; half of them are siblings of the other half
    "other_classes": 2,  # per step, of contours, fractals and textures each
    "instances": 5,  # images per class and step
    "vigour_first": 0.2,  # strength of the deformations at the first step
    "vigour_last": 1.0,  # and from 70 % of the steps on
    "temperature": 0.1,
    "learning_rate": 1.5e-3,  # cosine to zero
    "warmup_steps": 200,
    "weight_decay": 0.05,  # matrices only
    "gradient_norm": 1.0,  # clipped to
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    def __init__(self, width: int, ratio: int = 4):
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """(b, 3, size, size) in [-1, 1] -> the class token's feature (b, width). timm's layout."""

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, heads: int):
        super().__init__()
        side = image_size // patch_size
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        waves = torch.cat([torch.zeros(1, width), 0.5 * plane_waves(side, width)])
        self.pos_embed = nn.Parameter(waves[None])
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x)[:, 0])


def plane_waves(side: int, width: int) -> Tensor:
    """(side * side, width): sines and cosines of a token's column and row, to begin with."""
    frequency = 100.0 ** -(torch.arange(width // 4) * 4 / width)
    angle = torch.arange(side)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, 0)], 1)


def normalise(images: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1]: mean = std = 0.5."""
    return (images - 0.5) / 0.5


# ---- Training ----


def formula_batch(draw: Draw, vigour: float) -> Tensor:
    """Images of one step, the instances of a class side by side."""
    k, side = RECIPE["instances"], SHAPE["image_size"]
    images = [strokes(draw, RECIPE["stroke_classes"], k, side, vigour)]
    for family in (contours, fractals, textures):
        images.append(family(draw, RECIPE["other_classes"], k, side))
    return torch.cat(images)


def class_mean_loss(features: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy over cosines to the batch's class means, leave-one-out; and the accuracy."""
    x = functional.normalize(features, dim=-1)
    groups = x.view(-1, RECIPE["instances"], x.shape[-1])
    total = groups.sum(1)
    rest = functional.normalize((total[:, None] - groups).flatten(0, 1), dim=-1)
    label = torch.arange(len(total)).repeat_interleave(RECIPE["instances"])
    cosine = x @ functional.normalize(total, dim=-1).T
    cosine = cosine.scatter(1, label[:, None], (x * rest).sum(-1, keepdim=True))
    loss = functional.cross_entropy(cosine / RECIPE["temperature"], label)
    return loss, (cosine.argmax(1) == label).float().mean()


def vigour_at(done: float) -> float:
    """Easy first: with strong deformations from the start the features learn far more slowly."""
    first, last = RECIPE["vigour_first"], RECIPE["vigour_last"]
    return first + (last - first) * min(1.0, done / 0.7)


def learning_rate_at(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / RECIPE["warmup_steps"])
    return RECIPE["learning_rate"] * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    decays = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decays}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=RECIPE["weight_decay"], betas=(0.9, 0.98))


def train(out: Path, steps: int, seed: int, report: int) -> None:
    torch.manual_seed(seed)
    model = VisionTransformer(**SHAPE)
    optimizer = make_optimizer(model)
    run = {"steps": steps, "seed": seed} | SHAPE | RECIPE
    resume = out.with_suffix(".resume.pt")
    first = load_progress(resume, run, model, optimizer) if resume.exists() else 0
    losses, hits, began = [], [], time.perf_counter()
    for step in range(first, steps):
        # One generator per step: a resumed run draws what it would have drawn.
        images = formula_batch(Draw(seed * 1_000_003 + step), vigour_at(step / steps))
        loss, hit = class_mean_loss(model(normalise(images)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), RECIPE["gradient_norm"])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps)
        optimizer.step()
        losses.append(loss.item())
        hits.append(hit.item())
        if (step + 1) % report == 0:
            rate = len(losses) * len(images) / (time.perf_counter() - began)
            print(
                f"step {step + 1}/{steps}  loss {mean(losses):.3f}  "
                f"nearest mean {100 * mean(hits):.1f} %  {rate:.0f} images/s",
                flush=True,
            )
            save_progress(resume, run, model, optimizer, step + 1)
            losses, hits, began = [], [], time.perf_counter()
    write_checkpoint(model, out, steps, seed)
    resume.unlink(missing_ok=True)


def save_progress(
    path: Path, run: dict, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    state = {"run": run, "step": step, "model": model.state_dict()}
    partial = path.with_suffix(".partial")
    torch.save(state | {"optimizer": optimizer.state_dict()}, partial)
    partial.replace(path)


def load_progress(path: Path, run: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The number of steps already done; ValueError where they belong to another run."""
    state = torch.load(path, weights_only=True)
    if state["run"] != run:
        raise ValueError(f"[pretrain] expected {path} to hold a run of {run}, got {state['run']}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ---- Checkpoint ----


def write_checkpoint(model: VisionTransformer, out: Path, steps: int, seed: int) -> None:
    tensors = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    families = RECIPE["stroke_classes"] + 3 * RECIPE["other_classes"]
    images = steps * families * RECIPE["instances"]
    metadata = SHAPE | {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "recipe": RECIPE | {"steps": steps, "images": images, "source": Path(__file__).name},
        "seed": seed,
        "figures": digit_figures(rounded(tensors)),
    }
    save_file(tensors, out, {key: json.dumps(value) for key, value in metadata.items()})


def rounded(tensors: dict[str, Tensor]) -> VisionTransformer:
    """The network as its half precision file holds it, computing in float32."""
    model = VisionTransformer(**SHAPE)
    model.load_state_dict({key: value.float() for key, value in tensors.items()})
    return model


def read_checkpoint(path: Path) -> VisionTransformer:
    with safe_open(path, "pt") as file:
        return rounded({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


# ---- Figures: the training digits, five folds ----


def training_digits() -> tuple[Tensor, Tensor]:
    """The 1,347 training images of the default data set as the default transform shows them."""
    store = load_dataset("digits").train
    view = _C.Transform("resize", SHAPE["image_size"])
    images = numpy.stack([view.test(store.load(index)) for index in range(len(store))])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255, torch.tensor(store.labels)


@torch.no_grad()
def digit_figures(model: VisionTransformer) -> dict[str, float]:
    """Percent right on each fifth of the training digits, fitted on the other four fifths."""
    images, labels = training_digits()
    x = functional.normalize(model(normalise(images)), dim=-1)
    fold, hits, linear = torch.arange(len(x)) % 5, 0, 0
    for held in range(5):
        fit, test = fold != held, fold == held
        means = torch.stack([x[fit & (labels == c)].mean(0) for c in range(10)])
        cosine = x[test] @ functional.normalize(means, dim=-1).T
        hits += (cosine.argmax(1) == labels[test]).sum().item()
        probe = LogisticRegression(C=30, max_iter=1000).fit(x[fit], labels[fit])
        linear += (probe.predict(x[test]) == labels[test].numpy()).sum().item()
    share = 100 / len(labels)
    return {
        "nearest_class_mean": round(share * hits, 2),
        "linear_probe": round(share * linear, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("vit_formula_patch8_32.safetensors"))
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=int, default=200, help="steps between lines and savings")
    parser.add_argument("--evaluate", type=Path, help="file whose figures to print")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.evaluate:
        print(digit_figures(read_checkpoint(options.evaluate)))
    else:
        train(options.out, options.steps, options.seed, options.report)


if __name__ == "__main__":
    main()
