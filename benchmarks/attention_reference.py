"""What latent attention should compute, written to be obvious, with an error bound.

The reference is plain softmax attention over expanded keys and values, in float64. The bound is
what a kernel's roundings can make of that:

* What is rounded on the way in is known: to bf16 latents, queries and, in the expanded form,
  weights; in the absorbed form queries to what the weights' format takes. By how much, `d_x`, is
  computed. Later results differ by 2^-8 of themselves where they are rounded to bf16 (half a step),
  by half a step of int8 where that is what a product takes.
* Int8 latents are multiplied as integers where bf16 has no tiles; then q_c, after its rounding to
  bf16, and the weights of a tile times the latents' scales are rounded to 2^-16 of the largest of
  128 and of 64. Squared and added up that is less than what rounding the largest alone to bf16
  may change, so the bounds are those of the products in bf16.
* Added up at their worst, 512 such roundings would hide any mistake. They are independent of each
  other, so a sum of them exceeds 6 times the root of the sum of the squares of their bounds with a
  probability of 2 exp(-18) (Hoeffding; Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019).
* Errors of one query's scores are not independent: they are added at their worst. If a weight a_i
  becomes a_i (1 + e_i) before normalisation, |e_i| <= r_i, then the output moves by at most
  sum a_i r_i |v_i - out| / (1 - sum a_i r_i).
* fp32 (u = 2^-24) is taken at its worst: 2 k u of the terms' magnitudes in a product of k, 8 u of
  the largest score in the argument of exp2, and in all that happens to weights and sums afterwards
  (256 + 16 tiles) u.

Shape suffixes: T queries, L tokens, H heads, C kv_lora_rank, R qk_rope_head_dim, Dn
qk_nope_head_dim, Dv v_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from experts_reference import U, prepared

U16 = 2.0**-8
CERTAIN = 6.0
TILE_KEYS = 64

Form = Literal["absorbed", "expanded"]


@dataclass(frozen=True, slots=True)
class MlaWeights:
    """What the packed halves of kv_b_proj stand for, float64, and how scores are scaled."""

    uk: torch.Tensor  # [H, C, Dn]
    uv: torch.Tensor  # [H, Dv, C]
    scaling: float
    weight_format: str


def rounding(x: torch.Tensor) -> torch.Tensor:
    """Return what rounding to bf16 changes."""
    return x.float().bfloat16().double() - x


def half_int8_step(x: torch.Tensor) -> torch.Tensor:
    """Return half a step of rows quantised to int8, each row's for all of its values."""
    return (x.abs().amax(-1, keepdim=True) / 254).expand_as(x)


def attention_reference(
    weights: MlaWeights,
    q: torch.Tensor,
    latent: torch.Tensor,
    rope: torch.Tensor,
    seen: torch.Tensor,
    form: Form,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs `[T, H, Dv]` of one sequence in float64, and a kernel's possible error.

    `q` `[T, H, Dn + R]`; `latent` `[L, C]` and `rope` `[L, R]`: what the cache stands for; `seen`
    bool `[T, L]`.
    """
    uk, uv, scaling = weights.uk, weights.uv, weights.scaling
    (C, Dn), (L, R) = uk.shape[1:], rope.shape
    nope, pos = q[..., :Dn].double(), q[..., Dn:].double()
    c, r = latent.double(), rope.double()
    k, v = torch.einsum("hcd,lc->hld", uk, c), torch.einsum("hvc,lc->hlv", uv, c)
    s = torch.einsum("thd,hld->thl", nope, k) + torch.einsum("thr,lr->thl", pos, r)
    s = (scaling * s).masked_fill(~seen[:, None], -torch.inf)
    a = torch.softmax(s, dim=-1).nan_to_num(0.0)
    out = torch.einsum("thl,hlv->thv", a, v)
    q_c, o_c = torch.einsum("thd,hcd->thc", nope, uk), torch.einsum("thl,lc->thc", a, c)

    def back(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.einsum("thc,hvc->thv", x, w)

    # Squares of what independent roundings change: in a score, and in an output by its terms.
    d_c = rounding(c) ** 2
    in_score = torch.einsum("thr,lr->thl", rounding(pos) ** 2, r**2)
    in_score += torch.einsum("thr,lr->thl", pos**2, rounding(r) ** 2)
    in_score += torch.einsum("thc,lc->thl", q_c**2, d_c)
    in_out = back(torch.einsum("thl,lc->thc", a**2, d_c), uv**2)
    a2v = torch.einsum("thl,hlv->thv", a**2, v)
    spread = torch.einsum("thl,hlv->thv", a**2, v**2) - 2 * out * a2v  # of sum a^2 (v - out)^2
    in_out += U16**2 * (spread + out**2 * (a**2).sum(-1, keepdim=True)).clamp(min=0)
    if form == "absorbed":
        d_nope = prepared(q[..., :Dn], weights.weight_format) - nope
        in_score += torch.einsum("thc,lc->thl", (U16 * q_c) ** 2, c**2)
        d_o = U16 * o_c if weights.weight_format == "bf16" else half_int8_step(o_c)
        in_out += back(d_o**2, uv**2)
    else:
        d_nope = rounding(nope)
        d_k = torch.einsum("hcd,lc->hld", rounding(uk) ** 2, c**2)
        in_score += torch.einsum("thd,hld->thl", nope**2, (U16 * k) ** 2 + d_k)
        in_out += torch.einsum("thl,hlv->thv", a**2, (U16 * v) ** 2)
        in_out += back(o_c**2, rounding(uv) ** 2)
    in_score += torch.einsum("thd,hld->thl", d_nope**2, k**2)

    terms = torch.einsum("thd,hcd->thc", nope.abs(), uk.abs())
    terms = torch.einsum("thc,lc->thl", terms, c.abs())
    terms += torch.einsum("thr,lr->thl", pos.abs(), r.abs())
    fp32_score = 2 * (C + Dn + R) * U * scaling * terms
    fp32_score += 8 * U * s.abs().masked_fill(~seen[:, None], 0.0).amax(-1, keepdim=True)
    magnitudes = back(torch.einsum("thl,lc->thc", a, c.abs()), uv.abs())
    fp32_out = (2 * C + 256 + 16 * (L / TILE_KEYS + 2)) * U * magnitudes

    relative = torch.expm1(CERTAIN * scaling * in_score.sqrt() + fp32_score)
    moved = torch.einsum("thl,hlv->thv", a * relative, v.abs())
    common = (a * relative).sum(-1, keepdim=True)
    error = (moved + common * out.abs()) / (1 - common).clamp(min=0)
    error = error + CERTAIN * in_out.sqrt() + fp32_out
    error = error + (U16 if q.dtype == torch.bfloat16 else U) * (out.abs() + error)
    return out, error + 1e-37  # below the smallest normal number steps no longer shrink
