"""The loader: order, determinism, errors, skipping, restart and cancellation."""

import gc
import io
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ntkcl import _C

SIZE = 24


def write_images(folder: Path, count: int) -> list[str]:
    rng = np.random.default_rng(1)
    paths = []
    for i in range(count):
        height, width = rng.integers(9, 60, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = folder / f"{i:03d}.{'jpg' if i % 2 else 'png'}"
        Image.fromarray(pixels).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return write_images(tmp_path, 37)


def file_store(paths: list[str]) -> _C.ImageStore:
    return _C.make_file_store(paths, list(range(len(paths))))


def make_loader(store: _C.ImageStore, kind: str = "inception", **options: object) -> _C.Loader:
    return _C.Loader(store, _C.Transform(kind, SIZE), **options)


def drain(loader: _C.Loader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches = []
    while (batch := loader.next()) is not None:
        batches.append(batch)
    return batches


def load_all(loader: _C.Loader) -> tuple[torch.Tensor, torch.Tensor]:
    images, indices = zip(*drain(loader), strict=True)
    return torch.cat(images), torch.cat(indices)


@pytest.mark.parametrize("kind", ["inception", "cifar", "cars", "resize"])
@pytest.mark.parametrize("view", ["augmented", "test"])
def test_views_made_by_a_device_are_those_of_the_threads(
    tmp_path: Path, kind: str, view: str
) -> None:
    # Protects: resizing place by place, as a GPU does it, to the same bits: images of all shapes,
    # larger and smaller than the view, of which rows or columns come first.
    rng = np.random.default_rng(5)
    sizes = [
        (9, 60),
        (60, 9),
        (24, 24),
        (1, 1),
        (300, 20),
        (20, 300),
        (97, 131),
        (7, 7),
        (256, 32),
        (1, 4000),
    ]
    stored = []
    for i, (height, width) in enumerate(sizes):
        stored.append(str(tmp_path / f"{i}.png"))
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stored[-1])
    order = list(range(len(sizes))) * 3
    found = []
    for augment_on in ("threads", "device"):
        loader = make_loader(file_store(stored), kind, augment_on=augment_on)
        for key in (1, 2, 3):
            loader.start(view, order, 4, key)
            found.append(load_all(loader))
    for (images, indices), (of_device, the_same) in zip(found[:3], found[3:], strict=True):
        assert torch.equal(indices, the_same)
        assert torch.equal(images, of_device)


def test_corrupt_images_are_left_out_of_what_a_device_makes(paths: list[str]) -> None:
    Path(paths[5]).write_bytes(b"no image")
    found = []
    for augment_on in ("threads", "device"):
        loader = make_loader(file_store(paths), on_corrupt="skip", augment_on=augment_on)
        loader.start("augmented", [4, 5, 6, 5], 2, 1)
        found.append(load_all(loader))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].tolist() == found[1][1].tolist() == [4, 6]


@pytest.mark.parametrize("view", ["augmented", "test"])
@pytest.mark.parametrize("prefetch", [1, 4, 100])
def test_thread_count_changes_nothing(paths: list[str], view: str, prefetch: int) -> None:
    store = file_store(paths)
    order = np.random.default_rng(2).permutation(len(paths)).tolist()
    results = []
    for threads in (1, 4, 16):
        loader = make_loader(store, threads=threads, prefetch=prefetch)
        loader.start(view, order, 5, 99)
        results.append(load_all(loader))
    for images, indices in results:
        assert torch.equal(images, results[0][0])
        assert indices.tolist() == order


def test_batches_hold_the_transformed_images(paths: list[str]) -> None:
    store = file_store(paths)
    transform = _C.Transform("cifar", SIZE)
    loader = _C.Loader(store, transform)
    loader.start("test", [5, 3, 5, 8, 0], 2, 1)
    batches = drain(loader)
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, SIZE, SIZE)] * 2 + [
        (1, 3, SIZE, SIZE)
    ]
    for images, indices in batches:
        assert images.dtype == torch.uint8 and images.is_contiguous()
        for image, index in zip(images, indices.tolist(), strict=True):
            expected = transform.test(store.load(index))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_views_depend_on_the_key_and_the_image_not_on_the_place(paths: list[str]) -> None:
    store = file_store(paths)
    loader = make_loader(store)

    def views(indices: list[int], batch: int, key: int) -> dict[int, bytes]:
        loader.start("augmented", indices, batch, key)
        images, got = load_all(loader)
        return {i: image.numpy().tobytes() for i, image in zip(got.tolist(), images, strict=True)}

    first = views(list(range(20)), 4, 7)
    assert views(list(range(20))[::-1], 7, 7) == first
    other = views(list(range(20)), 4, 8)
    assert sum(first[i] != other[i] for i in first) >= 19


def test_an_epoch_can_be_repeated_and_ends_cleanly(paths: list[str]) -> None:
    loader = make_loader(file_store(paths))
    for _ in range(3):
        loader.start("augmented", list(range(10)), 4, 5)
        assert len(drain(loader)) == 3
        assert loader.next() is None


def test_an_empty_pass_has_no_batch(paths: list[str]) -> None:
    loader = make_loader(file_store(paths))
    assert loader.next() is None
    loader.start("test", [], 4, 5)
    assert loader.next() is None


def test_restart_in_the_middle_gives_the_new_pass_alone(paths: list[str]) -> None:
    store = file_store(paths)
    fresh = make_loader(store)
    fresh.start("augmented", list(range(20, 37)), 3, 2)
    expected = load_all(fresh)[0]
    loader = make_loader(store, threads=4, prefetch=8)
    for consumed in range(4):
        loader.start("augmented", list(range(37)), 2, 1)
        for _ in range(consumed):
            loader.next()
        loader.start("augmented", list(range(20, 37)), 3, 2)
        images, indices = load_all(loader)
        assert indices.tolist() == list(range(20, 37))
        assert torch.equal(images, expected)


def test_a_dropped_loader_leaves_no_thread(paths: list[str]) -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    store = file_store(paths)
    before = threads()
    for _ in range(5):
        loader = make_loader(store, threads=4, prefetch=2)
        loader.start("augmented", list(range(37)) * 20, 2, 1)
        loader.next()
        assert threads() > before
        del loader
        gc.collect()
        assert threads() == before


def test_the_interpreter_runs_while_a_batch_is_awaited(paths: list[str]) -> None:
    """next() gives the lock back: another Python thread finishes before a long pass does."""
    loader = make_loader(file_store(paths), threads=1, prefetch=1)
    loader.start("augmented", list(range(37)) * 20, 740, 1)
    ticks: list[int] = []
    other = threading.Thread(target=lambda: ticks.append(1))
    other.start()
    assert len(drain(loader)) == 1
    other.join()
    assert ticks == [1]


def spoil(path: str, kind: str) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(b"no image" if kind == "corrupt" else content[: len(content) // 2])


@pytest.mark.parametrize("kind", ["corrupt", "truncated"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_bad_image_stops_the_pass_in_its_batch(paths: list[str], kind: str, threads: int) -> None:
    """Batches before it arrive, and the first bad one in order is named."""
    spoil(paths[13], kind)
    spoil(paths[14], kind)
    spoil(paths[30], kind)
    loader = make_loader(file_store(paths), threads=threads, prefetch=10)
    loader.start("test", list(range(37)), 5, 0)
    for batch in range(2):
        assert loader.next()[1].tolist() == list(range(5 * batch, 5 * batch + 5))
    with pytest.raises(ValueError, match=f"{paths[13]}: .*"):
        loader.next()
    assert loader.next() is None  # the pass is over
    loader.start("test", list(range(10)), 5, 0)
    assert len(drain(loader)) == 2


@pytest.mark.parametrize("threads", [1, 4])
def test_bad_images_are_skipped_counted_and_named(paths: list[str], threads: int) -> None:
    for index in (0, 3, 4, 5, 36):
        spoil(paths[index], "truncated")
    loader = make_loader(file_store(paths), threads=threads, on_corrupt="skip")
    for _ in range(2):  # a second pass does not count them again
        loader.start("test", [0, 1, 2, 3, 4, 5, 6, 7, 36], 3, 0)
        batches = drain(loader)
        assert [indices.tolist() for _, indices in batches] == [[1, 2], [6, 7]]
        assert [len(images) for images, _ in batches] == [2, 2]
    assert loader.skipped == 5
    assert loader.skipped_names == [paths[i] for i in (0, 3, 4, 5, 36)]


def test_a_missing_file_is_never_skipped(paths: list[str]) -> None:
    Path(paths[2]).unlink()
    loader = make_loader(file_store(paths), on_corrupt="skip")
    loader.start("test", [1, 2, 3], 3, 0)
    with pytest.raises(FileNotFoundError, match=paths[2]):
        loader.next()


def test_bad_arguments_are_named(paths: list[str]) -> None:
    store = file_store(paths)
    loader = make_loader(store)
    with pytest.raises(ValueError, match=r"expected indices in 0 \.\. 36, got 37"):
        loader.start("test", [0, 37], 2, 0)
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        loader.start("test", [0], 0, 0)
    with pytest.raises(ValueError, match="'view': expected one of: augmented, test, got 'train'"):
        loader.start("train", [0], 1, 0)
    with pytest.raises(ValueError, match=r"\[Loader\] 'loader_threads': expected >= 1"):
        make_loader(store, threads=0)
    with pytest.raises(ValueError, match=r"\[Loader\] 'on_corrupt': expected one of: stop, skip"):
        make_loader(store, on_corrupt="ignore")


# Stores.


def png_bytes(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def zip_store(path: Path, **changes: int) -> _C.ImageStore:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()

    def described(e: zipfile.ZipInfo) -> _C.ZipEntry:
        fields = {
            "offset": e.header_offset,
            "compressed_size": e.compress_size,
            "size": e.file_size,
            "method": e.compress_type,
            "crc32": e.CRC,
        }
        return _C.ZipEntry(name=e.filename, **(fields | changes))

    return _C.make_zip_store(str(path), [described(e) for e in entries], [0] * len(entries))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.png", png_bytes(10), zipfile.ZIP_STORED)
        file.writestr("b.png", png_bytes(20), zipfile.ZIP_DEFLATED)
    return path


def test_zip_entries_stored_and_deflated(archive: Path) -> None:
    store = zip_store(archive)
    for index, value in enumerate((10, 20)):
        assert (store.load(index) == np.array([value, 0, 255 - value])).all()
        assert store.name(index) == f"{archive}:{'ab'[index]}.png"


def test_zip_entry_with_another_checksum_is_corrupt(archive: Path) -> None:
    store = zip_store(archive, crc32=1)
    for index in (0, 1):
        with pytest.raises(ValueError, match="checksum"):
            store.load(index)


def test_zip_with_damaged_data_is_corrupt(archive: Path) -> None:
    store = zip_store(archive)
    content = bytearray(archive.read_bytes())
    for position in range(60, len(content) - 120, 7):
        content[position] ^= 0xFF
    archive.write_bytes(content)
    for index in (0, 1):
        with pytest.raises(ValueError, match=f"{archive}:[ab].png"):
            store.load(index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 2**40}, "expected a size that"),
        ({"size": 2**31 - 2}, "expected a size that"),
        ({"size": -1}, "inside the archive"),
        ({"offset": 2**40}, "inside the archive"),
        ({"offset": -5}, "inside the archive"),
        ({"compressed_size": 2**62}, "inside the archive"),
        ({"method": 12}, "method 0 or 8"),
    ],
)
def test_zip_fields_are_not_trusted(archive: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zip_store(archive, **changes)


@pytest.mark.parametrize("changes", [{"offset": 3}, {"size": 200, "method": 8}])
def test_zip_fields_that_lie_are_found_when_read(archive: Path, changes: dict[str, int]) -> None:
    store = zip_store(archive, **changes)
    for index in (0, 1):
        with pytest.raises(ValueError, match=r"\[ImageStore\]"):
            store.load(index)


def test_array_store() -> None:
    images = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).reshape(2, 4, 5, 3)
    store = _C.make_array_store(images, [7, 3])
    assert len(store) == 2 and store.labels == [7, 3]
    assert np.array_equal(store.load(1), images[1].numpy())
    turned = _C.make_array_store(images.permute(0, 2, 1, 3), [7, 3])
    assert np.array_equal(turned.load(1), images[1].permute(1, 0, 2).numpy())


def test_stores_check_their_arguments(paths: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one label per path"):
        _C.make_file_store(paths, [0])
    with pytest.raises(ValueError, match="class indices from 0, got -1"):
        _C.make_file_store(paths[:1], [-1])
    with pytest.raises(ValueError, match="expected uint8 images"):
        _C.make_array_store(torch.zeros(2, 4, 5, 3), [0, 0])
    with pytest.raises(FileNotFoundError, match=r"none\.zip"):
        _C.make_zip_store(str(tmp_path / "none.zip"), [], [])
    with pytest.raises(OSError, match="regular file"):
        _C.make_file_store([str(tmp_path)], [0]).load(0)
    for index in (-1, len(paths)):
        with pytest.raises(ValueError, match="expected an index in"):
            file_store(paths).load(index)
