"""Experts against a float64 reference with a derived bound (experts_reference.py)."""

from __future__ import annotations

import functools

import pytest
import torch

from experts_reference import experts_reference
from native_variants import Variant, format_variants
from packed_layer import PackedLayer, Request, forward, random_layer, random_request, same_bits

# Blocks: 16 tokens are quantised per task, tiles have 64 rows, blocks 256, chunks 1,024 tokens.
TOKENS = (1, 2, 7, 31, 32, 33, 128, 129, 1024, 1025)
SIZES = ((8, 100, 50), (3, 64, 32), (5, 65, 129), (2, 1, 1))

# One of each kind on every instruction set; the other group sizes differ in the product alone.
EVERY_ISA = pytest.mark.parametrize(
    ("format", "kernels"), format_variants("int8", "int4-32", "bf16"), indirect=["kernels"]
)

layer_of = functools.cache(random_layer)


def assert_within_bound(layer: PackedLayer, request: Request, out: torch.Tensor) -> None:
    expected, bound = experts_reference(
        layer.dequantised, request.hidden_states, request.top_k_index, request.top_k_weights
    )
    assert ((out.double() - expected).abs() <= bound).all()
    assert float(bound.max()) < 0.05 * float(expected.abs().max()) + 1e-30  # a bound that says much


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", TOKENS)
@EVERY_ISA
def test_output_is_within_the_derived_bound(
    format: str, kernels: Variant, T: int, dtype: torch.dtype
) -> None:
    layer = layer_of(8, 100, 50, format=format)
    request = random_request(layer, T, 3, dtype)
    out = forward(layer.native(kernels.native, isa=kernels.isa), request)
    assert_within_bound(layer, request, out)


@pytest.mark.parametrize("sizes", SIZES)
@EVERY_ISA
def test_bits_do_not_depend_on_threads_nor_integers_on_the_isa(
    format: str, kernels: Variant, sizes: tuple[int, int, int]
) -> None:
    layer = layer_of(*sizes, format=format)
    for T in (1, 3, 17, 70):
        for dtype in (torch.float32, torch.bfloat16):
            request = random_request(layer, T, 3, dtype)
            if format == "bf16":
                expected = forward(
                    layer.native(kernels.native, threads=1, isa=kernels.isa), request
                )
                assert_within_bound(layer, request, expected)
            else:
                expected = forward(layer.native(threads=1, isa="portable"), request)
            for threads in (1, 2, 4):
                native = layer.native(kernels.native, threads=threads, isa=kernels.isa)
                assert same_bits(forward(native, request), expected)


@EVERY_ISA
def test_output_does_not_depend_on_the_other_tokens(format: str, kernels: Variant) -> None:
    layer = layer_of(8, 100, 50, format=format)
    native = layer.native(kernels.native, isa=kernels.isa)
    request = random_request(layer, 300, 3)
    together = forward(native, request)
    for begin, end in ((0, 1), (1, 3), (50, 57), (57, 257), (299, 300)):
        part = Request(
            request.hidden_states[begin:end],
            request.top_k_index[begin:end],
            request.top_k_weights[begin:end],
        )
        assert same_bits(forward(native, part), together[begin:end])


@pytest.mark.parametrize("T", [1, 65, 257, 600])
@EVERY_ISA
def test_all_tokens_may_go_to_one_expert(format: str, kernels: Variant, T: int) -> None:
    layer = layer_of(8, 100, 50, format=format)
    request = random_request(layer, T, 2)
    request.top_k_index[:] = torch.tensor([5, 8])
    out = forward(layer.native(kernels.native, isa=kernels.isa), request)
    assert_within_bound(layer, request, out)


@EVERY_ISA
def test_expert_named_twice_counts_twice_in_slot_order(format: str, kernels: Variant) -> None:
    layer = layer_of(8, 100, 50, format=format)
    native = layer.native(kernels.native, isa=kernels.isa)
    x = torch.randn(1, 100, generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([[0.3, 0.5, 1e-3]])
    out = forward(native, Request(x, torch.tensor([[4, 1, 4]]), weights))
    one = torch.ones(1, 1)
    first = forward(native, Request(x, torch.tensor([[1]]), one))
    fourth = forward(native, Request(x, torch.tensor([[4]]), one))
    expected = (0 + weights[:, 1:2] * first) + weights[:, 0:1] * fourth + weights[:, 2:3] * fourth
    assert same_bits(out, expected)


@EVERY_ISA
def test_order_of_slots_does_not_matter_for_different_experts(
    format: str, kernels: Variant
) -> None:
    layer = layer_of(8, 100, 50, format=format)
    native = layer.native(kernels.native, isa=kernels.isa)
    request = random_request(layer, 20, 4)
    for row in request.top_k_index:
        row[:] = torch.randperm(9)[:4]
    order = [2, 0, 3, 1]
    shuffled = Request(
        request.hidden_states,
        request.top_k_index[:, order].contiguous(),
        request.top_k_weights[:, order].contiguous(),
    )
    assert same_bits(forward(native, request), forward(native, shuffled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@EVERY_ISA
def test_token_that_is_not_finite_spoils_only_itself(
    format: str, kernels: Variant, value: float, dtype: torch.dtype
) -> None:
    layer = layer_of(8, 100, 50, format=format)
    native = layer.native(kernels.native, isa=kernels.isa)
    request = random_request(layer, 40, 3, dtype)
    request.top_k_index[7] = torch.tensor([1, 8, 3])
    clean = forward(native, request)
    request.hidden_states[7, 99] = value
    out = forward(native, request)
    assert out[7].isnan().all()
    others = torch.arange(40) != 7
    assert same_bits(out[others], clean[others])


@EVERY_ISA
def test_router_weight_that_is_nan_spoils_only_its_token(format: str, kernels: Variant) -> None:
    layer = layer_of(8, 100, 50, format=format)
    native = layer.native(kernels.native, isa=kernels.isa)
    request = random_request(layer, 9, 3)
    request.top_k_index[4] = torch.tensor([0, 1, 2])
    clean = forward(native, request)
    request.top_k_weights[4, 1] = torch.nan
    out = forward(native, request)
    assert out[4].isnan().all()
    others = torch.arange(9) != 4
    assert same_bits(out[others], clean[others])


@EVERY_ISA
def test_intermediate_that_overflows_is_nan_and_not_undefined(
    format: str, kernels: Variant
) -> None:
    layer = layer_of(3, 64, 32, format=format)
    request = random_request(layer, 3, 1)
    request.top_k_index[:] = 0
    request.hidden_states[1] *= 1e30
    out = forward(layer.native(kernels.native, isa=kernels.isa), request)
    assert out.isnan().all(1).tolist() == [False, True, False]


@EVERY_ISA
def test_skipped_slots_add_nothing(format: str, kernels: Variant) -> None:
    layer = layer_of(8, 100, 50, format=format)
    native = layer.native(kernels.native, isa=kernels.isa)
    request = random_request(layer, 5, 3)
    request.top_k_index[:] = 8
    assert same_bits(forward(native, request), torch.zeros(5, 100))


@pytest.mark.parametrize(("T", "K"), [(0, 2), (3, 0), (0, 0)])
@EVERY_ISA
def test_no_tokens_and_no_slots_are_fine(format: str, kernels: Variant, T: int, K: int) -> None:
    layer = layer_of(8, 100, 50, format=format)
    out = forward(layer.native(kernels.native, isa=kernels.isa), random_request(layer, T, K))
    assert same_bits(out, torch.zeros(T, 100))


@pytest.mark.parametrize("format", ["int4-64", "int4-128"])
@pytest.mark.parametrize("sizes", SIZES)
def test_other_group_sizes_are_within_the_bound_too(
    sizes: tuple[int, int, int], format: str
) -> None:
    layer = layer_of(*sizes, format=format)
    request = random_request(layer, 33, 2)
    assert_within_bound(layer, request, forward(layer.native(), request))


def test_many_slots_are_computed_in_smaller_chunks() -> None:
    layer = layer_of(3, 64, 32)
    request = random_request(layer, 40, 1000)
    assert_within_bound(layer, request, forward(layer.native(), request))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
def test_integer_and_weight_types_give_the_same(index: torch.dtype, weights: torch.dtype) -> None:
    layer = layer_of(8, 100, 50)
    request = random_request(layer, 5, 3)
    request.top_k_weights[:] = torch.randint(1, 9, (5, 3)) / 8  # exact in every type
    other = Request(
        request.hidden_states, request.top_k_index.to(index), request.top_k_weights.to(weights)
    )
    assert same_bits(forward(layer.native(), other), forward(layer.native(), request))


def test_output_may_be_the_input() -> None:
    layer = layer_of(8, 100, 50)
    request = random_request(layer, 1100, 3)
    expected = forward(layer.native(), request)
    x = request.hidden_states.clone()
    layer.native().forward(x, request.top_k_index, request.top_k_weights, x)
    assert same_bits(x, expected)


def test_layer_keeps_its_tensors_alive() -> None:
    native = random_layer(3, 64, 32).native()
    again = random_layer(3, 64, 32)
    request = random_request(again, 9, 2)
    assert same_bits(forward(native, request), forward(again.native(), request))


def test_layer_tells_its_sizes() -> None:
    native = layer_of(8, 100, 50).native(threads=3, isa="portable")
    assert (native.num_experts, native.hidden_size, native.moe_intermediate_size) == (8, 100, 50)
    assert (native.format, native.threads, native.isa) == ("int8", 3, "portable")


@pytest.mark.parametrize(("index", "found"), [(9, "9"), (-1, "-1"), (2**40, "1099511627776")])
def test_index_out_of_range_names_token_and_slot(index: int, found: str) -> None:
    layer = layer_of(8, 100, 50)
    request = random_request(layer, 1500, 3)
    request.top_k_index[1400, 2] = index
    out = torch.full_like(request.hidden_states, 7.0)
    with pytest.raises(ValueError) as caught:
        layer.native().forward(
            request.hidden_states, request.top_k_index, request.top_k_weights, out
        )
    assert str(caught.value) == (
        f"top_k_index: token 1400, slot 2 names expert {found}, expected 0 to 7, "
        "or 8 to skip the slot"
    )
    assert (out == 7).all()  # nothing was written


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hidden_states": torch.ones(2, 99)},
            ValueError,
            "hidden_states: expected shape [*, 100], got [2, 99]",
        ),
        (
            {"hidden_states": torch.ones(2, 100, dtype=torch.float16)},
            TypeError,
            "hidden_states: expected bfloat16 or float32, got float16",
        ),
        (
            {"top_k_index": torch.zeros(3, 3, dtype=torch.int64)},
            ValueError,
            "top_k_index: expected shape [2, *], got [3, 3]",
        ),
        (
            {"top_k_index": torch.zeros(2, 3)},
            TypeError,
            "top_k_index: expected int64 or int32, got float32",
        ),
        (
            {"top_k_weights": torch.ones(2, 2)},
            ValueError,
            "top_k_weights: expected shape [2, 3], got [2, 2]",
        ),
        (
            {"out": torch.ones(2, 100, dtype=torch.bfloat16)},
            TypeError,
            "out: expected float32, got bfloat16",
        ),
        ({"out": torch.ones(100, 2).T}, ValueError, "out: expected a contiguous tensor"),
    ],
)
def test_wrong_arguments_get_a_sentence(
    change: dict[str, torch.Tensor], error: type[Exception], message: str
) -> None:
    arguments = {
        "hidden_states": torch.ones(2, 100),
        "top_k_index": torch.zeros(2, 3, dtype=torch.int64),
        "top_k_weights": torch.ones(2, 3),
        "out": torch.ones(2, 100),
    }
    with pytest.raises(error) as caught:
        layer_of(8, 100, 50).native().forward(**{**arguments, **change})
    assert str(caught.value) == message


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_number_of_threads_is_checked(threads: int) -> None:
    with pytest.raises(ValueError, match=f"^threads={threads}: expected 1 to 1024$"):
        layer_of(3, 64, 32).native(threads=threads)
