"""Continual learning with parameter-efficient fine-tuning of vision transformers.

import ntkcl
result = ntkcl.train()                      # the embedded default, under a minute
result = ntkcl.train(preset="ntk-cl/cifar100-in21k", data_root="~/data")
"""

from ntkcl import _torch_check as _torch_check  # first of all

# isort: split
from ntkcl import _C as _C
from ntkcl.api import info, list_datasets, resume, train
from ntkcl.backbones import list_backbones
from ntkcl.config import Config
from ntkcl.methods import Method, Task, list_methods, register
from ntkcl.model import Model, Predictions, evaluate, load
from ntkcl.presets import list_presets
from ntkcl.reporting import report
from ntkcl.result import Evaluation, Result, Results
from ntkcl.seeds import load_result
from ntkcl.sweeping import SweepError, sweep

__version__: str = _C.__version__
__all__ = [
    "Config",
    "Evaluation",
    "Method",
    "Model",
    "Predictions",
    "Result",
    "Results",
    "SweepError",
    "Task",
    "evaluate",
    "info",
    "list_backbones",
    "list_datasets",
    "list_methods",
    "list_presets",
    "load",
    "load_result",
    "register",
    "report",
    "resume",
    "sweep",
    "train",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
