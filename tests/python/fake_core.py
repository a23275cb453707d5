"""Stand-ins for the core that do what a test asks for: fail at a task, give known numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Event = dict[str, Any]


class FakeVisionTransformer:
    def __init__(self, weights: dict[str, torch.Tensor], heads: int, image_size: int = 0) -> None:
        self.image_size = image_size


def row(task: int) -> list[float]:
    """Accuracy on each seen task after `task`: 90 on the new one, 2.5 less per task since."""
    return [90.0 - 2.5 * (task - j) for j in range(task + 1)]


class FakeTrainer:
    """Three tasks of known accuracies; `fail_at` raises at the beginning of that task."""

    fail_at: int | None = None
    error: BaseException = FloatingPointError("[train] loss is nan at step 3")
    tasks = 3
    seen: dict[str, Any]

    def __init__(self, method: str, method_options: dict[str, Any], *_: Any, **given: Any) -> None:
        type(self).seen = {"method": method, "method_options": method_options, "given": (_, given)}

    def run(
        self,
        on_event: Callable[[Event], None] | None,
        should_stop: Callable[[], bool] | None,
        on_checkpoint: Callable[[dict[str, Any]], None] | None = None,
        checkpoint: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        tell = on_event or (lambda event: None)
        tell(
            {"event": "run_begin", "tasks": self.tasks, "task_sizes": [2] * self.tasks, "steps": 12}
        )
        for task in range(self.tasks):
            if task == self.fail_at:
                raise type(self.error)(*self.error.args)  # without another test's notes
            self._task(task, tell)
            if should_stop is not None and should_stop():
                raise KeyboardInterrupt("[train] stopped")
        return self._result()

    def _task(self, task: int, tell: Callable[[Event], None]) -> None:
        tell(
            {"event": "task_begin", "task": task, "classes": [0, 1], "train_images": 64, "steps": 4}
        )
        for step in range(4):
            tell(
                {
                    "event": "step",
                    "task": task,
                    "epoch": 0,
                    "step": step,
                    "steps": 4,
                    "images": 16,
                    "learning_rate": 0.1,
                    "losses": {"total": 1.5, "fused": 1.0},
                }
            )
        tell(
            {
                "event": "epoch",
                "task": task,
                "epoch": 0,
                "epochs": 1,
                "learning_rate": 0.1,
                "losses": {"total": 1.5, "fused": 1.0},
                "seconds": 0.5,
                "images_per_second": 128.0,
            }
        )
        tell({"event": "stage", "task": task, "name": "prototypes", "done": 64, "count": 64})
        tell({"event": "evaluation", **self._evaluation(task)})
        tell({"event": "task_end", "task": task, "seconds": 1.0})

    def _evaluation(self, task: int) -> dict[str, Any]:
        per_task = row(task)
        return {
            "task": task,
            "count": 20 * (task + 1),
            "top1": sum(per_task) / len(per_task),
            "top5": 99.0 if task else math.nan,
            "per_task": per_task,
            "old_classes": per_task[0] if task else math.nan,
            "new_classes": 90.0,
            "task_id": 95.0,
            "within_task": 97.0,
            "inferred_task": float("nan"),
        }

    def _result(self) -> dict[str, Any]:
        matrix = torch.full((self.tasks, self.tasks), math.nan, dtype=torch.float64)
        for task in range(self.tasks):
            matrix[task, : task + 1] = torch.tensor(row(task), dtype=torch.float64)
        return {
            "accuracy_matrix": matrix,
            "evaluations": [self._evaluation(task) for task in range(self.tasks)],
            "final_accuracy": 87.5,
            "average_accuracy": 88.75,
            "final_task_mean": 87.5,
            "average_task_mean": 88.75,
            "forgetting": 3.75,
            "backward_transfer": -3.75,
            "forward_transfer": math.nan,
            "seconds": 3.0,
            "training_seconds": 2.0,
            "images_per_second": 96.0,
            "trainable_parameters": 1234,
            "stored_parameters": 5678,
            "task_sizes": [2] * self.tasks,
            "skipped_images": 0,
            "peak_memory": 2**30,
            "state": {"head.weight": torch.ones(2, 3), "prototypes": torch.zeros(6, 4)},
            "predictions": [
                {
                    "labels": torch.zeros(20 * (t + 1), dtype=torch.int64),
                    "records": torch.zeros(20 * (t + 1), 5, dtype=torch.int64),
                    "confidences": torch.ones(20 * (t + 1)),
                }
                for t in range(self.tasks)
            ],
        }
