"""Every kernel compiles for every architecture, without a GPU, and holds its budget."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lfm2_gpu.bench.resources import ARCHITECTURES
from support import ROOT, child_environment

FILES = sorted(Path(__file__).parent.glob("cases_*.py"))

_SPILLING_CASE = """
import torch
import triton
import triton.language as tl
from compile_case import Case, meta


@triton.jit
def _spilling_kernel(x_ptr, y_ptr):
    rows, cols = tl.arange(0, 128)[:, None], tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + rows * 128 + cols)
    tl.store(y_ptr + rows * 128 + cols, tl.dot(x, tl.trans(x)))


def run(dtype):
    x, y = meta(128, 128, dtype=dtype), meta(128, 128, dtype=torch.float32)
    # the accumulator alone takes 128 registers of each thread
    _spilling_kernel[(1,)](x, y, maxnreg=96)


CASES = {"too few registers": Case(run)}
"""


def _compile(folder: Path, cache: Path, *arguments: str) -> tuple[list[dict], str]:
    report = folder / "resources.json"
    command = [sys.executable, "-m", "lfm2_gpu.bench.resources", "--json", str(report), *arguments]
    environment = child_environment(TRITON_CACHE_DIR=str(cache))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text()), done.stdout


def test_every_kernel_holds_its_budget(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = getattr(request.config, "cache", None)
    # kept between runs: compiled kernels, and the table that the terminal summary shows
    folder = cache.mkdir("kernels") if cache else tmp_path
    rows, table = _compile(folder, folder / "triton", *map(str, FILES))
    (folder / "resources.txt").write_text(table)

    broken = []
    for row in rows:
        found = row["resources"]
        label = f"{found['kernel']} sm_{found['arch']} {row['dtype']} ({row['case']})"
        if found["spills"]:
            broken.append(f"{label}: {found['spills']} bytes spilled, want 0")
        limit = ARCHITECTURES[found["arch"]].shared_per_block
        if found["shared"] > limit:
            broken.append(f"{label}: {found['shared']} bytes shared, want at most {limit}")
    # a case file imports its neighbours, as a script does
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    cases = [item for file in FILES for item in runpy.run_path(str(file))["CASES"].items()]
    for name, case in cases:
        for kernel in case.wgmma:
            counts = [
                row["resources"]["instructions"]["wgmma"]
                for row in rows
                if (row["case"], row["resources"]["kernel"]) == (name, kernel)
                and row["resources"]["arch"] == 90
                and row["dtype"] != "float32"
            ]
            if not counts or not all(counts):
                broken.append(f"{kernel} ({name}): wgmma counts {counts}, want one in each variant")
    assert not broken, "\n".join([*broken, table])
    assert {row["resources"]["arch"] for row in rows} == set(ARCHITECTURES)


def test_spills_are_seen(tmp_path: Path) -> None:
    case = tmp_path / "cases_spilling.py"
    folder = str(Path(__file__).parent)
    case.write_text(f"import sys\nsys.path.append({folder!r})\n{_SPILLING_CASE}")
    rows, table = _compile(
        tmp_path, tmp_path / "triton", "--arch", "90", "--processes", "1", str(case)
    )
    (found,) = (row["resources"] for row in rows)
    assert found["spills"] > 0
    assert found["instructions"]["wgmma"] > 0
    assert found["registers"] <= 96
    assert "_spilling_kernel" in table


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        (90, 128, 32, 0, 16),  # threads: 2048 / 128
        (90, 128, 128, 0, 4),  # registers: 65536 / (128 * 128)
        (90, 256, 64, 100 * 1024, 2),  # shared memory: 228 / (100 + 1)
        (120, 32, 16, 0, 24),  # blocks
    ],
)
def test_occupancy(arch: int, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert ARCHITECTURES[arch].blocks(threads, registers, shared) == blocks
