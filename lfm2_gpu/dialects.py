"""config.json's dialects, old and new, read into the fields of ModelConfig.

The rules between the keys are those of transformers 5 (``Lfm2Config``, ``Lfm2MoeConfig``). What
says that it is another model is refused here, by name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from lfm2_gpu.errors import ModelFileError

__all__ = [
    "CONV",
    "DEFAULT_THETA",
    "FULL_ATTENTION",
    "RANGES",
    "boolean",
    "integer",
    "number",
    "read_fields",
    "refuse",
]

logger = logging.getLogger(__name__)

CONV = "conv"
FULL_ATTENTION = "full_attention"
DEFAULT_THETA = 1e6

# inclusive; wide enough for any conceivable LFM2, narrow enough to bound every allocation
RANGES = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    # head_dim, taps and experts: what the kernels have; more taps than 4 is LFM3's convolution
    "head_dim": (16, 128),
    "intermediate_size": (1, 2**20),
    "conv_L_cache": (2, 4),
    "max_position_embeddings": (1, 2**24),
    "num_experts": (1, 256),
    "num_experts_per_tok": (1, 256),
    "moe_intermediate_size": (1, 2**20),
    "num_dense_layers": (0, 1024),
}

_ARCHITECTURES = {
    "Lfm2ForCausalLM": "lfm2",
    "LFM2ForCausalLM": "lfm2",
    "Lfm2MoeForCausalLM": "lfm2_moe",
}
_OPTIONAL = ("conv_L_cache", "conv_bias", "norm_eps", "max_position_embeddings")
_OPTIONAL_EXPERT = (
    "num_dense_layers",
    "use_expert_bias",
    "norm_topk_prob",
    "routed_scaling_factor",
)


def read_fields(
    data: Mapping[str, Any], generation_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Keyword arguments of ``ModelConfig`` from a parsed config.json.

    The token ids of ``generation_config`` win over those of ``data``. Fields whose meaning no
    dialect changes are passed on as they are, for ``ModelConfig`` to check.

    Raises:
        ModelFileError: The model is not LFM2, or a key is missing, mistyped or contradicts another.
    """
    architecture = _architecture(data)
    _refuse_other_models(data)
    fields = {
        "architecture": architecture,
        "vocab_size": _required(data, "vocab_size"),
        "hidden_size": _required(data, "hidden_size"),
        "num_hidden_layers": _required(data, "num_hidden_layers"),
        "num_attention_heads": _required(data, "num_attention_heads"),
        "num_key_value_heads": _required(data, "num_key_value_heads"),
        "layer_types": _layer_types(data, architecture),
        "head_dim": _head_dim(data),
        "rope_theta": _rope_theta(data),
        **_present(data, _OPTIONAL),
    }
    if architecture == "lfm2_moe":
        fields.update(_expert_fields(data))
    else:
        fields["intermediate_size"] = _dense_ff_size(data)
    # the legacy key overrides, as in transformers
    for name in ("tie_word_embeddings", "tie_embedding"):
        if data.get(name) is not None:
            fields["tie_word_embeddings"] = data[name]
    dtype = data.get("dtype") or data.get("torch_dtype")
    if dtype is not None:
        fields["dtype"] = str(dtype).removeprefix("torch.")
    ids = {**data, **(generation_config or {})}
    fields.update((k, ids[k]) for k in ("bos_token_id", "pad_token_id") if k in ids)
    if "eos_token_id" in ids:
        fields["eos_token_ids"] = _token_ids(ids["eos_token_id"])
    return fields


def _architecture(data: Mapping[str, Any]) -> str:
    kind, names = data.get("model_type"), data.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        refuse("architectures", names, "a list of names")
    label = f"{names[0] if names else 'the model'} (model_type {kind!r})"
    text = " ".join([str(kind), *names]).lower()
    if "lfm3" in text:
        raise ModelFileError(f"{label} is LFM3, another architecture: only LFM2 is supported")
    if "vl" in text or "vision_config" in data or "text_config" in data:
        raise ModelFileError(f"{label} is a vision-language model: only text LFM2 is supported")
    if any(name in ("Lfm2Model", "Lfm2MoeModel") or "Bidirectional" in name for name in names):
        raise ModelFileError(
            f"{label} is an encoder, without a language-model head: it cannot generate text"
        )
    found = {str(_ARCHITECTURES.get(name, name)) for name in names}
    if kind is not None:
        found.add(str(kind))
    if found not in ({"lfm2"}, {"lfm2_moe"}):
        raise ModelFileError(
            f"architecture is {label[:160]}, want Lfm2ForCausalLM (lfm2) or Lfm2MoeForCausalLM "
            "(lfm2_moe)"
        )
    return found.pop()


def _refuse_other_models(data: Mapping[str, Any]) -> None:
    """Refuse what says it is LFM2 but computes something else."""
    if data.get("is_causal") is False or data.get("use_bidirectional_attention"):
        raise ModelFileError("the model attends both ways (an encoder): it cannot generate text")
    if data.get("sliding_window") is not None:
        refuse("sliding_window", data["sliding_window"], "none: LFM2 attends to its whole context")
    if data.get("hidden_act") not in (None, "silu", "swish"):
        refuse("hidden_act", data["hidden_act"], "silu")


def _head_dim(data: Mapping[str, Any]) -> Any:
    if data.get("head_dim") is not None:
        return data["head_dim"]
    hidden = integer("hidden_size", data["hidden_size"])
    heads = integer("num_attention_heads", data["num_attention_heads"])
    if hidden % heads:
        refuse("hidden_size", hidden, f"a multiple of num_attention_heads ({heads})")
    return hidden // heads


def _expert_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    counts = _present(data, ("num_experts", "num_local_experts"))
    if not counts:
        raise ModelFileError("num_experts is missing")
    if len(counts) == 2 and counts["num_experts"] != counts["num_local_experts"]:
        refuse("num_local_experts", counts["num_local_experts"], f"{counts['num_experts']!r}")
    return {
        "intermediate_size": _required(data, "intermediate_size"),
        "moe_intermediate_size": _required(data, "moe_intermediate_size"),
        "num_experts_per_tok": _required(data, "num_experts_per_tok"),
        "num_experts": next(iter(counts.values())),
        # transformers' default
        "num_dense_layers": 2,
        **_present(data, _OPTIONAL_EXPERT),
    }


def _dense_ff_size(data: Mapping[str, Any]) -> int:
    """Rows of ``w1`` in a dense model. ``int`` cuts where transformers' does."""
    name = "intermediate_size" if data.get("block_ff_dim") is None else "block_ff_dim"
    size = integer(name, _required(data, name), RANGES["intermediate_size"])
    if not boolean("block_auto_adjust_ff_dim", data.get("block_auto_adjust_ff_dim", True)):
        return size
    size = int(2 * size / 3)
    multiplier = data.get("block_ffn_dim_multiplier", 1.0)
    if multiplier is None:
        return size
    size = int(number("block_ffn_dim_multiplier", multiplier, 0, 1000) * size)
    multiple = integer("block_multiple_of", data.get("block_multiple_of", 256), (1, 2**16))
    return multiple * -(-size // multiple)


def _layer_types(data: Mapping[str, Any], architecture: str) -> tuple[str, ...]:
    count = integer("num_hidden_layers", data["num_hidden_layers"])
    indexes, named = data.get("full_attn_idxs"), data.get("layer_types")
    if indexes is None and named is None:
        if architecture == "lfm2_moe":
            raise ModelFileError("layer_types is missing")
        return (FULL_ATTENTION,) * count
    if named is not None:
        if not isinstance(named, list):
            refuse("layer_types", named, "a list of layer kinds")
        kinds = tuple(CONV if kind == "short_conv" else kind for kind in named)
        attention = [i for i, kind in enumerate(kinds) if kind == FULL_ATTENTION]
        if indexes is not None and indexes != attention:
            logger.warning("full_attn_idxs disagrees with layer_types, which is used")
        return kinds
    if not isinstance(indexes, list):
        refuse("full_attn_idxs", indexes, "a list of layer numbers")
    chosen = {integer("full_attn_idxs", index, (0, count - 1)) for index in indexes}
    return tuple(FULL_ATTENTION if i in chosen else CONV for i in range(count))


def _rope_theta(data: Mapping[str, Any]) -> float:
    bases: dict[str, float] = {}
    for key in ("rope_parameters", "rope_scaling"):
        nested = data.get(key)
        if nested is None:
            continue
        if not isinstance(nested, Mapping):
            refuse(key, nested, "an object")
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            refuse(f"{key}.rope_type", kind, "default: RoPE scaling is not supported")
        if nested.get("partial_rotary_factor", 1.0) != 1.0:
            refuse(f"{key}.partial_rotary_factor", nested["partial_rotary_factor"], "1")
        if nested.get("rope_theta") is not None:
            bases[f"{key}.rope_theta"] = nested["rope_theta"]
    bases.update(_present(data, ("rope_theta", "theta")))
    for key, base in bases.items():
        number(key, base, 0, 1e12)
    if len(set(bases.values())) > 1:
        used, *others = (f"{key} {base:g}" for key, base in bases.items())
        logger.warning("%s is used, not %s", used, ", ".join(others))
    return float(next(iter(bases.values()), DEFAULT_THETA))


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(integer("eos_token_id", token, (0, 2**31 - 1)) for token in ids))


def _present(data: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: data[name] for name in names if data.get(name) is not None}


def _required(data: Mapping[str, Any], name: str) -> Any:
    if data.get(name) is None:
        raise ModelFileError(f"{name} is missing")
    return data[name]


def refuse(name: str, value: object, wanted: str) -> NoReturn:
    """Raise a ModelFileError that names a field, what it is and what was wanted."""
    raise ModelFileError(f"{name} is {repr(value)[:80]}, want {wanted}")


def integer(name: str, value: object, bounds: tuple[int, int] | None = None) -> int:
    """Check an integer against inclusive bounds, those of ``RANGES[name]`` by default."""
    low, high = bounds or RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        refuse(name, value, f"an integer in [{low}, {high}]")
    return value


def number(name: str, value: object, low: float, high: float) -> float:
    """Check a finite number in ``(low, high]``."""
    wanted = f"a number in ({low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(name, value, wanted)
    if not math.isfinite(value) or not low < value <= high:
        refuse(name, value, wanted)
    return value


def boolean(name: str, value: object) -> bool:
    """Check true or false."""
    if not isinstance(value, bool):
        refuse(name, value, "true or false")
    return value
