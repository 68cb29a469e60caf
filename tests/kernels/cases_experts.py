"""Compile cases of the expert layer, from router to weighted sum, and of sampling."""

from __future__ import annotations

from functools import partial

import torch
from compile_case import ALL_DTYPES, Case, meta

from lfm2_kernels.moe import moe
from lfm2_kernels.penalties import process_logits, update_seen
from lfm2_kernels.router import route
from lfm2_kernels.sampling import sample, token_logprobs

# hidden, expert width, experts, experts per token
_24B = (2048, 1536, 64, 4)
_8B = (2048, 1792, 32, 4)
_ODD = (1000, 200, 12, 3)
_WGMMA = ("_grouped_swiglu_kernel", "_grouped_linear_kernel")


def _experts(dtype: torch.dtype, tokens: int, shape: tuple[int, int, int, int]) -> None:
    hidden, width, experts, top_k = shape
    x = meta(tokens, hidden, dtype=dtype)
    weights, ids = route(
        meta(tokens, experts, dtype=dtype),
        meta(experts, dtype=torch.float32),
        top_k=top_k,
        norm_topk_prob=True,
        scaling=1.0,
        positions=meta(tokens, dtype=torch.int32),
    )
    w13 = meta(experts, 2 * width, hidden, dtype=dtype)
    w2 = meta(experts, hidden, width, dtype=dtype)
    moe(x, w13, w2, weights, ids, residual=x)


def _sampling(dtype: torch.dtype, vocab: int) -> None:
    rows, slots = 16, 128
    words = (vocab + 31) // 32
    logits = meta(rows, vocab, dtype=dtype)
    by_row = partial(meta, rows, dtype=torch.int32)
    by_slot = partial(meta, slots)
    seen, counts = meta(slots, words, dtype=torch.int32), meta(8, vocab, dtype=torch.int32)
    dense_rows = by_slot(dtype=torch.int32)
    processed = process_logits(
        logits,
        slots=by_row(),
        vocab_size=vocab - 1,
        seen=seen,
        repetition_penalty=by_slot(dtype=torch.float32),
        dense_rows=dense_rows,
        counts=counts,
        logit_bias=meta(8, vocab, dtype=torch.float32),
        presence_penalty=by_slot(dtype=torch.float32),
        frequency_penalty=by_slot(dtype=torch.float32),
        mask=meta(1, words, dtype=torch.int32),
        mask_rows=by_row(),
    )
    tokens = sample(
        processed,
        slots=by_row(),
        positions=by_row(),
        temperature=by_slot(dtype=torch.float32),
        top_k=by_slot(dtype=torch.int32),
        top_p=by_slot(dtype=torch.float32),
        min_p=by_slot(dtype=torch.float32),
        seeds=by_slot(dtype=torch.int64),
        choices=by_slot(dtype=torch.int32),
    )
    update_seen(tokens, seen, counts, slots=by_row(), positions=by_row(), dense_rows=dense_rows)
    token_logprobs(logits, tokens)


CASES = {
    # the tiles of 16, 64 and 128 rows
    "experts 24B, 1 token": Case(partial(_experts, tokens=1, shape=_24B), ALL_DTYPES),
    "experts 24B, 300 tokens": Case(partial(_experts, tokens=300, shape=_24B), ALL_DTYPES, _WGMMA),
    "experts 24B, 32768 tokens": Case(partial(_experts, tokens=32768, shape=_24B), wgmma=_WGMMA),
    "experts 8B, 4096 tokens": Case(partial(_experts, tokens=4096, shape=_8B), wgmma=_WGMMA),
    "experts odd sizes, 400 tokens": Case(partial(_experts, tokens=400, shape=_ODD), wgmma=_WGMMA),
    "sampling, vocabulary 65536": Case(partial(_sampling, vocab=65536), ALL_DTYPES),
    "sampling, vocabulary 128000": Case(partial(_sampling, vocab=128000)),
}
