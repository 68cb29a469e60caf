"""Request: one choice of one prompt on its way through the engine, and the plan of a step.

Integers only, no tensors. A request's numbers live in the ``SlotTable`` row of its slot while it
runs, and in the request itself while it waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from lfm2_gpu.api import FinishReason, RequestMetrics, SamplingParams

__all__ = ["Plan", "Request", "Status", "TokenLogprobs"]

Ints = npt.NDArray[np.int32]


class Status(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    # out of its slot, but the token of a step in flight is still to come
    LEAVING = "leaving"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Raw log-probabilities at one position: of the token there, and of the most likely ones."""

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(slots=True, eq=False)
class Request:
    """One choice.

    Attributes:
        request_id: The caller's id; the choices of one request share it.
        index: Which choice of the request this is; part of the random counter.
        prompt: Token ids.
        params: With every default filled in.
        seed: Of the counter-based generator, as a signed 64-bit integer.
        limit: Tokens that prompt and output may have together.
        stop_ids: Tokens that end it.
        bad_words: Token sequences that must not be produced.
        watched: The caller wants each token as it comes, not just the end.
        output: Tokens drawn so far. Up to date only while the request is not running.
    """

    request_id: str
    index: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    limit: int
    stop_ids: tuple[int, ...]
    metrics: RequestMetrics
    bad_words: tuple[tuple[int, ...], ...] = ()
    watched: bool = False
    output: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    slot: int = 0
    pages: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output together, as far as ``output`` is up to date."""
        return len(self.prompt) + len(self.output)


@dataclass(slots=True)
class Plan:
    """One step, in integers: rows of tokens, and what changed in the device's state before it.

    Attributes:
        slots: ``[R]``, one per row, each at most once.
        serials: ``[R]``, occupant number of each row's slot when the step was planned.
        query_lens: ``[R]``, tokens of each row.
        token_ids: ``[N]``; -1 where the device uses the row's last drawn token.
        sampling: ``[R]`` bool, rows whose last token draws the next one.
        starts: ``[R]``, position of each row's first token.
        requests: The requests of rows that Python must look at: prefill, masks, logprobs. By row.
        admitted: Requests that took a slot in this plan.
        page_slots, page_columns, page_ids: Page-table entries to write.
        decode_only: Every row is one token long and uses the device's last token.
        max_seq_len: No row is longer than this after the step.
    """

    slots: Ints
    serials: npt.NDArray[np.int64]
    query_lens: Ints
    token_ids: Ints
    sampling: npt.NDArray[np.bool_]
    starts: Ints
    requests: dict[int, Request]
    admitted: list[Request]
    page_slots: list[int]
    page_columns: list[int]
    page_ids: list[int]
    decode_only: bool
    max_seq_len: int
