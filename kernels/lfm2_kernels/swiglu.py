r"""SwiGLU activation of a dense MLP: the halves of one row, gate first.

Math (Shazeer 2020, https://arxiv.org/abs/2002.05202), for each row of 2 D features ``[g, u]``::

    y = round(round(g / (1 + exp(-g))) * u)

Numerics: fp32 inside; ``round`` is to the dtype of the input, where transformers rounds.

Memory traffic, elements per row: read 2 D, write D (silu, then multiply: 5 D). Bound by HBM.
One program per row and tile of D; any N and D. Reference: ``reference.swiglu``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import reference
from ._checks import check, output, uses_triton

__all__ = ["swiglu"]


class SwigluConfig(NamedTuple):
    """Launch knobs. A pure function of the shape."""

    block_d: int
    num_warps: int

    @classmethod
    def select(cls, d: int) -> SwigluConfig:
        """Choose for rows of ``d`` outputs."""
        # 1024: one decoded token of 7168 features still spreads over 7 SMs
        block_d = min(triton.next_power_of_2(d), 1024)
        # 8 elements per thread: one 16-byte load of each half in 16-bit dtypes
        return cls(block_d, num_warps=max(block_d // 256, 1))


@triton.jit
def _swiglu_kernel(
    x_ptr,  # [N, 2 D]
    y_ptr,  # [N, D]
    stride_x_n,
    stride_y_n,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # int64 before the multiply by a stride: N * D can pass 2**31
    pid_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    dtype = y_ptr.dtype.element_ty

    gate_ptrs = x_ptr + pid_n * stride_x_n + offs_d
    gate = tl.load(gate_ptrs, mask=mask_d, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + D, mask=mask_d, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(y_ptr + pid_n * stride_y_n + offs_d, (silu * up).to(dtype), mask=mask_d)


def swiglu(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) * up``, the two being the halves of each row of ``gate_up``.

    Args:
        gate_up: ``[N, 2 D]``, float32, float16 or bfloat16, last dimension contiguous.
        out: ``[N, D]`` in the dtype of ``gate_up``; written and returned.

    Returns:
        ``[N, D]`` in ``gate_up.dtype``.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: The width is odd, or a shape or stride breaks the contract above.
    """
    check("swiglu", "gate_up", gate_up, ("N", "2 D"))
    n, width = gate_up.shape
    if width % 2:
        raise ValueError(f"swiglu: gate_up is {list(gate_up.shape)}, want an even width")
    d = width // 2
    y = output("swiglu", out, (n, d), gate_up.dtype, gate_up.device)
    if not uses_triton(gate_up):
        return y.copy_(reference.swiglu(gate_up))
    if n == 0:
        return y
    config = SwigluConfig.select(d)
    _swiglu_kernel[(n, triton.cdiv(d, config.block_d))](
        gate_up,
        y,
        gate_up.stride(0),
        y.stride(0),
        D=d,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return y
