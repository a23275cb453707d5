"""RAA against its golden files: float64 and float32."""

from __future__ import annotations

import re

import pytest
import torch

import golden
from ntkcl import _C

DTYPES = [torch.float64, torch.float32]
MODES = ["paper", "code"]
KINDS = {
    "": {"optimizer": "sam+"},
    "global.": {"optimizer": "sam+", "gamma": "global"},
    "sam.": {"optimizer": "sam"},
}
# The README's float32 figures: values and covariances; gradients; cosines; parameters after a step
# (gamma magnifies errors of the cosine).
VALUE, GRADIENT, COSINE, STEP = 1e-5, 2e-5, 1e-4, 1e-3
KEYS = ["W", "p", "U", "c"]


def load(name: str) -> golden.Golden:
    return golden.load("raa", name)


def check(g, name, actual, relative32, relative64=1e-10, expected=None):
    """The README's rule: the largest deviation over the largest magnitude; zeros are exact."""
    expected = g[name] if expected is None else expected
    actual = actual.detach()
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    largest = expected.abs().max()
    relative = relative64 if actual.dtype == torch.float64 else relative32
    deviation = (actual.double() - expected).abs().max()
    assert deviation <= relative * largest, (name, (deviation / largest).item())


def sam_options(config: dict, **kind) -> dict:
    names = {"momentum": "momentum", "rho": "rho", "tau": "tau", "wd": "weight_decay"}
    return {ours: config[theirs] for theirs, ours in names.items()} | kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", KINDS)
def test_sam_steps(prefix, dtype):
    g = load("sam")
    count, steps = g.config["n_tensors"], g.config["steps"]
    theta = [g[f"theta0.t{j}"].to(dtype).requires_grad_() for j in range(count)]
    optimizer = _C.make_optimizer(sam_options(g.config, **KINDS[prefix]), theta)
    assert optimizer.passes == 2
    for step in range(steps):
        passes = []

        def gradients(index: int, step: int = step, passes: list[int] = passes) -> None:
            passes.append(index)
            # Up to its first step the parameters are the same for all kinds.
            if index == 1 and (prefix == "" or step == 0):
                for j, tensor in enumerate(theta):
                    check(g, f"{step}.perturbed.t{j}", tensor, STEP)
            for j, tensor in enumerate(theta):
                gradient = g[f"{step}.g{index + 1}.t{j}"].to(dtype)
                tensor.grad = gradient if gradient.any() else None

        optimizer.set_learning_rate(g["lr"][step].item())
        optimizer.step(gradients)
        assert passes == [0, 1]
        for j, tensor in enumerate(theta):
            check(g, f"{prefix}{step}.theta.t{j}", tensor, STEP)
            if prefix == "":
                check(g, f"{step}.v.t{j}", optimizer.state()[f"parameters.{j}.momentum"], STEP)
        check_damping(g, prefix, step, optimizer.state(), dtype)


def check_damping(g, prefix, step, state, dtype):
    """Norm, cosines and gammas of a step, from the optimiser's momentum."""
    count = g.config["n_tensors"]
    ascent = [g[f"{step}.g1.t{j}"].to(dtype) for j in range(count)]
    momentum = [state[f"parameters.{j}.momentum"] for j in range(count)]
    if prefix == "global.":
        ascent, momentum = ([torch.cat([t.flatten() for t in ts])] for ts in (ascent, momentum))
    if prefix == "":
        norm = torch.stack([x.norm() for x in ascent]).norm()
        check(g, f"{step}.norm", norm, GRADIENT)
    if f"{prefix}{step}.cos" in g.tensors:
        pairs = zip(momentum, ascent, strict=True)
        cos = torch.stack([cosine(v[None, None], e[None, None])[0, 0] for v, e in pairs])
        cos = cos.reshape(g[f"{prefix}{step}.cos"].shape)
        check(g, f"{prefix}{step}.cos", cos.to(dtype), COSINE)
        gamma = _C.sam_plus_gamma(cos, g.config["tau"]).to(dtype)
        check(g, f"{prefix}{step}.gamma", gamma, STEP)


def test_damping_table():
    g = load("sam")
    gamma = _C.sam_plus_gamma(g["table.cos"], g.config["tau"])
    check(g, "table.gamma", gamma, STEP)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sgd_steps(dtype):
    g = load("sam")
    theta = [g[f"theta0.t{j}"].to(dtype) for j in range(g.config["n_tensors"])]
    options = {"momentum": g.config["momentum"], "weight_decay": g.config["wd"]}
    optimizer = _C.make_optimizer(options, theta)
    for step in range(g.config["steps"]):

        def gradients(_: int, step: int = step) -> None:
            for j, tensor in enumerate(theta):
                tensor.grad = g[f"{step}.g2.t{j}"].to(dtype)

        optimizer.set_learning_rate(g["lr"][step].item())
        optimizer.step(gradients)
        for j, tensor in enumerate(theta):
            check(g, f"sgd.{step}.theta.t{j}", tensor, STEP)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prototypes_and_their_drift(dtype):
    g = load("proto_drift")
    labels = g["y"]
    first = int(labels.min())
    means = _C.ClassMeans(first, len(g["mu"]), g["f"].shape[1])
    means.add(g["f"].to(dtype), labels)
    check(g, "mu", means.result(dtype), VALUE)
    before, old = g["drift.F_old"].to(dtype), g["drift.mu"].to(dtype)
    settings = g.config["sigma"], g.config["floor"]
    for pairing in ("paired", "unpaired"):
        after = g[f"drift.F_new_{pairing}"].to(dtype)
        shift = _C.gaussian_drift(before, after, old, *settings)
        check(g, f"drift.shift_{pairing}", shift, VALUE)


def test_protocol():
    g = load("protocol")
    for name, order in g.under("order.").items():
        classes, seed = map(int, name.split("."))
        ours = _C.numpy_permutation(seed, classes)
        assert ours == order.tolist(), name
        assert torch.tensor(ours).argsort().tolist() == g[f"label_map.{name}"].tolist()
    for name, sizes in g.under("sizes.").items():
        assert _C.split_classes(*map(int, name.split("."))) == sizes.tolist(), name
    for name, rates in g.under("lr.").items():
        epochs = int(name)
        ours = [_C.learning_rate_at({}, 0.01, epoch, epochs) for epoch in range(epochs)]
        assert ours == pytest.approx(rates.tolist(), rel=1e-12), name
    for name, kappa in g.under("kappa.").items():
        data, _, variant = name.partition(".")
        classes, sizes = len(kappa), _C.split_classes(len(kappa), 20, 20)
        last = int(data.rsplit("_t", 1)[1])
        tasks = [t for t, size in enumerate(sizes) for _ in range(size)]
        if variant == "release":
            tasks = _C.tasks_of_classes(sizes[: last + 1], "release")
        assert len(tasks) == classes
        ours = torch.tensor(_C.mean_factors(tasks, last, 0.9), dtype=torch.float64)
        check(g, f"kappa.{name}", ours, VALUE)


def test_metrics():
    g = load("protocol")
    labels, scores = g["metric.y"], g["metric.logits"]
    old = int(g["metric.nb_old"])
    evaluation = _C.Evaluation([old, scores.shape[1] - old], 1)
    evaluation.add(labels, scores)
    assert evaluation.top1 == pytest.approx(g["metric.top1"].item())
    assert evaluation.top5 == pytest.approx(g["metric.top5"].item())
    assert evaluation.old_classes == pytest.approx(g["metric.old_rounded"].item(), abs=0.005001)
    assert evaluation.new_classes == pytest.approx(g["metric.new_rounded"].item(), abs=0.005001)
    groups = len(g["metric.groups10_rounded"])
    sizes = [10] * (groups - 1) + [scores.shape[1] - 10 * (groups - 1)]
    of_tens = _C.Evaluation(sizes, groups - 1)
    of_tens.add(labels, scores)
    wanted = g["metric.groups10_rounded"].tolist()
    assert of_tens.per_task == pytest.approx(wanted, abs=0.005001)
    assert _C.forgetting(g["metric.matrix"]) == pytest.approx(g["metric.forgetting"].item())


# ---- Adapters and passes ----


def backbone(dtype):
    g = load("backbone")
    names = {
        "cls": "cls_token",
        "pos": "pos_embed",
        "patch.w": "patch_embed.proj.weight",
        "patch.b": "patch_embed.proj.bias",
        "norm.w": "norm.weight",
        "norm.b": "norm.bias",
    }
    parts = {
        "ln1": "norm1",
        "ln2": "norm2",
        "qkv": "attn.qkv",
        "proj": "attn.proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    for block in range(g.config["L"]):
        for theirs, ours in parts.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{block}.{theirs}.{kind[0]}"] = f"blocks.{block}.{ours}.{kind}"
    assert set(names) == set(g.tensors)
    weights = {ours: g[theirs].to(dtype) for theirs, ours in names.items()}
    weights["cls_token"] = weights["cls_token"].view(1, 1, -1)
    weights["pos_embed"] = weights["pos_embed"][None]
    return _C.VisionTransformer(weights, g.config["heads"])


def branches(g, prefix, dtype):
    """[W, p, U, c], each (NA, L, ...)."""
    blocks = sum(bool(re.fullmatch(re.escape(prefix) + r"\d+\.W", name)) for name in g.tensors)
    stacked = [
        torch.stack([g[f"{prefix}{block}.{key}"] for block in range(blocks)], 1) for key in KEYS
    ]
    return [tensor.to(dtype).requires_grad_() for tensor in stacked]


def check_branches(g, prefix, tensors, relative32, relative64=1e-10):
    """(n, L, ...) of each kind against its blocks."""
    for key, tensor in zip(KEYS, tensors, strict=True):
        for block in range(tensor.shape[1]):
            name = f"{prefix}{block}.{key}"
            check(g, name, tensor[:, block], relative32, relative64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_adapters(mode, dtype):
    g = load("adapter")
    scale = g.config["scale"]
    cases = sorted({name.split(".")[0] for name in g.tensors})
    assert cases
    for case in cases:
        adapters = branches(g, f"{case}.", dtype)
        a = g[f"{case}.a"].to(dtype).requires_grad_()
        alpha = g[f"{case}.alpha"].to(dtype)[None]
        out = scale * _C.stream_adapters(a, adapters, alpha, mode)
        check(g, f"{case}.{mode}.out", out, VALUE)
        (g[f"{case}.cot"].to(dtype) * out).sum().backward()
        check(g, f"{case}.{mode}.d_a", a.grad, GRADIENT)
        for key, tensor in zip(KEYS, adapters, strict=True):
            check(g, f"{case}.{mode}.d_{key}", tensor.grad[:, 0], GRADIENT)
        merged = _C.merged_branches(adapters)
        for key, tensor in zip(KEYS, merged, strict=True):
            check(g, f"{case}.merged.{key}", tensor[0], VALUE)
        one = _C.stream_adapters(a[:1], [tensor[None] for tensor in merged], alpha, "none")
        check(g, f"{case}.merged.out_a0", scale * one[0], VALUE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", golden.names("raa", "vit"))
def test_passes(name, mode, dtype):
    g = load(name)
    vit, adapters = backbone(dtype), branches(g, "adapter.", dtype)
    images = g["x_u8"].to(dtype) / 255
    alpha, scale = g["alpha"].to(dtype), g.config["scale"]
    masks = list(g["mask"].unbind(0)) if "mask" in g.tensors else []
    if mode == "code":
        masks = [mask[:-1] for mask in masks]  # no adapter of the mixture's own
    dropout = g.config["dropout"]
    features = _C.stream_pass(vit, images, adapters, alpha, mode, scale, masks, dropout)
    check(g, f"{mode}.feat", features.flatten(0, 1), VALUE)
    (g["cot"].to(dtype) * features.flatten(0, 1)).sum().backward()
    check_branches(g, f"{mode}.d_adapter.", [tensor.grad for tensor in adapters], GRADIENT)
    if "infer.feat" in g.tensors:
        # Of branch 0 as it is on file: testing reads it alone, after a task it is the mean of all.
        alone = _C.stream_pass(vit, images, [t[:1] for t in adapters], alpha, "none", scale)
        check(g, "infer.feat", alone[0], VALUE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_block(mode, dtype):
    g = load("vit")
    out = _C.stream_block(
        backbone(dtype),
        g["block.x"].to(dtype),
        branches(g, "adapter.", dtype),
        g["alpha"].to(dtype),
        mode,
        1,
        g.config["scale"],
    )
    check(g, f"{mode}.block.out", out, VALUE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss(dtype):
    g = load("loss")
    known = g.config["known"]
    cases = sorted({name.split(".")[0] for name in g.tensors if name.endswith(".loss")})
    assert cases
    heads = [g[name] for name in sorted(n for n in g.tensors if n.startswith("head."))]
    for case in cases:
        scale, margin = g[f"{case}.S_m"].tolist()
        features, head = (t.to(dtype, copy=True).requires_grad_() for t in (g["f"], heads[-1]))
        loss = _C.cosface(features, head, g["y"] - known, scale, margin).mean()
        loss.backward()
        check(g, f"{case}.loss", loss, VALUE)
        check(g, f"{case}.d_f", features.grad, GRADIENT)
        check(g, f"{case}.d_head.{len(heads) - 1}", head.grad, GRADIENT)
        z = _C.cosines(g["f"].to(dtype), torch.cat(heads).to(dtype))
        check(g, f"{case}.z", z, VALUE)
        # d_z through the cosines is d_f; no part of it is of the old columns.
        unit = torch.nn.functional.normalize
        dz, f = g[f"{case}.d_z"], g["f"]
        to_unit = dz @ unit(torch.cat(heads))
        along = (to_unit * unit(f)).sum(1, keepdim=True) * unit(f)
        expected = (to_unit - along) / f.norm(dim=1, keepdim=True)
        check(g, f"{case}.d_z", features.grad, GRADIENT, expected=expected)
        assert dz[:, :known].eq(0).all()


# ---- Class statistics and alignment ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_class_gaussians(dtype):
    g = load("proto_drift")
    gaussians = _C.ClassGaussians(g["f"].shape[1], torch.zeros(1, dtype=dtype))
    for number, c in enumerate(g["y"].unique().tolist()):
        gaussians.add_class(g["f"][g["y"] == c].to(dtype), g.config["cov_eps"])
        factor = gaussians.factor(number)
        covariance = factor @ factor.T
        check(g, "cov", covariance, VALUE, expected=g["cov"][number])
    check(g, "mu", gaussians.means, VALUE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["release", "corrected"])
def test_alignment(variant, dtype):
    g = load("ca")
    config, task = g.config, g.config["t"]
    sizes = config["sizes"][: task + 1]
    tasks = _C.tasks_of_classes(sizes, "release" if variant == "release" else "cumulative")
    factors = _C.mean_factors(tasks, task, 0.9)
    kappa = torch.tensor(factors, dtype=torch.float64)
    check(g, f"{variant}.kappa", kappa, VALUE)
    gaussians = gaussians_of(g["mu"], g["cov"], dtype)
    head = torch.cat([g[f"head.{t}"] for t in range(len(sizes))]).to(dtype)
    if "chol" in g.tensors:
        for c, factor in enumerate(g["chol"]):
            check(g, "chol", gaussians.factor(c), VALUE, expected=factor)
    draws = _C.GaussianDraws(
        lambda epoch, count: g["perm"][epoch],
        lambda epoch, number: g["xi"][epoch, number].to(dtype),
    )
    first = g["perm"][0][: config["n_ca"]]
    x = torch.stack(
        [gaussians.draw(c, factors[c], g["xi"][0, c].to(dtype)) for c in range(sum(sizes))]
    ).flatten(0, 1)[first]
    if variant == "release":
        check(g, "release.logits_first", config["S"] * _C.cosines(x, head), VALUE)
    settings = [config[key] for key in ("S", "epochs", "lr", "momentum", "wd", "n_ca")]
    one_step = _C.GaussianDraws(
        lambda epoch, count: first, lambda epoch, number: g["xi"][epoch, number].to(dtype)
    )
    stepped = head.clone()
    _C.align_cosine_head(stepped, gaussians, factors, config["S"], 1, *settings[2:], one_step)
    check(g, f"{variant}.head_after_1", stepped, STEP)
    losses = _C.align_cosine_head(head, gaussians, factors, *settings, draws)
    wanted = g[f"{variant}.loss"].flatten()
    check(g, "loss", torch.tensor(losses, dtype=torch.float64).to(dtype), VALUE, expected=wanted)
    check(g, f"{variant}.head_after_all", head, STEP)


def gaussians_of(means, covariances, dtype):
    """Classes of given moments, by rows that have them."""
    width = means.shape[1]
    gaussians = _C.ClassGaussians(width, torch.zeros(1, dtype=dtype))
    # C + 1 points of mean 0 and covariance I: an orthonormal basis of what is orthogonal to ones.
    ones = torch.ones(width + 1, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, torch.eye(width + 1)[:, :-1]], 1))[0][:, 1:]
    for mean, covariance in zip(means, covariances, strict=True):
        rows = basis * width**0.5 @ torch.linalg.cholesky(covariance).T + mean
        gaussians.add_class(rows, 0.0)
    return gaussians


# ---- Training steps and whole runs ----

BLOCK_NAMES = {"W": "down.weight", "p": "down.bias", "U": "up.weight", "c": "up.bias"}


def branch_state(adapters):
    """[W, p, U, c] (NA, L, ...) as the method's state has them."""
    return {
        f"branch{i}.{block}.{name}": tensor[i, block].detach()
        for name, tensor in zip(BLOCK_NAMES.values(), adapters, strict=True)
        for i in range(tensor.shape[0])
        for block in range(tensor.shape[1])
    }


def branches_in(state, first=0):
    names = list(BLOCK_NAMES.values())
    count = 1 + max(int(k.split(".")[0][6:]) for k in state if k.startswith("branch"))
    blocks = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("branch"))
    return [
        torch.stack(
            [
                torch.stack([state[f"branch{i}.{block}.{name}"] for block in range(blocks)])
                for i in range(first, count)
            ]
        )
        for name in names
    ]


def raa_session(config, mode, dtype, draws, tasks, **options):
    common = {
        "rank": load("backbone").config["r"],
        "n_adapters": load("backbone").config["NA"],
        "adapter_dropout": 0.0,
        "amalgamation": mode,
        "branch_loss_weight": config["lam"],
        "margin": config["margin"],
        "logit_scale": config["S"],
        "scale": config.get("scale", 0.1),
    }
    train = {
        "optimizer": "sam+",
        "rho": config["rho"],
        "tau": config.get("tau", 25.0),
        "momentum": config.get("momentum", 0.9),
        "weight_decay": config["wd"],
        "precision": str(dtype).removeprefix("torch."),
        "cpu_matmul": "default",
    }
    return _C.MethodSession("raa", common | options, backbone(dtype), tasks, train, draws)


def cosine(v, e):
    """Of each leading index (n, L) of v and e; 0 where either is zero."""
    v, e = (t.flatten(2).double() for t in (v, e))
    lengths = v.norm(dim=2) * e.norm(dim=2)
    return torch.where(lengths > 0, (v * e).sum(2) / lengths, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", golden.names("raa", "step_task"))
def test_training_steps(name, mode, dtype):
    g = load(name)
    config, task, b = g.config, g.config["task"], g.config["b"]
    heads = [g[f"head.{t}"].to(dtype) for t in range(task + 1)]

    def draws(purpose, t, step, index, layer):
        if purpose == "amalgamation":
            return g["alpha"][step, index]
        return heads[task].double() / 0.02 if purpose == "head.weight" else None

    session = raa_session(config, mode, dtype, draws, task + 1, alignment=False)
    state = branch_state(branches(g, "adapter.", dtype))
    known, sizes = config["known"], [len(head) for head in heads]
    if task:
        state["head"] = torch.cat(heads[:task])
        state["task_sizes"] = torch.tensor(sizes[:task])
    session.load_state(state)
    images = g["x_u8"].to(dtype) / 255
    session.begin_task(task, known, sizes[-1], sizes[-1], b, images, g["y"])
    trained = config["trained_branches"]
    for step in range(config["steps"]):
        rows = slice(step * b, (step + 1) * b)
        passes = session.step(images[rows], g["y"][rows], config["lr"])["passes"]
        prefix = f"{mode}.{step}."
        for index, of_pass in enumerate(passes):
            loss = torch.tensor(of_pass["losses"]["total"], dtype=torch.float64).to(dtype)
            wanted = g[f"{mode}.loss"][step, index]
            check(g, "loss", loss, VALUE, 1e-9, expected=wanted)
            if step == 0:
                gradients = of_pass["gradients"]
                check_branches(g, f"{prefix}g{index + 1}.adapter.", gradients[:4], GRADIENT, 1e-9)
                for t, gradient in enumerate(torch.cat(gradients[4:]).split(sizes)):
                    check(g, f"{prefix}g{index + 1}.head.{t}", gradient, GRADIENT, 1e-9)
        ascent = passes[0]["gradients"]
        norm = torch.stack([gradient.norm() for gradient in ascent]).norm()
        check(g, f"{prefix}norm", norm, GRADIENT, 1e-9)
        momentum = session.optimizer_state()
        cos = torch.stack(
            [cosine(momentum[f"adapters.{j}.momentum"], ascent[j]).T for j in range(4)], 1
        )
        blocks = [
            torch.cat(tensors).split(sizes)
            for tensors in (
                [v for name, v in sorted(momentum.items()) if name.startswith("head.")],
                ascent[4:],
            )
        ]
        of_head = [cosine(v[None, None], e[None, None])[0, 0] for v, e in zip(*blocks, strict=True)]
        check(g, f"{prefix}cos", cos.to(dtype), COSINE, 1e-9)
        check(g, f"{prefix}cos_head", torch.stack(of_head).to(dtype), COSINE, 1e-9)
        for suffix, cosines in (("", cos), ("_head", torch.stack(of_head))):
            gamma = _C.sam_plus_gamma(cosines, config.get("tau", 25.0))
            check(g, f"{prefix}gamma{suffix}", gamma.to(dtype), STEP, 1e-9)
        state = session.state()
        check_branches(g, f"{prefix}theta.adapter.", branches_in(state, trained[0]), STEP, 1e-9)
        for t, head in enumerate(state["head"].split(sizes)):
            check(g, f"{prefix}theta.head.{t}", head, STEP, 1e-9)


RUN32, RUN64 = 1e-3, 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["release", "corrected"])
def test_run(variant, dtype):
    g, inputs = load(f"run_{variant}"), load("run_inputs")
    config = g.config
    sizes, tasks = config["sizes"], len(config["sizes"])

    def draws(purpose, t, step, index, layer):
        given = {
            "amalgamation": lambda: inputs[f"draw.{t}.alpha"][step, index],
            "head.weight": lambda: inputs[f"head_init.{t}"] / 0.02,
            "drift.before": lambda: inputs[f"draw.{t}.drift_old"],
            "drift.after": lambda: inputs[f"draw.{t}.drift_new"],
            "alignment.order": lambda: inputs[f"draw.{t}.perm"][step],
            "alignment.normals": lambda: inputs[f"draw.{t}.xi"][step, index],
        }
        return given[purpose]() if purpose in given else None

    session = raa_session(
        config,
        config["mode"],
        dtype,
        draws,
        tasks,
        drift=config["drift"],
        kappa=config["kappa"],
        stale_gradient=variant == "release",
        alignment_epochs=config["ca_epochs"],
        alignment_samples=config["n_ca"],
        alignment_learning_rate=config["ca_lr"],
    )
    session.load_state(branch_state(branches(inputs, "adapter.", dtype)))
    average = []
    for t in range(tasks):
        accuracy = check_task(g, inputs, session, t, sizes, dtype)
        average.append(accuracy)
    exact = 100 / len(inputs["y_test"]) * tasks if dtype == torch.float32 else 1e-9
    assert sum(average) / tasks == pytest.approx(g["A_avg"].item(), abs=exact)


def check_task(g, inputs, session, t, sizes, dtype):
    config = g.config
    known, new = sum(sizes[:t]), sizes[t]
    mine = (inputs["y_train"] >= known) & (inputs["y_train"] < known + new)
    images, labels = inputs["x_train"][mine].to(dtype) / 255, inputs["y_train"][mine]
    session.begin_task(t, known, new, new, config["batch"], images, labels)
    step = 0
    epochs = config["epochs"][t]
    means_before = session.state()["gaussians.means"]
    for epoch in range(epochs):
        rate = _C.learning_rate_at({}, config["lr"], epoch, epochs)
        for rows in inputs[f"draw.{t}.orders"][epoch].split(config["batch"]):
            passes = session.step(images[rows], labels[rows], rate)["passes"]
            losses = torch.tensor([p["losses"]["total"] for p in passes], dtype=torch.float64)
            wanted = g[f"{t}.loss"][step]
            check(g, f"{t}.loss", losses.to(dtype), RUN32, RUN64, expected=wanted)
            if step == 0 and f"{t}.first_norm" in g.tensors:
                norm = torch.stack([x.norm() for x in passes[0]["gradients"]]).norm()
                check(g, f"{t}.first_norm", norm, RUN32, RUN64)
            step += 1
    check(g, f"{t}.head_trained", session.state()["head"], RUN32, RUN64)
    session.run_stages()
    state = session.state()
    if f"{t}.adapter.0.W" in g.tensors:
        check_branches(g, f"{t}.adapter.", branches_in(state), RUN32, RUN64)
    means = state["gaussians.means"]
    check(g, f"{t}.mu", means, RUN32, RUN64)
    if t:
        check(g, f"{t}.drift_shift", means[:known] - means_before, RUN32, RUN64)
    factors = unpacked(state["gaussians.factors"], means.shape[1])
    covariances = factors @ factors.mT
    traces = covariances.diagonal(dim1=1, dim2=2).sum(1)
    check(g, f"{t}.cov_trace", traces, RUN32, RUN64)
    if f"{t}.cov_last" in g.tensors:
        check(g, f"{t}.cov_last", covariances[-1], RUN32, RUN64)
    check(g, f"{t}.head", state["head"], RUN32, RUN64)
    seen = inputs["y_test"] < known + new
    tests = inputs["x_test"][seen].to(dtype) / 255
    check(g, f"{t}.feat_test", session.features(tests)["features"], RUN32, RUN64)
    scores = session.scores(tests)
    check(g, f"{t}.logits", scores, RUN32, RUN64)
    accuracy = (scores.argmax(1) == inputs["y_test"][seen]).double().mean().item() * 100
    slack = 100 / len(tests) if dtype == torch.float32 else 1e-9
    assert accuracy == pytest.approx(g[f"{t}.acc_exact"].item(), abs=slack)
    return accuracy


def unpacked(packed, width):
    rows, columns = torch.tril_indices(width, width)
    factors = packed.new_zeros(len(packed), width, width)
    factors[:, rows, columns] = packed
    return factors
