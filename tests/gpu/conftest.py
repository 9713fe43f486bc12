"""Where kernels for a GPU are tested: on one, if there is one, or else in Triton's interpreter.

Which of the two is settled for the whole process when Triton and a kernel are imported, so the
environment says it before any test does that, and keeps it.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "something imported Triton before it was to interpret"
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """Where kernels of this process run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
