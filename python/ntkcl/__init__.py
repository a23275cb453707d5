"""Continual learning with parameter-efficient fine-tuning of vision transformers."""

import ntkcl._torch_check  # noqa: F401  # first of all
from ntkcl import _C as _C

__version__: str = _C.__version__
