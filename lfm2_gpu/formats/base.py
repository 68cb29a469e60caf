"""The Checkpoint protocol: named tensors in files, whatever the format. Knows files, not models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "TensorInfo"]


class TensorInfo(NamedTuple):
    """What a file says of a tensor. ``dtype`` is the format's own name, such as ``BF16``."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class Checkpoint(Protocol):
    """A checkpoint whose every header has been read and validated; no weight has been read."""

    @property
    def path(self) -> Path:
        """The directory or file that was opened."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json, parsed."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, parsed; empty if there is none."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold tensors."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, in the order in which the files hold them."""

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of a tensor, on the CPU, in the file's dtype.

        The memory is a private mapping of the file: it costs no more than the pages that are
        touched, and is given back with the tensor.

        Raises:
            ModelFileError: The file changed since it was opened.
        """

    def close(self) -> None:
        """Close the files. Tensors already handed out stay valid."""
