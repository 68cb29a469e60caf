r"""Gated short convolution: depthwise, causal, over ragged sequences, with its past in a ring.

Math (LFM2 technical report, https://arxiv.org/abs/2511.23404), for a token at position p, per
channel, with ``[B | C | X]`` its row of ``bcx`` and L taps, the last of them for the token itself::

    u_p = round(B * X)                                  # u before first_computed reads as zero
    y_p = round(C * round(sum_j w[:, j] * u_{p - (L-1) + j} + bias))

Numerics: taps accumulate in fp32 from the oldest to the newest, then the bias; ``round`` is to the
dtype of ``bcx``. No product is fused with a sum, so results are those of the reference, bit by bit,
and prefill and decode agree with each other in the same way.

State: ``conv_state[slot, p % R]`` holds u_p, with R >= L. A tap that lies before the span of its
row comes from there. Decode stores u_p in the launch that reads p - 1, p - 2, ...: R >= L keeps
those rows apart. A prefill span may end in the very ring rows that its own first tokens read, and
these belong to other programs, so its last R rows are stored by a second launch.

Memory traffic, elements per token and channel::

    prefill   read B, C, X   write y              4   (L - 1 earlier rows of B and X hit L1)
    store     read B, X      write u              3   for the last R tokens of a row
    decode    read B, C, X, L - 1 of the ring   write y, u   L + 4

Bound by HBM. One program per tile of tokens and channels (prefill), per row and tile of channels
(store, decode). Limits: 2 to 4 taps. Reference: ``reference.short_conv_prefill``,
``reference.short_conv_decode``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _checks, reference

__all__ = ["short_conv_decode", "short_conv_prefill"]

_MIN_TAPS, _MAX_TAPS = 2, 4
# slices of packed step buffers: their alignment changes from step to step and must not recompile
_METADATA = ("positions_ptr", "rows_ptr", "starts_ptr", "slots_ptr", "first_ptr")


class ShortConvConfig(NamedTuple):
    """Launch knobs. They depend on the model alone, so no batch compiles anything new."""

    block_t: int
    block_h: int
    num_warps: int

    @classmethod
    def select_prefill(cls, hidden: int) -> ShortConvConfig:
        """Choose for tiles of tokens."""
        # rows of 128 channels are 256 bytes in 16-bit dtypes, whole cache lines; 16 tokens keep
        # what neighbouring tiles both read (L - 1 rows) near 12 %
        return cls(16, min(128, triton.next_power_of_2(hidden)), num_warps=4)

    @classmethod
    def select_row(cls, hidden: int) -> ShortConvConfig:
        """Choose for programs that own one row: decode and the ring store."""
        # 8 channels per thread: one 16-byte access in 16-bit dtypes; with two warps a program, the
        # 32 programs that an SM holds at most fill its 64 warps
        return cls(1, min(512, triton.next_power_of_2(hidden)), num_warps=2)


@triton.jit
def _gate(bcx_ptrs, mask, H: tl.constexpr):
    """``u = round(B * X)`` as fp32, from pointers to B."""
    b = tl.load(bcx_ptrs, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(bcx_ptrs + 2 * H, mask=mask, other=0.0).to(tl.float32)
    return (b * x).to(bcx_ptrs.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=_METADATA)
def _short_conv_prefill_kernel(
    bcx_ptr,  # [N, 3 H]
    w_ptr,  # [H, L]
    bias_ptr,  # [H] if HAS_BIAS
    state_ptr,  # [S, R, H]
    y_ptr,  # [N, H]
    positions_ptr,  # [N]
    rows_ptr,  # [N]
    starts_ptr,  # [rows + 1]
    slots_ptr,  # [rows]
    first_ptr,  # [S]
    stride_bcx_n,
    stride_w_h,
    stride_w_l,
    stride_y_n,
    N,
    H: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tiles_h: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    pid_h = tl.program_id(0) % tiles_h
    # int64 before a token, slot or ring row meets a stride
    pid_n = (tl.program_id(0) // tiles_h).to(tl.int64)
    offs_h = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_n = pid_n * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_h = offs_h < H
    mask_n = offs_n < N

    pos = tl.load(positions_ptr + offs_n, mask=mask_n, other=-1)
    live = pos >= 0
    row = tl.load(rows_ptr + offs_n, mask=live, other=0)
    start = tl.load(starts_ptr + row, mask=live, other=0)
    slot = tl.load(slots_ptr + row, mask=live, other=0).to(tl.int64)
    first = tl.load(first_ptr + slot, mask=live, other=0)

    acc = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    bcx_ptrs = bcx_ptr + offs_n[:, None] * stride_bcx_n + offs_h[None, :]
    w_ptrs = w_ptr + offs_h * stride_w_h
    for back in tl.static_range(L - 1, -1, -1):
        past = pos - back
        seen = live & (past >= first)
        in_span = offs_n - back >= start
        # this mask waits for no metadata, so the large loads start at once
        mask_source = mask_n & (offs_n >= back)
        u = _gate(bcx_ptrs - back * stride_bcx_n, mask_source[:, None] & mask_h[None, :], H)
        u = tl.where((seen & in_span)[:, None], u, 0.0)
        if back > 0:
            mask_ring = (seen & ~in_span)[:, None] & mask_h[None, :]
            ring_rows = slot * R + tl.where(seen, past, 0) % R
            ring_ptrs = state_ptr + ring_rows[:, None] * H + offs_h[None, :]
            u += tl.load(ring_ptrs, mask=mask_ring, other=0.0).to(tl.float32)
        w = tl.load(w_ptrs + (L - 1 - back) * stride_w_l, mask=mask_h, other=0.0).to(tl.float32)
        acc += u * w[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)[None, :]

    mask = live[:, None] & mask_h[None, :]
    c = tl.load(bcx_ptrs + H, mask=mask, other=0.0).to(tl.float32)
    y = c * acc.to(y_ptr.dtype.element_ty).to(tl.float32)
    y_ptrs = y_ptr + offs_n[:, None] * stride_y_n + offs_h[None, :]
    # C was not loaded for padding tokens: they store 0
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_h[None, :])


@triton.jit(do_not_specialize_on_alignment=_METADATA)
def _short_conv_store_kernel(
    bcx_ptr,  # [N, 3 H]
    state_ptr,  # [S, R, H]
    positions_ptr,  # [N]
    starts_ptr,  # [rows + 1]
    slots_ptr,  # [rows]
    stride_bcx_n,
    H: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pid_row = tl.program_id(1)
    start = tl.load(starts_ptr + pid_row)
    end = tl.load(starts_ptr + pid_row + 1)
    slot = tl.load(slots_ptr + pid_row).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_n = (end - 1 - offs_r).to(tl.int64)
    mask_r = (offs_r < R) & (offs_n >= start)
    mask_h = offs_h < H

    pos = tl.load(positions_ptr + offs_n, mask=mask_r, other=-1)
    mask = (pos >= 0)[:, None] & mask_h[None, :]
    u = _gate(bcx_ptr + offs_n[:, None] * stride_bcx_n + offs_h[None, :], mask, H)
    ring_rows = slot * R + tl.maximum(pos, 0) % R
    ring_ptrs = state_ptr + ring_rows[:, None] * H + offs_h[None, :]
    tl.store(ring_ptrs, u.to(state_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=_METADATA)
def _short_conv_decode_kernel(
    bcx_ptr,  # [N, 3 H]
    w_ptr,  # [H, L]
    bias_ptr,  # [H] if HAS_BIAS
    state_ptr,  # [S, R, H]
    y_ptr,  # [N, H]
    positions_ptr,  # [N]
    slots_ptr,  # [N]
    first_ptr,  # [S]
    stride_bcx_n,
    stride_w_h,
    stride_w_l,
    stride_y_n,
    H: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pid_n = tl.program_id(1).to(tl.int64)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    y_ptrs = y_ptr + pid_n * stride_y_n + offs_h

    pos = tl.load(positions_ptr + pid_n)
    if pos < 0:
        tl.store(y_ptrs, tl.zeros([BLOCK_H], dtype=y_ptr.dtype.element_ty), mask=mask_h)
        return
    slot = tl.load(slots_ptr + pid_n).to(tl.int64)
    first = tl.load(first_ptr + slot)
    bcx_ptrs = bcx_ptr + pid_n * stride_bcx_n + offs_h
    now = _gate(bcx_ptrs, mask_h, H)

    state_ptrs = state_ptr + slot * (R * H) + offs_h
    acc = tl.zeros([BLOCK_H], dtype=tl.float32)
    w_ptrs = w_ptr + offs_h * stride_w_h
    for back in tl.static_range(L - 1, -1, -1):
        w = tl.load(w_ptrs + (L - 1 - back) * stride_w_l, mask=mask_h, other=0.0).to(tl.float32)
        if back == 0:
            # the token itself is before first_computed when a caller says so: then it reads as zero
            acc += tl.where(pos >= first, now, 0.0) * w
        else:
            past = pos - back
            ring_ptrs = state_ptrs + tl.maximum(past, 0) % R * H
            mask_past = mask_h & (past >= first)
            acc += tl.load(ring_ptrs, mask=mask_past, other=0.0).to(tl.float32) * w
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)

    c = tl.load(bcx_ptrs + H, mask=mask_h, other=0.0).to(tl.float32)
    y = c * acc.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_h)
    tl.store(state_ptrs + pos % R * H, now.to(state_ptr.dtype.element_ty), mask=mask_h)


def short_conv_prefill(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    conv_state: torch.Tensor,
    *,
    positions: torch.Tensor,
    token_rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    slots: torch.Tensor,
    first_computed: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve spans of any length and store the last rows of each in the ring ``conv_state``.

    Args:
        bcx: ``[N, 3 H]``, float32, float16 or bfloat16, last dimension contiguous: B, C and X.
        weight: ``[H, L]``, 2 <= L <= 4, like ``bcx``, one of its strides 1. The last tap is the
            newest. A transposed view of ``[L, H]`` memory loads in 16-byte words, the other order
            in single elements.
        conv_state: ``[S, R, H]`` with R >= L, like ``bcx``, contiguous; written in place.
        positions: ``[N]`` int32; -1 marks padding, which yields 0 and stores nothing.
        token_rows: ``[N]`` int32, the row of each token.
        query_start_loc: ``[rows + 1]`` int32; the tokens of a row have consecutive positions.
        slots: ``[rows]`` int32, the ring of each row.
        first_computed: ``[S]`` int32; inputs before this position read as zero.
        bias: ``[H]``, like ``bcx``.
        out: ``[N, H]``, like ``bcx``; written and returned.

    Returns:
        ``[N, H]`` in ``bcx.dtype``.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape or stride differs from the above.
    """
    op = "short_conv_prefill"
    n, hidden, taps, ring = _check(op, bcx, weight, conv_state, bias)
    rows = slots.shape[0]
    _checks.check(op, "positions", positions, (n,), _checks.INT32)
    _checks.check(op, "token_rows", token_rows, (n,), _checks.INT32)
    _checks.check(op, "query_start_loc", query_start_loc, (rows + 1,), _checks.INT32)
    _checks.check(op, "slots", slots, (rows,), _checks.INT32)
    _checks.check(op, "first_computed", first_computed, conv_state.shape[:1], _checks.INT32)
    y = _checks.output(op, out, (n, hidden), bcx.dtype, bcx.device)
    if not _checks.uses_triton(bcx):
        return y.copy_(
            reference.short_conv_prefill(
                bcx,
                weight,
                conv_state,
                positions=positions,
                token_rows=token_rows,
                query_start_loc=query_start_loc,
                slots=slots,
                first_computed=first_computed,
                bias=bias,
            )
        )
    if n == 0:
        return y
    config = ShortConvConfig.select_prefill(hidden)
    tiles_h = triton.cdiv(hidden, config.block_h)
    _short_conv_prefill_kernel[(tiles_h * triton.cdiv(n, config.block_t),)](
        bcx,
        weight,
        bias,
        conv_state,
        y,
        positions,
        token_rows,
        query_start_loc,
        slots,
        first_computed,
        bcx.stride(0),
        weight.stride(0),
        weight.stride(1),
        y.stride(0),
        n,
        H=hidden,
        L=taps,
        R=ring,
        HAS_BIAS=bias is not None,
        BLOCK_T=config.block_t,
        BLOCK_H=config.block_h,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    config = ShortConvConfig.select_row(hidden)
    _short_conv_store_kernel[(triton.cdiv(hidden, config.block_h), rows)](
        bcx,
        conv_state,
        positions,
        query_start_loc,
        slots,
        bcx.stride(0),
        H=hidden,
        R=ring,
        BLOCK_R=triton.next_power_of_2(ring),
        BLOCK_H=config.block_h,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return y


def short_conv_decode(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    conv_state: torch.Tensor,
    *,
    positions: torch.Tensor,
    slots: torch.Tensor,
    first_computed: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve one token a row and store it in the ring ``conv_state``.

    Token r belongs to row r, so ``positions`` and ``slots`` are ``[N]``; the rest is the contract
    of ``short_conv_prefill``. Rows that are not padding have different slots.
    """
    op = "short_conv_decode"
    n, hidden, taps, ring = _check(op, bcx, weight, conv_state, bias)
    _checks.check(op, "positions", positions, (n,), _checks.INT32)
    _checks.check(op, "slots", slots, (n,), _checks.INT32)
    _checks.check(op, "first_computed", first_computed, conv_state.shape[:1], _checks.INT32)
    y = _checks.output(op, out, (n, hidden), bcx.dtype, bcx.device)
    if not _checks.uses_triton(bcx):
        return y.copy_(
            reference.short_conv_decode(
                bcx,
                weight,
                conv_state,
                positions=positions,
                slots=slots,
                first_computed=first_computed,
                bias=bias,
            )
        )
    if n == 0:
        return y
    config = ShortConvConfig.select_row(hidden)
    _short_conv_decode_kernel[(triton.cdiv(hidden, config.block_h), n)](
        bcx,
        weight,
        bias,
        conv_state,
        y,
        positions,
        slots,
        first_computed,
        bcx.stride(0),
        weight.stride(0),
        weight.stride(1),
        y.stride(0),
        H=hidden,
        L=taps,
        R=ring,
        HAS_BIAS=bias is not None,
        BLOCK_H=config.block_h,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return y


def _check(
    op: str,
    bcx: torch.Tensor,
    weight: torch.Tensor,
    conv_state: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[int, int, int, int]:
    """Check what both ops share; return tokens, channels, taps and ring rows."""
    _checks.check(op, "bcx", bcx, ("N", "3 H"))
    if bcx.shape[1] % 3:
        raise ValueError(f"{op}: bcx is {list(bcx.shape)}, want [N, 3 H]")
    same, hidden = (bcx.dtype,), bcx.shape[1] // 3
    if weight.ndim == 2 and weight.stride(0) == 1:
        _checks.check(op, "weight (transposed)", weight.t(), ("L", hidden), same)
    else:
        _checks.check(op, "weight", weight, (hidden, "L"), same)
    taps = weight.shape[1]
    if not _MIN_TAPS <= taps <= _MAX_TAPS:
        raise ValueError(f"{op}: weight has {taps} taps, want {_MIN_TAPS} to {_MAX_TAPS}")
    _checks.check(op, "conv_state", conv_state, ("S", "R", hidden), same, dense=True)
    ring = conv_state.shape[1]
    if ring < taps:
        raise ValueError(f"{op}: conv_state has {ring} ring rows, want at least {taps}, the taps")
    if bias is not None:
        _checks.check(op, "bias", bias, (hidden,), same)
    return bcx.shape[0], hidden, taps, ring
