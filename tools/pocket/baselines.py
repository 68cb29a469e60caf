"""What simple models reach on the held-out text: the yardsticks for the pocket's bits per byte.

``python -m tools.pocket.baselines`` trains them on the training text and writes ``baselines.json``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
from pathlib import Path
from typing import NamedTuple

import numpy as np

ORDER = 5
ALPHABET = 256


class _Order(NamedTuple):
    """Counts of the n-grams of one order, keys sorted; contexts are the keys without last byte."""

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    types: np.ndarray
    discount: float


class KneserNey:
    """Interpolated Kneser-Ney over bytes, one discount per order, n1 / (n1 + 2 n2).

    Ney, Essen and Kneser 1994; the form is equation 4.40 of Chen and Goodman 1998. The lowest order
    is interpolated with the uniform distribution over 256 bytes.
    """

    def __init__(self, text: bytes, order: int = ORDER) -> None:
        """Count a text.

        Args:
            text: the training bytes.
            order: the longest n-gram.
        """
        data = np.frombuffer(text, np.uint8).astype(np.int64)
        self._orders: list[_Order] = []
        longer: np.ndarray | None = None
        for n in range(order, 0, -1):
            if longer is None:
                keys, counts = np.unique(_ngrams(data, n), return_counts=True)
            else:
                # a shorter n-gram counts the distinct bytes seen before it
                keys, counts = np.unique(longer % ALPHABET**n, return_counts=True)
            contexts, first = np.unique(keys // ALPHABET, return_index=True)
            totals = np.add.reduceat(counts, first)
            types = np.diff(np.append(first, len(keys)))
            n1, n2 = int((counts == 1).sum()), int((counts == 2).sum())
            discount = n1 / (n1 + 2 * n2) if n1 else 0.5
            self._orders.append(_Order(keys, counts, contexts, totals, types, discount))
            longer = keys
        self._orders.reverse()

    def bits(self, text: bytes) -> float:
        """Return the bits that the model spends on a text."""
        data = np.frombuffer(text, np.uint8).astype(np.int64)
        probability = np.full(len(data), 1 / ALPHABET)
        for n, table in enumerate(self._orders, 1):
            known = np.zeros(len(data))
            weight = np.ones(len(data))
            keys = _ngrams(data, n)
            here = slice(n - 1, None)
            found, at = _look_up(table.contexts, keys // ALPHABET)
            total = np.where(found, table.totals[at], 1)
            weight[here] = np.where(found, table.discount * table.types[at] / total, 1.0)
            seen, where = _look_up(table.keys, keys)
            known[here] = np.where(seen, (table.counts[where] - table.discount) / total, 0.0)
            probability = known + weight * probability
        return float(-np.log2(probability).sum())


def _ngrams(data: np.ndarray, n: int) -> np.ndarray:
    keys = np.zeros(len(data) - n + 1, np.int64)
    for i in range(n):
        keys = keys * ALPHABET + data[i : len(data) - n + 1 + i]
    return keys


def _look_up(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return keys[at] == wanted, at


def unigram_bits(train: bytes, text: bytes) -> float:
    """Return the bits of a text under the training text's byte frequencies, plus one each."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=ALPHABET) + 1
    rates = -np.log2(counts / counts.sum())
    return float(rates[np.frombuffer(text, np.uint8)].sum())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("work_pocket"))
    args = parser.parse_args()
    units = json.loads((args.work / "train_text.json").read_text("utf-8"))
    train = "\n".join(text for _, text in units).encode()
    held = json.loads((args.work / "held_out.json").read_text("utf-8"))
    model = KneserNey(train)
    # xz may look back into the training text; gzip's window is too short for that to matter
    alone = len(lzma.compress(train, preset=6))
    result: dict[str, dict[str, float]] = {}
    for source, texts in {**held, "all": [t for ts in held.values() for t in ts]}.items():
        text = ("\n".join(texts) + "\n").encode()
        with_train = len(lzma.compress(train + text, preset=6)) if source == "all" else None
        result[source] = {
            "bytes": len(text),
            "unigram": unigram_bits(train, text) / len(text),
            "kneser_ney_5": model.bits(text) / len(text),
            "gzip": 8 * len(gzip.compress(text, 9)) / len(text),
            "xz": 8 * len(lzma.compress(text, preset=9)) / len(text),
        }
        if with_train is not None:
            result[source]["xz_after_training_text"] = 8 * (with_train - alone) / len(text)
    (args.work / "baselines.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
