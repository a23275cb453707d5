"""A trained model: predict, look at features, test, learn another task, give away.

A folder holds a model if these files are in it; a finished run's does.

    model.json            classes and tasks as they were learned, hashes
    config.toml           the configuration that trained it
    state.safetensors     what the method has learned
    backbone.safetensors  the frozen backbone, in an exported folder; elsewhere it is found as the
                          configuration says, and told by its hash
    program.pt2           on demand: the predictor as a program of torch.export
  model.onnx            on demand: the same for ONNX
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray

from ntkcl import _C
from ntkcl.backbones import Weights, backbone_info, load_backbone, sha256_of
from ntkcl.config import ARRAYS, SEEDS_FILE, Config, options, resolve, to_toml
from ntkcl.datasets import load_test_images
from ntkcl.datasets.loose_images import Images, image_stores, one_store
from ntkcl.files import read_object, read_tensors, safetensors_bytes, write_atomically
from ntkcl.methods import core_method
from ntkcl.names import if_missing, shown
from ntkcl.portable import portable
from ntkcl.progress import make_progress
from ntkcl.ranks import are_several
from ntkcl.result import Evaluation

FORMAT = 1
# Methods that torch.export cannot record, and why.
_NO_PROGRAM = {"lorac-ipc": "it looks at its tensors to decide what to compute"}


class Predictions(NamedTuple):
    """What `Model.predict` gives.

    Attributes:
      labels: the class of each image.
      scores: (n, classes), of all classes as `Model.classes` has them; the largest is the
        prediction.
    """

    labels: list[str]
    scores: NDArray[np.float32]


class ModelFile(pydantic.BaseModel):
    """model.json."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    format: int = FORMAT
    classes: list[str]  # in the order in which they were learned
    task_sizes: list[pydantic.PositiveInt]
    weights_sha256: str
    state_sha256: str

    def content(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()


class _Scores(torch.nn.Module):
    """What torch.export records."""

    def __init__(self, predictor: _C.Predictor, classes: int) -> None:
        super().__init__()
        self._predictor, self._classes = predictor, classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._predictor.scores_of(images)[:, : self._classes]


class Model:
    """A trained model, made by `load`.

    Attributes:
      classes: names of the classes that it knows, in the order in which they were learned.
      task_sizes: how many of them came with each task.
      config: the configuration that trained it.
    """

    def __init__(
        self,
        config: Config,
        classes: Sequence[str],
        task_sizes: Sequence[int],
        weights: Weights,
        state: Mapping[str, torch.Tensor],
        folder: Path,
    ) -> None:
        self.config = config
        self.classes = list(classes)
        self.task_sizes = list(task_sizes)
        self._weights, self._state, self._folder = weights, dict(state), folder
        self._predictor = self._make_predictor()

    def predict(self, images: Images) -> Predictions:
        """The class of each image.

        Args:
          images: a path of an image, or of a folder of images (all below it, by name); an array or
            a tensor, uint8 (h, w, 3) or (n, h, w, 3), or grey (h, w), (n, h, w) or (n, h, w, 1);
            a PIL image; or a list of these.

        Raises:
          FileNotFoundError: no such file, or no image in a folder.
          ValueError, TypeError: an image that cannot be decoded, or an array of another kind.
        """
        scores = np.concatenate([self._scores(store)[0].numpy() for store in image_stores(images)])
        return Predictions([self.classes[c] for c in scores.argmax(1)], scores)

    def features(self, images: Images) -> NDArray[np.float32]:
        """What the classes are told apart by, (n, D), by the weights of the last task; images as
        for `predict`."""
        parts = [self._predictor.features(store) for store in image_stores(images)]
        return torch.cat(parts).float().numpy()

    def evaluate(
        self,
        dataset: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        data_root: str | os.PathLike[str] | None = None,
    ) -> Evaluation:
        """The test after the last task, on the test images of a data set; none: of its own. Test
        images are enough: {"test": (images, labels)}, or a folder with test/<class>/<image>.

        Raises:
          ValueError: the data set has a class that the model does not know; no data set is given,
            and the model's own was arrays.
        """
        if dataset is None and self.config.dataset == ARRAYS:
            raise ValueError(
                "[evaluate] expected the test images again, as a file does not hold the run's "
                'arrays: evaluate(run, dataset={"test": (images, labels)}), got none'
            )
        root = data_root if data_root is not None else self.config.data_root
        with if_missing("if its images have moved, give dataset=<where they are> (--dataset)"):
            found = (
                load_test_images(self.config.dataset, root, self.config.test_per_class)
                if dataset is None
                else load_test_images(dataset, root)
            )
        numbers = {name: number for number, name in enumerate(self.classes)}
        present = {found.class_names[label] for label in found.test.labels}
        if unknown := sorted(present - numbers.keys()):
            raise ValueError(
                f"[evaluate] expected classes that the model knows, got {', '.join(unknown[:5])}"
            )
        labels = [numbers[found.class_names[label]] for label in found.test.labels]
        scores, tasks = self._scores(found.test)
        evaluation = _C.Evaluation(self.task_sizes, len(self.task_sizes) - 1)
        evaluation.add(torch.tensor(labels), scores, tasks)
        return Evaluation.of(
            {name: getattr(evaluation, name) for name in Evaluation.__dataclass_fields__}
        )

    def add_task(
        self,
        images: Mapping[str, Images] | str | os.PathLike[str],
        *,
        test: Mapping[str, Images] | str | os.PathLike[str] | None = None,
        output: str | os.PathLike[str] | None = None,
        progress: bool = False,
        **keys: Any,
    ) -> Evaluation | None:
        """Learns new classes as the next task, without the images of the old ones, and saves.

        Args:
          images: training images of each new class by its name, or a folder <class>/<image>.
          test: test images in the same form, of the new classes; old ones may be there, too.
          output: folder of the extended model; none: task-<number> in the model's own.
          progress: whether to show it.
          **keys: options of training other than those of the run, as `epochs=5`.

        Returns:
          The test after the task; None without test images.

        Raises:
          ValueError: a class is known already; a class without images; a key that does not fit.
          TypeError: images without the names of their classes.
          KeyboardInterrupt: Ctrl-C; the model is as it was.
        """
        if are_several():
            raise ValueError("[add_task] expected a process alone, got one of several ranks")
        config = _with_keys(self.config, keys)
        train = _by_class(images, "images")
        if known := [name for name in train if name in self.classes]:
            raise ValueError(f"[add_task] expected new classes, got {', '.join(known[:5])} again")
        classes = [*self.classes, *train]
        tested = {} if test is None else _by_class(test, "test")
        if missing := [name for name in tested if name not in classes]:
            raise ValueError(
                f"[add_task] 'test': expected old and new classes, got {', '.join(missing[:5])}"
            )
        tasks = len(self.task_sizes)
        folder = self._next_folder(tasks + 1) if output is None else _folder(output, "add_task")
        _check_absent(folder)
        with _in_words_of_add_task(classes), make_progress(progress) as display:
            trainer = _C.Trainer(
                core_method(config.method),
                config.method_options(),
                config.train_options(),
                self._transformer(),
                {
                    "train": one_store(train, classes),
                    "test": one_store(tested, classes),
                    "class_order": list(range(len(classes))),
                    "task_sizes": [*self.task_sizes, len(train)],
                    "finished_classes": len(self.classes),
                },
                config.transform_options(),
                config.loader_options(),
                *config.mean_std(),
            )
            trainer.begin_after(tasks, self._state)
            raw = trainer.run(display)
        self.classes, self.task_sizes = classes, [*self.task_sizes, len(train)]
        self._state = raw["state"]
        self._predictor = self._make_predictor()
        try:
            self._save(folder, with_backbone=False)
        except BaseException as error:
            error.add_note("the task is learned, and not saved: Model.export writes it")
            raise
        self._folder = folder
        return Evaluation.of(raw["evaluations"][-1]) if tested else None

    def export(
        self,
        folder: str | os.PathLike[str],
        *,
        program_batch: int | None = None,
        onnx_batch: int | None = None,
    ) -> Path:
        """Writes the model with its backbone: one folder that `load` reads anywhere.

        Args:
          folder: a new one.
          program_batch: also write `program.pt2` for batches of so many images, see `as_program`.
          onnx_batch: also write `model.onnx` for batches of so many images, see `as_onnx`.

        Raises:
          ValueError: there is something already; a method that cannot be a program.
        """
        more: dict[str, Callable[[Path], None]] = {}
        if program_batch is not None:
            more["program.pt2"] = lambda file: _write_program(self.as_program(program_batch), file)
        if onnx_batch is not None:
            more["model.onnx"] = lambda file: self.as_onnx(onnx_batch).save(file)
        return self._save(_folder(folder, "export"), with_backbone=True, more=more)

    def as_program(self, batch: int = 1) -> torch.export.ExportedProgram:
        """The model as a program of torch.export: uint8 images (batch, 3, S, S), transformed as
        for a test, to scores (batch, classes), on the CPU; with bfloat16 products, in float32.
        It is made of torch's own operators, and runs where ntkcl is not.

        Raises:
          ValueError: the method looks at its tensors to decide what to compute, as LoRAC-IPC does.
        """
        if self.config.method in _NO_PROGRAM:
            raise ValueError(
                f"[as_program] '{self.config.method}' cannot be a program of torch.export: "
                f"{_NO_PROGRAM[self.config.method]}"
            )
        if batch < 1:
            raise ValueError(f"[as_program] 'batch': expected at least 1, got {batch}")
        precision = "float64" if self.config.precision == "float64" else "float32"
        keys = {"device": "cpu", "precision": precision, "cpu_matmul": "default"}
        predictor = self._make_predictor(keys)
        size = self.config.image_size
        example = torch.zeros((batch, 3, size, size), dtype=torch.uint8)
        module = _Scores(predictor, len(self.classes))
        try:
            with torch.no_grad():
                return portable(torch.export.export(module, (example,), strict=False))
        except Exception as error:
            raise ValueError(
                f"[as_program] '{self.config.method}' cannot be a program of torch.export: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error

    def as_onnx(self, batch: int = 1) -> torch.onnx.ONNXProgram:
        """The same as an ONNX model, from the input "images" to the output "scores"; its method
        `save` writes it.

        Raises:
          ImportError: the package onnxscript is missing.
          ValueError: as for `as_program`.
        """
        try:
            import onnxscript  # noqa: F401
        except ImportError:
            raise ImportError(
                "[as_onnx] expected the package onnxscript: pip install ntkcl[onnx]"
            ) from None
        made = torch.onnx.export(
            self.as_program(batch),
            input_names=["images"],
            output_names=["scores"],
            dynamo=True,
            verbose=False,
        )
        assert made is not None  # without a file to write to
        return made

    def __repr__(self) -> str:
        return (
            f"<ntkcl.Model {self.config.method}: {len(self.classes)} classes of "
            f"{len(self.task_sizes)} tasks, '{self._folder}'>"
        )

    def _scores(self, store: _C.ImageStore) -> tuple[torch.Tensor, torch.Tensor | None]:
        scores, tasks = self._predictor.scores(store)
        if scores.shape[1] < len(self.classes):
            raise ValueError(
                f"[load] expected a state of {len(self.classes)} classes, got one of "
                f"{scores.shape[1]} in '{self._folder}'"
            )
        return scores[:, : len(self.classes)].float(), tasks

    def _transformer(self) -> _C.VisionTransformer:
        heads = backbone_info(self.config.backbone).heads
        return _C.VisionTransformer(self._weights.tensors, heads, self.config.image_size)

    def _make_predictor(self, keys: Mapping[str, Any] | None = None) -> _C.Predictor:
        return _C.Predictor(
            core_method(self.config.method),
            self.config.method_options(),
            self.config.train_options() | dict(keys or {}),
            self._transformer(),
            len(self.task_sizes),
            self.config.transform_options(),
            self.config.loader_options(),
            *self.config.mean_std(),
            self._state,
        )

    def _next_folder(self, task: int) -> Path:
        base = self._folder.parent if self._folder.name.startswith("task-") else self._folder
        return base / f"task-{task}"

    def _save(
        self,
        folder: Path,
        with_backbone: bool,
        more: Mapping[str, Callable[[Path], None]] | None = None,
    ) -> Path:
        """Whole or not at all: into a folder beside it, which then gets the name."""
        try:
            _check_absent(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            name = f".{folder.name}."
            work = Path(tempfile.mkdtemp(prefix=name, suffix=".tmp", dir=folder.parent))
        except OSError as error:
            raise OSError(f"[output] cannot write to '{folder}': {error.strerror}") from None
        try:
            state = safetensors_bytes(self._state, {"ntkcl.method": self.config.method})
            write_model(work, state, self.classes, self.task_sizes, self._weights.sha256)
            config = self.config.model_copy(update={"output": None})
            write_atomically(work / "config.toml", to_toml(config).encode())
            if with_backbone:
                shutil.copyfile(self._weights.path, work / "backbone.safetensors")
            for name, write in (more or {}).items():
                write(work / name)
            work.chmod(0o755)
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return folder


def load(
    run: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Model:
    """The trained model of a finished run, of an extended one (`Model.add_task`) or an exported
    one (`Model.export`).

    Args:
      run: its folder.
      weights: safetensors file of the backbone, if it has moved.
      device: where to compute now; none: as in the run.
      threads: how many CPU threads to use; none: as in the run.

    Raises:
      FileNotFoundError: no model there, or its backbone is not found.
      ValueError: a file is damaged, or the backbone is another one.
    """
    path = _folder(run, "load")
    about = _read_about(path)
    moved = {"device": device, "threads": threads}
    given = {key: value for key, value in moved.items() if value is not None}
    config = resolve(given, path / "config.toml", any_method=True)
    chosen = weights or _packed_backbone(path, about.weights_sha256) or config.weights
    with if_missing("if it has moved, give weights=<safetensors file> (--weights)"):
        found = load_backbone(config.backbone, chosen)
    if found.sha256 != about.weights_sha256:
        raise ValueError(
            f"[load] expected the backbone of SHA-256 {about.weights_sha256:.80}, got "
            f"'{found.path}' of {found.sha256}; give weights=<safetensors file>"
        )
    state = _read_state(path / "state.safetensors", about.state_sha256)
    return Model(config, about.classes, about.task_sizes, found, state, path)


def evaluate(
    run: str | os.PathLike[str],
    dataset: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    data_root: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Tests the model of a run on the test images of a data set; see `Model.evaluate`."""
    return load(run).evaluate(dataset, data_root=data_root)


def write_model(
    folder: Path, state: bytes, classes: Sequence[str], task_sizes: Sequence[int], weights: str
) -> None:
    """Writes state.safetensors and model.json."""
    about = ModelFile(
        classes=list(classes),
        task_sizes=list(task_sizes),
        weights_sha256=weights,
        state_sha256=hashlib.sha256(state).hexdigest(),
    )
    write_atomically(folder / "state.safetensors", state)
    write_atomically(folder / "model.json", about.content())


def _folder(given: str | os.PathLike[str], where: str) -> Path:
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"[{where}] expected the path of a folder, got {shown(given)}")
    return Path(given).expanduser()


def _read_about(path: Path) -> ModelFile:
    if not path.is_dir():
        raise FileNotFoundError(f"[load] expected a trained model, got '{path}': no such folder")
    file = path / "model.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"[load] expected a trained model, got no {file}{_where_else(path)}"
        )
    try:
        raw = read_object(file)
        if raw.get("format") != FORMAT:
            got = shown(raw.get("format"))
            raise ValueError(f"'{file}': expected format {FORMAT}, got {got}")
        about = ModelFile.model_validate(raw)
    except pydantic.ValidationError as error:
        raise ValueError(f"[load] '{file}' is damaged: {error.errors()[0]['msg']}") from None
    except ValueError as damage:
        raise ValueError(f"[load] {damage}") from None
    if len(set(about.classes)) != len(about.classes) or sum(about.task_sizes) != len(about.classes):
        raise ValueError(f"[load] '{file}': expected tasks of {len(about.classes)} classes in all")
    return about


def _where_else(path: Path) -> str:
    """What to do about a folder without a model, if it is that of runs."""
    inner = sorted(file.parent for file in path.glob("*/model.json"))
    if inner:
        more = ", ..." if len(inner) > 5 else ""
        return "; there is one in " + ", ".join(f"'{folder}'" for folder in inner[:5]) + more
    begun = any((path / name).is_file() for name in ("config.toml", SEEDS_FILE))
    return f"; finish it with `ntkcl resume {path}`" if begun else ""


def _write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    with warnings.catch_warnings():
        # Parts of a tensor are constants of the program; the program is on the CPU.
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        torch.export.save(program, path)


def _packed_backbone(path: Path, sha256: str) -> Path | None:
    """The backbone of an exported model; a task that was added to it has it in the folder above."""
    beside, above = (folder / "backbone.safetensors" for folder in (path, path.absolute().parent))
    if beside.is_file():
        return beside
    return above if above.is_file() and sha256_of(above) == sha256 else None


def _read_state(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"[load] '{path}' is missing")
    try:
        return read_tensors(path, sha256)
    except ValueError as damage:
        raise ValueError(f"[load] {damage}") from None


def _check_absent(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"[output] expected a new folder, got '{folder}', which is there")


def _with_keys(config: Config, keys: Mapping[str, Any]) -> Config:
    """The configuration with other options of training."""
    group = {info["key"] for info in _C.describe_options()["train"]}
    allowed = (group | {"loader_threads", "prefetch", "on_corrupt", "augment_on"}) - {
        *("initial_classes", "increment", "precision", "validation_fraction")
    }
    section = [option.key for option in options(config.method) if "." in option.key]
    for key in keys:
        if key not in allowed and key not in section:
            raise ValueError(f"[add_task] '{key}': expected an option of training, got no such key")
    known = {key: value for key, value in config.flat().items() if value is not None}
    return resolve(known | {"validation_fraction": 0.0} | dict(keys))


@contextmanager
def _in_words_of_add_task(classes: Sequence[str]) -> Iterator[None]:
    """What ends the training, as the user of `add_task` knows it."""

    def name(number: re.Match[str]) -> str:  # which is what the core knows of a class
        return f"[add_task] class '{classes[int(number[1])]}':"

    try:
        yield
    except KeyboardInterrupt as stop:
        stop.args = ("[add_task] stopped; nothing was saved: the model is as it was",)
        raise
    except ValueError as error:
        error.args = (re.sub(r"^\[train\] class (\d+):", name, str(error)),)
        raise


def _by_class(
    images: Mapping[str, Images] | str | os.PathLike[str], where: str
) -> dict[str, Images]:
    """Images of each class; of a folder, its folders."""
    if not isinstance(images, Mapping | str | os.PathLike):
        raise TypeError(
            f"[add_task] '{where}': expected images by the name of their class, or the path of a "
            f"folder <class>/<image>, got {type(images).__name__}"
        )
    if not isinstance(images, Mapping):
        root = Path(images).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"[add_task] '{where}': no folder '{root}'")
        found = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
        images = {folder.name: str(folder) for folder in found}
    if not images:
        raise ValueError(f"[add_task] '{where}': expected at least one class, got none")
    return {str(name): value for name, value in images.items()}
