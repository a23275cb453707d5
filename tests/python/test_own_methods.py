"""Methods written in Python: what the core gives them, what it takes, and that they live the same
life as built-in ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ntkcl
from ntkcl import methods
from ntkcl.comparison import compare
from run_comparison import differences
from test_cli import run
from test_resume import KEYS, stop_after
from test_training import CLASSES, TRAIN, dataset, train


class Means(ntkcl.Method):
    """SimpleCIL in Python."""

    peft = "none"

    def __init__(self) -> None:
        self.means = torch.zeros(0, 0)

    def trains(self, task: ntkcl.Task) -> bool:
        return False

    def after_task(self, features: torch.Tensor, labels: torch.Tensor, task: ntkcl.Task) -> None:
        classes = range(task.n_old, task.n_seen)
        new = torch.stack([features[labels == c].double().mean(0) for c in classes]).float()
        self.means = torch.cat([self.means.reshape(-1, self.width), new])

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        normalize = torch.nn.functional.normalize
        return normalize(features) @ normalize(self.means).T


class Heads(ntkcl.Method):
    """Adapters and a head that grows."""

    rank = 4

    def __init__(self, rate: float = 1.0) -> None:
        self.rate = rate
        self.head = torch.zeros(0, 0)
        self.seen: list[ntkcl.Task] = []

    def before_task(self, task: ntkcl.Task) -> None:
        self.seen.append(task)
        new = torch.randn(task.n_new, self.width, generator=task.generator()) * 0.02
        self.head = torch.cat([self.head.detach().reshape(-1, self.width), new])

    def parameters(self) -> list[torch.Tensor]:
        return [self.head]

    def loss(self, features: torch.Tensor, labels: torch.Tensor, task: ntkcl.Task) -> torch.Tensor:
        assert features.requires_grad
        logits = self.rate * features @ self.head.T
        return torch.nn.functional.cross_entropy(logits, labels)

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.head.detach().T


def test_class_means_in_python_are_those_of_the_core(tmp_path: Path) -> None:
    own = train(tmp_path / "own", method=Means())
    core = train(tmp_path / "core", method="simple-cil")
    np.testing.assert_array_equal(own.accuracy_matrix, core.accuracy_matrix)


def test_adapters_and_the_methods_own_tensors_learn(tmp_path: Path) -> None:
    result = train(tmp_path / "run", method=Heads(), epochs=4, learning_rate=0.05)
    state = ntkcl.load(tmp_path / "run")._state
    assert state["own.head"].shape == (
        CLASSES,
        result.stored_parameters and state["own.head"].shape[1],
    )
    assert any(name.endswith("up.weight") and bool(t.any()) for name, t in state.items())
    assert result.evaluations[0].top1 > 60


@pytest.mark.parametrize("kind", ["adapter", "lora", "prompts"])
def test_every_kind_of_module_is_trained_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    class Own(Heads):
        peft = kind

    keys = KEYS | {"method": Own(), "transform": "inception"}
    whole = train(tmp_path / "whole", **keys)
    modules = load_file(whole.output / "state.safetensors")
    # What begins at zero and is read: outputs of adapters and LoRAs, gates of prompts.
    zeros = {"adapter": "1.up.weight", "lora": "1.fc1.up", "prompts": "1.gate"}[kind]
    assert bool(modules[f"peft.{zeros}"].any())
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", resume=True, **keys)
    ntkcl.resume(tmp_path / "run", dataset=dataset())
    assert differences(whole.output, tmp_path / "run") == []


def test_a_loss_has_the_gradient_of_plain_pytorch(tmp_path: Path) -> None:
    # Protects: autograd goes from the hook into the head, in one graph with the adapters.
    seen: dict[str, torch.Tensor] = {}

    class Watched(Heads):
        def loss(self, features: Any, labels: Any, task: Any) -> Any:
            loss = super().loss(features, labels, task)
            if not seen:
                expected = torch.autograd.grad(loss, self.head, retain_graph=True)[0]
                seen.update(before=self.head.detach().clone(), gradient=expected)
                seen["features"] = torch.autograd.grad(loss, features, retain_graph=True)[0]
            elif "after" not in seen:
                seen["after"] = self.head.detach().clone()
            return loss

    train(
        tmp_path / "run",
        method=Watched(),
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        learning_rate=0.5,
        schedule="constant",
    )
    moved = seen["before"] - 0.5 * seen["gradient"]
    torch.testing.assert_close(seen["after"], moved, rtol=1e-5, atol=1e-7)
    assert bool(seen["features"].any())


def test_a_stopped_run_of_an_own_method_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KEYS | {"method": Heads()}
    whole = train(tmp_path / "whole", **keys)
    for questions in (2, 4, 3):
        with monkeypatch.context() as patch:
            stop_after(patch, questions)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "run", resume=True, **keys)
    ntkcl.resume(tmp_path / "run", dataset=dataset())
    assert differences(whole.output, tmp_path / "run") == []


def test_an_own_method_is_loaded_and_goes_on(tmp_path: Path) -> None:
    ntkcl.register("heads", Heads)
    assert "heads" in ntkcl.list_methods()
    train(tmp_path / "run", method="heads")
    model = ntkcl.load(tmp_path / "run")
    found = ntkcl.load_result(tmp_path / "run").evaluations[-1]
    np.testing.assert_equal(vars(model.evaluate(dataset())), vars(found))
    noise = np.random.default_rng(0).integers(0, 256, (TRAIN, 32, 32, 3), np.uint8)
    model.add_task({"new": noise})
    assert model.predict(noise).scores.shape == (TRAIN, CLASSES + 1)


# ---- where the class is not known ----------------------------------------------------------------

MODULE = """
import ntkcl
from test_own_methods import Heads

ntkcl.register("elsewhere", Heads)
"""
COMMON = """
method = "elsewhere"
train_per_class = 4
test_per_class = 2
epochs = 1
progress = false
"""


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As if a process began anew, in a folder that has the method in `my_module`: no class is
    registered, nothing is imported."""
    monkeypatch.chdir(tmp_path)
    Path("my_module.py").write_text(MODULE)
    Path("c.toml").write_text(COMMON)
    # Pythons that are started find the classes of this file.
    monkeypatch.setenv("PYTHONPATH", ":".join([str(Path(__file__).parent), *sys.path]))

    def anew() -> None:
        monkeypatch.setattr(methods, "_registered", {})
        monkeypatch.setattr(methods, "_imported", [])
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
        monkeypatch.delitem(sys.modules, "my_module", raising=False)

    anew()
    return anew


def test_what_was_run_is_read_without_its_class(tmp_path: Path, process: Any) -> None:
    data = dataset()
    one = train(tmp_path / "one", data, method=Heads())
    two = train(tmp_path / "two", data, method=Heads(), seeds=[0, 1])
    process()
    assert "Heads" not in ntkcl.list_methods()
    assert ntkcl.load_result("one").config == one.config
    np.testing.assert_equal(ntkcl.load_result("two").mean, two.mean)
    [table] = compare(["one", "two"])
    assert [group.seeds for group in table.groups] == ["0, 0, 1"]
    assert run("report", "one", "two") == 0
    np.testing.assert_equal(ntkcl.resume("one").to_dict(), one.to_dict())
    with pytest.raises(ValueError) as refused:
        ntkcl.load("one")
    assert "ntkcl.register('Heads', <class>)" in str(refused.value)
    assert "--import MODULE" in str(refused.value)


def test_commands_import_the_module_that_registers_a_method(
    process: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", "c.toml", "--output", "o"]
    assert run(*words) == 2
    assert "(register an own one first: `ntkcl.register('elsewhere'" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run(*words, "--import", "my_module") == 130
    assert capsys.readouterr().err.endswith("go on with `ntkcl resume o --import my_module`\n")
    for command in (["resume", "o"], ["evaluate", "o"], ["predict", "o", "o/accuracy.png"]):
        process()
        assert run(*command) == 2
        assert "got 'elsewhere' (register an own one first" in capsys.readouterr().err
        process()
        assert run(*command, "--import", "my_module") == 0
        capsys.readouterr()


def test_a_note_names_a_way_to_go_on_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: Any
) -> None:
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(tmp_path / "run", method=Heads(), seeds=[0, 1])
    assert [note.partition("; ")[2] or note for note in stopped.value.__notes__] == [
        f"go on with `ntkcl.resume('{tmp_path}/run/seed-0')` where 'Heads' is registered",
        f"with all seeds by `ntkcl.resume('{tmp_path}/run')` where 'Heads' is registered",
    ]


def test_the_processes_of_a_sweep_import_the_module(
    process: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("grid.toml").write_text(f'output = "s"\n[base]\n{COMMON}[grid]\nseed = [0, 1]\n')
    words = ["sweep", "grid.toml", "--import", "my_module"]
    assert run(*words, "--slurm", "jobs.sh") == 0
    assert "grid.toml --import my_module --point" in Path("jobs.sh").read_text()
    assert run(*words, "--jobs", "2") == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count(" finished ") == 2


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("nowhere", "[import] expected a module here or installed, got 'nowhere'"),
        ("my_module.py", "[import] expected a module here or installed, got 'my_module.py'"),
        ("broken", "No module named 'nowhere'; in the module 'broken'"),
    ],
)
def test_a_module_that_is_not_there_is_named(
    process: Any, capsys: pytest.CaptureFixture[str], module: str, error: str
) -> None:
    Path("broken.py").write_text("import nowhere\n")
    assert run("resume", "o", "--import", module) == 2
    assert capsys.readouterr().err.startswith(f"ntkcl: {error}")


# ---- what is refused, and what is kept apart -----------------------------------------------------


def test_every_run_has_an_object_of_its_own(tmp_path: Path) -> None:
    method = Heads()
    first = train(tmp_path / "first", method=method)
    second = train(tmp_path / "second", method=method)
    assert differences(first.output, second.output) == []
    assert method.seen == []


class NoLoss(ntkcl.Method):
    pass


class Constant(Heads):
    def loss(self, features: Any, labels: Any, task: Any) -> Any:
        return torch.tensor(1.0)


class Vector(Heads):
    def loss(self, features: Any, labels: Any, task: Any) -> Any:
        return features.sum(1)


class Text(Heads):
    def loss(self, features: Any, labels: Any, task: Any) -> Any:
        return "none"


class Computed(Heads):
    def parameters(self) -> list[torch.Tensor]:
        return [self.head.requires_grad_() * 2]


class WrongScores(Means):
    def scores(self, features: torch.Tensor) -> torch.Tensor:
        return super().scores(features)[:, :1]


class Prefix(Heads):
    peft = "prefix"


class NoRank(Heads):
    rank = 0


class Fails(Heads):
    def before_task(self, task: ntkcl.Task) -> None:
        raise KeyError("of the method")


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (Constant(), ValueError, "a number that depends on what is trained, got a constant"),
        (Vector(), ValueError, "'loss': expected one number"),
        (Text(), TypeError, "'loss': expected a tensor, got <class 'str'>"),
        (Computed(), ValueError, "tensors that were not computed from others"),
        (WrongScores(), ValueError, r"expected floating point scores \(b, 2 or more\)"),
        (Prefix(), ValueError, "'peft': expected one of: adapter, lora, prompts, got 'prefix'"),
        (NoRank(), ValueError, "'rank': expected a positive number, got 0"),
        (Fails(), KeyError, "of the method"),
        (NoLoss(), NotImplementedError, "'NoLoss' trains but has no loss"),
    ],
)
def test_a_method_that_does_not_fit_is_refused(
    tmp_path: Path, method: ntkcl.Method, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(tmp_path / "run", method=method)


def test_a_class_is_known_by_its_own_name_or_the_registered_one(tmp_path: Path) -> None:
    class Unregistered(Means):
        pass

    class Registered(Means):
        pass

    ntkcl.register("of-means", Registered)
    for number, (method, name) in enumerate(
        [(Unregistered, "Unregistered"), (Registered, "of-means"), ("of-means", "of-means")]
    ):
        result = train(tmp_path / str(number), method=method)
        assert result.config.method == name
    found = ntkcl.resume(tmp_path / "0", dataset=dataset())
    np.testing.assert_array_equal(found.accuracy_matrix, result.accuracy_matrix)
    with pytest.raises(TypeError, match="'method': expected str, got <class 'dict'>"):
        train(tmp_path / "dict", method=dict)


@pytest.mark.parametrize("name", ["", "a b/x", "../x", "-x", "a.b", "a\n"])
def test_names_of_other_characters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\[register\] expected a name of letters, digits"):
        ntkcl.register(name, Means)


@pytest.mark.parametrize("make", [Means(), dict, None])
def test_what_makes_no_method_is_refused(make: Any) -> None:
    with pytest.raises(
        TypeError, match=r"\[register\] expected a class derived from ntkcl\.Method"
    ):
        ntkcl.register("wrong", make)
    assert "wrong" not in ntkcl.list_methods()


def test_built_in_names_and_makers_of_other_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a new name, got the built-in 'raa'"):
        ntkcl.register("raa", Heads)
    ntkcl.register("no-method", lambda: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="to make an ntkcl"):
        methods.core_method("no-method")
