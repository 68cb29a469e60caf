"""process_logits and update_seen against the reference, to the bit, and their error contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lfm2_kernels import reference
from lfm2_kernels.penalties import process_logits, update_seen

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def state(rows: int, width: int, vocab_size: int, device: torch.device) -> dict[str, Any]:
    """Arguments of ``process_logits`` but the logits: rows + 3 slots in random order."""
    slots, words = rows + 3, (width + 31) // 32

    def words_of(count: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (count, words)).int()

    counts = torch.randint(0, 4, (4, width)).int()
    bias = torch.randn(4, width)
    counts[0], bias[0] = 0, 0
    seen = words_of(slots)
    seen[0] = 0
    arguments = {
        "slots": torch.randperm(slots)[:rows].int(),
        "seen": seen,
        "repetition_penalty": torch.rand(slots) + 0.5,
        "dense_rows": torch.randint(0, 4, (slots,)).int(),
        "counts": counts,
        "logit_bias": bias,
        "presence_penalty": torch.randn(slots),
        "frequency_penalty": torch.randn(slots),
        "mask": words_of(2),
        "mask_rows": torch.randint(-1, 2, (rows,)).int(),
    }
    tensors = {name: x.to(device) for name, x in arguments.items()}
    return {"vocab_size": vocab_size, **tensors}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "vocab_size"), [(1, 1, 1), (3, 100, 97), (5, 2048, 2000), (2, 2081, 2081)]
)
def test_process_logits(
    rows: int, width: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = state(rows, width, vocab_size, device)
    wide = torch.full((rows, width + 2), torch.nan, device=device).to(dtype)
    logits = wide[:, :width]
    logits.copy_(4 * torch.randn(rows, width))
    want = reference.process_logits(logits, **arguments)
    out = torch.full((rows, width + 1), torch.nan, device=device)[:, :width]
    assert process_logits(logits, **arguments, out=out) is out
    # the same operations in the same order, each rounded once
    assert torch.equal(out, want)
    assert (out[:, vocab_size:] == -torch.inf).all()
    if dtype == torch.float32:
        assert process_logits(logits, **arguments, out=logits) is logits
        assert torch.equal(logits, want)


def test_defaults_change_nothing(device: torch.device) -> None:
    arguments = state(4, 70, 70, device)
    arguments["repetition_penalty"].fill_(1)
    arguments["mask_rows"].fill_(-1)
    for name in ("dense_rows", "presence_penalty", "frequency_penalty"):
        arguments[name].zero_()
    logits = torch.randn(4, 70, device=device)
    assert torch.equal(process_logits(logits, **arguments), logits)


def test_dummy_rows_are_harmless(device: torch.device) -> None:
    # slot 0 is never admitted: its parameters are zero, a repetition penalty of zero included
    arguments = state(2, 40, 40, device)
    arguments["slots"].zero_()
    arguments["mask_rows"].fill_(-1)
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "dense_rows"):
        arguments[name][0] = 0
    logits = torch.randn(2, 40, device=device)
    assert torch.equal(process_logits(logits, **arguments), logits)


def test_no_rows(device: torch.device) -> None:
    arguments = state(0, 40, 40, device)
    assert process_logits(torch.zeros(0, 40, device=device), **arguments).shape == (0, 40)


@pytest.mark.parametrize("rows", [0, 1, 7, 130])
def test_update_seen(rows: int, device: torch.device) -> None:
    arguments = state(rows, 100, 100, device)
    slots = arguments["slots"]
    slots[::5] = 0
    positions = torch.randint(-1, 4, (rows,), dtype=torch.int32, device=device)
    tokens = torch.randint(0, 100, (rows,), dtype=torch.int32, device=device)
    # bit 31 is the sign
    tokens[1::4] = 31
    # a slot with a dense row shares it with no other
    dense_rows = torch.zeros_like(arguments["dense_rows"])
    for row, slot in enumerate(slots[slots > 0][:3].tolist()):
        dense_rows[slot] = row + 1
    seen, counts = arguments["seen"], arguments["counts"]
    want_seen, want_counts = seen.clone(), counts.clone()
    options = {"slots": slots, "positions": positions, "dense_rows": dense_rows}
    reference.update_seen(tokens, want_seen, want_counts, **options)
    update_seen(tokens, seen, counts, **options)
    assert torch.equal(seen, want_seen)
    assert torch.equal(counts, want_counts)
    assert not counts[0].any()
    assert not seen[0].any()


def test_update_seen_sets_one_bit_and_one_count(device: torch.device) -> None:
    seen = torch.zeros(3, 2, dtype=torch.int32, device=device)
    counts = torch.zeros(2, 64, dtype=torch.int32, device=device)
    column = {"dtype": torch.int32, "device": device}
    tokens = torch.tensor([35, 31, 4], **column)
    update_seen(
        tokens,
        seen,
        counts,
        slots=torch.tensor([2, 1, 0], **column),
        positions=torch.tensor([5, 6, 7], **column),
        dense_rows=torch.tensor([0, 0, 1], **column),
    )
    assert seen.tolist() == [[0, 0], [-(2**31), 0], [0, 8]]
    assert counts.nonzero().tolist() == [[1, 35]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(40)}, ValueError, r"logits is \[40\], want \[R, V\]"),
        ({"logits": torch.zeros(40, 2).T}, ValueError, "logits has strides"),
        ({"vocab_size": 41}, ValueError, "vocab_size is 41, want 1 to 40"),
        ({"slots": torch.zeros(2)}, TypeError, "slots is float32, want int32"),
        ({"seen": torch.zeros(5, 1, dtype=torch.int32)}, ValueError, r"want \[S, 2\]"),
        ({"counts": torch.zeros(2, 39, dtype=torch.int32)}, ValueError, r"want \[rows, 40\]"),
        (
            {"logit_bias": torch.zeros(3, 40)},
            ValueError,
            r"logit_bias is \[3, 40\], want \[4, 40\]",
        ),
        ({"presence_penalty": torch.zeros(4)}, ValueError, r"want \[5\]"),
        ({"repetition_penalty": torch.zeros(5).half()}, TypeError, "repetition_penalty is float16"),
        ({"mask": torch.zeros(1, 3, dtype=torch.int32)}, ValueError, r"want \[masks, 2\]"),
        ({"mask_rows": torch.zeros(3, dtype=torch.int32)}, ValueError, "mask_rows"),
        ({"out": torch.zeros(2, 40).half()}, TypeError, "out is float16, want float32"),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 40), **state(2, 40, 40, torch.device("cpu")), **change}
    with pytest.raises(error, match=f"process_logits: .*{message}"):
        process_logits(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": torch.zeros(2).long()}, TypeError, "tokens is int64, want int32"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, ValueError, r"want \[2\]"),
        ({"counts": torch.zeros(40, dtype=torch.int32)}, ValueError, r"want \[rows, V\]"),
        ({"dense_rows": torch.zeros(4, dtype=torch.int32)}, ValueError, r"want \[5\]"),
    ],
)
def test_update_seen_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = state(2, 40, 40, torch.device("cpu"))
    names = ("seen", "counts", "slots", "dense_rows")
    zeros = torch.zeros(2, dtype=torch.int32)
    arguments = {name: arguments[name] for name in names} | {"tokens": zeros, "positions": zeros}
    with pytest.raises(error, match=f"update_seen: .*{message}"):
        update_seen(**(arguments | change))
