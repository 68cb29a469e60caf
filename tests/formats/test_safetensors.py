"""Safetensors: what is read equals what was written, and no hostile file gets past its header."""

from __future__ import annotations

import json
import mmap
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lfm2_gpu.errors import ModelFileError
from lfm2_gpu.formats import open_checkpoint
from lfm2_gpu.formats.base import Checkpoint
from lfm2_gpu.formats.safetensors import SafetensorsCheckpoint, read_header

INDEX = "model.safetensors.index.json"


def entry(shape: list[int], begin: int, dtype: str = "F32", size: int = 4) -> dict[str, Any]:
    end = begin + size * int(torch.Size(shape).numel())
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pack(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def folder(path: Path, raw: bytes) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(raw)
    return path


def shards(path: Path, tensors: dict[str, dict[str, torch.Tensor]], **weight_map: str) -> Path:
    (path / "config.json").write_text("{}")
    named = {name.replace("_", "-"): held for name, held in tensors.items()}
    for name, held in named.items():
        save_file(held, path / f"{name}.safetensors")
    index = {t: f"{name}.safetensors" for name, held in named.items() for t in held}
    (path / INDEX).write_text(json.dumps({"weight_map": {**index, **weight_map}}))
    return path


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_what_the_library_wrote(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randint(0, 2, (7, 5)).to(dtype)
    held = {"a.weight": values, "b": values[:3].clone(), "scalar": values[0, 0].clone()}
    (tmp_path / "config.json").write_text('{"x": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == {"x": 1}
    assert checkpoint.generation_config == {"eos_token_id": 7}
    assert checkpoint.files == [tmp_path / "model.safetensors"]
    assert set(checkpoint.tensors) == set(held)
    for name, value in held.items():
        found = checkpoint.tensor(name)
        assert found.dtype == dtype
        assert found.shape == value.shape
        assert same_bytes(found, value)
    rows = checkpoint.tensor("a.weight", 2, 5)
    checkpoint.close()
    # a mapping outlives the descriptor it was made from
    assert same_bytes(rows, values[2:5])


def test_rows_beyond_the_end_are_none(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0).view(3, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensor("a", 2, 9).tolist() == [[4.0, 5.0]]
    assert checkpoint.tensor("a", 3).shape == (0, 2)


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_misaligned_data_is_read_right(tmp_path: Path, shift: int) -> None:
    values = torch.arange(600, dtype=torch.float32)
    header = json.dumps({"a": entry([600], 0)}).encode()
    header += b" " * (-len(header) % 8 + shift)
    checkpoint = open_checkpoint(folder(tmp_path, pack(header, values.numpy().tobytes())))
    found = checkpoint.tensor("a")
    assert torch.equal(found, values)
    assert found.data_ptr() % 4 == 0


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    folder(tmp_path, pack({"a": entry([4], 0)}, bytes(16)))
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.tensor("a").fill_(1)
    assert checkpoint.tensor("a").tolist() == [0, 0, 0, 0]


def test_zero_sized_tensors_are_legal(tmp_path: Path) -> None:
    raw = pack({"none": entry([0, 3], 0), "some": entry([1], 0)}, bytes(4))
    checkpoint = open_checkpoint(folder(tmp_path, raw))
    assert checkpoint.tensor("none").shape == (0, 3)


GOOD = {"a": entry([2, 2], 0), "b": entry([3], 16)}
GOOD_RAW = pack(GOOD, bytes(28))

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "is truncated: 0 bytes"),
    "seven bytes": (b"\0" * 7, "is truncated: 7 bytes"),
    "no header": (pack(b"", length=0), "header is 0 bytes"),
    "huge length": (pack(b"{}", length=2**63), "header is 9223372036854775808 bytes"),
    "101 MB length": (pack(b"{}", length=101 * 2**20), "header is 105906176 bytes"),
    "length past the end": (pack(b"{}", length=4000), "is truncated: 10 bytes"),
    "not utf-8": (pack(b'{"\xff": 1}'), "is not JSON"),
    "not an object": (pack(b"[1, 2]"), "header starts with"),
    "leading space": (pack(b' {"a": 1}'), "header starts with"),
    "bottomless": (pack(b'{"a":' * 5000), "is not JSON"),
    "no tensors": (pack({"__metadata__": {"a": "b"}}), "holds no tensors"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}, **GOOD}, bytes(28)), "__metadata__"),
    "repeated name": (
        pack(b'{"a": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}, "a": 3}', b"0"),
        "key 'a' appears twice",
    ),
    "repeated field": (
        pack(b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [], "data_offsets": [0, 1]}}', b"0"),
        "key 'dtype' appears twice",
    ),
    "NUL in a name": (pack({"a\0b": entry([1], 0)}, bytes(4)), r"name 'a\\x00b' is not a plain"),
    "path as a name": (pack({"../../x": entry([1], 0)}, bytes(4)), "is not a plain dotted name"),
    "dots in a name": (pack({"a..b": entry([1], 0)}, bytes(4)), "is not a plain dotted name"),
    "empty name": (pack({"": entry([1], 0)}, bytes(4)), "is not a plain dotted name"),
    "long name": (pack({"n" * 5000: entry([1], 0)}, bytes(4)), "is not a plain dotted name"),
    "entry is a list": (pack({"a": [1]}), "tensor a: entry is not"),
    "missing field": (pack({"a": {"dtype": "F32", "shape": [1]}}), "tensor a: entry is not"),
    "extra field": (pack({"a": {**entry([1], 0), "x": 1}}, bytes(4)), "tensor a: entry is not"),
    "unknown dtype": (pack({"a": entry([1], 0, "F12")}, bytes(4)), "tensor a: dtype is 'F12'"),
    "sub-byte dtype": (pack({"a": entry([1], 0, "F4")}, bytes(4)), "tensor a: dtype is 'F4'"),
    "dtype is a list": (pack({"a": {**entry([1], 0), "dtype": []}}, bytes(4)), "dtype is"),
    "float in shape": (pack({"a": {**entry([1], 0), "shape": [1.0]}}, bytes(4)), "shape is"),
    "bool in shape": (pack({"a": {**entry([1], 0), "shape": [True]}}, bytes(4)), "shape is"),
    "negative size": (pack({"a": {**entry([1], 0), "shape": [-1]}}, bytes(4)), "shape is"),
    "nine dimensions": (pack({"a": entry([1] * 9, 0)}, bytes(4)), "shape is"),
    "size product overflows": (
        pack({"a": {**entry([1], 0), "shape": [2**62, 2**62]}}, bytes(4)),
        "spans 4 bytes, want",
    ),
    "begin after end": (
        pack({"a": {**entry([1], 0), "data_offsets": [4, 0]}}, bytes(4)),
        "data_offsets",
    ),
    "three offsets": (
        pack({"a": {**entry([1], 0), "data_offsets": [0, 4, 4]}}, bytes(4)),
        "data_offsets",
    ),
    "negative offset": (
        pack({"a": {**entry([1], 0), "data_offsets": [-4, 0]}}, bytes(4)),
        "data_offsets",
    ),
    "shape and span differ": (
        pack({"a": {**entry([2], 0), "data_offsets": [0, 4]}}, bytes(4)),
        r"tensor a: spans 4 bytes, want 8 for F32 \[2\]",
    ),
    "overlap": (
        pack({"a": entry([2], 0), "b": entry([2], 4)}, bytes(12)),
        "tensor b overlaps the one before it: begins at 4, want 8",
    ),
    "same span twice": (
        pack({"a": entry([2], 0), "b": entry([2], 0)}, bytes(8)),
        "overlaps",
    ),
    "hole": (
        pack({"a": entry([2], 0), "b": entry([2], 12)}, bytes(20)),
        "tensor b leaves a hole before it: begins at 12, want 8",
    ),
    "hole at the start": (pack({"a": entry([2], 4)}, bytes(12)), "tensor a leaves a hole"),
    "span past the end": (pack(GOOD, bytes(27)), "is truncated: tensor b ends at 28, the data"),
    "tail": (pack(GOOD, bytes(29)), "has 1 bytes after its last tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, name: str) -> None:
    raw, message = HOSTILE[name]
    with pytest.raises(ModelFileError, match=f"model.safetensors: .*{message}"):
        open_checkpoint(folder(tmp_path, raw))


def test_the_good_twin_of_the_hostile_headers_opens(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder(tmp_path, GOOD_RAW))
    assert {n: i.shape for n, i in checkpoint.tensors.items()} == {"a": (2, 2), "b": (3,)}


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for size in range(len(GOOD_RAW)):
        with pytest.raises(ModelFileError):
            open_checkpoint(folder(tmp_path, GOOD_RAW[:size]))


def test_flipped_bytes_are_refused_or_harmless(tmp_path: Path) -> None:
    rng = random.Random(0)
    file = tmp_path / "x"
    for _ in range(500):
        raw = bytearray(GOOD_RAW)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw) - 28)] = rng.randrange(256)
        file.write_bytes(raw)
        fd = os.open(file, os.O_RDONLY)
        try:
            spans = read_header(fd, len(raw), "x")
        except ModelFileError:
            continue
        finally:
            os.close(fd)
        assert sum(info.num_bytes for info, _ in spans.values()) == 28


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder(tmp_path, GOOD_RAW))
    os.truncate(tmp_path / "model.safetensors", 60)
    with pytest.raises(ModelFileError, match="changed while it was being read"):
        checkpoint.tensor("a")


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    a, b, c = torch.randn(3, 2), torch.randn(4), torch.randn(1)
    shards(tmp_path, {"one": {"a": a, "c": c}, "two": {"b": b}})
    checkpoint = open_checkpoint(tmp_path)
    assert [file.name for file in checkpoint.files] == ["one.safetensors", "two.safetensors"]
    for name, value in (("a", a), ("b", b), ("c", c)):
        assert torch.equal(checkpoint.tensor(name), value)


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    shards(tmp_path, {"one": {"a": torch.zeros(1)}})
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).tensor("a").tolist() == [1.0]


def test_shards_at_odds_with_the_index(tmp_path: Path) -> None:
    one, two = {"a": torch.zeros(1)}, {"b": torch.zeros(1)}

    def refused(message: str, **weight_map: str) -> None:
        shards(tmp_path, {"one": one, "two": two}, **weight_map)
        with pytest.raises(ModelFileError, match=message):
            open_checkpoint(tmp_path)

    refused("shard three.safetensors is missing", c="three.safetensors")
    refused("tensor c is not in one.safetensors", c="one.safetensors")
    refused("tensor b is not in one.safetensors", b="one.safetensors")
    one["c"] = two["c"] = torch.zeros(1)
    refused("two.safetensors: tensor c is also in .*one.safetensors")
    del one["c"], two["c"]
    shards(tmp_path, {"one": one, "two": two})
    index = {"a": "one.safetensors", "b": "two.safetensors"}
    save_file({"a": torch.zeros(1), "x": torch.zeros(1)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ModelFileError, match=r"one.safetensors: tensor x is not in"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        "sub/one.safetensors",
        "one\0.safetensors",
        "..\\one.safetensors",
        "..safetensors",
        "n" * 5000 + ".safetensors",
        "one.bin",
        "",
        7,
        None,
    ],
)
def test_the_index_cannot_name_a_path(tmp_path: Path, shard: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ModelFileError, match=r"tensor 'a' is in .*, want the plain name"):
        open_checkpoint(tmp_path)


def test_an_index_without_a_map(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ModelFileError, match="weight_map is missing or empty"):
        open_checkpoint(tmp_path)


def test_only_regular_files_are_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    for make in (os.mkfifo, os.mkdir):
        make(weights)
        with pytest.raises(ModelFileError, match="not a regular file"):
            open_checkpoint(tmp_path)
        weights.rmdir() if weights.is_dir() else weights.unlink()
    weights.symlink_to("/dev/zero")
    with pytest.raises(ModelFileError, match="not a regular file"):
        open_checkpoint(tmp_path)


def test_a_link_to_a_regular_file_is_followed(tmp_path: Path) -> None:
    # the hub's cache is made of such links
    folder(tmp_path / "blobs", GOOD_RAW)
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    assert set(open_checkpoint(tmp_path / "snapshot").tensors) == {"a", "b"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no weights"),
        ({"pytorch_model.bin": ""}, r"pickled weights, .* \(pytorch_model.bin\)"),
        ({"consolidated.pth": ""}, "pickled weights"),
        ({"LFM2-Q4_0.gguf": ""}, "GGUF, which is not supported yet"),
        ({"weights.npz": ""}, "NumPy weights"),
        ({"consolidated.safetensors": ""}, "safetensors under other names"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "LoRA adapter. Merge it"),
        ({"adapter_config.json": "{}", "model.safetensors": ""}, "LoRA adapter. Merge it"),
        ({"model.safetensors": ""}, "config.json is missing"),
        (
            {"model.safetensors": "", "config.json": '{"quantization": {"bits": 4}}'},
            "MLX-quantised weights are not supported yet",
        ),
        (
            {"model.safetensors": "", "config.json": '{"quantization_config": {}}'},
            "quantised by unknown are not supported yet",
        ),
        (
            {
                "model.safetensors": "",
                "config.json": '{"quantization_config": {"quant_method": "fp8"}}',
            },
            "quantised by fp8 are not supported yet",
        ),
    ],
)
def test_other_formats_are_refused_by_name(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(tmp_path)


def test_paths_that_are_no_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(ModelFileError, match="GGUF is not supported yet"):
        open_checkpoint(tmp_path / "model.gguf")
    (tmp_path / "x.safetensors").write_bytes(GOOD_RAW)
    with pytest.raises(ModelFileError, match="is a file, want the checkpoint's directory"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_a_dropped_tensor_is_unmapped(tmp_path: Path) -> None:
    size = 64 * 2**20
    header = json.dumps({"a": entry([size], 0, "U8", 1)}).encode()
    file = folder(tmp_path, pack(header)) / "model.safetensors"
    os.truncate(file, 8 + len(header) + size)
    checkpoint = open_checkpoint(tmp_path)

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(file))

    tensor = checkpoint.tensor("a")
    assert mapped() == 1
    rows = checkpoint.tensor("a", mmap.PAGESIZE, 2 * mmap.PAGESIZE)
    assert rows.numel() == mmap.PAGESIZE
    del tensor, rows
    assert mapped() == 0


def test_implements_the_protocol(tmp_path: Path) -> None:
    checkpoint: Checkpoint = SafetensorsCheckpoint.open(folder(tmp_path, GOOD_RAW))
    assert checkpoint.path == tmp_path
