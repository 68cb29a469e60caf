"""The router against its reference, bit by bit where rounding allows, ties and padding included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lfm2_kernels import reference
from lfm2_kernels.router import route

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(
    logits: torch.Tensor, bias: torch.Tensor | None, device: torch.device, **options: Any
) -> None:
    logits = logits.to(device)
    bias = None if bias is None else bias.to(device)
    want_weights, want_ids = reference.route(logits, bias, **options)
    weights, ids = torch.full_like(want_weights, torch.nan), torch.full_like(want_ids, -7)
    got = route(logits, bias, **options, out=(weights, ids))
    assert got[0] is weights
    assert got[1] is ids
    # both round the same fp32 scores to the logits' dtype; these differ in the last bits of exp,
    # which moves one over a rounding edge by an ulp of a number below 1. Only scores so near may
    # be exchanged, and a weight may move by that ulp
    eps = max(torch.finfo(logits.dtype).eps, 1e-6)
    experts = logits.shape[1]
    assert torch.equal(ids == experts, want_ids == experts)
    scores = logits.sigmoid().float() + (0 if bias is None else bias)
    chosen, want = (scores.gather(1, x.long().clamp(max=experts - 1)) for x in (ids, want_ids))
    torch.testing.assert_close(chosen, want, rtol=0, atol=eps)
    torch.testing.assert_close(weights, want_weights, rtol=eps, atol=0)
    # and hardly any is
    assert (ids == want_ids).float().mean() > 0.98 or ids.numel() == 0


@pytest.mark.parametrize(
    ("n", "experts", "top_k"),
    [(0, 8, 2), (1, 4, 1), (5, 12, 3), (67, 32, 4), (9, 64, 8), (3, 5, 5)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(
    n: int, experts: int, top_k: int, dtype: torch.dtype, device: torch.device
) -> None:
    logits = torch.randn(n, experts).to(dtype)
    bias = 0.1 * torch.randn(experts)
    positions = torch.randint(-1, 3, (n,), dtype=torch.int32).to(device)
    check(
        logits,
        bias,
        device,
        top_k=top_k,
        norm_topk_prob=True,
        scaling=2.5,
        positions=positions,
    )
    check(logits, None, device, top_k=top_k, norm_topk_prob=False, scaling=0.7)


def test_ties_go_to_the_lower_expert(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0], [0.0] * 5], device=device)
    _, ids = route(logits, None, top_k=4, norm_topk_prob=True, scaling=1.0)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_bias_chooses_but_does_not_weigh(device: torch.device) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device)
    bias = torch.tensor([-9.0, 0.0, 0.0, 9.0], device=device)
    weights, ids = route(logits, bias, top_k=2, norm_topk_prob=False, scaling=1.0)
    assert ids.tolist() == [[3, 1]]
    torch.testing.assert_close(weights, logits[:, [3, 1]].sigmoid())


def test_bias_is_not_rounded_to_the_logits(device: torch.device) -> None:
    # 2^-12 is lost beside 0.5 in bfloat16
    logits = torch.zeros(1, 3, dtype=torch.bfloat16, device=device)
    bias = torch.tensor([0.0, 2.0**-12, 2.0**-13], device=device)
    _, ids = route(logits, bias, top_k=3, norm_topk_prob=False, scaling=1.0)
    assert ids.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_vanishing_scores(dtype: torch.dtype, device: torch.device) -> None:
    # scores near 1e-6: what 1e-6 adds to their sum shows, rounded where the reference rounds it
    logits = torch.linspace(-16, -12, 24).view(3, 8).to(dtype)
    check(logits, torch.zeros(8), device, top_k=3, norm_topk_prob=True, scaling=1.0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_ids_stay_in_range_whatever_the_logits(poison: float, device: torch.device) -> None:
    logits = torch.randn(3, 6, device=device)
    logits[0] = poison
    logits[1, 2:] = poison
    _, ids = route(logits, None, top_k=4, norm_topk_prob=True, scaling=1.0)
    assert all(sorted(set(row)) == sorted(row) for row in ids.tolist())
    assert (ids >= 0).all()
    assert (ids < 6).all()


def test_padding_gets_expert_e_and_weight_zero(device: torch.device) -> None:
    logits = torch.full((2, 4), torch.nan, device=device)
    positions = torch.tensor([-1, -1], dtype=torch.int32, device=device)
    weights, ids = route(
        logits, None, top_k=2, norm_topk_prob=True, scaling=1.0, positions=positions
    )
    assert ids.tolist() == [[4, 4], [4, 4]]
    assert weights.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "logits is int32"),
        ({"logits": torch.zeros(4)}, ValueError, r"logits is \[4\], want \[N, E\]"),
        ({"logits": torch.zeros(2, 300)}, ValueError, "at most 256 experts"),
        ({"logits": torch.zeros(4, 2).T}, ValueError, "want it contiguous"),
        ({"expert_bias": torch.zeros(3)}, ValueError, r"expert_bias is \[3\], want \[4\]"),
        ({"expert_bias": torch.zeros(4, dtype=torch.bfloat16)}, TypeError, "expert_bias is bf"),
        ({"top_k": 5}, ValueError, "top_k is 5, want 1 to 4"),
        ({"top_k": 0}, ValueError, "top_k is 0, want 1 to 4"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, ValueError, "positions"),
        ({"positions": torch.zeros(2)}, TypeError, "positions is float32, want int32"),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(2, 4),
        "expert_bias": None,
        "top_k": 2,
        "norm_topk_prob": True,
        "scaling": 1.0,
    }
    with pytest.raises(error, match=message):
        route(**(arguments | change))
