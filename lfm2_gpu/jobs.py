"""Job: a caller's request, from its choices in the engine to the output they grow into."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from tqdm import tqdm

from lfm2_gpu.api import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from lfm2_gpu.engine.engine import Engine
from lfm2_gpu.engine.request import Request, Status, TokenLogprobs
from lfm2_gpu.output import ChoiceBuilder, LogprobEntry, logprob_dict
from lfm2_gpu.tokenizer import Tokenizer

__all__ = ["Job", "Progress"]


@dataclass(slots=True, eq=False)
class Job:
    """A request of the caller: its choices in the engine and the output they grow into.

    ``moved`` is set when the output grew, and cleared by whoever has looked at it.
    """

    requests: list[Request]
    builders: list[ChoiceBuilder]
    output: RequestOutput
    tokenizer: Tokenizer | None
    moved: bool = False

    def advance(self, request: Request, engine: Engine) -> None:
        """Take over what ``request`` has drawn since the last time."""
        builder = self.builders[request.index]
        choice = builder.output
        if choice.finish_reason is not None:
            return
        self.moved = True
        have = len(choice.token_ids)
        tokens = engine.output_since(request, have)
        ended = request.status is Status.FINISHED
        stopped = ended and request.finish_reason is FinishReason.STOP
        stop = builder.add(tokens[:-1] if stopped else tokens)
        if stop is not None:
            engine.abort([request], FinishReason.STOP)
            builder.finish(FinishReason.STOP, stop)
        elif ended:
            assert request.finish_reason is not None
            end_token = tokens[-1] if stopped else None
            builder.finish(request.finish_reason, request.stop_reason, end_token)
        builder.add_logprobs(_entry(e) for e in request.logprobs[have : len(choice.token_ids)])
        if request.index == 0 and request.params.prompt_logprobs is not None:
            self._take_prompt_logprobs(request)
        self.output.finished = all(b.output.finish_reason is not None for b in self.builders)
        self.output.error = self.output.error or request.error
        self.output.metrics = _merged([r.metrics for r in self.requests])

    def _take_prompt_logprobs(self, request: Request) -> None:
        if self.output.prompt_logprobs is None:
            self.output.prompt_logprobs = [None] + [
                logprob_dict(_entry(entry), self.tokenizer) for entry in request.prompt_logprobs
            ]

    def snapshot(self) -> RequestOutput:
        """A copy that later steps do not change."""
        outputs = [_copy(builder.output) for builder in self.builders]
        return replace(self.output, outputs=outputs)


class Progress:
    """vLLM's progress bar: requests done, and tokens per second in and out."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._input = self._output = 0
        self._start = time.monotonic()
        self._bar = tqdm(
            total=total, desc="Processed prompts", disable=not enabled, dynamic_ncols=True
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, output: RequestOutput) -> None:
        """Count a finished request."""
        self._input += len(output.prompt_token_ids)
        self._output += sum(len(choice.token_ids) for choice in output.outputs)
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(
            f"est. speed input: {self._input / seconds:.2f} toks/s, "
            f"output: {self._output / seconds:.2f} toks/s",
            refresh=False,
        )
        self._bar.update()


def _merged(parts: list[RequestMetrics]) -> RequestMetrics:
    """The metrics of a request from those of its choices; a fresh object."""

    def first(times: list[float | None]) -> float | None:
        return min((t for t in times if t is not None), default=None)

    finished = [p.finished_time for p in parts]
    return RequestMetrics(
        arrival_time=parts[0].arrival_time,
        first_scheduled_time=first([p.first_scheduled_time for p in parts]),
        first_token_time=first([p.first_token_time for p in parts]),
        finished_time=None if None in finished else max(t for t in finished if t is not None),
        num_preemptions=sum(p.num_preemptions for p in parts),
    )


def _entry(entry: TokenLogprobs) -> LogprobEntry:
    return entry.token_id, entry.logprob, entry.rank, entry.top_ids, entry.top_logprobs


def _copy(choice: CompletionOutput) -> CompletionOutput:
    logprobs = None if choice.logprobs is None else list(choice.logprobs)
    return replace(choice, token_ids=list(choice.token_ids), logprobs=logprobs)
