"""The timer counts what it should, and the roof turns work into the least time."""

from __future__ import annotations

import time

import pytest
import torch

from lfm2_gpu.bench.roofline import Roof, measure_roof
from lfm2_gpu.bench.timing import Timer

CPU = torch.device("cpu")


def test_timer_measures_a_sleep() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.002)

    timing = Timer(CPU).measure(call)
    assert 2000 <= timing.p20_us <= timing.median_us <= timing.p80_us
    assert timing.samples == 5
    assert len(calls) == 6


def test_timer_stops_at_its_budget() -> None:
    timing = Timer(CPU, budget_s=0.0).measure(lambda: None)
    assert timing.samples == 3


def test_roof() -> None:
    roof = Roof(copy_gb_s=1000.0, matmul_tflop_s=100.0)
    # 1 MB at 1 TB/s is 1 us; 1 GFLOP at 100 TFLOP/s is 10 us
    assert roof.floor_us(10**6, 0) == pytest.approx(1.0)
    assert roof.floor_us(10**6, 10**9) == pytest.approx(10.0)
    assert roof.bound_by(10**6, 10**9) == "compute"
    assert roof.bound_by(10**8, 10**9) == "memory"


def test_measure_roof() -> None:
    roof = measure_roof(Timer(CPU), CPU, torch.float32, copy_bytes=2**16, matmul_size=16)
    assert roof.copy_gb_s > 0
    assert roof.matmul_tflop_s > 0


@pytest.mark.gpu
def test_timer_on_the_gpu() -> None:
    device = torch.device("cuda")
    timer = Timer(device)
    # one copy within L2 and one of 4 GB: the second cannot be faster than the wires allow
    small, large = (torch.empty(2**n, dtype=torch.int8, device=device) for n in (20, 31))
    assert 0 < timer.overhead_us < 100
    assert timer.measure(lambda: small.clone()).median_us < 100
    assert timer.measure(lambda: large.add_(1)).median_us > 2**32 / 10e12 * 1e6
