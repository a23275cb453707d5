"""NTK-CL's arithmetic against an oracle: every golden case, float64 and float32."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

import golden
from ntkcl import _C
from ntkcl.ops import dissimilarity, signed_projection

DTYPES = [torch.float64, torch.float32]
FUSION_KINDS = [
    "attention",
    "attention_dropout",
    "concat",
    "multimodal",
    "vae",
    "lstm",
    "gru",
]
# The README's float32 figures.
PASS, PASS_GRADIENT, STEP_GRADIENT, TWO_STEPS, RUN = 3e-6, 1.5e-5, 2.5e-6, 3e-6, 7e-6
LOSS, LOSS_ABSOLUTE, PROTOTYPE, SCORE = 1.5e-5, 1e-5, 1e-6, 2e-7


def load(name: str) -> golden.Golden:
    return golden.load("ntk_cl", name)


def vit(config: dict, dtype: torch.dtype) -> _C.VisionTransformer:
    weights = {name: t.to(dtype) for name, t in load("vit").tensors.items()}
    return _C.VisionTransformer(weights, config["heads"])


def precision(dtype: torch.dtype) -> dict[str, str]:
    return {"precision": str(dtype).removeprefix("torch.")}


def pixels(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return images.to(dtype) / 255


def leaves(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: t.to(dtype, copy=True).requires_grad_() for name, t in tensors.items()}


def release_options(config: dict, **extra) -> dict:
    """The released method at the sizes of a golden file, without dropout."""
    release = _C.describe_options()["methods"]["ntk-cl"]["variants"]["release"]
    names = {"K": "frozen_lists", "ptm": "pretrained_feature", "r": "rank", "P": "prompt_tokens"}
    names |= {"scale": "channel_scale", "eta": "eta", "upsilon": "upsilon", "lam": "lambda"}
    names |= {"tau": "temperature", "k": "orth_rank", "mode": "mode"}
    names |= {"alpha": "alpha", "beta": "beta", "gamma": "gamma"}
    given = {names[key]: value for key, value in config.items() if key in names}
    no_dropout = {"adapter_dropout": 0.0, "fusion_dropout": 0.0}
    return release | given | {"prompt_scale": config["scale"]} | no_dropout | extra


# ---- a: passes ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_pass(dtype):
    g = load("a_passes")
    model, images = vit(g.config, dtype), pixels(g["images_u8"], dtype)
    g.check("plain.embed", model.embed(images), PASS)
    traced = _C.plain_pass(model, images, trace=True)
    for block, out in enumerate(traced["blocks"]):
        g.check(f"plain.block{block}.out", out, PASS)
    g.check("plain.cls", traced["cls"], PASS)
    g.check("plain.cls", model.features(images), PASS)  # the last block for the class token alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["channel_pass", "channel_dropout", "patch_pass"])
def test_peft_pass(case, dtype):
    g = load("a_passes")
    model, images = vit(g.config, dtype), pixels(g["images_u8"], dtype)
    kind = case.split("_")[0]

    def run(parameters, trace):
        if kind == "patch":
            return _C.patch_pass(model, images, parameters, g.config["scale"], trace)
        masks = []
        if case == "channel_dropout":
            masks = [g[f"{case}.mask{block}"] for block in range(g.config["depth"])]
        return _C.channel_pass(model, images, parameters, g.config["scale"], masks, 0.1, trace)

    for trace in (True, False):
        parameters = leaves(g.under(f"{kind}."), dtype)
        result = run(parameters, trace)
        for name, outputs in (("out", result["blocks"]), ("prompts", result["prompts"])):
            for block, out in enumerate(outputs):
                if f"{case}.block{block}.{name}" in g.tensors:
                    g.check(f"{case}.block{block}.{name}", out, PASS)
        g.check(f"{case}.cls", result["cls"], PASS)
        (g["functional"].to(dtype) * result["cls"]).sum().backward()
        for name, parameter in parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            g.check(f"{case}.grad.{kind}.{name}", gradient, PASS_GRADIENT)


# ---- b: fusion ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FUSION_KINDS)
def test_fusion(case, dtype):
    g = load("b_fusion")
    names = [n for n in g.under(f"{case}.") if not n.startswith(("grad", "out", "mask"))]
    parameters = leaves({name: g[f"{case}.{name}"] for name in names}, dtype)
    inputs = leaves({name: g[name] for name in ("channel", "patch")}, dtype)
    out = _C.fuse(
        case.removesuffix("_dropout"),
        inputs["channel"],
        inputs["patch"],
        parameters,
        section=g.config["D"] // 2,
        heads=g.config["attention_heads"],
        head_mask=g.tensors.get(f"{case}.mask"),
        dropout=0.1,
    )
    g.check(f"{case}.out", out, PASS)
    (g["functional"].to(dtype) * out).sum().backward()
    for name, parameter in parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        g.check(f"{case}.grad.{name}", gradient, PASS_GRADIENT)
    for name, tensor in inputs.items():
        g.check(f"{case}.grad_in.{name}", tensor.grad, PASS_GRADIENT)


# ---- c: losses ----


def loss_tags() -> list[str]:
    return sorted({name.split(".")[0] for name in load("c_losses").tensors})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tag", loss_tags())
def test_cross_entropy(tag, dtype):
    g = load("c_losses")
    n_old = len(g[f"{tag}.prototypes"]) - len(g[f"{tag}.head.weight"])
    for kind in ("channel", "patch", "fused"):
        x = g[f"{tag}.features.{kind}"].to(dtype, copy=True).requires_grad_()
        head = leaves(g.under(f"{tag}.head."), dtype)
        logits = _C.cosine_logits(x, head["weight"], head["sigma"])
        g.check(f"{tag}.logits.{kind}", logits, PASS)
        loss = torch.nn.functional.cross_entropy(logits, g[f"{tag}.labels"] - n_old)
        g.check(f"{tag}.ce.{kind}", loss, LOSS, LOSS_ABSOLUTE)
        loss.backward()
        g.check(f"{tag}.ce.{kind}.grad.features", x.grad, STEP_GRADIENT)
        for name, tensor in head.items():
            g.check(f"{tag}.ce.{kind}.grad.head.{name}", tensor.grad, STEP_GRADIENT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tag", loss_tags())
def test_dissimilarity(tag, dtype):
    g = load("c_losses")
    fused = g[f"{tag}.features.fused"].to(dtype, copy=True).requires_grad_()
    draws = g[f"{tag}.draws"]
    old = g[f"{tag}.prototypes"].to(dtype)[draws]
    loss = dissimilarity(
        fused, g[f"{tag}.labels"], old, draws, kind="release", temperature=g.config["tau"]
    )
    g.check(f"{tag}.l_dis", loss, LOSS, LOSS_ABSOLUTE)
    loss.backward()
    g.check(f"{tag}.l_dis.grad.fused", fused.grad, STEP_GRADIENT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tag", loss_tags())
def test_orthogonality(tag, dtype):
    g = load("c_losses")
    rows = g[f"{tag}.prototypes"].to(dtype)
    n_old = len(rows) - len(g[f"{tag}.head.weight"])
    direction = _C.signed_direction(_C.old_basis(rows[:n_old], g.config["k"]))
    features = {k: g[f"{tag}.features.{k}"] for k in ("channel", "patch")}
    inputs = leaves(features, dtype)
    loss = sum(signed_projection(x, direction) for x in inputs.values())
    g.check(f"{tag}.l_orth", loss, LOSS, LOSS_ABSOLUTE)
    loss.backward()
    for name, tensor in inputs.items():
        g.check(f"{tag}.l_orth.grad.{name}", tensor.grad, STEP_GRADIENT)


# ---- d: training steps ----


def stacked(tensors: dict[str, torch.Tensor], name: str, depth: int) -> torch.Tensor:
    kind, rest = name.split(".", 1)
    if kind == "fusion":
        return tensors[name]
    return torch.stack([tensors[f"{kind}.{block}.{rest}"] for block in range(depth)])


def is_list(name: str) -> bool:
    return name.startswith(("channel.", "patch.", "pre", "fusion."))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.names("ntk_cl", "d_step_"))
def test_two_steps(name, dtype):
    g = load(name)
    c, depth = g.config, g.config["depth"]
    before = {key: t.to(dtype) for key, t in g.under("before.").items()}
    n_new = len(before["head.weight"])
    # In task 0 old rows are drawn only where the first task is larger than the increment.
    drawn = len(g["step0.draws"])
    increment = c.get("increment", n_new - drawn if c["task"] == 0 else n_new)
    tasks = max(c["task"] + 2, c["K"])

    def draws(purpose, task, step, list_, layer):
        if purpose == "head.weight":
            return before["head.weight"]
        return g[f"step{step}.draws"] if purpose == "old_prototypes" else None

    train = {"momentum": c["momentum"], "weight_decay": c["weight_decay"]} | precision(dtype)
    session = _C.MethodSession("ntk-cl", release_options(c), vit(c, dtype), tasks, train, draws)
    old = {"prototypes": g["prototypes"].to(dtype)[: c["n_old"]]}
    session.load_state({k: t for k, t in before.items() if is_list(k)} | old)
    none = torch.empty(0)
    session.begin_task(c["task"], c["n_old"], n_new, increment, c["batch"], none, none.long())
    reference = {"head.sigma": before["head.sigma"]}
    weights = ["channel.down", "channel.up", "patch.mix", "patch.norm"]
    weights += ["fusion.query", "fusion.key", "fusion.value"]
    if c["task"] > 0:
        for weight in weights:
            prev = stacked(g.under("prev."), f"{weight}.weight", depth)
            reference[f"previous.{weight}.weight"] = prev.to(dtype)
    session.load_state(reference)

    for step in range(2):
        images = pixels(g[f"step{step}.images_u8"], dtype)
        features = session.features(images)
        for key, kind in (("F_c", "channel"), ("F_p", "patch"), ("F_m", "fused")):
            g.check(f"step{step}.{key}", features[kind], PASS)
        result = session.step(images, g[f"step{step}.labels"], c["lr"])
        columns = c["loss_columns"]
        values = result["losses"] | {"lr": c["lr"]}
        losses = torch.tensor([values[column] for column in columns], dtype=torch.float64)
        g.check(f"step{step}.losses", losses.to(dtype), LOSS, LOSS_ABSOLUTE)
        if step == 0:
            check_gradients(g, result["gradients"], depth)
        state = session.state()
        for key in g.under(f"step{step}.after."):
            g.check(f"step{step}.after.{key}", state[key], TWO_STEPS)


def check_gradients(g: golden.Golden, gradients: list[torch.Tensor], depth: int):
    names = [f"channel.{n}" for n in ("down.weight", "down.bias", "up.weight", "up.bias")]
    names += [f"patch.{n}" for n in ("mix.weight", "mix.bias", "norm.weight", "norm.bias")]
    names += [f"fusion.{p}.{n}" for p in ("query", "key", "value") for n in ("weight", "bias")]
    names += ["head.weight", "head.sigma"]
    assert len(names) == len(gradients)
    for name, gradient in zip(names, gradients, strict=True):
        kind, rest = name.split(".", 1)
        if kind in ("channel", "patch"):
            for block in range(depth):
                g.check(f"step0.grad.{kind}.{block}.{rest}", gradient[block], STEP_GRADIENT)
        elif f"step0.grad.{name}" in g.tensors:
            g.check(f"step0.grad.{name}", gradient, STEP_GRADIENT)


# ---- e: whole runs ----


def store(images: torch.Tensor, labels: torch.Tensor):
    return _C.make_array_store(images.permute(0, 2, 3, 1).contiguous(), labels.tolist())


def class_bounds(g: golden.Golden) -> list[int]:
    """First class of each task, then the number of classes."""
    return [0, *(len(g[f"t{task}.prototypes"]) for task in range(g.config["tasks"]))]


def recorded_draws(g: golden.Golden, train_labels: torch.Tensor):
    bounds = class_bounds(g)

    def draws(purpose, task, step, list_, layer):
        if purpose == "head.weight":
            return g[f"t{task}.init.head.weight"]
        if purpose == "old_prototypes" and f"t{task}.draws" in g.tensors:
            return g[f"t{task}.draws"][step]
        if purpose == "order":
            # Places within the task's images; the file counts from the train set's first image.
            low, high = bounds[task : task + 2]
            images = ((train_labels >= low) & (train_labels < high)).nonzero().flatten()
            return torch.searchsorted(images, g[f"t{task}.epoch{step}.order"])
        return None

    return draws


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", golden.names("ntk_cl", "e_run_"))
def test_whole_run(name, dtype):
    g = load(name)
    c, bounds = g.config, class_bounds(g)
    data = load(c["data"].removesuffix(".safetensors"))
    classes = bounds[-1]
    sizes = [high - low for low, high in itertools.pairwise(bounds)]
    parts = {}
    for part in ("train", "test"):
        labels = data[f"{part}_labels"]
        parts[part] = (data[f"{part}_images_u8"][labels < classes], labels[labels < classes])
    train_options = {
        "initial_classes": sizes[0],
        "increment": c.get("increment", sizes[min(1, len(sizes) - 1)]),
        "epochs": c["epochs"],
        "batch_size": c["batch"],
        "learning_rate": c["lr"],
        "min_learning_rate": float(c["min_lr"]),
        "momentum": c["momentum"],
        "weight_decay": c["weight_decay"],
        "schedule": c["scheduler"],
        "precision": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "cpu_matmul": "default",
    }
    trainer = _C.Trainer(
        "ntk-cl",
        release_options(c),
        train_options,
        vit(c, dtype),
        {
            "train": store(*parts["train"]),
            "test": store(*parts["test"]),
            "class_order": list(range(classes)),
        },
        {"transform": "resize", "image_size": c["image"]},
        {},
        [0.0] * 3,
        [1.0] * 3,
        draws=recorded_draws(g, parts["train"][1]),
    )
    trainer.load_state({k: t.to(dtype) for k, t in g.under("init.").items()}, partial=True)
    checker = RunChecker(g, trainer, *parts["test"])
    result = trainer.run(on_event=checker)
    assert checker.checked == c["tasks"]
    expected = torch.tensor(c["top1_curve"], dtype=torch.float64)
    top1 = torch.tensor([e["top1"] for e in result["evaluations"]], dtype=torch.float64)
    assert ((top1 - expected).abs() <= torch.tensor(checker.slack) + 1e-9).all()


class RunChecker:
    """Compares the state of a run with the golden file at each of its events."""

    def __init__(self, g, trainer, test_images, test_labels):
        self.g, self.trainer = g, trainer
        self.images, self.labels = test_images, test_labels
        self.losses: list[list[float]] = []
        self.slack: list[float] = []  # % of images a float32 run may predict otherwise, by task
        self.checked = 0

    def __call__(self, event: dict):
        c, name = self.g.config, event["event"]
        if name == "step":
            values = event["losses"] | {"lr": event["learning_rate"]}
            self.losses.append([values.get(k, float("nan")) for k in c["loss_columns"]])
        elif name == "epoch" and event["epoch"] == c["epochs"] - 1:
            self.check_training(event["task"])
        elif name == "evaluation":
            self.check_evaluation(event["task"], event["top1"])

    def dtype(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.trainer.state()["prototypes"].dtype)

    def check_training(self, task: int):
        c = self.g.config
        losses = torch.tensor(self.losses, dtype=torch.float64)
        self.losses = []
        for column, name in enumerate(c["loss_columns"]):
            # In single modes the other columns are what the release computes and ignores.
            if c["mode"] == "both" or name in (f"ce_{c['mode']}", "total", "lr"):
                self.g.check(
                    f"t{task}.losses",
                    self.dtype(losses[:, column]),
                    LOSS,
                    LOSS_ABSOLUTE,
                    slice(column, column + 1),
                )
        state = self.trainer.state()
        for key in self.g.under(f"t{task}.end."):
            self.g.check(f"t{task}.end.{key}", state[key], RUN)

    def check_evaluation(self, task: int, top1: float):
        g = self.g
        state = self.trainer.state()
        for key in g.under(f"t{task}.ema."):
            g.check(f"t{task}.ema.{key}", state[key], RUN)
        g.check(f"t{task}.prototypes", state["prototypes"], PROTOTYPE)
        seen = self.labels < len(g[f"t{task}.prototypes"])
        scores = self.trainer.scores(self.images[seen])
        g.check(f"t{task}.scores", scores, 0, 5 * SCORE + 1e-6)
        best = g[f"t{task}.scores"].topk(min(2, scores.shape[1])).values
        clear = best[:, 0] - best[:, -1] > (1e-5 if scores.shape[1] > 1 else -1)
        exact = scores.dtype == torch.float64
        self.slack.append(0.0 if exact else 100 * (~clear).double().mean().item())
        assert torch.equal(scores.argmax(1)[clear], g[f"t{task}.pred"][clear])
        assert abs(top1 - g[f"t{task}.top1"].item()) <= self.slack[-1] + 1e-9
        self.checked += 1


# ---- f: features and scores ----


def score_cases() -> list[str]:
    return sorted(n.split(".")[0] for n in load("f_features_scores").tensors if ".F_c" in n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", score_cases())
def test_features_and_scores(case, dtype):
    g = load("f_features_scores")
    k, ptm = (int(number) for number in re.fullmatch(r"K(\d+)_ptm([01])", case).groups())
    # The features do not depend on the fusion; `concat` asks nothing of the width.
    lists_of = {"frozen_lists": k, "pretrained_feature": bool(ptm)}
    options = release_options(g.config, fusion="concat", **lists_of)
    model, tasks = vit(g.config, dtype), max(k, 2)
    session = _C.MethodSession("ntk-cl", options, model, tasks, precision(dtype))
    lists = ("channel.", "patch.", *(f"pre{i}." for i in range(1, k + 1)))
    state = {n: t.to(dtype) for n, t in g.tensors.items() if n.startswith(lists)}
    session.load_state(state)
    features = session.features(pixels(g["images_u8"], dtype))
    prototypes = g[f"{case}.prototypes"].to(dtype)
    c = g.config
    multipliers = [c["beta"]] * ptm + [c["gamma"]] * k + [c["alpha"]]
    for key, kind in (("c", "channel"), ("p", "patch")):
        g.check(f"{case}.F_{key}", features[kind], PASS)
        scores = torch.ops.ntkcl.section_cosine(
            features[kind], prototypes, torch.tensor(multipliers, dtype=dtype)
        )
        g.check(f"{case}.scores_{key}", scores, 0, 5 * SCORE + 1e-6)
