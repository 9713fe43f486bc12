"""Where kernels for a GPU are tested: on one, if there is one, or else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where kernels of this process run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
