"""A seeded share of the soak, so that it keeps working and finds what is easy to find."""

from __future__ import annotations

from collections import Counter

from soak import soak_scheduler


def test_soak_scheduler() -> None:
    totals: Counter[str] = Counter()
    for seed in range(15):
        totals += soak_scheduler(seed)
    # the traffic is of every kind
    for kind in ("requests", "tokens", "preemptions", "aborted"):
        assert totals[kind] > 15, kind
