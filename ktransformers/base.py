"""The contract of an operator: what takes a module's place, and what it is told and must tell.

An operator is born on the meta device, inside `plan`, from the module that it will replace. It
says what it needs (`footprint`) before any weight exists, takes its place in `apply`, and reads
its own weights from a checkpoint in `load`. What it cannot do it says by raising `ValueError` in
`from_module`; it never falls back in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from typing_extensions import Self


@dataclass(frozen=True, slots=True)
class Site:
    """Where an operator stands: everything that it may know of the model around it."""

    name: str  # dotted module name, such as model.layers.3.mlp.experts
    layer: int | None  # the decoder layer that the name lies in
    config: Any  # the model's PreTrainedConfig
    dtype: torch.dtype  # of the activations that reach it
    device: torch.device  # where unpacked weights of the model live
    rule: str  # "rules/v3.yaml:12: rule 3", for messages


@dataclass(frozen=True, slots=True)
class Footprint:
    """What an operator needs on a device, known before any weight exists."""

    device: torch.device
    weight_bytes: int  # resident once loaded
    flops_per_token: int  # multiply and add count as two
    bytes_read_per_token: int  # of weights, for one token alone


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a checkpoint, unread."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # as `Checkpoint.read` returns it
    file: str  # where it lies, for messages
    nbytes: int  # that reading it moves


class Checkpoint(Protocol):
    """Tensors by their HuggingFace name, read lazily, whatever the file format.

    Canonical names are one tensor per expert (`...mlp.experts.7.up_proj.weight`), also where the
    file holds all experts fused. Block scales of FP8 weights are applied by `read` and have no
    name of their own. All methods are safe to call from several threads at once.
    """

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by canonical name."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU, contiguous; the caller owns the memory.

        Raises ValueError, naming file and tensor, where the file does not hold what it promises.
        """


@dataclass(frozen=True, slots=True)
class ChainEnds:
    """What stands before and after decoder layers, all of one dtype, on the CPU."""

    embedding: torch.Tensor  # [vocab_size, hidden_size]
    norm: torch.Tensor  # [hidden_size], of an RMSNorm
    eps: float
    head: Any  # a `_native.Linear`; None: it is left to the caller


class Chain(Protocol):
    """What decodes a token of each sequence with all of a model in one go."""

    def __call__(
        self,
        token_ids: torch.Tensor,
        position_embeddings: Any,
        cache: Any,
        check: Callable[[], object] | None,
    ) -> torch.Tensor:
        """Return the logits, [B, vocab_size]; without a head what it takes, [B, hidden_size].

        Args:
            token_ids: [B, 1].
            position_embeddings: of the model's rotary embedding.
            cache: a `LatentCache`, which all layers have filled alike, without padding.
            check: is called before each layer; what it raises ends the call.
        """


class Operator(nn.Module):
    """A module that takes another's place. Its `forward` has that module's signature."""

    consumes: ClassVar[Collection[str] | None] = None
    """Names of the direct children whose work this operator does itself; None means all.

    The others stay modules, are called through their `forward` and may be claimed by other rules:
    the operator keeps them as its own children, the same objects under the same names, which
    `plan` checks.
    """
    causal: ClassVar[bool] = False
    """Whether this is attention, or has it, and looks at no later token whatever mask comes.

    Where all attention of a model does, nobody makes masks of queries x keys for it: it gets none,
    or which keys are no padding, [B, L].
    """
    host_children: ClassVar[Collection[str]] = ()
    """Children that this operator gives tensors on the CPU, on whatever device it stands itself."""

    cache_format: str | None = None
    """What attention was planned to cache latents in; None leaves it to whoever makes the cache."""

    @classmethod
    def from_module(cls, module: nn.Module, site: Site, *args: Any, **kwargs: Any) -> Self:
        """Build the operator for `module`, with every tensor on the meta device.

        Called under `torch.device("meta")`. Subclasses name their kwargs one by one: a rule's
        `kwargs` are checked against this signature. `module` is read, never changed.

        Raises ValueError with the reason where the operator cannot take this module's place.
        """
        raise NotImplementedError(f"{cls.__name__} does not define from_module")

    def connect(self, operators: Mapping[str, Operator]) -> None:
        """Find the operators that this one works with; called at the end of `plan`.

        Args:
            operators: all of the plan, by the name of the module whose place they take.

        Raises ValueError where one that it needs is not there.
        """

    def footprint(self) -> Footprint:
        """Say what the operator needs, on the one device where it is."""
        raise NotImplementedError(f"{type(self).__name__} does not define footprint")

    def footprints(self) -> Sequence[Footprint]:
        """Say what it needs on each device; an operator on several overrides this one."""
        return (self.footprint(),)

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name the checkpoint's tensors that `load_weights` reads, canonically, with shapes."""
        raise NotImplementedError(f"{type(self).__name__} does not define weight_shapes")

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Read `weight_shapes` into the operator's own layout; called once, off the main thread."""
        raise NotImplementedError(f"{type(self).__name__} does not define load_weights")

    def check_machine(self) -> None:
        """Raise ValueError, in a sentence, where this machine cannot run the operator.

        Asked before anything is loaded, but not by `plan`: that may be for another machine, as
        what is packed for one may be.
        """

    def computed_by(self) -> str | None:
        """Say for the report what computes this operator; None where that is the CPU kernels."""
        return None

    def graph_obstacle(self) -> str | None:
        """Say why this can't be part of a graph of a decoded token; None where it can.

        A graph (`streams`) is recorded once and replayed without Python. So the host reads no value
        of a device, is called through the stream alone, and what differs from token to token lies
        on the device, where it is changed in place. Asked once an answer, as `chained` is.
        """
        return "is not made for graphs"

    @classmethod
    def chained(cls, layers: Sequence[Any], ends: ChainEnds) -> Chain | None:
        """Return a function that does the work of a model with layers of this class in one call.

        Args:
            layers: all of the model's, in order, none of them hooked or its `forward` replaced.
            ends: of the same model.

        None, as here, where each has to be called, if only because its routing is watched. Asked
        once an answer: hooks attached while one streams are not seen before the next.
        """
        return None

    def native_linear(self) -> Any:
        """Return the `_native.Linear` that does all that `forward` does; None, as here: none does.

        For the head of a model whose layers are `chained`.
        """
        return None

    def prefill_tokens(self) -> int | None:
        """Tokens of a chunk of prefill from which on longer ones are no faster; None: no matter.

        Asked once weights are loaded.
        """
        return None

    def experts_per_token(self) -> int | None:
        """Routed experts that a token gets behind this operator; None where it changes nothing.

        The loader measures the number in a probe and refuses a model in which it is not live.
        """
        return None

    def watch_routing(self, record: Callable[[int, torch.Tensor], None] | None) -> None:
        """Call `record(num_experts, top_k_index [T, K])` in every forward; None ends it.

        For operators that do the work of router and experts in one, so that no module named
        `experts` is called. Others do nothing.
        """


class PackedOperator(Operator):
    """An operator with weights packed in buffers: refuses, in a sentence, what they cannot do.

    `load_weights` packs a checkpoint's tensors into memory of its own and ends in `use_packed`.
    """

    site: Site

    def packed_layout(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name the buffers that hold the packed weights, with shapes and dtypes."""
        raise NotImplementedError(f"{type(self).__name__} does not define packed_layout")

    def packed_format(self) -> str:
        """Say what the bytes of the buffers mean: another text means other bytes."""
        raise NotImplementedError(f"{type(self).__name__} does not define packed_format")

    def use_packed(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compute with these tensors, one for each name of `packed_layout`, from now on.

        They are read in place and never written: their memory may be a mapped file.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define use_packed")

    def register_packed(self) -> None:
        """Register the buffers of `packed_layout`, on the meta device; for `__init__`."""
        for name, (shape, dtype) in self.packed_layout().items():
            meta = torch.empty(shape, dtype=dtype, device="meta")
            self.register_buffer(name, meta, persistent=False)

    def empty_packed(self) -> dict[str, torch.Tensor]:
        """Return memory for the packed weights, uninitialised; for `load_weights`.

        Raises MemoryError where there is none.
        """
        try:
            return {
                name: torch.empty(shape, dtype=dtype)
                for name, (shape, dtype) in self.packed_layout().items()
            }
        except RuntimeError as error:  # torch has no class for it on the CPU
            raise self.no_memory() from error

    def no_memory(self) -> MemoryError:
        """Return the error for packed weights that memory has no room for."""
        return MemoryError(
            self._refusal(f"no memory for {self.packed_bytes():,} bytes of packed weights")
        )

    def packed_bytes(self) -> int:
        """Return the bytes of all packed weights; for `footprint`."""
        layout = self.packed_layout().values()
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout)

    def check_no_gradient(self, *inputs: torch.Tensor) -> None:
        """Raise RuntimeError where a gradient with respect to an input is asked for."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            raise RuntimeError(
                self._refusal("packed weights have no gradient; call it under torch.no_grad()")
            )

    def _refusal(self, reason: str) -> str:
        return f"{type(self).__name__} at {self.site.name}: {reason}"

    def check_conversion(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Raise RuntimeError where `fn`, of `.to` and its like, would change dtype or device."""
        probe = fn(torch.empty(0, dtype=self.site.dtype, device=self.site.device))
        if (probe.dtype, probe.device) != (self.site.dtype, self.site.device):
            raise RuntimeError(
                self._refusal(
                    f"packed weights cannot be moved to {probe.dtype} on {probe.device}; load the "
                    "model with the dtype that you want, and place modules by rules"
                )
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self.check_conversion(fn)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not any(buffer.is_meta for buffer in self.buffers()):
            raise RuntimeError(
                self._refusal("packed weights cannot be saved; keep the checkpoint and the rules")
            )
        super()._save_to_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            self._refusal("packed weights can be neither pickled nor copied; load the model again")
        )
