"""ModelConfig: the shape of an LFM2 model, frozen and checked once, before any allocation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_gpu.dialects import (
    CONV,
    DEFAULT_THETA,
    FULL_ATTENTION,
    RANGES,
    boolean,
    integer,
    number,
    read_fields,
    refuse,
)
from lfm2_gpu.errors import ModelFileError
from lfm2_gpu.files import read_json

__all__ = ["ModelConfig"]

_DTYPES = ("bfloat16", "float16", "float32")
_EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_dense_layers")
_BOOLEANS = ("conv_bias", "tie_word_embeddings", "use_expert_bias", "norm_topk_prob")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one LFM2 or LFM2-MoE model. Every instance has passed every check.

    Attributes:
        architecture: ``lfm2`` or ``lfm2_moe``.
        layer_types: ``conv`` or ``full_attention``, one per layer.
        intermediate_size: Rows of the dense ``w1``: the real number, after LFM2's adjustment.
        conv_L_cache: Taps of the short convolution, the current token's included.
        num_experts: 0 for a dense model, whose other expert fields mean nothing.
        num_dense_layers: The first layers of an MoE model, which use a dense FFN.
        dtype: What the weights were saved in.
        eos_token_ids: May be empty: then only other stop conditions end a text.

    Raises:
        ModelFileError: A field is out of range or contradicts another; the message names it.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    conv_L_cache: int = 3
    conv_bias: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = DEFAULT_THETA
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 128_000
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    num_dense_layers: int = 0
    use_expert_bias: bool = True
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    dtype: str = "bfloat16"
    bos_token_id: int | None = 1
    # what transformers' class assumes; checkpoints carry their own
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        moe = self.architecture == "lfm2_moe"
        if not moe and self.architecture != "lfm2":
            refuse("architecture", self.architecture, "lfm2 or lfm2_moe")
        for name in RANGES:
            if moe or name not in _EXPERT_FIELDS:
                integer(name, getattr(self, name))
        if not moe and self.num_experts != 0:
            refuse("num_experts", self.num_experts, "0 in a dense model (lfm2)")
        for name in _BOOLEANS:
            boolean(name, getattr(self, name))
        number("norm_eps", self.norm_eps, 0, 1)
        number("rope_theta", self.rope_theta, 0, 1e12)
        number("routed_scaling_factor", self.routed_scaling_factor, 0, 1e6)
        if self.dtype not in _DTYPES:
            refuse("dtype", self.dtype, f"one of {', '.join(_DTYPES)}")
        self._check_contradictions()
        tokens = (0, self.vocab_size - 1)
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), tokens)
        for token in self.eos_token_ids:
            integer("eos_token_id", token, tokens)

    def _check_contradictions(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            refuse("num_attention_heads", heads, f"a multiple of num_key_value_heads ({kv_heads})")
        if self.num_attention_heads // self.num_key_value_heads > 8:
            refuse(
                "num_attention_heads",
                self.num_attention_heads,
                f"at most 8 for each of the {self.num_key_value_heads} num_key_value_heads",
            )
        if self.head_dim % 2:
            refuse("head_dim", self.head_dim, "an even number, since RoPE turns pairs")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ModelFileError(
                f"layer_types has {len(self.layer_types)} entries, want num_hidden_layers "
                f"({self.num_hidden_layers})"
            )
        for i, kind in enumerate(self.layer_types):
            if kind not in (CONV, FULL_ATTENTION):
                refuse(f"layer_types[{i}]", kind, f"{CONV} or {FULL_ATTENTION}")
        for name, limit in (
            ("num_experts_per_tok", "num_experts"),
            ("num_dense_layers", "num_hidden_layers"),
        ):
            if getattr(self, name) > getattr(self, limit):
                most = getattr(self, limit)
                refuse(name, getattr(self, name), f"at most {limit} ({most})")

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        *,
        generation_config: Mapping[str, Any] | None = None,
        source: str = "config.json",
    ) -> ModelConfig:
        """Read a parsed config.json, in any dialect.

        Args:
            data: The parsed file. Keys without a meaning for inference are ignored.
            generation_config: The parsed generation_config.json, whose token ids win, as in
                transformers.
            source: Named at the head of every error.

        Raises:
            ModelFileError: The architecture is not LFM2's, or a field is missing, mistyped, out of
                range or in contradiction to another.
        """
        try:
            return cls(**read_fields(data, generation_config))
        except ModelFileError as error:
            raise ModelFileError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Read a checkpoint directory, or a config.json and the generation_config.json beside it.

        Raises:
            ModelFileError: As ``from_dict``; also when the file is missing or is not JSON.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        generation = file.with_name("generation_config.json")
        return cls.from_dict(
            read_json(file),
            generation_config=read_json(generation) if generation.exists() else None,
            source=str(file),
        )

    @property
    def num_attention_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.layer_types.count(FULL_ATTENTION)

    @property
    def num_conv_layers(self) -> int:
        """Layers that keep a ring of conv inputs."""
        return self.layer_types.count(CONV)

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied head counts once, expert biases count."""
        h, moe_layers = self.hidden_size, self._num_moe_layers
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        conv = 4 * h * h + self.conv_L_cache * h + (5 * h if self.conv_bias else 0)
        attention = 2 * h * q + 2 * h * kv + 2 * self.head_dim
        dense = 3 * h * self.intermediate_size
        router = self.num_experts * (h + self.use_expert_bias)
        return (
            self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
            + h
            + self.num_hidden_layers * 2 * h
            + self.num_conv_layers * conv
            + self.num_attention_layers * attention
            + (self.num_hidden_layers - moe_layers) * dense
            + moe_layers * (router + self.num_experts * self._expert_parameters)
        )

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token touches: the idle experts are left out."""
        idle = self.num_experts - self.num_experts_per_tok
        return self.num_parameters - self._num_moe_layers * idle * self._expert_parameters

    @property
    def default_max_model_len(self) -> int:
        """The context that the vendor states for this model, in tokens.

        32,768 for the LFM2 generation. The 128K class, known by its wider vocabulary or RoPE base,
        goes as far as its config allows.
        """
        wide = self.vocab_size >= 100_000 or self.rope_theta > DEFAULT_THETA
        return min(131_072 if wide else 32_768, self.max_position_embeddings)

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values that one token adds, over all attention layers."""
        heads = 2 * self.num_key_value_heads * self.num_attention_layers
        return heads * self.head_dim * dtype_bytes

    @property
    def _num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def _expert_parameters(self) -> int:
        return 3 * self.moe_intermediate_size * self.hidden_size
