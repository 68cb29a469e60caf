r"""RMSNorm, alone or fused with the residual add that precedes it.

Math (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467), for each row of D features::

    h = round(x + residual)               # add_rmsnorm only; written back to residual
    y = round(round(h * rsqrt(mean(h^2) + eps)) * round(w))

Numerics: sums and products are fp32; ``round`` is to the dtype of x, at the points where
transformers rounds. Leaving one out differs by an ulp in bf16 and not at all in fp32.

Memory traffic, elements per row::

    rmsnorm      read x            write y              2 D
    add_rmsnorm  read x, residual  write residual, y    4 D   (add, then norm: 5 D)

Bound by HBM: the row stays in registers between the reduction and the scale, ``w`` hits L2.
One program per row, so D <= 16384. Reference: ``reference.rmsnorm``, ``reference.add_rmsnorm``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import reference
from ._checks import FLOATS, check, output, uses_triton

__all__ = ["add_rmsnorm", "rmsnorm"]

_MAX_D = 16384


class RMSNormConfig(NamedTuple):
    """Launch knobs. A pure function of the shape, so runs are bitwise repeatable."""

    block_d: int
    num_warps: int

    @classmethod
    def select(cls, d: int) -> RMSNormConfig:
        """Choose for rows of ``d`` features."""
        block_d = triton.next_power_of_2(d)
        # 8 elements per thread: one 16-byte load in 16-bit dtypes
        return cls(block_d, num_warps=min(max(block_d // 256, 1), 16))


@triton.jit
def _rmsnorm_kernel(
    x_ptr,  # [N, D]
    res_ptr,  # [N, D], read and written if HAS_RES
    w_ptr,  # [D]
    y_ptr,  # [N, D]
    stride_x_n,
    stride_res_n,
    stride_y_n,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RES: tl.constexpr,
):
    # int64 before the multiply by a stride: N * D can pass 2**31
    pid_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D

    h = tl.load(x_ptr + pid_n * stride_x_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_RES:
        res_ptrs = res_ptr + pid_n * stride_res_n + offs_d
        h += tl.load(res_ptrs, mask=mask_d, other=0.0).to(tl.float32)
        rounded = h.to(res_ptr.dtype.element_ty)
        tl.store(res_ptrs, rounded, mask=mask_d)
        h = rounded.to(tl.float32)

    # masked lanes hold 0, so the sum is over D, not BLOCK_D
    mean_square = tl.sum(h * h, axis=0) / D
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    dtype = y_ptr.dtype.element_ty
    w = tl.load(w_ptr + offs_d, mask=mask_d, other=0.0).to(dtype).to(tl.float32)
    y = (h * rstd).to(dtype).to(tl.float32) * w
    tl.store(y_ptr + pid_n * stride_y_n + offs_d, y.to(dtype), mask=mask_d)


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise the last dimension of ``x``.

    Args:
        x: ``[N, D]``, float32, float16 or bfloat16, last dimension contiguous.
        weight: ``[D]``, float32, float16 or bfloat16.
        eps: Added to the mean square.
        out: ``[N, D]``, like ``x``; written and returned. May be ``x`` itself.

    Returns:
        ``[N, D]`` in ``x.dtype``.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: A shape or stride breaks the contract above, or D > 16384.
    """
    y = _checked_output("rmsnorm", x, weight, out)
    if not uses_triton(x):
        return y.copy_(reference.rmsnorm(x, weight, eps))
    return _launch(x, None, weight, eps, y)


def add_rmsnorm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual += x`` in place, then ``rmsnorm(residual)``.

    ``residual`` is shaped and typed like ``x``; the rest is the contract of ``rmsnorm``.
    """
    y = _checked_output("add_rmsnorm", x, weight, out)
    check("add_rmsnorm", "residual", residual, x.shape, (x.dtype,))
    if not uses_triton(x):
        return y.copy_(reference.add_rmsnorm(x, residual, weight, eps))
    return _launch(x, residual, weight, eps, y)


def _checked_output(
    op: str, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    check(op, "x", x, ("N", "D"), FLOATS)
    if x.shape[1] > _MAX_D:
        raise ValueError(f"{op}: x is {list(x.shape)}, want [N, D] with D <= {_MAX_D}")
    check(op, "weight", weight, x.shape[1:], FLOATS)
    return output(op, out, x.shape, x.dtype, x.device)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    y: torch.Tensor,
) -> torch.Tensor:
    n, d = x.shape
    if n == 0:
        return y
    config = RMSNormConfig.select(d)
    res = x if residual is None else residual
    _rmsnorm_kernel[(n,)](
        x,
        res,
        weight,
        y,
        x.stride(0),
        res.stride(0),
        y.stride(0),
        eps,
        D=d,
        BLOCK_D=config.block_d,
        HAS_RES=residual is not None,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return y
