"""Scheduler: which requests run in a step, over which tokens, in which pages. No torch, no text.

A plan may be made while the step before it is still running: everything that a plan needs is known
or predicted. Only the value of the last token is not, and that one stays on the device.

Policy. Decoding rows come first, least recently scheduled first when the token budget is short (an
eighth of it is then left to prefills); then prefills that have begun, in order of arrival; then the
queue, first come first served. A request is admitted when pages for all its known tokens are free,
so only decoding ever runs out of pages; then the youngest running request gives its pages back and
is recomputed later. The oldest one always finishes, since any single request fits the pool.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from lfm2_gpu.api import FinishReason
from lfm2_gpu.engine.blocks import IdPool
from lfm2_gpu.engine.config import PAGE_SIZE, EngineConfig, pages_for
from lfm2_gpu.engine.request import Plan, Request, Status
from lfm2_gpu.engine.table import SlotTable

__all__ = ["Scheduler"]

# tokens of a step that may need logits of their own: [512, 65,536] fp32 is 134 MB
PROMPT_LOGPROBS_CHUNK = 512
NO_TOKEN = "no token can be drawn: the logits are not finite, or every token is ruled out"


class Scheduler:
    """Owns requests, pages and slots from arrival to end."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.table = SlotTable(config.max_num_seqs, config.max_model_len)
        self.pages = IdPool(config.num_pages, "page")
        self.slots = IdPool(config.max_num_seqs, "slot")
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        # preempted or aborted with a token in flight, by the serial of the slot they had
        self._leaving: dict[int, Request] = {}
        self._turn = 0
        self._logprobs_room = 0
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Queue a request. It must fit: ``limit <= max_model_len`` and a non-empty prompt."""
        assert 0 < len(request.prompt) < request.limit <= self.config.max_model_len
        self.waiting.append(request)

    def abort(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request in any state. Its token in flight, if any, is dropped when read."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.RUNNING:
            self._vacate(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        request.error = error

    @property
    def has_work(self) -> bool:
        """Whether a request waits, runs, or has a token in flight."""
        return bool(self.waiting or self.running or self._leaving)

    def schedule(self) -> Plan | None:
        """The next step, or ``None`` when no request can run now."""
        page_writes: list[tuple[int, int, int]] = []
        decode = self._decode_slots(page_writes)
        budget = self.config.max_num_batched_tokens
        room = budget - self._prefill_share(budget, len(decode))
        if len(decode) > room:
            order = np.argsort(self.table.last_turn[decode], kind="stable")
            decode = decode[order[:room]]
        budget -= len(decode)
        chunks = self._prefill_chunks(budget)
        budget -= sum(length for _, length in chunks)
        admitted = self._admit(budget, chunks, page_writes)
        if not len(decode) and not chunks:
            assert not admitted
            return None
        return self._plan(decode, chunks, admitted, page_writes)

    def _decode_slots(self, page_writes: list[tuple[int, int, int]]) -> np.ndarray:
        """Slots that can take one more token, each with a page under it."""
        table = self.table
        # planned == limit: the last token is in flight, and it is the request's end
        ready = table.decoding & (table.planned < table.limit)
        for slot in np.flatnonzero(ready & (table.computed >= table.capacity)).tolist():
            while ready[slot] and not self.pages.num_free:
                victim = self._youngest()
                ready[victim.slot] = False
                self._preempt(victim)
            if ready[slot]:
                request = self.running[slot]
                (page,) = self.pages.allocate(1)
                page_writes.append((slot, len(request.pages), page))
                request.pages.append(page)
                table.capacity[slot] += PAGE_SIZE
        # a victim may have been given a page above, before it was chosen
        page_writes[:] = [w for w in page_writes if ready[w[0]]]
        return np.flatnonzero(ready)

    def _prefill_share(self, budget: int, num_decoding: int) -> int:
        """Tokens of a step that decoding alone would fill, kept for prefills that could go on."""
        begun = len(self.running) > num_decoding
        could_go_on = begun or (self.waiting and self.slots.num_free)
        return max(budget // 8, 1) if could_go_on and budget > 1 else 0

    def _prefill_chunks(self, budget: int) -> list[tuple[Request, int]]:
        self._logprobs_room = PROMPT_LOGPROBS_CHUNK
        chunks = []
        for slot, request in self.running.items():
            if self.table.decoding[slot]:
                continue
            left = int(self.table.known[slot] - self.table.computed[slot])
            length = self._chunk(request, left, budget)
            if length:
                chunks.append((request, length))
                budget -= length
        return chunks

    def _admit(
        self,
        budget: int,
        chunks: list[tuple[Request, int]],
        page_writes: list[tuple[int, int, int]],
    ) -> list[Request]:
        admitted = []
        while self.waiting and self.slots.num_free:
            request = self.waiting[0]
            needed = pages_for(request.num_tokens)
            if needed > self.pages.num_free:
                break
            length = self._chunk(request, request.num_tokens, budget)
            if not length:
                break
            self.waiting.popleft()
            (request.slot,) = self.slots.allocate(1)
            request.pages = self.pages.allocate(needed)
            request.status = Status.RUNNING
            self.table.enter(request)
            self.running[request.slot] = request
            admitted.append(request)
            page_writes.extend((request.slot, i, page) for i, page in enumerate(request.pages))
            chunks.append((request, length))
            budget -= length
        return admitted

    def _chunk(self, request: Request, left: int, budget: int) -> int:
        """Tokens of the ``left`` ones that a request may prefill in this step."""
        if request.params.prompt_logprobs is None:
            return min(left, budget)
        length = min(left, budget, self._logprobs_room)
        self._logprobs_room -= length
        return length

    def _plan(
        self,
        decode: np.ndarray,
        chunks: Sequence[tuple[Request, int]],
        admitted: list[Request],
        page_writes: list[tuple[int, int, int]],
    ) -> Plan:
        table = self.table
        prefill = np.array([request.slot for request, _ in chunks], np.int32)
        slots = np.concatenate([decode.astype(np.int32), prefill])
        query_lens = np.ones(len(slots), np.int32)
        query_lens[len(decode) :] = [length for _, length in chunks]
        starts = table.computed[slots]
        ends = starts + query_lens
        sampling = ends == table.planned[slots]
        pieces = [np.full(len(decode), -1, np.int32)]
        pieces += [
            table.tokens[request.slot, start : start + length]
            for (request, length), start in zip(chunks, starts[len(decode) :], strict=True)
        ]
        looked_at = np.flatnonzero(table.watched[slots[: len(decode)]]).tolist()
        requests = {row: self.running[int(slots[row])] for row in looked_at}
        requests |= {len(decode) + i: request for i, (request, _) in enumerate(chunks)}
        table.computed[slots] = ends
        table.planned[slots] += sampling
        table.decoding[slots] |= sampling
        # tickets, not step numbers: ties would always go to the lower slot
        table.last_turn[slots] = self._turn + np.arange(len(slots))
        self._turn += len(slots)
        return Plan(
            slots=slots,
            serials=table.serial[slots],
            query_lens=query_lens,
            token_ids=np.concatenate(pieces),
            sampling=sampling,
            starts=starts,
            requests=requests,
            admitted=admitted,
            page_slots=[w[0] for w in page_writes],
            page_columns=[w[1] for w in page_writes],
            page_ids=[w[2] for w in page_writes],
            decode_only=not chunks,
            max_seq_len=int(ends.max()),
        )

    def commit(self, plan: Plan, tokens: np.ndarray) -> list[Request]:
        """Take the tokens of a finished step, one per sampling row in row order.

        A negative token says that none could be drawn: that request ends in error.

        Returns:
            The requests that ended, and those that are watched and went on.
        """
        table = self.table
        rows = np.flatnonzero(plan.sampling)
        slots, serials = plan.slots[rows], plan.serials[rows]
        present = table.serial[slots] == serials
        touched: list[Request] = []
        if not present.all():
            for i in np.flatnonzero(~present).tolist():
                touched += self._commit_leaver(int(serials[i]), int(tokens[i]))
            slots, tokens = slots[present], tokens[present]
        good = tokens >= 0
        # their token is read, and not to be waited for
        table.planned[slots[~good]] -= 1
        for slot in slots[~good].tolist():
            request = self.running[slot]
            self.abort(request, FinishReason.ERROR, NO_TOKEN)
            touched.append(request)
        slots, tokens = slots[good], tokens[good]
        at = table.known[slots]
        table.tokens[slots, at] = tokens
        table.known[slots] = at + 1
        stopped = (table.stop_ids[slots] == tokens[:, None]).any(axis=1)
        ended = stopped | (at + 1 >= table.limit[slots]) | table.watched[slots]
        for i in np.flatnonzero(ended).tolist():
            request = self.running[int(slots[i])]
            self._end_if_done(request, int(tokens[i]), int(at[i]) + 1)
            touched.append(request)
        return touched

    def recompute(self, plan: Plan) -> None:
        """Take back a step that failed: what its rows hold on the device is not to be trusted."""
        rows = zip(plan.serials.tolist(), plan.slots.tolist(), strict=True)
        # youngest first: each goes to the head of the queue
        for serial, slot in sorted(rows, reverse=True):
            if self.table.serial[slot] == serial:
                # the token that the step would have drawn will not come
                self.table.planned[slot] = self.table.known[slot]
                self._preempt(self.running[slot])

    def _end_if_done(self, request: Request, token: int, length: int) -> bool:
        """End a request whose newest token is a stop token or fills it; say whether it did."""
        if token in request.stop_ids:
            request.finish_reason = FinishReason.STOP
            # the model's own end token is no stop_reason, as in vLLM
            request.stop_reason = token if token in request.params.stop_token_ids else None
        elif length >= request.limit:
            request.finish_reason = FinishReason.LENGTH
        else:
            return False
        if request.status is Status.RUNNING:
            self._vacate(request)
        request.status = Status.FINISHED
        return True

    def _commit_leaver(self, serial: int, token: int) -> list[Request]:
        request = self._leaving.pop(serial, None)
        if request is None or request.status is not Status.LEAVING:
            # aborted, or stopped by the token before this one: the overrun is dropped
            return []
        if token < 0:
            self.abort(request, FinishReason.ERROR, NO_TOKEN)
            return [request]
        request.output.append(token)
        if not self._end_if_done(request, token, request.num_tokens):
            self._requeue(request)
        return [request]

    def _youngest(self) -> Request:
        slot = max(self.running, key=lambda s: self.table.serial[s])
        return self.running[slot]

    def _preempt(self, request: Request) -> None:
        """Take slot and pages away; the request is recomputed from its tokens."""
        in_flight = self._vacate(request)
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        if in_flight:
            request.status = Status.LEAVING
        else:
            self._requeue(request)

    def _requeue(self, request: Request) -> None:
        request.status = Status.WAITING
        self.waiting.appendleft(request)

    def _vacate(self, request: Request) -> bool:
        """Free slot and pages at once: stream order protects what a step in flight still reads.

        Returns:
            Whether a token of the request is in flight.
        """
        table, slot = self.table, request.slot
        serial = int(table.serial[slot])
        in_flight = bool(table.planned[slot] > table.known[slot])
        table.leave(request)
        if in_flight:
            self._leaving[serial] = request
        del self.running[slot]
        self.pages.free(request.pages)
        self.slots.free([slot])
        request.pages, request.slot = [], 0
        return in_flight
