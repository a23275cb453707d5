"""Images and a method of Python that every rank of a test makes for itself."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

import ntkcl
from test_training import TINY, dataset

# Batches that two or three ranks cannot share equally, and whose last has a single image.
KEYS: dict[str, Any] = TINY | {
    "transform": "inception",
    "precision": "float64",
    "epochs": 2,
    "initial_epochs": 2,
    "batch_size": 5,
    "evaluation_batch_size": 7,
    "forward_transfer": True,
}


class Centres(ntkcl.Method):
    """An adapter, and class means as head."""

    peft = "adapter"
    rank = 4

    def __init__(self) -> None:
        self.centres = torch.zeros(0, 0, dtype=torch.float64)
        self.head = torch.zeros(0, 0, dtype=torch.float64)

    def before_task(self, task: ntkcl.Task) -> None:
        random = torch.Generator().manual_seed(task.seed)
        new = torch.randn(task.n_new, self.width, generator=random, dtype=torch.float64)
        self.head = new.requires_grad_()

    def parameters(self) -> list[torch.Tensor]:
        return [self.head]

    def loss(self, features: torch.Tensor, labels: torch.Tensor, task: ntkcl.Task) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(features @ self.head.T, labels - task.n_old)
        # Of all pairs of images: no rank alone could compute it.
        return loss + 0.01 * (features @ features.T).square().mean()

    def after_task(self, features: torch.Tensor, labels: torch.Tensor, task: ntkcl.Task) -> None:
        means = [features[labels == c].mean(0) for c in range(task.n_old, task.n_old + task.n_new)]
        old = self.centres.reshape(-1, self.width)
        self.centres = torch.cat([old, torch.stack(means)])

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(features, self.centres)


class Careless(Centres):
    """Draws what each rank draws otherwise."""

    def before_task(self, task: ntkcl.Task) -> None:
        super().before_task(task)
        self.head = torch.empty_like(self.head).normal_(generator=_unseeded()).requires_grad_()

    def after_task(self, features: torch.Tensor, labels: torch.Tensor, task: ntkcl.Task) -> None:
        super().after_task(features, labels, task)
        self.centres += torch.empty_like(self.centres).normal_(generator=_unseeded())


class Uneven(Centres):
    """Keeps a row more on every later rank."""

    def after_task(self, features: torch.Tensor, labels: torch.Tensor, task: ntkcl.Task) -> None:
        super().after_task(features, labels, task)
        more = torch.zeros(ntkcl.ranks.join().rank, self.width, dtype=torch.float64)
        self.centres = torch.cat([self.centres, more])


def _unseeded() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def register_own_method() -> None:
    ntkcl.register("centres", Centres)
    ntkcl.register("careless", Careless)
    ntkcl.register("uneven", Uneven)


def dataset_of(kind: str, folder: Path) -> Any:
    """The usual images; others; or a folder of files one of which is corrupt."""
    if kind == "usual":
        return dataset()
    data = dataset(train=9)
    if kind == "other":
        return data
    for part, (images, labels) in data.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / part / f"class{label}" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    for broken in ("train/class0/003.png", "train/class3/030.png", "test/class1/005.png"):
        path = folder / broken
        path.write_bytes(path.read_bytes()[:40])
    return folder
