"""Safetensors, one file or an index of shards: headers validated by us, weights mapped on demand.

The header is checked before anything is mapped: bounded length, JSON without repeated keys, plain
tensor names, known dtypes, spans that agree with their shapes and tile the rest of the file
exactly. The library accepts repeated keys and odd names; we do not. Importing this loads no torch.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from lfm2_gpu.errors import ModelFileError
from lfm2_gpu.files import open_regular, parse_json, read_json
from lfm2_gpu.formats.base import TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["SafetensorsCheckpoint", "read_header"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# LFM2-24B's header has 7,610 tensors in about 1 MB
_MAX_HEADER_BYTES = 2**24
_MAX_DIMENSIONS = 8
# bytes per element, and torch's name
_DTYPES = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F32": (4, "float32"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
    "F64": (8, "float64"),
}
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,511}")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}\.safetensors")


class _Span(NamedTuple):
    info: TensorInfo
    shard: int
    offset: int


class SafetensorsCheckpoint:
    """A directory with config.json and safetensors files. Implements ``Checkpoint``."""

    def __init__(
        self, path: Path, shards: Sequence[str], weight_map: dict[str, str] | None
    ) -> None:
        """Open ``shards`` and validate their headers.

        Args:
            path: The directory.
            shards: File names in it, in the order to read them.
            weight_map: The index's claim which shard holds which tensor; ``None`` without an index.

        Raises:
            ModelFileError: A file is missing, damaged, or at odds with the index.
        """
        self.path = path
        self.config: dict[str, Any] = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        self.files = [path / name for name in shards]
        self._fds: list[int] = []
        self._sizes: list[int] = []
        self._spans: dict[str, _Span] = {}
        try:
            for file in self.files:
                self._open(file)
            if weight_map is not None:
                self._check_index(weight_map)
        except BaseException:
            self.close()
            raise
        self.tensors = {name: span.info for name, span in self._spans.items()}

    @classmethod
    def open(cls, path: Path) -> SafetensorsCheckpoint:
        """Open ``model.safetensors``, else the shards of its index, as transformers chooses."""
        if (path / SINGLE_NAME).exists():
            return cls(path, [SINGLE_NAME], None)
        weight_map = _read_index(path / INDEX_NAME)
        # in the order of first mention: the file that the embedding is in comes first
        return cls(path, list(dict.fromkeys(weight_map.values())), weight_map)

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of a tensor; see ``Checkpoint.tensor``."""
        import torch

        info, shard, offset = self._spans[name]
        if os.fstat(self._fds[shard]).st_size != self._sizes[shard]:
            # a mapping beyond the end of a truncated file would kill the process when read
            raise ModelFileError(f"{self.files[shard]}: changed while it was being read")
        shape = info.shape
        if shape:
            rows = max(shape[0], 1)
            stop = shape[0] if stop is None else min(stop, shape[0])
            shape = (max(stop - start, 0), *shape[1:])
            offset += start * (info.num_bytes // rows)
            num_bytes = shape[0] * (info.num_bytes // rows)
        else:
            num_bytes = info.num_bytes
        dtype: torch.dtype = getattr(torch, _DTYPES[info.dtype][1])
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        skew = offset % mmap.ALLOCATIONGRANULARITY
        # private and writable, since torch has no read-only tensors; nothing reaches the file
        view = mmap.mmap(
            self._fds[shard], skew + num_bytes, offset=offset - skew, access=mmap.ACCESS_COPY
        )
        flat = torch.frombuffer(view, dtype=torch.uint8, count=num_bytes, offset=skew)
        if skew % dtype.itemsize:
            # vector loads want aligned elements; a header of odd length moves them all
            flat = flat.clone()
        return flat.view(dtype).view(shape)

    def close(self) -> None:
        """Close the files. Tensors already handed out stay valid."""
        while self._fds:
            os.close(self._fds.pop())

    def _open(self, file: Path) -> None:
        fd = open_regular(file)
        self._fds.append(fd)
        size = os.fstat(fd).st_size
        self._sizes.append(size)
        for name, (info, offset) in read_header(fd, size, str(file)).items():
            if name in self._spans:
                other = self.files[self._spans[name].shard]
                raise ModelFileError(f"{file}: tensor {name} is also in {other}")
            self._spans[name] = _Span(info, len(self._fds) - 1, offset)

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = self.path / INDEX_NAME
        for name, shard in weight_map.items():
            span = self._spans.get(name)
            if span is None or self.files[span.shard].name != shard:
                raise ModelFileError(f"{index}: tensor {name} is not in {shard}")
        for name, span in self._spans.items():
            if name not in weight_map:
                raise ModelFileError(
                    f"{self.files[span.shard]}: tensor {name} is not in {INDEX_NAME}"
                )


def read_header(fd: int, size: int, source: str) -> dict[str, tuple[TensorInfo, int]]:
    """Read and validate one file's header.

    Args:
        fd: The open file; its position does not matter.
        size: The file's size in bytes.
        source: The file's name, for errors.

    Returns:
        Each tensor's description and the file offset of its first byte, in file order.

    Raises:
        ModelFileError: The header breaks a rule of the format; the message names the tensor.
    """
    if size < 8:
        raise ModelFileError(f"{source}: is truncated: {size} bytes, want a header")
    length = int.from_bytes(_read(fd, 8, 0, source), "little")
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise ModelFileError(f"{source}: header is {length} bytes, want 2 to {_MAX_HEADER_BYTES}")
    if length > size - 8:
        raise ModelFileError(
            f"{source}: is truncated: {size} bytes, want {length + 8} for the header"
        )
    raw = _read(fd, length, 8, source)
    if raw[:1] != b"{":
        raise ModelFileError(f"{source}: header starts with {raw[:1]!r}, want '{{'")
    entries = parse_json(raw, f"{source}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelFileError(f"{source}: __metadata__ is not a map of strings")
    if not entries:
        raise ModelFileError(f"{source}: holds no tensors")
    spans = [_entry(name, entry, source) for name, entry in entries.items()]
    spans.sort(key=lambda span: (span[2], span[3]))
    _check_tiling(spans, size - 8 - length, source)
    return {name: (info, 8 + length + begin) for name, info, begin, _ in spans}


def _entry(name: str, entry: Any, source: str) -> tuple[str, TensorInfo, int, int]:
    def refuse(what: str) -> NoReturn:
        raise ModelFileError(f"{source}: tensor {name}: {what}")

    if not _TENSOR_NAME.fullmatch(name) or ".." in name:
        raise ModelFileError(f"{source}: tensor name {name[:80]!r} is not a plain dotted name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse("entry is not an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        refuse(f"dtype is {repr(dtype)[:40]}, want one of {', '.join(_DTYPES)}")
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        refuse(f"shape is {repr(shape)[:80]}, want at most {_MAX_DIMENSIONS} sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(f"data_offsets is {repr(offsets)[:80]}, want [begin, end]")
    num_bytes = _DTYPES[dtype][0]
    for dimension in shape:
        num_bytes *= dimension
    begin, end = offsets
    if end - begin != num_bytes:
        refuse(f"spans {end - begin} bytes, want {num_bytes} for {dtype} {shape}")
    return name, TensorInfo(dtype, tuple(shape), num_bytes), begin, end


def _check_tiling(spans: list[tuple[str, TensorInfo, int, int]], size: int, source: str) -> None:
    at = 0
    for name, _, begin, end in spans:
        if begin != at:
            what = "overlaps the one before it" if begin < at else "leaves a hole before it"
            raise ModelFileError(f"{source}: tensor {name} {what}: begins at {begin}, want {at}")
        if end > size:
            raise ModelFileError(
                f"{source}: is truncated: tensor {name} ends at {end}, the data at {size}"
            )
        at = end
    if at != size:
        raise ModelFileError(f"{source}: has {size - at} bytes after its last tensor, want none")


def _read_index(file: Path) -> dict[str, str]:
    weight_map = read_json(file, max_bytes=_MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{file}: weight_map is missing or empty")
    for name, shard in weight_map.items():
        # a name, never a path: it cannot leave the directory
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard) or ".." in shard:
            raise ModelFileError(
                f"{file}: tensor {name[:80]!r} is in {repr(shard)[:80]}, want the plain name of a "
                ".safetensors file"
            )
        if not (file.parent / shard).exists():
            raise ModelFileError(f"{file}: shard {shard} is missing")
    return weight_map


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _read(fd: int, count: int, offset: int, source: str) -> bytes:
    data = os.pread(fd, count, offset)
    if len(data) != count:
        raise ModelFileError(f"{source}: is truncated: {len(data)} of {count} bytes at {offset}")
    return data
