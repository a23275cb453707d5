"""What the accuracy benchmark runs, and the file that it records runs in.

Everything that decides an accuracy stands in the tables `PROTOCOLS` and `RUNS`; one `Case` is one
call of `ntkcl.train`.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ntkcl.config import PLACE_KEYS, resolve

Record = dict[str, Any]

_THREE_EPOCHS = {"initial_classes": 10, "increment": 10, "epochs": 3}


@dataclass(frozen=True)
class Protocol:
    """Data, weights and training that all runs share."""

    name: str
    about: str
    dataset: str = "cifar100_100tr20te.zip"  # in the assets folder, unless --data names another
    backbone: str = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    weights: str | None = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"
    train_per_class: int | None = None  # none: all
    test_per_class: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: Mapping[str, Any] = field(default_factory=lambda: _THREE_EPOCHS)


@dataclass(frozen=True)
class Run:
    """A method, a variant, and what differs from it."""

    method: str
    variant: str
    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "cpu",
            "CIFAR-100, 40 training and 10 test images a class, ViT-Ti/16 at 224 pixels, "
            "10 tasks of 10 classes, 3 epochs; the backbone's products in bfloat16",
            train_per_class=40,
            test_per_class=10,
            settings=_THREE_EPOCHS | {"precision": "bfloat16"},
        ),
        Protocol(
            "full",
            "CIFAR-100, 100 training and 20 test images a class, ViT-Ti/16 at 224 pixels, "
            "10 tasks of 10 classes, 3 epochs; for a GPU",
        ),
    )
}

_CIFAR100 = {"ntk_cl.eta": 0.03}  # published for CIFAR-100; all else is the library's default


def _release(about: str, **options: Any) -> Run:
    return Run("ntk-cl", "release", about, _section(options))


def _corrected(about: str, **options: Any) -> Run:
    return Run("ntk-cl", "corrected", about, _section(options))


def _both(about: str, **options: Any) -> Run:
    return _corrected(f"both sub-networks, {about}", mode="both", **options)


def _section(options: Mapping[str, Any]) -> dict[str, Any]:
    return _CIFAR100 | {f"ntk_cl.{key}": value for key, value in options.items()}


_NO_INFERENCE = {"lorac_ipc.inference": "none", "lorac_ipc.alignment": False}
_NO_IPC = {"lorac_ipc.ipc_threshold": 0.0}

# Published for CIFAR-100 (the defaults, and rho), but for the epochs, which are those of all runs.
_RAA_CIFAR100 = {"rho": 0.01, "initial_epochs": 0}
_ONE_ADAPTER = {"raa.n_adapters": 1, "raa.amalgamation": "none"}


def _raa(about: str, variant: str = "corrected", **settings: Any) -> Run:
    named = {key.replace("raa_", "raa."): value for key, value in settings.items()}
    return Run("raa", variant, about, _RAA_CIFAR100 | named)


NORMALIZATIONS = ("none", "weights")
# One seed is enough for the rows between nothing and all of RAA.
_ABLATION = (
    "raa-amalgamation",
    "raa-sam",
    "raa-sam+",
    "raa-code",
    "raa-no-drift",
    "raa-no-alignment",
)
# RAA's drift and alignment in the other methods, and what these are without.
_BORROWED = (
    "corrected-no-drift",
    "corrected-raa-drift",
    "corrected-alignment",
    "lorac-ipc-last",
    "lorac-ipc-last-drift",
    "lorac-ipc-raa-alignment",
)
# The main comparison: names in RUNS, and the inputs that each is run with.
MAIN: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("simple-cil", "release", "corrected"), NORMALIZATIONS),
    **dict.fromkeys(("lorac-plain", "lorac-ipc-plain", "lorac", "lorac-ipc"), ("weights",)),
    **dict.fromkeys(("raa-nothing", "raa", *_ABLATION), ("weights",)),
    **dict.fromkeys(_BORROWED, ("weights",)),
}


def main_seeds(name: str, protocol: Protocol) -> tuple[int, ...]:
    """Seeds of a run of the main comparison."""
    return protocol.seeds[:1] if name in _ABLATION else protocol.seeds


RUNS: Mapping[str, Run] = {
    "simple-cil": Run("simple-cil", "corrected", "class means of the frozen backbone"),
    "release": _release("NTK-CL as released"),
    "corrected": _corrected("NTK-CL with its defects repaired"),
    "lorac-plain": Run(
        *("lorac-ipc", "corrected", "LoRAC without task inference and alignment"),
        _NO_IPC | _NO_INFERENCE,
    ),
    "lorac-ipc-plain": Run(
        *("lorac-ipc", "corrected", "LoRAC+IPC without task inference and alignment"),
        _NO_INFERENCE,
    ),
    "lorac": Run("lorac-ipc", "corrected", "LoRAC", _NO_IPC),
    "lorac-ipc": Run("lorac-ipc", "corrected", "LoRAC+IPC"),
    # Baselines by their defaults.
    "ranpac": Run("ranpac", "corrected", "RanPAC"),
    "ease": Run("ease", "corrected", "EASE"),
    "fine-tune": Run("fine-tune", "corrected", "fine-tuning, the lower bound"),
    "fine-tune-task": Run(
        *("fine-tune", "corrected", "fine-tuning, each loss over the task's classes"),
        {"fine_tune.loss": "task"},
    ),
    "joint": Run("joint", "corrected", "joint training on all images so far, the upper bound"),
    # Settings of LoRAC+IPC, for held-out images.
    "lorac-ipc-lr-0.002": Run(
        *("lorac-ipc", "corrected", "learning rate 0.002"), {"learning_rate": 0.002}
    ),
    "lorac-ipc-lr-0.01": Run(
        *("lorac-ipc", "corrected", "learning rate 0.01"), {"learning_rate": 0.01}
    ),
    "raa-nothing": _raa("one adapter, SGD: SSIAT", optimizer="sgd", **_ONE_ADAPTER),
    "raa-amalgamation": _raa("RAA without SAM", optimizer="sgd"),
    "raa-sam": _raa("one adapter, SAM", optimizer="sam", **_ONE_ADAPTER),
    "raa-sam+": _raa("one adapter, SAM+", **_ONE_ADAPTER),
    "raa": _raa("RAA: amalgamation and SAM+"),
    "raa-code": _raa("RAA, the branches' outputs mixed", raa_amalgamation="code"),
    "raa-release": _raa("RAA as released", variant="release"),
    "raa-no-drift": _raa("RAA without drift compensation", raa_drift="off"),
    "raa-no-alignment": _raa("RAA without drift compensation and alignment", raa_alignment=False),
    "corrected-raa-drift": _corrected("NTK-CL with RAA's drift", drift="paired"),
    "corrected-alignment": _corrected("NTK-CL with RAA's alignment", alignment=True),
    "lorac-ipc-last": Run(
        *("lorac-ipc", "corrected", "LoRAC+IPC, every image by the last weights"),
        {"lorac_ipc.inference": "none"},
    ),
    "lorac-ipc-last-drift": Run(
        *("lorac-ipc", "corrected", "the same with RAA's drift"),
        {"lorac_ipc.inference": "none", "lorac_ipc.drift": "paired"},
    ),
    "lorac-ipc-raa-alignment": Run(
        *("lorac-ipc", "corrected", "LoRAC+IPC with RAA's alignment"),
        {"lorac_ipc.alignment_recipe": "raa"},
    ),
    "lorac-ipc-full": Run(
        *("lorac-ipc", "corrected", "LoRAC+IPC aligned on one full Gaussian a class"),
        {"lorac_ipc.alignment_covariance": "full"},
    ),
    # Settings of RAA and of its baseline, for held-out images.
    "raa-lr-0.003": _raa("RAA, learning rate 0.003", learning_rate=0.003),
    "raa-lr-0.03": _raa("RAA, learning rate 0.03", learning_rate=0.03),
    "raa-nothing-lr-0.003": _raa(
        "SSIAT, learning rate 0.003",
        **{"optimizer": "sgd", "learning_rate": 0.003, **_ONE_ADAPTER},
    ),
    "raa-batch-16": _raa("RAA, batch 16", batch_size=16),
    "raa-nothing-batch-16": _raa("SSIAT, batch 16", optimizer="sgd", batch_size=16, **_ONE_ADAPTER),
    "raa-nothing-batch-16-lr-0.03": _raa(
        "SSIAT, batch 16, learning rate 0.03",
        **{"optimizer": "sgd", "batch_size": 16, "learning_rate": 0.03, **_ONE_ADAPTER},
    ),
    # One repair added to the release.
    "release-gated-prompts": _release("prompts that learn", prompts="gated"),
    "release-cross-attention": _release("fusion by cross-attention", fusion="cross_attention"),
    "release-projection": _release("L_orth as a projection", orth="projection"),
    "release-infonce": _release("L_dis as InfoNCE", dissimilarity="infonce"),
    "release-sigma-16": _release(
        "head's scale 16, not decayed", head_sigma_init=16.0, head_sigma_decays=False
    ),
    "release-scale-1": _release("adapters' scale 1", channel_scale=1.0),
    "release-drift": _release("drift compensation", drift_compensation=True),
    # One repair taken from the corrected variant.
    "corrected-sigma-1": _corrected(
        "head's scale 1, decayed", head_sigma_init=1.0, head_sigma_decays=True
    ),
    "corrected-scale-0.1": _corrected("adapters' scale 0.1", channel_scale=0.1),
    "corrected-no-drift": _corrected("NTK-CL without drift compensation", drift_compensation=False),
    # Other choices within it.
    "corrected-both": _corrected("both sub-networks and their fusion", mode="both"),
    "corrected-float32": Run(
        "ntk-cl", "corrected", "every product in float32", _CIFAR100 | {"precision": "auto"}
    ),
    "corrected-float8": Run(
        "ntk-cl",
        "corrected",
        "the backbone's products of 8-bit numbers",
        _CIFAR100 | {"precision": "float8"},
    ),
    "corrected-patch": _corrected("patch sub-network alone", mode="patch"),
    "corrected-pretrained": _corrected(
        "with the plain backbone's section", pretrained_feature=True
    ),
    "corrected-scale-0.3": _corrected("adapters' scale 0.3", channel_scale=0.3),
    "corrected-sigma-8": _corrected("head's scale 8", head_sigma_init=8.0),
    "corrected-later-lr-0.1": _corrected("learning rate x 0.1 after task 1", later_lr_factor=0.1),
    "corrected-first-task": _corrected("trained in the first task alone", first_task_only=True),
    # With both sub-networks: one repair taken away, or another choice.
    "both-dead-prompts": _both("prompts dead", prompts="dead"),
    "both-attention": _both("fusion as released", fusion="attention"),
    "both-signed-sum": _both("L_orth as released", orth="signed_sum"),
    "both-release-dis": _both("L_dis as released", dissimilarity="release"),
    "both-prompt-scale-1": _both("prompts' scale 1", prompt_scale=1.0),
    "both-eta-0": _both("no L_dis", eta=0.0),
    "both-eta-0.2": _both("eta 0.2", eta=0.2),
    "both-upsilon-0": _both("no L_orth", upsilon=0.0),
}

# Keys of places and of speed.
_NOT_COMPUTED = PLACE_KEYS | {"device", "threads", "seeds"}


@dataclass(frozen=True)
class Case:
    """One call of `ntkcl.train`, but for places and threads."""

    protocol: Protocol
    name: str  # in RUNS
    normalize: str
    seed: int
    validation: float = 0.0  # share of the training images that stands in for the test images

    def keywords(self) -> dict[str, Any]:
        """What `ntkcl.train` is called with; files by their bare names."""
        run = RUNS[self.name]
        limits = {
            "train_per_class": self.protocol.train_per_class,
            "test_per_class": self.protocol.test_per_class,
            "weights": self.protocol.weights,
        }
        return {
            "method": run.method,
            "variant": run.variant,
            "dataset": self.protocol.dataset,
            "backbone": self.protocol.backbone,
            "normalize": self.normalize,
            "seed": self.seed,
            "validation_fraction": self.validation,
            **{key: value for key, value in limits.items() if value is not None},
            **self.protocol.settings,
            **run.settings,
        }

    def settings(self) -> dict[str, Any]:
        """Every key that decides what is computed, defaults included; files by their bare names."""
        given = self.keywords()
        flat = resolve(given).flat() | {key: given.get(key) for key in ("dataset", "weights")}
        return {key: value for key, value in flat.items() if key not in _NOT_COMPUTED}

    def command(self, threads: int) -> str:
        """The command that does this run alone."""
        parts = [f"python benchmarks/accuracy.py --protocol {self.protocol.name}"]
        if self.protocol.dataset != PROTOCOLS[self.protocol.name].dataset:
            parts.append(f"--data {self.protocol.dataset}")
        if self.validation:
            parts.append(f"--validation {self.validation}")
        parts.append(f"--only {self.name} --normalize {self.normalize} --seeds {self.seed}")
        return " ".join([*parts, f"--threads {threads}"])

    def is_recorded_by(self, record: Record) -> bool:
        """Whether `record` is of this case, with today's settings.

        Keys that only one side knows are passed over: an option added to the library later leaves
        by its default what there was.
        """
        about = (self.protocol.name, self.name, self.normalize, self.seed)
        if about != tuple(record[key] for key in ("protocol", "name", "normalize", "seed")):
            return False
        settings = self.settings()
        shared = settings.keys() & record["settings"].keys()
        return all(settings[key] == record["settings"][key] for key in shared)


def find_record(case: Case, records: list[Record]) -> Record | None:
    """The latest record of a case."""
    return next((record for record in reversed(records) if case.is_recorded_by(record)), None)


def read_records(path: Path) -> list[Record]:
    """Records of a file, none where there is no file; ValueError names a line that is broken."""
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"[accuracy] {path}, line {number}: expected a record as JSON, got {error}; "
                "a write was cut short: remove the line"
            ) from None
    return records


def append_record(path: Path, record: Record) -> None:
    """Adds a line to a file in one write, safe beside other processes that do the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        if os.write(file, line) != len(line):
            os.ftruncate(file, size)
            raise OSError(f"[accuracy] could not write a whole record to {path}: no space left")
        os.fsync(file)
    finally:
        os.close(file)
