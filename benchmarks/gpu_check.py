"""Run the GPU tests and the quick benches within a time limit; write one JSON and a few plots.

    PYTHONPATH=.:kernels python benchmarks/gpu_check.py --out DIR [--dry-run]

Each public op is checked against its reference and timed at the shapes of LFM2-24B-A2B. The JSON is
rewritten after every result, so a run that is cut short keeps what it had. ``--dry-run`` runs the
same code on a CPU at toy shapes. The exit code is 0 only if tests passed and no op was wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lfm2_gpu.bench.cases import BUILDERS, Sizes, build
from lfm2_gpu.bench.plots import plot_all
from lfm2_gpu.bench.roofline import Roof, measure_roof
from lfm2_gpu.bench.schema import document, machine
from lfm2_gpu.bench.timing import Timer
from lfm2_gpu.config import ModelConfig
from lfm2_gpu.errors import MissingExtra
from lfm2_gpu.model_table import PUBLIC_CONFIGS

ROOT = Path(__file__).resolve().parents[1]
MODEL = "LFM2-24B-A2B"
TOKENS = (1, 64, 2048)
_HEAD = (
    f"{'op':20} {'tokens':>6} {'us':>9} {'p20-p80':>15} {'GB/s':>7} {'TFLOP/s':>8} {'% roof':>7}"
)
# kept for the benches: a compile and 50 samples of every case took less by estimate
BENCH_SECONDS = 150.0
TOY = ModelConfig(
    architecture="lfm2_moe",
    vocab_size=300,
    hidden_size=96,
    num_hidden_layers=2,
    layer_types=("conv", "full_attention"),
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=80,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    num_dense_layers=1,
)


@dataclass
class Report:
    """What is known so far, and the file that it is kept in."""

    path: Path
    machine: dict[str, Any]
    roof: dict[str, Any] | None = None
    tests: dict[str, Any] | None = None
    results: list[dict[str, Any]] = field(default_factory=list)

    def save(self) -> dict[str, Any]:
        """Write the document as it stands."""
        made = document(
            command=sys.argv,
            machine=self.machine,
            roof=self.roof,
            tests=self.tests,
            results=self.results,
        )
        self.path.write_text(json.dumps(made, indent=1, allow_nan=False) + "\n")
        return made


def main(arguments: list[str] | None = None) -> int:
    """Run everything; returns the exit code."""
    options = _parser().parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_check: torch finds no GPU; --dry-run runs the same code on the CPU")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out / "gpu_check.json", machine(ROOT, options.commit))
    print("\n".join(f"{name:10} {value}" for name, value in report.machine.items()), flush=True)
    report.tests = run_tests(options.tests, deadline - time.monotonic() - BENCH_SECONDS)
    report.save()
    run_benches(report, deadline, dry_run=options.dry_run)
    made = report.save()
    try:
        plot_all(made, options.out)
    except MissingExtra as error:
        print(f"no plots: {error}")
    wrong = [r for r in report.results if r["status"] in ("wrong", "error")]
    print(f"tests: {report.tests}\nresults: {len(report.results)}, wrong: {len(wrong)}")
    print(f"wrote {report.path}")
    return 1 if wrong or not report.tests["passed_all"] else 0


def run_tests(folder: Path, seconds: float) -> dict[str, Any]:
    """``pytest -m gpu`` in a process of its own; its counts and the names of what failed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-q", "-m", "gpu"]
        # a test file that misses an optional package must not keep the others from running
        command.append("--continue-on-collection-errors")
        # what pytest prints goes where our own output goes, into the log
        child = subprocess.Popen([*command, f"--junitxml={xml}", str(folder)], cwd=ROOT)
        interrupted = False
        try:
            code = child.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            interrupted, code = True, _interrupt(child)
        counts = _read_junit(xml)
    # pytest lists the test that was cut short as if it had passed
    counts["passed"] = max(counts["passed"] - interrupted, 0)
    # 5: no GPU test was found, which a dry run of a few files may meet
    passed = code in (0, 5) and not counts["failed"]
    seconds = round(time.monotonic() - started, 1)
    return {
        **counts,
        "exit_code": code,
        "interrupted": interrupted,
        "seconds": seconds,
        "passed_all": passed,
    }


def _interrupt(child: subprocess.Popen[bytes]) -> int:
    """End pytest as Ctrl-C does, so that it still reports what it had run."""
    print("gpu_check: out of time, the other tests are not run", flush=True)
    child.send_signal(signal.SIGINT)
    try:
        return child.wait(timeout=20)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _read_junit(path: Path) -> dict[str, Any]:
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    if not path.exists():
        return counts
    for case in ET.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
            counts["failures"].append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts


def run_benches(report: Report, deadline: float, *, dry_run: bool) -> None:
    """Check and time every op at every token count, until the deadline."""
    device = torch.device("cpu" if dry_run else "cuda")
    dtype = torch.float32 if dry_run else torch.bfloat16
    config, tokens = (TOY, (1, 5, 70)) if dry_run else (PUBLIC_CONFIGS[MODEL], TOKENS)
    torch.manual_seed(0)
    timer = Timer(device)
    small = {"copy_bytes": 2**20, "matmul_size": 64} if dry_run else {}
    roof = measure_roof(timer, device, dtype, **small)
    report.roof = {**asdict(roof), "dtype": str(dtype), "overhead_us": timer.overhead_us}
    print(f"\nroof: copy {roof.copy_gb_s:.0f} GB/s, matmul {roof.matmul_tflop_s:.0f} TFLOP/s")
    print(f"an empty event pair takes {timer.overhead_us:.1f} us; times below include it")
    print(_HEAD)
    for op in BUILDERS:
        for count in tokens:
            sizes = Sizes(config, count, dtype, device, context=100 if dry_run else 1024)
            result = run_case(op, sizes, roof, timer, out_of_time=time.monotonic() > deadline)
            result["model"] = "toy" if dry_run else MODEL
            report.results.append(result)
            report.save()
            print(_row(result), flush=True)
            if not dry_run:
                gc.collect()
                torch.cuda.empty_cache()


def run_case(
    op: str, sizes: Sizes, roof: Roof, timer: Timer, *, out_of_time: bool = False
) -> dict[str, Any]:
    """One result of the schema, but for its model. A wrong op is not timed."""
    result: dict[str, Any] = {
        "op": op,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "tokens": sizes.tokens,
        "bytes": 0,
        "flops": 0,
        "status": "skipped",
        "detail": "out of time",
        "deviation": None,
    }
    if out_of_time:
        return result
    # whatever one op raises, the others are still worth their time on the machine
    try:
        case = build(op, sizes)
        deviation = case.deviation()
        result |= {"bytes": case.bytes, "flops": case.flops}
        result["deviation"] = deviation if math.isfinite(deviation) else None
        if not deviation <= case.tolerance:
            detail = f"deviates by {deviation:.3g}, want at most {case.tolerance:.3g}"
            return result | {"status": "wrong", "detail": detail}
        timing = timer.measure(case.run)
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        return result | {"status": "error", "detail": detail[:500]}
    floor = roof.floor_us(case.bytes, case.flops)
    figures = {
        **asdict(timing),
        "gb_s": case.bytes / timing.median_us / 1e3,
        "tflop_s": case.flops / timing.median_us / 1e6,
        "floor_us": floor,
        "percent_of_roof": 100 * floor / timing.median_us,
    }
    bound = roof.bound_by(case.bytes, case.flops)
    return result | {"status": "ok", "detail": f"{bound}-bound"} | figures


def _row(result: dict[str, Any]) -> str:
    head = f"{result['op']:20} {result['tokens']:6}"
    if result["status"] != "ok":
        return f"{head} {result['status']}: {result['detail']}"
    spread = f"{result['p20_us']:.1f}-{result['p80_us']:.1f}"
    return (
        f"{head} {result['median_us']:9.1f} {spread:>15} {result['gb_s']:7.0f} "
        f"{result['tflop_s']:8.1f} {result['percent_of_roof']:7.1f}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="GPU tests and quick benches, one JSON.")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder, made if absent")
    parser.add_argument("--minutes", type=float, default=8.5, help="stop after so long")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="folder or file")
    parser.add_argument("--commit", help="where the checkout has no git folder")
    parser.add_argument("--dry-run", action="store_true", help="CPU, toy shapes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
