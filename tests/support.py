"""What several tests share: child processes that see this checkout, installed or not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["ROOT", "child_environment"]

ROOT = Path(__file__).resolve().parents[1]
# the parent's choices for its own kernels, and what could pull in modules by itself
_UNWANTED = ("TRITON_INTERPRET", "PYTHONSTARTUP", "COVERAGE_PROCESS_START")


def child_environment(**extra: str) -> dict[str, str]:
    """The environment of a child Python that imports this checkout from any folder."""
    kept = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    kept["OMP_NUM_THREADS"] = "1"
    return {**kept, **extra}


def python_lines(code: str, **extra: str) -> list[str]:
    """Run ``code`` in a child Python; its output by lines."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(**extra), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
