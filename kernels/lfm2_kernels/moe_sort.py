r"""Token sort: the (token, choice) slots of a batch ordered by expert, stably.

Slot s is choice ``s % k`` of token ``s // k``. With ids in 0 .. E, where E marks slots to drop::

    order   = the slots 0 .. S - 1 by (ids[s], s)
    offsets = offsets[e] counts the slots of experts below e, e = 0 .. E

All integer, so the result is a pure function of the ids: no atomics, no order of programs.

Up to 8,192 slots, one launch: a slot's rank is the number of keys ``id * 8192 + s`` below its own,
and ``offsets[e]`` is the rank of key ``e * 8192``. Every program ranks a few queries against all
keys, which stay in L1: S^2 comparisons are cheaper than a second launch. Beyond, two launches of a
counting sort: each program counts its chunk of slots by expert; then each sums the counts of the
chunks before its own and places its slots.

Memory traffic is 8 S bytes plus what L2 serves; bound by latency. Limits: E <= 256, S <= 2^31 - 1.
Reference: ``reference.sort_tokens``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _checks, reference

__all__ = ["sort_tokens"]

_MAX_EXPERTS = 256
_RANKED_SLOTS = 8192


class CountingSortConfig(NamedTuple):
    """Launch knobs of the counting sort; integer results do not depend on them."""

    chunk: int
    block_s: int
    num_warps: int

    @classmethod
    def select(cls, slots: int, block_e: int) -> CountingSortConfig:
        # a one-hot tile takes 32 registers per thread
        block_s = 8192 // block_e
        # 128 chunks fill the device; each program of the second launch re-reads all their counts
        return cls(block_s * triton.cdiv(slots, block_s * 128), block_s, num_warps=8)


@triton.jit(do_not_specialize=["S"])
def _rank_slots_kernel(
    ids_ptr,  # [S]
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    S,
    E: tl.constexpr,
    KEYS_PER_ID: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # queries 0 .. S - 1 are slots, S .. S + E the first keys of expert 0 .. E
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_slot = offs_q < S
    is_expert = (offs_q >= S) & (offs_q <= S + E)
    ids = tl.load(ids_ptr + offs_q, mask=is_slot, other=0)
    queries = tl.where(is_slot, ids * KEYS_PER_ID + offs_q, (offs_q - S) * KEYS_PER_ID)
    rank = tl.zeros([BLOCK_Q], dtype=tl.int32)
    for first in range(0, S, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        # slots past S belong to an expert above all
        key_ids = tl.load(ids_ptr + offs_s, mask=offs_s < S, other=E + 1)
        keys = key_ids * KEYS_PER_ID + offs_s
        rank += tl.sum((keys[None, :] < queries[:, None]).to(tl.int32), axis=1)
    tl.store(order_ptr + rank, offs_q, mask=is_slot)
    tl.store(offsets_ptr + (offs_q - S), rank, mask=is_expert)


@triton.jit
def _one_hot(ids_ptr, offs_s, S, BLOCK_E: tl.constexpr):
    """``[BLOCK_S, BLOCK_E]`` int32; rows past S are zero."""
    ids = tl.load(ids_ptr + offs_s, mask=offs_s < S, other=BLOCK_E)
    return (ids[:, None] == tl.arange(0, BLOCK_E)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["S", "CHUNK"])
def _count_slots_kernel(
    ids_ptr,  # [S]
    counts_ptr,  # [chunks, BLOCK_E]
    S,
    CHUNK,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    pid = tl.program_id(0)
    counts = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(0, CHUNK, BLOCK_S):
        offs_s = pid * CHUNK + first + tl.arange(0, BLOCK_S)
        counts += tl.sum(_one_hot(ids_ptr, offs_s, S, BLOCK_E), axis=0)
    tl.store(counts_ptr + pid * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["S", "CHUNK"])
def _place_slots_kernel(
    ids_ptr,  # [S]
    counts_ptr,  # [chunks, BLOCK_E]
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    S,
    CHUNK,
    E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    pid = tl.program_id(0)
    chunks = tl.num_programs(0)
    offs_e = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], dtype=tl.int32)
    before = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(0, chunks, BLOCK_S):
        offs_c = first + tl.arange(0, BLOCK_S)
        counts_ptrs = counts_ptr + offs_c[:, None] * BLOCK_E + offs_e[None, :]
        counts = tl.load(counts_ptrs, mask=(offs_c < chunks)[:, None], other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((offs_c < pid)[:, None], counts, 0), axis=0)
    offsets = tl.cumsum(total, axis=0) - total
    if pid == 0:
        tl.store(offsets_ptr + offs_e, offsets, mask=offs_e <= E)

    # the next free place of each expert
    place = offsets + before
    for first in range(0, CHUNK, BLOCK_S):
        offs_s = pid * CHUNK + first + tl.arange(0, BLOCK_S)
        one_hot = _one_hot(ids_ptr, offs_s, S, BLOCK_E)
        earlier = tl.cumsum(one_hot, axis=0) - one_hot
        rank = tl.sum(one_hot * (place[None, :] + earlier), axis=1)
        tl.store(order_ptr + rank, offs_s, mask=offs_s < S)
        place += tl.sum(one_hot, axis=0)


def sort_tokens(
    topk_ids: torch.Tensor,
    num_experts: int,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order the slots of ``topk_ids`` by expert; slots of one expert keep their order.

    Args:
        topk_ids: ``[N, k]`` int32, contiguous, in 0 .. num_experts; num_experts marks a slot to
            drop, and such slots come last.
        num_experts: E, at most 256.
        out: The two results; written and returned.

    Returns:
        The slots ``[N * k]`` int32, and offsets ``[E + 1]`` int32: those of expert e lie at
        ``offsets[e] : offsets[e + 1]``.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape, a stride or ``num_experts`` differs from the above.
    """
    op = "sort_tokens"
    _checks.check(op, "topk_ids", topk_ids, ("N", "k"), _checks.INT32, dense=True)
    if not 1 <= num_experts <= _MAX_EXPERTS:
        raise ValueError(f"{op}: num_experts is {num_experts}, want 1 to {_MAX_EXPERTS}")
    slots = topk_ids.numel()
    order, offsets = out if out is not None else (None, None)
    order = _checks.output(op, order, (slots,), torch.int32, topk_ids.device)
    offsets = _checks.output(op, offsets, (num_experts + 1,), torch.int32, topk_ids.device)
    if not _checks.uses_triton(topk_ids):
        results = reference.sort_tokens(topk_ids, num_experts)
        return order.copy_(results[0]), offsets.copy_(results[1])
    if slots == 0:
        return order, offsets.zero_()
    if slots <= _RANKED_SLOTS:
        # 32 queries against 128 keys: 32 comparisons per thread
        _rank_slots_kernel[(triton.cdiv(slots + num_experts + 1, 32),)](
            topk_ids,
            order,
            offsets,
            slots,
            E=num_experts,
            KEYS_PER_ID=_RANKED_SLOTS,
            BLOCK_Q=32,
            BLOCK_S=128,
            num_warps=4,
        )
        return order, offsets
    block_e = triton.next_power_of_2(num_experts + 1)
    config = CountingSortConfig.select(slots, block_e)
    chunks = triton.cdiv(slots, config.chunk)
    counts = torch.empty(chunks, block_e, dtype=torch.int32, device=topk_ids.device)
    _count_slots_kernel[(chunks,)](
        topk_ids,
        counts,
        slots,
        config.chunk,
        BLOCK_S=config.block_s,
        BLOCK_E=block_e,
        num_warps=config.num_warps,
    )
    _place_slots_kernel[(chunks,)](
        topk_ids,
        counts,
        order,
        offsets,
        slots,
        config.chunk,
        E=num_experts,
        BLOCK_S=config.block_s,
        BLOCK_E=block_e,
        num_warps=config.num_warps,
    )
    return order, offsets
