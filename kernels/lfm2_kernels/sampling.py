r"""The draw of a token, and log-probabilities.

Math, for a row of logits, with temperature T, seed, position and choice of its slot::

    h = logits / T
    keep = exp(h - max h) >= min_p                         # if min_p > 0
    keep = keep and h >= (top_k-th largest kept h)         # if 0 < top_k < kept
    keep = keep and mass of larger kept h < top_p          # if top_p < 1; mass: softmax over kept
    token = argmax over kept of h - log E,  E ~ Exp(1)     # T = 0: argmax of the logits

The last line draws from softmax(h) over the kept (an exponential race). E is a function of (seed,
token, position, choice) alone, by Philox4x32-10 (Salmon et al. 2011,
https://doi.org/10.1145/2063384.2063405): a draw depends on no other row and survives preemption.
Ties at a threshold all stay; ties of an argmax go to the lower id.

Nothing is sorted. A filter keeps ``h > floor``, and the floor is a bisection on fp32 bits, which
order like integers: top-k and top-p both ask for the largest floor above which the count, or the
mass, still reaches a target. The largest h of every 16-odd tokens (a lane) rise above it first, in
registers: for a small top_k one pass over the row then confirms it.

Numerics: fp32; h is divided, not multiplied by 1 / T. Rows with NaN, or with no finite logit, yield
some token in range.

Mapping: one program per row finds its floor and returns at once where no filter is set; the row
stays in L2 between passes. Then a grid over (row, 2,048 tokens) races, and one program per row
picks the winner. Memory traffic per row: V logits from HBM twice, partial results of V / 1024
elements. Reference: ``reference.sample``, ``reference.token_logprobs``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _checks, reference

__all__ = ["sample", "token_logprobs"]

_FLOAT32 = (torch.float32,)
# tokens per pass of a program: 16 per thread, four 16-byte loads in flight
_ROW_BLOCK, _ROW_WARPS = 4096, 8
_RACE_BLOCK, _RACE_WARPS = 2048, 4


@triton.jit
def _to_key(x):
    """The int64 of an fp32 scalar that orders as it does; -0 lies just below 0."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _from_key(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weigh(row_ptr, temperature, top, key, V, MASS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Count, and mass (or the count again), of a row's h above ``key``."""
    offs_v = tl.arange(0, BLOCK_V)
    floor = _from_key(key)
    counts = tl.zeros([BLOCK_V], dtype=tl.float32)
    masses = tl.zeros([BLOCK_V], dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        x = tl.load(row_ptr + first + offs_v, mask=offs_v < V - first, other=float("-inf"))
        h = tl.div_rn(x, tl.broadcast_to(temperature, [BLOCK_V]))
        above = h > floor
        counts += tl.where(above, 1.0, 0.0)
        if MASS:
            masses += tl.where(above, tl.exp(h - top), 0.0)
    # a count is exact in fp32: V < 2**24
    count = tl.sum(counts)
    return count, tl.sum(masses) if MASS else count


@triton.jit
def _raise_floor(
    row_ptr, temperature, top, lanes, key, target, V, MASS: tl.constexpr, BLOCK_V: tl.constexpr
):
    """The largest key above which the row weighs ``target`` or more; ``key`` if none does."""
    lo = key
    hi = _to_key(top)
    # the largest h of each lane weigh no more than the row: their floor is a lower bound
    weights = tl.exp(lanes - top) if MASS else tl.full([BLOCK_V], 1.0, dtype=tl.float32)
    while hi - lo > 1:
        mid = (lo + hi) >> 1
        enough = tl.sum(tl.where(lanes > _from_key(mid), weights, 0.0)) >= target
        lo = tl.where(enough, mid, lo)
        hi = tl.where(enough, hi, mid)

    hi = _to_key(top)
    count_lo, weight_lo = _weigh(row_ptr, temperature, top, lo, V, MASS, BLOCK_V)
    count_hi = 0.0
    # a gap that holds one token, or a weight equal to the target, leaves nothing to decide
    while (hi - lo > 1) & (count_lo - count_hi > 1) & (weight_lo > target):
        mid = (lo + hi) >> 1
        count, weight = _weigh(row_ptr, temperature, top, mid, V, MASS, BLOCK_V)
        enough = weight >= target
        lo = tl.where(enough, mid, lo)
        count_lo = tl.where(enough, count, count_lo)
        weight_lo = tl.where(enough, weight, weight_lo)
        hi = tl.where(enough, hi, mid)
        count_hi = tl.where(enough, count_hi, count)
    return lo


@triton.jit
def _find_floor_kernel(
    logits_ptr,  # [R, V]
    floors_ptr,  # [R]
    slots_ptr,  # [R]
    temperature_ptr,  # [S]
    top_k_ptr,  # [S]
    top_p_ptr,  # [S]
    min_p_ptr,  # [S]
    stride_logits_r,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # int64 before a row or a slot meets a stride: R * V can pass 2**31
    pid_r = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + pid_r).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    row_ptr = logits_ptr + pid_r * stride_logits_r
    key = _to_key(tl.full([], float("-inf"), dtype=tl.float32))
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        offs_v = tl.arange(0, BLOCK_V)
        lanes = tl.full([BLOCK_V], float("-inf"), dtype=tl.float32)
        for first in range(0, V, BLOCK_V):
            x = tl.load(row_ptr + first + offs_v, mask=offs_v < V - first, other=float("-inf"))
            lanes = tl.maximum(lanes, x)
        lanes = tl.div_rn(lanes, tl.broadcast_to(temperature, [BLOCK_V]))
        top = tl.max(lanes)
        if min_p > 0:
            # h >= top + log(min_p) is h > the number below
            key = tl.maximum(key, _to_key(top + tl.log(min_p)) - 1)
        if top_k > 0:
            target = top_k.to(tl.float32)
            key = _raise_floor(row_ptr, temperature, top, lanes, key, target, V, False, BLOCK_V)
        if top_p < 1:
            _, mass = _weigh(row_ptr, temperature, top, key, V, True, BLOCK_V)
            target = top_p * mass
            key = _raise_floor(row_ptr, temperature, top, lanes, key, target, V, True, BLOCK_V)
    tl.store(floors_ptr + pid_r, _from_key(key))


@triton.jit
def _log_exponential(ids, position, choice, seed):
    """``log E``, E ~ Exp(1), of each id; see ``_philox.exponential_race``."""
    bits, _, _, _ = tl.philox(seed, ids, position, choice, 0)
    u = (bits.to(tl.float32) + 1.0) * 2.0**-32
    series = u + u * u * (0.5 + u * (1.0 / 3.0))
    drawn = -tl.log(1.0 - tl.minimum(u, 1.0 - 2.0**-24))
    return tl.log(tl.where(u < 2.0**-10, series, drawn))


@triton.jit
def _race_kernel(
    logits_ptr,  # [R, V]
    floors_ptr,  # [R]
    scores_ptr,  # [R, blocks]
    ids_ptr,  # [R, blocks]
    slots_ptr,  # [R]
    positions_ptr,  # [R]
    temperature_ptr,  # [S]
    seeds_ptr,  # [S]
    choices_ptr,  # [S]
    stride_logits_r,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # int64 before a row or a slot meets a stride: R * V can pass 2**31
    pid_r = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + pid_r).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    logits_ptrs = logits_ptr + pid_r * stride_logits_r + offs_v
    score = tl.load(logits_ptrs, mask=offs_v < V, other=float("-inf"))
    if temperature > 0:
        h = tl.div_rn(score, tl.broadcast_to(temperature, [BLOCK_V]))
        kept = h > tl.load(floors_ptr + pid_r)
        score = tl.full([BLOCK_V], float("-inf"), dtype=tl.float32)
        # with a filter most blocks lose every token, and need no random numbers
        if tl.max(kept.to(tl.int32)) > 0:
            position = tl.load(positions_ptr + pid_r)
            choice = tl.load(choices_ptr + slot)
            noise = _log_exponential(offs_v, position, choice, tl.load(seeds_ptr + slot))
            score = tl.where(kept, h - noise, float("-inf"))
    # NaN loses to everything, and leaves the first id of the block if nothing else is there
    score = tl.where(score == score, score, float("-inf"))
    best = tl.max(score, axis=0)
    winner = tl.min(tl.where(score == best, offs_v, V), axis=0)
    at = pid_r * tl.num_programs(1) + tl.program_id(1)
    tl.store(scores_ptr + at, best)
    tl.store(ids_ptr + at, winner)


@triton.jit
def _pick_kernel(
    scores_ptr,  # [R, BLOCKS]
    ids_ptr,  # [R, BLOCKS]
    tokens_ptr,  # [R]
    V: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    pid_r = tl.program_id(0).to(tl.int64)
    offs_b = tl.arange(0, BLOCK_B)
    mask_b = offs_b < BLOCKS
    score = tl.load(scores_ptr + pid_r * BLOCKS + offs_b, mask=mask_b, other=float("-inf"))
    ids = tl.load(ids_ptr + pid_r * BLOCKS + offs_b, mask=mask_b, other=V)
    best = tl.max(score, axis=0)
    tl.store(tokens_ptr + pid_r, tl.min(tl.where(score == best, ids, V), axis=0))


@triton.jit
def _token_logprobs_kernel(
    logits_ptr,  # [R, V]
    ids_ptr,  # [R]
    logprobs_ptr,  # [R]
    ranks_ptr,  # [R]
    stride_logits_r,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # int64 before a row meets a stride: R * V can pass 2**31
    pid_r = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + pid_r * stride_logits_r
    chosen = tl.load(row_ptr + tl.load(ids_ptr + pid_r)).to(tl.float32)
    offs_v = tl.arange(0, BLOCK_V)
    # each lane keeps its own maximum and sum, joined after the loop
    top = tl.full([BLOCK_V], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_V], dtype=tl.float32)
    larger = tl.zeros([BLOCK_V], dtype=tl.int32)
    for first in range(0, V, BLOCK_V):
        x = tl.load(row_ptr + first + offs_v, mask=offs_v < V - first, other=float("-inf"))
        h = x.to(tl.float32)
        larger += (h > chosen).to(tl.int32)
        new_top = tl.maximum(top, h)
        # a lane that saw nothing yet has no finite maximum to subtract
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
        total = total * tl.exp(top - base) + tl.exp(h - base)
        top = new_top
    row_top = tl.max(top, axis=0)
    log_sum = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), axis=0))
    tl.store(logprobs_ptr + pid_r, chosen - log_sum)
    tl.store(ranks_ptr + pid_r, 1 + tl.sum(larger, axis=0))


def sample(
    logits: torch.Tensor,
    *,
    slots: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    choices: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token per row; per-slot arrays are read at ``slots``.

    Args:
        logits: ``[R, V]`` float32, last dimension contiguous, as ``process_logits`` leaves them.
        slots: ``[R]`` int32.
        positions: ``[R]`` int32, the position that the random number belongs to.
        temperature: ``[S]`` float32; 0 takes the largest logit.
        top_k: ``[S]`` int32; 0 keeps all.
        top_p: ``[S]`` float32 in (0, 1]; 1 keeps all.
        min_p: ``[S]`` float32 in [0, 1]; 0 keeps all.
        seeds: ``[S]`` int64, all 64 bits in use.
        choices: ``[S]`` int32, the index among the choices of one request.
        out: ``[R]`` int32; written and returned.

    Returns:
        Token ids ``[R]`` int32, in 0 .. V - 1 whatever the logits.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape or stride differs from the above.
    """
    op = "sample"
    _checks.check(op, "logits", logits, ("R", "V"), _FLOAT32)
    rows, width = logits.shape
    _checks.check(op, "slots", slots, (rows,), _checks.INT32)
    _checks.check(op, "positions", positions, (rows,), _checks.INT32)
    _checks.check(op, "temperature", temperature, ("S",), _FLOAT32)
    per_slot = temperature.shape
    _checks.check(op, "top_k", top_k, per_slot, _checks.INT32)
    _checks.check(op, "top_p", top_p, per_slot, _FLOAT32)
    _checks.check(op, "min_p", min_p, per_slot, _FLOAT32)
    _checks.check(op, "seeds", seeds, per_slot, (torch.int64,))
    _checks.check(op, "choices", choices, per_slot, _checks.INT32)
    tokens = _checks.output(op, out, (rows,), torch.int32, logits.device)
    if not _checks.uses_triton(logits):
        return tokens.copy_(
            reference.sample(
                logits,
                slots=slots,
                positions=positions,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                seeds=seeds,
                choices=choices,
            )
        )
    if rows == 0:
        return tokens
    blocks = triton.cdiv(width, _RACE_BLOCK)
    floors = _find_floors(logits, slots, temperature, top_k, top_p, min_p)
    scores = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    _race_kernel[(rows, blocks)](
        logits,
        floors,
        scores,
        ids,
        slots,
        positions,
        temperature,
        seeds,
        choices,
        logits.stride(0),
        V=width,
        BLOCK_V=_RACE_BLOCK,
        num_warps=_RACE_WARPS,
        # the series of log E rounds as the reference does
        enable_fp_fusion=False,
    )
    _pick_kernel[(rows,)](
        scores,
        ids,
        tokens,
        V=width,
        BLOCKS=blocks,
        BLOCK_B=triton.next_power_of_2(blocks),
        num_warps=1,
    )
    return tokens


def token_logprobs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability and the rank of one token per row.

    Args:
        logits: ``[R, V]``, float32, float16 or bfloat16, last dimension contiguous.
        ids: ``[R]`` int32, in 0 .. V - 1.
        out: The two results; written and returned.

    Returns:
        ``log softmax(logits)[id]`` ``[R]`` float32, and ``[R]`` int32: one plus the number of
        larger logits.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape or stride differs from the above.
    """
    op = "token_logprobs"
    _checks.check(op, "logits", logits, ("R", "V"))
    rows, width = logits.shape
    _checks.check(op, "ids", ids, (rows,), _checks.INT32)
    logprobs, ranks = out if out is not None else (None, None)
    logprobs = _checks.output(op, logprobs, (rows,), torch.float32, logits.device)
    ranks = _checks.output(op, ranks, (rows,), torch.int32, logits.device)
    if not _checks.uses_triton(logits):
        results = reference.token_logprobs(logits, ids)
        return logprobs.copy_(results[0]), ranks.copy_(results[1])
    if rows == 0:
        return logprobs, ranks
    _token_logprobs_kernel[(rows,)](
        logits,
        ids,
        logprobs,
        ranks,
        logits.stride(0),
        V=width,
        BLOCK_V=min(_ROW_BLOCK, triton.next_power_of_2(width)),
        num_warps=_ROW_WARPS,
        enable_fp_fusion=True,
    )
    return logprobs, ranks


def _find_floors(
    logits: torch.Tensor,
    slots: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """``[R]`` float32: a row keeps its tokens of ``logits / temperature`` above it."""
    rows, width = logits.shape
    floors = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _find_floor_kernel[(rows,)](
        logits,
        floors,
        slots,
        temperature,
        top_k,
        top_p,
        min_p,
        logits.stride(0),
        V=width,
        BLOCK_V=min(_ROW_BLOCK, triton.next_power_of_2(width)),
        num_warps=_ROW_WARPS,
        enable_fp_fusion=False,
    )
    return floors
