"""The one JSON document that every benchmark writes, and the check that every reader relies on.

Version 1: ``schema``, ``version``, ``created`` (UTC), ``command``, ``machine`` (see ``machine``),
``roof`` (peaks of the same run, or null), ``tests`` (counts of a pytest run, or null) and
``results``, one per op and size: identity (``op``, ``model``, ``dtype``, ``tokens``), work
(``bytes``, ``flops``), outcome (``status``: ``ok``, ``wrong``, ``error`` or ``skipped``;
``detail``; ``deviation`` from the reference), and for ``ok`` the figures of ``FIGURES``.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

import lfm2_gpu
from lfm2_gpu.devices import nvidia_smi

__all__ = ["FIGURES", "NAME", "STATUSES", "VERSION", "document", "machine", "validate"]

NAME = "lfm2-gpu/bench"
VERSION = 1
STATUSES = ("ok", "wrong", "error", "skipped")
FIGURES = (
    "median_us",
    "p20_us",
    "p80_us",
    "samples",
    "gb_s",
    "tflop_s",
    "floor_us",
    "percent_of_roof",
)
_TOP: dict[str, type | tuple[type, ...]] = {
    "schema": str,
    "version": int,
    "created": str,
    "command": list,
    "machine": dict,
    "roof": (dict, type(None)),
    "tests": (dict, type(None)),
    "results": list,
}
_RESULT: dict[str, type | tuple[type, ...]] = {
    "op": str,
    "model": str,
    "dtype": str,
    "tokens": int,
    "bytes": int,
    "flops": int,
    "status": str,
    "detail": str,
    "deviation": (float, type(None)),
}
_GPU_FIELDS = (
    "name",
    "driver_version",
    "power.limit",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "temperature.gpu",
    "memory.total",
)


def machine(root: Path, commit: str | None = None) -> dict[str, Any]:
    """Device, driver, clocks, power limit, versions, commit and whether the tree was dirty.

    Args:
        root: The checkout.
        commit: Says it where the checkout has no git folder.
    """
    gpus = nvidia_smi(*_GPU_FIELDS)
    status = _git(root, "status", "--porcelain")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
        "gpu": gpus[0] if gpus else None,
        "cpus": cpus,
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "lfm2_gpu": lfm2_gpu.__version__,
        "commit": commit or _git(root, "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def document(
    *,
    command: Sequence[str],
    machine: Mapping[str, Any],
    roof: Mapping[str, Any] | None,
    tests: Mapping[str, Any] | None,
    results: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """A checked document of this moment.

    Raises:
        ValueError: A part does not fit the schema.
    """
    made = {
        "schema": NAME,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "machine": dict(machine),
        "roof": None if roof is None else dict(roof),
        "tests": None if tests is None else dict(tests),
        "results": [dict(result) for result in results],
    }
    validate(made)
    return made


def validate(made: Mapping[str, Any]) -> None:
    """Check a document.

    Raises:
        ValueError: The field at fault, what it is and what was wanted.
    """
    _check("document", made, _TOP)
    if made["schema"] != NAME or made["version"] != VERSION:
        raise ValueError(
            f"document is {made['schema']} version {made['version']}, want {NAME} {VERSION}"
        )
    for i, result in enumerate(made["results"]):
        where = f"results[{i}]"
        figures = FIGURES if result.get("status") == "ok" else ()
        wanted = _RESULT | dict.fromkeys(figures, (float, int))
        _check(where, result, wanted)
        if result["status"] not in STATUSES:
            raise ValueError(f"{where}.status is {result['status']!r}, want one of {STATUSES}")


def _check(
    where: str, value: Mapping[str, Any], wanted: Mapping[str, type | tuple[type, ...]]
) -> None:
    if set(value) != set(wanted):
        missing, unknown = set(wanted) - set(value), set(value) - set(wanted)
        raise ValueError(f"{where}: missing {sorted(missing)}, unknown {sorted(unknown)}")
    for name, kind in wanted.items():
        if not isinstance(value[name], kind):
            raise ValueError(f"{where}.{name} is {value[name]!r}, want {kind}")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
