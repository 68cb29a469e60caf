"""attention_decode against dense attention in float64 and the reference, over poisoned pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import interpreter
from lfm2_kernels import reference
from lfm2_kernels.attention_decode import KeySplit, attention_decode, attention_decode_workspace
from sequences import Batch, attend, kv_pool, ragged

# KV heads, query heads for each, head_dim: every kind of padding in a tile, every tile shape
MODELS = [
    (2, 4, 64, torch.bfloat16),
    (1, 3, 32, torch.bfloat16),
    (1, 2, 128, torch.bfloat16),
    (1, 8, 48, torch.float16),
    (2, 1, 16, torch.float32),
    (1, 5, 128, torch.float32),
]
# first token, a page's last and first, padding, in the first split alone, the longest
POSITIONS = [0, 63, -1, 64, 100, 299]


def _batch(positions: list[int], device: torch.device, max_pages: int = 0) -> Batch:
    return ragged([(p, 1) for p in positions], device, max_pages=max_pages)


def _assert_close(got: torch.Tensor, want: torch.Tensor, values: torch.Tensor) -> None:
    # P and the result round to the dtype, half an ulp each of values weighted by a mean; in fp32
    # scores, sums of D products of a few units, carry 1e-6, which exp makes as much of a weight
    eps = max(torch.finfo(got.dtype).eps, 1e-6)
    atol = 1.5 * eps * values.nan_to_num().abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


# one split (a bound too low for the longest row: slower, not wrong), two, three
@pytest.mark.parametrize("max_seq_len", [64, 200, 300])
@pytest.mark.parametrize(("kv_heads", "group", "dim", "dtype"), MODELS)
def test_attention_decode(
    kv_heads: int,
    group: int,
    dim: int,
    dtype: torch.dtype,
    max_seq_len: int,
    device: torch.device,
) -> None:
    batch = _batch(POSITIONS, device)
    pages, dense = kv_pool(batch, kv_heads, dim, dtype)
    rows, heads = len(POSITIONS), kv_heads * group
    # rows with a gap of NaN between them, as a slice of a wider tensor has
    q = torch.full((rows, heads + 1, dim), torch.nan, dtype=dtype, device=device)[:, :heads]
    q[:] = torch.randn(rows, heads, dim, device=device).to(dtype)
    q[batch.positions < 0] = torch.nan
    metadata = {"positions": batch.positions, "slots": batch.slots, "scale": dim**-0.5}
    size = attention_decode_workspace(rows, heads, kv_heads, dim, max_seq_len)
    splits = KeySplit.select(rows, kv_heads, max_seq_len).splits
    assert splits == {64: 1, 200: 2, 300: 3}[max_seq_len]
    assert size == (rows * splits * heads * (dim + 2) if splits > 1 else 0)
    out = torch.empty(rows, heads, dim, dtype=dtype, device=device)
    got = attention_decode(
        q,
        pages,
        batch.page_table,
        max_seq_len=max_seq_len,
        out=out,
        workspace=torch.full((size + 3,), torch.nan, device=device),
        **metadata,
    )
    assert got is out
    _assert_close(out, attend(q, batch, dense, dim**-0.5), pages[:, 1])
    want = reference.attention_decode(q, pages, batch.page_table, **metadata)
    _assert_close(out, want.double(), pages[:, 1])
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    again = attention_decode(q, pages, batch.page_table, max_seq_len=max_seq_len, **metadata)
    assert torch.equal(again, out)


def test_many_splits(device: torch.device) -> None:
    batch = _batch([1020, 500], device)
    pages, dense = kv_pool(batch, 1, 16, torch.bfloat16)
    q = torch.randn(2, 3, 16, device=device).bfloat16()
    # one key in the fourth split outweighs all others, by more than exp can hold
    slot = int(batch.slots[0])
    page, row = int(batch.page_table[slot, 7]), 450 % 64
    pages[page, 0, 0, row] = dense[0][0][450] = q[0, 1] * 100
    assert KeySplit.select(2, 1, 1021) == (8, 2)
    got = attention_decode(
        q,
        pages,
        batch.page_table,
        positions=batch.positions,
        slots=batch.slots,
        scale=1.0,
        max_seq_len=1021,
    )
    _assert_close(got, attend(q, batch, dense, 1.0), pages[:, 1])
    torch.testing.assert_close(got[0, 1], dense[0][1][450, 0], rtol=0, atol=0)


def test_splits_cover_every_bound() -> None:
    for rows in (1, 2, 7, 64, 1024):
        for kv_heads in (1, 3, 8):
            for max_seq_len in (1, 64, 65, 128, 129, 1000, 4096, 32768, 128000):
                splits, pages = KeySplit.select(rows, kv_heads, max_seq_len)
                assert 1 <= splits <= 64
                # all keys are covered, and the last split is not empty
                assert (splits - 1) * pages * 64 < max_seq_len <= splits * pages * 64
                assert splits == 1 or pages >= 2 or max_seq_len <= 192


def test_no_rows(device: torch.device) -> None:
    batch = _batch([], device)
    pages, _ = kv_pool(batch, 1, 16, torch.float32)
    y = attention_decode(
        torch.zeros(0, 2, 16, device=device),
        pages,
        batch.page_table,
        positions=batch.positions,
        slots=batch.slots,
        scale=1.0,
        max_seq_len=1,
    )
    assert y.shape == (0, 2, 16)
    assert attention_decode_workspace(0, 2, 1, 16, 1) == 0


REFUSED = [
    (TypeError, r"q is int64, want float32", {"q": torch.zeros(2, 4, 16).long()}),
    (ValueError, r"q has 3 heads for 2 KV heads, want 1 to 8 times", {"q": torch.zeros(2, 3, 16)}),
    (ValueError, r"kv_pages is \[9, 2, 2, 32, 16\]", {"kv_pages": torch.zeros(9, 2, 2, 32, 16)}),
    (ValueError, r"positions is \[3\], want \[2\]", {"positions": torch.zeros(3).int()}),
    (TypeError, r"slots is int64, want int32", {"slots": torch.zeros(2).long()}),
    (ValueError, r"out has strides", {"out": torch.zeros(2, 8, 16)[:, ::2]}),
    (ValueError, r"max_seq_len is 0, want 1 to 512", {"max_seq_len": 0}),
    (ValueError, r"max_seq_len is 513, want 1 to 512", {"max_seq_len": 513}),
    (TypeError, r"workspace is float16, want float32", {"workspace": torch.zeros(10**4).half()}),
    (ValueError, r"workspace is \[575\], want at least \[576\]", {"workspace": torch.zeros(575)}),
]


@pytest.mark.parametrize("interpret", [True, False])
@pytest.mark.parametrize(("error", "message", "change"), REFUSED, ids=[m for _, m, _ in REFUSED])
def test_refuses(
    interpret: bool, error: type[Exception], message: str, change: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 4, 16),
        "kv_pages": torch.zeros(9, 2, 2, 64, 16),
        "page_table": torch.zeros(3, 8).int(),
        "positions": torch.zeros(2).int(),
        "slots": torch.zeros(2).int(),
        "scale": 1.0,
        "max_seq_len": 512,
        **change,
    }
    with (
        interpreter.enabled(interpret),
        pytest.raises(error, match=f"attention_decode: {message}"),
    ):
        attention_decode(**arguments)
