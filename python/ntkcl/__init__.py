"""Continual learning with parameter-efficient fine-tuning of vision transformers."""

import torch  # noqa: F401  # loads libtorch before our libraries

from ntkcl import _C as _C

__version__: str = _C.__version__
