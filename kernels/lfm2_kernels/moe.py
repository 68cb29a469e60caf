r"""Mixture of experts: two grouped GEMMs over tokens sorted by expert, and their weighted sum.

Math (LFM2 technical report, https://arxiv.org/abs/2511.23404), for token t with experts e_j and
weights r_j, j = 0 .. k - 1; ``w13[e]`` holds the M rows of w1 (gate), then the M rows of w3 (up)::

    a_j = round(round(silu(round(w1[e_j] x_t))) * round(w3[e_j] x_t))       # grouped_swiglu
    y_j = round(round(w2[e_j] a_j) * r_j)                                   # grouped_linear
    out = residual_t + round(y_0 + y_1 + ... in this order)                 # moe_combine

Numerics: every GEMM and the sum over j accumulate in fp32; ``round`` is to the dtype of x, where
transformers rounds. No atomics: a slot has one writer, and the sum has a fixed order.

Mapping: ``sort_tokens`` orders the S = N k slots by expert. A GEMM program owns one tile of one
expert's rows and finds its expert from ``expert_offsets``; the grid is an upper bound computed from
S and E alone, so the host never waits for the routing. Programs that share an expert's rows follow
each other, so the weights of one expert are read from memory once and then from L2.

Memory traffic, elements, with A the experts that got a token::

    grouped_swiglu   read 2 M H A + S H,  write S M     (gate and up never leave registers)
    grouped_linear   read M H A + S M,    write S H
    moe_combine      read S H + N H,      write N H

Bound by the weights up to about 2,900 tokens (24B in bf16 on an H100), by tensor cores beyond.
Limits: E <= 256; S, H and M below 2^31, their products not. Reference: ``reference.moe`` and the
stages of the same names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _checks, reference
from ._moe_tiles import MAX_EXPERTS, GroupedGemmConfig, find_tile, max_tiles
from .moe_sort import sort_tokens

__all__ = ["grouped_linear", "grouped_swiglu", "moe", "moe_combine"]


@triton.jit
def _load_columns(ptrs, mask, EVEN: tl.constexpr):
    return tl.load(ptrs) if EVEN else tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _grouped_swiglu_kernel(
    x_ptr,  # [N, H]
    w13_ptr,  # [E, 2 M, H]
    slots_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    out_ptr,  # [S, M]
    E: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n: tl.constexpr = (M + BLOCK_N - 1) // BLOCK_N
    pid_m = tl.program_id(0) // tiles_n
    pid_n = tl.program_id(0) % tiles_n
    expert, first, end = find_tile(offsets_ptr, pid_m, E, BLOCK_E, BLOCK_M)
    if expert >= E:
        return

    # int64 before a row or an expert meets a stride
    offs_m = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < end
    mask_n = offs_n < M
    # lanes outside read row 0, which exists, and are not stored
    rows = tl.load(slots_ptr + offs_m, mask=mask_m, other=0).to(tl.int64) // TOP_K
    cols = tl.where(mask_n, offs_n, 0)
    x_ptrs = x_ptr + rows[:, None] * H + offs_k[None, :]
    gate_ptrs = w13_ptr + expert.to(tl.int64) * (2 * M * H) + cols[None, :] * H + offs_k[:, None]

    gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        mask_k = offs_k < H - k
        x = _load_columns(x_ptrs + k, mask_k[None, :], H % BLOCK_K == 0)
        w1 = _load_columns(gate_ptrs + k, mask_k[:, None], H % BLOCK_K == 0)
        w3 = _load_columns(gate_ptrs + M * H + k, mask_k[:, None], H % BLOCK_K == 0)
        gate = tl.dot(x, w1, gate, input_precision="ieee")
        up = tl.dot(x, w3, up, input_precision="ieee")

    dtype = out_ptr.dtype.element_ty
    gate = gate.to(dtype).to(tl.float32)
    act = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    act = act * up.to(dtype).to(tl.float32)
    out_ptrs = out_ptr + offs_m[:, None] * M + offs_n[None, :]
    tl.store(out_ptrs, act.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _grouped_linear_kernel(
    act_ptr,  # [S, M]
    w2_ptr,  # [E, H, M]
    slots_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    weights_ptr,  # [S], by slot
    out_ptr,  # [S, H], by slot
    E: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    pid_m = tl.program_id(0) // tiles_n
    pid_n = tl.program_id(0) % tiles_n
    expert, first, end = find_tile(offsets_ptr, pid_m, E, BLOCK_E, BLOCK_M)
    if expert >= E:
        return

    # int64 before a row or an expert meets a stride
    offs_m = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < end
    mask_n = offs_n < H
    # lanes outside read the first row of the tile, which exists, and are not stored
    rows = tl.where(mask_m, offs_m, first)
    cols = tl.where(mask_n, offs_n, 0)
    act_ptrs = act_ptr + rows[:, None] * M + offs_k[None, :]
    w_ptrs = w2_ptr + expert.to(tl.int64) * (H * M) + cols[None, :] * M + offs_k[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, M, BLOCK_K):
        mask_k = offs_k < M - k
        act = _load_columns(act_ptrs + k, mask_k[None, :], M % BLOCK_K == 0)
        w = _load_columns(w_ptrs + k, mask_k[:, None], M % BLOCK_K == 0)
        acc = tl.dot(act, w, acc, input_precision="ieee")

    dtype = out_ptr.dtype.element_ty
    slots = tl.load(slots_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    weights = tl.load(weights_ptr + slots, mask=mask_m, other=0.0).to(tl.float32)
    y = acc.to(dtype).to(tl.float32) * weights[:, None]
    out_ptrs = out_ptr + slots[:, None] * H + offs_n[None, :]
    tl.store(out_ptrs, y.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _moe_combine_kernel(
    parts_ptr,  # [N, TOP_K, H]
    ids_ptr,  # [N, TOP_K]
    residual_ptr,  # [N, H]
    out_ptr,  # [N, H]
    E: tl.constexpr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # int64 before a token meets a stride
    pid_n = tl.program_id(1).to(tl.int64)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    parts_ptrs = parts_ptr + pid_n * (TOP_K * H) + offs_h
    acc = tl.zeros([BLOCK_H], dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        live = tl.load(ids_ptr + pid_n * TOP_K + j) < E
        # a dropped slot was never written: it is not read
        acc += tl.load(parts_ptrs + j * H, mask=mask_h & live, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + pid_n * H + offs_h, mask=mask_h, other=0.0)
    dtype = out_ptr.dtype.element_ty
    y = residual.to(tl.float32) + acc.to(dtype).to(tl.float32)
    tl.store(out_ptr + pid_n * H + offs_h, y.to(dtype), mask=mask_h)


def grouped_swiglu(
    x: torch.Tensor,
    w13: torch.Tensor,
    sorted_slots: torch.Tensor,
    expert_offsets: torch.Tensor,
    *,
    top_k: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """First expert GEMM: ``silu(w1 x) * (w3 x)`` for every slot, in sorted order.

    Args:
        x: ``[N, H]``, float32, float16 or bfloat16, contiguous.
        w13: ``[E, 2 M, H]``, like ``x``, contiguous: the rows of w1, then those of w3.
        sorted_slots: ``[S]`` int32 with S = N * top_k, from ``sort_tokens``.
        expert_offsets: ``[E + 1]`` int32, from ``sort_tokens``.
        top_k: Slots per token: slot s reads row ``s // top_k``.
        out: ``[S, M]``, like ``x``, contiguous; written and returned.

    Returns:
        ``[S, M]`` in ``x.dtype``. Rows from ``expert_offsets[E]`` on are undefined.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape or stride differs from the above, or E > 256.
    """
    op = "grouped_swiglu"
    _checks.check(op, "x", x, ("N", "H"), dense=True)
    n, hidden = x.shape
    slots = n * top_k
    _checks.check(op, "w13", w13, ("E", "2 M", hidden), (x.dtype,), dense=True)
    experts, rows, _ = w13.shape
    if rows % 2:
        raise ValueError(f"{op}: w13 is {list(w13.shape)}, want an even number of rows")
    _check_sorted(op, sorted_slots, expert_offsets, slots, experts)
    y = _output(op, out, (slots, rows // 2), x)
    if not _checks.uses_triton(x):
        return y.copy_(reference.grouped_swiglu(x, w13, sorted_slots, expert_offsets, top_k=top_k))
    if slots == 0:
        return y
    config = GroupedGemmConfig.select(slots, experts, x.dtype, two_weights=True)
    tiles_n = triton.cdiv(rows // 2, config.block_n)
    _grouped_swiglu_kernel[(max_tiles(slots, experts, config.block_m) * tiles_n,)](
        x,
        w13,
        sorted_slots,
        expert_offsets,
        y,
        E=experts,
        M=rows // 2,
        H=hidden,
        TOP_K=top_k,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return y


def grouped_linear(
    act: torch.Tensor,
    w2: torch.Tensor,
    sorted_slots: torch.Tensor,
    expert_offsets: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Second expert GEMM: ``w2 act`` times the routing weight, back in slot order.

    Args:
        act: ``[S, M]``, float32, float16 or bfloat16, contiguous, in sorted order.
        w2: ``[E, H, M]``, like ``act``, contiguous.
        sorted_slots: ``[S]`` int32, from ``sort_tokens``.
        expert_offsets: ``[E + 1]`` int32, from ``sort_tokens``.
        topk_weights: ``[N, k]`` with N * k = S, contiguous, any of the dtypes of ``act``.
        out: ``[S, H]``, like ``act``, contiguous; written and returned.

    Returns:
        ``[S, H]`` in ``act.dtype``, row s for slot s. Rows of dropped slots are undefined.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape or stride differs from the above, or E > 256.
    """
    op = "grouped_linear"
    _checks.check(op, "act", act, ("S", "M"), dense=True)
    slots, width = act.shape
    _checks.check(op, "w2", w2, ("E", "H", width), (act.dtype,), dense=True)
    experts, hidden, _ = w2.shape
    _check_sorted(op, sorted_slots, expert_offsets, slots, experts)
    _checks.check(op, "topk_weights", topk_weights, ("N", "k"), dense=True)
    if topk_weights.numel() != slots:
        shape = list(topk_weights.shape)
        raise ValueError(f"{op}: topk_weights is {shape}, want {slots} weights in all")
    y = _output(op, out, (slots, hidden), act)
    if not _checks.uses_triton(act):
        return y.copy_(
            reference.grouped_linear(act, w2, sorted_slots, expert_offsets, topk_weights)
        )
    if slots == 0:
        return y
    config = GroupedGemmConfig.select(slots, experts, act.dtype, two_weights=False)
    tiles_n = triton.cdiv(hidden, config.block_n)
    _grouped_linear_kernel[(max_tiles(slots, experts, config.block_m) * tiles_n,)](
        act,
        w2,
        sorted_slots,
        expert_offsets,
        topk_weights,
        y,
        E=experts,
        M=width,
        H=hidden,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return y


def moe_combine(
    slot_outputs: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    residual: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum the ``k`` slots of each token in slot order, and add ``residual``.

    Args:
        slot_outputs: ``[N * k, H]``, float32, float16 or bfloat16, contiguous, in slot order.
        topk_ids: ``[N, k]`` int32, contiguous; slots of id ``num_experts`` or more are not read.
        num_experts: E.
        residual: ``[N, H]``, like ``slot_outputs``, contiguous.
        out: Like ``residual``; written and returned. May be ``residual`` itself.

    Returns:
        ``[N, H]`` in ``residual.dtype``.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape or stride differs from the above.
    """
    op = "moe_combine"
    _checks.check(op, "topk_ids", topk_ids, ("N", "k"), _checks.INT32, dense=True)
    n, top_k = topk_ids.shape
    _checks.check(op, "slot_outputs", slot_outputs, (n * top_k, "H"), dense=True)
    hidden = slot_outputs.shape[1]
    _checks.check(op, "residual", residual, (n, hidden), (slot_outputs.dtype,), dense=True)
    y = _output(op, out, (n, hidden), residual)
    if not _checks.uses_triton(residual):
        return y.copy_(reference.moe_combine(slot_outputs, topk_ids, num_experts, residual))
    if n == 0:
        return y
    # 8 elements per thread: one 16-byte load in 16-bit dtypes
    block_h = min(1024, triton.next_power_of_2(hidden))
    _moe_combine_kernel[(triton.cdiv(hidden, block_h), n)](
        slot_outputs,
        topk_ids,
        residual,
        y,
        E=num_experts,
        H=hidden,
        TOP_K=top_k,
        BLOCK_H=block_h,
        num_warps=max(1, block_h // 256),
        enable_fp_fusion=True,
    )
    return y


def moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    residual: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A whole expert layer after routing: sort, both GEMMs, weighted sum plus ``residual``.

    Args:
        x: ``[N, H]``, float32, float16 or bfloat16, contiguous.
        w13: ``[E, 2 M, H]``, like ``x``, contiguous: the rows of w1, then those of w3.
        w2: ``[E, H, M]``, like ``x``, contiguous.
        topk_weights: ``[N, k]``, contiguous.
        topk_ids: ``[N, k]`` int32, contiguous; id E drops a slot.
        residual: ``[N, H]``, like ``x``, contiguous.
        out: Like ``residual``; written and returned. May be ``residual`` itself.

    Returns:
        ``[N, H]`` in ``x.dtype``.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape or stride differs from the above, or E > 256.
    """
    experts = w13.shape[0]
    order, offsets = sort_tokens(topk_ids, experts)
    act = grouped_swiglu(x, w13, order, offsets, top_k=topk_ids.shape[1])
    parts = grouped_linear(act, w2, order, offsets, topk_weights)
    return moe_combine(parts, topk_ids, experts, residual, out=out)


def _check_sorted(
    op: str, sorted_slots: torch.Tensor, expert_offsets: torch.Tensor, slots: int, experts: int
) -> None:
    if experts > MAX_EXPERTS:
        raise ValueError(f"{op}: {experts} experts, want at most {MAX_EXPERTS}")
    _checks.check(op, "sorted_slots", sorted_slots, (slots,), _checks.INT32)
    _checks.check(op, "expert_offsets", expert_offsets, (experts + 1,), _checks.INT32)


def _output(
    op: str, out: torch.Tensor | None, shape: tuple[int, int], like: torch.Tensor
) -> torch.Tensor:
    y = _checks.output(op, out, shape, like.dtype, like.device)
    _checks.check(op, "out", y, shape, (like.dtype,), dense=True)
    return y
