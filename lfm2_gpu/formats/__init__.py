"""Checkpoint formats: ``open_checkpoint`` tells them apart and refuses others by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lfm2_gpu.errors import ModelFileError
from lfm2_gpu.files import read_json
from lfm2_gpu.formats.base import Checkpoint, TensorInfo
from lfm2_gpu.formats.safetensors import INDEX_NAME, SINGLE_NAME, SafetensorsCheckpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint directory and validate every header in it; no weight is read.

    Raises:
        ModelFileError: There is no checkpoint at ``path``, it is damaged, or its format is not
            supported.
    """
    directory = Path(path)
    try:
        return _open(directory)
    except OSError as error:
        raise ModelFileError(f"{directory}: cannot be read: {error.strerror}") from error


def _open(directory: Path) -> Checkpoint:
    if directory.suffix == ".gguf":
        raise ModelFileError(f"{directory}: GGUF is not supported yet, want safetensors")
    if not directory.exists():
        raise ModelFileError(f"{directory}: does not exist")
    if not directory.is_dir():
        raise ModelFileError(f"{directory}: is a file, want the checkpoint's directory")
    if (directory / "adapter_config.json").exists():
        raise ModelFileError(
            f"{directory}: is a LoRA adapter. Merge it into its base model first "
            "(merge_and_unload of the peft package, then save_pretrained) and load the result"
        )
    if not any((directory / name).exists() for name in (SINGLE_NAME, INDEX_NAME)):
        raise ModelFileError(f"{directory}: {_other_formats(directory)}")
    if not (directory / "config.json").exists():
        raise ModelFileError(f"{directory}: config.json is missing")
    _refuse_quantised(read_json(directory / "config.json"), directory)
    return SafetensorsCheckpoint.open(directory)


def _other_formats(directory: Path) -> str:
    """Say what a directory without our files does hold."""
    wanted = f"want {SINGLE_NAME} or {INDEX_NAME}"
    names = sorted(entry.name for entry in directory.iterdir())
    for suffixes, what in (
        ((".gguf",), "holds GGUF, which is not supported yet"),
        (
            (".bin", ".pt", ".pth"),
            "holds pickled weights, which are never loaded: they can run code",
        ),
        ((".npz",), "holds NumPy weights, which are not supported"),
        ((".safetensors",), "holds safetensors under other names"),
    ):
        found = [name for name in names if name.endswith(suffixes)]
        if found:
            return f"{what} ({found[0]}); {wanted}"
    return f"holds no weights; {wanted}"


def _refuse_quantised(config: dict[str, Any], directory: Path) -> None:
    if isinstance(config.get("quantization"), dict):
        raise ModelFileError(f"{directory}: MLX-quantised weights are not supported yet")
    settings = config.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
        raise ModelFileError(
            f"{directory}: weights quantised by {str(method)[:40]} are not supported yet"
        )
