"""Streaming text: characters are never split, stop strings are found wherever they are cut."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from lfm2_gpu.detokenizer import ByteDetokenizer, StopChecker, WindowDetokenizer

quick = settings(derandomize=True, deadline=None, max_examples=300, database=None)

# one to four bytes, a combining mark, a joined family, a flag, and U+FFFD as a character of its own
CHARS = ["a", " ", "ß", "é", "\u0301", "日", "本", "🌊", "👩‍👩‍👧", "🇨🇭", "\ufffd", "\x00", "\n"]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The bytes as tokens, cut at these places."""
    ends = sorted({0, len(data), *(p % (len(data) + 1) for p in places)})
    return [data[a:b] for a, b in itertools.pairwise(ends)]


def byte_detokenizer(tokens: list[bytes]) -> ByteDetokenizer:
    return ByteDetokenizer(tokens.__getitem__)


@quick
@given(st.lists(st.sampled_from(CHARS)), st.lists(st.integers(0, 200)))
def test_valid_text_arrives_whole_characters_at_a_time(chars: list[str], places: list[int]) -> None:
    text = "".join(chars)
    tokens = cut(text.encode(), places)
    stream = byte_detokenizer(tokens)
    seen, so_far = b"", ""
    for i, token in enumerate(tokens):
        seen += token
        so_far += stream.push([i])
        # everything complete has arrived, and nothing else
        assert so_far == seen.decode("utf-8", "ignore")
    assert stream.flush() == ""
    assert so_far == text


@quick
@given(st.lists(st.binary(max_size=6)), st.lists(st.integers(0, 40)))
def test_any_bytes_in_any_cut_give_one_text(tokens: list[bytes], places: list[int]) -> None:
    whole = b"".join(tokens).decode("utf-8", "replace")
    stream = byte_detokenizer(tokens)
    groups = sorted({0, len(tokens), *(p % (len(tokens) + 1) for p in places)})
    deltas = [stream.push(range(a, b)) for a, b in itertools.pairwise(groups)]
    assert "".join(deltas) + stream.flush() == whole


@pytest.mark.parametrize(
    ("tokens", "deltas", "rest"),
    [
        ([b"\xff", b"a"], ["\ufffd", "a"], ""),
        # the second byte cannot follow the first, which is therefore wrong at once
        ([b"\xe2", b"(", b"\xe6\x97"], ["", "\ufffd(", ""], "\ufffd"),
        # half of a surrogate pair is no character in UTF-8
        ([b"\xed", b"\xa0\x80"], ["", "\ufffd\ufffd\ufffd"], ""),
        ([b"\xf0\x9f", b"\x8c", b"\x8a!"], ["", "", "🌊!"], ""),
        ([b"\xf0\x9f\x8c"], [""], "\ufffd"),
    ],
)
def test_replacement_characters(tokens: list[bytes], deltas: list[str], rest: str) -> None:
    stream = byte_detokenizer(tokens)
    assert [stream.push([i]) for i in range(len(tokens))] == deltas
    assert stream.flush() == rest


@quick
@given(
    # U+FFFD itself looks unfinished to this one
    st.lists(st.sampled_from(sorted({*CHARS} - {"\ufffd"})), max_size=20),
    st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_window_detokenizer_follows_a_byte_fallback_decoder(
    chars: list[str], spelled: list[bool]
) -> None:
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokens = []
    for char, as_bytes in zip(chars, spelled, strict=False):
        tokens += [f"<0x{b:02X}>" for b in char.encode()] if as_bytes else [char]
    stream = WindowDetokenizer(lambda ids: str(decoder.decode([tokens[i] for i in ids])))
    deltas = [stream.push([i]) for i in range(len(tokens))]
    assert "".join(deltas) + stream.flush() == decoder.decode(tokens)
    assert all("\ufffd" not in delta for delta in deltas)


def test_window_detokenizer_keeps_spaces_and_gives_up_on_wrong_bytes() -> None:
    words = ["a", "b", "\ufffd", "c"]
    stream = WindowDetokenizer(lambda ids: " ".join(words[i] for i in ids))
    assert [stream.push([i]) for i in (0, 1)] == ["a", " b"]
    held = [stream.push([2]) for _ in range(WindowDetokenizer.WINDOW)]
    assert held[:-1] == [""] * (WindowDetokenizer.WINDOW - 1)
    assert held[-1] == " \ufffd" * WindowDetokenizer.WINDOW
    assert stream.push([3]) == " c"
    assert stream.push([2]) == ""
    assert stream.flush() == " \ufffd"


def first_stop(text: str, stop: list[str]) -> str | None:
    """The definition: the stop string that ends first, of several the longest."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[:end] + "|" + max(complete, key=len)
    return None


def held_back(text: str, stop: list[str]) -> int:
    return max(k for k in range(len(text) + 1) if any(s[:k] == text[len(text) - k :] for s in stop))


@settings(quick, max_examples=600)
@given(
    st.text("ab日", max_size=24),
    st.lists(st.text("ab日", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(0, 24)),
    st.booleans(),
)
def test_stop_strings_in_any_cut(
    text: str, stop: list[str], places: list[int], include: bool
) -> None:
    checker = StopChecker(stop, include_stop_str_in_output=include)
    ends = sorted({0, len(text), *(p % (len(text) + 1) for p in places)})
    expected = first_stop(text, stop)
    out = ""
    for start, end in itertools.pairwise(ends):
        out += checker.push(text[start:end])
        if checker.matched is None:
            # nothing is held back that cannot begin a stop string
            assert out == text[: end - held_back(text[:end], stop)]
    out += checker.flush()
    if expected is None:
        assert checker.matched is None
        assert out == text
    else:
        before, matched = expected.split("|")
        assert checker.matched == matched
        assert out == (before if include else before.removesuffix(matched))


def test_nothing_follows_a_stop_string() -> None:
    checker = StopChecker(["\n\n"])
    assert checker.push("one\n") == "one"
    assert checker.push("\ntwo\n\nthree") == ""
    assert checker.matched == "\n\n"
    assert checker.push("four") == ""
    assert checker.flush() == ""


@pytest.mark.parametrize("stop", [[], ["a", ""]])
def test_stop_checker_wants_strings(stop: list[str]) -> None:
    with pytest.raises(ValueError, match="StopChecker: stop is"):
        StopChecker(stop)


def stop_at_every_character(n: int) -> None:
    checker = StopChecker(["a" * 200 + "b", "a" * 100 + "c"])
    for _ in range(n):
        checker.push("a")


def stop_in_one_piece(n: int) -> None:
    StopChecker(["ab" * 100 + "c", "b" * 9]).push("ab" * (n // 2))


def bytes_of_unfinished_characters(n: int) -> None:
    stream = ByteDetokenizer(lambda i: b"\xf0\x9f\x8c\x8a"[i % 4 : i % 4 + 1])
    for i in range(n):
        stream.push([i])


def window_of_wrong_bytes(n: int) -> None:
    stream = WindowDetokenizer(lambda ids: "\ufffd" * len(ids))
    for i in range(n // 8):
        stream.push([i])


@pytest.mark.parametrize(
    "work",
    [
        stop_at_every_character,
        stop_in_one_piece,
        bytes_of_unfinished_characters,
        window_of_wrong_bytes,
    ],
)
def test_time_is_linear(work: Callable[[int], None]) -> None:
    def seconds(n: int) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            work(n)
            times.append(time.process_time() - start)
        return min(times)

    # 8 times the work takes 8 times as long if linear and 64 times if quadratic
    assert seconds(64_000) < 24 * max(seconds(8_000), 1e-3)
