"""Routed experts of which some live on a GPU, in four bits, and the CPU computes the others.

Takes the place of `mlp.experts`, as `CpuExperts` and `Int4Experts` do for whole layers, whose
formats and arithmetic are those of its two sides. Both work at the same time on what a router
chose; each is told to skip what the other has. `HybridMoE` around it adds the shared experts.

`policy: static`. The resident experts are a list, or the most used ones of a profile, or the first.
They are on the GPU alone: the CPU's layer is one of fewer experts, numbered anew, and nothing on
the host is ever allocated for the others.

`policy: lru`. The host has every expert twice, in the CPU's format and, pinned, in the GPU's. Slots
on the GPU hold those that were used last. A step, one call of the layer, computes with what it
finds there and uploads up to `uploads` of the experts that it missed, for the next step: it never
waits for one. The device decides (`kernels/expert_slots.py`) and copies by itself, so that a CUDA
graph holds all of it. `docs/adr/0014` says why, `benchmarks/expert_policies.py` what it is worth.

Shape suffixes: T tokens, D hidden_size, E experts, H experts on the host, S resident experts or
slots, K top_k, F moe_intermediate_size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import nn
from typing_extensions import Self

from ktransformers.base import Checkpoint, Footprint, Operator, Site
from ktransformers.checkpoint import check_finite, read_checked
from ktransformers.cpu_options import chunk_size, thread_count, weight_format
from ktransformers.expert_profile import chosen_experts, uses_of_layer
from ktransformers.fused_experts import check_activation, experts_sizes
from ktransformers.gpu_options import check_gpu, gpu_device, triton_on, within_reach
from ktransformers.host_experts import ExpertsCall, HostExperts, Routing
from ktransformers.numa import weight_placement
from ktransformers.operators.kernels.expert_slots import ExpertSlots
from ktransformers.operators.kernels.int4_expert_weights import Int4ExpertWeights
from ktransformers.operators.kernels.int4_weight import Int4Weight, Layout, asked_format
from ktransformers.packed_weights import PROJECTIONS, ExpertsWeights
from ktransformers.streams import stream_of

GPU = "resident_"  # before the names of what is packed for it
UPLOADS = 1  # of V3's experts 22 MB: about a millisecond of a layer, in which the CPU computes

Tensors = Mapping[str, torch.Tensor]


class _Policy(Protocol):
    """Where a layer's experts are; asked and told in turn, once a step."""

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which number each expert has on the host and on the GPU, both [E + 1].

        What a side has not is its "skip", as is the number of experts to both.
        """

    def used(self, top_k_index: torch.Tensor) -> None:
        """Hear what a step used, all of which is on its way."""


class _Static:
    """The same experts stay."""

    def __init__(self, sides: Sequence[Sequence[int]], num_experts: int, device: torch.device):
        """Take which experts the host has, and which the GPU."""
        tables = []
        for experts in sides:
            table = torch.full((num_experts + 1,), len(experts))
            table[list(experts)] = torch.arange(len(experts))
            tables.append(table.to(device))
        self.host_of, self.slot_of = tables

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.host_of, self.slot_of

    def used(self, top_k_index: torch.Tensor) -> None:
        pass


class _Lru:
    """Slots hold the experts that were used last, as copies of the host's."""

    def __init__(self, slots: ExpertSlots, host: Tensors, held: Tensors, uploads: int):
        """Take memory of all experts on the host, and of those in slots."""
        self.slots, self.host, self.held, self.uploads = slots, host, held, uploads

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        slot_of, S = self.slots.slot_of, len(self.slots.experts)
        numbers = torch.arange(len(slot_of), device=slot_of.device)
        return numbers.masked_fill(slot_of != S, len(slot_of) - 1), slot_of

    def used(self, top_k_index: torch.Tensor) -> None:
        # Brings Triton, which packing and looking at plans do without.
        from ktransformers.operators.kernels.expert_upload import expert_upload

        experts, targets = self.slots.step(top_k_index, self.uploads)
        for name, held in self.held.items():
            expert_upload(self.host[name], held, experts, targets)


class ResidentExperts(HostExperts):
    """Compute some of a layer's routed experts on a GPU and the others on the CPU."""

    def __init__(
        self,
        site: Site,
        *,
        num_experts: int,
        resident: Sequence[int],
        share: float,
        uploads: int | None,
        int4: Int4ExpertWeights,
        device: torch.device,
        **host: Any,
    ):
        """Take what `from_module` made of its arguments.

        Args:
            resident: the experts on the GPU; with `uploads` those that it begins with.
            share: of a token's experts, that are expected there.
            uploads: a step, at most; None where nothing moves.
            host: how the CPU computes, for `HostExperts`.
        """
        self.resident, self.share, self.uploads = tuple(resident), share, uploads
        self.int4, self.device = int4, device
        on_host = [e for e in range(num_experts) if uploads is not None or e not in self.resident]
        super().__init__(site, num_experts=num_experts, on_host=on_host, **host)
        self._policy: _Policy | None = None
        self._int4_weights: tuple[Int4Weight, Int4Weight] | None = None
        # What one thread hands to the stream between reading which expert is where and changing
        # it, no other thread's work may come between.
        self._one_at_a_time = threading.Lock()

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        site: Site,
        *,
        resident: int | list[int],
        device: str = "cuda:0",
        policy: Literal["static", "lru"] = "static",
        profile: str | None = None,
        uploads: int | None = None,
        group_size: Literal[32, 64, 128, -1] = 128,
        symmetric: bool = True,
        weight: Literal["int8", "int4", "bf16"] = "int8",
        cpu_group_size: Literal[32, 64, 128] | None = None,
        threads: int | Literal["auto"] = "auto",
        numa: Literal["interleave", "shard", "replicate"] | None = None,
        chunk_tokens: int | None = None,
    ) -> Self:
        """Build the operator for a fused experts module.

        Args:
            resident: how many experts the GPU holds, or their numbers.
            device: the GPU; `cpu` only for tests, in Triton's interpreter (TRITON_INTERPRET=1).
            policy: whether the same experts stay there, or those that were used last.
            profile: a file of `ktransformers.expert_profile`: the most used experts are resident,
                or at first, instead of those with the lowest numbers.
            uploads: for lru, how many experts a step brings to the GPU at most; 1 by default.
            group_size, symmetric: the GPU's format, as `Int4Experts` has it.
            weight, cpu_group_size, threads, numa, chunk_tokens: the CPU's format and how it
                computes, as `CpuExperts` has it, where cpu_group_size is group_size.

        Raises ValueError where the module is no gated SiLU experts module that such groups divide,
        activations are not bf16, or the experts asked for are not there.
        """
        E, D, F = experts_sizes(module)
        if site.dtype != torch.bfloat16:  # what both sides take
            raise ValueError(f"takes bfloat16 activations, not {site.dtype}")
        int4_format = asked_format(group_size, symmetric, (D, F), site.dtype)
        int4 = Int4ExpertWeights(int4_format, D, F)
        check_activation(module, site)
        _check_policy(policy, uploads, resident, profile)
        uses = None if profile is None else uses_of_layer(profile, site.layer, E)
        experts = chosen_experts(resident, E, uses)
        if policy == "static":
            experts = sorted(experts)
            if len(experts) == E:
                raise ValueError(
                    f"resident experts are all {E} of the layer: Int4Experts is the operator for "
                    "that"
                )
        counts = uses if uses is not None and any(uses) else [1] * E
        share = sum(counts[expert] for expert in experts) / sum(counts)
        return cls(
            site,
            num_experts=E,
            resident=experts,
            share=share,
            uploads=(uploads or UPLOADS) if policy == "lru" else None,
            int4=int4,
            device=gpu_device(device),
            hidden_size=D,
            width=F,
            weight_format=weight_format(weight, cpu_group_size, "cpu_group_size"),
            threads=thread_count(threads),
            placement=weight_placement(numa),
            chunk_tokens=chunk_size(chunk_tokens),
        )

    def connect(self, operators: Mapping[str, Operator]) -> None:
        """Refuse an operator around it that stands elsewhere than the GPU."""
        parent, _, child = self.site.name.rpartition(".")
        around = operators.get(parent)
        if around is None or child not in around.host_children or self.site.device == self.device:
            return
        raise ValueError(
            f"its device is {self.device}, but {type(around).__name__} around it stands on "
            f"{self.site.device}: keep the layer on {self.device} by a rule with class: default"
        )

    def elsewhere(self) -> Layout:
        """Name what is packed for the GPU, of all experts that it may ever get."""
        count = len(self.resident) if self.uploads is None else self.num_experts
        return {GPU + name: of for name, of in self.int4.layout(count).items()}

    def packed_format(self) -> str:
        """Say what the bytes of either side mean, and whose they are."""
        whose = "all" if self.uploads is not None else ", ".join(map(str, self.resident))
        return f"{super().packed_format()}; on a GPU {self.int4}: experts {whose}"

    def check_machine(self) -> None:
        """Refuse a machine without the GPU, or whose stream can't call the CPU."""
        check_gpu(self.device)
        try:
            stream_of(self.device)
        except ImportError as error:
            raise ValueError(str(error)) from error

    def computed_by(self) -> str:
        """Name Triton and the GPU."""
        return triton_on(self.device)

    def graph_obstacle(self) -> None:
        """Name none: with lru, too, the device decides."""

    def footprints(self) -> tuple[Footprint, Footprint]:
        """Say what CPU and GPU need; a token's experts divide as the profile has it, or evenly.

        With lru what the CPU holds includes the pinned experts; what uploads read is left out.
        """
        active = min(self.site.config.num_experts_per_tok, self.num_experts)
        flops = active * PROJECTIONS * 2 * self.hidden_size * self.moe_intermediate_size
        packed, one = self.packed_bytes(), self.int4.nbytes(1)
        pinned = 0 if self.uploads is None else self.num_experts * one
        read = packed // self.placement.copies // len(self.on_host) * active
        ours, theirs = self.share, 1 - self.share
        return (
            Footprint(
                torch.device("cpu"), packed + pinned, int(flops * theirs), int(read * theirs)
            ),
            Footprint(
                self.device, len(self.resident) * one, int(flops * ours), int(one * active * ours)
            ),
        )

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name three matrices per expert."""
        modules = tuple(f"{self.site.name}.{expert}" for expert in range(self.num_experts))
        return ExpertsWeights(modules, self.hidden_size, self.moe_intermediate_size, "").shapes()

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Read one matrix at a time, and quantise and pack it for the side that computes it.

        Raises ValueError, naming file and tensor, for a wrong shape and for NaN or infinity;
        MemoryError where a device has no room.
        """
        moves = self.uploads is not None
        at_host = {expert: at for at, expert in enumerate(self.on_host)}
        at_gpu = at_host if moves else {expert: at for at, expert in enumerate(self.resident)}
        memory = self.placed_memory()
        with self._filling_gpu() as gpu:
            home = torch.device("cpu") if moves else gpu
            tensors = {
                name: torch.empty(shape, dtype=dtype, device=home)
                for name, (shape, dtype) in self.int4.layout(len(at_gpu)).items()
            }
            for index, (name, shape) in enumerate(self.weight_shapes().items()):
                expert, projection = divmod(index, PROJECTIONS)
                weight = read_checked(checkpoint, name, shape)
                if expert in at_host:
                    at = at_host[expert]
                    self.weights.put(memory, at, projection, weight, checkpoint, name)
                if expert in at_gpu:
                    check_finite(checkpoint, name, weight)
                    self.int4.put(tensors, at_gpu[expert], projection, weight.to(gpu))
        self.use_placed(memory)
        self.use_elsewhere({GPU + name: tensor for name, tensor in tensors.items()})

    def use_elsewhere(self, tensors: Tensors) -> None:
        """Bring the experts to the GPU, or to memory that it can read, and some of those to it.

        Raises MemoryError where the GPU has no room.
        """
        E, moves = self.num_experts, self.uploads is not None
        with self._filling_gpu() as gpu:
            for name, tensor in tensors.items():
                if not moves:
                    tensor = tensor.to(gpu)
                elif gpu.type == "cuda":
                    # Not torch's pinned memory, which comes in powers of two.
                    tensor = torch.empty_like(tensor).copy_(tensor)
                    stream_of(gpu).pin(tensor)
                setattr(self, name, tensor)
            held = {name: self.get_buffer(GPU + name) for name in self.int4.layout(0)}
            if self.uploads is None:
                self._policy = _Static((self.on_host, self.resident), E, gpu)
            else:
                host, held = held, self._filled_slots(held, gpu)
                slots = ExpertSlots.holding(self.resident, E, gpu)
                self._policy = _Lru(slots, host, held, self.uploads)
        self._int4_weights = self.int4.weights(held)

    @contextmanager
    def _filling_gpu(self) -> Iterator[torch.device]:
        """Yield the GPU. Raises MemoryError where it turns out to have no room."""
        try:
            yield within_reach(self.device)
        except torch.OutOfMemoryError as error:
            nbytes = len(self.resident) * self.int4.nbytes(1)
            reason = f"no memory on {self.device} for {nbytes:,} bytes of resident experts"
            raise MemoryError(self._refusal(reason)) from error

    def _filled_slots(self, host: Tensors, gpu: torch.device) -> dict[str, torch.Tensor]:
        """Return the slots' memory, with the experts that it begins with; as buffers, too."""
        held = {}
        for name, (shape, dtype) in self.int4.layout(len(self.resident)).items():
            held[name] = torch.empty(shape, dtype=dtype, device=gpu)
            for slot, expert in enumerate(self.resident):
                held[name][slot].copy_(host[name][expert])
            self.register_buffer(f"slots_{name}", held[name], persistent=False)
        return held

    def start(
        self, hidden_states: torch.Tensor, parts: Sequence[Routing]
    ) -> tuple[list[ExpertsCall], torch.Tensor | None]:
        """Start both sides on the GPU's stream: each part on the CPU, all of them on the GPU.

        Experts that this step has missed are uploaded last, over what it has computed with.
        """
        # Brings Triton, which packing and looking at plans do without.
        from ktransformers.operators.kernels.int4_experts import int4_experts

        layer, stream = self.native_layer(), stream_of(self.device)
        assert self._policy is not None
        assert self._int4_weights is not None
        x = hidden_states.to(self.device)
        parts = [(index.to(self.device), weights.to(self.device)) for index, weights in parts]
        index, weights = (torch.cat(of, dim=1) for of in zip(*parts, strict=True))
        with self._one_at_a_time:
            host_of, slot_of = self._policy.tables()
            host_states = stream.copy_in(x)
            calls = [ExpertsCall(stream, layer, host_states, host_of[i], w) for i, w in parts]
            resident = int4_experts(x, slot_of[index], weights, *self._int4_weights)
            self._policy.used(index)
        return calls, resident

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs, [T, D], in the input's dtype.

        Args:
            hidden_states: [T, D], bf16.
            top_k_index: [T, K], integers; the number of experts means "skip this slot".
            top_k_weights: [T, K], floating point.

        Raises ValueError for wrong shapes or dtypes, RuntimeError where weights are not loaded or
        a gradient is asked for.
        """
        self.check_no_gradient(hidden_states, top_k_weights)
        (call,), resident = self.start(hidden_states, [(top_k_index, top_k_weights)])
        assert resident is not None
        return (call.join() + resident).to(hidden_states.device)

    def extra_repr(self) -> str:
        """Show sizes, formats and devices where the module tree is printed."""
        E, D, F = self.num_experts, self.hidden_size, self.moe_intermediate_size
        S, how = len(self.resident), "static" if self.uploads is None else "lru"
        shape = f"num_experts={E}, {D} -> {F} -> {D}"
        gpu = f"{S} on {self.device} in {self.int4.format} ({how})"
        return f"{shape}, {gpu}, weight={self.weight_format}, threads={self.threads}"


def _check_policy(policy: object, uploads: object, resident: object, profile: object) -> None:
    """Raise ValueError for kwargs that do not go together."""
    if policy not in ("static", "lru"):
        raise ValueError(f"policy {policy!r} is not supported (expected static, lru)")
    if uploads is not None and policy == "static":
        raise ValueError(f"uploads {uploads!r} is for policy lru: static moves no expert")
    if uploads is not None and (type(uploads) is not int or uploads < 1):
        raise ValueError(f"uploads {uploads!r} is not a number of 1 or more")
    if isinstance(resident, list) and policy == "lru":
        raise ValueError(
            "resident is a list, which lru would not keep: give how many experts the GPU holds"
        )
    if profile is None:
        return
    if not isinstance(profile, str):
        raise ValueError(f"profile {profile!r} is not the path of a file")
    if isinstance(resident, list):
        raise ValueError("resident is a list, and profile would choose: give one of the two")
