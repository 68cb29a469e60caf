"""The counter-based random numbers of ``reference.sample``, in plain torch.

A number is a function of (seed, choice, position, token id) and of nothing else: output does not
depend on the batch and can be resumed anywhere.
"""

from __future__ import annotations

import torch


def exponential_race(ids: torch.Tensor, position: int, choice: int, seed: int) -> torch.Tensor:
    """``log E`` with E ~ Exp(1) drawn for each token id, a pure function of its arguments.

    ``argmax(h - log E)`` draws from ``softmax(h)`` (the Gumbel-max trick in its exponential form).
    """
    bits = philox(ids.long(), position, choice, seed)
    u = (bits.float() + 1.0) * 2.0**-32
    # -log(1 - u) loses every digit of a small u in fp32; there the series is exact
    series = u + u * u * (0.5 + u * (1.0 / 3.0))
    return torch.where(u < 2.0**-10, series, -torch.log(1.0 - u.clamp(max=1 - 2.0**-24))).log()


def philox(c0: torch.Tensor, c1: int, c2: int, seed: int) -> torch.Tensor:
    """First word of Philox4x32-10 (Salmon et al. 2011) at counter (c0, c1, c2, 0), as int64."""
    word = 0xFFFFFFFF
    a, b = c0 & word, torch.full_like(c0, c1 & word)
    c, d = torch.full_like(c0, c2 & word), torch.zeros_like(c0)
    k0, k1 = seed & word, (seed >> 32) & word
    for _ in range(10):
        # the high product is split: 32 x 32 bits overflow a signed int64
        hi_a, lo_a = _mul_hi_lo(a, 0xD2511F53)
        hi_c, lo_c = _mul_hi_lo(c, 0xCD9E8D57)
        a, b, c, d = hi_c ^ b ^ k0, lo_c, hi_a ^ d ^ k1, lo_a
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return a


def _mul_hi_lo(x: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = x * (m & 0xFFFF), x * (m >> 16)
    carry = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (carry >> 16), ((carry & 0xFFFF) << 16) | (low & 0xFFFF)
