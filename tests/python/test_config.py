"""One configuration: the same keys in Python, in a file and on the command line; errors say what
was given and what is allowed."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkcl import _C
from ntkcl.cli import parse_train
from ntkcl.config import Config, options, resolve, to_toml

PRESET = "ntk-cl/cifar100-in21k"


def from_file(folder: Path, text: str, **keywords: Any) -> Config:
    path = folder / "c.toml"
    path.write_text(text)
    return resolve(keywords, path)


def refused(error: type[Exception], keywords: dict[str, Any]) -> str:
    with pytest.raises(error) as caught:
        resolve(keywords)
    assert type(caught.value) is error, "pydantic's own error must not reach the user"
    message = str(caught.value)
    assert message.startswith("[config] ")
    return message


# ---- layers --------------------------------------------------------------------------------------


def test_without_arguments_it_is_the_embedded_default() -> None:
    config = resolve()
    assert (config.method, config.dataset, config.transform) == ("ntk-cl", "digits", "resize")
    assert (config.initial_classes, config.increment, config.image_size) == (2, 2, 32)
    assert config.backbone.startswith("vit_formula")


def test_keywords_win_over_file_over_preset_over_variant(tmp_path: Path) -> None:
    release = resolve({"variant": "release"})
    assert release.ntk_cl.fusion == "attention"
    assert resolve({"variant": "release", "ntk_cl.fusion": "concat"}).ntk_cl.fusion == "concat"

    preset = resolve({"preset": PRESET})
    assert (preset.learning_rate, preset.ntk_cl.eta, preset.variant) == (0.025, 0.03, "release")
    text = f'preset = "{PRESET}"\nlearning_rate = 0.5\nepochs = 7\n[ntk_cl]\neta = 0.7\n'
    file = from_file(tmp_path, text)
    assert (file.learning_rate, file.epochs, file.ntk_cl.eta) == (0.5, 7, 0.7)
    assert file.weight_decay == preset.weight_decay
    both = from_file(tmp_path, text, epochs=9, ntk_cl={"eta": 0.9})
    assert (both.learning_rate, both.epochs, both.ntk_cl.eta) == (0.5, 9, 0.9)


def test_an_explicit_variant_wins_over_the_presets() -> None:
    config = resolve({"preset": PRESET, "variant": "corrected"})
    assert config.ntk_cl.fusion == "cross_attention"
    assert config.learning_rate == 0.025


def test_normalization_follows_the_variant_until_it_is_given() -> None:
    assert resolve({"variant": "release"}).normalize == "none"
    assert resolve({"variant": "corrected"}).normalize == "weights"
    assert resolve({"variant": "release", "normalize": "weights"}).normalize == "weights"
    given = resolve({"normalize": {"mean": (0.1, 0.2, 0.3), "std": np.ones(3)}}).normalize
    assert given.model_dump() == {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}


def test_image_size_follows_the_backbone_until_it_is_given() -> None:
    tiny = {"backbone": "vit_tiny_patch16_224.augreg_in21k", "dataset": "cifar100"}
    assert resolve(tiny).image_size == 224
    assert resolve({**tiny, "image_size": 112}).image_size == 112


def test_the_core_gets_each_option_under_its_name_and_no_other() -> None:
    config = resolve({"epochs": 4, "loader_threads": 3, "ntk_cl.rank": 8})
    described = _C.describe_options()
    train = config.train_options()
    assert list(train) == [info["key"] for info in described["train"]]
    assert train["epochs"] == 4
    assert config.loader_options()["loader_threads"] == 3
    assert config.transform_options() == {"transform": "resize", "image_size": 32}
    method = config.method_options()
    assert set(method) == {info["key"] for info in described["methods"]["ntk-cl"]["options"]}
    assert method["rank"] == 8


def test_a_preset_serves_another_method_without_its_section() -> None:
    config = resolve({"preset": PRESET, "method": "simple-cil"})
    assert (config.method, config.increment) == ("simple-cil", 10)
    assert config.method_options() == {}


# ---- the same in every place ---------------------------------------------------------------------


def test_command_line_keywords_and_file_agree(tmp_path: Path) -> None:
    text = """
epochs = 5
learning_rate = 0.1
deterministic = false
schedule = "multistep"
milestones = [2, 4]
class_order = [1, 0, 2]
normalize = {mean = [0.5, 0.5, 0.5], std = [1.0, 1.0, 1.0]}
train_per_class = 3
[ntk_cl]
eta = 0.03
lambda = 2e-3
mode = "channel"
"""
    keywords: dict[str, Any] = {
        "epochs": 5,
        "learning_rate": 0.1,
        "deterministic": False,
        "schedule": "multistep",
        "milestones": [2, 4],
        "class_order": [1, 0, 2],
        "normalize": {"mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0]},
        "train_per_class": 3,
        "ntk_cl": {"eta": 0.03, "lambda": 2e-3, "mode": "channel"},
    }
    words = [
        *("--epochs", "5", "--learning-rate", "0.1", "--deterministic", "false"),
        *("--schedule=multistep", "--milestones", "2", "4", "--class-order", "[1, 0, 2]"),
        *("--normalize", "{mean = [0.5, 0.5, 0.5], std = [1, 1, 1]}", "--train_per_class", "3"),
        *("--ntk-cl.eta", "0.03", "--ntk-cl.lambda", "2e-3", "--ntk-cl.mode", "channel"),
    ]
    expected = resolve(keywords)
    assert expected.milestones == [2, 4]
    assert from_file(tmp_path, text) == expected
    file, given, _ = parse_train(words)
    assert file is None
    assert resolve(given, file) == expected


def test_dotted_keys_are_sections() -> None:
    assert resolve({"ntk_cl.eta": 0.5}) == resolve({"ntk_cl": {"eta": 0.5}})


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"preset": PRESET, "data_root": 'a "quoted" \\ path\n\x7f é'},
        {"preset": "ntk-cl/kvasir-in1k", "seed": 3, "ntk_cl.lambda": 1e-7},
        {"method": "simple-cil", "normalize": "none"},
        {"normalize": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 1]}, "class_order": [2, 0, 1]},
        {"schedule": "multistep", "milestones": [1, 3], "train_per_class": 4, "progress": False},
    ],
)
def test_written_and_read_back_it_is_the_same(tmp_path: Path, keywords: dict[str, Any]) -> None:
    config = resolve(keywords)
    assert from_file(tmp_path, to_toml(config)) == config


def test_every_default_passes_its_own_check() -> None:
    for option in options():
        if "." in option.key or option.default is None or option.key == "normalize":
            continue
        resolve({"dataset": "digits", option.key: option.default})


def test_numpy_numbers_and_paths_are_taken() -> None:
    config = resolve(
        {"epochs": np.int64(3), "learning_rate": np.float32(0.5), "weights": Path("w")}
    )
    assert (config.epochs, config.learning_rate) == (3, 0.5)
    assert config.weights == str(Path("w").absolute())


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("epcohs", "epochs"),
        ("lr", "learning_rate"),
        ("eta", "ntk_cl.eta"),
        ("ntk_cl.etta", "ntk_cl.eta"),
        ("ntk-cl.eta", "ntk_cl.eta"),
        ("batchsize", "batch_size"),
        ("raa.rho", "rho"),
        ("raa.epcohs", "epochs"),
        ("raa.rnak", "raa.rank"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, meant: str) -> None:
    message = refused(ValueError, {key: 1})
    assert f"unknown key '{key}'" in message
    assert f"did you mean '{meant}'" in message


def test_an_unknown_key_without_a_near_one_points_to_the_list() -> None:
    assert "--help" in refused(ValueError, {"zzzzzz": 1})


def test_an_unknown_key_in_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown key 'ntk_cl\.etta'; did you mean 'ntk_cl\.eta'"):
        from_file(tmp_path, "[ntk_cl]\netta = 1.0\n")


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"epochs": "three"}, "'epochs': expected int >= 1, got 'three'"),
        ({"epochs": 2.5}, "'epochs': expected int >= 1, got 2.5"),
        ({"epochs": True}, "'epochs': expected int >= 1, got True"),
        ({"epochs": None}, "'epochs': expected int >= 1, got None"),
        ({"learning_rate": "x"}, "'learning_rate': expected float >= 0, got 'x'"),
        ({"deterministic": 1}, "'deterministic': expected bool, got 1"),
        ({"milestones": 3}, "'milestones': expected list[int] >= 1, got 3"),
        ({"dataset": 3}, "'dataset': expected str, got 3"),
        ({"ntk_cl": {"eta": "x"}}, "'ntk_cl.eta': expected float >= 0, got 'x'"),
        ({"ntk_cl": 3}, "'ntk_cl': expected a table of options, got 3"),
    ],
)
def test_a_wrong_type_says_what_was_expected(keywords: dict[str, Any], expected: str) -> None:
    assert expected in refused(TypeError, keywords)


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"epochs": 0}, "'epochs': expected int >= 1, got 0"),
        ({"learning_rate": math.nan}, "'learning_rate': expected float >= 0, got nan"),
        (
            {"validation_fraction": 1.0},
            "'validation_fraction': expected float >= 0 and < 1, got 1.0",
        ),
        ({"schedule": "cosin"}, "'schedule': expected one of: cosine, multistep, constant"),
        ({"method": "ntkcl"}, "did you mean 'ntk-cl'"),
        ({"variant": "releas"}, "did you mean 'release'"),
        ({"backbone": "vit_tiny"}, "did you mean 'vit_tiny_patch16_224.augreg_in21k'"),
        ({"preset": "ntk-cl/cifar10-in21k"}, "did you mean 'ntk-cl/cifar100-in21k'"),
        ({"train_per_class": 0}, "'train_per_class': expected int >= 1, got 0"),
        ({"normalize": "weight"}, "'normalize': expected none, weights or {mean, std}"),
        ({"normalize": {"mean": [0, 0, 0], "std": [1, 0, 1]}}, "'normalize': expected none"),
        ({"normalize": {"mean": [0, 0, 0]}}, "'normalize': expected none"),
        ({"class_order": "sed"}, "'class_order': expected seed, natural or class indices"),
    ],
)
def test_a_value_that_is_not_allowed_says_what_is(keywords: dict[str, Any], expected: str) -> None:
    assert expected in refused(ValueError, keywords)


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"image_size": 33}, "multiple of the patch size 8 of 'vit_formula_patch8_32', got 33"),
        ({"seed": 2**32}, "'seed': expected less than 2**32"),
        ({"milestones": [2]}, "expected schedule 'multistep', got schedule 'cosine'"),
        ({"class_order": [0, 0, 2]}, "expected each of 0 ... 2 once, got [0, 0, 2]"),
        ({"method": "simple-cil", "ntk_cl.eta": 0.1}, "'ntk_cl.eta': the method is 'simple-cil'"),
        ({"ntk_cl.eta": 0.1, "ntk_cl": {"eta": 0.2}}, "'ntk_cl.eta': given twice"),
    ],
)
def test_an_impossible_combination_is_refused(keywords: dict[str, Any], expected: str) -> None:
    assert expected in refused(ValueError, keywords)


def test_all_wrong_keys_are_named_at_once() -> None:
    message = refused(ValueError, {"epochs": 0, "schedule": "x"})
    assert "'epochs'" in message
    assert "'schedule'" in message


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        resolve({}, tmp_path / "nowhere.toml")
    with pytest.raises(ValueError, match=r"c\.toml' is not valid TOML.*line 1"):
        from_file(tmp_path, "epochs == 3\n")
