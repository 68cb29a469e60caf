"""ForwardBatch: everything that one forward pass needs besides weights. No globals."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["ForwardBatch", "StatePools"]


@dataclass(frozen=True, slots=True)
class StatePools:
    """Device memory that outlives a step.

    Attributes:
        kv_pages: ``[pages, 2, kv_heads, 64, head_dim]`` per attention layer. Page 0 is the dummy.
        conv_state: ``[slots, ring, hidden]`` per conv layer. Slot 0 is the dummy.
    """

    kv_pages: tuple[torch.Tensor, ...]
    conv_state: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's tokens, flattened to ``N``, of ``R`` rows: prefill chunks and decode tokens.

    Attributes:
        token_ids: ``[N]`` int32.
        positions: ``[N]`` int32, absolute; -1 marks padding, which computes nothing that lasts.
        token_rows: ``[N]`` int32, the row of each token.
        query_start_loc: ``[R + 1]`` int32.
        slots: ``[R]`` int32, state slot of each row; padding rows use the dummy, 0.
        page_table: ``[S, P]`` int32, by slot.
        first_computed: ``[S]`` int32, by slot: conv inputs before it read as zero.
        kv_write_from: ``[S]`` int32, by slot: keys and values before it are not written.
        logits_index: ``[L]`` int64, the tokens whose logits are wanted.
        decode_only: Every row has one token, and token r belongs to row r.
        max_seq_len: No row is longer than this after the step; sizes the split-KV grid.
        pools: KV pages and conv ring state.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    token_rows: torch.Tensor
    query_start_loc: torch.Tensor
    slots: torch.Tensor
    page_table: torch.Tensor
    first_computed: torch.Tensor
    kv_write_from: torch.Tensor
    logits_index: torch.Tensor
    decode_only: bool
    max_seq_len: int
    pools: StatePools
