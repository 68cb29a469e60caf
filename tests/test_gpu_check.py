"""benchmarks/gpu_check.sh end to end on a CPU, and what it says of ops that are wrong or raise."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lfm2_kernels
from lfm2_gpu.bench.cases import BUILDERS, Sizes
from lfm2_gpu.bench.roofline import Roof
from lfm2_gpu.bench.schema import validate
from lfm2_gpu.bench.timing import Timer
from support import ROOT, child_environment

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
CPU = torch.device("cpu")
ROOF = Roof(copy_gb_s=1.0, matmul_tflop_s=1.0)


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def test_dry_run_from_another_folder(tmp_path: Path) -> None:
    environment = child_environment(PYTHON=sys.executable)
    # the script itself says where it imports from
    del environment["PYTHONPATH"]
    tests = tmp_path / "test_two.py"
    tests.write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_a(): pass\n"
        "@pytest.mark.gpu\ndef test_b(): assert False\ndef test_c(): assert False\n"
    )
    command = [ROOT / "benchmarks" / "gpu_check.sh", "--dry-run", "--out", "got"]
    done = subprocess.run(
        [*command, "--tests", str(tests), "--commit", "abc"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    # one of the two marked tests fails
    assert done.returncode == 1, done.stdout + done.stderr
    document = json.loads((tmp_path / "got" / "gpu_check.json").read_text())
    validate(document)
    assert document["machine"]["commit"] == "abc"
    tests_run = document["tests"]
    assert (tests_run["passed"], tests_run["failed"]) == (1, 1)
    assert [name.split("::")[-1] for name in tests_run["failures"]] == ["test_b"]
    assert {r["op"] for r in document["results"]} == set(BUILDERS)
    assert {r["status"] for r in document["results"]} == {"ok"}
    assert {r["tokens"] for r in document["results"]} == {1, 5, 70}
    log = (tmp_path / "got" / "gpu_check.log").read_text()
    assert log == done.stdout
    assert "1 failed, 1 passed, 1 deselected" in log
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "got" / "roofline.png").exists()


def test_without_a_gpu_it_says_so(gpu_check: ModuleType, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", os.devnull]) == 2
    assert "torch finds no GPU; --dry-run" in capsys.readouterr().out


def run_case(gpu_check: ModuleType, **options: Any) -> dict[str, Any]:
    sizes = Sizes(gpu_check.TOY, 5, torch.float32, CPU)
    result: dict[str, Any] = gpu_check.run_case("rmsnorm", sizes, ROOF, Timer(CPU), **options)
    return result


def test_figures(gpu_check: ModuleType) -> None:
    result = run_case(gpu_check)
    assert result["status"] == "ok"
    # 1 GB/s is a byte a nanosecond
    assert result["floor_us"] == pytest.approx(result["bytes"] / 1e3)
    assert result["percent_of_roof"] == pytest.approx(
        100 * result["floor_us"] / result["median_us"]
    )
    assert result["detail"] == "memory-bound"


def test_a_wrong_op_is_not_timed(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfm2_kernels, "rmsnorm", lambda x, weight, eps: x)
    result = run_case(gpu_check)
    assert result["status"] == "wrong"
    assert "want at most" in result["detail"]
    assert "median_us" not in result
    monkeypatch.setattr(lfm2_kernels, "rmsnorm", lambda x, weight, eps: x * float("nan"))
    result = run_case(gpu_check)
    assert (result["status"], result["deviation"]) == ("wrong", None)


def test_an_op_that_raises_does_not_end_the_run(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(lfm2_kernels, "rmsnorm", raises)
    result = run_case(gpu_check)
    assert (result["status"], result["detail"]) == ("error", "RuntimeError: no such kernel")


def test_out_of_time(gpu_check: ModuleType) -> None:
    result = run_case(gpu_check, out_of_time=True)
    assert (result["status"], result["detail"]) == ("skipped", "out of time")


def test_tests_that_run_too_long_are_interrupted(gpu_check: ModuleType, tmp_path: Path) -> None:
    tests = tmp_path / "test_slow.py"
    tests.write_text(
        "import pytest, time\n@pytest.mark.gpu\ndef test_a(): pass\n"
        "@pytest.mark.gpu\ndef test_b(): time.sleep(60)\n"
    )
    started = time.monotonic()
    counts = gpu_check.run_tests(tests, seconds=4.0)
    assert time.monotonic() - started < 30
    assert not counts["passed_all"]
    assert counts["passed"] == 1
