"""Engine: the step loop. Requests of token ids go in, tokens come out; it knows no text.

``step`` plans, launches, reads and commits one step. The four are apart so that a later plan can be
made and launched before an earlier one is read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from lfm2_gpu.api import FinishReason, RequestMetrics, SamplingParams
from lfm2_gpu.engine.config import EngineConfig
from lfm2_gpu.engine.request import Plan, Request, Status
from lfm2_gpu.engine.runner import Runner, StepResult
from lfm2_gpu.engine.scheduler import Scheduler
from lfm2_gpu.errors import InvalidRequest

__all__ = ["Engine"]


class Engine:
    """Runs requests over one model. Not thread-safe: one caller at a time.

    Attributes:
        num_steps: Steps that were committed.
    """

    def __init__(self, runner: Runner) -> None:
        self.config: EngineConfig = runner.config
        self.scheduler = Scheduler(runner.config)
        self.num_steps = 0
        self._runner = runner

    @property
    def has_unfinished(self) -> bool:
        """Whether ``step`` has anything left to do."""
        return self.scheduler.has_work

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        bad_words: Sequence[Sequence[int]] = (),
        watched: bool = False,
    ) -> list[Request]:
        """Queue the ``params.n`` choices of a prompt.

        Args:
            request_id: The caller's name for it.
            prompt: Token ids, at least one.
            params: With every default filled in (``with_defaults``).
            seed: Any 64-bit integer; output is a function of it, of the choice and the position.
            bad_words: Token sequences of ``params.bad_words``.
            watched: Report every token as it is read, not only the end.

        Raises:
            InvalidRequest: The prompt is empty, too long, or has an id out of range, or a field of
                ``params`` does not fit this engine.
        """
        self.validate(prompt, params)
        limit = self.config.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, len(prompt) + params.max_tokens)
        stop_ids = self._stop_ids(params)
        now = time.monotonic()
        requests = [
            Request(
                request_id=request_id,
                index=index,
                prompt=list(prompt),
                # the prompt is the same for all: one choice reports it
                params=params if index == 0 else replace(params, prompt_logprobs=None),
                seed=_signed_64(seed),
                limit=limit,
                stop_ids=stop_ids,
                metrics=RequestMetrics(arrival_time=now),
                bad_words=tuple(tuple(word) for word in bad_words),
                watched=watched,
            )
            for index in range(params.n)
        ]
        for request in requests:
            self.scheduler.add(request)
        return requests

    def _stop_ids(self, params: SamplingParams) -> tuple[int, ...]:
        eos = () if params.ignore_eos else self.config.eos_token_ids
        # an id in both lists counts once
        return tuple(dict.fromkeys((*eos, *params.stop_token_ids)))

    def validate(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise what ``add`` would raise, and queue nothing."""
        vocab, longest = self.config.vocab_size, self.config.max_model_len
        if not prompt:
            raise InvalidRequest("the prompt is empty, want at least one token", param="prompt")
        if len(prompt) >= longest:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens, want at most {longest - 1}: "
                f"the context is {longest} and one token must be generated",
                param="prompt",
            )
        _in_vocabulary("prompt_token_ids", prompt, vocab)
        _in_vocabulary("stop_token_ids", params.stop_token_ids, vocab)
        _in_vocabulary("allowed_token_ids", params.allowed_token_ids or (), vocab)
        _in_vocabulary("logit_bias", tuple(params.logit_bias), vocab)
        room = longest - len(prompt)
        if params.min_tokens > room:
            raise InvalidRequest(
                f"min_tokens is {params.min_tokens}, want at most {room}, "
                f"what the context of {longest} leaves after the prompt",
                param="min_tokens",
            )

        allowed = set(params.allowed_token_ids or ())
        if params.min_tokens and allowed and allowed <= set(self._stop_ids(params)):
            raise InvalidRequest(
                f"allowed_token_ids holds end tokens only, and min_tokens is {params.min_tokens}: "
                "no token could be drawn",
                param="allowed_token_ids",
            )

    def abort(self, requests: Sequence[Request], reason: FinishReason = FinishReason.ABORT) -> None:
        """End requests in any state; their slots and pages are free at once."""
        now = time.monotonic()
        for request in requests:
            if request.status is not Status.FINISHED:
                self.scheduler.abort(request, reason)
                request.metrics.finished_time = now

    def output_since(self, request: Request, start: int) -> list[int]:
        """Tokens of a request that were drawn and read so far, from the ``start``-th on."""
        return self.scheduler.table.output_since(request, start)

    def step(self) -> list[Request]:
        """Run one step.

        Returns:
            The requests that ended, and the watched ones that got a token.

        Raises:
            Exception: Whatever the device raised. The step's requests are then recomputed from
                their tokens by the next steps, unless the caller aborts them.
        """
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        self._note_scheduled(plan)
        try:
            result = self._runner.run(plan, self.scheduler.table)
        except BaseException:
            self.scheduler.recompute(plan)
            raise
        return self._commit(plan, result)

    def _note_scheduled(self, plan: Plan) -> None:
        now = time.monotonic()
        for request in plan.admitted:
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now

    def _commit(self, plan: Plan, result: StepResult) -> list[Request]:
        now = time.monotonic()
        for row, request in plan.requests.items():
            # a finished request's overrun is dropped, with all that belongs to it
            if request.status is Status.FINISHED:
                continue
            if plan.sampling[row] and request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
            if row in result.logprobs:
                request.logprobs.append(result.logprobs[row])
            for position, entry in result.prompt_logprobs.get(row, ()):
                # a recomputed prompt comes by again
                if position == len(request.prompt_logprobs) + 1:
                    request.prompt_logprobs.append(entry)
        touched = self.scheduler.commit(plan, result.tokens)
        for request in touched:
            if request.status is Status.FINISHED:
                request.metrics.finished_time = now
        self.num_steps += 1
        return touched


def _in_vocabulary(name: str, ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            got = repr(token)[:80]
        elif 0 <= token < vocab_size:
            continue
        else:
            got = str(token) if abs(token) < 2**64 else "an integer beyond 64 bits"
        raise InvalidRequest(f"{name} holds {got}, want integers in [0, {vocab_size})", param=name)


def _signed_64(seed: int) -> int:
    """The 64 bits of ``seed`` as torch stores them."""
    return (seed + 2**63) % 2**64 - 2**63
