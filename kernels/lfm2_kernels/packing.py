r"""The packed weight layout: 4- and 8-bit codes, with a scale per group, that every kernel reads.

A weight ``[..., N, K]`` (leading dimensions: experts) is multiplied along K, so its rows are packed
along K, in blocks of 64, and one code stands for one weight::

    affine      w = scale * q + bias             q unsigned; MLX, GGUF K-quants
    symmetric   w = scale * (q - 2^(bits - 1))   no bias plane; Q4_0, Q8_0 (stored + 128)
    codebook    w = scale * E2M1[q]              4 bits; mxfp4, nvfp4

``E2M1`` is the 4-bit float of the OCP microscaling formats
(https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf): codes 0 to
7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6, and code q + 8 is the negative of code q.

Bit order. 8 bits: byte k of a row is code k. 4 bits: block b of a row takes bytes 32 b to
32 b + 31, and byte 32 b + j holds code 64 b + j in its low and code 64 b + j + 32 in its high
nibble. A kernel loads 32 bytes, masks and shifts, and has two contiguous halves of K for two dots,
with no shuffle. For example, codes 1, 2, 3 at k = 0, 32, 33 and 0 elsewhere::

    data[0] = 0x21    data[1] = 0x30    data[2:32] = 0

``scales`` and ``biases`` are ``[..., N, K / group]``; group g covers columns g * group on. They are
fp16 or bf16, as the source has them; the 8-bit scales of mxfp4 and nvfp4 become bf16 exactly
(``e8m0_scales``, ``e4m3_scales``). K must be a multiple of 64 and of the group: a ragged last block
would cost every kernel a mask, and no LFM2 has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from . import _checks

__all__ = [
    "E2M1",
    "PackedTensor",
    "QuantLayout",
    "dequantize",
    "e4m3_scales",
    "e8m0_scales",
    "matmul",
    "pack",
    "unpack",
]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_BLOCK_K = 64
_BITS = (4, 8)
_KINDS = ("affine", "symmetric", "codebook")
_GROUPS = (16, 32, 64, 128)
_SCALE_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class QuantLayout:
    """How codes become weights.

    Attributes:
        bits: Bits of a code, 4 or 8.
        kind: The formula, see the module.
        group: Columns that share a scale: 16, 32, 64 or 128.
        scale_dtype: float16 or bfloat16, of scales and biases.
    """

    bits: int
    kind: Literal["affine", "symmetric", "codebook"]
    group: int
    scale_dtype: torch.dtype

    def __post_init__(self) -> None:
        for name, value, wanted in (
            ("bits", self.bits, _BITS),
            ("kind", self.kind, _KINDS),
            ("group", self.group, _GROUPS),
            ("scale_dtype", self.scale_dtype, _SCALE_DTYPES),
        ):
            if value not in wanted:
                options = ", ".join(map(str, wanted))
                raise ValueError(f"QuantLayout: {name} is {value}, want one of {options}")
        if self.kind == "codebook" and self.bits != 4:
            raise ValueError(f"QuantLayout: bits is {self.bits}, want 4 for a codebook")

    @property
    def zero_point(self) -> int:
        """The code of weight zero in the symmetric kind."""
        return 1 << (self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        """Bits in memory per weight, scales and biases included."""
        planes = 2 if self.kind == "affine" else 1
        return self.bits + 16 * planes / self.group


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """A packed weight; made by ``pack``.

    Attributes:
        data: ``[..., N, K * bits / 8]`` uint8, contiguous.
        scales: ``[..., N, K / group]`` in ``layout.scale_dtype``, contiguous.
        biases: Like ``scales`` in the affine kind, else None.
        layout: What the codes mean.
        shape: Of the weight, ``[..., N, K]``.
    """

    data: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor | None
    layout: QuantLayout
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        biases = 0 if self.biases is None else self.biases.nbytes
        return self.data.nbytes + self.scales.nbytes + biases


def pack(
    q: torch.Tensor,
    scales: torch.Tensor,
    biases: torch.Tensor | None = None,
    *,
    layout: QuantLayout,
) -> PackedTensor:
    """Pack one code per weight. Runs where ``q`` lives, and reads its largest value back.

    Args:
        q: ``[..., N, K]`` uint8 codes below ``2 ** layout.bits``.
        scales: ``[..., N, K / group]`` in ``layout.scale_dtype``.
        biases: Like ``scales`` in the affine kind, else None.
        layout: What the codes mean.

    Returns:
        The packed weight; ``unpack`` gives ``q`` back.

    Raises:
        TypeError: A dtype differs from the above.
        ValueError: A shape differs from the above, K is no multiple of 64 and of the group, or a
            code is too large.
    """
    if q.dtype != torch.uint8:
        raise TypeError(f"pack: q is {q.dtype}, want torch.uint8")
    if q.ndim < 2:
        raise ValueError(f"pack: q is {list(q.shape)}, want [..., N, K]")
    *lead, width = q.shape
    unit = max(_BLOCK_K, layout.group)
    if width % unit:
        raise ValueError(f"pack: q is {list(q.shape)}, want a last dimension in steps of {unit}")
    planes = [("scales", scales)]
    if layout.kind == "affine":
        if biases is None:
            raise ValueError("pack: biases is None, want one per scale of an affine layout")
        planes.append(("biases", biases))
    elif biases is not None:
        raise ValueError(f"pack: biases given, want None for a {layout.kind} layout")
    for name, plane in planes:
        shape = (*lead, width // layout.group)
        _checks.check("pack", name, plane, shape, (layout.scale_dtype,), dense=True)
    top = (1 << layout.bits) - 1
    if layout.bits < 8 and q.numel() and int(q.max()) > top:
        raise ValueError(f"pack: q holds {int(q.max())}, want codes of at most {top}")
    if layout.bits == 8:
        data = q.contiguous()
    else:
        low, high = q.unflatten(-1, (-1, 2, _BLOCK_K // 2)).unbind(-2)
        data = (low | (high << 4)).flatten(-2)
    return PackedTensor(data, scales, biases, layout, tuple(q.shape))


def unpack(packed: PackedTensor) -> torch.Tensor:
    """The codes ``[..., N, K]``, uint8, that were packed."""
    if packed.layout.bits == 8:
        return packed.data
    bytes_ = packed.data.unflatten(-1, (-1, _BLOCK_K // 2))
    return torch.stack([bytes_ & 0xF, bytes_ >> 4], dim=-2).flatten(-3)


def dequantize(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight ``[..., N, K]``, computed in fp32 and rounded once, to ``dtype``."""
    layout = packed.layout
    codes = unpack(packed)
    if layout.kind == "codebook":
        values = torch.tensor(E2M1, device=codes.device)[codes.int()]
    elif layout.kind == "symmetric":
        values = codes.float() - layout.zero_point
    else:
        values = codes.float()
    # fp32 holds the product of an 11-bit scale and an 8-bit code exactly
    grouped: torch.Tensor = values.unflatten(-1, (-1, layout.group))
    grouped = grouped * packed.scales.float()[..., None]
    if packed.biases is not None:
        grouped = grouped + packed.biases.float()[..., None]
    return grouped.flatten(-2).to(dtype)


def matmul(x: torch.Tensor, packed: PackedTensor) -> torch.Tensor:
    """``x`` times the transposed weight: what every packed GEMM must equal.

    The weight rounds to ``x.dtype``, products accumulate in fp32 and round once.

    Args:
        x: ``[..., T, K]``, float32, float16 or bfloat16; leading dimensions as the weight's.
        packed: ``[..., N, K]``.

    Returns:
        ``[..., T, N]`` in ``x.dtype``.

    Raises:
        TypeError: ``x`` has another dtype.
        ValueError: ``x`` has another K.
    """
    if x.dtype not in _checks.FLOATS:
        raise TypeError(f"matmul: x is {x.dtype}, want float32, float16 or bfloat16")
    width = packed.shape[-1]
    if x.ndim < 2 or x.shape[-1] != width:
        raise ValueError(f"matmul: x is {list(x.shape)}, want [..., T, {width}]")
    weight = dequantize(packed, x.dtype)
    return torch.matmul(x.float(), weight.float().transpose(-1, -2)).to(x.dtype)


def e8m0_scales(codes: torch.Tensor) -> torch.Tensor:
    """The scales of mxfp4, uint8 exponents: ``2 ** (code - 127)`` in bf16, exact; 255 is NaN."""
    return codes.view(torch.float8_e8m0fnu).to(torch.bfloat16)


def e4m3_scales(codes: torch.Tensor) -> torch.Tensor:
    """The scales of nvfp4, uint8 bits of fp8 e4m3, in bf16, exact."""
    return codes.view(torch.float8_e4m3fn).to(torch.bfloat16)
