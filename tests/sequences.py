"""Ragged batches over randomly placed slots and pages, everything unused poisoned, for op tests."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

__all__ = ["Batch", "attend", "kv_pool", "ragged"]

PAGE = 64


@dataclass(frozen=True)
class Batch:
    """What ops know about a step; the names are those of ``ForwardBatch``."""

    positions: torch.Tensor
    token_rows: torch.Tensor
    query_start_loc: torch.Tensor
    slots: torch.Tensor
    page_table: torch.Tensor

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and last-plus-one token of each row."""
        return list(pairwise(self.query_start_loc.tolist()))


def ragged(
    spans: list[tuple[int, int]],
    device: torch.device,
    *,
    slots: list[int] | None = None,
    tail: int = 0,
    max_pages: int = 0,
) -> Batch:
    """A batch of spans ``(first position, length)``; a first position of -1 makes a padding row.

    Args:
        spans: One a row.
        device: Where its tensors live.
        slots: The slot of each row; by default random ones. Padding rows use slot 0.
        tail: Padding tokens after the last row.
        max_pages: Least width of the page table.
    """
    chosen = (torch.randperm(len(spans)) + 1).tolist() if slots is None else slots
    pages = [-(-(first + length) // PAGE) if first >= 0 else 0 for first, length in spans]
    free = (torch.randperm(sum(pages)) + 1).tolist()
    table = torch.zeros(max(chosen, default=0) + 1, max([1, max_pages, *pages]), dtype=torch.int32)
    positions, rows, bounds, taken = [], [], [0], []
    for row, (first, length) in enumerate(spans):
        slot = chosen[row] if first >= 0 else 0
        for index in range(pages[row]):
            table[slot, index] = free.pop()
        positions += [first + i if first >= 0 else -1 for i in range(length)]
        rows += [row] * length
        bounds.append(len(positions))
        taken.append(slot)

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Batch(
        int32(positions + [-1] * tail),
        # a real row, as its state must not change for a padding token either
        int32(rows + [len(spans) - 1] * tail),
        int32(bounds),
        int32(taken),
        table.to(device),
    )


def kv_pool(
    batch: Batch, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Pages that hold random keys and values up to the end of each row, and NaN everywhere else.

    Returns:
        ``[pages, 2, kv_heads, 64, head_dim]``, and for each row its dense keys and values,
        ``[length, kv_heads, head_dim]``.
    """
    device = batch.positions.device
    count = int(batch.page_table.max()) + 2
    pages = torch.full((count, 2, kv_heads, PAGE, head_dim), torch.nan, dtype=dtype, device=device)
    dense = []
    for (begin, end), slot in zip(batch.spans, batch.slots.tolist(), strict=True):
        length = int(batch.positions[end - 1]) + 1 if end > begin else 0
        kv = torch.randn(2, length, kv_heads, head_dim, device=device).to(dtype)
        for at in range(0, length, PAGE):
            part = kv[:, at : at + PAGE].transpose(1, 2)
            pages[int(batch.page_table[slot, at // PAGE]), :, :, : part.shape[2]] = part
        dense.append((kv[0], kv[1]))
    return pages, dense


def attend(
    q: torch.Tensor,
    batch: Batch,
    dense: list[tuple[torch.Tensor, torch.Tensor]],
    scale: float,
) -> torch.Tensor:
    """Causal attention, one sequence, one head and one token at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for (begin, end), (keys, values) in zip(batch.spans, dense, strict=True):
        for token in range(begin, end):
            seen = int(batch.positions[token]) + 1
            for head in range(q.shape[1] if seen else 0):
                kv_head = head * keys.shape[1] // q.shape[1]
                scores = keys[:seen, kv_head].double() @ q[token, head].double() * scale
                out[token, head] = scores.softmax(0) @ values[:seen, kv_head].double()
    return out
