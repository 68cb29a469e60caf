"""What a compile case is: wrapper calls on meta tensors, and what their kernels must contain.

``cases_*.py`` beside this file export ``CASES: dict[str, Case]``. ``test_compile.py`` runs each
case under a driver that compiles every kernel the wrappers would launch, for each architecture,
with no GPU. Every kernel must have no spills and fit the shared memory of its architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

BF16 = (torch.bfloat16,)
ALL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Case(NamedTuple):
    """One or more wrapper calls at one shape.

    bfloat16 is compiled for sm_80, 89, 90, 100 and 120, the other dtypes for sm_90 alone.
    """

    # calls public wrappers on meta tensors whose activation dtype is the argument; returns nothing
    run: Callable[[torch.dtype], None]
    dtypes: tuple[torch.dtype, ...] = BF16
    # names of kernels that must use wgmma on sm_90 in 16-bit dtypes
    wgmma: tuple[str, ...] = ()


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An argument without memory: shape, strides and dtype only."""
    return torch.empty(shape, dtype=dtype, device="meta")
