r"""RMSNorm of query and key heads, rotary embedding, and the write into KV pages, in one launch.

Math (RoPE: Su et al. 2021, https://arxiv.org/abs/2104.09864, half-split form), for one head h of
width D, w its norm weight, and ``c, s`` the cosines and sines of its position::

    n  = round(round(h * rsqrt(mean(h^2) + eps)) * w)
    lo = round(round(n[: D/2] * c) - round(n[D/2 :] * s))
    hi = round(round(n[D/2 :] * c) + round(n[: D/2] * s))

Query heads go to ``out``; key heads, and value heads unchanged, to the page of their position.

Numerics: the mean square and the scaling are fp32; ``round`` is to the dtype of ``qkv``, where
transformers rounds. Products are not fused with sums, so float32 rounds at the same points too.

Memory traffic, elements per token, Hq query and Hk key heads of width D::

    read qkv, rope   write out, k, v      2 (Hq + 2 Hk) D + D
    (norm, rotation and write apart:      4 Hq D + 8 Hk D + D)

Bound by HBM. One program per tile of tokens and head. Limits: D even, 16 to 128.
Reference: ``reference.qk_norm_rope``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _checks, reference
from .reference import PAGE_SIZE

__all__ = ["qk_norm_rope"]

_MIN_D, _MAX_D = 16, 128
# slices of packed step buffers: their alignment changes from step to step and must not recompile
_METADATA = ("positions_ptr", "rows_ptr", "slots_ptr", "table_ptr", "write_from_ptr")


class QKNormRopeConfig(NamedTuple):
    """Launch knobs. They depend on the model alone, so no batch compiles anything new."""

    block_t: int
    num_warps: int

    @classmethod
    def select(cls, head_dim: int) -> QKNormRopeConfig:
        """Choose for a model."""
        # 1,024 elements for a warp at D = 64: four 16-byte loads a thread in 16-bit dtypes
        return cls(block_t=16, num_warps=1 if head_dim <= 64 else 2)


@triton.jit
def _normalize(lo, hi, w_ptr, offs_d, mask_d, eps, D: tl.constexpr, dtype: tl.constexpr):
    """``round(round(h * rstd) * w)`` of both halves ``[BLOCK_T, BLOCK_D]``, as fp32."""
    # masked lanes hold 0, so the mean is over D
    mean_square = (tl.sum(lo * lo, axis=1) + tl.sum(hi * hi, axis=1)) / D
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None]
    w_lo = tl.load(w_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    w_hi = tl.load(w_ptr + D // 2 + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    lo = ((lo * rstd).to(dtype).to(tl.float32) * w_lo).to(dtype).to(tl.float32)
    hi = ((hi * rstd).to(dtype).to(tl.float32) * w_hi).to(dtype).to(tl.float32)
    return lo, hi


@triton.jit
def _rotate(lo, hi, cos, sin, dtype: tl.constexpr):
    """Both rotated halves in ``dtype``; every product rounds before the sum does."""
    lo_cos = (lo * cos).to(dtype).to(tl.float32)
    hi_sin = (hi * sin).to(dtype).to(tl.float32)
    hi_cos = (hi * cos).to(dtype).to(tl.float32)
    lo_sin = (lo * sin).to(dtype).to(tl.float32)
    return (lo_cos - hi_sin).to(dtype), (hi_cos + lo_sin).to(dtype)


@triton.jit(do_not_specialize=["N", "stride_table_s"], do_not_specialize_on_alignment=_METADATA)
def _qk_norm_rope_kernel(
    qkv_ptr,  # [N, (Hq + 2 Hk) D]
    q_weight_ptr,  # [D]
    k_weight_ptr,  # [D]
    rope_ptr,  # [positions, D]
    pages_ptr,  # [pages, 2, Hk, PAGE, D]
    out_ptr,  # [N, Hq, D]
    positions_ptr,  # [N]
    rows_ptr,  # [N]
    slots_ptr,  # [rows]
    table_ptr,  # [S, P]
    write_from_ptr,  # [S]
    stride_qkv_n,
    stride_table_s,
    eps,
    N,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    heads: tl.constexpr = HQ + 2 * HK
    pid_h = tl.program_id(0) % heads
    # int64 before a token, page or slot meets a stride
    offs_n = (tl.program_id(0) // heads).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask_d = offs_d < D // 2
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty

    pos = tl.load(positions_ptr + offs_n, mask=mask_n, other=-1)
    live = pos >= 0
    mask_live = live[:, None] & mask_d[None, :]
    qkv_ptrs = qkv_ptr + offs_n[:, None] * stride_qkv_n + pid_h * D + offs_d[None, :]
    lo = tl.load(qkv_ptrs, mask=mask_live, other=0.0)
    hi = tl.load(qkv_ptrs + D // 2, mask=mask_live, other=0.0)

    if pid_h < HQ + HK:
        rope_ptrs = rope_ptr + tl.maximum(pos, 0).to(tl.int64)[:, None] * D + offs_d[None, :]
        cos = tl.load(rope_ptrs, mask=mask_live, other=0.0).to(tl.float32)
        sin = tl.load(rope_ptrs + D // 2, mask=mask_live, other=0.0).to(tl.float32)
        w_ptr = q_weight_ptr
        if pid_h >= HQ:
            w_ptr = k_weight_ptr
        lo_n, hi_n = _normalize(
            lo.to(tl.float32), hi.to(tl.float32), w_ptr, offs_d, mask_d, eps, D, dtype
        )
        lo, hi = _rotate(lo_n, hi_n, cos, sin, dtype)

    if pid_h < HQ:
        # padding rows were loaded as 0 and their cos and sin are 0, so they store 0
        out_ptrs = out_ptr + (offs_n[:, None] * HQ + pid_h) * D + offs_d[None, :]
        mask_out = mask_n[:, None] & mask_d[None, :]
        tl.store(out_ptrs, lo, mask=mask_out)
        tl.store(out_ptrs + D // 2, hi, mask=mask_out)
    else:
        row = tl.load(rows_ptr + offs_n, mask=live, other=0)
        slot = tl.load(slots_ptr + row, mask=live, other=0).to(tl.int64)
        write = live & (pos >= tl.load(write_from_ptr + slot, mask=live, other=0))
        table_ptrs = table_ptr + slot * stride_table_s + tl.maximum(pos, 0) // PAGE
        page = tl.load(table_ptrs, mask=write, other=0).to(tl.int64)
        # a page holds HK key tiles of [PAGE, D], then HK value tiles
        tile = page * (2 * HK) + (pid_h - HQ)
        offs_row = tile * PAGE + tl.maximum(pos, 0) % PAGE
        page_ptrs = pages_ptr + offs_row[:, None] * D + offs_d[None, :]
        mask_page = write[:, None] & mask_d[None, :]
        tl.store(page_ptrs, lo, mask=mask_page)
        tl.store(page_ptrs + D // 2, hi, mask=mask_page)


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope: torch.Tensor,
    kv_pages: torch.Tensor,
    *,
    eps: float,
    positions: torch.Tensor,
    token_rows: torch.Tensor,
    slots: torch.Tensor,
    page_table: torch.Tensor,
    kv_write_from: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write this step's keys and values into ``kv_pages`` and return its queries.

    Args:
        qkv: ``[N, (Hq + 2 Hk) D]``, float32, float16 or bfloat16, last dimension contiguous: the
            query heads, the key heads, the value heads.
        q_weight: ``[D]``, like ``qkv``.
        k_weight: ``[D]``, like ``qkv``.
        rope: ``[positions, D]``, like ``qkv``, contiguous: ``reference.rope_table``.
        kv_pages: ``[pages, 2, Hk, 64, D]``, like ``qkv``, contiguous; written in place.
        eps: Added to the mean square.
        positions: ``[N]`` int32; -1 marks padding, which yields 0 and stores nothing.
        token_rows: ``[N]`` int32, the row of each token.
        slots: ``[rows]`` int32, the slot of each row.
        page_table: ``[S, P]`` int32, the page of positions 64 p to 64 p + 63 of a slot.
        kv_write_from: ``[S]`` int32; nothing is stored for positions before it.
        out: ``[N, Hq, D]``, like ``qkv``, contiguous; written and returned.

    Returns:
        ``[N, Hq, D]`` in ``qkv.dtype``, the normalised and rotated queries.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape or stride differs from the above, or D is odd or not in 16 to 128.
    """
    op = "qk_norm_rope"
    _checks.check(op, "qkv", qkv, ("N", "(Hq + 2 Hk) D"))
    same = (qkv.dtype,)
    _checks.check(op, "q_weight", q_weight, ("D",), same)
    dim = q_weight.shape[0]
    if dim % 2 or not _MIN_D <= dim <= _MAX_D:
        raise ValueError(f"{op}: head_dim is {dim}, want an even number from {_MIN_D} to {_MAX_D}")
    _checks.check(op, "k_weight", k_weight, (dim,), same)
    _checks.check(op, "rope", rope, ("positions", dim), same, dense=True)
    _checks.check(op, "kv_pages", kv_pages, ("pages", 2, "Hk", PAGE_SIZE, dim), same, dense=True)
    n, kv_heads = qkv.shape[0], kv_pages.shape[2]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    if heads < 1 or qkv.shape[1] % dim:
        raise ValueError(
            f"{op}: qkv is {list(qkv.shape)}, want [N, (Hq + 2 * {kv_heads}) * {dim}] with Hq >= 1"
        )
    _checks.check(op, "positions", positions, (n,), _checks.INT32)
    _checks.check(op, "token_rows", token_rows, (n,), _checks.INT32)
    _checks.check(op, "slots", slots, ("rows",), _checks.INT32)
    _checks.check(op, "page_table", page_table, ("S", "P"), _checks.INT32)
    _checks.check(op, "kv_write_from", kv_write_from, page_table.shape[:1], _checks.INT32)
    if out is not None:
        _checks.check(op, "out", out, (n, heads, dim), same, dense=True)
    q = _checks.output(op, out, (n, heads, dim), qkv.dtype, qkv.device)
    if not _checks.uses_triton(qkv):
        return q.copy_(
            reference.qk_norm_rope(
                qkv,
                q_weight,
                k_weight,
                rope,
                kv_pages,
                eps=eps,
                positions=positions,
                token_rows=token_rows,
                slots=slots,
                page_table=page_table,
                kv_write_from=kv_write_from,
            )
        )
    if n == 0:
        return q
    config = QKNormRopeConfig.select(dim)
    _qk_norm_rope_kernel[((heads + 2 * kv_heads) * triton.cdiv(n, config.block_t),)](
        qkv,
        q_weight,
        k_weight,
        rope,
        kv_pages,
        q,
        positions,
        token_rows,
        slots,
        page_table,
        kv_write_from,
        qkv.stride(0),
        page_table.stride(0),
        eps,
        n,
        HQ=heads,
        HK=kv_heads,
        D=dim,
        PAGE=PAGE_SIZE,
        BLOCK_T=config.block_t,
        BLOCK_D=triton.next_power_of_2(dim // 2),
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return q
