"""The argument checks that all wrappers share, and what kernel tests find in fresh memory."""

from __future__ import annotations

import pytest
import torch

import interpreter
from lfm2_kernels._checks import INT32, check, output, uses_triton


def test_accepts_what_fits() -> None:
    check("op", "x", torch.zeros(2, 8), (2, 8))
    check("op", "x", torch.zeros(2, 9)[:, :8], ("N", 8))
    check("op", "x", torch.zeros(3, dtype=torch.int32), (3,), INT32)
    check("op", "x", torch.zeros(()), ())
    # strides of dimensions of one element mean nothing
    check("op", "x", torch.zeros(4, 1)[:, :1].expand(4, 1).t().t(), ("N", 1))
    check("op", "x", torch.zeros(8, 4).t()[:, :1], ("N", 1))


@pytest.mark.parametrize(
    ("x", "shape", "options", "error", "message"),
    [
        (torch.zeros(7), (8,), {}, ValueError, r"op: x is \[7\], want \[8\]"),
        (torch.zeros(7), ("N", 8), {}, ValueError, r"op: x is \[7\], want \[N, 8\]"),
        (torch.zeros(2, 7), ("N", 8), {}, ValueError, r"op: x is \[2, 7\], want \[N, 8\]"),
        (torch.zeros(()), ("N",), {}, ValueError, r"op: x is \[\], want \[N\]"),
        (torch.zeros(2), (2,), {"dtypes": INT32}, TypeError, "op: x is float32, want int32"),
        (torch.zeros(8, 2).t(), (2, 8), {}, ValueError, r"x has strides \[1, 2\], want a contig"),
        (torch.zeros(2, 9)[:, :8], (2, 8), {"dense": True}, ValueError, r"want it contiguous"),
    ],
)
def test_refuses(
    x: torch.Tensor, shape: tuple[int | str, ...], options: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        check("op", "x", x, shape, **options)


def test_output_is_checked_or_made() -> None:
    device = torch.device("cpu")
    given = torch.zeros(2, 3)
    assert output("op", given, (2, 3), torch.float32, device) is given
    made = output("op", None, (2, 3), torch.bfloat16, device)
    assert made.shape == (2, 3)
    assert made.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"op: out is \[2, 3\], want \[3, 2\]"):
        output("op", given, (3, 2), torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fresh_memory_is_poisoned(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.empty(5, dtype=dtype, device=device)
    for made in (x, torch.empty_like(x), x.new_empty(3)):
        assert made.isnan().all()
    assert (torch.empty(5, dtype=torch.int32, device=device) == 2**31 - 1).all()


def test_where_an_op_runs(device: torch.device) -> None:
    assert uses_triton(torch.empty(1, device=device))
    assert uses_triton(torch.empty(1, device="meta"))
    with interpreter.enabled(False):
        assert not uses_triton(torch.empty(1))
