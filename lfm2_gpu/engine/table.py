"""SlotTable: the host's numbers of every running request, one numpy row per slot.

A decode step of a thousand rows is a handful of array operations here; Python looks at single rows
only when they start, stop, cross a page, or ask for more than tokens.
"""

from __future__ import annotations

import numpy as np

from lfm2_gpu.engine.config import PAGE_SIZE
from lfm2_gpu.engine.request import Request

__all__ = ["MAX_STOP_IDS", "SlotTable"]

# stop ids that are compared as one array; requests with more are looked at one by one
MAX_STOP_IDS = 8


class SlotTable:
    """Columns by slot. Row 0 belongs to the dummy slot and stays empty.

    Attributes:
        tokens: ``[S, max_model_len]`` ids of prompt and output.
        known: Tokens the host has read.
        planned: ``known`` plus draws in flight.
        computed: Positions whose state is computed, or will be by steps in flight.
        limit: Tokens the request may reach.
        capacity: Positions that its pages can hold.
        stop_ids: ``[S, MAX_STOP_IDS]``, padded with -1.
        decoding: Everything but the last token is computed.
        watched: Python looks at the row in every step (``needs_a_look``).
        serial: Number of the occupant: grows with each admission, 0 while the slot is empty.
        last_turn: Ticket of the slot's last row: the smallest has waited longest.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        rows = max_num_seqs + 1
        # zeros, not empty: untouched rows cost no memory either way, and no stale id can show
        self.tokens = np.zeros((rows, max_model_len), np.int32)
        self.known = np.zeros(rows, np.int32)
        self.planned = np.zeros(rows, np.int32)
        self.computed = np.zeros(rows, np.int32)
        self.limit = np.zeros(rows, np.int32)
        self.capacity = np.zeros(rows, np.int32)
        self.stop_ids = np.full((rows, MAX_STOP_IDS), -1, np.int32)
        self.decoding = np.zeros(rows, np.bool_)
        self.watched = np.zeros(rows, np.bool_)
        self.serial = np.zeros(rows, np.int64)
        self.last_turn = np.zeros(rows, np.int64)
        self._next_serial = 0

    def enter(self, request: Request) -> None:
        """Fill the row of ``request.slot`` from the request."""
        slot, length = request.slot, request.num_tokens
        self.tokens[slot, : len(request.prompt)] = request.prompt
        self.tokens[slot, len(request.prompt) : length] = request.output
        self.known[slot] = self.planned[slot] = length
        self.computed[slot] = 0
        self.limit[slot] = request.limit
        self.capacity[slot] = len(request.pages) * PAGE_SIZE
        self.stop_ids[slot] = -1
        few = request.stop_ids[:MAX_STOP_IDS]
        self.stop_ids[slot, : len(few)] = few
        self.decoding[slot] = False
        self.watched[slot] = needs_a_look(request)
        self._next_serial += 1
        self.serial[slot] = self._next_serial

    def leave(self, request: Request) -> None:
        """Copy the output back into the request and empty the row."""
        slot = request.slot
        request.output = self.tokens[slot, len(request.prompt) : self.known[slot]].tolist()
        self.serial[slot] = 0
        self.decoding[slot] = False
        self.watched[slot] = False

    def output_since(self, request: Request, start: int) -> list[int]:
        """Tokens drawn and read so far, from the ``start``-th on, in any state of the request."""
        if request.slot == 0:
            return request.output[start:]
        first = len(request.prompt) + start
        tokens: list[int] = self.tokens[request.slot, first : self.known[request.slot]].tolist()
        return tokens


def needs_a_look(request: Request) -> bool:
    """Whether each new token of this request takes a turn through Python."""
    params = request.params
    return (
        request.watched
        or params.logprobs is not None
        or params.min_tokens > 0
        or params.allowed_token_ids is not None
        or bool(request.bad_words)
        or len(request.stop_ids) > MAX_STOP_IDS
    )
