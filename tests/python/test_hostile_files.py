"""Files from strangers are read, or refused with an error that says where and why; a part of what
`make fuzz` reads under sanitizers, and each kind of fault that it has found."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import fuzz
import hostile_surfaces
import ntkcl
from hostile_surfaces import Surface, input_of, make_surfaces, outcome
from mutations import of_bytes
from ntkcl import _C, runfolder
from ntkcl.comparison import compare
from ntkcl.config import resolve
from ntkcl.datasets import load_dataset, plain_pickle

# Inputs of each surface: as many as are read in a second or two.
_FAST = {"jpeg": 300, "png": 300, "bmp": 300, "webp": 300, "png-chunks": 300, "any-format": 100}
_FAST |= {"zip": 150, "folder": 100, "lists": 100, "yaml-lists": 100, "arrays": 200, "pickle": 300}
_FAST |= {"cifar-100": 100, "cifar-100-tar": 100, "weights": 200, "checkpoint-json": 100}
_FAST |= {"weights-core": 200}
_FAST |= {"checkpoint-bytes": 100, "result.json": 100, "environment-of-a-resumed-run": 100}
_FAST |= {"events.jsonl": 50, "model.json": 50, "config.toml": 50}
_SLOW = ["environment.json", "predictions.safetensors"]
_SLOW += [
    f"{kind}-{method}"
    for kind in ("state", "checkpoint", "progress")
    for method in hostile_surfaces.METHODS
]
INPUTS = _FAST | dict.fromkeys(_SLOW, 15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def surfaces(folder: Path) -> dict[str, Surface]:
    return make_surfaces(folder)


@pytest.fixture
def alarm() -> Iterator[None]:
    """Ends a test that goes on for ever."""

    def end(*_: object) -> None:
        raise TimeoutError("an input takes too long")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", INPUTS)
def test_a_hostile_file_is_read_or_refused(
    surfaces: dict[str, Surface], alarm: None, name: str
) -> None:
    # Protects: no raw KeyError, RecursionError or RuntimeError, no hang, no crash.
    surface = surfaces[name]
    assert {outcome(surface, seed) for seed in surface.seeds} == {"accepted"}
    for number in range(INPUTS[name]):
        outcome(surface, input_of(surface, name, 1, number))


def test_every_surface_has_its_test(surfaces: dict[str, Surface]) -> None:
    assert set(surfaces) == set(INPUTS)


# ---- the fuzzer itself ---------------------------------------------------------------------------


def test_an_input_is_drawn_from_seed_and_number_alone(surfaces: dict[str, Surface]) -> None:
    for name in ("png", "zip", "weights", "model.json", "config.toml"):
        surface = surfaces[name]
        inputs = [input_of(surface, name, 3, number) for number in (0, 1, 2)]
        assert inputs == [input_of(surface, name, 3, number) for number in (0, 1, 2)]
        assert len(set(inputs)) == 3 and input_of(surface, name, 4, 0) != inputs[0]


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (KeyError("x"), "no refusal of ours"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "[where] expected"), "no refusal of ours"),
        (ValueError("no place"), "no refusal of ours"),
        (RuntimeError("[internal] assertion"), "no refusal of ours"),
        (FloatingPointError("[train] the loss"), "no refusal of ours"),
        (ValueError("[where] " + "x" * 20_000), "a message of 20008"),
    ],
)
def test_other_ends_than_a_refusal_are_failures(raised: Exception, message: str) -> None:
    def read(_: bytes) -> None:
        raise raised

    with pytest.raises(AssertionError, match=message):
        outcome(Surface([b""], of_bytes, read, 1), b"")


@pytest.mark.parametrize(
    ("end", "what"),
    [("os.abort()", "ended with -6"), ("time.sleep(60)", "took too long")],
)
def test_a_crash_and_a_hang_are_kept_and_gone_on_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, what: str
) -> None:
    # Protects: the watcher names the input that the reader died over, and keeps it.
    (tmp_path / "failures").mkdir()
    (tmp_path / "current").write_bytes(b"hostile")
    lines = "begin\tpng\t6\nend\tpng\t6\t0.5\t'accepted'\nbegin\tpng\t7"
    script = f"import os, time; print({lines!r}, flush=True); {end}"
    monkeypatch.setattr(fuzz, "reader", lambda place: [sys.executable, "-c", script])
    monkeypatch.setattr(fuzz, "SECONDS", 1.0)
    counts: dict[str, fuzz.Count] = {}
    found: list[str] = []
    arguments = Namespace(work=tmp_path, seed=5)
    assert fuzz.watch_once(arguments, ("", 0), counts, found) == ("png", 8)
    assert counts["png"].outcomes == {"accepted": 1, "FAILED": 1}
    assert len(found) == 1 and found[0].startswith(f"png-5-7: FAILED {what}")
    assert (tmp_path / "failures" / "png-5-7").read_bytes() == b"hostile"


def test_the_guard_sees_what_no_reader_may_do(tmp_path: Path) -> None:
    # In a process of its own: Python's audit hooks stay.
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    script = f"""
import os, pathlib, pickle, subprocess, sys
sys.path.insert(0, {str(Path(fuzz.__file__).parent)!r})
import fuzz
guard = fuzz.Guard(pathlib.Path({str(inside)!r}))
pathlib.Path({str(inside / "a")!r}).write_text("x")
assert not guard.seen, guard.seen
pathlib.Path({str(outside)!r}).write_text("x")
os.rename({str(outside)!r}, {str(inside / "b")!r})
subprocess.run(["true"])
pickle.loads(pickle.dumps(print))
print([text.split()[0].rstrip(":") for text in guard.seen])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = done.stdout
    for event in ("open", "os.rename", "subprocess.Popen", "pickle.find_class"):
        assert event in seen


# ---- what it has found ---------------------------------------------------------------------------


def test_a_pipe_among_images_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    store = _C.make_file_store([str(tmp_path / "x.png")], [0])
    errors: list[Exception] = []

    def load() -> None:
        try:
            store.load(0)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(60)
    assert [str(error).partition(",")[0] for error in errors] == [
        "[ImageStore] expected a regular file"
    ]


def test_a_file_too_large_for_an_image_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # without blocks on the disk
    with pytest.raises(ValueError, match=r"^\[ImageStore\] .*expected an image of at most"):
        _C.make_file_store([str(path)], [0]).load(0)


def test_a_png_of_few_bytes_has_no_large_image() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    def claims(side: int) -> bytes:
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        rows = zlib.compress(bytes((1 + 3 * side) * side), 9)
        parts = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)

    true = claims(2000)  # as small as deflate makes it
    assert _C.decode_image(true, "x").shape == (2000, 2000, 3)
    false = true.replace(struct.pack(">II", 2000, 2000), struct.pack(">II", 16000, 16000))
    with pytest.raises(ValueError, match=r"expected pixels that .* bytes can unpack to"):
        _C.decode_image(false, "x")


def test_a_bmp_whose_sides_overflow() -> None:
    # Protects: a product of three fields of the header, undefined behaviour.
    sides = struct.pack("<II", 0xFFFFFFFF, 0x7FFFFFFF)
    header = struct.pack("<HIHHI", 0x4D42, 100, 0, 0, 54) + struct.pack("<I", 40) + sides
    header += struct.pack("<HHIIIIII", 1, 0xFFFF, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"expected 1 to \d+ pixels"):
        _C.decode_image(header + bytes(100), "x")


@pytest.mark.parametrize(
    ("target", "error"), [("missing", FileNotFoundError), ("x.png", ValueError)]
)
def test_links_that_lead_nowhere(tmp_path: Path, target: str, error: type[Exception]) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "ant").mkdir(parents=True)
        (tmp_path / split / "ant" / "x.png").symlink_to(target)
    with pytest.raises(error, match=r"^\[load_dataset\] "):
        load_dataset(tmp_path)


@pytest.mark.parametrize("line", [b"\xff 0", b"real/ant/x.png " + b"9" * 5000])
def test_lists_of_other_bytes_and_endless_labels(tmp_path: Path, line: bytes) -> None:
    for split in ("train", "test"):
        (tmp_path / f"real_{split}.txt").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"^\[load_dataset\] "):
        load_dataset(tmp_path)


def test_a_zip_of_a_version_that_python_does_not_read(
    tmp_path: Path, surfaces: dict[str, Surface]
) -> None:
    content = bytearray(surfaces["zip"].seeds[0])
    content[content.index(b"PK\1\2") + 6] = 255  # version needed
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"^\[load_dataset\] expected a zip file, got"):
        load_dataset(tmp_path / "x.zip")


def test_a_zip_entry_of_more_bytes_than_a_file_can_have(tmp_path: Path) -> None:
    archive = zipfile.ZipFile(tmp_path / "x.zip", "w")
    for split in ("train", "test"):
        archive.writestr(f"{split}/ant/x.png", b"content")
    archive.filelist[0].file_size = 1 << 63
    archive.close()
    with pytest.raises(ValueError, match=r"^\[load_dataset\] .*expected sizes of a file"):
        load_dataset(tmp_path / "x.zip")


def test_whole_numbers_of_more_than_64_bits(surfaces: dict[str, Surface]) -> None:
    surface = surfaces["config.toml"]
    lines = surface.seeds[0].decode().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("epochs ="))
    lines[at] = f"epochs = {1 << 64}"
    with pytest.raises(ValueError, match=r"'epochs': expected whole numbers of 64 bits"):
        surface.read("\n".join(lines).encode())


def test_a_pickle_does_not_fill_the_message() -> None:
    name = b"x" * 70_000
    with pytest.raises(ValueError, match=r"^\[plain_pickle\] ") as caught:
        plain_pickle.loads(b"c" + name + b"\n" + name + b"\n.")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"fine_labels": 5},
        {"filenames": None},
        {"data": [[1], [1, 2]]},
        {"fine_label_names": [1, "x"]},
    ],
)
def test_cifar_entries_of_another_kind(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, content in hostile_surfaces.cifar_members(2).items():
        (folder / name).write_bytes(pickle.dumps(pickle.loads(content) | change, 2))
    with pytest.raises(ValueError, match=r"^\[load_dataset\] .*expected"):
        load_dataset(folder)


def test_a_tar_whose_data_is_corrupt(tmp_path: Path) -> None:
    whole = bytearray(hostile_surfaces.cifar_tar(9))
    for at in range(100, len(whole), 10):
        whole[at] ^= 0xFF
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"^\[load_dataset\] "):
        load_dataset("cifar100", tmp_path)


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64])
def test_weights_that_are_no_floating_point_numbers(
    surfaces: dict[str, Surface], tmp_path: Path, kind: torch.dtype
) -> None:
    # Protects: what was cast without a word: the imaginary part was dropped.
    tensors = safetensors.torch.load(surfaces["weights"].seeds[0])
    tensors["norm.bias"] = tensors["norm.bias"].to(kind)
    (tmp_path / "x.safetensors").write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(ValueError, match=r"^\[weights\] 'norm.bias': expected a floating point"):
        ntkcl.backbones.load_backbone(hostile_surfaces.TINY, tmp_path / "x.safetensors")


@pytest.mark.parametrize("shape", [(16, 3, 0, 0), (0, 3, 8, 8)])
def test_patches_of_nothing(surfaces: dict[str, Surface], shape: tuple[int, ...]) -> None:
    # Protects: a division by the patch size, which ended the process.
    tensors = safetensors.torch.load(surfaces["weights"].seeds[0])
    tensors["patch_embed.proj.weight"] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight: expected \(C, 3, p, p\)"):
        _C.VisionTransformer(tensors, 2)


def test_many_wrong_keys_are_not_all_told(surfaces: dict[str, Surface]) -> None:
    tensors = safetensors.torch.load(surfaces["weights"].seeds[0])
    tensors |= {f"{i} {'x' * 1000}": torch.zeros(1) for i in range(1000)}
    with pytest.raises(ValueError, match=r"and \d+ more") as caught:
        _C.VisionTransformer(tensors, 2)
    assert len(str(caught.value)) < 5000


def changed_state(surfaces: dict[str, Surface], method: str, **tensors: Any) -> bytes:
    """The state of a run with changes: a tensor by its name, or a function of the one it has."""
    state = safetensors.torch.load(surfaces[f"state-{method}"].seeds[0])
    assert all(state[name.replace("__", ".")].numel() for name in tensors)
    for name, change in tensors.items():
        key = name.replace("__", ".")
        state[key] = change(state[key])
    return safetensors.torch.save(state)


@pytest.mark.parametrize(
    ("method", "name"),
    [("lorac-ipc", "inference__means"), ("lorac-ipc", "inference__factors"),
     ("raa", "gaussians__factors"), ("ntk-cl", "head__weight"), ("simple-cil", "prototypes")],
)  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_without_numbers(
    surfaces: dict[str, Surface], method: str, name: str, value: float
) -> None:
    content = changed_state(surfaces, method, **{name: lambda t: t.fill_(value)})
    surface = surfaces[f"state-{method}"]
    if np.isnan(value):
        with pytest.raises(ValueError, match=r"^\[state\] .*expected numbers, got NaN"):
            surface.read(content)
    else:
        outcome(surface, content)


def test_statistics_whose_covariance_overflows(surfaces: dict[str, Surface]) -> None:
    content = changed_state(surfaces, "lorac-ipc", inference__factors=lambda t: t.fill_(1e30))
    with pytest.raises(ValueError, match=r"^\[state\] inference.*finite and positive definite"):
        surfaces["state-lorac-ipc"].read(content)


def test_an_average_of_less_than_no_step(surfaces: dict[str, Surface]) -> None:
    surface = surfaces["checkpoint-lorac-ipc-entries"]
    tensors = safetensors.torch.load(surface.seeds[0])
    steps = [name for name in tensors if name.endswith(".steps")]
    assert steps
    for name in steps:
        tensors[name].fill_(-1)
        for part in ("mean", "uncertainty"):
            tensors[name.replace("steps", part)] = torch.zeros(0)
    with pytest.raises(ValueError, match=r"^\[state\] importance.*after -1 steps"):
        surface.read(safetensors.torch.save(tensors))


@pytest.mark.parametrize("shape", [(), (4,), (2, 4)])
def test_weights_of_modules_of_another_shape(
    surfaces: dict[str, Surface], shape: tuple[int, ...]
) -> None:
    omegas = {
        name: lambda t: torch.ones(shape)
        for name in safetensors.torch.load(surfaces["state-lorac-ipc"].seeds[0])
        if name.endswith(".omega")
    }
    assert omegas
    content = changed_state(surfaces, "lorac-ipc", **omegas)
    with pytest.raises(ValueError, match=r"^\[state\] omega: expected \(blocks, types, modules"):
        surfaces["state-lorac-ipc"].read(content)


@pytest.mark.parametrize("shape", [(), (4,), (1, 4, 16), (4, 15)])
def test_prototypes_of_another_shape(surfaces: dict[str, Surface], shape: tuple[int, ...]) -> None:
    content = changed_state(surfaces, "simple-cil", prototypes=lambda t: torch.ones(shape))
    with pytest.raises(ValueError, match=r"^\[state\] prototypes: expected \(classes, 16\)"):
        surfaces["state-simple-cil"].read(content)


def test_a_state_of_fewer_classes_than_the_model_names(surfaces: dict[str, Surface]) -> None:
    content = changed_state(surfaces, "simple-cil", prototypes=lambda t: t[:0])
    with pytest.raises(ValueError, match=r"^\[load\] expected a state of 4 classes, got one of 0"):
        surfaces["state-simple-cil"].read(content)


@pytest.mark.parametrize(
    "text",
    ["[", "[" * 100_000, "\udcff", "5", "{}", '{"evaluations": []}', "9" * 5000],
    ids=["cut", "deep", "bytes", "number", "empty", "no-tasks", "digits"],
)
def test_results_that_are_none(folder: Path, surfaces: dict[str, Surface], text: str) -> None:
    with pytest.raises(ValueError, match=r"^\[load_result\] .*is damaged"):
        surfaces["result.json"].read(text.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    "change",
    [
        {"final_accuracy": "x"},
        {"evaluations": [], "accuracy_matrix": []},
        {"accuracy_matrix": [[1.0]]},
        {"peak_memory": 0.5},
    ],
)
def test_results_with_other_values(surfaces: dict[str, Surface], change: dict[str, Any]) -> None:
    surface = surfaces["result.json"]
    with pytest.raises(ValueError, match=r"^\[load_result\] .*is damaged"):
        surface.read(json.dumps(json.loads(surface.seeds[0]) | change).encode())


@pytest.mark.parametrize("text", ["x = " + "9" * 5000, "x = " + "[" * 5000, "x = "])
def test_toml_with_endless_numbers_and_depths(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ValueError, match=r"^\[config\] .* is not valid TOML"):
        resolve(file=tmp_path / "config.toml")


@pytest.mark.parametrize("classes", [None, 5, [1, 2]])
def test_a_resumed_run_knows_that_it_can_be_finished(tmp_path: Path, classes: Any) -> None:
    # Protects: what was computed is not lost by a file that is needed at the very end.
    content = {"classes": classes, "weights_sha256": "x"}
    (tmp_path / "environment.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"^\[resume\] .*expected names of classes"):
        runfolder.RunFolder(tmp_path, []).environment()


@pytest.mark.parametrize(
    "line",
    ['{"event": "evaluation", "per_task": ["x"]}', '{"event": "run_begin", "tasks": "x"}',
     '{"event": "run_begin", "tasks": 1000000000000}', "[" * 100_000,
     f'{{"event": "evaluation", "per_task": [{"9" * 400}]}}'],
    ids=["text", "tasks", "many-tasks", "deep", "large"],
)  # fmt: skip
def test_damaged_events_are_left_out(tmp_path: Path, line: str) -> None:
    (tmp_path / "events.jsonl").write_text(line + "\n")
    with runfolder.RunFolder.reopen(tmp_path) as folder:
        folder.go_back(len(line) + 1)
        folder.record({"event": "evaluation", "per_task": [50.0]})
    assert (tmp_path / "accuracy_matrix.csv").read_text() == "50.0\n"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("labels", lambda t: t[:-1]),
        ("labels", lambda t: t.double()),
        ("labels", lambda t: t.bfloat16()),
        ("predictions", lambda t: t.reshape(1, -1)),
        ("confidences", lambda t: t[:-1]),
    ],
)
def test_predictions_that_do_not_fit_each_other(
    folder: Path, surfaces: dict[str, Surface], name: str, change: Any
) -> None:
    surface = surfaces["predictions.safetensors"]
    tensors = safetensors.torch.load(surface.seeds[0])
    tensors[f"task_1.{name}"] = change(tensors[f"task_1.{name}"]).clone()
    with pytest.raises(ValueError, match=r"^\[report\] expected (labels and|a safetensors)"):
        surface.read(safetensors.torch.save(tensors))
    assert compare([folder / "ntk-cl finished"])  # which has its own again
