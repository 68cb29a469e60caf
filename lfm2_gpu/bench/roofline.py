"""The roof that results stand under, measured on the device in the same run, not read off a sheet.

Bandwidth is that of a copy much larger than L2, bytes read plus bytes written. Compute is the rate
of a large square product through the vendor's library on random data (zeros run faster: they draw
less power).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lfm2_gpu.bench.timing import Timer

__all__ = ["Roof", "measure_roof"]


@dataclass(frozen=True, slots=True)
class Roof:
    """Peak rates of one device and dtype."""

    copy_gb_s: float
    matmul_tflop_s: float

    def floor_us(self, num_bytes: int, flops: int) -> float:
        """The least time in which so many bytes and operations can be served."""
        return max(self._copy_us(num_bytes), self._matmul_us(flops))

    def bound_by(self, num_bytes: int, flops: int) -> str:
        """``memory`` or ``compute``, whichever sets the floor."""
        return "memory" if self._copy_us(num_bytes) >= self._matmul_us(flops) else "compute"

    def _copy_us(self, num_bytes: int) -> float:
        return num_bytes / self.copy_gb_s / 1e3

    def _matmul_us(self, flops: int) -> float:
        return flops / self.matmul_tflop_s / 1e6


def measure_roof(
    timer: Timer,
    device: torch.device,
    dtype: torch.dtype,
    *,
    copy_bytes: int = 2**31,
    matmul_size: int = 8192,
) -> Roof:
    """Measure both peaks; takes twice ``copy_bytes`` of device memory for a moment."""
    return Roof(
        copy_gb_s=2 * copy_bytes / _copy_us(timer, device, copy_bytes) / 1e3,
        matmul_tflop_s=2 * matmul_size**3 / _matmul_us(timer, device, dtype, matmul_size) / 1e6,
    )


def _copy_us(timer: Timer, device: torch.device, size: int) -> float:
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return timer.measure(lambda: target.copy_(source)).median_us


def _matmul_us(timer: Timer, device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return timer.measure(lambda: torch.mm(a, b, out=out)).median_us
