"""Every kernel test runs on every instruction set, and on those that can be emulated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from native_variants import Variant, variant, variants


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> Iterator[None]:
    """Keep torch's threads, of no use for references this small, from fighting with ours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=variants("quantize_rows"))
def kernels(request: pytest.FixtureRequest) -> Variant:
    """One instruction set after the other; skips, by name, what this process has not got.

    Tests of matrix products say which ones by `format_variants`.
    """
    return variant(request.param)
