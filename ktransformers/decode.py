"""The decode loop: a token from the logits, the logits from the token, and nothing in its way.

transformers' `generate` checks a request and makes logits processors and stopping criteria of it,
from the model's generation config and the arguments; then `custom_generate` has it hand them over
instead of looping itself. The tokens are those that its own loop would choose, with the same seed
too. What this is not for, such as beams, `generate` does in its own way.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode

from ktransformers.cache import LatentCache, check_fits
from ktransformers.stack import DecoderStack
from ktransformers.streams import stream_of
from ktransformers.token_graph import TokenGraph, graph_obstacle, places_of

logger = logging.getLogger(__name__)

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
UNKEPT = ("return_dict_in_generate", "output_attentions", "output_hidden_states")
UNHEARD = ("assistant_model", "custom_generate", "streamer", "position_ids", "inputs_embeds")


@dataclass(frozen=True, slots=True)
class Request:
    """What transformers made of the arguments of `generate`."""

    input_ids: torch.Tensor  # [B, T]
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig


def plain_request(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    input_ids: torch.Tensor,
    cache: LatentCache,
    sampling: Mapping[str, Any],
) -> Request | None:
    """Let `generate` check and prepare a request; return it if it is for `decode`.

    None means one for another loop of transformers, such as for beams, an assistant or position_ids
    of one's own.

    Raises what `generate` raises, and ValueError where prompt and answer do not fit the cache.
    """
    if any(sampling.get(name) is not None for name in UNHEARD):
        return None
    options = dict(sampling)
    stop = stop_strings(model, options)
    if stop:  # a custom_generate is not given the tokenizer
        assert tokenizer is not None  # only who asks for no strings leaves it out
        criteria = [*(options.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, stop)]
        options |= {"stop_strings": None, "stopping_criteria": StoppingCriteriaList(criteria)}
    if DecoderStack.fits(model):  # processors keep tensors where the prompt is
        input_ids = input_ids.to(DecoderStack(model).logits_device())
    request: Request = model.generate(  # type: ignore[operator]  # typed for GenerationMixin alone
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=cache,
        custom_generate=_hand_over,
        **options,
    )
    config = request.generation_config
    check_fits(config.max_length - 1, cache.max_tokens)
    is_plain = (
        config.get_generation_mode() in MODES
        and len(request.input_ids) == 1
        and config.use_cache
        and not any(getattr(config, name) for name in UNKEPT)
    )
    return request if is_plain else None


def _hand_over(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **_: Any,
) -> Request:
    return Request(input_ids, logits_processor, stopping_criteria, generation_config)


def stop_strings(model: PreTrainedModel, sampling: Mapping[str, Any]) -> list[str]:
    """Return the strings that end an answer: those asked for, or else the model's own.

    Raises ValueError for one that every text has.
    """
    own = getattr(model.generation_config, "stop_strings", None)
    given = getattr(sampling.get("generation_config"), "stop_strings", None)
    default = own if given is None else given  # as `generate` fills what a given config leaves open
    found = sampling.get("stop_strings", default) or []
    strings = [found] if isinstance(found, str) else list(found)
    if "" in strings:
        raise ValueError("a stop string is empty, which would end every answer; leave it out")
    return strings


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    request: Request,
    cache: LatentCache,
    logits: torch.Tensor,
    on_token: Callable[[int], None],
    check: Callable[[], object] | None = None,
    *,
    graph: bool | None = None,
) -> None:
    """Answer a plain request for a model that `DecoderStack` fits.

    Args:
        model: computes.
        request: of one sequence.
        cache: holds the prompt, and is filled with the answer but for the last token, which nobody
            reads.
        logits: of the prompt's last position, [1, V], from `prefill`.
        on_token: is told of each new token.
        check: is called before each layer, or before each token that is one graph; what it raises
            ends the answer.
        graph: whether each token is to be one graph; without it where a model on GPUs is fit for
            that, which the log says.

    Raises ValueError where a graph is wanted and the model is not fit for one.
    """
    config, processors = request.generation_config, request.logits_processor
    last_tokens, most, criteria = _ends(request.stopping_criteria)
    length = request.input_ids.shape[1]
    ids = torch.empty(1, config.max_length, dtype=torch.long, device=logits.device)
    ids[:, :length] = request.input_ids
    next_logits = _next_logits(model, cache, check, graph)
    while True:
        scores = logits.float()
        for processor in processors:
            scores = processor(ids[:, :length], scores)
        if config.do_sample:
            token = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        if processors or criteria:  # nobody else reads them
            ids[:, length] = token[:, 0]
        length += 1
        token_id = int(token)
        on_token(token_id)
        stopped = criteria and criteria(ids[:, :length], None)
        if stopped or token_id in last_tokens or length >= most:
            return
        logits = next_logits(token)


def _ends(criteria: StoppingCriteriaList) -> tuple[set[int], int, StoppingCriteriaList]:
    """Return the tokens that end an answer, the length that does, and all other criteria.

    Those that nearly every request has come to numbers here, since torch's calls for them take as
    long as all of the loop besides.
    """
    tokens, most, others = set[int](), sys.maxsize, StoppingCriteriaList()
    for each in criteria:
        if type(each) is EosTokenCriteria:
            tokens.update(each.eos_token_id.flatten().tolist())
        elif type(each) is MaxLengthCriteria and not _reminds(each):
            most = min(most, each.max_length)
        else:
            others.append(each)
    return tokens, most, others


def _reminds(criterion: MaxLengthCriteria) -> bool:
    """Return whether it may log that an answer gets longer than the model was made for."""
    made_for = criterion.max_position_embeddings
    return made_for is not None and criterion.max_length > made_for


def _next_logits(
    model: PreTrainedModel,
    cache: LatentCache,
    check: Callable[[], object] | None,
    graph: bool | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what computes the logits after a token, [1, 1]."""
    stack = DecoderStack(model, check)
    device, *others = places_of(model)
    on_gpus = any(place.type == "cuda" for place in (device, *others))
    if graph is False or (graph is None and not on_gpus):
        return partial(stack.last_logits, cache=cache)
    obstacle = graph_obstacle(model)
    if obstacle is None:
        logger.info("each token is one graph on %s", ", ".join(map(str, (device, *others))))
        return TokenGraph(stack, cache, device, [stream_of(other) for other in others])
    if graph:
        raise ValueError(f"a token of this model can't be one graph: {obstacle}")
    logger.info("no token is one graph: %s", obstacle)
    return partial(stack.last_logits, cache=cache)
