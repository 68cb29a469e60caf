"""What each kernel takes from a GPU: registers, spills, shared memory, tensor-core instructions.

Nothing here needs a GPU. Host code runs on meta tensors under a driver that only names an
architecture, so the kernels that would be launched are compiled instead, by the ptxas that Triton
brings along.

    python -m lfm2_gpu.bench.resources [--arch 80,90] [--json FILE] CASES.py ...

compiles the cases of each file, a module with ``CASES: dict[str, Case]``, and prints one line per
compiled kernel. A case has ``run``, a function of the activation dtype, and ``dtypes``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"mma\.sync",
    "cp_async": r"cp\.async\.c[ag]",
    "tma": r"cp\.async\.bulk\.tensor",
    "vector_loads": r"ld\.global\S*\.v4|ld\.global\S*\.b128",
}
_LINE = "{:<32} {:>3} {:<8} {:<34} {:>5} {:>4} {:>6} {:>6} {:>6}  {}"


class Architecture(NamedTuple):
    """Limits of one streaming multiprocessor; every one here has 65,536 registers."""

    shared_per_block: int
    shared_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int

    def blocks(self, threads: int, registers: int, shared: int) -> int:
        """Blocks that fit one multiprocessor at once."""
        # registers are given out per warp in units of 256, shared memory has 1 KB of overhead
        per_warp = math.ceil(registers * 32 / 256) * 256
        return min(
            65536 // per_warp // math.ceil(threads / 32),
            self.shared_per_sm // (shared + 1024),
            self.threads_per_sm // threads,
            self.blocks_per_sm,
        )


# CUDA C++ programming guide, table of technical specifications per compute capability
ARCHITECTURES = {
    80: Architecture(163 * 1024, 164 * 1024, 2048, 32),
    89: Architecture(99 * 1024, 100 * 1024, 1536, 24),
    90: Architecture(227 * 1024, 228 * 1024, 2048, 32),
    100: Architecture(227 * 1024, 228 * 1024, 2048, 32),
    120: Architecture(99 * 1024, 100 * 1024, 1536, 24),
}


class KernelResources(NamedTuple):
    """One compiled variant of a kernel. Sizes in bytes, instructions counted in its PTX."""

    kernel: str
    arch: int
    digest: str
    num_warps: int
    registers: int
    spills: int
    shared: int
    blocks_per_sm: int
    instructions: dict[str, int]


class CaseResources(NamedTuple):
    """What one kernel of one case took, at one dtype."""

    case: str
    dtype: str
    resources: KernelResources


class _CompileOnlyDriver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # Triton caches kernels per device: a number that no GPU has, one for each architecture
        return 1000 + self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compiling_for(arch: int) -> Iterator[list[KernelResources]]:
    """Compile instead of launching; the list fills with one entry per launch.

    Args:
        arch: Compute capability, a key of ``ARCHITECTURES``.

    Raises:
        RuntimeError: Kernels are interpreted in this process and cannot be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("resources: TRITON_INTERPRET is set, want it unset to compile kernels")
    launched: list[KernelResources] = []
    measured: dict[str, KernelResources] = {}
    run, active = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in measured:
            measured[kernel.hash] = measure(kernel)
        launched.append(measured[kernel.hash])
        return kernel

    driver.set_active(_CompileOnlyDriver(arch))
    JITFunction.run = compile_only
    try:
        yield launched
    finally:
        JITFunction.run = run
        driver._active = active


def measure(kernel: Any) -> KernelResources:
    """Resources of a ``triton.compiler.CompiledKernel``."""
    meta, ptx = kernel.metadata, kernel.asm["ptx"]
    arch = meta.target.arch
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
    registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    # warp-specialised kernels have more threads than num_warps says
    declared = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    threads = int(declared[1]) if declared else 32 * meta.num_warps
    return KernelResources(
        kernel=meta.name,
        arch=arch,
        digest=kernel.hash,
        num_warps=meta.num_warps,
        registers=registers,
        # spilled registers live on the stack
        spills=_spills(ptx, arch) if stack else 0,
        shared=meta.shared,
        blocks_per_sm=ARCHITECTURES[arch].blocks(threads, registers, meta.shared),
        instructions={
            name: len(re.findall(pattern, ptx)) for name, pattern in _INSTRUCTIONS.items()
        },
    )


def _spills(ptx: str, arch: int) -> int:
    """Bytes of spill stores and loads."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        log = _tool(
            "ptxas-blackwell" if arch >= 100 else "ptxas",
            "-v",
            f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}",
            str(source),
            "-o",
            str(Path(folder, "kernel.cubin")),
        )
    return _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)


def _tool(name: str, *arguments: str) -> str:
    command = [str(_TOOLS / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"resources: {name} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"resources: no {pattern!r} in {text!r}")
    return int(found[1])


def format_table(rows: Sequence[CaseResources]) -> str:
    """One line per compiled variant, under the first case that launches it."""
    first = {row.resources.digest: row for row in reversed(rows)}
    ordered = sorted(first.values(), key=lambda r: (r.resources.kernel, r.resources.arch, r.case))
    heads = ("kernel", "sm", "dtype", "case", "warps", "regs", "spills", "shared", "CTA/SM")
    lines = [_LINE.format(*heads, "instructions")]
    for case, dtype, r in ordered:
        present = " ".join(f"{name}:{count}" for name, count in r.instructions.items() if count)
        numbers = (r.num_warps, r.registers, r.spills, r.shared, r.blocks_per_sm)
        lines.append(_LINE.format(r.kernel, r.arch, dtype, case, *numbers, present))
    return "\n".join(lines)


def compile_cases(
    files: Sequence[Path], archs: Sequence[int], processes: int
) -> list[CaseResources]:
    """Compile every case of ``files``: bfloat16 for all of ``archs``, other dtypes for sm_90."""
    jobs = [
        (file, name, dtype, arch)
        for file in files
        for name, case in _load(file).items()
        for dtype in case.dtypes
        for arch in archs
        if dtype == torch.bfloat16 or arch == 90
    ]
    # spawned: torch's threads do not survive a fork
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return list(itertools.chain(*pool.starmap(_compile_case, jobs, chunksize=1)))


def _compile_case(file: Path, name: str, dtype: torch.dtype, arch: int) -> list[CaseResources]:
    with compiling_for(arch) as launched:
        _load(file)[name].run(dtype)
    label = str(dtype).removeprefix("torch.")
    variants = {resources.digest: resources for resources in launched}
    return [CaseResources(name, label, resources) for resources in variants.values()]


def _load(file: Path) -> dict[str, Any]:
    # a case file imports its neighbours, as a script does
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    cases: dict[str, Any] = runpy.run_path(str(file))["CASES"]
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile the cases of the files named on the command line and print their table."""
    parser = argparse.ArgumentParser(prog="python -m lfm2_gpu.bench.resources")
    parser.add_argument("files", nargs="+", type=Path, help="modules with CASES")
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    archs = [int(arch) for arch in options.arch.split(",")]
    if unknown := sorted(set(archs) - set(ARCHITECTURES)):
        parser.error(f"--arch: {unknown} unknown, want some of {sorted(ARCHITECTURES)}")
    rows = compile_cases(options.files, archs, options.processes)
    sys.stdout.write(format_table(rows) + "\n")
    if options.json:
        records = [r._asdict() | {"resources": r.resources._asdict()} for r in rows]
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
