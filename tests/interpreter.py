"""Triton's CPU interpreter made correct, with every launch checked. For tests only.

``install`` repairs what the interpreter of triton 3.6 to 3.8 gets silently wrong: arithmetic, dots,
reductions and casts of bfloat16 and fp8 (computed in fp32, rounded to nearest even as the device
does), loops under numpy >= 2.4, autotuning without a driver, ``gdc`` instructions,
``device_assert``. It also installs the memory and race checker of ``memory_check.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as base
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import memory_check

_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


@contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Whether wrappers send CPU tensors to the interpreter (``_checks.uses_triton``) inside."""
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = on
    try:
        yield
    finally:
        triton.knobs.runtime.interpret = before


@functools.cache
def install() -> None:
    """Patch the interpreter, once per process. Needs ``TRITON_INTERPRET=1`` before triton loads."""
    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before importing triton"
    _install_dtypes()
    _install_numerics()
    _install_language()
    memory_check.install()
    # kernels fail with their own exception and traceback, not with repr() in an InterpreterError
    triton.knobs.compilation.front_end_debugging = True


def _install_dtypes() -> None:
    slow = base._get_np_dtype
    names = {t.name: slow(t) for t in vars(tl).values() if type(t) is tl.dtype and t != tl.void}

    def np_dtype(dtype: tl.dtype) -> np.dtype:
        """The original builds its table anew in every call."""
        scalar = dtype.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else names[scalar.name]

    base._get_np_dtype = np_dtype


def _bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _f32_to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(x.shape)


def _decode(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Values of ``data``: fp32 for bfloat16 and fp8, which numpy holds as bits; else unchanged."""
    if dtype == tl.bfloat16:
        return _bf16_to_f32(data)
    if dtype in _FP8:
        return torch.tensor(data).view(_FP8[dtype]).float().numpy()
    return data


def _encode(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    if dtype == tl.bfloat16:
        return _f32_to_bf16(values)
    if dtype in _FP8:
        top = torch.finfo(_FP8[dtype]).max
        # saturates, as cvt.rn.satfinite does
        wide = torch.tensor(values, dtype=torch.float32).clamp(-top, top)
        return wide.to(_FP8[dtype]).view(torch.uint8).numpy()
    return values.astype(base._get_np_dtype(dtype))


def _is_bits(x: object) -> bool:
    return isinstance(x, TensorHandle) and (x.dtype.scalar == tl.bfloat16 or x.dtype.scalar in _FP8)


def _widen(x: Any) -> Any:
    return TensorHandle(_decode(x.data, x.dtype.scalar), tl.float32) if _is_bits(x) else x


def _in_fp32(op: Callable[..., Any]) -> Callable[..., Any]:
    """The builder's ``op`` with bit-held operands computed in fp32 and rounded once."""

    @functools.wraps(op)
    def wrapped(self: InterpreterBuilder, *args: Any, **kwargs: Any) -> Any:
        held = [x.dtype.scalar for x in args if _is_bits(x)]
        if not held:
            return op(self, *args, **kwargs)
        result = op(self, *map(_widen, args), **kwargs)
        if result.data.dtype == np.bool_:
            return result
        return TensorHandle(_encode(result.data, held[0]), held[0])

    return wrapped


def _install_numerics() -> None:
    casts = {"create_fp_to_si", "create_fp_to_ui", "create_fp_ext", "create_fp_trunc"}
    others = "minimumf minnumf maximumf maxnumf precise_divf clampf cos exp exp2 floor ceil log"
    others += " log2 precise_sqrt sqrt sin erf rsqrt"
    names = {n for n in vars(InterpreterBuilder) if n.startswith("create_f")} - casts
    names -= {"create_fp_to_fp"}
    names |= {f"create_{n}" for n in others.split()} & set(vars(InterpreterBuilder))
    for name in names:
        setattr(InterpreterBuilder, name, _in_fp32(getattr(InterpreterBuilder, name)))

    binary_op, dot = InterpreterBuilder.binary_op, InterpreterBuilder.create_dot

    def typed_binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> TensorHandle:
        result = binary_op(self, lhs, rhs, op)
        if result.data.dtype == np.bool_:
            # a comparison keeps the type of its operands, and its splat turns into integers
            result.dtype = tl.int1
        return result

    def cast(self: Any, src: TensorHandle, dst_type: Any, rounding: Any = None) -> TensorHandle:
        if rounding == base._ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError("the interpreter shim rounds to nearest even only")
        values = _decode(src.data, src.dtype.scalar)
        return TensorHandle(_encode(values, dst_type.scalar), dst_type.scalar)

    def wide_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> Any:
        def fp32(x: TensorHandle) -> TensorHandle:
            half = x.dtype.scalar == tl.float16
            return TensorHandle(x.data.astype(np.float32), tl.float32) if half else _widen(x)

        result = dot(self, fp32(a), fp32(b), _widen(d), *rest)
        return TensorHandle(_encode(result.data, d.dtype.scalar), d.dtype.scalar)

    InterpreterBuilder.binary_op = typed_binary_op
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = cast
    InterpreterBuilder.create_dot = wide_dot
    base.ReduceOps.generic_reduce = _pairwise_reduce
    for ops in (base.ReduceOps, base.ScanOps):
        ops.apply_impl = _reduce_in_fp32(ops.apply_impl)


def _reduce_in_fp32(apply_impl: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, inputs: tuple[Any, ...]) -> Any:
        wide = tuple(
            self.to_tensor(_decode(x.handle.data, x.dtype), tl.float32) if _is_bits(x.handle) else x
            for x in inputs
        )
        results = apply_impl(self, wide)
        results = results if isinstance(results, (tuple, list)) else (results,)
        return tuple(
            narrow(self, y, x.dtype) if _is_bits(x.handle) else y
            for x, y in zip(inputs, results, strict=False)
        )

    def narrow(self: Any, y: Any, dtype: tl.dtype) -> Any:
        bits = _encode(y.handle.data, dtype)
        return self.to_tensor(bits if y.type.is_block() else bits.item(), dtype)

    return wrapped


def _pairwise_reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """A reduction by any function, in log2 steps; the original takes one step per element."""
    axis = 0 if self.axis is None else self.axis
    dtypes = [x.dtype for x in inputs]
    parts = [x.handle.data.ravel() if self.axis is None else x.handle.data for x in inputs]
    while parts[0].shape[axis] > 1:
        sides = [
            self.to_tensor(np.take(p, np.arange(side, p.shape[axis], 2), axis), dtype)
            for side in (0, 1)
            for p, dtype in zip(parts, dtypes, strict=True)
        ]
        results = self.combine_fn.fn(*sides)
        results = results if isinstance(results, tuple) else (results,)
        parts = [r.handle.data for r in results]
    if self.keep_dims:
        rank = len(inputs[0].handle.data.shape)
        parts = [p.reshape([1] * rank) for p in parts] if self.axis is None else parts
    else:
        parts = [np.squeeze(p, axis) for p in parts]
    return [
        self.to_tensor(p if p.ndim else p.item(), d) for p, d in zip(parts, dtypes, strict=True)
    ]


def _install_language() -> None:
    # debug makes device_assert raise; overflow checks would triple the work of integer arithmetic
    options = base.interpreter_builder.options
    object.__setattr__(options, "debug", True)
    object.__setattr__(options, "sanitize_overflow", False)

    # once for the process: the original patches the language around every call of every function,
    # which takes half of the time of a launch
    base._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    base._patch_lang = lambda fn: base._LangPatchScope()
    # numpy >= 2.4 refuses int() of an array of one element (triton 3.6)
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    for name in ("gdc_wait", "gdc_launch_dependents"):
        if hasattr(tl.extra.cuda, name):
            setattr(tl.extra.cuda, name, lambda _semantic=None: None)
    # every configuration takes no time, so the first one wins
    Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]
