"""LoRAC-IPC against its golden files."""

from __future__ import annotations

import re

import pytest
import torch

import golden
from ntkcl import _C
from ntkcl.ops import composed_linear

DTYPES = [torch.float64, torch.float32]
RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-4}


def check(g, name, actual, tolerance64=1e-9):
    """The README's rule: float64 to 1e-9 * (1 + |expected|), float32 to 1e-4 of the largest."""
    expected = g[name].double()
    assert actual.shape == expected.shape, name
    difference = (actual.double() - expected).abs()
    allowed = tolerance64 * (1 + expected.abs())
    if actual.dtype == torch.float32:
        allowed = 1e-4 * expected.abs().max().clamp_min(1e-30)
    assert (difference <= allowed).all(), (name, (difference / allowed).max().item())


def check_scaled(expected, actual):
    """Tiny numbers, held to their largest."""
    if not expected.numel():
        return
    allowed = RELATIVE[actual.dtype] * expected.abs().max()
    assert (actual.double() - expected).abs().max() <= allowed


def test_learning_rates():
    g = golden.load("lorac_ipc", "schedule_metrics")
    for name, rates in g.under("lr/").items():
        base, epochs = re.fullmatch(r"lr([\d.]+)_epochs(\d+)", name).groups()
        groups = [
            _C.ParameterGroup("adapters", [torch.zeros(1)]),
            _C.ParameterGroup("omega", [torch.zeros(1)], learning_rate_scale=0.1),
        ]
        optimizer = _C.make_optimizer({"optimizer": "adam"}, groups)
        schedule = {"hold_epochs": 1, "min_learning_rate": 1e-5}
        for epoch, expected in enumerate(rates.tolist()):
            _C.schedule_learning_rates(optimizer, schedule, float(base), epoch, int(epochs))
            ours = [optimizer.learning_rate(group) for group in range(2)]
            assert ours == pytest.approx(expected, rel=1e-12), (name, epoch)


def test_metrics():
    g = golden.load("lorac_ipc", "schedule_metrics")
    # Stored with a row for each test set.
    matrix = g["metrics/acc_matrix"].t()
    averages = []
    for task, (average, forgetting, backward) in enumerate(
        g["metrics/average_forgetting_backward"].tolist()
    ):
        seen = matrix[: task + 1, : task + 1]
        averages.append(average)
        assert seen[task].mean().item() == pytest.approx(average)
        assert _C.forgetting(seen) == pytest.approx(forgetting)
        assert _C.backward_transfer(seen) == pytest.approx(backward)
    assert sum(averages) / len(averages) == pytest.approx(g["metrics/cumulative"].item())


TYPES = ["q", "k", "v", "o", "f1", "f2"]
GROUPS = {"attention": TYPES[:4], "fc1": ["f1"], "fc2": ["f2"]}


def sizes(model):
    names = ["image", "patch", "width", "heads", "depth", "rank", "tasks", "increment", "batch"]
    return dict(zip(names, model["config"].long().tolist(), strict=True))


def backbone(model, dtype):
    weights = {k: t.to(dtype) for k, t in model.under("backbone.").items() if "head." not in k}
    return _C.VisionTransformer(weights, sizes(model)["heads"])


def types_of(placement):
    return TYPES if placement == "all" else TYPES[:4]


def table(model, name, types, task, dtype=torch.float64):
    """(types, L) of the rows `task` of a pool (T, L)."""
    return torch.stack([model[f"{name}.{kind}"][task].to(dtype) for kind in types])


# ---- The composed passes ----


def composed_case(model, placement, when, variant, dtype):
    """What `lora_pass` is given: modules and weights by type, masks of current and old modules."""
    types = types_of(placement)
    task = 0 if when == "first" else sizes(model)["tasks"] - 1
    modules = {
        name: {kind: model[f"{name}.{kind}"][: task + 1].to(dtype) for kind in types}
        for name in "AB"
    }
    old = torch.ones(len(types), sizes(model)["depth"], dtype=torch.float64)
    if task:
        old = table(model, "mask", types, task - 1)
    omega = {}
    for row, kind in enumerate(types):
        kept = model[f"bank.{kind}"][task - 1, :task] if task else model[f"omega.{kind}"][:0]
        omega[kind] = torch.where(old[row] > 0, model[f"omega.{kind}"][:task], kept).to(dtype)
    current = old.clone()
    if variant == "release":
        current[1] = old[0]  # 12.1
    return task, modules, omega, current, old


def logits_and_value(model, features, head):
    """Of a head (weight, bias); the functional whose gradients are on file."""
    logits = torch.nn.functional.linear(features, *head)
    dtype = features.dtype
    value = (model["P"].to(dtype) * logits).sum() + (model["Q"].to(dtype) * features).sum()
    return logits, value


def head_of(model, dtype):
    return [model[f"backbone.head.{n}"].to(dtype) for n in ("weight", "bias")]


def forward_cases():
    g = golden.load("lorac_ipc", "forward")
    found = {name.rsplit("/", 1)[0] for name in g.tensors if name.endswith("/value")}
    return sorted(found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", forward_cases())
def test_forward_and_gradients(case, dtype):
    model, g = golden.load("lorac_ipc", "model"), golden.load("lorac_ipc", "forward")
    placement, when, variant = case.split("/")
    task, modules, omega, current, old = composed_case(model, placement, when, variant, dtype)
    leaves = [t for name in "AB" for t in modules[name].values()] + list(omega.values())
    probes = torch.zeros(current.shape, dtype=dtype)
    head = head_of(model, dtype)
    for leaf in [*leaves, probes, *head]:
        leaf.requires_grad_()
    features = _C.lora_pass(
        backbone(model, dtype),
        model["images"].to(dtype),
        modules["A"],
        modules["B"],
        omega,
        current,
        old,
        probes,
    )
    logits, value = logits_and_value(model, features, head)
    value.backward()
    check(g, f"{case}/features", features)
    check(g, f"{case}/logits", logits)
    check(g, f"{case}/value", value[None])
    check(g, f"{case}/head_weight_grad", head[0].grad)
    check(g, f"{case}/head_bias_grad", head[1].grad)
    checked = 0
    for row, kind in enumerate(types_of(placement)):
        gradients = {
            "A": modules["A"][kind].grad[task],
            "B": modules["B"][kind].grad[task],
            "omega": omega[kind].grad if task else None,
        }
        for name, gradient in gradients.items():
            if f"{case}/grad_{name}.{kind}" in g.tensors and gradient is not None:
                check(g, f"{case}/grad_{name}.{kind}", gradient)
                checked += 1
        # A frozen matrix's importance is never asked for: it is not computed.
        free = old[row] > 0
        check_scaled(g[f"{case}/importance.{kind}"][free], probes.grad[row][free])
        assert modules["A"][kind].grad[:task].eq(0).all()  # old modules are constants
    assert checked >= len(types_of(placement))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", forward_cases())
def test_weight_gradient(case, dtype):
    # A module of A = I and B = 0 changes nothing, and its B has the weight's gradient.
    model, g = golden.load("lorac_ipc", "model"), golden.load("lorac_ipc", "forward")
    placement, when, variant = case.split("/")
    _, modules, omega, current, old = composed_case(model, placement, when, variant, dtype)
    c = sizes(model)
    down, up, weights = {}, {}, {}
    for row, kind in enumerate(types_of(placement)):
        a, b = modules["A"][kind], modules["B"][kind]
        a, b = a * c["width"] / c["rank"], b  # the scale is 1 / rank
        rest = c["width"] - c["rank"]
        a = torch.nn.functional.pad(a, (0, rest))
        b = torch.nn.functional.pad(b, (0, 0, 0, rest))
        eye = torch.eye(a.shape[2], c["width"], dtype=dtype).expand(1, *a.shape[1:])
        down[kind], up[kind] = torch.cat([a, eye]), torch.cat([b, 0 * b[:1]])
        weights[kind] = torch.cat([omega[kind], current[row].to(dtype)[None]])
    up["q"].requires_grad_()
    features = _C.lora_pass(
        backbone(model, dtype),
        model["images"].to(dtype),
        down,
        up,
        weights,
        torch.ones_like(current),
        torch.zeros_like(old),
    )
    logits_and_value(model, features, head_of(model, dtype))[1].backward()
    check(g, f"{case}/features", features)
    check(g, f"{case}/weight_grad.q.block1", up["q"].grad[-1, 1] * c["width"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("placement", ["qkvo", "all"])
def test_snapshots(placement, dtype):
    model, g = golden.load("lorac_ipc", "model"), golden.load("lorac_ipc", "forward")
    types = types_of(placement)
    for k in range(sizes(model)["tasks"] - 1):
        modules = {
            name: {kind: model[f"{name}.{kind}"][: k + 1].to(dtype) for kind in types}
            for name in "AB"
        }
        omega = {kind: model[f"bank.{kind}"][k, : k + 1].to(dtype) for kind in types}
        for pool in modules.values():  # all of them are old
            for kind, module in pool.items():
                pool[kind] = torch.cat([module, 0 * module[:1]])
        free = torch.ones(len(types), sizes(model)["depth"], dtype=torch.float64)
        images = model["images"].to(dtype)
        features = _C.lora_pass(
            backbone(model, dtype), images, modules["A"], modules["B"], omega, free, free
        )
        check(g, f"{placement}/snapshot{k}/features", features)
        logits = torch.nn.functional.linear(features, *head_of(model, dtype))
        check(g, f"{placement}/snapshot{k}/logits", logits)


# ---- Training steps and whole runs ----


def method_state(model, types, task, dtype):
    """The method's tensors as they are before task `task`, from the pools of `model`."""
    state = {}
    for name, kinds in GROUPS.items():
        if kinds[0] not in types:
            continue
        pools = {p: [model[f"{p}.{kind}"] for kind in kinds] for p in ("A", "B", "omega", "bank")}
        tensors = {
            "old_down": [a[:task].permute(1, 2, 0, 3).flatten(2) for a in pools["A"]],
            "old_up": [b[:task].permute(1, 0, 2, 3).flatten(1, 2) for b in pools["B"]],
            "omega": [omega[:task].t() for omega in pools["omega"]],
            "bank": [bank[:task, :task].permute(2, 0, 1) for bank in pools["bank"]],
        }
        state |= {f"{name}.{key}": torch.stack(t, 1).to(dtype) for key, t in tensors.items()}
    state["mask"] = torch.ones(len(types), sizes(model)["depth"], dtype=torch.float64)
    if task:
        state["mask"] = table(model, "mask", types, task - 1)
    per_task = sizes(model)["increment"]
    state["task_sizes"] = torch.full((task,), per_task, dtype=torch.long)
    for n in ("weight", "bias"):
        state[f"head.{n}"] = model[f"backbone.head.{n}"].to(dtype)
    return state


def pool_of(state, name, key):
    """A group's tensor (L, g, ...) of the state by type."""
    return dict(zip(GROUPS[name], state[f"{name}.{key}"].unbind(1), strict=True))


def method_options(placement, variant, **others):
    release = {
        "k_mask": "query",
        "selection": "release",
        "mask_unseen": False,
        "class_lookup": "position",
        "small_clusters": "error",
    }
    return {"placement": placement, **(release if variant == "release" else {}), **others}


def step_cases():
    g = golden.load("lorac_ipc", "train_step")
    return sorted(name.removesuffix("/ce") for name in g.tensors if name.endswith("/ce"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", step_cases())
def test_training_steps(case, dtype):
    model, g = golden.load("lorac_ipc", "model"), golden.load("lorac_ipc", "train_step")
    placement, when, variant = case.split("/")
    c, types = sizes(model), types_of(placement)
    task = 0 if when == "first" else c["tasks"] - 1
    strength = g["lambda"].item()
    options = method_options(
        placement,
        variant,
        rank=c["rank"],
        ipc_threshold=0.5,  # importance is measured; nothing is selected here
        omega_lr_factor=g["omega_lr_scale"].item(),
        **{"lambda": strength},
    )
    train = {"optimizer": "adam", "weight_decay": 0.0, "cpu_matmul": "default"}
    session = _C.MethodSession(
        "lorac-ipc",
        options,
        backbone(model, dtype),
        c["tasks"],
        train | {"precision": str(dtype).removeprefix("torch.")},
        draws=lambda purpose, t, step, kind, block: (
            model[f"A.{TYPES[kind]}"][t, block] if purpose == "lora.down" else None
        ),
    )
    session.load_state(method_state(model, types, task, dtype))
    classes = c["increment"]
    images = g["images_u8"].to(dtype) / 255
    labels = g[f"{'/'.join(case.split('/')[:2])}/labels"].long()
    session.begin_task(
        task,
        task * classes,
        classes,
        classes,
        c["batch"],
        images[0],
        labels[0],
        classes=c["tasks"] * classes,
    )
    session.load_state(
        {
            f"{name}.up": torch.stack([model[f"B.{kind}"][task] for kind in kinds], 1).to(dtype)
            for name, kinds in GROUPS.items()
            if kinds[0] in types
        }
    )
    before, mean, steps = session.state(), None, len(images)
    columns = {name: [] for name in ("ce", "l_orth", "grad_norm")}
    importance = []
    for step in range(steps):
        losses = session.step(images[step], labels[step], g["lr"].item())["losses"]
        for name, column in columns.items():
            column.append(losses[name])
        state = session.state()
        now = state["importance.mean"]
        importance.append((now - (0 if mean is None else 0.85 * mean)) / 0.15)
        mean = now
        if f"{case}/after{step + 1}/head_bias" in g.tensors:
            check_step(g, f"{case}/after{step + 1}", model, state, types, task)
    as_dtype = {
        name: torch.tensor(column, dtype=torch.float64).to(dtype)
        for name, column in columns.items()
    }
    check(g, f"{case}/ce", as_dtype["ce"])
    check(g, f"{case}/ortho", as_dtype["l_orth"] * strength)
    check(g, f"{case}/grad_norm", as_dtype["grad_norm"])
    free = state["mask"]  # a frozen matrix's importance is not computed
    check_scaled(g[f"{case}/importance"] * free, (torch.stack(importance) * free).to(dtype))
    score = state["importance.mean"] * state["importance.uncertainty"] * state["mask"]
    check_scaled(g[f"{case}/score"] * free, score.to(dtype))
    for name in GROUPS:  # old modules and the bank stay as they are
        for key in ("old_down", "old_up", "bank"):
            if f"{name}.{key}" in state:
                assert torch.equal(state[f"{name}.{key}"], before[f"{name}.{key}"])


def check_step(g, prefix, model, state, types, task):
    check(g, f"{prefix}/head_weight", state["head.weight"])
    check(g, f"{prefix}/head_bias", state["head.bias"])
    for name, kinds in GROUPS.items():
        if kinds[0] not in types:
            continue
        for kind in kinds:
            for key, file in (("down", "A"), ("up", "B")):
                if f"{prefix}/{file}.{kind}" in g.tensors:
                    check(g, f"{prefix}/{file}.{kind}", pool_of(state, name, key)[kind])
            omega = model[f"omega.{kind}"].clone()
            ours = pool_of(state, name, "omega")[kind]  # (L, t)
            omega[:task] = ours.t()
            check(g, f"{prefix}/omega.{kind}", omega.to(ours.dtype))


class RunChecker:
    """Gathers what happens in a run."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.losses = {name: [] for name in ("ce", "l_orth", "grad_norm")}
        self.rates, self.scores, self.masks, self.before = [], [], [], []
        self.last_mask = None

    def __call__(self, event):
        name = event["event"]
        if name == "step":
            for key, column in self.losses.items():
                column.append(event["losses"][key])
        elif name == "epoch":
            self.rates.append(event["learning_rate"])
            state = self.trainer.state()
            self.last = state["importance.mean"] * state["importance.uncertainty"] * state["mask"]
        elif name == "extra_evaluation":
            self.before.append(event["per_task"])
        elif name == "evaluation":
            self.scores.append(self.last)
            self.masks.append(self.trainer.state()["mask"])


def run_case(variant, dtype, **others):
    model, g = golden.load("lorac_ipc", "model"), golden.load("lorac_ipc", "mini_run")
    c = sizes(model)
    lr, omega_scale, strength, alignment_lr, threshold = g["hyper"].tolist()
    batch, epochs, alignment_epochs, clusters, inference_clusters, draws_of = g["sizes"].tolist()
    classes, per_class = g["train_u8"].shape[:2]

    def draws(purpose, task, step, list_, block):
        if purpose == "lora.down":
            return model[f"A.{TYPES[list_]}"][task, block]
        if purpose == "head.weight":
            return model["backbone.head.weight"] / 0.02
        if purpose == "head.bias":
            return model["backbone.head.bias"]
        if purpose == "order":
            return g["order"][task, step]
        if purpose == "alignment.clusters":
            return torch.arange(per_class) % clusters
        if purpose == "inference.clusters":
            return torch.arange(per_class) % inference_clusters
        if purpose == "alignment.order":
            return g[f"permutation.task{task}"][step]
        if purpose == "alignment.normals":
            return g[f"z.task{task}"][step]
        raise AssertionError(purpose)

    def store(images):
        labels = torch.arange(classes).repeat_interleave(images.shape[1])
        pixels = images.flatten(0, 1).permute(0, 2, 3, 1).contiguous()
        return _C.make_array_store(pixels, labels.tolist())

    trainer = _C.Trainer(
        "lorac-ipc",
        method_options(
            "all",
            variant,
            rank=c["rank"],
            omega_lr_factor=omega_scale,
            ipc_threshold=threshold,
            inference_clusters=inference_clusters,
            alignment_clusters=clusters,
            alignment_epochs=alignment_epochs,
            alignment_learning_rate=alignment_lr,
            alignment_draws=draws_of,
            **{"lambda": strength},
            **others,
        ),
        {
            "initial_classes": c["increment"],
            "increment": c["increment"],
            "epochs": epochs,
            "batch_size": batch,
            "learning_rate": lr,
            "min_learning_rate": 1e-5,
            "hold_epochs": 1,
            "optimizer": "adam",
            "weight_decay": 0.0,
            "precision": str(dtype).removeprefix("torch."),
            "device": "cpu",
            "cpu_matmul": "default",
        },
        backbone(model, dtype),
        {
            "train": store(g["train_u8"]),
            "test": store(g["test_u8"]),
            "class_order": list(range(classes)),
        },
        {"transform": "resize", "image_size": c["image"]},
        {},
        [0.0] * 3,
        [1.0] * 3,
        draws=draws,
    )
    checker = RunChecker(trainer)
    return g, trainer, checker, trainer.run(on_event=checker)


def matrix(rows, tasks):
    """Rows of accuracies after each task as the file has them: (test set, after task), 0 above."""
    full = torch.zeros(tasks, tasks, dtype=torch.float64)
    for row in rows:
        full[: len(row), len(row) - 1] = torch.tensor(row, dtype=torch.float64)
    return full


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["release", "corrected"])
def test_whole_run(variant, dtype):
    g, trainer, checker, result = run_case(variant, dtype)
    tolerance = 1e-6
    tasks = len(g[f"{variant}/acc_matrix"])
    state = trainer.state()
    strength = g["hyper"][2].item()
    for name, file in (("ce", "ce"), ("l_orth", "ortho"), ("grad_norm", "grad_norm")):
        column = torch.tensor(checker.losses[name], dtype=torch.float64)
        column = column * (strength if file == "ortho" else 1)
        check(g, f"{variant}/{file}", column.to(dtype), tolerance)
    rates = torch.tensor(checker.rates, dtype=torch.float64)
    assert torch.allclose(rates, g[f"{variant}/lr_per_epoch"][:, 0], rtol=1e-12, atol=0)
    check_scaled_to(g[f"{variant}/score"], torch.stack(checker.scores), dtype, 1e-6)
    assert torch.equal(torch.stack(checker.masks), g[f"{variant}/mask"].double())
    for name, kinds in GROUPS.items():
        for kind in kinds:
            bank = pool_of(state, name, "bank")[kind].permute(1, 2, 0)  # (T, T, L)
            ones = torch.ones_like(bank)
            upper = torch.ones(tasks, tasks).triu(1)[:, :, None].bool()
            check(g, f"{variant}/bank.{kind}", torch.where(upper, ones, bank), tolerance)
            for key, file in (("old_down", "A"), ("old_up", "B")):
                if f"{variant}/{file}.{kind}.last_block" in g.tensors:
                    last = pool_of(state, name, key)[kind][-1]
                    rank = g[f"{variant}/B.q.last_block"].shape[1]
                    pool = last.unflatten(1 if file == "A" else 0, (tasks, rank))
                    pool = pool.transpose(0, 1) if file == "A" else pool
                    check(g, f"{variant}/{file}.{kind}.last_block", pool, tolerance)
    check(g, f"{variant}/head_weight", state["head.weight"], tolerance)
    check(g, f"{variant}/head_bias", state["head.bias"], tolerance)
    per_task = [e["per_task"] for e in result["evaluations"]]
    expected = g[f"{variant}/acc_matrix"]
    assert torch.allclose(matrix(per_task, tasks), expected, atol=1e-9)
    before = matrix(checker.before, tasks)
    assert torch.allclose(before, g[f"{variant}/acc_matrix_before_alignment"], atol=1e-9)
    images = g["test_u8"].flatten(0, 1)
    check(g, f"{variant}/final_logits", trainer.scores(images), tolerance)
    last = result["evaluations"][-1]
    assert last["inferred_task"] == pytest.approx(g[f"{variant}/final_task_accuracy"].mean().item())
    average, forgetting, backward = g[f"{variant}/average_forgetting_backward"][-1].tolist()
    assert result["final_task_mean"] == pytest.approx(average)
    assert result["forgetting"] == pytest.approx(forgetting)
    assert result["backward_transfer"] == pytest.approx(backward)


def check_scaled_to(expected, actual, dtype, tolerance64):
    allowed = (1e-4 if dtype == torch.float32 else tolerance64) * expected.abs().max()
    assert (actual - expected).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_run_without_inference(dtype):
    g, _, _, result = run_case("release", dtype, inference="none")
    accuracy, task_accuracy = g["release/without_inference_accuracy_task_accuracy"].t()
    last = result["evaluations"][-1]  # the file has its test sets one by one
    assert last["per_task"] == pytest.approx(accuracy.tolist())
    assert last["inferred_task"] == pytest.approx(task_accuracy.mean().item())


# ---- The orthogonality penalty ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_orthogonality(dtype):
    model, g = golden.load("lorac_ipc", "model"), golden.load("lorac_ipc", "ortho")
    strength = g["lambda"].item()
    tasks = model["config"].long().tolist()[6]
    for t in range(tasks):
        total = 0.0
        for kind in TYPES:
            pool = model[f"A.{kind}"].to(dtype)
            free = model[f"mask.{kind}"][t - 1].to(dtype) if t else pool.new_ones(pool.shape[1])
            old = pool[:t].permute(1, 2, 0, 3).flatten(2)
            values, gradient = _C.Orthogonality(old)(pool[t])
            check(g, f"t{t}/value.{kind}", values * free)
            check(g, f"t{t}/grad_A.{kind}", strength * gradient * free[:, None, None])
            total += strength * (values * free).sum().double().item()
        assert total == pytest.approx(g[f"t{t}/loss"].item(), rel=RELATIVE[dtype])


@pytest.mark.parametrize("columns", [0, 3])
def test_orthonormal_columns_cost_nothing(columns):
    q = torch.eye(8, dtype=torch.float64)[None]
    values, gradient = _C.Orthogonality(q[:, :, :columns])(q[:, :, columns : columns + 4])
    assert torch.equal(values, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(gradient, torch.zeros(1, 8, 4, dtype=torch.float64))


# ---- Importance and selection ----


def importance_of(weights, gradients):
    """mean |W * G| of matrices (L, in, out) as a composed layer has it: y = I W, dL/dy = G."""
    result = []
    for w, gradient in zip(weights, gradients, strict=True):
        eye, none = torch.eye(len(w), dtype=w.dtype), w.new_zeros(1, len(w), 1)
        probe = w.new_zeros(1).requires_grad_()
        y = composed_linear(eye, w.t()[None], None, none, w.new_zeros(1, 1, w.shape[1]), [0.0],
                            composed=True, probe=probe)  # fmt: skip
        y.backward(gradient)
        result.append(probe.grad)
    return torch.cat(result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_importance_average(dtype):
    g = golden.load("lorac_ipc", "ipc")
    average = _C.ImportanceAverage()
    for step in range(len(g["ema/importance"])):
        importance = torch.stack(
            [
                importance_of(
                    g[f"ema/W.{kind}"][step].to(dtype), g[f"ema/G.{kind}"][step].to(dtype)
                )
                for kind in TYPES
            ]
        )
        average.add(importance)
        check_scaled(g["ema/importance"][step], importance)
        check_scaled(g["ema/mean"][step], average.mean)
        check_scaled(g["ema/uncertainty"][step], average.uncertainty)
    check_scaled(g["ema/score"], average.score())


@pytest.mark.parametrize("window", [None, 128])
def test_importance_of_the_last_steps(window):
    g = golden.load("lorac_ipc", "ipc")
    average = _C.ImportanceAverage()
    for importance in g["series/importance"].double()[-window if window else 0 :]:
        average.add(importance)
    check_scaled(g[f"series/score{f'_window{window}' if window else ''}"], average.score())


def selections():
    g = golden.load("lorac_ipc", "ipc")
    names = [name for name in g.tensors if re.fullmatch(r"select/thr.*/(release|corrected)", name)]
    names += [n.removesuffix("_fails_at_task") for n in g.tensors if n.endswith("_fails_at_task")]
    return sorted(set(names))


@pytest.mark.parametrize("name", selections())
def test_selection(name):
    g = golden.load("lorac_ipc", "ipc")
    threshold, which, variant = re.fullmatch(r"select/thr([\d.]+)/(\w+)/(\w+)", name).groups()
    arguments = {
        "threshold": float(threshold),
        "of_new": which == "new_mask",
        "rule": "release" if variant == "release" else "exact",
    }
    scores = g["select/score"].double()
    fails_at = -1
    if variant == "release":
        fails_at = int(g[f"{name}_fails_at_task"].item())
    mask = torch.ones_like(scores[0])
    for task, score in enumerate(scores):
        if task == fails_at:
            with pytest.raises(ValueError, match="cannot freeze 0 matrices"):
                _C.freeze_important(mask, score, **arguments)
            break
        mask = _C.freeze_important(mask, score, **arguments)
        assert torch.equal(mask, g[name][task].double()), task


def test_selection_refuses_what_cannot_be():
    mask, score = torch.ones(6, 3), torch.rand(6, 3)
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="expected a threshold from 0 to 1"):
            _C.freeze_important(mask, score, threshold)
    with pytest.raises(ValueError, match="expected the rule exact or release, got 'relase'"):
        _C.freeze_important(mask, score, 0.1, rule="relase")
    for rule in ("exact", "release"):
        with pytest.raises(FloatingPointError, match="expected finite scores"):
            _C.freeze_important(mask, score * torch.nan, 0.1, rule=rule)
    with pytest.raises(ValueError, match=r"mask of the score's shape \[6, 3\], got \[6, 2\]"):
        _C.freeze_important(mask[:, :2], score, 0.1)


# ---- Clusters and task inference ----


def test_kmeans():
    g = golden.load("lorac_ipc", "task_inference")
    centers, labels = _C.kmeans(g["kmeans/x"].double(), g["kmeans/init"].double())
    assert torch.equal(labels, g["kmeans/labels"].long())
    g.check("kmeans/centers", centers, 0)


def test_kmeans_keeps_every_cluster():
    # Two centers so far off that no row is theirs: each gets one.
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0]]).double()
    centers, labels = _C.kmeans(x, torch.tensor([[1.0], [100.0], [200.0]]).double())
    assert sorted(torch.bincount(labels, minlength=3).tolist()) == [1, 1, 2]
    for cluster in range(3):
        assert torch.equal(centers[cluster], x[labels == cluster].mean(0))


def test_kmeans_plus_plus_draws_distinct_rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator).repeat(2, 1)
    draws = torch.rand(200, 8, generator=generator, dtype=torch.float64)
    for row in draws:
        assert len(_C.kmeans_plus_plus(x, row).unique(dim=0)) == 8
    # Fewer distinct rows than clusters: all of them, once.
    few = torch.tensor([[1.0], [3.0], [1.0], [3.0]])
    assert sorted(_C.kmeans_plus_plus(few, torch.full((3,), 0.9)).flatten().tolist()) == [1.0, 3.0]


def test_kmeans_plus_plus_draws_by_squared_distance():
    # From row 0, the rows at distance 1 and 2 have probabilities 1/5 and 4/5.
    x = torch.tensor([[0.0], [1.0], [2.0]])
    second = [
        _C.kmeans_plus_plus(x, torch.tensor([0.0, draw], dtype=torch.float64))[1].item()
        for draw in (0.0, 0.19, 0.21, 0.99)
    ]
    assert second == [1.0, 1.0, 2.0, 2.0]


def inference(g, dtype, order):
    gaussians = _C.ClusterGaussians()
    for c in order:
        rows = torch.nn.functional.normalize(g["train_features"][c].to(dtype))
        gaussians.add_class(rows, g["cluster_labels"][c].long())
    return gaussians


@pytest.mark.parametrize("dtype", DTYPES)
def test_task_inference(dtype):
    g = golden.load("lorac_ipc", "task_inference")
    tests = torch.nn.functional.normalize(g["test_features"].to(dtype), dim=2)
    per_task = len(g["train_features"]) // len(tests)
    for t in range(len(tests)):
        distances = inference(g, dtype, range((t + 1) * per_task)).distances(
            tests[: t + 1].flatten(0, 1)
        )
        check(g, f"after_task{t}/distance", distances, 1e-8)
        expected = g[f"after_task{t}/predicted_task"].long()
        assert torch.equal(distances.argmin(1) // per_task, expected)
        check_predictions(g, t, expected, per_task, dtype)
    # The task is looked up by the class, not by its place (repair 12.4).
    classes = g["shuffled_order/classes"].long()
    nearest = inference(g, dtype, classes.flatten().tolist()).distances(tests.flatten(0, 1))
    task_of = torch.arange(len(tests)).repeat_interleave(per_task)
    assert torch.equal(task_of[nearest.argmin(1)], g["shuffled_order/predicted_task"].long())


def check_predictions(g, t, tasks, per_task, dtype):
    """Classes by the snapshot of each image, or by that of a vote of its test set."""
    raw = g["test_features"][: t + 1].to(dtype).flatten(0, 1)
    heads = g["snapshot_heads"].to(dtype)
    true_task = torch.arange(t + 1).repeat_interleave(len(raw) // (t + 1))
    for kind, chosen in (("per_sample", tasks), ("batch_wise", _C.votes(tasks, true_task))):
        logits = torch.einsum("nc,nck->nk", raw, heads[chosen])
        prefix = f"after_task{t}/{kind}/predicted_class"
        assert torch.equal(logits.argmax(1), g[prefix].long())
        if kind == "per_sample":
            seen = logits[:, : (t + 1) * per_task].argmax(1)
            assert torch.equal(seen, g[f"{prefix}_corrected"].long())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cluster_of_one_image(dtype):
    g = golden.load("lorac_ipc", "task_inference")
    gaussians = _C.ClusterGaussians()
    rows = torch.nn.functional.normalize(g["train_features"][0].to(dtype))
    gaussians.add_class(rows, g["singleton/labels"].long())
    tests = torch.nn.functional.normalize(g["test_features"].to(dtype), dim=2).flatten(0, 1)
    check(g, "singleton/distance", gaussians.distances(tests)[:, 0], 1e-8)


def test_task_inference_refuses_what_cannot_be():
    gaussians = _C.ClusterGaussians()
    with pytest.raises(ValueError, match="expected at least one class"):
        gaussians.distances(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="a row in each of 3 clusters, got none in cluster 1"):
        gaussians.add_class(torch.zeros(2, 4), torch.tensor([0, 2]))
    gaussians.add_class(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected features \(b, 4\), got \[1, 5\]"):
        gaussians.distances(torch.zeros(1, 5))


# ---- Head alignment ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_cluster_moments(dtype):
    g = golden.load("lorac_ipc", "head_alignment")
    labels = g["stats/labels"].long()
    clusters = len(g["stats/means"])
    means, variances = _C.cluster_moments(g["stats/features"].to(dtype), labels, clusters)
    check(g, "stats/means", means)
    check(g, "stats/variances", variances)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["plain", "fc_norm"])
def test_head_alignment(dtype, case):
    model, g = golden.load("lorac_ipc", "model"), golden.load("lorac_ipc", "head_alignment")
    normals = g["z"].to(dtype)  # (epochs, classes, K, rows, C)
    epochs, classes, _, rows, width = normals.shape
    asked = []

    def draws(epoch, numbers):
        asked.append(len(numbers))
        return normals[epoch].reshape(-1, width)[numbers]

    weight, bias = (model[f"backbone.head.{n}"].to(dtype).clone() for n in ("weight", "bias"))
    norm = (torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype))
    task = int(g["task"].item())
    n_old = classes // (task + 1) * task
    losses = _C.align_head(
        weight,
        bias,
        *(norm if case == "fc_norm" else (None, None)),
        g["means"].to(dtype),
        g["variances"].to(dtype),
        n_old,
        epochs,
        g["lr"].item(),
        rows,
        _C.AlignmentDraws(lambda epoch, count: g["permutation"][epoch].long(), draws),
    )
    assert asked == [n_old * rows] * epochs  # no draw is made that no step uses
    check(g, f"{case}/loss", torch.tensor(losses, dtype=torch.float64).to(dtype))
    check(g, f"{case}/head_weight", weight)
    check(g, f"{case}/head_bias", bias)
    if case == "fc_norm":
        check(g, "fc_norm/norm_weight", norm[0])
        check(g, "fc_norm/norm_bias", norm[1])


def test_head_alignment_refuses_what_cannot_be():
    head = (torch.zeros(3, 4), torch.zeros(3), None, None)
    draws = _C.AlignmentDraws(lambda epoch, count: None, lambda epoch, numbers: None)
    moments = torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match="expected 0 to 1 old classes, got 2"):
        _C.align_head(*head, moments, moments, 2, 1, 0.1, 5, draws)
    with pytest.raises(ValueError, match=r"means and variances \(n, K, C\), got"):
        _C.align_head(*head, moments, torch.zeros(2, 2, 4), 1, 1, 0.1, 5, draws)
    with pytest.raises(ValueError, match="a row in each of 3 clusters"):
        _C.cluster_moments(torch.zeros(2, 4), torch.tensor([0, 2]), 3)
