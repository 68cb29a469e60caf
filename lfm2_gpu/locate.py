"""A model's name to its folder: an embedded checkpoint, a path, or a hub id."""

from __future__ import annotations

from pathlib import Path

from lfm2_gpu import assets
from lfm2_gpu.errors import InvalidRequest
from lfm2_gpu.formats.hub import resolve

__all__ = ["locate"]


def locate(model: str, *, revision: str | None = None) -> Path:
    """The folder of ``model``; a path of an embedded model's name wins over it.

    Raises:
        InvalidRequest: ``revision`` was given for what has none.
        MissingExtra: A download is needed and huggingface_hub is not installed.
        ModelFileError: There is no such checkpoint.
    """
    if model not in assets.NAMES or Path(model).exists():
        return resolve(model, revision=revision)
    if revision is not None:
        raise InvalidRequest(
            f"revision is {revision!r}, want none: {model} is embedded", param="revision"
        )
    return assets.path(model)
