"""Data sets: every source, the order of classes and images, and bad input."""

import io
import os
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ntkcl.datasets import KNOWN_DATASETS, Dataset, load_dataset, plain_pickle

CLASSES = ["Zebra", "ant", "bee", "éclair"]  # sorted by their bytes
COUNTS = {"train": 4, "test": 2}


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (value, 7, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def members() -> dict[str, bytes]:
    """Relative path to content; the red value tells images apart."""
    files = {}
    for split, count in COUNTS.items():
        for label, name in enumerate(CLASSES):
            for i in range(count):
                value = 100 * (split == "test") + 10 * label + i
                files[f"{split}/{name}/image{i}.{'png' if i % 2 else 'PNG'}"] = png(value)
    return files


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes], prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pets", members())


def reds(store: Any) -> list[int]:
    return [int(store.load(i)[0, 0, 0]) for i in range(len(store))]


def check_members(dataset: Dataset, train_count: int = 4, test_count: int = 2) -> None:
    assert dataset.class_names == CLASSES
    for store, base, count in ((dataset.train, 0, train_count), (dataset.test, 100, test_count)):
        assert store.labels == [label for label in range(4) for _ in range(count)]
        assert reds(store) == [base + 10 * label + i for label in range(4) for i in range(count)]


# Folders.


def test_folder_per_class(folder: Path) -> None:
    dataset = load_dataset(folder)
    check_members(dataset)
    assert dataset.name == str(folder)
    assert dataset.train.name(0) == str(folder / "train" / "Zebra" / "image0.PNG")


def test_known_name_and_relative_name_are_looked_for_in_data_root(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "oxford-pets")
    check_members(load_dataset("oxford-pets", folder.parent))
    check_members(load_dataset("pets", folder.parent))


def test_other_files_are_left_alone(folder: Path) -> None:
    for name in ("train/notes.txt", "train/ant/readme.md", "train/.DS_Store", "train/ant/._a.png"):
        (folder / name).write_bytes(b"-")
    (folder / "train" / ".cache").mkdir()
    check_members(load_dataset(folder))


def test_images_in_subfolders_belong_to_the_class(folder: Path) -> None:
    (folder / "train" / "ant" / "more").mkdir()
    (folder / "train" / "ant" / "image3.png").rename(folder / "train" / "ant" / "more" / "x.png")
    check_members(load_dataset(folder))


def test_order_on_disk_changes_nothing(tmp_path: Path) -> None:
    files = list(members().items())
    datasets = []
    for seed in range(3):
        random.Random(seed).shuffle(files)
        datasets.append(load_dataset(write_folder(tmp_path / str(seed), dict(files))))
        datasets.append(load_dataset(write_zip(tmp_path / f"{seed}.zip", dict(files))))
    for dataset in datasets:
        check_members(dataset)
    assert len({dataset.manifest_hash for dataset in datasets[::2]}) == 1
    assert len({dataset.manifest_hash for dataset in datasets[1::2]}) == 1


def test_manifest_hash_follows_names_sizes_and_limits(folder: Path) -> None:
    hashes = [load_dataset(folder).manifest_hash, load_dataset(folder).manifest_hash]
    assert hashes[0] == hashes[1]
    hashes.append(load_dataset(folder, train_per_class=3).manifest_hash)
    path = folder / "train" / "ant" / "image0.PNG"
    path.write_bytes(path.read_bytes() + b"x")
    hashes.append(load_dataset(folder).manifest_hash)
    path.rename(path.with_name("another.png"))
    hashes.append(load_dataset(folder).manifest_hash)
    assert len(set(hashes)) == 4


def test_limits_keep_the_first_images_of_each_class(folder: Path) -> None:
    check_members(load_dataset(folder, train_per_class=2, test_per_class=1), 2, 1)
    check_members(load_dataset(folder, train_per_class=99))


@pytest.mark.parametrize(
    ("limit", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_bad_limits_are_named(folder: Path, limit: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="'train_per_class': expected"):
        load_dataset(folder, train_per_class=limit)


def test_missing_data_says_what_where_and_how(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset("cifar100", tmp_path)
    for part in (
        "'cifar100'",
        str(tmp_path / "cifar-100-python"),
        "cifar-100-python.tar.gz",
        "how to get it: ",
    ):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match="did you mean 'imagenet-r'"):
        load_dataset("imagenet_r", tmp_path)
    with pytest.raises(ValueError, match="'data_root': expected the folder that holds 'eurosat'"):
        load_dataset("eurosat")
    for name in set(KNOWN_DATASETS) - {"digits"}:
        with pytest.raises(FileNotFoundError, match="how to get it: "):
            load_dataset(name, tmp_path)


def test_missing_split_folder(folder: Path) -> None:
    shutil.rmtree(folder / "test")
    with pytest.raises(FileNotFoundError, match=r"no folder .*test: expected train/<class>"):
        load_dataset(folder)


def test_empty_class(folder: Path) -> None:
    (folder / "train" / "cow").mkdir()
    with pytest.raises(ValueError, match=r"expected images in the class folder .*cow, got none"):
        load_dataset(folder)


def test_no_classes(folder: Path) -> None:
    for split in COUNTS:
        shutil.rmtree(folder / split)
        (folder / split).mkdir()
    with pytest.raises(ValueError, match="expected at least one class in train, got none"):
        load_dataset(folder)


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_class_in_one_split_alone(folder: Path, split: str, other: str) -> None:
    write_folder(folder, {f"{split}/cow/a.png": png(1)})
    with pytest.raises(
        ValueError,
        match=f"same classes in train and test, got 1 of {split} that {other} has not: 'cow'",
    ):
        load_dataset(folder)


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"expected a folder or a zip file .* got the file"):
        load_dataset(path)


# Zips.


@pytest.mark.parametrize("prefix", ["", "pets-1.0/"])
def test_zip_with_and_without_a_leading_folder(tmp_path: Path, prefix: str) -> None:
    files = members() | {"__MACOSX/train/ant/._x.png": b"-", "train/ant/readme.txt": b"-"}
    path = write_zip(tmp_path / "pets.zip", files, prefix)
    check_members(load_dataset(path))
    check_members(load_dataset("pets", tmp_path))
    check_members(load_dataset(path, train_per_class=1, test_per_class=1), 1, 1)


@pytest.mark.parametrize(
    "name",
    [
        "../train/ant/x.png",
        "train/../../x.png",
        "/train/ant/x.png",
        "train\\..\\x.png",
        "C:/train/ant/x.png",
    ],
)
def test_zip_with_a_path_that_leaves_it(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "pets.zip", members() | {name: png(1)})
    with pytest.raises(ValueError, match="expected names inside the archive, got"):
        load_dataset(path)


def test_zip_with_an_empty_class(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "pets.zip", members() | {"train/cow/": b""})
    with pytest.raises(ValueError, match="expected images in each class, got none in 'train/cow'"):
        load_dataset(path)


def test_zip_of_something_else(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "pets.zip", {"notes/a.txt": b"-", "b.png": png(1)})
    with pytest.raises(ValueError, match="expected a zip of train/<class>"):
        load_dataset(path)


def test_truncated_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "pets.zip", members())
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="zip"):
        load_dataset(path)


def test_zip_entry_twice(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "pets.zip", members())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("train/ant/image0.PNG", png(99))
    with pytest.raises(ValueError, match="expected each entry once"):
        load_dataset(path)


# Arrays and digits.


def test_arrays() -> None:
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    test = rng.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    dataset = load_dataset({"train": (train, [10, 2, 2, 10, 5, 2]), "test": (test, [5, 10, 2])})
    assert dataset.class_names == ["2", "5", "10"]
    assert dataset.train.labels == [0, 0, 0, 1, 2, 2]
    assert np.array_equal(dataset.train.load(3), train[4])
    assert np.array_equal(dataset.test.load(2), np.repeat(test[1, ..., None], 3, -1))
    limited = load_dataset(
        {"train": (train, [10, 2, 2, 10, 5, 2]), "test": (test, [5, 10, 2])}, train_per_class=1
    )
    assert [np.array_equal(limited.train.load(i), train[j]) for i, j in ((0, 1), (1, 4), (2, 0))]
    changed = test.copy()
    changed[0, 0, 0] ^= 1
    other = load_dataset({"train": (train, [10, 2, 2, 10, 5, 2]), "test": (changed, [5, 10, 2])})
    assert other.manifest_hash != dataset.manifest_hash


def test_tensors_are_arrays() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    labels = [0, 1, 0]
    arrays = {split: (images, labels) for split in ("train", "test")}
    tensors = {split: (torch.from_numpy(images), labels) for split in ("train", "test")}
    assert load_dataset(tensors).manifest_hash == load_dataset(arrays).manifest_hash
    planes = (torch.from_numpy(images).permute(0, 3, 1, 2), labels)
    with pytest.raises(
        ValueError, match=r"got \(3, 3, 4, 5\); channels come last: images\.permute"
    ):
        load_dataset({"train": planes, "test": planes})


def test_arrays_with_names() -> None:
    images = np.zeros((3, 2, 2, 3), np.uint8)
    dataset = load_dataset(
        {"train": (images, ["cat", "ant", "cat"]), "test": (images, ["cat", "ant", "ant"])}
    )
    assert dataset.class_names == ["ant", "cat"]
    assert dataset.train.labels == [0, 1, 1]


IMAGES = np.zeros((2, 3, 3, 3), np.uint8)


GOOD = (IMAGES, [0, 1])


@pytest.mark.parametrize(
    ("train", "test", "error", "message"),
    [
        (GOOD, None, ValueError, r"expected arrays 'train' and 'test', got \['train'\]"),
        (GOOD, IMAGES, TypeError, "'test': expected a pair"),
        ((IMAGES / 2, [0, 1]), GOOD, TypeError, "'train': expected uint8 images, got float64"),
        ((IMAGES[..., :2], [0, 1]), GOOD, ValueError, "'train': expected images"),
        ((IMAGES, [0]), GOOD, ValueError, "'train': expected one label per image, got 1 labels"),
        ((IMAGES, [0.5, 1.5]), GOOD, ValueError, "'train': expected one-dimensional labels"),
        (GOOD, (IMAGES, [0, 0]), ValueError, "got 1 of train that test has not: '1'"),
        (GOOD, (IMAGES[:0], np.zeros(0, int)), ValueError, "at least one image"),
    ],
)
def test_bad_arrays(train: Any, test: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_dataset({"train": train} if test is None else {"train": train, "test": test})


def test_digits_split_is_stratified_fixed_and_complete() -> None:
    from sklearn.datasets import load_digits

    dataset = load_dataset("digits")
    assert dataset.class_names == [str(digit) for digit in range(10)]
    assert (len(dataset.train), len(dataset.test)) == (1347, 450)
    digits = load_digits()
    for label, size in Counter(digits.target.tolist()).items():
        share = dataset.test.labels.count(label)
        assert abs(share - 450 * size / 1797) < 1
        assert share + dataset.train.labels.count(label) == size

    def content(store: Any) -> list[tuple[int, bytes]]:
        return [(store.labels[i], store.load(i)[..., 0].tobytes()) for i in range(len(store))]

    scaled = np.floor(digits.images * 255 / 16 + 0.5).astype(np.uint8)
    everything = [
        (int(label), image.tobytes()) for label, image in zip(digits.target, scaled, strict=True)
    ]
    assert Counter(content(dataset.train) + content(dataset.test)) == Counter(everything)
    first = dataset.train.load(0)
    assert first.shape == (8, 8, 3) and (first[..., :1] == first).all() and first.max() > 200
    # The split itself: a change here changes everybody's numbers.
    assert dataset.manifest_hash.startswith("303d943fbf557c81bbeda3f87c1d816b")


# CIFAR-100's python files.


def cifar_parts(count: int = 12) -> dict[str, Any]:
    """Class k of image i is i % 3; names in reverse, so that sorting shows."""
    rng = np.random.default_rng(4)
    parts: dict[str, Any] = {
        "meta": {"fine_label_names": ["apple", "bear", "cat"], "coarse_label_names": ["x"]}
    }
    for split in ("train", "test"):
        parts[split] = {
            "filenames": [f"{split}_{count - i:04d}.png" for i in range(count)],
            "fine_labels": [i % 3 for i in range(count)],
            "coarse_labels": [0] * count,
            "batch_label": "batch 1 of 1",
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        }
    return parts


def write_cifar(root: Path, parts: dict[str, Any], protocol: int = 2) -> Path:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, part in parts.items():
        (folder / name).write_bytes(pickle.dumps(part, protocol))
    return folder


def check_cifar(dataset: Dataset, parts: dict[str, Any]) -> None:
    assert dataset.class_names == ["apple", "bear", "cat"]
    assert dataset.train.labels == [0] * 4 + [1] * 4 + [2] * 4
    for store, split in ((dataset.train, "train"), (dataset.test, "test")):
        rows = [row for label in range(3) for row in reversed(range(label, 12, 3))]  # by file name
        for i, row in enumerate(rows):
            planes = parts[split]["data"][row].reshape(3, 32, 32)
            assert np.array_equal(store.load(i), planes.transpose(1, 2, 0))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_cifar100_python_files(tmp_path: Path, protocol: int) -> None:
    parts = cifar_parts()
    write_cifar(tmp_path, parts, protocol)
    check_cifar(load_dataset("cifar100", tmp_path), parts)


def test_cifar100_in_other_places(tmp_path: Path) -> None:
    parts = cifar_parts()
    folder = write_cifar(tmp_path / "a" / "cifar100", parts)
    check_cifar(load_dataset("cifar100", tmp_path / "a"), parts)
    (tmp_path / "b").mkdir()
    with tarfile.open(tmp_path / "b" / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(folder, "cifar-100-python")
    check_cifar(load_dataset("cifar100", tmp_path / "b"), parts)
    check_cifar(load_dataset(folder), parts)


def test_python_2_pickles_are_read() -> None:
    """The published files: byte strings for text, for keys and for an array's content."""
    content = bytes(range(6))
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01"
        b"cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87Rq\x03"
        b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87Rq\x05"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", len(content)) + content + b"tb"
    )  # fmt: skip
    pickled = b"\x80\x02}q\x00(U\x04dataq\x06" + array + b"U\x04name]q\x07(U\x03a\xe9zK\x05eu."
    value = plain_pickle.loads(pickled)
    assert set(value) == {"data", "name"}
    assert value["name"] == ["a\xe9z", 5]
    assert np.array_equal(value["data"], np.arange(6, dtype=np.uint8).reshape(2, 3))


class Shell:
    """Unpickling this would create the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "ran"
    parts = cifar_parts()
    parts["train"]["batch_label"] = Shell(trace)
    write_cifar(tmp_path, parts, protocol)
    with pytest.raises(
        ValueError,
        match=r"train: \[plain_pickle\] expected plain data, got a call of 'posix\.system'",
    ):
        load_dataset("cifar100", tmp_path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Shell(trace), protocol))  # what was avoided
    assert trace.exists()


@pytest.mark.parametrize(
    "value",
    [
        eval, Path("x"), {1, 2}, np.zeros(3), np.zeros(3, np.int64), np.array(["a"], object),
        np.float64(1), complex(1, 2), slice(1), Counter("ab"), np.dtype("u1"), np.ndarray,
        np.asfortranarray(np.zeros((3, 4), np.uint8)),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_other_objects_in_a_pickle_are_refused(value: Any, protocol: int) -> None:
    with pytest.raises(ValueError, match=r"\[plain_pickle\] "):
        plain_pickle.loads(pickle.dumps({"x": value}, protocol))


@pytest.mark.parametrize("protocol", range(5))
def test_plain_data_survives_a_pickle(protocol: int) -> None:
    shared = ["x"]
    value = {
        "none": None, "flags": [True, False], "numbers": [0, -1, 300, 2**40, -(2**70), 1.5],
        "text": ["", "é", "a" * 300], "tuples": [(), (1,), (1, 2), (1, 2, 3), tuple(range(9))],
        "shared": [shared, shared], "nested": {"a": {"b": [{}]}}, 3: "three",
    }  # fmt: skip
    assert plain_pickle.loads(pickle.dumps(value, protocol)) == value
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    loaded = plain_pickle.loads(pickle.dumps([array, array], protocol))
    assert all(np.array_equal(part, array) for part in loaded)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_damaged_pickles_are_value_errors() -> None:
    """Any bytes give a value or a ValueError, nothing else."""
    whole = pickle.dumps(cifar_parts(2)["train"], 2)
    rng = np.random.default_rng(0)
    refused = 0
    for case in range(400):
        damaged = bytearray(whole if case % 2 else whole[: rng.integers(0, len(whole))])
        for position in rng.integers(0, max(len(damaged), 1), 3) if damaged else ():
            damaged[position] = rng.integers(0, 256)
        try:
            plain_pickle.loads(bytes(damaged))
        except ValueError as error:
            assert "[plain_pickle]" in str(error)
            refused += 1
    assert refused > 200
    for text in (b"", b"hello", b".", b"K\x01", b"K\x01K\x02.", b"R.", b"(((.", b"e.", b"b."):
        with pytest.raises(ValueError, match=r"\[plain_pickle\]"):
            plain_pickle.loads(text)


def test_shared_parts_of_a_pickle_are_not_multiplied() -> None:
    """60 levels, each holding the one below twice: 2^60 if it were unfolded."""
    value: Any = ["x"]
    for _ in range(60):
        value = [value, value]
    loaded = plain_pickle.loads(pickle.dumps(value, 2))
    assert loaded[0] is loaded[1]


def test_a_deep_pickle_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="deep nesting"):
        plain_pickle.loads(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("train", "data", np.zeros((12, 3000), np.uint8), "expected n images of 3072 bytes"),
        ("train", "fine_labels", [0] * 11, "expected n images of 3072 bytes"),
        ("test", "fine_labels", [3] * 12, r"expected labels in 0 \.\. 2"),
        ("test", "fine_labels", ["0"] * 12, r"expected labels in 0 \.\. 2"),
        ("train", "fine_labels", [0] * 12, "same classes in train and test"),
    ],
)
def test_bad_cifar_content(tmp_path: Path, part: str, key: str, value: Any, message: str) -> None:
    parts = cifar_parts()
    parts[part][key] = value
    write_cifar(tmp_path, parts)
    with pytest.raises(ValueError, match=message):
        load_dataset("cifar100", tmp_path)


def test_missing_cifar_parts(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, cifar_parts())
    (folder / "test").write_bytes(pickle.dumps({"data": 1}))
    with pytest.raises(ValueError, match="expected a dict with 'data'"):
        load_dataset("cifar100", tmp_path)
    (folder / "test").unlink()
    with pytest.raises(FileNotFoundError, match="no file 'test' in"):
        load_dataset("cifar100", tmp_path)


# DomainNet's lists.


def write_domainnet(root: Path, form: str) -> Path:
    folder = root / "domainnet"
    names = ["The_Eiffel_Tower", "ant", "bee"]
    order = [1, 2, 0]  # the lists' labels: ant, bee, The_Eiffel_Tower
    listed: dict[str, list[tuple[str, int]]] = {}
    for domain in ("clipart", "sketch"):
        for split in ("train", "test"):
            for label, name in enumerate(names[i] for i in order):
                path = f"{domain}/{name}/{split}_{label}.png"
                write_folder(folder, {path: png(10 * label + (domain == "sketch"))})
                listed.setdefault(f"{domain}_{split}", []).append((path, label))
    if form == "txt":
        for key, rows in listed.items():
            (folder / f"{key}.txt").write_text("".join(f"{path} {label}\n" for path, label in rows))
    else:
        for split in ("train", "test"):
            rows = listed[f"clipart_{split}"] + listed[f"sketch_{split}"]
            text = "data:\n" + "".join(f"- data/domainnet/{path}\n" for path, _ in rows)
            text += "targets:\n" + "".join(f"- {label}\n" for _, label in rows)
            (folder / f"domainnet_{split}.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("form", ["txt", "yaml"])
def test_domainnet_lists_state_the_labels(tmp_path: Path, form: str) -> None:
    write_domainnet(tmp_path, form)
    dataset = load_dataset("domainnet", tmp_path)
    assert dataset.class_names == ["ant", "bee", "The_Eiffel_Tower"]
    assert dataset.train.labels == [0, 0, 1, 1, 2, 2]
    assert reds(dataset.train) == [0, 1, 10, 11, 20, 21]


def test_domainnet_list_of_a_missing_image(tmp_path: Path) -> None:
    folder = write_domainnet(tmp_path, "txt")
    (folder / "sketch" / "ant" / "train_0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_0\.png, which .*sketch_train\.txt lists"):
        load_dataset("domainnet", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sketch/ant/train_0.png", "expected lines '<path> <label>'"),
        ("sketch/ant/train_0.png one", "expected one label per path"),
        ("sketch/../../etc/passwd 0", "expected <domain>/<class>/<image>"),
        ("passwd 0", "expected <domain>/<class>/<image>"),
        ("sketch/ant/train_0.png 1", "expected one class per label, got 'bee' and 'ant' for 1"),
        ("sketch/ant/train_0.png 7", r"expected the labels 0 \.\. n-1"),
    ],
)
def test_bad_domainnet_lists(tmp_path: Path, line: str, message: str) -> None:
    folder = write_domainnet(tmp_path, "txt")
    with (folder / "sketch_train.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        load_dataset("domainnet", tmp_path)


# Real data.


@pytest.mark.parametrize(
    ("name", "classes", "train", "test", "shape"),
    [
        ("cifar100_100tr20te.zip", 100, 100, 20, (32, 32, 3)),
        ("eurosat_200tr50te.zip", 10, 200, 50, (64, 64, 3)),
        ("fashion_mnist_200tr50te.zip", 10, 200, 50, (28, 28, 3)),
    ],
)
def test_real_archives(
    assets: Path, name: str, classes: int, train: int, test: int, shape: tuple[int, ...]
) -> None:
    """Every entry is listed; images equal Pillow's."""
    dataset = load_dataset(assets / name)
    assert len(dataset.class_names) == classes
    assert Counter(dataset.train.labels) == dict.fromkeys(range(classes), train)
    assert Counter(dataset.test.labels) == dict.fromkeys(range(classes), test)
    with zipfile.ZipFile(assets / name) as archive:
        for index in range(0, len(dataset.train), 97):
            entry = dataset.train.name(index).split(":")[-1]
            assert entry.startswith(f"train/{dataset.class_names[dataset.train.labels[index]]}/")
            expected = Image.open(io.BytesIO(archive.read(entry))).convert("RGB")
            image = dataset.train.load(index)
            assert image.shape == shape and np.array_equal(image, np.asarray(expected))
