"""Checkpoints that ship inside the package, by name: ``pocket``."""

from __future__ import annotations

from pathlib import Path

from lfm2_gpu.errors import ModelFileError

__all__ = ["NAMES", "path"]

NAMES = ("pocket",)


def path(name: str) -> Path:
    """The folder of an embedded checkpoint.

    Raises:
        ModelFileError: There is none of this name.
    """
    folder = Path(__file__).parent / name
    if name not in NAMES or not folder.is_dir():
        present = ", ".join(n for n in NAMES if (Path(__file__).parent / n).is_dir()) or "none"
        raise ModelFileError(f"no embedded model {name!r}; present: {present}")
    return folder
