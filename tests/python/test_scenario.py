"""Class orders equal NumPy's, and task sizes follow the published splits."""

import numpy as np
import pytest

from ntkcl import _C


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 37, 100, 200, 345, 1000, 4097])
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 42, 1993, 1996, 1997, 2**31, 2**32 - 1])
def test_permutation_equals_numpys_legacy_generator(seed: int, n: int) -> None:
    wanted = np.random.RandomState(seed).permutation(n).tolist()
    assert _C.numpy_permutation(seed, n) == wanted


def test_permutation_of_published_orders() -> None:
    # The heads that RAA's specification gives for seed 1993.
    assert _C.numpy_permutation(1993, 100)[:6] == [68, 56, 78, 8, 23, 84]
    assert _C.numpy_permutation(1993, 200)[:6] == [168, 136, 51, 9, 183, 101]
    assert _C.numpy_permutation(1993, 196)[:6] == [59, 134, 162, 9, 42, 72]


def test_permutation_refuses_a_negative_size() -> None:
    with pytest.raises(ValueError, match=r"^\[numpy_permutation\] expected 0 <= n.*got -1"):
        _C.numpy_permutation(0, -1)


@pytest.mark.parametrize(
    ("n_classes", "initial", "increment", "sizes"),
    [
        (100, 10, 10, [10] * 10),
        (37, 7, 5, [7, 5, 5, 5, 5, 5, 5]),
        (196, 20, 20, [20] * 9 + [16]),
        (15, 3, 3, [3] * 5),
        (10, 10, 2, [10]),
        (10, 10, 50, [10]),
        (11, 5, 6, [5, 6]),
        (1, 1, 1, [1]),
    ],
)
def test_split_gives_first_increments_and_rest(
    n_classes: int, initial: int, increment: int, sizes: list[int]
) -> None:
    assert _C.split_classes(n_classes, initial, increment) == sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1), "at least one class, got 0"),
        ((10, 0, 2), "initial_classes between 1 and the 10 classes, got 0"),
        ((10, 11, 2), "initial_classes between 1 and the 10 classes, got 11"),
        ((10, 2, 0), "increment >= 1, got 0"),
        ((10, 10, -1), "increment >= 1, got -1"),
        ((10, 6, 5), r"increment <= 4, the classes left after the first task \(10 - 6\), got 5"),
    ],
)
def test_split_says_what_is_wrong(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[split_classes\] expected " + message):
        _C.split_classes(*arguments)
