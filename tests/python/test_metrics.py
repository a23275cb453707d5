"""Accuracies against numbers worked by hand and against a slow reference."""

import math

import pytest
import torch
from torch import Tensor

from ntkcl import _C


def evaluation(sizes: list[int], task: int, labels: list[int], scores: Tensor) -> _C.Evaluation:
    result = _C.Evaluation(sizes, task)
    result.add(torch.tensor(labels), scores)
    return result


def scores_for(predictions: list[int], classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predictions), classes).float()


def test_metrics_by_hand() -> None:
    # Tasks of 3, 2 and 2 classes: 0 1 2 | 3 4 | 5 6; all scores negative.
    scores = torch.tensor(
        [
            [-1.0, -2, -3, -4, -5, -6, -7],  # label 0: right
            [-2.0, -3, -1, -4, -5, -6, -7],  # label 1: other class of the task; third within it
            [-3.0, -4, -2, -1, -5, -6, -7],  # label 2: wrong task; best within the own one
            [-2.0, -3, -4, -5, -6, -7, -1],  # label 4: wrong task; sixth; second within
            [-7.0, -6, -5, -4, -3, -1, -2],  # label 5: right
        ]
    )
    result = evaluation([3, 2, 2], 2, [0, 1, 2, 4, 5], scores)
    assert result.count == 5
    assert result.seen_classes == 7
    assert result.predictions.tolist() == [0, 2, 3, 6, 5]
    assert result.labels.tolist() == [0, 1, 2, 4, 5]
    assert result.top1 == pytest.approx(40)
    assert result.top5 == pytest.approx(80)
    assert result.per_task == pytest.approx([100 / 3, 0, 100])
    assert result.old_classes == pytest.approx(25)
    assert result.new_classes == pytest.approx(100)
    assert result.task_id == pytest.approx(60)
    assert result.within_task == pytest.approx(60)


def reference_metrics(sizes: list[int], labels: list[int], scores: list[list[float]]) -> dict:
    """The definitions, image by image."""
    task_of = [t for t, size in enumerate(sizes) for _ in range(size)]
    hits, fives, ids, within = [], [], [], []
    by_task: list[list[bool]] = [[] for _ in sizes]
    for label, row in zip(labels, scores, strict=True):
        ranked = sorted(range(len(row)), key=lambda k, row=row: (-row[k], k))
        inside = [k for k in ranked if task_of[k] == task_of[label]]
        hits.append(ranked[0] == label)
        fives.append(label in ranked[:5])
        ids.append(task_of[ranked[0]] == task_of[label])
        within.append(inside[0] == label)
        by_task[task_of[label]].append(hits[-1])

    def percent(values: list[bool]) -> float:
        return 100 * sum(values) / len(values) if values else math.nan

    return {
        "top1": percent(hits),
        "top5": percent(fives) if len(task_of) > 5 else math.nan,
        "per_task": [percent(values) for values in by_task],
        "old_classes": percent([hit for values in by_task[:-1] for hit in values]),
        "new_classes": percent(by_task[-1]),
        "task_id": percent(ids),
        "within_task": percent(within),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[4], [5], [6], [2, 3], [7, 5, 5, 1], [1] * 9])
def test_metrics_equal_a_slow_reference(sizes: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    classes = sum(sizes)
    # Whole scores: many ties, which must rank by class.
    scores = torch.randint(-3, 4, (203, classes), generator=generator).to(dtype)
    labels = torch.randint(0, classes, (203,), generator=generator)
    # Later tasks are known and must not matter.
    result = _C.Evaluation([*sizes, 11], len(sizes) - 1)
    for part in torch.arange(203).split(64):
        result.add(labels[part], scores[part])
    wanted = reference_metrics(sizes, labels.tolist(), scores.tolist())
    for name, value in wanted.items():
        assert getattr(result, name) == pytest.approx(value, nan_ok=True), name
    assert torch.equal(result.labels, labels)


def test_queries_between_batches_change_nothing() -> None:
    scores, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    result = _C.Evaluation([2, 2], 1)
    result.add(labels[:2], scores[:2])
    assert result.top1 == 100
    result.add(labels[2:], scores[2:])
    assert result.top1 == 75
    assert result.predictions.tolist() == [0, 1, 2, 3]


def test_labels_are_copied() -> None:
    labels = torch.tensor([0, 1])
    result = _C.Evaluation([2], 0)
    result.add(labels, torch.eye(2))
    labels.zero_()
    assert result.labels.tolist() == [0, 1]


def test_what_no_image_defines_is_nan() -> None:
    empty = _C.Evaluation([3, 4], 1)
    empty.add(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 7))
    assert empty.count == 0
    for name in ("top1", "top5", "old_classes", "new_classes", "task_id", "within_task"):
        assert math.isnan(getattr(empty, name)), name
    first = evaluation([3, 4], 0, [0, 1], torch.eye(3)[:2])
    assert math.isnan(first.old_classes)
    assert math.isnan(first.top5)
    assert first.new_classes == 100
    partial = evaluation([1, 1, 2], 2, [0, 2], torch.eye(4)[[0, 2]])
    assert partial.per_task == pytest.approx([100, math.nan, 100], nan_ok=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_an_error(bad: float) -> None:
    scores = torch.eye(3)
    scores[1, 2] = bad
    result = evaluation([3], 0, [0, 1, 2], scores)
    message = r"finite scores, got NaN or infinity for 1 of 3 test images after task 0.*number 1"
    for query in ("top1", "predictions", "per_task", "within_task", "task_id"):
        with pytest.raises(FloatingPointError, match=message):
            getattr(result, query)


def test_a_class_not_seen_may_be_predicted_and_is_wrong() -> None:
    result = _C.Evaluation([2, 3], 0)
    scores = torch.tensor([[0.9, 0.1, 0.0, 0.0, 0.0], [0.1, 0.2, 0.0, 0.0, 0.7]])
    result.add(torch.tensor([0, 1]), scores)
    assert result.predictions.tolist() == [0, 4]
    assert (result.top1, result.task_id, result.within_task) == (50, 50, 100)


def test_inferred_tasks() -> None:
    result = _C.Evaluation([2, 3], 1)
    result.add(torch.tensor([0, 4]), torch.zeros(2, 5), torch.tensor([0, 0]))
    assert result.inferred_task == 50
    with pytest.raises(ValueError, match=r"expected int64 tasks \(2\)"):
        result.add(torch.tensor([0, 4]), torch.zeros(2, 5), torch.tensor([0]))
    result.add(torch.tensor([0]), torch.zeros(1, 5))  # one image whose task was not inferred
    assert math.isnan(result.inferred_task)


def test_evaluation_refuses_what_does_not_fit() -> None:
    result = _C.Evaluation([3, 2], 1)
    with pytest.raises(ValueError, match=r"^\[evaluation\] expected labels in 0 .. 4, got 0 .. 5"):
        result.add(torch.tensor([0, 5]), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"expected labels in 0 .. 4, got -1 .. 1"):
        result.add(torch.tensor([-1, 1]), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"floating point scores \(b, 5 or more\), got .*\[2, 3\]"):
        result.add(torch.tensor([0, 1]), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"int64 labels \(2\)"):
        result.add(torch.tensor([0, 1, 2]), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="int64 labels"):
        result.add(torch.tensor([0.0, 1.0]), torch.zeros(2, 5))
    assert result.count == 0
    with pytest.raises(ValueError, match=r"expected a task in 0 .. 1, got 2"):
        _C.Evaluation([3, 2], 2)
    with pytest.raises(ValueError, match="at least one class, got one of 0"):
        _C.Evaluation([3, 0], 1)


def run_of_three() -> list[_C.Evaluation]:
    sizes = [2, 1, 1]
    return [
        # 3 of 3 right.
        evaluation(sizes, 0, [0, 1, 1], scores_for([0, 1, 1], 2)),
        # Task 0: 2 of 3, task 1: 1 of 1.
        evaluation(sizes, 1, [0, 1, 1, 2], scores_for([2, 1, 1, 2], 3)),
        # Task 0: 1 of 3, task 1: 0 of 1, task 2: 2 of 2.
        evaluation(sizes, 2, [0, 1, 1, 2, 3, 3], scores_for([3, 1, 2, 0, 3, 3], 4)),
    ]


def test_summary_by_hand() -> None:
    summary = _C.summarize(run_of_three())
    third = 100 / 3
    matrix = torch.tensor(
        [[100, math.nan, math.nan], [2 * third, 100, math.nan], [third, 0, 100]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(summary.accuracy_matrix, matrix, equal_nan=True)
    assert summary.accuracy == pytest.approx([100, 75, 50])
    assert summary.task_mean == pytest.approx([100, 2.5 * third, 4 * third / 3])
    assert summary.final_accuracy == pytest.approx(50)
    assert summary.average_accuracy == pytest.approx(75)
    assert summary.final_task_mean == pytest.approx(4 * third / 3)
    assert summary.average_task_mean == pytest.approx((100 + 2.5 * third + 4 * third / 3) / 3)
    assert summary.forgetting == pytest.approx((2 * third + 100) / 2)
    assert summary.backward_transfer == pytest.approx(-(2 * third + 100) / 2)


def test_summary_of_one_task_has_no_forgetting() -> None:
    summary = _C.summarize(run_of_three()[:1])
    assert summary.accuracy_matrix.tolist() == [[100]]
    assert (summary.forgetting, summary.backward_transfer) == (0, 0)


def test_accuracies_are_not_rounded() -> None:
    labels = [0] * 7
    result = evaluation([2], 0, labels, scores_for([0, 1, 1, 1, 1, 1, 1], 2))
    assert _C.summarize([result]).accuracy == [100 * 1 / 7]


def test_summary_refuses_a_run_with_gaps() -> None:
    run = run_of_three()
    with pytest.raises(ValueError, match=r"^\[summarize\] expected at least one evaluation"):
        _C.summarize([])
    with pytest.raises(ValueError, match="after task 1, got that after task 2"):
        _C.summarize([run[0], run[2]])
    other = evaluation([3, 2], 0, [0], scores_for([0], 3))
    with pytest.raises(ValueError, match="the same tasks"):
        _C.summarize([other, run[1]])


def test_forgetting_takes_the_best_before_the_last_task() -> None:
    nan = math.nan
    # Task 0 was best after task 1 and task 1 improves at the end: forgetting counts 90 - 70 and
    # 50 - 60; backward transfer 70 - 80 and 60 - 50.
    matrix = torch.tensor([[80, nan, nan], [90, 50, nan], [70, 60, 40.0]])
    assert _C.forgetting(matrix) == pytest.approx((20 - 10) / 2)
    assert _C.backward_transfer(matrix) == pytest.approx(0)
    with pytest.raises(ValueError, match=r"square accuracy matrix, got shape \[2, 3\]"):
        _C.forgetting(matrix[:2])


def test_forgetting_skips_a_task_without_images() -> None:
    nan = math.nan
    matrix = torch.tensor([[80, nan, nan], [90, nan, nan], [70, nan, 40.0]])
    assert _C.forgetting(matrix) == pytest.approx(20)
    assert _C.backward_transfer(matrix) == pytest.approx(-10)
