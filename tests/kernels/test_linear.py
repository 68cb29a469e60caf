"""The skinny linear against the reference on both sides of 16 rows, and its error contract."""

from __future__ import annotations

import pytest
import torch

from lfm2_kernels import reference
from lfm2_kernels.linear import MAX_SKINNY_ROWS, LinearConfig, linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _close(got: torch.Tensor, want: torch.Tensor, k: int) -> None:
    # fp32: each of k additions rounds a partial sum of up to sqrt(k), which adds up to about
    # sqrt(k) * sqrt(k) * 2**-25; taken eight times. 16 bits: a value on an edge moves y by one ulp,
    # and the residual add rounds that ulp, of |y| < 6 sqrt(k), once more
    eps, size = torch.finfo(want.dtype).eps, k**0.5
    if want.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=0, atol=4 * k * 2**-24)
    else:
        torch.testing.assert_close(got, want, rtol=eps, atol=6 * size * eps)
        # edges are rare: a rounding left out would show in more values
        assert want.numel() == 0 or (got == want).float().mean() > 0.95


def _operands(
    n: int, o: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    def rows(width: int) -> torch.Tensor:
        wide = torch.full((n, width + 3), torch.nan, dtype=dtype, device=device)
        wide[:, :width] = torch.randn(n, width, device=device).to(dtype)
        return wide[:, :width]

    extras = {
        "bias": torch.randn(o, device=device).to(dtype),
        "residual": rows(o),
        "norm_weight": torch.randn(k, device=device),
    }
    return rows(k), extras


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", ["", "bias", "residual", "norm_weight", "all"])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 17, 0])
def test_linear(n: int, parts: str, dtype: torch.dtype, device: torch.device) -> None:
    o, k = 37, 96
    x, extras = _operands(n, o, k, dtype, device)
    weight = torch.randn(o, k, device=device).to(dtype)
    options = {name: t for name, t in extras.items() if parts in (name, "all")}
    want = reference.linear(x, weight, eps=1e-5, **options)
    out = torch.full((n, o + 2), torch.nan, dtype=dtype, device=device)[:, :o]
    assert linear(x, weight, eps=1e-5, out=out, **options) is out
    _close(out, want, k)
    if "residual" in options:
        # the residual stream is updated in place
        linear(x, weight, eps=1e-5, out=options["residual"], **options)
        _close(options["residual"], want, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("o", "k"), [(1, 1), (17, 63), (64, 1536), (5, 1031), (130, 32)])
@pytest.mark.parametrize("n", [1, 3])
def test_odd_shapes(n: int, o: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(n, k, device=device).to(dtype)
    weight = torch.randn(o, k, device=device).to(dtype)
    _close(linear(x, weight), reference.linear(x, weight), k)


def test_a_row_does_not_depend_on_the_others(device: torch.device) -> None:
    x = torch.randn(9, 96, device=device).bfloat16()
    weight = torch.randn(20, 96, device=device).bfloat16()
    whole = linear(x, weight)
    assert torch.equal(linear(x[3:7], weight), whole[3:7])
    x[0] = torch.nan
    assert torch.equal(linear(x, weight)[1:], whole[1:])


def test_config_fills_the_device() -> None:
    # 132 SMs: decode shapes of the 1.2B, 8B and 24B models (hidden 2048) leave none idle
    for n in (1, 2, MAX_SKINNY_ROWS):
        for o in (2048, 3072, 6144, 65536):
            config = LinearConfig.select(n, o, 2048, torch.bfloat16)
            assert o // config.block_o >= 128


@pytest.mark.gpu
def test_is_captured_and_replayed(device: torch.device) -> None:
    x = torch.randn(4, 128, device=device).bfloat16()
    weight = torch.randn(64, 128, device=device).bfloat16()
    out = linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        linear(x, weight, out=out)
    x.normal_()
    graph.replay()
    assert torch.equal(out, linear(x, weight))


@pytest.mark.parametrize(
    ("error", "message", "name", "change"),
    [
        (ValueError, r"linear: x is \[8\], want \[N, K\]", "x", torch.zeros(8)),
        (TypeError, "linear: x is float64", "x", torch.zeros(2, 8).double()),
        (ValueError, r"linear: weight is \[4, 7\], want \[O, 8\]", "weight", torch.zeros(4, 7)),
        (TypeError, "linear: weight is float16, want float32", "weight", torch.zeros(4, 8).half()),
        (ValueError, "linear: weight has strides", "weight", torch.zeros(8, 4).t()),
        (ValueError, r"linear: bias is \[3\], want \[4\]", "bias", torch.zeros(3)),
        (ValueError, r"linear: residual is \[2, 8\]", "residual", torch.zeros(2, 8)),
        (ValueError, r"linear: norm_weight is \[4\]", "norm_weight", torch.zeros(4)),
        (ValueError, r"linear: out is \[4, 2\], want \[2, 4\]", "out", torch.zeros(4, 2)),
    ],
)
def test_refuses(error: type[Exception], message: str, name: str, change: torch.Tensor) -> None:
    tensors = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8), name: change}
    with pytest.raises(error, match=message):
        linear(tensors.pop("x"), tensors.pop("weight"), **tensors)
