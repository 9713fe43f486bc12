"""What prefill costs: the figures that others published, and the choice for a chunk."""

from __future__ import annotations

import pytest
from transformers import DeepseekV3Config

from ktransformers.prefill_cost import (
    ModelSizes,
    MoeSizes,
    Rates,
    cpu_seconds,
    experts_hit,
    hiding_tokens,
    least_tokens,
    prefill_rate,
    prefill_seconds,
    rest_seconds,
    streaming_pays,
)
from streamed_prefill import PCIE_4, PCIE_5, V3_FP8, XEON_AND_5090, XEON_AND_A100, v3

MARGIN = 0.15  # of what was published


def near(got: float, published: float) -> bool:
    return abs(got - published) <= MARGIN * published


def test_streaming_predicts_what_was_published_for_it() -> None:
    # OSDI'26: DeepSeek-V3 in fp8, RTX 5090 (PCIe 5.0 x16): 1,200 tokens/s, 32K tokens in 30 s.
    assert XEON_AND_5090.host_to_device == PCIE_5
    assert near(prefill_rate(XEON_AND_5090, V3_FP8, 16384, 16384, pieces=2), 1200)
    assert near(prefill_seconds(XEON_AND_5090, V3_FP8, 32768, 32768, pieces=2), 30)
    assert near(prefill_seconds(XEON_AND_5090, V3_FP8, 32768, 16384, pieces=2), 30)


def test_experts_on_the_cpu_predict_what_was_published_for_them() -> None:
    # SOSP'25: DeepSeek-V3 in bf16, 2 x Xeon 8452Y and an A100: 412 tokens/s at 8K tokens; OSDI'26:
    # without streaming no more than 12K tokens in 30 s.
    assert XEON_AND_A100.host_to_device == PCIE_4
    bf16 = v3(bits=16)
    assert near(prefill_rate(XEON_AND_A100, bf16, 8192, 8192, pieces=None), 412)
    assert near(prefill_seconds(XEON_AND_A100, bf16, 12288, 12288, pieces=None), 30)


def test_sizes_are_those_of_deepseek_v3() -> None:
    layer = V3_FP8.layer
    assert layer.layer_bytes * V3_FP8.moe_layers == pytest.approx(654e9, rel=0.01)
    per_token = layer.top_k * layer.expert_operations + layer.rest_operations
    total = V3_FP8.moe_layers * per_token + V3_FP8.other_operations
    # 37 billion weights active, of which embedding and head are 0.9 each.
    assert total == pytest.approx(2 * (37e9 - 2 * 0.93e9), rel=0.02)


def test_tokens_reach_as_many_experts_as_chance_has_it() -> None:
    layer = MoeSizes(256, 8, 1, 1, 1, 1)
    assert experts_hit(layer, 0) == 0
    assert experts_hit(layer, 1) == pytest.approx(8)
    assert experts_hit(layer, 2) == pytest.approx(16 - 8 * 8 / 256)
    assert 255.9 < experts_hit(layer, 512) < 256


def test_few_tokens_cost_what_the_cpu_reads_and_many_what_it_computes() -> None:
    layer = MoeSizes(256, 8, 1000, 1000, 0, 0)
    rates = Rates(1.0, 1.0, 1.0, cpu_operations=100.0, cpu_bandwidth=10.0)
    assert cpu_seconds(rates, layer, 1) == pytest.approx(8 * 1000 / 10)
    assert cpu_seconds(rates, layer, 10**4) == pytest.approx(8 * 10**4 * 1000 / 100)


@pytest.mark.parametrize("pieces", [1, 2, 6])
@pytest.mark.parametrize("link", [8e9, PCIE_4, PCIE_5])
def test_chunk_is_streamed_from_where_that_is_faster_on(link: float, pieces: int) -> None:
    rates = Rates(link, 126e12, 126e12, 22e12, 430e9)
    least = least_tokens(rates, V3_FP8.layer)
    assert least is not None
    assert not streaming_pays(rates, V3_FP8.layer, least - 1)
    assert streaming_pays(rates, V3_FP8.layer, least)
    assert streaming_pays(rates, V3_FP8.layer, 16 * least, pieces)
    # That is where a layer on the CPU takes as long as its copy.
    on_cpu = cpu_seconds(rates, V3_FP8.layer, least) + rest_seconds(rates, V3_FP8.layer, least)
    assert on_cpu == pytest.approx(V3_FP8.layer.layer_bytes / link, rel=0.01)


def test_slower_links_need_longer_chunks_and_slow_gpus_none() -> None:
    rates = [Rates(link, 126e12, 126e12, 22e12, 430e9) for link in (PCIE_5, PCIE_4)]
    five, four = (least_tokens(each, V3_FP8.layer) for each in rates)
    assert five is not None
    assert four is not None
    assert 1.9 * five < four < 2.1 * five
    slow = Rates(PCIE_5, 1e12, 1e12, 22e12, 430e9)
    assert least_tokens(slow, V3_FP8.layer) is None


def test_longer_chunks_are_faster_until_they_hide_the_copies() -> None:
    rates, T = XEON_AND_5090, 32768
    flat = ModelSizes(V3_FP8.layer, V3_FP8.moe_layers, 0, 0)  # attention's own costs grow
    hiding = hiding_tokens(rates, flat.layer)
    speeds = [prefill_rate(rates, flat, n, n, pieces=2) for n in (hiding // 2, hiding, 4 * hiding)]
    assert speeds[1] == pytest.approx(2 * speeds[0], rel=0.02)
    assert speeds[2] == pytest.approx(speeds[1], rel=0.02)
    assert prefill_rate(rates, flat, T, 512, pieces=2) < prefill_rate(
        rates, flat, T, 512, pieces=None
    )


def test_sizes_of_a_model_without_low_rank_queries() -> None:
    config = DeepseekV3Config(q_lora_rank=None)
    more = ModelSizes.deepseek(config, expert_bytes=1).layer.rest_operations
    assert more > V3_FP8.layer.rest_operations
