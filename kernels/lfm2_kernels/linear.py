r"""Linear layer for few rows, with RMSNorm before it and bias and residual behind it.

Math, for N <= 16 rows x, weight W ``[O, K]``::

    h = rmsnorm(x, norm_weight)           # with norm_weight, else h = x
    y = round(h W^T + bias)
    out = round(residual + y)             # with residual, else out = y

Numerics: products accumulate in fp32, whole K in one program; ``round`` is to the dtype of x, where
transformers rounds, and h is rounded as in ``rmsnorm.py``. float32 uses IEEE products, not TF32.

Memory traffic: W once, ``O K`` elements; x is read from L2 by every program. Bound by HBM at these
row counts, so the aim is bytes in flight: one program per small tile of O, long runs of K per load,
and W staged through shared memory some steps ahead. One row multiplies in fp32 and sums along K
once at the end; 2 to 16 rows use the tensor cores.

More rows go to cuBLAS through ``torch.nn.functional.linear``, with the same roundings around it.
Reference: ``reference.linear``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import reference
from ._checks import FLOATS, check, output, uses_triton
from .rmsnorm import rmsnorm

__all__ = ["MAX_SKINNY_ROWS", "linear"]

# the height of one tensor-core tile: above it a row costs as much as 16
MAX_SKINNY_ROWS = 16


class LinearConfig(NamedTuple):
    """Launch knobs. A pure function of the shape, so runs are bitwise repeatable."""

    block_n: int
    block_o: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def select(cls, n: int, o: int, k: int, dtype: torch.dtype) -> LinearConfig:
        """Choose for ``n`` rows, ``o`` outputs and ``k`` inputs."""
        widest_k = triton.next_power_of_2(k)
        if n == 1:
            # 4 KB of W a stage and three in flight; O = 2048 is 512 programs, four on each of 132
            # SMs, so 48 KB in flight on each: 3.35 TB/s at 600 ns of latency need 15 KB
            return cls(1, block_o=4, block_k=min(widest_k, 512), num_warps=4, num_stages=4)
        if dtype == torch.float32:
            # products run outside the tensor cores and unroll over K, so the tile stays small
            return cls(16, block_o=16, block_k=min(widest_k, 32), num_warps=4, num_stages=2)
        # 32 outputs per program as soon as that still fills two programs on each of 132 SMs
        block_o = 32 if o >= 32 * 2 * 132 else 16
        # one warp per 8 outputs, the width of one instruction; 8 KB of W a stage at 16 outputs
        return cls(16, block_o, min(max(widest_k, 16), 256), num_warps=block_o // 8, num_stages=4)


@triton.jit(do_not_specialize=["n"])
def _linear_kernel(
    x_ptr,  # [N, K]
    w_ptr,  # [O, K]
    norm_ptr,  # [K] if HAS_NORM
    bias_ptr,  # [O] if HAS_BIAS
    res_ptr,  # [N, O] if HAS_RES
    y_ptr,  # [N, O]
    stride_x_n,
    stride_res_n,
    stride_y_n,
    n,
    eps,
    K: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
):
    pid_o = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_o = offs_n < n, offs_o < OUT
    dtype = y_ptr.dtype.element_ty
    x_rows = x_ptr + offs_n.to(tl.int64)[:, None] * stride_x_n
    # the tile's corner in int64, as O * K can pass 2**31; offsets inside the tile fit int32
    w_rows = w_ptr + pid_o.to(tl.int64) * BLOCK_O * K + tl.arange(0, BLOCK_O)[:, None] * K

    if HAS_NORM:
        squares = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            mask_k = start + offs_k < K
            mask_x = mask_n[:, None] & mask_k[None, :]
            h = tl.load(x_rows + start + offs_k[None, :], mask=mask_x, other=0.0).to(tl.float32)
            squares += h * h
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=1) / K + eps))  # [BLOCK_N]

    if BLOCK_N == 1:
        acc = tl.zeros((BLOCK_O, BLOCK_K), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask_k = start + offs_k < K
        mask_w = mask_o[:, None] & mask_k[None, :]
        w = tl.load(w_rows + start + offs_k[None, :], mask=mask_w, other=0.0)
        mask_x = mask_n[:, None] & mask_k[None, :]
        x = tl.load(x_rows + start + offs_k[None, :], mask=mask_x, other=0.0)
        if HAS_NORM:
            scale = tl.load(norm_ptr + start + offs_k, mask=mask_k, other=0.0).to(dtype)
            normed = (x.to(tl.float32) * rstd[:, None]).to(dtype).to(tl.float32)
            x = (normed * scale.to(tl.float32)[None, :]).to(dtype)
        if BLOCK_N == 1:
            acc += w.to(tl.float32) * x.to(tl.float32)
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")

    # [BLOCK_N, BLOCK_O] from here on
    y = tl.sum(acc, axis=1)[None, :] if BLOCK_N == 1 else acc
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)[None, :]
    y = y.to(dtype)
    mask_y = mask_n[:, None] & mask_o[None, :]
    if HAS_RES:
        res_ptrs = res_ptr + offs_n[:, None] * stride_res_n + offs_o[None, :]
        residual = tl.load(res_ptrs, mask=mask_y, other=0.0)
        # y may be the residual: a small tile lives in all warps, and all must have read it
        tl.debug_barrier()
        y = (residual.to(tl.float32) + y.to(tl.float32)).to(dtype)
    tl.store(y_ptr + offs_n[:, None] * stride_y_n + offs_o[None, :], y, mask=mask_y)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual + rmsnorm(x) @ weight.T + bias``, each part but the product optional.

    Up to 16 rows run in one kernel. With more rows cuBLAS does the product, and ``norm_weight`` and
    ``residual`` each allocate one temporary.

    Args:
        x: ``[N, K]``, float32, float16 or bfloat16, last dimension contiguous.
        weight: ``[O, K]`` in ``x.dtype``, contiguous.
        bias: ``[O]`` in ``x.dtype``.
        residual: ``[N, O]`` in ``x.dtype``, last dimension contiguous.
        norm_weight: ``[K]``, a floating dtype: normalise ``x`` by ``rmsnorm`` first.
        eps: Of the norm.
        out: ``[N, O]`` in ``x.dtype``; written and returned. May be ``residual``, not ``x``.

    Returns:
        ``[N, O]`` in ``x.dtype``.

    Raises:
        TypeError: A dtype breaks the contract above.
        ValueError: A shape or stride does.
    """
    check("linear", "x", x, ("N", "K"))
    check("linear", "weight", weight, ("O", x.shape[1]), (x.dtype,), dense=True)
    n, o = x.shape[0], weight.shape[0]
    if bias is not None:
        check("linear", "bias", bias, (o,), (x.dtype,))
    if residual is not None:
        check("linear", "residual", residual, (n, o), (x.dtype,))
    if norm_weight is not None:
        check("linear", "norm_weight", norm_weight, x.shape[1:], FLOATS)
    y = output("linear", out, (n, o), x.dtype, x.device)
    if not uses_triton(x):
        want = reference.linear(
            x, weight, bias=bias, residual=residual, norm_weight=norm_weight, eps=eps
        )
        return y.copy_(want)
    if n == 0:
        return y
    if n > MAX_SKINNY_ROWS:
        return _wide(x, weight, bias, residual, norm_weight, eps, y)
    return _launch(x, weight, bias, residual, norm_weight, eps, y)


def _wide(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
) -> torch.Tensor:
    h = x if norm_weight is None else rmsnorm(x, norm_weight, eps)
    if residual is not None:
        return torch.add(residual, F.linear(h, weight, bias), out=y)
    if bias is not None:
        return torch.addmm(bias, h, weight.t(), out=y)
    return torch.mm(h, weight.t(), out=y)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
) -> torch.Tensor:
    n, k = x.shape
    o = weight.shape[0]
    config = LinearConfig.select(n, o, k, x.dtype)
    _linear_kernel[(triton.cdiv(o, config.block_o),)](
        x,
        weight,
        x if norm_weight is None else norm_weight,
        x if bias is None else bias,
        x if residual is None else residual,
        y,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        y.stride(0),
        n,
        eps,
        K=k,
        OUT=o,
        BLOCK_N=config.block_n,
        BLOCK_O=config.block_o,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        HAS_NORM=norm_weight is not None,
        HAS_BIAS=bias is not None,
        HAS_RES=residual is not None,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return y
