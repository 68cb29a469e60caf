r"""The router of a mixture of experts: sigmoid scores, biased top-k, normalised weights.

Math (LFM2 technical report, https://arxiv.org/abs/2511.23404; the bias that only selects is that of
Wang et al. 2024, https://arxiv.org/abs/2408.15664), for each row of E logits::

    p = round(sigmoid(logits))
    e = the k experts of largest p + bias                  # ties go to the lower expert id
    w = p[e]                                               # unbiased
    w = round(w / round(round(sum(w)) + 1e-6))             # if norm_topk_prob
    w = round(w * scaling)

Numerics: all arithmetic is fp32, the bias is never rounded, ``round`` is to the dtype of the
logits. Selection compares the bits of ``p + bias`` as integers, so no logit, NaN included, yields
an id outside 0 .. E - 1.

Memory traffic, elements per row: read E, write 2 k. Bound by launch latency: a few rows per
one-warp program, k rounds of a warp-wide maximum. Limit: E <= 256. Reference: ``reference.route``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _checks, reference

__all__ = ["route"]

_MAX_EXPERTS = 256


class RouterConfig(NamedTuple):
    """Launch knobs. They depend on the model alone, so no batch compiles anything new."""

    block_n: int
    num_warps: int

    @classmethod
    def select(cls, experts: int) -> RouterConfig:
        # 8 scores per thread; one warp, so that no maximum crosses a barrier
        return cls(max(1, 256 // triton.next_power_of_2(experts)), num_warps=1)


@triton.jit(do_not_specialize=["N"])
def _route_kernel(
    logits_ptr,  # [N, E]
    bias_ptr,  # [E] if HAS_BIAS
    positions_ptr,  # [N] if HAS_POSITIONS
    weights_ptr,  # [N, TOP_K]
    ids_ptr,  # [N, TOP_K]
    N,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SCALING: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype = weights_ptr.dtype.element_ty
    # int64 before a token meets a stride
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_e = offs_e < E

    logits_ptrs = logits_ptr + offs_n[:, None] * E + offs_e[None, :]
    h = tl.load(logits_ptrs, mask=mask_n[:, None] & mask_e[None, :], other=0.0).to(tl.float32)
    one = tl.full([BLOCK_N, BLOCK_E], 1.0, dtype=tl.float32)
    scores = tl.div_rn(one, 1.0 + tl.exp(-h)).to(dtype).to(tl.float32)
    biased = scores
    if HAS_BIAS:
        biased += tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0)[None, :]
    # the bits of fp32 order like signed integers once those of negative numbers are turned round;
    # the lowest integer marks lanes that are taken or lie past E
    lowest: tl.constexpr = -(2**31)
    bits = biased.to(tl.int32, bitcast=True)
    keys = tl.where(mask_e[None, :], bits ^ ((bits >> 31) & 0x7FFFFFFF), lowest)

    ids = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.int32)
    weights = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        best = tl.max(keys, axis=1)
        candidates = tl.where(keys == best[:, None], offs_e[None, :], BLOCK_E)
        chosen = tl.min(candidates, axis=1)
        hit = offs_e[None, :] == chosen[:, None]
        score = tl.sum(tl.where(hit, scores, 0.0), axis=1)
        ids = tl.where(offs_k[None, :] == j, chosen[:, None], ids)
        weights = tl.where(offs_k[None, :] == j, score[:, None], weights)
        keys = tl.where(hit, lowest, keys)

    if NORM:
        # lanes past TOP_K hold 0
        total = tl.sum(weights, axis=1).to(dtype).to(tl.float32)
        total = (total + 1e-6).to(dtype).to(tl.float32)
        divisor = tl.broadcast_to(total[:, None], [BLOCK_N, BLOCK_K])
        weights = tl.div_rn(weights, divisor).to(dtype).to(tl.float32)
    weights = weights * SCALING
    if HAS_POSITIONS:
        pad = tl.load(positions_ptr + offs_n, mask=mask_n, other=0)[:, None] < 0
        ids = tl.where(pad, E, ids)
        weights = tl.where(pad, 0.0, weights)
    offs_out = offs_n[:, None] * TOP_K + offs_k[None, :]
    mask = mask_n[:, None] & (offs_k < TOP_K)[None, :]
    tl.store(weights_ptr + offs_out, weights.to(dtype), mask=mask)
    tl.store(ids_ptr + offs_out, ids, mask=mask)


def route(
    logits: torch.Tensor,
    expert_bias: torch.Tensor | None,
    *,
    top_k: int,
    norm_topk_prob: bool,
    scaling: float,
    positions: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``top_k`` experts for each token and weigh them.

    Args:
        logits: ``[N, E]``, float32, float16 or bfloat16, contiguous, E <= 256.
        expert_bias: ``[E]`` float32, added for the choice only.
        top_k: Experts per token, 1 to E.
        norm_topk_prob: Divide the weights by their sum plus 1e-6.
        scaling: Factor of every weight, applied last.
        positions: ``[N]`` int32; a negative one marks padding, which gets id E and weight 0.
        out: The two results; written and returned.

    Returns:
        Weights ``[N, top_k]`` in ``logits.dtype``, and expert ids ``[N, top_k]`` int32, by
        falling score.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape, a stride or ``top_k`` differs from the above.
    """
    op = "route"
    _checks.check(op, "logits", logits, ("N", "E"), dense=True)
    n, experts = logits.shape
    if experts > _MAX_EXPERTS:
        raise ValueError(f"{op}: logits is [{n}, {experts}], want at most {_MAX_EXPERTS} experts")
    if not 1 <= top_k <= experts:
        raise ValueError(f"{op}: top_k is {top_k}, want 1 to {experts}")
    if expert_bias is not None:
        _checks.check(op, "expert_bias", expert_bias, (experts,), (torch.float32,))
    if positions is not None:
        _checks.check(op, "positions", positions, (n,), _checks.INT32)
    weights, ids = out if out is not None else (None, None)
    weights = _checks.output(op, weights, (n, top_k), logits.dtype, logits.device)
    ids = _checks.output(op, ids, (n, top_k), torch.int32, logits.device)
    if not _checks.uses_triton(logits):
        results = reference.route(
            logits,
            expert_bias,
            top_k=top_k,
            norm_topk_prob=norm_topk_prob,
            scaling=scaling,
            positions=positions,
        )
        return weights.copy_(results[0]), ids.copy_(results[1])
    if n == 0:
        return weights, ids
    config = RouterConfig.select(experts)
    _route_kernel[(triton.cdiv(n, config.block_n),)](
        logits,
        expert_bias,
        positions,
        weights,
        ids,
        n,
        E=experts,
        TOP_K=top_k,
        SCALING=scaling,
        NORM=norm_topk_prob,
        HAS_BIAS=expert_bias is not None,
        HAS_POSITIONS=positions is not None,
        BLOCK_N=config.block_n,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=config.num_warps,
        # p + bias and w * scaling round apart
        enable_fp_fusion=False,
    )
    return weights, ids
