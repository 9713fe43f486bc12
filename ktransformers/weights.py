"""Weights into a planned model: what goes where, checked before anything is read, then streamed.

Operators read their own tensors. Everything else goes through transformers' conversion mapping,
which knows how a model's checkpoint names and fuses tensors, onto the modules that no rule took.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from ktransformers import _native
from ktransformers.base import Checkpoint, Operator, TensorInfo
from ktransformers.checkpoint import CountingCheckpoint, TiedCheckpoint, lazy_state_dict
from ktransformers.checkpoint.messages import joined, listed, missing_tensor
from ktransformers.inject import Plan, Replacement
from ktransformers.parallel import in_parallel
from ktransformers.progress import byte_progress

MAX_NEAREST = 3  # missing tensors for which similar names are looked up
MAX_READERS = 16  # threads that read and pack: each holds a tensor as it was read


class LoadError(ValueError):
    """Everything that keeps a model's weights from loading, one a line."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Which tensors of a checkpoint are read, and by whom."""

    operators: tuple[Operator, ...]  # read their own
    rest: tuple[str, ...]  # for modules that no rule took


def serve_ties(checkpoint: Checkpoint, model: PreTrainedModel, planned: Plan) -> Checkpoint:
    """Let operators read what the checkpoint holds only under the name that it is tied to."""
    ties = model.all_tied_weights_keys
    return TiedCheckpoint(
        checkpoint, {name: ties[name] for name in _read_by_operators(planned) & ties.keys()}
    )


def _read_by_operators(planned: Plan) -> set[str]:
    operators = (item.operator for item in planned.replacements if item.operator is not None)
    return {name for operator in operators for name in operator.weight_shapes()}


def check_weights(model: PreTrainedModel, planned: Plan, checkpoint: Checkpoint) -> Reading:
    """Match a checkpoint's tensors with a model that `planned` is about to change.

    Raises LoadError listing every tensor that is missing, unused or of the wrong shape. Tensors
    that the model's class ignores, and those of multi-token prediction layers, may be there.
    """
    operators = tuple(r.operator for r in planned.replacements if r.operator is not None)
    kept = {r.name: _kept(model, r) for r in planned.replacements if r.operator is not None}
    wanted = {
        name: shape for operator in operators for name, shape in operator.weight_shapes().items()
    }
    infos = checkpoint.infos()
    state = model.state_dict()
    target = _targets(model, state, infos)
    ignored = _ignored(model)

    on_meta = {key for key, tensor in state.items() if tensor.is_meta}
    free = {key for key in on_meta if not _is_operators(key, kept)}
    rest = tuple(name for name, key in target.items() if key in free and name not in wanted)
    missing = (free - {target[name] for name in rest} - model.all_tied_weights_keys.keys()) | (
        wanted.keys() - infos.keys()
    )
    taken = free | (state.keys() - on_meta)
    unused = [
        name
        for name in infos.keys() - wanted.keys()
        if target[name] not in taken and not any(pattern.search(name) for pattern in ignored)
    ]
    errors = [
        *_missing(sorted(missing), infos),
        *(f"{infos[name].file}: {name}: no module takes it" for name in sorted(unused)),
        *_wrong_shapes(infos, wanted | {n: tuple(state[n].shape) for n in rest if target[n] == n}),
    ]
    if errors:
        raise LoadError(joined(errors))
    return Reading(operators, rest)


def _targets(
    model: PreTrainedModel, state: dict[str, torch.Tensor], names: Iterable[str]
) -> dict[str, str]:
    """Map each checkpoint name to the key of the model's state that transformers loads it into."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    return {
        name: name
        if name in state
        else rename_source_key(name, renamings, converters, prefix, state)[0]
        for name in names
    }


def _ignored(model: PreTrainedModel) -> list[re.Pattern[str]]:
    """Patterns of names that a checkpoint may hold for nothing."""
    first_mtp = model.config.num_hidden_layers
    count = getattr(model.config, "num_nextn_predict_layers", 0) or 0
    mtp = [rf"\.layers\.{first_mtp + index}\." for index in range(count)]
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), *mtp, r"rotary_emb\.inv_freq$"]
    return [re.compile(pattern) for pattern in patterns]


def _kept(model: PreTrainedModel, replacement: Replacement) -> set[str]:
    """Name the children that stay modules under the operator, and load like any other."""
    operator_class = replacement.operator_class
    if operator_class is None or operator_class.consumes is None:
        return set()
    children = dict(model.get_submodule(replacement.name).named_children())
    return children.keys() - set(operator_class.consumes)


def _is_operators(key: str, kept: Mapping[str, Collection[str]]) -> bool:
    """Tell whether the nearest operator above a tensor, if any, answers for it."""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        children = kept.get(".".join(parts[:length]))
        if children is not None:
            return parts[length] not in children
    return False


def _missing(names: list[str], infos: Mapping[str, TensorInfo]) -> list[str]:
    """Write an error for each; the first few with names like it, whose search is slow."""
    return [
        missing_tensor(name, infos) if index < MAX_NEAREST else f"no tensor {name}"
        for index, name in enumerate(names)
    ]


def _wrong_shapes(
    infos: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    return [
        f"{infos[name].file}: {name}: shape {list(infos[name].shape)}, expected {list(shape)}; "
        "config and weights are of different models"
        for name, shape in expected.items()
        if name in infos and infos[name].shape != shape
    ]


def load_weights(
    model: PreTrainedModel,
    planned: Plan,
    checkpoint: Checkpoint,
    reading: Reading,
    fill: Callable[[], None] | None = None,
) -> None:
    """Read all weights into a model whose operators are in place; changes the model.

    `fill` is what gives weights to operators that do not read them from the checkpoint.

    Raises LoadError or ValueError, naming file and tensor, for what the checkpoint does not keep.
    """
    infos = checkpoint.infos()
    names = [
        *reading.rest,
        *(n for operator in reading.operators for n in operator.weight_shapes()),
    ]
    total = sum(infos[name].nbytes for name in names)
    with byte_progress("Loading weights", total) as advance:
        if reading.rest:
            _load_rest(
                model, lazy_state_dict(CountingCheckpoint(checkpoint, advance), reading.rest)
            )
        if fill is not None:  # no sooner: with packed weights, transformers could list no state
            fill()
        _load_operators(reading.operators, checkpoint, advance)
    if reading.rest:
        _recompute_buffers(model)
        for name in _read_by_operators(planned):  # an operator's weights are its own
            model.all_tied_weights_keys.pop(name, None)
        model.tie_weights(recompute_mapping=False)
    on_meta = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if on_meta:
        raise LoadError(f"{listed(on_meta)}: got no weights")


def _load_rest(model: PreTrainedModel, state: Mapping[str, object]) -> None:
    dtype = model.dtype
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]  # its base
    )
    with _no_progress_bar_of_transformers():
        info, _ = convert_and_load_state_dict_in_model(model, dict(state), config)
    errors = [
        *(f"{key}: {error}" for key, error in info.conversion_errors.items()),
        *(f"{key}: shape {found}, expected {want}" for key, found, want in info.mismatched_keys),
        *info.error_msgs,
    ]
    if errors:
        raise LoadError(joined(errors))


@contextmanager
def _no_progress_bar_of_transformers() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _load_operators(
    operators: Iterable[Operator], checkpoint: Checkpoint, advance: Callable[[int], None]
) -> None:
    """Let operators read in parallel; after an error or Ctrl-C no further tensor is read."""
    stop = threading.Event()

    def on_read(nbytes: int) -> None:
        if stop.is_set():
            raise InterruptedError("loading was stopped")
        advance(nbytes)

    watched = CountingCheckpoint(checkpoint, on_read)
    jobs = [partial(operator.load_weights, watched) for operator in operators]
    try:
        in_parallel(jobs, min(MAX_READERS, _native.default_threads()), stop.set)
    except ValueError as error:
        raise LoadError(str(error)) from error


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _recompute_buffers(model: PreTrainedModel) -> None:
    """Give buffers that no checkpoint holds, such as rotary's `inv_freq`, their values.

    `_init_weights` is where transformers models define them; it leaves alone the parameters that
    loading has marked.
    """
    for module in model.modules():
        missing = {n: b for n, b in module.named_buffers(recurse=False) if b.is_meta}
        for name, buffer in missing.items():
            setattr(
                module, name, nn.Buffer(torch.empty_like(buffer, device="cpu"), persistent=False)
            )
        if missing:
            model._init_weights(module)
