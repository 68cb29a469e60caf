"""Compile cases of the two mixers: the short convolution, and attention with what feeds it."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from compile_case import ALL_DTYPES, Case, meta

from lfm2_kernels.attention_decode import attention_decode
from lfm2_kernels.attention_prefill import attention_prefill
from lfm2_kernels.qk_norm_rope import qk_norm_rope
from lfm2_kernels.short_conv import short_conv_decode, short_conv_prefill

_SLOTS, _PAGES = 128, 4096
_WGMMA = ("_attention_prefill_kernel",)


class Step(NamedTuple):
    """Sizes that change from step to step, and where in a packed buffer its metadata begins."""

    tokens: int = 512
    rows: int = 9
    offset: int = 0
    max_pages: int = 512

    def int32(self, size: int) -> torch.Tensor:
        """``[size]`` int32, ``offset`` elements into its memory."""
        return meta(self.offset + size, dtype=torch.int32)[self.offset :]


_STEP = Step()


def conv(
    dtype: torch.dtype,
    hidden: int = 2048,
    taps: int = 3,
    has_bias: bool = False,
    by_tap: bool = True,
    step: Step = _STEP,
) -> None:
    """Prefill and decode; ``by_tap`` is the order of storage of the weight that loads fast."""
    n = step.tokens
    bcx, state = meta(n, 3 * hidden, dtype=dtype), meta(_SLOTS, taps, hidden, dtype=dtype)
    weight = meta(taps, hidden, dtype=dtype).t() if by_tap else meta(hidden, taps, dtype=dtype)
    bias = meta(hidden, dtype=dtype) if has_bias else None
    short_conv_prefill(
        bcx,
        weight,
        state,
        positions=step.int32(n),
        token_rows=step.int32(n),
        query_start_loc=step.int32(step.rows + 1),
        slots=step.int32(step.rows),
        first_computed=step.int32(_SLOTS),
        bias=bias,
    )
    short_conv_decode(
        bcx,
        weight,
        state,
        positions=step.int32(n),
        slots=step.int32(n),
        first_computed=step.int32(_SLOTS),
        bias=bias,
    )


def attention(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int = 64, step: Step = _STEP
) -> None:
    """Norm, rotation and page write, then prefill, and decode with split keys and without."""
    n = step.tokens
    pages = meta(_PAGES, 2, kv_heads, 64, dim, dtype=dtype)
    table = step.int32(_SLOTS * step.max_pages).view(_SLOTS, step.max_pages)
    q = qk_norm_rope(
        meta(n, (heads + 2 * kv_heads) * dim, dtype=dtype),
        meta(dim, dtype=dtype),
        meta(dim, dtype=dtype),
        meta(32768, dim, dtype=dtype),
        pages,
        eps=1e-5,
        positions=step.int32(n),
        token_rows=step.int32(n),
        slots=step.int32(step.rows),
        page_table=table,
        kv_write_from=step.int32(_SLOTS),
    )
    attention_prefill(
        q,
        pages,
        table,
        positions=step.int32(n),
        query_start_loc=step.int32(step.rows + 1),
        slots=step.int32(step.rows),
        scale=dim**-0.5,
    )
    # one row splits many keys, but not a page of them
    for max_seq_len in (64, 64 * step.max_pages):
        attention_decode(
            q[:1],
            pages,
            table,
            positions=step.int32(1),
            slots=step.int32(1),
            scale=dim**-0.5,
            max_seq_len=max_seq_len,
        )


CASES = {
    "conv of 1.2B, 8B and 24B": Case(partial(conv), ALL_DTYPES),
    "conv weights by channel": Case(partial(conv, by_tap=False)),
    "conv odd width, 4 taps, bias": Case(partial(conv, hidden=1000, taps=4, has_bias=True)),
    "attention of 1.2B, 8B and 24B": Case(
        partial(attention, heads=32, kv_heads=8), ALL_DTYPES, _WGMMA
    ),
    "attention of 700M, groups of 3": Case(partial(attention, heads=24, kv_heads=8), wgmma=_WGMMA),
    "attention head_dim 32": Case(partial(attention, heads=8, kv_heads=4, dim=32), wgmma=_WGMMA),
    "attention head_dim 48, groups of 8": Case(
        partial(attention, heads=8, kv_heads=1, dim=48), wgmma=_WGMMA
    ),
    "attention head_dim 128": Case(
        partial(attention, heads=16, kv_heads=8, dim=128), ALL_DTYPES, _WGMMA
    ),
}
