"""Which tensor of a checkpoint goes where in the model. Names and shapes only: knows no files.

Checkpoints hold q, k, v and w1, w3 apart and the experts one by one (or fused, as transformers 5
can save them); the model holds ``qkv``, ``w13`` and experts stacked. Importing this loads no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from lfm2_gpu.config import ModelConfig
from lfm2_gpu.errors import ModelFileError

if TYPE_CHECKING:
    import torch

__all__ = ["CLASSES", "Placement", "copy_rows", "expected_tensors", "fit_ff_size", "place_tensors"]

logger = logging.getLogger(__name__)

CLASSES = ("embedding", "conv", "attention", "dense_ffn", "experts", "router", "norms")

# text models, bare models, vision-language exports (two spellings), audio
_PREFIXES = ("model.", "", "language_model.model.", "model.language_model.", "lfm.")
_FLOATS = ("BF16", "F16", "F32")
_EMBEDDING = "embed_tokens.weight"
_MOST_PROBLEMS = 8


class Placement(NamedTuple):
    """Where one checkpoint tensor goes.

    Attributes:
        target: The model's parameter.
        kind: Its class, one of ``CLASSES``.
        shape: What the checkpoint must hold.
        row: The parameter's first row that it fills.
        expert: The parameter's first index, if the tensor is one expert of a stack.
    """

    target: str
    kind: str
    shape: tuple[int, ...]
    row: int = 0
    expert: int | None = None


def expected_tensors(
    config: ModelConfig, *, fused_experts: bool = False
) -> Iterator[tuple[str, Placement]]:
    """Every tensor that a checkpoint of ``config`` has: its name without a prefix, its placement.

    ``fused_experts`` is the layout with one stacked tensor per projection. The head of a model with
    an untied one is ``lm_head.weight``.
    """
    h, v = config.hidden_size, config.vocab_size
    yield _EMBEDDING, Placement("embedding", "embedding", (v, h))
    if not config.tie_word_embeddings:
        yield "lm_head.weight", Placement("head", "embedding", (v, h))
    yield "embedding_norm.weight", Placement("norm", "norms", (h,))
    for i, kind in enumerate(config.layer_types):
        mixer = _conv_tensors(config) if kind == "conv" else _attention_tensors(config)
        if config.num_experts and i >= config.num_dense_layers:
            ffn = _expert_tensors(config, fused_experts)
        else:
            ffn = _dense_tensors(config)
        for part, tensors in (("mixer", mixer), ("ffn", ffn)):
            for name, place in tensors:
                target = f"layers.{i}.{part}.{place.target}"
                yield f"layers.{i}.{name}", place._replace(target=target)


def _conv_tensors(config: ModelConfig) -> Iterator[tuple[str, Placement]]:
    h = config.hidden_size
    yield "operator_norm.weight", Placement("norm", "norms", (h,))
    yield "conv.in_proj.weight", Placement("in_proj", "conv", (3 * h, h))
    yield "conv.conv.weight", Placement("conv", "conv", (h, 1, config.conv_L_cache))
    yield "conv.out_proj.weight", Placement("out_proj", "conv", (h, h))
    if config.conv_bias:
        yield "conv.in_proj.bias", Placement("in_bias", "conv", (3 * h,))
        yield "conv.conv.bias", Placement("conv_bias", "conv", (h,))
        yield "conv.out_proj.bias", Placement("out_bias", "conv", (h,))


def _attention_tensors(config: ModelConfig) -> Iterator[tuple[str, Placement]]:
    h, d = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    yield "operator_norm.weight", Placement("norm", "norms", (h,))
    yield "self_attn.q_proj.weight", Placement("qkv", "attention", (q, h))
    yield "self_attn.k_proj.weight", Placement("qkv", "attention", (kv, h), row=q)
    yield "self_attn.v_proj.weight", Placement("qkv", "attention", (kv, h), row=q + kv)
    yield "self_attn.q_layernorm.weight", Placement("q_norm", "norms", (d,))
    yield "self_attn.k_layernorm.weight", Placement("k_norm", "norms", (d,))
    yield "self_attn.out_proj.weight", Placement("out_proj", "attention", (h, q))


def _dense_tensors(config: ModelConfig) -> Iterator[tuple[str, Placement]]:
    h, f = config.hidden_size, config.intermediate_size
    yield "ffn_norm.weight", Placement("norm", "norms", (h,))
    yield "feed_forward.w1.weight", Placement("w13", "dense_ffn", (f, h))
    yield "feed_forward.w3.weight", Placement("w13", "dense_ffn", (f, h), row=f)
    yield "feed_forward.w2.weight", Placement("w2", "dense_ffn", (h, f))


def _expert_tensors(config: ModelConfig, fused: bool) -> Iterator[tuple[str, Placement]]:
    h, m, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    yield "ffn_norm.weight", Placement("norm", "norms", (h,))
    yield "feed_forward.gate.weight", Placement("gate", "router", (experts, h))
    if config.use_expert_bias:
        yield "feed_forward.expert_bias", Placement("expert_bias", "router", (experts,))
    base = "feed_forward.experts"
    if fused:
        yield f"{base}.gate_up_proj", Placement("w13", "experts", (experts, 2 * m, h))
        yield f"{base}.down_proj", Placement("w2", "experts", (experts, h, m))
        return
    for e in range(experts):
        yield f"{base}.{e}.w1.weight", Placement("w13", "experts", (m, h), 0, e)
        yield f"{base}.{e}.w3.weight", Placement("w13", "experts", (m, h), m, e)
        yield f"{base}.{e}.w2.weight", Placement("w2", "experts", (h, m), 0, e)


def place_tensors(
    config: ModelConfig, tensors: Mapping[str, tuple[str, tuple[int, ...]]], source: str
) -> dict[str, Placement]:
    """Match a checkpoint's tensors with the model's parameters, each exactly once.

    Args:
        config: The model's shape.
        tensors: dtype name and shape of each tensor, by its name in the checkpoint.
        source: Named at the head of the error.

    Returns:
        A placement for each tensor, by name, in the order of ``tensors``. ``lm_head.weight`` has
        none in a model with tied embeddings.

    Raises:
        ModelFileError: Tensors are missing, left over, mis-shaped or not floating point; the
            message names them, what they are and what was wanted.
    """
    prefix = _prefix(tensors, source)
    fused = any(name.endswith(".experts.gate_up_proj") for name in tensors)
    wanted = {
        name if name == "lm_head.weight" else prefix + name: place
        for name, place in expected_tensors(config, fused_experts=fused)
    }
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    placed: dict[str, Placement] = {}
    for name, (dtype, shape) in tensors.items():
        if name not in wanted:
            if name != "lm_head.weight":
                problems.append(f"{name} {list(shape)} is not part of the model")
        elif tuple(shape) != wanted[name].shape:
            problems.append(f"{name} is {list(shape)}, want {list(wanted[name].shape)}")
        elif dtype not in _FLOATS:
            problems.append(f"{name} is {dtype}, want {', '.join(_FLOATS)}")
        else:
            placed[name] = wanted[name]
    if problems:
        shown = "; ".join(problems[:_MOST_PROBLEMS])
        more = len(problems) - _MOST_PROBLEMS
        raise ModelFileError(f"{source}: {shown}" + (f"; and {more} more" if more > 0 else ""))
    return placed


def fit_ff_size(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """``config`` with the dense FFN size that the tensors have, if they agree on one.

    Some repacked dense checkpoints state a size that transformers' adjustment turns into another
    one than their tensors have; the tensors are right. MoE checkpoints state it literally.
    """
    if config.num_experts:
        return config
    sizes = {shape[0] for name, shape in shapes.items() if name.endswith("feed_forward.w1.weight")}
    if len(sizes) != 1 or sizes == {config.intermediate_size}:
        return config
    size = sizes.pop()
    logger.warning(
        "the config's FFN size is %d, the tensors' %d, which is used",
        config.intermediate_size,
        size,
    )
    return replace(config, intermediate_size=size)


def copy_rows(
    parameter: torch.Tensor, placement: Placement, start: int, rows: torch.Tensor
) -> None:
    """Copy rows ``start : start + len(rows)`` of a checkpoint tensor into its parameter."""
    target = parameter if placement.expert is None else parameter[placement.expert]
    first = placement.row + start
    part = target[first : first + rows.shape[0]]
    # [H, 1, L] of a depthwise convolution is [H, L] here
    part.copy_(rows.view(part.shape))


def _prefix(names: Iterable[str], source: str) -> str:
    found = [prefix for prefix in _PREFIXES if prefix + _EMBEDDING in names]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelFileError(f"{source}: model.{_EMBEDDING} is missing")
    both = " and ".join(prefix + _EMBEDDING for prefix in found)
    raise ModelFileError(f"{source}: {both} are the same tensor twice")
