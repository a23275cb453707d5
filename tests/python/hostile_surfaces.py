"""What the library reads from strangers: for each kind of file the whole ones that are changed,
how they are changed, and the reading that a user would do with them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors.torch
import torch

import ntkcl
import test_decode
import test_training
from mutations import (
    NAMES,
    Mutate,
    json_text,
    of_bytes,
    of_json,
    of_png,
    of_safetensors,
    of_toml,
    of_zip,
)
from ntkcl import _C, api, backbones, checkpoints, comparison, runfolder
from ntkcl.config import resolve
from ntkcl.datasets import load_dataset, plain_pickle

# A refusal: one of the classes that the headers name, and where it was raised.
ERRORS = (ValueError, TypeError, FileNotFoundError, OSError)
LONGEST_MESSAGE = 10_000  # characters


@dataclass(frozen=True)
class Surface:
    """One kind of file. `read` gets a changed one and raises what a user would see."""

    seeds: Sequence[bytes]
    mutate: Mutate
    read: Callable[[bytes], object]
    share: int  # of 1,000 inputs
    trains: bool = False  # a step of it may find what is not finite


def outcome(surface: Surface, content: bytes) -> str:
    """'accepted', or the name of the error that refused it; AssertionError for any other end."""
    allowed = (*ERRORS, FloatingPointError) if surface.trains else ERRORS
    try:
        surface.read(content)
    except allowed as error:
        text = str(error)
        if type(error) not in allowed or not text.startswith("[") or "] " not in text:
            raise AssertionError(f"no refusal of ours: {type(error).__name__}: {text}") from error
        if len(text) > LONGEST_MESSAGE:
            raise AssertionError(f"a message of {len(text)} characters: {text[:200]}") from error
        return type(error).__name__
    except BaseException as error:
        raise AssertionError(f"no refusal of ours: {type(error).__name__}: {error}") from error
    return "accepted"


def input_of(surface: Surface, name: str, seed: int, number: int) -> bytes:
    return surface.mutate(Random(f"{name} {seed} {number}"), surface.seeds)


def make_surfaces(folder: Path) -> dict[str, Surface]:
    """All of them, by name. Their whole files are made in `folder`, where they also work."""
    return {
        **_images(),
        **_stores(folder),
        **_weights(folder),
        **_runs(folder),
    }


# ---- images --------------------------------------------------------------------------------------


def _images() -> dict[str, Surface]:
    by_format: dict[str, list[bytes]] = {}
    for name, encode in test_decode.FORMATS.items():
        by_format.setdefault(name.split()[0], []).append(encode())

    def decode(content: bytes) -> None:
        assert _C.decode_image(content, "image").size > 0

    every = [content for of_format in by_format.values() for content in of_format]
    shares = {"jpeg": 200, "png": 140, "bmp": 60, "webp": 80}
    surfaces = {
        name: Surface(by_format[name], of_bytes, decode, share) for name, share in shares.items()
    }
    return surfaces | {
        "png-chunks": Surface(by_format["png"], of_png, decode, 110),
        "any-format": Surface(every, of_bytes, decode, 40),
    }


# ---- image stores --------------------------------------------------------------------------------


def _members() -> dict[str, bytes]:
    """A data set of two classes."""
    images = [test_decode.FORMATS[name]() for name in ("jpeg", "png", "bmp", "webp")]
    return {
        f"{split}/{name}/{i}.{suffix}": images[i]
        for split in ("train", "test")
        for name in ("ant", "bee")
        for i, suffix in enumerate(("jpg", "png", "bmp", "webp"))
    }


def _load_all(dataset: ntkcl.datasets.Dataset) -> None:
    """Every image that can be read; the first one that cannot is raised at the end."""
    refused = None
    for store in (dataset.train, dataset.test):
        for index in range(min(len(store), 20)):
            try:
                store.load(index)
            except ERRORS as error:
                refused = refused or error
    if refused:
        raise refused


def _stores(folder: Path) -> dict[str, Surface]:
    archive = folder / "images.zip"
    cifar = folder / "cifar-100-python"
    cifar.mkdir()
    packed = folder / "cifar-100-python.tar.gz"
    tree = folder / "tree"
    lists = folder / "domainnet"
    for name, content in _members().items():
        path = lists / "real" / name.removeprefix("train/").removeprefix("test/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def read_zip(content: bytes) -> None:
        archive.write_bytes(content)
        _load_all(load_dataset(archive))

    def read_cifar(content: bytes) -> None:
        # One of three files; the others are whole.
        member, _, content = content.partition(b"\0")
        for name, whole in cifar_members(protocol=2).items():
            (cifar / name).write_bytes(content if name.encode() == member else whole)
        _load_all(load_dataset("cifar100", folder))

    def read_tar(content: bytes) -> None:
        shutil.rmtree(cifar, ignore_errors=True)
        packed.write_bytes(content)
        try:
            _load_all(load_dataset("cifar100", folder))
        finally:
            cifar.mkdir()

    def read_lists(content: bytes) -> None:
        (lists / "real_train.txt").write_bytes(content)
        _load_all(load_dataset(lists))

    def read_yaml(content: bytes) -> None:
        (lists / "real_train.txt").unlink(missing_ok=True)
        (lists / "real_train.yaml").write_bytes(content)
        _load_all(load_dataset(lists))

    def read_tree(content: bytes) -> None:
        shutil.rmtree(tree, ignore_errors=True)
        _grow(tree, json.loads(content))
        _load_all(load_dataset(tree))

    listed = "".join(f"real/{c}/{i}.{s} {n}\n" for n, c in enumerate(("ant", "bee"))
                     for i, s in enumerate(("jpg", "png", "bmp", "webp"))).encode()  # fmt: skip
    (lists / "real_test.txt").write_bytes(listed)
    pairs = [line.split() for line in listed.decode().splitlines()]
    (lists / "real_test.yaml").write_bytes(_yaml(pairs))
    pickles = [
        f"{name}\0".encode() + content
        for protocol in (0, 1, 2, 3, 4)
        for name, content in cifar_members(protocol).items()
    ]
    return {
        "zip": Surface(_zips(), of_zip, read_zip, 60),
        "folder": Surface([json.dumps(_tree()).encode()], _of_tree, read_tree, 20),
        "lists": Surface([listed], _of_lists, read_lists, 20),
        "yaml-lists": Surface([_yaml(pairs)], _of_lists, read_yaml, 10),
        "arrays": Surface([json.dumps(_ARRAYS).encode()], of_json, _read_arrays, 20),
        "pickle": Surface(_plain_pickles(), of_bytes, plain_pickle.loads, 100),
        "cifar-100": Surface(pickles, _behind_name, read_cifar, 30),
        "cifar-100-tar": Surface([cifar_tar(level) for level in (0, 9)], of_bytes, read_tar, 20),
    }


def _zips() -> list[bytes]:
    contents = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for prefix in ("", "pets/"):
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", method) as archive:
                for name, content in _members().items():
                    archive.writestr(prefix + name, content)
            contents.append(buffer.getvalue())
    return contents


def _tree() -> list[list[str]]:
    """[name, kind, what it holds or points to]; `_grow` makes them."""
    return [[name, "file", name.rpartition(".")[2]] for name in _members()]


def _of_tree(draws: Random, seeds: Sequence[bytes]) -> bytes:
    entries = json.loads(draws.choice(seeds))
    for _ in range(1 + int(draws.expovariate(1))):
        entry = draws.choice(entries)
        kind = draws.randrange(4)
        if kind == 0:
            entry[0] = draws.choice(("", "train/", "train/ant/")) + draws.choice(NAMES)
        elif kind == 1:
            entry[1:] = ["link", draws.choice(["0.jpg", ".", "..", "missing", "/dev/zero", "loop"])]
        elif kind == 2:
            entry[1] = draws.choice(("folder", "pipe", "unreadable"))
        else:
            entry[2] = draws.choice(("jpg", "png", "bmp", "webp", "empty"))
    return json.dumps(entries).encode()


def _grow(root: Path, entries: Sequence[Sequence[str]]) -> None:
    """Makes what can be made of the entries, inside `root`."""
    contents = {name.rpartition(".")[2]: content for name, content in _members().items()}
    for name, kind, about in entries:
        if ".." in name or name.startswith("/") or name.count("/") > 200:
            continue  # no file system gives such a name, or it cannot be removed again
        path = root / name
        with contextlib.suppress(OSError, ValueError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                path.write_bytes(contents.get(about, b""))
            elif kind == "link":
                path.symlink_to(path.name if about == "loop" else about)
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                path.mkdir()


def _yaml(pairs: Sequence[Sequence[str]]) -> bytes:
    data, targets = ("".join(f"- {pair[i]}\n" for pair in pairs) for i in (0, 1))
    return f"data:\n{data}targets:\n{targets}".encode()


def _of_lists(draws: Random, seeds: Sequence[bytes]) -> bytes:
    lines = draws.choice(seeds).decode().splitlines()
    hostile = [f"{name} 0" for name in NAMES] + [f"real/{name}/0.jpg 0" for name in NAMES]
    hostile += [f"real/ant/0.jpg {label}" for label in ("-1", "²", "9" * 5000, "x", "1 2", "٣")]
    hostile += ["- [1]", "data:", "targets:", "- 'x", "9" * 5000, "- " + "9" * 5000]
    for _ in range(1 + int(draws.expovariate(1))):
        lines.insert(draws.randrange(len(lines) + 1), draws.choice([*hostile, *lines]))
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    return of_bytes(draws, [text]) if draws.random() < 0.3 else text


_ARRAYS = {
    split: {"type": "uint8", "shape": [4, 8, 8, 3], "labels": [0, 0, 1, 1], "label type": "int64"}
    for split in ("train", "test")
}


def _read_arrays(content: bytes) -> None:
    """Arrays of the types and shapes that the document asks for, if there are such arrays."""
    try:
        described = json.loads(content)
        arrays = {
            str(split): (
                np.broadcast_to(np.zeros((), part["type"]), part["shape"]),
                np.asarray(part["labels"], part["label type"]),
            )
            for split, part in described.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return
    except (SyntaxError, MemoryError):  # numpy's reading of a type's name, of a shape
        return
    if all(pixels.size < 1 << 20 for pixels, _ in arrays.values()):
        _load_all(load_dataset(arrays))


def cifar_members(protocol: int) -> dict[str, bytes]:
    """CIFAR-100's three files with eight images."""
    noise = np.random.default_rng(5)
    images = noise.integers(0, 256, (8, 3072), dtype=np.uint8)
    split = {
        "data": images,
        "fine_labels": [0, 1] * 4,
        "filenames": [f"{i}.png" for i in range(8)],
    }
    meta = {"fine_label_names": ["ant", "bee"]}
    files = {"train": split, "test": split, "meta": meta}
    return {name: pickle.dumps(content, protocol) for name, content in files.items()}


def _plain_pickles() -> list[bytes]:
    values = [{"a": [1, 2.5, None, True, (1, 2), b"bytes", "text"], 3: {"b": [[]]}}, [1 << 70, ()]]
    values.append({"images": np.arange(12, dtype=np.uint8).reshape(3, 4)})
    shared = [1]
    values.append([shared, shared, {"again": shared}])
    return [pickle.dumps(value, protocol) for value in values for protocol in range(5)]


def _behind_name(draws: Random, seeds: Sequence[bytes]) -> bytes:
    name, _, content = draws.choice(seeds).partition(b"\0")
    others = [seed.partition(b"\0")[2] for seed in seeds]
    return name + b"\0" + of_bytes(draws, [content, *draws.sample(others, 2)][:1])


def cifar_tar(level: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=level) as archive:
        for name, content in cifar_members(2).items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# ---- weights -------------------------------------------------------------------------------------

TINY = "tiny of hostile files"
SIZE = 16


def _weights(folder: Path) -> dict[str, Surface]:
    info = backbones.Backbone(TINY, width=16, depth=2, heads=2, patch_size=8, image_size=SIZE)
    backbones._BACKBONES[TINY] = info
    whole = folder / "weights.safetensors"
    whole.write_bytes(safetensors.torch.save(_tiny_weights(info)))
    changed = folder / "changed.safetensors"

    def read(content: bytes) -> None:
        changed.write_bytes(content)
        found = ntkcl.backbones.load_backbone(TINY, changed)
        _C.VisionTransformer(found.tensors, info.heads, SIZE)
        _C.VisionTransformer(found.tensors, info.heads, 2 * SIZE)  # positions are resampled

    def read_core(content: bytes) -> None:
        # Without the check of the sizes that the name promises.
        try:
            tensors = safetensors.torch.load(content)
        except (safetensors.SafetensorError, KeyError, ValueError):
            return
        _C.VisionTransformer(tensors, info.heads)

    seeds = [whole.read_bytes()]
    return {
        "weights": Surface(seeds, of_safetensors, read, 40),
        "weights-core": Surface(seeds, of_safetensors, read_core, 20),
    }


def _tiny_weights(info: backbones.Backbone) -> dict[str, torch.Tensor]:
    c, inner = info.width, 2 * info.width
    draws = torch.Generator().manual_seed(3)

    def random(*sizes: int) -> torch.Tensor:
        return 0.2 * torch.randn(sizes, generator=draws)

    tensors = {
        "cls_token": random(1, 1, c),
        "pos_embed": random(1, 1 + (SIZE // info.patch_size) ** 2, c),
        "patch_embed.proj.weight": random(c, 3, info.patch_size, info.patch_size),
        "patch_embed.proj.bias": random(c),
        "norm.weight": torch.ones(c),
        "norm.bias": random(c),
    }
    for block in range(info.depth):
        sizes = {"attn.qkv": (3 * c, c), "attn.proj": (c, c)}
        sizes |= {"mlp.fc1": (inner, c), "mlp.fc2": (c, inner)}
        for name, (rows, columns) in sizes.items():
            tensors[f"blocks.{block}.{name}.weight"] = random(rows, columns)
            tensors[f"blocks.{block}.{name}.bias"] = random(rows)
        for name in ("norm1", "norm2"):
            tensors[f"blocks.{block}.{name}.weight"] = torch.ones(c)
            tensors[f"blocks.{block}.{name}.bias"] = random(c)
    return tensors


# ---- runs: checkpoints and trained models --------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "simple-cil": {"method": "simple-cil"},
    "ntk-cl": {
        "method": "ntk-cl",
        "ntk_cl": {"mode": "both", "frozen_lists": 2, "drift": "paired", "alignment": True},
    },
    # Clusters of more than one image, which have a covariance.
    "lorac-ipc": {
        "method": "lorac-ipc",
        "lorac_ipc": {"inference_clusters": 1, "alignment_clusters": 2},
    },
    "lorac-ipc-entries": {
        "method": "lorac-ipc",
        "optimizer": "adamw",
        "lorac_ipc": {
            "importance_of": "entry",
            "importance_average": "epoch",
            "alignment_covariance": "full",
            "drift": "paired",
        },
    },
    "raa": {"method": "raa"},
}
_STOP_AT = 12  # questions whether to stop: in the second task


def _dataset() -> dict[str, Any]:
    whole = test_training.dataset(classes=4, train=4, test=2)
    return {split: (images[:, ::2, ::2], labels) for split, (images, labels) in whole.items()}


class Stop:
    """Says so from the n-th question on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@contextlib.contextmanager
def _stopping(after: int) -> Iterator[None]:
    """Runs stop when they have asked that often."""
    kept = api._StopSignal.__call__
    stop = Stop(after)
    api._StopSignal.__call__ = lambda _self: stop()  # type: ignore[method-assign]
    try:
        yield
    finally:
        api._StopSignal.__call__ = kept  # type: ignore[method-assign]


def _train(output: Path, keys: Mapping[str, Any]) -> None:
    common = {
        **{"backbone": TINY, "weights": output.parent / "weights.safetensors"},
        **{"image_size": SIZE, "transform": "resize", "initial_classes": 2, "increment": 2},
        **{"epochs": 2, "batch_size": 4, "device": "cpu", "progress": False, "threads": 1},
        **{"loader_threads": 1, "checkpoint_steps": 1, "cpu_matmul": "default"},
    }
    ntkcl.train(dataset=_dataset(), output=output, **(common | dict(keys)))


def _runs(folder: Path) -> dict[str, Surface]:
    surfaces: dict[str, Surface] = {}
    for name, keys in METHODS.items():
        finished = folder / f"{name} finished"
        _train(finished, keys)
        surfaces |= _model_surfaces(name, finished)
        stopped = folder / f"{name} stopped"
        stop_at = 3 if name == "simple-cil" else _STOP_AT
        with _stopping(stop_at), contextlib.suppress(KeyboardInterrupt):
            _train(stopped, keys)
        surfaces |= _checkpoint_surfaces(name, stopped)
    return surfaces


def _replacing(file: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Reads with another content of the file, which has its own again afterwards."""
    whole = file.read_bytes()

    def replaced(content: bytes) -> object:
        file.write_bytes(content)
        try:
            return read()
        finally:
            file.write_bytes(whole)

    return replaced


def _model_surfaces(name: str, run: Path) -> dict[str, Surface]:
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    about, state = run / "model.json", run / "state.safetensors"
    whole = about.read_bytes()

    def predict() -> None:
        model = ntkcl.load(run)
        model.predict(image)
        repr(model)

    def read_state(content: bytes) -> None:
        sealed = json.loads(whole) | {"state_sha256": hashlib.sha256(content).hexdigest()}
        about.write_text(json.dumps(sealed))
        try:
            state.write_bytes(content)
            predict()
        finally:
            about.write_bytes(whole)
            state.write_bytes(kept)

    kept = state.read_bytes()
    surfaces = {f"state-{name}": Surface([kept], of_safetensors, read_state, 4)}
    if name != "ntk-cl":
        return surfaces

    def result() -> None:
        found = ntkcl.load_result(run)
        repr(found), found._repr_html_(), found.to_dict()

    def report() -> None:
        comparison.compare([run])

    files: list[tuple[str, Mutate, Callable[[], object], int]] = [
        ("model.json", of_json, predict, 5),
        ("config.toml", of_toml, predict, 6),
        ("result.json", of_json, result, 10),
        ("environment.json", of_json, report, 3),
        ("predictions.safetensors", of_safetensors, report, 3),
    ]
    return surfaces | {
        file: Surface([(run / file).read_bytes()], mutate, _replacing(run / file, read), share)
        for file, mutate, read, share in files
    }


def _checkpoint_surfaces(name: str, run: Path) -> dict[str, Surface]:
    store = checkpoints.Checkpoints(run / "checkpoint")
    path = next(iter(sorted((run / "checkpoint").glob("*.json"), reverse=True)))
    tensors = path.with_suffix(".safetensors")
    whole, kept = path.read_bytes(), tensors.read_bytes()
    manifest = json.loads(whole)
    config = resolve(file=run / "config.toml")
    dataset = load_dataset(_dataset())
    backbone = backbones.load_backbone(config.backbone, config.weights)

    def restore() -> None:
        """Reads the last checkpoint and goes on for a step."""
        found = store.latest()
        assert found is not None
        order = api._class_order(config, len(dataset.class_names))
        trainer = api._make_trainer(config, dataset, backbone, order)
        try:
            trainer.run(None, Stop(1), None, found.for_core())
        except KeyboardInterrupt as stopped:
            assert str(stopped).startswith("[train] stopped")

    def read_tensors(content: bytes) -> None:
        tensors.write_bytes(content)
        path.write_bytes(_sealed(manifest | {"tensors_sha256": _sha256(content)}))
        restore()

    def read_manifest(content: bytes) -> None:
        tensors.write_bytes(kept)
        path.write_bytes(content)
        restore()

    def read_progress(content: bytes) -> None:
        tensors.write_bytes(kept)
        try:
            path.write_bytes(_sealed(json.loads(content)))
        except (ValueError, RecursionError, TypeError, AttributeError):
            path.write_bytes(content)
        restore()

    for other in (run / "checkpoint").iterdir():
        if other.stem != path.stem:
            other.unlink()
    surfaces = {
        f"checkpoint-{name}": Surface([kept], of_safetensors, read_tensors, 5, trains=True),
        f"progress-{name}": Surface([whole], _of_progress, read_progress, 3, trains=True),
    }
    if name == "ntk-cl":
        surfaces["checkpoint-json"] = Surface([whole], of_json, read_manifest, 20)
        surfaces["checkpoint-bytes"] = Surface([whole], of_bytes, read_manifest, 10)
        environment = run / "environment.json"

        def compare_environments() -> None:
            begun = runfolder.RunFolder(run, []).environment()
            api._check_environment(config, json.loads(environment_whole), begun)

        environment_whole = environment.read_bytes()
        surfaces["environment-of-a-resumed-run"] = Surface(
            [environment_whole], of_json, _replacing(environment, compare_environments), 10
        )
        surfaces["events.jsonl"] = Surface(
            [(run / "events.jsonl").read_bytes()], _of_events, _read_events(run), 20
        )
    return surfaces


def _of_progress(draws: Random, seeds: Sequence[bytes]) -> bytes:
    """Another place in the run; the rest of the manifest as it was."""
    manifest = json.loads(draws.choice(seeds))
    text = json_text(draws, manifest["progress"]).decode("utf-8", "surrogatepass")
    rest = json.dumps(manifest | {"progress": "mark of progress"})
    return rest.replace('"mark of progress"', text).encode("utf-8", "surrogatepass")


def _of_events(draws: Random, seeds: Sequence[bytes]) -> bytes:
    lines = draws.choice(seeds).splitlines()
    for at in draws.sample(range(len(lines)), 1 + int(draws.expovariate(1)) % len(lines)):
        lines[at] = of_json(draws, [lines[at]])
    text = b"\n".join(lines) + b"\n"
    return of_bytes(draws, [text]) if draws.random() < 0.2 else text


def _read_events(run: Path) -> Callable[[bytes], object]:
    log = run / "events.jsonl"

    def read(content: bytes) -> None:
        log.write_bytes(content)
        folder = runfolder.RunFolder.reopen(run)
        with folder:
            folder.go_back(len(content))
            folder.record({"event": "evaluation", "per_task": [50.0, 25.0]})

    return read


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """With the checksum that fits."""
    content = dict(manifest)
    content["sha256"] = checkpoints._checksum(content)
    return json.dumps(content).encode("utf-8", "surrogatepass")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
