"""The draw against the reference token by token, the reference against softmax, and logprobs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from lfm2_kernels import _philox, reference
from lfm2_kernels.sampling import _find_floors, _log_exponential, sample, token_logprobs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def settings(
    rows: int,
    device: torch.device,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
) -> dict[str, torch.Tensor]:
    """Arguments of ``sample`` but the logits: slot r + 1 of row r, all seeds and places different.

    A parameter is one number for all rows or a list with one per row. Slot 0 is a greedy dummy.
    """

    def column(value: Any, dtype: torch.dtype, dummy: float) -> torch.Tensor:
        values = value if isinstance(value, list) else [value] * rows
        return torch.tensor([dummy, *values], dtype=dtype, device=device)

    return {
        "slots": torch.arange(1, rows + 1, dtype=torch.int32, device=device),
        "positions": torch.randint(0, 9999, (rows,), dtype=torch.int32, device=device),
        "temperature": column(temperature, torch.float32, 0.0),
        "top_k": column(top_k, torch.int32, 0),
        "top_p": column(top_p, torch.float32, 1.0),
        "min_p": column(min_p, torch.float32, 0.0),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (rows + 1,), device=device),
        "choices": torch.randint(0, 4, (rows + 1,), dtype=torch.int32, device=device),
    }


def rounds_apart(logits: torch.Tensor) -> torch.Tensor:
    """Half of the rows get few distinct values, so that thresholds meet ties."""
    logits[::2] = logits[::2].round()
    return logits


# top_k of 0 and top_p of 1 keep all; 9,000 tokens take three steps of a program
@pytest.mark.parametrize("width", [37, 700, 9000])
def test_draws_the_token_of_the_reference(width: int, device: torch.device) -> None:
    mixes = list(itertools.product([0.0, 0.3, 1.7], [0, 1, 40], [1.0, 0.6], [0.0, 0.1]))
    temperature, top_k, top_p, min_p = map(list, zip(*mixes, strict=True))
    rows = len(mixes)
    arguments = settings(
        rows, device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    arguments["slots"] = arguments["slots"].flip(0)
    logits = rounds_apart(3 * torch.randn(rows, width + 1, device=device))[:, :width]
    # the largest logits share lanes: tokens of equal id modulo 4,096 follow each other in rank
    together = (torch.arange(width, device=device) % 4096).argsort(stable=True)
    logits[1::4, together] = logits[1::4].sort(dim=-1, descending=True).values
    # padded vocabulary
    logits[:, -4:] = -torch.inf
    out = torch.full((rows,), -7, dtype=torch.int32, device=device)
    assert sample(logits, **arguments, out=out) is out
    assert torch.equal(out, reference.sample(logits, **arguments))

    names = ("slots", "temperature", "top_k", "top_p", "min_p")
    floors = _find_floors(logits, *(arguments[name] for name in names))
    for row, slot in enumerate(arguments["slots"].tolist()):
        if temperature[slot - 1] > 0:
            h = logits[row] / temperature[slot - 1]
            survivors = reference._survivors(h, top_k[slot - 1], top_p[slot - 1], min_p[slot - 1])
            assert torch.equal((h > floors[row]).nonzero().flatten(), survivors)


def test_a_row_does_not_depend_on_the_others(device: torch.device) -> None:
    rows = 6
    arguments = settings(
        rows, device, temperature=[0.0, 1.0] * 3, top_k=[0, 5, 9] * 2, top_p=[0.9, 0.8] * 3
    )
    logits = torch.randn(rows, 100, device=device)
    together = sample(logits, **arguments)
    order = torch.randperm(rows, device=device)
    moved = arguments | {name: arguments[name][order] for name in ("slots", "positions")}
    assert torch.equal(sample(logits[order], **moved), together[order])
    alone = arguments | {name: arguments[name][3:4] for name in ("slots", "positions")}
    assert torch.equal(sample(logits[3:4], **alone), together[3:4])


@pytest.mark.parametrize("what", ["position", "choice", "low seed", "high seed"])
def test_each_part_of_the_counter_matters(what: str, device: torch.device) -> None:
    rows = 16
    arguments = settings(rows, device)
    for name in ("positions", "seeds", "choices"):
        arguments[name].fill_(7)
    logits = torch.zeros(rows, 50, device=device)
    assert len(set(sample(logits, **arguments).tolist())) == 1
    steps = torch.arange(rows, device=device)
    if what == "position":
        arguments["positions"] += steps.int()
    elif what == "choice":
        arguments["choices"][1:] += steps.int()
    else:
        arguments["seeds"][1:] += steps << (32 if what == "high seed" else 0)
    # 16 draws of 50: fewer than 8 different tokens has a probability below 1e-5
    assert len(set(sample(logits, **arguments).tolist())) >= 8


def test_philox_known_answer(device: torch.device) -> None:
    # Random123's kat_vectors: philox4x32-10 of counter 0 under key 0
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    assert _philox.philox(zero, 0, 0, 0).tolist() == [0x6627E8D5]


@triton.jit
def _log_exponential_kernel(ids_ptr, out_ptr, position, choice, seed, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, _log_exponential(tl.load(ids_ptr + offs), position, choice, seed))


def test_noise_is_the_log_of_an_exponential(device: torch.device) -> None:
    position, choice, seed, count = 31999, 2, -(2**61) - 12345, 2**16
    ids = torch.arange(count, dtype=torch.int32, device=device)
    want = _philox.exponential_race(ids, position, choice, seed)
    got = torch.empty_like(want)
    _log_exponential_kernel[(count // 2048,)](ids, got, position, choice, seed, BLOCK=2048)
    # a log of either sign of up to 22 in size, each side within an ulp or two
    torch.testing.assert_close(got, want, rtol=3e-7, atol=3e-7)
    u = (_philox.philox(ids.long(), position, choice, seed).double() + 1) * 2.0**-32
    exact = torch.log(-torch.log1p(-u))
    # the smallest u decide a race. The series is exact below 2^-10; above, 1 - u has an error of
    # 2^-25, hence log E one of 2^-25 / u. Near u = 1 log E is coarse, and such tokens lose
    error = (want.double() - exact).abs()
    assert (error[u < 2.0**-10] < 22 * 2.0**-23).all()
    assert (error[u < 0.5] < 2.0**-14).all()
    assert (u < 2.0**-14).any()


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 12), ({"temperature": 0.5}, 12), ({"top_k": 4}, 4), ({"top_p": 0.8}, 6)],
    ids=str,
)
def test_reference_draws_from_softmax(options: dict[str, Any], kept: int) -> None:
    draws, width = 2000, 12
    logits = torch.linspace(1.5, -1.5, width)
    arguments = settings(draws, torch.device("cpu"), **options)
    tokens = reference.sample(logits.expand(draws, width), **arguments)
    expected = (logits[:kept] / options.get("temperature", 1.0)).softmax(0).double() * draws
    seen = torch.bincount(tokens, minlength=width).double()
    assert not seen[kept:].any()
    chi_square = ((seen[:kept] - expected) ** 2 / expected).sum()
    # 99.9 % quantiles of chi-square with kept - 1 degrees of freedom; the seed is fixed
    assert chi_square < {4: 16.3, 6: 20.5, 12: 31.3}[kept]


FLAT = [0.1, 0.0, 0.1, 0.0, 0.0, -8.0]
# the fp32 number below 1 next to 1
NEXT = [1.0, 1.0 - 2.0**-24, 1.0, 1.0 - 2.0**-24]
# softmax is (0.4, 0.3, 0.2, 0.1); the best two alone are (0.57, 0.43)
STEEP = [-0.9163, -1.2040, -1.6094, -2.3026]
HOLED = [0.0, 0.0, -torch.inf, 0.0]


@pytest.mark.parametrize(
    ("logits", "options", "kept"),
    [
        # ties at a threshold all stay
        (FLAT, {"top_k": 2}, {0, 2}),
        (FLAT, {"top_k": 3}, {0, 1, 2, 3, 4}),
        (FLAT, {"top_p": 0.3}, {0, 2}),
        (FLAT, {"top_p": 0.5}, {0, 1, 2, 3, 4}),
        (NEXT, {"top_k": 1}, {0, 2}),
        (NEXT, {"min_p": 1.0}, {0, 2}),
        # 0 and -0 are one value
        ([0.0, -0.0, 0.0, -1.0], {"top_k": 1}, {0, 1, 2}),
        # top_p counts the mass that the other filters leave
        (STEEP, {"top_p": 0.5}, {0, 1}),
        (STEEP, {"top_p": 0.5, "top_k": 2}, {0}),
        (STEEP, {"min_p": 0.6}, {0, 1}),
        (STEEP, {"min_p": 0.6, "top_k": 3, "top_p": 0.5}, {0}),
        # filters too wide keep all but -inf
        (HOLED, {"top_k": 3}, {0, 1, 3}),
        (HOLED, {"top_k": 2**31 - 1}, {0, 1, 3}),
        (HOLED, {"top_p": 0.999}, {0, 1, 3}),
        (HOLED, {"min_p": 0.5}, {0, 1, 3}),
    ],
    ids=str,
)
def test_filters_keep(
    logits: list[float], options: dict[str, Any], kept: set[int], device: torch.device
) -> None:
    # each of up to 5 near-equal tokens is missed by 48 draws with a probability below 1e-4
    arguments = settings(48, device, **options)
    rows = torch.tensor(logits, device=device).expand(48, -1).contiguous()
    want = reference.sample(rows, **arguments)
    assert set(want.tolist()) == kept
    few = arguments | {name: arguments[name][:4] for name in ("slots", "positions")}
    assert torch.equal(sample(rows[:4], **few), want[:4])


def test_greedy_ties_go_to_the_lower_id(device: torch.device) -> None:
    logits = torch.zeros(2, 5000, device=device)
    logits[0, [4999, 4100, 17]] = 1.0
    assert sample(logits, **settings(2, device, temperature=0.0)).tolist() == [17, 0]


FILTERS = [
    {},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 3, "top_p": 0.7, "min_p": 0.2},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_extreme_logits(options: dict[str, Any], device: torch.device) -> None:
    logits = torch.randn(5, 60, device=device)
    logits[0] = -torch.inf
    logits[0, 41] = -3.0
    logits[1] *= 1e30
    logits[2] = -1e30
    logits[2, 5] = 1e30
    logits[3] = 2.5
    logits[4, 1:] *= 1e-38
    arguments = settings(5, device, **options)
    tokens = sample(logits, **arguments)
    assert torch.equal(tokens, reference.sample(logits, **arguments))
    assert tokens[0] == 41
    assert tokens[2] == 5


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_rows_without_a_distribution_yield_some_token(
    options: dict[str, Any], device: torch.device
) -> None:
    logits = torch.randn(5, 60, device=device)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 7] = torch.nan
    logits[3, 7] = torch.inf
    logits[4] *= 1e38
    arguments = settings(5, device, **({"temperature": 0.1} | options))
    for op in (sample, reference.sample):
        tokens = op(logits, **arguments)
        assert (tokens >= 0).all()
        assert (tokens < 60).all()


def test_dummy_rows_are_harmless(device: torch.device) -> None:
    arguments = settings(2, device)
    arguments["slots"].zero_()
    arguments["top_p"][0] = 0
    logits = torch.tensor([[0.0, 2.0, 1.0], [torch.nan] * 3], device=device)
    assert sample(logits, **arguments)[0] == 1


def test_no_rows(device: torch.device) -> None:
    assert sample(torch.zeros(0, 9, device=device), **settings(0, device)).shape == (0,)


@pytest.mark.gpu
def test_is_captured_and_replayed(device: torch.device) -> None:
    arguments = settings(4, device, temperature=[0.0, 1.0, 1.0, 0.5], top_k=50, top_p=0.9)
    logits = torch.randn(4, 65536, device=device)
    out = sample(logits, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample(logits, **arguments, out=out)
    logits.normal_()
    arguments["positions"] += 1
    graph.replay()
    assert torch.equal(out, sample(logits, **arguments))


@pytest.mark.gpu
def test_rows_beyond_2_31_elements(device: torch.device) -> None:
    rows, width = 2**15 + 2, 2**16
    logits = torch.zeros(rows, width, device=device)
    logits[-2:].normal_()
    arguments = settings(rows, device, temperature=0.8, top_k=20)
    last = arguments | {name: arguments[name][-2:] for name in ("slots", "positions")}
    want = sample(logits[-2:].clone(), **last)
    assert torch.equal(sample(logits, **arguments)[-2:], want)
    ids = torch.full((rows,), 7, dtype=torch.int32, device=device)
    logprobs, ranks = token_logprobs(logits, ids)
    want_logprobs, want_ranks = reference.token_logprobs(logits[-2:], ids[-2:])
    torch.testing.assert_close(logprobs[-2:], want_logprobs, rtol=0, atol=1e-5)
    assert torch.equal(ranks[-2:], want_ranks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(0, 9), (1, 1), (4, 333), (3, 4999)])
def test_token_logprobs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = rounds_apart(4 * torch.randn(rows, width + 3, device=device)).to(dtype)[:, :width]
    ids = torch.randint(0, width, (rows,), dtype=torch.int32, device=device)
    want = reference.token_logprobs(logits, ids)
    out = (torch.full_like(want[0], torch.nan), torch.full_like(want[1], -7))
    got = token_logprobs(logits, ids, out=out)
    assert got[0] is out[0]
    assert got[1] is out[1]
    # a sum of up to 4,999 exponentials in another order, the log of it, and a difference below 32
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-5)
    assert torch.equal(got[1], want[1])
    log_softmax = logits.double().log_softmax(-1).gather(1, ids.long()[:, None])[:, 0]
    torch.testing.assert_close(got[0].double(), log_softmax, rtol=0, atol=1e-5)


def test_token_logprobs_of_masked_logits(device: torch.device) -> None:
    logits = torch.full((3, 5000), -torch.inf, device=device)
    logits[:, 4500] = 100.0
    logits[1, 7] = 100.0
    ids = torch.tensor([4500, 7, 3], dtype=torch.int32, device=device)
    logprobs, ranks = token_logprobs(logits, ids)
    # log(2) is added to 100 and taken off again: half an ulp of 100 is 4e-6
    assert logprobs.tolist() == pytest.approx([0.0, -math.log(2), -torch.inf], abs=8e-6)
    assert ranks.tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 9).half()}, TypeError, "logits is float16, want float32"),
        ({"logits": torch.zeros(9)}, ValueError, r"logits is \[9\], want \[R, V\]"),
        ({"logits": torch.zeros(9, 2).T}, ValueError, "logits has strides"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, ValueError, r"slots is \[3\], want \[2\]"),
        ({"positions": torch.zeros(2).long()}, TypeError, "positions is int64, want int32"),
        ({"top_k": torch.zeros(3)}, TypeError, "top_k is float32, want int32"),
        ({"top_p": torch.zeros(2)}, ValueError, r"top_p is \[2\], want \[3\]"),
        ({"seeds": torch.zeros(3, dtype=torch.int32)}, TypeError, "seeds is int32, want int64"),
        ({"out": torch.zeros(3, dtype=torch.int32)}, ValueError, r"out is \[3\], want \[2\]"),
    ],
)
def test_sample_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 9), **settings(2, torch.device("cpu")), **change}
    with pytest.raises(error, match=f"sample: {message}"):
        sample(**arguments)


def test_token_logprobs_refuses() -> None:
    ids = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"token_logprobs: ids is \[2\], want \[3\]"):
        token_logprobs(torch.zeros(3, 9), ids)
    with pytest.raises(TypeError, match="token_logprobs: ids is int64"):
        token_logprobs(torch.zeros(2, 9), ids.long())
