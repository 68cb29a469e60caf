r"""What a request asks of its logits before the draw, and the record of what was drawn.

Math (repetition penalty: Keskar et al. 2019, https://arxiv.org/abs/1909.05858), for a logit x of
token v in a row of slot s with dense row d; c is the number of times that v was drawn::

    h = x                       -inf if v >= vocab_size, or masked
    h = h + logit_bias[d, v]
    h = h / r if h > 0 else h * r        r = repetition_penalty[s], where v was seen by s
    h = h - frequency_penalty[s] * c - presence_penalty[s] * (c > 0)

Numerics: fp32, every operation rounds once, none is fused: bitwise the reference.

Per-slot sets are bit masks: bit b of word w stands for token 32 w + b. Counts and biases are dense
and few: ``dense_rows`` maps a slot to its row of them. Row 0 stands for none: it holds zeros, and
is neither read nor written here.

Memory traffic, elements per logit: read 1, write 1, read 2 bits, and 2 more with a dense row. Bound
by HBM; one program per row and 2,048 tokens. Reference: ``reference.process_logits``,
``reference.update_seen``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _checks, reference

__all__ = ["process_logits", "update_seen"]

_FLOAT32 = (torch.float32,)
# 2,048 tokens per program, 16 per thread
_WORDS_PER_BLOCK = 64
_ROWS_PER_BLOCK = 128


@triton.jit
def _process_logits_kernel(
    logits_ptr,  # [R, V]
    out_ptr,  # [R, V]
    slots_ptr,  # [R]
    seen_ptr,  # [S, W]
    repetition_ptr,  # [S]
    dense_rows_ptr,  # [S]
    counts_ptr,  # [rows, V]
    bias_ptr,  # [rows, V]
    presence_ptr,  # [S]
    frequency_ptr,  # [S]
    mask_ptr,  # [masks, W]
    mask_rows_ptr,  # [R]
    stride_logits_r,
    stride_out_r,
    V: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    W: tl.constexpr = (V + 31) // 32
    # int64 before a row or a slot meets a stride: R * V and S * W can pass 2**31
    pid_r = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + pid_r).to(tl.int64)
    dense = tl.load(dense_rows_ptr + slot).to(tl.int64)
    mask_row = tl.load(mask_rows_ptr + pid_r).to(tl.int64)
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    bits = tl.arange(0, 32)[None, :]
    offs_v = offs_w[:, None] * 32 + bits  # [BLOCK_W, 32]
    mask_w = offs_w < W
    mask_v = offs_v < V
    mask_dense = mask_v & (dense > 0)

    logits_ptrs = logits_ptr + pid_r * stride_logits_r + offs_v
    h = tl.load(logits_ptrs, mask=mask_v, other=0.0).to(tl.float32)
    # rows without a mask read ones
    allowed = tl.load(mask_ptr + mask_row * W + offs_w, mask=mask_w & (mask_row >= 0), other=-1)
    keep = (((allowed[:, None] >> bits) & 1) != 0) & (offs_v < VOCAB_SIZE)
    h = tl.where(keep, h, float("-inf"))
    h += tl.load(bias_ptr + dense * V + offs_v, mask=mask_dense, other=0.0)

    seen = tl.load(seen_ptr + slot * W + offs_w, mask=mask_w, other=0)
    repetition = tl.load(repetition_ptr + slot)
    divided = tl.div_rn(h, tl.broadcast_to(repetition, [BLOCK_W, 32]))
    penalised = tl.where(h > 0, divided, h * repetition)
    h = tl.where(((seen[:, None] >> bits) & 1) != 0, penalised, h)

    count = tl.load(counts_ptr + dense * V + offs_v, mask=mask_dense, other=0)
    h -= tl.load(frequency_ptr + slot) * count.to(tl.float32)
    h -= tl.load(presence_ptr + slot) * (count > 0).to(tl.float32)
    tl.store(out_ptr + pid_r * stride_out_r + offs_v, h, mask=mask_v)


@triton.jit(do_not_specialize=["R"])
def _update_seen_kernel(
    tokens_ptr,  # [R]
    slots_ptr,  # [R]
    positions_ptr,  # [R]
    seen_ptr,  # [S, W]
    dense_rows_ptr,  # [S]
    counts_ptr,  # [rows, V]
    R,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    W: tl.constexpr = (V + 31) // 32
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    slot = tl.load(slots_ptr + offs_r, mask=mask_r, other=0).to(tl.int64)
    position = tl.load(positions_ptr + offs_r, mask=mask_r, other=-1)
    live = (slot > 0) & (position >= 0)
    token = tl.load(tokens_ptr + offs_r, mask=live, other=0)

    # live rows have distinct slots, so every word and every count has one writer
    seen_ptrs = seen_ptr + slot * W + token // 32
    word = tl.load(seen_ptrs, mask=live, other=0)
    tl.store(seen_ptrs, word | (1 << (token % 32)), mask=live)
    dense = tl.load(dense_rows_ptr + slot, mask=live, other=0).to(tl.int64)
    mask_dense = live & (dense > 0)
    counts_ptrs = counts_ptr + dense * V + token
    count = tl.load(counts_ptrs, mask=mask_dense, other=0)
    tl.store(counts_ptrs, count + 1, mask=mask_dense)


def process_logits(
    logits: torch.Tensor,
    *,
    slots: torch.Tensor,
    vocab_size: int,
    seen: torch.Tensor,
    repetition_penalty: torch.Tensor,
    dense_rows: torch.Tensor,
    counts: torch.Tensor,
    logit_bias: torch.Tensor,
    presence_penalty: torch.Tensor,
    frequency_penalty: torch.Tensor,
    mask: torch.Tensor,
    mask_rows: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mask, bias and penalise logits; per-slot arrays are read at ``slots``.

    Args:
        logits: ``[R, V]``, float32, float16 or bfloat16, last dimension contiguous.
        slots: ``[R]`` int32.
        vocab_size: Ids from here to V are padding and get -inf.
        seen: ``[S, ceil(V / 32)]`` int32, contiguous; the bits of tokens in prompt and output.
        repetition_penalty: ``[S]`` float32, above 0.
        dense_rows: ``[S]`` int32, the row of ``counts`` and ``logit_bias``; 0 stands for none.
        counts: ``[rows, V]`` int32, contiguous; how often a token was drawn. Row 0 holds zeros.
        logit_bias: ``[rows, V]`` float32, contiguous. Row 0 holds zeros.
        presence_penalty: ``[S]`` float32.
        frequency_penalty: ``[S]`` float32.
        mask: ``[masks, ceil(V / 32)]`` int32, contiguous; the bits of the allowed tokens.
        mask_rows: ``[R]`` int32, the mask of each row; negative allows all tokens.
        out: ``[R, V]`` float32; written and returned. May be ``logits`` itself.

    Returns:
        ``[R, V]`` float32.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape, a stride or ``vocab_size`` differs from the above.
    """
    op = "process_logits"
    _checks.check(op, "logits", logits, ("R", "V"))
    rows, width = logits.shape
    if not 1 <= vocab_size <= width:
        raise ValueError(f"{op}: vocab_size is {vocab_size}, want 1 to {width}")
    words = triton.cdiv(width, 32)
    _checks.check(op, "slots", slots, (rows,), _checks.INT32)
    _check_history(op, seen, dense_rows, counts, width)
    _checks.check(op, "logit_bias", logit_bias, counts.shape, _FLOAT32, dense=True)
    per_slot = {
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    for name, x in per_slot.items():
        _checks.check(op, name, x, seen.shape[:1], _FLOAT32)
    _checks.check(op, "mask", mask, ("masks", words), _checks.INT32, dense=True)
    _checks.check(op, "mask_rows", mask_rows, (rows,), _checks.INT32)
    y = _checks.output(op, out, (rows, width), torch.float32, logits.device)
    if not _checks.uses_triton(logits):
        return y.copy_(
            reference.process_logits(
                logits,
                slots=slots,
                vocab_size=vocab_size,
                seen=seen,
                dense_rows=dense_rows,
                counts=counts,
                logit_bias=logit_bias,
                mask=mask,
                mask_rows=mask_rows,
                **per_slot,
            )
        )
    if rows == 0:
        return y
    _process_logits_kernel[(rows, triton.cdiv(words, _WORDS_PER_BLOCK))](
        logits,
        y,
        slots,
        seen,
        repetition_penalty,
        dense_rows,
        counts,
        logit_bias,
        presence_penalty,
        frequency_penalty,
        mask,
        mask_rows,
        logits.stride(0),
        y.stride(0),
        V=width,
        VOCAB_SIZE=vocab_size,
        BLOCK_W=_WORDS_PER_BLOCK,
        num_warps=4,
        # a penalty's product rounds before it is subtracted
        enable_fp_fusion=False,
    )
    return y


def update_seen(
    tokens: torch.Tensor,
    seen: torch.Tensor,
    counts: torch.Tensor,
    *,
    slots: torch.Tensor,
    positions: torch.Tensor,
    dense_rows: torch.Tensor,
) -> None:
    """Record each row's drawn token in ``seen`` and ``counts``, in place.

    Rows of slot 0 or of a negative position are padding and record nothing. The others must have
    distinct slots, and distinct dense rows but for row 0, which is never written.

    Args:
        tokens: ``[R]`` int32, in 0 .. V - 1.
        seen: ``[S, ceil(V / 32)]`` int32, contiguous.
        counts: ``[rows, V]`` int32, contiguous.
        slots: ``[R]`` int32.
        positions: ``[R]`` int32.
        dense_rows: ``[S]`` int32, the row of ``counts`` of a slot; 0 stands for none.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape or stride differs from the above.
    """
    op = "update_seen"
    _checks.check(op, "tokens", tokens, ("R",), _checks.INT32)
    _checks.check(op, "counts", counts, ("rows", "V"), _checks.INT32, dense=True)
    rows, width = tokens.shape[0], counts.shape[1]
    _check_history(op, seen, dense_rows, counts, width)
    _checks.check(op, "slots", slots, (rows,), _checks.INT32)
    _checks.check(op, "positions", positions, (rows,), _checks.INT32)
    if not _checks.uses_triton(tokens):
        reference.update_seen(
            tokens, seen, counts, slots=slots, positions=positions, dense_rows=dense_rows
        )
        return
    if rows == 0:
        return
    _update_seen_kernel[(triton.cdiv(rows, _ROWS_PER_BLOCK),)](
        tokens,
        slots,
        positions,
        seen,
        dense_rows,
        counts,
        rows,
        V=width,
        BLOCK_R=_ROWS_PER_BLOCK,
        num_warps=4,
    )


def _check_history(
    op: str, seen: torch.Tensor, dense_rows: torch.Tensor, counts: torch.Tensor, width: int
) -> None:
    words = triton.cdiv(width, 32)
    _checks.check(op, "seen", seen, ("S", words), _checks.INT32, dense=True)
    _checks.check(op, "dense_rows", dense_rows, seen.shape[:1], _checks.INT32)
    _checks.check(op, "counts", counts, ("rows", width), _checks.INT32, dense=True)
