"""Which keys are padding, from the masks that transformers hands to attention.

Attention here is causal by itself, so that of a mask only the padding is new: one value per key.
Shape suffixes: B sequences, T queries, L keys.
"""

from __future__ import annotations

import torch


def valid_keys(mask: torch.Tensor | None, T: int, L: int) -> torch.Tensor | None:
    """Return 1 for the keys that may be attended to, uint8 [B, L]; None means all.

    Args:
        mask: none, a padding mask [B, >= L], or a mask [B, 1, T, >= L], of booleans or added to
            scores; the last query is the last key.
        T: queries of each sequence.
        L: keys of each sequence, the queries' own included.

    Raises ValueError for a mask that is not causal with padding, which is all that there can be.
    """
    if mask is None:
        return None
    known = getattr(mask, "_valid_keys", None)  # a mask serves all layers of a forward
    if known is not None and known[0] == (mask._version, T, L):
        return known[1]  # type: ignore[no-any-return]  # an attribute of a tensor
    valid = _derive(mask, T, L)
    if not mask.is_inference():  # such a tensor counts no changes
        mask._valid_keys = (mask._version, T, L), valid  # type: ignore[attr-defined]  # ours
    return valid


def _derive(mask: torch.Tensor, T: int, L: int) -> torch.Tensor | None:
    if mask.ndim == 2 and mask.shape[1] >= L:
        valid = mask[:, :L] != 0
    elif mask.ndim == 4 and mask.shape[1:3] == (1, T) and mask.shape[3] >= L:
        attended = _attended(mask[:, 0])
        valid = attended[:, -1, :L]
        query = torch.arange(T, device=mask.device)[:, None]
        key = torch.arange(attended.shape[2], device=mask.device)
        causal = key <= query + (L - T)
        padded = torch.nn.functional.pad(valid, (0, attended.shape[2] - L))
        if T > 1 and not torch.equal(attended, causal & padded[:, None]):
            raise ValueError(
                "this attention mask is not causal with padding, which is all that MlaAttention "
                "computes; pass a padding mask [batch, tokens], or leave attention to transformers"
            )
    else:
        raise ValueError(
            f"an attention mask of shape {list(mask.shape)} does not fit {T:,} queries and {L:,} "
            f"keys: expected [batch, {L}] or [batch, 1, {T}, {L}]"
        )
    return None if valid.all() else valid.to(torch.uint8).contiguous()


def _attended(mask: torch.Tensor) -> torch.Tensor:
    """Return where a mask lets a query attend. A mask of numbers is added: 0 leaves a score."""
    if mask.dtype == torch.bool:
        return mask
    attended = mask == 0
    if not (attended | (mask <= torch.finfo(mask.dtype).min)).all():
        raise ValueError(
            "this attention mask adds other numbers than 0 and the least one, and MlaAttention "
            "adds none; leave attention to transformers for such a bias"
        )
    return attended
