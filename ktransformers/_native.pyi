"""The C++ kernels: packed weights, the routed experts, and the pieces they are made of.

Tensors are contiguous, on the CPU, and belong to the caller: anything that speaks DLPack will do.
What a function writes is an argument (`packed`, `scale`, `q`, `out`, ...). Nothing here tracks
gradients. Formulas and packed layouts are in the headers under `csrc/`.

A `format` is that of weights: `int8`, `int4-32`, `int4-64`, `int4-128` (groups of so many along k
share a scale) or `bf16`.

`KTRANSFORMERS_ISA` caps the instruction set; the keyword `isa` asks for a lower one still, to
compare. Both raise ValueError for one that this process cannot use.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

def isa() -> str:
    """Return the best instruction set in use, `avx2` for example."""

def isas() -> list[str]:
    """Return the instruction sets that this process can use, best first."""

def kernels() -> list[tuple[str, str]]:
    """Return every kernel of this build as (operation, isa), whether it can run here or not."""

def kernel_runs() -> dict[tuple[str, str], int]:
    """Return how often each kernel has run in this process, by (operation, isa)."""

def default_threads() -> int:
    """Return the physical cores in the affinity mask, capped by the cgroups' CPU quota."""

def pool_threads() -> int:
    """Return the worker threads alive; the calling thread is one more."""

def topology(root: str = "") -> Topology:
    """Read what the calling thread may use of the machine, from files under `root`/sys and /proc.

    Never raises for what is missing there: every CPU is then a core, and all memory is node 0.
    """

def numa_mode(wanted: str | None = None) -> str:
    """Return `wanted`, checked; without one, what the environment says.

    `USE_NUMA=1`, the classic switch, means `replicate`; otherwise it is `interleave`. Raises
    ValueError for another mode or another value.
    """

def numa_plan(
    mode: str,
    *,
    matrices: int,
    outputs: int,
    output_bytes: int,
    nodes: Sequence[int] | None = None,
) -> list[NumaPart]:
    """Cut a packed weight into parts of memory, one or one per node (csrc/numa_memory.h).

    `matrices` of one shape, one per expert, or two where gate and up are stored together;
    `outputs` of each, a multiple of 32; `output_bytes` of one output's packed weights. `nodes`
    defaults to `topology().nodes(mode)`. Allocates nothing.
    """

def scratch_bytes() -> int:
    """Return the bytes of intermediates that layers keep, as of the calls that have returned.

    There are as many scratches as calls have run at once; each grows to its largest call's need.
    """

def formats() -> list[str]:
    """Return the names of all weight formats."""

def packed_bytes(n: int, k: int, format: str) -> int:
    """Return the bytes of a packed matrix `[n, k]`, n padded to 32 and k as the format asks."""

def scale_count(n: int, k: int, format: str) -> int:
    """Return how many scales a packed matrix has: fp32 in int8, bf16 in int4, none in bf16."""

def pack(
    weight: Tensor, packed: Tensor, scale: Tensor, format: str, *, isa: str | None = None
) -> None:
    """Quantise and pack one matrix; releases the GIL, and may run in several threads at once.

    `weight` `[n, k]` bf16, fp16 or fp32; `packed` uint8 `[packed_bytes(n, k, format)]`; `scale`
    `[scale_count(n, k, format)]`, in int4 as [n/16][k/group_size][16]. Raises ValueError where a
    weight is not finite: how many, and the first.
    """

def unpack(packed: Tensor, out: Tensor, format: str) -> None:
    """Read packed weights back into `out` `[n, k]`: int8 integers, or bf16 in that format."""

def quantize_rows(
    x: Tensor, q: Tensor, scale: Tensor, sum: Tensor, *, isa: str | None = None
) -> None:
    """Quantise each row of `x` `[m, k]` symmetrically to int8 (csrc/quantize/quantize.h).

    `q` int8 `[m, k padded to a multiple of 64]`, `scale` fp32 `[m]`, `sum` int32 `[m]`.
    """

def sum_groups(q: Tensor, sum: Tensor, *, isa: str | None = None) -> None:
    """Sum each row of `q` int8 `[m, k]` in as many equal groups as `sum` int32 has columns."""

def gemm(
    a: Tensor,
    a_scale: Tensor | None,
    a_sum: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    out: Tensor,
    format: str,
    *,
    rows: Tensor | None = None,
    isa: str | None = None,
) -> None:
    """Multiply rows of activations with packed weights (csrc/gemm.h).

    `a` `[*, k]` int8 in [-127, 127], with `a_scale` from `quantize_rows` and `a_sum` int32
    `[*, 1]` from there too, in int4 `[*, k / group_size]` from `sum_groups`; or, in the format
    bf16, bf16 with neither. `out` fp32 `[m, n]`, k and n as padded, in the format bf16 n to 16;
    `rows` int32 `[m]` picks rows of `a`.
    """

def silu_mul(gate: Tensor, up: Tensor, out: Tensor, *, isa: str | None = None) -> None:
    """Compute silu(gate) * up, all fp32 `[m, n]`, n a multiple of 16 (csrc/silu/silu.h)."""

def weighted_add(
    d: Tensor, token: Tensor, weight: Tensor, y: Tensor, *, isa: str | None = None
) -> None:
    """Add `weight[i] * d[i]` to `y[token[i]]`, row after row (csrc/combine/combine.h).

    `d` fp32 `[m, n]`, `token` int32 `[m]`, `weight` fp32 `[m]`, `y` fp32 `[*, n]`, n a multiple
    of 16.
    """

def round_rows(y: Tensor, out: Tensor, *, isa: str | None = None) -> None:
    """Round fp32 `y` `[m, n]` to `out`, bf16 or fp32; every NaN becomes the same quiet one."""

def softmax_step(
    scores: Tensor,
    scale: float,
    seen: Tensor,
    maximum: Tensor,
    sum: Tensor,
    factor: Tensor,
    p: Tensor | None,
    *,
    isa: str | None = None,
) -> None:
    """Turn a tile of scores into weights, one query a column (csrc/attention/attention.h).

    `scores` fp32 `[keys, columns]`, keys even and columns a multiple of 16; of them each column
    sees the first `seen` int32 `[columns]`. `maximum` and `sum` fp32 `[columns]` are updated;
    `factor` fp32 `[columns]` and `p` bf16 `[keys / 2, columns, 2]` are written; without `p` the
    weights take the scores' places, not rounded.
    """

def rescale_add(factor: Tensor, x: Tensor, acc: Tensor, *, isa: str | None = None) -> None:
    """Compute `acc[i] * factor[i] + x[i]` into `acc`, fp32 `[m, n]`, n a multiple of 16."""

def dequantise_rows(
    q: Tensor, scale: Tensor, group_size: int, out: Tensor, *, isa: str | None = None
) -> None:
    """Round `q[i, j] * scale[i, j // group_size]` to `out`: int8 and bf16 `[m, n]`.

    `scale` fp32 `[m, ceil(n / group_size)]`, group_size a multiple of 16.
    """

def widen_rows(q: Tensor, out: Tensor, *, isa: str | None = None) -> None:
    """Copy int8 `[m, n]` to int16 `[m, n]`."""

def quantize_pairs(
    x: Tensor, factor: Tensor | None, q: Tensor, scale: Tensor, *, isa: str | None = None
) -> None:
    """Quantise columns to int16 (csrc/quantize/quantize.h): `q` int16 `[k / 2, n, 2]`.

    `x` is fp32 `[k, n]`, of which each row is multiplied by its `factor` `[k]`, or without factors
    bf16 `[k / 2, n, 2]`; `scale` fp32 `[n]`, n a multiple of 8.
    """

def int16_gemm(
    a: Tensor,
    a_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    c_scale: Tensor,
    c: Tensor,
    *,
    isa: str | None = None,
) -> None:
    """Add the product of int16 rows to `c` (csrc/int16_gemm/int16_gemm.h).

    `a` int16 `[m, k]`, `packed` int16 `[n / 16, k / 2, 16, 2]`, one of the two in [-127, 127];
    `c` fp32 `[m, n]`; `a_scale` and `c_scale` fp32 `[m]`, `w_scale` `[n]`; k even, 512 at most.
    """

def pair_rows(x: Tensor, packed: Tensor, *, isa: str | None = None) -> None:
    """Interleave pairs of rows: bf16 `[m, n]` to `[n / 16, m / 2, 16, 2]`."""

def transpose_pairs(x: Tensor, out: Tensor, *, isa: str | None = None) -> None:
    """Transpose bf16 `[m, n, 2]` to `[n, m, 2]`, m and n multiples of 8."""

def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, *, isa: str | None = None) -> None:
    """Normalise each row of `x` `[m, n]`, all bf16 or all fp32 (csrc/norm/norm.h)."""

def add_rows(a: Tensor, b: Tensor, out: Tensor, *, isa: str | None = None) -> None:
    """Add `a` and `b` `[n]`, all bf16 or all fp32, rounded once (csrc/norm/norm.h)."""

def router_logits(x: Tensor, weight: Tensor, out: Tensor, *, isa: str | None = None) -> None:
    """Multiply `x` `[m, k]` with `weight` `[E, k]`, both bf16 or both fp32, to fp32 `[m, E]`."""

def rotate(x: Tensor, cos: Tensor, sin: Tensor | None, out: Tensor, rotary: str) -> None:
    """Turn pairs of `x` `[T, H, R]` by the angles of each token (csrc/rotary/rotary.h).

    `cos`, `sin` and `rotary` as `DecoderLayer` takes them, of one sequence.
    """

def choose_experts(
    logits: Tensor,
    bias: Tensor | None,
    index: Tensor,
    weight: Tensor,
    *,
    groups: int = 1,
    top_groups: int = 1,
    normalise: bool = False,
    routed_scaling: float = 1.0,
) -> None:
    """Choose experts by fp32 `logits` `[T, E]` (csrc/router/router.h).

    `index` int32 and `weight` fp32 `[T, K]`. With a `bias` fp32 `[E]` as DeepSeek-V3 does, by
    sigmoid; without, as V2 does, by softmax.
    """

def bench_read_bandwidth(buffer: Tensor, threads: int | None = None, seconds: float = 0.2) -> float:
    """Return the bytes per second at which threads read a uint8 buffer, again and again."""

def bench_peak(
    format: str, threads: int | None = None, seconds: float = 0.2, *, isa: str | None = None
) -> tuple[float, str]:
    """Return the operations per second that registers alone allow, and the instructions.

    Of the exact int8 dot product, or with the format bf16 that of bf16.
    """

class Topology:
    """What a thread may use of the machine (csrc/topology.h)."""

    @property
    def cores(self) -> list[tuple[int, list[int]]]:
        """Physical cores: the node, and the CPUs in the affinity mask."""

    @property
    def memory_nodes(self) -> list[int]:
        """Nodes with memory that this process may use."""

    @property
    def threads(self) -> int:
        """The number of cores, capped by the CPU quota: what `threads: auto` means."""

    def nodes(self, mode: str) -> list[int]:
        """Return the nodes that a mode uses; shard and replicate leave out those without cores."""

    def place_threads(self, threads: int, caller_cpu: int = -1) -> list[tuple[int, list[int]]]:
        """Return node and CPUs of each thread of a job; no CPUs: it may run anywhere.

        The first is the calling thread, on `caller_cpu`, and is never held to its place.
        """

class NumaPart:
    """Memory for some outputs of every matrix of a weight: `[matrices, outputs, output_bytes]`."""

    @property
    def nodes(self) -> list[int]:
        """The node, or those that the pages are dealt to in turn."""

    @property
    def first_output(self) -> int: ...
    @property
    def outputs(self) -> int:
        """How many of each matrix; 0 where there are fewer panels of 32 than nodes."""

    @property
    def nbytes(self) -> int: ...
    @property
    def allocated(self) -> int:
        """Bytes that `allocate` takes: whole pages."""

    def allocate(self, *, bind: Callable[[int, int, list[int]], object] | None = None) -> object:
        """Return the memory, flat uint8 zeros bound to nodes, as a capsule for `torch.from_dlpack`.

        It is freed with the last tensor that refers to it. `bind(address, bytes, nodes)` takes the
        place of the kernel's mbind, to pretend a machine. Raises MemoryError, or OSError where the
        kernel refuses to bind.
        """

class Experts:
    """The routed experts of one layer (csrc/experts/experts.h).

    Holds references to its tensors and reads their memory in place: change nothing in them.
    `forward` may be called from several threads. A token's output does not depend on the other
    tokens or the number of threads, and with integer weights not on the instruction set.
    """

    def __init__(
        self,
        gate_up_packed: Tensor | Sequence[Tensor],
        gate_up_scale: Tensor | Sequence[Tensor],
        down_packed: Tensor | Sequence[Tensor],
        down_scale: Tensor | Sequence[Tensor],
        *,
        format: str,
        hidden_size: int,
        moe_intermediate_size: int,
        threads: int | None = None,
        chunk_tokens: int | None = None,
        numa: str = "interleave",
        nodes: Sequence[int] = (),
        isa: str | None = None,
    ) -> None:
        """Check and adopt the tensors; D `hidden_size`, F `moe_intermediate_size`, E experts.

        `gate_up_packed` uint8 `[E, 2 * packed_bytes(F, D, format)]`, gate before up;
        `gate_up_scale` `[E, 2, scale_count(F, D, format)]`; `down_packed` uint8
        `[E, packed_bytes(D, F, format)]`; `down_scale` `[E, scale_count(D, F, format)]`. `threads`
        defaults to `default_threads()`.

        In several parts, as `numa_plan(numa, nodes=nodes, ...)` cuts them, each is a sequence of
        tensors, F or D of whose shape is a part's `outputs`. Workers take the tasks of their own
        node's shard first, and read its replica.

        At most `chunk_tokens` are computed at a time, by default 1,024; with K above 8 no more
        than 8 * chunk_tokens / K. This bounds the scratch memory.
        """

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, out: Tensor
    ) -> None:
        """Write the weighted sum of each token's experts to `out`.

        `hidden_states` and `out` bf16 or fp32 `[T, D]` (may be the same tensor); `top_k_index`
        int64 or int32 `[T, K]`, where E means "skip this slot"; `top_k_weights` fp32, bf16 or
        fp16 `[T, K]`. Raises ValueError, naming token and slot, for any other index.
        """

    @property
    def num_experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def chunk_tokens(self) -> int: ...
    @property
    def isa(self) -> str: ...

class Linear:
    """A dense projection without bias (csrc/linear/linear.h).

    Holds references to its tensors and reads their memory in place, as `Experts` does.
    """

    def __init__(
        self,
        packed: Tensor | Sequence[Tensor],
        scale: Tensor | Sequence[Tensor],
        *,
        format: str,
        in_features: int,
        out_features: int,
        threads: int | None = None,
        chunk_tokens: int | None = None,
        numa: str = "interleave",
        nodes: Sequence[int] = (),
        isa: str | None = None,
    ) -> None:
        """Check and adopt the tensors, as `pack` writes them; else as `Experts` says."""

    def forward(self, x: Tensor, out: Tensor) -> None:
        """Project `x` `[T, in_features]` to `out` `[T, out_features]`, both bf16 or both fp32."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def chunk_tokens(self) -> int: ...
    @property
    def isa(self) -> str: ...

def pack_experts(
    gate_proj: object,
    up_proj: object,
    down_proj: object,
    format: str,
    *,
    threads: int | None = None,
    numa: str = "interleave",
    nodes: Sequence[int] = (0,),
    bind: Callable[[int, int, list[int]], object] | None = None,
) -> dict[str, Any]:
    """Quantise and pack all experts of a layer into new memory: what `Experts` takes, by name.

    `gate_proj` and `up_proj` `[E, F, D]`, `down_proj` `[E, D, F]`; bf16, fp16 or fp32. The memory
    is cut as `numa_plan(numa, nodes=nodes, ...)` says, and bound as `NumaPart.allocate` does.
    Raises ValueError where a weight is not finite, MemoryError where there is no memory, OSError
    where the kernel refuses to bind. Heard between experts: Ctrl-C.
    """

class ExpertsHandle:
    """A layer of experts for another engine: hand work in, go on, wait for it later.

    `ktransformers.engine` states the contract.
    """

    def __init__(self, layer: Experts) -> None: ...
    def submit(
        self, hidden_states: object, top_k_index: object, top_k_weights: object, out: object
    ) -> None:
        """Hand in what `Experts.forward` computes, and wait for nothing.

        Raises TypeError or ValueError for wrong types or shapes, RuntimeError after a fork; what
        the computation itself finds, such as an index out of range, is raised by `sync`.
        """

    def sync(self) -> None:
        """Wait until everything submitted so far has ended, and raise the first error of it.

        Ctrl-C ends the wait within a twentieth of a second; the work goes on.
        """

    def host_function(
        self,
        hidden_states: object,
        top_k_index: object,
        top_k_weights: object,
        out: object,
        done: object | None = None,
        times: object | None = None,
    ) -> HostFunction:
        """Return the same `submit`, and `sync`, for a thread without Python to call.

        `done`, int32 `[1]`, is for a device that waits for a word in memory: `submit` sets it to 0,
        and the end of the work, whichever that is, to 1. `times`, int64 `[2]`, gets when the work
        began and when it ended, on the clock of `time.monotonic_ns()`.
        """

    @property
    def layer(self) -> Experts: ...

class HostFunction:
    """Addresses for C: `void (*submit)(void*)`, `void (*sync)(void*)`, and what to pass to them.

    They take no GIL and throw nothing: errors wait for `ExpertsHandle.sync`. The caller keeps this
    object as long as anything may call them; freed with work in flight, it drops that work.
    """

    @property
    def submit(self) -> int: ...
    @property
    def sync(self) -> int: ...
    @property
    def arguments(self) -> int: ...

class MlaAttention:
    """Multi-head latent attention over a paged cache (csrc/mla/mla.h); `kv_b_proj` is part of it.

    Holds references to its tensors and reads their memory in place, as `Experts` does. A query's
    output does not depend on the other sequences of a call or on the number of threads.
    """

    def __init__(
        self,
        uk_packed: Tensor,
        uk_scale: Tensor,
        uv_packed: Tensor,
        uv_scale: Tensor,
        *,
        format: str,
        num_heads: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        kv_lora_rank: int,
        scaling: float,
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        """Check and adopt the tensors; H `num_heads`, C `kv_lora_rank`, Dn, R and Dv the head dims.

        Per head `uk` is the transposed W_UK `[C, Dn]` and `uv` is W_UV `[Dv, C]`, as `pack` writes
        them: uint8 `[H, packed_bytes(C, Dn, format)]` and `[H, packed_bytes(Dv, C, format)]`, with
        scales `[H, scale_count(...)]`.
        """

    def forward(
        self,
        q: Tensor,
        latent: Tensor,
        latent_scale: Tensor | None,
        rope: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        valid: Tensor | None,
        out: Tensor,
        *,
        form: str | None = None,
    ) -> None:
        """Attend with the last T tokens of each of B sequences, causally, and write to `out`.

        `q` bf16 or fp32 `[B, T, H, Dn + R]`, rotated; `out` like it `[B, T, H * Dv]`. The cache:
        `latent` bf16, fp32 or int8 `[P, page_tokens, C]`, int8 with `latent_scale` fp32
        `[P, page_tokens, ceil(C / 128)]`; `rope` bf16 or fp32 `[P, page_tokens, R]`; `block_table`
        int32 `[B, max_pages]`, the pages of each sequence in order; `lengths` int32 `[B]`, its
        tokens with the T new ones. `valid` uint8 `[B, *]`, 0 for tokens that nobody attends to. A
        query that sees nothing gives zeros. `form` asks for `absorbed` or `expanded`; without it
        each sequence takes the one that does less work. Raises ValueError where lengths or
        block_table point outside the cache.
        """

    @property
    def num_heads(self) -> int: ...
    @property
    def qk_nope_head_dim(self) -> int: ...
    @property
    def qk_rope_head_dim(self) -> int: ...
    @property
    def v_head_dim(self) -> int: ...
    @property
    def kv_lora_rank(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...

class DecoderLayer:
    """A whole decoder layer of DeepSeek-V2 or V3 (csrc/decoder/decoder.h).

    Holds references to the layers that it is made of and reads their weights in place.
    """

    def __init__(
        self,
        *,
        input_norm: Tensor,
        q_a: Linear | None,
        query_norm: Tensor | None,
        q_b: Linear,
        kv_a: Linear,
        latent_norm: Tensor,
        attention: MlaAttention,
        o: Linear,
        mlp_norm: Tensor,
        mlp: Experts,
        experts: Experts | None,
        router: Tensor | None,
        router_bias: Tensor | None,
        scaling: float,
        eps: float,
        latent_eps: float,
        rotary: str,
        top_k: int = 1,
        groups: int = 1,
        top_groups: int = 1,
        normalise: bool = False,
        routed_scaling: float = 1.0,
        threads: int | None = None,
        chunk_tokens: int | None = None,
        isa: str | None = None,
    ) -> None:
        """Check that the layers fit together; their own `threads` and `isa` play no part.

        Norms and `router` `[E, D]` in the type of activations, bf16 or fp32. Without `q_a`, q_b
        takes the hidden state itself. `mlp` has one expert: the dense MLP or the shared experts;
        `experts` are the routed ones. `eps` of the norms of the hidden state, `latent_eps` of
        those of what is compressed. `rotary`: `neighbours`, `neighbours_to_halves` or `halves`.
        At most `chunk_tokens` are computed at a time, by default 1,024.
        """

    def forward(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor | None,
        latent: Tensor,
        latent_scale: Tensor | None,
        rope: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        valid: Tensor | None,
        out: Tensor,
        chosen: Tensor | None = None,
        last_only: bool = False,
    ) -> None:
        """Compute `out` of `hidden_states`, both `[B, T, D]`, and cache the T new tokens.

        `cos` and `sin` `[B or 1, T, R]`, bf16 or fp32, whose halves are equal; or without `sin`
        `cos` complex64 `[B or 1, T, R / 2]`, `cos + i sin`. The cache as `MlaAttention.forward`
        takes it: the new tokens are the last of `lengths` and are written there. `chosen` int32
        `[B * T, top_k]` gets the experts of each token. With `last_only` all is cached, but what
        comes after is computed for each sequence's last token alone, and `chosen` is
        `[B, top_k]`; the other rows of `out` are those of `hidden_states`. The last row is that of
        a full call up to attention's rounding: its one query takes the absorbed form.
        """

    def project(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor | None,
        latent: Tensor,
        rope: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        q: Tensor,
    ) -> None:
        """Do what comes before the cache; `q` `[B, T, H, Dn + R]` gets the queries."""

    def finish(
        self,
        hidden_states: Tensor,
        q: Tensor,
        latent: Tensor,
        rope: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        valid: Tensor | None,
        out: Tensor,
        chosen: Tensor | None = None,
        last_only: bool = False,
    ) -> None:
        """Do what comes after the cache, with the queries of `project`; else as `forward`."""

def decode_token(
    layers: list[DecoderLayer],
    embedding: Tensor,
    norm: Tensor,
    eps: float,
    head: Linear | None,
    token_ids: Tensor,
    cos: Tensor,
    sin: Tensor | None,
    caches: list[tuple[Tensor, Tensor | None, Tensor]],
    block_table: Tensor,
    lengths: Tensor,
    out: Tensor,
    check: Callable[[], object] | None = None,
) -> None:
    """Compute `out` `[B, out_features]` of a new token of each sequence, `token_ids` `[B, 1]`.

    That is the row of `embedding` `[V, D]`, all layers, each as its `forward` does, RMSNorm with
    `norm` `[D]` and `head`; without a head the norm's `[B, D]`. All are of the layers' dtype.
    `caches` has latent, latent_scale and rope of each layer. `check` is called before each layer;
    what it raises ends the call.
    """
