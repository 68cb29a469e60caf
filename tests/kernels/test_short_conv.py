"""short_conv_prefill and short_conv_decode against the reference, and against F.conv1d."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import interpreter
from lfm2_kernels import reference
from lfm2_kernels.short_conv import short_conv_decode, short_conv_prefill
from sequences import Batch, ragged

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# channels, taps, ring rows, bias: a part tile, two tiles, every number of taps, a ring for drafts
MODELS = [(96, 3, 3, False), (160, 3, 5, True), (33, 2, 2, False), (64, 4, 7, True)]
# fresh, resumed, shorter than the taps, one token, empty, longer than a tile, padding
SPANS = [(0, 5), (7, 2), (0, 1), (100, 1), (3, 0), (2, 19), (-1, 3), (64, 17), (1, 4)]


def _bcx(n: int, hidden: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows with a gap of NaN between them, as a slice of a wider tensor has."""
    wide = torch.full((n, 3 * hidden + 5), torch.nan, dtype=dtype, device=device)
    wide[:, : 3 * hidden] = torch.randn(n, 3 * hidden, device=device).to(dtype)
    return wide[:, : 3 * hidden]


def _weights(
    hidden: int, taps: int, has_bias: bool, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = torch.randn(hidden, taps, device=device).to(dtype)
    return weight, torch.randn(hidden, device=device).to(dtype) if has_bias else None


def _ring(
    batch: Batch, first: torch.Tensor, ring: int, hidden: int, taps: int, dtype: torch.dtype
) -> torch.Tensor:
    """A state that holds what the rows' first tokens read, and NaN everywhere else."""
    state = torch.full((len(first), ring, hidden), torch.nan, dtype=dtype, device=first.device)
    for (begin, end), slot in zip(batch.spans, batch.slots.tolist(), strict=True):
        start = int(batch.positions[begin]) if end > begin else 0
        for past in range(max(int(first[slot]), start - taps + 1), start):
            state[slot, past % ring] = torch.randn(hidden).to(state)
    return state


def _assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    # neither side fuses a product with a sum, and both sum in one order: not a bit may differ
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "taps", "ring", "has_bias"), MODELS)
def test_short_conv_prefill(
    hidden: int, taps: int, ring: int, has_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    batch = ragged(SPANS, device, tail=3)
    n = len(batch.positions)
    bcx = _bcx(n, hidden, dtype, device)
    bcx[batch.positions < 0] = torch.nan
    weight, bias = _weights(hidden, taps, has_bias, dtype, device)
    # 0 for a new sequence; later ones were replayed from a position inside the ring or the span
    first = torch.randint(0, 6, batch.page_table.shape[:1], dtype=torch.int32, device=device)
    state = _ring(batch, first, ring, hidden, taps, dtype)
    want_state = state.clone()
    common = {
        "positions": batch.positions,
        "token_rows": batch.token_rows,
        "query_start_loc": batch.query_start_loc,
        "slots": batch.slots,
        "first_computed": first,
        "bias": bias,
    }
    want = reference.short_conv_prefill(bcx, weight, want_state, **common)
    assert want.isfinite().all()
    out = torch.empty(n, hidden, dtype=dtype, device=device)
    # stored by tap, as wide loads want it: the same numbers
    by_tap = weight.t().contiguous().t()
    assert short_conv_prefill(bcx, by_tap, state, out=out, **common) is out
    _assert_same(out, want)
    _assert_same(state, want_state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "taps", "ring", "has_bias"), MODELS)
def test_short_conv_decode(
    hidden: int, taps: int, ring: int, has_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    batch = ragged([(0, 1), (1, 1), (-1, 1), (2, 1), (-1, 1), (65, 1), (9, 1)], device)
    bcx = _bcx(7, hidden, dtype, device)
    bcx[batch.positions < 0] = torch.nan
    weight, bias = _weights(hidden, taps, has_bias, dtype, device)
    first = torch.zeros(batch.page_table.shape[0], dtype=torch.int32, device=device)
    first[batch.slots[-1]] = 8
    first[batch.slots[3]] = 3
    state = _ring(batch, first, ring, hidden, taps, dtype)
    want_state = state.clone()
    common = {
        "positions": batch.positions,
        "slots": batch.slots,
        "first_computed": first,
        "bias": bias,
    }
    want = reference.short_conv_decode(bcx, weight, want_state, **common)
    assert want.isfinite().all()
    out = torch.empty(7, hidden, dtype=dtype, device=device)
    assert short_conv_decode(bcx, weight, state, out=out, **common) is out
    _assert_same(out, want)
    _assert_same(state, want_state)


@pytest.mark.parametrize("taps", [2, 3, 4])
def test_any_schedule_gives_the_convolution_of_the_whole(taps: int, device: torch.device) -> None:
    hidden, ring = 40, taps + 1
    lengths, dtype = [23, 9, 14], torch.float32
    weight, bias = _weights(hidden, taps, True, dtype, device)
    sequences = [_bcx(n, hidden, dtype, device).contiguous() for n in lengths]
    first = torch.zeros(4, dtype=torch.int32, device=device)
    state = torch.full((4, ring, hidden), torch.nan, device=device)
    done, results = [0, 0, 0], [[], [], []]
    # the last column decodes; spans end before, at and after a turn of the ring
    for step in ([5, 0, 1], [1, 2, 6], [11, 6, 1], [3, 0, 4], [2, 0, 1], [1, 1, 1]):
        batch = ragged(list(zip(done, step, strict=True)), device, slots=[2, 3, 1])
        bcx = torch.cat([s[d : d + n] for s, d, n in zip(sequences, done, step, strict=True)])
        common = {"positions": batch.positions, "slots": batch.slots, "first_computed": first}
        if step == [1, 1, 1]:
            y = short_conv_decode(bcx, weight, state, bias=bias, **common)
        else:
            rows = {"token_rows": batch.token_rows, "query_start_loc": batch.query_start_loc}
            y = short_conv_prefill(bcx, weight, state, bias=bias, **common, **rows)
        for row, (begin, end) in enumerate(batch.spans):
            results[row].append(y[begin:end])
            done[row] += end - begin
    assert done == lengths
    for bcx, parts in zip(sequences, results, strict=True):
        b, c, x = bcx.double().chunk(3, dim=1)
        u = F.pad((b * x).t(), (taps - 1, 0))
        y = F.conv1d(u, weight.double()[:, None], bias.double(), groups=hidden)
        # taps + 3 roundings of terms of a few units
        torch.testing.assert_close(torch.cat(parts).double(), c * y.t(), rtol=1e-5, atol=1e-5)


def test_decode_gives_the_bits_of_prefill(device: torch.device) -> None:
    hidden, dtype = 72, torch.bfloat16
    weight, bias = _weights(hidden, 3, True, dtype, device)
    bcx = _bcx(8, hidden, dtype, device)
    first = torch.zeros(2, dtype=torch.int32, device=device)
    states = [torch.full((2, 3, hidden), torch.nan, dtype=dtype, device=device) for _ in "ab"]
    batch = ragged([(0, 8)], device)
    whole = short_conv_prefill(
        bcx,
        weight,
        states[0],
        positions=batch.positions,
        token_rows=batch.token_rows,
        query_start_loc=batch.query_start_loc,
        slots=batch.slots,
        first_computed=first,
        bias=bias,
    )
    for i in range(8):
        one = short_conv_decode(
            bcx[i : i + 1],
            weight,
            states[1],
            positions=batch.positions[i : i + 1],
            slots=batch.slots,
            first_computed=first,
            bias=bias,
        )
        _assert_same(one[0], whole[i])
    _assert_same(states[1], states[0])


def test_no_tokens(device: torch.device) -> None:
    batch = ragged([], device)
    state, first = torch.zeros(1, 3, 8, device=device), torch.zeros(1, device=device).int()
    bcx, weight = torch.zeros(0, 24, device=device), torch.zeros(8, 3, device=device)
    common = {"positions": batch.positions, "slots": batch.slots, "first_computed": first}
    assert short_conv_decode(bcx, weight, state, **common).shape == (0, 8)
    rows = {"token_rows": batch.token_rows, "query_start_loc": batch.query_start_loc}
    assert short_conv_prefill(bcx, weight, state, **common, **rows).shape == (0, 8)


REFUSED = [
    (
        TypeError,
        r"bcx is int32, want float32, float16 or bfloat16",
        {"bcx": torch.zeros(2, 24).int()},
    ),
    (ValueError, r"bcx is \[2, 25\], want \[N, 3 H\]", {"bcx": torch.zeros(2, 25)}),
    (ValueError, r"weight is \[7, 3\], want \[8, L\]", {"weight": torch.zeros(7, 3)}),
    (ValueError, r"weight has 5 taps, want 2 to 4", {"weight": torch.zeros(8, 5)}),
    (TypeError, r"weight is float16, want float32", {"weight": torch.zeros(8, 3).half()}),
    (
        ValueError,
        r"conv_state has 2 ring rows, want at least 3",
        {"conv_state": torch.zeros(4, 2, 8)},
    ),
    (ValueError, r"conv_state is \[4, 3, 9\]", {"conv_state": torch.zeros(4, 3, 9)}),
    (ValueError, r"conv_state has strides", {"conv_state": torch.zeros(4, 3, 16)[..., ::2]}),
    (TypeError, r"positions is int64, want int32", {"positions": torch.zeros(2).long()}),
    (ValueError, r"slots is \[3\], want \[2\]", {"slots": torch.zeros(3).int()}),
    (ValueError, r"first_computed is \[5\], want \[4\]", {"first_computed": torch.zeros(5).int()}),
    (ValueError, r"bias is \[9\], want \[8\]", {"bias": torch.zeros(9)}),
    (ValueError, r"out is \[2, 9\], want \[2, 8\]", {"out": torch.zeros(2, 9)}),
]


@pytest.mark.parametrize("interpret", [True, False])
@pytest.mark.parametrize(("error", "message", "change"), REFUSED, ids=[m for _, m, _ in REFUSED])
def test_refuses(
    interpret: bool, error: type[Exception], message: str, change: dict[str, torch.Tensor]
) -> None:
    arguments: dict[str, Any] = {
        "bcx": torch.zeros(2, 24),
        "weight": torch.zeros(8, 3),
        "conv_state": torch.zeros(4, 3, 8),
        "positions": torch.zeros(2).int(),
        "slots": torch.zeros(2).int(),
        "first_computed": torch.zeros(4).int(),
        **change,
    }
    ops: list[Callable[[], torch.Tensor]] = [lambda: short_conv_decode(**arguments)]
    if "slots" not in change:
        rows = {"token_rows": torch.tensor([0, 1]).int(), "query_start_loc": torch.arange(3).int()}
        ops.append(lambda: short_conv_prefill(**arguments, **rows))
    with interpreter.enabled(interpret):
        for op in ops:
            with pytest.raises(error, match=f"short_conv_.*: {message}"):
                op()
