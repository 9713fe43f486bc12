"""Padding read off the masks that transformers makes, and the masks that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import eager_mask, sdpa_mask

from ktransformers.attention_mask import valid_keys

PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1]])


@pytest.mark.parametrize("make", [sdpa_mask, eager_mask])
@pytest.mark.parametrize("T", [1, 3, 7])
def test_padding_left_right_and_between_is_found(make: Any, T: int) -> None:
    made = make(3, T, 7, 7 - T, attention_mask=PADDING.bool(), allow_is_causal_skip=False)
    for mask in (made, PADDING, PADDING.bool()):
        valid = valid_keys(mask, T, 7)
        assert valid is not None
        assert valid.dtype == torch.uint8
        assert torch.equal(valid.long(), PADDING)


@pytest.mark.parametrize("mask", [None, torch.ones(3, 7), sdpa_mask(3, 4, 7, 3)])
def test_a_mask_without_padding_is_none(mask: torch.Tensor | None) -> None:
    assert valid_keys(mask, 4, 7) is None


def test_room_at_the_end_of_a_static_cache_is_no_key() -> None:
    made = sdpa_mask(3, 2, 10, 5, attention_mask=PADDING.bool(), allow_is_causal_skip=False)
    assert torch.equal(valid_keys(made, 2, 7).long(), PADDING)


def test_a_mask_that_was_changed_is_read_again() -> None:
    mask = PADDING.clone()
    valid_keys(mask, 1, 7)
    mask.fill_(1)
    assert valid_keys(mask, 1, 7) is None


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(2, 1, 4, 7, dtype=torch.bool), "is not causal with padding"),
        (torch.tril(torch.ones(4, 7)).bool().expand(2, 1, 4, 7), "is not causal with padding"),
        (torch.full((2, 1, 4, 7), -3.0), "adds other numbers than 0 and the least one"),
        (torch.ones(2, 6), r"shape \[2, 6\] does not fit 4 queries and 7 keys"),
        (torch.ones(2, 2, 4, 7), r"expected \[batch, 7\] or \[batch, 1, 4, 7\]"),
    ],
)
def test_any_other_mask_is_refused(mask: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        valid_keys(mask, 4, 7)
