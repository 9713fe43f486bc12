"""What a chunk takes beside weights and cache, counted, and what `device_memory` expects of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from ktransformers import optimize_and_load
from ktransformers.cache import LatentCache
from ktransformers.operators.kernels import int4_linear
from ktransformers.operators.kernels.launch import as_multiplied
from ktransformers.prefill import prefill
from ktransformers.research.device_memory import activation_bytes
from tiny_models import random_model, v3_config

TOKENS = 64
OPERATORS = "ktransformers.operators"
INT4 = {"group_size": 32}
ATTENTION: dict[str, tuple[str, dict[str, int]]] = {
    r"\.self_attn$": ("gpu_attention.GpuMlaAttention", {}),
    r"\.self_attn\.(q_a|q_b|o)_proj$": ("linear.Int4Linear", INT4),
}
MLP: dict[str, tuple[str, dict[str, int]]] = {
    r"\.mlp\.(shared_experts\.)?(gate|up|down)_proj$": ("linear.Int4Linear", INT4),
    r"\.mlp\.experts$": ("experts.Int4Experts", INT4),
}


class Peak(TorchDispatchMode):
    """Counts the bytes that torch's operations allocate and nobody has freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.live: dict[int, int] = {}
        self.most = 0
        self.counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage._cdata for storage in _storages(args)}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out) if self.counts else ():
            if storage._cdata not in known and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.live.values()))
        return out

    def without(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same uncounted."""

        def uncounted(*args: Any, **kwargs: Any) -> Any:
            self.counts = False
            try:
                return function(*args, **kwargs)
            finally:
                self.counts = True

        return uncounted


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()


def loaded(
    taken: dict[str, tuple[str, dict[str, int]]],
    device: torch.device,
    dtype: torch.dtype,
    **sizes: int,
) -> Any:
    rules = [
        {
            "match": {"name": name},
            "replace": {
                "class": f"{OPERATORS}.{operator}",
                "kwargs": {"device": str(device), **kwargs},
            },
        }
        for name, (operator, kwargs) in taken.items()
    ]
    plain = random_model(v3_config(num_hidden_layers=2, **sizes), dtype=dtype)
    return optimize_and_load(plain, rules)


def counted(monkeypatch: pytest.MonkeyPatch) -> Peak:
    """Return what counts all but the interpreter's own copies of arguments."""
    peak = Peak()
    monkeypatch.setattr(GridExecutor, "__call__", peak.without(GridExecutor.__call__))
    return peak


def test_attention_takes_no_more_than_is_expected(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    model = loaded(ATTENTION, device, torch.bfloat16, **heads)
    cache = LatentCache.for_model(model, 2 * TOKENS)
    ids = torch.arange(TOKENS)[None]
    prefill(model, ids[:, :1], cache)  # its memory is reserved
    peak = counted(monkeypatch)
    # The interpreter multiplies copies in fp32.
    monkeypatch.setattr(int4_linear, "as_multiplied", peak.without(as_multiplied))
    with peak:
        prefill(model, ids, cache, chunk_size=TOKENS)
    expected = activation_bytes(model, TOKENS, with_experts=True)
    assert 0.5 * expected < peak.most <= expected


@pytest.mark.parametrize(
    ("layer", "sizes"), [(0, {"intermediate_size": 512}), (1, {"moe_intermediate_size": 128})]
)
def test_a_dense_mlp_and_experts_take_no_more_than_is_expected(
    layer: int, sizes: dict[str, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In fp16, which the interpreter multiplies as it is.
    model = loaded(MLP, device, torch.float16, **sizes)
    x = torch.randn(1, TOKENS, 64).to(device, torch.float16)
    with torch.no_grad(), counted(monkeypatch) as peak:
        model.model.layers[layer].mlp(x)
    expected = activation_bytes(model, TOKENS, with_experts=True)
    assert 0.5 * expected < peak.most <= expected
