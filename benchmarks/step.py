"""Times one whole training step of NTK-CL beside plain and careful PyTorch.

    python benchmarks/step.py --threads 2                         # ViT-Ti, batch 16, CPU
    python benchmarks/step.py --model vit-b --json step.json
    python benchmarks/step.py --model vit-b --batch 64 --device cuda --precision bfloat16

The step is the released method's (mode both, K = 1) in a later task, after the batch is loaded:

    plain      as published: one pass after another, full SVDs, loops, torch's default settings
    careful    every saving that torch's operators allow, the best global settings
    compiled   careful, with its blocks through torch.compile
    ours       ntkcl
    lean       ntkcl with recompute = true
    graph      ntkcl with cuda_graph = true
    any-order  ntkcl with deterministic = false
    float8     ntkcl with precision = float8, on a GPU with cuda_graph = true
    before     ntkcl of another build, --before <its python folder>

Each variant runs in a process of its own, with the same weights and batch. Losses and gradients are
compared first, then the processes step by turns. The floor is the sum over the matrix products that
remain after all exact savings, each alone at the best of torch's kernels, by turns with the rest.
A time is the minimum over the rounds, `faster` the ratio of such times and `median` that of the
ratios round by round: the machine may be shared.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from step_problem import (
    CLASSES,
    MODELS,
    Problem,
    product_steps,
    products_needed,
    products_published,
)
from step_pytorch import CarefulStep, PlainStep
from workers import (
    Process,
    append_result,
    by_turns,
    float32_settings,
    memory,
    serve,
    timed,
    verify,
)

# What ntkcl is asked for.
OURS: dict[str, dict[str, Any]] = {
    "before": {},
    "ours": {},
    "lean": {"recompute": True},
    "graph": {"cuda_graph": True},
    "any-order": {"deterministic": False},
    "float8": {"precision": "float8"},
}
VARIANTS = ("plain", "careful", "compiled", *(name for name in OURS if name != "before"))
# Against plain PyTorch in float32, for 16 images: relative error of a gradient, by its norm.
# Rounded products turn ReLUs on and off whose gradients cancel over a batch, the more the larger.
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float8": 0.8}
# Steps until a graph is recorded, and one that replays it.
REHEARSALS = 4
# What careful users set: no page faults for large tensors, workers that sleep when they wait.
CAREFUL_ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


# ---- one variant, in its own process ----


class OurStep:
    def __init__(
        self, problem: Problem, device: str, precision: str, threads: int, **asked: object
    ) -> None:
        from ntkcl import _C

        self.p, self.verify = problem, False
        backbone = _C.VisionTransformer(problem.backbone, problem.heads)
        release = _C.describe_options()["methods"]["ntk-cl"]["variants"]["release"]
        options = release | {
            "rank": problem.rank,
            "prompt_tokens": problem.prompts,
            "adapter_dropout": problem.dropout,
            "fusion_dropout": problem.dropout,
            "fusion_heads": problem.fusion_heads,
            "eta": problem.eta,
            "upsilon": problem.upsilon,
            "lambda": problem.lambda_,
            "orth_rank": problem.orth_rank,
            "temperature": problem.temperature,
        }
        train = {
            "device": device,
            "precision": precision,
            "threads": threads,
            "momentum": problem.momentum,
            "weight_decay": problem.weight_decay,
        } | asked
        self.session = _C.MethodSession(
            "ntk-cl", options, backbone, problem.task + 2, train, self.draw, as_run=True
        )
        lists = ("channel.", "patch.", "pre1.", "fusion.", "prototypes")
        state = problem.state
        self.session.load_state({n: t for n, t in state.items() if n.startswith(lists)})
        none = torch.empty(0)
        old = problem.old_classes
        self.session.begin_task(
            problem.task, old, CLASSES, CLASSES, problem.batch, none, none.long()
        )
        self.session.load_state(self.reference())

    def draw(
        self, purpose: str, task: int, step: int, number: int, layer: int
    ) -> torch.Tensor | None:
        if purpose == "head.weight":
            return self.p.state["head.weight"]
        if not self.verify:
            return None
        recorded = {
            "old_prototypes": self.p.drawn,
            "fusion.dropout": self.p.masks["fusion"],
            "adapter.dropout": self.p.masks.get(f"{number}.{layer}"),
        }
        return recorded.get(purpose)

    def reference(self) -> dict[str, torch.Tensor]:
        """The regularised weights before the task, stacked over the blocks as in the state."""
        previous = self.p.previous
        stacked = {n: t for n, t in previous.items() if n.startswith("fusion.")}
        for kind in ("channel.{}.down", "channel.{}.up", "patch.{}.mix", "patch.{}.norm"):
            blocks = [previous[f"{kind.format(i)}.weight"] for i in range(self.p.blocks)]
            stacked[f"{kind.replace('{}.', '')}.weight"] = torch.stack(blocks)
        return {f"previous.{name}": value for name, value in stacked.items()}

    def step(self, images: torch.Tensor, labels: torch.Tensor, verify: bool) -> dict[str, float]:
        self.verify = verify
        # Rate 0 leaves the weights as they are.
        rate = 0.0 if verify else self.p.learning_rate
        result = self.session.step(images, labels, rate, gradients=verify)
        self.result = result
        losses: dict[str, float] = result["losses"]
        return losses

    def gradients(self) -> dict[str, torch.Tensor]:
        """By the names of problem.state: lists come stacked, in the order of their state."""
        stacked = iter(self.result["gradients"])
        named = {}
        for kind, parts in (
            ("channel", ("down.weight", "down.bias", "up.weight", "up.bias")),
            ("patch", ("mix.weight", "mix.bias", "norm.weight", "norm.bias")),
        ):
            for part in parts:
                for i, gradient in enumerate(next(stacked)):
                    named[f"{kind}.{i}.{part}"] = gradient
        for name in ("query", "key", "value"):
            for part in ("weight", "bias"):
                named[f"fusion.{name}.{part}"] = next(stacked)
        named["head.weight"], named["head.sigma"] = stacked
        return {name: value.cpu() for name, value in named.items()}


def worker(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    device, kind = arguments.device, arguments.worker
    problem = Problem(arguments.model, arguments.batch, arguments.task)
    step: Any
    if kind == "floor":
        torch.set_float32_matmul_precision("highest")
    elif kind == "plain":
        step = PlainStep(problem, device)
    elif kind in OURS:
        asked = OURS[kind] | ({"cuda_graph": True} if (kind, device) == ("float8", "cuda") else {})
        step = OurStep(problem, device, arguments.precision, arguments.threads, **asked)
    else:
        torch.set_float32_matmul_precision(float32_settings(device)[-1])
        dtype = getattr(torch, arguments.precision)
        step = CarefulStep(problem, device, dtype, compiled=kind == "compiled")
    if kind != "floor":
        images, labels = problem.images.to(device), problem.labels.to(device)
    before = memory(device, reset=True)

    def verified(command: dict[str, Any]) -> dict[str, Any]:
        losses = step.step(images, labels, True)
        gradients = {name: g.contiguous().cpu() for name, g in step.gradients().items()}
        save_file(gradients, command["to"])
        for _ in range(REHEARSALS if kind in ("graph", "float8") else 1):
            step.step(images, labels, False)
        return {"losses": losses}

    serve(
        {
            "verify": verified,
            "floor": lambda _: {"seconds": floor_seconds(problem, arguments.precision, device)},
            "time": lambda _: {"seconds": timed(lambda: step.step(images, labels, False), device)},
            "memory": lambda _: {"bytes": memory(device) - before},
        }
    )


def floor_seconds(problem: Problem, precision: str, device: str) -> list[float]:
    """Seconds of each product alone (once), at the best of torch's settings."""
    return [
        best_seconds(product, torch.float32 if not product.frozen else getattr(torch, precision),
                     device)
        for product in products_needed(problem)
    ]  # fmt: skip


def best_seconds(product: Any, dtype: torch.dtype, device: str) -> float:
    best = float("inf")
    for setting in float32_settings(device):
        torch.set_float32_matmul_precision(setting)
        for run in product_steps(product, dtype, device):
            run()
            best = min(best, timed(run, device), timed(run, device))
    return best


# ---- all variants ----


def process_of(name: str, arguments: argparse.Namespace) -> Process:
    keys = ("model", "batch", "task", "device", "precision", "threads")
    environment = {}
    if name in ("careful", "compiled", "floor"):
        environment = CAREFUL_ENVIRONMENT
    elif name == "before":
        environment = {"PYTHONPATH": str(arguments.before.resolve())}
    return Process(name, __file__, {key: getattr(arguments, key) for key in keys}, environment)


def tolerance(name: str, arguments: argparse.Namespace) -> float:
    precision = {"plain": "float32", "float8": "float8"}.get(name, arguments.precision)
    return GRADIENT_TOLERANCE[precision] * max(arguments.batch / 16, 1)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    problem = Problem(arguments.model, arguments.batch, arguments.task)
    processes = [process_of(name, arguments) for name in arguments.variants]
    floor = process_of("floor", arguments)
    for process in (floor, *processes):
        process.__enter__()
    try:
        errors = verify(
            processes,
            lambda name: tolerance(name, arguments),
            smallest=lambda _: 1e-4,
            # Exactly 0; plain PyTorch leaves the rounding of sums that cancel.
            skipped=lambda name: name.endswith("mix.bias"),
        )
        by_turns([*processes, floor], arguments.rounds)
        memories = {process.name: process.ask("memory")["bytes"] for process in processes}
    finally:
        for process in (floor, *processes):
            process.__exit__()
    products = products_needed(problem)
    each = [min(times) for times in zip(*floor.seconds, strict=True)]
    floor_total = sum(p.count * s for p, s in zip(products, each, strict=True))
    needed = sum(p.flops for p in products)
    published = sum(p.flops for p in products_published(problem))
    return {
        "model": arguments.model,
        "batch": arguments.batch,
        "task": arguments.task,
        "precision": arguments.precision,
        "flops": {"published": published, "needed": needed},
        "floor": {
            "seconds": floor_total,
            "products": [
                {
                    "name": p.name,
                    "count": p.count,
                    "seconds": s,
                    "gflops": p.flops / p.count / s / 1e9,
                }
                for p, s in zip(products, each, strict=True)
            ],
        },
        "variants": {
            process.name: {
                "seconds": process.best,
                "all_seconds": process.seconds,
                "images_per_second": arguments.batch / process.best,
                "gflops": (published if process.name == "plain" else needed) / process.best / 1e9,
                "over_floor": process.best / floor_total,
                "peak_bytes": memories[process.name],
                "difference": errors[process.name],
            }
            for process in processes
        },
    }


def show(result: dict[str, Any]) -> None:
    flops, floor = result["flops"], result["floor"]["seconds"]
    print(
        f"\n{result['model']}, batch {result['batch']}, task {result['task']}, "
        f"{result['precision']}: {flops['published'] / 1e12:.3f} TFLOP as published, "
        f"{flops['needed'] / 1e12:.3f} needed, floor {floor:.3f} s "
        f"({flops['needed'] / floor / 1e9:.0f} GFLOP/s)"
    )
    first = next(iter(result["variants"].values()))
    print(
        f"{'':10} {'s':>8} {'images/s':>9} {'GFLOP/s':>8} {'faster':>7} {'median':>7} "
        f"{'/ floor':>8} {'MiB':>7} {'loss diff':>10} {'grad diff':>10}"
    )
    for name, v in result["variants"].items():
        rounds = zip(first["all_seconds"], v["all_seconds"], strict=True)
        by_round = statistics.median(a / b for a, b in rounds)
        print(
            f"{name:10} {v['seconds']:8.3f} {v['images_per_second']:9.2f} {v['gflops']:8.0f} "
            f"{first['seconds'] / v['seconds']:7.2f} {by_round:7.2f} {v['over_floor']:8.2f} "
            f"{v['peak_bytes'] / 2**20:7.0f} {v['difference']['losses']:10.1e} "
            f"{v['difference']['gradients']:10.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="vit-ti")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--task", type=int, default=1, help="from 1 on: there are old classes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32",
                        help="of all but plain")  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS,
                        default=["plain", "careful", "ours"])  # fmt: skip
    parser.add_argument("--before", type=Path, help="python folder of another build")
    parser.add_argument("--json", type=Path, help="also append the result to this file, as a line")
    parser.add_argument("--worker", choices=[*VARIANTS, "before", "floor"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    if arguments.before and "ours" in arguments.variants:
        arguments.variants.insert(arguments.variants.index("ours"), "before")
    result = measure(arguments)
    show(result)
    append_result(arguments, result)


if __name__ == "__main__":
    main()
