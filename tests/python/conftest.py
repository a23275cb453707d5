"""What all tests share: where real data is, and whether there is a GPU."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real weights and images: $NTKCL_ASSETS_DIR, or shared/assets beside a checkout.

    The test is skipped where it is missing, and fails with NTKCL_REQUIRE_ASSETS=1.
    """
    folder = Path(os.environ.get("NTKCL_ASSETS_DIR", ROOT.parent / "shared" / "assets"))
    if folder.is_dir():
        return folder
    reason = f"no real data: {folder} is no folder (set NTKCL_ASSETS_DIR)"
    if os.environ.get("NTKCL_REQUIRE_ASSETS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def cuda() -> torch.device:
    """A GPU.

    With NTKCL_REQUIRE_CUDA=1 its absence is a failure, so that a GPU job cannot pass by skipping.
    """
    if not torch.cuda.is_available():
        if os.environ.get("NTKCL_REQUIRE_CUDA") == "1":
            pytest.fail("NTKCL_REQUIRE_CUDA=1, but torch sees no GPU")
        pytest.skip("torch sees no GPU")
    return torch.device("cuda")
