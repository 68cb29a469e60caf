"""The interpreter shim itself: arithmetic of narrow types, and every fault its checker must see."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from memory_check import DataRace, MemoryFault

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted"),
]


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x * y + x)
    tl.store(out_ptr + N + offs, tl.maximum(x, y))
    tl.store(out_ptr + 2 * N + offs, tl.where(x > y, x, -y))
    tl.store(out_ptr + 3 * N + offs, (x > y).to(out_ptr.dtype.element_ty))


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.max(x, axis=0))
    tl.store(out_ptr + 1, tl.sum(x, axis=0))


@triton.jit
def _last_nonzero(a_value, a_index, b_value, b_index):
    take_b = b_value != 0
    return tl.where(take_b, b_value, a_value), tl.where(take_b, b_index, a_index)


@triton.jit
def _custom_reduce_kernel(x_ptr, value_ptr, index_ptr, M: tl.constexpr, N: tl.constexpr):
    offs_m, offs_n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + offs_m[:, None] * N + offs_n[None, :])
    index = tl.broadcast_to(offs_n[None, :], (M, N))
    value, index = tl.reduce((x, index), 1, _last_nonzero)
    tl.store(value_ptr + offs_m, value)
    tl.store(index_ptr + offs_m, index)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    rows, cols = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    acc = tl.dot(tl.load(a_ptr + rows * N + cols), tl.load(b_ptr + rows * N + cols))
    tl.store(c_ptr + rows * N + cols, acc)


@triton.jit
def _loop_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    acc = 0.0
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.sum(tl.load(x_ptr + offs, mask=offs < n, other=0.0), axis=0)
    tl.store(y_ptr, acc)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, stride, shift, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs * stride + shift, x, mask=offs < n)


@triton.jit
def _scalar_mask_kernel(y_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + pid * BLOCK + offs, offs, mask=(pid < n) & (offs < BLOCK - 1))


@triton.jit
def _move_kernel(x_ptr, load_from, store_to, STORE_STEP: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(x_ptr + pid * STORE_STEP + store_to, tl.load(x_ptr + pid + load_from))


@triton.jit
def _sum_into_one_kernel(x_ptr, y_ptr, ATOMIC: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0))
    if ATOMIC:
        tl.atomic_add(y_ptr, x)
    else:
        tl.store(y_ptr, x)


@triton.jit
def _rotate_kernel(x_ptr, N: tl.constexpr, WITH_BARRIER: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + (offs + 1) % N)
    if WITH_BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + offs, x)


@triton.jit
def _colliding_lanes_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs // 2, tl.load(x_ptr + offs))


@triton.jit
def _assert_kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0, "x must be positive")


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(2000) * 100, torch.randn(2000) * 1e-3, torch.zeros(96)])
    got = torch.empty(4096, dtype=dtype)
    _cast_kernel[(1,)](x, got, 4096)
    assert torch.equal(_bits(got), _bits(x.clamp(-448, 448).to(dtype)))
    back = torch.empty(4096)
    _cast_kernel[(1,)](got, back, 4096)
    assert torch.equal(back, got.float())


def test_bf16_nan_and_infinity_survive() -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38])
    got = torch.empty(4, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, got, 4)
    torch.testing.assert_close(got, x.bfloat16(), equal_nan=True, rtol=0, atol=0)


def test_bf16_arithmetic_rounds_each_step() -> None:
    x, y = torch.randn(2, 256).bfloat16()
    got = torch.empty(4, 256, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](x, y, got, 256)
    want = [x * y + x, torch.maximum(x, y), torch.where(x > y, x, -y), (x > y).bfloat16()]
    assert torch.equal(got, torch.stack(want))


def test_bf16_reductions() -> None:
    x = torch.randn(128).bfloat16() - 4.0
    got = torch.empty(2, dtype=torch.bfloat16)
    _reduce_kernel[(1,)](x, got, 128)
    assert torch.equal(got, torch.stack([x.max(), x.float().sum().bfloat16()]))


def test_reduction_by_any_associative_function() -> None:
    x = torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, 0.0, 5.0, 0.0]])
    value, index = torch.empty(2), torch.empty(2, dtype=torch.int32)
    _custom_reduce_kernel[(1,)](x, value, index, 2, 4)
    assert value.tolist() == [3.0, 5.0]
    assert index.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_accumulates_in_fp32(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 64, 64).to(dtype)
    got = torch.empty(64, 64)
    _dot_kernel[(1,)](a, b, got, 64)
    # sums of 64 products of size 1 in fp32: 64 * 2**-24 at the most, in another order
    torch.testing.assert_close(got, a.float() @ b.float(), rtol=0, atol=4e-5)


def test_fp8_dot() -> None:
    a, b = torch.randn(2, 32, 32).to(torch.float8_e4m3fn)
    got = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, got, 32)
    torch.testing.assert_close(got, a.float() @ b.float(), rtol=0, atol=4e-5)


def test_loop_with_a_runtime_bound() -> None:
    x, got = torch.ones(37), torch.empty(1)
    _loop_kernel[(1,)](x, got, 37, BLOCK=16)
    assert got.item() == 37


def test_a_scalar_condition_masks_a_block() -> None:
    got = torch.full((8,), -1, dtype=torch.int32)
    _scalar_mask_kernel[(2,)](got, 1, BLOCK=4)
    assert got.tolist() == [0, 1, 2, -1, -1, -1, -1, -1]


def test_autotune_needs_no_driver() -> None:
    configs = [triton.Config({"BLOCK": 8}), triton.Config({"BLOCK": 16})]
    tuned = triton.autotune(configs, key=[])(_loop_kernel)
    got = torch.empty(1)
    tuned[(1,)](torch.ones(37), got, 37)
    assert got.item() == 37


def test_device_assert_fires() -> None:
    _assert_kernel[(1,)](torch.ones(1))
    with pytest.raises(AssertionError, match="x must be positive"):
        _assert_kernel[(1,)](torch.zeros(1))


def test_in_bounds_copies_pass() -> None:
    x, y = torch.randn(37), torch.zeros(40, 3)
    _copy_kernel[(3,)](x, y[:37, 1], 37, 3, 0, BLOCK=16)
    want = torch.zeros(40, 3)
    want[:37, 1] = x
    assert torch.equal(y, want)


@pytest.mark.parametrize(
    ("n", "stride", "shift", "message"),
    [
        (38, 1, 0, "load out of bounds in 1 lanes, first 0 bytes past the end of x_ptr"),
        (37, 1, 1, "store out of bounds in 1 lanes, first 0 bytes past the end of y_ptr"),
        (37, 1, -1, "store out of bounds in 1 lanes, first 4 bytes before y_ptr"),
    ],
)
def test_out_of_bounds_is_caught(n: int, stride: int, shift: int, message: str) -> None:
    with pytest.raises(MemoryFault, match=message):
        _copy_kernel[(3,)](torch.randn(37), torch.empty(37), n, stride, shift, BLOCK=16)


def test_out_of_bounds_before_all_arguments_is_caught() -> None:
    with pytest.raises(MemoryFault, match="load out of bounds in 1 lanes, first 4 bytes before x_"):
        _move_kernel[(1,)](torch.zeros(5), -1, 0, STORE_STEP=1)


def test_gaps_of_a_strided_view_are_out_of_bounds() -> None:
    x, y = torch.randn(8), torch.empty(8, 3)[:, 0]
    _copy_kernel[(1,)](x, y, 8, 3, 0, BLOCK=8)
    with pytest.raises(MemoryFault, match="store between the elements of y_ptr"):
        _copy_kernel[(1,)](x, y, 8, 2, 0, BLOCK=8)


@pytest.mark.parametrize(
    ("load_from", "store_to", "message"),
    [
        (0, 3, "stores what another program stored"),
        (1, 0, "stores what another program loaded"),
        (0, 1, "loads what another program stored"),
    ],
)
def test_programs_that_meet_at_one_address_race(
    load_from: int, store_to: int, message: str
) -> None:
    x = torch.zeros(5)
    with pytest.raises(DataRace, match=rf"_move_kernel, program \(1, 0, 0\): {message}"):
        _move_kernel[(2,)](x, load_from, store_to, STORE_STEP=0 if store_to == 3 else 1)


def test_atomics_may_meet_each_other_but_floats_must_not() -> None:
    total = torch.zeros(1, dtype=torch.int32)
    _sum_into_one_kernel[(5,)](torch.arange(5, dtype=torch.int32), total, ATOMIC=True)
    assert total.item() == 10
    with pytest.raises(DataRace, match="floating-point atomic"):
        _sum_into_one_kernel[(2,)](torch.ones(2), torch.zeros(1), ATOMIC=True)


def test_lanes_that_cross_need_a_barrier() -> None:
    x = torch.arange(256.0)
    _rotate_kernel[(1,)](x, 256, WITH_BARRIER=True)
    assert torch.equal(x, torch.arange(256.0).roll(-1))
    with pytest.raises(DataRace, match="another thread of this program loaded"):
        _rotate_kernel[(1,)](x, 256, WITH_BARRIER=False)


def test_lanes_of_one_store_must_agree() -> None:
    _colliding_lanes_kernel[(1,)](torch.ones(8), torch.empty(4), 8)
    with pytest.raises(DataRace, match="different values to one address"):
        _colliding_lanes_kernel[(1,)](torch.arange(8.0), torch.empty(4), 8)
