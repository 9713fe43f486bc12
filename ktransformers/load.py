"""`optimize_and_load`: a model, a rule file, and back comes the same model on other operators.

    load_rules -> plan -> check -> apply -> load

There is no way back: what can be known without reading weights is checked before anything is
changed, all errors at once; a load that fails leaves a model whose forward says why.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ktransformers.base import Checkpoint, Operator, PackedOperator
from ktransformers.cache import LatentCache, check_fits
from ktransformers.checkpoint import open_checkpoint
from ktransformers.devices import keep_on
from ktransformers.hub import resolve_model
from ktransformers.inject import Plan, apply, format_replacements, plan
from ktransformers.last_position import last_position_only
from ktransformers.machine import check_machine
from ktransformers.packed import AUTO, CacheMode, find_cache
from ktransformers.prefill import check_prompt
from ktransformers.report import build_report, count_experts
from ktransformers.rules import load_rules
from ktransformers.weights import LoadError, check_weights, load_weights, serve_ties

__all__ = ["LoadError", "build_folder_on_meta", "build_on_meta", "optimize_and_load"]

logger = logging.getLogger(__name__)

PROBE_TOKENS = 2  # a fixed reduction shows in one; every further one reads more experts

Model = str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel
Rules = str | os.PathLike[str] | Sequence[Mapping[str, Any]]
Weights = tuple[Checkpoint, Path | None]  # and the folder or file that holds it, if one does


def optimize_and_load(
    model: Model,
    rules: Rules,
    *,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    checkpoint: str | os.PathLike[str] | nn.Module | None = None,
    dtype: torch.dtype | None = None,
    cache: str | os.PathLike[str] | None = AUTO,
    cache_mode: CacheMode = "auto",
) -> PreTrainedModel:
    """Swap modules of a model for the operators that rules name, and load its weights.

    Args:
        model: a folder, a hub id, a config, or a `PreTrainedModel` (on the meta device or loaded).
            A loaded model is changed in place and serves as its own checkpoint.
        rules: a rule file, the name of a shipped one, or a list of rules as dicts.
        overrides: of the rule file's `vars`, as a mapping or as `name=value` strings.
        checkpoint: where the weights are, if not in `model`.
        dtype: of activations and of weights that no operator packs; the config's by default.
        cache: a folder that `ktransformers pack` wrote, from which packed weights come; "auto" is
            the folder `packed` beside the weights, if it is there; None packs them anew.
        cache_mode: "map" shares the cache's pages with all processes that map it, and reads them
            when they are first needed; "copy" reads them at once into memory of this process, on
            the NUMA nodes that each operator wants; "auto" copies what lies on several nodes in
            parts, which no mapping can, and maps the rest.

    Returns the model in evaluation mode; `model.ktransformers_report` says what was done.

    Raises `RuleError` for the rules and `LoadError` for the weights, each with every error at
    once; a model object is left untouched by all that is found before weights are read.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype {dtype!r}: expected a torch.dtype, such as torch.bfloat16")
    parsed = load_rules(rules, overrides=overrides)
    skeleton, find_weights = _open(model, checkpoint, dtype)
    planned = plan(skeleton, parsed, dtype=dtype)
    check_machine(planned)
    source, weights = find_weights()
    source = serve_ties(source, skeleton, planned)
    reading = check_weights(skeleton, planned, source)
    packed, cache_line = find_cache(planned, source, weights, cache, cache_mode)
    apply(skeleton, planned)
    for line in format_replacements(planned):
        logger.info("%s", line)
    try:
        if packed is None:
            load_weights(skeleton, planned, source, reading)
        else:
            left = packed.rest_of(reading)
            load_weights(skeleton, planned, source, left, packed.fill)
        keep_on(skeleton, planned.kept_on())
        experts_per_token = _probe(skeleton, planned)
    except BaseException as error:
        _make_unusable(skeleton, error)
        raise
    skeleton.eval().requires_grad_(False)  # packed weights have no gradient: who wants one must ask
    _become_optimised(skeleton)
    report = build_report(skeleton, planned, experts_per_token, cache_line)
    skeleton.ktransformers_report = report  # type: ignore[assignment]  # nn.Module's attributes
    return skeleton


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the causal language model of a config without memory for weights.

    A `quantization_config` describes the checkpoint's format, which our reader handles: it is
    left out here, lest transformers' own quantiser wake.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, dtype=dtype or _default_dtype(config))
    return built.eval()  # type: ignore[no-any-return]  # from_config is untyped


def build_folder_on_meta(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the model that a folder's `config.json` describes; see `build_on_meta`.

    Raises ValueError, naming the file, where transformers can make no model of it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return build_on_meta(config, dtype)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
    except StrictDataclassError as error:
        reason = str(error)
    summary = " ".join(reason.split())
    raise ValueError(f"{folder / 'config.json'}: transformers can make no model of it: {summary}")


def _default_dtype(config: PreTrainedConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16


def _open(
    model: Model, checkpoint: str | os.PathLike[str] | nn.Module | None, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, Callable[[], Weights]]:
    """Return the model to change, and a function that opens its weights.

    That may fetch hundreds of gigabytes, and waits until the rules are known to be right.
    """
    if isinstance(model, PreTrainedModel):
        return _open_module(model, checkpoint, dtype)
    if isinstance(model, nn.Module):
        raise TypeError(f"{type(model).__name__} is no PreTrainedModel: it has no config")
    if isinstance(model, PreTrainedConfig):
        if checkpoint is None:
            raise LoadError("a config holds no weights: pass checkpoint=<folder or module>")
        return build_on_meta(model, dtype), functools.partial(_open_checkpoint, checkpoint)
    folder = resolve_model(os.fspath(model), needs_weights=False)
    skeleton = build_folder_on_meta(folder, dtype)
    if (folder / "generation_config.json").is_file():  # from_config never sees it
        skeleton.generation_config = GenerationConfig.from_pretrained(folder)
    source = model if checkpoint is None else checkpoint
    return skeleton, functools.partial(_open_checkpoint, source)


def _open_module(
    model: PreTrainedModel,
    checkpoint: str | os.PathLike[str] | nn.Module | None,
    dtype: torch.dtype | None,
) -> tuple[PreTrainedModel, Callable[[], Weights]]:
    if any("_hf_hook" in module.__dict__ for module in model.modules()):
        raise LoadError("accelerate has hooked this model; load it without device_map")
    if dtype is not None and dtype != model.dtype:
        raise LoadError(f"the model is {model.dtype}: convert it with .to({dtype}) first")
    if any(isinstance(module, Operator) for module in model.modules()):
        raise LoadError("this model is optimised already; load it again with all rules in one file")
    on_meta = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    loaded = [name for name, tensor in model.named_parameters() if not tensor.is_meta]
    if checkpoint is not None and loaded:
        raise LoadError(
            f"the model has weights of its own, such as {loaded[0]}: a checkpoint is for one on "
            "the meta device; leave checkpoint out, or build the model under torch.device('meta')"
        )
    if checkpoint is None and on_meta:
        raise LoadError(
            f"{len(on_meta)} parameters are on the meta device, such as {on_meta[0]}: "
            "pass checkpoint=<folder or module>"
        )
    source = model if checkpoint is None else checkpoint
    return model, functools.partial(_open_checkpoint, source)


def _open_checkpoint(source: str | os.PathLike[str] | nn.Module) -> Weights:
    if isinstance(source, nn.Module):
        return open_checkpoint(source), None
    path = Path(source)
    weights = path if path.exists() else resolve_model(os.fspath(source))
    return open_checkpoint(weights), weights


def _probe(model: PreTrainedModel, planned: Plan) -> float | None:
    """Run a few tokens and measure the experts that each got; refuse a reduction not live."""
    token_ids = torch.arange(PROBE_TOKENS, device=model.device) % model.config.vocab_size
    with count_experts(model) as counter, torch.no_grad():
        model(input_ids=token_ids.unsqueeze(0), use_cache=False)
    errors = []
    for replacement in planned.replacements:
        operator = replacement.operator
        promised = None if operator is None else operator.experts_per_token()
        if promised is None:
            continue
        name = replacement.site.name
        around = name.rpartition(".")[0]
        places = (name, f"{around}.experts", around)
        measured = next((counter.by_layer[p] for p in places if p in counter.by_layer), None)
        if measured != promised:
            found = "no experts module ran" if measured is None else f"experts got {measured:g}"
            errors.append(
                f"{replacement.site.rule}: {type(operator).__name__} at {name}: a reduction to "
                f"{promised} experts per token is not live: {found}"
            )
    if errors:
        raise LoadError("\n".join(errors))
    return counter.mean


def _make_unusable(model: PreTrainedModel, error: BaseException) -> None:
    cause = str(error) or type(error).__name__
    reason = f"this model is unusable, because loading it failed: {cause}"

    def refuse(*_: object) -> None:
        raise RuntimeError(reason)

    model.register_forward_pre_hook(refuse)


class _Optimised:
    """What an optimised model cannot do, refused in a sentence; mixed into the model's class."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "an optimised model cannot be saved: it is not what its config describes; keep the "
            "checkpoint and the rule file, which make it again"
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        if kwargs.get("use_mtp", getattr(config or self.generation_config, "use_mtp", None)):  # type: ignore[attr-defined]  # the model's
            raise RuntimeError("use_mtp is not supported: MTP layers are not loaded")
        prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if prompt is not None:
            check_prompt(self, prompt)  # type: ignore[arg-type]  # it is the model
        cache = kwargs.get("past_key_values")
        try:
            with last_position_only(self):  # type: ignore[arg-type]  # it is the model
                return super().generate(*args, **kwargs)  # type: ignore[misc]  # the model's
        finally:
            if isinstance(cache, LatentCache):  # Ctrl-C leaves some layers with more tokens
                cache.cut(cache.completed())

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> Any:
        """Refuse, before any work, what the cache that was passed can't hold."""
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, LatentCache) and generation_config.max_length is not None:
            cache.claim(self)  # type: ignore[arg-type]  # it is the model
            check_fits(generation_config.max_length - 1, cache.max_tokens)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]  # the model's

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Ask all packed operators first: half a conversion is worse than none."""
        for module in self.modules():  # type: ignore[attr-defined]  # the model's
            if isinstance(module, PackedOperator):
                module.check_conversion(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]  # the model's


def _become_optimised(model: PreTrainedModel) -> None:
    """Make the model, in place, of a class that refuses what its operators cannot do."""
    plain = type(model)
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    model.__class__ = type(plain.__name__, (_Optimised, plain), names)
