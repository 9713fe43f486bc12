"""A token of decode as one graph, from its id to the logits: no Python runs in between.

A model is fit for it where each of its parts is, which operators are asked (`graph_obstacle`);
modules of torch and transformers are, beside attention of our own. The graph reads the token from
its input, and the position off the lengths in the cache. So what is left to the host is room in the
cache before a token, and to count it after.

    graph = TokenGraph(DecoderStack(model), cache, device)
    logits = graph(token_ids)

**Lifetime.** A graph knows its model's weights and its cache's pages by their addresses. It lives
as long as an answer: whatever happens between two, to hooks, weights or the cache, it can't know,
and to record one takes the host less than three tokens without. What happens to the cache in an
answer it sees, and is recorded again where pages or tables are others.

Shape suffixes: B sequences, V vocab_size.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from ktransformers.base import Operator
from ktransformers.cache import LatentCache
from ktransformers.decode_graph import DecodeGraph
from ktransformers.devices import Bring
from ktransformers.stack import DecoderStack
from ktransformers.streams import Stream, stream_of

EXPERTS = (v2.DeepseekV2Experts, v3.DeepseekV3Experts)


def graph_obstacle(model: PreTrainedModel) -> str | None:
    """Say why a token of a model can't be one graph; None where it can."""
    if not DecoderStack.fits(model):
        return f"{type(model).__name__} is no model that is known, or somebody has changed it"
    stack = DecoderStack(model)
    if stack.needs_mask:
        return "attention of transformers gathers the cache anew for each token"
    if not stack.has_fixed_angles:
        return "the host looks at positions for its rotary embedding"
    for name, module in _parts("", model):
        reason = _obstacle_of(module)
        if reason is not None:
            return f"{type(module).__name__} at {name}: {reason}"
    places = places_of(model)
    cpu = torch.device("cpu")
    if cpu in places and len(places) > 1:
        return f"{places[cpu]} lies on the CPU: keep it on a GPU"
    try:
        for device in places:
            stream_of(device)
    except ImportError as error:
        return str(error)
    return None


def places_of(model: PreTrainedModel) -> dict[torch.device, str]:
    """Return the devices of what a token is computed with, in its order, and what is first there.

    The memory of experts that an operator calls on the host in its own way is none of them.
    """
    places: dict[torch.device, str] = {}
    for name, module in _parts("", model):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            places.setdefault(tensor.device, name)
    return places


def graph_line(model: PreTrainedModel) -> str | None:
    """Say whether a token is one graph, and why not; None of a model on the CPU alone."""
    places = places_of(model)
    if places.keys() <= {torch.device("cpu")}:
        return None
    obstacle = graph_obstacle(model)
    if obstacle is not None:
        return f"layers are called one by one, a token is no graph: {obstacle}"
    return f"a token is one graph on {', '.join(map(str, places))}"


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    elsewhere = module.host_children if isinstance(module, Operator) else ()
    for child, below in module.named_children():
        if child not in elsewhere:
            yield from _parts(f"{name}.{child}" if name else child, below)


def _obstacle_of(module: nn.Module) -> str | None:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if "forward" in vars(module) or not all(isinstance(hook, Bring) for hook in hooks):
        return "a forward or a hook of somebody's own would not run in replays"
    if isinstance(module, Operator):
        return module.graph_obstacle()
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if isinstance(module, EXPERTS) and implementation == "eager":
        return "eager experts ask the host which were chosen"
    return None


class TokenGraph:
    """Computes the next token of each sequence of a cache."""

    def __init__(
        self,
        stack: DecoderStack,
        cache: LatentCache,
        device: torch.device,
        others: Sequence[Stream] = (),
    ):
        """Take a model apart that has no obstacle.

        Args:
            stack: computes.
            cache: holds tokens, which the model has put there.
            device: the first of the model's.
            others: streams of its other devices.
        """
        self._stack = stack
        self._cache = cache
        self._device = device
        self._others = others
        self._recorded_on: list[weakref.ref[torch.Tensor]] = []
        self._graph: DecodeGraph | None = None

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Read new tokens [B, 1] into the cache; return logits [B, V], which the next call changes.

        Raises what the stack's check raises, once a token, and what went wrong on the host, after
        which the cache is as it was.
        """
        cache = self._cache
        if self._stack.check is not None:
            self._stack.check()
        before = cache.get_seq_length()
        try:
            return self._next(token_ids)
        except BaseException:
            cache.cut(before)
            raise

    def _next(self, token_ids: torch.Tensor) -> torch.Tensor:
        stack, cache = self._stack, self._cache
        layers, pages = cache.make_room_in_all(len(token_ids), 1)
        memory = [pages.lengths, *(tensor for layer in layers for tensor in layer)]
        if self._graph is None or not _are(self._recorded_on, memory):
            self._graph = None  # its memory first
            step = partial(_token, stack, cache, pages.lengths)
            self._graph = DecodeGraph(step, self._device, self._others)
            self._recorded_on = [weakref.ref(each) for each in memory if each is not None]
        logits = self._graph(token_ids)
        cache.wrote_in_all(1)
        return logits


def _are(before: Sequence[weakref.ref[torch.Tensor]], now: Sequence[torch.Tensor | None]) -> bool:
    there = [tensor for tensor in now if tensor is not None]
    return len(before) == len(there) and all(
        reference() is tensor for reference, tensor in zip(before, there, strict=True)
    )


def _token(
    stack: DecoderStack, cache: LatentCache, lengths: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """Compute the token after those that are counted, however often it is done."""
    position_ids = (lengths[:, None].long() - 1).to(token_ids.device)
    logits = stack.last_logits(token_ids, cache, position_ids=position_ids)
    cache.wrote_in_all(-1)
    return logits
