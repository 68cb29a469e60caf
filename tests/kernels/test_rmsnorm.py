"""rmsnorm and add_rmsnorm against the reference, and their error contract."""

from __future__ import annotations

import pytest
import torch

from lfm2_kernels import reference
from lfm2_kernels.rmsnorm import add_rmsnorm, rmsnorm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 64), (3, 63), (7, 1024), (2, 1536), (5, 96), (1, 1), (0, 64)]


def _rows(n: int, d: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows with a gap of NaN between them, as a slice of a wider tensor has."""
    wide = torch.full((n, d + 7), torch.nan, dtype=dtype, device=device)
    wide[:, :d] = torch.randn(n, d, device=device).to(dtype)
    return wide[:, :d]


def _assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    # another order of the fp32 sum moves a value on a rounding edge by one ulp, and the scale by
    # weight rounds that ulp to at most two
    eps = torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=2 * eps, atol=1e-6)
    if want.dtype != torch.float32 and want.numel():
        # edges are rare: a rounding left out would show in a quarter of the values
        assert (got == want).float().mean() > 0.95


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_rmsnorm(n: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
    x = _rows(n, d, dtype, device)
    # a weight in fp32 is rounded to the dtype of x before it multiplies
    weight = torch.randn(d, device=device)
    out = _rows(n, d, dtype, device).fill_(torch.nan)
    want = reference.rmsnorm(x, weight, 1e-5)
    assert rmsnorm(x, weight, 1e-5, out=out) is out
    _assert_close(out, want)
    _assert_close(rmsnorm(x, weight.to(dtype), 1e-5), want)
    rmsnorm(x, weight, 1e-5, out=x)
    _assert_close(x, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_add_rmsnorm(n: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
    x, residual = _rows(n, d, dtype, device), _rows(n, d, dtype, device)
    weight = torch.randn(d, device=device).to(dtype)
    want_residual = residual.clone()
    want = reference.add_rmsnorm(x, want_residual, weight, 1e-5)
    out = _rows(n, d, dtype, device).fill_(torch.nan)
    assert add_rmsnorm(x, residual, weight, 1e-5, out=out) is out
    _assert_close(out, want)
    assert torch.equal(residual, want_residual)


def test_eps_keeps_a_zero_row_finite(device: torch.device) -> None:
    x = torch.zeros(2, 48, device=device)
    assert torch.equal(rmsnorm(x, torch.ones(48, device=device), 1e-5), x)


def test_large_values_do_not_overflow_half(device: torch.device) -> None:
    # squares of 60000 pass the largest float16: the sum must be fp32
    x = torch.full((1, 64), 6e4, dtype=torch.float16, device=device)
    got = rmsnorm(x, torch.ones(64, dtype=torch.float16, device=device), 1e-5)
    assert torch.equal(got, torch.ones_like(x))


@pytest.mark.parametrize("interpret", [True, False])
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "rmsnorm: x is int32, want float32, float16 or bfloat16", {"x": torch.int32}),
        (ValueError, r"rmsnorm: x is \[8\], want \[N, D\]", {"x": (8,)}),
        (ValueError, r"x is \[1, 16385\], want \[N, D\] with D <= 16384", {"x": (1, 16385)}),
        (ValueError, r"rmsnorm: weight is \[7\], want \[8\]", {"weight": (7,)}),
        (TypeError, "rmsnorm: weight is int64", {"weight": torch.int64}),
        (ValueError, r"rmsnorm: out is \[2, 9\], want \[2, 8\]", {"out": (2, 9)}),
        (TypeError, "rmsnorm: out is float16, want float32", {"out": torch.float16}),
    ],
)
def test_refuses(
    interpret: bool, error: type[Exception], message: str, arguments: dict[str, object]
) -> None:
    import interpreter

    tensors = {"x": torch.zeros(2, 8), "weight": torch.zeros(8), "out": torch.zeros(2, 8)}
    for name, change in arguments.items():
        tensors[name] = (
            torch.zeros(change) if isinstance(change, tuple) else tensors[name].to(change)
        )
    with interpreter.enabled(interpret), pytest.raises(error, match=message):
        rmsnorm(tensors["x"], tensors["weight"], 1e-5, out=tensors["out"])


def test_refuses_a_strided_last_dimension_and_a_wrong_residual() -> None:
    x, weight = torch.zeros(8, 2).t(), torch.zeros(8)
    with pytest.raises(ValueError, match=r"x has strides \[1, 2\], want a contiguous last dim"):
        rmsnorm(x, weight, 1e-5)
    with pytest.raises(ValueError, match=r"add_rmsnorm: residual is \[1, 8\], want \[2, 8\]"):
        add_rmsnorm(torch.zeros(2, 8), torch.zeros(1, 8), weight, 1e-5)
