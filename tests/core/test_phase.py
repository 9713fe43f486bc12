"""What a forward is: prefill or decode."""

from __future__ import annotations

import threading

import torch
from transformers import PreTrainedConfig

from ktransformers.cache import LatentCache
from ktransformers.phase import is_decode, phase
from ktransformers.prefill import prefill
from tiny_models import random_model


def test_one_new_token_is_decode_unless_somebody_knows_better() -> None:
    assert (is_decode(1), is_decode(2)) == (True, False)
    with phase("prefill"):
        assert (is_decode(1), is_decode(2)) == (False, False)
        with phase("decode"):
            assert (is_decode(1), is_decode(2)) == (True, True)
        assert not is_decode(1)
    assert is_decode(1)


def test_a_phase_is_that_of_its_thread() -> None:
    found = []
    with phase("prefill"):
        thread = threading.Thread(target=lambda: found.append(is_decode(1)))
        thread.start()
        thread.join()
    assert found == [True]


def test_the_last_token_of_a_prompt_is_prefill_however_it_is_cut(config: PreTrainedConfig) -> None:
    model = random_model(config)
    found: list[bool] = []
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args: found.append(is_decode(args[0].shape[1]))
    )
    cache = LatentCache.for_model(model, 8)
    prefill(model, torch.arange(5)[None], cache, chunk_size=4)
    assert found == [False, False]
