"""One case per public op: inputs at a model's shape, the bytes and operations it cannot avoid.

Bytes count each input read once and each output written once, with only the experts that the drawn
routing touches; operations count the arithmetic of products (2 per multiply-add), not element-wise
work. ``deviation`` runs the op and its reference on the same inputs: nothing wrong is ever timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import lfm2_kernels
from lfm2_gpu.config import ModelConfig
from lfm2_kernels import reference

__all__ = ["BUILDERS", "Case", "Sizes", "build"]

PAGE_SIZE = reference.PAGE_SIZE
# rows of more than this would need more logits than a step ever has
_MAX_SAMPLED_ROWS = 1024


@dataclass(slots=True)
class Case:
    """A call of ``lfm2_kernels.<op>`` with its work.

    Attributes:
        launch: Keywords that the op's launch needs and its reference does not.
        writes: Indexes of the positional arguments that the op changes in place.
        tolerance: Largest deviation from the reference that is not an error, see ``deviation``.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bytes: int
    flops: int = 0
    launch: dict[str, Any] = field(default_factory=dict)
    writes: tuple[int, ...] = ()
    tolerance: float = 0.0

    def run(self) -> Any:
        """Call the op."""
        return getattr(lfm2_kernels, self.op)(*self.args, **self.kwargs, **self.launch)

    def deviation(self) -> float:
        """Largest difference from the reference, as a fraction of the largest value.

        For integer results: the fraction of values that differ. NaN where either has a NaN.
        """
        args = list(self.args)
        for index in self.writes:
            args[index] = args[index].clone()
        wanted = getattr(reference, self.op)(*args, **self.kwargs)
        got = self.run()
        if self.op == "route":
            return _route_difference(got, wanted)
        pairs = list(zip(_tensors(got), _tensors(wanted), strict=True))
        pairs += [(self.args[index], args[index]) for index in self.writes]
        worst = [_difference(a, b) for a, b in pairs]
        # max() would drop a NaN
        return math.nan if any(map(math.isnan, worst)) else max(worst)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a case is built for: a model's shape, tokens in the step, context of decode rows."""

    config: ModelConfig
    tokens: int
    dtype: torch.dtype
    device: torch.device
    context: int = 1024

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Random values made on the device: a seeded host generator would take minutes for 24B."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device) * scale

    def weight(self, rows: int, columns: int) -> torch.Tensor:
        """A matrix that keeps unit scale."""
        return self.normal(rows, columns, scale=columns**-0.5)

    def int32(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` as int32 on the device."""
        return values.to(device=self.device, dtype=torch.int32)


def build(op: str, sizes: Sizes) -> Case:
    """Make the inputs of ``op``."""
    case = BUILDERS[op](sizes)
    if case.tolerance == 0.0:
        # two roundings of the largest value: 2**-8 each in bf16, 2**-11 in fp16; sums in another
        # order stay far below in fp32
        case.tolerance = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(sizes.dtype, 1e-4)
    return case


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    if result is None:
        return ()
    return result if isinstance(result, tuple) else (result,)


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    if not wanted.is_floating_point():
        return float((got != wanted).float().mean())
    # rows that are masked hold -inf in both
    same = got == wanted
    difference = torch.where(same, 0, got.float() - wanted.float()).abs().max()
    finite = torch.where(wanted.isfinite(), wanted.float(), 0).abs().max()
    return float(difference / finite.clamp(min=1e-30))


def _route_difference(got: Any, wanted: Any) -> float:
    """Share of rows with other experts (scores on a rounding boundary), or the others' weights."""
    same = (got[1] == wanted[1]).all(dim=1)
    other = 1.0 - float(same.float().mean())
    weights = _difference(got[0][same], wanted[0][same]) if same.any() else 0.0
    return weights if math.isnan(weights) else max(other, weights)


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _rmsnorm(s: Sizes) -> Case:
    x, weight = s.normal(s.tokens, s.config.hidden_size), s.normal(s.config.hidden_size)
    return Case("rmsnorm", (x, weight, s.config.norm_eps), {}, 2 * _bytes(x) + _bytes(weight))


def _add_rmsnorm(s: Sizes) -> Case:
    x, residual = (s.normal(s.tokens, s.config.hidden_size) for _ in range(2))
    weight = s.normal(s.config.hidden_size)
    # scaled to nothing, so that a thousand timed repetitions do not grow the residual
    args = (x * 1e-3, residual, weight, s.config.norm_eps)
    return Case("add_rmsnorm", args, {}, 4 * _bytes(x) + _bytes(weight), writes=(1,))


def _linear(s: Sizes) -> Case:
    hidden = s.config.hidden_size
    x, weight = s.normal(s.tokens, hidden), s.weight(3 * hidden, hidden)
    work = _bytes(x) * 4 + _bytes(weight)
    return Case("linear", (x, weight), {}, work, flops=2 * x.shape[0] * weight.numel())


def _swiglu(s: Sizes) -> Case:
    gate_up = s.normal(s.tokens, 2 * s.config.intermediate_size)
    return Case("swiglu", (gate_up,), {}, _bytes(gate_up) * 3 // 2)


def _rows(s: Sizes, decode: bool) -> dict[str, torch.Tensor]:
    """Batch metadata: ``tokens`` decode rows at the context's end, or one prefill of ``tokens``."""
    rows = s.tokens if decode else 1
    length = s.context if decode else s.tokens
    pages = -(-length // PAGE_SIZE)
    # pages in random order, as a server that has run for a while has them
    order = torch.randperm(rows * pages) + 1
    table = torch.zeros(rows + 1, pages, dtype=torch.int64)
    table[1:] = order.view(rows, pages)
    each = torch.arange(s.tokens)
    positions = torch.full((s.tokens,), length - 1) if decode else each
    starts = torch.arange(rows + 1) if decode else torch.tensor([0, s.tokens])
    return {
        "positions": s.int32(positions),
        "token_rows": s.int32(each if decode else torch.zeros_like(each)),
        "query_start_loc": s.int32(starts),
        "slots": s.int32(torch.arange(1, rows + 1)),
        "page_table": s.int32(table),
        "zeros": s.int32(torch.zeros(rows + 1)),
    }


def _pick(rows: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: rows[name] for name in names}


def _conv_inputs(s: Sizes, rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    hidden, taps = s.config.hidden_size, s.config.conv_L_cache
    bcx, weight = s.normal(s.tokens, 3 * hidden), s.normal(hidden, taps)
    return bcx, weight, s.normal(rows["slots"].shape[0] + 1, taps, hidden)


def _short_conv_prefill(s: Sizes) -> Case:
    rows = _rows(s, decode=False)
    args = _conv_inputs(s, rows)
    kwargs = _pick(rows, "positions", "token_rows", "query_start_loc", "slots")
    kwargs["first_computed"] = rows["zeros"]
    work = _bytes(args[0]) * 4 // 3 + _bytes(args[1])
    return Case("short_conv_prefill", args, kwargs, work, writes=(2,))


def _short_conv_decode(s: Sizes) -> Case:
    rows = _rows(s, decode=True)
    args = _conv_inputs(s, rows)
    kwargs = {**_pick(rows, "positions", "slots"), "first_computed": rows["zeros"]}
    taps = args[1].shape[1]
    # read B, C, x and the past taps - 1 rows; write y and this position's row
    work = _bytes(args[0]) * (3 + 1 + taps) // 3 + _bytes(args[1])
    return Case("short_conv_decode", args, kwargs, work, writes=(2,))


def _pages(s: Sizes, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    count = rows["page_table"].numel() + 1
    return s.normal(count, 2, s.config.num_key_value_heads, PAGE_SIZE, s.config.head_dim)


def _qk_norm_rope(s: Sizes) -> Case:
    c, rows = s.config, _rows(s, decode=False)
    qkv = s.normal(s.tokens, (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim)
    rope = reference.rope_table(s.tokens, c.head_dim, c.rope_theta, s.dtype).to(s.device)
    weights = s.normal(c.head_dim), s.normal(c.head_dim)
    kwargs: dict[str, Any] = {
        "eps": c.norm_eps,
        **_pick(rows, "positions", "token_rows", "slots", "page_table"),
        "kv_write_from": rows["zeros"],
    }
    args = (qkv, *weights, rope, _pages(s, rows))
    return Case("qk_norm_rope", args, kwargs, 2 * _bytes(qkv) + _bytes(rope), writes=(4,))


def _attention(s: Sizes, decode: bool) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    c, rows = s.config, _rows(s, decode)
    q = s.normal(s.tokens, c.num_attention_heads, c.head_dim)
    names = ("positions", "slots") if decode else ("positions", "query_start_loc", "slots")
    kwargs: dict[str, Any] = {**_pick(rows, *names), "scale": c.head_dim**-0.5}
    return (q, _pages(s, rows), rows["page_table"]), kwargs


def _kv_bytes(s: Sizes, length: int) -> int:
    each = 2 * s.config.num_key_value_heads * s.config.head_dim
    return length * each * torch.empty(0, dtype=s.dtype).element_size()


def _attention_prefill(s: Sizes) -> Case:
    args, kwargs = _attention(s, decode=False)
    pairs = s.tokens * (s.tokens + 1) // 2
    flops = 4 * s.config.num_attention_heads * s.config.head_dim * pairs
    work = 2 * _bytes(args[0]) + _kv_bytes(s, s.tokens)
    return Case("attention_prefill", args, kwargs, work, flops)


def _attention_decode(s: Sizes) -> Case:
    args, kwargs = _attention(s, decode=True)
    flops = 4 * args[0].numel() * s.context
    work = 2 * _bytes(args[0]) + s.tokens * _kv_bytes(s, s.context)
    return Case("attention_decode", args, kwargs, work, flops, launch={"max_seq_len": s.context})


def _router_outputs(s: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    logits = s.normal(s.tokens, s.config.num_experts)
    return reference.route(
        logits, None, top_k=s.config.num_experts_per_tok, norm_topk_prob=True, scaling=1.0
    )


def _route(s: Sizes) -> Case:
    c = s.config
    logits = s.normal(s.tokens, c.num_experts)
    bias = torch.randn(c.num_experts, device=s.device) * 0.1
    kwargs = {"top_k": c.num_experts_per_tok, "norm_topk_prob": True, "scaling": 1.0}
    work = _bytes(logits, bias) + s.tokens * c.num_experts_per_tok * (4 + logits.element_size())
    return Case("route", (logits, bias), kwargs, work, tolerance=0.01)


def _sort_tokens(s: Sizes) -> Case:
    _, ids = _router_outputs(s)
    work = 2 * _bytes(ids) + 4 * (s.config.num_experts + 1)
    return Case("sort_tokens", (ids, s.config.num_experts), {}, work)


def _expert_weights(s: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    c = s.config
    w13 = s.normal(c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size)
    w2 = s.normal(c.num_experts, c.hidden_size, c.moe_intermediate_size)
    return w13.mul_(c.hidden_size**-0.5), w2.mul_(c.moe_intermediate_size**-0.5)


def _touched(ids: torch.Tensor, weight: torch.Tensor) -> int:
    return int(ids.unique().numel()) * _bytes(weight[0])


def _grouped_swiglu(s: Sizes) -> Case:
    (w13, _), (_, ids) = _expert_weights(s), _router_outputs(s)
    order, offsets = reference.sort_tokens(ids, w13.shape[0])
    x = s.normal(s.tokens, s.config.hidden_size)
    out = s.tokens * ids.shape[1] * s.config.moe_intermediate_size * x.element_size()
    return Case(
        "grouped_swiglu",
        (x, w13, order, offsets),
        {"top_k": ids.shape[1]},
        _bytes(x) + out + _touched(ids, w13),
        flops=2 * ids.numel() * w13[0].numel(),
    )


def _grouped_linear(s: Sizes) -> Case:
    (_, w2), (weights, ids) = _expert_weights(s), _router_outputs(s)
    order, offsets = reference.sort_tokens(ids, w2.shape[0])
    act = s.normal(ids.numel(), s.config.moe_intermediate_size)
    out = ids.numel() * s.config.hidden_size * act.element_size()
    return Case(
        "grouped_linear",
        (act, w2, order, offsets, weights),
        {},
        _bytes(act) + out + _touched(ids, w2),
        flops=2 * ids.numel() * w2[0].numel(),
    )


def _moe_combine(s: Sizes) -> Case:
    _, ids = _router_outputs(s)
    parts = s.normal(ids.numel(), s.config.hidden_size)
    residual = s.normal(s.tokens, s.config.hidden_size)
    args = (parts, ids, s.config.num_experts, residual)
    return Case("moe_combine", args, {}, _bytes(parts, ids) + 2 * _bytes(residual))


def _moe(s: Sizes) -> Case:
    (w13, w2), (weights, ids) = _expert_weights(s), _router_outputs(s)
    x, residual = (s.normal(s.tokens, s.config.hidden_size) for _ in range(2))
    return Case(
        "moe",
        (x, w13, w2, weights, ids),
        {"residual": residual},
        3 * _bytes(x) + _touched(ids, w13) + _touched(ids, w2),
        flops=2 * ids.numel() * (w13[0].numel() + w2[0].numel()),
    )


def _logits(s: Sizes) -> torch.Tensor:
    rows = min(s.tokens, _MAX_SAMPLED_ROWS)
    return torch.randn(rows, s.config.vocab_size, device=s.device) * 3


def _process_logits(s: Sizes) -> Case:
    logits = _logits(s).to(s.dtype)
    rows, vocab = logits.shape
    ones = torch.ones(rows + 1, device=s.device)
    words = -(-vocab // 32)
    seen = s.int32(torch.randint(-(2**31), 2**31, (rows + 1, words)))
    kwargs = {
        "slots": s.int32(torch.arange(1, rows + 1)),
        "vocab_size": vocab - 1,
        "seen": seen,
        "repetition_penalty": ones * 1.05,
        # no row uses dense counts or a mask: the common case
        "dense_rows": s.int32(torch.zeros(rows + 1)),
        "counts": s.int32(torch.zeros(1, vocab)),
        "logit_bias": torch.zeros(1, vocab, device=s.device),
        "presence_penalty": ones * 0,
        "frequency_penalty": ones * 0,
        "mask": s.int32(torch.zeros(1, words)),
        "mask_rows": s.int32(torch.full((rows,), -1)),
    }
    work = _bytes(logits) + 4 * logits.numel() + _bytes(seen)
    return Case("process_logits", (logits,), kwargs, work)


def _update_seen(s: Sizes) -> Case:
    rows, vocab = min(s.tokens, _MAX_SAMPLED_ROWS), s.config.vocab_size
    tokens = s.int32(torch.randint(vocab, (rows,)))
    seen = s.int32(torch.zeros(rows + 1, -(-vocab // 32)))
    kwargs = {
        "slots": s.int32(torch.arange(1, rows + 1)),
        "positions": s.int32(torch.full((rows,), s.context)),
        # every row counts its tokens
        "dense_rows": s.int32(torch.arange(rows + 1)),
    }
    counts = s.int32(torch.zeros(rows + 1, vocab))
    # a word of each table is read and written per row, and four numbers are read
    return Case("update_seen", (tokens, seen, counts), kwargs, 32 * rows, writes=(1, 2))


def _token_logprobs(s: Sizes) -> Case:
    logits = _logits(s)
    ids = s.int32(torch.randint(logits.shape[1], (logits.shape[0],)))
    return Case("token_logprobs", (logits, ids), {}, _bytes(logits))


def _sample(s: Sizes) -> Case:
    logits = _logits(s)
    rows = logits.shape[0]
    slots = rows + 1
    full = torch.full((slots,), 0.0, device=s.device)
    kwargs = {
        "slots": s.int32(torch.arange(1, slots)),
        "positions": s.int32(torch.full((rows,), s.context)),
        # what the vendor recommends for the 24B
        "temperature": full + 0.1,
        "top_k": s.int32(full + 50),
        "top_p": full + 1,
        "min_p": full,
        "seeds": torch.arange(slots, device=s.device),
        "choices": s.int32(full),
    }
    # a rounding of the draw may cross a near-tie in one row of a hundred, not more
    return Case("sample", (logits,), kwargs, _bytes(logits), tolerance=0.01)


BUILDERS: dict[str, Callable[[Sizes], Case]] = {
    "rmsnorm": _rmsnorm,
    "add_rmsnorm": _add_rmsnorm,
    "linear": _linear,
    "swiglu": _swiglu,
    "short_conv_prefill": _short_conv_prefill,
    "short_conv_decode": _short_conv_decode,
    "qk_norm_rope": _qk_norm_rope,
    "attention_prefill": _attention_prefill,
    "attention_decode": _attention_decode,
    "route": _route,
    "sort_tokens": _sort_tokens,
    "grouped_swiglu": _grouped_swiglu,
    "grouped_linear": _grouped_linear,
    "moe_combine": _moe_combine,
    "moe": _moe,
    "process_logits": _process_logits,
    "update_seen": _update_seen,
    "token_logprobs": _token_logprobs,
    "sample": _sample,
}
