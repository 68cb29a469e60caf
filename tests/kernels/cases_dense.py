"""Compile cases of the norms, the dense activation and the skinny linear."""

from __future__ import annotations

from functools import partial

import torch
from compile_case import ALL_DTYPES, Case, meta

from lfm2_kernels.linear import linear
from lfm2_kernels.rmsnorm import add_rmsnorm, rmsnorm
from lfm2_kernels.swiglu import swiglu

# hidden size of the 1.2B, 8B and 24B models, and the dense MLP of the 1.2B
_HIDDEN, _MLP = 2048, 8192


def _norms(dtype: torch.dtype, rows: int, hidden: int) -> None:
    x, weight = meta(rows, hidden, dtype=dtype), meta(hidden, dtype=dtype)
    rmsnorm(x, weight, 1e-5)
    add_rmsnorm(x, meta(rows, hidden, dtype=dtype), weight, 1e-5)


def _swiglu(dtype: torch.dtype) -> None:
    swiglu(meta(16, 2 * _MLP, dtype=dtype))


def _linear(dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> None:
    x, weight = meta(rows, inputs, dtype=dtype), meta(outputs, inputs, dtype=dtype)
    linear(x, weight, residual=meta(rows, outputs, dtype=dtype))
    linear(x, weight, norm_weight=meta(inputs, dtype=dtype), eps=1e-5)


CASES = {
    "norms": Case(partial(_norms, rows=16, hidden=_HIDDEN), ALL_DTYPES),
    "norms odd width": Case(partial(_norms, rows=3, hidden=1000)),
    "swiglu": Case(_swiglu, ALL_DTYPES),
    "linear 1 row, 2048 to 2048": Case(
        partial(_linear, rows=1, outputs=_HIDDEN, inputs=_HIDDEN), ALL_DTYPES
    ),
    "linear 1 row, 8192 to 2048": Case(partial(_linear, rows=1, outputs=_HIDDEN, inputs=_MLP)),
    "linear 16 rows, 2048 to 2048": Case(
        partial(_linear, rows=16, outputs=_HIDDEN, inputs=_HIDDEN), ALL_DTYPES
    ),
    "linear 16 rows, 2048 to 65536": Case(partial(_linear, rows=16, outputs=65536, inputs=_HIDDEN)),
    "linear 5 rows, odd sizes": Case(partial(_linear, rows=5, outputs=1000, inputs=1000)),
}
