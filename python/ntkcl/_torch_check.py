"""Stops the import, with both versions named, where the extension was built against another torch.

Importing this module checks; it comes before anything that loads `ntkcl._C`.
"""

import torch  # also loads libtorch before our libraries

from ntkcl import _build_info

if torch.__version__ != _build_info.TORCH_VERSION:
    raise ImportError(
        f"[ntkcl] expected torch {_build_info.TORCH_VERSION}, which ntkcl was built against, "
        f"got torch {torch.__version__}. Build ntkcl again in this environment "
        "(pip install --force-reinstall --no-deps), or install that torch."
    )
