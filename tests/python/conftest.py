"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real weights and images, beside the checkout or at NTKCL_ASSETS_DIR."""
    folder = Path(
        os.environ.get("NTKCL_ASSETS_DIR") or REPOSITORY.parent / "shared" / "assets"
    ).resolve()
    if not folder.is_dir():
        reason = f"real weights and images are not at {folder} (set NTKCL_ASSETS_DIR)"
        if os.environ.get("NTKCL_REQUIRE_ASSETS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
