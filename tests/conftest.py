"""What all tests share: tiny models, no network, and where kernels for a GPU run.

No test reaches for a network: what tries to is stopped, and its test fails. An audit hook sees
every connection and every look-up of a host's name in this process, whatever library makes it.
Raising is not enough: libraries that reach for a hub fall back in silence.

Without a GPU Triton's kernels are interpreted. That is settled for a whole process when Triton is
imported, which torch does when transformers is, so the environment says it before.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import PreTrainedConfig, PreTrainedModel

from tiny_models import v2_config, v3_config

LOCAL = {None, "", "127.0.0.1", "::1", "localhost", "0.0.0.0"}

attempts: list[str] = []


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if host not in LOCAL:
        attempts.append(f"{event} {host}")
        raise OSError(f"tests use no network, but something reached for {host}")


# A shell that runs tests in the background ignores SIGINT, and every process below would inherit
# that: the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A hook can't be taken away again: it stays for the whole process.
sys.addaudithook(_refuse_network)


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """Fail a test that reached for a network."""
    attempts.clear()
    yield
    assert attempts == []


@pytest.fixture(params=["v2", "v3"])
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    """Both structures, one after the other."""
    return v3_config() if request.param == "v3" else v2_config()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write a model as a HuggingFace folder."""

    def write(model: PreTrainedModel, name: str = "model", **kwargs: Any) -> Path:
        folder = tmp_path / name
        model.save_pretrained(folder, **kwargs)
        return folder

    return write
