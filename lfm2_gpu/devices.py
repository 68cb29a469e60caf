"""Choose the device, and say in one sentence why a GPU that is there cannot be used.

Owns everything that is asked of the NVIDIA driver: its version, its GPUs, and what
``lfm2-gpu collect-env`` and the benchmarks record of a machine.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2_gpu.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

__all__ = ["Probe", "environment", "nvidia_smi", "probe", "problem", "select_device"]

MIN_CAPABILITY = (8, 0)
# the oldest driver branch that runs any toolkit of a CUDA major version (CUDA release notes,
# "minor version compatibility")
_OLDEST_DRIVER = {11: "450.80", 12: "525.60", 13: "580.65"}
_PROC_VERSION = Path("/proc/driver/nvidia/version")
_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "jinja2",
    "tqdm",
    "huggingface_hub",
    "transformers",
)
# none of these holds a secret
_VARIABLES = re.compile(r"(CUDA_|NVIDIA_|TRITON_|PYTORCH_|LFM2_|OMP_|HF_HOME$|HF_HUB_OFFLINE$)")


@dataclass(frozen=True, slots=True)
class Probe:
    """What the driver and torch say about GPUs.

    ``reason`` is torch's own warning where it finds none; ``name``, ``capability`` and ``archs``
    (what torch was compiled for) are set where it finds one.
    """

    driver: str | None
    torch: str
    cuda: str | None
    available: bool
    name: str = "an NVIDIA GPU"
    capability: tuple[int, int] | None = None
    archs: tuple[str, ...] = ()
    reason: str = ""
    hidden_by: str | None = None


def select_device(requested: str) -> tuple[torch.device, str]:
    """The device to run on, and the sentence that tells the user which and why.

    Args:
        requested: ``auto``, ``cuda`` or ``cpu``.

    Raises:
        InvalidRequest: Another name, or ``cuda`` where no GPU can be used.
    """
    import torch

    if requested not in ("auto", "cuda", "cpu"):
        raise InvalidRequest(f"device is {requested!r}, want auto, cuda or cpu", param="device")
    if requested == "cpu":
        return torch.device("cpu"), "running on the CPU, as asked"
    found = probe()
    trouble = problem(found)
    if trouble is None:
        major, minor = found.capability or MIN_CAPABILITY
        return torch.device("cuda"), (
            f"running on {found.name} (sm_{major}{minor}), driver {found.driver}, "
            f"torch {found.torch}"
        )
    if requested == "cuda":
        raise InvalidRequest(f"device is 'cuda', but {trouble}", param="device")
    return torch.device("cpu"), f"running on the CPU: {trouble}"


def problem(found: Probe) -> str | None:
    """Why no GPU can be used: driver, torch build and what is needed; ``None`` if one can be."""
    if not found.available:
        return _why_unavailable(found)
    assert found.capability is not None
    sm = "sm_{}{}".format(*found.capability)
    if found.capability < MIN_CAPABILITY:
        return f"{found.name} is {sm} and these kernels need sm_80 or newer"
    if not _compiled_for(found.capability, found.archs):
        return (
            f"{found.name} with driver {found.driver} is {sm} and torch {found.torch} is compiled "
            f"for {', '.join(found.archs)}; a torch compiled for {sm} is needed"
        )
    return None


def _why_unavailable(found: Probe) -> str:
    build = f"torch {found.torch}"
    if found.driver is None:
        return f"no NVIDIA driver was found ({build})"
    seen = f"{found.name} with driver {found.driver} is here"
    if found.cuda is None:
        return f"{seen} and {build} has no CUDA; a CUDA build of torch 2.11 to 2.13 is needed"
    build += f" (CUDA {found.cuda})"
    if found.hidden_by is not None:
        return f"{seen} and {found.hidden_by} hides it from {build}"
    oldest = _OLDEST_DRIVER.get(int(found.cuda.split(".")[0]))
    if oldest is not None and _numbers(found.driver) < _numbers(oldest):
        return (
            f"{seen} and {build} needs driver {oldest} or newer; "
            "update the driver or install a torch built for an older CUDA"
        )
    return f"{seen} and {build} cannot use it: {found.reason or 'torch gives no reason'}"


def probe() -> Probe:
    """Ask the driver and torch. Creates no CUDA context beyond torch's own availability check."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    gpus = nvidia_smi("name", "driver_version")
    base = Probe(
        driver=_proc_driver() or (gpus[0]["driver_version"] if gpus else None),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        available=available,
    )
    if available:
        return replace(
            base,
            name=torch.cuda.get_device_name(0),
            capability=torch.cuda.get_device_capability(0),
            archs=tuple(torch.cuda.get_arch_list()),
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return replace(
        base,
        name=gpus[0]["name"] if gpus else base.name,
        # the first sentence; the rest is an address to read more at
        reason=str(caught[0].message).split("(")[0].strip() if caught else "",
        hidden_by=f"CUDA_VISIBLE_DEVICES={visible!r}" if visible in ("", "-1") else None,
    )


def nvidia_smi(*fields: str) -> list[dict[str, str]]:
    """One dict per GPU with these query fields of nvidia-smi; empty where it does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def environment() -> dict[str, str]:
    """What a bug report needs: versions, machine, GPUs, variables, and the device chosen."""
    from lfm2_gpu import __version__

    facts = {
        "lfm2-gpu": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": f"{_cpu_name()}, {os.cpu_count()} logical cores",
    }
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    if facts["torch"] != "not installed":
        # a torch that does not import is just what a bug report is about
        try:
            import torch

            facts["torch CUDA build"] = torch.version.cuda or "none"
            facts["device"] = select_device("auto")[1]
        except (ImportError, OSError) as error:
            facts["device"] = f"torch does not import: {error}"
    facts["driver"] = _proc_driver() or "none in /proc"
    fields = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
    for index, gpu in enumerate(nvidia_smi(*fields)):
        facts[f"gpu {index}"] = ", ".join(f"{k} {v}" for k, v in gpu.items())
    facts.update({k: v for k, v in sorted(os.environ.items()) if _VARIABLES.match(k)})
    return facts


def _proc_driver() -> str | None:
    try:
        match = re.search(r"Module.*?\s(\d+(?:\.\d+)+)\s", _PROC_VERSION.read_text())
    except OSError:
        return None
    return match.group(1) if match else None


def _cpu_name() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1) if match else platform.machine()


def _compiled_for(capability: tuple[int, int], archs: tuple[str, ...]) -> bool:
    """Whether machine code or PTX in ``archs`` (``sm_90a``, ``compute_90``) runs on the GPU.

    Machine code runs on its own major version from its minor on, PTX on anything newer.
    """
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if match is None:
            continue
        kind, compiled = match[1], (int(match[2]), int(match[3]))
        if match[4] == "a":
            runs = compiled == capability
        elif kind == "compute":
            runs = compiled <= capability
        else:
            runs = compiled[0] == capability[0] and compiled <= capability
        if runs:
            return True
    return not archs


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
