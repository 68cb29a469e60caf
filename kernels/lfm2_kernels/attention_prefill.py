r"""Causal attention of ragged query spans over paged keys and values (grouped queries).

Math (FlashAttention-2: Dao 2023, https://arxiv.org/abs/2307.08691; pages: Kwon et al. 2023,
https://arxiv.org/abs/2309.06180), for the token at position p of a sequence, per query head::

    y_p = softmax_{j <= p}(scale * q_p . k_j) V

Keys and values come from pages alone, this step's own included, so how a prompt is cut into chunks
changes nothing.

Numerics: scores, the running maximum and sum, and the accumulator are fp32; probabilities round to
the dtype of ``q`` before they meet V, and the result rounds once. Keys are taken 64 at a time, one
page (fewer where registers run out), in order from position 0, whatever tile a token falls in: its
result depends on nothing else in the batch.

Mapping: the G query heads that share a KV head are packed with the tokens, so a tile of BLOCK_M
rows is BLOCK_M / G' tokens (G' is G raised to a power of two) and K and V are read once for all of
them. Row r of the batch gets ``floor(end / BLOCK_Q) - floor(start / BLOCK_Q) + 1`` tiles, enough
for any start, so the grid depends on N and the number of rows alone; a program finds its row by
counting in ``query_start_loc`` and returns if its tile is empty. The tokens after the last row are
one more row, whose programs store zeros: padding needs no memset. The last tiles come first: in a
causal span they see the most keys.

Memory traffic, elements per tile and KV head: q and y, 2 BLOCK_M D; K and V, 2 D per visible key.
Bound by the tensor cores (4 D multiply-adds per query head and key) for spans of a few hundred
tokens and up. Limits: D 16 to 128, G 1 to 8. Reference: ``reference.attention_prefill``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _checks, reference
from .reference import PAGE_SIZE

__all__ = ["attention_prefill"]

_MIN_D, _MAX_D, _MAX_GROUP = 16, 128, 8
_BLOCK_R = 1024
LOG2_E = 1.4426950408889634
# slices of packed step buffers: their alignment changes from step to step and must not recompile
_METADATA = ("positions_ptr", "starts_ptr", "slots_ptr", "table_ptr")


class AttentionPrefillConfig(NamedTuple):
    """Launch knobs. They depend on the model alone, so no batch compiles anything new."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @classmethod
    def select(cls, head_dim: int, dtype: torch.dtype) -> AttentionPrefillConfig:
        """Choose for a model; 0 spills on sm_80 to sm_120 decides between tiles of equal work."""
        if dtype == torch.float32:
            # no tensor cores in full fp32: each thread holds whole rows of its operands
            if head_dim <= 64:
                return cls(block_m=16, block_n=32, num_warps=4, num_stages=2)
            return cls(block_m=16, block_n=16, num_warps=4, num_stages=1)
        # wgmma needs 64 rows a warp group; two groups share each K and V tile. Page ids, then K
        # and V, are loaded ahead in five stages: three K and V tiles are in flight, in under 99 KB
        if head_dim <= 32:
            return cls(block_m=128, block_n=64, num_warps=4, num_stages=5)
        return cls(block_m=128, block_n=64 if head_dim <= 64 else 32, num_warps=8, num_stages=5)


@triton.jit
def _find_row(starts_ptr, pid, rows, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr):
    """The row whose tiles include tile ``pid``; row r begins at tile ``start_r // BLOCK_Q + r``.

    Counting beats bisecting: one load and a sum for 1,024 rows, not ten loads in a chain.
    """
    count = 0
    for base in range(0, rows + 1, BLOCK_R):
        offs_r = base + tl.arange(0, BLOCK_R)
        mask_r = offs_r <= rows
        start = tl.load(starts_ptr + offs_r, mask=mask_r, other=0)
        begins = mask_r & (start // BLOCK_Q + offs_r <= pid)
        count += tl.sum(begins.to(tl.int32), axis=0)
    return count - 1


@triton.jit
def attend_tiles(
    q,  # [BLOCK_M, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D]
    m,  # [BLOCK_M], running maximum, in powers of two
    total,  # [BLOCK_M], running sum
    table_ptr,
    kv_ptr,  # the key tile of this head in page 0
    pos,  # [BLOCK_M]
    last,
    first_tile,
    end_tile,
    qk_scale,
    stride_page: tl.constexpr,
    stride_kv: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take key tiles ``first_tile`` to ``end_tile`` into ``acc, m, total``; decode uses it too."""
    tiles_page: tl.constexpr = PAGE // BLOCK_N
    offs_k = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_kv = offs_k[:, None] * D + offs_d[None, :]
    for tile in range(first_tile, end_tile):
        page = tl.load(table_ptr + tile // tiles_page).to(tl.int64)
        k_ptrs = kv_ptr + page * stride_page + tile % tiles_page * (BLOCK_N * D) + offs_kv
        if MASKED:
            # rows of a page after the last token may hold anything, NaN too
            mask_kv = (tile * BLOCK_N + offs_k <= last)[:, None] & mask_d[None, :]
            k = tl.load(k_ptrs, mask=mask_kv, other=0.0)
            v = tl.load(k_ptrs + stride_kv, mask=mask_kv, other=0.0)
        elif BLOCK_D != D:
            k = tl.load(k_ptrs, mask=mask_d[None, :], other=0.0)
            v = tl.load(k_ptrs + stride_kv, mask=mask_d[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs)
            v = tl.load(k_ptrs + stride_kv)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
        if MASKED:
            visible = tile * BLOCK_N + offs_k[None, :] <= pos[:, None]
            s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return acc, m, total


@triton.jit(
    do_not_specialize=["N", "rows", "stride_table_s"], do_not_specialize_on_alignment=_METADATA
)
def _attention_prefill_kernel(
    q_ptr,  # [N, Hk G, D]
    pages_ptr,  # [pages, 2, Hk, PAGE, D]
    table_ptr,  # [S, P]
    out_ptr,  # [N, Hk G, D]
    positions_ptr,  # [N]
    starts_ptr,  # [rows + 1]
    slots_ptr,  # [rows]
    stride_q_n,
    stride_table_s,
    qk_scale,
    N,
    rows,
    HK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // BLOCK_G
    pid_q = tl.num_programs(0) - 1 - tl.program_id(0)
    pid_h = tl.program_id(1)
    row = _find_row(starts_ptr, pid_q, rows, BLOCK_Q, BLOCK_R)
    start = tl.load(starts_ptr + row)
    end = tl.load(starts_ptr + row + 1, mask=row < rows, other=N)
    begin = start + (pid_q - (start // BLOCK_Q + row)) * BLOCK_Q
    if begin >= end:
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = begin + offs_m // BLOCK_G
    offs_g = offs_m % BLOCK_G
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = (offs_n < end) & (offs_g < G)
    mask_d = offs_d < D
    mask_q = mask_m[:, None] & mask_d[None, :]
    # tokens of no row are padding whatever their position says
    pos = tl.load(positions_ptr + offs_n, mask=mask_m & (row < rows), other=-1)
    # int64 before a token meets a stride
    offs_n = offs_n.to(tl.int64)
    heads = pid_h * G + offs_g
    out_ptrs = out_ptr + (offs_n * (HK * G) + heads)[:, None] * D + offs_d[None, :]
    last = tl.max(pos, axis=0)
    if last < 0:
        tl.store(
            out_ptrs, tl.zeros([BLOCK_M, BLOCK_D], dtype=out_ptr.dtype.element_ty), mask=mask_q
        )
        return

    q_ptrs = q_ptr + offs_n[:, None] * stride_q_n + heads[:, None] * D + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_q, other=0.0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    table_ptr += slot * stride_table_s
    stride_kv: tl.constexpr = HK * PAGE * D
    kv_ptr = pages_ptr + pid_h * (PAGE * D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    # keys up to the first token of the tile are visible to all of it
    first = tl.min(tl.where(mask_m, pos, last), axis=0)
    full_tiles = (first + 1) // BLOCK_N
    acc, m, total = attend_tiles(
        q,
        acc,
        m,
        total,
        table_ptr,
        kv_ptr,
        pos,
        last,
        0,
        full_tiles,
        qk_scale,
        2 * stride_kv,
        stride_kv,
        D,
        PAGE,
        BLOCK_N,
        BLOCK_D,
        False,
        PRECISION,
    )
    acc, m, total = attend_tiles(
        q,
        acc,
        m,
        total,
        table_ptr,
        kv_ptr,
        pos,
        last,
        full_tiles,
        last // BLOCK_N + 1,
        qk_scale,
        2 * stride_kv,
        stride_kv,
        D,
        PAGE,
        BLOCK_N,
        BLOCK_D,
        True,
        PRECISION,
    )
    # padding tokens inside a tile saw no key: their sum is 0 or NaN, their result 0
    y = tl.where((pos >= 0)[:, None], acc / total[:, None], 0.0)
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask_q)


def attention_prefill(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    page_table: torch.Tensor,
    *,
    positions: torch.Tensor,
    query_start_loc: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from spans of any length to all keys up to each token's position.

    Args:
        q: ``[N, Hq, D]``, float32, float16 or bfloat16, last two dimensions contiguous.
        kv_pages: ``[pages, 2, Hk, 64, D]``, like ``q``, contiguous; this step's keys and values are
            already written. Hq is a multiple of Hk, at most 8 times.
        page_table: ``[S, P]`` int32, the page of positions 64 p to 64 p + 63 of a slot.
        positions: ``[N]`` int32; -1 marks padding, which yields 0.
        query_start_loc: ``[rows + 1]`` int32. Tokens after the last row yield 0.
        slots: ``[rows]`` int32, the slot of each row.
        scale: Factor on the scores.
        out: ``[N, Hq, D]``, like ``q``, contiguous; written and returned.

    Returns:
        ``[N, Hq, D]`` in ``q.dtype``.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape or stride differs from the above.
    """
    op = "attention_prefill"
    group = check_attention(op, q, kv_pages, page_table, out)
    n, heads, dim = q.shape
    rows = slots.shape[0]
    _checks.check(op, "positions", positions, (n,), _checks.INT32)
    _checks.check(op, "query_start_loc", query_start_loc, (rows + 1,), _checks.INT32)
    _checks.check(op, "slots", slots, (rows,), _checks.INT32)
    y = _checks.output(op, out, (n, heads, dim), q.dtype, q.device)
    if not _checks.uses_triton(q):
        return y.copy_(
            reference.attention_prefill(
                q,
                kv_pages,
                page_table,
                positions=positions,
                query_start_loc=query_start_loc,
                slots=slots,
                scale=scale,
            )
        )
    if n == 0:
        return y
    config = AttentionPrefillConfig.select(dim, q.dtype)
    block_g = triton.next_power_of_2(group)
    tiles = n // (config.block_m // block_g) + rows + 1
    _attention_prefill_kernel[(tiles, heads // group)](
        q,
        kv_pages,
        page_table,
        y,
        positions,
        query_start_loc,
        slots,
        q.stride(0),
        page_table.stride(0),
        scale * LOG2_E,
        n,
        rows,
        HK=heads // group,
        G=group,
        D=dim,
        PAGE=PAGE_SIZE,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_G=block_g,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_R=_BLOCK_R,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return y


def check_attention(
    op: str,
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    page_table: torch.Tensor,
    out: torch.Tensor | None,
) -> int:
    """Check what prefill and decode share; return the number of query heads per KV head."""
    _checks.check(op, "q", q, ("N", "Hq", "D"))
    same, dim = (q.dtype,), q.shape[2]
    if not _MIN_D <= dim <= _MAX_D:
        raise ValueError(f"{op}: head_dim is {dim}, want {_MIN_D} to {_MAX_D}")
    if q.stride(1) != dim and q.shape[1] > 1:
        raise ValueError(f"{op}: q has strides {list(q.stride())}, want heads {dim} apart")
    _checks.check(op, "kv_pages", kv_pages, ("pages", 2, "Hk", PAGE_SIZE, dim), same, dense=True)
    heads, kv_heads = q.shape[1], kv_pages.shape[2]
    if not heads or not kv_heads or heads % kv_heads or heads // kv_heads > _MAX_GROUP:
        raise ValueError(
            f"{op}: q has {heads} heads for {kv_heads} KV heads, "
            f"want 1 to {_MAX_GROUP} times as many"
        )
    _checks.check(op, "page_table", page_table, ("S", "P"), _checks.INT32)
    if out is not None:
        _checks.check(op, "out", out, q.shape, same, dense=True)
    return heads // kv_heads
