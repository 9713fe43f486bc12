"""What `prefill_cost` predicts for DeepSeek-V3: chunk by chunk, for some links.

    python benchmarks/streamed_prefill.py [--bits 8] [--pieces 2]

Nothing is measured here. Rates are published ones, times what products and copies reach of them;
where they come from is said beside each. `tests/core/test_prefill_cost.py` holds the published
figures against them.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace

from transformers import DeepseekV3Config

from ktransformers.prefill_cost import (
    ModelSizes,
    Rates,
    hiding_tokens,
    least_tokens,
    prefill_rate,
)

# Of a link's 31.5 and 63.0 GB/s copies from pinned memory are taken to reach 85 %, of a GPU's peak
# products 60 %, and on an A100 of 2020 and in torch 50 %.
PCIE_4, PCIE_5 = 0.85 * 31.5e9, 0.85 * 63.0e9
# Two sockets of Xeon 8452Y: 21.3 TFLOPS of bf16 each with AMX (SOSP'25); two sockets are 1.53 of
# one (82.9 over 54.2 tokens/s of prefill, the report on V0.2); of what its product reaches a layer
# reaches 67 % (ours, bf16, V3's sizes, 1,024 tokens: docs/log.md). 70 % of DDR5-4800 x 16.
XEON_OPERATIONS, XEON_BANDWIDTH = 0.67 * 1.53 * 21.3e12, 0.7 * 614e9
# A100: 312 TFLOPS of bf16. RTX 5090: 419 TFLOPS of fp8, as OSDI'26 has its weights, and 209.5 of
# bf16, both with sums in fp32.
XEON_AND_A100 = Rates(PCIE_4, 0.5 * 312e12, 0.5 * 312e12, XEON_OPERATIONS, XEON_BANDWIDTH)
XEON_AND_5090 = Rates(PCIE_5, 0.6 * 419e12, 0.6 * 209.5e12, XEON_OPERATIONS, XEON_BANDWIDTH)
LENGTHS = (2048, 4096, 8192, 16384, 32768)


def v3(*, bits: float) -> ModelSizes:
    """Return the sizes of DeepSeek-V3, experts in so many bits."""
    config = DeepseekV3Config()
    weights = 3 * config.hidden_size * config.moe_intermediate_size
    return ModelSizes.deepseek(config, expert_bytes=int(weights * bits / 8))


V3_FP8 = v3(bits=8)


def main() -> None:
    """Print a table, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", type=float, default=8, help="of an expert's weights")
    parser.add_argument("--pieces", type=int, default=2, help="that a layer is streamed in")
    options = parser.parse_args()
    if not 0 < options.bits < math.inf or options.pieces < 1:
        parser.error("--bits is above 0, and --pieces 1 or more")
    model, rows = v3(bits=options.bits), []
    # Weights become 16 bits before they are multiplied.
    ours = replace(XEON_AND_5090, gpu_operations=XEON_AND_5090.gpu_attention)
    print(f"DeepSeek-V3, experts in {options.bits:g} bits, {options.pieces} pieces a layer;")
    print("tokens/s of prompts of one chunk, and on the CPU: " + ", ".join(map(str, LENGTHS)))
    for name, link in (("PCIe 4.0 x16", PCIE_4), ("PCIe 5.0 x16", PCIE_5)):
        rates = replace(ours, host_to_device=link)
        speeds = {
            pieces: [round(prefill_rate(rates, model, T, T, pieces=pieces)) for T in LENGTHS]
            for pieces in (options.pieces, None)
        }
        least, hiding = least_tokens(rates, model.layer), hiding_tokens(rates, model.layer)
        print(
            f"  {name}, {link / 1e9:.1f} GB/s: {speeds[options.pieces]}, {speeds[None]}; pays from "
            f"{least} tokens on, copies are hidden from {hiding} on"
        )
        rows.append({"link": link, "streamed": speeds[options.pieces], "least": least})
    figures = {"bits": options.bits, "pieces": options.pieces, "rows": rows}
    print(json.dumps({"name": "streamed-prefill", "predicted": True, **figures}))


if __name__ == "__main__":
    main()
