"""An own method in 56 lines: adapters trained with a head of each task, then ridge regression.

    python examples/own_method.py

The adapters learn from the first task alone. Every task's features go through a fixed random
projection into the sums of a ridge regression over all classes (RanPAC: McDonnell et al., NeurIPS
2023, with one ridge instead of a chosen one), so nothing is ever forgotten but what drifts.
"""

import torch

import ntkcl


class RidgeOfRandomFeatures(ntkcl.Method):
    rank = 16

    def __init__(self, projections: int = 2000, ridge: float = 1e4) -> None:
        self.projections, self.ridge = projections, ridge
        self.head = torch.zeros(0, 0)
        self.projection = torch.zeros(0, 0)
        self.gram = torch.zeros(0, 0, dtype=torch.float64)
        self.sums = torch.zeros(0, 0, dtype=torch.float64)  # (projections, classes)

    def trains(self, task: ntkcl.Task) -> bool:
        return task.index == 0

    def before_task(self, task: ntkcl.Task) -> None:
        self.head = torch.zeros(task.n_new, self.width)
        if task.index == 0:
            shape = (self.width, self.projections)
            self.projection = torch.randn(shape, generator=task.generator())
            self.gram = torch.zeros(self.projections, self.projections, dtype=torch.float64)
            self.sums = torch.zeros(self.projections, 0, dtype=torch.float64)

    def parameters(self) -> list[torch.Tensor]:
        return [self.head]

    def loss(self, features: torch.Tensor, labels: torch.Tensor, task: ntkcl.Task) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(features @ self.head.T, labels - task.n_old)

    def after_task(self, features: torch.Tensor, labels: torch.Tensor, task: ntkcl.Task) -> None:
        rows = torch.relu(features @ self.projection).double()
        targets = torch.nn.functional.one_hot(labels, task.n_seen).double()
        old = torch.nn.functional.pad(self.sums, (0, task.n_seen - self.sums.shape[1]))
        self.gram, self.sums = self.gram + rows.T @ rows, old + rows.T @ targets

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        system = self.gram + self.ridge * torch.eye(self.projections, dtype=torch.float64)
        weights = torch.linalg.solve(system, self.sums)
        return torch.relu(features @ self.projection).double() @ weights


if __name__ == "__main__":
    result = ntkcl.train(method=RidgeOfRandomFeatures(), epochs=5, progress=False)
    print(f"{result.final_accuracy:.2f} % on the digits of five tasks")
