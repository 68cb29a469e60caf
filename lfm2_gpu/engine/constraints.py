"""Which tokens a request may draw next, as a bit mask. numpy only.

Bit b of word w stands for token 32 w + b. The runner uploads the masks of constrained rows between
forward and sample; a grammar will hand in its masks the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lfm2_gpu.engine.request import Request
from lfm2_gpu.engine.table import SlotTable

__all__ = ["mask_words", "next_token_mask", "token_bits"]

Words = npt.NDArray[np.int32]


def mask_words(vocab_rows: int) -> int:
    """int32 words of a mask over ``vocab_rows`` tokens."""
    return -(-vocab_rows // 32)


def token_bits(token_ids: Sequence[int] | npt.NDArray[np.int32], words: int) -> Words:
    """A mask with the bits of ``token_ids`` set."""
    flags = np.zeros(words * 32, np.bool_)
    flags[np.asarray(token_ids, np.int64)] = True
    return np.packbits(flags, bitorder="little").view(np.int32)


def next_token_mask(request: Request, table: SlotTable, words: int) -> Words | None:
    """Tokens that a running request may draw next, or ``None`` if any will do.

    Honours ``allowed_token_ids``, ``min_tokens`` (no stop token before) and ``bad_words`` (no last
    token of a sequence whose other tokens were just drawn).
    """
    params, known = request.params, int(table.known[request.slot])
    drawn = known - len(request.prompt)
    forbidden = []
    for bad in request.bad_words:
        before = len(bad) - 1
        just_drawn = table.tokens[request.slot, known - before : known].tolist()
        if before <= drawn and just_drawn == list(bad[:-1]):
            forbidden.append(bad[-1])
    if drawn < params.min_tokens:
        forbidden += request.stop_ids
    if params.allowed_token_ids is None and not forbidden:
        return None
    if params.allowed_token_ids is None:
        mask = np.full(words, -1, np.int32)
    else:
        mask = token_bits(params.allowed_token_ids, words)
    return mask & ~token_bits(forbidden, words)
