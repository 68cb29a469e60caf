"""Every error that this package raises on purpose. Nothing else may escape the public API."""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "EngineError",
    "InvalidRequest",
    "Lfm2Error",
    "MissingExtra",
    "ModelFileError",
]


class Lfm2Error(Exception):
    """Base of all errors of this package."""


class InvalidRequest(Lfm2Error, ValueError):
    """A request or an option cannot be honoured. ``param`` names the field at fault."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelFileError(Lfm2Error, ValueError):
    """A file of a checkpoint is missing, damaged, or of a kind that is not supported."""


class CapacityError(Lfm2Error, RuntimeError):
    """The device has no room for what was asked; the message names the number that fits."""


class EngineError(Lfm2Error, RuntimeError):
    """A request failed inside the engine through no fault of its own."""


class MissingExtra(Lfm2Error, ImportError):
    """An optional dependency is not installed; the message is the pip line that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'lfm2-gpu[{extra}]'")
