"""Tiles of a grouped GEMM over rows sorted by expert: their shape, number, and which one is whose.

The host picks a shape and an upper bound of the number of tiles from sizes alone; a program finds
its expert and rows from ``expert_offsets`` on the device, so nothing waits for the routing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["MAX_EXPERTS", "GroupedGemmConfig", "find_tile", "max_tiles"]

MAX_EXPERTS = 256


class GroupedGemmConfig(NamedTuple):
    """Tile shape and launch knobs. A pure function of the shape, so runs are bitwise repeatable."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def select(
        cls, slots: int, experts: int, dtype: torch.dtype, *, two_weights: bool
    ) -> GroupedGemmConfig:
        """Choose from the mean number of rows per expert; ``two_weights`` is grouped_swiglu."""
        if dtype == torch.float32:
            # no tensor cores: small tiles keep the sums of each thread in registers
            if slots < 8 * experts:
                return cls(16, 32, 32, num_warps=4, num_stages=2)
            return cls(64, 32, 32, num_warps=8, num_stages=2)
        if slots < 8 * experts:
            # bound by weights: many narrow tiles so that few experts still fill the device, and a
            # deep pipeline of long rows. 16 is the smallest tile of mma
            return cls(16, 32 if two_weights else 64, 128, num_warps=4, num_stages=4)
        if slots < 64 * experts:
            # 64 is the smallest tile of wgmma. A tile of 128 would be mostly padding here
            return cls(64, 64 if two_weights else 128, 64, num_warps=4, num_stages=3)
        # 128 x 128 in all, in 96 KiB of shared memory: fits sm_89 and sm_120, twice on sm_90
        return cls(128, 64 if two_weights else 128, 64, num_warps=8, num_stages=3)


@triton.jit
def find_tile(offsets_ptr, pid_m, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert of tile ``pid_m``, its first row and the end of the expert's rows; E or more: none."""
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    start = tl.load(offsets_ptr + offs_e, mask=mask_e, other=0)
    end = tl.load(offsets_ptr + offs_e + 1, mask=mask_e, other=0)
    # lanes past E have no tiles: their sums repeat the total
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, axis=0)
    expert = tl.sum((tile_ends <= pid_m).to(tl.int32), axis=0)
    here = offs_e == expert
    tile_start = start + (pid_m - tile_ends + tiles) * BLOCK_M
    return expert, tl.sum(tl.where(here, tile_start, 0)), tl.sum(tl.where(here, end, 0))


def max_tiles(slots: int, experts: int, block_m: int) -> int:
    """No routing yields more row tiles: full ones, and a partial one per expert with tokens."""
    return -(-slots // block_m) + min(experts, slots)
