"""The public LFM2 models' shapes, for what needs a model's size but not its weights."""

from __future__ import annotations

from typing import Any

from lfm2_gpu.config import ModelConfig
from lfm2_gpu.dialects import CONV, FULL_ATTENTION

__all__ = ["PUBLIC_CONFIGS"]

_16_LAYERS = (16, (2, 5, 8, 10, 12, 14))
_30_LAYERS = (30, (2, 5, 9, 13, 17, 21, 24, 27))
_24_LAYERS = (24, (2, 6, 10, 14, 18, 21))
_40_LAYERS = (40, (2, 6, 10, 14, 18, 22, 26, 30, 34, 38))

_IDS_65K: dict[str, Any] = {"bos_token_id": 1, "eos_token_ids": (7,), "pad_token_id": 0}
_IDS_128K: dict[str, Any] = {
    "bos_token_id": 124_894,
    "eos_token_ids": (124_900,),
    "pad_token_id": 124_893,
}
_WIDE: dict[str, Any] = {"vocab_size": 128_000, "rope_theta": 5e6, **_IDS_128K}
_8B: dict[str, Any] = {"num_experts": 32, "moe_intermediate_size": 1792}
_24B: dict[str, Any] = {"num_experts": 64, "moe_intermediate_size": 1536}


def _config(
    hidden: int, layers: tuple[int, tuple[int, ...]], heads: int, ff: int, **fields: Any
) -> ModelConfig:
    count, attention = layers
    experts = "num_experts" in fields
    if experts:
        fields = {"num_experts_per_tok": 4, "num_dense_layers": 2, **fields}
    return ModelConfig(
        architecture="lfm2_moe" if experts else "lfm2",
        hidden_size=hidden,
        num_hidden_layers=count,
        layer_types=tuple(FULL_ATTENTION if i in attention else CONV for i in range(count)),
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=hidden // heads,
        intermediate_size=ff,
        **{"vocab_size": 65_536, **_IDS_65K, **fields},
    )


PUBLIC_CONFIGS: dict[str, ModelConfig] = {
    "LFM2.5-230M": _config(1024, (14, (2, 4, 6, 8, 10, 12)), 16, 2560),
    "LFM2-350M": _config(1024, _16_LAYERS, 16, 4608),
    "LFM2-700M": _config(1536, _16_LAYERS, 24, 6912),
    "LFM2-1.2B": _config(2048, _16_LAYERS, 32, 8192),
    "LFM2-2.6B": _config(2048, _30_LAYERS, 32, 10_752),
    "LFM2-8B-A1B": _config(2048, _24_LAYERS, 32, 7168, **_8B),
    "LFM2-24B-A2B": _config(2048, _40_LAYERS, 32, 11_776, **_24B),
    "LFM2.5-350M": _config(1024, _16_LAYERS, 16, 4608),
    "LFM2.5-1.2B": _config(2048, _16_LAYERS, 32, 8192),
    "LFM2.5-2.6B": _config(2048, _30_LAYERS, 32, 10_752, **{**_WIDE, "rope_theta": 1e7}),
    "LFM2.5-8B-A1B": _config(2048, _24_LAYERS, 32, 7168, **_WIDE, **_8B),
    # its config.json was not public when this was written: inferred from counts of its projections
    "LFM2.5-24B-A2B": _config(2048, _40_LAYERS, 32, 11_776, **_WIDE, **_24B),
}
