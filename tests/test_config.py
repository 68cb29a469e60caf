"""ModelConfig: every dialect of config.json, the public sizes, and every refusal by name."""

from __future__ import annotations

import json
import os
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from lfm2_gpu.config import ModelConfig
from lfm2_gpu.errors import ModelFileError
from lfm2_gpu.files import read_json
from lfm2_gpu.model.weights import expected_tensors
from lfm2_gpu.model_table import PUBLIC_CONFIGS

DENSE: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "vocab_size": 65536,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 12288,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
}
MOE: dict[str, Any] = {
    **DENSE,
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "num_hidden_layers": 24,
    "layer_types": ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_experts": 32,
    "num_experts_per_tok": 4,
}


def without(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in names}


# the parameters that the vendor's files hold, and those that one token touches
PARAMETERS = {
    "LFM2.5-230M": (229_693_184, 229_693_184),
    "LFM2-350M": (354_483_968, 354_483_968),
    "LFM2.5-350M": (354_483_968, 354_483_968),
    "LFM2-700M": (742_489_344, 742_489_344),
    "LFM2-1.2B": (1_170_340_608, 1_170_340_608),
    "LFM2.5-1.2B": (1_170_340_608, 1_170_340_608),
    "LFM2-2.6B": (2_569_272_320, 2_569_272_320),
    "LFM2.5-2.6B": (2_697_198_592, 2_697_198_592),
    "LFM2-8B-A1B": (8_339_930_560, 1_557_740_992),
    "LFM2.5-8B-A1B": (8_467_856_832, 1_685_667_264),
    "LFM2-24B-A2B": (23_843_661_440, 2_326_881_920),
    "LFM2.5-24B-A2B": (23_971_587_712, 2_454_808_192),
}


@pytest.mark.parametrize("name", PUBLIC_CONFIGS)
def test_public_sizes(name: str) -> None:
    config = PUBLIC_CONFIGS[name]
    assert (config.num_parameters, config.num_active_parameters) == PARAMETERS[name]
    stored = 0
    for _, place in expected_tensors(config):
        elements = 1
        for size in place.shape:
            elements *= size
        stored += elements
    assert stored == config.num_parameters


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("LFM2.5-230M", 132),
        ("LFM2-1.2B", 148),
        ("LFM2-2.6B", 266),
        ("LFM2-8B-A1B", 2302),
        ("LFM2-24B-A2B", 7610),
    ],
)
def test_tensor_counts_of_the_published_files(name: str, tensors: int) -> None:
    assert len(list(expected_tensors(PUBLIC_CONFIGS[name]))) == tensors


def test_published_dense_config_is_the_table_entry() -> None:
    data = {**DENSE, "eos_token_id": 7, "bos_token_id": 1, "pad_token_id": 0}
    assert ModelConfig.from_dict(data) == PUBLIC_CONFIGS["LFM2-1.2B"]


def test_published_moe_config_is_the_table_entry() -> None:
    assert ModelConfig.from_dict({**MOE, "eos_token_id": 7}) == PUBLIC_CONFIGS["LFM2-8B-A1B"]


@pytest.mark.parametrize(
    ("name", "length"),
    [("LFM2-24B-A2B", 32768), ("LFM2.5-230M", 32768), ("LFM2.5-8B-A1B", 128_000)],
)
def test_context_is_the_vendors(name: str, length: int) -> None:
    assert PUBLIC_CONFIGS[name].default_max_model_len == length


def test_context_is_never_more_than_positions() -> None:
    config = replace(PUBLIC_CONFIGS["LFM2-350M"], max_position_embeddings=4096)
    assert config.default_max_model_len == 4096


def test_state_sizes() -> None:
    config = PUBLIC_CONFIGS["LFM2-24B-A2B"]
    assert (config.num_conv_layers, config.num_attention_layers) == (30, 10)
    assert config.kv_bytes_per_token(2) == 20 * 1024


@pytest.mark.parametrize(
    ("changes", "ff"),
    [
        ({}, 8192),
        ({"intermediate_size": 6656}, 4608),
        ({"intermediate_size": 10240}, 6912),
        ({"intermediate_size": 10752, "block_auto_adjust_ff_dim": False}, 10752),
        ({"block_ff_dim": 6656}, 4608),
        ({"block_ff_dim": None}, 8192),
        ({"block_ffn_dim_multiplier": None, "intermediate_size": 1000}, 666),
        ({"block_ffn_dim_multiplier": 0.5}, 4096),
        ({"block_multiple_of": 1000}, 9000),
    ],
)
def test_dense_ff_size(changes: dict[str, Any], ff: int) -> None:
    assert ModelConfig.from_dict({**DENSE, **changes}).intermediate_size == ff


def test_moe_ff_size_is_literal() -> None:
    config = ModelConfig.from_dict({**MOE, "block_ff_dim": 6656})
    assert config.intermediate_size == 7168


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_parameters": {"rope_theta": 5e6}}, 5e6),
        ({"rope_parameters": None, "rope_theta": 10000}, 10000.0),
        ({"rope_parameters": None, "rope_scaling": None, "theta": 1e4}, 1e4),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e5}, 1e5),
        ({"rope_parameters": None}, 1e6),
    ],
)
def test_rope_dialects(changes: dict[str, Any], theta: float) -> None:
    assert ModelConfig.from_dict({**DENSE, **changes}).rope_theta == theta


def test_nested_rope_base_wins_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    data = {**DENSE, "rope_parameters": {"rope_theta": 5e6}, "rope_theta": 1e6}
    assert ModelConfig.from_dict(data).rope_theta == 5e6
    assert "rope_parameters.rope_theta 5e+06 is used, not rope_theta 1e+06" in caplog.text


def test_equal_rope_bases_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ModelConfig.from_dict({**DENSE, "rope_theta": 1_000_000})
    assert caplog.text == ""


def test_layer_dialects() -> None:
    wanted = ModelConfig.from_dict(DENSE).layer_types
    attention = [2, 5, 8, 10, 12, 14]
    by_index = {**without(DENSE, "layer_types"), "full_attn_idxs": attention}
    short = [kind.replace("conv", "short_conv") for kind in DENSE["layer_types"]]
    assert ModelConfig.from_dict(by_index).layer_types == wanted
    assert ModelConfig.from_dict({**DENSE, "layer_types": short}).layer_types == wanted
    alone = ModelConfig.from_dict(without(DENSE, "layer_types"))
    assert alone.layer_types == ("full_attention",) * 16


def test_layer_types_win_over_indexes(caplog: pytest.LogCaptureFixture) -> None:
    config = ModelConfig.from_dict({**DENSE, "full_attn_idxs": [0]})
    assert config.layer_types == tuple(DENSE["layer_types"])
    assert "full_attn_idxs disagrees" in caplog.text


def test_other_dialects() -> None:
    config = ModelConfig.from_dict(
        {
            **without(MOE, "num_experts"),
            "num_local_experts": 32,
            "tie_embedding": False,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
            "block_norm_eps": 1.0,
            "conv_dim": 7,
            "unsloth_version": "x",
        }
    )
    assert (config.num_experts, config.num_dense_layers) == (32, 2)
    assert config.tie_word_embeddings is False
    assert (config.dtype, config.norm_eps) == ("float16", 1e-5)
    assert ModelConfig.from_dict({**DENSE, "dtype": "torch.float32"}).dtype == "float32"
    assert ModelConfig.from_dict(without(DENSE, "architectures")).architecture == "lfm2"
    assert ModelConfig.from_dict(without(DENSE, "model_type")).architecture == "lfm2"


def test_explicit_head_dim_needs_no_divisible_hidden_size() -> None:
    config = ModelConfig.from_dict(
        {**DENSE, "hidden_size": 100, "num_attention_heads": 3, "num_key_value_heads": 1}
        | {"head_dim": 32}
    )
    assert config.head_dim == 32


def test_token_ids() -> None:
    assert ModelConfig.from_dict(DENSE).eos_token_ids == (2,)
    many = ModelConfig.from_dict({**DENSE, "eos_token_id": [7, 2, 7]})
    assert many.eos_token_ids == (7, 2)
    generation = {"eos_token_id": 7, "bos_token_id": 3, "temperature": 0.3}
    config = ModelConfig.from_dict(
        {**DENSE, "eos_token_id": 2, "pad_token_id": 5}, generation_config=generation
    )
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((7,), 3, 5)
    none = ModelConfig.from_dict({**DENSE, "eos_token_id": None, "bos_token_id": None})
    assert (none.eos_token_ids, none.bos_token_id) == ((), None)


def test_from_file_reads_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert ModelConfig.from_file(tmp_path).eos_token_ids == (7, 9)
    assert ModelConfig.from_file(str(tmp_path / "config.json")).eos_token_ids == (7, 9)


def test_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PUBLIC_CONFIGS["LFM2-350M"].hidden_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Lfm3ForCausalLM"], "model_type": "lfm3"}, "is LFM3, another"),
        ({"architectures": ["Lfm2VlForConditionalGeneration"]}, "vision-language"),
        ({"model_type": "lfm2-vl", "architectures": None}, "vision-language"),
        ({"vision_config": {}}, "vision-language"),
        ({"architectures": ["Lfm2Model"]}, "Lfm2Model .* encoder"),
        ({"architectures": ["Lfm2BidirectionalModel"]}, "encoder"),
        ({"is_causal": False}, "both ways"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM"),
        ({"architectures": ["Lfm2MoeForCausalLM"]}, "architecture is"),
        ({"architectures": [3]}, "architectures"),
        ({"architectures": None, "model_type": None}, "architecture is"),
        ({"sliding_window": 512}, "sliding_window is 512"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', want silu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_type is 'yarn', want default"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": 3}, "rope_parameters is 3"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"hidden_size": 0}, r"hidden_size is 0, want an integer in \[1, 65536\]"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        ({"hidden_size": "1024"}, "hidden_size is '1024'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 2050}, r"hidden_size is 2050, want a multiple of num_attention_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 15}, r"layer_types has 16 entries, want num_hidden_layers \(15\)"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 5}, r"num_attention_heads is 32, want a multiple of"),
        ({"head_dim": 63}, "head_dim is 63, want an even number"),
        ({"head_dim": 1024}, "head_dim is 1024"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"intermediate_size": 2.5}, "intermediate_size is 2.5"),
        ({"intermediate_size": 1, "block_multiple_of": 0}, "block_multiple_of is 0"),
        ({"block_ff_dim": -4}, "block_ff_dim is -4"),
        ({"block_auto_adjust_ff_dim": 1}, "block_auto_adjust_ff_dim is 1"),
        ({"block_ffn_dim_multiplier": float("inf")}, "block_ffn_dim_multiplier is inf"),
        ({"layer_types": ["conv"] * 15 + ["mamba"]}, r"layer_types\[15\] is 'mamba'"),
        ({"layer_types": "conv"}, "layer_types is 'conv'"),
        ({"layer_types": None, "full_attn_idxs": [16]}, "full_attn_idxs is 16"),
        ({"layer_types": None, "full_attn_idxs": 3}, "full_attn_idxs is 3"),
        ({"conv_L_cache": 7}, r"conv_L_cache is 7, want an integer in \[2, 4\]"),
        ({"conv_L_cache": 0}, "conv_L_cache is 0"),
        ({"conv_bias": "no"}, "conv_bias is 'no'"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"norm_eps": "1e-5"}, "norm_eps is '1e-5'"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"tie_word_embeddings": 3}, "tie_word_embeddings is 3"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"eos_token_id": 65536}, "eos_token_id is 65536"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=f"config.json: .*{message}"):
        ModelConfig.from_dict({**DENSE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": None}, "num_experts is missing"),
        ({"num_local_experts": 8}, "num_local_experts is 8, want 32"),
        ({"num_experts_per_tok": 33}, r"num_experts_per_tok is 33, want at most num_experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_dense_layers": 25}, r"num_dense_layers is 25, want at most num_hidden_layers"),
        ({"num_dense_layers": -1}, "num_dense_layers is -1"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
        ({"use_expert_bias": 1}, "use_expert_bias is 1"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
        ({"layer_types": None}, "layer_types is missing"),
    ],
)
def test_moe_refusals_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        ModelConfig.from_dict({**MOE, **changes})


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
    ],
)
def test_missing_fields_are_named(name: str) -> None:
    with pytest.raises(ModelFileError, match=f"my.json: {name} is missing"):
        ModelConfig.from_dict(without(DENSE, name), source="my.json")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is not JSON"),
        (b"[]", "is list, want a JSON object"),
        (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
        (b'{"a": NaN}', "holds NaN"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b" " * (2**20 + 1), "is over 1048576 bytes"),
    ],
)
def test_json_is_read_strictly(tmp_path: Path, raw: bytes, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(raw)
    with pytest.raises(ModelFileError, match=f"config.json: {message}"):
        read_json(file)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ModelFileError, match="not a regular file"):
            read_json(tmp_path / name)
    with pytest.raises(ModelFileError, match="cannot be opened: No such file"):
        read_json(tmp_path / "absent")
