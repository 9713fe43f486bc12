"""What a layer of packed experts should compute, written to be obvious, with an error bound.

Quantised activations are exact in both. The reference keeps everything else in float64; the bound
is what the kernel's fp32 roundings (u = 2^-24 each, relative) can make of that, element by element:

* a product of a row with int8 weights is rounded three times; with int4 weights once per group of k
  and once more, relative to the sum of the terms' magnitudes; with bf16 weights 2 u per term;
* an error e of g moves silu(g) by at most e sigmoid(g) (1 + |g|); its own arithmetic adds 8 u
  (three for the polynomial as Cephes states it, one and a half for the reduced argument, the rest
  for the sum, the quotient and the product with up);
* where an intermediate lies closer to a rounding boundary than its error, be it of int8 steps or
  of bf16, it may be one step off: that moves each output by one step times one weight;
* the weighted sum rounds once per product and once per addition, and the output type once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

U = 2.0**-24


@dataclass(frozen=True, slots=True)
class DequantisedExperts:
    """What the packed weights of all experts stand for, float64: `[E, F, D]`, down `[E, D, F]`."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    weight_format: str


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise finite rows symmetrically in fp32: integers as float64, and scales as fp32."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True)
    zero = amax < 2.0**-120
    limit = torch.tensor(127.0)  # a tensor: torch computes 127 / x as 127 * (1 / x)
    inverse = torch.where(zero, 0.0, limit / amax)
    scale = torch.where(zero, 0.0, amax / limit)
    return torch.round(x * inverse).double(), scale[..., 0]


def prepared(x: torch.Tensor, format: str) -> torch.Tensor:
    """Return the rows that a format's product sees of x `[*, k]`, in float64."""
    if format == "bf16":
        return x.bfloat16().double()
    q, scale = quantise_rows(x)
    return q * scale[..., None].double()


def product_bound(x: torch.Tensor, weight: torch.Tensor, format: str) -> torch.Tensor:
    """Return by how much a kernel's x @ weight.T may differ from the exact one."""
    k = x.shape[-1]
    magnitudes = x.abs() @ weight.abs().T
    own = (
        k * 2.0**-52 * magnitudes
    )  # the reference's roundings, where a kernel's integers have none
    if format == "int8":
        return 3 * U * (x @ weight.T).abs() + own
    terms = 2 * k if format == "bf16" else k / int(format.partition("-")[2]) + 2
    return terms * U * magnitudes + own


def _prepared_intermediate(
    h: torch.Tensor, error: torch.Tensor, format: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what down sees of h, the possible absolute error of each, and one common to a row."""
    if format == "bf16":
        low, high = (h - error).bfloat16().double(), (h + error).bfloat16().double()
        return h.float().bfloat16().double(), high - low, torch.zeros_like(h[..., :1])
    amax, where = h.abs().max(-1, keepdim=True)
    step = amax / 127
    steps = torch.where(amax > 0, h / step, 0.0)
    amax_relative = torch.where(amax > 0, error.gather(-1, where) / amax, 0.0) + 4 * U
    steps_error = torch.where(amax > 0, error / step, 0.0) + steps.abs() * amax_relative
    to_boundary = ((steps - torch.floor(steps)) - 0.5).abs()
    one_off = (to_boundary <= steps_error).double()
    return torch.round(steps) * step, one_off * step, amax_relative


def experts_reference(
    experts: DequantisedExperts,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs `[T, D]` in float64, and by how much a kernel may differ from them."""
    E = experts.gate.shape[0]
    T, D = hidden_states.shape
    weight_format = experts.weight_format
    x = prepared(hidden_states, weight_format)
    y = torch.zeros(T, D, dtype=torch.float64)
    size = torch.zeros_like(y)  # sum of the magnitudes of the terms
    error = torch.zeros_like(y)
    for e in range(E):
        token, slot = (top_k_index == e).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        gate, up = x[token] @ experts.gate[e].T, x[token] @ experts.up[e].T
        gate_error = product_bound(x[token], experts.gate[e], weight_format)
        up_error = product_bound(x[token], experts.up[e], weight_format)
        silu = torch.nn.functional.silu(gate)
        silu_error = 1.01 * gate_error * torch.sigmoid(gate) * (1 + gate.abs()) + 8 * U * silu.abs()
        h = silu * up
        h_error = silu_error * (up.abs() + up_error) + silu.abs() * up_error + U * h.abs()

        seen, seen_error, row_relative = _prepared_intermediate(h, h_error, weight_format)
        d = seen @ experts.down[e].T
        d_error = (
            seen_error @ experts.down[e].abs().T
            + row_relative * d.abs()
            + product_bound(seen, experts.down[e], weight_format)
        )
        weight = top_k_weights[token, slot].double()[:, None]
        y.index_add_(0, token, weight * d)
        size.index_add_(0, token, (weight * d).abs())
        error.index_add_(0, token, weight.abs() * d_error)
    error += (top_k_index.shape[1] + 1) * U * (size + error)
    half_step = 2.0**-8 if hidden_states.dtype == torch.bfloat16 else U
    error += half_step * (y.abs() + error)
    return y, error + 1e-37  # below the smallest normal number steps no longer shrink
