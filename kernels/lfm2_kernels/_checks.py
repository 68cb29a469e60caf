"""What every wrapper asks of its arguments, in one message form, and where an op runs.

Checks read shapes, dtypes and strides, never values: they cost about a microsecond, need no device
and are safe under graph capture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INT32 = (torch.int32,)


def uses_triton(x: torch.Tensor) -> bool:
    """Whether an op on ``x`` launches Triton kernels; if not, it runs ``reference.py``.

    CUDA tensors do. Meta tensors do, so that host code can be driven to compile without a GPU.
    CPU tensors do only under Triton's interpreter (``TRITON_INTERPRET=1``).
    """
    return x.is_cuda or x.is_meta or bool(triton.knobs.runtime.interpret)


def check(
    op: str,
    name: str,
    x: torch.Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] = FLOATS,
    *,
    dense: bool = False,
) -> None:
    """Require a dtype, a shape, and a contiguous last dimension of ``x``.

    Args:
        op: The op that speaks.
        name: The argument's name.
        x: The argument.
        shape: The wanted sizes; a string stands for any size and names it.
        dtypes: The wanted dtypes.
        dense: All of ``x`` must be contiguous, not only its last dimension.

    Raises:
        TypeError: The dtype is not among ``dtypes``.
        ValueError: The shape or the strides differ.
    """
    if x.dtype not in dtypes:
        raise TypeError(f"{op}: {name} is {_dtype_name(x.dtype)}, want {_dtype_names(dtypes)}")
    got = tuple(x.shape)
    if got != tuple(shape) and not _fits(got, shape):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{op}: {name} is {list(got)}, want [{wanted}]")
    if dense:
        if not x.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {list(x.stride())}, want it contiguous")
    elif x.ndim and x.stride(-1) != 1 and got[-1] > 1:
        raise ValueError(
            f"{op}: {name} has strides {list(x.stride())}, want a contiguous last dimension"
        )


def output(
    op: str,
    out: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """``out`` after a check, or a new uninitialised tensor.

    Raises:
        TypeError: ``out`` is not of ``dtype``.
        ValueError: ``out`` is not of ``shape``, or its last dimension is not contiguous.
    """
    if out is None:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    check(op, "out", out, shape, (dtype,))
    return out


def _fits(got: tuple[int, ...], shape: Sequence[int | str]) -> bool:
    return len(got) == len(shape) and all(
        isinstance(want, str) or size == want for size, want in zip(got, shape, strict=True)
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    *head, last = map(_dtype_name, dtypes)
    return f"{', '.join(head)} or {last}" if head else last
