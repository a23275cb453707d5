"""Times LoRAC-IPC beside plain PyTorch: a training step, and all evaluations of a run.

    python benchmarks/lorac_ipc.py --threads 2                     # ViT-Ti, steps of tasks 1 and 10
    python benchmarks/lorac_ipc.py --tasks 1 10 20 --variants ours window
    python benchmarks/lorac_ipc.py --evaluation --threads 2

Steps, of LoRA on all six matrices, none of them frozen:

    plain    as published: every A_i B_i in every forward pass, dense gradients, the whole pool in
             the optimiser, torch's default settings
    ours     ntkcl outside the importance window
    window   ntkcl inside it: the importance of every matrix is measured, as plain always does

Each variant runs in a process of its own; losses and gradients are compared first, then the
processes step by turns. A time is the minimum over the rounds: the machine may be shared.

The evaluations are all those of a run of ten tasks of ten classes, before and after alignment.
Plain computes image by image, so its time is that of a few images (the predictions are compared)
times their number in all evaluations.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from lorac_pytorch import TYPES, PlainLorac, precision_matrices, predict_one
from safetensors.torch import save_file
from step_problem import CLASSES, IMAGE, MODELS, Problem, Tensors, moved
from workers import Process, append_result, by_turns, memory, serve, timed, verify

VARIANTS = ("plain", "ours", "window")
GROUPS = {"attention": TYPES[:4], "fc1": ("f1",), "fc2": ("f2",)}
STRENGTH, RATE, OMEGA_FACTOR = 1.0, 0.005, 0.1
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}


class LoraProblem(Problem):
    """Pools and head in the middle of a run: `task` modules are old."""

    def pools(self) -> dict[str, Tensors]:
        g = torch.Generator().manual_seed(2)
        c, blocks, modules = self.width, self.blocks, self.task + 1
        inputs = {kind: 4 * c if kind == "f2" else c for kind in TYPES}
        outputs = {kind: 4 * c if kind == "f1" else c for kind in TYPES}
        bound = self.rank**-0.5

        def uniform(*shape: int) -> torch.Tensor:
            return (2 * torch.rand(*shape, generator=g) - 1) * bound

        def normal(*shape: int) -> torch.Tensor:
            return 0.05 * torch.randn(*shape, generator=g)

        return {
            "A": {k: uniform(modules, blocks, inputs[k], self.rank) for k in TYPES},
            "B": {k: normal(modules, blocks, self.rank, outputs[k]) for k in TYPES},
            "omega": {k: 1 + normal(modules, blocks) for k in TYPES},
        }

    def head(self) -> Tensors:
        g = torch.Generator().manual_seed(3)
        classes = CLASSES * (self.task + 1)
        return {
            "weight": 0.02 * torch.randn(classes, self.width, generator=g),
            "bias": torch.zeros(classes),
        }


class OurStep:
    def __init__(self, p: LoraProblem, a: argparse.Namespace, window: bool) -> None:
        from ntkcl import _C

        pools, head, t = p.pools(), p.head(), p.task
        train = {
            "device": a.device,
            "precision": a.precision,
            "threads": a.threads,
            "optimizer": "adam",
            "weight_decay": 0.0,
        }
        options = {"rank": p.rank, "lambda": STRENGTH, "omega_lr_factor": OMEGA_FACTOR}
        vit = _C.VisionTransformer(p.backbone, p.heads)

        def draws(purpose: str, task: int, step: int, kind: int, block: int) -> Any:
            return pools["A"][TYPES[kind]][t, block] if purpose == "lora.down" else None

        self.session = _C.MethodSession(
            "lorac-ipc",
            options | {"importance_window": 1},
            *(vit, t + 1, train, draws),
            as_run=True,
        )
        state: Tensors = {f"head.{name}": value for name, value in head.items()}
        state["task_sizes"] = torch.full((t,), CLASSES)
        current: Tensors = {}
        for name, kinds in GROUPS.items():
            a_of, b_of = ([pools[n][k] for k in kinds] for n in "AB")
            state[f"{name}.old_down"] = torch.stack(
                [x[:t].permute(1, 2, 0, 3).flatten(2) for x in a_of], 1
            )
            state[f"{name}.old_up"] = torch.stack(
                [x[:t].permute(1, 0, 2, 3).flatten(1, 2) for x in b_of], 1
            )
            state[f"{name}.omega"] = torch.stack([pools["omega"][k][:t].t() for k in kinds], 1)
            # No step reads the omegas of the tasks before.
            state[f"{name}.bank"] = torch.zeros(p.blocks, len(kinds), t, t)
            current[f"{name}.up"] = torch.stack([x[t] for x in b_of], 1)
        self.session.load_state(state)
        none = torch.empty(0)
        # In a window of one step, the last; or far from it.
        steps = 1 if window else 1 << 30
        self.session.begin_task(
            *(t, CLASSES * t, CLASSES, CLASSES, p.batch, none, none.long()),
            classes=CLASSES * (t + 1), steps=steps,
        )  # fmt: skip
        self.session.load_state(current)

    def step(self, images: torch.Tensor, labels: torch.Tensor, move: bool) -> dict[str, float]:
        self.result = self.session.step(images, labels, RATE if move else 0.0, gradients=not move)
        losses: dict[str, float] = self.result["losses"]
        return losses

    def gradients(self) -> Tensors:
        head_weight, head_bias, *groups = self.result["gradients"]
        named = {"head.weight": head_weight, "head.bias": head_bias}
        for i, (name, kinds) in enumerate(GROUPS.items()):
            parts = {"A": groups[2 * i], "B": groups[2 * i + 1]}
            if len(groups) > 2 * len(GROUPS):
                parts["omega"] = groups[2 * len(GROUPS) + i]
            for part, tensor in parts.items():
                for j, kind in enumerate(kinds):
                    named[f"{part}.{kind}"] = tensor[:, j]
            assert name in GROUPS
        return {name: value.float().cpu().contiguous() for name, value in named.items()}


class PlainStep:
    def __init__(self, p: LoraProblem, device: str) -> None:
        self.t = p.task
        pools = {name: moved(pool, device) for name, pool in p.pools().items()}
        self.model = PlainLorac(
            *(moved(p.backbone, device), p.heads, pools, moved(p.head(), device)),
            *(p.task, CLASSES * p.task, CLASSES, STRENGTH, RATE, OMEGA_FACTOR),
        )

    def step(self, images: torch.Tensor, labels: torch.Tensor, move: bool) -> dict[str, float]:
        return self.model.step(images, labels, move)

    def gradients(self) -> Tensors:
        pools, head, t = self.model.pools, self.model.head, self.t
        named = {}
        for kind in TYPES:
            for name in "AB":
                gradient = pools[name][kind].grad
                assert gradient is not None
                named[f"{name}.{kind}"] = gradient[t]
            omega = pools["omega"][kind].grad
            if t and omega is not None:
                named[f"omega.{kind}"] = omega[:t].t()
        for name, value in head.items():
            assert value.grad is not None
            named[f"head.{name}"] = value.grad[CLASSES * t :]
        return {name: value.cpu().contiguous() for name, value in named.items()}


def worker(a: argparse.Namespace) -> None:
    torch.set_num_threads(a.threads)
    problem = LoraProblem(a.model, a.batch, a.task, a.rank)
    if a.worker == "plain":
        step: Any = PlainStep(problem, a.device)
    else:
        step = OurStep(problem, a, a.worker == "window")
    images = problem.images.to(a.device)
    labels = (CLASSES * problem.task + torch.arange(a.batch) % CLASSES).to(a.device)
    before = memory(a.device, reset=True)

    def verified(command: dict[str, Any]) -> dict[str, Any]:
        losses = step.step(images, labels, False)
        save_file(step.gradients(), command["to"])
        step.step(images, labels, True)
        return {"losses": losses}

    serve(
        {
            "verify": verified,
            "time": lambda _: {"seconds": timed(lambda: step.step(images, labels, True), a.device)},
            "memory": lambda _: {"bytes": memory(a.device) - before},
        }
    )


def measure_steps(a: argparse.Namespace, task: int) -> dict[str, Any]:
    options = {key: getattr(a, key) for key in ("model", "batch", "device", "precision", "threads")}
    options |= {"task": task - 1, "rank": a.rank}
    processes = [Process(name, __file__, options) for name in a.variants]
    for process in processes:
        process.__enter__()
    try:
        differences = verify(
            processes,
            lambda name: GRADIENT_TOLERANCE["float32" if name == "plain" else a.precision],
            smallest=lambda _: 1e-6,
        )
        errors = {name: max(difference.values()) for name, difference in differences.items()}
        by_turns(processes, a.rounds)
        memories = {process.name: process.ask("memory")["bytes"] for process in processes}
    finally:
        for process in processes:
            process.__exit__()
    first = processes[0].best
    print(f"\n{a.model}, batch {a.batch}, rank {a.rank}, task {task}, {a.precision}")
    print(f"{'':8} {'s':>8} {'images/s':>9} {'faster':>7} {'MiB':>7} {'difference':>11}")
    for process in processes:
        print(
            f"{process.name:8} {process.best:8.3f} {a.batch / process.best:9.2f} "
            f"{first / process.best:7.2f} {memories[process.name] / 2**20:7.0f} "
            f"{errors[process.name]:11.1e}",
            flush=True,
        )
    return {
        "task": task,
        "variants": {
            process.name: {
                "seconds": process.best,
                "all_seconds": process.seconds,
                "peak_bytes": memories[process.name],
                "difference": errors[process.name],
            }
            for process in processes
        },
    }


# ---- evaluation ----


def trained_run(a: argparse.Namespace, tasks: int, per_class: int) -> tuple[Any, Any, Any, Any]:
    """A run of one step a task on noise of each class's own colour, and its evaluations."""
    from ntkcl import _C

    p = Problem(a.model, a.batch, 1)
    classes = CLASSES * tasks
    generator = torch.Generator().manual_seed(5)
    colours = torch.randint(0, 256, (classes, 1, 16, 16, 3), generator=generator)

    def images(count: int) -> torch.Tensor:
        noise = torch.randint(-60, 61, (classes, count, 16, 16, 3), generator=generator)
        return (colours + noise).clamp(0, 255).to(torch.uint8).flatten(0, 1)

    def store(pixels: torch.Tensor, count: int) -> Any:
        return _C.make_array_store(pixels, torch.arange(classes).repeat_interleave(count).tolist())

    test = images(per_class)
    events: list[dict[str, Any]] = []
    trainer = _C.Trainer(
        "lorac-ipc",
        {"rank": a.rank, "alignment_epochs": 1, "alignment_draws": 32, "ipc_threshold": 0.0},
        {"initial_classes": CLASSES, "increment": CLASSES, "epochs": 1, "batch_size": 64}
        | {"optimizer": "adam", "learning_rate": RATE, "weight_decay": 0.0, "device": a.device}
        | {"precision": a.precision, "threads": a.threads},
        _C.VisionTransformer(p.backbone, p.heads),
        {
            "train": store(images(6), 6),
            "test": store(test, per_class),
            "class_order": list(range(classes)),
        },
        {"transform": "resize", "image_size": IMAGE},
        {},
        [0.5] * 3,
        [0.5] * 3,
    )
    result = trainer.run(events.append, None)
    return trainer, result, events, test


def measure_evaluation(a: argparse.Namespace) -> dict[str, Any]:
    tasks, per_class, sample = 10, a.per_class, a.sample
    trainer, result, events, test = trained_run(a, tasks, per_class)
    # Before and after each alignment: the first of two finds the features, the second has them.
    evaluations = [e for e in events if e["event"] in ("evaluation", "extra_evaluation")]
    ours = sum(e["seconds"] for e in evaluations)
    images = sum(e["count"] for e in evaluations)

    torch.set_num_threads(a.threads)
    p, state = Problem(a.model, a.batch, 1), moved(trainer.state(), "cpu")
    pools: dict[str, Tensors] = {"A": {}, "B": {}, "omega": {}}
    bank: list[Tensors] = [{} for _ in range(tasks)]
    for name, kinds in GROUPS.items():
        for j, kind in enumerate(kinds):
            down, up = (state[f"{name}.old_{n}"][:, j] for n in ("down", "up"))
            pools["A"][kind] = down.unflatten(2, (tasks, -1)).permute(2, 0, 1, 3).contiguous()
            pools["B"][kind] = up.unflatten(1, (tasks, -1)).transpose(0, 1).contiguous()
            pools["omega"][kind] = state[f"{name}.omega"][:, j].t().contiguous()
            for k in range(tasks):
                bank[k][kind] = state[f"{name}.bank"][:, j, k].t()
    head = {name: state[f"head.{name}"] for name in ("weight", "bias")}
    plain = PlainLorac(p.backbone, p.heads, pools, head, tasks, 0, 1, 0.0, 0.0, 0.0)
    rows = state["inference.factor_rows"].tolist()
    start = time.perf_counter()
    precisions = precision_matrices(state["inference.factors"], rows)
    inverting = time.perf_counter() - start
    clusters = state["inference.clusters"]
    class_of_cluster = torch.arange(len(clusters)).repeat_interleave(clusters)
    task_of_class = torch.arange(CLASSES * tasks) // CLASSES

    chosen = torch.linspace(0, len(test) - 1, sample).long()
    pixels = torch.nn.functional.interpolate(
        test[chosen].permute(0, 3, 1, 2).float(), IMAGE, mode="bicubic", antialias=True
    )
    uint8 = pixels.round().clamp(0, 255).to(torch.uint8)
    expected = trainer.scores(uint8).argmax(1)
    batch = (uint8.float() / 255 - 0.5) / 0.5
    seconds, same = [], 0
    for image, label in zip(batch, expected, strict=True):
        start = time.perf_counter()
        found = predict_one(
            plain, image[None], bank, state["inference.means"], precisions, class_of_cluster,
            task_of_class,
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
        same += found == int(label)
    assert same >= 0.9 * sample, f"plain predicts otherwise for {sample - same} of {sample} images"
    # Clusters are inverted anew in every evaluation, those of the classes seen.
    seen = sum(e["task"] + 1 for e in evaluations) / tasks
    plain_seconds = min(seconds) * images + inverting * seen
    print(
        f"\n{a.model}, {a.precision}: {images} images in {len(evaluations)} evaluations of a "
        f"test set of {len(test)}"
    )
    print(f"plain  {plain_seconds:9.1f} s (from {sample} images, best {min(seconds):.3f} s; "
          f"{same} of {sample} predictions equal)")  # fmt: skip
    print(f"ours   {ours:9.1f} s   {plain_seconds / ours:.1f} times faster")
    return {
        "images": images,
        "plain_seconds": plain_seconds,
        "plain_image_seconds": seconds,
        "inverting_seconds": inverting,
        "ours_seconds": ours,
        "ratio": plain_seconds / ours,
        "final_accuracy": result["final_accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="vit-ti")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--tasks", type=int, nargs="+", default=[1, 10], help="steps of these tasks"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32",
                        help="of ours")  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--evaluation", action="store_true", help="the evaluations, not the step")
    parser.add_argument("--per-class", type=int, default=10, help="test images, for --evaluation")
    parser.add_argument("--sample", type=int, default=10, help="images that plain evaluates")
    parser.add_argument("--json", type=Path, help="also append the result to this file, as a line")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--task", type=int, default=0, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a)
        return
    result: dict[str, Any] = {"model": a.model, "batch": a.batch, "rank": a.rank}
    result |= {"precision": a.precision}
    if a.evaluation:
        result["evaluation"] = measure_evaluation(a)
    else:
        result["steps"] = [measure_steps(a, task) for task in a.tasks]
    append_result(a, result)


if __name__ == "__main__":
    main()
