"""A device that stores hashes where a GPU stores floats, and the oracle that needs no device.

Each position's KV cell chains on the cell before it, read back through the real page table; each
drawn token mixes the newest cell, one older cell, the conv ring and the slot's seed. A stale,
swapped or freed-too-early page or slot changes the text, and there is no tolerance to hide in.
"""

from __future__ import annotations

import numpy as np

from lfm2_gpu.engine.config import PAGE_SIZE, EngineConfig, pages_for
from lfm2_gpu.engine.request import Plan, Request

RING = 3
_POISON = 0xDEADBEEF


def mix(*values: int) -> int:
    h = 0x9E3779B97F4A7C15
    for value in values:
        h = ((h ^ (value & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 29
    return h


def draw(chain: int, older: int, conv: tuple[int, ...], seed: int, vocab: int) -> int:
    return mix(chain, older, *conv, seed) % vocab


class HashDevice:
    """Runs plans on hash-valued pools. Freed memory keeps its last owner's values, as on a GPU."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        slots = config.max_num_seqs + 1
        self.cells = [[_POISON] * PAGE_SIZE for _ in range(config.num_pages + 1)]
        self.ring = [[_POISON] * RING for _ in range(slots)]
        self.page_table = np.zeros((slots, pages_for(config.max_model_len)), np.int64)
        self.last_token = [0] * slots
        self.position = [0] * slots
        self.seed = [0] * slots

    def run(self, plan: Plan) -> np.ndarray:
        for slot, column, page in zip(
            plan.page_slots, plan.page_columns, plan.page_ids, strict=True
        ):
            self.page_table[slot, column] = page
        for request in plan.admitted:
            self.position[request.slot] = 0
            self.seed[request.slot] = mix(request.seed, request.index)
        tokens, at = [], 0
        for row, slot in enumerate(plan.slots.tolist()):
            length = int(plan.query_lens[row])
            ids = plan.token_ids[at : at + length].tolist()
            at += length
            for token in ids:
                self._compute(slot, self.last_token[slot] if token < 0 else token)
            if plan.sampling[row]:
                self.last_token[slot] = self._draw(slot)
                tokens.append(self.last_token[slot])
        return np.array(tokens, np.int32)

    def _cell(self, slot: int, position: int) -> int:
        page = self.page_table[slot, position // PAGE_SIZE]
        return self.cells[page][position % PAGE_SIZE]

    def _compute(self, slot: int, token: int) -> None:
        position = self.position[slot]
        before = self._cell(slot, position - 1) if position else 0
        page = self.page_table[slot, position // PAGE_SIZE]
        assert page > 0, "a token is written to the dummy page"
        self.cells[page][position % PAGE_SIZE] = mix(before, token, position)
        self.ring[slot][position % RING] = mix(token, position)
        self.position[slot] = position + 1

    def _draw(self, slot: int) -> int:
        last = self.position[slot] - 1
        older = mix(last) % (last + 1)
        conv = tuple(self.ring[slot][p % RING] for p in range(max(0, last - 2), last + 1))
        return draw(
            self._cell(slot, last),
            self._cell(slot, older),
            conv,
            self.seed[slot],
            self.config.vocab_size,
        )


def expected_output(request: Request, vocab: int, count: int) -> list[int]:
    """The first ``count`` tokens that ``request`` must produce, stops aside."""
    tokens, chain = list(request.prompt), [0]
    for position, token in enumerate(tokens):
        chain.append(mix(chain[-1], token, position))
    seed, output = mix(request.seed, request.index), []
    while len(output) < count:
        last = len(tokens) - 1
        conv = tuple(mix(tokens[p], p) for p in range(max(0, last - 2), last + 1))
        token = draw(chain[-1], chain[mix(last) % (last + 1) + 1], conv, seed, vocab)
        output.append(token)
        chain.append(mix(chain[-1], token, len(tokens)))
        tokens.append(token)
    return output
