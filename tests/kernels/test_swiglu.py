"""Swiglu against the reference, and its error contract."""

from __future__ import annotations

import pytest
import torch

from lfm2_kernels import reference
from lfm2_kernels.swiglu import swiglu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 63), (5, 96), (3, 1536), (2, 2049), (0, 64), (1, 1)])
def test_swiglu(n: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
    wide = torch.full((n, 2 * d + 3), torch.nan, dtype=dtype, device=device)
    # large gates too: exp overflows, and silu must end in 0 or the gate itself
    wide[:, : 2 * d] = (torch.randn(n, 2 * d, device=device) * 30).to(dtype)
    gate_up = wide[:, : 2 * d]
    out = torch.full((n, d + 5), torch.nan, dtype=dtype, device=device)[:, :d]
    want = reference.swiglu(gate_up)
    assert swiglu(gate_up, out=out) is out
    # exp differs by 2 ulp of fp32 at the most, exp(-g) is in error by |g| ulp more; in 16 bits that
    # moves silu by one ulp on a rounding edge, which the product rounds to at most two
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, want, rtol=max(2 * eps, 2e-5), atol=1e-6)
    if dtype != torch.float32 and n:
        # edges are rare: a rounding left out would show in a quarter of the values
        assert (out == want).float().mean() > 0.95


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"swiglu: gate_up is \[2, 7\], want an even width"):
        swiglu(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"swiglu: gate_up is \[8\], want \[N, 2 D\]"):
        swiglu(torch.zeros(8))
    with pytest.raises(TypeError, match="swiglu: gate_up is float64"):
        swiglu(torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"swiglu: out is \[2, 8\], want \[2, 4\]"):
        swiglu(torch.zeros(2, 8), out=torch.zeros(2, 8))
