"""Every kernel of `operators/kernels/`, for every GPU that it is meant for, as launches choose it.

Compiled once for all tests (`compiled` in tests/gpu/conftest.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ktransformers.operators.kernels.expert_upload import BLOCK as UPLOADED
from ktransformers.operators.kernels.int4_experts import choose_block
from ktransformers.operators.kernels.int4_linear import choose_tiles as linear_tiles
from ktransformers.operators.kernels.int4_weight import Int4Format
from ktransformers.operators.kernels.mla_decode import MAX_PARTS, SUM_COLUMNS
from ktransformers.operators.kernels.mla_keys import choose_tiles as mla_tiles
from ktransformers.operators.kernels.packed_experts import MOST_SLOTS
from ktransformers.operators.kernels.packed_experts import choose_tile as packed_tile
from ktransformers.operators.kernels.split_sum import BLOCK
from triton_aot import Job

KERNELS = "ktransformers.operators.kernels"
NVIDIA = ("sm_80", "sm_89", "sm_90")
AMD = "gfx942"
# Bytes of shared memory that a program may take; int4's of sm_80 serves sm_86 as well.
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, AMD: 64 << 10}
C, R, PAGE = 512, 64, 64  # of DeepSeek-V2, V2-Lite and V3
MANY = 1 << 20  # rows of a chunk


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel, for a GPU, and what decides how it is compiled."""

    kernel: str  # its name
    target: str
    size: int = 0  # tokens, or rows that share their keys
    format: Int4Format | None = None
    kind: str = "bf16"  # of activations, or of the cache; or which weights

    def __str__(self) -> str:
        """Name the case in a test's id."""
        parts = (self.kernel, self.target, self.size or "", self.format or "", self.kind)
        return "-".join(str(part) for part in parts if part != "")


# Tokens, format and dtype: every tile that is chosen, every group size.
LINEAR = [
    (1, Int4Format(128, True), "fp16"),
    (16, Int4Format(32, False), "bf16"),
    (64, Int4Format(-1, False), "fp16"),
    (4096, Int4Format(128, True), "bf16"),
    (4096, Int4Format(64, True), "fp16"),
    (4096, Int4Format(32, False), "bf16"),
]
# Tokens of a layer with V3's 256 experts, 8 a token; whether gate and up are computed, or down.
EXPERTS = [
    (1, Int4Format(128, True), "gate_up"),
    (1, Int4Format(32, False), "down"),
    (4096, Int4Format(128, False), "gate_up"),
    (4096, Int4Format(128, True), "gate_up"),
]
# Of the CPU's weights, blocks as full as they get; gate and up, or down.
PACKED = {
    "sm_80": ("int8 gate_up", "int4-128 down"),
    "sm_89": ("bf16 gate_up",),
    "sm_90": ("int8 down", "int4-32 gate_up", "bf16 down"),
}
PLANES = {"int8": 4, "bf16": 2, "int4-32": 8, "int4-128": 8}  # values of a word


def cases() -> list[Case]:
    """Return all of them; attention has no tiles for AMD's GPUs."""
    found = [
        Case("int4_linear_kernel", AMD, *LINEAR[1]),
        Case("int4_experts_kernel", AMD, *EXPERTS[3]),
        Case("split_sum_kernel", AMD),
    ]
    for target in NVIDIA:
        # sm_89 is compiled as sm_80 is, but for ptxas: not every variant again.
        fewer = target == "sm_89"
        linear = [*LINEAR[:1], *LINEAR[-1:]] if fewer else LINEAR
        experts = EXPERTS[1:3] if fewer else EXPERTS
        found += [Case("int4_linear_kernel", target, *each) for each in linear]
        found += [Case("int4_experts_kernel", target, *each) for each in experts]
        packed = PACKED[target]
        found += [Case("packed_experts_kernel", target, MOST_SLOTS, kind=kind) for kind in packed]
        alone = ("split_sum_kernel", "sum_parts", "expert_upload_kernel")
        found += [Case(name, target) for name in alone]
        for cache in ("bf16",) if target == "sm_80" else ("bf16", "fp8e4nv"):
            found += [Case("decode_parts", target, rows, kind=cache) for rows in (16, 128)]
            found.append(Case("prefill_rows", target, MANY, kind=cache))
            found.append(Case("append_token", target, kind=cache))
    return found


def job(case: Case) -> Job:
    """Say what to compile."""
    return {
        "int4_linear_kernel": _linear,
        "int4_experts_kernel": _experts,
        "packed_experts_kernel": _packed,
        "expert_upload_kernel": _upload,
        "split_sum_kernel": _split_sum,
        "decode_parts": _attention,
        "prefill_rows": _attention,
        "append_token": _append,
        "sum_parts": _sum_parts,
    }[case.kernel](case)


def _linear(case: Case) -> Job:
    assert case.format is not None
    tiles = linear_tiles(case.size, 8192, 8192, symmetric=case.format.symmetric)
    one_pass = tiles.splits == 1
    signature = {
        "x": f"*{case.kind}:16",
        "sums": "*fp32:16",
        "packed": "*i16:16",
        "scale": "*bf16:16",
        "zero_point": "*u8:16",
        "bias": "*fp32:16",
        "out": f"*{case.kind if one_pass else 'fp32'}:16",
        "M": "i32",
        "N": "i32:16",
        "K": "i32:16",
        "x_stride": "i32:16",
        "sums_stride": "i32",
        "panels_per_split": "i32:16",
    }
    constexprs: dict[str, Any] = {
        "GROUP": case.format.group_size,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "EVEN_K": True,
        "PTX": case.target != AMD,
    }
    absent = [] if one_pass else ["bias"]
    absent += ["zero_point", "sums"] if case.format.symmetric else []
    how = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return _job("int4_linear", case, signature, constexprs, absent, **how)


def _experts(case: Case) -> Job:
    assert case.format is not None
    gated = case.kind == "gate_up"
    block_m = choose_block(case.size, 8, 256, symmetric=case.format.symmetric)
    signature = {
        "x": "*bf16:16",
        "sums": "*fp32:16",
        "packed": "*i16:16",
        "scale": "*bf16:16",
        "zero_point": "*u8:16",
        "slots": "*i32:16",
        "experts": "*i32:16",
        "slot_weights": "*fp32:16",
        "out": "*bf16:16" if gated else "*fp32:16",
        **dict.fromkeys(("N", "K"), "i32:16"),
        **dict.fromkeys(("SLOTS", "EXPERTS", "PANELS", "GROUPS"), "i32"),
    }
    constexprs: dict[str, Any] = {
        "SLOTS_PER_ROW": 8 if gated else 1,
        "GROUP": case.format.group_size,
        "BLOCK_M": block_m,
        "BLOCK_N": 64 if block_m <= 16 else 128,
        "EVEN_K": True,
        "PTX": case.target != AMD,
    }
    absent = ["slot_weights"] if gated else []
    absent += ["zero_point", "sums"] if case.format.symmetric else []
    how = {"num_warps": 4, "num_stages": 5} if block_m <= 16 else {"num_warps": 8, "num_stages": 3}
    return _job("int4_experts", case, signature, constexprs, absent, **how)


def _packed(case: Case) -> Job:
    weight, matrix = case.kind.split()
    gated, group = matrix == "gate_up", int(weight.partition("-")[2] or 0)
    tile = packed_tile(case.size, PLANES[weight], gated=gated)
    signature = {
        "x": "*bf16:16",
        "words": "*i32:16",
        "scale": "*bf16:16" if group else "*fp32:16",
        "slots": "*i32:16",
        "experts": "*i32:16",
        "slot_weights": "*fp32:16",
        "out": "*bf16:16" if gated else "*fp32:16",
        **dict.fromkeys(("SLOTS", "N", "PADDED_N", "WORDS", "SCALES", "OUT_WORDS"), "i32:16"),
        **dict.fromkeys(("FIRST", "LAST"), "i32"),
    }
    constexprs: dict[str, Any] = {
        "SLOTS_PER_ROW": 8 if gated else 1,
        "PLANES": PLANES[weight],
        "GROUP": group,
        "BLOCK_M": case.size,
        "BLOCK_N": tile.block_n,
        "BLOCK_Q": tile.block_q,
        "EVEN": True,
    }
    absent = ["scale"] if weight == "bf16" else []
    absent += ["slot_weights"] if gated else []
    how = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return _job("packed_experts", case, signature, constexprs, absent, **how)


def _upload(case: Case) -> Job:
    signature = dict.fromkeys(("host", "slots", "experts", "targets"), "*i64:16")
    signature |= {"EXPERTS": "i32", "WORDS": "i32:16"}
    return _job("expert_upload", case, signature, {"BLOCK": UPLOADED})


def _split_sum(case: Case) -> Job:
    signature = dict.fromkeys(("partial", "bias"), "*fp32:16")
    signature |= {"out": "*bf16:16", "elements": "i32:16", "N": "i32"}
    return _job("split_sum", case, signature, {"SPLITS": 4, "BLOCK": BLOCK})


def tiles_of(case: Case) -> Any:
    """Return the tiles of attention on a GPU."""
    return mla_tiles(case.size, (int(case.target[3]), int(case.target[4])))


def _attention(case: Case) -> Job:
    tiles, decode = tiles_of(case), case.kernel == "decode_parts"
    signature = dict.fromkeys(("q_latent_ptr", "q_rope_ptr", "rope_ptr"), "*bf16:16")
    signature |= {"latent_ptr": f"*{case.kind}:16", "table_ptr": "*i32:16", "scale_ptr": "*fp32:16"}
    signature |= {"lengths_ptr": "*i32:16", "H": "i32:16", "score_scale": "fp32"}
    signature |= dict.fromkeys(("table_stride", "valid_stride"), "i32")
    axes = "bh" if decode else "bth"
    signature |= {f"{part}_stride_{axis}": "i32:16" for part in ("latent", "rope") for axis in axes}
    if decode:
        signature |= {"part_ptr": "*fp32:16", "lse_ptr": "*fp32:16"}
    else:
        signature |= {"out_ptr": "*bf16:16", "T": "i32"}
    constexprs = {"C": C, "R": R, "PAGE": PAGE, "BLOCK_N": tiles.keys, "BLOCK_C": C, "BLOCK_R": R}
    constexprs |= {"WIDEN": False, "BLOCK_H" if decode else "BLOCK_M": tiles.rows}
    absent = ["valid_ptr"] + (["scale_ptr"] if case.kind == "bf16" else [])
    how = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return _job(
        "mla_decode" if decode else "mla_prefill", case, signature, constexprs, absent, **how
    )


def _append(case: Case) -> Job:
    moved = "bf16" if case.kind == "bf16" else "u8"  # as it lies
    signature = {f"{new}latent_ptr": f"*{moved}:16" for new in ("new_", "")}
    signature |= {f"{new}rope_ptr": "*bf16:16" for new in ("new_", "")}
    signature |= {f"{new}scale_ptr": "*fp32:16" for new in ("new_", "")}
    signature |= {"table_ptr": "*i32:16", "lengths_ptr": "*i32:16", "table_stride": "i32"}
    strides = [
        f"{part}_{what}" for part in ("latent", "rope") for what in ("stride_b", "stride_t", "row")
    ]
    signature |= dict.fromkeys(strides, "i32:16")
    constexprs = {"C": C, "R": R, "PAGE": PAGE, "BLOCK_C": C, "BLOCK_R": R}
    absent = ["scale_ptr", "new_scale_ptr"] if case.kind == "bf16" else []
    return _job("mla_append", case, signature, constexprs, absent)


def _sum_parts(case: Case) -> Job:
    signature = {"part_ptr": "*fp32:16", "lse_ptr": "*fp32:16", "out_ptr": "*bf16:16", "S": "i32"}
    constexprs = {"C": C, "BLOCK_S": MAX_PARTS, "BLOCK_C": SUM_COLUMNS}
    return _job("mla_decode", case, signature, constexprs)


def _job(
    module: str,
    case: Case,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    absent: Any = (),
    **how: int,
) -> Job:
    """Leave optional pointers out."""
    there = {name: kind for name, kind in signature.items() if name not in absent}
    given = {**constexprs, **dict.fromkeys(absent)}
    return Job(f"{KERNELS}.{module}:{case.kernel}", there, case.target, given, **how)
