"""Latent attention against plain softmax attention in float64, in both forms, on every ISA."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention_reference import Form
from latent_attention import (
    Request,
    Sizes,
    forward,
    random_attention,
    random_request,
    share_of_bound,
)
from native_variants import Variant, variants
from packed_layer import FORMATS, same_bits

FORMS: tuple[Form, ...] = ("absorbed", "expanded")
SMALL = Sizes()
STATM = Path("/proc/self/statm")
both_forms = pytest.mark.parametrize("form", FORMS)
every_product = pytest.mark.parametrize("kernels", variants("bf16_gemm"), indirect=True)


@every_product
@both_forms
@pytest.mark.parametrize("format", FORMATS)
def test_output_is_within_the_derived_bound(kernels: Variant, format: str, form: Form) -> None:
    of = random_attention(SMALL, format)
    layer = of.native(kernels.native, isa=kernels.isa)
    for tokens, lengths in ((1, [65]), (7, [7, 100])):
        request = random_request(SMALL, lengths, tokens)
        out = forward(layer, request, form)
        assert share_of_bound(of, request, out, form) <= 1, tokens


@both_forms
@pytest.mark.parametrize("before", [0, 1, 63, 200])
@pytest.mark.parametrize("tokens", [1, 2, 7, 31, 32, 33, 128, 257])
def test_every_number_of_queries(tokens: int, before: int, form: Form) -> None:
    of = random_attention(SMALL)
    request = random_request(SMALL, [before + tokens], tokens)
    out = forward(of.native(), request, form)
    assert share_of_bound(of, request, out, form) <= 1


@both_forms
@pytest.mark.parametrize(
    "length", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 8192]
)
def test_every_length(length: int, form: Form) -> None:
    of = random_attention(SMALL)
    request = random_request(SMALL, [length], 1, page_tokens=64)
    out = forward(of.native(), request, form)
    assert share_of_bound(of, request, out, form) <= 1


@both_forms
@pytest.mark.parametrize("length", [*range(1, 36), 63, 64, 65, 127, 128, 129, 193, 500, 2049])
def test_every_token_counts_once(length: int, form: Form) -> None:
    """Queries of zero give all tokens the same weight; each token has a dimension for itself.

    The bound on random tokens would not notice one of hundreds missing.
    """
    sizes = Sizes(heads=1, latent=64, rope=16, nope=16, value=64)
    of = random_attention(sizes)
    request = random_request(sizes, [length], 1)
    latent = torch.zeros(request.block_table.shape[1] * 16, 64)
    latent[torch.arange(len(latent)), torch.arange(len(latent)) % 64] = 64.0
    table = torch.arange(request.block_table.shape[1], dtype=torch.int32)[None]
    rope = torch.zeros(len(latent) // 16, 16, 16)
    request = replace(
        request, q=0 * request.q, latent=latent.view(-1, 16, 64), rope=rope, block_table=table
    )
    counts = torch.bincount(torch.arange(length) % 64, minlength=64).double()
    expected = of.weights.uv[0] @ (64 * counts / length)
    out = forward(of.native(), request, form)[0, 0].double()
    one = 64 / length * of.weights.uv[0].abs().amax()  # what a token contributes
    assert ((out - expected).abs() <= 0.01 * expected.abs() + 0.1 * one).all()


@every_product
@both_forms
@pytest.mark.parametrize("cache", ["bf16", "int8"])
def test_later_tokens_are_not_seen(kernels: Variant, form: Form, cache: str) -> None:
    """An output does not change by a bit with what follows."""
    of = random_attention(SMALL)
    layer = of.native(kernels.native, isa=kernels.isa)
    request = random_request(SMALL, [80], 20, cache=cache)
    out = forward(layer, request, form)
    page, row = int(request.block_table[0, 70 // 16]), 70 % 16
    request.latent[page, row] = 100
    if request.latent_scale is not None:
        request.latent_scale[page, row] = 1
    changed = forward(layer, request, form)
    assert same_bits(changed[0, :10].contiguous(), out[0, :10].contiguous())
    assert (changed[0, 10:] != out[0, 10:]).any(-1).all()


@both_forms
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(heads=1, latent=48, rope=8, nope=24, value=40),
        Sizes(heads=3, latent=32, rope=64, nope=16, value=8),
        Sizes(heads=16, latent=512, rope=64, nope=128, value=128),
        Sizes(heads=128, latent=32, rope=16, nope=16, value=16),
    ],
    ids=lambda sizes: f"{sizes.heads}-heads-of-{sizes.latent}",
)
@pytest.mark.parametrize("cache", ["bf16", "int8"])
def test_sizes_that_need_padding_or_are_real(sizes: Sizes, form: Form, cache: str) -> None:
    of = random_attention(sizes)
    request = random_request(sizes, [70, 33], 2, cache=cache)
    assert share_of_bound(of, request, forward(of.native(), request, form), form) <= 1


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", ["bf16", "fp32", "int8"])
def test_every_cache_and_activation_type(cache: str, dtype: torch.dtype, form: Form) -> None:
    sizes = Sizes(latent=48)
    of = random_attention(sizes)
    request = random_request(sizes, [90, 40], 5, cache=cache, dtype=dtype)
    out = forward(of.native(), request, form)
    assert out.dtype == dtype
    assert share_of_bound(of, request, out, form) <= 1


@every_product
@both_forms
def test_int8_cache_on_every_isa(kernels: Variant, form: Form) -> None:
    sizes = Sizes(heads=2, latent=272)  # two whole groups and the rest
    of = random_attention(sizes)
    request = random_request(sizes, [70], 3, cache="int8")
    layer = of.native(kernels.native, isa=kernels.isa)
    assert share_of_bound(of, request, forward(layer, request, form), form) <= 1


@both_forms
@pytest.mark.parametrize("page_tokens", [16, 64, 512])
def test_order_and_size_of_pages_do_not_matter(page_tokens: int, form: Form) -> None:
    layer = random_attention(SMALL).native()
    request = random_request(SMALL, [300, 129], 3, page_tokens=page_tokens)
    rows = [request.sequence(b) for b in range(2)]
    latent, rope = torch.zeros(2, 300, SMALL.latent), torch.zeros(2, 300, SMALL.rope)
    for b, (c, r, _) in enumerate(rows):
        latent[b, : len(c)], rope[b, : len(r)] = c.float(), r.float()
    in_order = replace(
        request,
        latent=latent.bfloat16(),
        rope=rope.bfloat16(),
        block_table=torch.tensor([[0], [1]], dtype=torch.int32),
    )
    assert same_bits(forward(layer, request, form), forward(layer, in_order, form))


def padded(request: Request, valid: list[list[int]]) -> Request:
    return replace(request, valid=torch.tensor(valid, dtype=torch.uint8))


@both_forms
@pytest.mark.parametrize("where", ["left", "right", "holes"])
def test_padding_is_seen_by_nobody(where: str, form: Form) -> None:
    of = random_attention(SMALL)
    request = random_request(SMALL, [150, 150], 9)
    masks = {
        "left": [[0] * 70 + [1] * 80, [0] * 145 + [1] * 5],
        "right": [[1] * 145 + [0] * 5, [1] * 20 + [0] * 130],
        "holes": [[1, 0] * 75, [int(i % 7 > 2) for i in range(150)]],
    }
    request = padded(request, masks[where])
    out = forward(of.native(), request, form)
    assert share_of_bound(of, request, out, form) <= 1
    for b in range(2):  # what lies in the padding cannot matter, NaN included
        for i in range(150):
            if not masks[where][b][i]:
                page = int(request.block_table[b, i // 16])
                request.latent[page, i % 16] = request.rope[page, i % 16] = torch.nan
    assert same_bits(forward(of.native(), request, form), out)


@both_forms
def test_query_that_sees_nothing_gives_zeros(form: Form) -> None:
    request = padded(random_request(SMALL, [40], 4), [[0] * 38 + [1] * 2])
    out = forward(random_attention(SMALL).native(), request, form)
    assert (out[0, :2] == 0).all()
    assert (out[0, 2:] != 0).all()


@every_product
@both_forms
@pytest.mark.parametrize("cache", ["bf16", "int8"])
def test_output_depends_neither_on_threads_nor_on_other_sequences(
    kernels: Variant, form: Form, cache: str
) -> None:
    of = random_attention(SMALL)
    request = random_request(SMALL, [300, 5, 64, 129], 3, cache=cache)
    together = forward(of.native(kernels.native, isa=kernels.isa, threads=1), request, form)
    for threads in (1, 2, 3):
        layer = of.native(kernels.native, isa=kernels.isa, threads=threads)
        assert same_bits(forward(layer, request, form), together)
        for b in range(4):
            assert same_bits(forward(layer, request.alone(b), form), together[b : b + 1])


@both_forms
def test_expanded_queries_shared_by_threads_keep_their_bits(form: Form) -> None:
    """With more threads than heads a head's queries are shared out."""
    of = random_attention(Sizes(heads=1))
    request = random_request(of.sizes, [300], 200)
    expected = forward(of.native(threads=1), request, form)
    assert same_bits(forward(of.native(threads=4), request, form), expected)


@both_forms
def test_many_sequences_take_more_than_one_chunk(form: Form) -> None:
    of = random_attention(Sizes(heads=16, latent=32))
    request = random_request(of.sizes, [1000, 3, 700] * 20, 3)
    layer = of.native()
    out = forward(layer, request, form)
    for b in (0, 1, 29, 59):
        assert same_bits(forward(layer, request.alone(b), form), out[b : b + 1])


def test_sequences_of_a_batch_may_take_different_forms() -> None:
    of = random_attention(Sizes(nope=16, value=16))
    layer, request = of.native(), random_request(of.sizes, [30, 40, 6000, 30], 30)
    out = forward(layer, request)
    forms: tuple[Form, ...] = ("absorbed", "absorbed", "expanded", "absorbed")
    for b, form in enumerate(forms):
        assert same_bits(out[b : b + 1], forward(layer, request.alone(b), form))


@both_forms
def test_long_prompt_takes_more_than_one_chunk(form: Form) -> None:
    of = random_attention(Sizes(heads=16, latent=32, rope=8, nope=8, value=8))
    request = random_request(of.sizes, [600], 600, page_tokens=64)
    assert share_of_bound(of, request, forward(of.native(), request, form), form) <= 1


@every_product
@both_forms
@pytest.mark.parametrize(
    ("cache", "where"),
    [(cache, where) for cache in ("bf16", "int8") for where in ("q", "rope")]
    + [("bf16", "latent"), ("int8", "latent_scale")],
)
def test_nan_stays_in_its_sequence(kernels: Variant, cache: str, where: str, form: Form) -> None:
    sizes = SMALL if cache == "bf16" else replace(SMALL, latent=160)  # a scale of several
    layer = random_attention(sizes).native(kernels.native, isa=kernels.isa)
    request = random_request(sizes, [50, 50, 50], 4, cache=cache)
    clean = forward(layer, request, form)
    if where == "q":
        request.q[1, 2, 1, 5] = torch.nan
    else:
        getattr(request, where)[int(request.block_table[1, 0]), 3, 1] = torch.nan
    out = forward(layer, request, form)
    assert same_bits(out[[0, 2]], clean[[0, 2]])
    hit = out[1].view(4, SMALL.heads, SMALL.value).isnan().all(-1)
    assert hit.sum().item() == (1 if where == "q" else 4 * SMALL.heads)


@pytest.mark.parametrize(
    ("tokens", "before", "faster"),
    [(1, 0, 0), (1, 9000, 0), (32, 50, 0), (300, 50, 1), (100, 0, 1), (32, 1000, 0)],
)
def test_forms_agree_and_the_faster_one_is_taken(tokens: int, before: int, faster: int) -> None:
    """Counted for these sizes: 144 or 80 steps a pair, 4096 a query or a key."""
    of = random_attention(SMALL)
    request = random_request(SMALL, [before + tokens], tokens)
    layer = of.native()
    absorbed, expanded = (forward(layer, request, form) for form in FORMS)
    assert not same_bits(absorbed, expanded)
    # 2^-8 for each of a handful of roundings, of outputs that are of the order of 1.
    assert (absorbed - expanded).abs().max() <= 8 * 2.0**-8
    assert same_bits(forward(layer, request), (absorbed, expanded)[faster])


def resident_bytes() -> int:
    if not STATM.exists():
        pytest.skip("only Linux tells the resident set of this moment")
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


@both_forms
def test_scratch_does_not_grow_with_the_context(form: Form) -> None:
    layer = random_attention(SMALL).native()
    short, long = (random_request(SMALL, [n], 1, page_tokens=64) for n in (4096, 131072))
    forward(layer, short, form)
    before = resident_bytes()
    forward(layer, long, form)
    assert resident_bytes() - before <= 256 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [2]}, r"^lengths\[0\] is 2, expected 3 to 48: the new tokens, and what"),
        ({"lengths": [49]}, r"^lengths\[0\] is 49, expected 3 to 48"),
        ({"lengths": [40]}, r"^block_table\[0, 2\] is -1, expected 0 to 3$"),
        ({"block_table": [[0, 4]]}, r"^block_table\[0, 1\] is 4, expected 0 to 3$"),
        ({"valid": [[1] * 19]}, r"^lengths\[0\] is 20, expected 3 to 19"),
        ({"latent_scale": [[1.0] * 16] * 4}, r"^latent_scale: expected for an int8 latent"),
    ],
)
def test_what_points_outside_the_cache_is_refused(
    change: dict[str, list[float]], message: str
) -> None:
    dtypes = {"valid": torch.uint8, "latent_scale": torch.float32}
    tensors = {
        name: torch.tensor(value, dtype=dtypes.get(name, torch.int32))
        for name, value in change.items()
    }
    request = replace(random_request(SMALL, [20], 3), **tensors)
    with pytest.raises(ValueError, match=message):
        forward(random_attention(SMALL).native(), request)


def test_an_int8_cache_with_a_scale_per_token_is_refused() -> None:
    sizes = Sizes(latent=272)
    request = random_request(sizes, [20], 3, cache="int8")
    assert request.latent_scale is not None
    one = replace(request, latent_scale=request.latent_scale[..., :1].contiguous())
    with pytest.raises(ValueError, match=r"^latent_scale: expected shape .*16, 3.*16, 1"):
        forward(random_attention(sizes).native(), one)


def test_unknown_form_is_an_error() -> None:
    layer, request = random_attention(SMALL).native(), random_request(SMALL, [20], 3)
    with pytest.raises(ValueError, match=r"^form='flash': expected absorbed, expanded or None$"):
        forward(layer, request, "flash")  # type: ignore[arg-type]  # what the test is about


def test_no_queries_are_no_work() -> None:
    layer, request = random_attention(SMALL).native(), random_request(SMALL, [20], 3)
    assert forward(layer, replace(request, q=request.q[:, :0].contiguous())).numel() == 0
