"""Free lists of KV pages and state slots. Pure Python: who holds what, never what is in it."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["IdPool"]


class IdPool:
    """Ids 1 to ``size``, each free or held once. Id 0 is the dummy and is never given out.

    A free that does not match a hold raises: two owners of one page or slot is how engines corrupt
    requests without a sound.
    """

    def __init__(self, size: int, kind: str) -> None:
        self.size = size
        self._kind = kind
        # popped from the end: low ids go out first
        self._free = list(range(size, 0, -1))
        self._held = bytearray(size + 1)

    @property
    def num_free(self) -> int:
        """Ids that could be allocated now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` ids, which the caller must have checked to be free."""
        assert count <= len(self._free), f"{count} {self._kind}s of {len(self._free)} free"
        ids = [self._free.pop() for _ in range(count)]
        for i in ids:
            self._held[i] = 1
        return ids

    def free(self, ids: Iterable[int]) -> None:
        """Give ids back, last one to be re-used first.

        Raises:
            ValueError: An id is not held.
        """
        for i in ids:
            if not 0 < i <= self.size or not self._held[i]:
                raise ValueError(f"{self._kind} {i} is freed but not held")
            self._held[i] = 0
            self._free.append(i)
