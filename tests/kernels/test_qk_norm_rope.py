"""qk_norm_rope against the reference: queries, written pages, and every byte it must not write."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import interpreter
from lfm2_kernels import reference
from lfm2_kernels.qk_norm_rope import qk_norm_rope
from sequences import Batch, ragged

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# query heads, KV heads, head_dim: LFM2's width, groups of three, part tiles
MODELS = [(4, 1, 64), (6, 2, 32), (2, 2, 48), (1, 1, 128), (3, 1, 16)]
# fresh, over a page's end, one token, empty, padding, replayed (written from later on)
SPANS = [(0, 3), (60, 9), (130, 1), (5, 0), (-1, 2), (10, 7)]
EPS = 1e-5


def _arguments(
    batch: Batch, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> dict[str, Any]:
    device = batch.positions.device
    n, width = len(batch.positions), (heads + 2 * kv_heads) * dim
    # rows with a gap of NaN between them, as a slice of a wider tensor has
    qkv = torch.full((n, width + 16), torch.nan, dtype=dtype, device=device)
    qkv[:, :width] = torch.randn(n, width, device=device).to(dtype)
    qkv[batch.positions < 0] = torch.nan
    return {
        "qkv": qkv[:, :width],
        "q_weight": torch.randn(dim, device=device).to(dtype),
        "k_weight": torch.randn(dim, device=device).to(dtype),
        "rope": reference.rope_table(160, dim, 1e6, dtype).to(device),
        "eps": EPS,
        "positions": batch.positions,
        "token_rows": batch.token_rows,
        "slots": batch.slots,
        "page_table": batch.page_table,
        "kv_write_from": torch.zeros(len(batch.page_table), dtype=torch.int32, device=device),
    }


def _pages(batch: Batch, kv_heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    count = int(batch.page_table.max()) + 2
    shape = (count, 2, kv_heads, 64, dim)
    return torch.full(shape, torch.nan, dtype=dtype, device=batch.positions.device)


def _assert_close(got: torch.Tensor, want: torch.Tensor, dim: int) -> None:
    # another order of the sum of squares moves a normalised value on a rounding edge by an ulp; the
    # scale and a product may each add half of one, and |n w| stays under 4 sqrt(dim) here
    atol = 2 * torch.finfo(want.dtype).eps * 4 * dim**0.5
    if want.dtype != torch.float32:
        # on the edge, so rarely: a difference in one value of fifty would be a missed rounding
        assert (got != want).float().nan_to_num().mean() < 0.02 + (want != want).float().mean()
    torch.testing.assert_close(got, want, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), MODELS)
def test_qk_norm_rope(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    batch = ragged(SPANS, device, tail=2)
    arguments = _arguments(batch, heads, kv_heads, dim, dtype)
    arguments["kv_write_from"][batch.slots[-1]] = 13
    # the last row is at a slot whose page holds positions 0 to 63: 10, 11 and 12 stay as they are
    pages = _pages(batch, kv_heads, dim, dtype)
    want_pages = pages.clone()
    want = reference.qk_norm_rope(kv_pages=want_pages, **arguments)
    assert want.isfinite().all()
    out = torch.empty(len(batch.positions), heads, dim, dtype=dtype, device=device)
    assert qk_norm_rope(kv_pages=pages, out=out, **arguments) is out
    _assert_close(out, want, dim)
    assert torch.equal(out[batch.positions < 0], torch.zeros_like(out[batch.positions < 0]))
    _assert_close(pages[:, 0], want_pages[:, 0], dim)
    # values are copied, and 17 tokens are written
    torch.testing.assert_close(pages[:, 1], want_pages[:, 1], rtol=0, atol=0, equal_nan=True)
    assert int(pages.isfinite()[:, :, 0, :, 0].sum()) == 2 * 17


def test_rotation_is_relative(device: torch.device) -> None:
    # with unit weights, q at p times k at p - 5 must not depend on p
    batch = ragged([(0, 100)], device)
    arguments = _arguments(batch, 1, 1, 32, torch.float32)
    arguments["qkv"] = torch.randn(3, 32, device=device).repeat(100, 1).view(100, 96)
    arguments["q_weight"] = arguments["k_weight"] = torch.ones(32, device=device)
    pages = _pages(batch, 1, 32, torch.float32)
    q = qk_norm_rope(kv_pages=pages, **arguments)[:, 0]
    k = pages[batch.page_table[batch.slots[0]].long(), 0, 0].flatten(0, 1)[:100]
    products = (q[5:] * k[:-5]).sum(1)
    # 32 products of values near 1, whose angles up to 100 are good to 100 * 2**-24
    torch.testing.assert_close(products, products[:1].expand(95), rtol=0, atol=3e-4)
    assert (q[5:] * k[5:]).sum(1).sub(products).abs().max() > 0.1


def test_no_tokens(device: torch.device) -> None:
    batch = ragged([], device)
    arguments = _arguments(batch, 2, 1, 16, torch.float32)
    pages = _pages(batch, 1, 16, torch.float32)
    assert qk_norm_rope(kv_pages=pages, **arguments).shape == (0, 2, 16)
    assert pages.isnan().all()


REFUSED = [
    (
        TypeError,
        r"qkv is int64, want float32, float16 or bfloat16",
        {"qkv": torch.zeros(2, 64).long()},
    ),
    (
        ValueError,
        r"qkv is \[2, 60\], want \[N, \(Hq \+ 2 \* 1\) \* 16\]",
        {"qkv": torch.zeros(2, 60)},
    ),
    (ValueError, r"qkv is \[2, 32\], want", {"qkv": torch.zeros(2, 32)}),
    (
        ValueError,
        r"head_dim is 15, want an even number from 16 to 128",
        {"q_weight": torch.zeros(15)},
    ),
    (ValueError, r"head_dim is 130, want", {"q_weight": torch.zeros(130)}),
    (ValueError, r"k_weight is \[8\], want \[16\]", {"k_weight": torch.zeros(8)}),
    (TypeError, r"rope is float64, want float32", {"rope": torch.zeros(4, 16).double()}),
    (ValueError, r"kv_pages is \[3, 2, 1, 32, 16\]", {"kv_pages": torch.zeros(3, 2, 1, 32, 16)}),
    (
        TypeError,
        r"kv_pages is float16, want float32",
        {"kv_pages": torch.zeros(3, 2, 1, 64, 16).half()},
    ),
    (ValueError, r"positions is \[3\], want \[2\]", {"positions": torch.zeros(3).int()}),
    (TypeError, r"token_rows is int64, want int32", {"token_rows": torch.zeros(2).long()}),
    (TypeError, r"page_table is int64, want int32", {"page_table": torch.zeros(3, 2).long()}),
    (ValueError, r"kv_write_from is \[2\], want \[3\]", {"kv_write_from": torch.zeros(2).int()}),
    (ValueError, r"out is \[2, 3, 16\], want \[2, 2, 16\]", {"out": torch.zeros(2, 3, 16)}),
    (ValueError, r"out has strides", {"out": torch.zeros(2, 4, 16)[:, ::2]}),
]


@pytest.mark.parametrize("interpret", [True, False])
@pytest.mark.parametrize(("error", "message", "change"), REFUSED, ids=[m for _, m, _ in REFUSED])
def test_refuses(
    interpret: bool, error: type[Exception], message: str, change: dict[str, torch.Tensor]
) -> None:
    arguments: dict[str, Any] = {
        "qkv": torch.zeros(2, 64),
        "q_weight": torch.zeros(16),
        "k_weight": torch.zeros(16),
        "rope": torch.zeros(4, 16),
        "kv_pages": torch.zeros(3, 2, 1, 64, 16),
        "eps": EPS,
        "positions": torch.zeros(2).int(),
        "token_rows": torch.zeros(2).int(),
        "slots": torch.zeros(2).int(),
        "page_table": torch.zeros(3, 2).int(),
        "kv_write_from": torch.zeros(3).int(),
        **change,
    }
    with (
        interpreter.enabled(interpret),
        pytest.raises(error, match=f"qk_norm_rope: {message}"),
    ):
        qk_norm_rope(**arguments)
