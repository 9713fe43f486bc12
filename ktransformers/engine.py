"""Routed experts for other engines: load, submit, sync on plain tensors, without transformers.

    handle = load_experts(gate_proj, up_proj, down_proj, weight="int8")
    handle.submit(hidden_states, top_k_index, top_k_weights, out)   # returns at once
    ...                                                             # whatever else there is to do
    handle.sync()                                                   # now `out` holds the result

Tensors are whatever speaks DLPack and lies on the CPU, contiguous: torch's, or numpy's for fp32 and
integers. Neither library is imported here. The layer is `CpuExperts`' own: the same bits.

The contract:

* **Order.** A handle's submissions are computed one after the other, as they came. `submit` waits
  for none of them. One thread per process computes for all handles, on the pool that every layer of
  ours shares.
* **Memory.** The caller leaves the tensors of a submission alone until the `sync` after it, and
  does not resize them; the handle holds references to them for that long.
* **Errors.** What is wrong with a tensor's type or shape is raised by `submit`, which then hands
  nothing in. What only computing finds (an index out of range, no memory for intermediates) is
  raised by the next `sync`: the first error since the last one. Other submissions are computed
  all the same; the `out` of those that failed means nothing.
* **Sync** may be called again at will: with nothing in flight it returns at once. Ctrl-C ends the
  wait and not the work, which the next `sync` waits for.
* **Fork.** A child's use of its parent's handle raises RuntimeError: it loads its own.
* **Exit.** What is in flight when the interpreter exits is dropped, at most a chunk of one layer
  later. So is that of a handle that is freed.

For callbacks that must not touch Python, as `cudaLaunchHostFunc` asks, `handle.host_function(...)`
takes the same tensors, once, and gives the addresses of two C functions, `submit` and `sync`, both
`void (*)(void* arguments)`, with the `arguments` for both. They may be called on any thread, again
and again; what they meet with is raised by the handle's `sync` in Python. The caller keeps the
object as long as they may be called. Where a device waits for a word in memory instead, `done`,
int32 [1], is it: 0 from `submit` on, 1 once the work has ended, failed or was dropped. `times`,
int64 [2], gets when the work began and when it ended, in `time.monotonic_ns()`.

Letters in shapes: T tokens, D hidden_size, E experts, K top_k, F moe_intermediate_size.
"""

from __future__ import annotations

from typing import Literal

from ktransformers import _native
from ktransformers._native import ExpertsHandle, HostFunction
from ktransformers.cpu_options import thread_count, weight_format
from ktransformers.numa import weight_placement

__all__ = ["ExpertsHandle", "HostFunction", "load_experts"]


def load_experts(
    gate_proj: object,
    up_proj: object,
    down_proj: object,
    *,
    weight: Literal["int8", "int4", "bf16"] = "int8",
    group_size: Literal[32, 64, 128] | None = None,
    threads: int | Literal["auto"] = "auto",
    numa: Literal["interleave", "shard", "replicate"] | None = None,
) -> ExpertsHandle:
    """Quantise and pack the experts of a layer, and return a handle that computes with them.

    Args:
        gate_proj: [E, F, D], bf16, fp16 or fp32; not needed after this call, nor are the others.
        up_proj: [E, F, D].
        down_proj: [E, D, F].
        weight: the format to pack to.
        group_size: inputs that share a scale, for int4 alone; 128 where it is not given.
        threads: how many to compute with; auto means every physical core that the process may run
            on, within its CPU quota.
        numa: where the weights lie on a machine of several nodes, as in a rule: their pages dealt
            to all in turn, a slice of every matrix on each, or a copy on each. Without it the
            classic switch decides: USE_NUMA=1 means replicate; else they are interleaved.

    Raises TypeError or ValueError for tensors that do not fit together, ValueError for weights that
    are not finite and for options, MemoryError where there is no memory for the packed weights.
    """
    format_name, count = weight_format(weight, group_size), thread_count(threads)
    placement = weight_placement(numa)
    layer = _native.pack_experts(
        gate_proj,
        up_proj,
        down_proj,
        format_name,
        threads=count,
        numa=placement.mode,
        nodes=placement.nodes,
        bind=placement.binding,
    )
    return ExpertsHandle(_native.Experts(**layer, threads=count))
