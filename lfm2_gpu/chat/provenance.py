"""Keeps text of a request from becoming a control token, whatever a template does with it.

A template may cut, trim, join and search the strings that it gets, so marks around them would not
survive, or would change what it prints. Instead the characters that control tokens begin and end
with (``<``, ``|``, ``>``) are replaced, one for one, by symbols that occur nowhere in the request.
Whatever the template does, a control token in its output then has its ends from the template's own
text. Afterwards the symbols become the old characters again, each in a segment that is not trusted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from lfm2_gpu.errors import InvalidRequest

__all__ = ["StandIns", "strings_in"]

# Byzantine musical symbols: one code point each, no letters, no spaces, and printable, so that
# repr() keeps them; then, for a request that uses all of those, the private use plane
_CANDIDATES = (range(0x1D000, 0x1D0F6), range(0xF0000, 0xFFFFE))


class StandIns:
    """Symbols that stand for the characters at the ends of control tokens in one request."""

    def __init__(self, edges: Collection[str], used: Collection[str]) -> None:
        free = (chr(code) for code in chain(*_CANDIDATES) if chr(code) not in used)
        try:
            self._hidden = {edge: next(free) for edge in sorted(edges)}
        except StopIteration:
            raise InvalidRequest(
                "messages use every character of a plane of Unicode, want text", param="messages"
            ) from None
        self._to_symbol = str.maketrans(self._hidden)
        self._to_edge = {ord(symbol): edge for edge, symbol in self._hidden.items()}
        self._symbols = re.compile(f"([{''.join(self._hidden.values())}]+)")

    @classmethod
    def for_request(
        cls, control_tokens: Iterable[str], request: object, template: str
    ) -> StandIns | None:
        """Stand-ins that occur neither in the request nor in the template.

        ``None`` if no string of the request has a character that would have to be replaced.
        """
        edges = set().union(*map(_edges, control_tokens))
        used = set().union(*strings_in(request))
        return None if used.isdisjoint(edges) else cls(edges, used | set(template))

    def hide(self, value: Any, keep: re.Pattern[str] | None = None) -> Any:
        """A copy with the characters replaced in every string, but not in matches of ``keep``."""
        if isinstance(value, str):
            if keep is None:
                return value.translate(self._to_symbol)
            parts = re.split(f"({keep.pattern})", value)
            parts[::2] = [part.translate(self._to_symbol) for part in parts[::2]]
            return "".join(parts)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item, keep) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item, keep) for item in value]
        return value

    def reveal(self, text: str) -> str:
        """The text with the old characters back."""
        return text.translate(self._to_edge)

    def segments(self, text: str) -> list[tuple[str, bool]]:
        """The revealed text in ``(text, trusted)`` pieces."""
        parts = self._symbols.split(text)
        pieces = ((self.reveal(part), not i % 2) for i, part in enumerate(parts))
        return [(part, trusted) for part, trusted in pieces if part]


def _edges(token: str) -> set[str]:
    """First and last character, and those next to them unless they are letters or digits."""
    return {
        token[0],
        token[-1],
        *(char for char in token[1:2] + token[-2:-1] if not char.isalnum()),
    }


def strings_in(value: object) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)
