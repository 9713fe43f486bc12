"""Packages for latent attention that are not installed: their functions, computed by references.

They take what the real ones take and refuse what those refuse, as their sources say: FlashMLA 1.0.0
and its interface of 2025, flashinfer-python 0.7.2. What they planned for they hold on to, so that a
plan for other lengths gives other numbers.

Shape suffixes: B sequences, T queries of each, H heads, L keys, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

from ktransformers.cache import LatentPages
from ktransformers.operators.kernels.mla_prefill import mla_prefill_reference


def install(monkeypatch: pytest.MonkeyPatch, name: str, version: str, **contents: Any) -> None:
    """Let a module of this name be imported, until the test ends."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(contents, __version__=version)
    monkeypatch.setitem(sys.modules, name, module)


# FlashMLA


@dataclass
class FlashMLASchedMeta:
    """What the first call fills in."""

    lengths: torch.Tensor | None = None


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """Plan nothing yet, whatever is given."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend, with a plan that is made by the first call."""
    assert isinstance(tile_scheduler_metadata, FlashMLASchedMeta)
    assert num_splits is None
    assert not is_fp8_kvcache
    if tile_scheduler_metadata.lengths is None:
        tile_scheduler_metadata.lengths = cache_seqlens.clone()
    planned = tile_scheduler_metadata.lengths
    return _dense(
        q, k_cache, block_table, cache_seqlens, head_dim_v, planned, softmax_scale, causal
    )


def get_mla_metadata_of_2025(
    cache_seqlens: torch.Tensor, num_heads_per_head_k: int, num_heads_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan at once, for so many queries times heads."""
    assert num_heads_k == 1
    return torch.stack((cache_seqlens, cache_seqlens * 0 + num_heads_per_head_k)), cache_seqlens


def flash_mla_with_kvcache_of_2025(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: torch.Tensor,
    num_splits: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with the plan that is given."""
    planned, rows = tile_scheduler_metadata
    assert num_splits.shape == cache_seqlens.shape
    assert rows.tolist() == [q.shape[1] * q.shape[2]] * len(q)
    return _dense(
        q, k_cache, block_table, cache_seqlens, head_dim_v, planned, softmax_scale, causal
    )


def _dense(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    planned: torch.Tensor,
    softmax_scale: float | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, _, width = q.shape
    assert q.dtype == k_cache.dtype == torch.bfloat16
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    assert q.stride(-1) == k_cache.stride(-1) == block_table.stride(-1) == 1
    assert cache_seqlens.is_contiguous()
    assert (width, head_dim_v) == (576, 512)
    assert k_cache.shape[1:] == (64, 1, 576)
    assert k_cache.stride(1) * k_cache.itemsize % 16 == 0  # for TMA
    assert (cache_seqlens.shape, block_table.shape[0]) == ((B,), B)
    assert causal or T == 1
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    # Nothing here is read by Python: a graph may hold all of it.
    keys = k_cache[:, :, 0][block_table.long().clamp_min(0)].flatten(1, 2).float()
    key, query = torch.arange(keys.shape[1]), torch.arange(T)[:, None]
    key, query = key.to(q.device), query.to(q.device)
    keys = keys.where((key < planned[:, None])[..., None], 0)
    seen = key <= cache_seqlens[:, None, None] - T + query  # [B, T, L]
    score = torch.einsum("bthc,blc->bhtl", q.float(), keys) * scale
    weight = score.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bhtl,blc->bthc", weight, keys[..., :head_dim_v])
    return out.to(q.dtype), score.logsumexp(-1)


# FlashInfer


@dataclass(frozen=True)
class MLAPlanMetadata:
    """Which queries and which pages sequences have."""

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_len_arr: torch.Tensor

    @classmethod
    def csr(
        cls,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
    ) -> MLAPlanMetadata:
        """Take them as lists of all, one after another."""
        return cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr)

    def check(self, page_size: int, device: torch.device) -> None:
        """Refuse what does not fit together."""
        for name, tensor in vars(self).items():
            assert tensor.dtype == torch.int32, name
            assert tensor.ndim == 1, name
            assert tensor.is_contiguous(), name
            assert tensor.device in (torch.device("cpu"), device), name
        for indptr in (self.qo_indptr, self.kv_indptr):
            assert indptr[0] == 0
            assert len(indptr) == len(self.kv_len_arr) + 1
            assert (indptr.diff() >= 0).all()
        assert torch.equal(self.kv_indptr.diff(), -(-self.kv_len_arr // page_size))
        assert self.kv_indptr[-1] <= len(self.kv_indices)


@dataclass
class Plans:
    """What wrappers were told, in order; for tests to look at."""

    made: list[dict[str, Any]] = field(default_factory=list)


class BatchMLAPagedAttentionWrapper:
    """Attends to pages as it was planned for."""

    plans = Plans()

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert not use_cuda_graph
        assert backend in ("fa2", "fa3")
        self.device = float_workspace_buffer.device

    def plan(
        self,
        *,
        metadata: MLAPlanMetadata,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        query_layout: str = "packed",
        kv_cache_layout: str = "packed",
    ) -> None:
        """Copy what is told."""
        assert isinstance(metadata, MLAPlanMetadata)
        metadata.check(page_size, self.device)
        assert q_data_type == kv_data_type == torch.bfloat16
        assert head_dim_ckv % 128 == 0
        assert head_dim_kpe % 64 == 0
        assert 128 % num_heads == 0
        assert causal
        assert query_layout == kv_cache_layout == "split"
        self.told = {name: value.clone() for name, value in vars(metadata).items()}
        self.sizes = num_heads, head_dim_ckv, head_dim_kpe, page_size
        self.sm_scale = sm_scale
        self.plans.made.append(self.told)

    def run(
        self,
        *,
        query: tuple[torch.Tensor, torch.Tensor],
        kv_cache: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Attend, sequence by sequence."""
        H, C, R, page = self.sizes
        told = {name: value.tolist() for name, value in self.told.items()}
        for pair, rest in (
            (query, (told["qo_indptr"][-1], H)),
            (kv_cache, (len(kv_cache[0]), page)),
        ):
            assert type(pair) is tuple
            for tensor, width in zip(pair, (C, R), strict=True):
                assert tensor.dtype == torch.bfloat16
                assert tensor.shape == (*rest, width)
                assert tensor.stride(-1) == 1
        out = torch.empty_like(query[0])
        for b, length in enumerate(told["kv_len_arr"]):
            queries = slice(told["qo_indptr"][b], told["qo_indptr"][b + 1])
            pages = told["kv_indices"][told["kv_indptr"][b] : told["kv_indptr"][b + 1]]
            read = LatentPages(
                kv_cache[0],
                None,
                kv_cache[1],
                torch.tensor([pages], device=self.device),
                torch.tensor([length], device=self.device),
            )
            q_nope, q_pe = (part[queries][None] for part in query)
            one = mla_prefill_reference(q_nope, q_pe, read, scaling=self.sm_scale)
            out[queries] = one[0].to(out.dtype)
        return out


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Install what stands in for `flashinfer`, `flash_mla` or `flash_mla of 2025`."""
    if name == "flashinfer":
        monkeypatch.setattr(BatchMLAPagedAttentionWrapper, "plans", Plans())
        mla: dict[str, Any] = {
            "BatchMLAPagedAttentionWrapper": BatchMLAPagedAttentionWrapper,
            "MLAPlanMetadata": MLAPlanMetadata,
        }
        install(monkeypatch, "flashinfer", "0.7.2.post1")
        install(monkeypatch, "flashinfer.mla", "", **mla)
    elif name == "flash_mla":
        functions: dict[str, Any] = {
            "get_mla_metadata": get_mla_metadata,
            "flash_mla_with_kvcache": flash_mla_with_kvcache,
        }
        install(monkeypatch, "flash_mla", "1.0.0", **functions)
    else:
        functions = {
            "get_mla_metadata": get_mla_metadata_of_2025,
            "flash_mla_with_kvcache": flash_mla_with_kvcache_of_2025,
        }
        install(monkeypatch, "flash_mla", "1.0.0", **functions)
