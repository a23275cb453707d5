"""
ntkcl's C++ core. Use the functions of the package `ntkcl`.
"""

from __future__ import annotations

import collections.abc
import typing

import numpy
import numpy.typing
import torch

__all__: list[str] = [
    "AlignmentDraws",
    "ClassGaussians",
    "ClassMeans",
    "ClusterGaussians",
    "Evaluation",
    "GaussianDraws",
    "ImageStore",
    "ImportanceAverage",
    "Loader",
    "MethodSession",
    "Optimizer",
    "Orthogonality",
    "ParameterGroup",
    "Predictor",
    "Summary",
    "Trainer",
    "Transform",
    "VisionTransformer",
    "ZipEntry",
    "align_cosine_head",
    "align_head",
    "backward_transfer",
    "build_info",
    "channel_pass",
    "clip_grad_norm_",
    "cluster_moments",
    "cosface",
    "cosine_logits",
    "cosines",
    "decode_image",
    "describe_options",
    "forgetting",
    "freeze_important",
    "fuse",
    "fusion_kinds",
    "gaussian_drift",
    "kmeans",
    "kmeans_plus_plus",
    "learning_rate_at",
    "list_in_use",
    "lora_pass",
    "make_array_store",
    "make_file_store",
    "make_optimizer",
    "make_zip_store",
    "mean_factors",
    "merged_branches",
    "numpy_permutation",
    "old_basis",
    "patch_pass",
    "plain_pass",
    "resample",
    "running_mean_",
    "sam_plus_gamma",
    "schedule_learning_rates",
    "section_drift",
    "shares_of",
    "signed_direction",
    "split_classes",
    "stream_adapters",
    "stream_block",
    "stream_pass",
    "summarize",
    "tasks_of_classes",
    "votes",
]

class ImageStore:
    """
    A fixed list of labelled images; make one with make_*_store.
    """
    def __len__(self) -> int: ...
    def load(
        self, index: typing.SupportsInt | typing.SupportsIndex
    ) -> numpy.typing.NDArray[numpy.uint8]:
        """
        The decoded pixels, uint8 (height, width, 3).
        """
    def name(self, index: typing.SupportsInt | typing.SupportsIndex) -> str:
        """
        What messages call the image.
        """
    @property
    def labels(self) -> list[int]:
        """
        The class index of each image.
        """

class ZipEntry:
    """
    An entry of a zip archive's central directory.
    """
    def __init__(
        self,
        name: str,
        offset: typing.SupportsInt | typing.SupportsIndex,
        compressed_size: typing.SupportsInt | typing.SupportsIndex,
        size: typing.SupportsInt | typing.SupportsIndex,
        method: typing.SupportsInt | typing.SupportsIndex,
        crc32: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...

class Transform:
    """
    Random training views and fixed test views of images.
    """
    def __init__(
        self, kind: str, image_size: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def test(
        self, array: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8]
    ) -> numpy.typing.NDArray[numpy.uint8]:
        """
        The view of `array` for evaluation.
        """
    def train(
        self,
        array: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
        key: typing.SupportsInt | typing.SupportsIndex,
    ) -> numpy.typing.NDArray[numpy.uint8]:
        """
        The random view of `array` that `key` gives.
        """

class Loader:
    """
    Decodes and transforms batches ahead of their use.
    """
    def __init__(
        self,
        store: ImageStore,
        transform: Transform,
        threads: typing.SupportsInt | typing.SupportsIndex = 2,
        prefetch: typing.SupportsInt | typing.SupportsIndex = 4,
        on_corrupt: str = "stop",
        augment_on: str = "threads",
    ) -> None: ...
    def next(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """
        The next (images uint8 (b, 3, S, S), indices int64 (b)), or None at the end.
        """
    def start(
        self,
        view: str,
        indices: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        batch_size: typing.SupportsInt | typing.SupportsIndex,
        key: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        Begins a pass; view is 'augmented' or 'test'.
        """
    @property
    def skipped(self) -> int:
        """
        How many corrupt images were skipped.
        """
    @property
    def skipped_names(self) -> list[str]: ...

class VisionTransformer:
    """
    A frozen vision transformer in timm's layout.
    """
    def __init__(
        self,
        weights: collections.abc.Mapping[str, torch.Tensor],
        heads: typing.SupportsInt | typing.SupportsIndex,
        image_size: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None: ...
    def embed(self, images: torch.Tensor) -> torch.Tensor: ...
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """
        Class features (B, C) of normalised images (B, 3, S, S).
        """
    @property
    def depth(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def width(self) -> int: ...

class ImportanceAverage:
    """
    Smoothed importance and uncertainty of each weight matrix.
    """
    def __init__(
        self,
        mean_decay: typing.SupportsFloat | typing.SupportsIndex = 0.85,
        uncertainty_decay: typing.SupportsFloat | typing.SupportsIndex = 0.85,
        plain: bool = False,
    ) -> None: ...
    def add(self, importance: torch.Tensor) -> None:
        """
        One step's (types, blocks).
        """
    def score(self) -> torch.Tensor:
        """
        mean * uncertainty, (types, blocks).
        """
    @property
    def mean(self) -> torch.Tensor: ...
    @property
    def uncertainty(self) -> torch.Tensor: ...

class Orthogonality:
    """
    || Q^T Q - I ||_F with Q = [old, current].
    """
    def __call__(self, current: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        (blocks, in, r) -> values (blocks), gradient of their sum.
        """
    def __init__(self, old: torch.Tensor) -> None:
        """
        (blocks, in, columns), columns may be 0.
        """

class AlignmentDraws:
    def __init__(
        self,
        permutation: collections.abc.Callable[[int, int], torch.Tensor],
        normals: collections.abc.Callable[[int, torch.Tensor], torch.Tensor],
    ) -> None: ...

class ClusterGaussians:
    """
    Classes as Gaussians over features, for task inference.
    """
    def __init__(self) -> None: ...
    def add_class(self, rows: torch.Tensor, labels: torch.Tensor) -> None: ...
    def distances(
        self, features: torch.Tensor, first: typing.SupportsInt | typing.SupportsIndex = 0
    ) -> torch.Tensor:
        """
        (b, C) -> (b, classes), squared Mahalanobis distance to the nearest cluster.
        """
    @property
    def classes(self) -> int: ...

class MethodSession:
    """
    One method outside the task loop, step by step.
    """
    def __init__(
        self,
        method: str,
        method_options: dict,
        backbone: VisionTransformer,
        tasks: typing.SupportsInt | typing.SupportsIndex,
        train: dict = {},
        draws: collections.abc.Callable | None = None,
        as_run: bool = False,
    ) -> None: ...
    def begin_task(
        self,
        index: typing.SupportsInt | typing.SupportsIndex,
        n_old: typing.SupportsInt | typing.SupportsIndex,
        n_new: typing.SupportsInt | typing.SupportsIndex,
        increment: typing.SupportsInt | typing.SupportsIndex,
        batch_size: typing.SupportsInt | typing.SupportsIndex,
        images: torch.Tensor,
        labels: torch.Tensor,
        classes: typing.SupportsInt | typing.SupportsIndex = 0,
        steps: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None:
        """
        Images (n, 3, S, S) and labels of the task, for its statistics; classes of all tasks and steps of this one, 0 where not known.
        """
    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]: ...
    def load_state(self, state: collections.abc.Mapping[str, torch.Tensor]) -> None: ...
    def optimizer_state(self) -> dict[str, torch.Tensor]: ...
    def run_stages(self) -> None: ...
    def scores(self, images: torch.Tensor) -> torch.Tensor: ...
    def state(self) -> dict[str, torch.Tensor]: ...
    def step(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        learning_rate: typing.SupportsFloat | typing.SupportsIndex,
        gradients: bool = True,
    ) -> dict: ...

class ParameterGroup:
    """
    Parameters that share their settings.
    """
    def __init__(
        self,
        name: str,
        parameters: collections.abc.Sequence[torch.Tensor],
        learning_rate_scale: typing.SupportsFloat | typing.SupportsIndex = 1.0,
        decays: bool = True,
        stacked_dims: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None: ...
    @property
    def decays(self) -> bool: ...
    @property
    def learning_rate_scale(self) -> float: ...
    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> list[torch.Tensor]: ...

class Optimizer:
    """
    An optimiser, as make_optimizer builds it.
    """
    def learning_rate(self, group: typing.SupportsInt | typing.SupportsIndex) -> float:
        """
        The rate of the group of that index.
        """
    @typing.overload
    def set_learning_rate(self, rate: typing.SupportsFloat | typing.SupportsIndex) -> None:
        """
        Each group runs at rate times its learning_rate_scale.
        """
    @typing.overload
    def set_learning_rate(
        self,
        rate: typing.SupportsFloat | typing.SupportsIndex,
        group: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        The rate of the group of that index.
        """
    def state(self) -> dict:
        """
        All that a resumed run needs, by name; the tensors are the optimiser's own.
        """
    def step(self, gradients: collections.abc.Callable[[int], None]) -> None:
        """
        One step; gradients(pass) fills .grad of the parameters. An undefined gradient counts as zero.
        """
    @property
    def passes(self) -> int:
        """
        How often a step asks for gradients.
        """

class ClassGaussians:
    """
    Classes as a Gaussian each over features.
    """
    def __init__(
        self, width: typing.SupportsInt | typing.SupportsIndex, like: torch.Tensor
    ) -> None:
        """
        Of the type and device of `like`.
        """
    def add_class(
        self, rows: torch.Tensor, eps: typing.SupportsFloat | typing.SupportsIndex
    ) -> None: ...
    def draw(
        self,
        number: typing.SupportsInt | typing.SupportsIndex,
        scale: typing.SupportsFloat | typing.SupportsIndex,
        normals: torch.Tensor,
    ) -> torch.Tensor: ...
    def factor(self, number: typing.SupportsInt | typing.SupportsIndex) -> torch.Tensor: ...
    def keep(self, count: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def move(self, shift: torch.Tensor) -> None: ...
    @property
    def classes(self) -> int: ...
    @property
    def means(self) -> torch.Tensor: ...

class GaussianDraws:
    def __init__(
        self,
        permutation: collections.abc.Callable[[int, int], torch.Tensor],
        normals: collections.abc.Callable[[int, int], torch.Tensor],
    ) -> None: ...

class Evaluation:
    """
    The test after one task on all seen classes; accuracies in percent.
    """
    def __init__(
        self,
        task_sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        task: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def add(
        self, labels: torch.Tensor, scores: torch.Tensor, task: torch.Tensor | None = None
    ) -> None:
        """
        A batch: int64 labels (b), scores (b, n_seen or more), tasks inferred (b).
        """
    @property
    def confidences(self) -> torch.Tensor:
        """
        (count), float32: softmax of the scores at the prediction.
        """
    @property
    def count(self) -> int:
        """
        Images added.
        """
    @property
    def inferred_task(self) -> float:
        """
        The task inferred is the image's; NaN where none was.
        """
    @property
    def labels(self) -> torch.Tensor:
        """
        (count), int64.
        """
    @property
    def new_classes(self) -> float:
        """
        Top-1 on the classes of this task.
        """
    @property
    def old_classes(self) -> float:
        """
        Top-1 on the classes of earlier tasks.
        """
    @property
    def per_task(self) -> list[float]:
        """
        Top-1 on each seen task.
        """
    @property
    def predictions(self) -> torch.Tensor:
        """
        (count), int64.
        """
    @property
    def seen_classes(self) -> int: ...
    @property
    def task(self) -> int:
        """
        Index of the task just learned, from 0.
        """
    @property
    def task_id(self) -> float:
        """
        Predicted class lies in the image's task.
        """
    @property
    def top1(self) -> float:
        """
        A_t.
        """
    @property
    def top5(self) -> float:
        """
        NaN with 5 seen classes or fewer.
        """
    @property
    def within_task(self) -> float:
        """
        Best class of the image's own task is the right one.
        """

class Summary:
    """
    Metrics of a run of T tasks, in percent.
    """
    @property
    def accuracy(self) -> list[float]:
        """
        A_t, over all test images.
        """
    @property
    def accuracy_matrix(self) -> torch.Tensor:
        """
        (T, T): [i][j] on task j after task i, NaN for j > i.
        """
    @property
    def average_accuracy(self) -> float: ...
    @property
    def average_task_mean(self) -> float: ...
    @property
    def backward_transfer(self) -> float: ...
    @property
    def final_accuracy(self) -> float: ...
    @property
    def final_task_mean(self) -> float: ...
    @property
    def forgetting(self) -> float: ...
    @property
    def task_mean(self) -> list[float]:
        """
        The same with tasks weighing equally.
        """

class ClassMeans:
    """
    Mean feature of each class, summed in float64.
    """
    def __init__(
        self,
        first_class: typing.SupportsInt | typing.SupportsIndex,
        classes: typing.SupportsInt | typing.SupportsIndex,
        width: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """
        A batch: features (b, width), int64 labels (b).
        """
    def result(self, dtype: torch.dtype) -> torch.Tensor:
        """
        (classes, width) in dtype; ValueError names a class without an image.
        """
    @property
    def counts(self) -> torch.Tensor:
        """
        Images of each class.
        """

class Predictor:
    """
    A trained method outside its run.
    """
    def __init__(
        self,
        method: typing.Any,
        method_options: dict,
        train_options: dict,
        backbone: VisionTransformer,
        tasks: typing.SupportsInt | typing.SupportsIndex,
        transform: dict,
        loader: dict,
        mean: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
        std: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
        state: collections.abc.Mapping[str, torch.Tensor],
    ) -> None: ...
    def features(self, images: ImageStore) -> torch.Tensor:
        """
        (n, D), by the last task's weights.
        """
    def scores(self, images: ImageStore) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Scores (n, classes) and, of some methods, tasks inferred (n).
        """
    def scores_of(self, images: torch.Tensor) -> torch.Tensor:
        """
        Scores (B, classes) of transformed uint8 images (B, 3, S, S).
        """

class Trainer:
    """
    The task loop of one run.
    """
    def __init__(
        self,
        method: typing.Any,
        method_options: dict,
        train_options: dict,
        backbone: VisionTransformer,
        dataset: dict,
        transform: dict,
        loader: dict,
        mean: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
        std: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
        draws: collections.abc.Callable | None = None,
        group: tuple[str, str] | None = None,
    ) -> None:
        """
        `group`: names of torch.distributed's process groups of the ranks that train together, one for the device's tensors and one for the CPU's.
        """
    def begin_after(
        self,
        tasks: typing.SupportsInt | typing.SupportsIndex,
        learned: collections.abc.Mapping[str, torch.Tensor],
    ) -> None:
        """
        Begins after tasks that were learned elsewhere.
        """
    def load_state(
        self, state: collections.abc.Mapping[str, torch.Tensor], partial: bool = False
    ) -> None:
        """
        Of every tensor of the method; or of some, and the others stay as they are.
        """
    def run(
        self,
        on_event: collections.abc.Callable | None = None,
        should_stop: collections.abc.Callable | None = None,
        on_checkpoint: collections.abc.Callable | None = None,
        checkpoint: dict | None = None,
    ) -> dict: ...
    def scores(self, images: torch.Tensor) -> torch.Tensor:
        """
        Scores (B, n_seen) of transformed uint8 images (B, 3, S, S).
        """
    def state(self) -> dict[str, torch.Tensor]:
        """
        Every tensor of the method by name, as copies.
        """

def align_cosine_head(
    weight: torch.Tensor,
    gaussians: ClassGaussians,
    factors: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
    scale: typing.SupportsFloat | typing.SupportsIndex,
    epochs: typing.SupportsInt | typing.SupportsIndex,
    learning_rate: typing.SupportsFloat | typing.SupportsIndex,
    momentum: typing.SupportsFloat | typing.SupportsIndex,
    weight_decay: typing.SupportsFloat | typing.SupportsIndex,
    samples: typing.SupportsInt | typing.SupportsIndex,
    draws: GaussianDraws,
) -> list[float]:
    """
    Trains the head on draws from class Gaussians, in place; each step's cross-entropy.
    """

def align_head(
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    means: torch.Tensor,
    variances: torch.Tensor,
    n_old: typing.SupportsInt | typing.SupportsIndex,
    epochs: typing.SupportsInt | typing.SupportsIndex,
    learning_rate: typing.SupportsFloat | typing.SupportsIndex,
    rows: typing.SupportsInt | typing.SupportsIndex,
    draws: AlignmentDraws,
) -> list[float]:
    """
    Trains the head on draws from clusters, in place; each step's cross-entropy.
    """

def backward_transfer(accuracy_matrix: torch.Tensor) -> float:
    """
    Mean over tasks k < T - 1 of a[T-1][k] - a[k][k]; 0 for T = 1.
    """

def channel_pass(
    vit: VisionTransformer,
    images: torch.Tensor,
    adapters: collections.abc.Mapping[str, torch.Tensor],
    scale: typing.SupportsFloat | typing.SupportsIndex,
    masks: collections.abc.Sequence[torch.Tensor] = [],
    dropout: typing.SupportsFloat | typing.SupportsIndex = 0.0,
    trace: bool = False,
) -> dict: ...
def clip_grad_norm_(
    parameters: collections.abc.Sequence[torch.Tensor],
    max_norm: typing.SupportsFloat | typing.SupportsIndex,
) -> torch.Tensor:
    """
    Scales the gradients by min(1, max_norm / (norm + 1e-6)); returns the norm before.
    """

def cluster_moments(
    rows: torch.Tensor, labels: torch.Tensor, clusters: typing.SupportsInt | typing.SupportsIndex
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and biased variance of each cluster: (K, C) twice.
    """

def cosface(
    features: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: typing.SupportsFloat | typing.SupportsIndex,
    margin: typing.SupportsFloat | typing.SupportsIndex,
) -> torch.Tensor:
    """
    Each row's loss, (n).
    """

def cosine_logits(x: torch.Tensor, weight: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor: ...
def cosines(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...
def decode_image(encoded: bytes, name: str) -> numpy.typing.NDArray[numpy.uint8]:
    """
    Decodes a JPEG, PNG, BMP or WebP to uint8 (height, width, 3), as Pillow's
    convert('RGB'). ValueError naming `name` when corrupt or truncated.
    """

def describe_options() -> dict:
    """
    Every option: key, type, default, allowed, doc.
    """

def forgetting(accuracy_matrix: torch.Tensor) -> float:
    """
    Mean over tasks k < T - 1 of max_{i < T - 1} a[i][k] - a[T-1][k]; 0 for T = 1.
    """

def freeze_important(
    mask: torch.Tensor,
    score: torch.Tensor,
    threshold: typing.SupportsFloat | typing.SupportsIndex,
    of_new: bool = False,
    rule: str = "exact",
) -> torch.Tensor:
    """
    The masks of the next task: 1 free, 0 frozen.
    """

def fuse(
    kind: str,
    channel: torch.Tensor,
    patch: torch.Tensor,
    parameters: collections.abc.Mapping[str, torch.Tensor],
    section: typing.SupportsInt | typing.SupportsIndex,
    heads: typing.SupportsInt | typing.SupportsIndex = 8,
    head_mask: torch.Tensor | None = None,
    dropout: typing.SupportsFloat | typing.SupportsIndex = 0.0,
) -> torch.Tensor: ...
def gaussian_drift(
    before: torch.Tensor,
    after: torch.Tensor,
    prototypes: torch.Tensor,
    sigma: typing.SupportsFloat | typing.SupportsIndex,
    floor: typing.SupportsFloat | typing.SupportsIndex = 1e-05,
) -> torch.Tensor:
    """
    Shift of old prototypes (RAA 5.2): (n, D), (n, D), (k, D) -> (k, D).
    """

def kmeans(
    x: torch.Tensor, centers: torch.Tensor, rounds: typing.SupportsInt | typing.SupportsIndex = 300
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Lloyd: centers, labels.
    """

def kmeans_plus_plus(x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """
    First centers: x (n, C), draws (k) uniform in [0, 1) -> (k or fewer, C).
    """

def learning_rate_at(
    options: dict,
    base: typing.SupportsFloat | typing.SupportsIndex,
    epoch: typing.SupportsInt | typing.SupportsIndex,
    epochs: typing.SupportsInt | typing.SupportsIndex,
) -> float:
    """
    Learning rate of an epoch of a task under a schedule (cosine, multistep, constant).
    """

def list_in_use(
    frozen_lists: typing.SupportsInt | typing.SupportsIndex,
    task: typing.SupportsInt | typing.SupportsIndex,
    tasks: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def lora_pass(
    vit: VisionTransformer,
    images: torch.Tensor,
    down: collections.abc.Mapping[str, torch.Tensor],
    up: collections.abc.Mapping[str, torch.Tensor],
    omega: collections.abc.Mapping[str, torch.Tensor],
    current: torch.Tensor,
    old: torch.Tensor,
    probes: torch.Tensor | None = None,
) -> torch.Tensor: ...
def make_array_store(
    images: torch.Tensor,
    labels: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
) -> ImageStore:
    """
    Images in memory, uint8 (n, height, width, 3).
    """

def make_file_store(
    paths: collections.abc.Sequence[str],
    labels: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
) -> ImageStore:
    """
    One encoded image file per path.
    """

@typing.overload
def make_optimizer(options: dict, groups: collections.abc.Sequence[ParameterGroup]) -> Optimizer:
    """
    The optimiser options['optimizer'] (sgd, adam, adamw, sam, sam+) over parameter groups; its learning rate is 0 until one is set.
    """

@typing.overload
def make_optimizer(options: dict, parameters: collections.abc.Sequence[torch.Tensor]) -> Optimizer:
    """
    The same over one group of parameters.
    """

def make_zip_store(
    zip_path: str,
    entries: collections.abc.Sequence[ZipEntry],
    labels: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
) -> ImageStore:
    """
    Images inside a zip archive; entries are read when asked for.
    """

def mean_factors(
    tasks: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    task: typing.SupportsInt | typing.SupportsIndex,
    lowest: typing.SupportsFloat | typing.SupportsIndex,
) -> list[float]: ...
def merged_branches(branches: collections.abc.Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """
    Their mean: (n, L, ...) -> (L, ...) of each kind.
    """

def numpy_permutation(
    seed: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex
) -> list[int]:
    """
    numpy.random.RandomState(seed).permutation(n), bit for bit.
    """

def old_basis(
    prototypes: torch.Tensor, limit: typing.SupportsInt | typing.SupportsIndex
) -> torch.Tensor: ...
def patch_pass(
    vit: VisionTransformer,
    images: torch.Tensor,
    prompts: collections.abc.Mapping[str, torch.Tensor],
    scale: typing.SupportsFloat | typing.SupportsIndex,
    trace: bool = False,
) -> dict: ...
def plain_pass(vit: VisionTransformer, images: torch.Tensor, trace: bool = False) -> dict: ...
def resample(
    array: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8],
    height: typing.SupportsInt | typing.SupportsIndex,
    width: typing.SupportsInt | typing.SupportsIndex,
    filter: str,
    box: typing.Annotated[
        collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], "FixedSize(4)"
    ]
    | None = None,
) -> numpy.typing.NDArray[numpy.uint8]:
    """
    Resizes uint8 pixels (height, width, 3), or the box (left, top, right, bottom) of them,
    equal to Pillow's Image.resize bit for bit. filter: 'bilinear' or 'bicubic'.
    """

def running_mean_(
    previous: collections.abc.Sequence[torch.Tensor],
    current: collections.abc.Sequence[torch.Tensor],
    n: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    previous <- n/(n+1) previous + 1/(n+1) current, tensor by tensor.
    """

def sam_plus_gamma(
    cos: torch.Tensor, tau: typing.SupportsFloat | typing.SupportsIndex
) -> torch.Tensor:
    """
    SAM+: clamp(tau (1 - exp(cos - 1)), 0, 1).
    """

def schedule_learning_rates(
    optimizer: Optimizer,
    options: dict,
    base: typing.SupportsFloat | typing.SupportsIndex,
    epoch: typing.SupportsInt | typing.SupportsIndex,
    epochs: typing.SupportsInt | typing.SupportsIndex,
) -> float:
    """
    Sets every group's rate from base times its learning_rate_scale; all share the floor.
    """

def section_drift(
    before: torch.Tensor,
    after: torch.Tensor,
    prototypes: torch.Tensor,
    section_width: typing.SupportsInt | typing.SupportsIndex,
    tau: typing.SupportsFloat | typing.SupportsIndex,
) -> torch.Tensor:
    """
    Shift of old prototypes by section (NTK-CL): (n, D), (n, D), (k, D) -> (k, D).
    """

def shares_of(uniform: torch.Tensor, kind: str = "uniform_norm") -> torch.Tensor: ...
def signed_direction(basis: torch.Tensor) -> torch.Tensor: ...
def split_classes(
    n_classes: typing.SupportsInt | typing.SupportsIndex,
    initial: typing.SupportsInt | typing.SupportsIndex,
    increment: typing.SupportsInt | typing.SupportsIndex,
) -> list[int]:
    """
    Classes of each task: [initial, increment, increment, ..., rest]. ValueError for sizes that leave no sensible split.
    """

def stream_adapters(
    hidden: torch.Tensor,
    branches: collections.abc.Sequence[torch.Tensor],
    alpha: torch.Tensor,
    mode: str,
) -> torch.Tensor:
    """
    What adapters (n, 1, ...) and their mixture add to hidden (n + 1, b, T, C).
    """

def stream_block(
    vit: VisionTransformer,
    x: torch.Tensor,
    branches: collections.abc.Sequence[torch.Tensor],
    alpha: torch.Tensor,
    mode: str,
    block: typing.SupportsInt | typing.SupportsIndex,
    scale: typing.SupportsFloat | typing.SupportsIndex,
) -> torch.Tensor:
    """
    One block of all streams (n + 1, b, T, C).
    """

def stream_pass(
    vit: VisionTransformer,
    images: torch.Tensor,
    branches: collections.abc.Sequence[torch.Tensor],
    alpha: torch.Tensor,
    mode: str,
    scale: typing.SupportsFloat | typing.SupportsIndex,
    masks: collections.abc.Sequence[torch.Tensor] = [],
    dropout: typing.SupportsFloat | typing.SupportsIndex = 0.0,
) -> torch.Tensor:
    """
    Class features (streams, b, C) of branches (n, L, ...) [down weight, bias, up weight, bias] and their mixture by alpha (L, n).
    """

def summarize(evaluations: collections.abc.Sequence[Evaluation]) -> Summary:
    """
    Metrics of a run from the evaluations after tasks 0 .. T - 1.
    """

def tasks_of_classes(
    sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    kind: str = "cumulative",
) -> list[int]: ...
def votes(tasks: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """
    The most frequent task of each group, for its members: (n), (n) -> (n).
    """

__version__: str
build_info: dict
fusion_kinds: list = ["attention", "concat", "multimodal", "vae", "lstm", "gru", "cross_attention"]
