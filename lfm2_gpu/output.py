"""Tokens of a choice to its text: detokenisation, stop strings, logprobs by token. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lfm2_gpu.api import CompletionOutput, FinishReason, Logprob, SamplingParams
from lfm2_gpu.detokenizer import IncrementalDetokenizer, StopChecker
from lfm2_gpu.tokenizer import Tokenizer

__all__ = ["ChoiceBuilder", "LogprobEntry", "bad_word_ids", "logprob_dict"]

# token, logprob, rank, most likely ids, their logprobs
LogprobEntry = tuple[int, float, int, Sequence[int], Sequence[float]]


class ChoiceBuilder:
    """Grows one ``CompletionOutput`` token by token.

    Without a tokenizer (or with ``detokenize=False``) the text stays empty.
    """

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.output = CompletionOutput(index=index, text="", token_ids=[])
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer: IncrementalDetokenizer | None = None
        self._stops: StopChecker | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = tokenizer.detokenizer(
                skip_special_tokens=params.skip_special_tokens
            )
            if params.stop:
                self._stops = StopChecker(
                    params.stop, include_stop_str_in_output=params.include_stop_str_in_output
                )
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0

    def add(self, token_ids: Sequence[int]) -> str | None:
        """Append drawn tokens that go on the text.

        Returns:
            The stop string that they completed, if any; tokens after it are not appended.
        """
        for token in token_ids:
            self.output.token_ids.append(token)
            if self._detokenizer is not None:
                stop = self._add_text(self._detokenizer.push([token]))
                if stop is not None:
                    return stop
        return None

    def add_logprobs(self, entries: Iterable[LogprobEntry]) -> None:
        """Append what was reported for the next tokens."""
        if self.output.logprobs is None or self.output.cumulative_logprob is None:
            return
        for entry in entries:
            self.output.logprobs.append(logprob_dict(entry, self._tokenizer))
            self.output.cumulative_logprob += entry[1]

    def finish(
        self, reason: FinishReason, stop_reason: int | str | None, end_token: int | None = None
    ) -> None:
        """Close the choice; ``end_token`` is the stop token that ended it, if one did.

        A stop token is among ``token_ids``, and in the text only where the caller asked for it.
        """
        text = ""
        if end_token is not None:
            self.output.token_ids.append(end_token)
            if self._detokenizer is not None and self._params.include_stop_str_in_output:
                text = self._detokenizer.push([end_token])
        if self._detokenizer is not None and not isinstance(stop_reason, str):
            stop = self._add_text(text + self._detokenizer.flush())
            if stop is not None:
                # what an unfinished character was replaced with may complete a stop string
                reason, stop_reason = FinishReason.STOP, stop
            elif self._stops is not None:
                self.output.text += self._stops.flush()
        self.output.finish_reason, self.output.stop_reason = reason, stop_reason

    def _add_text(self, delta: str) -> str | None:
        # stop strings do not count before min_tokens, as stop tokens do not
        if self._stops is None or len(self.output.token_ids) <= self._params.min_tokens:
            self.output.text += delta
            return None
        self.output.text += self._stops.push(delta)
        return self._stops.matched


def logprob_dict(entry: LogprobEntry, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """One position's log-probabilities in public form: the chosen token and the most likely."""
    token, logprob, rank, top_ids, top_logprobs = entry

    def text(token_id: int) -> str | None:
        if tokenizer is None or token_id in tokenizer.holes:
            return None
        return tokenizer.token_text(token_id)

    chosen = {token: Logprob(logprob, rank, text(token))}
    top = {
        top_id: Logprob(value, position, text(top_id))
        for position, (top_id, value) in enumerate(zip(top_ids, top_logprobs, strict=True), 1)
    }
    return chosen | top


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token sequences of each word: alone, after a space, and as control tokens it may spell."""
    sequences: list[list[int]] = []
    for word in words:
        variants = [
            tokenizer.encode(word, add_special_tokens=False, allow_special=True),
            tokenizer.encode(word, add_special_tokens=False),
            tokenizer.encode(" " + word.lstrip(), add_special_tokens=False),
        ]
        sequences += [ids for ids in variants if ids and ids not in sequences]
    return sequences
