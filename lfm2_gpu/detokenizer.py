"""Streams of token ids to text, and stop strings in that text. Knows no tokenizer and no request.

Everything here takes time linear in what is pushed, whatever the tokens and however they are cut.
"""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

__all__ = ["ByteDetokenizer", "IncrementalDetokenizer", "StopChecker", "WindowDetokenizer"]


class IncrementalDetokenizer(Protocol):
    """Text of one generated sequence, piece by piece.

    It is given generated ids only, so a piece never holds text of the prompt. A character that is
    not complete yet is held back.
    """

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these ids complete."""

    def flush(self) -> str:
        """What was held back, when no more ids will come."""


class ByteDetokenizer:
    """For byte-level vocabularies: every token is a run of bytes and UTF-8 is decoded in order.

    The pieces joined are the text of all ids, for any cut. U+FFFD stands for bytes that can never
    become a character, at once, and for an unfinished character at `flush`.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return self._utf8.decode(b"".join(map(self._token_bytes, token_ids)))

    def flush(self) -> str:
        """U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For any other vocabulary: the ids of the last piece are decoded with and without the new.

    A text that ends in U+FFFD may be an unfinished character and is held back until ``WINDOW`` ids
    wait: a character has at most four bytes, so by then the bytes are wrong for good.
    """

    WINDOW = 8

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return "".join(map(self._push, token_ids))

    def _push(self, token_id: int) -> str:
        self._waiting.append(token_id)
        delta = self._delta()
        if delta.endswith("\ufffd") and len(self._waiting) < self.WINDOW:
            return ""
        # the window begins where a piece did, so never inside a character; an id without text, such
        # as a skipped special token, leaves it as it is
        self._shown = self._waiting if delta else self._shown
        self._waiting = []
        return delta

    def _delta(self) -> str:
        return self._decode(self._shown + self._waiting)[len(self._decode(self._shown)) :]

    def flush(self) -> str:
        """What was held back."""
        delta, self._waiting = self._delta() if self._waiting else "", []
        return delta


class StopChecker:
    """Finds the first stop string in a stream of text, across the borders of its pieces.

    The text ends at the first character that completes a stop string; if it completes several, the
    longest counts. This does not depend on how the text was cut. Text that may be the beginning of
    a stop string is held back. Text that must not be searched (before ``min_tokens``) is simply not
    pushed.

    Matching is Aho and Corasick's automaton (https://doi.org/10.1145/360825.360855): one state per
    prefix of a stop string, so the state says how much to hold back.

    Attributes:
        matched: The stop string that ended the text, or ``None``.
    """

    def __init__(self, stop: Sequence[str], *, include_stop_str_in_output: bool = False) -> None:
        if not stop or "" in stop:
            raise ValueError(f"StopChecker: stop is {stop!r}, want non-empty strings")
        self.matched: str | None = None
        self._include = include_stop_str_in_output
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._ends: list[str | None] = [None]
        for text in stop:
            self._add(text)
        self._fallback = self._link()
        # from the root, everything up to one of these characters can be skipped
        self._first = re.compile("[" + "".join(map(re.escape, self._next[0])) + "]")
        self._state = 0
        self._held = ""

    def _add(self, text: str) -> None:
        state = 0
        for char in text:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._ends.append(None)
            state = self._next[state][char]
        self._ends[state] = text

    def _link(self) -> list[int]:
        """For each state, the state of its longest proper suffix that is a prefix too."""
        fallback = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            if self._ends[state] is None:
                self._ends[state] = self._ends[fallback[state]]
            for char, child in self._next[state].items():
                back = fallback[state]
                while back and char not in self._next[back]:
                    back = fallback[back]
                fallback[child] = self._next[back].get(char, 0)
                queue.append(child)
        return fallback

    def push(self, text: str) -> str:
        """The text that is certain now; nothing more once ``matched`` is set."""
        if self.matched is not None:
            return ""
        start = len(self._held)
        held = self._held + text
        at, state = start, self._state
        while at < len(held):
            if not state:
                found = self._first.search(held, at)
                if found is None:
                    break
                at = found.start()
            char = held[at]
            while state and char not in self._next[state]:
                state = self._fallback[state]
            state = self._next[state].get(char, 0)
            at += 1
            self.matched = self._ends[state]
            if self.matched is not None:
                self._held = ""
                return held[: at if self._include else at - len(self.matched)]
        self._state = state
        keep = len(held) - self._depth[state]
        self._held = held[keep:]
        return held[:keep]

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        rest, self._held, self._state = self._held, "", 0
        return rest
