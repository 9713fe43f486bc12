"""kt-kernel, the CPU engine of the classic ktransformers, through its extension module.

int8 is AMXINT8 and int4 AMXINT4, which quantise bf16 weights by row and need AVX-512; on AVX2 int4
is RAWINT4, in groups of 32. bf16 is BF16. A few experts' weights are given for all: it copies them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ktransformers import _native
from moe_layer import Sizes, Weights
from peer_layer import Call, CannotRun, PeerLayer, Variant

# Its int4 by row is 27 % off on normal weights.
MAX_ERROR = {"int8": 0.05, "int4": 0.4, "bf16": 0.02}
GROUP = 32  # of RAWINT4
MAX_TOKENS = 1024

CLASSES = {
    "AMXINT8": ("AMXInt8_MOE",),
    "AMXINT4": ("AMXInt4_MOE",),
    "RAWINT4": ("AVX2RawInt4_MOE",),
    "BF16": ("AMXBF16_MOE", "AVX2BF16_MOE"),
}


def variants(weight_format: str, threads: int) -> list[Variant]:
    """List the counterpart on all threads and on one: it spins where cores are few.

    Raises CannotRun where that needs AVX-512.
    """
    wide = "avx512_vnni" in _native.isas()
    kind = weight_format.partition("-")[0]
    name = {"int8": "AMXINT8", "int4": "AMXINT4" if wide else "RAWINT4", "bf16": "BF16"}[kind]
    if name.startswith("AMX") and not wide:
        raise CannotRun(f"kt-kernel's {name} needs AVX-512; this machine has {_native.isa()}")
    return [Variant(name, count) for count in sorted({threads, 1}, reverse=True)]


def make_layer(sizes: Sizes, experts: list[Weights], variant: Variant) -> PeerLayer:
    """Give it the weights. Raises CannotRun."""
    try:
        from kt_kernel import kt_kernel_ext  # type: ignore[import-not-found]  # its own environment
    except ImportError as error:
        raise CannotRun(f"kt-kernel: {error}") from None
    names = CLASSES[variant.format]
    found = [kind for name in names if (kind := getattr(kt_kernel_ext.moe, name, None))]
    if not found:
        raise CannotRun(f"kt-kernel has no {' or '.join(names)} for this machine")
    pool = kt_kernel_ext.WorkerPoolConfig()
    pool.subpool_count = 1
    pool.subpool_numa_map = [0]
    pool.subpool_thread_count = [variant.threads]
    engine = kt_kernel_ext.CPUInfer(pool)
    placed = torch.zeros(sizes.num_experts, dtype=torch.bool)  # none on a GPU
    config = kt_kernel_ext.moe.MOEConfig(
        sizes.num_experts,
        sizes.top_k,
        sizes.hidden_size,
        sizes.moe_intermediate_size,
        placed.data_ptr(),
    )
    config.layer_idx = 0
    config.pool = engine.backend_
    config.max_len = MAX_TOKENS
    held = _give_weights(config, sizes, experts, variant)
    layer = found[0](config)
    order = torch.arange(sizes.num_experts)
    engine.submit(layer.load_weights_task(order.data_ptr()))
    engine.sync()
    return KtExperts(engine, layer, sizes.top_k, (placed, order, held))


def _give_weights(
    config: Any, sizes: Sizes, experts: list[Weights], variant: Variant
) -> list[torch.Tensor]:
    """Point the config at the weights, and return what must stay alive for it."""
    held: list[torch.Tensor] = []
    quantised = variant.format.startswith("AMX")
    for name in ("gate", "up", "down"):
        few = [getattr(weights, name).contiguous() for weights in experts]
        repeated = [few[e % len(few)] for e in range(sizes.num_experts)]
        if quantised:  # it quantises `[E, n, k]` itself
            held.append(torch.stack(repeated))
            setattr(config, f"{name}_proj", held[-1].data_ptr())
            continue
        scales = [torch.empty(0)] * len(few)
        if variant.format == "RAWINT4":
            few, scales = (list(both) for both in zip(*map(raw_int4, few), strict=True))
        held += few + scales
        each = [e % len(few) for e in range(sizes.num_experts)]
        setattr(config, f"{name}_projs", [[few[e].data_ptr() for e in each]])
        setattr(config, f"{name}_scales", [[scales[e].data_ptr() for e in each]])
    if variant.format == "RAWINT4":
        config.quant_config.bits = 4
        config.quant_config.group_size = GROUP
        config.quant_config.zero_point = False
    return held


def raw_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `[n, k]` symmetrically in groups, two to a byte, low nibble first; bf16 scales."""
    n, k = weight.shape
    groups = weight.float().view(n, k // GROUP, GROUP)
    scale = (groups.abs().amax(dim=2, keepdim=True) / 7).to(torch.bfloat16)
    q = (groups / scale.float()).round().clamp(-8, 7).add(8).to(torch.uint8).view(n, k)
    return q[:, ::2] | q[:, 1::2] << 4, scale[..., 0].contiguous()


@dataclass(frozen=True, slots=True)
class KtExperts:
    """Its layer, and what it reads."""

    engine: Any
    layer: Any
    top_k: int
    held: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]

    def prepare(self, x: torch.Tensor, weights: torch.Tensor) -> Call:
        """Return the call: submit and wait."""
        T, K = weights.shape
        x, weights, out = x.contiguous(), weights.float().contiguous(), torch.empty_like(x)
        count = torch.tensor([T], dtype=torch.int32)

        def call(index: torch.Tensor) -> torch.Tensor:
            index = index.contiguous()
            task = self.layer.forward_task(
                count.data_ptr(), K, index.data_ptr(), weights.data_ptr(), x.data_ptr(),
                out.data_ptr(), False,
            )  # fmt: skip
            self.engine.submit(task)
            self.engine.sync()
            return out

        return call
