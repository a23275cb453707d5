import os

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    """A GPU. With NTKCL_REQUIRE_CUDA=1 its absence is a failure, so that a GPU job cannot pass by
    skipping."""
    if not torch.cuda.is_available():
        if os.environ.get("NTKCL_REQUIRE_CUDA") == "1":
            pytest.fail("NTKCL_REQUIRE_CUDA=1, but torch sees no GPU")
        pytest.skip("torch sees no GPU")
    return torch.device("cuda")
