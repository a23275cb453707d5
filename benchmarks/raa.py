"""Times a training step of RAA beside plain PyTorch.

    python benchmarks/raa.py --threads 2                       # ViT-Ti, tasks 1 and 2, as released
    python benchmarks/raa.py --threads 2 --mode paper
    python benchmarks/raa.py --model vit-b --precision bfloat16 --json raa.json

Both passes of SAM+, two branches of width 64 and their mixture:

    plain    as published: every stream through the whole network, torch's default settings
    ours     ntkcl

Each runs in a process of its own. Losses and gradients of both passes are compared first, without
dropout, as its draws differ; then the processes step by turns. A time is the minimum over the
rounds: the machine may be shared.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from raa_pytorch import KINDS, PlainRaa
from safetensors.torch import save_file
from step_problem import CLASSES, IMAGE, MODELS, Problem, Tensors, moved
from workers import Process, append_result, by_turns, memory, serve, timed, verify

VARIANTS = ("plain", "ours")
BRANCHES, RANK, DROPOUT, RHO, RATE = 2, 64, 0.1, 0.05, 0.01
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}


class RaaProblem(Problem):
    """Branches and heads in the middle of a run."""

    def branches(self) -> Tensors:
        g = torch.Generator().manual_seed(2)
        shapes = {
            "down.weight": (RANK, self.width),
            "down.bias": (RANK,),
            "up.weight": (self.width, RANK),
            "up.bias": (self.width,),
        }
        return {
            f"branch{i}.{block}.{kind}": 0.05 * torch.randn(*shapes[kind], generator=g)
            for i in range(BRANCHES)
            for block in range(self.blocks)
            for kind in KINDS
        }

    def head(self) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(3)
        tasks = range(self.task + 1)
        return [0.02 * torch.randn(CLASSES, self.width, generator=g) for _ in tasks]

    def alphas(self, step: int) -> torch.Tensor:
        """(2, L, branches) of both passes."""
        g = torch.Generator().manual_seed(step)
        alphas = torch.rand(2, self.blocks, BRANCHES, generator=g)
        return alphas / alphas.sum(2, keepdim=True)


class OurStep:
    def __init__(self, p: RaaProblem, a: argparse.Namespace, dropout: float) -> None:
        from ntkcl import _C

        head, t = p.head(), p.task
        train = {
            "device": a.device,
            "precision": a.precision,
            "threads": a.threads,
            "optimizer": "sam+",
            "rho": RHO,
        }
        options = {
            "n_adapters": BRANCHES,
            "rank": RANK,
            "adapter_dropout": dropout,
            "amalgamation": a.mode,
            "alignment": False,
        }

        def draws(purpose: str, task: int, step: int, number: int, layer: int) -> Any:
            if purpose == "amalgamation":
                return p.alphas(step)[number]
            return head[t] / 0.02 if purpose == "head.weight" else None

        vit = _C.VisionTransformer(p.backbone, p.heads)
        self.session = _C.MethodSession("raa", options, vit, t + 1, train, draws, as_run=True)
        state = p.branches()
        if t:
            state |= {"head": torch.cat(head[:t]), "task_sizes": torch.full((t,), CLASSES)}
        self.session.load_state(state)
        none = torch.empty(0)
        self.session.begin_task(
            t, CLASSES * t, CLASSES, CLASSES, p.batch, none, none.long(), CLASSES * (t + 1)
        )
        self.first = 0 if t == 0 else 1

    def step(self, images: torch.Tensor, labels: torch.Tensor, move: bool) -> None:
        self.result = self.session.step(images, labels, RATE if move else 0.0, gradients=not move)

    def found(self) -> tuple[dict[str, float], Tensors]:
        losses, named = {}, {}
        for number, of_pass in enumerate(self.result["passes"]):
            losses[f"{number}"] = of_pass["losses"]["total"]
            kinds, heads = of_pass["gradients"][:4], of_pass["gradients"][4:]
            for kind, tensor in zip(KINDS, kinds, strict=True):
                for i, of_branch in enumerate(tensor):
                    for block, value in enumerate(of_branch):
                        named[f"{number}.branch{self.first + i}.{block}.{kind}"] = value
            by_task = torch.cat(heads).split(CLASSES)  # those of old tasks are one tensor
            named |= {f"{number}.head.{t}": value for t, value in enumerate(by_task)}
        return losses, {name: v.float().cpu().contiguous() for name, v in named.items()}


class PlainStep:
    def __init__(self, p: RaaProblem, a: argparse.Namespace, dropout: float) -> None:
        self.problem, self.steps = p, 0
        head = [value.to(a.device) for value in p.head()]
        self.model = PlainRaa(
            *(moved(p.backbone, a.device), p.heads, moved(p.branches(), a.device), head),
            *(BRANCHES, a.mode, dropout, RHO, RATE),
        )

    def step(self, images: torch.Tensor, labels: torch.Tensor, move: bool) -> None:
        local = labels - CLASSES * self.problem.task
        self.passes = self.model.step(images, local, self.problem.alphas(self.steps), move)
        self.steps += 1

    def found(self) -> tuple[dict[str, float], Tensors]:
        names = [n for n, v in self.model.branches.items() if v.requires_grad]
        names += [f"head.{t}" for t in range(len(self.model.head))]
        losses, named = {}, {}
        for number, (loss, gradients) in enumerate(self.passes):
            losses[f"{number}"] = loss
            for name, gradient in zip(names, gradients, strict=True):
                named[f"{number}.{name}"] = gradient.cpu()
        return losses, named


def worker(a: argparse.Namespace) -> None:
    torch.set_num_threads(a.threads)
    problem = RaaProblem(a.model, a.batch, a.task)
    images = problem.images.to(a.device)
    labels = (CLASSES * problem.task + torch.arange(a.batch) % CLASSES).to(a.device)
    make: Any = PlainStep if a.worker == "plain" else OurStep
    timing: list[Any] = []
    before = memory(a.device, reset=True)

    def verified(command: dict[str, Any]) -> dict[str, Any]:
        step = make(problem, a, 0.0)
        step.step(images, labels, False)
        losses, gradients = step.found()
        save_file(gradients, command["to"])
        return {"losses": losses}

    def prepared(_: dict[str, Any]) -> dict[str, Any]:
        timing.append(make(problem, a, DROPOUT))
        timing[0].step(images, labels, True)
        return {}

    serve(
        {
            "verify": verified,
            "prepare": prepared,
            "time": lambda _: {
                "seconds": timed(lambda: timing[0].step(images, labels, True), a.device)
            },
            "memory": lambda _: {"bytes": memory(a.device) - before},
        }
    )


def measure(a: argparse.Namespace, task: int) -> dict[str, Any]:
    keys = ("model", "batch", "device", "precision", "threads", "mode")
    options = {key: getattr(a, key) for key in keys} | {"task": task - 1}
    processes = [Process(name, __file__, options) for name in a.variants]
    for process in processes:
        process.__enter__()
    try:
        differences = verify(
            processes,
            lambda name: TOLERANCE["float32" if name == "plain" else a.precision],
            smallest=lambda gs: 1e-3 * float(torch.stack([g.norm() for g in gs.values()]).norm()),
        )
        errors = {name: max(difference.values()) for name, difference in differences.items()}
        for process in processes:
            process.ask("prepare")
        by_turns(processes, a.rounds)
        memories = {process.name: process.ask("memory")["bytes"] for process in processes}
    finally:
        for process in processes:
            process.__exit__()
    first = processes[0].best
    print(f"\n{a.model}, batch {a.batch}, {IMAGE} px, task {task}, {a.mode}, {a.precision}")
    print(f"{'':8} {'s':>8} {'images/s':>9} {'faster':>7} {'MiB':>7} {'difference':>11}")
    result: dict[str, Any] = {"task": task, "variants": {}}
    for process in processes:
        seconds = process.best
        result["variants"][process.name] = {
            "seconds": seconds,
            "all_seconds": process.seconds,
            "ratio": first / seconds,
            "peak_bytes": memories[process.name],
            "difference": errors[process.name],
        }
        print(
            f"{process.name:8} {seconds:8.3f} {a.batch / seconds:9.2f} {first / seconds:7.2f} "
            f"{memories[process.name] / 2**20:7.0f} {errors[process.name]:11.1e}"
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="vit-ti")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2], help="steps of these")
    parser.add_argument("--mode", choices=["code", "paper"], default="code")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32",
                        help="of ours")  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path, help="also append the result to this file, as a line")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--task", type=int, default=0, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a)
        return
    result: dict[str, Any] = {"model": a.model, "batch": a.batch, "mode": a.mode}
    result |= {"precision": a.precision, "steps": [measure(a, task) for task in a.tasks]}
    append_result(a, result)


if __name__ == "__main__":
    main()
