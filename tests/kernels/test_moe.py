"""Token sort, both expert GEMMs, their weighted sum, and the whole layer against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lfm2_kernels import reference
from lfm2_kernels._moe_tiles import GroupedGemmConfig
from lfm2_kernels.moe import grouped_linear, grouped_swiglu, moe, moe_combine
from lfm2_kernels.moe_sort import sort_tokens

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# name: tokens, experts, top_k, hidden, width, routing; every mean number of rows per expert that
# GroupedGemmConfig tells apart, on sizes that no tile divides
LAYERS = {
    "one_token": (1, 4, 2, 96, 48, "random"),
    "one_token_top_1": (1, 8, 1, 40, 24, "random"),
    "few_tokens": (5, 6, 3, 320, 80, "random"),
    "top_8_of_64": (3, 64, 8, 64, 32, "random"),
    "one_expert_takes_all": (40, 5, 1, 96, 48, "all_on_last"),
    "empty_experts": (30, 12, 2, 72, 48, "first_half"),
    "padding": (21, 4, 4, 96, 48, "padded"),
    "only_padding": (7, 4, 2, 96, 48, "all_padded"),
    "many_rows": (150, 4, 2, 136, 72, "padded"),
}


def ids_of(n: int, experts: int, top_k: int, routing: str) -> torch.Tensor:
    among = experts // 2 if routing == "first_half" else experts
    ids = torch.rand(n, among).argsort(dim=1)[:, :top_k].int()
    if routing == "all_on_last":
        ids.fill_(experts - 1)
    if routing == "padded":
        ids[torch.rand(n) < 0.3] = experts
    if routing == "all_padded":
        ids.fill_(experts)
    return ids.contiguous()


def layer(
    name: str, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x, w13, w2, topk_weights, topk_ids, residual`` with values of unit scale throughout."""
    n, experts, top_k, hidden, width, routing = LAYERS[name]
    tensors = (
        torch.randn(n, hidden),
        torch.randn(experts, 2 * width, hidden) * hidden**-0.5,
        torch.randn(experts, hidden, width) * width**-0.5,
        torch.rand(n, top_k) + 0.1,
        torch.randn(n, hidden),
    )
    x, w13, w2, weights, residual = (t.to(dtype).to(device) for t in tensors)
    ids = ids_of(n, experts, top_k, routing).to(device)
    return x, w13, w2, weights, ids, residual


def oracle(op: Any, *args: Any, **options: Any) -> torch.Tensor:
    """The reference op on the CPU, where a 16-bit product accumulates in fp32 for sure."""
    tensors = (x.cpu() if isinstance(x, torch.Tensor) else x for x in args)
    on_cpu = {k: x.cpu() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    return op(*tensors, **on_cpu).to(args[0].device)


def assert_close(got: torch.Tensor, want: torch.Tensor, roundings: int) -> None:
    """Equal up to sums in another order.

    fp32: sums of at most 320 products of unit scale, 320 * 2^-24 < 2e-5. 16 bits: fp32 sums in
    another order move a value over a rounding edge, which shifts it by one ulp at each of the
    ``roundings`` points in a row; values are below 8 in size, most are equal.
    """
    eps = torch.finfo(want.dtype).eps
    if want.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    else:
        torch.testing.assert_close(got, want, rtol=roundings * eps, atol=roundings * eps)
        assert want.numel() == 0 or (got == want).float().mean() > 0.9


def check_sort(ids: torch.Tensor, experts: int) -> None:
    want = reference.sort_tokens(ids, experts)
    out = (torch.full_like(want[0], -7), torch.full_like(want[1], -7))
    got = sort_tokens(ids, experts, out=out)
    assert got[0] is out[0]
    assert got[1] is out[1]
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", LAYERS)
def test_sort(name: str, device: torch.device) -> None:
    n, experts, top_k, _, _, routing = LAYERS[name]
    check_sort(ids_of(n, experts, top_k, routing).to(device), experts)


# the largest sort of one launch takes the interpreter 15 s
@pytest.mark.parametrize("slots", [128, 129, 1000, pytest.param(8192, marks=pytest.mark.gpu)])
def test_sort_in_one_launch(slots: int, device: torch.device) -> None:
    check_sort(torch.randint(0, 4, (slots, 1), dtype=torch.int32, device=device), 3)


@pytest.mark.parametrize(
    ("n", "experts", "top_k", "routing"),
    [(8193, 32, 1, "padded"), (5000, 5, 4, "first_half"), (9001, 255, 1, "random")],
)
def test_sort_in_two_launches(
    n: int, experts: int, top_k: int, routing: str, device: torch.device
) -> None:
    check_sort(ids_of(n, experts, top_k, routing).to(device), experts)


def test_sort_of_no_tokens(device: torch.device) -> None:
    check_sort(torch.zeros(0, 4, dtype=torch.int32, device=device), 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_grouped_swiglu(name: str, dtype: torch.dtype, device: torch.device) -> None:
    x, w13, _, _, ids, _ = layer(name, dtype, device)
    experts, top_k = w13.shape[0], ids.shape[1]
    order, offsets = reference.sort_tokens(ids, experts)
    want = oracle(reference.grouped_swiglu, x, w13, order, offsets, top_k=top_k)
    out = torch.full_like(want, torch.nan)
    assert grouped_swiglu(x, w13, order, offsets, top_k=top_k, out=out) is out
    live = int(offsets[-1])
    assert_close(out[:live], want[:live], roundings=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_grouped_linear(name: str, dtype: torch.dtype, device: torch.device) -> None:
    _, _, w2, weights, ids, _ = layer(name, dtype, device)
    experts, _, width = w2.shape
    order, offsets = reference.sort_tokens(ids, experts)
    act = torch.randn(ids.numel(), width, device=device).to(dtype)
    # rows of dropped slots were never written
    act[int(offsets[-1]) :] = torch.nan
    want = oracle(reference.grouped_linear, act, w2, order, offsets, weights)
    out = torch.full_like(want, torch.nan)
    assert grouped_linear(act, w2, order, offsets, weights, out=out) is out
    live = ids.flatten() < experts
    assert_close(out[live], want[live], roundings=2)


def test_grouped_linear_takes_weights_of_another_dtype(device: torch.device) -> None:
    _, _, w2, weights, ids, _ = layer("few_tokens", torch.bfloat16, device)
    weights = weights.float() + 2**-12
    order, offsets = reference.sort_tokens(ids, w2.shape[0])
    act = torch.randn(ids.numel(), w2.shape[2], device=device).bfloat16()
    want = oracle(reference.grouped_linear, act, w2, order, offsets, weights)
    assert_close(grouped_linear(act, w2, order, offsets, weights), want, roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "top_k", "hidden"), [(1, 1, 64), (3, 4, 1100), (5, 8, 33)])
def test_combine(n: int, top_k: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    parts = torch.randn(n * top_k, hidden, device=device).to(dtype)
    residual = torch.randn(n, hidden, device=device).to(dtype)
    ids = torch.randint(0, 4, (n, top_k), dtype=torch.int32, device=device)
    want = reference.moe_combine(parts, ids, 3, residual)
    parts[ids.flatten() >= 3] = torch.nan
    # the same sums in the same order: equal to the bit
    assert torch.equal(moe_combine(parts, ids, 3, residual), want)
    assert moe_combine(parts, ids, 3, residual, out=residual) is residual
    assert torch.equal(residual, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_moe(name: str, dtype: torch.dtype, device: torch.device) -> None:
    x, w13, w2, weights, ids, residual = layer(name, dtype, device)
    want = oracle(reference.moe, x, w13, w2, weights, ids, residual=residual)
    out = torch.full_like(want, torch.nan)
    assert moe(x, w13, w2, weights, ids, residual=residual, out=out) is out
    # three roundings before w2, two after it and two in the sum
    assert_close(out, want, roundings=7)


def test_moe_of_no_tokens(device: torch.device) -> None:
    x = torch.zeros(0, 96, device=device)
    w13, w2 = torch.zeros(4, 96, 96, device=device), torch.zeros(4, 96, 48, device=device)
    ids = torch.zeros(0, 2, dtype=torch.int32, device=device)
    got = moe(x, w13, w2, torch.zeros(0, 2, device=device), ids, residual=x)
    assert got.shape == (0, 96)


def test_moe_equals_transformers(device: torch.device) -> None:
    # each expert in turn, weights applied after w2, as Lfm2MoeExperts does with eager experts
    x, w13, w2, weights, ids, residual = layer("few_tokens", torch.float32, device)
    want = residual.clone()
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = (w13[expert] @ x[token]).chunk(2)
            want[token] += weight * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
    got = moe(x, w13, w2, weights, ids, residual=residual)
    # five sums of unit scale instead of one
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_poison_in_one_token_stays_there(device: torch.device) -> None:
    x, w13, w2, weights, ids, residual = layer("few_tokens", torch.bfloat16, device)
    clean = moe(x, w13, w2, weights, ids, residual=residual)
    x[0] = torch.nan
    got = moe(x, w13, w2, weights, ids, residual=residual)
    assert got[0].isnan().all()
    assert torch.equal(got[1:], clean[1:])


@pytest.mark.parametrize("two_weights", [True, False])
def test_config_uses_wgmma_tiles_from_8_rows_per_expert(two_weights: bool) -> None:
    for experts, top_k in ((64, 4), (32, 4)):
        for tokens in (1, 16, 127, 128, 1024, 32768):
            config = GroupedGemmConfig.select(
                tokens * top_k, experts, torch.bfloat16, two_weights=two_weights
            )
            assert (config.block_m >= 64) == (tokens * top_k >= 8 * experts)


@pytest.mark.gpu
def test_moe_is_captured_and_replayed(device: torch.device) -> None:
    x, w13, w2, weights, ids, residual = layer("many_rows", torch.bfloat16, device)
    out = moe(x, w13, w2, weights, ids, residual=residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe(x, w13, w2, weights, ids, residual=residual, out=out)
    x.normal_()
    ids.copy_(ids.flip(0))
    graph.replay()
    # the same bits twice: nothing depends on the order of programs
    assert torch.equal(out, moe(x, w13, w2, weights, ids, residual=residual))


@pytest.mark.gpu
def test_experts_beyond_2_31_elements(device: torch.device) -> None:
    experts, hidden, width = 256, 2048, 4224
    w13 = torch.zeros(experts, 2 * width, hidden, dtype=torch.bfloat16, device=device)
    w2 = torch.zeros(experts, hidden, width, dtype=torch.bfloat16, device=device)
    w13[-1].normal_(std=hidden**-0.5)
    w2[-1].normal_(std=width**-0.5)
    x = torch.randn(3, hidden, device=device).bfloat16()
    ids = torch.full((3, 1), experts - 1, dtype=torch.int32, device=device)
    weights = torch.ones(3, 1, dtype=torch.bfloat16, device=device)
    alone = moe(x, w13[-1:].clone(), w2[-1:].clone(), weights, ids - ids, residual=x)
    got = moe(x, w13, w2, weights, ids, residual=x)
    assert not torch.equal(got, x)
    assert torch.equal(got, alone)


def arguments() -> dict[str, Any]:
    return {
        "x": torch.zeros(3, 16),
        "w13": torch.zeros(4, 24, 16),
        "w2": torch.zeros(4, 16, 12),
        "act": torch.zeros(6, 12),
        "sorted_slots": torch.zeros(6, dtype=torch.int32),
        "expert_offsets": torch.zeros(5, dtype=torch.int32),
        "topk_weights": torch.zeros(3, 2),
        "topk_ids": torch.zeros(3, 2, dtype=torch.int32),
        "slot_outputs": torch.zeros(6, 16),
        "residual": torch.zeros(3, 16),
        "out": None,
    }


OPS: dict[str, Any] = {
    "sort_tokens": lambda a: sort_tokens(a["topk_ids"], a.get("num_experts", 4)),
    "grouped_swiglu": lambda a: grouped_swiglu(
        a["x"], a["w13"], a["sorted_slots"], a["expert_offsets"], top_k=2, out=a["out"]
    ),
    "grouped_linear": lambda a: grouped_linear(
        a["act"], a["w2"], a["sorted_slots"], a["expert_offsets"], a["topk_weights"], out=a["out"]
    ),
    "moe_combine": lambda a: moe_combine(
        a["slot_outputs"], a["topk_ids"], 4, a["residual"], out=a["out"]
    ),
}


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        ("sort_tokens", {"topk_ids": torch.zeros(3, 2)}, TypeError, "topk_ids is float32"),
        ("sort_tokens", {"num_experts": 257}, ValueError, "num_experts is 257, want 1 to 256"),
        ("grouped_swiglu", {"x": torch.zeros(3, 8)}, ValueError, r"want \[E, 2 M, 8\]"),
        ("grouped_swiglu", {"w13": torch.zeros(4, 23, 16)}, ValueError, "even number of rows"),
        ("grouped_swiglu", {"w13": torch.zeros(4, 24, 16).half()}, TypeError, "w13 is float16"),
        ("grouped_swiglu", {"w13": torch.zeros(300, 24, 16)}, ValueError, "300 experts"),
        ("grouped_swiglu", {"x": torch.zeros(16, 3).T}, ValueError, "x has strides"),
        ("grouped_swiglu", {"out": torch.zeros(5, 12)}, ValueError, r"want \[6, 12\]"),
        (
            "grouped_swiglu",
            {"sorted_slots": torch.zeros(6).long()},
            TypeError,
            "sorted_slots is int64, want int32",
        ),
        (
            "grouped_swiglu",
            {"expert_offsets": torch.zeros(4, dtype=torch.int32)},
            ValueError,
            r"expert_offsets is \[4\], want \[5\]",
        ),
        ("grouped_linear", {"act": torch.zeros(6, 11)}, ValueError, r"want \[E, H, 11\]"),
        ("grouped_linear", {"topk_weights": torch.zeros(2, 2)}, ValueError, "want 6 weights"),
        ("grouped_linear", {"out": torch.zeros(16, 6).T}, ValueError, "out has strides"),
        ("moe_combine", {"residual": torch.zeros(2, 16)}, ValueError, r"want \[3, 16\]"),
        ("moe_combine", {"slot_outputs": torch.zeros(5, 16)}, ValueError, r"want \[6, H\]"),
        ("moe_combine", {"residual": torch.zeros(3, 16).half()}, TypeError, "residual is float16"),
    ],
)
def test_refuses(op: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{op}: .*{message}"):
        OPS[op](arguments() | change)
