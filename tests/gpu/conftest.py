"""Where kernels for a GPU are tested: on one, if there is one, or else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from compiled_kernels import Case, cases, job
from triton_aot import Compiled, compile_all


@pytest.fixture
def device() -> torch.device:
    """Where kernels of this process run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def compiled() -> dict[Case, Compiled]:
    """Every kernel for every GPU, compiled once for all tests."""
    found = cases()
    return dict(zip(found, compile_all([job(case) for case in found]), strict=True))
