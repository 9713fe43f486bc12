"""What makes training this small model on two CPU cores fast enough: four fused operators.

Each is an autograd function with its backward written out, because at these sizes the time goes to
memory traffic between small operators rather than to arithmetic. They compute what transformers'
modules compute, to fp32 rounding, and are used for training only.

Shape suffixes: `T` tokens, `D` hidden_size, `E` experts, `K` top_k, `F` moe_intermediate_size,
`V` vocab_size, `G` batch times heads, `S` sequence length, `N` tokens of one expert.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

EXPERTS = "tiny_sorted"  # names for config._experts_implementation and _attn_implementation
ATTENTION = "tiny_blocked"
QUERY_BLOCK = 128  # rows of scores made at once: [32 heads, 128, 512] fp32 is 8 MiB, in the L3
LOGITS_CHUNK = 1024  # tokens whose logits live at once: [1024, 2048] fp32 is 8 MiB


class _SortedExperts(torch.autograd.Function):
    """y[t] = sum_k w[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])), e = index[t, k].

    The tokens of one expert are gathered, multiplied and scattered before the next expert's, so
    that what is between the products stays in the cache.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_TD: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        top_k = index_TK.shape[1]
        order = torch.argsort(index_TK.reshape(-1), stable=True)
        counts = torch.bincount(index_TK.reshape(-1), minlength=down_EDF.shape[0]).tolist()
        tokens = torch.div(order, top_k, rounding_mode="floor")
        weights = weights_TK.reshape(-1)[order]
        y_TD = torch.zeros_like(x_TD)
        gate_ups = []
        start = 0
        for expert, count in enumerate(counts):
            chosen = tokens[start : start + count]
            gate_up = x_TD.index_select(0, chosen) @ gate_up_E2FD[expert].t()
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = nn.functional.silu(gate).mul_(up)
            hidden.mul_(weights[start : start + count, None])
            y_TD.index_add_(0, chosen, hidden @ down_EDF[expert].t())
            gate_ups.append(gate_up)
            start += count
        ctx.save_for_backward(x_TD, gate_up_E2FD, down_EDF, order, tokens, weights, *gate_ups)
        ctx.counts = counts  # type: ignore[attr-defined]  # it carries what one puts there
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_up_E2FD, down_EDF, order, tokens, weights, *gate_ups = ctx.saved_tensors
        dx_TD = torch.zeros_like(x_TD)
        dgate_up_E2FD = torch.zeros_like(gate_up_E2FD)
        ddown_EDF = torch.zeros_like(down_EDF)
        dweights = torch.empty_like(weights)
        start = 0
        for expert, count in enumerate(ctx.counts):
            chosen = tokens[start : start + count]
            weight_N1 = weights[start : start + count, None]
            gate, up = gate_ups[expert].chunk(2, dim=-1)
            sigmoid = torch.sigmoid(gate)
            silu = gate * sigmoid
            hidden = silu * up
            dy_ND = dy_TD.index_select(0, chosen)
            dscaled = dy_ND @ down_EDF[expert]
            dweights[start : start + count] = (dscaled * hidden).sum(-1)
            ddown_EDF[expert] = dy_ND.t() @ hidden.mul_(weight_N1)
            dhidden = dscaled.mul_(weight_N1)
            # silu'(g) = sigmoid(g) * (1 + g * (1 - sigmoid(g))) = sigmoid + silu * (1 - sigmoid)
            dgate = (1 - sigmoid).mul_(silu).add_(sigmoid).mul_(up).mul_(dhidden)
            dgate_up = torch.cat((dgate, dhidden.mul_(silu)), dim=-1)
            dgate_up_E2FD[expert] = dgate_up.t() @ x_TD.index_select(0, chosen)
            dx_TD.index_add_(0, chosen, dgate_up @ gate_up_E2FD[expert])
            start += count
        dweights_flat = torch.empty_like(dweights)
        dweights_flat[order] = dweights
        dweights_TK = dweights_flat.view(dy_TD.shape[0], -1)
        return dx_TD, dgate_up_E2FD, ddown_EDF, None, dweights_TK


class _CausalAttention(torch.autograd.Function):
    """softmax(scaling * q k^T + causal mask) v, a block of queries at a time.

    Keys after a block's last query are skipped, and the probabilities are kept for backward:
    cheaper at these lengths than torch's flash kernel, which also needs equal head sizes.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q, k: [G, S, qk_head_dim]; v and the result: [G, S, v_head_dim]."""
        length = q.shape[1]
        out = torch.empty_like(v)
        probabilities = []
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            scores = torch.bmm(q[:, start:end] * scaling, k[:, :end].transpose(1, 2))
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)
            scores[:, :, start:].masked_fill_(future, float("-inf"))
            p = torch.softmax(scores, dim=-1)
            out[:, start:end] = torch.bmm(p, v[:, :end])
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scaling = scaling  # type: ignore[attr-defined]  # it carries what one puts there
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        length = q.shape[1]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, start in zip(probabilities, range(0, length, QUERY_BLOCK), strict=True):
            end = min(start + QUERY_BLOCK, length)
            dblock = dout[:, start:end]
            dv[:, :end].baddbmm_(p.transpose(1, 2), dblock)
            dp = torch.bmm(dblock, v[:, :end].transpose(1, 2))
            dscores = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scaling)
            dq[:, start:end] = torch.bmm(dscores, k[:, :end])
            dk[:, :end].baddbmm_(dscores.transpose(1, 2), q[:, start:end])
        return dq, dk, dv, None


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(h W^T)[target], with the logits of one chunk of tokens at a time.

    The gradients are made in the forward pass, while a chunk's logits exist.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, h_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        count = h_TD.shape[0]
        dh_TD, dweight_VD = torch.empty_like(h_TD), torch.zeros_like(weight_VD)
        total = torch.zeros(())
        for start in range(0, count, LOGITS_CHUNK):
            h = h_TD[start : start + LOGITS_CHUNK]
            target_N1 = target_T[start : start + LOGITS_CHUNK, None]
            log_p = torch.log_softmax(h @ weight_VD.t(), dim=-1)
            total -= log_p.gather(1, target_N1).sum()
            dlogits = log_p.exp_()
            dlogits.scatter_add_(1, target_N1, torch.full(target_N1.shape, -1.0))
            dh_TD[start : start + LOGITS_CHUNK] = dlogits @ weight_VD
            dweight_VD.addmm_(dlogits.t(), h)
        ctx.save_for_backward(dh_TD.div_(count), dweight_VD.div_(count))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dh_TD, dweight_VD = ctx.saved_tensors
        return dh_TD * dloss, dweight_VD * dloss, None


def linear_cross_entropy(h_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Return the mean cross entropy in nats of the logits `h W^T` against the targets."""
    # torch leaves `apply` untyped, here and below.
    loss: Tensor = _LinearCrossEntropy.apply(h_TD, weight_VD, target_T)  # type: ignore[no-untyped-call]
    return loss


def _experts(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Take the place of `DeepseekV3Experts.forward`: [T, D], [T, K], [T, K] -> [T, D]."""
    y_TD: Tensor = _SortedExperts.apply(  # type: ignore[no-untyped-call]
        hidden_states, experts.gate_up_proj, experts.down_proj, top_k_index, top_k_weights
    )
    return y_TD


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Take the place of transformers' attention: [B, H, S, head_dim] -> [B, S, H, v_head_dim]."""
    del module
    assert attention_mask is None, "training windows have no padding"
    assert dropout == 0.0, "the kept probabilities leave no room for dropout"
    batch, heads = query.shape[:2]
    q, k, v = (x.reshape(batch * heads, *x.shape[2:]) for x in (query, key, value))
    out = _CausalAttention.apply(q, k, v, scaling)  # type: ignore[no-untyped-call]
    return out.view(batch, heads, *out.shape[1:]).transpose(1, 2), None


def use_training_kernels(model: PreTrainedModel) -> None:
    """Make a model run on these operators: right for full causal windows only, without a cache."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    model.set_experts_implementation(EXPERTS)
    model.set_attn_implementation(ATTENTION)
