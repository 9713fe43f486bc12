"""What routed experts compute, in fp64 from dequantised weights, and how far off they may be."""

from __future__ import annotations

import torch

U = 2.0**-24  # unit roundoff of fp32
ROUNDING = {torch.float32: U, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def experts_and_bound(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    hidden: torch.dtype,
    weight_rounding: float = 0.0,
    quantised: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the layer's exact output, [T, D], and a bound of what its steps may lose.

    A product of k terms loses k + 5 roundings of fp32 of what is summed. SiLU passes an error on at
    most 1.1 times, and its exponential may lose 2^-20 itself. What is quantised to int8 is off by
    half a step, a 254th of the largest of its row, and a few roundings of that.

    Args:
        x: [T, D], as the layer gets it; the result is rounded to its dtype.
        index: [T, K]; another number than an expert's means "skip this slot".
        weights: [T, K].
        gate, up, down: dequantised, [E, F, D], the same, [E, D, F].
        hidden: what silu(gate) * up is rounded to.
        weight_rounding: relative, of each weight before it is multiplied.
        quantised: whether activations are int8 before both products.
    """
    F, D = gate.shape[1:]
    gate, up, down = gate.double(), up.double(), down.double()
    exact = torch.zeros(x.shape, dtype=torch.float64)
    bound = torch.zeros_like(exact)
    for token, row in enumerate(x.double()):
        off = _half_step(row) if quantised else 0.0
        for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
            if not 0 <= expert < len(gate):
                continue
            values, errors = [], []
            for matrix in (gate[expert], up[expert]):
                lost = ((D + 5) * U + weight_rounding) * (matrix.abs() @ (row.abs() + off))
                values.append(matrix @ row)
                errors.append(lost + matrix.abs().sum(1) * off)
            silu = torch.nn.functional.silu(values[0])
            silu_error = 1.1 * errors[0] + 2.0**-20 * silu.abs()
            made = silu * values[1]
            error = silu_error * (values[1].abs() + errors[1]) + silu.abs() * errors[1]
            error += ROUNDING[hidden] * (made.abs() + error)
            if quantised:
                error += _half_step(made.abs() + error)
            exact[token] += weight * (down[expert] @ made)
            lost = ((F + 5) * U + weight_rounding) * (down[expert].abs() @ (made.abs() + error))
            bound[token] += abs(weight) * (down[expert].abs() @ error + lost)
    bound += (ROUNDING[x.dtype] + (index.shape[1] + 8) * U) * (exact.abs() + bound)
    return exact, bound


def _half_step(row: torch.Tensor) -> float:
    return float(row.abs().amax()) * (1 / 254 + 8 * U)
