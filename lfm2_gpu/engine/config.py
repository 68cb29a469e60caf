"""EngineConfig: what an engine is told once, checked once, and never changed."""

from __future__ import annotations

from dataclasses import dataclass

from lfm2_gpu.errors import InvalidRequest

__all__ = ["PAGE_SIZE", "EngineConfig", "pages_for"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and sizes of one engine.

    Attributes:
        max_model_len: Tokens of a request, prompt and output together.
        max_num_seqs: Choices that run at once (state slots 1 to ``max_num_seqs``; 0 is the dummy).
        max_num_batched_tokens: Tokens of one step, over all requests.
        num_pages: KV pages of 64 tokens, the dummy page 0 not counted.
        vocab_size: Ids from here on are padding rows of the embedding: never drawn, never taken.
        eos_token_ids: Tokens that end a choice unless it ignores them.
        unused_ids: Ids below ``vocab_size`` that stand for no token: never drawn.

    Raises:
        InvalidRequest: A value is not a positive integer, or one request could not fit the pages.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_pages: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    unused_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "num_pages",
            "vocab_size",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidRequest(f"{name} is {value!r}, want a positive integer", param=name)
        if self.num_pages < pages_for(self.max_model_len):
            raise InvalidRequest(
                f"num_pages is {self.num_pages}, want at least {pages_for(self.max_model_len)}: "
                f"one request of max_model_len {self.max_model_len} must fit",
                param="num_pages",
            )


PAGE_SIZE = 64


def pages_for(num_tokens: int) -> int:
    """Pages that hold ``num_tokens`` tokens."""
    return -(-num_tokens // PAGE_SIZE)
