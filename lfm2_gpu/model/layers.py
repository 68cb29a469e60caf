"""The four kinds of sublayer: parameters, and the few kernel calls of one step.

Each is ``forward(x, batch) -> x``: it takes the residual stream ``[N, hidden]``, normalises it,
mixes or transforms it, and returns it with its own output added, rounding where transformers does.
"""

from __future__ import annotations

import torch
from torch import nn

import lfm2_kernels as ops
from lfm2_gpu.config import ModelConfig
from lfm2_gpu.model.batch import ForwardBatch

__all__ = ["Attention", "DenseFFN", "ShortConv", "SparseMoE"]


def parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """An uninitialised parameter that takes no gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class ShortConv(nn.Module):
    """Gated short convolution: ``x + out_proj(C * conv(B * X))``.

    ``layer`` counts conv layers: it picks the ring in the batch's pools.
    """

    def __init__(
        self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        h = config.hidden_size
        self.layer, self.eps = layer, config.norm_eps
        self.norm = parameter(h, dtype=dtype, device=device)
        self.in_proj = parameter(3 * h, h, dtype=dtype, device=device)
        self.conv = parameter(h, config.conv_L_cache, dtype=dtype, device=device)
        self.out_proj = parameter(h, h, dtype=dtype, device=device)
        self.in_bias = self.conv_bias = self.out_bias = None
        if config.conv_bias:
            self.in_bias = parameter(3 * h, dtype=dtype, device=device)
            self.conv_bias = parameter(h, dtype=dtype, device=device)
            self.out_bias = parameter(h, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Add the convolution of the batch's tokens to ``x``; their inputs enter the ring."""
        bcx = ops.linear(x, self.in_proj, bias=self.in_bias, norm_weight=self.norm, eps=self.eps)
        state = batch.pools.conv_state[self.layer]
        if batch.decode_only:
            y = ops.short_conv_decode(
                bcx,
                self.conv,
                state,
                positions=batch.positions,
                slots=batch.slots,
                first_computed=batch.first_computed,
                bias=self.conv_bias,
            )
        else:
            y = ops.short_conv_prefill(
                bcx,
                self.conv,
                state,
                positions=batch.positions,
                token_rows=batch.token_rows,
                query_start_loc=batch.query_start_loc,
                slots=batch.slots,
                first_computed=batch.first_computed,
                bias=self.conv_bias,
            )
        return ops.linear(y, self.out_proj, bias=self.out_bias, residual=x)


class Attention(nn.Module):
    """Grouped-query attention with normalised q and k: ``x + out_proj(attention(qkv))``.

    ``layer`` counts attention layers: it picks the KV pages in the batch's pools. ``rope`` is the
    model's table, shared by all layers.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        rope: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
        self.layer, self.eps, self.scale, self.rope = layer, config.norm_eps, d**-0.5, rope
        self.norm = parameter(h, dtype=dtype, device=device)
        self.qkv = parameter(q + 2 * kv, h, dtype=dtype, device=device)
        self.q_norm = parameter(d, dtype=dtype, device=device)
        self.k_norm = parameter(d, dtype=dtype, device=device)
        self.out_proj = parameter(h, q, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Add the attention of the batch's tokens to ``x``; their k and v enter the pages."""
        pages = batch.pools.kv_pages[self.layer]
        q = ops.qk_norm_rope(
            ops.linear(x, self.qkv, norm_weight=self.norm, eps=self.eps),
            self.q_norm,
            self.k_norm,
            self.rope,
            pages,
            eps=self.eps,
            positions=batch.positions,
            token_rows=batch.token_rows,
            slots=batch.slots,
            page_table=batch.page_table,
            kv_write_from=batch.kv_write_from,
        )
        if batch.decode_only:
            attended = ops.attention_decode(
                q,
                pages,
                batch.page_table,
                positions=batch.positions,
                slots=batch.slots,
                scale=self.scale,
                max_seq_len=batch.max_seq_len,
            )
        else:
            attended = ops.attention_prefill(
                q,
                pages,
                batch.page_table,
                positions=batch.positions,
                query_start_loc=batch.query_start_loc,
                slots=batch.slots,
                scale=self.scale,
            )
        return ops.linear(attended.flatten(1), self.out_proj, residual=x)


class DenseFFN(nn.Module):
    """SwiGLU: ``x + w2(silu(w1 h) * w3 h)``, with ``w1`` and ``w3`` stacked in ``w13``."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        h, f = config.hidden_size, config.intermediate_size
        self.eps = config.norm_eps
        self.norm = parameter(h, dtype=dtype, device=device)
        self.w13 = parameter(2 * f, h, dtype=dtype, device=device)
        self.w2 = parameter(h, f, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Add the FFN of each token to ``x``."""
        gate_up = ops.linear(x, self.w13, norm_weight=self.norm, eps=self.eps)
        return ops.linear(ops.swiglu(gate_up), self.w2, residual=x)


class SparseMoE(nn.Module):
    """The k experts of highest ``sigmoid(gate h) + bias``, weighted by the sigmoid alone."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        h, m, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.eps, self.top_k = config.norm_eps, config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        self.norm = parameter(h, dtype=dtype, device=device)
        self.gate = parameter(experts, h, dtype=dtype, device=device)
        self.expert_bias = None
        if config.use_expert_bias:
            # fp32 whatever the model is: rounding it changes which experts are chosen
            self.expert_bias = parameter(experts, dtype=torch.float32, device=device)
        self.w13 = parameter(experts, 2 * m, h, dtype=dtype, device=device)
        self.w2 = parameter(experts, h, m, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Add the chosen experts' output of each token to ``x``."""
        h = ops.rmsnorm(x, self.norm, self.eps)
        weights, ids = ops.route(
            ops.linear(h, self.gate),
            self.expert_bias,
            top_k=self.top_k,
            norm_topk_prob=self.norm_topk_prob,
            scaling=self.scaling,
            positions=batch.positions,
        )
        return ops.moe(h, self.w13, self.w2, weights, ids, residual=x)
