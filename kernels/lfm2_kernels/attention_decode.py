r"""Attention of one token per row over paged keys and values, with the keys split among programs.

Math (split keys as in Flash-Decoding, https://pytorch.org/blog/flash-decoding/), for the token at
position p of a row, per query head, the keys cut into consecutive splits s::

    x_j = scale * q . k_j          m_s = max_j x_j
    l_s = sum_j exp(x_j - m_s)     a_s = sum_j exp(x_j - m_s) v_j
    y   = sum_s exp(m_s - max m) a_s / sum_s exp(m_s - max m) l_s

Numerics: as ``attention_prefill``, whose tile loop this uses; partial results are fp32 and the
combine takes the splits in one fixed order, so a batch gives the same bits every time.

Mapping: one program per row, KV head and split. The query heads of a KV head are packed into the 16
rows that a tensor core wants, so K and V are read once. The number of splits is a pure function of
(rows, KV heads, ``max_seq_len``), so a captured graph keeps its grid. A row shorter than
``max_seq_len`` leaves its last splits empty: they return, and the combine does not read them. The
last split takes whatever is left of a row: a bound that is too low costs time, not keys. With one
split nothing is combined and the result is stored directly.

Memory traffic, elements per row and KV head: K and V, 2 D per key; with S splits of the keys, S G
(D + 2) fp32 values written and read again. Bound by HBM. Limits: D 16 to 128, G 1 to 8.
Reference: ``reference.attention_decode``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _checks, reference
from .attention_prefill import LOG2_E, attend_tiles, check_attention
from .reference import PAGE_SIZE

__all__ = ["attention_decode", "attention_decode_workspace"]

_BLOCK_M = 16
_MAX_SPLITS = 64
# slices of packed step buffers: their alignment changes from step to step and must not recompile
_METADATA = ("positions_ptr", "slots_ptr", "table_ptr")


class AttentionDecodeConfig(NamedTuple):
    """Launch knobs. They depend on the model alone, so no batch compiles anything new."""

    block_n: int
    num_warps: int
    num_stages: int

    @classmethod
    def select(cls, head_dim: int, dtype: torch.dtype) -> AttentionDecodeConfig:
        """Choose for a model."""
        if dtype == torch.float32:
            # no tensor cores in full fp32: each thread holds whole rows of its operands
            if head_dim <= 64:
                return cls(block_n=32, num_warps=4, num_stages=2)
            return cls(block_n=16, num_warps=4, num_stages=1)
        # page ids, then K and V, are loaded ahead in five stages: three tiles of K and V in flight
        return cls(block_n=64 if head_dim <= 64 else 32, num_warps=4, num_stages=5)


class KeySplit(NamedTuple):
    """How the keys of every row of a batch are divided. A pure function of the host's bounds."""

    splits: int
    pages_per_split: int

    @classmethod
    def select(cls, rows: int, kv_heads: int, max_seq_len: int) -> KeySplit:
        """Choose for ``rows`` of at most ``max_seq_len`` keys."""
        pages = triton.cdiv(max_seq_len, PAGE_SIZE)
        # four programs for each of about 128 multiprocessors; under two pages a split, the merge
        # costs as much as the keys
        wanted = triton.cdiv(512, rows * kv_heads)
        splits = max(1, min(wanted, triton.cdiv(pages, 2), _MAX_SPLITS))
        pages_per_split = triton.cdiv(pages, splits)
        return cls(triton.cdiv(pages, pages_per_split), pages_per_split)


@triton.jit(
    do_not_specialize=["splits", "pages_per_split", "stride_table_s"],
    do_not_specialize_on_alignment=_METADATA,
)
def _attention_decode_kernel(
    q_ptr,  # [rows, Hk G, D]
    pages_ptr,  # [pages, 2, Hk, PAGE, D]
    table_ptr,  # [S, P]
    out_ptr,  # [rows, Hk G, D], written if not IS_SPLIT
    partial_ptr,  # [rows, splits, Hk G, D], then [..., 2]: m and sum, if IS_SPLIT
    positions_ptr,  # [rows]
    slots_ptr,  # [rows]
    stride_q_n,
    stride_table_s,
    qk_scale,
    splits,
    pages_per_split,
    HK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # int64 before a row, slot or page meets a stride
    pid_n = tl.program_id(0).to(tl.int64)
    pid_h = tl.program_id(1)
    pid_s = tl.program_id(2)
    pos = tl.load(positions_ptr + pid_n)
    tiles_per_split = pages_per_split * (PAGE // BLOCK_N)
    first_tile = pid_s * tiles_per_split
    # rounded up: no tile at position -1
    end_tile = (pos + BLOCK_N) // BLOCK_N
    if pid_s < splits - 1:
        end_tile = tl.minimum(end_tile, first_tile + tiles_per_split)
    if IS_SPLIT and first_tile >= end_tile:
        return

    offs_g = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_g < G)[:, None] & (offs_d < D)[None, :]
    heads = pid_h * G + offs_g
    q_ptrs = q_ptr + pid_n * stride_q_n + heads[:, None] * D + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask & (pos >= 0), other=0.0)
    slot = tl.load(slots_ptr + pid_n).to(tl.int64)
    stride_kv: tl.constexpr = HK * PAGE * D
    acc, m, total = attend_tiles(
        q,
        tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32),
        tl.full([BLOCK_M], float("-inf"), dtype=tl.float32),
        tl.zeros([BLOCK_M], dtype=tl.float32),
        table_ptr + slot * stride_table_s,
        pages_ptr + pid_h * (PAGE * D),
        tl.full([BLOCK_M], 0, dtype=tl.int32) + pos,
        pos,
        first_tile,
        end_tile,
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
    if IS_SPLIT:
        offs_p = (pid_n * splits + pid_s) * (HK * G) + heads
        tl.store(partial_ptr + offs_p[:, None] * D + offs_d[None, :], acc, mask=mask)
        stat_ptrs = (
            partial_ptr + tl.num_programs(0).to(tl.int64) * splits * (HK * G * D) + offs_p * 2
        )
        tl.store(stat_ptrs, m, mask=offs_g < G)
        tl.store(stat_ptrs + 1, total, mask=offs_g < G)
    else:
        # a padding row saw no key: its sum is 0, its result 0
        y = tl.where(pos >= 0, acc / total[:, None], 0.0)
        out_ptrs = out_ptr + (pid_n * (HK * G) + heads[:, None]) * D + offs_d[None, :]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["splits", "pages_per_split"], do_not_specialize_on_alignment=_METADATA
)
def _attention_combine_kernel(
    partial_ptr,  # [rows, splits, H, D], then [..., 2]: m and sum
    out_ptr,  # [rows, H, D]
    positions_ptr,  # [rows]
    splits,
    pages_per_split,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    pid_h = tl.program_id(1)
    pos = tl.load(positions_ptr + pid_n)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    # splits that hold no key were not written; none holds a key at position -1
    mask_s = (offs_s < splits) & (offs_s * (pages_per_split * PAGE) <= pos)

    offs_p = (pid_n * splits + offs_s) * H + pid_h
    stat_ptrs = partial_ptr + tl.num_programs(0).to(tl.int64) * splits * (H * D) + offs_p * 2
    m = tl.load(stat_ptrs, mask=mask_s, other=float("-inf"))
    total = tl.load(stat_ptrs + 1, mask=mask_s, other=0.0)
    acc_ptrs = partial_ptr + offs_p[:, None] * D + offs_d[None, :]
    acc = tl.load(acc_ptrs, mask=mask_s[:, None] & mask_d[None, :], other=0.0)
    weight = tl.where(mask_s, tl.exp2(m - tl.max(m, axis=0)), 0.0)
    y = tl.sum(acc * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    y = tl.where(pos >= 0, y, 0.0)
    out_ptrs = out_ptr + (pid_n * H + pid_h) * D + offs_d
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask_d)


def attention_decode_workspace(
    rows: int, heads: int, kv_heads: int, head_dim: int, max_seq_len: int
) -> int:
    """Float32 elements that ``attention_decode`` wants as ``workspace`` for these bounds."""
    splits = KeySplit.select(rows, kv_heads, max_seq_len).splits if rows else 1
    return rows * splits * heads * (head_dim + 2) if splits > 1 else 0


def attention_decode(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    page_table: torch.Tensor,
    *,
    positions: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    max_seq_len: int,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from one token a row to all keys up to its position.

    Args:
        q: ``[rows, Hq, D]``, float32, float16 or bfloat16, last two dimensions contiguous.
        kv_pages: ``[pages, 2, Hk, 64, D]``, like ``q``, contiguous; this step's keys and values are
            already written. Hq is a multiple of Hk, at most 8 times.
        page_table: ``[S, P]`` int32, the page of positions 64 p to 64 p + 63 of a slot.
        positions: ``[rows]`` int32; -1 marks padding, which yields 0.
        slots: ``[rows]`` int32, the slot of each row.
        scale: Factor on the scores.
        max_seq_len: No row has more keys, 1 to 64 P; the reference needs no such bound.
        out: ``[rows, Hq, D]``, like ``q``, contiguous; written and returned.
        workspace: Float32, one dimension, contiguous, at least ``attention_decode_workspace``
            elements, its content of no meaning. Allocated if not given.

    Returns:
        ``[rows, Hq, D]`` in ``q.dtype``.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape, a stride or ``max_seq_len`` differs from the above.
    """
    op = "attention_decode"
    group = check_attention(op, q, kv_pages, page_table, out)
    rows, heads, dim = q.shape
    kv_heads = heads // group
    _checks.check(op, "positions", positions, (rows,), _checks.INT32)
    _checks.check(op, "slots", slots, (rows,), _checks.INT32)
    longest = page_table.shape[1] * PAGE_SIZE
    if not 1 <= max_seq_len <= longest:
        raise ValueError(
            f"{op}: max_seq_len is {max_seq_len}, want 1 to {longest}, the keys of a page table row"
        )
    size = attention_decode_workspace(rows, heads, kv_heads, dim, max_seq_len)
    if workspace is not None:
        _checks.check(op, "workspace", workspace, ("elements",), (torch.float32,))
        if workspace.shape[0] < size:
            raise ValueError(f"{op}: workspace is {list(workspace.shape)}, want at least [{size}]")
    y = _checks.output(op, out, (rows, heads, dim), q.dtype, q.device)
    if not _checks.uses_triton(q):
        return y.copy_(
            reference.attention_decode(
                q, kv_pages, page_table, positions=positions, slots=slots, scale=scale
            )
        )
    if rows == 0:
        return y
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    config = AttentionDecodeConfig.select(dim, q.dtype)
    splits, pages_per_split = KeySplit.select(rows, kv_heads, max_seq_len)
    block_d = triton.next_power_of_2(dim)
    _attention_decode_kernel[(rows, kv_heads, splits)](
        q,
        kv_pages,
        page_table,
        y,
        workspace if splits > 1 else None,
        positions,
        slots,
        q.stride(0),
        page_table.stride(0),
        scale * LOG2_E,
        splits,
        pages_per_split,
        HK=kv_heads,
        G=group,
        D=dim,
        PAGE=PAGE_SIZE,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        IS_SPLIT=splits > 1,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    if splits > 1:
        _attention_combine_kernel[(rows, heads)](
            workspace,
            y,
            positions,
            splits,
            pages_per_split,
            H=heads,
            D=dim,
            PAGE=PAGE_SIZE,
            BLOCK_S=_MAX_SPLITS,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return y
