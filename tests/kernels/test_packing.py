"""The packed layout: bit order, round trips, the three formulas, exact scales, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_kernels.packing import (
    E2M1,
    PackedTensor,
    QuantLayout,
    dequantize,
    e4m3_scales,
    e8m0_scales,
    matmul,
    pack,
    unpack,
)

BF16 = torch.bfloat16


@st.composite
def packed_weights(draw: st.DrawFn) -> tuple[torch.Tensor, PackedTensor]:
    """Random codes with leading dimensions 0 to 2, and their packed form."""
    bits = draw(st.sampled_from([4, 8]))
    kinds = ["affine", "symmetric"] + (["codebook"] if bits == 4 else [])
    group = draw(st.sampled_from([16, 32, 64, 128]))
    layout = QuantLayout(
        bits, draw(st.sampled_from(kinds)), group, draw(st.sampled_from([torch.float16, BF16]))
    )
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    rows = draw(st.integers(0, 5))
    width = draw(st.integers(1, 3)) * max(64, group)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    q = torch.randint(0, 2**bits, (*lead, rows, width), generator=generator, dtype=torch.uint8)
    planes = torch.randn(2, *lead, rows, width // group, generator=generator)
    scales, biases = planes.to(layout.scale_dtype)
    return q, pack(q, scales, biases if layout.kind == "affine" else None, layout=layout)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(packed_weights())
def test_round_trip(case: tuple[torch.Tensor, PackedTensor]) -> None:
    q, packed = case
    assert torch.equal(unpack(packed), q)
    assert packed.shape == q.shape
    assert packed.data.is_contiguous()
    assert packed.nbytes * 8 == packed.layout.bits_per_weight * q.numel()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(packed_weights())
def test_dequantize_is_the_formula(case: tuple[torch.Tensor, PackedTensor]) -> None:
    q, packed = case
    layout = packed.layout
    column = torch.arange(q.shape[-1])
    scales = packed.scales.double()[..., column // layout.group]
    if layout.kind == "affine":
        assert packed.biases is not None
        want = scales * q + packed.biases.double()[..., column // layout.group]
    elif layout.kind == "symmetric":
        want = scales * (q.double() - {4: 8, 8: 128}[layout.bits])
    else:
        magnitude = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()[(q % 8).long()]
        want = scales * torch.where(q < 8, magnitude, -magnitude)
    # the products are exact, the bias of the affine kind rounds once
    assert torch.equal(dequantize(packed), want.float())
    assert torch.equal(dequantize(packed, BF16), want.float().to(BF16))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(packed_weights(), st.integers(0, 3))
def test_matmul(case: tuple[torch.Tensor, PackedTensor], tokens: int) -> None:
    q, packed = case
    x = torch.linspace(-1, 1, tokens * q.shape[-1]).view(tokens, q.shape[-1])
    for dtype in (torch.float32, torch.float16, BF16):
        weight = dequantize(packed, dtype).double()
        want = x.to(dtype).double() @ weight.mT
        # fp32 sums of at most 384 products below the bound of |x| |w|, then one rounding
        size = x.abs().double() @ weight.abs().mT
        error = (matmul(x.to(dtype), packed).double() - want).abs()
        half_ulp = torch.finfo(dtype).eps / 2
        assert (error <= size * 384 * 2**-24 + want.abs() * half_ulp + 2**-24).all()


def test_bit_order_of_4_bits() -> None:
    q = torch.zeros(1, 128, dtype=torch.uint8)
    q[0, [0, 32, 33]] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    q[0, [64 + 31, 64 + 63]] = torch.tensor([4, 15], dtype=torch.uint8)
    layout = QuantLayout(4, "symmetric", 64, BF16)
    data = pack(q, torch.ones(1, 2, dtype=BF16), layout=layout).data
    want = torch.zeros(1, 64, dtype=torch.uint8)
    want[0, 0], want[0, 1], want[0, 32 + 31] = 0x21, 0x30, 0xF4
    assert torch.equal(data, want)


def test_bit_order_of_8_bits() -> None:
    q = torch.arange(128, dtype=torch.uint8).view(1, 128)
    layout = QuantLayout(8, "symmetric", 128, BF16)
    assert torch.equal(pack(q, torch.ones(1, 1, dtype=BF16), layout=layout).data, q)


def test_codebook_values() -> None:
    q = torch.arange(64, dtype=torch.uint8).view(1, 64) % 16
    layout = QuantLayout(4, "codebook", 32, BF16)
    weight = dequantize(pack(q, torch.tensor([[1.0, -2.0]], dtype=BF16), layout=layout))
    assert weight[0, :16].tolist() == list(E2M1)
    assert weight[0, 32:48].tolist() == [-2 * v for v in E2M1]


def test_a_layer_of_experts_multiplies_expert_by_expert() -> None:
    q = torch.randint(0, 16, (3, 5, 64), dtype=torch.uint8)
    layout = QuantLayout(4, "codebook", 16, BF16)
    scales = torch.rand(3, 5, 4).to(BF16)
    x = torch.randn(3, 2, 64).to(BF16)
    got = matmul(x, pack(q, scales, layout=layout))
    for expert in range(3):
        alone = matmul(x[expert], pack(q[expert], scales[expert], layout=layout))
        assert torch.equal(got[expert], alone)


def test_e8m0_scales_are_exact() -> None:
    codes = torch.arange(256).to(torch.uint8)
    scales = e8m0_scales(codes).double()
    assert scales[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert scales[255].isnan()


def test_e4m3_scales_are_exact() -> None:
    codes = torch.arange(256).to(torch.uint8)
    scales = e4m3_scales(codes).double()
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        if code & 127 == 127:
            assert scales[code].isnan()
        else:
            assert scales[code] == (-value if code >> 7 else value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits is 3, want one of 4, 8"),
        ({"kind": "linear"}, "kind is linear, want one of affine, symmetric, codebook"),
        ({"group": 48}, "group is 48, want one of 16, 32, 64, 128"),
        ({"scale_dtype": torch.float32}, "scale_dtype is torch.float32, want one of torch.float16"),
        ({"bits": 8, "kind": "codebook"}, "bits is 8, want 4 for a codebook"),
    ],
)
def test_layout_refuses(change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"bits": 4, "kind": "affine", "group": 64, "scale_dtype": BF16}
    with pytest.raises(ValueError, match=message):
        QuantLayout(**(fields | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 64)}, TypeError, "q is torch.float32, want torch.uint8"),
        ({"q": torch.zeros(64, dtype=torch.uint8)}, ValueError, r"want \[..., N, K\]"),
        ({"q": torch.zeros(2, 96, dtype=torch.uint8)}, ValueError, "in steps of 64"),
        ({"q": torch.full((2, 64), 16, dtype=torch.uint8)}, ValueError, "q holds 16"),
        ({"scales": torch.zeros(2, 3, dtype=BF16)}, ValueError, r"scales is \[2, 3\], want \[2, 2"),
        ({"scales": torch.zeros(2, 2)}, TypeError, "scales is float32, want bfloat16"),
        ({"biases": None}, ValueError, "biases is None"),
        ({"biases": torch.zeros(2, 1, dtype=BF16)}, ValueError, r"biases is \[2, 1\]"),
        ({"layout": QuantLayout(4, "symmetric", 32, BF16)}, ValueError, "biases given, want None"),
        ({"layout": QuantLayout(4, "affine", 128, BF16)}, ValueError, "in steps of 128"),
    ],
)
def test_pack_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 64, dtype=torch.uint8),
        "scales": torch.zeros(2, 2, dtype=BF16),
        "biases": torch.zeros(2, 2, dtype=BF16),
        "layout": QuantLayout(4, "affine", 32, BF16),
    }
    with pytest.raises(error, match=f"pack: .*{message}"):
        pack(**(arguments | change))


def test_matmul_refuses() -> None:
    layout = QuantLayout(8, "symmetric", 64, BF16)
    packed = pack(
        torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 1, dtype=BF16), layout=layout
    )
    with pytest.raises(ValueError, match=r"matmul: x is \[3, 63\], want \[..., T, 64\]"):
        matmul(torch.zeros(3, 63), packed)
    with pytest.raises(TypeError, match="matmul: x is torch"):
        matmul(torch.zeros(3, 64).double(), packed)
