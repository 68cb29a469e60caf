"""The mixers' kernels compile once per model: no size or alignment of a step compiles another."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import python_lines

_CODE = """
import sys

import torch

sys.path[:0] = {folders!r}
from cases_mixers import Step, attention, conv
from lfm2_gpu.bench.resources import compiling_for


def run(step):
    conv(torch.bfloat16, hidden=64, step=step)
    attention(torch.bfloat16, heads=2, kv_heads=2, dim=16, step=step)


with compiling_for(90) as launched:
    run(Step())
    warm = {{id(kernel) for kernel in launched}}
    print(len(warm), "kernels warm")
    for step in (Step(1, 1, 1, 3), Step(17, 3, 3, 17), Step(4096, 16, 2, 64)):
        del launched[:]
        run(step)
        print(*(kernel.kernel for kernel in launched if id(kernel) not in warm))
"""


def test_no_step_compiles_after_warm_up(request: pytest.FixtureRequest) -> None:
    here = Path(__file__).parent
    # the folder of test_compile.py: compiled kernels are kept between runs
    cache = request.config.cache.mkdir("kernels") / "triton"
    code = _CODE.format(folders=[str(here), str(here.parent)])
    # two of the conv, one with its store; norm and rope; prefill; decode twice, with its combine
    assert python_lines(code, TRITON_CACHE_DIR=str(cache)) == ["8 kernels warm", "", "", ""]
