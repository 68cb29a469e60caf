"""attention_prefill against dense attention in float64 and the reference, over poisoned pages."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import interpreter
from lfm2_kernels import reference
from lfm2_kernels.attention_prefill import attention_prefill
from sequences import attend, kv_pool, ragged

# KV heads, query heads for each, head_dim: every kind of padding in a tile, every tile shape
MODELS = [
    (2, 4, 64, torch.bfloat16),
    (1, 3, 32, torch.bfloat16),
    (2, 1, 16, torch.bfloat16),
    (1, 8, 48, torch.bfloat16),
    (1, 2, 128, torch.bfloat16),
    (1, 4, 64, torch.float16),
    (1, 5, 32, torch.float16),
    (1, 4, 64, torch.float32),
    (2, 3, 48, torch.float32),
    (1, 1, 128, torch.float32),
]
# fresh, over a page's end, a decode row, empty, padding, longer than a tile, ends with a page
SPANS = [(0, 5), (60, 9), (130, 1), (3, 0), (-1, 2), (20, 70), (0, 1), (64, 64)]


def _assert_close(got: torch.Tensor, want: torch.Tensor, values: torch.Tensor) -> None:
    # P and the result round to the dtype, half an ulp each of values weighted by a mean; in fp32
    # scores, sums of D products of a few units, carry 1e-6, which exp makes as much of a weight
    eps = max(torch.finfo(got.dtype).eps, 1e-6)
    atol = 1.5 * eps * values.nan_to_num().abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


@pytest.mark.parametrize(("kv_heads", "group", "dim", "dtype"), MODELS)
def test_attention_prefill(
    kv_heads: int, group: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    batch = ragged(SPANS, device, tail=3)
    pages, dense = kv_pool(batch, kv_heads, dim, dtype)
    n, heads = len(batch.positions), kv_heads * group
    # rows with a gap of NaN between them, as a slice of a wider tensor has
    wide = torch.full((n, heads + 1, dim), torch.nan, dtype=dtype, device=device)
    q = wide[:, :heads]
    q[:] = torch.randn(n, heads, dim, device=device).to(dtype)
    q[batch.positions < 0] = torch.nan
    metadata = {
        "positions": batch.positions,
        "query_start_loc": batch.query_start_loc,
        "slots": batch.slots,
        "scale": dim**-0.5,
    }
    out = torch.empty(n, heads, dim, dtype=dtype, device=device)
    assert attention_prefill(q, pages, batch.page_table, out=out, **metadata) is out
    _assert_close(out, attend(q, batch, dense, dim**-0.5), pages[:, 1])
    want = reference.attention_prefill(q, pages, batch.page_table, **metadata)
    _assert_close(out, want.double(), pages[:, 1])
    padding = out[batch.positions < 0]
    assert len(padding) == 5
    assert torch.equal(padding, torch.zeros_like(padding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_give_the_bits_of_the_whole(dtype: torch.dtype, device: torch.device) -> None:
    length, kv_heads, heads, dim = 150, 1, 3, 32
    whole = ragged([(0, length)], device)
    pages, _ = kv_pool(whole, kv_heads, dim, dtype)
    q = torch.randn(length, heads, dim, device=device).to(dtype)
    parts = []
    for begin, end in [(0, 37), (37, 101), (101, 102), (102, 150), (0, 150)]:
        positions = torch.arange(begin, end, dtype=torch.int32, device=device)
        # a neighbour before it moves the tiles, and padding after it the grid
        starts = torch.tensor([0, 7, 7 + end - begin], dtype=torch.int32, device=device)
        parts.append(
            attention_prefill(
                torch.cat([q[:7], q[begin:end], q[:2]]),
                pages,
                whole.page_table,
                positions=torch.cat(
                    [whole.positions[:7], positions, positions.new_tensor([-1, -1])]
                ),
                query_start_loc=starts,
                slots=whole.slots.repeat(2),
                scale=0.2,
            )[7:-2]
        )
    assert torch.equal(torch.cat(parts[:-1]), parts[-1])


def test_rows_are_found_across_blocks_of_rows(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    # 1,024 rows a block in earnest, 4 here: rows of nothing, of a token, of more than a tile
    module = importlib.import_module("lfm2_kernels.attention_prefill")
    monkeypatch.setattr(module, "_BLOCK_R", 4)
    spans = [(0, 0), (0, 1), (5, 0), (2, 40), (0, 0), (9, 0), (63, 2), (-1, 1), (0, 33), (7, 0)]
    batch = ragged(spans, device, tail=35)
    pages, dense = kv_pool(batch, 1, 16, torch.bfloat16)
    q = torch.randn(len(batch.positions), 4, 16, device=device).bfloat16()
    got = attention_prefill(
        q,
        pages,
        batch.page_table,
        positions=batch.positions,
        query_start_loc=batch.query_start_loc,
        slots=batch.slots,
        scale=0.25,
    )
    _assert_close(got, attend(q, batch, dense, 0.25), pages[:, 1])


def test_padding_inside_a_row_and_stale_positions_after_the_last(device: torch.device) -> None:
    batch = ragged([(60, 9), (0, 4)], device, tail=2)
    pages, dense = kv_pool(batch, 1, 16, torch.bfloat16)
    q = torch.randn(len(batch.positions), 2, 16, device=device).bfloat16()
    # token 5 of a row is padding, and the last token belongs to no row
    batch.positions[5], batch.positions[-1] = -1, 3
    got = attention_prefill(
        q,
        pages,
        batch.page_table,
        positions=batch.positions,
        query_start_loc=batch.query_start_loc,
        slots=batch.slots,
        scale=0.25,
    )
    _assert_close(got, attend(q, batch, dense, 0.25), pages[:, 1])
    assert not got[[5, -1]].any()


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    batch = ragged([(0, 70)], device)
    pages, dense = kv_pool(batch, 1, 16, torch.float16)
    # scores of thousands: exp of one alone passes float32
    q = torch.full((70, 1, 16), 1000.0, dtype=torch.float16, device=device)
    got = attention_prefill(
        q,
        pages,
        batch.page_table,
        positions=batch.positions,
        query_start_loc=batch.query_start_loc,
        slots=batch.slots,
        scale=1.0,
    )
    # a score of 2**13 is good to 2**-10 in fp32, and so are the weights
    torch.testing.assert_close(got.double(), attend(q, batch, dense, 1.0), rtol=0, atol=1e-2)


@pytest.mark.parametrize("rows", [0, 2])
def test_no_tokens(rows: int, device: torch.device) -> None:
    batch = ragged([(0, 0)] * rows, device)
    pages, _ = kv_pool(batch, 1, 16, torch.float32)
    y = attention_prefill(
        torch.zeros(0, 2, 16, device=device),
        pages,
        batch.page_table,
        positions=batch.positions,
        query_start_loc=batch.query_start_loc,
        slots=batch.slots,
        scale=1.0,
    )
    assert y.shape == (0, 2, 16)


REFUSED = [
    (TypeError, r"q is int64, want float32", {"q": torch.zeros(2, 4, 16).long()}),
    (ValueError, r"q is \[2, 64\], want \[N, Hq, D\]", {"q": torch.zeros(2, 64)}),
    (ValueError, r"head_dim is 8, want 16 to 128", {"q": torch.zeros(2, 4, 8)}),
    (ValueError, r"head_dim is 256, want 16 to 128", {"q": torch.zeros(2, 4, 256)}),
    (ValueError, r"q has strides \[128, 32, 1\]", {"q": torch.zeros(2, 4, 32)[..., :16]}),
    (ValueError, r"q has 3 heads for 2 KV heads, want 1 to 8 times", {"q": torch.zeros(2, 3, 16)}),
    (ValueError, r"q has 18 heads for 2 KV heads", {"q": torch.zeros(2, 18, 16)}),
    (ValueError, r"kv_pages is \[3, 2, 2, 32, 16\]", {"kv_pages": torch.zeros(3, 2, 2, 32, 16)}),
    (
        TypeError,
        r"kv_pages is float16, want float32",
        {"kv_pages": torch.zeros(3, 2, 2, 64, 16).half()},
    ),
    (
        ValueError,
        r"kv_pages has strides",
        {"kv_pages": torch.zeros(3, 2, 64, 2, 16).transpose(2, 3)},
    ),
    (TypeError, r"page_table is int64, want int32", {"page_table": torch.zeros(3, 2).long()}),
    (ValueError, r"positions is \[3\], want \[2\]", {"positions": torch.zeros(3).int()}),
    (
        ValueError,
        r"query_start_loc is \[2\], want \[3\]",
        {"query_start_loc": torch.zeros(2).int()},
    ),
    (TypeError, r"slots is int64, want int32", {"slots": torch.zeros(2).long()}),
    (ValueError, r"out is \[2, 4, 8\], want \[2, 4, 16\]", {"out": torch.zeros(2, 4, 8)}),
]


@pytest.mark.parametrize("interpret", [True, False])
@pytest.mark.parametrize(("error", "message", "change"), REFUSED, ids=[m for _, m, _ in REFUSED])
def test_refuses(
    interpret: bool, error: type[Exception], message: str, change: dict[str, torch.Tensor]
) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 4, 16),
        "kv_pages": torch.zeros(3, 2, 2, 64, 16),
        "page_table": torch.zeros(3, 2).int(),
        "positions": torch.zeros(2).int(),
        "query_start_loc": torch.arange(3).int(),
        "slots": torch.zeros(2).int(),
        "scale": 1.0,
        **change,
    }
    with (
        interpreter.enabled(interpret),
        pytest.raises(error, match=f"attention_prefill: {message}"),
    ):
        attention_prefill(**arguments)
