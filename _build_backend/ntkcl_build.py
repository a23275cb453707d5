"""The build backend: scikit-build-core, with torch added only where the target has none."""

import subprocess
import sys

from scikit_build_core import build as _skb
from scikit_build_core.build import *  # noqa: F403

_TORCH = "torch>=2.11,<3"


def _torch_if_missing() -> list[str]:
    # -E: under pip's build isolation this is the environment that pip installs into.
    probe = [sys.executable, "-E", "-c", "import torch"]
    return [] if subprocess.run(probe, capture_output=True).returncode == 0 else [_TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return [*_skb.get_requires_for_build_wheel(config_settings), *_torch_if_missing()]


def get_requires_for_build_editable(config_settings=None):
    return [*_skb.get_requires_for_build_editable(config_settings), *_torch_if_missing()]
