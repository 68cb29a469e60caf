"""Time one op: graph replay behind a cold L2 on a GPU, a plain clock on a CPU.

On a GPU a sample is: overwrite L2, record, replay a graph of one call, record. The overwrite takes
longer than the host needs to queue the rest, so the two events bound device time alone. They also
bound the launch of the graph itself: ``Timer.overhead_us`` is what an empty pair measures, and is
reported beside the results, not subtracted from them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Timer", "Timing"]

_WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call: median, 20th and 80th percentile of ``samples`` samples."""

    median_us: float
    p20_us: float
    p80_us: float
    samples: int


class Timer:
    """Times calls on one device.

    Args:
        device: Where the calls run.
        samples: Samples per call at most; a CPU takes at most five.
        budget_s: Stop sampling a call after this long, with at least three samples.
    """

    def __init__(self, device: torch.device, *, samples: int = 50, budget_s: float = 0.5) -> None:
        self._on_gpu = device.type == "cuda"
        self._samples = samples if self._on_gpu else min(samples, 5)
        self._budget_s = budget_s
        self.overhead_us = 0.0
        if self._on_gpu:
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            # twice the cache, so that no line of the last call survives
            self._flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)
            self.overhead_us = self._collect(lambda: None).median_us

    def measure(self, call: Callable[[], object]) -> Timing:
        """Time ``call``, which must be safe to capture: no wait for the GPU, no host copy."""
        if not self._on_gpu:
            call()
            return self._collect(call)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # compiles, and lets libraries take their workspaces before the capture
            for _ in range(_WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self._collect(graph.replay)

    def _collect(self, call: Callable[[], object]) -> Timing:
        sample = self._sample_gpu if self._on_gpu else _sample_cpu
        times: list[float] = []
        started = time.monotonic()
        while len(times) < self._samples:
            times.append(sample(call))
            if len(times) >= 3 and time.monotonic() - started > self._budget_s:
                break
        return _summary(times)

    def _sample_gpu(self, call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3


def _sample_cpu(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e6


def _summary(times: list[float]) -> Timing:
    ordered = sorted(times)
    last = len(ordered) - 1
    return Timing(
        median_us=statistics.median(ordered),
        p20_us=ordered[round(0.2 * last)],
        p80_us=ordered[round(0.8 * last)],
        samples=len(ordered),
    )
