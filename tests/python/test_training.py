"""Whole runs through `ntkcl.train` on the embedded backbone and a few images in memory: what a run
promises whatever it is asked to learn."""

import itertools
import json
import math
import signal
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

import ntkcl
from ntkcl import _C
from ntkcl.backbones import DEFAULT_BACKBONE, backbone_info, load_backbone
from ntkcl.config import resolve
from ntkcl.datasets import load_dataset

SIZE = 32
CLASSES, TRAIN, TEST = 6, 8, 4  # images of each class
TINY = {
    "image_size": SIZE,
    "transform": "resize",
    "initial_classes": 2,
    "increment": 2,
    "epochs": 1,
    "batch_size": 8,
    "evaluation_batch_size": 16,
    "device": "cpu",  # what is expected here is computed on it
    "progress": False,
}
FUSIONS = ["attention", "concat", "multimodal", "vae", "lstm", "gru", "cross_attention"]


def images_of(classes: int, per_class: int, noise: np.random.Generator) -> Any:
    """A random pattern for each class, always the same, under noise; labels class by class."""
    patterns = np.random.default_rng(7).integers(0, 256, (CLASSES, 4, 4, 3)).repeat(8, 1)
    patterns = patterns.repeat(8, 2)[:classes].repeat(per_class, 0)
    images = patterns + noise.normal(0, 60, patterns.shape)
    return images.clip(0, 255).astype(np.uint8), np.arange(classes).repeat(per_class)


def dataset(classes: int = CLASSES, train: int = TRAIN, test: int = TEST) -> dict[str, Any]:
    noise = np.random.default_rng(11)
    return {
        "train": images_of(classes, train, noise),
        "test": images_of(classes, test, noise),
    }


def train(output: Path, data: dict[str, Any] | None = None, **keywords: Any) -> ntkcl.Result:
    return ntkcl.train(dataset=data or dataset(), output=output, **(TINY | keywords))


def state(result: ntkcl.Result) -> dict[str, torch.Tensor]:
    return load_file(result.output / "state.safetensors")


def predictions(result: ntkcl.Result) -> dict[str, torch.Tensor]:
    return load_file(result.output / "predictions.safetensors")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def class_order(result: ntkcl.Result) -> list[int]:
    """Class of the data set by the place at which it is learned."""
    environment = json.loads((result.output / "environment.json").read_text())
    return [int(name) for name in environment["classes"]]


def step_losses(result: ntkcl.Result) -> list[dict[str, float]]:
    return [event["losses"] for event in events(result.output, "step")]


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def backbone() -> _C.VisionTransformer:
    heads = backbone_info(DEFAULT_BACKBONE).heads
    return _C.VisionTransformer(load_backbone(DEFAULT_BACKBONE).tensors, heads)


def pixels(images: np.ndarray) -> torch.Tensor:
    """As the backbone was pretrained: (n, 3, S, S), mean and standard deviation 0.5."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


# ---- the same seed, the same bits ----------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ntkcl.Result:
    """A run with random crops and flips, read by one thread."""
    output = tmp_path_factory.mktemp("reference") / "run"
    return train(output, transform="inception", seed=5, loader_threads=1)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_same_seed_gives_the_same_bits_for_any_number_of_loader_threads(
    tmp_path: Path, reference: ntkcl.Result, threads: int
) -> None:
    # Protects: every random draw is keyed, none depends on time, memory or who reads the image.
    again = train(tmp_path / "run", transform="inception", seed=5, loader_threads=threads)
    np.testing.assert_array_equal(again.accuracy_matrix, reference.accuracy_matrix)
    assert same_bits(state(again), state(reference))
    assert same_bits(predictions(again), predictions(reference))
    assert step_losses(again) == step_losses(reference)


def test_the_classes_may_have_a_seed_of_their_own(tmp_path: Path, reference: ntkcl.Result) -> None:
    other = train(tmp_path / "run", seed=1, class_order_seed=5)
    assert class_order(other) == class_order(reference)  # seed 5
    assert class_order(other) == _C.numpy_permutation(5, CLASSES)


@pytest.mark.parametrize("changed", [{"seed": 6}, {"transform": "resize"}])
def test_another_seed_and_another_augmentation_train_other_weights(
    tmp_path: Path, reference: ntkcl.Result, changed: dict[str, Any]
) -> None:
    # Protects: the seed and the crops reach the training at all, else equal bits prove nothing.
    common = {"transform": "inception", "seed": 5, "loader_threads": 1}
    order = {"class_order": class_order(reference)}
    other = train(tmp_path / "run", **(common | changed | order))
    assert not same_bits(state(other), state(reference))
    assert step_losses(other)[0] != step_losses(reference)[0]


# ---- what is refused, what is kept ---------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_step(tmp_path: Path) -> None:
    # Protects: a diverging run stops where it diverges and not after hours of NaN.
    with pytest.raises(FloatingPointError, match=r"loss '\w+' is .* at step 1 of task 0 .epoch 0"):
        train(tmp_path / "run", learning_rate=1e30)
    assert not (tmp_path / "run" / "result.json").exists()


def test_what_was_finished_before_a_loss_diverged_is_kept(tmp_path: Path) -> None:
    # Protects: the rows of the finished tasks. The second task alone has the absurd rate.
    output = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"at step 1 of task 1"):
        train(output, **{"ntk_cl.later_lr_factor": 1e32})
    matrix = np.genfromtxt(output / "accuracy_matrix.csv", delimiter=",", ndmin=2)
    assert matrix.shape == (1, 3)
    assert 0 <= matrix[0, 0] <= 100
    assert np.isnan(matrix[0, 1:]).all()
    assert [event["task"] for event in events(output, "task_end")] == [0]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"ntk_cl": {"frozen_lists": 4}}, r"'frozen_lists': expected 1 to the .*\(3\), got 4"),
        ({"initial_classes": 7}, r"expected .*got 7"),
        ({"initial_classes": 4, "increment": 3}, r"expected .*got 3"),
        ({"validation_fraction": 0.01}, r"at least one image of each class, got 0 of 8"),
        ({"validation_fraction": 0.99}, r"at least one image of each class, got 8 of 8"),
    ],
)
def test_a_split_that_cannot_be_is_refused(
    tmp_path: Path, keywords: dict[str, Any], message: str
) -> None:
    # Protects: a typing error is told before the first step, and leaves nothing on the disk.
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **keywords)
    assert not (tmp_path / "run").exists()


class Presses:
    """Stands where the progress bar is and presses Ctrl-C at the end of the first task."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "task_end":
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("times", "steps"), [(1, 1), (2, 0)])
def test_control_c_leaves_a_run_folder_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, steps: int
) -> None:
    # Protects: an interrupted night's run. Once: after the step under way; twice: at once.
    output = tmp_path / "run"
    monkeypatch.setattr("ntkcl.api.make_progress", lambda _: Presses(times))
    before = signal.getsignal(signal.SIGINT)
    method = {"ntk_cl": {"drift_compensation": False}}  # else features are gathered first
    with pytest.raises(KeyboardInterrupt):
        train(output, **method)
    assert signal.getsignal(signal.SIGINT) is before
    assert resolve({}, output / "config.toml").ntk_cl.drift_compensation is False
    assert "torch" in json.loads((output / "environment.json").read_text())
    assert [event["task"] for event in events(output, "step")].count(1) == steps
    assert len(np.genfromtxt(output / "accuracy_matrix.csv", delimiter=",", ndmin=2)) == 1
    assert {path.name for path in output.iterdir()} == {
        "config.toml",
        "environment.json",
        "events.jsonl",
        "accuracy_matrix.csv",
        "checkpoint",
    }


def test_should_stop_is_asked_after_every_step() -> None:
    # Protects: whoever embeds the task loop can end it without a signal.
    seen: list[dict[str, Any]] = []
    trainer = bare_trainer("ntk-cl", {})
    with pytest.raises(KeyboardInterrupt, match=r"stopped in task 1 of 3, after 1 steps of it"):
        trainer.run(seen.append, lambda: True)
    assert [event["event"] for event in seen] == ["run_begin", "task_begin", "step"]


def test_an_error_of_the_listener_reaches_the_caller() -> None:
    # Protects: a full disk under the event log ends the run with its own error.
    def listen(_: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        bare_trainer("simple-cil", {}).run(listen, None)


def bare_trainer(method: str, options: dict[str, Any]) -> _C.Trainer:
    """The C++ task loop without configuration and run folder."""
    images = load_dataset(dataset())
    loop = {"initial_classes": 2, "increment": 2, "epochs": 1, "batch_size": 8, "device": "cpu"}
    return _C.Trainer(
        method,
        options,
        loop,
        backbone(),
        {"train": images.train, "test": images.test, "class_order": list(range(CLASSES))},
        {"transform": "resize", "image_size": SIZE},
        {},
        [0.5] * 3,
        [0.5] * 3,
    )


def test_a_state_loads_into_a_fresh_method():
    """The tensors that a run leaves are all that its predictions need."""
    trained = bare_trainer("ntk-cl", {})
    trained.run(None, None)
    fresh = bare_trainer("ntk-cl", {})
    fresh.load_state(trained.state())
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    torch.testing.assert_close(fresh.scores(images), trained.scores(images), rtol=0, atol=1e-5)


def test_a_state_that_does_not_fit_is_refused():
    """A tensor of another shape is never dropped in silence."""
    state = bare_trainer("ntk-cl", {}).state()
    name = "channel.0.down.weight"
    with pytest.raises(ValueError, match=name):
        bare_trainer("ntk-cl", {}).load_state({name: state[name][:1]}, partial=True)
    with pytest.raises(ValueError, match=r"unknown tensor .no\.such."):
        bare_trainer("ntk-cl", {}).load_state({"no.such": torch.zeros(1)})


def test_a_trainer_runs_once():
    """A second run would begin behind the last task: an error, not undefined behaviour."""
    trainer = bare_trainer("simple-cil", {})
    trainer.run(None, None)
    with pytest.raises(ValueError, match="has run already"):
        trainer.run(None, None)


def test_training_works_where_the_caller_records_no_gradients():
    """`torch.no_grad()` around a run is the caller's business, not the training's."""
    with torch.no_grad():
        result = bare_trainer("ntk-cl", {}).run(None, None)
    assert math.isfinite(result["final_accuracy"])


# ---- validation_fraction -------------------------------------------------------------------------


def held_out(result: ntkcl.Result, images: np.ndarray, held: int) -> list[tuple[int, ...]]:
    """Of each class of the data set, which images its SimpleCIL prototype leaves out."""
    prototypes = state(result)["prototypes"]
    features = backbone().features(pixels(images)).view(CLASSES, TRAIN, -1)
    found: list[tuple[int, ...]] = [()] * CLASSES
    for number, index in enumerate(class_order(result)):
        distances = {}
        for out in itertools.combinations(range(TRAIN), held):
            kept = [i for i in range(TRAIN) if i not in out]
            mean = features[index, kept].mean(0)
            distances[out] = (mean - prototypes[number]).norm() / mean.norm()
        found[index] = min(distances, key=distances.__getitem__)
        assert distances[found[index]] < 1e-5
    return found


def test_validation_holds_out_the_same_training_images_for_every_seed_and_no_test_image(
    tmp_path: Path,
) -> None:
    # Protects: choices made on held-out images see neither the test images nor, by another seed,
    # images that were trained on.
    data = dataset()
    blank = {"train": data["train"], "test": (np.zeros_like(data["test"][0]), data["test"][1])}
    runs = [
        train(tmp_path / f"{i}", given, method="simple-cil", validation_fraction=0.25, seed=seed)
        for i, (given, seed) in enumerate([(data, 0), (data, 1), (blank, 0)])
    ]
    assert class_order(runs[0]) != class_order(runs[1])
    images = data["train"][0]
    out = held_out(runs[0], images, 2)
    assert held_out(runs[1], images, 2) == out
    assert len(set(out)) > 1  # not the same places in every class

    assert [e.count for e in runs[0].evaluations] == [4, 8, 12]  # 2 of 8 images of each class
    assert [e["train_images"] for e in events(runs[0].output, "task_begin")] == [12, 12, 12]
    assert same_bits(predictions(runs[0]), predictions(runs[2]))
    assert runs[0].accuracy == runs[2].accuracy

    # The held-out images are what is tested: scored here, they give the run's predictions.
    order = class_order(runs[0])
    places = [index * TRAIN + i for index in range(CLASSES) for i in out[index]]
    features = backbone().features(pixels(images[places]))
    scores = normalize(features) @ normalize(state(runs[0])["prototypes"]).T
    last = predictions(runs[0])
    assert torch.equal(scores.argmax(1), last["task_2.predictions"])
    labels = [order.index(place // TRAIN) for place in places]
    assert last["task_2.labels"].tolist() == labels


# ---- methods -------------------------------------------------------------------------------------


def test_simple_cil_is_nearest_class_mean_by_cosine_and_trains_nothing(tmp_path: Path) -> None:
    # Protects: the baseline that every method is compared with.
    data = dataset()
    result = train(tmp_path / "run", data, method="simple-cil", class_order="natural")
    assert result.trainable_parameters == 0
    assert result.training_seconds == 0
    assert events(result.output, "step") == []
    assert set(state(result)) == {"prototypes"}

    vit = backbone()
    means = vit.features(pixels(data["train"][0])).view(CLASSES, TRAIN, -1).double().mean(1)
    features = vit.features(pixels(data["test"][0])).double()
    for task in range(3):
        seen = 2 * (task + 1)
        scores = normalize(features[: seen * TEST]) @ normalize(means[:seen]).T
        stored = predictions(result)
        assert torch.equal(scores.argmax(1), stored[f"task_{task}.predictions"])
        right = scores.argmax(1) == torch.from_numpy(data["test"][1][: seen * TEST])
        assert result.accuracy[task] == pytest.approx(100 * right.double().mean().item())
    torch.testing.assert_close(state(result)["prototypes"].double(), means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["channel", "patch"])
def test_ntk_cl_that_does_not_learn_predicts_as_simple_cil(tmp_path: Path, mode: str) -> None:
    # Protects: PEFT at its start changes nothing, through stages, EMA, drift and section scores.
    plain = train(tmp_path / "plain", method="simple-cil")
    idle = train(tmp_path / "idle", learning_rate=0.0, ntk_cl={"mode": mode})
    found, expected = predictions(idle), predictions(plain)
    for name in expected:
        if not name.endswith("confidences"):  # scores are those of all sections
            assert torch.equal(found[name], expected[name]), name
    np.testing.assert_array_equal(idle.accuracy_matrix, plain.accuracy_matrix)


def test_adapters_whose_second_half_is_zero_leave_the_backbone_as_it_is() -> None:
    # Protects: the residual of the channel pass.
    vit, images = backbone(), pixels(dataset()["test"][0][:3])
    draw = torch.Generator().manual_seed(3)
    adapters = {
        f"{block}.{name}": torch.randn(shape, generator=draw) * random
        for block in range(vit.depth)
        for name, shape, random in (
            ("down.weight", (4, vit.width), 1.0),
            ("down.bias", (4,), 1.0),
            ("up.weight", (vit.width, 4), 0.0),
            ("up.bias", (vit.width,), 0.0),
        )
    }
    assert_same_feature(_C.channel_pass(vit, images, adapters, 1.0)["cls"], vit.features(images))
    adapters["2.up.weight"] = torch.randn((vit.width, 4), generator=draw)
    moved = _C.channel_pass(vit, images, adapters, 1.0)["cls"]
    assert (moved - vit.features(images)).norm() > 1e-2


def test_prompts_behind_a_closed_gate_leave_the_backbone_as_it_is() -> None:
    # Protects: gated prompts are attended to by a softmax of their own (repair 8.1).
    vit, images = backbone(), pixels(dataset()["test"][0][:3])
    draw = torch.Generator().manual_seed(3)
    prompts = {
        f"{block}.{name}": torch.randn(shape, generator=draw)
        for block in range(vit.depth)
        for name, shape in (
            ("mix.weight", (5, vit.tokens)),
            ("mix.bias", (5,)),
            ("norm.weight", (vit.width,)),
            ("norm.bias", (vit.width,)),
        )
    }
    gates = {f"{block}.gate": torch.zeros(vit.heads) for block in range(vit.depth)}
    closed = _C.patch_pass(vit, images, prompts | gates, 0.1)["cls"]
    assert_same_feature(closed, vit.features(images))
    gates["3.gate"] = torch.full((vit.heads,), 0.5)
    opened = _C.patch_pass(vit, images, prompts | gates, 0.1)["cls"]
    assert (opened - vit.features(images)).norm() > 1e-2


@pytest.mark.parametrize("mode", ["channel", "patch"])
@pytest.mark.parametrize("plain", [False, True])
def test_a_fresh_ntk_cl_gives_the_backbones_feature_in_every_section(
    mode: str, plain: bool
) -> None:
    # Protects: how trained and frozen lists are initialised.
    vit, images = backbone(), pixels(dataset()["test"][0][:3])
    options = {"mode": mode, "frozen_lists": 2, "pretrained_feature": plain}
    session = _C.MethodSession("ntk-cl", options, vit, tasks=2)
    features = session.features(images)
    assert set(features) == {mode}
    assert features[mode].shape == (3, (4 if plain else 3) * vit.width)
    for section in features[mode].split(vit.width, 1):
        assert_same_feature(section, vit.features(images))


def assert_same_feature(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


# ---- frozen lists --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (3, [3, 3, 2, 2, 1, 1, 1, 1]),  # 8 tasks: without a clamp, list 0 at task 6
        (2, [2, 2, 1, 1]),
        (1, [1, 1, 1]),
        (4, [4, 3, 2, 1]),
    ],
)
def test_the_frozen_list_in_use_goes_from_the_oldest_to_the_newest(
    lists: int, expected: list[int]
) -> None:
    # Protects: section 2 of the specification, with the clamp where K does not divide T.
    tasks = len(expected)
    assert [_C.list_in_use(lists, task, tasks) for task in range(tasks)] == expected


@pytest.mark.parametrize(
    ("lists", "counts"),
    [
        (2, [[0, 1], [0, 2], [1, 2], [1, 2]]),
        (
            3,
            [
                *([0, 0, 1], [0, 0, 2], [0, 1, 2], [0, 2, 2]),
                *([1, 2, 2], [2, 2, 2], [3, 2, 2], [3, 2, 2]),
            ],
        ),
    ],
)
def test_the_moving_average_fills_the_list_in_use_and_rests_after_the_last_task(
    lists: int, counts: list[list[int]]
) -> None:
    # Protects: which list each task goes into, and that the mean counts the tasks in that list.
    vit = backbone()
    images, labels = images_of(2, 2, np.random.default_rng(1))
    batch, labels = pixels(images), torch.from_numpy(labels)
    options = {"frozen_lists": lists, "rank": 2, "prompt_tokens": 2, "drift_compensation": False}
    options |= {"adapter_dropout": 0.0, "fusion_dropout": 0.0}
    session = _C.MethodSession("ntk-cl", options, vit, tasks=len(counts))
    in_list: list[list[torch.Tensor]] = [[] for _ in range(lists)]
    for task, expected in enumerate(counts):
        numbers = labels + 2 * task
        session.begin_task(task, 2 * task, 2, 2, 4, batch, numbers)
        losses = session.step(batch, numbers, 0.05)["losses"]
        assert all(math.isfinite(value) for value in losses.values())
        session.run_stages()
        now = session.state()
        assert now["tasks_in_list"].tolist() == expected
        assert len(now["prototypes"]) == 2 * (task + 1)
        if task + 1 < len(counts):
            used = _C.list_in_use(lists, task, len(counts))
            in_list[used - 1].append(now["channel.1.up.weight"])
    for number, seen in enumerate(in_list, start=1):
        mean = now[f"pre{number}.channel.1.up.weight"]
        torch.testing.assert_close(mean, torch.stack(seen).mean(0), rtol=1e-5, atol=1e-8)
        assert mean.abs().max() > 0


# ---- every kind of run ---------------------------------------------------------------------------

ONE_TASK = {"initial_classes": 4, "batch_size": 6}


def small() -> dict[str, Any]:
    return dataset(classes=4, train=3, test=1)


def assert_finite(result: ntkcl.Result, names: set[str]) -> None:
    losses = step_losses(result)
    assert len(losses) >= 2
    assert all(set(step) == names for step in losses)
    assert all(math.isfinite(value) for step in losses for value in step.values())
    assert all(tensor.isfinite().all() for tensor in state(result).values())


def test_every_kind_of_fusion_is_tested() -> None:
    # Protects: the list below against a kind that is added without a run.
    assert set(_C.fusion_kinds) == set(FUSIONS)


@pytest.mark.parametrize("kind", FUSIONS)
def test_every_kind_of_fusion_learns(tmp_path: Path, kind: str) -> None:
    # Protects: shapes, initialisation and gradients of each fusion inside a whole run.
    result = train(tmp_path / "run", small(), **ONE_TASK, ntk_cl={"mode": "both", "fusion": kind})
    names = {"ce_channel", "ce_patch", "ce_fused", "l_dis", "l_orth", "l_reg", "total"}
    assert_finite(result, names)
    start = bare_trainer("ntk-cl", {"mode": "both", "fusion": kind}).state()
    fusion = {name: t for name, t in state(result).items() if name.startswith("fusion.")}
    assert fusion.keys() == {name for name in start if name.startswith("fusion.")}
    assert any(not torch.equal(fusion[name], start[name]) for name in fusion)


@pytest.mark.parametrize("mode", ["both", "channel", "patch"])
def test_every_mode_learns(tmp_path: Path, mode: str) -> None:
    # Protects: a mode trains its own sub-network and leaves the other one alone.
    result = train(
        tmp_path / "run", small(), **ONE_TASK, ntk_cl={"mode": mode, "pretrained_feature": True}
    )
    after = state(result)
    adapters = after["channel.1.up.weight"].abs().max()
    gates = after["patch.1.gate"].abs().max()
    assert (adapters > 0) == (mode != "patch")
    assert (gates > 0) == (mode != "channel")
    cross_entropies = {"channel": {"ce_channel"}, "patch": {"ce_patch"}}
    both = {"ce_channel", "ce_patch", "ce_fused", "l_dis", "l_orth", "l_reg"}
    assert_finite(result, cross_entropies.get(mode, both) | {"total"})


@pytest.mark.parametrize("variant", ["release", "corrected"])
def test_both_variants_run_over_tasks(tmp_path: Path, variant: str) -> None:
    # Protects: the published arithmetic stays runnable beside the repaired one.
    result = train(tmp_path / "run", dataset(4, 4, 2), variant=variant)
    assert result.config.normalize == {"release": "none", "corrected": "weights"}[variant]
    assert np.isfinite(result.accuracy_matrix[np.tril_indices(2)]).all()
    assert all(math.isfinite(v) for step in step_losses(result) for v in step.values())
    gated = any(name.endswith("gate") for name in state(result))
    assert gated == (variant == "corrected")


def test_float64_computes_in_float64_what_float32_computes(tmp_path: Path) -> None:
    # Protects: precision is a choice of dtype and nothing else.
    runs = {
        precision: train(tmp_path / precision, small(), **ONE_TASK, precision=precision)
        for precision in ("float32", "float64")
    }
    double = state(runs["float64"])
    assert {t.dtype for name, t in double.items() if name != "tasks_in_list"} == {torch.float64}
    assert state(runs["float32"])["prototypes"].dtype == torch.float32
    for single, twice in zip(*(step_losses(run) for run in runs.values()), strict=True):
        assert single == pytest.approx(twice, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("products", "tolerance", "cosine_above"), [("bfloat16", 2e-2, 0.999), ("float8", 0.1, 0.99)]
)
def test_rounded_products_stay_near_float32_and_keep_all_else_in_it(
    tmp_path: Path, products: str, tolerance: float, cosine_above: float
) -> None:
    # Protects: what is trained, summed and stored is float32; only the frozen products are rounded.
    runs = {
        precision: train(tmp_path / precision, small(), **ONE_TASK, precision=precision)
        for precision in ("float32", products)
    }
    exact, rounded = state(runs["float32"]), state(runs[products])
    assert {name: t.dtype for name, t in rounded.items()} == {n: t.dtype for n, t in exact.items()}
    first = [step_losses(run)[0] for run in runs.values()]
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=tolerance, abs=tolerance)
    cosine = normalize(exact["prototypes"]) * normalize(rounded["prototypes"])
    assert cosine.sum(1).min() > cosine_above


def test_the_faster_matrix_product_computes_the_same(tmp_path: Path) -> None:
    # Protects: cpu_matmul chooses a library, not a precision.
    auto, default = (
        train(tmp_path / kind, dataset(4), cpu_matmul=kind) for kind in ("auto", "default")
    )
    np.testing.assert_array_equal(auto.accuracy_matrix, default.accuracy_matrix)
    for a, b in zip(step_losses(auto), step_losses(default), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("mode", ["channel", "patch"])
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_keeping_less_changes_no_gradient(mode: str, precision: str) -> None:
    # Protects: what recompute computes anew is what it did not keep, to the bit.
    images, labels = images_of(2, 2, np.random.default_rng(1))
    batch, labels = pixels(images), torch.from_numpy(labels)
    options = {"mode": mode, "adapter_dropout": 0.0}
    gradients = []
    for recompute in (False, True):
        train = {"precision": precision, "recompute": recompute}
        session = _C.MethodSession("ntk-cl", options, backbone(), tasks=2, train=train)
        session.begin_task(0, 0, 2, 2, 4, batch, labels)
        session.step(batch, labels, 0.05)  # the first leaves zero weights behind
        gradients.append(session.step(batch, labels, 0.05)["gradients"])
    for kept, computed in zip(*gradients, strict=True):
        assert torch.equal(kept, computed)


# ---- RAA's drift and alignment in NTK-CL ---------------------------------------------------------


def test_ntk_cl_with_the_alignment_of_raa(tmp_path: Path) -> None:
    # Protects: prototypes and what images are compared with are two things.
    section = {"alignment": True, "alignment_samples": 16, "alignment_epochs": 2}
    plain, aligned = (
        train(tmp_path / str(bool(given)), ntk_cl=given, epochs=2) for given in ({}, section)
    )
    tensors = state(aligned)
    assert torch.equal(tensors["prototypes"], state(plain)["prototypes"])
    assert state(plain)["aligned"].numel() == 0
    assert tensors["aligned"].shape == tensors["prototypes"].shape
    assert not torch.equal(tensors["aligned"], tensors["prototypes"])
    assert tensors["gaussians.means"].shape == tensors["prototypes"].shape
    torch.testing.assert_close(tensors["gaussians.means"], tensors["prototypes"])
    tags = [(e["task"], e["tag"]) for e in events(aligned.output, "extra_evaluation")]
    assert tags == [(1, "before alignment"), (2, "before alignment")]
    # Before the first alignment both are one.
    assert aligned.evaluations[0].per_task == plain.evaluations[0].per_task


def test_the_alignment_of_ntk_cl_begins_from_the_means_as_they_have_drifted(tmp_path: Path) -> None:
    section = {"alignment": True, "alignment_epochs": 1, "alignment_learning_rate": 0.0}
    tensors = state(train(tmp_path / "run", ntk_cl=section, epochs=2))
    sections = tensors["prototypes"].unflatten(1, (-1, backbone().width))
    torch.testing.assert_close(tensors["aligned"], normalize(sections, dim=2).flatten(1))


def test_ntk_cl_with_the_drift_of_raa(tmp_path: Path) -> None:
    prototypes = {}
    for drift in ("off", "paired"):
        section = {"drift": drift, "drift_compensation": False}
        prototypes[drift] = state(train(tmp_path / drift, ntk_cl=section))["prototypes"]
    assert torch.equal(prototypes["off"][4:], prototypes["paired"][4:])
    assert not torch.equal(prototypes["off"][:4], prototypes["paired"][:4])
