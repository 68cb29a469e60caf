"""Every op as plain torch: the specification, the CPU path, and the oracle of every test.

Each function takes what its Triton twin takes and rounds where it rounds: to the activation dtype
at the points where transformers (>= 5.23, eager) rounds, fp32 in between. In fp32 nothing rounds,
so the two agree to the order of sums. State tensors (``kv_pages``, ``conv_state``) are written in
place.

Batch metadata, the same for every op (``N`` tokens of ``R`` rows, ``S`` slots)::

    positions        [N] int32      absolute position of a token; -1 marks padding
    token_rows       [N] int32      the row that a token belongs to
    query_start_loc  [R + 1] int32  row r owns tokens query_start_loc[r] : query_start_loc[r + 1]
    slots            [R] int32      the state slot of a row; slot 0 is the dummy
    page_table       [S, P] int32   page of positions 64 p .. 64 p + 63 of a slot; page 0: dummy
    first_computed   [S] int32      conv inputs before this position read as zero
    kv_write_from    [S] int32      keys and values before this position are not written
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._philox import exponential_race

PAGE_SIZE = 64


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * h.to(x.dtype)


def add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    residual.add_(x)
    return rmsnorm(residual, weight, eps)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    h = x if norm_weight is None else rmsnorm(x, norm_weight, eps)
    y = F.linear(h, weight, bias)
    return y if residual is None else residual + y


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def short_conv_prefill(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    conv_state: torch.Tensor,
    *,
    positions: torch.Tensor,
    token_rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    slots: torch.Tensor,
    first_computed: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    n, width = bcx.shape[0], weight.shape[1]
    ring = conv_state.shape[1]
    b, c, x = bcx.chunk(3, dim=-1)
    u = b * x
    rows = token_rows.long()
    token_slots = slots.long()[rows]
    starts, ends = query_start_loc.long()[rows], query_start_loc.long()[rows + 1]
    index, position = torch.arange(n, device=bcx.device), positions.long()
    live = position >= 0
    acc = torch.zeros(u.shape, dtype=torch.float32, device=u.device)
    for back in range(width - 1, -1, -1):
        source, past = index - back, position - back
        from_span = (source >= starts)[:, None]
        seen = (live & (past >= first_computed.long()[token_slots]))[:, None]
        ring_value = conv_state[token_slots, past.remainder(ring)]
        value = torch.where(from_span, u[source.clamp(min=0)], ring_value)
        tap = weight[:, width - 1 - back].float()
        acc += torch.where(seen, value, 0).float() * tap
    if bias is not None:
        acc += bias.float()
    y = torch.where(live[:, None], c * acc.to(u.dtype), 0)
    keep = live & (index >= ends - ring)
    conv_state[token_slots[keep], position[keep].remainder(ring)] = u[keep]
    return y


def short_conv_decode(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    conv_state: torch.Tensor,
    *,
    positions: torch.Tensor,
    slots: torch.Tensor,
    first_computed: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = torch.arange(bcx.shape[0] + 1, dtype=torch.int32, device=bcx.device)
    return short_conv_prefill(
        bcx,
        weight,
        conv_state,
        positions=positions,
        token_rows=rows[:-1],
        query_start_loc=rows,
        slots=slots,
        first_computed=first_computed,
        bias=bias,
    )


def rope_table(num_positions: int, head_dim: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    """``[num_positions, head_dim]``: cos of the head_dim / 2 angles, then their sin, in ``dtype``.

    Angles, cos and sin are fp32 and rounded once, as transformers does.
    """
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope: torch.Tensor,
    kv_pages: torch.Tensor,
    *,
    eps: float,
    positions: torch.Tensor,
    token_rows: torch.Tensor,
    slots: torch.Tensor,
    page_table: torch.Tensor,
    kv_write_from: torch.Tensor,
) -> torch.Tensor:
    n, dim = qkv.shape[0], q_weight.shape[0]
    kv_heads = kv_pages.shape[2]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q, k, v = qkv.view(n, -1, dim).split([heads, kv_heads, kv_heads], dim=1)
    live = positions >= 0
    cos, sin = rope[positions.clamp(min=0).long()][:, None].chunk(2, dim=-1)

    def rotate(h: torch.Tensor) -> torch.Tensor:
        lo, hi = h.chunk(2, dim=-1)
        return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], dim=-1)

    q, k = rotate(rmsnorm(q, q_weight, eps)), rotate(rmsnorm(k, k_weight, eps))
    token_slots = slots.long()[token_rows.long()]
    write = live & (positions >= kv_write_from[token_slots])
    at = positions[write].long()
    pages = page_table[token_slots[write], at // PAGE_SIZE].long()
    kv_pages[pages, 0, :, at % PAGE_SIZE] = k[write]
    kv_pages[pages, 1, :, at % PAGE_SIZE] = v[write]
    return torch.where(live[:, None, None], q, 0)


def attention_prefill(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    page_table: torch.Tensor,
    *,
    positions: torch.Tensor,
    query_start_loc: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    out = torch.zeros_like(q)
    _, _, kv_heads, _, dim = kv_pages.shape
    group = q.shape[1] // kv_heads
    bounds = query_start_loc.tolist()
    for row, slot in enumerate(slots.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        if begin == end or int(positions[begin]) < 0:
            continue
        at = positions[begin:end].long()
        length = int(at[-1]) + 1
        pages = page_table[slot, : -(-length // PAGE_SIZE)].long()
        # [pages, 2, kv_heads, 64, dim] -> [2, kv_heads, length, dim]
        k, v = kv_pages[pages].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        # [kv_heads, group * T, dim]: one product a kv head serves its whole group of queries
        queries = q[begin:end].view(-1, kv_heads, group, dim).permute(1, 2, 0, 3).flatten(1, 2)
        scores = queries.float() @ k.float().transpose(1, 2) * scale
        hidden = torch.arange(length, device=q.device)[None, :] > at[:, None]
        scores.masked_fill_(hidden.repeat(group, 1), float("-inf"))
        attended = scores.softmax(dim=-1) @ v.float()
        out[begin:end] = (
            attended.view(kv_heads, group, -1, dim).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
        )
    return out


def attention_decode(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    page_table: torch.Tensor,
    *,
    positions: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return attention_prefill(
        q,
        kv_pages,
        page_table,
        positions=positions,
        query_start_loc=torch.arange(q.shape[0] + 1, dtype=torch.int32),
        slots=slots,
        scale=scale,
    )


def route(
    logits: torch.Tensor,
    expert_bias: torch.Tensor | None,
    *,
    top_k: int,
    norm_topk_prob: bool,
    scaling: float,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.sigmoid()
    biased = scores if expert_bias is None else scores.float() + expert_bias
    # a stable sort makes ties go to the lower expert id; torch.topk leaves them open
    ids = biased.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)
    weights = weights * scaling
    if positions is not None:
        pad = (positions < 0)[:, None]
        ids, weights = ids.masked_fill(pad, logits.shape[1]), weights.masked_fill(pad, 0)
    return weights, ids.to(torch.int32)


def sort_tokens(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    flat = topk_ids.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return order.to(torch.int32), offsets.to(torch.int32)


def grouped_swiglu(
    x: torch.Tensor,
    w13: torch.Tensor,
    sorted_slots: torch.Tensor,
    expert_offsets: torch.Tensor,
    *,
    top_k: int,
) -> torch.Tensor:
    out = x.new_zeros(sorted_slots.shape[0], w13.shape[1] // 2)
    bounds = expert_offsets.tolist()
    for expert in range(w13.shape[0]):
        span = slice(bounds[expert], bounds[expert + 1])
        if span.start < span.stop:
            out[span] = swiglu(F.linear(x[sorted_slots[span].long() // top_k], w13[expert]))
    return out


def grouped_linear(
    act: torch.Tensor,
    w2: torch.Tensor,
    sorted_slots: torch.Tensor,
    expert_offsets: torch.Tensor,
    topk_weights: torch.Tensor,
) -> torch.Tensor:
    out = act.new_zeros(sorted_slots.shape[0], w2.shape[1])
    bounds = expert_offsets.tolist()
    flat_weights = topk_weights.flatten()
    for expert in range(w2.shape[0]):
        span = slice(bounds[expert], bounds[expert + 1])
        if span.start < span.stop:
            target = sorted_slots[span].long()
            y = F.linear(act[span], w2[expert])
            out[target] = (y * flat_weights[target, None]).to(act.dtype)
    return out


def moe_combine(
    slot_outputs: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, residual: torch.Tensor
) -> torch.Tensor:
    n, top_k = topk_ids.shape
    parts = slot_outputs.view(n, top_k, -1).float()
    parts = torch.where((topk_ids < num_experts)[:, :, None], parts, 0)
    acc = parts[:, 0]
    for j in range(1, top_k):
        acc = acc + parts[:, j]
    return residual + acc.to(residual.dtype)


def moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    residual: torch.Tensor,
) -> torch.Tensor:
    experts = w13.shape[0]
    order, offsets = sort_tokens(topk_ids, experts)
    act = grouped_swiglu(x, w13, order, offsets, top_k=topk_ids.shape[1])
    return moe_combine(
        grouped_linear(act, w2, order, offsets, topk_weights), topk_ids, experts, residual
    )


def process_logits(
    logits: torch.Tensor,
    *,
    slots: torch.Tensor,
    vocab_size: int,
    seen: torch.Tensor,
    repetition_penalty: torch.Tensor,
    dense_rows: torch.Tensor,
    counts: torch.Tensor,
    logit_bias: torch.Tensor,
    presence_penalty: torch.Tensor,
    frequency_penalty: torch.Tensor,
    mask: torch.Tensor,
    mask_rows: torch.Tensor,
) -> torch.Tensor:
    slot = slots.long()
    h = logits.float().clone()
    h[:, vocab_size:] = float("-inf")
    masked = mask_rows >= 0
    allowed = _unpack_bits(mask[mask_rows.clamp(min=0).long()], h.shape[1])
    h.masked_fill_(~(allowed | ~masked[:, None]), float("-inf"))
    dense = dense_rows.long()[slot]
    h += logit_bias[dense]
    penalty = repetition_penalty[slot][:, None]
    penalised = torch.where(h > 0, h / penalty, h * penalty)
    h = torch.where(_unpack_bits(seen[slot], h.shape[1]), penalised, h)
    count = counts[dense]
    h = h - frequency_penalty[slot][:, None] * count
    return h - presence_penalty[slot][:, None] * (count > 0)


def update_seen(
    tokens: torch.Tensor,
    seen: torch.Tensor,
    counts: torch.Tensor,
    *,
    slots: torch.Tensor,
    positions: torch.Tensor,
    dense_rows: torch.Tensor,
) -> None:
    live = (slots > 0) & (positions >= 0)
    slot, token = slots[live].long(), tokens[live]
    seen[slot, token.long() // 32] |= 1 << (token % 32)
    dense = dense_rows[slot].long()
    # dense row 0 is shared by all slots that have none: it stays zero
    counted = dense > 0
    counts[dense[counted], token[counted].long()] += 1


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = logits.float()
    chosen = h.gather(1, ids.long()[:, None])
    logprobs = chosen - h.logsumexp(dim=-1, keepdim=True)
    ranks = 1 + (h > chosen).sum(dim=-1)
    return logprobs[:, 0], ranks.to(torch.int32)


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
) -> torch.Tensor:
    slot = slots.long()
    out = logits.argmax(dim=-1)
    for row in (temperature[slot] > 0).nonzero().flatten().tolist():
        s = int(slot[row])
        # divided, not multiplied by the inverse: the kernel divides, and bits must agree
        h = logits[row] / temperature[s]
        if not h.max().isfinite():
            # no distribution: any token will do, the caller reports the row
            continue
        kept = _survivors(h, int(top_k[s]), float(top_p[s]), float(min_p[s]))
        race = h[kept] - exponential_race(kept, int(positions[row]), int(choices[s]), int(seeds[s]))
        out[row] = kept[race.argmax()]
    return out.to(torch.int32)


def _survivors(h: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Ids kept by min-p, then top-k, then top-p over what is left; ties at a threshold all stay."""
    kept = (h > float("-inf")).nonzero().flatten()
    if min_p > 0:
        kept = kept[(h[kept] - h.max()).exp() >= min_p]
    if 0 < top_k < kept.numel():
        kept = kept[h[kept] >= h[kept].topk(top_k).values[-1]]
    if top_p < 1:
        # a token stays while the mass strictly above it is under top_p: the first one always does
        order = h[kept].sort(descending=True, stable=True)
        mass = order.values.softmax(dim=0)
        above = mass.cumsum(0) - mass
        threshold = order.values[above < top_p][-1]
        kept = kept[h[kept] >= threshold]
    return kept


def _unpack_bits(words: torch.Tensor, width: int) -> torch.Tensor:
    """``[R, W]`` int32 words to ``[R, width]`` bool; bit b of word w is id 32 w + b."""
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    bits = (words[:, :, None] >> shifts) & 1
    return bits.flatten(1)[:, :width].bool()
