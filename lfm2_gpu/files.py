"""Bounded reads of files that nobody vouches for. Standard library only."""

from __future__ import annotations

import json
import os
import stat
from typing import Any, NoReturn

from lfm2_gpu.errors import ModelFileError

__all__ = ["open_regular", "parse_json", "read_json"]

_MAX_JSON_BYTES = 2**20


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor, never blocking on a pipe.

    Raises:
        ModelFileError: The path is missing, unreadable, or not a regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelFileError(f"{os.fspath(path)}: cannot be opened: {reason}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelFileError(f"{os.fspath(path)}: is not a regular file")
    return fd


def read_json(path: str | os.PathLike[str], *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a regular file of bounded size.

    Raises:
        ModelFileError: The file is missing, too large, not UTF-8, not an object, or repeats a key.
    """
    with open(open_regular(path), "rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ModelFileError(f"{os.fspath(path)}: is over {max_bytes} bytes")
    return parse_json(raw, str(os.fspath(path)))


def parse_json(raw: bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object strictly: no repeated key, no NaN, no bottomless nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ModelFileError(f"{source}: key {key[:80]!r} appears twice")
            seen[key] = value
        return seen

    def constant(name: str) -> NoReturn:
        raise ModelFileError(f"{source}: holds {name}, want JSON numbers")

    try:
        data = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=constant)
    except ModelFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{source}: is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelFileError(f"{source}: is {type(data).__name__}, want a JSON object")
    return data
