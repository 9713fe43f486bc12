"""Absorbed latent attention on a GPU, or in Triton's interpreter, against references in fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ktransformers.cache_pages import PAGE_TOKENS as PAGE
from ktransformers.cache_rounding import quantised
from ktransformers.operators.kernels.mla_append import mla_append, mla_append_reference
from ktransformers.operators.kernels.mla_decode import (
    choose_parts,
    mla_decode,
    mla_decode_reference,
)
from ktransformers.operators.kernels.mla_prefill import mla_prefill, mla_prefill_reference
from latent_pages import random_pages, random_queries, sequence, tolerance

LENGTHS = [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5]
KINDS = [  # queries, cache
    (torch.float32, "fp32"),
    (torch.bfloat16, "bf16"),
    (torch.bfloat16, "fp8"),
    (torch.float32, "fp8"),
]
SCALING = 0.2


def on_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.mark.parametrize(
    ("dtype", "format", "H"),
    [*((*kind, 16) for kind in KINDS), *((*KINDS[0], H) for H in (1, 33))],
)
def test_decode_is_the_reference(
    dtype: torch.dtype, format: str, H: int, device: torch.device
) -> None:
    pages = random_pages(LENGTHS, 48, 8, format, device)
    q = random_queries((len(LENGTHS), H, 48), 8, dtype, device)
    got = mla_decode(*q, pages, scaling=SCALING)
    want = mla_decode_reference(*q, pages, scaling=SCALING)
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() <= tolerance(*q, pages, SCALING)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_of_the_keys_are_weighed_by_what_they_sum_up_to(
    parts: int, device: torch.device
) -> None:
    """Some get no keys at all."""
    pages = random_pages(LENGTHS, 32, 16, "fp32", device)
    q = random_queries((len(LENGTHS), 3, 32), 16, torch.float32, device)
    got = mla_decode(*q, pages, scaling=2.0, parts=parts)
    want = mla_decode_reference(*q, pages, scaling=2.0)
    assert (got - want).abs().max() <= tolerance(*q, pages, 2.0)


@pytest.mark.parametrize(
    ("dtype", "format", "T", "H"),
    [*((*kind, 11, 3) for kind in KINDS), (*KINDS[0], 2, 16), (*KINDS[0], 33, 2)],
)
def test_prefill_is_the_reference(
    dtype: torch.dtype, format: str, T: int, H: int, device: torch.device
) -> None:
    """Chunks that begin with the sequence, in a page, and at its border."""
    lengths = [T, PAGE + T, 2 * PAGE - T, 2 * PAGE]
    pages = random_pages(lengths, 32, 16, format, device)
    q = random_queries((4, T, H, 32), 16, dtype, device)
    got = mla_prefill(*q, pages, scaling=SCALING)
    want = mla_prefill_reference(*q, pages, scaling=SCALING)
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() <= tolerance(*q, pages, SCALING)


def test_a_query_sees_no_later_token(device: torch.device) -> None:
    pages = random_pages([PAGE + 3], 32, 8, "fp32", device)
    q = random_queries((1, 6, 2, 32), 8, torch.float32, device)
    before = mla_prefill(*q, pages, scaling=SCALING)
    page = pages.latent[pages.block_table[0, 1].long()]
    page[2] += 5  # the last token
    after = mla_prefill(*q, pages, scaling=SCALING)
    assert torch.equal(after[:, :5], before[:, :5])
    assert not torch.equal(after[:, 5], before[:, 5])


def test_padding_is_not_seen_and_who_sees_nothing_gets_zeros(device: torch.device) -> None:
    lengths, T, H = [PAGE + 9, PAGE + 9, 7], 5, 3
    pages = random_pages(lengths, 32, 8, "fp32", device)
    valid = torch.ones(3, PAGE + 9, dtype=torch.uint8, device=device)
    valid[0, : PAGE + 1] = 0
    valid[1, 40] = 0
    valid[2, :4] = 0  # of the queries at 2 to 6 the first two are padding
    q = random_queries((3, T, H, 32), 8, torch.float32, device)
    bound = tolerance(*q, pages, SCALING)
    got = mla_prefill(*q, pages, scaling=SCALING, valid=valid)
    want = mla_prefill_reference(*q, pages, scaling=SCALING, valid=valid)
    assert (got - want).abs().max() <= bound
    assert not got[2, :2].any()
    valid[2] = 0
    last = (q[0][:, -1], q[1][:, -1])
    decoded = mla_decode(*last, pages, scaling=SCALING, valid=valid, parts=2)
    want = mla_decode_reference(*last, pages, scaling=SCALING, valid=valid)
    assert (decoded - want).abs().max() <= bound
    assert not decoded[2].any()


def test_queries_may_lie_as_a_product_per_head_leaves_them(device: torch.device) -> None:
    pages = random_pages([20, 70], 32, 8, "fp32", device)
    q_latent, q_rope = random_queries((2, 4, 3, 32), 8, torch.float32, device)
    strided = q_latent.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert not strided.is_contiguous()
    want = mla_prefill(q_latent, q_rope, pages, scaling=SCALING)
    assert torch.equal(mla_prefill(strided, q_rope, pages, scaling=SCALING), want)
    one = mla_decode(q_latent[:, -1], q_rope[:, -1], pages, scaling=SCALING)
    assert torch.equal(mla_decode(strided[:, -1], q_rope[:, -1], pages, scaling=SCALING), one)


def test_a_sequence_does_not_depend_on_the_others(device: torch.device) -> None:
    pages = random_pages(LENGTHS, 32, 8, "bf16", device)
    q_latent, q_rope = random_queries((len(LENGTHS), 2, 32), 8, torch.bfloat16, device)
    together = mla_decode(q_latent, q_rope, pages, scaling=SCALING, parts=2)
    for b in (1, 4):
        alone = mla_decode(
            q_latent[b, None], q_rope[b, None], sequence(pages, b), scaling=SCALING, parts=2
        )
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_new_tokens_are_written_where_they_belong(format: str, device: torch.device) -> None:
    T = 3
    pages = random_pages([T, PAGE + 1, 2 * PAGE], 48, 8, format, device)
    copy = replace(
        pages,
        latent=pages.latent.clone(),
        rope=pages.rope.clone(),
        scale=None if pages.scale is None else pages.scale.clone(),
    )
    latent, rope = random_queries((3, T, 48), 8, torch.bfloat16, device, seed=3)
    mla_append(latent, rope, pages)
    mla_append_reference(latent, rope, copy)
    for got, want in ((pages.latent, copy.latent), (pages.rope, copy.rope)):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    if pages.scale is not None and copy.scale is not None:
        assert torch.equal(pages.scale.nan_to_num(), copy.scale.nan_to_num())


def test_fp8_rounds_a_token_to_a_16th_of_each_value() -> None:
    """The bound is that of `cache_rounding`; a page's largest value plays no part."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(200, 512, generator=generator) * torch.logspace(-10, 10, 200)[:, None]
    q, scale = quantised(rows, torch.float8_e4m3fn)
    error = (q.float() * scale[:, None] - rows).abs()
    assert (error <= 1.001 * torch.maximum(rows.abs() / 16, scale[:, None] / 1024)).all()
    relative = (error.square().sum(-1) / rows.square().sum(-1)).sqrt()
    assert 0.02 < relative.mean() < 0.03
    assert not quantised(torch.zeros(1, 64), torch.float8_e4m3fn)[0].float().any()


def test_attention_over_fp8_differs_by_as_much_as_its_latents(device: torch.device) -> None:
    exact = random_pages([2 * PAGE], 512, 64, "fp32", device)
    rows = exact.latent.nan_to_num().flatten(0, 1)
    q, scale = quantised(rows, torch.float8_e4m3fn)
    rounded = replace(
        exact,
        latent=q.view(exact.latent.shape),
        scale=scale.view(exact.latent.shape[:2]),
        rope=exact.rope.bfloat16(),
    )
    queries = random_queries((1, 2, 512), 64, torch.float32, device)
    outputs = [mla_decode(*queries, pages, scaling=0.05) for pages in (exact, rounded)]
    relative = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    # A score is a sum of 512 terms, each off by 0.026: 0.026 of its own size, here of
    # 0.05 * 512**0.5 = 1.1 standard deviations; a weight by that, and a latent again.
    assert 0.005 < relative < 0.1


def test_keys_are_cut_for_few_sequences_alone(device: torch.device) -> None:
    cpu = torch.device("cpu")
    assert choose_parts(1, 32_768, cpu) == 2
    assert choose_parts(1, 100, cpu) == 1
    assert choose_parts(64, 32_768, cpu) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"latent": torch.zeros(3, PAGE, 32, dtype=torch.int8)}, "latent: torch.int8"),
        ({"rope": torch.zeros(3, PAGE, 4)}, r"rope: .* \[3, 64, 4\] .*, expected .* \[3, 64, 8\]"),
        ({"latent": torch.zeros(3, 16, 32)}, "pages of 16 tokens, expected a multiple of 64"),
        ({"scale": torch.zeros(3, PAGE)}, "there is one for float8_e4m3fn latents, and for those"),
        ({"lengths": torch.zeros(1, dtype=torch.int64)}, r"lengths: torch.int64 \[1\]"),
    ],
)
def test_pages_that_do_not_fit_are_refused(
    changes: dict[str, Any], reason: str, device: torch.device
) -> None:
    pages = random_pages([2 * PAGE], 32, 8, "fp32", device)
    changed = replace(pages, **{name: value.to(device) for name, value in changes.items()})
    q = random_queries((1, 2, 32), 8, torch.float32, device)
    with pytest.raises(ValueError, match=reason):
        mla_decode(*q, changed, scaling=1.0)


@pytest.mark.parametrize("H", [16, 128])
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_the_tiles_of_real_models_are_right_on_this_gpu(
    H: int, format: str, device: torch.device
) -> None:
    on_gpu()
    pages = random_pages([1, 500, 3000], 512, 64, format, device)
    q = random_queries((3, 1, H, 512), 64, torch.bfloat16, device)
    want = mla_prefill_reference(*q, pages, scaling=0.05)
    bound = tolerance(*q, pages, 0.05)
    assert (mla_prefill(*q, pages, scaling=0.05).float() - want).abs().max() <= bound
    one = mla_decode(q[0][:, 0], q[1][:, 0], pages, scaling=0.05)
    assert (one.float() - want[:, 0]).abs().max() <= bound


def test_a_recorded_call_follows_the_lengths(device: torch.device) -> None:
    on_gpu()
    pages = random_pages([300, 400], 512, 64, "bf16", device)
    q = random_queries((2, 16, 512), 64, torch.bfloat16, device)
    mla_decode(*q, pages, scaling=0.05)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mla_decode(*q, pages, scaling=0.05)
    pages.lengths.copy_(torch.tensor([17, 399], device=device))
    graph.replay()
    assert torch.equal(out, mla_decode(*q, pages, scaling=0.05))
