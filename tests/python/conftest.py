"""What all tests share: where real data is, and how many threads torch takes."""

import os
from pathlib import Path

import pytest

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
