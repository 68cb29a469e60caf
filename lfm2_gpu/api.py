"""What a caller hands in and gets back: sampling parameters and outputs. Standard library only.

Names and defaults follow vLLM's Python API, with one difference: a sampling field left at ``None``
takes the model's own default (checkpoint, else the vendor's table), not a neutral value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NoReturn

from lfm2_gpu.errors import InvalidRequest

__all__ = [
    "CompletionOutput",
    "FinishReason",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingDefaults",
    "SamplingParams",
]

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64


class FinishReason(str, Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The values that a ``None`` field of ``SamplingParams`` takes."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw the tokens of one request.

    Attributes:
        n: Choices to generate, each with its own random stream.
        temperature: 0 is greedy. ``None`` here and in the four fields below: the model's default.
        top_p: Keep the smallest set of tokens with at least this mass, in (0, 1].
        top_k: Keep the k most likely tokens; 0 or -1 keeps all.
        min_p: Keep tokens with at least this fraction of the most likely one's probability.
        repetition_penalty: CTRL's rule over prompt and output, in [0.01, 100]; 1 is off.
        seed: Of the counter-based generator. ``None`` draws one, which the output reports.
        stop: Strings that end the text, at most 64.
        stop_token_ids: Tokens that end it, beside the model's end tokens.
        include_stop_str_in_output: Keep the stop string (or the stop token's text).
        bad_words: Strings that are never produced.
        max_tokens: Tokens to generate at most. ``None``: up to the context's end.
        min_tokens: End tokens are masked until so many were generated.
        logprobs: Report this many most likely tokens (and the drawn one) per position, at most 20.
        prompt_logprobs: The same for the prompt's tokens.
        presence_penalty: OpenAI's, over the output, in [-2, 2].
        frequency_penalty: OpenAI's, over the output, in [-2, 2].
        logit_bias: Added to the logits of these token ids, in [-100, 100].
        allowed_token_ids: Only these may be drawn.
        ignore_eos: Go on after the model's end tokens.
        detokenize: ``False`` returns token ids only; it cannot be combined with ``stop``.
        skip_special_tokens: Leave special tokens out of the text.
        structured_outputs: Not available yet, and refused.

    Raises:
        InvalidRequest: A field is out of range; ``param`` names it.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    bad_words: Sequence[str] = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    structured_outputs: Any = None

    def __post_init__(self) -> None:
        freeze = object.__setattr__
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        freeze(self, "stop", _strings("stop", stop, MAX_STOP_STRINGS))
        freeze(self, "bad_words", _strings("bad_words", self.bad_words, 1000))
        freeze(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise InvalidRequest(
                    "allowed_token_ids is empty: no token could be drawn", param="allowed_token_ids"
                )
            freeze(self, "allowed_token_ids", allowed)
        if self.top_k == -1:
            freeze(self, "top_k", 0)
        _integer("n", self.n, 1, MAX_CHOICES)
        _number("temperature", self.temperature, 0, 100, optional=True)
        _number("top_p", self.top_p, 0, 1, optional=True, open_low=True)
        _integer("top_k", self.top_k, 0, 2**31 - 1, optional=True)
        _number("min_p", self.min_p, 0, 1, optional=True)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100, optional=True)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _integer("seed", self.seed, -(2**63), 2**64 - 1, optional=True)
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1, optional=True)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
        ):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "true or false")
        self._check_logit_bias()
        self._check_combinations()

    def _check_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            _refuse("logit_bias", self.logit_bias, "a mapping of token id to bias")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _number("logit_bias", bias, -100, 100)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    def _check_combinations(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.stop and not self.detokenize:
            _refuse("detokenize", False, "true, since stop strings are found in the text")
        if self.structured_outputs is not None:
            raise InvalidRequest(
                "structured_outputs is not supported yet", param="structured_outputs"
            )

    def with_defaults(self, defaults: SamplingDefaults) -> SamplingParams:
        """These parameters with every ``None`` of the sampling fields filled from ``defaults``."""
        unset = {
            f.name: getattr(defaults, f.name)
            for f in dataclasses.fields(defaults)
            if getattr(self, f.name) is None
        }
        return dataclasses.replace(self, **unset) if unset else self


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of a token at a position, from the raw logits.

    ``rank`` is 1 for the most likely token. ``decoded_token`` is ``None`` where there is none.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request. ``stop_reason`` is the stop string or token id that ended it."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Monotonic times in seconds (``time.monotonic``) of a request's life."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class RequestOutput:
    """What a request has produced so far; ``finished`` says whether more will come.

    ``error`` is set when ``finish_reason`` is ``error`` and says what went wrong.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    seed: int | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None


def _refuse(name: str, value: object, wanted: str) -> NoReturn:
    try:
        shown = repr(value)
    except ValueError:
        # an integer of more digits than Python prints
        shown = "too long to print"
    raise InvalidRequest(f"{name} is {shown[:200]}, want {wanted}", param=name)


def _integer(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _refuse(name, value, f"an integer in [{low}, {high}]")


def _number(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    optional: bool = False,
    open_low: bool = False,
) -> None:
    if value is None and optional:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # the order matters: an integer too long for a float has no isfinite
    if not number or not low <= value <= high or not math.isfinite(value):
        _refuse(name, value, f"a finite number in [{low}, {high}]")
    if open_low and value == low:
        _refuse(name, value, f"a number above {low}")


def _strings(name: str, values: object, most: int) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        _refuse(name, values, "a list of strings")
    if len(values) > most:
        _refuse(name, f"{len(values)} strings", f"at most {most}")
    for value in values:
        if not isinstance(value, str) or not value:
            _refuse(name, value, "non-empty strings")
        if any("\ud800" <= char <= "\udfff" for char in value):
            _refuse(name, value, "whole characters: it holds half of a surrogate pair")
    return tuple(values)


def _token_ids(name: str, values: object) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        _refuse(name, values, "a list of token ids")
    for value in values:
        _integer(name, value, 0, 2**31 - 1)
    return tuple(values)
